"""What goes wrong in the SDK's own server, and must not in this app."""

from __future__ import annotations

import io
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from contract_calls import CITY, HOME, STREET, assert_refused, classes_in
from PIL import Image
from platform_double import TOKEN
from platform_seed import IMAGES

ROOT = Path(__file__).parents[2]
COLOURS = ("red", "green", "blue")
# Where it is the point whose answer it is, not what it says.
SHORT = {"task_prompt": "<OCR>", "max_new_tokens": 1, "num_beams": 1}


def dot(number: int) -> bytes:
    """A small image whose size says its number."""
    image = Image.new("RGB", (32 + number, 24), COLOURS[number % 3])
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def widths(entries):
    return [entry["annotation"]["size"]["width"] for entry in entries]


def test_clients_that_give_files_one_name_each_get_their_own_image(app):
    def ask(number):
        files = [("image_0.png", dot(number))]
        return widths(app.upload("inference_batch", files, SHORT).json())

    with ThreadPoolExecutor(4) as clients:
        found = list(clients.map(ask, range(20)))

    assert found == [[32 + number] for number in range(20)]


def test_background_requests_with_one_name_each_get_their_own_image(app):
    started = [
        app.upload("inference_batch_async", [("image_0.png", dot(number))], SHORT)
        for number in range(8)
    ]
    uuids = [answer.json()["inference_request_uuid"] for answer in started]
    found = [widths(app.finished(uuid)[1]) for uuid in uuids]
    assert found == [[32 + number] for number in range(8)]


def test_a_hundred_files_are_answered_in_order(app):
    files = [(f"{number}.png", dot(number)) for number in range(100)]
    answer = app.upload("inference_batch", files, SHORT)
    assert answer.status_code == 200, answer.text[:300]
    assert widths(answer.json()) == [32 + number for number in range(100)]


def test_a_batch_that_fails_is_an_error_and_not_an_empty_list(app):
    files = [("a.png", b"broken"), ("b.png", b"too")]
    assert_refused(app.upload("inference_batch", files, {}), 400, says="image")
    uuid = app.upload("inference_batch_async", files, {}).json()["inference_request_uuid"]
    progress, _ = app.finished(uuid)
    assert progress["exception"]["message"]
    assert progress["stage"] == "Error"


def test_one_image_of_the_platform_does_not_pass_through_the_uploader(app, seeded):
    # The SDK's uploader blocks for a second whatever the model takes, and loses its last error.
    runs = ROOT / "serve" / "platform"
    source = "\n".join(path.read_text("utf-8") for path in runs.rglob("*.py"))
    assert not re.search(r"\bUploader\b", source)
    state = {"image_id": seeded.image_ids["scene_city.jpg"]}
    assert app.post("inference_image_id", state).status_code == 200


def test_an_image_is_downloaded_once_for_each_request(app, platform, seeded):
    app.post("inference_image_id", {"image_id": seeded.image_ids["scene_city.jpg"]})
    downloads = platform.count("images.bulk.download") + platform.count("images.download")
    assert downloads == 1


def test_outlines_inside_a_rectangle_are_moved_to_where_they_are_in_the_image(app, model):
    task, roi = "<REFERRING_EXPRESSION_SEGMENTATION>", (60, 90, 500, 400)
    settings = {"task_prompt": task, "text": "car", "rectangle": list(roi)}

    [entry] = app.upload_images([STREET], settings)

    with Image.open(STREET) as image:
        result = model.run(task, image.convert("RGB").crop(roi), text="car")
    expected = [
        [
            [int(x + roi[0] + 0.5), int(y + roi[1] + 0.5)]
            for x, y in zip(ring[0::2], ring[1::2], strict=True)
        ]
        for found in result.objects
        for ring in found.rings_xy
    ]
    assert expected
    objects = entry["annotation"]["objects"]
    assert [item["points"]["exterior"] for item in objects] == expected
    assert entry["annotation"]["size"] == {"height": 480, "width": 640}


