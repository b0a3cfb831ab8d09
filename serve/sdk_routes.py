"""Routes of the SDK that fail on what clients may send, made safe and otherwise kept."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fastapi import BackgroundTasks, FastAPI, Request

from florence2.errors import RequestError
from serve.http.errors import NotFoundError
from serve.http.limits import MIB
from serve.http.uploads import NO_FILES, Files, FormText, parse_state, read_one_upload

if TYPE_CHECKING:
    from serve.app import Florence2App

_MAX_VIDEO_BYTES: Final = 512 * MIB
_CACHE_IDS: Final = ("image_ids", "frame_ranges", "frame_indexes")


def register_sdk_routes(server: FastAPI, app: Florence2App) -> None:
    """Mounts them in front of the SDK's own."""
    _videos(server, app)
    _tracking(server, app)
    _speed_test(server, app)
    _caching(server, app)


def _videos(server: FastAPI, app: Florence2App) -> None:
    @server.post("/inference_video_id")
    def inference_video_id(request: Request) -> dict[str, Any]:
        """The SDK answers an error with an empty list."""
        state = _with_number(request.state.state, "videoId", "video_id")
        return app.answer_video(app.api_from_request(request), state)

    @server.post("/inference_video_id_async")
    def inference_video_id_async(request: Request) -> dict[str, str]:
        state = _with_number(request.state.state, "videoId", "video_id")
        return app.schedule(app._inference_video_id, app.api_from_request(request), state)

    @server.post("/inference_video_async")
    def inference_video_async(
        files: Files = NO_FILES,
        settings: FormText = "{}",
        state: FormText = "{}",
    ) -> dict[str, str]:
        """The SDK writes the file where its name says."""
        asked = parse_state(state, settings)
        app.settings_of(asked)
        upload = read_one_upload(files, max_bytes=_MAX_VIDEO_BYTES)
        folder = tempfile.TemporaryDirectory(prefix="video-")
        path = Path(folder.name, "video" + Path(upload.name).suffix[:8])
        path.write_bytes(upload.data)

        def infer(inference_request: Any) -> None:  # noqa: ANN401 - the SDK's record
            with folder:
                app._inference_video(str(path), asked, inference_request)

        return app.schedule(infer)


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
    @server.post("/smart_cache")
    def smart_cache(request: Request, tasks: BackgroundTasks) -> dict[str, str]:
        state = _cacheable(request.state.state)
        tasks.add_task(app.cache.cache_task, api=app.api_from_request(request), state=state)
        return {"message": "Cache task started."}

    @server.post("/smart_cache_files")
    def smart_cache_files(
        tasks: BackgroundTasks,
        files: Files = NO_FILES,
        settings: FormText = "{}",
        state: FormText = "{}",
    ) -> dict[str, str]:
        asked = _cacheable(parse_state(state, settings))
        tasks.add_task(app.cache.cache_files_task, files=files, state=asked)
        return {"message": "Cache task started."}


def _cacheable(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state of the cache's routes; the SDK makes paths of the ids in it."""
    if not any(name in state for name in (*_CACHE_IDS, "image_hashes", "video_id")):
        raise RequestError(
            "The cache takes image_ids, image_hashes or video_id, and none was received; add one."
        )
    if "video_id" in state:
        _with_number(state, "video_id")
    for name in _CACHE_IDS:
        if name in state and not all(isinstance(one, int) for one in _flat(state[name])):
            raise RequestError(f"{name} is a list of numbers, and something else was received.")
    hashes = state.get("image_hashes", [])
    if not isinstance(hashes, list) or any(
        not isinstance(one, str) or ".." in one or one.startswith("/") for one in hashes
    ):
        raise RequestError("image_hashes is a list of hashes, and something else was received.")
    return state


def _flat(value: object) -> list[object]:
    if not isinstance(value, list):
        return [value] if isinstance(value, int) else [None]
    return [inner for one in value for inner in (one if isinstance(one, list) else [one])]


def _with_number(state: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The state, once one of ``names`` in it is a whole number above 0."""
    value = next((state[name] for name in names if state.get(name) is not None), None)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RequestError(
            f"{names[0]} is a whole number above 0, and {str(value)[:60]!r} was received; "
            "correct it."
        )
    return dict(state)
