"""Several rewards: their weighted sum, what None means in it, and how recipes write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from atesd.config import RunConfig
from atesd.facts import RunFacts
from atesd.recipe import build_config, load_config
from atesd.rewards.exact import exact_reward
from atesd.rewards.kinds import ExactConfig, MathConfig, PythonConfig
from atesd.rewards.weighted import WeightedReward, build_reward
from atesd.rollout.sampler import SamplingConfig
from atesd.routing.route import Route
from atesd.train.record import batch_metrics
from atesd.types import Problem, UserError

from support.rollouts import fake_driver

SCORES: dict[str, list[float | None]] = {"right": [1.0, 0.0, None, None], "short": [0.5, 0.5, 0.5, None]}
PICO = Path(__file__).parents[3] / "recipes" / "pico.toml"
TWO = [{"kind": "exact"}, {"kind": "math", "weight": 0.5}]


def weighted(**weights: float) -> WeightedReward:
    return WeightedReward({name: lambda scores=scores, **_: scores for name, scores in SCORES.items()}, weights)


def test_the_total_is_the_weighted_sum_over_what_graded() -> None:
    """2 * 1 - 0.2 * 0.5 = 1.9; 2 * 0 - 0.1; the third is graded by `short` alone, the fourth by none."""
    assert weighted(right=2.0, short=-0.2)(prompts=[], completions=[]) == pytest.approx([1.9, -0.1, -0.1, None])


def test_every_reward_reads_all_columns() -> None:
    seen: list[dict[str, Any]] = []

    def look(**columns: Any) -> list[float | None]:
        seen.append(columns)
        return [1.0]

    WeightedReward({"a": look, "b": look}, {"a": 1.0, "b": 1.0})(["p"], ["c"], answer=["1"], source=["mine"])
    assert seen == [{"prompts": ["p"], "completions": ["c"], "answer": ["1"], "source": ["mine"]}] * 2


def test_timeouts_of_all_graders_are_counted() -> None:
    reward = WeightedReward({"a": exact_reward, "b": MathConfig().build(RunFacts())}, {"a": 1.0, "b": 1.0})
    assert reward.timeouts == 0
    reward._functions["b"].timeouts = 3  # type: ignore[attr-defined]
    assert reward.timeouts == 3


def test_one_plain_reward_is_itself_and_every_other_is_weighted() -> None:
    run = RunFacts()
    assert build_reward(None, ExactConfig(), run) is exact_reward
    assert build_reward(ExactConfig(), MathConfig(), run) is exact_reward
    for section in (ExactConfig(weight=0.5), ExactConfig(name="same"), (ExactConfig(),)):
        assert isinstance(build_reward(section, MathConfig(), run), WeightedReward)
    halved = build_reward(ExactConfig(weight=0.5), MathConfig(), run)
    assert halved(["p"], [r"\boxed{1}"], answer=["1"]) == [0.5]


def test_one_of_several_may_be_silent_for_a_batch_and_the_only_one_may_not(tmp_path: Path) -> None:
    """TRL's rewards of several domains: each returns None for completions of another one, here for the whole batch."""
    path = tmp_path / "mine.py"
    path.write_text("def code(completions, **_):\n    return [None] * len(completions)\n")
    silent, run = PythonConfig(function=f"{path}:code"), RunFacts()
    columns: dict[str, Any] = {"prompts": ["p"], "completions": [r"\boxed{1}"], "answer": ["1"]}
    both = build_reward((ExactConfig(), silent), ExactConfig(), run)
    assert isinstance(both, WeightedReward)
    assert both.parts(**columns) == {"exact": [1.0], "code": [None]}
    assert both(**columns) == [1.0]
    for alone in (silent, (silent,), silent.model_copy(update={"weight": 0.5})):
        with pytest.raises(UserError, match="returned None for all 1 completions"):
            build_reward(alone, ExactConfig(), run)(**columns)


