"""Decoding with caches: several beams per item over one copy of what they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, cast

import torch
from torch import Tensor

from florence2.errors import RequestError
from florence2.network.bart import DecoderLayer
from florence2.network.florence import Florence2Network

FIRST_STEPS: Final = 32
# Kernels for masked attention on a GPU copy a mask whose rows do not start at multiples of this.
ROW_ALIGNMENT: Final = 16


@dataclass(slots=True)
class _LayerCache:
    """Keys and values of one layer: ``cross_*`` [B, h, S, d_h], ``own_*`` [B, h, slots, d_h]."""

    cross_key: Tensor
    cross_value: Tensor
    own_key: Tensor
    own_value: Tensor


class DecoderSession:
    """The decoder's state while the answers of B items are searched with ``num_beams`` beams.

    Cross-attention keys and values exist once per item; beams are query rows over them. A token
    of beam b at step t is written to slot P + t * num_beams + b of its item's self-attention
    cache (P the prefix's length) and never moves: which slots a beam sees, its own history's,
    is a row of an additive mask, and ``reorder`` only copies such rows.

    ``max_new_tokens`` counts every token after the decoder's start token, as the published
    generation settings do; the last of them is never fed back.
    """

    def __init__(
        self,
        network: Florence2Network,
        states: Tensor,
        mask: Tensor,
        num_beams: int,
        max_new_tokens: int,
    ) -> None:
        """``states`` [B, S, d_model] and ``mask`` [B, S] bool, from ``encode_prompts``."""
        self._network = network
        self._decoder = network.model.language_model.decoder
        if max_new_tokens > self._decoder.limit:
            raise RequestError(
                f"max_new_tokens may be at most {self._decoder.limit} for this checkpoint, "
                f"got {max_new_tokens}; lower it."
            )
        self.num_beams = num_beams
        self.max_new_tokens = max_new_tokens
        self._prefix_length = 0
        self._steps = 0
        with torch.inference_mode():
            self._layers = [self._start_layer(layer, states) for layer in self._decoder_layers()]
            self._cross_mask = None if bool(mask.all()) else _additive(mask, states.dtype)
            self._own_mask = states.new_empty(states.shape[0], num_beams, 0)

    @property
    def num_items(self) -> int:
        """B: the items not dropped yet."""
        return self._own_mask.shape[0]

    @property
    def length(self) -> int:
        """Tokens fed so far, the prefix included."""
        return self._prefix_length + self._steps

    @torch.inference_mode()
    def prefill(self, prefix_ids: Sequence[int]) -> Tensor:
        """Feeds the tokens that all answers begin with, once per item.

        Gives the logits [B, V] after the last of them.
        """
        if self.length or not prefix_ids:
            raise RuntimeError("prefill takes at least one token, and only before any step.")
        self._prefix_length = len(prefix_ids)
        self._reserve(self._prefix_length)
        token_ids = torch.tensor([list(prefix_ids)], device=self._own_mask.device)
        vectors = self._decoder.embed(token_ids).expand(self.num_items, -1, -1)
        rows = self._decoder.add_positions(vectors)
        rows = self._run_layers(rows, 0, mask=None, is_causal=True)
        return cast(Tensor, self._network.lm_head(rows[:, -1]))

    @torch.inference_mode()
    def step(self, token_ids: Tensor) -> Tensor:
        """Feeds one token per beam, [B, beams] -> logits [B, beams, V]."""
        if not self._prefix_length:
            raise RuntimeError("step continues a prefix; call prefill first.")
        start = self._prefix_length + self._steps * self.num_beams
        end = start + self.num_beams
        rows = self._decoder.add_position(self._decoder.embed(token_ids), self.length)
        self._reserve(end)
        self._steps += 1
        mask = None if self.num_beams == 1 else self._own_mask[:, None, :, :end]
        rows = self._run_layers(rows, start, mask, is_causal=False)
        return cast(Tensor, self._network.lm_head(rows))

    @torch.inference_mode()
    def reorder(self, beam_indices: Tensor) -> None:
        """Beam i of an item goes on from the history of beam ``beam_indices[item, i]``.

        ``beam_indices`` [B, beams], called before the step it is meant for.
        """
        written = self._prefix_length + self._steps * self.num_beams
        if self.num_beams == 1 or not self._steps:
            return
        past = self._own_mask[:, :, :written]
        past.copy_(past.gather(1, beam_indices[:, :, None].expand(past.shape)))

    @torch.inference_mode()
    def keep(self, item_indices: Tensor) -> None:
        """Goes on with these items [B'] only, in this order."""
        for layer in self._layers:
            layer.cross_key = layer.cross_key.index_select(0, item_indices)
            layer.cross_value = layer.cross_value.index_select(0, item_indices)
            layer.own_key = layer.own_key.index_select(0, item_indices)
            layer.own_value = layer.own_value.index_select(0, item_indices)
        self._own_mask = self._own_mask.index_select(0, item_indices)
        if self._cross_mask is not None:
            self._cross_mask = self._cross_mask.index_select(0, item_indices)

    def _decoder_layers(self) -> list[DecoderLayer]:
        return [cast(DecoderLayer, layer) for layer in self._decoder.layers]

    @staticmethod
    def _start_layer(layer: DecoderLayer, states: Tensor) -> _LayerCache:
        key, value = layer.encoder_attn.project_key_value(states)
        nothing = key[:, :, :0].contiguous()
        return _LayerCache(key.contiguous(), value.contiguous(), nothing, nothing)

    def _run_layers(self, rows: Tensor, start: int, mask: Tensor | None, is_causal: bool) -> Tensor:
        """Writes the rows' keys and values from slot ``start`` on; [B, L, d] -> [B, L, d]."""
        end = start + rows.shape[1]
        for layer, cache in zip(self._decoder_layers(), self._layers, strict=True):
            attention = layer.self_attn
            query = attention.project_query(rows)
            cache.own_key[:, :, start:end], cache.own_value[:, :, start:end] = (
                attention.project_key_value(rows)
            )
            key, value = cache.own_key[:, :, :end], cache.own_value[:, :, :end]
            mixed = attention.attend(query, key, value, mask, is_causal)
            rows = layer.after_self_attention(
                rows, mixed, cache.cross_key, cache.cross_value, self._cross_mask
            )
        return rows

    def _reserve(self, slots: int) -> None:
        """Makes room for the first ``slots`` slots, doubling, so that long limits cost nothing."""
        capacity = self._own_mask.shape[2]
        if slots <= capacity:
            return
        most = self._prefix_length + self.max_new_tokens * self.num_beams
        first = self._prefix_length + FIRST_STEPS * self.num_beams
        capacity = max(slots, min(most, max(first, 2 * capacity)))
        capacity = -(-capacity // ROW_ALIGNMENT) * ROW_ALIGNMENT
        for layer in self._layers:
            layer.own_key = _widen(layer.own_key, capacity)
            layer.own_value = _widen(layer.own_value, capacity)
        self._own_mask = self._start_mask(capacity)

    def _start_mask(self, capacity: int) -> Tensor:
        """The own mask [B, beams, capacity] with the old one's values in front.

        All see the prefix; every beam sees, of the slots of a step not made yet, only its own.
        """
        old = self._own_mask
        beams = self.num_beams
        own = torch.eye(beams, dtype=torch.bool, device=old.device)
        later = -(-(capacity - self._prefix_length) // beams)
        prefix = own.new_ones(beams, self._prefix_length)
        visible = torch.cat([prefix, own.repeat(1, later)], dim=1)[:, :capacity]
        bias = torch.zeros(visible.shape, dtype=old.dtype, device=old.device)
        mask = bias.masked_fill_(~visible, float("-inf")).repeat(old.shape[0], 1, 1)
        mask[:, :, : old.shape[2]] = old
        return mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask [B, S] as an addend [B, 1, 1, S]: 0 where True, minus infinity elsewhere."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(~mask, float("-inf"))[:, None, None, :]


def _widen(cache: Tensor, slots: int) -> Tensor:
    wide = cache.new_zeros(*cache.shape[:2], slots, cache.shape[3])
    wide[:, :, : cache.shape[2]] = cache
    return wide
