"""Answering requests: what every way in does between a state and the model, and back."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NoReturn

from florence2.engine.ask import Ask
from florence2.engine.encoding import AnyImage
from florence2.engine.scheduler import Priority
from florence2.errors import GenerationCancelledError, RequestError
from florence2.images import open_image
from florence2.records import Failure, Result
from florence2.tasks import find_task
from serve.console import complain, say
from serve.labeling.previews import draw_preview, preview_pixels
from serve.limits import held_bytes
from serve.model_service import Deployment, ModelMeta
from serve.platform.existing_objects import tag_existing_objects
from serve.platform.failures import FailedImageError
from serve.platform.project_run import run_image_ids, run_project
from serve.platform.registry import InferenceRequest, ended_when_stopped
from serve.platform.request_state import batch_size_of
from serve.platform.run import RunServices
from serve.predict.details import details_of
from serve.predict.full_queue import when_queue_has_room
from serve.predict.predictor import AheadImage, Call, Deadline, Predicted, Predictor, asked_classes
from serve.sdk import sly
from serve.sdk_overrides import SdkMethods
from serve.settings import (
    BOX_SUFFIX,
    Settings,
    check_placement,
    is_for_one_class,
    is_form_for_masks,
    parse_settings,
    shown,
    with_own,
)
from serve.video.answers import answer_video
from serve.video.frames import check_without_av, has_library
from serve.video.platform_run import label_platform_video, track_platform_video
from serve.video.request import VideoRequest, video_id_of
from serve.video.source import video_info, video_of_file, video_of_platform

# isort: split
from supervisely.nn.model.prediction import Prediction

State = Mapping[str, Any]

_FOLDER_BATCH: Final = 16

_CONFIDENCES: Final = ("conf", "confidence", "confidence_threshold", "confidence_thresh")
_TASK_FIRST: Final = re.compile(r"\s*(<[^<>\s]+>(?:\s*\+\s*<[^<>\s]+>)*)(.*)", re.DOTALL)


def merged_settings(
    state: State, defaults: State, sliding_window_mode: str, own: State = MappingProxyType({})
) -> dict[str, Any]:
    """The client's settings with those of the file, as ``Inference._get_inference_settings``.

    What form the client's own have is lost in the merge, so it is noted before. ``own`` are those
    of a fine-tune that is deployed.
    """
    merged = dict(state.get("settings") or {})
    if is_form_for_masks(merged):
        merged["class_suffix"] = BOX_SUFFIX
    elif merged.get("unknown_tags") in (None, ""):
        # The file's is for clients that send it.
        merged["unknown_tags"] = "tag"
    merged = with_own(merged, own) if own else merged
    if "rectangle" in state:
        merged["rectangle"] = state["rectangle"]
    if (confidence := merged.get("conf")) is not None:
        merged |= {name: confidence for name in _CONFIDENCES if name in merged}
    merged["sliding_window_mode"] = sliding_window_mode
    return merged | {name: value for name, value in defaults.items() if name not in merged}


def task_and_text(prompt: object) -> tuple[str, str | None]:
    """``"<OD>"`` or ``"<CAPTION_TO_PHRASE_GROUNDING> a red car"`` in two; also a task's name."""
    if not isinstance(prompt, str) or not prompt.strip():
        received = "nothing" if prompt is None or prompt == "" else shown(prompt)
        raise RequestError(
            "text_prompt is a task prompt such as <DETAILED_CAPTION>, and "
            f"{received} was received; /get_prompt_instructions lists them."
        )
    found = _TASK_FIRST.fullmatch(prompt)
    if found is None:
        return find_task(prompt).token, None
    return re.sub(r"\s", "", found[1]), found[2].strip() or None


def raise_failure(failure: Failure) -> NoReturn:
    """The failure as an error with its code and sentence."""
    raise FailedImageError(failure)


