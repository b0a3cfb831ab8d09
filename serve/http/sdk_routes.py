"""Routes of the SDK that fail on what clients may send, made safe and otherwise kept."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from fastapi import BackgroundTasks, FastAPI, Request

from florence2.budget import open_pixels
from florence2.errors import RequestError
from serve.http.guard import keep_body
from serve.http.handlers import (
    SentForm,
    Services,
    Waiting,
    check_pictures,
    save_one_upload,
)
from serve.limits import MIB
from serve.platform.failures import NotFoundError
from serve.platform.registry import InferenceRequest
from serve.predict.full_queue import QUEUE_LIMIT_S
from serve.video.request import VideoRequest, video_id_of

MAX_VIDEO_BYTES: Final = 512 * MIB
_MAX_CACHED: Final = 10_000
_MAX_CACHING: Final = 16

_log = logging.getLogger(__name__)


def register_sdk_routes(server: FastAPI, services: Services) -> None:
    """Mounts them in front of the SDK's own."""
    _progress(server, services)
    _videos(server, services)
    _speed_test(server, services)
    _caching(server, services)


def _progress(server: FastAPI, services: Services) -> None:
    @server.post("/get_inference_progress")
    def get_inference_progress(request: Request) -> dict[str, Any]:
        """Clients take the result about one image from here; the SDK says whether there is one."""
        asked = services.runs.get(request.state.state["inference_request_uuid"])
        told: dict[str, Any] = {**asked.to_json(), **services.sdk.progress_of(asked)}
        if asked.stage != InferenceRequest.Stage.INFERENCE:
            told["progress"] = {"current": 0, "total": 1}
        result = asked.final_result
        # Of a video the result is the whole of it, which nobody takes from here.
        if isinstance(result, dict) and "annotation" in result:
            told["result"] = result
        return told


def _videos(server: FastAPI, services: Services) -> None:
    waiting = Waiting()
    answering = services.answering

    def checked(state: dict[str, Any]) -> dict[str, Any]:
        """What is wrong with a state is said at once, also of work behind an answer."""
        video_id_of(state)
        answering.settings_of(state)
        VideoRequest.of(state)
        return dict(state)

    @server.post("/inference_video_id")
    async def inference_video_id(request: Request) -> dict[str, Any]:
        """The SDK answers an error with an empty list."""
        state = checked(request.state.state)
        frames, asked = await waiting.run_registered(
            request, services, answering.run_video_id, state
        )
        return {"ann": frames, **(asked.final_result or {})}

    @server.post("/inference_video_id_async")
    def inference_video_id_async(request: Request) -> dict[str, str]:
        state = checked(request.state.state)
        return services.schedule(answering.run_video_id, services.api_of(request), state)

    @server.post("/inference_video_async")
    def inference_video_async(request: Request, form: SentForm) -> dict[str, str]:
        """The SDK writes the file where its name says."""
        state = form.state()
        answering.settings_of(state)
        VideoRequest.of_sent(state)
        folder = tempfile.TemporaryDirectory(prefix="video-")
        try:
            path = save_one_upload(form.files, Path(folder.name), "video", MAX_VIDEO_BYTES)

            def infer(inference_request: InferenceRequest) -> None:
                with folder:
                    answering.run_video_file(path, state, inference_request)

            return services.schedule(infer, hold=keep_body(request.scope))
        except BaseException:
            folder.cleanup()
            raise

    @server.post("/tracking_by_detection")
    def tracking_by_detection(request: Request) -> dict[str, str]:
        """The SDK starts it whatever it was sent, and fails where nobody looks."""
        state = checked({**request.state.state, **(request.state.context or {})})
        services.schedule(answering.run_tracking, services.api_of(request), state)
        return {"message": "Track task started."}


