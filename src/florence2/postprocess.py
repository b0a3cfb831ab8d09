"""Generated tokens to objects with scores, for every output kind of the task table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Final

from florence2.errors import RequestError
from florence2.records import (
    AnswerToken,
    Box,
    Object,
    Polygon,
    Quad,
    Result,
    SizeWh,
    Text,
    TokenKind,
)
from florence2.tasks import BANNED_PHRASES, OutputKind, Task, TaskInput, find_task
from florence2.tokenizer import joined_text, strip_dropped, tokens_from_text
from florence2.tokens import NUM_LOCATION_BINS, POLYGON_END, POLYGON_START, SEPARATOR

NEAR_BINS: Final = 20
"""A location within so many bins of the chosen one, 2 % of the image, is the same place."""


def object_score(place: Sequence[AnswerToken], label: Sequence[AnswerToken]) -> float | None:
    """The score of a prediction, in [0, 1].

    ``score = g(place) * g(label)``, where ``g`` is the geometric mean of the probabilities of
    the tokens given, and 1 when there are none. The probability of a location token is that of
    any bin within NEAR_BINS of it: a bin is a thousandth of the image, and a network that is sure
    of an edge still spreads its probability over neighbouring bins.

    - ``place``: the object's own location tokens: 4 for a box, 8 for a quad, those of all its
      rings for a polygon, none for a text.
    - ``label``: the tokens of its label. Objects that share one label share this factor.

    All probabilities are of one distribution: the float32 softmax over the whole vocabulary of the
    logits from which the token was chosen, given the tokens before it in the same answer. Nothing
    is taken out of it: what a ban forbids (repeated n-grams, ``<s>``) keeps its share, in the
    normaliser and among the neighbours of a place. So a token that was chosen only because a
    better one was banned has the small probability it had, and a place whose best bin was banned
    has that bin's share too. In reduced precision the best logits of every row are computed in
    float32 (``Florence2Network.next_logits``), the others are rounded. Scores compare within a
    task and checkpoint. The result is None if any of the probabilities is unknown.

    The search itself ranks by other numbers, the reference's: the same log-softmax with -inf
    where a token is banned, not renormalised, and 0 for a forced token; see ``BeamSearch`` and
    ``Answer.beam_score``.
    """
    place_mean = _geometric_mean(token.near_log_prob for token in place)
    label_mean = _geometric_mean(token.log_prob for token in label)
    return None if place_mean is None or label_mean is None else place_mean * label_mean


def _geometric_mean(values: Iterable[float | None]) -> float | None:
    log_probs = list(values)
    known = [log_prob for log_prob in log_probs if log_prob is not None]
    if len(known) < len(log_probs):
        return None
    if not known:
        return 1.0
    mean = sum(min(log_prob, 0.0) for log_prob in known) / len(known)
    # A probability of 0 has the logarithm -inf; a NaN says no more about the object than that.
    return 0.0 if math.isnan(mean) else math.exp(mean)


LEFTOVER_LOCATIONS: Final = "location tokens that complete no object, left out"
UNLABELED: Final = "objects without a label, left out"
TOO_GENERAL: Final = "phrases too general to be grounded, left out"
UNPLACED_TEXT: Final = "texts without a place, left out"
NO_AREA: Final = "boxes without area, left out"
SWAPPED: Final = "boxes with corners in the wrong order, put right"
TOO_FEW_POINTS: Final = "outlines with fewer than 3 points, left out"
CUT_OUTLINE: Final = "outlines cut off before their end, kept"
STRAY_MARKERS: Final = "tokens without a meaning here, left out"

_OPEN: Final = POLYGON_START.encode()
_CLOSE: Final = POLYGON_END.encode()
_NEXT_RING: Final = SEPARATOR.encode()


@dataclass(slots=True)
class Notes:
    """What was left out or put right, counted, so that junk of any length gives a short list."""

    counts: Counter[str] = field(default_factory=Counter)

    def add(self, what: str, count: int = 1) -> None:
        """Count one of the constants of this module; a count of 0 leaves no note."""
        if count:
            self.counts[what] += count

    def sentences(self) -> tuple[str, ...]:
        """One line per kind of note, in the order of first appearance."""
        return tuple(f"{what}: {count}" for what, count in self.counts.items())


@dataclass(slots=True)
class Span:
    """The tokens of a label, then the locations and outline markers up to the next label."""

    label_tokens: list[AnswerToken] = field(default_factory=list)
    place_tokens: list[AnswerToken] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The text without the white space around it."""
        return joined_text(self.label_tokens).strip()

    @property
    def num_locations(self) -> int:
        """Of the place, which has outline markers too."""
        return sum(token.kind is TokenKind.LOCATION for token in self.place_tokens)

    @property
    def has_outline(self) -> bool:
        """Whether the place is spelled as polygons rather than boxes."""
        return any(token.data == _OPEN for token in self.place_tokens)


