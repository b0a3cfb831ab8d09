"""What was asked and what the user wants of the answers: the input of ``serve.predict.annotations``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from florence2.records import Region, Result
from serve.predict.naming import FIXED_SHAPES, clean_class_name, clean_suffix, possible_titles

# Two prompts of one class see the same object: from this overlap on only the surer one is kept.
SAME_OBJECT_IOU: Final = 0.7


@dataclass(frozen=True, slots=True)
class Answered:
    """A result and what was asked for: the class its prompt stands for, the phrase, the region."""

    result: Result
    class_name: str | None = None
    phrase: str | None = None
    region: Region | None = None


@dataclass(frozen=True, slots=True)
class LabelRules:
    """Which objects become labels, of which class and shape.

    ``classes`` maps ``phrase_key`` of a label to a class. An object goes when its score is below
    the threshold of its class (``class_thresholds``, else ``threshold``), when ``whitelist`` lacks
    its class, or when its box covers more than ``max_box_area`` of the image. Names are compared
    cleaned, in any case, without ``class_suffix``; a whitelist may have them with it too.
    ``nms_threshold`` and ``containment_threshold``: see ``serve.predict.dedupe``; None is off.
    ``fixed_shapes`` are the classes whose shape the readers of the annotation already know.
    """

    classes: Mapping[str, str] = field(default_factory=dict)
    threshold: float = 0.0
    class_thresholds: Mapping[str, float] = field(default_factory=dict)
    whitelist: frozenset[str] | None = None
    class_suffix: str = ""
    geometry: Literal["polygon", "bitmap"] = "polygon"
    max_box_area: float = 1.0
    sentences_as_classes: bool = False
    nms_threshold: float | None = SAME_OBJECT_IOU
    containment_threshold: float | None = None
    across_classes: bool = False
    fixed_shapes: Mapping[str, str] = field(default_factory=lambda: FIXED_SHAPES)

    def __post_init__(self) -> None:
        thresholds = {_key(name): value for name, value in self.class_thresholds.items()}
        object.__setattr__(self, "class_thresholds", thresholds)
        object.__setattr__(self, "class_suffix", clean_suffix(self.class_suffix))
        if self.whitelist is not None:
            object.__setattr__(self, "whitelist", frozenset(map(_key, self.whitelist)))

    def threshold_of(self, class_name: str) -> float:
        return self.class_thresholds.get(_key(class_name), self.threshold)

    def wants(self, class_name: str, shape: str) -> bool:
        """Whether the whitelist has the class, as it is called or as its labels will be."""
        return self.whitelist is None or any(
            _key(title) in self.whitelist
            for title in (class_name, *possible_titles(class_name, shape, self.class_suffix))
        )


def _key(class_name: str) -> str:
    """What two spellings of a class share: a labeler's ``Car`` is the model's ``car``."""
    return clean_class_name(class_name).casefold()
