"""Evaluating a model so that its samples are kept: thinking, the context, and what the settings name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from atesd.recipe import load_config
from atesd.rollout.sampler import SamplingConfig
from atesd.train.inspect import Keep, _settings, evaluate_model
from atesd.train.model import resolve
from atesd.types import UserError

PICO = Path(__file__).parents[3] / "recipes" / "pico.toml"
LONG = "eval.max_new_tokens=38912"


def kept(folder: Path, model: str | Path, *overrides: str, **how: bool) -> tuple[dict[str, Any], list[str]]:
    """Evaluate one problem and return the settings and what was said."""
    said: list[str] = []
    config = load_config(PICO, ["threads=1", "task.eval_size=1", "eval.k=1", *overrides])
    evaluate_model(config, model, Keep(folder, lambda progress: None, said.append, **how))
    return json.loads((folder / "settings.json").read_text()), said


def thinking_model(folder: Path) -> Path:
    """Write pico with a template whose thinking flag of False changes the prompt."""
    shutil.copytree(resolve("pico"), folder)
    template = folder / "chat_template.jinja"
    off = "{%- if enable_thinking is defined and not enable_thinking -%}{{ '#' }}{%- endif -%}"
    template.write_text(template.read_text() + off)
    return folder


def test_completions_are_cut_to_the_context_where_that_is_allowed(tmp_path: Path) -> None:
    settings, said = kept(tmp_path / "a", "pico", LONG, fit=True)
    prompt = 256 - settings["max_new_tokens"]  # pico has 256 positions
    assert 5 < prompt < 40
    assert said[0] == f"completions have at most {256 - prompt} tokens: the model's context is 256"
    assert said[1].endswith(f"at most {256 - prompt} tokens; kept in {tmp_path / 'a'}")
    with pytest.raises(UserError, match=r"1 evaluation problems \(.*\) do not fit the model's context of 256"):
        kept(tmp_path / "b", "pico", LONG)
    with pytest.raises(UserError, match="and no others are left"):
        kept(tmp_path / "b", "pico", LONG, 'step.overlong="drop"')
    with pytest.raises(UserError, match="do not fit the model's context of 256"):
        evaluate_model(load_config(PICO, ["threads=1", "task.eval_size=1", LONG]), "pico")
    settings, said = kept(tmp_path / "c", "pico", "eval.max_new_tokens=40", fit=True)
    assert (settings["max_new_tokens"], len(said)) == (40, 1), "what fits stays"


def test_a_model_that_can_think_is_asked_to_and_no_other(tmp_path: Path) -> None:
    model = thinking_model(tmp_path / "model")
    off = "prompt.enable_thinking_student=false"
    for name, path, think, expected in (("a", model, True, True), ("b", model, False, False)):
        settings, _ = kept(tmp_path / name, path, "eval.max_new_tokens=9", off, think=think)
        assert settings["prompt"]["enable_thinking_student"] is expected
    settings, _ = kept(tmp_path / "c", "pico", "eval.max_new_tokens=9", think=True)
    assert settings["prompt"]["enable_thinking_student"] is None


def test_settings_tell_models_and_problems_apart(tmp_path: Path) -> None:
    few = ("eval.max_new_tokens=9",)
    one, _ = kept(tmp_path / "a", "pico", *few)
    with pytest.raises(UserError, match=r"another evaluation \(model = "):
        kept(tmp_path / "a", thinking_model(tmp_path / "model"), *few)
    with pytest.raises(UserError, match="another evaluation"):
        kept(tmp_path / "a", "pico", *few, "task.data_seed=9")
    copied = shutil.copytree(resolve("pico"), tmp_path / "copy")
    again, _ = kept(tmp_path / "a", copied, *few)
    assert again == one, "the same model in another place"
    with pytest.raises(UserError, match=r"another evaluation \(attn_implementation = "):
        kept(tmp_path / "a", "pico", *few, 'model.attn_implementation="eager"')


def test_settings_tell_four_bits_from_whole_weights(tmp_path: Path) -> None:
    plain, four = (
        _settings(load_config(PICO, words), "pico", SamplingConfig(), [])
        for words in ([], ["model.lora={}", 'model.quantization="4bit"'])
    )
    assert [name for name in plain if plain[name] != four[name]] == ["quantization"]


def test_settings_tell_versions_of_the_users_code_apart(tmp_path: Path) -> None:
    code = tmp_path / "mine.py"
    reward = f'reward={{kind="python", function="{code}:score"}}'
    body = "def score(completions, **_):\n    return [{}] * len(completions)\n"
    code.write_text(body.format(1.0))
    few = ("eval.max_new_tokens=9", reward)
    kept(tmp_path / "a", "pico", *few)
    kept(tmp_path / "a", "pico", *few)
    code.write_text(body.format(0.0))
    with pytest.raises(UserError, match=r"another evaluation \(code = "):
        kept(tmp_path / "a", "pico", *few)
