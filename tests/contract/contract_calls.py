"""Requests to the app as they go over the wire, and what is read from the answers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import requests
from platform_seed import IMAGES

from florence2.records import Box, Result
from serve.sdk import sly

DEMO = IMAGES.parent / "checkpoint"
BIKE = IMAGES / "scene_bike.png"
CITY, STREET, HOME = (IMAGES / f"scene_{name}.jpg" for name in ("city", "street", "home"))
TIMEOUT_S = 60

# One label as (class, confidence, first column, first row, last column, last row).
Row = tuple[str, float, int, int, int, int]
# What a training that ended wrote about itself.
TRAINING = {
    "model": "Florence-2-base",
    "method": "full",
    "tasks": ["<CAPTION_TO_PHRASE_GROUNDING>"],
    "classes": ["vehicle", "moon"],
    "prompts": {"vehicle": ["car", "house"]},
    "metric": {"name": "mAP", "value": 0.8351},
    "data": {"training_images": 90, "validation_images": 10},
    "settings": {"steps": 300},
}


@dataclass(frozen=True)
class App:
    """The app at a url."""

    url: str

    def get(self, path: str) -> requests.Response:
        return requests.get(f"{self.url}/{path}", timeout=TIMEOUT_S)

    def post(self, path: str, state: Any = None, **body: Any) -> requests.Response:
        """A JSON request; ``state`` of None sends none."""
        content = body if state is None else {"state": state, "context": {}, **body}
        return requests.post(f"{self.url}/{path}", json=content, timeout=TIMEOUT_S)

    def send(self, path: str, data: bytes | str, **headers: str) -> requests.Response:
        """Bytes as they are, JSON by what the request says of itself unless told otherwise."""
        named = {"Content-Type": "application/json"}
        named |= {name.replace("_", "-"): value for name, value in headers.items()}
        return requests.post(f"{self.url}/{path}", data=data, headers=named, timeout=TIMEOUT_S)

    def upload(
        self, path: str, files: Sequence[tuple[str, bytes]], settings: Any = None, **fields: str
    ) -> requests.Response:
        """A form with files by name; the settings as the SDK's clients wrap them."""
        parts: list[tuple[str, Any]] = [("files", (name, data)) for name, data in files]
        if settings is not None:
            fields = {"settings": json.dumps({"settings": settings}), **fields}
        parts += [(name, (None, value, "text/plain")) for name, value in fields.items()]
        return requests.post(f"{self.url}/{path}", files=parts, timeout=TIMEOUT_S)

    def finished(self, uuid: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The progress of a request in the background once it has ended, and its results."""
        request = {"inference_request_uuid": uuid}
        # Asking takes both sides a part of the core that the work needs.
        waits_s = chain((0.02, 0.04, 0.08), repeat(0.15))
        while True:
            answer = self.post("get_inference_progress", request)
            assert answer.status_code == 200, answer.text
            progress: dict[str, Any] = answer.json()
            if progress["finished"]:
                popped = self.post("pop_inference_results", request).json()
                return progress, popped["pending_results"]
            time.sleep(next(waits_s))

    def done(
        self, path: str, state: Any, **body: Any
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Starts a request in the background and waits for it."""
        answer = self.post(path, state, **body)
        assert answer.status_code == 200, answer.text
        return self.finished(answer.json()["inference_request_uuid"])

    def upload_images(
        self, paths: Sequence[Path], settings: Any = None, path: str = "inference_batch"
    ) -> list[dict[str, Any]]:
        answer = self.upload(path, [(one.name, one.read_bytes()) for one in paths], settings)
        assert answer.status_code == 200, answer.text
        found: list[dict[str, Any]] = answer.json()
        return found


def assert_refused(answer: requests.Response, *statuses: int, says: str = "") -> dict[str, Any]:
    """The request failed by its own fault, and the body says so in one sentence."""
    allowed = statuses or tuple(range(400, 500))
    assert answer.status_code in allowed, f"{answer.status_code}: {answer.text[:300]}"
    body: dict[str, Any] = answer.json()
    assert body["success"] is False
    assert body["message"] == body["detail"]
    assert body["code"]
    message = body["message"]
    assert 20 < len(message) < 500, message
    assert message.rstrip().endswith((".", "?", "!")), message
    assert "Traceback" not in message
    assert "Error(" not in message
    assert says.lower() in message.lower(), message
    return body


def refused_now_or_later(app: App, path: str, state: dict[str, Any]) -> str:
    """The sentence of a refusal, at once or, for a request in the background, as its error."""
    answer = app.post(path, state)
    if not (path.endswith("_async") and answer.status_code == 200):
        return str(assert_refused(answer)["message"])
    progress, results = app.finished(answer.json()["inference_request_uuid"])
    assert progress["exception"]
    assert (progress["stage"], results) == ("Error", [])
    message: str = progress["exception"]["message"]
    assert message.endswith((".", "?"))
    return message


def meta_of(api: sly.Api, project_id: int) -> sly.ProjectMeta:
    return sly.ProjectMeta.from_json(api.project.get_meta(project_id))


def annotation_of(api: sly.Api, image_id: int) -> sly.Annotation:
    """What an image of the platform is labeled with now."""
    info = api.image.get_info_by_id(image_id)
    meta = meta_of(api, api.dataset.get_info_by_id(info.dataset_id).project_id)
    return sly.Annotation.from_json(api.annotation.download(image_id).annotation, meta)


def rows_of(annotation: dict[str, Any]) -> list[Row]:
    """The rectangles of an annotation's JSON, in no particular order: sorted."""
    rows = []
    for item in annotation["objects"]:
        assert item["geometryType"] == "rectangle"
        (left, top), (right, bottom) = item["points"]["exterior"]
        tags = {tag["name"]: tag["value"] for tag in item["tags"]}
        rows.append((item["classTitle"], tags["confidence"], left, top, right, bottom))
    return sorted(rows)


def rows_of_labels(annotation: sly.Annotation) -> list[Row]:
    return rows_of(annotation.to_json())


def classes_in_labels(annotation: sly.Annotation) -> list[str]:
    return classes_in(annotation.to_json())


def classes_in(annotation: dict[str, Any]) -> list[str]:
    return sorted(item["classTitle"] for item in annotation["objects"])


def expected_rows(result: Result, size_wh: tuple[int, int], names: dict[str, str]) -> list[Row]:
    """The rows that an answer of the model should become.

    A box covers [x1, x2) and a rectangle names its last pixel, hence the one less; ``names`` are
    classes by label, where they differ.
    """
    width, height = size_wh
    rows = []
    for found in result.objects:
        assert isinstance(found, Box)
        assert found.score is not None
        x1, y1, x2, y2 = found.box_xyxy
        rows.append(
            (
                names.get(found.label, found.label),
                round(found.score, 4),
                int(x1 + 0.5),
                int(y1 + 0.5),
                min(int(x2 + 0.5), width) - 1,
                min(int(y2 + 0.5), height) - 1,
            )
        )
    return sorted(rows)


def image_size_wh(path: Path) -> tuple[int, int]:
    height, width = sly.image.read(str(path)).shape[:2]
    return width, height


def near(found: Sequence[Row], expected: Sequence[Row]) -> bool:
    """Whether rows are the same, the confidence to what batches of other sizes change in it."""
    return [(row[0], *row[2:]) for row in found] == [
        (row[0], *row[2:]) for row in expected
    ] and all(abs(one[1] - two[1]) <= 2e-4 for one, two in zip(found, expected, strict=True))


def wait_for(condition: Callable[[], object], what: str = "it did not come to that") -> None:
    until = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.01)
