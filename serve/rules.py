"""From a request's settings to the rules by which its results become labels."""

from __future__ import annotations

from serve.label_rules import LabelRules
from serve.settings.model import Settings


def rules_of(settings: Settings) -> LabelRules:
    """The labels' rules that the settings ask for."""
    return LabelRules(
        classes=settings.classes_by_phrase,
        threshold=settings.confidence_threshold,
        class_thresholds=settings.class_thresholds,
        whitelist=None if settings.classes is None else frozenset(settings.classes),
        class_suffix=settings.class_suffix,
        geometry=settings.geometry,
        max_box_area=settings.max_box_area,
        sentences_as_classes=settings.sentences_as_classes,
        nms_threshold=settings.nms_threshold,
        containment_threshold=settings.containment_threshold,
        across_classes=settings.nms_across_classes,
    )