def split_spans(tokens: Iterable[AnswerToken], notes: Notes) -> list[Span]:
    """The spans of an answer in order; a token that means nothing here ends a span."""
    spans = [Span()]
    for token in tokens:
        if token.kind is TokenKind.LOCATION or token.data in (_OPEN, _CLOSE, _NEXT_RING):
            spans[-1].place_tokens.append(token)
            continue
        if spans[-1].place_tokens or token.kind is TokenKind.MARKER:
            spans.append(Span())
        if token.kind is TokenKind.TEXT:
            spans[-1].label_tokens.append(token)
        else:
            notes.add(STRAY_MARKERS)
    return [span for span in spans if span.place_tokens or span.label]


def location_groups(
    place_tokens: Sequence[AnswerToken], group_size: int, notes: Notes
) -> list[list[AnswerToken]]:
    """Locations in groups of ``group_size``; outline markers end a group, and are counted."""
    groups: list[list[AnswerToken]] = [[]]
    for token in place_tokens:
        if token.kind is TokenKind.LOCATION:
            groups[-1].append(token)
        else:
            notes.add(STRAY_MARKERS)
        if token.kind is not TokenKind.LOCATION or len(groups[-1]) == group_size:
            notes.add(LEFTOVER_LOCATIONS, len(groups[-1]) % group_size)
            groups.append([])
    notes.add(LEFTOVER_LOCATIONS, len(groups[-1]))
    return [group for group in groups if len(group) == group_size]


def _coordinates(locations: Sequence[AnswerToken], size_wh: SizeWh) -> list[float]:
    """x, y, x, y, ... in pixels: the middle of each bin, so always inside the image."""
    return [
        ((token.location_bin or 0) + 0.5) * size_wh[position % 2] / NUM_LOCATION_BINS
        for position, token in enumerate(locations)
    ]


def _boxes(span: Span, label: str, size_wh: SizeWh, notes: Notes) -> Iterator[Box]:
    """One box per group of four locations, with x1 < x2 and y1 < y2."""
    label_tokens = span.label_tokens if label else ()
    for group in location_groups(span.place_tokens, 4, notes):
        x1, y1, x2, y2 = _coordinates(group, size_wh)
        if x1 == x2 or y1 == y2:
            notes.add(NO_AREA)
            continue
        notes.add(SWAPPED, int(x1 > x2 or y1 > y2))
        box_xyxy = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
        score = object_score(group, label_tokens)
        yield Box(box_xyxy, label, score, (*label_tokens, *group))


def _quads(span: Span, label: str, size_wh: SizeWh, notes: Notes) -> Iterator[Quad]:
    """One quad per group of eight locations; its corners stay in the order they were given."""
    for group in location_groups(span.place_tokens, 8, notes):
        x1, y1, x2, y2, x3, y3, x4, y4 = _coordinates(group, size_wh)
        if len({x1, x2, x3, x4}) == 1 or len({y1, y2, y3, y4}) == 1:
            notes.add(NO_AREA)
            continue
        corners = (x1, y1, x2, y2, x3, y3, x4, y4)
        score = object_score(group, span.label_tokens)
        yield Quad(corners, label, score, (*span.label_tokens, *group))


