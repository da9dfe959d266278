"""Veils: a teacher's attention without some tokens of its hint, in one pass; every other pass is left as it is.

While a pass with veils runs, and never else, the model's attention is a function of transformers' AttentionInterface:
scaled dot-product attention with a bias of the layer's own added to the logits. A key that is hidden has the lowest
number there is for every query but its own; while gates learn, a key of the hint has (q - k) log beta
(exposure/retention_gates.py).

What gates keep is settled first: a pass over the prompt alone, up to the hint's end and with nothing hidden, gives the
states that enter each layer, these the betas, and the betas what is kept at the prompt's last position.

B rows of a pass, L positions, E layers, H key heads (1 where all are alike), Q queries, K keys, I tokens of a hint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from atesd.exposure.retention_gates import Gates, decay_bias, evict
from atesd.exposure.revealer import Masker, ModelSize
from atesd.rollout.known import SHORT_ROWS
from atesd.train.batch import Pass, Passage, Veil
from atesd.train.heads import decoder, kind_of
from atesd.transfer import sent
from atesd.types import UserError, first_line

_ATTENTION = "atesd_veiled"
_ROUNDING = 1e-2
_REMEDY = 'take a model whose layers call scaled dot-product attention, or set reveal.kind = "segments"'


@dataclass(slots=True)
class _Bias:
    """What a layer adds to its logits, [B, H, Q, K], and whether its attention asked for it."""

    values: Tensor
    was_read: bool = False


@dataclass(slots=True)
class Remembered:
    """A pass in which gates learn: its veiled passages by row, and each layer's log beta, [B, H, L], 0 elsewhere."""

    veiled: Mapping[int, Passage]
    log_beta: list[Tensor] = field(default_factory=list)


