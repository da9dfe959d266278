"""The warm-up of any model: its own problems, both roles' prompts, the update, and the folder that it writes."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM

from atesd.cli.check import whole_task_of
from atesd.config import RunConfig
from atesd.recipe import build_config
from atesd.rollout.render import Renderer
from atesd.sections import ModelConfig
from atesd.train.hints import Hints
from atesd.train.model import load
from atesd.train.supervised import RATIOS, WarmupConfig, own_problems, samples, warm_up
from atesd.types import NonFiniteError, Problem, UserError

from support.folders import write_byte_model
from support.rollouts import byte_tokenizer


class Given:
    """A task of given problems."""

    name = "given"

    def __init__(self, train: list[Problem], probe: list[Problem], evaluation: list[Problem]) -> None:
        self._sets = train, probe, evaluation

    def train(self) -> list[Problem]:
        return self._sets[0]

    def probe(self) -> list[Problem]:
        return self._sets[1]

    def evaluation(self) -> list[Problem]:
        return self._sets[2]


def problem(number: int) -> Problem:
    solution = f"{number} + 1 = {number + 1}\nright\n#### {number + 1}"
    return Problem(f"w{number}", f"add {number}", solution, str(number + 1))


PROBLEMS = [problem(number) for number in range(6)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_model(tmp_path_factory.mktemp("base") / "model")


def recipe(base: Path, **sections: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "model": {"path": str(base)},
        "task": {"kind": "pico", "train_size": 4, "probe_size": 1, "eval_size": 1},
        "prompt": {"student": "{problem}", "teacher": "{problem}|{hint}", "answer": "\n#### {answer}"},
        "reveal": {"unit": "line"},
        "step": {"token_budget": 40},
    }
    return build_config(tree | sections)


def hints(base: Path) -> tuple[Hints, Renderer]:
    config, renderer = recipe(base), Renderer(byte_tokenizer())
    return Hints(config.prompt, config.reveal.build(config.facts()), renderer, {}), renderer


@pytest.mark.parametrize("place", [0, 1, 2])
def test_problems_of_every_set_of_the_recipe_are_left_out_by_content(place: int) -> None:
    sets: list[list[Problem]] = [[], [], []]
    sets[place] = [Problem("other id", " add\n 3 ", "another solution")]
    own, left_out = own_problems(PROBLEMS, Given(*sets))  # type: ignore[arg-type]
    assert [each.id for each in own] == ["w0", "w1", "w2", "w4", "w5"]
    assert left_out == 1


def test_a_warm_up_on_the_runs_own_problems_alone_is_refused() -> None:
    with pytest.raises(UserError, match=r"all 6 problems of the warm-up's data are the recipe's own.*data_seed=1"):
        own_problems(PROBLEMS, Given(PROBLEMS[:2], PROBLEMS[2:3], PROBLEMS[3:]))  # type: ignore[arg-type]


def test_samples_are_the_solutions_behind_both_roles_prompts(base: Path) -> None:
    maker, renderer = hints(base)
    drawn = list(islice(samples(PROBLEMS, maker, 7, WarmupConfig(hinted=0.5, seed=3)), 600))
    by_prompt = {maker.student_ids(each): each for each in PROBLEMS}
    hinted = {maker.teacher_ids(each, ratio): (each, ratio) for each in PROBLEMS for ratio in RATIOS}
    for passage, is_hinted in drawn:
        asked = hinted[passage.prompt][0] if is_hinted else by_prompt[passage.prompt]
        assert passage.completion == (*renderer.solution_ids(asked.solution), 7), "the end token is learned, too"
    assert abs(sum(is_hinted for _, is_hinted in drawn) - 300) < 75, "six standard errors of a fair coin"
    # Three lines: 0 and .25 show the answer alone, .5 one line and the answer, .75 two, which is as much as 1 shows.
    shown = {passage.prompt for passage, is_hinted in drawn if is_hinted}
    assert len(shown) == 3 * len(PROBLEMS)
    for epoch in range(3):
        asked_ids = [
            (hinted[p.prompt][0] if h else by_prompt[p.prompt]).id for p, h in drawn[6 * epoch : 6 * epoch + 6]
        ]
        assert sorted(asked_ids) == sorted(each.id for each in PROBLEMS), "every problem once an epoch"


def test_hints_show_every_quarter_of_a_solution_from_none_to_all(base: Path) -> None:
    """Four lines, so that each of the ratios 0, .25, .5, .75 and 1 shows another part."""
    whole = Problem("four", "add", "1\n2\n3\nit is 4", "4")
    maker, _ = hints(base)
    drawn = islice(samples([whole], maker, 7, WarmupConfig(hinted=1.0)), 100)
    expected = {maker.teacher_ids(whole, quarters / 4) for quarters in range(5)}
    assert len(expected) == 5
    assert {passage.prompt for passage, _ in drawn} == expected


@pytest.mark.parametrize(("share", "expected"), [(0.0, {False}), (1.0, {True})])
def test_the_share_of_hinted_samples_may_be_none_or_all(share: float, expected: set[bool], base: Path) -> None:
    drawn = islice(samples(PROBLEMS, hints(base)[0], 7, WarmupConfig(hinted=share)), 50)
    assert {is_hinted for _, is_hinted in drawn} == expected


def test_seeds_fix_the_samples_and_differ(base: Path) -> None:
    def first(seed: int) -> list[Any]:
        return list(islice(samples(PROBLEMS, hints(base)[0], 7, WarmupConfig(seed=seed)), 12))

    assert first(1) == first(1) != first(2)


def test_updates_are_those_of_a_plain_loop(base: Path, tmp_path: Path) -> None:
    """Recomputed sample by sample from the model's own logits, with AdamW of its own."""
    plan, config = WarmupConfig(steps=4, batch=3, lr=3e-3, seed=1), recipe(base)
    said: list[tuple[int, int, float]] = []
    warm_up(config, PROBLEMS, tmp_path / "warm", plan, progress=lambda *step: said.append(step))
    model, tokenizer = load(ModelConfig(path=str(base)), seed=0)
    renderer = Renderer(tokenizer)
    maker = Hints(config.prompt, config.reveal.build(config.facts()), renderer, {})
    drawn = [passage for passage, _ in islice(samples(PROBLEMS, maker, renderer.eos_ids[0], plan), 12)]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    expected = []
    # One update up, a tenth of four being less than one, then from 1 linearly to 0 behind the last one.
    for step, factor in enumerate((1.0, 1.0, 2 / 3, 1 / 3)):
        optimizer.param_groups[0]["lr"] = 3e-3 * factor
        batch = drawn[3 * step : 3 * step + 3]
        parts = []
        for prompt, completion, _ in batch:
            logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
            parts.append(functional.cross_entropy(logits, torch.tensor(completion), reduction="sum"))
        loss = torch.stack(parts).sum() / sum(len(each.completion) for each in batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        expected.append(float(loss.detach()))
    assert [(step, steps) for step, steps, _ in said] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [loss for _, _, loss in said] == pytest.approx(expected, rel=1e-4)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "warm")
    for name, weight in model.named_parameters():
        assert torch.allclose(written.get_parameter(name), weight, atol=1e-4), name


