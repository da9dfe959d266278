# Never built: where this was written there was no docker. It was linted (hadolint 2.15), and tests look for its files.
#
#   docker build -t atesd .                                   # CPU
#   docker build -t atesd:cuda --build-arg DEVICE=cuda .      # CUDA: torch's own wheels; the host brings the driver
#   docker run --rm -v "$PWD/runs:/home/atesd/runs" atesd train pico --out runs/pico
#   docker run --rm --gpus all --shm-size 8g -v "$PWD/runs:/home/atesd/runs" -v "$HOME/.cache/huggingface:/cache" atesd:cuda \
#     train qwen3-1.7b-opsd --out runs/opsd
#
# A vLLM server has an environment of its own (vllm/vllm-openai is an image of it): docs/topology.md.
FROM python:3.11-slim-bookworm

ARG DEVICE=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HOME=/cache
WORKDIR /opt/atesd

# First what changes least: torch. The constraint torch==X is met by X+cpu of PyTorch's index, which pip prefers to X.
COPY constraints.txt ./
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN case "$DEVICE" in \
      cpu) extra=(--extra-index-url https://download.pytorch.org/whl/cpu) ;; \
      cuda) extra=() ;; \
      *) echo "DEVICE=$DEVICE: cpu or cuda" >&2; exit 1 ;; \
    esac; \
    pip install -c constraints.txt "${extra[@]}" torch numpy

# src/atesd/recipes is a link to recipes.
COPY pyproject.toml README.md LICENSE ./
COPY recipes recipes
COPY src src
RUN pip install -c constraints.txt ".[tensorboard,gym,smollm2]"

RUN useradd --create-home atesd && mkdir -p /home/atesd/runs /cache && chown -R atesd /home/atesd/runs /cache
USER atesd
WORKDIR /home/atesd
ENTRYPOINT ["atesd"]
CMD ["--help"]
