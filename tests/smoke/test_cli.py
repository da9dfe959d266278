"""The commands as a user types them: exit codes, messages, files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from atesd.cli import jobs
from atesd.cli.main import main
from atesd.facts import RunFacts
from atesd.recipe import load_config
from atesd.runlog import RunDir
from atesd.train import checkpoint
from atesd.train.model import resolve

from support.fake_vllm import FakeVllm
from support.folders import write_byte_model, write_qwen3

ROOT = Path(__file__).parents[2]
PICO = str(ROOT / "recipes" / "pico.toml")
SMALL = [
    "task.train_size=8",
    "task.probe_size=2",
    "task.eval_size=2",
    "step.num_steps=2",
    "step.problems=2",
    "eval.k=2",
    "save.every=1",
    "save.rollouts_every=1",
]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command in process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["atesd", *arguments])
    try:
        main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def rows(path: Path) -> list[dict[str, Any]]:
    """Return the whole rows of a JSON Lines file that may not exist yet, or be written just now."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.is_file() else []


def wait_until(true: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    """Wait for something that a process does."""
    deadline = time.monotonic() + 600
    while not true():
        assert time.monotonic() < deadline, "never came true"
        assert process.poll() is None, "it ended before"
        time.sleep(0.02)


@pytest.fixture
def served() -> Iterator[Callable[[Path], FakeVllm]]:
    """Return what serves a folder's model as vLLM does."""
    with ExitStack() as stack:
        yield lambda folder: stack.enter_context(FakeVllm(folder=folder, max_length=4096))


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_trains_two_steps(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    out = tmp_path / "run"
    small = SMALL
    if "[flow]" in recipe.read_text():
        trains_two_steps_of_a_flow(recipe, out, monkeypatch, capsys)
        return
    if "runs/cliff/base" in recipe.read_text():
        small = [*SMALL, 'model.path="pico"', "step.updates_per_batch=2"]  # the base that repro/cliff_base.py writes
    elif "Qwen/Qwen3" in recipe.read_text():
        small = [*real_model_made_small(tmp_path), f"model.path={write_qwen3(tmp_path / 'qwen3')}"]
    elif recipe.stem.startswith("smollm2-cpu"):  # generated problems, which need no file
        small = [*SMALL, f"model.path={write_byte_model(tmp_path / 'model')}", "rollout.max_new_tokens=8"]
    elif recipe.stem == "smollm2-textworld":
        pytest.importorskip("textworld")
        small = [*SMALL, f"model.path={write_byte_model(tmp_path / 'model')}", f"task.folder={tmp_path / 'games'}"]
    elif 'path = "pico' not in recipe.read_text():
        small = real_model_made_small(tmp_path)
    if recipe.stem == "smollm2-vllm":
        folder = Path(next(each for each in small if each.startswith("model.path=")).partition("=")[2])
        fake = request.getfixturevalue("served")(folder)
        small = [*small, f"rollout.engine.url={fake.url}"]
    assert run(monkeypatch, "train", str(recipe), *small, "--out", str(out)) == 0
    text = capsys.readouterr().out
    assert "step 2/2" in text
    assert "avg@2" in text
    assert [row["step"] for row in rows(out / "metrics.jsonl")] == [0, 1, 2]
    both = [row for step in (1, 2) for row in rows(out / "rollouts" / f"step_{step:06d}.jsonl")]
    row = [row for row in both if "divergence" in row][-1]  # a step whose rewards agree in every group trains nothing
    assert len(row["tokens"]) == len(row["divergence"]) == len(row["gate"])
    if "distil" in row["components"]:
        assert row["hint"] in row["teacher_prompt"]
        assert row["hint"] not in row["student_prompt"]
    else:
        assert row["teacher_prompt"] == row["hint"] == "", "no teacher read it"
    assert json.loads((out / "result.json").read_text())["step"] == 2
    assert run(monkeypatch, "eval", str(out), "--which", "best", "--problems", "1") == 0, "adapters load, too"


def trains_two_steps_of_a_flow(
    recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train, extend, report: what a flow's recipe is served by."""
    if recipe.stem.startswith("digits"):
        pytest.importorskip("sklearn")
    small = ["flow.warm_steps=3", "step.num_steps=2", "step.problems=2", "eval.problems=4", "save.every=1"]
    assert run(monkeypatch, "train", str(recipe), *small, "--out", str(out)) == 0
    text = capsys.readouterr().out
    assert "step 2/2" in text
    assert "avg@" in text
    assert "distance" in text
    assert [row["step"] for row in rows(out / "metrics.jsonl")] == [0, 1, 2]
    assert json.loads((out / "result.json").read_text())["step"] == 2
    assert run(monkeypatch, "report", str(out)) == 0
    page = (out / "report.html").read_text()
    assert "What the student makes of the same noise before training and at the last evaluation." in page
    assert "Qwen3" not in page.partition("<pre>")[0].rpartition("<body")[2]
    assert run(monkeypatch, "export", str(out), "--out", str(out.with_name("exported"))) == 2
    assert "has no texts and no language model" in capsys.readouterr().err


def real_model_made_small(folder: Path) -> list[str]:
    """Return overrides that put a tiny model and a small file of problems in place of the recipe's."""
    problems = [
        {"problem": f"Add {n} and 1.", "solution": f"Start at {n}.\nOne more.\n\\boxed{{{n + 1}}}"} for n in range(8)
    ]
    path = folder / "problems.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    sizes = ["task.probe_size=2", "task.eval_size=2", "rollout.max_new_tokens=8", *SMALL[3:]]
    return [f"model.path={write_byte_model(folder / 'model')}", f"task.path={path}", *sizes]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", PICO, "exposur.ratio=1"], "unknown key 'exposur': did you mean 'exposure'?"),
        (["train", PICO, "loss.clipp=token"], "unknown key 'loss.clipp': did you mean 'clip'?"),
        (["train", PICO, 'exposure={kind="fixed", ratio=1.5}'], "less than or equal to 1 (given: 1.5)"),
        (["train", PICO, 'exposure={kind="fixed", hold=3}'], "unknown key 'exposure.fixed.hold'"),
        (["train", PICO, "step.problems"], "not of the form section.key=value"),
        (["train", PICO, "step.updates_per_batch=3"], "choose a divisor"),
        (["train", PICO, "teacher.ema_decay=0.9"], "has no effect"),
        (["train", "nothing.toml"], "recipe nothing.toml cannot be read"),
        (["train"], "nothing to train"),
        (["train", "--resume", "nowhere"], "not a run directory"),
        (["show", PICO, "--ratio", "1.5"], "1.5"),
        (["show", PICO, "model.path=not/a/model"], "'not/a/model' is neither a folder here nor an id on the hub"),
        (["train", PICO, "model.path=not/a/model", "--out", "OUT"], "'not/a/model' is neither a folder here"),
        (["trian", PICO], "Did you mean 'train'? (atesd --help)"),
        (["train", PICO, "--outt", "x"], "No such option: --outt"),
        (["compare"], "Missing argument 'recipe' (atesd compare --help)"),
        (["compare", PICO, "--seeds", "0"], "greater than or equal to 1"),
        (["compare", PICO, "seed=3"], "give --first-seed"),
        (["compare", PICO, "--out", "."], "holds no comparison"),
        (["eval", "nowhere", "--which", "best"], "leave it out"),
        (["train", PICO, "--resume", "nowhere"], "give neither a recipe"),
        (["train", "step.num_steps=9", "--resume", "nowhere"], "not a run directory"),
        (["train", "pcio"], "did you mean 'pico'? give the path of a TOML file, or one of digits-atesd, pico"),
        (["train", "elsewhere/pico.toml"], "but 'pico' is packaged: name it so"),
        (["recipes", "--out", "file"], "--out copies one recipe: name it"),
        (["recipes", "pico", "--out", "file"], "file already exists and is left as it is"),
        (["recipes", "pcio"], "did you mean 'pico'?"),
        (["train", PICO, "--out", "file"], "file is no folder and is left as it is"),
        (["report", "file"], "file is no directory"),
        (["compare", PICO, "--arms", "full,hlaf"], "unknown arm 'hlaf': did you mean 'half'? the recipe"),
        (["compare", PICO, "--arms", ""], "--arms names no arm: the recipe and the built-in arms are none"),
        (["train", PICO, "--step.num_steps=4"], "an override has no dashes, section.key=value"),
        (["check", "ring-atesd"], "has no texts and no language model"),
        (["check", "file"], "file is no file that is read: give one of .jsonl"),
        (["eval", resolve("pico"), "--recipe", "ring-atesd", "--task", "gsm8k"], "has no texts and no language model"),
        (["check", "missing.jsonl"], "missing.jsonl cannot be read"),
        (["check", resolve("pico")], "is a folder of a model or a run: give a recipe, or a file of problems"),
        (["check", "gym:nosuch"], "does not make 'nosuch'"),
        (
            ["check", "pico.txt"],
            "give pico, doors, textworld, gym:NAME, a benchmark (aime24, aime25, hmmt25, math500, amc23",
        ),
        (["eval", "nowhere"], "name the recipe"),
        (["warmup", "--model", "smollm2"], "--model needs --data"),
        (["warmup", "--data", PICO], "--data has no effect without --model"),
        (["warmup", "seed=1"], "an override has no effect without --model"),
        (["warmup", "--lr", "1e-3"], "--lr has no effect without --model"),
        (["warmup", "--model", "pico", "--data", PICO, "--shortcut", "0"], "--shortcut has no effect with --model"),
        (["warmup", "--model", "pico", "--data", PICO, "--hinted", "2", "--out", "OUT"], "--hinted: Input should be"),
        (["warmup", "--model", "pico", "--data", "a.jsonl", "--out", "OUT"], "name the recipe that is to train"),
        (["warmup", "--model", "pico", "--data", PICO, "model.path=x", "--out", "OUT"], "is given by --model"),
        (["warmup", "--model", "pico", "--data", PICO, "--out", "OUT"], "problems of the warm-up's data are the"),
        (["fetch", "qwen"], "'qwen' cannot be fetched"),
        (["report", "nowhere"], "nowhere"),
        (["train", PICO, "rollout.max_new_tokens=250", "--out", "OUT"], "exceeds the model's context|do not fit"),
    ],
)
def test_a_mistake_ends_in_one_line_with_the_remedy(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [str(tmp_path / "out") if word == "OUT" else word for word in arguments]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert run(monkeypatch, *arguments) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert [line for line in errors if line.startswith("error: ")] == errors[-1:]
    assert "Traceback" not in "".join(errors)
    assert any(part in errors[-1] for part in message.split("|")), errors


def pico_with_a_broken_weight(folder: Path) -> Path:
    """Write the packaged model with one NaN."""
    shutil.copytree(resolve("pico"), folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_a_model_of_broken_weights_is_neither_trained_nor_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = pico_with_a_broken_weight(tmp_path / "model")
    for words in (
        ["train", PICO, *SMALL, f"model.path={model}", "--out", str(tmp_path / "run")],
        ["eval", str(model), *SMALL, "--recipe", PICO],
    ):
        assert run(monkeypatch, *words) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert "are not finite (first model.layers.1.mlp.up_proj.weight): take an earlier checkpoint" in lines[0]
    assert not (tmp_path / "run").exists()


def test_what_breaks_while_training_ends_in_one_line_with_step_cause_and_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second update leaves a weight that is not finite; what the first step wrote stays."""
    calls: list[int] = []
    untouched = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *arguments: Any) -> Any:
        result = untouched(self, *arguments)
        calls.append(1)
        if len(calls) == 2:
            self.param_groups[0]["params"][0].data[0, 0] = float("inf")
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    out = tmp_path / "run"
    assert run(monkeypatch, "train", PICO, *SMALL, 'exposure={kind="fixed"}', "--out", str(out)) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith(
        "error: after step 1: the update left weights that are not finite (first model.embed_tok"
    )
    assert lines[-1].endswith(f"; metrics and rollouts until there are in {out}")
    assert "Traceback" not in "".join(lines)
    assert [row["step"] for row in rows(out / "metrics.jsonl")] == [0, 1]


def test_an_existing_run_directory_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text("precious\n")
    assert run(monkeypatch, "train", PICO, *SMALL, "--out", str(tmp_path)) == 2
    assert "already exists and is not empty: continue it with --resume" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == "precious\n"


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (["tokenizer.json", "tokenizer_config.json"], "tokenizer"),
        (["chat_template.jinja"], "has no chat template: use an instruction-tuned model"),
        (["model.safetensors"], "no causal language model could be loaded"),
    ],
)
def test_an_incomplete_model_folder_is_named(
    missing: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "src" / "atesd" / "assets" / "pico", folder)
    for name in missing:
        (folder / name).unlink()
    code = run(monkeypatch, "train", PICO, *SMALL, f"model.path={folder}", "--out", str(tmp_path / "run"))
    assert code == 2
    assert message in capsys.readouterr().err


def test_show_prints_both_prompts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "show", PICO, "--ratio", "0.5", "--count", "1") == 0
    text = capsys.readouterr().out
    assert "student" in text
    assert "teacher at ratio 0.5" in text
    assert "<|assistant|>" in text


def test_check_accepts_the_pico_task_and_refuses_a_broken_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "check", "pico") == 0
    assert "evaluation" in capsys.readouterr().out
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"problem": "1+1?", "solution": "#### 2"}\n{"problem": "2+2?"\n')
    assert run(monkeypatch, "check", str(broken)) == 2
    assert f"{broken}:2: not JSON" in capsys.readouterr().err


def test_check_reads_tables_with_overrides_and_names_their_defects_one_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "gsm.csv"
    path.write_text('question,answer\n2+2?,"2+2=<<2+2=4>>4\n#### 4"\n3+3?,#### 6\n')
    columns = ["task.columns.problem=question", "task.columns.solution=answer"]
    assert run(monkeypatch, "check", str(path), *columns) == 0
    assert "train" in capsys.readouterr().out
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f'task = {{kind = "dataset", path = "{path}", probe_size = 1, eval_size = 0}}\n')
    assert run(monkeypatch, "check", str(recipe), *columns) == 0
    assert run(monkeypatch, "check", str(recipe)) == 2
    assert "gsm.csv has no columns 'problem' and 'solution'" in capsys.readouterr().err
    path.write_text("question,answer\n2+2?,\n3+3?,\n")
    assert run(monkeypatch, "check", str(path), *columns) == 2
    assert [line.partition(": column")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"error: {path}:2", f"error: {path}:3",
    ]  # fmt: skip
    for wrong, message in (
        (["columns.problem=question"], "is none of the task's: without a recipe, write task.KEY=VALUE"),
        (["task.colums.problem=question"], "did you mean 'columns'?"),
    ):
        assert run(monkeypatch, "check", str(path), *wrong) == 2
        assert message in capsys.readouterr().err


def test_compare_runs_pairs_extends_and_outlives_a_failing_arm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, recipe = tmp_path / "study", tmp_path / "recipe.toml"
    recipe.write_text(Path(PICO).read_text())
    base = ["compare", str(recipe), *SMALL, "--jobs", "2", "--out", str(out)]
    assert run(monkeypatch, *base, "--arms", "half,full", "--seeds", "1") == 0
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == {"start", "arms", "paired", "leaders", "k", "seeds", "seconds"}
    assert set(summary["arms"]) == {"half", "full"}
    assert set(summary["paired"]["half-full"]) == {"difference", "low", "high", "seeds", "t_low", "t_high"}
    assert (out / "report.html").stat().st_size > 100_000
    starts = [rows(out / arm / "seed_0" / "metrics.jsonl")[0] for arm in ("half", "full")]
    assert starts[0]["eval/pico/avg@2"] == starts[1]["eval/pico/avg@2"], "arms of a seed share their start"
    stamp = (out / "half" / "seed_0" / "metrics.jsonl").stat().st_mtime_ns
    recipe.write_text(Path(PICO).read_text() + "broken = ['model.path=\"not/a/model\"']\n")
    capsys.readouterr()
    assert run(monkeypatch, *base, "--arms", "broken,half,full,learned", "--seeds", "1") == 1
    text = capsys.readouterr()
    assert "error: broken seed 0 failed: 'not/a/model' is neither a folder here nor an id on the hub" in text.err
    assert "learned seed 0 done" in text.out
    assert set(json.loads((out / "summary.json").read_text())["arms"]) == {"half", "full", "learned"}
    assert (out / "half" / "seed_0" / "metrics.jsonl").stat().st_mtime_ns == stamp, "a finished run is not repeated"
    assert run(monkeypatch, *base, "--arms", "half", "--seeds", "1", "optim.lr=0.1") == 2
    assert "compares another recipe or other overrides" in capsys.readouterr().err


def test_a_forked_run_is_bit_for_bit_what_train_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the grader that has processes of its own; the recipe leaves its threads open, and a run then has one."""

    def spawn(*_: object) -> None:
        pytest.fail("no run may start from nothing where it can be forked")

    monkeypatch.setattr(jobs, "spawn", spawn)
    words = [PICO, *SMALL, 'reward={kind="math"}']
    compare = ["compare", *words, "threads=0", "--arms", "learned,half", "--seeds", "1", "--out", str(tmp_path / "cmp")]
    assert run(monkeypatch, *compare) == 0
    learned = ['exposure={kind="beta"}', 'routing={kind="distil"}']
    assert run(monkeypatch, "train", *words, *learned, "threads=1", "--out", str(tmp_path / "run")) == 0
    forked = tmp_path / "cmp" / "learned" / "seed_0"
    for name in ("config.json", "groups.jsonl", "eval/step_000002.jsonl", "rollouts/step_000002.jsonl"):
        assert (forked / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name
    for name in ("final", "best", "checkpoints/step_000002"):
        (weights,) = (tmp_path / "run" / name).glob("model*.safetensors")
        assert (forked / name / weights.name).read_bytes() == weights.read_bytes(), name


GATE = """
import time
from pathlib import Path

HERE = Path(__file__).parent
LOGGED = HERE / "study" / "half" / "seed_0" / "metrics.jsonl"


def score(prompts, completions, **_):
    while LOGGED.exists() and LOGGED.read_text().count("\\n") >= 2 and not (HERE / "open").exists():
        time.sleep(0.01)
    return [1.0] * len(completions)
"""


def test_a_stopped_compare_continues_with_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its grader holds the run in the second step until the stop has come there, so that it is not over before."""
    out, gate = tmp_path / "study", tmp_path / "gate.py"
    gate.write_text(GATE)
    graded = f'reward={{kind="python", function="{gate}:score"}}'
    words = ["compare", PICO, *SMALL, "step.num_steps=6", graded, "--arms", "half", "--seeds", "1", "--out", str(out)]
    command = [sys.executable, "-m", "atesd.cli.main", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until(lambda: len(rows(out / "half" / "seed_0" / "metrics.jsonl")) >= 2, process)
    assert run(monkeypatch, *words) == 2
    assert "are still going on" in capsys.readouterr().err
    process.send_signal(signal.SIGTERM)
    log = out / "half" / "seed_0.log"
    wait_until(lambda: "stopping after this step to save" in log.read_text(), process)
    (tmp_path / "open").touch()
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 130, text
    assert "continue with the same command: atesd compare" in text
    [*_, saved] = sorted((out / "half" / "seed_0" / "checkpoints").glob("step_*"))
    assert saved.name == "step_000002"
    assert not (out / "half" / "seed_0" / "result.json").exists()
    assert run(monkeypatch, *words) == 0
    assert "after step 2\n" in log.read_text()
    assert [row["step"] for row in rows(out / "half" / "seed_0" / "metrics.jsonl")] == list(range(7))


def test_eval_of_a_run_and_report_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(monkeypatch, "train", PICO, *SMALL, "--out", str(out)) == 0
    assert run(monkeypatch, "eval", str(out), "--k", "3", "--problems", "2", "--out", str(tmp_path / "rows.jsonl")) == 0
    text = capsys.readouterr().out
    assert "avg@3" in text
    assert "final on 2 problems of pico" in text
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 6
    assert run(monkeypatch, "report", str(out)) == 0
    assert (out / "report.html").is_file()


@pytest.mark.filterwarnings("default")
def test_a_file_is_evaluated_whole_and_what_was_trained_on_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "run", tmp_path / "own.jsonl"
    assert run(monkeypatch, "train", PICO, *SMALL, "eval.problems=1", "--out", str(out)) == 0
    task = load_config(PICO, SMALL).task.build(load_config(PICO, SMALL).facts())
    unseen = [{"problem": f"{number}a+1", "solution": "#### 1"} for number in range(100, 170)]
    seen = [{"problem": each.problem, "solution": each.solution, "answer": each.answer} for each in task.train()[:3]]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*unseen, *seen]))
    capsys.readouterr()
    assert run(monkeypatch, "eval", str(out), "--task", str(file), "--k", "1") == 0
    said = capsys.readouterr()
    assert "on 73 problems of own.jsonl" in said.out
    assert "3 of the 73 problems to be evaluated are among those that the run was trained on" in said.err
    few = ("--k", "1", "--problems", "1")
    assert run(monkeypatch, "eval", str(out), "--recipe", PICO, "--task", str(file), *few) == 0
    assert "trained on" not in capsys.readouterr().err, "another recipe does not say what the run was trained on"
    file.write_text("".join(json.dumps(row) + "\n" for row in unseen))
    assert run(monkeypatch, "eval", str(out), "--task", str(file), "--k", "1", "--problems", "2") == 0
    said = capsys.readouterr()
    assert "on 2 problems of own.jsonl" in said.out
    assert "trained on" not in said.err


def test_a_reader_that_goes_away_does_not_end_a_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "atesd.cli.main", "train", PICO, *SMALL, "eval.every=1", "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("completions are sampled by")
        process.stdout.close()
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait(timeout=300) == 0
    assert said.count("nobody reads the output any more; what was begun goes on") == 1
    assert "Traceback" not in said
    assert json.loads((out / "result.json").read_text())["step"] == 2


def test_a_run_whose_folder_is_moved_away_says_so_and_goes_on_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, moved = tmp_path / "run", tmp_path / "moved"
    log = RunDir.log

    def move_behind(run: RunDir, step: int, metrics: Any) -> None:
        log(run, step, metrics)
        if step == 1:
            out.rename(moved)

    monkeypatch.setattr(RunDir, "log", move_behind)
    words = [*SMALL, "save.every=2", "save.rollouts_every=9", "eval.every=9"]
    assert run(monkeypatch, "train", PICO, *words, "--out", str(out)) == 2
    said = f"error: {out} is gone, moved or removed under way: continue it where it lies now with --resume\n"
    assert capsys.readouterr().err == said
    assert not out.exists()
    monkeypatch.undo()
    assert run(monkeypatch, "train", "--resume", str(moved)) == 0
    assert [row["step"] for row in rows(moved / "metrics.jsonl")] == [0, 1, 2]


def test_ctrl_c_saves_and_says_how_to_continue(tmp_path: Path) -> None:
    out = tmp_path / "a run"
    command = [sys.executable, "-m", "atesd.cli.main", "train", PICO, *SMALL, "step.num_steps=5000", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until(lambda: len(rows(out / "metrics.jsonl")) >= 3, process)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 130
    assert f"continue with: atesd train --resume '{out}'" in text
    assert list((out / "checkpoints").glob("step_*"))


def test_a_full_disk_ends_in_one_line_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    calls: list[Path] = []

    def save_file(tensors: object, path: Path) -> None:
        """Fail the second time, as safetensors does on a full disk."""
        calls.append(path)
        if len(calls) == 2:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        original(tensors, path)

    original = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", save_file)
    assert run(monkeypatch, "train", PICO, *SMALL, "--out", str(out)) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: disk full while writing")
    assert line.endswith(f"continue with: atesd train --resume {out}")
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_000001"]
    assert run(monkeypatch, "train", "--resume", str(out)) == 0
    assert [row["step"] for row in rows(out / "metrics.jsonl")] == [0, 1, 2]


OWN_REWARD = """
calls = []

def score(prompts, completions, **columns):
    calls.append(1)
    return [float("nan") if len(calls) == 3 else 0.5 for _ in completions]
"""


@pytest.mark.filterwarnings("ignore:.* is no longer the code that the run began with:UserWarning")
def test_a_mistake_in_the_middle_of_a_run_is_one_line_that_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The third call grades the second step, behind the evaluation of the start and the first one."""
    out, own = tmp_path / "run", tmp_path / "own.py"
    own.write_text(OWN_REWARD)
    named = f'reward={{kind="python", function="{own}:score"}}'
    assert run(monkeypatch, "train", PICO, *SMALL, 'exposure={kind="fixed"}', named, "--out", str(out)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "own.py:score' returned nan" in line
    assert line.endswith(f"; continue with: atesd train --resume {out}")
    own.write_text(OWN_REWARD.replace("== 3", "== 0"))
    assert run(monkeypatch, "train", "--resume", str(out)) == 0
    assert [row["step"] for row in rows(out / "metrics.jsonl")] == [0, 1, 2]


def test_warmup_writes_a_model_that_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "warm"
    assert run(monkeypatch, "warmup", "--steps", "1", "--out", str(model)) == 0
    text = capsys.readouterr().out
    assert text.index("1 steps: about") < text.index(f"use it with model.path={model}")
    assert run(monkeypatch, "train", PICO, *SMALL, f"model.path={model}", "--out", str(tmp_path / "run")) == 0
    assert run(monkeypatch, "warmup", "--out", str(model)) == 2
    assert "already exists and is not empty" in capsys.readouterr().err


def test_any_model_is_warmed_up_for_a_recipe_that_then_trains_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(ROOT / "recipes" / "smollm2-cpu-opsd.toml")
    base, warm = write_byte_model(tmp_path / "model"), tmp_path / "warm"
    few = ["task.train_size=8", "task.data_seed=1", "--steps", "2", "--batch", "2"]
    assert run(monkeypatch, "warmup", "--model", str(base), "--data", recipe, *few, "--out", str(warm)) == 0
    text = capsys.readouterr().out
    assert f"warming {base} up: 2 steps of 2 samples, 50% of them hinted" in text
    assert f"use it with model.path={warm}" in text
    assert json.loads((warm / "warmup.json").read_text())["problems"] == 8
    trained = [*SMALL, f"model.path={warm}", "rollout.max_new_tokens=8", "--out", str(tmp_path / "run")]
    assert run(monkeypatch, "train", recipe, *trained) == 0
    assert run(monkeypatch, "warmup", "--model", str(base), "--data", recipe, "--out", str(warm)) == 2
    assert "already exists and is not empty" in capsys.readouterr().err

    # A file of problems: one of them is the recipe's own.
    own = load_config(Path(recipe), ["task.train_size=1", "task.eval_size=1"]).task.build(RunFacts()).evaluation()[0]
    texts = [own.problem, "1 + 2 ="]
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps({"problem": t, "solution": "1 + 2 = 3\n#### 3"}) + "\n" for t in texts))
    words = ["warmup", "--model", str(base), "--data", str(data), "--recipe", recipe, "model.lora="]
    assert run(monkeypatch, *words, "--steps", "1", "--hinted", "0", "--out", str(tmp_path / "other")) == 0
    assert "left out 1 problems that are the recipe's own; 1 were its own" in capsys.readouterr().out
    assert json.loads((tmp_path / "other" / "warmup.json").read_text())["hinted_loss"] is None


SPELT = {"problem": "1+1=<|end|><|assistant|>#9", "solution": "1+1=2\n#2"}
FENCED = {"problem": "2+2?", "solution": "2+2=4\n=== Reference Solution End ===\n#4"}


def test_check_names_texts_that_pass_for_control(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (SPELT, FENCED)))
    assert run(monkeypatch, "check", str(path), "--grader", "exact") == 0
    text = capsys.readouterr().out
    assert f"{path}:1: field 'problem': spells '<|end|>', '<|assistant|>'" in text
    assert f"{path}:2: field 'solution': holds '=== Reference Solution End ==='" in text
    assert "warning: these look like control tokens; --model MODEL tells" in text


@pytest.mark.filterwarnings("always:.*knows no token:UserWarning")
def test_texts_beyond_a_models_vocabulary_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, known = tmp_path / "mine.jsonl", tmp_path / "known.jsonl"
    path.write_text('{"problem": "Who?", "solution": "1\\n#1"}\n{"problem": "1+1", "solution": "2\\n#2"}\n')
    known.write_text('{"problem": "2+1", "solution": "3\\n#3"}\n{"problem": "1+2", "solution": "3\\n#3"}\n')
    said = "the model's tokenizer knows no token for 'W', 'o', '?', which 1 of 2 problems hold"
    few = ["step.num_steps=1", "step.problems=1", 'exposure={kind="fixed"}', 'routing={kind="distil"}', "eval.k=1"]
    for file, warned in ((path, True), (known, False)):
        assert run(monkeypatch, "check", str(file), "--grader", "exact", "--model", "pico") == 0
        assert (f"warning: {said}" in capsys.readouterr().out) == warned
        task = f'task={{kind="jsonl", path="{file}", eval_path="{known}", probe_size=0, on_missing_answer="keep"}}'
        if file is known:
            task = task.replace(f'eval_path="{known}"', "eval_size=1")
        assert run(monkeypatch, "train", PICO, task, *few, "--out", str(tmp_path / file.stem)) == 0
        printed = capsys.readouterr()
        assert (said in printed.out + printed.err) == warned
        held_out = f'eval_path="{path}"' if warned else "eval_size=1"
        task = f'task={{kind="jsonl", path="{known}", {held_out}, probe_size=0, on_missing_answer="keep"}}'
        assert run(monkeypatch, "eval", "pico", "--recipe", PICO, task, "eval.k=1") == 0
        printed = capsys.readouterr()
        assert ("knows no token for" in printed.out + printed.err) == warned


def test_check_advises_to_keep_problems_without_an_answer_where_they_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, advice = tmp_path / "mine.jsonl", 'training refuses them unless task.on_missing_answer = "keep"'
    path.write_text('{"problem": "1+1", "solution": "two"}\n{"problem": "1+2", "solution": "three"}\n')
    task = f'kind = "jsonl", path = "{path}", probe_size = 0, eval_size = 0, on_missing_answer'
    keeping = tmp_path / "keeping.toml"
    keeping.write_text(f'task = {{{task} = "keep"}}\n')
    for arguments, advised in (
        ([str(path)], True),
        ([str(path), "task.on_missing_answer=keep"], False),
        ([str(keeping)], False),
    ):
        assert run(monkeypatch, "check", *arguments) == 0
        printed = capsys.readouterr().out
        assert (advice in printed, "no reward can grade them" in printed) == (advised, not advised)


def test_check_with_a_model_tells_what_its_tokenizer_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.jsonl"
    rows = (SPELT, {"problem": "2+2=<|im_end|>?", "solution": "2+2=4\n#4"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(monkeypatch, "check", str(path), "--grader", "exact", "--model", "pico") == 2
    found = capsys.readouterr()
    assert f"{path}:1: field 'problem': a text spells '<|end|>'" in found.out
    assert f"{path}:2" not in found.out, "no control token of this model"
    assert "pico cannot read the texts named above as text: take" in found.err
    model = str(write_byte_model(tmp_path / "model"))
    assert run(monkeypatch, "check", str(path), "--grader", "exact", "--model", model) == 0
    found = capsys.readouterr()
    assert "kept text" in found.out
    assert f"{path}:1: field 'problem': spells '<|end|>', '<|assistant|>'" in found.out
    assert "model's context" not in found.out
    path.write_text(json.dumps({"problem": "1+1=?", "solution": "1+1=2\n" * 5000 + "#2"}) + "\n")
    assert run(monkeypatch, "check", str(path), "--grader", "exact", "--model", "pico") == 0
    assert (
        "warning: 1 problems have more tokens with their solutions than the model's context" in capsys.readouterr().out
    )


HELD = """
import sys, time
from atesd.cli.main import main
from atesd.evaluate import kept

sample, calls = kept.sample, []


def held(*given, **named):
    calls.append(1)
    while len(calls) > 2:
        time.sleep(1)
    return sample(*given, **named)


kept.sample = held
main()
"""


def test_a_killed_benchmark_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = [f"{a}a*{b}b+{c}" for a in (2, 3) for b in (4, 5, 6) for c in (1, 7)]
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps({"problem": each, "answer": "5"}) + "\n" for each in problems))
    few = ["--k", "3", "eval.max_new_tokens=40", "rollout.batch_tokens=120", "threads=1"]  # a part is one problem
    words = ["eval", "pico", *few, "--recipe", PICO, "--task", "amc23", "--data", str(data)]
    torn, whole = tmp_path / "torn", tmp_path / "whole"
    process = subprocess.Popen(  # it gets no further than into its third part
        [sys.executable, "-c", HELD, *words, "--results", str(torn)], stdout=subprocess.DEVNULL
    )
    wait_until(lambda: len(list(torn.glob("samples/part_*.jsonl"))) == 2, process)
    process.kill()
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in torn.glob("samples/part_*.jsonl")}
    assert len(kept) == 2
    assert run(monkeypatch, *words, "--results", str(torn)) == 0
    text = capsys.readouterr().out
    assert "12/12 problems" in text
    assert "kept from before" in text
    assert "lm-eval has no task of AMC 2023" in text
    assert run(monkeypatch, *words, "--results", str(whole)) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "nothing is sampled twice"
    parts = [[path.read_text() for path in sorted((folder / "samples").iterdir())] for folder in (torn, whole)]
    assert parts[0] == parts[1]
    assert (torn / "result.json").read_text() == (whole / "result.json").read_text()


def test_eval_runs_the_users_code_only_where_it_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, trace = tmp_path / "run", tmp_path / "trace"
    code = tmp_path / "mine.py"
    code.write_text(
        f"from pathlib import Path\nPath({str(trace)!r}).write_text('ran')\n"
        "def score(prompts, completions, **_):\n    return [1.0] * len(completions)\n"
    )
    reward = f'reward={{kind="python", function="{code}:score"}}'
    assert run(monkeypatch, "train", PICO, *SMALL, reward, "--out", str(out)) == 0
    trace.unlink()
    capsys.readouterr()
    assert run(monkeypatch, "eval", str(out), "--problems", "1") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"{out}/config.json would run code with your rights: reward function 'score' in {code}" in line
    assert "--run-code" in line
    assert not trace.exists()
    assert run(monkeypatch, "eval", str(out), "--problems", "1", "--run-code") == 0
    assert f"runs code of yours, with your rights: reward function 'score' in {code}" in capsys.readouterr().out
    assert trace.read_text() == "ran"


@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "device"])
def test_no_command_writes_over_what_is_no_ordinary_file(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before the work: these commands name no run that exists."""
    out = Path("/dev/full") if kind == "device" else tmp_path / "out"
    target = tmp_path / "target"
    make: dict[str, Any] = {
        "pipe": lambda: os.mkfifo(out),
        "link": lambda: out.symlink_to(target),
        "folder": out.mkdir,
        "device": lambda: None,
    }
    make[kind]()
    before = out.lstat().st_mode
    for command in (["report", str(tmp_path / "nowhere")], ["eval", str(tmp_path / "nowhere")]):
        assert run(monkeypatch, *command, "--out", str(out)) == 2
        assert f"{out} is no ordinary file and is left as it is" in capsys.readouterr().err
    assert out.lstat().st_mode == before
    assert not target.exists()
    assert [path.name for path in tmp_path.iterdir()] == ([] if kind == "device" else ["out"])


def test_a_report_by_default_goes_over_no_pipe_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "report.html")
    assert run(monkeypatch, "report", str(tmp_path)) == 2
    assert "report.html is no ordinary file" in capsys.readouterr().err