def _polygons(span: Span, label: str, size_wh: SizeWh, notes: Notes) -> Iterator[Polygon]:
    """One polygon per ``<poly>...</poly>`` or one for the whole span; ``<sep>`` parts its rings."""
    label_tokens = span.label_tokens if label else ()
    for outline in _outlines(span, notes):
        rings = [ring[: len(ring) // 2 * 2] for ring in outline if _is_ring(ring, notes)]
        if rings:
            shapes = tuple(tuple(_coordinates(ring, size_wh)) for ring in rings)
            place = [*chain(*rings)]
            score = object_score(place, label_tokens)
            yield Polygon(shapes, label, score, (*label_tokens, *place))


def _outlines(span: Span, notes: Notes) -> list[list[list[AnswerToken]]]:
    """The rings of each object, as their tokens."""
    is_marked = span.has_outline
    is_inside = not is_marked
    outlines: list[list[list[AnswerToken]]] = [] if is_marked else [[[]]]
    for token in span.place_tokens:
        is_location = token.kind is TokenKind.LOCATION
        if token.data == _OPEN:
            notes.add(CUT_OUTLINE, int(is_inside))
            outlines.append([[]])
            is_inside = True
        elif is_inside and is_location:
            outlines[-1][-1].append(token)
        elif is_inside and token.data == _CLOSE and is_marked:
            is_inside = False
        elif is_inside:
            notes.add(STRAY_MARKERS, int(token.data == _CLOSE))
            outlines[-1].append([])
        else:
            notes.add(LEFTOVER_LOCATIONS if is_location else STRAY_MARKERS)
    notes.add(CUT_OUTLINE, int(is_inside and is_marked))
    return outlines


def _is_ring(ring: Sequence[AnswerToken], notes: Notes) -> bool:
    if not ring:
        return False
    bins = [token.location_bin for token in ring]
    if len(set(zip(bins[0::2], bins[1::2], strict=False))) < 3:
        notes.add(TOO_FEW_POINTS)
        return False
    notes.add(LEFTOVER_LOCATIONS, len(ring) % 2)
    return True


def _objects(span: Span, output: OutputKind, size_wh: SizeWh, notes: Notes) -> Iterable[Object]:
    """What one span says; whatever does not make an object of this output leaves a note."""
    label = span.label
    is_polygon = output is OutputKind.POLYGONS or (
        output is OutputKind.BOXES_OR_POLYGONS and span.has_outline
    )
    group_size = 8 if output is OutputKind.OCR else 4
    if not span.place_tokens:
        notes.add(UNPLACED_TEXT)
        return ()
    if output in (OutputKind.BOXES, OutputKind.POLYGONS):
        notes.add(UNPLACED_TEXT, int(bool(label)))
        label = ""
    elif output is OutputKind.GROUNDING and label in BANNED_PHRASES:
        notes.add(TOO_GENERAL)
        return ()
    elif not label:
        notes.add(UNLABELED, 1 if is_polygon else max(span.num_locations // group_size, 1))
        return ()
    if is_polygon:
        return _polygons(span, label, size_wh, notes)
    return (_quads if output is OutputKind.OCR else _boxes)(span, label, size_wh, notes)


@dataclass(frozen=True, slots=True)
class Parsed:
    """What an answer says. ``text`` is None unless the task's output is text."""

    objects: tuple[Object, ...]
    text: str | None
    notes: tuple[str, ...]


def parse(tokens: Iterable[AnswerToken], task: Task, size_wh: SizeWh) -> Parsed:
    """The objects or the text that an answer spells, for any sequence of tokens.

    ``size_wh`` is the original image's size; coordinates are floats in its pixels.
    """
    notes = Notes()
    if task.output is OutputKind.TEXT:
        return _parse_text(list(tokens), task, notes)
    objects = [
        found
        for span in split_spans(tokens, notes)
        for found in _objects(span, task.output, size_wh, notes)
    ]
    return Parsed(tuple(objects), None, notes.sentences())


def _parse_text(tokens: list[AnswerToken], task: Task, notes: Notes) -> Parsed:
    words = [token for token in tokens if token.kind is TokenKind.TEXT]
    if task.takes is TaskInput.OPTIONAL_TEXT:
        # What a fine-tune's own tokens mean is known to its author only.
        words, text = tokens, joined_text(tokens).strip()
    else:
        spans = split_spans(tokens, notes)
        text = " ".join(span.label for span in spans if span.label)
        for span in spans:
            # A region task repeats its region behind the words; other locations deserve a note.
            repeats = 4 if task.takes is TaskInput.REGION else span.num_locations + 1
            notes.add(LEFTOVER_LOCATIONS, span.num_locations % repeats)
    objects = (Text(text, object_score((), words), tuple(words)),) if text else ()
    return Parsed(objects, text, notes.sentences())


def parse_answer_text(task: Task | str, text: str, size_wh: SizeWh) -> Result:
    """A result from a raw generated string, such as another program's; its scores are None.

    Raises RequestError for an unknown task or a size that is not two positive numbers.
    """
    known = find_task(task) if isinstance(task, str) else task
    if min(size_wh) < 1:
        raise RequestError(
            f"The size of an image is its width and height in pixels, and {size_wh} was received; "
            "give for example 640x480."
        )
    parsed = parse(tokens_from_text(text), known, size_wh)
    return Result(
        task=known.token,
        size_wh=size_wh,
        objects=parsed.objects,
        text=parsed.text,
        answer=strip_dropped(text),
        token_ids=(),
        truncated=False,
        notes=parsed.notes,
    )
