"""Measurements that policies ask for, taken on the probe set without gradient.

    probe_nll             token-mean NLL of the reference under the student, without any hint
    probe_kl              mean KL(teacher at ratio 1 || student) on completions stored at step 0
    probe_accuracy        mean reward of hint-free completions, the same sampling seed every time
    gt_solution@r         token-mean log-probability that the teacher at ratio r gives the reference solution
    gt_answer@r           the same of the final answer alone
    gt_hidden_only@r      the same of the segments that ratio r does not reveal: no credit for copying
    contract@r            at positions of forced form in probe completions, per class NAME: NAME/p, NAME/b, NAME/hits,
                          the probabilities (from mean logits) that the teacher at ratio r and the base give to the
                          teacher's modal token, and the number of positions
    influence@r           first-order credit of a ratio, virtual_nll@r its second (train/credit.py)
    reference_nll         of every training problem, by id: token-mean NLL of its reference under the student

Probe problems are never trained on, so the exposure reaches these numbers only through learning.
N scored tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from atesd.cliff import CLAMP, CliffConfig
from atesd.config import RunConfig
from atesd.exposure.reveal import reveal
from atesd.losses.divergence import LossConfig, Scored, token_streams
from atesd.losses.target import Plain
from atesd.rollout.driver import Driver
from atesd.rollout.render import Renderer
from atesd.runlog import Phases
from atesd.seeds import derive_seed
from atesd.train.batch import Row, labels, micro_batches, view_input
from atesd.train.credit import Credit
from atesd.train.forward import detached, label_streams, scored_hidden
from atesd.train.hints import Hints
from atesd.train.model import head
from atesd.train.teacher import Teacher
from atesd.types import Group, Measurement, Problem, StopReason, Turn, UserError

ContractRow = tuple[Problem, tuple[int, ...], list[tuple[int, str]]]
"""A completion's problem, its ids, and the places of its tokens of forced form with their class."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured: numbers by key, and numbers of single training problems by kind and problem id."""

    values: dict[str, float]
    by_problem: dict[str, dict[str, float]]


def contract_places(renderer: Renderer, turn: Turn, config: CliffConfig) -> list[tuple[int, str]]:
    """Return the places of a completion's tokens that overlap a match of a contract class, and of its end token."""
    texts = renderer.token_texts(turn.completion_ids)
    ends = np.cumsum([len(text) for text in texts])
    whole = "".join(texts)
    places = []
    for name, pattern in config.contract.items():
        for match in re.finditer(pattern, whole):
            start, end = match.span(1 if match.re.groups else 0)
            places += [
                (place, name)
                for place, (text, stop) in enumerate(zip(texts, ends, strict=True))
                if stop - len(text) < end and stop > start
            ]
    if config.eos and turn.stop is StopReason.EOS:
        places.append((len(texts) - 1, "eos"))
    return sorted(set(places))


def _most_probable(hidden: Tensor, model: nn.Module) -> Tensor:
    """Return the most probable token of each of [P, H] states under the head in place, some states at a time."""
    weight, bias = head(model)
    found = []
    for part in hidden.split_with_sizes([min(64, len(hidden) - start) for start in range(0, len(hidden), 64)]):
        logits = (part @ weight.T).float()
        found.append((logits if bias is None else logits + bias).argmax(-1))
    return torch.cat(found)


