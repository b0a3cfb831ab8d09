"""What the page about a run knows of its images: figures that stay small however many they are."""

from __future__ import annotations

import heapq
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from operator import itemgetter
from typing import Final, Generic, Literal, TypeVar

State = Literal["labeled", "empty", "failed", "skipped"]

NUM_DRAWN: Final = 24
"""How many of the lowest-scored labels are drawn."""
NUM_EXAMPLES: Final = 12
"""How many images are named for each thing that may be wrong with them."""
MAX_CLASSES: Final = 1000
"""So many classes have figures of their own; of sentences as classes there may be any number."""
MAX_REASONS: Final = 50
LOW_SCORE: Final = 0.5
"""The model is not sure of a label with less."""
# One image that is labeled badly all over should not be all that is seen.
_DRAWN_PER_IMAGE: Final = 3
_THOUSAND: Final = 1000
_QUARTERS: Final = (0.25, 0.5, 0.75)
# Beyond this many spreads above the upper quartile a number is far out (Tukey's outer fence).
_FAR_OUT: Final = 3.0
_MIN_MORE_LABELS: Final = 5
_MIN_LABELED: Final = 20
_FEW_EMPTY: Final = 0.05
_CUT: Final = "the answer was cut"
_NOTE_COUNT: Final = re.compile(r": \d+$")
_UNNAMED: Final = "(class not noted)"


@dataclass(frozen=True, slots=True)
class ImageOutcome:
    """What became of one image.

    ``name`` is what people call it, ``key`` what it and its labels are found by. ``scores`` has for
    each class those of its labels, in the order in which they were written; None for a label that
    has none. ``num_texts`` counts texts about the whole image. ``code`` and ``message`` say why it
    failed.
    """

    name: str
    state: State
    key: str = ""
    scores: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    num_texts: int = 0
    is_truncated: bool = False
    notes: Sequence[str] = ()
    code: str = ""
    message: str = ""

    @property
    def num_labels(self) -> int:
        return sum(map(len, self.scores.values()))


def known_scores(
    scores: Mapping[str, Sequence[float | None]], num_labels: int
) -> Mapping[str, Sequence[float | None]]:
    """The scores, or labels without one where an earlier version noted only how many there are."""
    return scores or ({_UNNAMED: [None] * num_labels} if num_labels else {})


@dataclass(slots=True)
class LowLabel:
    """One label that is to be drawn: the ``index``-th of its class on its image; an image that has
    texts alone, if ``class_name`` is None.

    ``jpeg`` is the drawing, None where there is none, or not yet; ``text`` what the label says
    beside its class.
    """

    image: ImageOutcome
    class_name: str | None
    index: int
    score: float | None
    jpeg: bytes | None = None
    text: str = ""


Draw = Callable[[LowLabel], None]
"""Gives a label its ``jpeg`` and ``text``, or leaves it without."""
Item = TypeVar("Item")