class Veils:
    """Hides tokens in a model's passes. UserError for a model whose attention cannot be replaced."""

    def __init__(self, model: nn.Module, gates: Gates | None = None) -> None:
        self._model = model
        self.gates = gates
        self._settings = cast("Any", model).config.get_text_config()
        self._layers = _layers_of(model)
        self._learning: list[Remembered] | None = None
        _register()
        self._refuse_misfit()

    @contextmanager
    def over(self, each: Pass) -> Iterator[None]:
        """Hide what the veils of a pass say; or let it fade, within `remembering`."""
        bias = self._hiding(each) if self._learning is None else self._fading(each)
        with self._replaced(bias):
            yield

    @contextmanager
    def remembering(self) -> Iterator[list[Remembered]]:
        """Within the block hints fade as gates say, with gradients; what they said of each pass is in the list."""
        self._learning = []
        try:
            yield self._learning
        finally:
            self._learning = None

    def kept(self, each: Pass) -> dict[int, Tensor]:
        """Return which entries of each veiled row's hint attention reaches, [E, H, I] as bool; E, H 1 where alike."""
        chosen = {row: passage for row, passage in each.veiled.items() if _veil(passage).kept is None}
        found = self._kept_by_gates(chosen, each) if chosen else {}
        shape = next(iter(found.values())).shape[:2] if found else (1, 1)
        for row, passage in each.veiled.items():
            veil = _veil(passage)
            if veil.kept is not None:
                kept_I = torch.zeros(veil.stop - veil.start, dtype=torch.bool)
                kept_I[list(veil.kept)] = True
                found[row] = sent(kept_I, each.ids_BL.device).expand(*shape, -1)
        return found

    def reached(self, passage: Passage) -> list[float]:
        """Return of each token of a veiled hint the share of entries, over layers and heads, that attention reaches."""
        ids_BL = torch.tensor([passage.prompt], device=next(self._model.parameters()).device)
        length = (len(passage.prompt),)
        kept_EHI = self.kept(Pass(ids_BL, length, length, (0,), ids_BL, {0: passage}))[0]
        return kept_EHI.float().mean((0, 1)).tolist()

    @torch.no_grad()
    def _kept_by_gates(self, veiled: Mapping[int, Passage], each: Pass) -> dict[int, Tensor]:
        """Read each distinct prompt once, and keep what its betas say."""
        gates = self.gates
        assert gates is not None, "a veil that leaves the choice to gates, of which there are none"
        first: dict[tuple[int, ...], int] = {}  # the row of each distinct prompt
        for row, passage in veiled.items():
            first.setdefault(_hinted(passage), row)
        place = {prompt: number for number, prompt in enumerate(first)}
        width = max(_veil(passage).stop for passage in veiled.values())
        said: list[Tensor] = []

        def listen(layer: int, states_BLW: Tensor) -> None:
            said.append(gates.log_beta(layer, states_BLW))

        with self._watched(listen):
            rows = sent(torch.tensor(list(first.values())), each.ids_BL.device)
            decoder(self._model)(input_ids=each.ids_BL.index_select(0, rows)[:, :width], use_cache=False)
        log_beta_BEHL = torch.stack(said, dim=1)
        found = {}
        for row, passage in veiled.items():
            veil = _veil(passage)
            log_beta_EHI = log_beta_BEHL[place[_hinted(passage)], ..., veil.start : veil.stop]
            found[row] = evict(log_beta_EHI, len(passage.prompt) - 1 - veil.start, veil.keep)
        return found

    def _hiding(self, each: Pass) -> Callable[[int, Tensor], Tensor]:
        """Return what hides everything that is not kept from every query but its own."""
        kept = self.kept(each)
        layers, heads, _ = next(iter(kept.values())).shape
        rows, length = each.ids_BL.shape
        hidden_EBHL = torch.zeros(layers, rows, heads, length, dtype=torch.bool, device=each.ids_BL.device)
        for row, kept_EHI in kept.items():
            veil = _veil(each.veiled[row])
            hidden_EBHL[:, row, :, veil.start : veil.stop] = ~kept_EHI
        other_QK = ~torch.eye(length, dtype=torch.bool, device=each.ids_BL.device)

        def bias(layer: int, states_BLW: Tensor) -> Tensor:
            hidden_BHQK = hidden_EBHL[min(layer, layers - 1)][:, :, None, :] & other_QK
            lowest = torch.finfo(states_BLW.dtype).min
            return torch.zeros_like(hidden_BHQK, dtype=states_BLW.dtype).masked_fill_(hidden_BHQK, lowest)

        return bias

    def _fading(self, each: Pass) -> Callable[[int, Tensor], Tensor]:
        """Return what lets the tokens of hints fade."""
        gates, learning = self.gates, self._learning
        assert gates is not None
        assert learning is not None
        is_hint_BL = torch.zeros(each.ids_BL.shape, dtype=torch.bool, device=each.ids_BL.device)
        for row, passage in each.veiled.items():
            is_hint_BL[row, _veil(passage).start : _veil(passage).stop] = True
        remembered = Remembered(each.veiled)
        learning.append(remembered)

        def bias(layer: int, states_BLW: Tensor) -> Tensor:
            log_beta_BHL = gates.log_beta(layer, states_BLW).where(is_hint_BL[:, None, :], 0.0)
            remembered.log_beta.append(log_beta_BHL)
            return decay_bias(log_beta_BHL)

        return bias

    @contextmanager
    def _replaced(self, bias: Callable[[int, Tensor], Tensor]) -> Iterator[list[_Bias]]:
        """Put the attention with a bias in place, and give every layer its own."""
        given: list[_Bias] = []

        def give(layer: int, states_BLW: Tensor) -> dict[str, Any]:
            given.append(_Bias(bias(layer, states_BLW)))
            return {"atesd_bias": given[-1]}

        before = self._settings._attn_implementation
        self._settings._attn_implementation = _ATTENTION
        try:
            with self._watched(give):
                yield given
        finally:
            self._settings._attn_implementation = before

    @contextmanager
    def _watched(self, see: Callable[[int, Tensor], dict[str, Any] | None]) -> Iterator[None]:
        """Show `see` the states that enter each layer; what it returns is given to the layer by keyword."""

        def hook(layer: int) -> Callable[..., Any]:
            def before(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
                more = see(layer, args[0] if args else options["hidden_states"])
                return (args, {**options, **more}) if more else None

            return before

        handles = [
            module.register_forward_pre_hook(hook(layer), with_kwargs=True) for layer, module in enumerate(self._layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _refuse_misfit(self) -> None:
        """Try two pairs of tokens that differ in the first, which is hidden from the second: it must tell nothing."""
        name, attention = kind_of(self._model), self._settings._attn_implementation
        if attention not in ("sdpa", SHORT_ROWS):
            raise UserError(
                f'reveal.kind = "retention" hides tokens within scaled dot-product attention, and {name} runs with '
                f'attn_implementation = "{attention}": set model.attn_implementation = "sdpa", or reveal.kind = '
                '"segments"'
            )
        ids_BL = torch.tensor([[0, 1], [1, 1]], device=next(self._model.parameters()).device)
        veil = Veil(0, 1, 0, None if self.gates is not None else ())
        veiled = {row: Passage(tuple(ids), (0,), veil) for row, ids in enumerate(ids_BL.tolist())}
        try:
            with self._replaced(self._hiding(Pass(ids_BL, (2, 2), (1, 1), (0, 1), ids_BL, veiled))) as given:
                one_W, other_W = decoder(self._model)(input_ids=ids_BL, use_cache=False).last_hidden_state[:, 1]
        except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, NotImplementedError) as error:
            raise UserError(
                f'reveal.kind = "retention" cannot hide tokens from the attention of {name} ({first_line(error)}): '
                f"{_REMEDY}"
            ) from error
        if not given or not all(each.was_read for each in given):
            raise UserError(f'reveal.kind = "retention" cannot replace the attention of {name}: {_REMEDY}')
        if (one_W - other_W).abs().max() > _ROUNDING * one_W.abs().max():
            raise UserError(
                f'reveal.kind = "retention" hides tokens from attention, and {name} passes on by other ways what they '
                f"say: {_REMEDY}"
            )


def veils_for(model: nn.Module, masker: Masker) -> Veils:
    """Show a masker the model's size, and return what hides tokens for it."""
    settings = cast("Any", model).config.get_text_config()
    heads = getattr(settings, "num_key_value_heads", None) or settings.num_attention_heads
    device = next(model.parameters()).device
    masker.prepare(ModelSize(len(_layers_of(model)), int(heads), int(settings.hidden_size), device))
    return Veils(model, masker.gates)


def _layers_of(model: nn.Module) -> nn.ModuleList:
    """Return the decoder's layers. UserError where they are no list of as many as the config says."""
    depth = cast("Any", model).config.get_text_config().num_hidden_layers
    for module in decoder(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise UserError(f'reveal.kind = "retention" finds no list of {depth} layers in {kind_of(model)}: {_REMEDY}')


def _veil(passage: Passage) -> Veil:
    assert passage.veil is not None
    return passage.veil


def _hinted(passage: Passage) -> tuple[int, ...]:
    """Return all that the states of a hint depend on."""
    return passage.prompt[: _veil(passage).stop]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    atesd_bias: _Bias | None = None,
    **options: Any,
) -> Any:
    """Attend as transformers' own function does, with the layer's bias on the logits."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if atesd_bias is None:
        raise ValueError("its layers do not hand keywords on to attention")
    bias_BHQK = atesd_bias.values.to(query.dtype)
    groups = query.shape[1] // key.shape[1]
    if bias_BHQK.shape[1] > 1 and groups > 1:
        bias_BHQK = bias_BHQK.repeat_interleave(groups, dim=1)
    atesd_bias.was_read = True
    return sdpa_attention_forward(module, query, key, value, attention_mask, position_bias=bias_BHQK, **options)


def _register() -> None:
    """Make the attention known to transformers, whose code of models only a run with veils needs."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
