"""The graders by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module, util
from pathlib import Path
from types import ModuleType
from typing import Annotated, ClassVar, Literal, Protocol, cast

from pydantic import Field

from atesd.facts import RunFacts
from atesd.rewards.exact import exact_reward
from atesd.rewards.math import MathReward
from atesd.rewards.own import OwnReward
from atesd.types import Method, UserError, first_line

RewardFunction = Callable[..., list[float | None]]
"""TRL's signature: f(prompts, completions, **columns) -> one reward or None ("not gradable") a completion."""


class Grader(Protocol):
    """A section that builds a reward function."""

    def build(self, run: RunFacts) -> RewardFunction:
        """Return the reward function."""
        ...


class NamedGrader(Grader, Protocol):
    """A grader among several."""

    @property
    def weight(self) -> float:
        """Factor in their sum."""
        ...

    @property
    def name(self) -> str | None:
        """The name that the recipe gives it."""
        ...

    @property
    def called(self) -> str:
        """The name under which it is logged."""
        ...


class RewardMethod(Method):
    """Base of graders' sections."""

    declares: ClassVar[tuple[str, ...]] = ("build",)

    weight: Annotated[float, Field(ge=-1e3, le=1e3)] = 1.0
    """Factor in the weighted sum of several rewards (`[[reward]]`); with 0 the reward is only logged."""
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None
    """The name under which it is logged; unset, its kind, or the function's name."""

    @property
    def called(self) -> str:
        """The name under which it is logged."""
        return self.name or str(getattr(self, "kind", ""))


class ExactConfig(RewardMethod):
    """The final answer must equal the gold one as text, but for white space, case and a closing full stop."""

    kind: Literal["exact"] = "exact"

    def build(self, run: RunFacts) -> RewardFunction:  # noqa: ARG002
        """Return the reward function."""
        return exact_reward


class MathConfig(RewardMethod):
    """The final answer must mean the same as the gold one, by math-verify: LaTeX, fractions, sets, plain numbers."""

    kind: Literal["math"] = "math"
    timeout_s: Annotated[float, Field(gt=0)] = 5.0
    """Seconds of processor time for one comparison; one that takes longer scores 0. Start-up does not count."""

    def build(self, run: RunFacts) -> RewardFunction:  # noqa: ARG002
        """Return the reward function; its verifier process starts with the first answer that needs it."""
        return MathReward(self.timeout_s)


class PythonConfig(RewardMethod):
    """A reward function of your own, in TRL's signature: f(prompts, completions, **columns) -> list of float or None.

    Columns are `answer`, `solution`, `id` and the data's further columns, one entry a completion; take `**kwargs` for
    those you do not read. None means "not gradable" and is never taken as 0; a number that is not finite, or beyond a
    million, stops the run.
    """

    kind: Literal["python"] = "python"
    function: str
    """Where it is: `package.module:name`, or `path/to/file.py:name`. The code runs with your rights."""
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds for one call, which grades a whole batch; one that takes longer stops the run."""

    @property
    def called(self) -> str:
        """The name under which it is logged."""
        return self.name or self.function.rpartition(":")[2]

    def build(self, run: RunFacts) -> RewardFunction:  # noqa: ARG002
        """Return the function. UserError if it cannot be found."""
        return OwnReward(self.function, load_function(self.function), self.timeout_s)


def load_function(place: str) -> RewardFunction:
    """Import `package.module:name` or `path/to/file.py:name`. UserError says what is missing."""
    source, colon, name = place.rpartition(":")
    if not colon or not source or not name:
        raise UserError(f"reward.function = {place!r} names no function: write package.module:name or file.py:name")
    module = _module(place, source)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"reward.function = {place!r}: {source} has no function {name!r}: mend the name")
    return cast("RewardFunction", function)


def _module(place: str, source: str) -> ModuleType:
    try:
        return _from_file(source) if source.endswith(".py") else import_module(source)
    except (Exception, SystemExit) as error:  # a module is anybody's code
        remedy = "mend the path" if _is_absent(source, error) else "mend its module"
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"reward.function = {place!r}: {source} cannot be imported ({why}): {remedy}") from error


def _is_absent(source: str, error: BaseException) -> bool:
    """Tell whether the module itself is not there, rather than something that it needs."""
    if source.endswith(".py"):
        return not Path(source).is_file()
    return isinstance(error, ModuleNotFoundError) and f"{source}.".startswith(f"{error.name}.")


def _from_file(source: str) -> ModuleType:
    spec = util.spec_from_file_location(f"atesd_reward_{Path(source).stem}", source)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a module up by its name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module