def test_a_tenth_of_the_updates_is_on_the_way_up_and_the_others_on_the_way_down(base: Path, tmp_path: Path) -> None:
    rates: list[float] = []
    watch = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    try:
        warm_up(recipe(base), PROBLEMS, tmp_path / "warm", WarmupConfig(steps=20, batch=1, lr=1e-2))
    finally:
        watch.remove()
    assert rates == pytest.approx([0.5e-2, 1e-2, *(1e-2 * left / 18 for left in range(18, 0, -1))])


def test_adapters_are_merged_into_an_ordinary_folder(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "warm"
    config = recipe(base, model={"path": str(base), "dtype": "auto", "lora": {"r": 4, "targets": ["q_proj"]}})
    found = warm_up(config, PROBLEMS, out, WarmupConfig(steps=8, batch=4, lr=2e-2))
    assert not (out / "adapter_config.json").exists()
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (base, out))
    changed = {n for n, w in before.named_parameters() if not torch.equal(w, after.get_parameter(n))}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}
    record = json.loads((out / "warmup.json").read_text())
    assert record["steps"] == 8
    assert record["model"] == str(base)
    assert (record["problems"], record["left_out"]) == (6, 0) == (found.problems, found.left_out)
    assert "warmup.json" in json.loads((out / "manifest.json").read_text())["files"]


def test_adapters_of_a_warm_up_begin_by_its_seed(base: Path, tmp_path: Path) -> None:
    """One problem without hints, so that the samples are the same whatever the seed."""
    config = recipe(base, model={"path": str(base), "lora": {"r": 2, "targets": ["q_proj"]}})

    def merged(name: str, seed: int) -> torch.Tensor:
        plan = WarmupConfig(steps=2, batch=1, lr=1e-2, hinted=0.0, seed=seed)
        warm_up(config, PROBLEMS[:1], tmp_path / name, plan)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        return model.get_parameter("model.layers.0.self_attn.q_proj.weight")

    first = merged("first", 1)
    assert torch.equal(first, merged("again", 1))
    assert not torch.equal(first, merged("other", 2))


