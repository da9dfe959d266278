"""What a user's own parts answer: nonsense ends in one line that names the part, what it gave, and what was asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from atesd.exposure.reveal import Reveal
from atesd.gates.gate import OpenGate
from atesd.losses.divergence import TokenStreams
from atesd.losses.stats import TokenStats
from atesd.routing.fixed import Distil
from atesd.routing.route import Route
from atesd.train.asked import (
    drawn,
    gate_values,
    gate_weights,
    numbers_of,
    proposed,
    reported,
    revealed,
    routed,
    selected,
    state_of,
    wanted,
    whole,
)
from atesd.types import Group, Measurement, Problem, Stateless, UserError

PROBLEMS = [Problem("a", "a", "a"), Problem("b", "b", "b")]
GROUPS = [Group(problem, ()) for problem in PROBLEMS]
BOTH: Any = SimpleNamespace(distils=True, reinforces=True)


def odd(**answers: Any) -> Any:
    """Return a part whose verbs return what is given."""

    def answer(given: Any) -> Any:
        return lambda *_: given

    return type("Odd", (Stateless,), {verb: answer(given) for verb, given in answers.items()})()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "None"),
        (0.5, "0.5"),
        ("00", "'00'"),
        ({"a": 0.5, "b": 0.5}, "{'a': 0.5, 'b': 0.5}"),
        ([None, 0.5], "the ratio None"),
        ([0.5, "x"], "the ratio 'x'"),
        (np.full((2, 1), 0.5), r"the ratio array([0.5])"),
        (np.array(0.5), "array(0.5)"),
    ],
)
def test_ratios_that_are_no_numbers_are_named(given: Any, says: str) -> None:
    with pytest.raises(UserError) as told:
        proposed(odd(propose=given), 3, PROBLEMS, [None, None])
    assert str(told.value) == f"Odd.propose returned {says} at step 3: return one from 0 to 1 a problem"


@pytest.mark.parametrize("given", [(0.25, 1), np.array([0.25, 1]), torch.tensor([0.25, 1.0])])
def test_ratios_of_other_libraries_are_taken(given: Any) -> None:
    assert proposed(odd(propose=given), 3, PROBLEMS, [None, None]) == [0.25, 1.0]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "None for problem 'a' at ratio 0.5: return an atesd.exposure.reveal.Reveal with a text"),
        ("one", "'one' for problem 'a' at ratio 0.5: return an atesd.exposure.reveal.Reveal with a text"),
        (Reveal("one", 1.0, 1, 2), "the ratio 1.0 for problem 'a' at ratio 0.5: return one that is no larger"),
        (Reveal("one", float("nan"), 1, 2), "the ratio nan for problem 'a' at ratio 0.5: return one that is no larger"),
        (
            Reveal("one", 0.5, 1, 1),  # the prompt would hold the whole solution
            "all of 1 segments for problem 'a' at ratio 0.5, and yet another text than the solution: count what is "
            "shown, or set foreign where it is no part of it",
        ),
    ],
)
def test_what_a_revealer_shows_is_of_the_share_that_was_asked_for(given: Any, says: str) -> None:
    with pytest.raises(UserError) as told:
        revealed(odd(reveal=given), Problem("a", "a", "one two"), 0.5)
    assert str(told.value) == f"Odd.reveal returned {says}"


@pytest.mark.parametrize(
    "given",
    [
        Reveal("one", 0.5, 1, 2),
        Reveal("one two", 0.25, 2, 2),
        Reveal("a skill", 0.5, 1, 1, foreign=True),
        Reveal("one two", 0.5, 0, 1, masked=True),
    ],
)
def test_what_a_revealer_may_show(given: Reveal) -> None:
    assert revealed(odd(reveal=given), Problem("a", "a", "one two"), 0.5) is given


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "None"),
        (Route.DISTIL, "<Route.DISTIL: 'distil'>"),
        ([Route.RL], "1 routes for 2 groups"),
        ([Route.RL, "destil"], "'destil'"),
        ([Route.RL, None], "None"),
        ([True, True], "True"),
    ],
)
def test_routes_that_are_none_are_named(given: Any, says: str) -> None:
    with pytest.raises(UserError) as told:
        routed(odd(route=given), 3, GROUPS, 0.5, BOTH)
    assert str(told.value) == (
        f"Odd.route returned {says} at step 3: return one Route a group: both, distil, nll, rl, skip"
    )


def test_routes_may_be_written_as_text() -> None:
    assert routed(odd(route=("rl", Route.SKIP)), 3, GROUPS, 0.5, BOTH) == [Route.RL, Route.SKIP]


@pytest.mark.parametrize("route", [Route.RL, Route.BOTH])
def test_a_route_that_the_section_does_not_declare_is_refused(route: Route) -> None:
    router = odd(route=[Route.SKIP, route])
    with pytest.raises(
        UserError, match=rf'Odd\.route returned "{route}" at step 0, but .* declares reinforces = False'
    ):
        routed(router, 0, GROUPS, 0.5, Distil())
    assert routed(router, 0, GROUPS, 0.5, BOTH) == [Route.SKIP, route]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "None"),
        ([0], "1 indices where 2 were asked for"),
        ([0, 1, 2], "3 indices where 2 were asked for"),
        ([0, 5], "the index 5"),
        ([-1, 0], "the index -1"),
        ([0, "a"], "the index 'a'"),
        ([0, 1.0], "the index 1.0"),
    ],
)
def test_a_curriculum_gives_as_many_problems_as_there_are_asked_for(given: Any, says: str) -> None:
    with pytest.raises(UserError) as told:
        drawn(odd(next=given), 3, 2, 5)
    assert str(told.value) == f"Odd.next returned {says} at step 3: return step.problems = 2 indices from 0 to 4"


@pytest.mark.parametrize("given", [[4, 0], np.array([4, 0]), torch.tensor([4, 0]), iter([4, 0])])
def test_indices_of_other_libraries_are_taken(given: Any) -> None:
    assert drawn(odd(next=given), 3, 2, 5) == [4, 0]


@pytest.mark.parametrize("given", [None, Measurement("probe_nll"), ["probe_nll"], "probe_nll"])
def test_what_is_wanted_are_measurements(given: Any) -> None:
    with pytest.raises(UserError, match=r'Odd\.wants returned .* at step 3: return a list such as \[Measurement\("'):
        wanted(odd(wants=given), 3)
    assert wanted(odd(wants=(Measurement("probe_nll"),)), 3) == [Measurement("probe_nll")]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "None: return numbers by name, {} for none"),
        ({5: 1.0}, "{5: 1.0}: return numbers by name, {} for none"),
        ({"exposure/a": "high"}, "exposure/a = 'high': return numbers alone"),
        ({"exposure/a": [1, 2]}, r"exposure/a = [1, 2]: return numbers alone"),
        ({"exposure/a": torch.zeros(2)}, "exposure/a = tensor([0., 0.]): return numbers alone"),
        ({"step": 9.0}, "'step' at step 3, which the run itself logs: give it another name"),
        ({"reward/mean": 9.0}, "'reward/mean' at step 3, which the run itself logs: give it another name"),
    ],
)
def test_what_a_policy_logs_are_numbers_under_names_of_its_own(given: Any, says: str) -> None:
    with pytest.raises(UserError) as told:
        reported(odd(metrics=given), 3, {"reward/mean": 0.5})
    assert str(told.value) == f"Odd.metrics returned {says}"


def test_numbers_of_other_libraries_are_plain_in_the_log() -> None:
    numbers = numbers_of(OpenGate(), {"a": np.float32(0.5), "b": torch.tensor(2), "c": True})
    assert numbers == {"a": 0.5, "b": 2.0, "c": 1.0}
    assert {type(value) for value in numbers.values()} == {float}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "returned None: return a dict, {} for no state"),
        ([1], r"returned [1]: return a dict, {} for no state"),
        ({"a": torch.zeros(1)}, "holds a = tensor([0.]), which JSON has not: make it numbers, texts, lists and dicts"),
        ({"a": [1, {"b": {2}}]}, "holds a[1].b = {2}, which JSON has not: make it numbers, texts, lists and dicts"),
        (
            {"a": np.float32(1)},
            "holds a = np.float32(1.0), which JSON has not: make it numbers, texts, lists and dicts",
        ),
        ({"a": float("nan")}, "holds a = nan, which JSON has not: put None in its place"),
        ({"a": {1: 2}}, "has the key 1 in a, which JSON has not: make it text"),
        ({(1, 2): 2}, "has the key (1, 2), which JSON has not: make it text"),
    ],
)
def test_a_state_that_a_checkpoint_would_lose_or_change_is_named(given: Any, says: str) -> None:
    with pytest.raises(UserError) as told:
        state_of("router", odd(state_dict=given))
    assert str(told.value) == f"the router's Odd.state_dict {says} (docs/extend.md)"


def test_a_state_of_plain_values_is_kept_as_it_is() -> None:
    state = {"a": [1, 2.5, (True, None)], "b": {"c": "d"}}
    assert state_of("router", odd(state_dict=state)) is state


STATS = TokenStats(**{name: torch.zeros(3) for name in TokenStats.__slots__})


class Wide(OpenGate):
    """Returns what it is given."""

    given: Any = None

    def weights(self, stats: TokenStats) -> Any:
        return self.given

    def values(self, streams: TokenStreams) -> Any:
        return self.given


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (torch.ones(3, 1), "shape (3, 1)"),  # would be spread to 3 times 3
        (torch.ones(1), "shape (1,)"),
        (torch.tensor(1.0), "shape ()"),
        (1.0, "1.0"),
        (None, "None"),
    ],
)
def test_a_gate_gives_one_number_a_token(given: Any, says: str) -> None:
    gate = Wide.model_construct(given=given)
    with pytest.raises(UserError) as told:
        gate_weights(gate, STATS)
    assert str(told.value) == f"Wide.weights returned {says} for 3 tokens: return a tensor with one number a token"
    with pytest.raises(UserError, match=r"Wide\.values returned .* for 3 tokens: return a tensor with one number"):
        gate_values(gate, TokenStreams(torch.zeros(3), torch.zeros(3), STATS))


def test_a_selection_gives_one_number_a_token() -> None:
    with pytest.raises(
        UserError, match=r"Odd\.select returned shape \(2,\) for 3 tokens: return a tensor with one number"
    ):
        selected(odd(select=torch.ones(2)), STATS, 0)
    assert selected(odd(select=torch.tensor([0.0, 1.0, 2.0])), STATS, 0).tolist() == [0, 1, 2]


def test_a_gates_weights_carry_no_gradient() -> None:
    weight = torch.ones(3, requires_grad=True)
    assert not gate_weights(Wide.model_construct(given=weight), STATS).requires_grad


def test_a_part_that_lacks_what_it_will_be_asked_is_refused() -> None:
    with pytest.raises(UserError) as told:
        whole("controller", SimpleNamespace(propose=1, wants=1, state_dict=1, load_state_dict=1))
    assert str(told.value) == (
        "the controller is of class SimpleNamespace, which has no observe, metrics: give it these, or derive it from "
        "atesd.types.Stateless where it keeps no state"
    )
    with pytest.raises(UserError, match=r"^the sampler is None, which has no sample, sync: give it these$"):
        whole("sampler", None)
    part = odd(next=[0])
    assert whole("curriculum", part) is part


class Narrow(Stateless):
    """A controller that was written without the pass rates."""

    def propose(self, step: int, problem_ids: list[str]) -> list[float]:
        """Return one ratio a problem."""
        return [step / 10 for _ in problem_ids]


class Idle(Stateless):
    """One whose state asks for an argument."""

    def propose(self, *asked: Any) -> list[float]:
        """Return one ratio a problem."""
        return [0.5 for _ in asked[1]]

    def metrics(self, unit: str) -> dict[str, float]:  # type: ignore[override]
        """Return what is logged."""
        return {unit: 1.0}


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (
            Narrow(),
            "Narrow.propose cannot be asked with (step, problem_ids, pass_rates): too many positional arguments",
        ),
        (Idle(), "Idle.metrics cannot be asked with (): missing a required argument: 'unit': give it these parameters"),
    ],
)
def test_a_verb_that_takes_other_arguments_is_refused_before_it_is_asked(part: object, says: str) -> None:
    with pytest.raises(UserError) as told:
        whole("controller", part)
    assert str(told.value).startswith(says)
