"""What a model's answer about a frame says of objects: boxes with a class and a score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from florence2.errors import RequestError
from florence2.records import Failure
from florence2.tasks import OutputKind
from serve.labeled_data import same_objects
from serve.predict.geometry import box_xyxy_from_rectangle_tlbr
from serve.predict.predictor import Predicted
from serve.sdk import sly
from serve.settings import Settings
from serve.video.frames import AskedFrame
from serve.video.journal import Detection, Seen

_BOXES: Final = (
    OutputKind.GROUNDING,
    OutputKind.LABELED_BOXES,
    OutputKind.BOXES,
    OutputKind.BOXES_OR_POLYGONS,
)
_SENTENCES: Final = "<DENSE_REGION_CAPTION>"
_SCORE: Final = "confidence"


def check_gives_boxes(settings: Settings, what_to_do: str) -> None:
    """RequestError for a task whose answers cannot be followed."""
    last = settings.steps[-1]
    if last.output not in _BOXES or last.token == _SENTENCES:
        raise RequestError(
            "A video is labeled with boxes that have a class, and the answers of "
            f"{settings.task_prompt} have none; {what_to_do}."
        )


def seen_of(frame: AskedFrame, outcome: Predicted | Failure) -> Seen:
    """What is kept of a frame that was asked about."""
    if isinstance(outcome, Failure):
        failed = outcome.code, outcome.message[:500]
        return Seen(frame.place, frame.times_s, frame.damaged, failed=failed)
    return Seen(
        frame.place,
        frame.times_s,
        frame.damaged,
        tuple(_detection(parts) for parts in same_objects(outcome.annotation.labels)),
        notes=outcome.notes,
        is_truncated=any(result.truncated for result in outcome.results),
    )


def _detection(parts: Sequence[sly.Label]) -> Detection:
    """The box around all outlines of an object."""
    boxes = [part.geometry.to_bbox() for part in parts]
    tlbr = (
        min(box.top for box in boxes),
        min(box.left for box in boxes),
        max(box.bottom for box in boxes),
        max(box.right for box in boxes),
    )
    tag = parts[0].tags.get(_SCORE)
    score = 1.0 if tag is None else float(tag.value)
    return Detection(parts[0].obj_class.name, box_xyxy_from_rectangle_tlbr(tlbr), score)
