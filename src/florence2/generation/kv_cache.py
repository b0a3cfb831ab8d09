"""Decoding with caches: several beams per item over one copy of what they share."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Final, cast

import torch
from torch import Tensor

from florence2.errors import RequestError
from florence2.network.bart import DecoderLayer
from florence2.network.florence import Florence2Network


def put_rows(
    into: Tensor, rows: Tensor, source: Tensor, fill: float, chosen: Tensor | None = None
) -> None:
    """Sets ``into[rows]`` to ``source``, whose later dimensions may be smaller, and else ``fill``.

    In place. ``into`` [B, ...], ``rows`` [B'] row numbers, ``source`` [B', ...] or, with
    ``chosen`` [B'], any number of rows of which these are taken; it may be ``into`` itself.
    """
    if chosen is not None:
        source = source.index_select(0, chosen)
    part = into
    for dim, size in enumerate(source.shape[1:], start=1):
        if size < into.shape[dim]:
            into.index_fill_(0, rows, fill)
            part = part.narrow(dim, 0, size)
    part.index_copy_(0, rows, source)


def widened(tensor: Tensor, dim: int, size: int, fill: float) -> Tensor:
    """A copy with ``size`` entries along ``dim``, the new ones ``fill``; itself if it has them."""
    shape = list(tensor.shape)
    shape[dim] = max(size, shape[dim])
    return enlarged(tensor, shape, fill)


def enlarged(tensor: Tensor, shape: Sequence[int], fill: float) -> Tensor:
    """A copy of this ``shape``, nowhere smaller, ``fill`` in what is new; itself if it has it."""
    if tuple(shape) == tensor.shape:
        return tensor
    large = tensor.new_full(list(shape), fill)
    part = large
    for dim, size in enumerate(tensor.shape):
        part = part.narrow(dim, 0, size)
    part.copy_(tensor)
    return large


def row_numbers(rows: list[int], device: torch.device) -> Tensor:
    """Row numbers as an index [B'] on ``device``."""
    return to_device(rows, torch.long, device)


def to_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``values`` on ``device``; the host does not wait for what the device is doing."""
    host = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


class KeyValues:
    """``cross_*`` [B, h, S, d_h] of the encoded prompts, ``own_*`` [B, h, slots, d_h].

    Slots that no beam sees must hold finite numbers all the same: weights of 0 do not make
    infinity disappear from a sum.
    """

    def __init__(self, cross_key: Tensor, cross_value: Tensor) -> None:
        """Starts without any slot of its own."""
        self.cross_key = cross_key.contiguous()
        self.cross_value = cross_value.contiguous()
        self.own_key = cross_key[:, :, :0].contiguous()
        self.own_value = self.own_key

    def write(self, start: int, key: Tensor, value: Tensor) -> None:
        """Keys and values [B, h, L, d_h] of all items into the slots from ``start`` on."""
        end = start + key.shape[2]
        self.own_key[:, :, start:end] = key
        self.own_value[:, :, start:end] = value

    def write_each(self, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Keys and values [B, h, beams, d_h] into each item's own ``slots`` [B, beams]."""
        places = slots[:, None, :, None].expand(key.shape)
        self.own_key.scatter_(2, places, key)
        self.own_value.scatter_(2, places, value)

    def keep(self, items: Tensor) -> None:
        """Goes on with these items [B'] only."""
        self.cross_key = self.cross_key[items]
        self.cross_value = self.cross_value[items]
        self.own_key = self.own_key[items]
        self.own_value = self.own_value[items]

    def put(
        self, items: Tensor, other: KeyValues, slots: int, chosen: Tensor | None = None
    ) -> None:
        """Gives the rows of ``items`` [B'] to those of ``other``, which has filled ``slots``.

        To all of them, or to those ``chosen`` [B'].
        """
        put_rows(self.cross_key, items, other.cross_key, 0.0, chosen)
        put_rows(self.cross_value, items, other.cross_value, 0.0, chosen)
        put_rows(self.own_key, items, other.own_key[:, :, :slots], 0.0, chosen)
        put_rows(self.own_value, items, other.own_value[:, :, :slots], 0.0, chosen)

    def reserve(self, slots: int) -> None:
        """Makes room for so many slots."""
        self.own_key = widened(self.own_key, 2, slots, 0.0)
        self.own_value = widened(self.own_value, 2, slots, 0.0)

    def reserve_cross(self, length: int) -> None:
        """Makes room for prompts so long."""
        self.cross_key = widened(self.cross_key, 2, length, 0.0)
        self.cross_value = widened(self.cross_value, 2, length, 0.0)

    def enlarge(self, num_rows: int, slots: int, cross_length: int) -> None:
        """Makes room for so many rows, slots and positions of prompts, nowhere fewer."""
        _, heads, _, head_dim = self.cross_key.shape
        cross, own = (num_rows, heads, cross_length, head_dim), (num_rows, heads, slots, head_dim)
        self.cross_key = enlarged(self.cross_key, cross, 0.0)
        self.cross_value = enlarged(self.cross_value, cross, 0.0)
        self.own_key = enlarged(self.own_key, own, 0.0)
        self.own_value = enlarged(self.own_value, own, 0.0)

    def window(self, num_rows: int, slots: int, cross_length: int) -> KeyValues:
        """The first rows, slots and positions, in the same memory."""
        part = copy.copy(self)
        part.cross_key = self.cross_key[:num_rows, :, :cross_length]
        part.cross_value = self.cross_value[:num_rows, :, :cross_length]
        part.own_key = self.own_key[:num_rows, :, :slots]
        part.own_value = self.own_value[:num_rows, :, :slots]
        return part

    @property
    def num_bytes(self) -> int:
        """Memory that these tensors take."""
        tensors = (self.cross_key, self.cross_value, self.own_key, self.own_value)
        return sum(tensor.nbytes for tensor in tensors)


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


class StaticSession(DecoderSession):
    """Rows that other sessions' items are put into, in memory that only ``enlarge`` moves.

    No shape and no branch of ``reorder`` and ``step_on_device`` depends on how far the rows are.
    Rows that hold no item take part in every step with finite numbers that mean nothing. It
    starts without rows, and encodes nothing. ``window`` gives a part of it to run steps on, while
    this session keeps count of its rows: ``count_pass`` and ``put`` are for the whole only.
    """

    def __init__(self, network: Florence2Network, num_beams: int, prefix_length: int) -> None:
        """For items that have been fed ``prefix_length`` tokens by their own sessions."""
        decoder = network.model.language_model.decoder
        with torch.inference_mode():
            states = network.lm_head.weight.new_zeros(0, 0, network.config.text.d_model)
            mask = torch.zeros(0, 0, dtype=torch.bool, device=network.device)
        super().__init__(network, states, mask, num_beams, decoder.limit, all_seen=False)
        self._prefix_length = prefix_length
        self._cross_of: list[int] = []

    @property
    def num_bytes(self) -> int:
        """Memory that its keys and values take."""
        return sum(layer.num_bytes for layer in self._layers)

    def needs(self, rows: Sequence[int]) -> tuple[int, int]:
        """Steps that there must be room for when these rows make their next one, and positions
        of their longest prompt."""
        steps = 1 + max((self._steps_of[row] for row in rows), default=0)
        return steps, max((self._cross_of[row] for row in rows), default=1)

    @torch.inference_mode()
    def enlarge(self, num_rows: int, steps: int, cross_length: int) -> None:
        """Makes room for so many rows, steps and positions of a prompt, nowhere for fewer.

        Tensors move; windows made before are of no use afterwards.
        """
        slots = self._slots_of(steps)
        for layer in self._layers:
            layer.enlarge(num_rows, slots, cross_length)
        self._steps = enlarged(self._steps, (num_rows,), 0)
        self._own_mask = enlarged(self._own_mask, (num_rows, self.num_beams, slots), HIDDEN)
        self._cross_mask = enlarged(self._wide_cross_mask(), (num_rows, 1, 1, cross_length), HIDDEN)
        # Every item sees these; and attention to nothing at all would give no number.
        self._own_mask[:, :, : self._prefix_length] = 0.0
        self._cross_mask[..., :1] = 0.0
        missing = num_rows - len(self._steps_of)
        self._steps_of += [0] * missing
        self._cross_of += [1] * missing

    def window(self, num_rows: int, steps: int, cross_length: int) -> StaticSession:
        """The first rows, steps and positions, in the same memory.

        Its rows must not need more. Only for ``reorder`` and ``step_on_device``.
        """
        slots = self._slots_of(steps)
        part = copy.copy(self)
        part._layers = [layer.window(num_rows, slots, cross_length) for layer in self._layers]
        part._steps = self._steps[:num_rows]
        part._own_mask = self._own_mask[:num_rows, :, :slots]
        part._cross_mask = self._wide_cross_mask()[:num_rows, :, :, :cross_length]
        return part

    @property
    def state(self) -> list[torch.Tensor]:
        """The tensors that ``reorder`` and ``step_on_device`` both read and write."""
        return [self._steps, self._own_mask]

    def count_pass(self) -> None:
        """What the host notes of a step."""
        self._steps_of = [count + 1 for count in self._steps_of]

    def put(self, items: list[int], other: DecoderSession, chosen: list[int] | None = None) -> None:
        """As in ``DecoderSession``; there must be room."""
        numbers = range(other.num_items) if chosen is None else chosen
        if isinstance(other, StaticSession):
            lengths = [other._cross_of[number] for number in numbers]
        else:
            lengths = [other.cross_length for _ in numbers]
        super().put(items, other, chosen)
        for item, length in zip(items, lengths, strict=True):
            self._cross_of[item] = length

    def _slots_of(self, steps: int) -> int:
        return aligned(self._prefix_length + steps * self.num_beams)

    def _is_together(self) -> bool:
        return False

    def _has_past(self) -> bool:
        return True

    def _end(self) -> int:
        return self._own_mask.shape[2]
