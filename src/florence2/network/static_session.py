"""A decoding session whose tensors stay where they are, so that its steps can be recorded."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from florence2.generation.kv_cache import HIDDEN, DecoderSession, aligned
from florence2.network.florence import Florence2Network
from florence2.rows import enlarged


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
