"""Bad forms, files, settings and addresses: refused in a sentence, and only what is bad."""

from __future__ import annotations

import io
import json
import socket

import numpy as np
import pytest
from contract_calls import CITY, assert_refused, refused_now_or_later
from PIL import Image

FORM_PATHS = (
    "inference_image",
    "inference_batch",
    "inference_batch_async",
    "inference_video_async",
)
PNG = io.BytesIO()
Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(PNG, "PNG")
SMALL = PNG.getvalue()

pytestmark = pytest.mark.usefixtures("next_request_works")


# What each key may say is in unit/settings/test_settings_values.py.
SETTINGS = [
    pytest.param("x", "settings", id="a text"),
    pytest.param({"confidence_threshold": "high"}, "confidence_threshold", id="confidence"),
    pytest.param({"task_prompt": "<NO_SUCH>"}, "task", id="task"),
    pytest.param({"task_prompt": "<REGION_TO_OCR>"}, "region", id="region is missing"),
    pytest.param({"confidence_treshold": 0.4}, "confidence_threshold", id="misspelt"),
    pytest.param({"mode": "reference_image"}, "reference_bbox", id="reference without a box"),
]


@pytest.mark.parametrize(("settings", "says"), SETTINGS)
def test_settings_that_cannot_be_used_are_refused(app, seeded, settings, says):
    files = [("a.png", SMALL)]
    image_id = seeded.image_ids["scene_city.jpg"]

    for path in ("inference_image", "inference_batch", "inference_batch_async"):
        assert_refused(app.upload(path, files, settings), 400, says=says)
    assert_refused(
        app.post("inference_image_id", {"image_id": image_id, "settings": settings}),
        400,
        says=says,
    )
    state = {"projectId": seeded.project_id, "settings": settings}
    assert says in refused_now_or_later(app, "inference_project_id_async", state)


@pytest.mark.parametrize("path", FORM_PATHS)
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        pytest.param({"settings": "{"}, "settings", id="settings cut off"),
        pytest.param({"settings": "[1]"}, "settings", id="settings that are a list"),
        pytest.param({"state": "no"}, "state", id="a state that is no JSON"),
        pytest.param({"state": '{"settings": 5}'}, "settings", id="settings that are a number"),
    ],
)
def test_forms_with_bad_fields_are_refused(app, path, fields, says):
    assert_refused(app.upload(path, [("a.png", SMALL)], **fields), 400, says=says)


@pytest.mark.parametrize("path", FORM_PATHS)
def test_a_form_without_files_is_refused(app, path):
    assert_refused(app.upload(path, [], {}), 400, says="file")
    assert_refused(app.send(path, json.dumps({"state": {}})), 400, says="form")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"not an image", id="words"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + b"\x00" * 40, id="a header"),
        pytest.param(CITY.read_bytes()[:3000], id="half a file"),
        pytest.param(b"<svg xmlns='http://www.w3.org/2000/svg'/>", id="a drawing"),
    ],
)
def test_bytes_that_are_no_image_are_refused(app, data):
    for path in ("inference_image", "inference_batch"):
        assert_refused(app.upload(path, [("a.png", data)], {}), 400, says="image")


def test_two_files_are_one_too_many_for_a_single_image(app):
    answer = app.upload("inference_image", [("a.png", SMALL), ("b.png", SMALL)], {})
    assert_refused(answer, 400, says="one file")


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "http://127.0.0.1:22/a.png", "http://localhost/a.png"),
        *("http://0x7f000001/a.png", "http://169.254.169.254/latest/meta-data", "not a url"),
        *("/etc/passwd", "ftp://example.com/a.png", "http://[::1]/a.png", "http://10.0.0.1/a.png"),
        *("http://", 5, None),
    ],
)
def test_an_address_that_is_not_a_public_image_is_refused(app, url):
    assert_refused(app.post("inference_image_url", {"image_url": url, "settings": {}}), 400)


def test_the_apps_own_address_is_refused_and_not_visited(app, platform):
    answer = app.post("inference_image_url", {"image_url": platform.address + "/public/api/v3/x"})
    assert_refused(answer, 400, says="public")
    assert platform.calls == []


def test_a_json_body_of_100_mb_is_refused_as_too_large(app):
    body = b'{"state": {"image_id": 1, "padding": "' + b"x" * 100_000_000 + b'"}}'
    assert_refused(app.send("inference_image_id", body), 413)


def test_a_file_of_100_mb_is_refused_as_too_large(app):
    answer = app.upload("inference_image", [("a.png", b"\0" * 100_000_000)], {})
    assert_refused(answer, 413)


def test_clients_that_leave_in_the_middle_disturb_nobody(app, running_app):
    head = (
        b"POST /inference_image HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    )
    for body in (b"Content-Length: 1000\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n5\r\n{"):
        with socket.create_connection(("127.0.0.1", running_app.port)) as connection:
            connection.sendall(head + body)

    assert app.get("is_ready").status_code == 200


def test_names_of_files_are_never_paths(app, tmp_path, running_app):
    up = "../" * 12
    names = [f"{up}{tmp_path}/up.png", f"{tmp_path}/absolute.png", "..\\up.png", "a\0b.png", ""]
    before = set(running_app.log_path.parent.rglob("*"))
    answer = app.upload("inference_batch", [(name or "x", SMALL) for name in names], {})
    assert answer.status_code == 200
    assert len(answer.json()) == len(names)
    assert set(running_app.log_path.parent.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []
