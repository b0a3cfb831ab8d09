"""Keys and values of one decoder layer, with a row for every item."""

from __future__ import annotations

import copy

from torch import Tensor

from florence2.rows import enlarged, put_rows, widened


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
