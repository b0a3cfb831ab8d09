"""Entries of a run's results, in the SDK's form; a failed image's has an ``error``."""

from __future__ import annotations

from typing import Any

from florence2.records import Failure
from serve.platform.images import Target
from serve.platform.services import HasAnnotation, RunServices
from serve.sdk import sly


def prediction_of(
    target: Target, annotation: sly.Annotation | None, model_meta: sly.ProjectMeta, **extra: object
) -> sly.nn.model.prediction.Prediction:
    """The SDK's own record of one image's prediction, with ``extra`` keys in its result."""
    return sly.nn.model.prediction.Prediction(
        annotation,
        model_meta=model_meta,
        name=target.name,
        image_id=target.image_id,
        dataset_id=target.dataset_id,
        project_id=target.project_id,
        image_name=target.name,
        slides_data={},
        **extra,
    )


def predicted_entry(
    services: RunServices, target: Target, predicted: HasAnnotation
) -> dict[str, Any]:
    """An image's result with its annotation."""
    extra = {"notes": list(predicted.notes)} if predicted.notes else {}
    return _entry(
        services, prediction_of(target, predicted.annotation, services.model_meta(), **extra)
    )


def uploaded_entry(services: RunServices, target: Target) -> dict[str, Any]:
    """An image whose labels are on the platform: neither annotation nor data, as the SDK does."""
    entry = _entry(services, prediction_of(target, None, services.model_meta()))
    return {**entry, "annotation": None, "data": None}


def failed_entry(services: RunServices, target: Target, failure: Failure) -> dict[str, Any]:
    """An image without a result: no annotation, which is not the same as an empty one."""
    error = {"code": failure.code, "message": failure.message}
    return _entry(services, prediction_of(target, None, services.model_meta(), error=error))


def _entry(services: RunServices, prediction: sly.nn.model.prediction.Prediction) -> dict[str, Any]:
    return services.format_output([prediction])[0]
