"""The frames of a video asked about in batches, in a run of the app: decoded ahead, and stopped."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

from florence2.engine.scheduler import Priority
from florence2.errors import DeviceLostError, FlorenceError, RequestError
from florence2.records import Failure, SizeWh
from serve.limits import FailureLimit
from serve.platform.failures import FailedImageError, failure_of
from serve.platform.pipeline import MAX_BATCH_PIXELS
from serve.platform.reference import resolve_reference
from serve.platform.registry import InferenceRequest, wait_while_paused
from serve.platform.request_state import State, batch_size_of
from serve.platform.run import RunServices
from serve.predict.full_queue import when_queue_has_room
from serve.predict.predictor import Call, Deadline, Predicted
from serve.sdk import sly
from serve.settings import Settings
from serve.video.frames import AskedFrame, Place, Range
from serve.video.request import FramesAsked

Outcome = Predicted | Failure
Asked = tuple[AskedFrame, Outcome]
"""A frame without its pixels, and what became of it."""
FramesOf = Callable[[Range, Place | None], Generator[AskedFrame]]


@dataclass(frozen=True, slots=True)
class Video:
    """A video that a run asks about. ``frames`` gives those of a range, behind a place if given.

    ``num_frames`` is how many it says that it has, None where it does not; it seems to have
    ``likely_frames``. ``rate`` are frames in a second. ``ids`` are those of the platform, as the
    SDK's entries name them.
    """

    name: str
    size_wh: SizeWh
    rate: float
    num_frames: int | None
    likely_frames: int
    frames: FramesOf
    ids: Mapping[str, int] = field(default_factory=dict)

    def range_of(self, asked: FramesAsked) -> Range:
        """The frames of a request; RequestError where it has none of them."""
        known = self.likely_frames if asked.is_backward else self.num_frames
        return asked.within(known, self.rate)

    def count(self, wanted: Range) -> int:
        """About how many frames of a range are asked about."""
        return wanted.count(self.likely_frames)


def no_frames(video: Video, wanted: Range) -> RequestError:
    """What a run ends with that could not decode any of the frames."""
    return RequestError(
        f"None of the frames that were asked for can be decoded of {video.name!r}, from frame "
        f"{wanted.first} on; it is cut or damaged, or has fewer frames: look at the video."
    )


class FrameAsker:
    """Asks about the frames of one video, for one request."""

    def __init__(
        self,
        video: Video,
        api: sly.Api | None,
        state: State,
        request: InferenceRequest,
        services: RunServices,
    ) -> None:
        """RequestError for a state that cannot be understood."""
        self._video = video
        self._api = api
        self._request = request
        self._services = services
        self._deadline = Deadline.of(state)
        self._limit = FailureLimit.parse(state.get("max_failures"))
        batch = batch_size_of(state, services.default_batch_size) * services.num_devices
        width, height = video.size_wh
        self._batch_size = max(1, min(batch, MAX_BATCH_PIXELS // (width * height)))
        self.settings = self._settings_of(state)
        self.num_asked = self.num_failed = self.num_damaged = 0
        self.last_index: int | None = None

    def _settings_of(self, state: State) -> Settings:
        """A reference on one image is looked at once for all frames."""
        settings = self._services.settings_of(state)
        if settings.reference is None or settings.reference.image_id is None or self._api is None:
            return settings
        call = Call(api=self._api)
        return resolve_reference(
            settings, self._api, lambda asks: self._services.ask(asks, call), image=None
        )

    def batches(
        self,
        wanted: Range,
        after: Place | None = None,
        model: Mapping[str, Any] | None = None,
    ) -> Generator[list[Asked]]:
        """The frames of a range with their answers, in order, until the request is stopped.
        Unless None, all of them come from ``model``, which is told as in a run's manifest.

        Raises what no frame can do without: a wrong request, a model that is gone, more failures
        than ``max_failures``, or not one answer in the first batch; and ModelChangedError. Close it
        to give up the rest.
        """
        is_bulk = wanted.first != wanted.last
        frames = self._video.frames(wanted, after)
        with (
            closing(frames),
            ThreadPoolExecutor(1, thread_name_prefix="decode") as decoder,
        ):
            coming = decoder.submit(self._take, frames, wanted)
            while group := coming.result():
                coming = decoder.submit(self._take, frames, wanted)
                wait_while_paused(self._request)
                if self._request.is_stopped():
                    return
                outcomes = self._outcomes([one.pixels for one in group], is_bulk=is_bulk)
                if self._request.is_stopped():
                    return
                if model is not None:
                    self._services.check_model(self.settings, model)
                self._count(group, outcomes)
                yield [
                    (replace(one, pixels=one.pixels[:0]), outcome)
                    for one, outcome in zip(group, outcomes, strict=True)
                ]
                self._limit.check(self.num_failed, self.num_asked)

    def notes(self) -> tuple[str, ...]:
        """What is worth knowing of the frames that were asked about so far."""
        if not self.num_damaged:
            return ()
        return (
            f"{self.num_damaged} parts of the video could not be decoded and count as no frames; "
            "the frames after them may have other numbers in a player.",
        )

    def _take(self, frames: Iterator[AskedFrame], wanted: Range) -> list[AskedFrame]:
        """The next batch; where a video ends, its last frame is none of the asked ones."""
        group: list[AskedFrame] = []
        while len(group) < self._batch_size and (frame := next(frames, None)) is not None:
            if (frame.place.index - wanted.first) % wanted.every == 0:
                group.append(frame)
        return group

    def _outcomes(self, images: Sequence[Any], *, is_bulk: bool) -> list[Outcome]:
        should_stop = self._request.is_stopped

        def predict() -> Sequence[Outcome]:
            priority = Priority.BULK if is_bulk else Priority.INTERACTIVE
            call = Call(priority, self._deadline.left_s, should_stop, self._api)
            return self._services.predict(images, self.settings, call)

        try:
            outcomes = when_queue_has_room(predict, should_stop) if is_bulk else predict()
        except FlorenceError as error:
            if not should_stop():
                raise
            return [failure_of(error, "The run was stopped")] * len(images)
        for outcome in outcomes:
            if isinstance(outcome, Failure) and outcome.code == DeviceLostError.code:
                raise DeviceLostError(outcome.message)
            if isinstance(outcome, Failure) and outcome.code == "not_deployed":
                raise FailedImageError(outcome)
        return list(outcomes)

    def _count(self, group: Sequence[AskedFrame], outcomes: Sequence[Outcome]) -> None:
        failures = [one for one in outcomes if isinstance(one, Failure)]
        if not self.num_asked and len(failures) == len(outcomes):
            # Frames are alike: what none of these can be asked, none of the others can.
            raise FailedImageError(failures[0])
        self.num_asked += len(group)
        self.num_failed += len(failures)
        self.num_damaged += sum(one.damaged for one in group)
        self.last_index = group[-1].place.index
        self._request.done(len(group))
