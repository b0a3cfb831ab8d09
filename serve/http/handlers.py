"""The app's own routes. They come before the SDK's, so a path that both have is ours."""

from __future__ import annotations

import asyncio
import base64
import binascii
import functools
import inspect
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import Depends, FastAPI, File, Form, Request, Response, UploadFile
from fastapi.routing import APIRoute

from florence2.budget import Hold
from florence2.engine.ask import Ask
from florence2.errors import GenerationCancelledError, QueueFullError, RequestError
from florence2.images import check_header
from florence2.stopping import Stop
from florence2.tasks import TASKS, TaskInput, next_tasks
from serve.answering import Answering, task_and_text
from serve.http.errors import RETRY_AFTER_S, TooLargeError, kind_of
from serve.http.guard import client_is_gone, keep_body
from serve.http.metrics import Metrics
from serve.http.page import register_notice, register_page
from serve.http.routes import ROUTE_BY_PATH
from serve.http.url_fetch import fetch_image
from serve.limits import MAX_FILES, MAX_IMAGE_BYTES, held_bytes, readable_size
from serve.model_service import Deployment
from serve.platform.failures import FailedImageError, NotFoundError
from serve.platform.images import Target, failed_download
from serve.platform.registry import InferenceRequest, RequestsManager
from serve.platform.undo import runs_asked_for, undo_of
from serve.sdk import sly
from serve.sdk_overrides import SdkMethods
from serve.settings import check_placement, parse_settings, shown
from serve.version import VERSION


@dataclass(frozen=True, slots=True)
class Services:
    """What the routes need of the app."""

    answering: Answering
    deployment: Deployment
    metrics: Metrics
    runs: RequestsManager
    sdk: SdkMethods

    def api_of(self, request: Request) -> sly.Api:
        """The platform of a request; RequestError where there is none."""
        api = getattr(request.state, "api", None)
        if api is not None and not os.environ.get("SERVER_ADDRESS"):
            # A server that a caller named, and nobody who set the app up.
            api.retry_count = min(api.retry_count, _RETRIES_OF_A_NAMED_SERVER)
        api = api or self.sdk.api
        if api is None:
            raise RequestError(
                "Images of the platform need its address and a token, and this app has none of "
                "them; start it with SERVER_ADDRESS and API_TOKEN, or send the image itself."
            )
        return api

    def schedule(
        self, work: Callable[..., Any], *arguments: object, hold: Hold | None = None
    ) -> dict[str, str]:
        """Starts work that goes on behind a request; the answer names it.

        ``hold`` is released once the work is over, or given up before it began.
        """
        try:
            request, future = self.runs.schedule_task(work, *arguments)
        except BaseException:
            if hold is not None:
                hold.release()
            raise
        if hold is not None:
            future.add_done_callback(lambda _: hold.release())
        return {"message": "Scheduled.", "inference_request_uuid": request.uuid}


_RETRIES_OF_A_NAMED_SERVER: Final = 2


def register_routes(server: FastAPI, services: Services, *, with_page: bool) -> None:
    """Mounts the routes; must come before ``Inference.serve`` mounts the SDK's."""
    _images(server, services)
    _batches(server, services)
    _image_ids(server, services)
    _questions(server, services)
    _runs(server, services)
    _model(server, services)
    if with_page:
        register_page(server)
    else:
        register_notice(server)


def _images(server: FastAPI, services: Services) -> None:
    waiting = Waiting()
    answering = services.answering

    @server.post("/inference_image", dependencies=[Depends(check_fields)])
    async def inference_image(request: Request, form: SentForm) -> dict[str, Any]:
        image = read_one_upload(form.files)
        state = form.state()
        entries = await waiting.run_wanted(
            request, lambda is_gone: answering.answer_uploads([image], state, is_gone)
        )
        return entries[0]

    @server.post("/inference_image_url")
    async def inference_image_url(request: Request) -> dict[str, Any]:
        asked: dict[str, Any] = request.state.state
        answering.settings_of(asked)

        def answer(is_gone: Callable[[], bool]) -> list[dict[str, Any]]:
            with held_bytes().hold(MAX_IMAGE_BYTES, stop=_stop_of(is_gone)) as hold:
                image = fetch_image(asked.get("image_url"))
                hold.resize(len(image))
                return answering.answer_uploads([image], asked, is_gone)

        return (await waiting.run_wanted(request, answer))[0]


def _batches(server: FastAPI, services: Services) -> None:
    waiting = Waiting()
    answering = services.answering

    @server.post("/inference_batch", dependencies=[Depends(check_fields)])
    async def inference_batch(request: Request, form: SentForm) -> list[dict[str, Any]]:
        state = form.state()

        def answer(is_gone: Callable[[], bool]) -> list[dict[str, Any]]:
            # Up to half a gigabyte from a temporary file: no work for the thread of all requests.
            return answering.answer_uploads(read_uploads(form.files), state, is_gone)

        return await waiting.run_wanted(request, answer)

    @server.post("/inference_batch_async", dependencies=[Depends(check_fields)])
    def inference_batch_async(request: Request, form: SentForm) -> dict[str, str]:
        state = form.state()
        images = read_uploads(form.files)
        answering.settings_of(state)
        return services.schedule(
            answering.run_uploads, images, state, hold=keep_body(request.scope)
        )


def _image_ids(server: FastAPI, services: Services) -> None:
    waiting = Waiting()

    async def entries_of(request: Request) -> list[dict[str, Any]]:
        entries, _ = await waiting.run_registered(
            request, services, services.answering.run_image_ids, request.state.state
        )
        return entries

    @server.post("/inference_image_id")
    async def inference_image_id(request: Request) -> dict[str, Any]:
        entries = await entries_of(request)
        if not entries:
            raise RuntimeError("Inference finished without returning any results.")
        return entries[0]

    @server.post("/inference_batch_ids")
    async def inference_batch_ids(request: Request) -> list[dict[str, Any]]:
        return await entries_of(request)


def _adapter_of(state: Mapping[str, Any]) -> str | None:
    """The adapter that a question names, beside or in its ``settings``; RequestError."""
    settings = state.get("settings")
    within = settings.get("model") if isinstance(settings, Mapping) else None
    named = state.get("model")
    return parse_settings({"model": within if named in (None, "") else named}).model


def _questions(server: FastAPI, services: Services) -> None:
    waiting = Waiting()
    answering = services.answering

    @server.post("/visual_question_answering")
    async def visual_question_answering(request: Request) -> dict[str, str]:
        state: dict[str, Any] = request.state.state

        def answer(is_gone: Callable[[], bool]) -> dict[str, str]:
            task, text = task_and_text(state.get("text_prompt"))
            with _image_of(state, request, services, is_gone) as image:
                ask = Ask(image, task, text, state.get("region"), adapter=_adapter_of(state))
                return {"answer": answering.answer_question(ask, state, is_gone)}

        return await waiting.run_wanted(request, answer)

    @server.post("/get_prompt_instructions")
    def get_prompt_instructions() -> dict[str, str]:
        return {"instructions": instructions()}

    @server.get("/tasks")
    @server.post("/tasks")
    def tasks() -> dict[str, Any]:
        return tasks_json()

    tagging = Waiting()

    @server.post("/tag_objects")
    async def tag_objects(request: Request) -> list[dict[str, Any]]:
        entries, _ = await tagging.run_registered(
            request, services, answering.run_tag_objects, request.state.state
        )
        return entries

    @server.post("/tag_objects_async")
    def tag_objects_async(request: Request) -> dict[str, str]:
        return services.schedule(
            answering.run_tag_objects, services.api_of(request), request.state.state
        )


def _runs(server: FastAPI, services: Services) -> None:
    waiting = Waiting()

    @server.post("/list_runs")
    async def list_runs(request: Request) -> list[dict[str, Any]]:
        api, state = services.api_of(request), request.state.state
        return await waiting.run(lambda: [one.to_json() for one in runs_asked_for(api, state)])

    @server.post("/undo_run")
    async def undo_run(request: Request) -> dict[str, Any]:
        api, state = services.api_of(request), request.state.state
        return await waiting.run_wanted(
            request, lambda is_gone: undo_of(api, state, is_gone).to_json()
        )


