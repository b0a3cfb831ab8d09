"""The alphabet of an answer: text, location bins and markers, each with its log-probability."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from florence2.tokens import (
    ADDED_TOKENS,
    BOS,
    EOS,
    IMAGE,
    MASK,
    NUM_LOCATION_BINS,
    PAD,
    UNK,
)

DROPPED_TOKENS: Final = (BOS, EOS, PAD)
MARKERS: Final = (
    *(token for token in ADDED_TOKENS if not token.startswith("<loc_")),
    UNK,
    MASK,
    IMAGE,
)

_DROPPED_PATTERN: Final = re.compile("|".join(re.escape(token) for token in DROPPED_TOKENS))
_TOKEN_PATTERN: Final = re.compile(
    r"<loc_(?P<bin>[0-9]{1,6})>|" + "|".join(re.escape(token) for token in MARKERS)
)


class PieceKind(Enum):
    """What a piece of an answer is."""

    TEXT = "text"
    LOCATION = "location"
    MARKER = "marker"


@dataclass(frozen=True, slots=True)
class Piece:
    """One token of an answer, or one stretch of a raw string.

    ``data`` is what it spells in UTF-8, possibly part of a character. ``location_bin`` is 0 to
    999 for a location and None for the rest. ``log_prob`` is a natural logarithm, None if unknown;
    ``near_log_prob`` that of the bin or one near it, the same as ``log_prob`` for the rest.
    """

    kind: PieceKind
    data: bytes
    location_bin: int | None = None
    log_prob: float | None = None
    near_log_prob: float | None = None


def strip_dropped(text: str) -> str:
    """A raw generated string without ``<s>``, ``</s>`` and ``<pad>``."""
    return _DROPPED_PATTERN.sub("", text)


def pieces_from_text(text: str) -> tuple[Piece, ...]:
    """Pieces of a raw generated string, without probabilities.

    ``<loc_1000>``, which some fine-tunes were trained on, counts as the last bin.
    """
    pieces: list[Piece] = []
    text = strip_dropped(text)
    end = 0
    for match in _TOKEN_PATTERN.finditer(text):
        pieces.extend(_text_piece(text[end : match.start()]))
        spelled = match.group().encode()
        if match["bin"] is None:
            pieces.append(Piece(PieceKind.MARKER, spelled))
        else:
            location_bin = min(int(match["bin"]), NUM_LOCATION_BINS - 1)
            pieces.append(Piece(PieceKind.LOCATION, spelled, location_bin))
        end = match.end()
    pieces.extend(_text_piece(text[end:]))
    return tuple(pieces)


def joined_text(pieces: Iterable[Piece]) -> str:
    """What the pieces spell together; bytes that are no UTF-8 become U+FFFD."""
    return b"".join(piece.data for piece in pieces).decode("utf-8", errors="replace")


def _text_piece(text: str) -> tuple[Piece, ...]:
    if not text:
        return ()
    return (Piece(PieceKind.TEXT, text.encode("utf-8", errors="replace")),)
