"""What a client gets for an image: the SDK's entry for a prediction, or the reason for none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from florence2.records import Failure
from serve.platform.failures import FailedImageError
from serve.predict.predictor import Predicted
from serve.sdk import sly

# isort: split
from supervisely.nn.model.prediction import Prediction


def entries_of(
    outcomes: Sequence[Predicted | Failure], model_meta: sly.ProjectMeta
) -> list[dict[str, Any]]:
    """One entry per image, in order. A failed image has no annotation, and an ``error``.

    An empty annotation would say that nothing was found there.
    """
    return [_entry_of(outcome, model_meta) for outcome in outcomes]


def check_any_answered(outcomes: Sequence[Predicted | Failure]) -> None:
    """Raises the first failure when not one image was answered."""
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    if failures and len(failures) == len(outcomes):
        raise_failure(failures[0])


def raise_failure(failure: Failure) -> NoReturn:
    """The failure as an error with its code and sentence."""
    raise FailedImageError(failure)


def _entry_of(outcome: Predicted | Failure, model_meta: sly.ProjectMeta) -> dict[str, Any]:
    if isinstance(outcome, Failure):
        keys: dict[str, Any] = dict.fromkeys(
            Prediction({"size": {"height": 1, "width": 1}}, model_meta=model_meta).to_json()
        )
        error = {"code": outcome.code, "message": outcome.message}
        return {**keys, "annotation": None, "data": {}, "error": error}
    prediction = Prediction(outcome.annotation, model_meta=model_meta)
    entry: dict[str, Any] = {**prediction.to_json(), "data": {}}
    if outcome.notes:
        entry["notes"] = list(outcome.notes)
    return entry
