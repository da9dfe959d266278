"""`atesd eval` on benchmarks: the paper's settings, what is shown, lm-eval's command."""

from __future__ import annotations

import io
import json
from pathlib import Path

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
from atesd.evaluate.kept import Progress
from atesd.recipe import build_config, with_overrides
from atesd.types import UserError

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
