"""The table of measurements that policies may ask for, all taken without moving the student's weights.

probe_nll             token-mean NLL of the probe's references under the student, without any hint
probe_kl              mean KL(teacher at ratio 1 || student) on completions stored at step 0
teacher_accuracy@r    mean reward of what the teacher writes with its hint at ratio r, sampled as for probe_accuracy
probe_accuracy        mean reward of hint-free completions, the same sampling seed every time
gt_solution@r         token-mean log-probability that the teacher at ratio r gives the reference solution
gt_answer@r           the same of the final answer alone
gt_hidden_only@r      the same of the segments that ratio r does not reveal: no credit for copying
contract@r            at positions of forced form in probe completions, by class: what the teacher at ratio r and
                      the base give to the teacher's modal token, and the number of positions
influence@r           and virtual_nll@r, virtual_reward@r, reward_influence@r, probe_influence@r, each of the last two
                      with _by_level@r: credit of a ratio; reward_influence_lambda@l of a lambda (train/credit.py)
reference_nll         of every training problem, by id: token-mean NLL of its reference under the student
retention             loss of the retention gates before an update of theirs (train/retention.py)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch

from atesd.runlog import Phases
from atesd.train.contract import Contract
from atesd.train.credit import Credit
from atesd.train.probe import Probe
from atesd.train.retention import Learning
from atesd.train.teacher import Teachers
from atesd.types import ContractPoint, Measurement, Problem, Reading, UserError

_OF_THE_STUDENT = {"probe_nll", "probe_accuracy", "reference_nll"}
"""Measurements that no teacher's weights are needed for."""


class Taker(NamedTuple):
    """How a kind of measurement is taken: at all wanted ratios together, in an order of the result that is theirs."""

    take: Callable[[Sequence[float]], Sequence[Reading | None]]
    phase: str = "probe"
    needs_probe: bool = True


class Measurer:
    """Takes measurements by kind."""

    _teachers: Teachers | None = None
    """Whose weights are held meanwhile; None where nothing has to be held."""
    _teaches: bool = True
    """Whether the run has a teacher to measure."""

    def __init__(
        self,
        probe: Probe,
        contract: Contract,
        credit: Credit,
        training: Sequence[Problem],
        gates: Learning | None = None,
        teachers: Teachers | None = None,
        *,
        teaches: bool = True,
    ) -> None:
        self._probe = probe
        self._teaches = teaches
        self._teachers = teachers
        likelihood = probe.teacher_log_likelihood
        self._table = {
            "influence": Taker(credit.influence, "credit"),
            "reward_influence": Taker(
                lambda ratios: credit.reward_influence(ratios, by_level=False), "credit", needs_probe=False
            ),
            "reward_influence_by_level": Taker(
                lambda ratios: credit.reward_influence(ratios, by_level=True), "credit", needs_probe=False
            ),
            "probe_influence": Taker(lambda ratios: credit.probe_influence(ratios, by_level=False), "credit"),
            "probe_influence_by_level": Taker(lambda ratios: credit.probe_influence(ratios, by_level=True), "credit"),
            "reward_influence_lambda": Taker(credit.reward_influence_lambda, "credit", needs_probe=False),
            "virtual_reward": Taker(credit.virtual_reward, "credit", needs_probe=False),
            "virtual_nll": Taker(lambda ratios: credit.virtual(ratios, probe.nll), "credit"),
            "reference_nll": Taker(_each(lambda _: probe.nll_of(training)), needs_probe=False),
            "probe_nll": Taker(_each(lambda _: probe.nll())),
            "probe_kl": Taker(_each(lambda _: probe.kl())),
            "probe_accuracy": Taker(_each(lambda _: probe.accuracy())),
            "teacher_accuracy": Taker(_each(probe.teacher_accuracy)),
            "gt_solution": Taker(_each(lambda ratio: likelihood(ratio, "solution"))),
            "gt_answer": Taker(_each(lambda ratio: likelihood(ratio, "answer"))),
            "gt_hidden_only": Taker(_each(lambda ratio: likelihood(ratio, "hidden"))),
            "contract": Taker(contract.points),
        }
        if gates is not None:  # last: what else is measured is of the gates that the step had
            self._table["retention"] = Taker(_each(lambda _: gates.update()), "retention", needs_probe=False)

    @torch.no_grad()
    def measure(self, wanted: Iterable[Measurement], phases: Phases | None = None) -> dict[Measurement, Reading]:
        """Take each distinct measurement once; one that cannot be taken is absent.

        UserError for a kind that nobody can take, and where the task has no probe problems or the run no teacher.
        """
        phases = phases or Phases()
        ratios: dict[str, list[Measurement]] = {}
        for measurement in dict.fromkeys(wanted):
            ratios.setdefault(measurement.kind, []).append(measurement)
        self.check(ratios)
        self._probe.forget()
        found: dict[Measurement, Reading] = {}
        reads_teacher = bool(ratios.keys() - _OF_THE_STUDENT)
        with self._teachers.held() if self._teachers and reads_teacher else nullcontext():
            for kind, taker in self._table.items():
                asked = ratios.get(kind, [])
                if asked:
                    with phases.phase(taker.phase):
                        readings = taker.take([1.0 if each.ratio is None else each.ratio for each in asked])
                    found |= {each: value for each, value in zip(asked, readings, strict=True) if value is not None}
        self._probe.forget()
        return found

    def check(self, asked: Iterable[str]) -> None:
        """Refuse kinds of measurement that cannot be taken here."""
        asked = list(asked)
        unknown = [kind for kind in asked if kind not in self._table]
        if unknown:
            raise UserError(f"no measurement is called {unknown[0]!r}: known are {', '.join(self._table)}")
        reading = [kind for kind in asked if kind not in _OF_THE_STUDENT]
        if reading and not self._teaches:
            raise UserError(
                f"a policy measures {', '.join(reading)}, and the run keeps no teacher, as its routing distils "
                f"nothing: measure {', '.join(sorted(_OF_THE_STUDENT))}, or choose a routing that distils"
            )
        needing = [kind for kind in asked if self._table[kind].needs_probe]
        if needing and not self._probe.problems:
            raise UserError(
                f"the run measures {', '.join(needing)} but the task has no probe problems: give it some (probe_size)"
            )


def logged(measured: Mapping[Measurement, Reading]) -> dict[str, float]:
    """Return measurements as the log keeps them: contract points by class, of other tables the mean."""
    numbers: dict[str, float] = {}
    for measurement, reading in measured.items():
        key = f"measure/{measurement.key}"
        if not isinstance(reading, Mapping):
            numbers[key] = reading
            continue
        points = {name: point for name, point in reading.items() if isinstance(point, ContractPoint)}
        for name, point in points.items():
            numbers |= {f"{key}/{name}/p": point.p, f"{key}/{name}/b": point.b, f"{key}/{name}/hits": float(point.hits)}
        values = [value for value in reading.values() if isinstance(value, float)]
        if values:
            numbers[key] = sum(values) / len(values)
    return numbers


def _each(take: Callable[[float], Reading | None]) -> Callable[[Sequence[float]], list[Reading | None]]:
    """Take a measurement ratio by ratio."""
    return lambda ratios: [take(ratio) for ratio in ratios]
