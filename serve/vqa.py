"""``/visual_question_answering``: a task prompt about one image, answered with text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

from florence2.engine.ask import Ask
from florence2.errors import RequestError
from florence2.records import Failure, Result
from florence2.tasks import find_task
from serve.answers import raise_failure
from serve.deadline import Deadline
from serve.http.encoded_images import decode_image
from serve.http.held_bytes import held_bytes
from serve.http.leaving import gone_or_none
from serve.platform.download import failed_download
from serve.platform.images import Target
from serve.predict.predictor import Call
from serve.settings.values import shown

if TYPE_CHECKING:
    from fastapi import Request

    from serve.app import Florence2App

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
