"""Settings as a request would spell them: plain JSON types that parse to the same settings."""

from __future__ import annotations

from serve.settings.model import Settings

OFF = "off"


def raw_settings(settings: Settings) -> dict[str, object]:
    """A dictionary whose ``parse_settings`` is ``settings``."""
    raw: dict[str, object] = {
        "task_prompt": settings.task_prompt,
        "text": settings.text,
        "mapping": {name: list(prompts) for name, prompts in settings.mapping.items()},
        "classes": None if settings.classes is None else list(settings.classes),
        "confidence_threshold": settings.confidence_threshold,
        "class_thresholds": dict(settings.class_thresholds),
        "nms_threshold": OFF if settings.nms_threshold is None else settings.nms_threshold,
        "containment_threshold": settings.containment_threshold,
        "nms_across_classes": settings.nms_across_classes,
        "max_box_area": settings.max_box_area,
        "geometry": settings.geometry,
        "sentences_as_classes": settings.sentences_as_classes,
        "class_suffix": settings.class_suffix,
        "tiling": _tiling(settings),
        "regions": [list(box) for box in settings.regions],
        "rectangle": None if settings.rectangle is None else list(settings.rectangle),
        "num_beams": settings.num_beams,
        "max_new_tokens": settings.max_new_tokens,
    }
    return raw | _reference(settings)


def _tiling(settings: Settings) -> dict[str, object] | None:
    if settings.tiling is None:
        return None
    width, height = settings.tiling.size_wh
    return {
        "width": width,
        "height": height,
        "overlap": list(settings.tiling.overlap_wh),
        "full_image": settings.tiling.full_image,
    }


def _reference(settings: Settings) -> dict[str, object]:
    if settings.reference is None:
        return {}
    left, top, right, bottom = settings.reference.box_xyxy
    return {
        "mode": "reference_image",
        "reference_image_id": settings.reference.image_id,
        "reference_bbox": [top, left, bottom - 1, right - 1],
        "reference_class_name": settings.reference.class_name,
    }
