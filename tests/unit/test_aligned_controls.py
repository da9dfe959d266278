"""Router, gate and lambda that follow graded rollouts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from pydantic import ValidationError

from atesd.facts import RunFacts
from atesd.gates.aligned import AlignedGate, agreement
from atesd.losses.divergence import TokenStreams
from atesd.losses.stats import TokenStats
from atesd.losses.target import Extrapolate
from atesd.routing.aligned import Aligned
from atesd.routing.route import Route, Router
from atesd.strength import Aligned as AlignedStrength
from atesd.types import Group, Measurement, Observation, Problem, StopReason, Trajectory, Turn

TURN = Turn((1,), (2,), (-1.0,), "", StopReason.EOS, 0)
DISTIL, RL, SKIP = Route.DISTIL, Route.RL, Route.SKIP
LEVELS = {"a": "easy", "b": "hard"}
FACTS = RunFacts(levels=LEVELS, strength=1.5)


def group(problem: str, *rewards: float | None) -> Group:
    return Group(Problem(problem, "x", "y"), tuple(Trajectory((TURN,), reward) for reward in rewards))


# ---- the router -----------------------------------------------------------------------------------------------------

OUTCOMES: list[tuple[float | None, ...]] = [(0, 0), (0, 1), (1, 1), (None, None), (None, 1), (0.0, 0.1), ()]


def credited(router: Router, step: int = 5, **z: Mapping[float, float]) -> Router:
    """Hand over credits of each level by ratio, each one in units of its own error: folds z - 1, z + 1."""
    kind = router.wants(step)[0].kind
    ratios = [measurement.ratio for measurement in router.wants(step)]
    measured = {
        Measurement(kind, ratio): {
            f"{level}/{fold}": values[ratio] + (-1.0, 1.0)[fold]  # type: ignore[index]
            for level, values in z.items()
            for fold in (0, 1)
        }
        for ratio in ratios
    }
    router.observe(Observation(step, measured=measured))
    return router


def routes(router: Router, problem: str) -> list[Route]:
    return router.route([group(problem, *rewards) for rewards in OUTCOMES], 0.5)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [SKIP, RL, SKIP, DISTIL, SKIP, RL, DISTIL]),
        ({"uniform": "distil"}, [DISTIL, RL, DISTIL, DISTIL, DISTIL, RL, DISTIL]),
        ({"otherwise": "skip"}, [SKIP] * 7),
    ],
)
def test_a_level_that_no_ratio_helps_is_reinforced_or_left_alone(fields: dict[str, str], expected: list[Route]) -> None:
    """Groups of equal rewards teach nothing; what cannot be graded at all is distilled as before."""
    router = Aligned(grid=(0.0, 1.0), **fields).build(FACTS)  # type: ignore[arg-type]
    assert not router.capped
    assert routes(router, "a") == [DISTIL] * 7, "nothing is known yet"
    credited(router, easy={0.0: -9.0, 1.0: -8.0}, hard={0.0: -9.0, 1.0: 0.5})
    assert routes(router, "a") == expected
    assert routes(router, "b") == [DISTIL] * 7, "one ratio helps, or might"
    assert routes(router, "new") == [DISTIL] * 7, "nothing is known of its level"
    mixed = router.route([group("a", 0, 1), group("b", 0, 1)], 0.5)
    assert mixed == [expected[1], DISTIL]


@pytest.mark.parametrize("margin", [-2.0, 0.0, 1.5])
def test_the_best_credit_must_be_above_the_margin(margin: float) -> None:
    """After one window z is the credit over its error: folds z - 1, z + 1 have an error of sqrt(2 / 2) = 1."""
    for best, helps in ((margin + 0.01, True), (margin - 0.01, False), (margin, False)):
        router = Aligned(grid=(0.0, 1.0), margin=margin, otherwise="skip").build(FACTS)
        credited(router, easy={0.0: best - 3.0, 1.0: best})
        assert router.metrics()["route/easy/best_credit"] == pytest.approx(best)
        assert routes(router, "a") == [DISTIL if helps else SKIP] * 7


def test_the_router_asks_on_its_cadence_and_never_before_the_first_step() -> None:
    router = Aligned(grid=(0.0, 1.0), every=3).build(FACTS)
    assert [bool(router.wants(step)) for step in range(7)] == [False, False, False, True, False, False, True]
    assert router.wants(3) == [Measurement("reward_influence_by_level", ratio) for ratio in (0.0, 1.0)]
    together = Aligned(grid=(0.0, 1.0), by="none").build(FACTS)
    assert together.wants(5) == [Measurement("reward_influence", ratio) for ratio in (0.0, 1.0)]


def test_all_levels_can_share_one_credit() -> None:
    router = Aligned(grid=(0.0, 1.0), by="none", otherwise="skip").build(FACTS)
    measured = {Measurement("reward_influence", ratio): {"/0": -9.0, "/1": -8.0} for ratio in (0.0, 1.0)}
    router.observe(Observation(5, measured=measured))
    assert router.metrics() == {"route/best_credit": pytest.approx(-8.5 / 0.5)}
    assert {*routes(router, "a"), *routes(router, "b"), *routes(router, "new")} == {SKIP}


def test_credits_add_up_with_the_decay_and_routes_stay_between_measurements() -> None:
    """z after windows of -3 and 4: S = 4 - 3 d, Q = 1 + d^2."""
    router = Aligned(grid=(0.0, 1.0), decay=0.5, otherwise="skip", margin=0.0).build(FACTS)
    credited(router, easy={0.0: -9.0, 1.0: -3.0})
    assert routes(router, "a")[0] is SKIP
    router.observe(Observation(6))
    assert router.metrics() == {}
    assert routes(router, "a")[0] is SKIP
    router.observe(Observation(10))
    assert router.metrics() == {}, "it could not be measured"
    credited(router, 15, easy={0.0: -9.0, 1.0: 4.0})
    assert router.metrics()["route/easy/best_credit"] == pytest.approx((4.0 - 1.5) / math.sqrt(1.25))
    assert routes(router, "a")[0] is DISTIL


def test_a_router_is_restored() -> None:
    config = Aligned(grid=(0.0, 1.0), otherwise="skip")
    router = credited(config.build(FACTS), easy={0.0: -9.0, 1.0: -8.0})
    again = config.build(FACTS)
    again.load_state_dict(json.loads(json.dumps(router.state_dict())))
    assert again.metrics() == router.metrics()
    for each in (router, again):
        assert routes(each, "a") == [SKIP] * 7
        credited(each, 10, easy={0.0: 3.0, 1.0: -8.0}, hard={0.0: -7.0, 1.0: -8.0})
    assert again.state_dict() == router.state_dict()
    assert again.metrics() == router.metrics()


def test_what_the_router_says_of_itself() -> None:
    assert (Aligned().reinforces, Aligned(otherwise="skip").reinforces) == (True, False)
    assert (Aligned().distils_uniform, Aligned(uniform="distil").distils_uniform) == (False, True)
    assert "reinforced" in Aligned().describe()
    assert "left alone" in Aligned(otherwise="skip").describe()
    with pytest.raises(ValidationError, match=r"remove routing\.uniform"):
        Aligned(otherwise="skip", uniform="distil")


# ---- the gate -------------------------------------------------------------------------------------------------------


def stats(advantage: Sequence[float], teacher: Sequence[float], student: Sequence[float]) -> TokenStats:
    zero = torch.zeros(len(advantage))
    columns = {
        "advantage": torch.tensor(advantage),
        "teacher_logprob": torch.tensor(teacher).log(),
        "student_logprob": torch.tensor(student).log(),
    }
    return TokenStats(**{name: columns.get(name, zero) for name in TokenStats.__slots__})


def test_gates_by_hand() -> None:
    """sigmoid(5 A (p_T - p_S)): .5 (.9 - .5) 5 = 1; -.5 of it -1; 1 (.1 - .5) 5 = -2; unknown 0."""
    found = AlignedGate().weights(stats([0.5, -0.5, 1.0, -1.0, 0.0], [0.9, 0.9, 0.1, 0.1, 0.9], [0.5] * 5))
    expected = [1 / (1 + math.exp(-x)) for x in (1.0, -1.0, -2.0, 2.0, 0.0)]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    steeper = AlignedGate(beta=10.0).weights(stats([0.5], [0.9], [0.5]))
    assert float(steeper) == pytest.approx(1 / (1 + math.exp(-2.0)), abs=1e-6)


def test_agreement_is_the_change_of_the_surrogate_but_for_what_every_token_shares() -> None:
    """A step eps (p_T - p_S) on the logits changes A log p(y) by A [p_T(y) - p_S(y) - c] eps, c the same for all y."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(7, dtype=torch.float64, generator=generator) for _ in range(2))
    p_S, p_T = student.softmax(-1), teacher.softmax(-1)
    pull, eps = p_T - p_S, 1e-6
    change = ((student + eps * pull).log_softmax(-1) - (student - eps * pull).log_softmax(-1)) / (2 * eps)
    shared = float((p_S * pull).sum())
    for advantage in (0.7, -0.4):
        found = agreement(stats([advantage] * 7, p_T.tolist(), p_S.tolist())).double()
        assert found == pytest.approx(advantage * (change + shared), abs=1e-6)