def _speed_test(server: FastAPI, services: Services) -> None:
    @server.post("/run_speedtest")
    def run_speedtest(request: Request) -> dict[str, str]:
        state = request.state.state
        for name in ("projectId", "batch_size", "num_iterations"):
            _with_number(state, name)
        services.answering.settings_of(state)
        api = services.api_of(request)
        if api.project.get_info_by_id(state["projectId"]) is None:
            raise NotFoundError(
                f"There is no project {state['projectId']}, or no access to it; check its id."
            )
        return services.schedule(services.sdk.test_speed, api, state)


def _caching(server: FastAPI, services: Services) -> None:
    caching = Waiting(_MAX_CACHING)

    @server.post("/smart_cache")
    def smart_cache(request: Request, tasks: BackgroundTasks) -> dict[str, str]:
        state = cacheable(request.state.state)
        api = services.api_of(request)
        caching.check_room()
        tasks.add_task(_logged, caching, services.sdk.cache.cache_task, api=api, state=state)
        return {"message": "Cache task started."}

    @server.post("/smart_cache_files")
    def smart_cache_files(tasks: BackgroundTasks, form: SentForm) -> dict[str, str]:
        state = cacheable(form.state())
        if not form.files:
            raise RequestError("The form must have at least one file in 'files'; add it.")
        caching.check_room()
        is_video = state.keys() & _CACHED.keys() == {"video_id"}
        pixels = 0 if is_video else check_pictures(form.files)

        def keep() -> None:
            """The SDK decodes one picture after the other."""
            with open_pixels().hold(pixels, is_bulk=True, wait_s=QUEUE_LIMIT_S):
                services.sdk.cache.cache_files_task(files=form.files, state=state)

        tasks.add_task(_logged, caching, keep)
        return {"message": "Cache task started."}


async def _logged(waiting: Waiting, work: Callable[..., None], **arguments: object) -> None:
    """``work`` after the answer; an error that left it would end the client's connection."""
    try:
        await waiting.run_accepted(partial(work, **arguments))
    except Exception:  # noqa: BLE001 - the SDK and its transport raise what they like
        _log.exception("What was to be cached could not be")


def cacheable(state: Mapping[str, Any]) -> dict[str, Any]:
    """What the cache reads of a state, checked: the SDK makes paths and lists of it."""
    asked = {name: state[name] for name in _CACHED if state.get(name) is not None}
    if not asked:
        raise RequestError(
            "The cache takes image_ids, image_hashes or video_id, and none was received; add one."
        )
    if asked.keys() <= {"frame_ranges", "frame_indexes"}:
        raise RequestError("Frames are those of a video, and no video_id was received; add it.")
    for name, value in asked.items():
        if name == "video_id":
            _with_number(asked, name)
            continue
        kind, is_one, count = _CACHED[name]
        if not isinstance(value, list) or not all(map(is_one, value)):
            raise RequestError(f"{name} is a list of {kind}, and something else was received.")
        if (total := sum(map(count, value))) > _MAX_CACHED:
            raise RequestError(
                f"{name} names at most {_MAX_CACHED} at a time, and {total} were received; send "
                "them in several requests."
            )
    return {**{name: value for name, value in state.items() if name not in _CACHED}, **asked}


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_range(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_whole, value))


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and ".." not in value and not value.startswith("/")


def _one(_value: object) -> int:
    return 1


# Name: what its list holds, what each of these is, and how many images or frames one names.
_CACHED: Final[Mapping[str, tuple[str, Callable[[Any], bool], Callable[[Any], int]]]] = {
    "image_ids": ("whole numbers", _is_whole, _one),
    "image_hashes": ("hashes", _is_hash, _one),
    "frame_ranges": (
        "pairs of first and last frame",
        _is_range,
        lambda pair: abs(pair[1] - pair[0]) + 1,
    ),
    "frame_indexes": ("whole numbers", _is_whole, _one),
    "video_id": ("videos", _is_whole, _one),
}


def _with_number(state: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The state, once one of ``names`` in it is a whole number above 0."""
    value = next((state[name] for name in names if state.get(name) is not None), None)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RequestError(
            f"{names[0]} is a whole number above 0, and {str(value)[:60]!r} was received; "
            "correct it."
        )
    return dict(state)
