"""LongAct: of the query and key projections only the rows of salient dimensions learn.

B sequences of the update, S their positions, H heads (of keys: those that groups of queries share), D dimensions of a
head, R rows of a projection, H D of them.

    M_hd = (1 / B) sum_i sqrt(sum_s x_ishd^2)        x: what the projection puts out in the student's training pass
    kept: of every head the floor(ratio D) dimensions of largest M, at least one; the first of equals
    gradient of W_Q and W_K: rows that are not kept become 0

LongAct, arXiv 2604.14922, second-hand; official code not seen. All other weights learn in full, biases of these
projections included. Deviations: 1. a batch is an update, over all its micro-batches; 2. with adapters the rows are
those of the up-matrix, as a row of it moves the same output; 3. `strict` (ours): Adam moves a weight without a gradient
too, by its momentum and its decay, so that these rows are put back after the step, bit for bit; 4. `score = "random"`
(ours), the control: as many rows of every head, drawn anew in every update.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from atesd.facts import RunFacts
from atesd.gradients.rule import GradientMethod, GradientRule, announced
from atesd.seeds import derive_seed
from atesd.transfer import sent
from atesd.types import Stateless, UserError

_PROJECTION = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:.*\.)?([qk])_proj$")


class LongAct(GradientMethod):
    """Rows of query and key projections learn where activations are large (LongAct 2604.14922)."""

    kind: Literal["longact"] = "longact"
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of every head's dimensions that learn; 1 is all of them."""
    score: Literal["activation", "random"] = "activation"
    """What they are chosen by: the norm of their activations over a sequence, or, as a control, chance."""
    strict: bool = False
    """Put the other rows back after the optimizer's step, whose momentum and weight decay move them as well. Costs a
    copy of both projections."""
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    """Numbers of the decoder layers whose projections are masked, from 0; unset, all."""

    watches: ClassVar[bool] = False  # but for what `watched` returns

    def describe(self) -> str:
        """Name share and choice."""
        chosen = "of largest activations (LongAct)" if self.score == "activation" else "drawn at random"
        held = ", the others stay as they are" if self.strict else ""
        return f"Of the rows of query and key projections {100 * self.ratio:.3g} % a head learn, those {chosen}{held}"

    def build(self, run: RunFacts) -> GradientRule:
        """Return the rule."""
        return LongActRule(self, run.seed_for("longact"))


@dataclass(slots=True)
class _Projection:
    """A masked projection, and what is known of it in an update."""

    module: nn.Module
    weights: list[nn.Parameter]
    """Its own weight where it trains, else the up-matrices of its adapters: each with a row an output."""
    head_size: int
    sums_HD: Tensor | None = None
    """sum_i sqrt(sum_s x^2)."""
    kept_R: Tensor | None = None
    before: list[Tensor] | None = None
    """With `strict`: the weights before the step."""


