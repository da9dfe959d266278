"""The scorer: from passages to per-token streams. The update, the probe and credit all stand on it.

N scored tokens, L input positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from atesd.codes.model import steered_rows
from atesd.gradients.rule import announce
from atesd.losses.divergence import (
    LOSS_ALONE,
    LossConfig,
    Scored,
    TokenStreams,
    Use,
    label_logprobs,
    token_streams,
)
from atesd.losses.target import Plain, Target
from atesd.train.batch import Passage, ViewInput, labels, micro_batches, view_input
from atesd.train.heads import Head, head
from atesd.train.last import final_states
from atesd.train.shard import Whole
from atesd.train.teacher import Teacher
from atesd.train.veils import Veils
from atesd.train.world import World
from atesd.transfer import numbers_of


class Student(nn.Module):
    """The trained model as one module from ids to per-token streams, so that wrappers see the whole forward pass."""

    def __init__(self, model: nn.Module, loss: LossConfig) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(
        self,
        inputs: ViewInput,
        labels_N: Tensor,
        views: Sequence[Scored],
        target: Target,
        temperature: float,
        old_logprob_N: Tensor | None = None,
        use: Use = LOSS_ALONE,
    ) -> TokenStreams:
        """Return the divergence and log-probability streams against the target made of the teacher views.

        Without a view the divergence is 0, and `temperature` is the log-probabilities' own.
        """
        student = hidden_states(self.model, inputs)
        if not views:
            return label_streams(student, labels_N, self._loss, temperature)
        return token_streams(
            student,
            views,
            labels_N,
            self._loss,
            target=target,
            temperature=temperature,
            old_logprob_N=old_logprob_N,
            use=use,
        )


class Scorer:
    """Runs the model over passages, with the student's or a teacher's weights in place.

    `temperature` is that of sampling; `loss` may give each role its own. `student` is the model as wrapped for
    training; without it the model itself stands in, which is enough for scoring. `veils` hide tokens where passages
    ask for it. `world` are the processes that share out what is averaged. Where `shards` are derived, a micro-batch is
    one pass, which gathers every layer once.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        pad_id: int,
        loss: LossConfig,
        temperature: float,
        token_budget: int,
        checkpointing: bool = False,
        student: nn.Module | None = None,
        veils: Veils | None = None,
        world: World | None = None,
        shards: Whole | None = None,
    ) -> None:
        self.model = model
        self.world = world or World()
        self._shards = shards or Whole(self.world)
        self.veils = veils
        self.loss = loss
        self.token_budget = token_budget
        self.student_temperature = loss.temperature_student or temperature
        self.teacher_temperature = loss.temperature_teacher or temperature
        self.samples_as_scored = self.student_temperature == temperature
        self._temperature = temperature
        self.pad_id = pad_id
        self._checkpointing = checkpointing
        self._student = student or Student(model, loss)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def training_mode(self) -> None:
        """Switch on what the backward pass needs. Dropout is inactive, as in OPSD's code (`enable_checkpointing`)."""
        self.model.train(self._checkpointing)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record gradients as training does."""
        self.training_mode()
        try:
            with torch.enable_grad():
                yield
        finally:
            self.model.eval()

    def streams(
        self,
        passages: Sequence[Passage],
        views: Sequence[Scored] = (),
        target: Target | None = None,
        *,
        temperature: float | None = None,
        old_logprob_N: Tensor | None = None,
        use: Use = LOSS_ALONE,
    ) -> TokenStreams:
        """Run the training forward pass. Without views `temperature` is the log-probabilities'; unset, the student's.

        The views must be scored before: the student's graph must not see the teacher's weights in place.
        """
        default = self._temperature if views else self.student_temperature
        streams: TokenStreams = self._student(
            self._input(passages),
            labels(passages, self.device),
            views,
            target or Plain(),
            default if temperature is None else temperature,
            old_logprob_N,
            use,
        )
        return streams

    def hidden(self, passages: Sequence[Passage]) -> Scored:
        """Return the hidden states of the scored positions under the weights in place."""
        return hidden_states(self.model, self._input(passages), self.veils)

    def _input(self, passages: Sequence[Passage]) -> ViewInput:
        together = self._shards.is_deriving
        return view_input(passages, self.pad_id, self.device, self.token_budget, together=together)

    def nothing(self) -> Tensor:
        """Return 0, made of a training pass over one token: no weight is without gradient, and none of it counts."""
        token = Passage((self.pad_id,), (self.pad_id,))
        return 0 * self.streams([token], use=Use(loss=False, logprob=True)).logprob_N.sum()

    def view(self, passages: Sequence[Passage], weights: Teacher) -> Scored:
        """Return what a teacher view makes of the passages, without gradient, to be kept beyond its weights."""
        with weights.in_place():
            return self.hidden(passages).detached()

    def against(
        self,
        student: Scored,
        views: Sequence[Scored],
        passages: Sequence[Passage],
        target: Target,
        *,
        plain: bool = False,
        use: Use = LOSS_ALONE,
    ) -> TokenStreams:
        """Return the streams of a student pass that serves several targets; `plain`: forward KL at temperature 1."""
        loss = _plain(self.loss) if plain else self.loss
        temperature = 1.0 if plain else self._temperature
        return token_streams(
            student, views, labels(passages, self.device), loss, target=target, temperature=temperature, use=use
        )

    def log_likelihood(self, passages: Sequence[Passage], temperature: float = 1.0) -> Tensor:
        """Return log p(label) of every scored token, [N], under the weights in place; differentiable if recorded."""
        return self.log_likelihood_of(self.hidden(passages), labels(passages, self.device), temperature)

    def log_likelihood_of(self, scored: Scored, labels_N: Tensor, temperature: float) -> Tensor:
        """Return log p(label), [N], of hidden states at hand."""
        return label_logprobs(scored, labels_N, temperature, self.loss.tile_logits)

    def head(self) -> Head:
        """Return the output head under the weights in place."""
        return head(self.model)

    def batches(self, passages: Sequence[Passage]) -> Iterator[list[int]]:
        """Cut passages into micro-batches of the token budget, by index."""
        return micro_batches([passage.cost for passage in passages], self.token_budget)

    def each(self, passages: Sequence[Passage], score: Callable[[Sequence[Passage]], Tensor]) -> list[Tensor]:
        """Score passages in micro-batches; return each passage's own tokens, [T] or [T, ...]."""
        found: dict[int, Tensor] = {}
        for members in self.batches(passages):
            chosen = [passages[member] for member in members]
            values = score(chosen)
            found |= zip(members, values.split_with_sizes([len(each.completion) for each in chosen]), strict=True)
        return [found[index] for index in range(len(passages))]

    def mean(self, passages: Sequence[Passage], score: Callable[[Sequence[Passage]], Tensor]) -> float:
        """Average a per-token score over all tokens of the passages, in micro-batches shared out among processes."""
        sums: list[Tensor] = []
        count = 0
        own = self.world.share(passages)
        for members in self.batches(own):
            values_N = score([own[member] for member in members])
            sums.append(values_N.double().sum())
            count += values_N.numel()
        totals, counts = zip(*self.world.collect((sum(numbers_of(sums)), count)), strict=True)
        return float(sum(totals) / sum(counts))


def hidden_states(model: nn.Module, inputs: ViewInput, veils: Veils | None = None) -> Scored:
    """Run the decoder and keep the hidden states [N, H] of the scored positions: the head sees no other row."""
    hidden = []
    for each in inputs.passes:
        announce(model, each.lengths)
        assert veils or not each.veiled, "a passage has a veil, and nothing would hide its tokens"
        veiled = veils.over(each) if veils and each.veiled else nullcontext()
        with veiled, steered_rows(model, each.prompts, each.lengths, each.members):
            hidden.append(final_states(model, each))
    return Scored(inputs.in_order(hidden), *head(model))


def label_streams(student: Scored, labels_N: Tensor, tiles: LossConfig, temperature: float) -> TokenStreams:
    """Score labels without a teacher."""
    return token_streams(
        student,
        [],
        labels_N,
        _plain(tiles),
        target=Plain(),
        temperature=temperature,
        use=Use(loss=False, logprob=True),
    )


def _plain(tiles: LossConfig) -> LossConfig:
    """Return forward KL without clip or temperatures, in the same tiles."""
    return LossConfig(tile_logits=tiles.tile_logits)
