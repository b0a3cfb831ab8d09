"""The app's own routes. They come before the SDK's, so a path that both have is ours."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

from fastapi import Depends, FastAPI, Request, Response

from florence2.engine.ask import Ask
from florence2.errors import RequestError
from florence2.records import Failure, Result
from florence2.tasks import TASKS, TaskInput, find_task
from serve.answers import raise_failure
from serve.http.bodies import MAX_IMAGE_BYTES, held_bytes, keep_body
from serve.http.page import register_page
from serve.http.uploads import (
    NO_FILES,
    Files,
    FormText,
    check_fields,
    decode_image,
    parse_state,
    read_one_upload,
    read_uploads,
)
from serve.http.url_fetch import fetch_image
from serve.http.waiting import Waiting, gone_or_none, run_registered, run_wanted
from serve.platform.images import Target, failed_download
from serve.platform.request_state import Deadline
from serve.predict.predictor import Call
from serve.sdk_routes import register_sdk_routes
from serve.settings import shown
from serve.version import VERSION

if TYPE_CHECKING:
    from fastapi import Request

    from serve.app import Florence2App


def tasks_json() -> dict[str, Any]:
    """The answer of ``/tasks``: every task prompt with its name, input, output and summary.

    ``version`` is the app's, whose table it is.
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
            }
            for task in TASKS
        ],
    }


def instructions() -> str:
    """The text of ``/get_prompt_instructions``: which prompts the model understands."""
    lines = [f"{task.token}: {task.summary}.{_INPUT_HINTS[task.takes]}" for task in TASKS]
    return "\n".join(["Florence-2 answers task prompts. Send one of these as text_prompt:", *lines])


_INPUT_HINTS = {
    TaskInput.NONE: "",
    TaskInput.TEXT: " Write the text right after the prompt.",
    TaskInput.REGION: " Needs a region: give one in the settings.",
    TaskInput.OPTIONAL_TEXT: " A text may follow the prompt.",
}

_TASK_FIRST: Final = re.compile(r"\s*(<[^<>\s]+>(?:\s*\+\s*<[^<>\s]+>)*)(.*)", re.DOTALL)


def answer_question(
    app: Florence2App, state: Mapping[str, Any], request: Request, stop: Callable[[], bool]
) -> str:
    """The answer's text; for a task that finds objects, its objects as JSON.

    ``state`` has the image as ``image_id`` or ``image_encoding`` (base64), and ``text_prompt``:
    a task prompt with its text behind it, or a task's name. Raises FlorenceError.
    """
    task, text = task_and_text(state.get("text_prompt"))
    region = state.get("region")
    with ExitStack() as held:
        ask = Ask(_image(app, state, request, stop, held), task, text, region)
        [result] = app.ask([ask], Call(deadline_s=Deadline.of(state).left_s, should_stop=stop))
    if isinstance(result, Failure):
        raise_failure(result)
    return text_of(result)


def task_and_text(prompt: object) -> tuple[str, str | None]:
    """``"<OD>"`` or ``"<CAPTION_TO_PHRASE_GROUNDING> a red car"`` in two; also a task's name."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise RequestError(
            "text_prompt is a task prompt such as <DETAILED_CAPTION>, and "
            f"{_received(prompt)} was received; /get_prompt_instructions lists them."
        )
    found = _TASK_FIRST.fullmatch(prompt)
    if found is None:
        return find_task(prompt).token, None
    return re.sub(r"\s", "", found[1]), found[2].strip() or None


def _received(prompt: object) -> str:
    return "nothing" if prompt is None or prompt == "" else shown(prompt)


def text_of(result: Result) -> str:
    """The text of an answer; of one that has objects, or of a cascade, all of it as JSON."""
    if result.text is not None and "+" not in result.task:
        return result.text
    return json.dumps(result.to_dict(), ensure_ascii=False)


def _image(
    app: Florence2App,
    state: Mapping[str, Any],
    request: Request,
    stop: Callable[[], bool],
    held: ExitStack,
) -> bytes:
    if state.get("image_encoding") is not None:
        return decode_image(state["image_encoding"])
    image_id = state.get("image_id")
    if image_id is None:
        raise RequestError(
            "A question needs an image as image_id or image_encoding (base64), and neither was "
            "received; a path on the server is not read."
        )
    if isinstance(image_id, bool) or not isinstance(image_id, int):
        raise RequestError(f"image_id is a number, and {shown(image_id)} was received; correct it.")
    api = app.api_from_request(request)
    info = api.image.get_info_by_id(image_id)
    if info is None:
        raise_failure(Failure("not_found", f"There is no image {image_id}; check its id."))
    size_bytes = Target(image_id, info=info).size_bytes
    held.enter_context(held_bytes().hold(size_bytes, stop=gone_or_none(stop)))
    try:
        [data] = api.image.download_bytes(info.dataset_id, [image_id])
    except Exception as error:  # noqa: BLE001  (the SDK and its transport raise what they like)
        raise_failure(failed_download(image_id, error))
    return bytes(data)


def register_routes(server: FastAPI, app: Florence2App, *, with_page: bool) -> None:
    """Mounts the routes; must come before ``Inference.serve`` mounts the SDK's."""
    _images(server, app)
    _batches(server, app)
    _image_ids(server, app)
    register_sdk_routes(server, app)
    _questions(server, app)
    _model(server, app)
    if with_page:
        register_page(server)