class LongActRule(Stateless):
    """Watches the student's training passes, masks gradients, and puts rows back where that is asked for."""

    def __init__(self, config: LongAct, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._updates = 0
        self._projections: list[_Projection] = []
        self._latest: dict[str, float] = {}

    def prepare(self, model: nn.Module) -> None:
        """Find the projections. UserError for a model without separate ones, or with fewer layers than were named."""
        found = {name: match for name, _ in model.named_modules() if (match := _PROJECTION.search(name))}
        if {match[2] for match in found.values()} != {"q", "k"}:
            raise UserError(
                'gradient.kind = "longact" masks separate query and key projections, called q_proj and k_proj, and '
                f"{type(_beneath(model)).__name__} has {_instead(model)}: take another model, or remove gradient"
            )
        depth = 1 + max(int(match[1]) for match in found.values())
        layers = range(depth) if self._config.layers is None else self._config.layers
        beyond = [layer for layer in layers if layer >= depth]
        if beyond:
            raise UserError(
                f"gradient.layers names layer {beyond[0]}, and the model's {depth} decoder layers are numbered from 0 "
                f"to {depth - 1}: name those, or leave gradient.layers out for all"
            )
        self._projections = [
            _Projection(module, weights, _head_size(model, name))
            for name, module in model.named_modules()
            if name in found and int(found[name][1]) in layers and (weights := _row_weights(module))
        ]
        if not self._projections:
            raise UserError(
                'gradient.kind = "longact" masks rows of query and key projections, none of which trains: add q_proj '
                "and k_proj to model.lora.targets, or remove gradient"
            )

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Take in what the projections put out in the student's own passes."""
        handles = []
        if self._config.score == "activation":
            handles = [each.module.register_forward_hook(self._watch(each, model)) for each in self._projections]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, projection: _Projection, model: nn.Module) -> Any:
        def hook(module: nn.Module, given: object, output: Tensor) -> None:  # noqa: ARG001
            # Teachers' passes record no gradient; those that checkpointing repeats run inside the backward pass.
            if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
                return
            sums_HD = sequence_norms(output.detach(), announced(model), projection.head_size)
            projection.sums_HD = sums_HD if projection.sums_HD is None else projection.sums_HD + sums_HD

        return hook

    def watched(self) -> list[Tensor]:
        """Return the sums over sequences, zeros where this process saw none."""
        if self._config.score != "activation":
            return []
        for each in self._projections:
            if each.sums_HD is None:
                weight = each.weights[0]
                each.sums_HD = torch.zeros(len(weight) // each.head_size, each.head_size, device=weight.device)
        return [each.sums_HD for each in self._projections if each.sums_HD is not None]

    def apply(self, model: nn.Module) -> None:  # noqa: ARG002
        """Zero the gradients of the rows that are not kept."""
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "update", self._updates))
        self._updates += 1
        shares: list[Tensor] = []
        for each in self._projections:
            sums_HD = self._scores(each, generator)
            kept_HD = salient(sums_HD, self._config.ratio)
            each.kept_R, each.sums_HD = kept_HD.flatten(), None
            shares.append(torch.stack((torch.where(kept_HD, sums_HD, 0).sum(), sums_HD.sum())))
            each.before = [weight.detach().clone() for weight in each.weights] if self._config.strict else None
            for weight in each.weights:
                if weight.grad is not None:
                    weight.grad.masked_fill_(~each.kept_R[:, None], 0)
        if self._config.score == "activation":
            held, total = torch.stack(shares).double().sum(0).tolist()
            self._latest = {"gradient/salient_share": held / total if total else 0.0}

    def _scores(self, projection: _Projection, generator: torch.Generator) -> Tensor:
        weight = projection.weights[0]
        if self._config.score == "random":
            shape = (weight.shape[0] // projection.head_size, projection.head_size)
            return sent(torch.rand(shape, generator=generator), weight.device)
        assert projection.sums_HD is not None, "a projection was not seen in the update"
        return projection.sums_HD

    def mend(self, model: nn.Module) -> None:  # noqa: ARG002
        """Put rows that are not kept back to what they were before the step."""
        for each in self._projections:
            if each.before is None or each.kept_R is None:
                continue
            with torch.no_grad():
                for weight, before in zip(each.weights, each.before, strict=True):
                    weight.copy_(torch.where(each.kept_R[:, None], weight, before))
            each.before = None

    def metrics(self) -> Mapping[str, float]:
        """Return how much of the summed norms the kept rows hold, in the step's last update."""
        latest, self._latest = self._latest, {}
        return latest

    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates, by which chance goes on."""
        return {"updates": self._updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._updates = int(state["updates"])


def sequence_norms(output_BSR: Tensor, lengths: Sequence[int], head_size: int) -> Tensor:
    """Return sum_i sqrt(sum_s x_ishd^2), [H, D] in float32, over the first `lengths` positions of each sequence."""
    assert len(lengths) == output_BSR.shape[0], "one length a row of the pass"
    ends_B = sent(torch.tensor(lengths), output_BSR.device)
    is_real_BS = torch.arange(output_BSR.shape[1], device=output_BSR.device) < ends_B[:, None]
    squares_BR = (output_BSR.float().square() * is_real_BS[:, :, None]).sum(1)
    return squares_BR.sqrt().sum(0).view(-1, head_size)


def salient(scores_HD: Tensor, ratio: float) -> Tensor:
    """Return which dimensions of each head are kept: the floor(ratio D) of largest score, at least one; 0/1 as bool."""
    count = max(1, int(ratio * scores_HD.shape[1] + 1e-9))
    first_HK = scores_HD.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(scores_HD, dtype=torch.bool).scatter_(1, first_HK, value=True)


def _row_weights(module: Any) -> list[nn.Parameter]:
    """Return the weights of a projection that train and have a row an output."""
    ups = getattr(module, "lora_B", {})
    plain = getattr(module, "base_layer", module).weight
    candidates = [plain, *(ups[name].weight for name in ups)]
    return [weight for weight in candidates if weight.requires_grad]


def _head_size(model: nn.Module, name: str) -> int:
    """Return the dimensions of a head of a projection."""
    attention = model.get_submodule(name.rpartition(".")[0])
    size = getattr(attention, "head_dim", None)
    if size is None:
        settings = cast("Any", model).config.get_text_config()
        size = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    return int(size)


def _beneath(model: nn.Module) -> nn.Module:
    return cast("Any", model).get_base_model() if hasattr(model, "get_base_model") else model


def _instead(model: nn.Module) -> str:
    """Name what a model's attention has in place of both."""
    fused = ("qkv_proj", "c_attn", "query_key_value", "Wqkv", "wqkv", "W_pack", "qkv")
    ends = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return next((f"one of both, {name}" for name in fused if name in ends), "none")
