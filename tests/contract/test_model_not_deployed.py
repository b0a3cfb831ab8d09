"""The page that the platform starts, before anybody pressed Serve: 503 and nothing else.

The same process shows what a page adds: states that requests must not change, and a token.
"""

from __future__ import annotations

import base64

import pytest
from app_server import SDK_ENVIRONMENT, AppServer, page_command
from contract_calls import CITY, App, assert_refused
from platform_double import TOKEN

IMAGE = ("a.jpg", CITY.read_bytes())


@pytest.fixture(scope="module")
def page_server(running_platform, tmp_path_factory):
    env = {
        **SDK_ENVIRONMENT,
        "SERVER_ADDRESS": running_platform.address,
        "API_TOKEN": TOKEN,
        "TEAM_ID": "3",
        "WORKSPACE_ID": "5",
    }
    server = AppServer(tmp_path_factory.mktemp("page"), env, page_command)
    server.start(until="/is_alive")
    yield server
    server.stop()


@pytest.fixture
def page(page_server, platform):
    return App(page_server.url)


@pytest.mark.parametrize("path", ["inference_image", "inference_batch"])
def test_uploads_are_answered_with_not_deployed(page, path):
    answer = page.upload(path, [IMAGE], {})

    body = assert_refused(answer, 503)
    assert body["code"] == "not_deployed"
    assert int(answer.headers["Retry-After"]) >= 1


@pytest.mark.parametrize(
    ("path", "state"),
    [
        ("inference_image_id", {"image_id": 1}),
        ("inference_batch_ids", {"batch_ids": [1]}),
        (
            "visual_question_answering",
            {
                "image_encoding": base64.b64encode(CITY.read_bytes()).decode(),
                "text_prompt": "<CAPTION>",
            },
        ),
        ("get_session_info", {}),
        ("get_deploy_info", {}),
    ],
)
def test_requests_are_answered_with_not_deployed(page, seeded, path, state):
    state = {
        key: {"image_id": seeded.labeled_id, "batch_ids": [seeded.labeled_id]}.get(key, value)
        for key, value in state.items()
    }

    assert_refused(page.post(path, state), 503)


@pytest.mark.parametrize(
    ("path", "state"),
    [
        ("inference_image_id_async", {"image_id": 1}),
        ("inference_batch_ids_async", {"image_ids": [1]}),
        ("inference_project_id_async", {"projectId": 1}),
    ],
)
def test_runs_in_the_background_end_with_not_deployed(page, seeded, path, state):
    real = {
        "image_id": seeded.labeled_id,
        "image_ids": [seeded.labeled_id],
        "projectId": seeded.project_id,
    }

    answer = page.post(path, {key: real[key] for key in state})

    if answer.status_code == 503:
        assert_refused(answer, 503)
        return
    progress = page.finished(answer.json()["inference_request_uuid"])
    assert "deployed" in progress["exception"]["message"]


def test_it_says_that_it_is_alive_and_not_ready(page):
    assert page.get("is_alive").json()["running"] is True
    assert page.get("is_ready").status_code == 503
    assert page.post("is_deployed").json()["deployed"] is False
    assert page.post("get_status").json()["is_deployed"] is False


def test_what_needs_no_model_is_answered(page):
    assert "task_prompt" in page.post("get_custom_inference_settings").json()["settings"]
    assert "Florence-2-base" in page.post("list_pretrained_models").json()
    assert "<CAPTION>" in page.post("get_prompt_instructions").json()["instructions"]


def test_bad_requests_are_still_bad_requests(page):
    assert_refused(page.send("inference_image_id", b"{"), 400, says="json")
    assert_refused(page.upload("inference_image", [], {}), 400, says="file")


def test_requests_do_not_change_the_state_of_the_page(page):
    before = page.post("sly/state").json()

    page.post("inference_image_id", {"image_id": 1, "selectedRow": 3, "settings": {"text": "x"}})
    page.post("get_session_info", {"pollution": True})

    after = page.post("sly/state").json()
    assert "pollution" not in after
    assert after == before


def test_a_deployment_that_fails_leaves_a_page_that_works(page):
    state = {"deploy_params": {"device": "cpu"}, "model_name": "no-such-model"}

    assert_refused(page.post("deploy_from_api", state), says="no-such-model")
    assert page.get("").status_code == 200
    assert page.get("is_ready").status_code == 503
