"""Forward passes: from ids to the hidden states of the scored positions, and to per-token streams.

N scored tokens of a micro-batch, L input positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from atesd.losses.divergence import LossConfig, Scored, TokenStreams, token_streams
from atesd.losses.target import Plain, Target
from atesd.train.batch import ViewInput
from atesd.train.model import decoder, head


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
    ) -> TokenStreams:
        """Return the divergence and log-probability streams against the target made of the teacher views.

        Without a view the divergence is 0, and `temperature` is the log-probabilities' own.
        """
        student = scored_hidden(self.model, inputs)
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
        )


def label_streams(student: Scored, labels_N: Tensor, tiles: LossConfig, temperature: float = 1.0) -> TokenStreams:
    """Score labels without a teacher: the student itself stands in for the view."""
    plain = LossConfig(tile_tokens=tiles.tile_tokens, tile_vocab=tiles.tile_vocab)
    return token_streams(student, [detached(student)], labels_N, plain, target=Plain(), temperature=temperature)


def scored_hidden(model: nn.Module, inputs: ViewInput) -> Scored:
    """Run the decoder and keep the hidden states [N, H] of the scored positions: the head sees no other row."""
    hidden_BLH = decoder(model)(
        input_ids=inputs.input_ids_BL,
        attention_mask=inputs.attention_mask_BL,
        position_ids=inputs.position_ids_BL,
        use_cache=False,
    ).last_hidden_state
    head_VH, bias_V = head(model)
    return Scored(hidden_BLH[inputs.scored_BL], head_VH, bias_V)


def detached(scored: Scored) -> Scored:
    """Return a view that stays what it is when the teacher's weights give way to the student's."""
    return Scored(scored.hidden_NH, scored.head_VH.detach(), None if scored.bias_V is None else scored.bias_V.detach())
