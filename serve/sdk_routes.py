"""Routes of the SDK that fail on what clients may send, made safe and otherwise kept."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fastapi import BackgroundTasks, FastAPI, Request

from florence2.budget import open_pixels
from florence2.errors import RequestError
from serve.http.bodies import MIB, keep_body
from serve.http.uploads import (
    NO_FILES,
    Files,
    FormText,
    check_pictures,
    parse_state,
    save_one_upload,
)
from serve.http.waiting import Waiting, run_registered
from serve.platform.failures import NotFoundError
from serve.predict.full_queue import QUEUE_LIMIT_S

if TYPE_CHECKING:
    from serve.app import Florence2App

_MAX_VIDEO_BYTES: Final = 512 * MIB
_MAX_CACHED: Final = 10_000
_MAX_CACHING: Final = 16

_log = logging.getLogger(__name__)


def register_sdk_routes(server: FastAPI, app: Florence2App) -> None:
    """Mounts them in front of the SDK's own."""
    _videos(server, app)
    _tracking(server, app)
    _speed_test(server, app)
    _caching(server, app)


def _videos(server: FastAPI, app: Florence2App) -> None:
    waiting = Waiting()

    @server.post("/inference_video_id")
    async def inference_video_id(request: Request) -> dict[str, Any]:
        """The SDK answers an error with an empty list."""
        state = _with_number(request.state.state, "videoId", "video_id")
        api = app.api_from_request(request)
        return await run_registered(
            request,
            app.inference_requests_manager,
            lambda asked: app.answer_video(api, state, asked),
            waiting,
        )

    @server.post("/inference_video_id_async")
    def inference_video_id_async(request: Request) -> dict[str, str]:
        state = _with_number(request.state.state, "videoId", "video_id")
        return app.schedule(app._inference_video_id, app.api_from_request(request), state)

    @server.post("/inference_video_async")
    def inference_video_async(
        request: Request,
        files: Files = NO_FILES,
        settings: FormText = "{}",
        state: FormText = "{}",
    ) -> dict[str, str]:
        """The SDK writes the file where its name says."""
        asked = parse_state(state, settings)
        app.settings_of(asked)
        folder = tempfile.TemporaryDirectory(prefix="video-")
        try:
            path = save_one_upload(files, Path(folder.name), "video", _MAX_VIDEO_BYTES)

            def infer(inference_request: Any) -> None:  # noqa: ANN401 - the SDK's record
                with folder:
                    app._inference_video(str(path), asked, inference_request)

            return app.schedule(infer, hold=keep_body(request.scope))
        except BaseException:
            folder.cleanup()
            raise


def _tracking(server: FastAPI, app: Florence2App) -> None:
    @server.post("/tracking_by_detection")
    def tracking_by_detection(request: Request) -> dict[str, str]:
        """The SDK starts it whatever it was sent, and fails where nobody looks."""
        state = {**request.state.state, **(request.state.context or {})}
        _with_number(state, "videoId", "video_id")
        if not app.get_info()["tracking_on_videos_support"]:
            raise RequestError(
                "Tracking needs packages that are not installed beside this app; install "
                "supervisely[tracking], or ask for the frames without tracking."
            )
        state["tracker"] = state.get("tracker") or "botsort"
        app.settings_of(state)
        app.schedule(app._tracking_by_detection, app.api_from_request(request), state)
        return {"message": "Track task started."}


def _speed_test(server: FastAPI, app: Florence2App) -> None:
    @server.post("/run_speedtest")
    def run_speedtest(request: Request) -> dict[str, str]:
        state = request.state.state
        for name in ("projectId", "batch_size", "num_iterations"):
            _with_number(state, name)
        app.settings_of(state)
        api = app.api_from_request(request)
        if api.project.get_info_by_id(state["projectId"]) is None:
            raise NotFoundError(
                f"There is no project {state['projectId']}, or no access to it; check its id."
            )
        return app.schedule(app._run_speedtest, api, state)


def _caching(server: FastAPI, app: Florence2App) -> None:
    caching = Waiting(_MAX_CACHING)

    @server.post("/smart_cache")
    def smart_cache(request: Request, tasks: BackgroundTasks) -> dict[str, str]:
        state = _cacheable(request.state.state)
        api = app.api_from_request(request)
        caching.check_room()
        tasks.add_task(_logged, caching, app.cache.cache_task, api=api, state=state)
        return {"message": "Cache task started."}

    @server.post("/smart_cache_files")
    def smart_cache_files(
        tasks: BackgroundTasks,
        files: Files = NO_FILES,
        settings: FormText = "{}",
        state: FormText = "{}",
    ) -> dict[str, str]:
        asked = _cacheable(parse_state(state, settings))
        if not files:
            raise RequestError("The form must have at least one file in 'files'; add it.")
        caching.check_room()
        is_video = asked.keys() & _CACHED.keys() == {"video_id"}
        pixels = 0 if is_video else check_pictures(files)

        def keep() -> None:
            """The SDK decodes one picture after the other."""
            with open_pixels().hold(pixels, is_bulk=True, wait_s=QUEUE_LIMIT_S):
                app.cache.cache_files_task(files=files, state=asked)

        tasks.add_task(_logged, caching, keep)
        return {"message": "Cache task started."}


async def _logged(waiting: Waiting, work: Callable[..., None], **arguments: object) -> None:
    """``work`` after the answer; an error that left it would end the client's connection."""
    try:
        await waiting.run_accepted(partial(work, **arguments))
    except Exception:  # noqa: BLE001 - the SDK and its transport raise what they like
        _log.exception("What was to be cached could not be")


def _cacheable(state: Mapping[str, Any]) -> dict[str, Any]:
    """What the cache reads of a state, checked: the SDK makes paths and lists of it."""
    ids = {name: state[name] for name in _CACHED if state.get(name) is not None}
    if not ids:
        raise RequestError(
            "The cache takes image_ids, image_hashes or video_id, and none was received; add one."
        )
    if ids.keys() <= {"frame_ranges", "frame_indexes"}:
        raise RequestError("Frames are those of a video, and no video_id was received; add it.")
    for name, value in ids.items():
        _CACHED[name](name, value)
    return {**{name: value for name, value in state.items() if name not in _CACHED}, **ids}


def _check_numbers(name: str, value: object) -> None:
    if not isinstance(value, list) or not all(_is_whole(one) for one in value):
        raise RequestError(f"{name} is a list of whole numbers, and something else was received.")
    _check_count(name, len(value))


def _check_ranges(name: str, value: object) -> None:
    if not isinstance(value, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(map(_is_whole, pair)) for pair in value
    ):
        raise RequestError(
            f"{name} is a list of pairs of first and last frame, and something else was received."
        )
    _check_count(name, sum(abs(last - first) + 1 for first, last in value))


def _check_hashes(name: str, value: object) -> None:
    if not isinstance(value, list) or any(
        not isinstance(one, str) or ".." in one or one.startswith("/") for one in value
    ):
        raise RequestError(f"{name} is a list of hashes, and something else was received.")
    _check_count(name, len(value))


def _check_count(name: str, count: int) -> None:
    if count > _MAX_CACHED:
        raise RequestError(
            f"{name} names at most {_MAX_CACHED} at a time, and {count} were received; send them "
            "in several requests."
        )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_video(name: str, value: object) -> None:
    _with_number({name: value}, name)


_CACHED: Final[Mapping[str, Callable[[str, object], None]]] = {
    "image_ids": _check_numbers,
    "image_hashes": _check_hashes,
    "frame_ranges": _check_ranges,
    "frame_indexes": _check_numbers,
    "video_id": _check_video,
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