@contextmanager
def _image_of(
    state: Mapping[str, Any], request: Request, services: Services, is_gone: Callable[[], bool]
) -> Iterator[bytes]:
    """The image of a question: ``image_encoding`` (base64), or the platform's ``image_id``."""
    if state.get("image_encoding") is not None:
        yield decode_image(state["image_encoding"])
        return
    image_id = state.get("image_id")
    if image_id is None:
        raise RequestError(
            "A question needs an image as image_id or image_encoding (base64), and neither was "
            "received; a path on the server is not read."
        )
    if isinstance(image_id, bool) or not isinstance(image_id, int):
        raise RequestError(f"image_id is a number, and {shown(image_id)} was received; correct it.")
    api = services.api_of(request)
    info = api.image.get_info_by_id(image_id)
    if info is None:
        raise NotFoundError(f"There is no image {image_id}; check its id.")
    size_bytes = Target(image_id, info=info).size_bytes
    with held_bytes().hold(size_bytes, stop=_stop_of(is_gone)):
        try:
            [data] = api.image.download_bytes(info.dataset_id, [image_id])
        except Exception as error:
            raise FailedImageError(failed_download(image_id, error)) from error
        yield bytes(data)


def _model(server: FastAPI, services: Services) -> None:
    @server.post("/deploy_from_api")
    def deploy_from_api(request: Request) -> dict[str, str]:
        services.sdk.deploy(request.state.state)
        return {"result": "model was successfully deployed"}

    @server.post("/freeze_model")
    def freeze_model() -> dict[str, str]:
        return {"message": services.deployment.freeze()}

    @server.get("/metrics")
    def metrics() -> Response:
        text, content_type = services.metrics.render()
        return Response(text, media_type=content_type)


def tasks_json() -> dict[str, Any]:
    """The answer of ``/tasks``: every task prompt with its name, input, output and summary.

    ``next`` are the tasks that can follow it in a cascade. ``version`` is the app's, whose table
    it is.
    """
    return {
        "version": VERSION,
        "tasks": [
            {
                "token": task.token,
                "name": task.name,
                "takes": task.takes.value,
                "gives": task.output.value,
                "summary": task.summary,
                "next": [following.token for following in next_tasks(task)],
            }
            for task in TASKS
        ],
    }


_INPUT_HINTS: Final = {
    TaskInput.NONE: "",
    TaskInput.TEXT: " Write the text right after the prompt.",
    TaskInput.REGION: " Needs a region: give one in the settings.",
    TaskInput.OPTIONAL_TEXT: " A text may follow the prompt.",
}


def instructions() -> str:
    """The text of ``/get_prompt_instructions``: which prompts the model understands."""
    lines = [f"{task.token}: {task.summary}.{_INPUT_HINTS[task.takes]}" for task in TASKS]
    return "\n".join(["Florence-2 answers task prompts. Send one of these as text_prompt:", *lines])


# What forms hold


@dataclass(frozen=True, slots=True)
class Sent:
    """A form's files and its two text fields. Without files it gets our sentence."""

    files: Sequence[UploadFile]
    settings_text: str
    state_text: str

    def state(self) -> dict[str, Any]:
        """See ``parse_state``."""
        return parse_state(self.state_text, self.settings_text)


async def _sent(
    files: Annotated[Sequence[UploadFile], File()] = (),
    settings: Annotated[str, Form()] = "{}",
    state: Annotated[str, Form()] = "{}",
) -> Sent:
    return Sent(files, settings, state)


SentForm = Annotated[Sent, Depends(_sent)]

_LONGEST_NAME: Final = 100
_PART_BYTES: Final = 2**20
_UNPRINTABLE: Final = re.compile(r"[^\w .,()+@=~#&'-]")
_DATA_URL: Final = re.compile(r"\s*data:[^,;]*(?:;[^,;]*)*;base64,", re.IGNORECASE)
_WHITESPACE: Final = {ord(character): None for character in " \t\r\n"}


def read_uploads(
    files: Sequence[UploadFile], max_files: int = MAX_FILES, max_bytes: int = MAX_IMAGE_BYTES
) -> list[bytes]:
    """The files of a form in the order they were sent; blocks while it reads.

    Raises RequestError for no file or more than ``max_files``, TooLargeError for one of more
    than ``max_bytes``.
    """
    if not files:
        raise RequestError("The form must have at least one file in 'files'; add it.")
    if len(files) > max_files:
        raise RequestError(
            f"A request can have at most {max_files} files, and {len(files)} were received; "
            "send them in several requests."
        )
    return [_read(file, index, max_bytes) for index, file in enumerate(files)]


