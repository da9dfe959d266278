"""The Llama family read one position at a time, on the weights of transformers' own module.

B rows, U different prompts, L prompt positions, P positions of one pass (L, 1, or 1 and the guessed ones), H hidden
size, Q query heads, K heads of keys and values, G query heads that share one of these, D head size, S columns of the
cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from atesd.codes.steer import Codes, Walk
from atesd.rollout.guess import free_positions
from atesd.transfer import sent

_Steer = Callable[[Tensor], Tensor]
_Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
_Places = tuple[Tensor, Tensor]
"""Rows and their positions."""
_PRECISE = (torch.float32, torch.float64)
_PART = 2**18
"""Numbers of a part of a tall matrix, 1 MiB in float32: what a core's own cache holds."""
_FEW, _FEW_OF_TALL = 4, 8
"""Rows up to which `_few_rows` is the faster product on a CPU, with one thread as with two."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A low-rank addition to a linear layer: scale * up @ down, with down [r, in] and up [out, r]."""

    down: Tensor
    up: Tensor
    scale: float


def adapters_of(layer: Any) -> list[Adapter]:
    """Return the adapters that a layer applies as it stands; none where they are switched off."""
    if not hasattr(layer, "base_layer") or layer.disable_adapters:
        return []
    return [
        Adapter(layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name]))
        for name in layer.active_adapters
        if name in layer.lora_A
    ]


class Cache:
    """Keys and values of every layer, [B, K, S, D]: prompts from column 0, completions from the longest's end.

    So a shorter prompt leaves a gap of columns, which `mask` hides; keys carry their true positions. A pass over
    prompts is then plainly causal, and every row writes the same column: but where rows go on at paces of their own
    (`is_ragged`), whose columns behind the end hold what was tried, until they are written again.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        shape: tuple[int, int, int, int],
        num_layers: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        is_ragged: bool,
    ) -> None:
        new = torch.zeros if is_ragged else torch.empty  # hidden columns are read, and 0 * NaN is NaN
        self.keys = [new(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [new(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.lengths_B = sent(torch.tensor(lengths), device)
        """Tokens of each prompt."""
        self.width = max(lengths)
        """The first column of completions."""
        self.positions_B = self.lengths_B
        """The position of each row's next token."""
        self.filled = self.width
        """Columns in use, or a few more."""
        self.walk: Walk | None = None
        """The codes in force, where some steer."""
        self.mask_B11S: Tensor | None = None
        if min(lengths) < self.filled:
            columns_S = torch.arange(shape[2], device=device)
            hidden_BS = (columns_S >= self.positions_B[:, None]) & (columns_S < self.filled)
            mask_BS = torch.zeros(hidden_BS.shape, dtype=dtype, device=device).masked_fill_(hidden_BS, -torch.inf)
            self.mask_B11S = mask_BS[:, None, None].contiguous()

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, in place."""
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):
                kept = tensor[: len(rows)]
                kept[:, :, : self.filled] = tensor[:, :, : self.filled].index_select(0, rows)
                tensors[layer] = kept
        self.positions_B, self.lengths_B = self.positions_B[rows], self.lengths_B[rows]
        if self.walk is not None:
            self.walk.keep(rows)
        if self.mask_B11S is not None:
            self.mask_B11S = self.mask_B11S[rows]

    def mask_of(self, columns_BP: Tensor, end: int) -> Tensor:
        """Return the mask [B, 1, P, S] that shows a row's prompt, and its completion up to each position itself."""
        columns_S = torch.arange(end, device=columns_BP.device)
        is_prompt_BS = columns_S < self.lengths_B[:, None]
        is_before_BPS = (columns_S >= self.width) & (columns_S <= columns_BP[:, :, None])
        is_hidden_BPS = ~(is_before_BPS | is_prompt_BS[:, None])
        mask_BPS = torch.zeros(is_hidden_BPS.shape, dtype=self.keys[0].dtype, device=columns_BP.device)
        return mask_BPS.masked_fill_(is_hidden_BPS, -torch.inf)[:, None]