class Answering:
    """The one door to the model. Every method may be called by any thread."""

    def __init__(
        self, predictor: Predictor, deployment: Deployment, meta: ModelMeta, sdk: SdkMethods
    ) -> None:
        self._predictor = predictor
        self._deployment = deployment
        self._meta = meta
        self._sdk = sdk

    def settings_of(self, state: State) -> Settings:
        """The settings of a request, with the file's where it has none; RequestError."""
        given = state.get("settings")
        if given is not None and not isinstance(given, Mapping):
            raise RequestError(
                f"settings is an object, and {type(given).__name__} was received; send for "
                'example {"settings": {"text": "red car. dog"}}.'
            )
        check_placement(state)
        # As they were sent first: the merge makes two different thresholds one.
        parse_settings(given or {})
        sdk, own = self._sdk, self._deployment.own_settings
        settings = parse_settings(
            merged_settings(state, sdk.default_settings, sdk.sliding_window_mode, own)
        )
        return settings.model_copy(update={"is_one_class": is_for_one_class(state)})

    def answer(
        self, images: Sequence[AnyImage | AheadImage], settings: Settings, call: Call
    ) -> list[Predicted | Failure]:
        """One annotation or failure per image, in order."""
        self._meta.expect(asked_classes(settings))
        try:
            predicted = self._predictor.predict(images, settings, call)
        finally:
            self._deployment.touch()
        for one in predicted:
            if isinstance(one, Predicted):
                self._meta.learn(one.annotation)
        return predicted

    def answer_all(
        self, images: Sequence[AnyImage], settings: Settings, call: Call
    ) -> list[Predicted]:
        """As ``answer``; the first failure is raised, where an annotation would hide it."""
        predicted = []
        for one in self.answer(images, settings, call):
            if isinstance(one, Failure):
                raise_failure(one)
            predicted.append(one)
        return predicted

    def ask(self, asks: Sequence[Ask], call: Call) -> list[Result | Failure]:
        """Answers to single questions, without labels."""
        try:
            return self._predictor.ask(asks, call)
        finally:
            self._deployment.touch()

    def answer_question(self, ask: Ask, state: State, should_stop: Callable[[], bool]) -> str:
        """The text of an answer; of one that has objects, or of a cascade, all of it as JSON."""
        [result] = self.ask(
            [ask], Call(deadline_s=Deadline.of(state).left_s, should_stop=should_stop)
        )
        if isinstance(result, Failure):
            raise_failure(result)
        if result.text is not None and "+" not in result.task:
            return result.text
        return json.dumps(result.to_dict(), ensure_ascii=False)

    # Images that were sent

    def answer_uploads(
        self, images: Sequence[bytes], state: State, should_stop: Callable[[], bool]
    ) -> list[dict[str, Any]]:
        """The entries of uploaded images; when all of them failed, the first one's error."""
        model = self._model_asked_about(state)
        entries: list[dict[str, Any]] = []
        answered: list[Predicted | Failure] = []
        for batch in self._in_batches(images, state, should_stop):
            answered += batch
            entries += entries_of(batch, self._meta.snapshot(), model)
        _check_any_answered(answered)
        if len(answered) < len(images):
            raise GenerationCancelledError("The client left; send the request again.")
        return entries

    def run_uploads(
        self, images: Sequence[AnyImage], state: State, inference_request: InferenceRequest
    ) -> None:
        """As ``answer_uploads``, behind an answer; the entries are those of the request."""
        model = self._model_asked_about(state)
        inference_request.set_stage(InferenceRequest.Stage.INFERENCE, 0, len(images))
        answered: list[Predicted | Failure] = []
        batches = self._in_batches(images, state, inference_request.is_stopped, is_run=True)
        for batch in batches:
            answered += batch
            inference_request.add_results(entries_of(batch, self._meta.snapshot(), model))
            inference_request.done(len(batch))
        _check_any_answered(answered)

    def _model_asked_about(self, state: State) -> dict[str, str] | None:
        """The model that answers now, for those who ask for details."""
        if not wants_details(state):
            return None
        model = self._deployment.current.model
        runtime = model.engine.runtime.name
        asked = {
            "name": model.name,
            "device": model.device,
            "precision": model.precision,
            "runtime": runtime,
        }
        adapter = self.settings_of(state).model
        return asked if adapter is None else {**asked, "adapter": adapter}

    def _in_batches(
        self,
        images: Sequence[AnyImage],
        state: State,
        should_stop: Callable[[], bool],
        *,
        is_run: bool = False,
    ) -> Iterator[list[Predicted | Failure]]:
        """The answers batch by batch; a run has no client who could send its beginning again."""
        settings, deadline = self.settings_of(state), Deadline.of(state)
        size = self._sdk.batch_size
        if state.get("batch_size") is not None:
            size = batch_size_of(state, size)
        priority = Priority.INTERACTIVE if len(images) == 1 else Priority.BULK
        call = Call(priority, should_stop=should_stop, api=self._sdk.api)
        for start in range(0, len(images), size):
            if should_stop():
                return
            batch = images[start : start + size]
            answer = partial(
                self.answer, batch, settings, replace(call, deadline_s=deadline.left_s)
            )
            is_patient = is_run or start > 0
            yield when_queue_has_room(answer, should_stop) if is_patient else answer()

    # Images of the platform; results go to the request

    def run_image_ids(
        self, api: sly.Api, state: State, inference_request: InferenceRequest
    ) -> None:
        """See ``serve.platform.project_run.run_image_ids``."""
        run_image_ids(api, state, inference_request, self._run_services())

    def run_project(self, api: sly.Api, state: State, inference_request: InferenceRequest) -> None:
        """See ``serve.platform.project_run.run_project``."""
        run_project(api, state, inference_request, self._run_services())

    def run_tag_objects(
        self, api: sly.Api, state: State, inference_request: InferenceRequest
    ) -> None:
        """What the model says about existing objects, written as their tags."""
        tag_existing_objects(api, state, inference_request, self._run_services())

    # Frames of videos; results go to the request

    def run_video_id(self, api: sly.Api, state: State, inference_request: InferenceRequest) -> None:
        """A video of the platform: its frames are answered, or its objects are written there."""
        asked = VideoRequest.of(state)
        info, services = video_info(api, video_id_of(state)), self._run_services()
        with ended_when_stopped(inference_request):
            if asked.mode is not None:
                label_platform_video(api, info, asked, state, inference_request, services)
                return
            with video_of_platform(api, info, asked.frames, inference_request) as video:
                answer_video(video, asked, api, state, inference_request, services)

    def run_tracking(self, api: sly.Api, state: State, inference_request: InferenceRequest) -> None:
        """What an annotation tool asks for: objects are written on the video and it is told."""
        video_id, services = video_id_of(state), self._run_services()
        with ended_when_stopped(inference_request):
            track_platform_video(api, video_id, state, inference_request, services)

    def run_video_file(self, path: Path, state: State, inference_request: InferenceRequest) -> None:
        """A video that was sent."""
        asked = VideoRequest.of_sent(state)
        if not (asked.is_followed or has_library("av")):
            # Its frames are read by OpenCV.
            check_without_av(path)
            self._sdk.label_video(str(path), state, inference_request)
            return
        video = video_of_file(path)
        api = self._sdk.api
        answer_video(video, asked, api, state, inference_request, self._run_services())

    def _run_services(self) -> RunServices:
        return RunServices(
            predict=self.answer,
            ask=self.ask,
            settings_of=self.settings_of,
            upload=self._sdk.upload,
            budget=held_bytes(),
            task_id=self._sdk.task_id,
            default_batch_size=self._sdk.batch_size,
            model_of=self._model_of,
            is_model_coming=lambda: self._deployment.is_coming,
            num_devices=self._deployment.num_devices,
            prepare=self._predictor.prepare,
            learn=self._meta.learn,
        )

    def _model_of(self, settings: Settings) -> dict[str, str]:
        """The model that answers now, by what tells it from others."""
        return self._deployment.current.told(settings.model)


