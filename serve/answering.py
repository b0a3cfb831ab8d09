"""Answering requests in the SDK's terms: every way in leads to one predictor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Final

from florence2.budget import Hold
from florence2.engine.ask import AnyImage, Ask
from florence2.engine.scheduler import Priority
from florence2.errors import GenerationCancelledError, RequestError
from florence2.records import Failure, Result
from serve.answers import check_any_answered, entries_of, raise_failure
from serve.deployable import DeployableApp
from serve.http.bodies import held_bytes
from serve.platform.existing_objects import tag_existing_objects
from serve.platform.project_run import run_image_ids, run_project
from serve.platform.registry import RequestsManager
from serve.platform.request_state import Deadline, batch_size_of
from serve.platform.run import RunServices
from serve.predict.full_queue import when_queue_has_room
from serve.predict.predictor import Call, Predicted
from serve.sdk import sly
from serve.sdk_uploader import use_prompt_uploader
from serve.settings import (
    BOX_SUFFIX,
    Settings,
    check_placement,
    is_form_for_masks,
    parse_settings,
)

# isort: split
from supervisely.nn.inference.inference_request import InferenceRequest

use_prompt_uploader()

# Requests wait in threads for the one model thread; the SDK would allow cpu_count + 4 of them.
_REQUEST_THREADS: Final = 128


class AnsweringApp(DeployableApp):
    """The part of the app that answers; each override says what it shields from."""

    def serve(self) -> None:
        """Mounts the SDK's routes on threads enough for every request that waits."""
        self._executor = ThreadPoolExecutor(_REQUEST_THREADS, thread_name_prefix="request")
        self.inference_requests_manager = RequestsManager(self._executor)
        super().serve()

    def settings_of(self, state: Mapping[str, Any]) -> Settings:
        """The settings of a request after the SDK's merge with the file; RequestError."""
        given = state.get("settings")
        if given is not None and not isinstance(given, Mapping):
            raise RequestError(
                f"settings is an object, and {type(given).__name__} was received; send for "
                'example {"settings": {"text": "red car. dog"}}.'
            )
        check_placement(state)
        return self._merged_settings(state, given or {})

    def _merged_settings(self, state: Mapping[str, Any], given: Mapping[str, Any]) -> Settings:
        # As they were sent first: the SDK's merge makes two different thresholds one.
        parse_settings(given)
        return parse_settings(self._get_inference_settings({**state, "settings": dict(given)}))

    def _get_inference_settings(self, state: dict[str, Any]) -> dict[str, Any]:
        """The client's settings with those of the file; what form the client's own have is lost."""
        given = state.get("settings")
        if isinstance(given, Mapping) and is_form_for_masks(given):
            state = {**state, "settings": {**given, "class_suffix": BOX_SUFFIX}}
        merged: dict[str, Any] = super()._get_inference_settings(state)
        return merged

    def answer(
        self, images: Sequence[AnyImage], settings: Settings, call: Call
    ) -> list[Predicted | Failure]:
        """One annotation or failure per image: the one door to the model."""
        try:
            predicted = self.predictor.predict(images, settings, call)
        finally:
            self._schedule_freeze_on_inactivity()
        for one in predicted:
            if isinstance(one, Predicted):
                self._meta.learn(one.annotation)
        return predicted

    def _inference_auto(
        self, source: Sequence[AnyImage], settings: Mapping[str, Any]
    ) -> tuple[list[sly.Annotation], list[dict[str, Any]]]:
        """All the SDK's own ways to a prediction: video frames, ``inference()``, the CLI.

        Its crops and sliding windows move only some geometries and lose image tags; ours are in
        the predictor. A failed image raises, because an annotation would hide it.
        """
        priority = Priority.INTERACTIVE if len(source) == 1 else Priority.BULK
        call = Call(priority, api=self.api)
        annotations = []
        for one in self.answer(source, parse_settings(settings), call):
            if isinstance(one, Failure):
                raise_failure(one)
            annotations.append(one.annotation)
        return annotations, [{} for _ in annotations]

    def ask(self, asks: Sequence[Ask], call: Call) -> list[Result | Failure]:
        """Answers to single questions, without labels."""
        try:
            return self.predictor.ask(asks, call)
        finally:
            self._schedule_freeze_on_inactivity()

    def answer_uploads(
        self, images: Sequence[bytes], state: Mapping[str, Any], should_stop: Callable[[], bool]
    ) -> list[dict[str, Any]]:
        """The entries of uploaded images; when all of them failed, the first one's error."""
        entries: list[dict[str, Any]] = []
        answered: list[Predicted | Failure] = []
        for batch in self._in_batches(images, state, should_stop):
            answered += batch
            entries += entries_of(batch, self.model_meta)
        check_any_answered(answered)
        if len(answered) < len(images):
            raise GenerationCancelledError("The client left; send the request again.")
        return entries

    def _inference_images(
        self,
        images: Sequence[AnyImage],
        state: Mapping[str, Any],
        inference_request: InferenceRequest,
    ) -> None:
        """Uploaded images, which the SDK would keep on disk under the names clients gave."""
        inference_request.set_stage(InferenceRequest.Stage.INFERENCE, 0, len(images))
        answered: list[Predicted | Failure] = []
        batches = self._in_batches(images, state, inference_request.is_stopped, is_run=True)
        for batch in batches:
            answered += batch
            inference_request.add_results(entries_of(batch, self.model_meta))
            inference_request.done(len(batch))
        check_any_answered(answered)

    def _in_batches(
        self,
        images: Sequence[AnyImage],
        state: Mapping[str, Any],
        should_stop: Callable[[], bool],
        *,
        is_run: bool = False,
    ) -> Iterator[list[Predicted | Failure]]:
        """The answers batch by batch; a run has no client who could send its beginning again."""
        settings, deadline = self.settings_of(state), Deadline.of(state)
        size = batch_size_of(state, self.get_batch_size())
        priority = Priority.INTERACTIVE if len(images) == 1 else Priority.BULK
        call = Call(priority, should_stop=should_stop, api=self.api)
        for start in range(0, len(images), size):
            if should_stop():
                return
            batch = images[start : start + size]
            answer = partial(
                self.answer, batch, settings, replace(call, deadline_s=deadline.left_s)
            )
            is_patient = is_run or start > 0
            yield when_queue_has_room(answer, should_stop) if is_patient else answer()

    def answer_video(
        self, api: sly.Api, state: Mapping[str, Any], inference_request: InferenceRequest
    ) -> dict[str, Any]:
        """Frames of a video of the platform; the SDK answers an error with an empty list."""
        frames = self.inference_requests_manager.run(
            self._inference_video_id, api, state, inference_request=inference_request
        )
        return {"ann": frames, **(inference_request.final_result or {})}

    def schedule(
        self, work: Callable[..., Any], *arguments: object, hold: Hold | None = None
    ) -> dict[str, str]:
        """Starts work that goes on behind a request; the answer names it.

        ``hold`` is released once the work is over, or given up before it began.
        """
        try:
            request, future = self.inference_requests_manager.schedule_task(work, *arguments)
        except BaseException:
            if hold is not None:
                hold.release()
            raise
        if hold is not None:
            future.add_done_callback(lambda _: hold.release())
        return {"message": "Scheduled.", "inference_request_uuid": request.uuid}

    def _validate_settings(self, settings: Mapping[str, Any]) -> None:
        """Settings of the SDK's command line, by the rules of every other request."""
        parse_settings(settings)

    def predict(self, image_path: str, settings: Mapping[str, Any]) -> list[Predicted]:
        """One image by path, in the SDK's terms."""
        return self.predict_batch([image_path], settings)[0]

    def predict_batch(
        self, images_np: Sequence[AnyImage], settings: Mapping[str, Any]
    ) -> list[list[Predicted]]:
        """Images in the SDK's terms: for each a list that ``_predictions_to_annotation`` reads."""
        return self.predict_benchmark(images_np, settings)[0]

    def predict_benchmark(
        self, images_np: Sequence[AnyImage], settings: Mapping[str, Any]
    ) -> tuple[list[list[Predicted]], dict[str, float]]:
        """As ``predict_batch``, with the milliseconds of each stage for the speed test."""
        began = time.perf_counter()
        call = Call(Priority.BULK, api=self.api)
        predicted = []
        for one in self.answer(images_np, parse_settings(settings), call):
            if isinstance(one, Failure):
                raise_failure(one)
            predicted.append([one])
        inference_s = max((sum(one.timings_s.values()) for [one] in predicted), default=0.0)
        rest_s = max(time.perf_counter() - began - inference_s, 0.0)
        return predicted, {
            "preprocess": 0.0,
            "inference": 1000 * inference_s,
            "postprocess": 1000 * rest_s,
        }

    def _predictions_to_annotation(
        self,
        image_path: AnyImage,
        predictions: Sequence[Predicted],
        classes_whitelist: Sequence[str] | None = None,
    ) -> sly.Annotation:
        """The annotation is made already, with image tags, which the SDK's own would leave out."""
        return predictions[0].annotation

    def _inference_image_ids(
        self, api: sly.Api, state: Mapping[str, Any], inference_request: InferenceRequest
    ) -> None:
        """Images of the platform; the SDK's run waits a second, and loses the last upload error."""
        run_image_ids(api, state, inference_request, self._run_services())

    def _inference_project_id(
        self, api: sly.Api, state: Mapping[str, Any], inference_request: InferenceRequest
    ) -> None:
        """A whole project; in the SDK's run one damaged image ends it."""
        run_project(api, state, inference_request, self._run_services())

    def answer_image_ids(
        self, api: sly.Api, state: Mapping[str, Any], inference_request: InferenceRequest
    ) -> list[dict[str, Any]]:
        """The entries of images of the platform, for a caller who waits for them."""
        entries: list[dict[str, Any]] = self.inference_requests_manager.run(
            self._inference_image_ids, api, state, inference_request=inference_request
        )
        return entries

    def answer_tag_objects(
        self, api: sly.Api, state: Mapping[str, Any], inference_request: InferenceRequest
    ) -> list[dict[str, Any]]:
        """What became of existing objects, for a caller who waits for it."""
        entries: list[dict[str, Any]] = self.inference_requests_manager.run(
            self.tag_objects, api, state, inference_request=inference_request
        )
        return entries

    def tag_objects(
        self, api: sly.Api, state: Mapping[str, Any], inference_request: InferenceRequest
    ) -> None:
        """What the model says about existing objects, written as their tags."""
        tag_existing_objects(api, state, inference_request, self._run_services())

    def _run_services(self) -> RunServices:
        return RunServices(
            predict=self.answer,
            ask=self.ask,
            settings_of=self.settings_of,
            upload=self.upload_predictions,
            budget=held_bytes(),
            task_id=self.task_id,
            default_batch_size=self.get_batch_size(),
        )