class Decoder:
    """A model's weights as they stand at one moment, adapters included.

    Weights stay where they are: a fused copy of projections gained nothing on a CPU. Adapters are merged into copies of
    their layers in float32 and float64; in half precision, where a merge would round them away, they are applied apart,
    rounded to it themselves: those of layers that read the same in one product.
    """

    def __init__(self, model: Any, codes: Codes | None = None) -> None:
        body, config = model.model, model.config
        self._codes = codes
        self._embedding_VH = body.embed_tokens.weight
        self._layers = [_Layer(layer) for layer in body.layers[: config.num_hidden_layers]]
        self._norm = _norm(body.norm)
        self._head = _in_parts(model.lm_head) if _is_tall(model.lm_head) else _projection(model.lm_head)
        weight = self._embedding_VH
        is_precise = weight.device.type == "cpu" and weight.dtype in _PRECISE
        self.free = free_positions(self._layers[0].num_weights, is_precise=is_precise)
        """Positions of a pass whose arithmetic takes as long as all else."""
        self._rotary = body.rotary_emb
        self._cos_S1D = self._sin_S1D = torch.empty(0)

    def read(self, prompts: Sequence[Sequence[int]], room: int, *, is_ragged: bool = False) -> tuple[Tensor, Cache]:
        """Return the logits [B, V] behind each prompt, and a cache with `room` columns for its completion.

        Equal prompts are read once. A shorter one is filled up with its own last token, which nothing reads.
        """
        device = self._embedding_VH.device
        place = {prompt: row for row, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        width = max(map(len, place))
        filled_up = [[*prompt, *prompt[-1:] * (width - len(prompt))] for prompt in place]
        ids_UL = sent(torch.tensor(filled_up), device)
        rows_B = sent(torch.tensor([place[tuple(prompt)] for prompt in prompts]), device)
        lengths_U = sent(torch.tensor(list(map(len, place))), device)
        self._rotate_up_to(width + room)
        shape = (len(prompts), self._layers[0].num_heads, width + room, self._layers[0].head_size)
        dtype = self._embedding_VH.dtype
        cache = Cache(list(map(len, prompts)), shape, len(self._layers), dtype, device, is_ragged=is_ragged)

        def attend_in(layer: int) -> _Attend:
            def attend(query_UQLD: Tensor, key_UKLD: Tensor, value_UKLD: Tensor) -> Tensor:
                cache.keys[layer][:, :, :width] = key_UKLD[rows_B]
                cache.values[layer][:, :, :width] = value_UKLD[rows_B]
                is_grouped = query_UQLD.shape[1] != key_UKLD.shape[1]
                return F.scaled_dot_product_attention(
                    query_UQLD, key_UKLD, value_UKLD, is_causal=True, enable_gqa=is_grouped
                )

            return attend

        ends = torch.arange(len(place), device=device), lengths_U - 1
        walk = None if self._codes is None else Walk(self._codes)

        def steer(hidden_ULH: Tensor) -> Tensor:
            assert walk is not None
            return hidden_ULH.index_put(ends, walk.steer(hidden_ULH[ends]))

        positions_1L = torch.arange(width, device=device)[None]
        if walk is None:
            last_UH = self._pass(ids_UL, positions_1L, attend_in, None, read=ends)
        else:
            last_UH = self._pass(ids_UL, positions_1L, attend_in, steer)[ends]
            walk.keep(rows_B)
        cache.walk = walk
        return self._head(self._norm(last_UH))[rows_B], cache

    def step(self, tokens_B: Tensor, cache: Cache) -> Tensor:
        """Return the logits [B, V] behind one more token a row, which joins the cache."""
        column, end = cache.filled, cache.filled + 1
        mask = None if cache.mask_B11S is None else cache.mask_B11S[..., :end]

        def attend_in(layer: int) -> _Attend:
            keys, values = cache.keys[layer], cache.values[layer]

            def attend(query_BQ1D: Tensor, key_BK1D: Tensor, value_BK1D: Tensor) -> Tensor:
                keys[:, :, column:end] = key_BK1D
                values[:, :, column:end] = value_BK1D
                # The query heads that share keys stand where several positions would, so that no key is repeated.
                query_BKGD = query_BQ1D.reshape(len(keys), keys.shape[1], -1, keys.shape[3])
                mixed = F.scaled_dot_product_attention(query_BKGD, keys[:, :, :end], values[:, :, :end], attn_mask=mask)
                return mixed.reshape(query_BQ1D.shape)

            return attend

        walk = cache.walk
        steer = None if walk is None else lambda hidden_B1H: walk.steer(hidden_B1H[:, 0])[:, None]
        hidden_B1H = self._pass(tokens_B[:, None], cache.positions_B[:, None], attend_in, steer)
        cache.positions_B = cache.positions_B + 1
        cache.filled = end
        return self._head(self._norm(hidden_B1H[:, 0]))

    def try_on(self, tokens_BP: Tensor, starts_B: Tensor, cache: Cache) -> Tensor:
        """Return the logits [B, P, V] behind more tokens of each row, from place `starts` of its completion on.

        Whatever the cache holds from there on is written over; the codes do not steer.
        """
        columns_BP = cache.width + starts_B[:, None] + torch.arange(tokens_BP.shape[1], device=tokens_BP.device)
        positions_BP = columns_BP + (cache.lengths_B - cache.width)[:, None]
        rows_B1 = torch.arange(len(tokens_BP), device=tokens_BP.device)[:, None]
        end = cache.filled = min(cache.filled + tokens_BP.shape[1], cache.keys[0].shape[2])
        mask_B1XS = cache.mask_of(columns_BP, end).repeat(1, 1, self._layers[0].num_sharing, 1)  # X = G P

        def attend_in(layer: int) -> _Attend:
            keys, values = cache.keys[layer], cache.values[layer]

            def attend(query_BQPD: Tensor, key_BKPD: Tensor, value_BKPD: Tensor) -> Tensor:
                keys[rows_B1, :, columns_BP] = key_BKPD.transpose(1, 2)
                values[rows_B1, :, columns_BP] = value_BKPD.transpose(1, 2)
                query_BKXD = query_BQPD.reshape(len(keys), keys.shape[1], -1, keys.shape[3])
                mixed = F.scaled_dot_product_attention(
                    query_BKXD, keys[:, :, :end], values[:, :, :end], attn_mask=mask_B1XS
                )
                return mixed.reshape(query_BQPD.shape)

            return attend

        return self._head(self._norm(self._pass(tokens_BP, positions_BP, attend_in, None)))

    def _pass(
        self,
        ids_BP: Tensor,
        positions_BP: Tensor,
        attend_in: Callable[[int], _Attend],
        steer: _Steer | None,
        read: _Places | None = None,
    ) -> Tensor:
        """Return the last layer's output [B, P, H], before the final norm; `steer` acts behind the codes' layer.

        With `read` it is [N, H], at these places alone.
        """
        hidden_BPH = F.embedding(ids_BP, self._embedding_VH)
        turn = (self._cos_S1D[positions_BP], self._sin_S1D[positions_BP])
        for index, layer in enumerate(self._layers):
            is_last = index + 1 == len(self._layers)
            hidden_BPH = layer(hidden_BPH, turn, attend_in(index), read if is_last else None)
            if steer is not None and self._codes is not None and index == self._codes.layer:
                hidden_BPH = steer(hidden_BPH)
        return hidden_BPH

    def _rotate_up_to(self, length: int) -> None:
        """Tabulate cosines and sines, [S, 1, D], from the model's own module; the first half of the sines is negated.

        transformers' rotate_half(x) * sin is then a roll of x by half a head times the table.
        """
        positions = torch.arange(length, device=self._embedding_VH.device)[None]
        cos_1SD, sin_1SD = self._rotary(self._embedding_VH, positions)
        half = sin_1SD.shape[-1] // 2
        self._cos_S1D = cos_1SD[0][:, None]
        self._sin_S1D = torch.cat((-sin_1SD[0, :, :half], sin_1SD[0, :, half:]), dim=-1)[:, None]


class _Layer:
    """One decoder layer."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._norms = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self._attended = _projections([attention.q_proj, attention.k_proj, attention.v_proj])
        self._out = _projection(attention.o_proj)
        self._head_norm = _head_norm(attention) if hasattr(attention, "q_norm") else None
        self._widened = _projections([mlp.gate_proj, mlp.up_proj])
        self._down = _projection(mlp.down_proj)
        self._activation = mlp.act_fn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        every = (*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        self.num_weights = sum(each.in_features * each.out_features for each in every)
        self.head_size: int = attention.head_dim
        self.num_heads: int = attention.k_proj.out_features // attention.head_dim
        self.num_sharing: int = attention.q_proj.out_features // attention.k_proj.out_features

    def __call__(
        self, hidden_BPH: Tensor, turn: tuple[Tensor, Tensor], attend: _Attend, read: _Places | None
    ) -> Tensor:
        normed_BPH = self._norms[0](hidden_BPH)
        query, key, value = (
            projected.view(*normed_BPH.shape[:2], -1, self.head_size) for projected in self._attended(normed_BPH)
        )
        both = torch.cat((query, key), dim=2)
        if self._head_norm is not None:
            both = self._head_norm(both)
        query, key = torch.split(_rotated(both, turn), [query.shape[2], key.shape[2]], dim=2)
        mixed = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        mixed_BPH = mixed.transpose(1, 2).flatten(2)
        if read is not None:  # behind attention each position goes its own way
            hidden_BPH, mixed_BPH = hidden_BPH[read], mixed_BPH[read]
        hidden_BPH = hidden_BPH + self._out(mixed_BPH)
        gate_BPI, up_BPI = self._widened(self._norms[1](hidden_BPH))
        return hidden_BPH + self._down(self._activation(gate_BPI) * up_BPI)


def _rotated(heads_BPND: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = turn
    return (heads_BPND * cos).addcmul_(heads_BPND.roll(heads_BPND.shape[-1] // 2, dims=-1), sin)


def _norm(module: Any) -> Callable[[Tensor], Tensor]:
    weight, eps = module.weight, module.variance_epsilon
    return lambda x: F.rms_norm(x, weight.shape, weight, eps)


def _head_norm(attention: Any) -> Callable[[Tensor], Tensor]:
    """Return the norm of all heads, queries before keys, in one pass."""
    size, eps = attention.head_dim, attention.q_norm.variance_epsilon
    groups = [(attention.q_norm, attention.q_proj), (attention.k_norm, attention.k_proj)]
    weight_ND = torch.cat([norm.weight.expand(layer.out_features // size, size) for norm, layer in groups])
    return lambda heads_BPND: F.rms_norm(heads_BPND, (size,), None, eps) * weight_ND


def _is_tall(layer: Any) -> bool:
    """Whether a plain layer on a CPU has so many outputs that its product is faster in parts."""
    weight = layer.weight
    is_slow = weight.device.type == "cpu" and weight.dtype in _PRECISE  # units for half precision need no help
    return type(layer) is nn.Linear and is_slow and weight.numel() > 4 * _PART


def _in_parts(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """Return a head as a function: few rows times a tall matrix take up to 1.7 times as long in one product."""
    size = max(1, _PART // layer.in_features)
    parts = torch.split(layer.weight, size)
    biases = [None] * len(parts) if layer.bias is None else torch.split(layer.bias, size)

    def apply(x: Tensor) -> Tensor:
        if x.shape[:-1].numel() <= _FEW_OF_TALL:
            return _few_rows(x, layer.weight, layer.bias)
        return torch.cat([F.linear(x, *part) for part in zip(parts, biases, strict=True)], dim=-1)

    return apply


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + b in float32 or float64."""
    is_few = x.device.type == "cpu" and x.shape[:-1].numel() <= _FEW
    return _few_rows(x, weight, bias) if is_few else F.linear(x, weight, bias)


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + b as (W x^T)^T + b, which reads W two to four times as fast where x has few rows.

    A single row goes through twice, since W times one column is the slower product of a matrix and a vector.
    """
    flat = x.reshape(-1, x.shape[-1])
    columns = torch.cat((flat, flat)).T if len(flat) == 1 else flat.T
    found = (weight @ columns).T[: len(flat)].contiguous().view(*x.shape[:-1], len(weight))
    return found if bias is None else found + bias


def _merged(weight: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """Return a weight with its adapters added, in one pass over it each: fresh memory is dear."""
    for each in adapters:
        weight = torch.addmm(weight, (each.scale * each.up).to(weight.dtype), each.down.to(weight.dtype))
    return weight


def _projection(layer: Any) -> Callable[[Tensor], Tensor]:
    """Return a linear layer with its adapters as a function."""
    apply = _projections([layer])
    return lambda x: apply(x)[0]


def _projections(layers: Sequence[Any]) -> Callable[[Tensor], list[Tensor]]:
    """Return linear layers that read the same, with their adapters, as one function."""
    plain: list[nn.Linear] = [getattr(layer, "base_layer", layer) for layer in layers]
    adapters = [adapters_of(layer) for layer in layers]
    dtype = plain[0].weight.dtype
    if dtype in _PRECISE:
        whole = [(_merged(layer.weight, own), layer.bias) for layer, own in zip(plain, adapters, strict=True)]
        return lambda x: [_product(x, *each) for each in whole]
    flat = [each for own in adapters for each in own]
    if not flat:
        return lambda x: [F.linear(x, layer.weight, layer.bias) for layer in plain]
    down_RH = torch.cat([each.down for each in flat]).to(dtype)
    ups = [[(each.scale * each.up).to(dtype).T for each in own] for own in adapters]
    ranks = [len(each.down) for each in flat]

    def apply(x: Tensor) -> list[Tensor]:
        results = [F.linear(x, layer.weight, layer.bias) for layer in plain]
        lows = iter(torch.split(F.linear(x.flatten(0, -2), down_RH), ranks, dim=-1))
        for result, own in zip(results, ups, strict=True):
            for up_RO in own:
                result.view(-1, result.shape[-1]).addmm_(next(lows), up_RO)
        return results

    return apply
