"""Prompts through encoder and the decoder's first pass, recorded for a few small batches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from florence2.generation.kv_cache import DecoderSession
from florence2.hypotheses import PREFIX
from florence2.network.florence import Florence2Network
from florence2.network.key_values import KeyValues
from florence2.rows import row_numbers
from florence2.runtimes.cuda_graphs import GraphRunner, Work

BUCKETS: Final = (1, 2, 4, 8)
"""Batch sizes that are recorded; larger ones keep the device busy for longer than launches take."""

LENGTHS: Final = 32
"""Encoded prompts, their image included, are padded to multiples, so that few shapes exist."""


@dataclass(slots=True)
class _Buffers:
    """What a recording reads, and writes: the outputs appear in the first warm-up."""

    inputs: tuple[Tensor, Tensor, Tensor]
    outputs: list[Tensor] | None = None

    @property
    def num_bytes(self) -> int:
        """Memory that these take."""
        return sum(part.nbytes for part in (*self.inputs, *(self.outputs or ())))


class PrefilledSession(DecoderSession):
    """A session whose prompts, and the prefix of every answer, have been through the network."""

    def __init__(
        self,
        network: Florence2Network,
        outputs: Sequence[Tensor],
        num_beams: int,
        max_new_tokens: int,
    ) -> None:
        """``outputs`` as ``first_pass`` gives them, of B items."""
        self._logits, cross_mask, *keys_and_values = outputs
        num_items = self._logits.shape[0]
        with torch.inference_mode():
            states = network.lm_head.weight.new_empty(0, 0, network.config.text.d_model)
            nothing_seen = torch.zeros(0, 0, dtype=torch.bool, device=states.device)
            super().__init__(
                network, states, nothing_seen, num_beams, max_new_tokens, all_seen=True
            )
            self._layers = [
                _restored(keys_and_values[place : place + 4])
                for place in range(0, len(keys_and_values), 4)
            ]
            self._cross_mask = cross_mask
            self._steps_of = [0] * num_items
            self._steps = self._steps.new_zeros(num_items)
            self._own_mask = cross_mask.new_empty(num_items, num_beams, 0)

    @torch.inference_mode()
    def prefill(self, prefix_ids: Sequence[int]) -> Tensor:
        """The logits [B, V] after the prefix, which must be the one of all answers."""
        if self._prefix_length or tuple(prefix_ids) != PREFIX:
            raise RuntimeError(f"The prefix is {PREFIX}, once, and {prefix_ids} was received.")
        self._prefix_length = len(prefix_ids)
        self.reserve(0)
        return self._logits


def first_pass(
    network: Florence2Network,
    inputs: tuple[Tensor, Tensor, Tensor],
    prefix: Tensor,
    num_beams: int,
) -> list[Tensor]:
    """Logits after the prefix, the cross-attention mask, and four tensors of each layer: keys and
    values of the encoded prompts and of the prefix.

    ``inputs`` are visual tokens [B, N, d], prompts and their mask [B, T] as for
    ``encode_prompts``; ``prefix`` the ids [P] that every answer begins with.
    """
    states, states_mask = network.encode_prompts(*inputs)
    session = DecoderSession(network, states, states_mask, num_beams, 1, all_seen=False)
    logits = session.prefill_on_device(prefix)
    return [logits, session.cross_mask, *session.layer_tensors()]


class PromptGraphs:
    """Starts sessions; small batches through recordings, whose output is copied out at once.

    What they read and write, the keys and values of all layers among it, takes at most
    ``max_bytes``, or what one recording needs; the least recently used goes first.
    """

    def __init__(self, network: Florence2Network, graphs: GraphRunner, max_bytes: int) -> None:
        self._network = network
        self._graphs = graphs
        self._max_bytes = max_bytes
        self._prefix: Tensor | None = None
        self._buffers: OrderedDict[Hashable, _Buffers] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """Memory that recordings read and write."""
        return sum(buffers.num_bytes for buffers in self._buffers.values())

    def padded_width(self, num_visual: int, width: int) -> int:
        """The width that prompts of ``width`` tokens are padded to, after ``num_visual`` others."""
        limit = self._network.config.text.max_position_embeddings - num_visual
        total = -(-(num_visual + width) // LENGTHS) * LENGTHS
        return max(width, min(total - num_visual, limit))

    def start(
        self,
        features: Tensor,
        prompts: Tensor,
        mask: Tensor,
        num_beams: int,
        max_new_tokens: int,
    ) -> DecoderSession | None:
        """A session as after ``encode_prompts``; None for batches that are not recorded."""
        count = len(prompts)
        size = next((bucket for bucket in BUCKETS if bucket >= count), None)
        if size is None or not count or not self._graphs.is_enabled:
            return None
        given = (features, prompts, mask)
        key = ("prompts", size, features.shape[1:], prompts.shape[1], num_beams)
        buffers = self._buffers.get(key)
        is_new = buffers is None
        if buffers is None:
            empty = [part.new_empty(size, *part.shape[1:]) for part in given]
            buffers = self._buffers[key] = _Buffers((empty[0], empty[1], empty[2]))
        self._buffers.move_to_end(key)
        for buffer, part in zip(buffers.inputs, given, strict=True):
            buffer[:count].copy_(part)
            # The rows that are left take the first prompt, whose numbers are sane.
            buffer[count:].copy_(part[:1].expand(size - count, *part.shape[1:]))
        self._graphs.run(key, self._work(buffers, num_beams))
        if buffers.outputs is None:
            raise RuntimeError("Prompts were recorded without ever having been encoded.")
        outputs = [output[:count].clone() for output in buffers.outputs]
        if is_new:
            self._make_room()
        return PrefilledSession(self._network, outputs, num_beams, max_new_tokens)

    def _make_room(self) -> None:
        while len(self._buffers) > 1 and self.num_bytes > self._max_bytes:
            oldest = next(iter(self._buffers))
            self._graphs.forget([oldest])
            del self._buffers[oldest]

    def _work(self, buffers: _Buffers, num_beams: int) -> Work:
        if self._prefix is None:
            self._prefix = row_numbers(list(PREFIX), self._network.device)
        prefix = self._prefix

        def work() -> None:
            found = first_pass(self._network, buffers.inputs, prefix, num_beams)
            if buffers.outputs is None:
                buffers.outputs = [torch.empty_like(part) for part in found]
            for output, part in zip(buffers.outputs, found, strict=True):
                output.copy_(part)

        return work

    def clear(self) -> None:
        """Forgets the buffers; the recordings are the runner's to forget, and first."""
        self._buffers.clear()
        self._prefix = None


def _restored(tensors: Sequence[Tensor]) -> KeyValues:
    cross_key, cross_value, own_key, own_value = tensors
    layer = KeyValues(cross_key, cross_value)
    layer.own_key, layer.own_value = own_key, own_value
    return layer