def test_a_caption_survives_a_rectangle_and_windows(app):
    settings = {"task_prompt": "<CAPTION>", "rectangle": [0, 0, 300, 300]}
    [entry] = app.upload_images([HOME], settings)
    assert [tag["name"] for tag in entry["annotation"]["tags"]] == ["caption"]
    windows = {"windowHeight": 256, "windowWidth": 256, "overlapX": 32, "overlapY": 32}
    settings = {"inference_mode": "sliding_window", "sliding_window_params": windows}
    [entry] = app.upload_images([HOME], {"task_prompt": "<CAPTION>", **settings})
    assert [tag["name"] for tag in entry["annotation"]["tags"]] == ["caption"]


def test_settings_of_one_request_do_not_reach_the_next(app):
    before = app.post("get_custom_inference_settings").json()
    plain = app.upload_images([CITY], {})[0]["annotation"]
    app.upload_images([CITY], {"text": "moon", "classes": ["moon"], "confidence_threshold": 0.5})
    app.post("inference_image_id", {"image_id": 1, "settings": {"task_prompt": "<OCR>"}})
    assert app.post("get_custom_inference_settings").json() == before
    assert app.upload_images([CITY], {})[0]["annotation"]["objects"] == plain["objects"]


def test_different_tasks_at_the_same_time_do_not_mix(app):
    tasks = ["<OD>", "<CAPTION>", "<OCR>", "<OCR_WITH_REGION>"] * 3

    def ask(task):
        annotation = app.upload_images([HOME], {"task_prompt": task})[0]["annotation"]
        return sorted(tag["name"] for tag in annotation["tags"]), classes_in(annotation)

    with ThreadPoolExecutor(8) as clients:
        found = list(clients.map(ask, tasks))

    alone = {task: ask(task) for task in set(tasks)}
    assert found == [alone[task] for task in tasks]


def test_both_fields_of_a_form_are_read_and_state_wins(app):
    image = [("a.jpg", CITY.read_bytes())]
    car, moon = ({"settings": {"text": word}} for word in ("car", "moon"))

    for path in ("inference_batch", "inference_image"):
        by_state = app.upload(path, image, state=json.dumps(moon))
        by_both = app.upload(path, image, state=json.dumps(moon), settings=json.dumps(car))
        for answer in (by_state, by_both):
            entry = answer.json()[0] if path == "inference_batch" else answer.json()
            assert classes_in(entry["annotation"]) == ["moon"]


CLOSED = ["session-info", "shutdown", "state", "data"]


@pytest.mark.parametrize(
    "path", [*(f"sly/{name}" for name in CLOSED), "shutdown", "debug", "metrics", ""]
)
def test_no_endpoint_gives_the_token_away(app, running_app, path):
    for answer in (app.get(path), app.post(path), app.post(path, {})):
        assert TOKEN not in answer.text
    assert running_app.is_alive()


def test_the_token_is_not_in_the_log(running_app, app, seeded):
    app.post("inference_image_id", {"image_id": 999}, api_token=TOKEN)
    assert TOKEN not in running_app.log


def test_the_app_listens_on_this_machine_only(running_app):
    listening = Path("/proc/net/tcp").read_text().splitlines()[1:]
    port = f"{running_app.port:04X}"
    hosts = {
        fields[1].split(":")[0]
        for fields in map(str.split, listening)
        if fields[1].endswith(f":{port}") and fields[3] == "0A"
    }
    assert hosts == {"0100007F"}


def test_a_request_that_names_another_token_uses_that_one(app, seeded):
    state = {"image_id": seeded.image_ids["scene_city.jpg"]}
    answer = app.post("inference_image_id", state, api_token="another-token")
    assert_refused(answer)


def test_answers_are_json_without_nan(app):
    for path in sorted(IMAGES.iterdir()):
        answer = app.upload("inference_image", [(path.name, path.read_bytes())], {})
        json.loads(answer.text, parse_constant=lambda name: pytest.fail(f"{name} in the answer"))


def test_a_client_that_leaves_while_its_image_is_on_the_way_disturbs_nobody(app, platform, seeded):
    state = {"state": {"image_id": seeded.labeled_id}, "context": {}}
    with platform.faults.held("images.bulk.download"), pytest.raises(requests.Timeout):
        requests.post(f"{app.url}/inference_image_id", json=state, timeout=0.3)

    answer = app.post("inference_image_id", {"image_id": seeded.labeled_id})
    assert len(answer.json()["annotation"]["objects"]) == 3
