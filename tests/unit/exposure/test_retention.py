"""The reveal `retention`: what is shown at a ratio, how many tokens are kept, and which by rule or chance."""

from __future__ import annotations

import json
from math import ceil

import pytest
import torch

from atesd.exposure.prompt import PromptConfig, hint_text
from atesd.exposure.retention import Retainer, Retention
from atesd.exposure.reveal import reveal
from atesd.exposure.revealer import Budget, ModelSize
from atesd.facts import RunFacts
from atesd.recipe import build_config
from atesd.types import Measurement, Observation, Problem, UserError

PROBLEM = Problem("p", "3*4+2-5", "a3*4=7\nb7+2=9\nc9-5=4\n#4", "4")
PIECES = ["aa", "a\n", "b", "b", "bb\n", "c", "cc"]  # three lines of 2, 3 and 2 tokens
PROMPT = PromptConfig(student="{problem}", teacher="{problem}\n>{hint}", answer="\n#{answer}")


def retainer(choose: str = "prefix", seed: int = 0, **settings: object) -> Retainer:
    section = Retention.model_validate({"choose": choose, **settings})
    built = section.build(RunFacts(seed=seed))
    assert isinstance(built, Retainer)
    return built


def test_both_ends_are_those_of_any_reveal_and_between_them_the_solution_is_masked() -> None:
    made = retainer()
    for ratio in (0.0, 1.0):
        assert made.reveal(PROBLEM, ratio) == reveal(PROBLEM.solution, ratio, unit="token")
    between = made.reveal(PROBLEM, 0.999999)
    assert (between.text, between.ratio, between.masked, between.complete) == (PROBLEM.solution, 0.999999, True, False)
    assert hint_text(PROBLEM, made.reveal(PROBLEM, 0.0), PROMPT) == "#4"
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="outside"):
            made.reveal(PROBLEM, wrong)
    with pytest.raises(UserError, match="empty"):
        made.reveal(Problem("p", "q", " "), 0.5)


def test_gates_choose_once_they_are_warm() -> None:
    made = retainer("gates", warmup=2, hidden=2)
    made.prepare(ModelSize(layers=1, key_heads=1, width=2, device=torch.device("cpu")))
    assert made.gates is not None
    chosen = []
    for _ in range(4):
        chosen.append(made.kept(PROBLEM, 0.3, ["a"] * 10))
        made.gates.update([torch.ones_like(weight) for weight in made.gates.weights])
    assert chosen == [Budget(3, (0, 1, 2))] * 2 + [Budget(3, None)] * 2
    assert retainer("prefix").kept(PROBLEM, 0.3, ["a"] * 10) == Budget(3, (0, 1, 2)), "others have no warm-up"


def test_gates_begin_by_the_runs_seed() -> None:
    def begun(seed: int) -> object:
        made = retainer("gates", seed, hidden=2)
        made.prepare(ModelSize(layers=1, key_heads=1, width=2, device=torch.device("cpu")))
        return made.state_dict()["gates"]["weights"]

    assert begun(3) == begun(3) != begun(4)


@pytest.mark.parametrize("choose", ["prefix", "random_tokens", "random_segments", "gates"])
@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.25, 0.3, 0.5, 0.9, 0.99])
def test_the_budget_is_the_ratio_rounded_up_whatever_chooses(choose: str, ratio: float) -> None:
    for count in (1, 3, 7, 10, 100):
        budget = retainer(choose).kept(PROBLEM, ratio, ["a "] * count)
        assert budget.keep == ceil(round(ratio * count, 6)), "in decimals: .1 * 30 is no 3.0000000000000004"
        assert (budget.kept is None) == (choose == "gates")
        assert budget.kept is None or (
            len(set(budget.kept)) == budget.keep and list(budget.kept) == sorted(budget.kept)
            and set(budget.kept) <= set(range(count))
        )  # fmt: skip


def test_a_share_that_floats_round_up_costs_no_token_more() -> None:
    assert retainer().kept(PROBLEM, 0.1, ["a"] * 30) == Budget(3, (0, 1, 2))
    assert retainer().kept(PROBLEM, 0.1001, ["a"] * 30).keep == 4


