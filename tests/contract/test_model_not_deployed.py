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
    server = AppServer(tmp_path_factory.mktemp("page"), env, page_command, is_forked=True)
    server.start(until="/is_alive")
    yield server
    server.stop()


@pytest.fixture
def page(page_server, platform):
    return App(page_server.url)


@pytest.mark.parametrize("path", ["inference_image", "inference_batch"])
def test_uploads_are_answered_with_not_deployed(page, path):
    answer = page.upload(path, [IMAGE], {})
    assert assert_refused(answer, 503)["code"] == "not_deployed"
    assert int(answer.headers["Retry-After"]) >= 1


ENCODED = {"image_encoding": base64.b64encode(IMAGE[1]).decode(), "text_prompt": "<CAPTION>"}
REQUESTS = {
    "inference_image_id": lambda seeded: {"image_id": seeded.labeled_id},
    "inference_batch_ids": lambda seeded: {"batch_ids": [seeded.labeled_id]},
    "visual_question_answering": lambda seeded: ENCODED,
    "get_session_info": lambda seeded: {},
    "get_deploy_info": lambda seeded: {},
    "inference_image_id_async": lambda seeded: {"image_id": seeded.labeled_id},
    "inference_batch_ids_async": lambda seeded: {"image_ids": [seeded.labeled_id]},
    "inference_project_id_async": lambda seeded: {"projectId": seeded.project_id},
}


@pytest.mark.parametrize(("path", "state_of"), REQUESTS.items(), ids=REQUESTS)
def test_requests_are_answered_with_not_deployed_or_end_with_it(page, seeded, path, state_of):
    answer = page.post(path, state_of(seeded))
    if not (path.endswith("_async") and answer.status_code == 200):
        assert_refused(answer, 503)
        return
    progress, _ = page.finished(answer.json()["inference_request_uuid"])
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
