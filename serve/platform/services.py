"""What runs over the platform's images need of the app, in one frozen record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from florence2.engine.ask import AnyImage, Ask
from florence2.records import Failure, Result
from serve.platform.download import download_images
from serve.sdk import sly
from serve.settings.model import Settings

State = Mapping[str, object]
Download = Callable[[sly.Api, Sequence[sly.ImageInfo]], Sequence[AnyImage]]


class HasAnnotation(Protocol):
    """A predicted image."""

    @property
    def annotation(self) -> sly.Annotation: ...

    @property
    def notes(self) -> tuple[str, ...]: ...


class Predict(Protocol):
    """One outcome per image, in order. ``is_bulk`` work gives way to single images."""

    def __call__(
        self,
        images: Sequence[AnyImage],
        settings: Settings,
        *,
        api: sly.Api,
        is_bulk: bool,
        should_stop: Callable[[], bool],
    ) -> Sequence[HasAnnotation | Failure]: ...


class AskQuestions(Protocol):
    """One outcome per question, in order, as bulk work."""

    def __call__(
        self, asks: Sequence[Ask], *, should_stop: Callable[[], bool]
    ) -> Sequence[Result | Failure]: ...


class Upload(Protocol):
    """``upload_predictions`` of the SDK's ``Inference``, bound to the app."""

    def __call__(
        self, predictions: list[sly.nn.model.prediction.Prediction], **options: object
    ) -> None: ...


@dataclass(frozen=True)
class RunServices:
    """``settings_of`` makes settings of a request's state; what it raises ends the run.

    ``download`` gives one image, or its Failure, per info, in order; it is called from several
    threads. ``format_output`` is the SDK's ``_format_output`` bound to the app. ``task_id`` names
    created projects.
    """

    predict: Predict
    settings_of: Callable[[State, sly.Api], Settings]
    upload: Upload
    format_output: Callable[[list[sly.nn.model.prediction.Prediction]], list[dict[str, object]]]
    model_meta: Callable[[], sly.ProjectMeta]
    task_id: int | None
    default_batch_size: int
    download: Download = download_images


@dataclass(frozen=True)
class ExistingServices:
    """What asking about existing labels needs; see RunServices."""

    ask: AskQuestions
    settings_of: Callable[[State, sly.Api], Settings]
    default_batch_size: int
    download: Download = download_images