def _images(server: FastAPI, app: Florence2App) -> None:
    waiting = Waiting()

    @server.post("/inference_image", dependencies=[Depends(check_fields)])
    async def inference_image(
        request: Request,
        files: Files = NO_FILES,
        settings: FormText = "{}",
        state: FormText = "{}",
    ) -> dict[str, Any]:
        upload = read_one_upload(files)
        asked = parse_state(state, settings)
        entries = await run_wanted(
            request, lambda stop: app.answer_uploads([upload.data], asked, stop), waiting
        )
        return entries[0]

    @server.post("/inference_image_url")
    async def inference_image_url(request: Request) -> dict[str, Any]:
        asked: dict[str, Any] = request.state.state
        app.settings_of(asked)

        def answer(stop: Callable[[], bool]) -> list[dict[str, Any]]:
            with held_bytes().hold(MAX_IMAGE_BYTES, stop=gone_or_none(stop)) as hold:
                image = fetch_image(asked.get("image_url"))
                hold.resize(len(image))
                return app.answer_uploads([image], asked, stop)

        return (await run_wanted(request, answer, waiting))[0]


def _batches(server: FastAPI, app: Florence2App) -> None:
    waiting = Waiting()

    @server.post("/inference_batch", dependencies=[Depends(check_fields)])
    async def inference_batch(
        request: Request,
        files: Files = NO_FILES,
        settings: FormText = "{}",
        state: FormText = "{}",
    ) -> list[dict[str, Any]]:
        asked = parse_state(state, settings)

        def answer(stop: Callable[[], bool]) -> list[dict[str, Any]]:
            # Up to half a gigabyte from a temporary file: no work for the thread of all requests.
            images = [upload.data for upload in read_uploads(files)]
            return app.answer_uploads(images, asked, stop)

        return await run_wanted(request, answer, waiting)

    @server.post("/inference_batch_async", dependencies=[Depends(check_fields)])
    def inference_batch_async(
        request: Request,
        files: Files = NO_FILES,
        settings: FormText = "{}",
        state: FormText = "{}",
    ) -> dict[str, str]:
        asked = parse_state(state, settings)
        images = [upload.data for upload in read_uploads(files)]
        app.settings_of(asked)
        return app.schedule(app._inference_images, images, asked, hold=keep_body(request.scope))


def _image_ids(server: FastAPI, app: Florence2App) -> None:
    waiting = Waiting()

    async def entries_of(request: Request) -> list[dict[str, Any]]:
        state, api = request.state.state, app.api_from_request(request)
        return await run_registered(
            request,
            app.inference_requests_manager,
            lambda asked: app.answer_image_ids(api, state, asked),
            waiting,
        )

    @server.post("/inference_image_id")
    async def inference_image_id(request: Request) -> dict[str, Any]:
        entry: dict[str, Any] = app._get_single_inference_result(await entries_of(request))
        return entry

    @server.post("/inference_batch_ids")
    async def inference_batch_ids(request: Request) -> list[dict[str, Any]]:
        return await entries_of(request)


def _questions(server: FastAPI, app: Florence2App) -> None:
    waiting = Waiting()

    @server.post("/visual_question_answering")
    async def visual_question_answering(request: Request) -> dict[str, str]:
        asked: dict[str, Any] = request.state.state

        def answer(stop: Callable[[], bool]) -> dict[str, str]:
            return {"answer": answer_question(app, asked, request, stop)}

        return await run_wanted(request, answer, waiting)

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
        state, api = request.state.state, app.api_from_request(request)
        return await run_registered(
            request,
            app.inference_requests_manager,
            lambda asked: app.answer_tag_objects(api, state, asked),
            tagging,
        )

    @server.post("/tag_objects_async")
    def tag_objects_async(request: Request) -> dict[str, str]:
        return app.schedule(app.tag_objects, app.api_from_request(request), request.state.state)


def _model(server: FastAPI, app: Florence2App) -> None:
    @server.post("/deploy_from_api")
    def deploy_from_api(request: Request) -> dict[str, str]:
        return app.deploy_from_state(request.state.state)

    @server.post("/freeze_model")
    def freeze_model() -> dict[str, str]:
        return {"message": app.freeze()}

    @server.get("/metrics")
    def metrics() -> Response:
        text, content_type = app.metrics.render()
        return Response(text, media_type=content_type)
