"""Measurements, lambda* and credit of a recorded run, recomputed as `support.oracle` recomputes its updates.

Shapes: T tokens of a completion, V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from support.oracle import Oracle, Row, put
from support.recording import Weights


class Gauges:
    """Numbers about the weights after some updates."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle
        self.run = oracle.run
        self.settings = oracle.settings

    def done(self, step: int) -> int:
        """Return the updates that were made when so many steps were."""
        return sum(part.step <= step for part in self.oracle.updates())

    # ---- likelihoods --------------------------------------------------------------------------------------------

    def ids(self, text: str) -> list[int]:
        """Return a text as the assistant would write it, cut to what a probe reads."""
        found: list[int] = self.run.tokenizer.encode(text, add_special_tokens=False)
        return found[: self.settings["probe"]["max_tokens"]]

    def logprob(self, weights: Weights, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
        """Return log p of a completion's tokens at temperature 1."""
        logs = self.oracle.seen(weights, prompt, completion).log_softmax(-1)
        return logs.gather(1, torch.tensor(completion)[:, None])[:, 0]

    def nll(self, weights: Weights, problems: Sequence[Any]) -> float:
        """Return the token-mean NLL of references behind the student's prompts."""
        found = [self.logprob(weights, self.oracle.prompt(p), self.ids(p.solution)) for p in problems]
        return -float(torch.cat(found).mean())

    def grounded(self, target: str, ratio: float, teacher: Weights) -> float | None:
        """Return the token-mean log-probability that a teacher gives the solution, the answer or what is hidden."""
        found = []
        for problem in self.run.probe:
            hidden = [
                line
                for line, is_shown in zip(
                    self.oracle.segments(problem.solution), self.oracle.shown(problem, ratio), strict=True
                )
                if not is_shown
            ]
            text = {"solution": problem.solution, "answer": problem.answer, "hidden_only": "".join(hidden)}[target]
            if text.strip():
                prompt = self.oracle.teacher_prompt(problem, ratio)
                found.append(self.logprob(teacher, prompt, self.ids(text)))
        return float(torch.cat(found).mean()) if found else None

    def divergence(self, weights: Weights, teacher: Weights) -> float:
        """Return the token-mean KL(teacher at ratio 1 || student) on the completions of the first probe request."""
        call = self.run.of(self.run.probe)[0]
        found = []
        for problem, turn in zip(self.run.probe, call.turns, strict=True):
            log_p, log_q = (
                self.oracle.seen(role, prompt, turn.completion_ids).log_softmax(-1)
                for role, prompt in (
                    (teacher, self.oracle.teacher_prompt(problem, 1.0)),
                    (weights, self.oracle.prompt(problem)),
                )
            )
            found.append((log_p.exp() * (log_p - log_q)).sum(-1))
        return float(torch.cat(found).mean())

    # ---- the contract -------------------------------------------------------------------------------------------

    def places(self, completion: Sequence[int], *, ended: bool) -> dict[str, list[int]]:
        """Return the places of each contract class in a completion of one character a token."""
        cliff = self.settings["cliff"]
        texts = [self.run.tokenizer.decode([token]) for token in completion]
        starts = [sum(map(len, texts[:place])) for place in range(len(texts))]
        found: dict[str, list[int]] = {}
        for name, pattern in cliff["contract"].items():
            for match in re.finditer(pattern, "".join(texts)):
                low, high = match.span(1 if match.re.groups else 0)
                found.setdefault(name, []).extend(
                    place for place, start in enumerate(starts) if low < start + len(texts[place]) and start < high
                )
        if cliff["eos"] and ended:
            found["eos"] = [len(completion) - 1]
        return found

    def contract(self, step: int, ratio: float) -> dict[str, tuple[float, float, int]]:
        """Return mean logit p, mean logit b and the number of positions of every class after so many steps."""
        done = self.done(step)
        call = next(call for call in self.run.of(self.run.probe) if call.updates == done)
        by_prompt = {self.oracle.prompt(problem): problem for problem in self.run.probe}
        teacher = self.oracle.teacher(done)
        temperature = self.settings["loss"]["temperature_teacher"] or self.settings["rollout"]["temperature"]
        p: dict[str, list[float]] = {}
        b: dict[str, list[float]] = {}
        for prompt, turn in zip(call.prompts, call.turns, strict=True):
            ids = turn.completion_ids
            hinted = self.oracle.teacher_prompt(by_prompt[prompt], ratio)
            seen = (self.oracle.seen(teacher, hinted, ids) / temperature).softmax(-1)
            base = (self.oracle.seen(self.run.initial, prompt, ids) / temperature).softmax(-1)
            for name, places in self.places(ids, ended=str(turn.stop) == "eos").items():
                for place in places:
                    token = int(seen[place].argmax())
                    p.setdefault(name, []).append(logit(clamped(float(seen[place, token]))))
                    b.setdefault(name, []).append(logit(clamped(float(base[place, token]))))
        return {name: (mean(p[name]), mean(b[name]), len(p[name])) for name in p}

    def curves(self, step: int) -> dict[str, tuple[list[float], float]]:
        """Return every class's fitted logits of p over the grid and its logit b; thin classes are left out."""
        grid = self.settings["cliff"]["grid"]
        points = [self.contract(step, ratio) for ratio in grid]
        return {
            name: (rising([point[name][0] for point in points]), mean([point[name][1] for point in points]))
            for name in points[0]
            if points[0][name][2] >= self.settings["cliff"]["min_hits"]
        }

    @property
    def c(self) -> float:
        """The importance clip behind lambda*."""
        return self.settings["cliff"]["c"] or self.settings["loss"]["divergence"].get("importance_clip") or 5.0

    def lambda_star(self, step: int, ratio: float) -> float:
        """Return lambda* at a ratio by the latest measurement at or before so many steps."""
        every, grid = self.settings["cliff"]["every"], self.settings["cliff"]["grid"]
        curves = self.curves(step - step % every).values()
        return min((bound(read_off(ratio, grid, values), b, self.c) for values, b in curves), default=math.inf)

    # ---- credit -------------------------------------------------------------------------------------------------

    def names(self, which: str) -> list[str]:
        """Return the weights that credit is taken on."""
        last = f"layers.{self.run.model.config.num_hidden_layers - 1}."
        return [name for name in self.run.initial if which == "all" or last in name]

    def preconditioner(self, updates: int) -> Weights:
        """Return 1 / (sqrt(v) + eps), v bias-corrected, after so many updates."""
        optim = self.settings["optim"]
        *_, (_, v) = [moments for moments, _ in zip(self.oracle.moments(), range(updates), strict=False)]
        correction = 1 - optim["betas"][1] ** updates
        return {name: 1 / ((part / correction).sqrt() + optim["eps"]) for name, part in v.items()}

    def credited(self, step: int) -> list[Row]:
        """Return the completions of a step that credit is taken on: those of its first distilled problems."""
        rows = [row for row in self.oracle.rows(step) if row.route in ("distil", "both")]
        problems = [key for key, _ in groupby(rows, key=lambda row: row.problem.id)]
        return [row for row in rows if row.problem.id in problems[: self.settings["probe"]["credit_problems"]]]

    def gradient(self, step: int, ratio: float) -> Weights:
        """Return the gradient of the gated token mean with the teacher at a ratio, under the weights after a step."""
        put(self.oracle.student, self.oracle.weights(self.done(step)))
        return self._taken(self._gated(step, ratio))

    def _gated(self, step: int, ratio: float, gates: list[Tensor] | None = None) -> Tensor:
        """Return the gated token mean under the weights in place; with gates that do not follow them, if given."""
        oracle, done = self.oracle, self.done(step)
        total, count = [], 0
        for place, row in enumerate(self.credited(step)):
            shown = Row(**{**vars(row), "ratio": ratio, "components": ("distil",)})
            values, stats = oracle.token_losses(shown, oracle.teacher(done), None)
            assert stats.gate is not None
            gate = stats.gate if gates is None else gates[place]
            total.append((gate * values["distil"]).sum())
            count += len(row.completion)
        return torch.stack(total).sum() / count

    def _gates(self, step: int, ratio: float) -> list[Tensor]:
        """Return the gate of every credited completion under the weights in place: a constant to the gradient."""
        found = []
        for row in self.credited(step):
            shown = Row(**{**vars(row), "ratio": ratio, "components": ("distil",)})
            _, stats = self.oracle.token_losses(shown, self.oracle.teacher(self.done(step)), None)
            assert stats.gate is not None
            found.append(stats.gate.detach())
        return found

    def probe_gradient(self, step: int) -> Weights:
        """Return the gradient of the probe's NLL under the weights after a step."""
        put(self.oracle.student, self.oracle.weights(self.done(step)))
        return self._taken(self._probe_nll())

    def _probe_nll(self) -> Tensor:
        oracle = self.oracle
        found = []
        for problem in self.run.probe:
            ids = self.ids(problem.solution)
            logs = oracle.logits(oracle.student, oracle.prompt(problem), ids).log_softmax(-1)
            found.append(logs.gather(1, torch.tensor(ids)[:, None])[:, 0])
        return -torch.cat(found).mean()

    def influence_by_differences(self, step: int, ratio: float, size: float = 1e-3) -> tuple[float, float]:
        """Return `influence` twice, its inner products as central differences of the losses along P times a gradient.

        <g_probe, P g_r> is how the probe's NLL changes along P g_r, and just as well how the distillation loss changes
        along P g_probe; <g_probe, P g_probe> is how the probe's NLL changes along P g_probe.
        """
        scale, names = self.preconditioner(self.done(step)), self.names(self.settings["probe"]["credit_parameters"])
        weights = self.oracle.weights(self.done(step))

        def slope(loss: Callable[[], Tensor], along: Weights) -> float:
            """Return the derivative of a loss along P times a gradient."""
            way = {name: scale[name] * along[name] for name in names}
            length = math.sqrt(sum(float(part.square().sum()) for part in way.values()))
            ends = []
            for sign in (1, -1):
                moved = {name: weights[name].double() + sign * size / length * part for name, part in way.items()}
                put(self.oracle.student, weights | moved)
                with torch.no_grad():
                    ends.append(float(loss()))
            return (ends[0] - ends[1]) / (2 * size) * length

        probe, own = self.probe_gradient(step), self.gradient(step, ratio)
        put(self.oracle.student, weights)
        distil = partial(self._gated, step, ratio, self._gates(step, ratio))
        factor = self.kept(own, names) / math.sqrt(slope(self._probe_nll, probe))
        return factor * slope(self._probe_nll, own), factor * slope(distil, probe)

    def _taken(self, loss: Tensor) -> Weights:
        named = [(name, weight) for name, weight in self.oracle.student.named_parameters() if weight.requires_grad]
        found = torch.autograd.grad(loss, [weight for _, weight in named])
        return {name: part for (name, _), part in zip(named, found, strict=True)}

    def kept(self, gradient: Weights, names: Sequence[str]) -> float:
        """Return what clipping leaves of a gradient of these weights: min(1, max_grad_norm / norm); 0 never clips."""
        limit = self.settings["optim"]["max_grad_norm"]
        norm = math.sqrt(sum(float(gradient[name].square().sum()) for name in names))
        return min(1.0, limit / norm) if limit else 1.0

    def influence(self, step: int, ratio: float) -> float:
        """Return s_r <g_probe, P g_r> / sqrt(<g_probe, P g_probe>)."""
        scale = self.preconditioner(self.done(step))
        probe, own = self.probe_gradient(step), self.gradient(step, ratio)
        names = self.names(self.settings["probe"]["credit_parameters"])

        def dot(left: Weights, right: Weights) -> float:
            return sum(float((left[name] * scale[name] * right[name]).sum()) for name in names)

        return self.kept(own, names) * dot(probe, own) / math.sqrt(dot(probe, probe))

    def stepped(self, step: int, ratio: float) -> Weights:
        """Return the weights behind AdamW's next step on the clipped g_r: its moments so far, decay, the next rate.

        m <- b1 m + (1 - b1) g     v <- b2 v + (1 - b2) g^2     both corrected for their start at update n
        theta <- theta - rate decay theta - rate m / (sqrt(v) + eps)
        """
        done, optim = self.done(step), self.settings["optim"]
        own = self.gradient(step, ratio)
        factor = self.kept(own, list(own))
        *_, (mean, square) = [moments for moments, _ in zip(self.oracle.moments(), range(done), strict=False)]
        (first, second), rate = optim["betas"], self.oracle.rate(done)
        moved = {}
        for name, weight in self.oracle.weights(done).items():
            gradient = factor * own[name]
            m = (first * mean[name] + (1 - first) * gradient) / (1 - first ** (done + 1))
            v = (second * square[name] + (1 - second) * gradient**2) / (1 - second ** (done + 1))
            held = weight.double() * (1 - rate * optim["weight_decay"])
            moved[name] = held - rate * m / (v.sqrt() + optim["eps"])
        self._kept = [*getattr(self, "_kept", []), moved]  # the oracle knows weights by identity
        return moved

    def virtual(self, step: int, ratio: float) -> float:
        """Return the probe's NLL behind the optimizer's next step."""
        return self.nll(self.stepped(step, ratio), self.run.probe)

    # ---- credit from graded rollouts ----------------------------------------------------------------------------

    def graded(self, step: int) -> list[Row]:
        """Return the graded completions of the `credit_steps` steps before one."""
        first = max(1, step - self.settings["probe"]["credit_steps"])
        rows = [row for number in range(first, step) for row in self.oracle.rows(number)]
        return [row for row in rows if row.outcome is not None]

    def _numbered(self, step: int) -> list[int]:
        """Return the number of each graded completion's problem among all of them, step by step."""
        first = max(1, step - self.settings["probe"]["credit_steps"])
        places = [
            (number, row.place)
            for number in range(first, step)
            for row in self.oracle.rows(number)
            if row.outcome is not None
        ]
        order = sorted({*places})
        return [order.index(place) for place in places]

    def sampled_logprob(self, row: Row) -> Tensor:
        """Return log p of a completion's tokens at the student's temperature under the weights in place, [T]."""
        temperature = self.settings["loss"]["temperature_student"] or self.settings["rollout"]["temperature"]
        logs = (self.oracle.logits(self.oracle.student, row.prompt, row.completion) / temperature).log_softmax(-1)
        return logs.gather(1, torch.tensor(row.completion)[:, None])[:, 0]

    def reward_loss(self, weights: Weights, step: int) -> float:
        """Return -(1/tokens) sum A log p over earlier graded completions."""
        put(self.oracle.student, weights)
        rows = self.graded(step)
        with torch.no_grad():
            total = sum(float(row.outcome * self.sampled_logprob(row).sum()) for row in rows if row.outcome)
        return -total / sum(len(row.completion) for row in rows)

    def reward_folds(self, step: int) -> list[Weights]:
        """Return g_R by fold: completions of problems number k, k + J, ... in fold k of J, each fold times J.

        Problems are numbered through the steps; J is 8, or their number where there are fewer.
        """
        put(self.oracle.student, self.oracle.weights(self.done(step)))
        rows = self.graded(step)
        tokens = sum(len(row.completion) for row in rows)
        zeros = {name: torch.zeros_like(weight).double() for name, weight in self.run.initial.items()}
        folds = []
        numbers = self._numbered(step)
        count = min(8, len({*numbers}))
        for fold in range(count):
            own = [row for row, number in zip(rows, numbers, strict=True) if number % count == fold and row.outcome]
            losses = [-count / tokens * row.outcome * self.sampled_logprob(row).sum() for row in own if row.outcome]
            folds.append(self._taken(torch.stack(losses).sum()) if losses else zeros)
        return folds

    def level_gradients(self, step: int, ratio: float | None, strength: float | None) -> dict[str, Weights]:
        """Return each level's part of the gated token mean over the step's first groups, whatever their route."""
        oracle, done = self.oracle, self.done(step)
        put(oracle.student, oracle.weights(done))
        rows = [row for row in oracle.rows(step) if row.place < self.settings["probe"]["credit_problems"]]
        if self.settings["step"]["truncated"] == "mask":
            rows = [row for row in rows if not row.cut_off]
        count = sum(len(row.completion) for row in rows)
        losses: dict[str, list[Tensor]] = {}
        for row in rows:
            changed = {"ratio": row.ratio if ratio is None else ratio, "components": ("distil",)}
            changed["strength"] = row.strength if strength is None else strength
            values, stats = oracle.token_losses(Row(**{**vars(row), **changed}), oracle.teacher(done), None)
            assert stats.gate is not None
            losses.setdefault(row.problem.level, []).append((stats.gate * values["distil"]).sum() / count)
        return {level: self._taken(torch.stack(parts).sum()) for level, parts in losses.items()}

    def reward_credit(
        self, step: int, *, ratio: float | None = None, strength: float | None = None
    ) -> dict[str, list[float]]:
        """Return s <g_R, P g> by level and fold; nothing where no completion says anything.

        The levels add up to what one credit for all problems is.
        """
        key = (step, ratio, strength)
        self._credits: dict[Any, dict[str, list[float]]] = getattr(self, "_credits", {})
        if key not in self._credits:
            self._credits[key] = self._reward_credit(step, ratio, strength)
        return self._credits[key]

    def _reward_credit(self, step: int, ratio: float | None, strength: float | None) -> dict[str, list[float]]:
        if not any(row.outcome for row in self.graded(step)):
            return {}
        names = self.names(self.settings["probe"]["credit_parameters"])
        scale, folds = self.preconditioner(self.done(step)), self._folds_of(step)
        levels = self.level_gradients(step, ratio, strength)
        whole = {name: torch.stack([part[name] for part in levels.values()]).sum(0) for name in names}
        factor = self.kept(whole, names)
        return {
            level: [factor * sum(float((fold[n] * scale[n] * own[n]).sum()) for n in names) for fold in folds]
            for level, own in levels.items()
        }

    def _folds_of(self, step: int) -> list[Weights]:
        self._folds: dict[int, list[Weights]] = getattr(self, "_folds", {})
        if step not in self._folds:
            self._folds[step] = self.reward_folds(step)
        return self._folds[step]


def bound(p: float, b: float, c: float) -> float:
    """Return lambda* of two logits: 1 + log(1 + (c - 1) / p) / (logit p - logit b), infinite where p <= b."""
    return 1 + math.log(1 + (c - 1) / sigmoid(p)) / (p - b) if p > b else math.inf


def clamped(p: float) -> float:
    return min(1 - 1e-6, max(1e-6, p))


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def rising(values: Sequence[float]) -> list[float]:
    """Return the closest values that do not fall: neighbours that do are pooled into their mean."""
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and mean(pools[-2]) > mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    return [mean(pool) for pool in pools for _ in pool]


def read_off(x: float, places: Sequence[float], values: Sequence[float]) -> float:
    """Return a piecewise linear curve at x, constant beyond its ends."""
    if x <= places[0]:
        return values[0]
    for (left, low), (right, high) in zip(
        zip(places, values, strict=True), zip(places[1:], values[1:], strict=True), strict=False
    ):
        if x <= right:
            return low + (high - low) * (x - left) / (right - left)
    return values[-1]