def read_one_upload(files: Sequence[UploadFile], max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
    """The file of a form that must have exactly one."""
    return _read(_only(files), 0, max_bytes)


def save_one_upload(files: Sequence[UploadFile], folder: Path, stem: str, max_bytes: int) -> Path:
    """The file of a form that must have exactly one, under a name of our own; never in memory."""
    file = _only(files)
    name = clean_name(file.filename, 0)
    path = folder / (stem + Path(name).suffix[:8])
    left = max_bytes
    with path.open("wb") as saved:
        while part := file.file.read(_PART_BYTES):
            left -= len(part)
            if left < 0:
                raise _too_large(name, max_bytes)
            saved.write(part)
    return path


def check_pictures(files: Sequence[UploadFile], max_bytes: int = MAX_IMAGE_BYTES) -> int:
    """The pixels of the largest picture, for what others decode, who look at no header.

    Each file is left at its beginning. Raises TooLargeError for a file, ImageError for a picture
    that is larger than the limits.
    """
    pixels = 0
    for index, file in enumerate(files):
        if (file.size or 0) > max_bytes:
            raise _too_large(clean_name(file.filename, index), max_bytes)
        pixels = max(pixels, math.prod(check_header(file.file)))
        file.file.seek(0)
    return pixels


def _only(files: Sequence[UploadFile]) -> UploadFile:
    if len(files) != 1:
        raise RequestError(
            f"The form must have exactly one file in 'files', and {len(files)} were received; "
            "send one, or use /inference_batch."
        )
    return files[0]


def _read(file: UploadFile, index: int, max_bytes: int) -> bytes:
    data = file.file.read(max_bytes + 1)
    # What the form's parser holds of it, up to a megabyte a file in memory.
    file.file.close()
    if len(data) > max_bytes:
        raise _too_large(clean_name(file.filename, index), max_bytes)
    return data


def _too_large(name: str, max_bytes: int) -> TooLargeError:
    return TooLargeError(
        f"A file can have at most {readable_size(max_bytes)}, and {name!r} has more; make it "
        "smaller."
    )


def clean_name(name: str | None, index: int) -> str:
    """A file's name for messages: no folders, no unprintable characters, never empty."""
    last = re.split(r"[/\\]", name or "")[-1]
    cleaned = _UNPRINTABLE.sub("", last).strip(" .")[-_LONGEST_NAME:]
    return cleaned or f"image {index + 1}"


async def check_fields(request: Request) -> None:
    """RequestError for a setting that is a field of its own, which nothing would read."""
    check_placement(dict.fromkeys(await request.form()))


def parse_state(form_state: str | None, form_settings: str | None) -> dict[str, Any]:
    """The ``state`` of a form's two text fields, by the rules that the SDK's clients rely on.

    ``state`` wins; without it ``settings`` is taken as the state, so clients send
    ``{"settings": {...}}`` there. Settings sent there without that wrapper would be ignored
    without a word, so they are taken as the settings too.

    Raises RequestError if the field that counts is not a JSON object, or if a ``state`` has
    settings beside ``settings``.
    """
    if form_state and form_state.strip() != "{}":
        state = _parse_object(form_state, "state")
    else:
        state = _parse_object(form_settings or "{}", "settings")
        if state and "settings" not in state:
            return {**state, "settings": state}
    check_placement(state)
    return state


def _parse_object(text: str, field: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"The field {field!r} must be a JSON object, and {text[:60]!r} cannot be read as "
            "one; correct it."
        ) from error
    if not isinstance(value, dict):
        raise RequestError(
            f"The field {field!r} must be a JSON object, and {text[:60]!r} was received; "
            "correct it."
        )
    return value


def decode_image(encoded: object, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
    """The bytes of an image file sent as base64, with or without ``data:image/png;base64,``.

    Line breaks and missing padding are tolerated. Raises RequestError if it is not base64 and
    TooLargeError for more than ``max_bytes``; whether it is an image shows when it is opened.
    """
    if not isinstance(encoded, str):
        raise RequestError(
            "The image must be text in base64, and "
            f"{kind_of(encoded)} was received; encode the image file."
        )
    prefix = _DATA_URL.match(encoded)
    text = (encoded[prefix.end() :] if prefix else encoded).translate(_WHITESPACE).rstrip("=")
    if len(text) * 3 // 4 > max_bytes:
        raise TooLargeError(
            f"An encoded image can have at most {readable_size(max_bytes)}, and "
            f"{readable_size(len(text) * 3 // 4)} were received; make it smaller."
        )
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(
            f"The image must be in base64, and {text[:20]!r}... is not; encode the image file."
        ) from error
    if not data:
        raise RequestError("The encoded image is empty; encode the image file and send it again.")
    return data


# Threads to wait in

Done = TypeVar("Done")

# Those who wait only hold a thread; the queue of the scheduler limits what is in hand.
MAX_WAITING: Final = 256
MAX_PLAIN: Final = 64
_LOOK_AFTER_S: Final = 0.25


class Waiting:
    """Threads of one kind of work, ``size`` of them; who comes on top gets QueueFullError."""

    def __init__(self, size: int = MAX_WAITING) -> None:
        self._size = size
        self._count = 0
        self._limiter = CapacityLimiter(size)

    async def run(self, work: Callable[..., Done], *arguments: object) -> Done:
        """``work`` in a thread."""
        self.check_room()
        return await self.run_accepted(work, *arguments)

    async def run_accepted(self, work: Callable[..., Done], *arguments: object) -> Done:
        """As ``run``, for what was told that there is room: it waits for its turn if need be."""
        # Only the thread of the event loop counts.
        self._count += 1
        try:
            return await to_thread.run_sync(work, *arguments, limiter=self._limiter)
        finally:
            self._count -= 1

    def check_room(self) -> None:
        """QueueFullError where nothing more can be taken on."""
        if self._count >= self._size:
            raise QueueFullError(
                f"At most {self._size} requests of this kind wait at a time, and all of these "
                "places are taken; send it again in a few seconds.",
                RETRY_AFTER_S,
            )

    async def run_wanted(
        self, request: Request, work: Callable[[Callable[[], bool]], Done]
    ) -> Done:
        """``work`` in a thread, told whether nobody waits for its result any longer."""
        return await self.run(work, client_is_gone(request.scope).is_set)

    async def run_registered(
        self, request: Request, services: Services, work: Work, state: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], InferenceRequest]:
        """The results of ``work`` on ``state``, and its entry in the SDK's registry.

        It is stopped when its client leaves.
        """
        api = services.api_of(request)
        self.check_room()
        asked = services.runs.create()
        stopping = asyncio.create_task(_stop_when_gone(request, asked))
        run = functools.partial(services.runs.run, work, api, state, inference_request=asked)
        try:
            return await self.run(run), asked
        finally:
            stopping.cancel()


Work = Callable[[sly.Api, dict[str, Any], InferenceRequest], Any]


async def _stop_when_gone(request: Request, asked: InferenceRequest) -> None:
    gone = client_is_gone(request.scope)
    while not gone.is_set():
        await asyncio.sleep(_LOOK_AFTER_S)
    asked.stop()


def _stop_of(is_gone: Callable[[], bool]) -> Stop:
    """What ends a wait that nobody waits for the end of."""
    return lambda: GenerationCancelledError("The client left.") if is_gone() else None


def use_own_threads(server: FastAPI, path_prefix: str = "", size: int = MAX_PLAIN) -> None:
    """Gives every route that may wait threads of its own; for routes that are added from now on.

    ``path_prefix`` is the SDK's ``SUPERVISELY_SERVER_PATH_PREFIX``.
    """

    class OwnThreads(APIRoute):
        def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:  # noqa: ANN401
            route = ROUTE_BY_PATH.get(path.removeprefix(path_prefix))
            if not inspect.iscoroutinefunction(endpoint) and (route is None or route.waits):
                endpoint = _in_own_threads(endpoint, Waiting(size))
            super().__init__(path, endpoint, **options)

    server.router.route_class = OwnThreads


def _in_own_threads(endpoint: Callable[..., Done], waiting: Waiting) -> Callable[..., Any]:
    @functools.wraps(endpoint)
    async def run(*arguments: object, **named: object) -> Done:
        return await waiting.run(functools.partial(endpoint, *arguments, **named))

    return run
