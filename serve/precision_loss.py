"""What a precision costs on labeled data: both asked the same, compared, and what is kept of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from florence2.api import Florence2
from florence2.checkpoint.converted import file_sha256
from florence2.conversion.kept import Conversions
from florence2.conversion.measured_loss import MOST_POINTS, TaskLoss, why_not_enough
from florence2.evaluation.loss import PrecisionLoss, located_loss, text_loss
from florence2.labeled.records import LabeledData
from florence2.tasks import TASKS
from serve.evaluation import TaskReport

_OCR: Final = ("<OCR>", "<OCR_WITH_REGION>", "<REGION_TO_OCR>")
# Of these a text is right or wrong; so is an answer to a fine-tune's own question.
_EXACT: Final = ("<REGION_TO_CATEGORY>",)
_FREE: Final = tuple(one.token for one in TASKS if one.token not in (*_OCR, *_EXACT))
_FAILED: Final = "some images were answered by one of the two only"


def compared(
    before: Sequence[TaskReport], after: Sequence[TaskReport], against: str, precision: str
) -> PrecisionLoss:
    """The loss from ``before`` in the precision ``against`` to ``after``; of the same plans."""
    tasks: list[TaskLoss | None] = []
    why_not = None
    for old, new in zip(before, after, strict=True):
        task, num_before = new.plan.task, len(tasks)
        if {one.name for one in old.failed} != {one.name for one in new.failed}:
            why_not = _FAILED
        if old.located is not None and new.located is not None:
            tasks.append(located_loss(task, new.plan.data, old.located, new.located))
        if old.texts is not None and new.texts is not None:
            exact = task not in (*_OCR, *_FREE)
            tasks.append(text_loss(task, old.texts, new.texts, exact=exact))
            if task in _FREE:
                why_not = f"how good an answer to {task} is, its characters do not say"
        if len(tasks) == num_before or None in tasks[num_before:]:
            why_not = why_not or f"{task} could not be compared"
    known = tuple(one for one in tasks if one is not None)
    return PrecisionLoss(precision, against, known, why_not or why_not_enough(known))


def keep(loss: PrecisionLoss, model: Florence2, data: LabeledData, command: str) -> str | None:
    """Keeps beside the conversion that int8 costs less than a point, or forgets that it did.

    What was done, in a sentence; None where nothing depends on it: ``auto`` only ever chooses int8
    of the OpenVINO runtime, and the measure is one against float32.
    """
    checkpoint = model.engine.checkpoint
    is_asked = (loss.precision, loss.against, model.runtime) == ("int8", "fp32", "openvino")
    if not is_asked or checkpoint.converted is not None:
        return None
    conversions = Conversions()
    if loss.is_too_much:
        known = ", and takes it no more" if conversions.forget_int8_loss(checkpoint) else ""
        points = max(one.points for one in loss.tasks)
        return (
            f"Precision auto takes int8 where it costs less than {MOST_POINTS:g} point, and here "
            f"it costs {points:.2f}: auto stays what it is{known}."
        )
    if loss.why_not is not None:
        return f"That is not enough for precision auto to take int8: {loss.why_not}."
    path = conversions.keep_int8_loss(
        checkpoint,
        loss.tasks,
        data=str(data.source.absolute()),
        data_sha256=_fingerprint(data),
        command=command,
        date=datetime.now(UTC).date().isoformat(),
    )
    return (
        f"Precision auto takes int8 for {checkpoint.name} from now on, wherever the OpenVINO "
        f"runtime is taken; {path} says why: remove it to have that no more."
    )


def _fingerprint(data: LabeledData) -> str:
    """A hash of the images' files and of everything that is labeled in them."""
    digest = hashlib.sha256()
    for image in data.images:
        labels = image.objects, sorted(image.tags.items()), image.answers
        digest.update(
            f"{image.name} {file_sha256(image.path)} {labels!r}\n".encode(errors="replace")
        )
    return digest.hexdigest()
