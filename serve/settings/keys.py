"""THE table of keys that a request's settings may have; the settings file and the docs are made
from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from serve.settings.model import Settings


@dataclass(frozen=True, slots=True)
class Key:
    """A key, its other spellings, and what the settings file says about it.

    ``default`` is the value in the settings file, which the SDK puts wherever a request has none.
    ``is_text`` keeps the words "none" and "null", which otherwise mean that nothing was given.
    A key ``for_clients`` is sent by other applications and stands at the end of the file.
    """

    name: str
    takes: str
    says: str
    default: object = None
    spellings: tuple[str, ...] = ()
    is_text: bool = False
    for_clients: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The key and its other spellings."""
        return (self.name, *self.spellings)


def _field(
    name: str,
    takes: str,
    *spellings: str,
    default: object = None,
    is_text: bool = False,
) -> Key:
    says = Settings.model_fields[name].description or ""
    return Key(name, takes, says, default, spellings, is_text)


_DEFAULT: Final = Settings()

KEYS: Final[tuple[Key, ...]] = (
    _field("task_prompt", "task", "task"),
    _field(
        "text", "text or list", "text_prompt", "text_queries", "prompt", default="", is_text=True
    ),
    _field("mapping", "mapping"),
    _field("classes", "list, or all"),
    _field(
        "confidence_threshold",
        "0 to 1",
        "conf",
        "confidence",
        "confidence_thresh",
        "box_threshold",
        default=_DEFAULT.confidence_threshold,
    ),
    _field("class_thresholds", "mapping"),
    _field(
        "nms_threshold",
        "0 to 1, or off",
        "iou",
        "iou_threshold",
        default=_DEFAULT.nms_threshold,
    ),
    _field("containment_threshold", "0 to 1, or off"),
    _field("nms_across_classes", "true or false", default=_DEFAULT.nms_across_classes),
    _field("max_box_area", "0 to 1", default=_DEFAULT.max_box_area),
    _field("geometry", "polygon or bitmap", default=_DEFAULT.geometry),
    _field("sentences_as_classes", "true or false", default=_DEFAULT.sentences_as_classes),
    _field("class_suffix", "text", default=_DEFAULT.class_suffix, is_text=True),
    _field("tiling", "mapping, or off"),
    _field("regions", "boxes", "region", "rectangles"),
    _field("num_beams", "whole number"),
    _field("max_new_tokens", "whole number"),
    _field("rectangle", "box"),
    Key(
        "mode",
        "text_prompt or reference_image",
        "Whether text and mapping say what to look for, or the reference_ keys do; empty: the "
        "reference, if there is one.",
        for_clients=True,
    ),
    Key(
        "reference_image_id",
        "whole number",
        "The image that the reference is on; empty: the image that is asked about.",
        for_clients=True,
    ),
    Key(
        "reference_bbox",
        "box",
        "An object to find more of, as [top, left, bottom, right] in whole pixels, the last ones "
        "included.",
        for_clients=True,
    ),
    Key(
        "reference_class_name",
        "text",
        'The class of what is found by the reference; empty: "object".',
        is_text=True,
        for_clients=True,
    ),
    Key(
        "inference_mode",
        "full_image or sliding_window",
        "Whether to look at the image through the windows of sliding_window_params.",
        for_clients=True,
    ),
    Key(
        "sliding_window_params",
        "mapping",
        "windowWidth, windowHeight, overlapX and overlapY in pixels; other entries are let "
        "through.",
        for_clients=True,
    ),
)

BY_NAME: Final = {key.name: key for key in KEYS}

ONLY_SETTINGS: Final = frozenset(
    key.name for key in KEYS if not key.for_clients and key.name not in ("classes", "rectangle")
)
"""Keys that mean nothing beside the settings; the SDK has a meaning of its own for the others."""

LEFT_OUT: Final = frozenset({"rectangle", "rectangles"})
"""Not in the settings file: the SDK takes a null under these names for a box, and fails."""

_LIST_ONLY: Final = "chooses what is labeled, not how"
_VIDEO: Final = "is about frames of a video"
_UPLOAD: Final = "is about where labels are written"

LET_THROUGH: Final[dict[str, str]] = {
    "existing_objects_iou_thresh": "is read by the SDK when it merges labels",
    "sliding_window_mode": "is added by the SDK to every request",
    "text_threshold": "is about words of another model; box_threshold is understood",
    "batch_size": "is how a client groups images",
    "img_size": "is another model's input size",
    "recursive": _LIST_ONLY,
    "image_ids": _LIST_ONLY,
    "video_ids": _LIST_ONLY,
    "dataset_ids": _LIST_ONLY,
    "project_ids": _LIST_ONLY,
    "show_progress": "is about the client's own screen",
    "upload_mode": _UPLOAD,
    "predictions_mode": _UPLOAD,
    "iou_merge_threshold": _UPLOAD,
    "model_prediction_suffix": _UPLOAD,
    "output_project_id": _UPLOAD,
    "cache_project_on_model": "is how the SDK reads a project",
    "cache_datasets_on_model": "is how the SDK reads a project",
    "start_frame": _VIDEO,
    "start_frame_index": _VIDEO,
    "num_frames": _VIDEO,
    "frames_count": _VIDEO,
    "end_frame": _VIDEO,
    "end_frame_index": _VIDEO,
    "step": _VIDEO,
    "stride": _VIDEO,
    "direction": _VIDEO,
    "duration": _VIDEO,
    "tracking": _VIDEO,
    "tracking_config": _VIDEO,
    "tracker": _VIDEO,
    "tracker_settings": _VIDEO,
    "input_image_id": "is meant for a segmentation model that is asked next",
    "bbox_class_name": "is meant for a segmentation model that is asked next",
}
"""Keys that clients send with every model and that change nothing here, with the reason."""
