"""Keys and values of one decoder layer, with a row for every item."""

from __future__ import annotations

from torch import Tensor

from florence2.rows import put_rows, widened


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

    def put(self, items: Tensor, other: KeyValues, slots: int) -> None:
        """Gives the rows of ``items`` [B'] to those of ``other``, which has filled ``slots``."""
        put_rows(self.cross_key, items, other.cross_key, 0.0)
        put_rows(self.cross_value, items, other.cross_value, 0.0)
        put_rows(self.own_key, items, other.own_key[:, :, :slots], 0.0)
        put_rows(self.own_value, items, other.own_value[:, :, :slots], 0.0)

    def reserve(self, slots: int) -> None:
        """Makes room for so many slots."""
        self.own_key = widened(self.own_key, 2, slots, 0.0)
        self.own_value = widened(self.own_value, 2, slots, 0.0)

    def reserve_cross(self, length: int) -> None:
        """Makes room for prompts so long."""
        self.cross_key = widened(self.cross_key, 2, length, 0.0)
        self.cross_value = widened(self.cross_value, 2, length, 0.0)
