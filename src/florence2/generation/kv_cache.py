"""Decoding with a KV cache: several beams per item over one copy of what they share."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Final, Protocol, Self

import torch
from torch import Tensor

from florence2.errors import RequestError
from florence2.network.bart import LayerCache
from florence2.network.florence import Florence2Network
from florence2.tokens import ANSWER_PREFIX


class StepNetwork(Protocol):
    """The decoder of a network, as a session runs it; ``Florence2Network`` is one.

    Both passes write the keys and values of what they are fed into the caches.
    """

    @property
    def position_limit(self) -> int:
        """The most tokens that are read and written."""
        ...

    def check_length(self, length: int) -> None:
        """RequestError for a sequence that is longer."""
        ...

    def prefill_logits(
        self,
        token_ids: Tensor,
        caches: Sequence[LayerCache],
        cross_mask: Tensor | None,
        num_exact: int,
    ) -> Tensor:
        """Ids [P] that every item begins with -> logits [B, V] after the last of them.

        The ``num_exact`` best of each row are as exact as float32, see ``next_logits``.
        """
        ...

    def step_logits(
        self,
        token_ids: Tensor,
        position: int | Tensor,
        caches: Sequence[LayerCache],
        slots: slice | Tensor,
        mask: Tensor | None,
        cross_mask: Tensor | None,
        num_exact: int,
    ) -> Tensor:
        """Ids [B, beams] -> logits [B, beams, V]; the others as for ``Decoder.step``."""
        ...


class RowTensors(dict[str, Tensor]):
    """Tensors by name that all have the rows of a batch as their first dimension.

    Others of their dimensions can have names too, and sizes that grow. What has not been written
    yet is each tensor's ``fill``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._layout: dict[str, tuple[float, dict[str, int]]] = {}

    def add(self, name: str, tensor: Tensor, fill: float = 0.0, **dims: int) -> None:
        """One more tensor; ``dims`` are the names of dimensions and which ones they are."""
        self[name] = tensor
        self._layout[name] = fill, {"rows": 0, **dims}

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows [B'] only, in this order; a row may be named twice."""
        for name, tensor in self.items():
            self[name] = tensor[rows]

    def put(self, rows: Tensor, source: RowTensors, chosen: Tensor | None = None) -> None:
        """Gives these rows [B'] to those of ``source``, in place.

        To all of them, or to those ``chosen`` [B']; it may be this one itself. Its tensors are
        nowhere larger; what they are smaller by is filled.
        """
        for name, into in self.items():
            part, fill = into, self._layout[name][0]
            values = source[name] if chosen is None else source[name].index_select(0, chosen)
            for dim, size in enumerate(values.shape[1:], start=1):
                if size < into.shape[dim]:
                    into.index_fill_(0, rows, fill)
                    part = part.narrow(dim, 0, size)
            part.index_copy_(0, rows, values)

    def enlarge(self, **sizes: int) -> None:
        """Makes the named dimensions at least so large; tensors that grow move."""
        for name, tensor in self.items():
            fill, dims = self._layout[name]
            shape = list(tensor.shape)
            for dim_name, size in sizes.items():
                if (dim := dims.get(dim_name)) is not None:
                    shape[dim] = max(shape[dim], size)
            if shape == list(tensor.shape):
                continue
            large = tensor.new_full(shape, fill)
            part = large
            for dim, size in enumerate(tensor.shape):
                part = part.narrow(dim, 0, size)
            part.copy_(tensor)
            self[name] = large

    def first(self, **sizes: int) -> RowTensors:
        """The first of the named dimensions, in the same memory."""
        view = RowTensors()
        view._layout = self._layout
        for name, tensor in self.items():
            dims = self._layout[name][1]
            for dim_name, size in sizes.items():
                if (dim := dims.get(dim_name)) is not None and size < tensor.shape[dim]:
                    tensor = tensor.narrow(dim, 0, size)
            view[name] = tensor
        return view

    @property
    def num_bytes(self) -> int:
        """Memory that the tensors take."""
        return sum(tensor.nbytes for tensor in self.values())


def to_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``values`` on ``device``; the host does not wait for what the device is doing."""
    host = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def row_index(rows: Sequence[int], device: torch.device) -> Tensor:
    """Numbers of rows, or token ids, as an index [B'] on ``device``."""
    return to_device(rows, torch.long, device)


FIRST_STEPS: Final = 32

# Kernels for masked attention on a GPU copy a mask whose rows do not start at multiples of this.
ROW_ALIGNMENT: Final = 16

EXACT_BEYOND: Final = 10
"""Logits computed exactly beside those a search takes: some may be banned, or change rank."""

HIDDEN: Final = float("-inf")
"""Added to the scores of what must not be seen."""

PREFIX_LENGTH: Final = len(ANSWER_PREFIX)

_CACHE: Final = LayerCache._fields


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
        with torch.inference_mode():
            decoder = network.model.language_model.decoder
            all_seen = bool(mask.all()) if all_seen is None else all_seen
            cross_mask = None if all_seen else additive(mask, states.dtype)
            caches = _empty_caches(decoder.cross_keys_values(states))
        self._begin(network, caches, cross_mask, num_beams, max_new_tokens)

    @classmethod
    def over(
        cls,
        network: StepNetwork,
        keys_values: Sequence[tuple[Tensor, Tensor]],
        cross_mask: Tensor | None,
        num_beams: int,
        max_new_tokens: int,
    ) -> Self:
        """A session over cross-attention keys and values [B, heads, S, head_dim] of each layer.

        ``cross_mask`` [B, 1, 1, S] is added to the scores over them; None where all are seen.
        """
        session = cls.__new__(cls)
        with torch.inference_mode():
            caches = _empty_caches(keys_values)
        session._begin(network, caches, cross_mask, num_beams, max_new_tokens)
        return session

    @classmethod
    def after_prefill(
        cls,
        network: Florence2Network,
        outputs: Sequence[Tensor],
        num_beams: int,
        max_new_tokens: int,
    ) -> DecoderSession:
        """A session of B items from what ``prefilled`` gave, which it takes over."""
        session = cls.__new__(cls)
        logits, cross_mask, *tensors = outputs
        caches = [LayerCache(*tensors[at : at + 4]) for at in range(0, len(tensors), 4)]
        session._begin(network, caches, cross_mask, num_beams, max_new_tokens)
        session._prefix_logits = logits
        return session

    def _begin(
        self,
        network: StepNetwork,
        caches: Sequence[LayerCache],
        cross_mask: Tensor | None,
        num_beams: int,
        max_new_tokens: int,
    ) -> None:
        self._network = network
        if max_new_tokens > network.position_limit:
            raise RequestError(
                f"max_new_tokens may be at most {network.position_limit} for this checkpoint, "
                f"got {max_new_tokens}; lower it."
            )
        self.num_beams = num_beams
        self.max_new_tokens = max_new_tokens
        self._prefix_logits: Tensor | None = None
        self._is_prefilled = False
        num_items = caches[0].cross_key.shape[0]
        # How many steps each item has made: on the host, and as rows["steps"] on the device.
        self._steps_of = [0] * num_items
        with torch.inference_mode():
            self._rows = rows = RowTensors()
            like = caches[0].cross_key
            rows.add("steps", torch.zeros(num_items, dtype=torch.long, device=like.device))
            rows.add("own_mask", like.new_empty(num_items, num_beams, 0), HIDDEN, slots=2)
            if cross_mask is not None:
                rows.add("cross_mask", cross_mask, HIDDEN, cross=3)
            for number, cache in enumerate(caches):
                for field, tensor in zip(_CACHE, cache, strict=True):
                    dim = {"cross": 2} if field.startswith("cross") else {"slots": 2}
                    rows.add(f"{field}.{number}", tensor, **dim)
            self._num_layers = len(caches)

    @property
    def num_items(self) -> int:
        """B: the items not dropped yet."""
        return len(self._steps_of)

    @property
    def length(self) -> int:
        """Tokens fed so far to the item that has most, the prefix included."""
        return PREFIX_LENGTH + max(self._steps_of)

    @property
    def cross_length(self) -> int:
        """S: positions of the longest encoded prompt."""
        return self._rows["cross_key.0"].shape[2]

    @property
    def num_bytes(self) -> int:
        """Memory that the session takes."""
        return self._rows.num_bytes

    def prefilled(self) -> list[Tensor]:
        """``prefill`` on the device: logits [B, V], the mask over the encoded prompts
        [B, 1, 1, S], and of each layer the four tensors of its cache.
        """
        logits = self._prefill()
        caches = self.caches(PREFIX_LENGTH)
        return [logits, self._wide_cross_mask(), *(part for cache in caches for part in cache)]

    @torch.inference_mode()
    def prefill(self) -> Tensor:
        """Feeds the tokens that all answers begin with: logits [B, V] after the last of them."""
        if self._is_prefilled:
            raise RuntimeError("prefill comes once, before any step.")
        if self._prefix_logits is None:
            return self._prefill()
        logits, self._prefix_logits = self._prefix_logits, None
        self._is_prefilled = True
        self._reserve(0)
        return logits

    def _prefill(self) -> Tensor:
        self._is_prefilled = True
        self._reserve(0)
        # Made on the device, as this is recorded on a GPU.
        ids = torch.stack([self._rows["steps"].new_full((), token) for token in ANSWER_PREFIX])
        caches = self.caches(PREFIX_LENGTH)
        cross_mask = self._rows.get("cross_mask")
        return self._network.prefill_logits(ids, caches, cross_mask, self._num_exact())

    def step(self, token_ids: Tensor) -> Tensor:
        """Feeds one token per beam, [B, beams] -> logits [B, beams, V]."""
        self.count_pass()
        return self.step_on_device(token_ids)

    @torch.inference_mode()
    def count_pass(self) -> None:
        """What the host notes of a step, and makes room for; ``step_on_device`` is the rest."""
        if not self._is_prefilled:
            raise RuntimeError("step continues a prefix; call prefill first.")
        self._network.check_length(PREFIX_LENGTH + min(self._steps_of) + 1)
        # Items that nobody waits for may be at the end of the position table, and stay there.
        most = self._network.position_limit - PREFIX_LENGTH
        steps_of = [min(count + 1, most) for count in self._steps_of]
        self._reserve(max(steps_of))
        self._steps_of = steps_of

    @torch.inference_mode()
    def step_on_device(self, token_ids: Tensor) -> Tensor:
        """What the device does of a step."""
        rows, end = self._rows, self._end()
        slots = self._own_slots()
        rows["own_mask"].scatter_(2, slots.unsqueeze(2), 0.0)
        caches, cross_mask = self.caches(end), rows.get("cross_mask")
        mask = rows["own_mask"][:, None, :, :end]
        position: int | Tensor = PREFIX_LENGTH + rows["steps"]
        place: slice | Tensor = slots
        seen: Tensor | None = mask
        if self._is_together():
            position, place = self.length - 1, slice(end - self.num_beams, end)
            # A single beam sees all there is.
            seen = None if self.num_beams == 1 else mask
        logits = self._network.step_logits(
            token_ids, position, caches, place, seen, cross_mask, self._num_exact()
        )
        rows["steps"] += 1
        return logits

    @torch.inference_mode()
    def reorder(self, beam_indices: Tensor) -> None:
        """Beam i of an item goes on from the history of beam ``beam_indices[item, i]``.

        ``beam_indices`` [B, beams], called before the step it is meant for.
        """
        if self.num_beams == 1 or not self._has_past():
            return
        past = self._rows["own_mask"][:, :, : self._end()]
        past.copy_(past.gather(1, beam_indices[:, :, None].expand(past.shape)))

    @torch.inference_mode()
    def keep(self, items: list[int]) -> None:
        """Goes on with these items only, in this order; an item may be named twice."""
        self._steps_of = [self._steps_of[item] for item in items]
        self._rows.keep(row_index(items, self._rows["steps"].device))

    @torch.inference_mode()
    def put(self, items: list[int], other: DecoderSession, chosen: list[int] | None = None) -> None:
        """Gives the places of these items to the items of ``other``, in order.

        To all of them, or to those ``chosen``, which may be items of this session itself.
        ``other`` has as many beams, and may be at any step.
        """
        numbers = range(other.num_items) if chosen is None else chosen
        steps_of = [other._steps_of[number] for number in numbers]
        device = self._rows["steps"].device
        self._reserve(max(steps_of))
        self._reserve_cross(other)
        self._is_prefilled = True
        for item, count in zip(items, steps_of, strict=True):
            self._steps_of[item] = count
        source = other._rows.first(slots=self._slots_for(steps_of))
        if "cross_mask" in self._rows and "cross_mask" not in source:
            source["cross_mask"] = other._wide_cross_mask()
        picked = None if chosen is None else row_index(chosen, device)
        self._rows.put(row_index(items, device), source, picked)

    def _reserve(self, steps: int) -> None:
        """Makes room for so many steps, doubling, so that long limits cost nothing."""
        slots = PREFIX_LENGTH + steps * self.num_beams
        capacity = self._rows["own_mask"].shape[2]
        if slots <= capacity and capacity:
            return
        most = PREFIX_LENGTH + self.max_new_tokens * self.num_beams
        first = PREFIX_LENGTH + FIRST_STEPS * self.num_beams
        capacity = max(slots, min(most, max(first, 2 * capacity)))
        self._rows.enlarge(slots=aligned(capacity))
        # Not by assignment, which brings its number from the host: this is recorded on a GPU.
        self._rows["own_mask"][:, :, :PREFIX_LENGTH].zero_()

    def _reserve_cross(self, other: DecoderSession) -> None:
        if "cross_mask" not in self._rows and (
            "cross_mask" in other._rows or other.cross_length != self.cross_length
        ):
            self._rows.add("cross_mask", self._wide_cross_mask(), HIDDEN, cross=3)
        if other.cross_length > self.cross_length:
            self._rows.enlarge(cross=other.cross_length)

    def _wide_cross_mask(self) -> Tensor:
        """Added to scores over the encoded prompts: [B, 1, 1, S]."""
        if "cross_mask" in self._rows:
            return self._rows["cross_mask"]
        return self._rows["own_mask"].new_zeros(self.num_items, 1, 1, self.cross_length)

    def caches(self, end: int | None = None) -> list[LayerCache]:
        """The cache of each layer, of its own slots those up to ``end``, or all there are."""
        rows = self._rows
        return [
            LayerCache(
                rows[f"cross_key.{number}"],
                rows[f"cross_value.{number}"],
                rows[f"own_key.{number}"][:, :, :end],
                rows[f"own_value.{number}"][:, :, :end],
            )
            for number in range(self._num_layers)
        ]

    def _slots_for(self, steps_of: list[int]) -> int:
        return PREFIX_LENGTH + max(steps_of) * self.num_beams

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

    def _own_slots(self) -> Tensor:
        """The slots [B, beams] of the step in hand; items nobody waits for may be beyond."""
        steps = self._rows["steps"]
        beams = torch.arange(self.num_beams, device=steps.device)
        slots = PREFIX_LENGTH + steps.unsqueeze(1) * self.num_beams + beams
        return slots.clamp(max=self._end() - 1)


def _empty_caches(keys_values: Sequence[tuple[Tensor, Tensor]]) -> list[LayerCache]:
    """Caches without slots of their own yet."""
    return [
        LayerCache(key.contiguous(), value.contiguous(), own, own)
        for key, value in keys_values
        for own in [key[:, :, :0].contiguous()]
    ]


def aligned(slots: int) -> int:
    """The next number of slots that masks may have."""
    return -(-slots // ROW_ALIGNMENT) * ROW_ALIGNMENT


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask [B, S] as an addend [B, 1, 1, S]: 0 where True, minus infinity elsewhere."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(~mask, HIDDEN)[:, None, None, :]


class StaticSession(DecoderSession):
    """Rows that other sessions' items are put into, in memory that only ``enlarge`` moves.

    No shape and no branch of ``reorder`` and ``step_on_device`` depends on how far the rows are.
    Rows that hold no item take part in every step with finite numbers that mean nothing. It
    starts without rows, and encodes nothing. ``view`` gives a part of it to run steps on, while
    this session keeps count of its rows: ``count_pass`` and ``put`` are for the whole only.
    """

    def __init__(self, network: Florence2Network, num_beams: int) -> None:
        """For items that have been fed the prefix by their own sessions."""
        limit = network.position_limit
        with torch.inference_mode():
            states = network.lm_head.weight.new_zeros(0, 0, network.config.text.d_model)
            mask = torch.zeros(0, 0, dtype=torch.bool, device=network.device)
        super().__init__(network, states, mask, num_beams, limit, all_seen=False)
        self._is_prefilled = True
        self._cross_of: list[int] = []

    def needs(self, rows: Sequence[int]) -> tuple[int, int]:
        """Steps that there must be room for when these rows make their next one, and positions
        of their longest prompt."""
        steps = 1 + max((self._steps_of[row] for row in rows), default=0)
        return steps, max((self._cross_of[row] for row in rows), default=1)

    @torch.inference_mode()
    def enlarge(self, num_rows: int, steps: int, cross_length: int) -> None:
        """Makes room for so many rows, steps and positions of a prompt.

        Tensors move; views made before are of no use afterwards.
        """
        self._rows.enlarge(rows=num_rows, slots=self._slots_of(steps), cross=cross_length)
        # Every item sees these; and attention to nothing at all would give no number.
        self._rows["own_mask"][:, :, :PREFIX_LENGTH] = 0.0
        self._rows["cross_mask"][..., :1] = 0.0
        missing = num_rows - len(self._steps_of)
        self._steps_of += [0] * missing
        self._cross_of += [1] * missing

    def view(self, num_rows: int, steps: int, cross_length: int) -> StaticSession:
        """The first rows, steps and positions, in the same memory.

        Its rows must not need more. Only for ``reorder`` and ``step_on_device``.
        """
        part = copy.copy(self)
        part._rows = self._rows.first(
            rows=num_rows, slots=self._slots_of(steps), cross=cross_length
        )
        return part

    @property
    def state(self) -> list[Tensor]:
        """The tensors that ``reorder`` and ``step_on_device`` both read and write."""
        return [self._rows["steps"], self._rows["own_mask"]]

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
        return aligned(PREFIX_LENGTH + steps * self.num_beams)

    def _is_together(self) -> bool:
        return False

    def _has_past(self) -> bool:
        return True

    def _end(self) -> int:
        return self._rows["own_mask"].shape[2]
