"""What a recorded run must have done: every update again, in float64, one sequence at a time, with a dense softmax.

Written from the formulas (docs/method.md) and on nothing of `atesd`: it reads the resolved recipe as plain JSON, the
recorded completions and weights, and of the run directory only what another test checks on its own (each group's route,
ratio and lambda, and which tokens were selected). Shapes: T tokens of a completion, V vocabulary.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from support import partial_credit
from support.recording import Recording, Weights, rendered, student_prompt

VIEWS = {
    "plain": ["teacher"],
    "extrapolate": ["teacher", "base"],
    "residual": ["teacher", "full"],
    "paint": ["teacher"],
    "avsd": ["teacher", "full", "answer"],
}


@dataclass
class Row:
    """One completion, and what the recipe makes of it."""

    problem: Any
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    sampled: tuple[float, ...]
    cut_off: bool
    reward: float | None
    route: str
    ratio: float | None
    strength: float
    components: tuple[str, ...]
    advantage: float = 0.0
    weight: float = 1.0
    selected: Tensor | None = None
    outcome: float | None = None
    """Reward minus what was to be expected of the attempt; None where it is not graded."""
    place: int = 0
    """Which problem of the step it answers."""


@dataclass
class Scored:
    """Token statistics of one completion, each [T], from the student and the teacher at the ratio in force."""

    logprob: Tensor
    entropy: Tensor
    top: Tensor
    divergence: Tensor | None = None
    reverse_kl: Tensor | None = None
    teacher_logprob: Tensor | None = None
    teacher_entropy: Tensor | None = None
    mismatch: Tensor | None = None
    gate: Tensor | None = None
    clipped: Tensor | None = None
    old: Tensor | None = None
    correction: Tensor | None = None
    ratio: Tensor | None = None
    held: Tensor | None = None
    kl: Tensor | None = None
    credit: Tensor | None = None
    painted: Tensor | None = None


@dataclass
class Expected:
    """One update: its gradient before clipping, its losses by component, its rows with their statistics."""

    step: int
    rows: list[Row]
    gradient: Weights
    losses: dict[str, float]
    scored: list[Scored] = field(default_factory=list)

    @property
    def norm(self) -> float:
        return math.sqrt(sum(float(part.square().sum()) for part in self.gradient.values()))

    def clipped(self, limit: float) -> Weights:
        """Return the gradient as the optimizer must have got it."""
        factor = min(1.0, limit / (self.norm + 1e-6)) if limit else 1.0
        return {name: factor * part for name, part in self.gradient.items()}


class Oracle:
    """Recomputes a recording."""

    def __init__(self, run: Recording) -> None:
        self.run = run
        self.settings = run.settings
        self.student = copy.deepcopy(run.model).double().eval()
        self._viewer = copy.deepcopy(run.model).double().eval()
        self._seen: dict[Any, Tensor] = {}
        self._averages: list[Weights] = []
        self._updates: list[Expected] | None = None

    # ---- prompts ------------------------------------------------------------------------------------------------

    def prompt(self, problem: Any) -> tuple[int, ...]:
        """Return what the student reads."""
        return student_prompt(self.run.tokenizer, self.settings, problem)

    def segments(self, solution: str) -> list[str]:
        """Cut a solution into its lines."""
        assert self.settings["reveal"]["unit"] in ("auto", "line")
        return re.findall(r"[^\n]+\n*", solution)

    def shown(self, problem: Any, ratio: float) -> list[bool]:
        """Say of every segment whether it is visible: the first or last floor(ratio m + 1e-9) of m."""
        count = len(self.segments(problem.solution))
        visible = math.floor(ratio * count + 1e-9)
        places = range(visible) if self.settings["reveal"]["order"] == "prefix" else range(count - visible, count)
        return [place in places for place in range(count)]

    def hint(self, problem: Any, ratio: float) -> str:
        """Return the hint at a ratio."""
        shown = self.shown(problem, ratio)
        if all(shown):
            return problem.solution
        lines = zip(self.segments(problem.solution), shown, strict=True)
        visible = "".join(line for line, is_shown in lines if is_shown).rstrip()
        answer = self.settings["prompt"]["answer"].replace("{answer}", problem.answer)
        if answer.strip() in visible.split("\n"):
            return visible
        return visible + answer if visible else answer.lstrip()

    def teacher_prompt(self, problem: Any, ratio: float) -> tuple[int, ...]:
        """Return what the teacher reads."""
        if self.settings["prompt"]["hint"] == "none":
            return self.prompt(problem)
        text = self.settings["prompt"]["teacher"].replace("{problem}", problem.problem)
        return rendered(self.run.tokenizer, text.replace("{hint}", self.hint(problem, ratio)))

    # ---- weights and forward passes -----------------------------------------------------------------------------

    def teacher(self, updates: int) -> Weights:
        """Return the teacher's weights after so many updates."""
        kind = self.settings["teacher"]["weights"]
        if kind == "frozen":
            return self.run.initial
        if kind == "live":
            return self.weights(updates)
        decay = self.settings["teacher"]["ema_decay"] or 0.999
        if not self._averages:
            average = {name: weight.double() for name, weight in self.run.initial.items()}
            self._averages.append(average)
            for update in self.run.updates:
                average = {name: decay * old + (1 - decay) * update.after[name] for name, old in average.items()}
                self._averages.append(average)
        return self._averages[updates]

    def weights(self, updates: int) -> Weights:
        """Return the student's weights after so many updates."""
        return self.run.updates[updates - 1].after if updates else self.run.initial

    def logits(self, model: nn.Module, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
        """Return the logits [T, V] that predict a completion's tokens."""
        out: Tensor = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0]
        return out[len(prompt) - 1 : -1]

    def seen(self, weights: Weights, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
        """Return the logits [T, V] under some weights, without a gradient."""
        key = (id(weights), tuple(prompt), tuple(completion))
        if key not in self._seen:
            put(self._viewer, weights)
            with torch.no_grad():
                self._seen[key] = self.logits(self._viewer, prompt, completion)
        return self._seen[key]

    def view(self, name: str, row: Row, teacher: Weights) -> Tensor:
        """Return a view's log-probabilities [T, V] at the teacher's temperature."""
        temperature = self.settings["loss"]["temperature_teacher"] or self.settings["rollout"]["temperature"]
        if name == "base":
            logits = self.seen(self.run.initial, row.prompt, row.completion)
        else:
            ratio = {"teacher": row.ratio, "full": 1.0, "answer": 0.0}[name]
            assert ratio is not None, "a distilled completion has a ratio"
            logits = self.seen(teacher, self.teacher_prompt(row.problem, ratio), row.completion)
        return (logits / temperature).log_softmax(-1)

    # ---- rows ---------------------------------------------------------------------------------------------------

    def reward(self, problem: Any, text: str, cut_off: bool) -> float | None:
        """Grade a completion: its last line `#answer` must be the problem's, unless the recipe has a reward."""
        chosen = self.settings["reward"]
        if chosen is not None:
            found = partial_credit.credit(problem.problem, text, problem.solution)
            return None if found is None else 0.0 if cut_off else found
        lines = [line.strip() for line in text.split("\n")]
        marked = [line[1:] for line in lines if re.match(r"#[^#\s]", line)]
        return float(not cut_off and bool(marked) and marked[-1] == problem.answer)

    def rows(self, step: int) -> list[Row]:
        """Return the completions of a step (1 is the first) in order, routed as the run directory says."""
        found: list[Row] = []
        records = self.run.groups[step]
        call = (
            None
            if self.settings["routing"]["kind"] == "sft"
            else self.run.of(self.run.trainer.parts.problems)[step - 1]
        )
        expected = self._expected(step)
        for place, record in enumerate(records):
            problem = self.run.problem(record["problem_id"])
            prompt = self.prompt(problem)
            if call is None:
                turns = [self._reference(problem)]
            else:
                asked = zip(call.prompts, call.turns, strict=True)
                turns = [
                    (turn.completion_ids, turn.logprobs, str(turn.stop) == "length") for p, turn in asked if p == prompt
                ]
            assert len(turns) == len(record["rewards"])
            rewards = [reward for reward in record["rewards"] if reward is not None]
            advantages = self._advantages(rewards) if record["route"] in ("rl", "both") else [0.0] * len(rewards)
            rest = iter(advantages)
            drops = self.settings["rl"]["zero_variance"] == "drop" and len(set(rewards)) <= 1
            for number, ((ids, sampled, cut_off), reward) in enumerate(zip(turns, record["rewards"], strict=True)):
                others = [each for at, each in enumerate(record["rewards"]) if at != number and each is not None]
                usual = sum(others) / len(others) if others else expected.get(problem.level)
                names = {"both": ("distil", "rl"), "skip": ()}.get(record["route"], (record["route"],))
                if reward is None or drops:
                    names = tuple(name for name in names if name != "rl")
                if cut_off and self.settings["step"]["truncated"] == "mask":
                    names = ()
                found.append(
                    Row(
                        problem,
                        prompt,
                        tuple(ids),
                        tuple(sampled),
                        cut_off,
                        reward,
                        record["route"],
                        record["ratio"],
                        record["lambda"] or 1.0,
                        names,
                        advantage=next(rest) if reward is not None else 0.0,
                        weight=self._problem_weight(rewards),
                        outcome=None if reward is None or usual is None else reward - usual,
                        place=place,
                    )
                )
        return found

    def _expected(self, step: int) -> dict[str, float]:
        """Return what a lone attempt of each level is compared with in a step: the level's running mean before it.

        m <- .9 m + .1 (the step's mean); a level's first step is compared with its own mean.
        """
        running: dict[str, float] = {}
        for number in range(1, step + 1):
            rewards: dict[str, list[float]] = {}
            for record in self.run.groups[number]:
                level = self.run.problem(record["problem_id"]).level
                rewards.setdefault(level, []).extend(each for each in record["rewards"] if each is not None)
            means = {level: sum(values) / len(values) for level, values in rewards.items() if values}
            if number == step:
                return {**means, **running}
            for level, mean in means.items():
                running[level] = 0.9 * running[level] + 0.1 * mean if level in running else mean
        raise AssertionError("steps begin at 1")

    def _reference(self, problem: Any) -> tuple[Sequence[int], Sequence[float], bool]:
        limit = self.settings["rollout"]["max_new_tokens"]
        ids = [*self.run.tokenizer.encode(problem.solution, add_special_tokens=False), self.run.tokenizer.eos_token_id]
        return ids[:limit], (), len(ids) > limit

    def _advantages(self, rewards: Sequence[float]) -> list[float]:
        if not rewards:
            return []
        mean = sum(rewards) / len(rewards)
        spread = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / len(rewards))
        if max(rewards) == min(rewards):
            return [0.0] * len(rewards)
        scale = spread + 1e-6 if self.settings["rl"]["scale"] == "std" else 1.0
        return [(reward - mean) / scale for reward in rewards]

    def _problem_weight(self, rewards: Sequence[float]) -> float:
        if self.settings["loss"]["prompt_weight"] == "none":
            return 1.0
        rate = sum(rewards) / len(rewards) if rewards else 0.5
        return rate * (1 - rate)

    def parts(self, step: int) -> list[list[Row]]:
        """Cut a step's completions into its updates."""
        rows = self.rows(step)
        size = len(rows) // self.settings["step"]["updates_per_batch"]  # of single turns, in groups of one size
        if self.settings["selection"]["kind"] != "all":
            for row, record in zip(rows, self.run.rollouts[step], strict=True):
                if "distil" in row.components:
                    row.selected = torch.tensor([float(weight != 0) for weight in record["gate"]], dtype=torch.float64)
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    # ---- one update ---------------------------------------------------------------------------------------------

    def updates(self) -> list[Expected]:
        """Return every update that the run must have made."""
        if self._updates is None:
            self._updates = []
            for step in range(1, self.run.steps + 1):
                begin = len(self._updates)
                for rows in self.parts(step):
                    if any(self._can_move(name, rows) for name in ("distil", "rl", "nll")):
                        self._updates.append(self.update(step, rows, begin, len(self._updates)))
        return self._updates

    def coefficient(self, name: str) -> float:
        """Return the factor of a component."""
        return self.settings["routing"].get("coef", 1.0) if name == "distil" else 1.0

    def _can_move(self, name: str, rows: Sequence[Row]) -> bool:
        fed = [row for row in rows if name in row.components]
        if name == "rl":
            return bool(fed) and (self.settings["rl"]["kl_coef"] > 0 or any(row.advantage for row in fed))
        return self.coefficient(name) != 0 and any(row.weight for row in fed)

    def update(self, step: int, rows: list[Row], begin: int, done: int) -> Expected:
        """Take the gradient of one update; `begin` and `done` are the updates before the step and before this one."""
        put(self.student, self.weights(done))
        teacher = self.teacher(done)
        terms: dict[str, list[Tensor]] = {}
        units: dict[str, float] = {}
        scored: list[Scored] = []
        several = self.settings["step"]["updates_per_batch"] > 1
        for row in rows:
            if not row.components:
                scored.append(self._silent(row))
                continue
            values, stats = self.token_losses(row, teacher, self.weights(begin) if several else None)
            scored.append(stats)
            for name, value in values.items():
                if name == "distil":
                    chosen = row.selected if row.selected is not None else torch.ones(len(row.completion)).double()
                    assert stats.gate is not None
                    weight = chosen * stats.gate * row.weight
                else:
                    chosen = weight = torch.ones(len(row.completion)).double()
                aggregate = self.settings["rl" if name == "rl" else "loss"]["aggregate"]
                if aggregate == "sequence":
                    weight = weight / max(1.0, float(chosen.sum()))
                terms.setdefault(name, []).append((weight * value).sum())
                units[name] = (
                    units.get(name, 0.0)
                    + {
                        "token": float(chosen.sum()),
                        "sequence": float(bool(chosen.any())),
                        "constant": float(self.settings["rollout"]["max_new_tokens"]),
                    }[aggregate]
                )
        if self.settings["routing"]["kind"] in ("hdpo", "cliff", "aligned"):
            units = dict.fromkeys(units, sum(units.values()))
        losses = {
            name: self.coefficient(name) * torch.stack(parts).sum() / units[name]
            for name, parts in terms.items()
            if self._can_move(name, rows)
        }
        named = [(name, weight) for name, weight in self.student.named_parameters() if weight.requires_grad]
        found = torch.autograd.grad(torch.stack(list(losses.values())).sum(), [weight for _, weight in named])
        gradient = {name: part for (name, _), part in zip(named, found, strict=True)}
        if self.settings["gradient"]["kind"] == "longact":
            gradient = self._masked(gradient, [row for row in rows if self._feeds(row, losses)])
        return Expected(step, rows, gradient, {name: float(loss.detach()) for name, loss in losses.items()}, scored)

    def _feeds(self, row: Row, losses: dict[str, Tensor]) -> bool:
        return bool(set(row.components) & set(losses))

    def _masked(self, gradient: Weights, rows: Sequence[Row]) -> Weights:
        """Zero the rows of query and key projections whose activations are not the largest of their head."""
        rule, size = self.settings["gradient"], self.student.config.head_dim  # type: ignore[union-attr]
        names = [f"model.layers.{layer}.self_attn.{which}_proj" for layer in rule["layers"] for which in "qk"]
        norms: dict[str, Tensor] = {}
        for row in rows:
            outputs: dict[str, Tensor] = {}

            def keep(
                module: nn.Module, given: object, output: Tensor, *, name: str, outputs: dict[str, Tensor] = outputs
            ) -> None:
                outputs[name] = output[0]

            handles = [
                self.student.get_submodule(name).register_forward_hook(partial(keep, name=name)) for name in names
            ]
            with torch.no_grad():
                self.student(input_ids=torch.tensor([[*row.prompt, *row.completion[:-1]]]), use_cache=False)
            for handle in handles:
                handle.remove()
            for name in names:
                norms[name] = norms.get(name, torch.zeros(())) + outputs[name].square().sum(0).sqrt()
        masked = dict(gradient)
        for name, norm in norms.items():
            kept = torch.zeros_like(norm)
            for start in range(0, len(norm), size):
                best = norm[start : start + size].topk(math.floor(rule["ratio"] * size + 1e-9)).indices
                kept[start + best] = 1.0
            masked[f"{name}.weight"] = gradient[f"{name}.weight"] * kept[:, None]
        return masked

    def _silent(self, row: Row) -> Scored:
        nothing = torch.zeros(len(row.completion)).double()
        return Scored(nothing, nothing, nothing)

    def token_losses(self, row: Row, teacher: Weights, begin: Weights | None) -> tuple[dict[str, Tensor], Scored]:
        """Return each component's loss per token, with its graph, and the statistics."""
        sampling = self.settings["loss"]["temperature_student"] or self.settings["rollout"]["temperature"]
        temperature = 1.0 if row.components == ("nll",) else sampling
        labels = torch.tensor(row.completion)[:, None]
        log_q = (self.logits(self.student, row.prompt, row.completion) / temperature).log_softmax(-1)
        logprob = log_q.gather(1, labels)[:, 0]
        old = logprob.detach()
        if begin is not None and row.components != ("nll",):
            before = (self.seen(begin, row.prompt, row.completion) / temperature).log_softmax(-1)
            old = before.gather(1, labels)[:, 0]
        q = log_q.detach()
        stats = Scored(logprob.detach(), -(q.exp() * q).sum(-1), q.max(-1).values.exp(), old=old)
        values: dict[str, Tensor] = {}
        if "distil" in row.components:
            values["distil"] = self._distil(row, log_q, labels, old, teacher, stats)
        if "rl" in row.components:
            values["rl"] = self._reinforce(row, logprob, old, temperature, stats)
        if "nll" in row.components:
            values["nll"] = -logprob
        return values, stats

    def _distil(self, row: Row, log_q: Tensor, labels: Tensor, old: Tensor, teacher: Weights, stats: Scored) -> Tensor:
        loss, gate = self.settings["loss"], self.settings["gate"]
        views = [self.view(name, row, teacher) for name in self.view_names(row.strength)]
        log_p, q = views[0], log_q.detach()
        kind = loss["divergence"]["kind"]
        plain = "reverse_kl" if kind == "sampled" else kind
        stats.divergence = self._summands(plain, log_p, q).sum(-1)
        stats.reverse_kl = self._summands("reverse_kl", log_p, q).sum(-1)
        stats.teacher_logprob = log_p.gather(1, labels)[:, 0]
        stats.teacher_entropy = -(log_p.exp() * log_p).sum(-1)
        stats.mismatch = (log_p.argmax(-1) != q.argmax(-1)).double()
        stats.gate = self._gate(stats, row.outcome)
        if gate["kind"] == "sdar" and gate["target"] == "surrogate":
            return stats.teacher_logprob - log_q.gather(1, labels)[:, 0]
        if self.settings["target"]["kind"] == "paint":
            stats.painted = self._painted(stats)
        target = self.target(row.strength, views, q, stats)
        if kind == "sampled":
            logprob = log_q.gather(1, labels)[:, 0]
            gap = target.gather(1, labels)[:, 0] - old
            ratio = (logprob.detach() - old).exp()
            stats.clipped = (ratio > loss["divergence"]["importance_clip"]).double()
            return -ratio.clamp(max=loss["divergence"]["importance_clip"]) * gap * logprob
        return self._divergence(target.log_softmax(-1), log_q)

    def view_names(self, strength: float) -> list[str]:
        """Return the views of the target."""
        target = self.settings["target"]
        if target["kind"] == "anchor_mix":
            return ["teacher", target["anchor"]]
        return ["teacher"] if target["kind"] == "extrapolate" and strength == 1 else VIEWS[target["kind"]]

    def _painted(self, stats: Scored) -> Tensor:
        """Say at which tokens entropies are far enough apart."""
        assert stats.teacher_entropy is not None
        return ((stats.teacher_entropy - stats.entropy).abs() >= self.settings["target"]["mismatch"]).double()

    def target(self, strength: float, views: Sequence[Tensor], student: Tensor, stats: Scored) -> Tensor:
        """Return the log target [T, V], up to a constant per token."""
        target, first = self.settings["target"], views[0]
        if target["kind"] == "paint":
            assert stats.painted is not None
            share = target["weight"] * stats.painted[:, None]
            return (1 - share) * first + share * student
        if target["kind"] == "avsd":
            mean = sum(views[1:], first) / len(views)
            consensus = mean - mean.logsumexp(-1, keepdim=True)
            residual = (sum(view.exp() for view in views) / len(views)).log() - consensus
            residual = torch.where(residual > 0, residual, 0.0)
            pull = (mean - student).abs()
            agreement = pull / (sum((view - student).abs() for view in views) / len(views))
            return consensus + agreement * pull / (pull + residual) * residual
        if len(views) == 1:
            return first
        second = views[1]
        match target["kind"]:
            case "extrapolate":
                return strength * first - (strength - 1) * second
            case "anchor_mix":
                return target["weight"] * first + (1 - target["weight"]) * second
            case _:
                return first + target["scale"] * (second - first).clamp(-target["bound"], target["bound"])

    def _summands(self, kind: str, log_p: Tensor, log_q: Tensor) -> Tensor:
        p, q = log_p.exp(), log_q.exp()
        match kind:
            case "forward_kl":
                return p * (log_p - log_q)
            case "reverse_kl":
                return q * (log_q - log_p)
            case _:
                beta = self.settings["loss"]["divergence"]["beta"]
                log_m = (beta * p + (1 - beta) * q).log()
                return beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)

    def _divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Return the divergence per token, on the target's top entries and clipped where that is asked for."""
        loss = self.settings["loss"]
        if loss["top_k"]:
            ids = log_p.topk(loss["top_k"]).indices
            kept_p, kept_q = log_p.gather(1, ids), log_q.gather(1, ids)
            if loss["tail"]:
                log_p, log_q = (
                    torch.cat([kept, (1 - kept.exp().sum(-1, keepdim=True)).log()], -1) for kept in (kept_p, kept_q)
                )
            else:
                log_p, log_q = kept_p.log_softmax(-1), kept_q.log_softmax(-1)
        parts = self._summands(loss["divergence"]["kind"], log_p, log_q)
        if loss["clip"] == "pointwise":
            parts = parts.clamp(max=loss["clip_tau"])
        whole = parts.sum(-1)
        return whole.clamp(max=loss["clip_tau"]) if loss["clip"] == "token" else whole

    def _gate(self, stats: Scored, outcome: float | None) -> Tensor:
        gate = self.settings["gate"]
        if gate["kind"] == "none":
            return torch.ones_like(stats.logprob)
        if gate["kind"] == "aligned":
            return torch.sigmoid(gate["beta"] * self.agreement(stats, outcome))
        value = torch.sigmoid(gate["beta"] * self.opening(stats))
        return value - 0.5 if gate["centered"] else value

    def agreement(self, stats: Scored, outcome: float | None) -> Tensor:
        """Return A (p_T(y) - p_S(y)); 0 where A is not known."""
        assert stats.teacher_logprob is not None
        return (outcome or 0.0) * (stats.teacher_logprob.exp() - stats.logprob.exp())

    def opening(self, stats: Scored) -> Tensor:
        """Return what opens SDAR's gate."""
        assert stats.teacher_logprob is not None
        gap = stats.teacher_logprob - stats.logprob
        match self.settings["gate"]["score"]:
            case "gap":
                return gap
            case "entropy":
                return stats.entropy
            case _:
                return 1 - (1 - stats.entropy) * (1 - gap)

    def _reinforce(self, row: Row, logprob: Tensor, old: Tensor, temperature: float, stats: Scored) -> Tensor:
        rl = self.settings["rl"]
        gap = logprob - old
        if rl["ratio"] == "sequence":
            gap = gap.mean().expand_as(gap)
        ratio = gap.exp()
        bounded = ratio.clamp(1 - rl["eps_low"], 1 + rl["eps_high"])
        credit = stats.credit = self._credit(row, old, stats)
        advantage = row.advantage * credit
        gain = torch.minimum(ratio * advantage, bounded * advantage)
        held = (bounded * advantage < ratio * advantage).detach()
        if rl["dual_clip"] and row.advantage < 0:
            floor = rl["dual_clip"] * advantage
            held = held | (gain < floor).detach()
            gain = torch.maximum(gain, floor)
        correction = torch.ones_like(old)
        if rl["importance_clip"] is not None:
            correction = (old - torch.tensor(row.sampled).double()).exp().clamp(max=rl["importance_clip"])
        kl = torch.zeros_like(logprob)
        if rl["kl_coef"]:
            base = (self.seen(self.run.initial, row.prompt, row.completion) / temperature).log_softmax(-1)
            d = base.gather(1, torch.tensor(row.completion)[:, None])[:, 0] - logprob
            kl = d.exp() - d - 1
        stats.ratio, stats.held, stats.correction, stats.kl = ratio.detach(), held.double(), correction, kl.detach()
        return rl["kl_coef"] * kl - correction * gain

    def _credit(self, row: Row, old: Tensor, stats: Scored) -> Tensor:
        """Return what the teacher who reads a completion makes of its advantage, token by token."""
        chosen = self.settings["rl"]["teacher_credit"]
        if chosen is None or stats.teacher_logprob is None:
            return torch.ones_like(old)
        evidence = (stats.teacher_logprob - old).exp()
        if row.advantage < 0:
            evidence = 1 / evidence
        if row.advantage == 0:
            evidence = torch.ones_like(old)
        bounded = evidence.clamp(1 - chosen["clip"], 1 + chosen["clip"])
        return (1 - chosen["share"]) + chosen["share"] * bounded

    # ---- the optimizer ------------------------------------------------------------------------------------------

    def moments(self) -> Iterator[tuple[Weights, Weights]]:
        """Yield Adam's two moments, without bias correction, after each recorded update."""
        first, second = self.settings["optim"]["betas"]
        m = {name: torch.zeros_like(weight).double() for name, weight in self.run.initial.items()}
        v = {name: torch.zeros_like(weight).double() for name, weight in self.run.initial.items()}
        for update in self.run.updates:
            m = {name: first * m[name] + (1 - first) * part for name, part in update.gradients.items()}
            v = {name: second * v[name] + (1 - second) * part.double() ** 2 for name, part in update.gradients.items()}
            yield m, v

    def rate(self, update: int) -> float:
        """Return the learning rate of the update with this index."""
        optim, step = self.settings["optim"], self.settings["step"]
        total, warm = step["num_steps"] * step["updates_per_batch"], optim["warmup_steps"]
        if update < warm:
            return optim["lr"] * (update + 1) / warm
        done = (update - warm) / (total - warm)
        shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return optim["lr"] * shape[optim["schedule"]]


def put(model: nn.Module, weights: Weights) -> None:
    """Load weights into a float64 model."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in weights:
                weight.copy_(weights[name])


def distance(found: Weights, expected: Weights) -> float:
    """Return |found - expected| / |expected| over all weights."""
    gap = sum(float((found[name].double() - part.double()).square().sum()) for name, part in expected.items())
    size = sum(float(part.double().square().sum()) for part in expected.values())
    return math.sqrt(gap / size) if size else math.sqrt(gap)
