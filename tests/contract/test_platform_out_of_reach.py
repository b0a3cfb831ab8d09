"""A platform that cannot be reached, hangs or answers nonsense: said, and no harm to the rest."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from app_server import OUT_OF_REACH
from contract_calls import CITY, assert_refused, classes_in

QUESTION = {"image_id": 1, "text_prompt": "<CAPTION>"}
REFERENCE = {"mode": "reference_image", "reference_image_id": 5, "reference_bbox": [20, 10, 90, 90]}
ROUTES = {
    "an image": ("inference_image_id", {"image_id": 1}),
    "images": ("inference_batch_ids", {"batch_ids": [1, 2]}),
    "an image with a reference on another": (
        "inference_image_id",
        {"image_id": 1, "settings": REFERENCE},
    ),
    "a question": ("visual_question_answering", QUESTION),
    "tags": ("tag_objects", {"image_ids": [1], "task_prompt": "<REGION_TO_CATEGORY>"}),
    "tags of a project": ("tag_objects", {"projectId": 1, "task_prompt": "<REGION_TO_OCR>"}),
    "a video": ("inference_video_id", {"videoId": 1, "startFrameIndex": 0, "framesCount": 1}),
    "the speed test": ("run_speedtest", {"projectId": 1, "batch_size": 1, "num_iterations": 1}),
}
IN_BACKGROUND = {
    "images": ("inference_batch_ids_async", {"batch_ids": [1, 2]}),
    "a project": ("inference_project_id_async", {"projectId": 1}),
    "tags": ("tag_objects_async", {"image_ids": [1], "task_prompt": "<REGION_TO_CATEGORY>"}),
}
WHERE = {"server_address": OUT_OF_REACH, "api_token": "x"}


@pytest.mark.parametrize(("path", "state"), ROUTES.values(), ids=ROUTES)
def test_a_platform_out_of_reach_is_424(app, path, state):
    body = assert_refused(app.post(path, state, **WHERE), 424, says="platform")
    assert body["code"] == "platform_failed"


@pytest.mark.parametrize(("path", "state"), IN_BACKGROUND.values(), ids=IN_BACKGROUND)
def test_a_run_in_the_background_tells_so_in_a_sentence(app, path, state):
    progress, _ = app.done(path, state, **WHERE)
    assert progress["stage"] == "Error"
    message = progress["exception"]["message"]
    assert message.startswith("The platform ")
    assert "Error" not in message


@pytest.mark.parametrize("status", [502, 504, 401])
@pytest.mark.parametrize(
    ("method", "path", "state"),
    [
        ("images.info", "inference_image_id", {"image_id": 1}),
        ("images.info", "visual_question_answering", QUESTION),
        ("projects.info", "run_speedtest", ROUTES["the speed test"][1]),
    ],
)
def test_a_proxy_that_answers_instead_is_424(app, platform, seeded, status, method, path, state):
    platform.faults.fail(method, times=50, status=status)
    assert_refused(app.post(path, state), 424, says="platform")


def test_calls_that_wait_for_the_platform_leave_every_other_route_answering(app, platform, seeded):
    path, state = ROUTES["the speed test"]
    state = {**state, "projectId": 999}
    with ThreadPoolExecutor(48) as clients:
        with platform.faults.held("projects.info"):
            waiting = [clients.submit(app.post, path, state) for _ in range(48)]
            while platform.count("projects.info") < 30:
                pass
            alive = [app.get(one).status_code for one in ("is_alive", "is_ready", "tasks")]
            alive += [app.post(one).status_code for one in ("get_status", "get_deploy_info")]
            [entry] = app.upload_images([CITY], {"text": "car", "num_beams": 1})
        answers = [one.result() for one in waiting]

    assert alive == [200] * 5
    assert classes_in(entry["annotation"]) == ["car", "car"]
    assert {one.status_code for one in answers} == {404}