def test_the_gate_listens_to_the_divergence_and_gives_no_gradient() -> None:
    seen = stats([0.5, -0.5], [0.9, 0.9], [0.5, 0.5])
    streams = TokenStreams(torch.tensor([0.1, 0.4], requires_grad=True), torch.tensor([-1.0, -2.0]), seen)
    assert AlignedGate().values(streams) is streams.divergence_N
    assert AlignedGate().reads_divergence
    weights = AlignedGate().weights(seen)
    assert not weights.requires_grad
    (weights * AlignedGate().values(streams)).sum().backward()
    assert torch.equal(streams.divergence_N.grad, weights)  # type: ignore[arg-type]


def test_agreement_is_counted_where_the_outcome_is_known() -> None:
    found = AlignedGate().metrics(stats([0.5, -0.5, 0.0, -1.0], [0.9, 0.9, 0.9, 0.1], [0.5] * 4))
    assert found == {"gate/agree_frac": pytest.approx(2 / 3)}
    assert AlignedGate().metrics(stats([0.0], [0.9], [0.5])) == {}
    assert "5" in AlignedGate().describe()
    for beta in (0.0, -1.0, 1e7):
        with pytest.raises(ValidationError):
            AlignedGate(beta=beta)


# ---- lambda ---------------------------------------------------------------------------------------------------------


