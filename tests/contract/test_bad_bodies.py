"""Bad JSON to every endpoint: refused in a sentence, never a 500, never an empty answer."""

from __future__ import annotations

import pytest
from contract_calls import assert_refused, refused_now_or_later

from serve.http.routes import ROUTES, Takes

# What the platform's documents list, written down here and not taken from the app.
STATE_PATHS = (
    *("inference_image_id", "inference_image_id_async", "inference_image_url"),
    *("inference_batch_ids", "inference_batch_ids_async", "inference_project_id_async"),
    *("inference_video_id", "inference_video_id_async", "tracking_by_detection", "run_speedtest"),
    *("deploy_from_api", "smart_cache", "visual_question_answering"),
)
REQUEST_PATHS = (
    *("get_inference_progress", "pop_inference_results", "get_inference_result"),
    *("get_inference_status", "get_preparing_progress", "stop_inference"),
)
PLAIN_PATHS = (
    *("is_running", "is_ready", "is_deployed", "get_session_info", "get_deploy_info", "get_status"),
    *("get_tracking_settings", "get_custom_inference_settings", "get_deploy_settings"),
    *("get_model_meta", "get_output_classes_and_tags", "get_prompt_instructions", "freeze_model"),
    *("list_pretrained_models", "list_pretrained_model_infos"),
)


pytestmark = pytest.mark.usefixtures("next_request_works")


def test_the_lists_here_leave_out_no_route_that_takes_a_state():
    known = {*STATE_PATHS, *REQUEST_PATHS, "clear_inference_request"}
    own = {"tag_objects", "tag_objects_async", "list_runs", "undo_run"}
    assert {route.path[1:] for route in ROUTES if route.takes is Takes.STATE} <= known | own


# Every other body that is none is refused in front of all routes, see unit/http/test_http_guard.py.
BODIES = {
    "empty": (b"", "json"),
    "cut off": (b"{", "json"),
    "a list": (b"[]", "object"),
    "nested": (b"[" * 100_000, ""),
    "no state": (b"{}", "state"),
    "a state that is a list": (b'{"state": [1]}', "state"),
    "a context that is a text": (b'{"state": {}, "context": "x"}', "context"),
}


@pytest.mark.parametrize("path", [*STATE_PATHS, *REQUEST_PATHS])
def test_a_body_that_is_no_state_is_refused(app, path):
    for body, says in BODIES.values():
        assert_refused(app.send(path, body), 400, says=says)


@pytest.mark.parametrize("path", STATE_PATHS)
def test_a_body_of_another_type_is_refused(app, path):
    answer = app.send(path, b"state=1", Content_Type="text/plain")
    assert_refused(answer, 400, says="application/json")


@pytest.mark.parametrize("path", [path for path in STATE_PATHS if path != "deploy_from_api"])
def test_an_empty_state_is_refused(app, path):
    refused_now_or_later(app, path, {})


@pytest.mark.parametrize("path", PLAIN_PATHS)
def test_endpoints_that_take_nothing_still_refuse_what_is_no_json(app, path):
    assert_refused(app.send(path, b"{"), 400, says="json")
    assert app.post(path).status_code == 200


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("inference_image_id", "image_id"),
        ("inference_image_id_async", "image_id"),
        ("inference_batch_ids", "batch_ids"),
        ("inference_batch_ids_async", "images_ids"),
        ("inference_project_id_async", "projectId"),
        ("visual_question_answering", "image_id"),
    ],
)
def test_an_id_that_is_none_is_refused(app, path, key):
    for value in ("12", None, [], [None], -1, 1.5, True, {"id": 1}):
        refused_now_or_later(app, path, {key: value, "text_prompt": "<OD>"})


@pytest.mark.parametrize(
    ("path", "state"),
    [
        ("inference_image_id", {"image_id": 999}),
        ("inference_image_id_async", {"image_id": 999}),
        ("inference_batch_ids", {"batch_ids": [999, 998]}),
        ("inference_batch_ids_async", {"image_ids": [999]}),
        ("inference_project_id_async", {"projectId": 999}),
        ("visual_question_answering", {"image_id": 999, "text_prompt": "<OD>"}),
    ],
)
def test_what_the_platform_does_not_have_is_said(app, seeded, path, state):
    message = refused_now_or_later(app, path, state)
    assert "999" in message


IDS = [
    ({}, 400),
    ({"inference_request_uuid": None}, 400),
    ({"inference_request_uuid": 5}, 400),
    ({"inference_request_uuid": ["a"]}, 400),
    ({"inference_request_uuid": "no-such-request"}, 404),
    ({"inference_request_uuid": "../../etc"}, 404),
]


@pytest.mark.parametrize("path", REQUEST_PATHS)
def test_a_request_that_is_not_running_is_not_found(app, path):
    for state, status in IDS:
        assert_refused(app.post(path, state), status)


@pytest.mark.parametrize(
    "state",
    [{"deploy_params": "x"}, {"deploy_params": {"device": "tpu"}, "model_name": "demo"}],
    ids=["parameters that are a text", "odd device"],
)
def test_a_deployment_that_cannot_be_is_refused_and_the_model_runs_on(app, state):
    assert_refused(app.post("deploy_from_api", state))
    assert app.get("is_ready").json() == {"status": "ready"}


@pytest.mark.parametrize(
    "state",
    [
        pytest.param({"image_encoding": "####", "text_prompt": "<OD>"}, id="no base64"),
        pytest.param({"image_encoding": "aGVsbG8=", "text_prompt": "<OD>"}, id="no image"),
        pytest.param({"image_encoding": 5, "text_prompt": "<OD>"}, id="a number"),
        pytest.param({"image_path": "/etc/passwd", "text_prompt": "<OD>"}, id="a path"),
        pytest.param({"text_prompt": "<OD>"}, id="no image at all"),
    ],
)
def test_a_question_without_an_image_is_refused(app, state):
    assert_refused(app.post("visual_question_answering", state), 400)


def test_paths_and_methods_that_do_not_exist_are_refused(app):
    for path in ("no_such_endpoint", "debug", "docs", "openapi.json"):
        assert app.get(path).status_code == 404
    assert app.get("inference_image_id").status_code in (404, 405)