def test_a_prompt_and_a_solution_with_its_end_token_may_fill_the_context(base: Path, tmp_path: Path) -> None:
    config, (_, tokenizer) = recipe(base), load(ModelConfig(path=str(base)), seed=0)
    maker = Hints(config.prompt, config.reveal.build(config.facts()), Renderer(tokenizer), {})

    def filled(tokens: int) -> Problem:
        whole = Problem("long", "x", "1\n" * 900, "1")
        room = tokens - maker.longest(whole) - len(maker.solution_ids(whole)) - 1
        return Problem("long", "x" * (1 + room), whole.solution, "1")

    plan = WarmupConfig(steps=1, batch=1, hinted=1.0)
    with pytest.raises(UserError, match=r"1 problems of the warm-up \(long\) do not fit the model's context of 4096"):
        warm_up(config, [filled(4097)], tmp_path / "over", plan)
    assert warm_up(config, [filled(4096)], tmp_path / "full", plan).problems == 1


def test_a_warm_up_learns_its_solutions(base: Path, tmp_path: Path) -> None:
    seen: list[float] = []
    plan = WarmupConfig(steps=30, batch=6, lr=1e-2, hinted=0.5)
    found = warm_up(recipe(base), PROBLEMS, tmp_path / "warm", plan, progress=lambda *step: seen.append(step[2]))
    assert found.loss is not None
    assert found.hinted_loss is not None
    assert max(found.loss, found.hinted_loss) < 0.5 * seen[0]
    assert found.loss != found.hinted_loss


def test_one_roles_loss_is_none_where_it_was_never_asked(base: Path, tmp_path: Path) -> None:
    found = warm_up(recipe(base), PROBLEMS, tmp_path / "warm", WarmupConfig(steps=1, batch=2, hinted=0.0))
    assert found.hinted_loss is None
    assert found.loss is not None


def test_what_does_not_fit_is_refused_and_nothing_is_written(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "warm"
    bits = recipe(base, model={"path": str(base), "lora": {}, "quantization": "4bit"})
    with pytest.raises(UserError, match=r"4-bit ones would round them: remove model\.quantization"):
        warm_up(bits, PROBLEMS, out, WarmupConfig(steps=1))
    fenced = {"student": "{problem}", "teacher": "{problem}\n== Solution ==\n{hint}\n== End ==\n"}
    hostile = [*PROBLEMS, Problem("fenced", "x", "one\n== End ==\n#### 1", "1")]
    with pytest.raises(UserError, match=r"'fenced'.*== End =="):
        warm_up(recipe(base, prompt=fenced), hostile, out, WarmupConfig(steps=1))
    long = [*PROBLEMS, Problem("long", "x", "1\n" * 3000, "1")]
    with pytest.raises(UserError, match=r"1 problems of the warm-up \(long\) do not fit the model's context of 4096"):
        warm_up(recipe(base), long, out, WarmupConfig(steps=1))
    assert not out.exists()


def test_a_hostile_row_of_the_data_is_named_whatever_the_recipes_task_is(base: Path, tmp_path: Path) -> None:
    """The recipe's own rows say nothing of where the warm-up's problems stand."""
    for name, word in (("own", "a"), ("warm", "b")):
        rows = [{"problem": f"{word}{n}", "solution": "one\n#### 1"} for n in range(4)]
        rows[2]["solution"] = "one\n== End ==\n#### 1" if name == "warm" else rows[2]["solution"]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = recipe(
        base,
        task={"kind": "jsonl", "path": str(tmp_path / "own.jsonl"), "probe_size": 1, "eval_size": 1},
        prompt={"student": "{problem}", "teacher": "{problem}\n== Solution ==\n{hint}\n== End ==\n"},
    )
    source = whole_task_of(str(tmp_path / "warm.jsonl"))
    with pytest.raises(UserError, match=r"warm\.jsonl:3: field 'solution': holds '== End =='"):
        warm_up(config, source.train(), tmp_path / "out", WarmupConfig(steps=1), source=source)
    with pytest.raises(UserError, match=r"warm-up problem '3', solution: holds '== End =='"):
        warm_up(config, source.train(), tmp_path / "out", WarmupConfig(steps=1))


def test_a_gradient_that_is_not_finite_stops_the_warm_up(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = iter([1.0, float("nan")])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(next(norms)))
    with pytest.raises(NonFiniteError, match="gradient of warm-up step 2 is not finite: lower --lr"):
        warm_up(recipe(base), PROBLEMS, tmp_path / "warm", WarmupConfig(steps=3, batch=2))
    assert not (tmp_path / "warm").exists()
