"""Decoding with caches: several beams per item over one copy of what they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, cast

import torch
from torch import Tensor

from florence2.errors import RequestError
from florence2.network.bart import DecoderLayer
from florence2.network.florence import Florence2Network
from florence2.network.key_values import KeyValues
from florence2.rows import put_rows, row_numbers, widened

FIRST_STEPS: Final = 32


# Kernels for masked attention on a GPU copy a mask whose rows do not start at multiples of this.
ROW_ALIGNMENT: Final = 16


EXACT_BEYOND: Final = 10
"""Logits computed exactly beside those a search takes: some may be banned, or change rank."""


HIDDEN: Final = float("-inf")


class DecoderSession:
    """The decoder's state while the answers of B items are searched with ``num_beams`` beams.

    Cross-attention keys and values exist once per item; beams are query rows over them. A token
    of beam b at its item's step t is written to slot P + t * num_beams + b of the item's
    self-attention cache (P the prefix's length) and never moves: which slots a beam sees, its own
    history's, is a row of an additive mask, and ``reorder`` only copies such rows. Items may have
    begun at different times, so that a row whose answer is settled can be given to another item.

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
        *,
        all_seen: bool | None = None,
    ) -> None:
        """``states`` [B, S, d_model] and ``mask`` [B, S] bool, from ``encode_prompts``.

        ``all_seen`` says whether the mask is True everywhere; to look waits for the device.
        """
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
        self._steps_of = [0] * states.shape[0]
        with torch.inference_mode():
            self._steps = torch.zeros(states.shape[0], dtype=torch.long, device=states.device)
            self._layers = [
                KeyValues(*layer.encoder_attn.project_key_value(states))
                for layer in self._decoder_layers()
            ]
            all_seen = bool(mask.all()) if all_seen is None else all_seen
            self._cross_mask = None if all_seen else _additive(mask, states.dtype)
            self._own_mask = states.new_empty(states.shape[0], num_beams, 0)

    @property
    def num_items(self) -> int:
        """B: the items not dropped yet."""
        return self._own_mask.shape[0]

    @property
    def length(self) -> int:
        """Tokens fed so far to the item that has most, the prefix included."""
        return self._prefix_length + max(self._steps_of)

    @property
    def cross_length(self) -> int:
        """S: positions of the longest encoded prompt."""
        return self._layers[0].cross_key.shape[2]

    @property
    def cross_mask(self) -> Tensor:
        """Added to scores over the encoded prompts: [B, 1, 1, S]."""
        return self._wide_cross_mask()

    def layer_tensors(self) -> list[Tensor]:
        """Of each layer: cross keys and values, own keys and values of the tokens fed so far."""
        end = self._end()
        return [
            tensor
            for layer in self._layers
            for tensor in (
                layer.cross_key,
                layer.cross_value,
                layer.own_key[:, :, :end],
                layer.own_value[:, :, :end],
            )
        ]

    @torch.inference_mode()
    def prefill(self, prefix_ids: Sequence[int]) -> Tensor:
        """Feeds the tokens that all answers begin with, once per item.

        Gives the logits [B, V] after the last of them.
        """
        if self._prefix_length or not prefix_ids:
            raise RuntimeError("prefill takes at least one token, and only before any step.")
        return self.prefill_on_device(row_numbers(list(prefix_ids), self._own_mask.device))

    @torch.inference_mode()
    def prefill_on_device(self, token_ids: Tensor) -> Tensor:
        """As ``prefill`` for ids [P] that are on the device."""
        self._prefix_length = end = len(token_ids)
        self.reserve(0)
        vectors = self._decoder.embed(token_ids).expand(self.num_items, -1, -1)
        rows = self._decoder.add_positions(vectors)
        for layer, cache in zip(self._decoder_layers(), self._layers, strict=True):
            query, key, value = layer.self_attn.project(rows)
            cache.write(0, key, value)
            own = cache.own_key[:, :, :end], cache.own_value[:, :, :end]
            mixed = layer.self_attn.attend(query, *own, is_causal=True)
            rows = self._finish_layer(layer, cache, rows, mixed)
        return self._network.next_logits(rows[:, -1], self._num_exact())

    def step(self, token_ids: Tensor) -> Tensor:
        """Feeds one token per beam, [B, beams] -> logits [B, beams, V]."""
        self.count_pass()
        return self.step_on_device(token_ids)

    @torch.inference_mode()
    def count_pass(self) -> None:
        """What the host notes of a step, and makes room for; ``step_on_device`` is the rest."""
        if not self._prefix_length:
            raise RuntimeError("step continues a prefix; call prefill first.")
        self._decoder.check_length(self.length + 1)
        self.reserve(max(self._steps_of) + 1)
        self._steps_of = [count + 1 for count in self._steps_of]

    @torch.inference_mode()
    def step_on_device(self, token_ids: Tensor) -> Tensor:
        """What the device does of a step."""
        end = self._end()
        rows = self._decoder.embed(token_ids)
        if self._is_together():
            rows = self._decoder.add_position(rows, self.length - 1)
        else:
            rows = self._decoder.add_position_each(rows, self._prefix_length + self._steps)
        slots = self._slots()
        self._own_mask.scatter_(2, slots.unsqueeze(2), 0.0)
        sees_all = self.num_beams == 1 and self._is_together()
        mask = None if sees_all else self._own_mask[:, None, :, :end]
        for layer, cache in zip(self._decoder_layers(), self._layers, strict=True):
            query, key, value = layer.self_attn.project(rows)
            if self._is_together():
                cache.write(end - self.num_beams, key, value)
            else:
                cache.write_each(slots, key, value)
            own = cache.own_key[:, :, :end], cache.own_value[:, :, :end]
            mixed = layer.self_attn.attend(query, *own, mask)
            rows = self._finish_layer(layer, cache, rows, mixed)
        self._steps += 1
        return self._network.next_logits(rows, self._num_exact())

    @torch.inference_mode()
    def reorder(self, beam_indices: Tensor) -> None:
        """Beam i of an item goes on from the history of beam ``beam_indices[item, i]``.

        ``beam_indices`` [B, beams], called before the step it is meant for.
        """
        if self.num_beams == 1 or not self._has_past():
            return
        past = self._own_mask[:, :, : self._end()]
        past.copy_(past.gather(1, beam_indices[:, :, None].expand(past.shape)))

    @torch.inference_mode()
    def keep(self, items: list[int]) -> None:
        """Goes on with these items only, in this order; an item may be named twice."""
        kept = row_numbers(items, self._own_mask.device)
        self._steps_of = [self._steps_of[item] for item in items]
        self._steps = self._steps[kept]
        for layer in self._layers:
            layer.keep(kept)
        self._own_mask = self._own_mask[kept]
        if self._cross_mask is not None:
            self._cross_mask = self._cross_mask[kept]

    @torch.inference_mode()
    def put(self, items: list[int], other: DecoderSession, chosen: list[int] | None = None) -> None:
        """Gives the places of these items to the items of ``other``, in order.

        To all of them, or to those ``chosen``, which may be items of this session itself.
        ``other`` has the same prefix and as many beams, and may be at any step.
        """
        numbers = range(other.num_items) if chosen is None else chosen
        steps_of = [other._steps_of[number] for number in numbers]
        device = self._own_mask.device
        into = row_numbers(items, device)
        picked = None if chosen is None else row_numbers(chosen, device)
        self._prefix_length = other._prefix_length
        self.reserve(max(steps_of))
        self._reserve_cross(other)
        for item, count in zip(items, steps_of, strict=True):
            self._steps_of[item] = count
        put_rows(self._steps, into, other._steps, 0, picked)
        for mine, theirs in zip(self._layers, other._layers, strict=True):
            mine.put(into, theirs, self._slots_for(steps_of), picked)
        own = other._own_mask[:, :, : self._own_mask.shape[2]]
        put_rows(self._own_mask, into, own, HIDDEN, picked)
        if self._cross_mask is not None:
            put_rows(self._cross_mask, into, other._wide_cross_mask(), HIDDEN, picked)

    @torch.inference_mode()
    def reserve(self, steps: int) -> None:
        """Makes room for so many steps, doubling, so that long limits cost nothing."""
        slots = self._prefix_length + steps * self.num_beams
        capacity = self._own_mask.shape[2]
        if slots <= capacity and capacity:
            return
        most = self._prefix_length + self.max_new_tokens * self.num_beams
        first = self._prefix_length + FIRST_STEPS * self.num_beams
        capacity = max(slots, min(most, max(first, 2 * capacity)))
        capacity = aligned(capacity)
        for layer in self._layers:
            layer.reserve(capacity)
        wide = widened(self._own_mask, 2, capacity, HIDDEN)
        # Not by assignment, which brings its number from the host: this is recorded on a GPU.
        wide[:, :, : self._prefix_length].zero_()
        self._own_mask = wide

    def _reserve_cross(self, other: DecoderSession) -> None:
        if self._cross_mask is None and (
            other._cross_mask is not None or other.cross_length != self.cross_length
        ):
            self._cross_mask = self._wide_cross_mask()
        if other.cross_length > self.cross_length:
            for layer in self._layers:
                layer.reserve_cross(other.cross_length)
            if self._cross_mask is not None:
                self._cross_mask = widened(self._cross_mask, 3, other.cross_length, HIDDEN)

    def _wide_cross_mask(self) -> Tensor:
        if self._cross_mask is not None:
            return self._cross_mask
        return self._own_mask.new_zeros(self.num_items, 1, 1, self.cross_length)

    def _slots_for(self, steps_of: list[int]) -> int:
        return self._prefix_length + max(steps_of) * self.num_beams

    def _num_exact(self) -> int:
        """Logits of each row that a search may have to tell apart."""
        return 2 * self.num_beams + EXACT_BEYOND

    def _is_together(self) -> bool:
        """Whether all items are at the same step, so that no index is needed."""
        return len(set(self._steps_of)) == 1

    def _has_past(self) -> bool:
        """Whether any item has made a step."""
        return any(self._steps_of)

    def _end(self) -> int:
        """Slots to look at, those of the step in hand included."""
        return self._slots_for(self._steps_of)

    def _slots(self) -> Tensor:
        """The slots [B, beams] of the step in hand; items nobody waits for may be beyond."""
        beams = torch.arange(self.num_beams, device=self._steps.device)
        slots = self._prefix_length + self._steps.unsqueeze(1) * self.num_beams + beams
        return slots.clamp(max=self._own_mask.shape[2] - 1)

    def _finish_layer(
        self, layer: DecoderLayer, cache: KeyValues, rows: Tensor, mixed: Tensor
    ) -> Tensor:
        return layer.after_self_attention(
            rows, mixed, cache.cross_key, cache.cross_value, self._cross_mask
        )

    def _decoder_layers(self) -> list[DecoderLayer]:
        return [cast(DecoderLayer, layer) for layer in self._decoder.layers]


def aligned(slots: int) -> int:
    """The next number of slots that masks may have."""
    return -(-slots // ROW_ALIGNMENT) * ROW_ALIGNMENT


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask [B, S] as an addend [B, 1, 1, S]: 0 where True, minus infinity elsewhere."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(~mask, HIDDEN)[:, None, None, :]