def lambdas(step: int, plain: Sequence[float], beyond: Sequence[float]) -> Observation:
    kind = "reward_influence_lambda"
    return Observation(
        step,
        measured={
            Measurement(kind, 1.0): {f"/{fold}": value for fold, value in enumerate(plain)},
            Measurement(kind, 1.5): {f"/{fold}": value for fold, value in enumerate(beyond)},
        },
    )


def test_lambda_begins_at_1_and_goes_beyond_while_that_has_the_higher_credit() -> None:
    """Folds 1, 2 and 3, 5: means 1.5, 4; their difference 2, 3 has a mean of 2.5 and an error of sqrt(.5 / 2) = .5."""
    strength = AlignedStrength(FACTS)
    assert [strength.at(ratio, capped=capped) for ratio in (0.0, 1.0) for capped in (False, True)] == [1.0] * 4
    assert [bool(strength.wants(step)) for step in (0, 1, 4, 5, 6, 10)] == [False, False, False, True, False, True]
    assert [(m.kind, m.ratio) for m in strength.wants(5)] == [("reward_influence_lambda", x) for x in (1.0, 1.5)]
    strength.observe(Observation(4))
    assert strength.metrics() == {}
    strength.observe(lambdas(5, [1.0, 2.0], [3.0, 5.0]))
    assert strength.at(0.3, capped=False) == 1.5
    assert strength.metrics() == {"target/lambda_credit": pytest.approx(5.0), "target/lambda": 1.5}
    strength.observe(Observation(6))
    assert strength.metrics() == {}
    assert strength.at(0.3, capped=False) == 1.5
    strength.observe(Observation(10))
    assert (strength.metrics(), strength.at(0.3, capped=False)) == ({}, 1.5), "nothing could be measured"
    strength.observe(lambdas(15, [9.0, 9.5], [1.0, 2.0]))
    strength.observe(lambdas(20, [9.0, 9.5], [1.0, 2.0]))
    assert strength.at(0.3, capped=False) == 1.0
    assert strength.metrics()["target/lambda"] == 1.0
    assert strength.metrics()["target/lambda_credit"] < 0


def test_one_lambda_without_a_table_spoils_the_measurement() -> None:
    strength = AlignedStrength(FACTS)
    half = lambdas(5, [1.0, 2.0], [3.0, 5.0]).measured
    for key in half:
        strength.observe(Observation(5, measured={key: half[key]}))
        assert (strength.metrics(), strength.at(1.0, capped=False)) == ({}, 1.0)


def test_an_aligned_lambda_is_restored() -> None:
    strength, again = AlignedStrength(FACTS), AlignedStrength(FACTS)
    strength.observe(lambdas(5, [1.0, 2.0], [3.0, 5.0]))
    again.load_state_dict(json.loads(json.dumps(strength.state_dict())))
    for each in (strength, again):
        assert each.metrics()["target/lambda"] == 1.5
        each.observe(lambdas(10, [2.0, 1.0], [3.0, 5.0]))
    assert again.state_dict() == strength.state_dict()
    assert again.metrics() == strength.metrics()


@pytest.mark.parametrize("fields", [{"guard": True}, {"lambda_x": 1.0}, {"lambda_x": 0.5}])
def test_an_aligned_lambda_needs_something_to_reach_for_and_no_guard(fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=r"set target\.lambda_x above"):
        Extrapolate(aligned=True, **fields)  # type: ignore[arg-type]
    assert Extrapolate(aligned=True).asks_rewards
    assert not Extrapolate().asks_rewards
    assert "while that would raise the reward" in Extrapolate(aligned=True).describe()
