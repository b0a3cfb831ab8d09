"""BART's encoder and decoder: post-LayerNorm, learned positions with an offset of 2.

Source of the architecture: BART (arXiv 1910.13461) as published in Florence-2.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from florence2 import tokens
from florence2.errors import RequestError
from florence2.network.config import TextConfig

POSITION_OFFSET: Final = 2

# Up to so many queries the plain products are faster than the fused kernel on a CPU.
FEW_QUERIES: Final = 4

WeightKind = tuple[torch.dtype, torch.Size]
"""Precision and shape of a weight, by which the form of its products is chosen."""

TransposedCounts = tuple[bool, ...]
"""Entry n: whether n rows are multiplied in the transposed form; more rows than entries are not."""


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation function of a checkpoint's config; see ``config.ACTIVATIONS``."""
    if name == "gelu_pytorch_tanh":
        return _tanh_gelu
    return functional.relu if name == "relu" else functional.gelu


def _tanh_gelu(values: Tensor) -> Tensor:
    return functional.gelu(values, approximate="tanh")


def transposed_product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``functional.linear`` of [N, C_in] and [C_out, C_in], which reads the weight once."""
    if rows.shape[0] == 1:
        out = (weight @ rows[0]).unsqueeze(0)
    else:
        # Contiguous: fused attention takes a many times slower path for queries that are not.
        out = (weight @ rows.t()).t().contiguous()
    return out if bias is None else out.add_(bias)


def _product(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, transposed: TransposedCounts
) -> Tensor:
    """``functional.linear`` of [..., C_in] and [C_out, C_in], in the form chosen for the rows."""
    # Always two dimensions: a view of one row of a larger tensor keeps that tensor's strides,
    # with which oneDNN's reduced precision takes a path that is a hundred times slower.
    rows = hidden.reshape(-1, hidden.shape[-1])
    count = rows.shape[0]
    is_transposed = count < len(transposed) and transposed[count]
    product = transposed_product if is_transposed else functional.linear
    return product(rows, weight, bias).reshape(*hidden.shape[:-1], weight.shape[0])


class Linear(nn.Linear):
    """``nn.Linear`` that starts empty, and is also fast for the few rows of a decoder step.

    Which form its products take is chosen by ``choose_form`` once the weights are where they are
    used; until then, and once moved or cast, it is ``functional.linear``.
    """

    transposed: TransposedCounts = ()

    def reset_parameters(self) -> None:
        """Leaves the weights empty."""

    def choose_form(self, forms: Mapping[WeightKind, TransposedCounts]) -> None:
        """Takes the choice for this weight out of those made for all."""
        self.transposed = forms.get((self.weight.dtype, self.weight.shape), ())

    def take_form_of(self, other: Linear) -> None:
        """Takes the choice of a layer with a weight of the same precision and shape."""
        self.transposed = other.transposed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        self.transposed = ()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """[..., C_in] -> [..., C_out]."""
        return _product(input, self.weight, self.bias, self.transposed)


class Embedding(nn.Embedding):
    """``nn.Embedding`` that starts empty."""

    def reset_parameters(self) -> None:
        """Leaves the weights empty."""


class Attention(nn.Module):
    """Multi-head attention: the projections, and the attention between what they give."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = Linear(dim, dim)
        self.v_proj = Linear(dim, dim)
        self.q_proj = Linear(dim, dim)
        self.out_proj = Linear(dim, dim)
        self.fused: tuple[Tensor, Tensor] | None = None
        """The three input projections as one weight [3 * dim, dim] and one bias, see ``fuse``."""
        self._fused_transposed: TransposedCounts = ()

    def fuse(self) -> None:
        """Lays the three input projections out as one weight.

        Theirs become views of it, so it takes no memory of its own. Moving or casting the module
        undoes it, and gradients are computed without it.
        """
        parts = self._input_parts()
        weight = torch.cat([part.weight.detach() for part in parts])
        bias = torch.cat([part.bias.detach() for part in parts])
        for part, rows, offset in zip(parts, weight.chunk(3), bias.chunk(3), strict=True):
            part.weight.data, part.bias.data = rows, offset
        self.fused = weight, bias

    def choose_form(self, forms: Mapping[WeightKind, TransposedCounts]) -> None:
        """Takes the choice for the fused weight out of those made for all."""
        if self.fused is not None:
            weight = self.fused[0]
            self._fused_transposed = forms.get((weight.dtype, weight.shape), ())

    def shares(self, other: Attention) -> bool:
        """Whether the input projections are another attention's own."""
        parts, others = self._input_parts(), other._input_parts()
        return all(
            part.weight is its.weight and part.bias is its.bias
            for part, its in zip(parts, others, strict=True)
        )

    def own_projections(self) -> None:
        """Gives the input projections parameters of their own, whose values may still be shared."""
        for part in self._input_parts():
            for name in ("weight", "bias"):
                value = getattr(part, name).detach()
                setattr(part, name, nn.Parameter(value, requires_grad=False))

    def fuse_as(self, other: Attention) -> None:
        """As ``fuse`` and ``choose_form``, of an attention of this size that may share its own."""
        if self.shares(other):
            self.fused = other.fused
        else:
            self.fuse()
        self._fused_transposed = other._fused_transposed

    def _input_parts(self) -> tuple[Linear, Linear, Linear]:
        return self.q_proj, self.k_proj, self.v_proj

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Attention:
        self.fused, self._fused_transposed = None, ()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def project_query(self, hidden: Tensor) -> Tensor:
        """[B, L, dim] -> queries [B, heads, L, head_dim]."""
        return self._heads(self.q_proj(hidden), 1)[0]

    def project_key_value(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L, dim] -> keys and values, each [B, heads, L, head_dim]."""
        if self.fused is None or torch.is_grad_enabled():
            key, value = self.k_proj(hidden), self.v_proj(hidden)
            return self._heads(key, 1)[0], self._heads(value, 1)[0]
        weight, bias = (part[hidden.shape[-1] :] for part in self.fused)
        key, value = self._heads(_product(hidden, weight, bias, ()), 2)
        return key, value

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, dim] -> queries, keys and values, each [B, heads, L, head_dim]."""
        if self.fused is None or torch.is_grad_enabled():
            return self.project_query(hidden), *self.project_key_value(hidden)
        fused = _product(hidden, *self.fused, self._fused_transposed)
        query, key, value = self._heads(fused, 3)
        return query, key, value

    def _heads(self, projected: Tensor, count: int) -> tuple[Tensor, ...]:
        """[B, L, count * dim] -> ``count`` times [B, heads, L, head_dim]."""
        batch, length, dim = projected.shape
        split = projected.view(batch, length, count, self.heads, dim // (count * self.heads))
        return split.permute(2, 0, 3, 1, 4).unbind()

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Queries [B, heads, L, head_dim] over [B, heads, S, head_dim] -> [B, L, dim].

        ``mask`` broadcasts to [B, heads, L, S]: bool, True where one may look, or added to the
        scores.
        """
        is_bool = mask is not None and mask.dtype == torch.bool
        is_few = query.shape[2] <= FEW_QUERIES and not (is_causal or is_bool)
        if is_few and query.device.type == "cpu" and query.dtype == torch.float32:
            # In reduced precision the fused kernel keeps float32 scores.
            scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
            mixed = (scores if mask is None else scores + mask).softmax(-1) @ value
        else:
            mixed = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=is_causal
            )
        return cast(Tensor, self.out_proj(mixed.transpose(1, 2).flatten(2)))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config.d_model, config.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.activation = activation(config.activation)
        self.fc1 = Linear(config.d_model, config.encoder_ffn_dim)
        self.fc2 = Linear(config.encoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """[B, S, d] -> [B, S, d]."""
        mixed = self.self_attn.attend(*self.self_attn.project(states), mask)
        states = self.self_attn_layer_norm(states + mixed)
        widened = self.activation(self.fc1(states))
        return cast(Tensor, self.final_layer_norm(states + self.fc2(widened)))


class LayerCache(NamedTuple):
    """What a decoder layer attends to: keys and values of the encoded prompts, and its own.

    ``cross_*`` [B, heads, S, head_dim], ``own_*`` [B, heads, slots, head_dim]. Slots that no beam
    sees must hold finite numbers all the same: weights of 0 do not make infinity disappear from a
    sum.
    """

    cross_key: Tensor
    cross_value: Tensor
    own_key: Tensor
    own_value: Tensor


class DecoderLayer(nn.Module):
    """Self-attention, attention to the encoder's states, feed-forward."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        heads = config.decoder_attention_heads
        self.self_attn = Attention(config.d_model, heads)
        self.activation = activation(config.activation)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.encoder_attn = Attention(config.d_model, heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = Linear(config.d_model, config.decoder_ffn_dim)
        self.fc2 = Linear(config.decoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, hidden: Tensor, states: Tensor, cross_mask: Tensor | None) -> Tensor:
        """Teacher-forced: hidden [B, L, d] over states [B, S, d] -> [B, L, d]."""
        query, key, value = self.self_attn.project(hidden)
        cache = LayerCache(*self.encoder_attn.project_key_value(states), key, value)
        return self._attend(hidden, query, cache, None, cross_mask, is_causal=True)

    def step(
        self,
        hidden: Tensor,
        cache: LayerCache,
        slots: slice | Tensor,
        mask: Tensor | None,
        cross_mask: Tensor | None,
        *,
        is_causal: bool,
    ) -> Tensor:
        """Hidden [B, L, d] over the cache -> [B, L, d], their keys and values put into ``slots``.

        A slice is the same for all items; a tensor [B, L] has each item's own.
        """
        query, key, value = self.self_attn.project(hidden)
        if isinstance(slots, slice):
            cache.own_key[:, :, slots] = key
            cache.own_value[:, :, slots] = value
        else:
            places = slots[:, None, :, None].expand(key.shape)
            cache.own_key.scatter_(2, places, key)
            cache.own_value.scatter_(2, places, value)
        return self._attend(hidden, query, cache, mask, cross_mask, is_causal=is_causal)

    def _attend(
        self,
        hidden: Tensor,
        query: Tensor,
        cache: LayerCache,
        mask: Tensor | None,
        cross_mask: Tensor | None,
        *,
        is_causal: bool,
    ) -> Tensor:
        """The layer from its self-attention's queries on; ``hidden`` is its input."""
        mixed = self.self_attn.attend(query, cache.own_key, cache.own_value, mask, is_causal)
        hidden = self.self_attn_layer_norm(hidden + mixed)
        query = self.encoder_attn.project_query(hidden)
        mixed = self.encoder_attn.attend(query, cache.cross_key, cache.cross_value, cross_mask)
        hidden = self.encoder_attn_layer_norm(hidden + mixed)
        widened = self.activation(self.fc1(hidden))
        return cast(Tensor, self.final_layer_norm(hidden + self.fc2(widened)))


class Stack(nn.Module):
    """What encoder and decoder share: embeddings, positions and their LayerNorm."""

    def __init__(self, config: TextConfig, embed_tokens: Embedding) -> None:
        super().__init__()
        self.limit = config.max_position_embeddings
        self.scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        self.embed_tokens = embed_tokens
        self.embed_positions = Embedding(self.limit + POSITION_OFFSET, config.d_model)
        self.layernorm_embedding = nn.LayerNorm(config.d_model)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Ids [...] -> vectors [..., d], scaled if the checkpoint says so."""
        vectors = self.embed_tokens(token_ids)
        return cast(Tensor, vectors if self.scale == 1.0 else vectors * self.scale)

    def add_positions(self, vectors: Tensor) -> Tensor:
        """[B, L, d] at positions 0 ... L - 1 -> the first layer's input."""
        return cast(Tensor, self.layernorm_embedding(vectors + self.positions(vectors.shape[1])))

    def positions(self, length: int) -> Tensor:
        """The vectors [length, d] of positions 0 ... length - 1."""
        self.check_length(length)
        return self.embed_positions.weight[POSITION_OFFSET : length + POSITION_OFFSET]

    def check_length(self, length: int) -> None:
        """Raises when a sequence is longer than the position table."""
        check_positions(length, self.limit)


def check_positions(length: int, limit: int) -> None:
    """RequestError for a sequence that is longer than the position table."""
    if length > limit:
        raise RequestError(
            f"This checkpoint reads and writes at most {limit} tokens, got {length}; "
            "shorten the prompt or lower max_new_tokens."
        )


class Encoder(Stack):
    """The text encoder."""

    def __init__(self, config: TextConfig, embed_tokens: Embedding) -> None:
        super().__init__(config, embed_tokens)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))

    def forward(self, vectors: Tensor, mask: Tensor | None) -> Tensor:
        """Vectors [B, S, d], mask [B, S] True where filled -> states [B, S, d]."""
        states = self.add_positions(vectors)
        wide = None if mask is None else mask[:, None, None, :]
        for layer in self.layers:
            states = layer(states, wide)
        return states