def test_tokens_by_chance_depend_on_run_and_problem_alone_and_stay_as_the_ratio_grows() -> None:
    pieces = ["a"] * 40
    first = retainer("random_tokens").kept(PROBLEM, 0.25, pieces)
    assert first == retainer("random_tokens").kept(Problem("p", "other", "text"), 0.25, pieces)
    assert first != retainer("random_tokens", seed=1).kept(PROBLEM, 0.25, pieces)
    assert first != retainer("random_tokens").kept(Problem("q", "", ""), 0.25, pieces)
    more = retainer("random_tokens").kept(PROBLEM, 0.5, pieces)
    assert first.kept is not None
    assert more.kept is not None
    assert set(first.kept) < set(more.kept)
    assert first.kept != tuple(range(10))


def test_segments_by_chance_are_whole_but_for_the_last_one() -> None:
    """Of lines of 2, 3 and 2 tokens ceil(.5 * 7) = 4: a whole one and the beginning of another, or both short ones."""
    lines = [(0, 1), (2, 3, 4), (5, 6)]
    seen = set()
    for name in range(30):
        budget = retainer("random_segments", unit="line").kept(Problem(str(name), "", ""), 0.5, PIECES)
        allowed = {tuple(sorted((*one, *other[: 4 - len(one)]))) for one in lines for other in lines if one != other}
        assert budget.kept in allowed
        seen.add(budget.kept)
    assert seen == {(0, 1, 2, 3), (0, 1, 5, 6), (0, 2, 3, 4), (2, 3, 4, 5), (2, 3, 5, 6)}
    again = [retainer("random_segments", seed, unit="line").kept(PROBLEM, 0.5, PIECES) for seed in (3, 3)]
    assert again[0] == again[1]


def test_only_gates_ask_for_an_update_and_their_numbers_last_a_step() -> None:
    asked = Measurement("retention")
    assert [list(retainer("gates").wants(step)) for step in (0, 1)] == [[], [asked]]
    assert list(retainer("prefix").wants(1)) == []
    made = retainer("gates")
    made.learned({"kl": 0.5})
    made.observe(Observation(1, {}, {asked: 0.7}))
    assert made.metrics() == {"retention/kl": 0.5}
    made.observe(Observation(2, {}, {}))
    assert made.metrics() == {}


@pytest.mark.parametrize("choose", ["prefix", "gates"])
def test_a_revealer_that_saw_no_model_has_no_state(choose: str) -> None:
    made = retainer(choose)
    state = json.loads(json.dumps(made.state_dict()))
    assert state == {"gates": None}
    made.load_state_dict(state)


REFUSED = [
    ({"choose": "prefix", "hidden": 3}, 'reveal.hidden has no effect with choose = "prefix": remove it'),
    ({"choose": "prefix", "warmup": 3}, "reveal.warmup has no effect"),
    ({"choose": "random_tokens", "cap": 0.5}, "reveal.cap has no effect"),
    ({"choose": "random_segments", "learning_rate": 0.1}, "reveal.learning_rate has no effect"),
    ({"unit": "line"}, 'reveal.unit has no effect with choose = "gates": remove it'),
    ({"choose": "prefix", "unit": "line"}, "reveal.unit has no effect"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_settings_of_another_choice_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_config({"reveal": {"kind": "retention", **settings}})
    build_config({"reveal": {"kind": "retention", "choose": "random_segments", "unit": "line"}})


MASKED = {"reveal": {"kind": "retention"}}
CLASHES = [
    ({"prompt": {"hint": "none"}}, 'reveal.kind = "retention" has no effect: remove reveal.kind'),
    ({"routing": {"kind": "sft"}}, "distils nothing: remove reveal, which has no effect"),
    (
        {"routing": {"kind": "retire", "teacher_share": 0.5, "every": 1}, "rollout": {"group_size": 2}},
        'from whom reveal.kind = "retention" hides tokens only where it scores: remove routing.teacher_share',
    ),
    ({"exposure": {"kind": "beta", "gt_target": "hidden_only"}}, 'set exposure.gt_target = "solution"'),
    (
        {"exposure": {"kind": "difficulty", "by": "reference_ppl", "policy": {"gt_target": "hidden_only"}}},
        'set exposure.gt_target = "solution"',
    ),
]


@pytest.mark.parametrize(("sections", "message"), CLASHES)
def test_what_masks_do_not_go_with_is_refused(sections: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_config(MASKED | sections)
    build_config(MASKED | {"exposure": {"kind": "beta"}})