class Least(Generic[Item]):
    """The ``size`` items with the least keys of all that were added; of equal ones the first."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._number = count()
        # The greatest key is the first to go.
        self._heap: list[tuple[float, int, Item]] = []

    def admits(self, key: float) -> bool:
        """Whether an item with this key would be kept now."""
        return len(self._heap) < self._size or key < -self._heap[0][0]

    def add(self, key: float, item: Item) -> None:
        entry = (-key, -next(self._number), item)
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, entry)
        elif key < -self._heap[0][0]:
            heapq.heapreplace(self._heap, entry)

    def __iter__(self) -> Iterator[Item]:
        """The least first."""
        return (item for *_, item in sorted(self._heap, key=lambda entry: entry[:2], reverse=True))

    def __len__(self) -> int:
        return len(self._heap)


@dataclass(slots=True)
class ClassFigures:
    """The labels of one class. ``thousandths`` counts scores, in thousandths."""

    num_labels: int = 0
    num_images: int = 0
    thousandths: Counter[int] = field(default_factory=Counter)

    def add(self, scores: Sequence[float | None]) -> None:
        self.num_labels += len(scores)
        self.num_images += 1
        for score in scores:
            if score is not None:
                self.thousandths[round(score * _THOUSAND)] += 1

    @property
    def num_scored(self) -> int:
        return self.thousandths.total()

    def median(self) -> float | None:
        """To a thousandth; None where no label has a score."""
        if not self.thousandths:
            return None
        return _quantile(self.thousandths, 0.5) / _THOUSAND

    def histogram(self, num_bins: int) -> list[int]:
        """Labels by score in bins of equal width from 0 to 1."""
        bins = [0] * num_bins
        for thousandth, number in self.thousandths.items():
            place = thousandth * num_bins // _THOUSAND
            bins[min(max(place, 0), num_bins - 1)] += number
        return bins


@dataclass(slots=True)
class FailedImages:
    """The images that failed for one reason, some of them by name."""

    count: int
    examples: Least[ImageOutcome]


class RunFigures:
    """Counts, scores by class and examples of the images that were added, each of them once.

    Examples are drawn by lot, always the same for the same images in the same order.
    """

    def __init__(self) -> None:
        self.counts: Counter[State] = Counter()
        self.num_labels = 0
        self.num_texts = 0
        self.num_truncated = 0
        self.notes: Counter[str] = Counter()
        self.classes: dict[str, ClassFigures] = {}
        self.other_classes = ClassFigures()
        self.failures: dict[str, FailedImages] = {}
        self.lowest: Least[LowLabel] = Least(NUM_DRAWN)
        self.truncated: Least[ImageOutcome] = Least(NUM_EXAMPLES)
        self.noted: Least[ImageOutcome] = Least(NUM_EXAMPLES)
        self.empty: Least[ImageOutcome] = Least(NUM_EXAMPLES)
        self._most_labels: Least[ImageOutcome] = Least(NUM_EXAMPLES)
        self._labels_per_image: Counter[int] = Counter()
        self._lot, self._picture_lot = random.Random(0), random.Random(0)

    @property
    def num_images(self) -> int:
        return self.counts.total()

    @property
    def num_scored(self) -> int:
        """Labels that have a score."""
        return sum(one.num_scored for one in (*self.classes.values(), self.other_classes))

    @property
    def num_low(self) -> int:
        """Labels with a low score."""
        every = (*self.classes.values(), self.other_classes)
        counted = (item for one in every for item in one.thousandths.items())
        return sum(number for value, number in counted if value < LOW_SCORE * _THOUSAND)

    def wants_picture(self, scores: Mapping[str, Sequence[float | None]]) -> bool:
        """Whether a label with one of these scores, or a text, would be drawn now."""
        known = [score for of_class in scores.values() for score in of_class if score is not None]
        return self.lowest.admits(min(known) if known else 1.0 + self._picture_lot.random())

    def add(self, image: ImageOutcome, draw: Draw | None = None) -> None:
        """Counts one image; ``draw`` is asked for those of its labels that are among the lowest."""
        self.counts[image.state] += 1
        if image.state == "failed":
            self._add_failure(image)
            return
        if image.state == "skipped":
            return
        lot = self._lot.random()
        if image.state == "empty":
            self.empty.add(lot, image)
        if image.is_truncated:
            self.num_truncated += 1
            self.truncated.add(lot, image)
        # That an answer was cut is counted by itself.
        if notes := [note for note in image.notes if not note.startswith(_CUT)]:
            for note in notes:
                kind = _NOTE_COUNT.sub("", note)
                is_known = kind in self.notes or len(self.notes) < MAX_REASONS
                self.notes[kind if is_known else "other notes"] += 1
            self.noted.add(lot, image)
        num_labels = image.num_labels
        self.num_labels += num_labels
        self.num_texts += image.num_texts
        self._labels_per_image[num_labels] += 1
        if num_labels:
            self._most_labels.add(-num_labels, image)
        for name, scores in image.scores.items():
            self._figures_of(name).add(scores)
        self._add_lowest(image, draw)

    def far_out(self) -> tuple[int, int, list[ImageOutcome]]:
        """A number of labels that is far more than images mostly have, how many images have at
        least so many, and those with the most."""
        if not self._labels_per_image:
            return 0, 0, []
        low, middle, high = (_quantile(self._labels_per_image, share) for share in _QUARTERS)
        limit = math.ceil(max(high + _FAR_OUT * (high - low), 2 * middle + _MIN_MORE_LABELS))
        number = sum(many for labels, many in self._labels_per_image.items() if labels >= limit)
        return limit, number, [one for one in self._most_labels if one.num_labels >= limit]

    def is_empty_unusual(self) -> bool:
        """Whether something was found on nearly all images, and on some nothing."""
        labeled, empty = self.counts["labeled"], self.counts["empty"]
        return bool(empty) and labeled >= _MIN_LABELED and empty <= _FEW_EMPTY * (labeled + empty)

    def _add_failure(self, image: ImageOutcome) -> None:
        code = image.code if len(self.failures) < MAX_REASONS else "other reasons"
        failed = self.failures.get(image.code) or self.failures.setdefault(
            code, FailedImages(0, Least(NUM_EXAMPLES))
        )
        failed.count += 1
        failed.examples.add(self._lot.random(), image)

    def _figures_of(self, class_name: str) -> ClassFigures:
        figures = self.classes.get(class_name)
        if figures is None:
            if len(self.classes) >= MAX_CLASSES:
                return self.other_classes
            figures = self.classes[class_name] = ClassFigures()
        return figures

    def _add_lowest(self, image: ImageOutcome, draw: Draw | None) -> None:
        """Labels without a score, and texts, come after all others, by lot."""
        labels: list[tuple[float, str | None, int, float | None]] = [
            (1.0 + self._lot.random() if score is None else score, name, index, score)
            for name, scores in image.scores.items()
            for index, score in enumerate(scores)
        ]
        if image.num_texts and not labels:
            labels.append((1.0 + self._lot.random(), None, 0, None))
        for key, name, index, score in heapq.nsmallest(_DRAWN_PER_IMAGE, labels, key=itemgetter(0)):
            if self.lowest.admits(key):
                low = LowLabel(image, name, index, score)
                if draw is not None:
                    draw(low)
                self.lowest.add(key, low)


def _quantile(counted: Counter[int], share: float) -> int:
    """The least value that has at least ``share`` of all counted ones at or below it."""
    wanted, so_far = share * counted.total(), 0
    for value in sorted(counted):
        so_far += counted[value]
        if so_far >= wanted:
            return value
    return 0