class Decoder(Stack):
    """The text decoder."""

    def __init__(self, config: TextConfig, embed_tokens: Embedding) -> None:
        super().__init__(config, embed_tokens)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))

    def forward(self, token_ids: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
        """Ids [B, L] over states [B, S, d] with mask [B, S] -> hidden [B, L, d], all causal."""
        hidden = self.add_positions(self.embed(token_ids))
        wide = None if mask is None else mask[:, None, None, :]
        for layer in self.layers:
            hidden = layer(hidden, states, wide)
        return hidden

    def cross_keys_values(self, states: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of each layer, keys and values [B, heads, S, head_dim] of states [B, S, d]."""
        layers = cast(Sequence[DecoderLayer], self.layers)
        return [layer.encoder_attn.project_key_value(states) for layer in layers]

    def prefill(
        self, token_ids: Tensor, caches: Sequence[LayerCache], cross_mask: Tensor | None
    ) -> Tensor:
        """Ids [P] that every item begins with -> hidden [B, P, d].

        ``caches`` have P slots, which are written.
        """
        num_items = caches[0].cross_key.shape[0]
        vectors = self.embed(token_ids).expand(num_items, -1, -1)
        hidden = self.add_positions(vectors)
        slots = slice(0, len(token_ids))
        return self._layers(hidden, caches, slots, None, cross_mask, is_causal=True)

    def step(
        self,
        token_ids: Tensor,
        position: int | Tensor,
        caches: Sequence[LayerCache],
        slots: slice | Tensor,
        mask: Tensor | None,
        cross_mask: Tensor | None,
    ) -> Tensor:
        """Ids [B, beams], one token of every beam -> hidden [B, beams, d].

        ``position`` is that of all items, or [B] each item's own; of these, positions beyond the
        table take its last row: they belong to items nobody waits for. ``mask`` is added to scores
        over the slots, [B, 1, beams, slots]; ``slots`` as for ``DecoderLayer.step``.
        """
        if isinstance(position, Tensor):
            places = (position + POSITION_OFFSET).clamp(max=self.limit + POSITION_OFFSET - 1)
            offset = self.embed_positions(places).unsqueeze(1)
        else:
            offset = self.embed_positions.weight[position + POSITION_OFFSET]
        hidden = self.layernorm_embedding(self.embed(token_ids) + offset)
        return self._layers(hidden, caches, slots, mask, cross_mask, is_causal=False)

    def _layers(
        self,
        hidden: Tensor,
        caches: Sequence[LayerCache],
        slots: slice | Tensor,
        mask: Tensor | None,
        cross_mask: Tensor | None,
        *,
        is_causal: bool,
    ) -> Tensor:
        layers = cast(Sequence[DecoderLayer], self.layers)
        for layer, cache in zip(layers, caches, strict=True):
            hidden = layer.step(hidden, cache, slots, mask, cross_mask, is_causal=is_causal)
        return hidden


class LanguageModel(nn.Module):
    """BART with one embedding shared by encoder and decoder."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.shared = Embedding(config.vocab_size, config.d_model, padding_idx=tokens.PAD_ID)
        self.encoder = Encoder(config, self.shared)
        self.decoder = Decoder(config, self.shared)


FEW_FLOAT32_ROWS: Final = 6
"""Up to so many rows ``functional.linear`` in float32 is the slower form on some CPUs."""

MEASURED: Final = ((1, 1), (3, 4), (8, 12), (24, 48))
"""The counts of rows that are measured, each with the largest count that goes by it."""

PROCESSOR: Final = Path("/proc/cpuinfo")

_CLEARLY_FASTER: Final = 0.9
_REPEATS: Final = 3

Form = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Clock = Callable[[Form, Tensor, Tensor], float]
"""Seconds that a form takes for some rows and a weight."""

_measured: dict[WeightKind, TransposedCounts] = {}
"""What was measured in this process for weights of reduced precision."""


def choose_forms(
    weights: Sequence[Tensor], processor: Path = PROCESSOR, clock: Clock | None = None
) -> Mapping[WeightKind, TransposedCounts]:
    """The choice for every kind of these weights that are on a CPU.

    Float32 has a rule, the same on every start of one machine. In reduced precision both forms are
    measured, once in a process, which takes as long as some 20 steps. ``weights`` are those of a
    whole step in its order, so that each is read from where a step reads it: one weight alone
    would stay in the processor's cache. ``processor`` is Linux's description of the CPU.
    """
    on_cpu = [weight for weight in weights if weight.device.type == "cpu"]
    reduced = [weight for weight in on_cpu if weight.dtype != torch.float32]
    new = {_kind(weight) for weight in reduced} - _measured.keys()
    if new:
        faster = [_faster_transposed(reduced, count, clock or seconds) for count, _ in MEASURED]
        for kind in new:
            counts = [False]
            for found, (_, most) in zip(faster, MEASURED, strict=True):
                counts += [kind in found] * (most + 1 - len(counts))
            _measured[kind] = tuple(counts)
    return {
        _kind(weight): _of_float32(weight, processor)
        if weight.dtype == torch.float32
        else _measured[_kind(weight)]
        for weight in on_cpu
    }


def _of_float32(weight: Tensor, processor: Path) -> TransposedCounts:
    """One row reads a weight fastest as a matrix-vector product.

    Of a few rows, those of weights that narrow them are as fast by ``functional.linear``.
    """
    narrows = weight.shape[0] < weight.shape[1]
    most = FEW_FLOAT32_ROWS if not narrows and has_slow_linear(processor) else 1
    return (False, *[True] * most)


@functools.cache
def has_slow_linear(processor: Path) -> bool:
    """Whether ``functional.linear`` reads a weight several times for a few float32 rows.

    MKL, which computes it, does so on x86 CPUs that are not Intel's. Where there is no
    description of the CPU, or it names no vendor, the answer is no.
    """
    try:
        lines = processor.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    vendors = {line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")}
    return bool(vendors) and "GenuineIntel" not in vendors


def seconds(form: Form, rows: Tensor, weight: Tensor) -> float:
    """How long one product takes."""
    began = time.perf_counter()
    form(rows, weight, None)
    return time.perf_counter() - began


def _kind(weight: Tensor) -> WeightKind:
    return weight.dtype, weight.shape


def _faster_transposed(weights: Sequence[Tensor], count: int, clock: Clock) -> set[WeightKind]:
    """The kinds for which the transposed form is clearly faster with so many rows."""
    plain, transposed = (
        _best_seconds(form, weights, count, clock)
        for form in (functional.linear, transposed_product)
    )
    return {kind for kind in plain if transposed[kind] < _CLEARLY_FASTER * plain[kind]}


def _best_seconds(
    form: Form, weights: Sequence[Tensor], count: int, clock: Clock
) -> dict[WeightKind, float]:
    """Seconds of all products of a step by kind: the best of several steps."""
    best: dict[WeightKind, float] = {}
    for _ in range(_REPEATS):
        step: dict[WeightKind, float] = {}
        for weight in weights:
            rows = weight.new_ones(count, weight.shape[1])
            step[_kind(weight)] = step.get(_kind(weight), 0.0) + clock(form, rows, weight)
        best = {kind: min(spent, best.get(kind, spent)) for kind, spent in step.items()}
    return best