class Probe:
    """The probe set, and how to measure the model with it."""

    def __init__(
        self,
        problems: Sequence[Problem],
        *,
        model: nn.Module,
        teacher: Teacher,
        hints: Hints,
        renderer: Renderer,
        driver: Driver,
        config: RunConfig,
        training: Sequence[Problem] = (),
        base: Teacher | None = None,
    ) -> None:
        self._problems = problems
        self._training = training
        self._base = base or teacher
        self.credit: Credit | None = None
        self._model = model
        self._teacher = teacher
        self._hints = hints
        self._renderer = renderer
        self._driver = driver
        self._config = config
        self._stored: list[tuple[int, ...]] | None = None
        self._groups: list[Group] | None = None
        self._completions: list[ContractRow] | None = None
        self._base_hidden: Tensor | None = None
        self._references: list[Row] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the stored completions, which later weights could not sample again."""
        return {"stored": self._stored}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        stored = state["stored"]
        self._stored = None if stored is None else [tuple(ids) for ids in stored]

    def measure(self, wanted: Iterable[Measurement], phases: Phases | None = None) -> Measured:
        """Take each distinct measurement once, by key; one that cannot be taken is absent.

        UserError where the task has no probe problems.
        """
        phases = phases or Phases()
        distinct = {measurement.key: measurement for measurement in wanted}
        asked = [key for key, measurement in distinct.items() if measurement.kind != "reference_nll"]
        if asked and not self._problems:
            raise UserError(
                f"the run measures {', '.join(asked)} but the task has no probe problems: give it some (probe_size)"
            )
        self._model.eval()
        self._groups = self._completions = self._base_hidden = None
        values: dict[str, float] = {}
        by_problem: dict[str, dict[str, float]] = {}
        ratios: dict[str, list[float]] = {}
        for measurement in distinct.values():
            ratios.setdefault(measurement.kind, []).append(1.0 if measurement.ratio is None else measurement.ratio)
        with torch.no_grad():
            for kind in ("influence", "virtual_nll"):
                with phases.phase("credit"):
                    values |= self._take_credit(kind, ratios.pop(kind, []))
            with phases.phase("probe"):
                if ratios.pop("reference_nll", None):
                    by_problem["reference_nll"] = self.reference_nll(self._training)
                    values["reference_nll"] = float(np.mean(list(by_problem["reference_nll"].values())))
                for measurement in distinct.values():
                    if measurement.kind in ratios:
                        values |= self._take(measurement)
        self._groups = self._completions = self._base_hidden = None
        return Measured(values, by_problem)

    def _take_credit(self, kind: str, ratios: Sequence[float]) -> dict[str, float]:
        """Take all ratios of a gradient measurement together."""
        if not ratios:
            return {}
        assert self.credit is not None, "the probe was built without a credit"
        if kind == "influence":
            found = self.credit.influence(ratios)
        else:
            found = self.credit.virtual(ratios, lambda: -self._mean_logprob(self.reference_rows()))
        return {
            Measurement(kind, ratio).key: value for ratio, value in zip(ratios, found, strict=True) if value is not None
        }

    def _take(self, measurement: Measurement) -> dict[str, float]:
        """Take one measurement: a number by its key, several by keys below it, or none."""
        ratio = 1.0 if measurement.ratio is None else measurement.ratio
        value: float | None
        match measurement.kind:
            case "probe_nll":
                value = -self._mean_logprob(self.reference_rows())
            case "probe_kl":
                value = self._mean_divergence()
            case "probe_accuracy":
                value = self._accuracy()
            case "gt_solution":
                value = self._teacher_logprob(ratio, [problem.solution for problem in self._problems])
            case "gt_answer":
                value = self._teacher_logprob(ratio, [problem.answer or "" for problem in self._problems])
            case "gt_hidden_only":
                value = self._teacher_logprob(ratio, [self._unrevealed(problem, ratio) for problem in self._problems])
            case "contract":
                return {f"{measurement.key}/{name}": number for name, number in self._contract(ratio).items()}
            case _:
                raise UserError(f"no measurement is called {measurement.kind!r}")
        return {} if value is None else {measurement.key: value}

    def _contract(self, ratio: float) -> dict[str, float]:
        """Return p, b and hits of every contract class at a ratio, at the temperature of the target's views."""
        positions = self._contract_positions()
        names = [name for _, _, marked in positions for _, name in marked]
        if not names:
            return {}
        if self._base_hidden is None:
            with self._base.in_place():
                prompts = [self._hints.student_ids(problem) for problem, _, _ in positions]
                self._base_hidden = self._contract_hidden(prompts)
        with self._teacher.in_place():
            hidden = self._contract_hidden([self._hints.teacher_ids(problem, ratio) for problem, _, _ in positions])
            modal = _most_probable(hidden, self._model)
            p = self._logits_of(hidden, modal)
        with self._base.in_place():
            b = self._logits_of(self._base_hidden, modal)
        numbers: dict[str, float] = {}
        for name in sorted(set(names)):
            chosen = torch.tensor([other == name for other in names], device=p.device)
            numbers |= {
                f"{name}/p": float(p[chosen].mean().sigmoid()),
                f"{name}/b": float(b[chosen].mean().sigmoid()),
                f"{name}/hits": float(chosen.sum()),
            }
        return numbers

    def _contract_hidden(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """Return hidden states [P, H] at the P contract positions behind the given prompts, in micro-batches."""
        positions = self._contract_positions()
        rows = [_row(prompt, ids) for prompt, (_, ids, _) in zip(prompts, positions, strict=True)]
        found: list[Tensor | None] = [None] * len(rows)
        for members in micro_batches(rows, self._config.step.token_budget):
            chosen = [rows[member] for member in members]
            pieces = self._hidden(chosen).hidden_NH.split_with_sizes([len(row.completion) for row in chosen])
            for member, piece in zip(members, pieces, strict=True):
                found[member] = piece[[place for place, _ in positions[member][2]]]
        return torch.cat([piece for piece in found if piece is not None])

    def _logits_of(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Return the clamped logit of each position's token under the head in place, in float64."""
        weight, bias = head(self._model)
        temperature = self._config.loss.temperature_teacher or self._config.rollout.temperature
        streams = label_streams(Scored(hidden, weight, bias), tokens, self._config.loss, temperature)
        return streams.stats.student_logprob.double().exp().clamp(CLAMP, 1 - CLAMP).logit()

    def _contract_positions(self) -> list[ContractRow]:
        """Return the student's probe completions with the places of forced form and their classes."""
        if self._completions is None:
            groups = self._sample()
            self._completions = [
                (group.problem, turn.completion_ids, contract_places(self._renderer, turn, self._config.cliff))
                for group in groups
                for turn in (attempt.turns[-1] for attempt in group.trajectories)
            ]
        return self._completions

    def _sample(self) -> list[Group]:
        """Sample hint-free completions of the probe problems, the same seed every time; once a call of `measure`."""
        if self._groups is None:
            sampling = self._config.rollout.model_copy(update={"group_size": self._config.probe.sampling_k})
            self._groups = self._driver.rollout(self._problems, sampling, seed=derive_seed(self._config.seed, "probe"))
        return self._groups

    @torch.no_grad()
    def reference_nll(self, problems: Sequence[Problem]) -> dict[str, float]:
        """Return the token-mean NLL of every problem's reference under the student, hint-free, by problem id."""
        self._model.eval()
        rows = [_row(self._hints.student_ids(p), self._reference(p.solution)) for p in problems]
        scores: dict[str, float] = {}
        for members in micro_batches(rows, self._config.step.token_budget):
            chosen = [rows[index] for index in members]
            streams = label_streams(self._hidden(chosen), self._labels(chosen), self._config.loss)
            pieces = streams.stats.student_logprob.double().split_with_sizes([len(row.completion) for row in chosen])
            scores |= {problems[index].id: -float(piece.mean()) for index, piece in zip(members, pieces, strict=True)}
        return scores

    def _teacher_logprob(self, ratio: float, texts: Sequence[str]) -> float | None:
        """Return the token-mean log-probability of the texts under the teacher; None where no text is left to score."""
        rows = [
            _row(self._hints.teacher_ids(problem, ratio), self._reference(text))
            for problem, text in zip(self._problems, texts, strict=True)
            if text.strip()
        ]
        with self._teacher.in_place():
            return self._mean_logprob(rows) if rows else None

    def reference_rows(self) -> list[Row]:
        """Return the reference solutions behind the student's prompts, rendered once."""
        if not self._references:
            self._references = [
                _row(self._hints.student_ids(problem), self._reference(problem.solution)) for problem in self._problems
            ]
        return self._references

    def _reference(self, text: str) -> tuple[int, ...]:
        return tuple(self._renderer.solution_ids(text, self._config.probe.max_tokens))

    def _unrevealed(self, problem: Problem, ratio: float) -> str:
        """Return the hidden segments, joined."""
        shown = reveal(problem.solution, ratio, self._config.reveal, seed_key=problem.id)
        return "".join(problem.solution[start:end] for start, end in shown.hidden_spans)

    def _mean_logprob(self, rows: Sequence[Row]) -> float:
        """Return the mean over tokens of log p(completion | student_prompt) under the weights in place."""

        def score(chosen: Sequence[Row]) -> Tensor:
            return label_streams(self._hidden(chosen), self._labels(chosen), self._config.loss).stats.student_logprob

        return self._token_mean(rows, score)

    def _mean_divergence(self) -> float:
        """Return the token-mean forward KL(teacher at ratio 1 || student) on the stored completions."""
        rows = [
            _row(self._hints.student_ids(problem), completion, self._hints.teacher_ids(problem, 1.0))
            for problem, completion in zip(self._problems, self._stored_completions(), strict=True)
        ]
        plain = LossConfig(tile_tokens=self._config.loss.tile_tokens, tile_vocab=self._config.loss.tile_vocab)

        def score(chosen: Sequence[Row]) -> Tensor:
            with self._teacher.in_place():
                view = detached(self._hidden([replace(row, student_prompt=row.teacher_prompt) for row in chosen]))
            streams = token_streams(
                self._hidden(chosen), [view], self._labels(chosen), plain, target=Plain(), temperature=1.0
            )
            return streams.divergence_N

        return self._token_mean(rows, score)

    def _accuracy(self) -> float | None:
        """Return the mean reward of gradable completions; None where none is."""
        groups = self._sample()
        rewards = [attempt.reward for group in groups for attempt in group.trajectories if attempt.reward is not None]
        return float(np.mean(rewards)) if rewards else None

    def _stored_completions(self) -> list[tuple[int, ...]]:
        """Return one completion a problem, sampled when first asked for: at step 0."""
        if self._stored is None:
            sampling = self._config.rollout.model_copy(update={"group_size": 1})
            groups = self._driver.rollout(self._problems, sampling, seed=derive_seed(self._config.seed, "probe_kl"))
            self._stored = [group.trajectories[0].turns[-1].completion_ids for group in groups]
        return self._stored

    def _token_mean(self, rows: Sequence[Row], score: Callable[[Sequence[Row]], Tensor]) -> float:
        """Average a per-token score over all tokens of the rows, in micro-batches of the step's budget."""
        total, count = 0.0, 0
        for members in micro_batches(rows, self._config.step.token_budget):
            values_N = score([rows[member] for member in members])
            total += float(values_N.double().sum())
            count += values_N.numel()
        return total / count

    def _hidden(self, rows: Sequence[Row]) -> Scored:
        prompts = [row.student_prompt for row in rows]
        inputs = view_input(prompts, [row.completion for row in rows], self._renderer.pad_id, self._device)
        return scored_hidden(self._model, inputs)

    def _labels(self, rows: Sequence[Row]) -> Tensor:
        return labels([row.completion for row in rows], self._device)

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device


def _row(prompt: tuple[int, ...], completion: tuple[int, ...], teacher_prompt: tuple[int, ...] = ()) -> Row:
    return Row(
        student_prompt=prompt,
        teacher_prompt=teacher_prompt,
        completion=completion,
        sampler_logprobs=(),
        components=("reference",),
        ratio=0.0,
        group=0,
    )
