"""How the parts of a run are asked, and their answers held to what their protocols promise: any may be a user's own.

A wrong answer ends the run in one line, before anything is made of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from inspect import isfunction, signature
from math import isfinite
from operator import index
from typing import Any, TypeVar

from torch import Tensor

from atesd.curriculum import Curriculum
from atesd.exposure.controller import Controller
from atesd.exposure.reveal import Reveal
from atesd.exposure.revealer import Revealer
from atesd.gates.gate import Gate
from atesd.gradients.rule import GradientRule
from atesd.losses.divergence import TokenStreams
from atesd.losses.stats import TokenStats
from atesd.routing.route import Route, Router, RoutingMethod
from atesd.selection import Selection
from atesd.types import Group, Measurement, Policy, Problem, Trajectory, UserError, shown

T = TypeVar("T")

_ROUNDING = 1e-9
_VERBS = ("wants", "observe", "metrics", "state_dict", "load_state_dict")
_HAS = {
    "controller": ("propose", *_VERBS),
    "revealer": ("reveal", *_VERBS),
    "router": ("route", "capped", *_VERBS),
    "strength": ("at", *_VERBS),
    "curriculum": ("next", *_VERBS),
    "rule": ("prepare", "attached", "apply", "mend", *_VERBS),
    "sampler": ("sample", "sync"),
    "environment": ("limit", "grades", "episode"),
    "task": ("name", "default_reward", "train", "probe", "evaluation", "traits"),
}
"""What is asked of each part."""
_PROTOCOLS: dict[str, type] = {
    "controller": Controller,
    "revealer": Revealer,
    "router": Router,
    "curriculum": Curriculum,
    "rule": GradientRule,
}
"""Parts whose verbs are asked by position."""


def whole(name: str, part: T) -> T:
    """Return a part that was built, or put in place by hand. UserError where it lacks what it will be asked."""
    missing = [each for each in _HAS[name] if not hasattr(part, each)]
    if not missing:
        _asked_as_written(name, part)
        return part
    given = "None" if part is None else f"of class {type(part).__name__}"
    stateless = ", or derive it from atesd.types.Stateless where it keeps no state" if "observe" in missing else ""
    raise UserError(f"the {name} is {given}, which has no {', '.join(missing)}: give it these{stateless}")


def _asked_as_written(name: str, part: object) -> None:
    """UserError where a verb of a part takes other arguments than its protocol says it is asked with."""
    for verb in _HAS[name]:
        protocol = getattr(_PROTOCOLS.get(name), verb, None)
        if not isfunction(protocol):
            continue
        wanted = list(signature(protocol).parameters)[1:]
        try:
            signature(getattr(part, verb)).bind(*wanted)
        except ValueError:  # a builtin that does not say what it takes
            continue
        except TypeError as error:
            called = f"{type(part).__name__}.{verb}"
            raise UserError(
                f"{called} cannot be asked with ({', '.join(wanted)}): {error}: give it these parameters "
                "(docs/extend.md)"
            ) from None


def proposed(
    controller: Controller, step: int, problems: Sequence[Problem], pass_rates: Sequence[float | None]
) -> list[float]:
    """Ask a controller for the ratios of a step. UserError unless there is one in [0, 1] a problem."""
    returned = controller.propose(step, [problem.id for problem in problems], pass_rates)
    given = _listed(returned)
    ratios = [] if given is None else [_number(ratio) for ratio in given]
    wrong = next((at for at, ratio in enumerate(ratios) if ratio is None or not _is_share(ratio)), None)
    if given is not None and len(ratios) == len(problems) and wrong is None:
        return [min(1.0, max(0.0, ratio)) for ratio in ratios if ratio is not None]
    if given is None:
        what = shown(returned, 60)
    elif wrong is None:
        what = f"{len(ratios)} ratios for {len(problems)} problems"
    else:
        what = f"the ratio {shown(given[wrong], 60) if ratios[wrong] is None else format(ratios[wrong], 'g')}"
    raise _error(controller, "propose", what, f" at step {step}", "return one from 0 to 1 a problem")


def revealed(revealer: Revealer, problem: Problem, ratio: float, rollout: Trajectory | None = None) -> Reveal:
    """Ask a revealer what is visible. UserError unless it is at most what was asked for, and says what it shows."""
    shows = revealer.reveal(problem, ratio, rollout)
    where = f" for problem {shown(problem.id, 60)} at ratio {ratio:g}"
    if not isinstance(shows, Reveal) or not isinstance(shows.text, str):
        raise _error(revealer, "reveal", shown(shows, 60), where, "return an atesd.exposure.reveal.Reveal with a text")
    if _number(shows.ratio) is None or not -_ROUNDING <= shows.ratio <= ratio + _ROUNDING:
        raise _error(revealer, "reveal", f"the ratio {shown(shows.ratio, 60)}", where, "return one that is no larger")
    if shows.complete and not (shows.foreign or shows.masked) and shows.text != problem.solution:
        what = f"all of {shown(shows.total)} segments{where}, and yet another text than the solution"
        raise _error(revealer, "reveal", what, "", "count what is shown, or set foreign where it is no part of it")
    return shows


def routed(router: Router, step: int, groups: Sequence[Group], ratio: float, section: RoutingMethod) -> list[Route]:
    """Ask a router for the routes of a step. UserError unless there is one a group that its section declares."""
    returned = router.route(groups, ratio)
    given = _listed(returned)
    known = set(map(str, Route))
    remedy = f"return one Route a group: {', '.join(sorted(known))}"
    if given is None or len(given) != len(groups):
        what = shown(returned, 60) if given is None else f"{len(given)} routes for {len(groups)} groups"
        raise _error(router, "route", what, f" at step {step}", remedy)
    wrong = next((route for route in given if not isinstance(route, str) or route not in known), known)
    if wrong is not known:
        raise _error(router, "route", shown(wrong, 60), f" at step {step}", remedy)
    routes = [Route(route) for route in given]
    for component, verb in (("distil", "distils"), ("rl", "reinforces")):
        route = next((route for route in routes if component in route.components), None)
        if route is not None and not getattr(section, verb):
            raise _error(
                router,
                "route",
                f'"{route}"',
                f" at step {step}, but the recipe's routing declares {verb} = False",
                f"declare {verb} = True, which checks and report go by, or give other routes",
            )
    return routes


def drawn(curriculum: Curriculum, step: int, count: int, total: int) -> list[int]:
    """Ask a curriculum for the problems of a step. UserError unless it gives so many indices of training problems."""
    returned = curriculum.next(count)
    given = _listed(returned)
    remedy = f"return step.problems = {count} indices from 0 to {total - 1}"
    if given is None or len(given) != count:
        what = shown(returned, 60) if given is None else f"{len(given)} indices where {count} were asked for"
        raise _error(curriculum, "next", what, f" at step {step}", remedy)
    places = [_place(each) for each in given]
    for each, place in zip(given, places, strict=True):
        if place is None or not 0 <= place < total:
            raise _error(curriculum, "next", f"the index {shown(each, 60)}", f" at step {step}", remedy)
    return [place for place in places if place is not None]


def wanted(policy: Policy, step: int) -> list[Measurement]:
    """Ask a policy for the measurements that it wants. UserError unless they are some."""
    returned = policy.wants(step)
    given = _listed(returned)
    wrong = given is None or not all(isinstance(each, Measurement) for each in given)
    if given is None or wrong:
        raise _error(
            policy, "wants", shown(returned, 60), f" at step {step}", 'return a list such as [Measurement("probe_nll")]'
        )
    return given


def reported(policy: Policy, step: int, taken: Mapping[str, float]) -> dict[str, float]:
    """Ask a policy for its numbers for the log. UserError unless they are numbers, by keys that are not `taken`."""
    numbers = numbers_of(policy, policy.metrics())
    twice = next((key for key in numbers if key == "step" or key in taken), None)
    if twice is not None:
        where = f" at step {step}, which the run itself logs"
        raise _error(policy, "metrics", shown(twice), where, "give it another name")
    return numbers


def numbers_of(part: object, returned: object) -> dict[str, float]:
    """Return what a part's `metrics` returned, as plain numbers. UserError where they are none."""
    if not isinstance(returned, Mapping) or not all(isinstance(key, str) for key in returned):
        raise _error(part, "metrics", shown(returned, 60), "", "return numbers by name, {} for none")
    numbers = {key: _number(value) for key, value in returned.items()}
    for key, number in numbers.items():
        if number is None:
            raise _error(part, "metrics", f"{key} = {shown(returned[key], 60)}", "", "return numbers alone")
    return {key: number for key, number in numbers.items() if number is not None}


