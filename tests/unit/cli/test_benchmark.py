"""`atesd eval` on benchmarks: the paper's settings, what is shown, lm-eval's command."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from atesd.cli.benchmark import (
    EvalProgress,
    check_data,
    default_folder,
    lm_eval_line,
    sets,
    settings_of,
    with_official_prompt,
)
from atesd.cli.evaluate import recipe_of, run_eval
from atesd.evaluate.kept import Progress
from atesd.evaluate.runner import Evaluation
from atesd.recipe import build_config, load_config, with_overrides
from atesd.types import UserError

PICO = Path(__file__).parents[3] / "recipes" / "pico.toml"

SAMPLED = {"temperature": 1.0, "top_p": 0.95, "top_k": 0, "max_new_tokens": 38912}


def test_a_benchmark_is_sampled_as_in_the_paper_unless_the_user_says_otherwise() -> None:
    recipe = build_config({"eval": {"k": 2, "temperature": 0.5, "top_p": 0.5, "top_k": 7, "max_new_tokens": 3}})
    config = with_overrides(recipe, settings_of("aime24", "mine.jsonl"))
    assert config.task.model_dump(exclude_none=True) == {"kind": "benchmark", "name": "aime24", "data": "mine.jsonl"}
    sampling = config.eval.sampling(config.rollout).model_dump()
    assert {name: sampling[name] for name in SAMPLED} == SAMPLED
    assert sampling["group_size"] == 12
    assert with_overrides(recipe, [*settings_of("aime24", None), "eval.k=3"]).eval.k == 3


def test_what_the_user_sets_is_known_by_key_and_by_section() -> None:
    assert sets(["eval.max_new_tokens=5"], "eval.max_new_tokens")
    assert sets(["eval={k=1}"], "eval.max_new_tokens")
    assert not sets(["eval.k=5"], "eval.max_new_tokens")


def test_the_official_prompt_lacks_the_prefix_and_gives_way_to_others() -> None:
    official = with_official_prompt(build_config({})).prompt.evaluation
    assert official == "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    for prompt in ({"student": "{problem}"}, {"evaluation": "Q {problem}"}):
        config = build_config({"prompt": prompt})
        assert with_official_prompt(config) == config


def test_data_belongs_to_a_benchmark() -> None:
    check_data(None, None)
    check_data("x.jsonl", "gsm8k")
    for task in (None, "pico"):
        with pytest.raises(UserError, match="--data gives a benchmark's problems: name it by --task"):
            check_data("x.jsonl", task)


@pytest.mark.parametrize(
    ("name", "folder"), [("Qwen/Qwen3-1.7B", "Qwen--Qwen3-1.7B-aime24"), ("./runs/a/", "runs--a-aime24")]
)
def test_results_have_a_place_of_their_own(name: str, folder: str) -> None:
    assert default_folder(name, "aime24") == Path("runs/eval") / folder


def test_lm_eval_is_told_the_same_settings(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps(SAMPLED))
    line = lm_eval_line("aime24", "a model", tmp_path)
    assert line.endswith(
        "lm_eval --model hf --model_args 'pretrained=a model,dtype=auto' --tasks aime24 --apply_chat_template "
        "--gen_kwargs do_sample=true,temperature=1,top_p=0.95,top_k=0,max_gen_toks=38912"
    )
    (tmp_path / "settings.json").write_text(json.dumps({**SAMPLED, "temperature": 0}))
    assert "--gen_kwargs do_sample=false,max_gen_toks=38912" in lm_eval_line("gsm8k", "m", tmp_path)
    assert lm_eval_line("hmmt25", "m", tmp_path) == "lm-eval has no task of HMMT February 2025"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    assert f"pretrained=base,peft={adapter},dtype=auto" in lm_eval_line("math500", str(adapter), tmp_path)
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "base", "revision": "v1"}')
    assert f"base,peft={adapter},revision=v1,dtype=auto" in lm_eval_line("math500", str(adapter), tmp_path)


def test_progress_is_a_line_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    console = Console(file=out, width=200)
    progress = EvalProgress(console, console.status("x"), "toy")
    progress(Progress(2, 4, 0, 0.25))
    assert out.getvalue() == "", "not every part, ten seconds apart"
    progress(Progress(4, 4, 2, None))
    assert out.getvalue() == "toy: 4/4 problems (2 kept from before)\n"
    progress._printed = -100.0
    progress(Progress(3, 4, 3, 0.5))
    assert out.getvalue().splitlines()[-1].startswith("toy: 3/4 problems, 0.500 correct so far, ")


def asked_for(monkeypatch: pytest.MonkeyPatch, *overrides: str, stop: bool = False) -> tuple[Any, Any]:
    """Return recipe and `Keep` that `atesd eval MODEL --task aime24` hands to the evaluation."""
    calls: list[tuple[Any, Any]] = []

    def evaluate_model(config: Any, model: str, keep: Any, *, write: Any) -> Evaluation:
        assert write is None, "without --out"
        calls.append((config, keep))
        if stop:
            raise KeyboardInterrupt
        keep.folder.mkdir(parents=True)
        (keep.folder / "settings.json").write_text(json.dumps(SAMPLED))
        return Evaluation({"eval/aime24/avg@12": 0.5}, [])

    monkeypatch.setattr("atesd.train.inspect.evaluate_model", evaluate_model)
    options: dict[str, Any] = dict.fromkeys(("recipe", "data", "k", "problems", "which", "out", "results"))
    run_eval("owner/model", overrides, task="aime24", **options)
    return calls[0]


def test_a_model_needs_no_recipe_and_what_is_left_open_is_official(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config, keep = asked_for(monkeypatch)
    assert keep.folder == Path("runs/eval/owner--model-aime24")
    assert (keep.think, keep.fit) == (True, True)
    assert config.prompt.evaluation.startswith("{problem}\n\nPlease reason")
    assert "--tasks aime24" in capsys.readouterr().out


def test_what_the_user_sets_is_neither_cut_nor_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, keep = asked_for(monkeypatch, "eval.max_new_tokens=99", "prompt.enable_thinking_student=false")
    assert (keep.think, keep.fit) == (False, False)
    assert (config.eval.max_new_tokens, config.prompt.enable_thinking_student, config.eval.k) == (99, False, 12)


@pytest.mark.parametrize(("which", "chosen"), [(None, "final"), ("final", "final"), ("best", "best")])
def test_a_run_is_evaluated_by_the_model_that_is_asked_for(
    which: str | None, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, Path]] = []

    def evaluate_model(config: Any, model: str, keep: Any, *, write: Any) -> Evaluation:
        seen.append((model, keep.folder))
        raise ZeroDivisionError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("atesd.train.inspect.evaluate_model", evaluate_model)
    for name in ("checkpoints", "final", "best"):
        Path("mine", name).mkdir(parents=True)
    recipe = load_config(PICO, ["task.train_size=4"])
    Path("mine", "config.json").write_text(recipe.model_dump_json())
    trained = [problem.problem for problem in recipe.task.build(recipe.facts()).train()[:2]]
    Path("data.jsonl").write_text(
        "".join(json.dumps({"problem": each, "answer": "1"}) + "\n" for each in ("new", *trained))
    )
    options: dict[str, Any] = dict.fromkeys(("recipe", "k", "out", "results"))
    with (
        pytest.raises(ZeroDivisionError),
        pytest.warns(UserWarning, match="1 of the 2 problems to be evaluated are among those that the run was trained"),
    ):
        run_eval("mine", [], task="aime24", data="data.jsonl", problems=2, which=which, **options)
    assert seen == [(f"mine/{chosen}", Path(f"runs/eval/mine-{chosen}-aime24"))]


def test_what_out_holds_is_there_before_the_metrics_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate_model(config: Any, model: str, keep: Any = None, *, write: Any) -> Evaluation:
        write([{"sample": 0}, {"sample": 1}])
        raise ZeroDivisionError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("atesd.train.inspect.evaluate_model", evaluate_model)
    for name, task, recipe in (("kept", "aime24", None), ("plain", None, PICO)):
        out = tmp_path / name / "rows.jsonl"
        options: dict[str, Any] = dict.fromkeys(("data", "k", "problems", "which", "results"))
        with pytest.raises(ZeroDivisionError):
            run_eval("owner/model", [], task=task, recipe=recipe, out=out, **options)
        assert [json.loads(line)["sample"] for line in out.read_text().splitlines()] == [0, 1]


def test_a_stopped_evaluation_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        asked_for(monkeypatch, stop=True)
    assert stop.value.code == 130
    assert "kept in runs/eval/owner--model-aime24: the same command goes on" in capsys.readouterr().out


def test_a_comparison_is_no_run_to_evaluate(tmp_path: Path) -> None:
    (tmp_path / "compare.json").touch()
    with pytest.raises(UserError, match=r"is a comparison: give one of its runs, .*/ARM/seed_N"):
        recipe_of(str(tmp_path), None)