def wants_details(state: State) -> bool:
    """Whether a request asks for ``details`` beside its annotations; RequestError."""
    wanted = state.get("details")
    if wanted is None or isinstance(wanted, bool):
        return bool(wanted)
    raise RequestError(
        f"details is true or false, and {shown(wanted)} was received; correct it or leave it out."
    )


def entries_of(
    outcomes: Sequence[Predicted | Failure],
    model_meta: sly.ProjectMeta,
    model: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """The SDK's entry per image, in order. A failed image has no annotation, and an ``error``.

    An empty annotation would say that nothing was found there. With a ``model``, the one that
    answered, an entry has ``details`` too.
    """
    return [_entry_of(outcome, model_meta, model) for outcome in outcomes]


def _entry_of(
    outcome: Predicted | Failure, model_meta: sly.ProjectMeta, model: Mapping[str, str] | None
) -> dict[str, Any]:
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
    if model is not None:
        entry["details"] = {"model": dict(model), **details_of(outcome)}
    return entry


def _check_any_answered(outcomes: Sequence[Predicted | Failure]) -> None:
    """Raises the first failure when not one image was answered."""
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    if failures and len(failures) == len(outcomes):
        raise_failure(failures[0])


def predict_path(answering: Answering, arguments: argparse.Namespace) -> int:
    """Writes ``OUTPUT/[folder/]image.json`` for every image; 1 when some failed.

    The SDK's own sends a whole folder as one batch, which one damaged image ends. Raises
    RequestError for settings or a path that cannot be used.
    """
    source, output = Path(arguments.input), Path(arguments.output)
    settings = parse_settings(arguments.settings or {})
    images = sorted(_images_in(source))
    if not images:
        raise RequestError(f"Images are labeled, and {source} holds none; name another folder.")
    target = output / source.name if source.is_dir() else output
    target.mkdir(parents=True, exist_ok=True)
    failed = 0
    for start in range(0, len(images), _FOLDER_BATCH):
        batch = images[start : start + _FOLDER_BATCH]
        for path, outcome in zip(
            batch, answering.answer(batch, settings, Call(Priority.BULK)), strict=True
        ):
            if isinstance(outcome, Failure):
                failed += 1
                complain(f"{path.name}: {outcome.message}")
            else:
                _write(path, outcome.annotation, target, draw=arguments.draw)
    say(f"{len(images) - failed} of {len(images)} images are labeled in {target}.")
    return 1 if failed else 0


def _images_in(source: Path) -> Iterator[Path]:
    if source.is_file():
        yield source
        return
    if not source.is_dir():
        raise RequestError(f"An image or a folder is labeled, and there is no {source}; check it.")
    for path in source.iterdir():
        if path.is_file() and path.suffix.lower() in sly.image.SUPPORTED_IMG_EXTS:
            yield path


def _write(path: Path, annotation: sly.Annotation, target: Path, *, draw: bool) -> None:
    sly.json.dump_json_file(annotation.to_json(), str(target / f"{path.name}.json"))
    if draw:
        pixels = preview_pixels(open_image(path).image)
        draw_preview(pixels, annotation, target / f"{path.stem}.preview.jpg")