def gate_weights(gate: Gate, stats: TokenStats) -> Tensor:
    """Ask a gate for its weights, detached. UserError unless there is one a token: torch would spread others."""
    return _per_token(gate, "weights", gate.weights(stats), stats.student_logprob).detach()


def gate_values(gate: Gate, streams: TokenStreams) -> Tensor:
    """Ask a gate what its weights multiply. UserError unless there is one number a token."""
    return _per_token(gate, "values", gate.values(streams), streams.stats.student_logprob)


def selected(selection: Selection, stats: TokenStats, seed: int) -> Tensor:
    """Ask a selection for its choice, detached. UserError unless there is one number a token."""
    return _per_token(selection, "select", selection.select(stats, seed), stats.student_logprob).detach()


def state_of(name: str, policy: Policy) -> dict[str, Any]:
    """Return a policy's state. UserError unless JSON gives back what it is given: it would be lost or changed."""
    state = policy.state_dict()
    flaw = "" if isinstance(state, dict) else f"returned {shown(state, 60)}: return a dict, {{}} for no state"
    flaw = flaw or _flaw(state, "")
    if flaw:
        raise UserError(f"the {name}'s {type(policy).__name__}.state_dict {flaw} (docs/extend.md)")
    return state


def _flaw(value: object, place: str) -> str:
    """Say what of a state JSON would not give back; "" where it all comes back, tuples as lists."""
    holds = f"holds {place or 'the state'} = {shown(value, 60)}"
    if isinstance(value, Mapping):
        odd = next((key for key in value if not isinstance(key, str)), None)
        if odd is not None:
            return f"has the key {shown(odd, 60)}{place and f' in {place}'}, which JSON has not: make it text"
        return next(filter(None, (_flaw(each, f"{place}.{key}" if place else key) for key, each in value.items())), "")
    if isinstance(value, list | tuple):
        return next(filter(None, (_flaw(each, f"{place}[{at}]") for at, each in enumerate(value))), "")
    if isinstance(value, float) and not isfinite(value):
        return f"{holds}, which JSON has not: put None in its place"
    if value is None or isinstance(value, bool | int | float | str):
        return ""
    return f"{holds}, which JSON has not: make it numbers, texts, lists and dicts"


def _per_token(part: object, verb: str, returned: object, like_N: Tensor) -> Tensor:
    if isinstance(returned, Tensor) and returned.shape == like_N.shape:
        return returned
    what = f"shape {tuple(returned.shape)}" if isinstance(returned, Tensor) else shown(returned, 60)
    raise _error(part, verb, what, f" for {len(like_N)} tokens", "return a tensor with one number a token")


def _error(part: object, verb: str, what: str, where: str, remedy: str) -> UserError:
    return UserError(f"{type(part).__name__}.{verb} returned {what}{where}: {remedy}")


def _is_share(ratio: float) -> bool:
    return -_ROUNDING <= ratio <= 1 + _ROUNDING


def _listed(given: object) -> list[Any] | None:
    """Return a sequence, an array or a tensor as a list; None for what is none, texts and tables included."""
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        return None
    try:
        return list(given)
    except TypeError:  # an array of no dimension
        return None


def _number(value: object) -> float | None:
    if not hasattr(value, "__float__"):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # an array of several numbers
        return None


def _place(value: object) -> int | None:
    try:
        return index(value)  # type: ignore[arg-type]
    except TypeError:
        return None