def test_one_of_several_is_checked_like_the_only_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def code(**_):\n    return ['1']\n")
    both = build_reward((ExactConfig(), PythonConfig(function=f"{path}:code")), ExactConfig(), RunFacts())
    with pytest.raises(UserError, match="returned '1' for a completion"):
        both(["p"], ["1"], answer=["1"])


PROBLEMS = [Problem("a", "one", "s", answer="1", extra={"bonus": 3.0}), Problem("b", "two", "s")]


def bonus(completions: list[str], bonus: list[float | None], **_: Any) -> list[float | None]:
    return bonus


def test_parts_are_kept_logged_by_name_and_a_completion_cut_off_has_none_of_them() -> None:
    reward = WeightedReward({"exact": exact_reward, "bonus": bonus}, {"exact": 1.0, "bonus": 0.1})
    driver, _ = fake_driver(lambda prompt, place: "#1", reward)
    groups = driver.rollout(PROBLEMS, SamplingConfig(max_new_tokens=99), seed=0)
    (one,), (two,) = (group.trajectories for group in groups)
    assert (one.reward, one.rewards, one.verdict) == (pytest.approx(1.3), {"exact": 1.0, "bonus": 3.0}, 1.0)
    assert (two.reward, two.rewards, two.verdict) == (None, {"exact": None, "bonus": None}, None)
    metrics = batch_metrics(groups, [Route.DISTIL] * 2, [], lambda problem, text: {})
    assert {key: value for key, value in metrics.items() if key.startswith(("reward/exact", "reward/bonus"))} == {
        "reward/exact/mean": 1.0,
        "reward/exact/ungradable": 1.0,
        "reward/bonus/mean": 3.0,
        "reward/bonus/ungradable": 1.0,
    }
    ((cut,),) = (g.trajectories for g in driver.rollout(PROBLEMS[:1], SamplingConfig(max_new_tokens=2), seed=0))
    assert (cut.reward, cut.rewards) == (0.0, {"exact": 0.0, "bonus": 0.0})


def test_a_recipe_lists_rewards_and_overrides_still_reach_one(tmp_path: Path) -> None:
    recipe = tmp_path / "a.toml"
    recipe.write_text('[[reward]]\nkind = "exact"\n[[reward]]\nkind = "math"\nweight = 0.5\n')
    config = load_config(recipe)
    assert isinstance(config.reward, tuple)
    assert [(each.called, each.weight) for each in config.reward] == [("exact", 1.0), ("math", 0.5)]
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config
    assert load_config(PICO, ['reward={kind="math"}', "reward.timeout_s=2"]).reward == MathConfig(timeout_s=2)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ([], "reward has no entry with a weight"),
        ([{"kind": "exact", "weight": 0}], "reward has no entry with a weight"),
        ([{"kind": "exact"}, {"kind": "exact"}], "two rewards are called 'exact'"),
        ([{"kind": "exact"}, {"kind": "mth"}], "reward.1.kind = 'mth' is unknown: did you mean 'math'?"),
        ([{"kind": "math", "wieght": 1}], "unknown key 'reward.0.math.wieght': did you mean 'weight'?"),
        ({"kind": "math", "timeout_s": 0}, "reward.math.timeout_s: Input should be greater than 0"),
        ({"kind": "mth"}, "reward.kind = 'mth' is unknown: did you mean 'math'?"),
        ([{"kind": "math", "weight": 1e9}], "reward.0.math.weight: Input should be less"),
        ([{"kind": "math", "name": "a/b"}], "reward.0.math.name"),
    ],
)
def test_mistakes_in_rewards_are_named(reward: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        build_config({"reward": reward})
    assert message in str(caught.value)
    assert "(one)" not in str(caught.value)
    assert "(several)" not in str(caught.value)


@pytest.mark.parametrize("several", [False, True])
def test_a_section_that_builds_no_function_is_named(several: bool) -> None:
    class Empty(ExactConfig):
        def build(self, run: RunFacts) -> Any:
            return None

    section = [Empty(), MathConfig()] if several else Empty()
    with pytest.raises(UserError, match=r"Empty\.build returned None: return a function of prompts, completions and"):
        build_reward(section, ExactConfig(), RunFacts())
