"""The app's own routes. They come before the SDK's, so a path that both have is ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse

from serve.http.held_bytes import held_bytes, keep_body
from serve.http.leaving import gone_or_none
from serve.http.limits import MAX_IMAGE_BYTES
from serve.http.page import index_page
from serve.http.tasks_json import instructions, tasks_json
from serve.http.uploads import (
    NO_FILES,
    Files,
    FormText,
    check_fields,
    parse_state,
    read_one_upload,
    read_uploads,
)
from serve.http.url_fetch import fetch_image
from serve.http.waiting import Waiting, run_registered, run_wanted
from serve.sdk_routes import register_sdk_routes
from serve.vqa import answer_question

if TYPE_CHECKING:
    from serve.app import Florence2App


def register_routes(server: FastAPI, app: Florence2App, *, with_page: bool) -> None:
    """Mounts the routes; must come before ``Inference.serve`` mounts the SDK's."""
    _images(server, app)
    _batches(server, app)
    _image_ids(server, app)
    register_sdk_routes(server, app)
    _questions(server, app)
    _model(server, app)
    if with_page:
        _page(server, app)


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


def _page(server: FastAPI, app: Florence2App) -> None:
    @server.get("/")
    def page() -> HTMLResponse:
        return HTMLResponse(index_page(app.page_info()))
