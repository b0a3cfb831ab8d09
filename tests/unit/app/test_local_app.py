"""The whole app without the platform, in this process: routes, switching, sleep, metrics."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from asgi_requests import JSON, parts, scope_of
from asgi_requests import ask as send_to
from PIL import Image
from starlette.testclient import TestClient

from florence2 import Florence2
from florence2.budget import Budget
from florence2.errors import CheckpointError, NoRoomError, QueueFullError, RequestError
from serve.http.handlers import Services
from serve.limits import MIB

HERE = "http://127.0.0.1:8000"


@pytest.fixture
def bike(image_path) -> bytes:
    return image_path("scene_bike.png").read_bytes()


def ask(client, image, route="/inference_image", **settings):
    form = {"state": json.dumps({"settings": settings})}
    return client.post(route, files=[("files", ("a.png", image))], data=form)


def deploy(client, name, **params):
    state = {"deploy_params": {"device": "cpu", **params}, "model_name": name}
    return client.post("/deploy_from_api", json={"state": state})


def classes_in(entry) -> list[str]:
    return sorted(label["classTitle"] for label in entry["annotation"]["objects"])


def test_the_local_app_is_ready_and_shows_a_page(client):
    assert client.get("/is_ready").json() == {"status": "ready"}
    assert "<title>Florence-2</title>" in client.get("/").text


def test_an_upload_is_answered_with_an_annotation(client, bike):
    answer = ask(client, bike)
    assert answer.status_code == 200
    assert classes_in(answer.json()) == ["arrow", "box", "star", "tree"]


def without_ids(value):
    """The same without what is new in every answer: the ids of labels."""
    if isinstance(value, list):
        return [without_ids(one) for one in value]
    if isinstance(value, dict):
        return {key: without_ids(one) for key, one in value.items() if key not in ("id", "key")}
    return value


def ask_state(client, image, state, route="/inference_image"):
    files = [("files", ("a.png", image))]
    return client.post(route, files=files, data={"state": json.dumps(state)})


@pytest.mark.parametrize("route", ["/inference_image", "/inference_batch"])
def test_details_are_beside_the_same_answer_for_those_who_ask(client, bike, route):
    def entry(**state):
        answer = ask_state(client, bike, state, route).json()
        return answer if route == "/inference_image" else answer[0]

    plain, detailed = entry(details=False), entry(details=True)
    details = detailed.pop("details")
    assert without_ids(detailed) == without_ids(plain) == without_ids(entry())
    assert details["model"] == {
        "name": "demo",
        "device": "cpu",
        "precision": "fp32",
        "runtime": "torch",
    }
    assert len(details["objects"]) == len(plain["annotation"]["objects"])


def test_details_of_a_run_are_those_of_its_entries(client, bike):
    state = {"details": True}
    begun = ask_state(client, bike, state, "/inference_batch_async").json()
    asked = {"state": {"inference_request_uuid": begun["inference_request_uuid"]}}
    wait_until(
        lambda: not client.post("/get_inference_progress", json=asked).json()["is_inferring"]
    )
    [entry] = client.post("/pop_inference_results", json=asked).json()["pending_results"]
    assert len(entry["details"]["objects"]) == len(entry["annotation"]["objects"]) > 0


@pytest.mark.parametrize("wanted", ["yes", 1, [], {}])
def test_details_are_wanted_or_not(client, bike, wanted):
    answer = ask_state(client, bike, {"details": wanted})
    assert answer.status_code == 400
    assert "details is true or false" in answer.json()["message"]


def test_settings_reach_the_model(client, bike):
    answer = ask(client, bike, mapping={"heaven": "star"})
    assert set(classes_in(answer.json())) == {"heaven"}
    wrong = ask(client, bike, treshold=0.5)
    assert wrong.status_code == 400
    assert "treshold" in wrong.json()["message"]


def test_classes_that_were_seen_are_announced_from_then_on(own_client, bike):
    before = own_client.post("/get_output_classes_and_tags", json={}).json()
    ask(own_client, bike)
    after = own_client.post("/get_output_classes_and_tags", json={}).json()
    names = {obj_class["title"] for obj_class in before["classes"]}
    assert {"object", "text"} <= names
    assert {obj_class["title"] for obj_class in after["classes"]} >= names | {"star", "tree"}
    tags = {tag["name"] for tag in before["tags"]}
    assert {"confidence", "caption", "ocr_text", "text", "category", "description"} <= tags


def test_a_batch_has_an_entry_per_image_and_an_error_where_one_failed(client, bike):
    files = [("files", ("same.png", content)) for content in (bike, b"junk", bike)]
    answer = client.post("/inference_batch", files=files)
    assert answer.status_code == 200
    good, bad, again = answer.json()
    assert classes_in(good) == classes_in(again)
    assert bad["annotation"] is None
    assert bad["error"]["code"] == "bad_image"


def test_a_batch_without_one_good_image_is_an_error(client):
    answer = client.post("/inference_batch", files=[("files", ("a.png", b"junk"))] * 2)
    assert answer.status_code == 400
    assert answer.json()["success"] is False


def test_questions_are_answered_with_text(client, bike):
    def question(**state):
        return client.post("/visual_question_answering", json={"state": state})

    encoded = base64.b64encode(bike).decode()
    caption = question(image_encoding=encoded, text_prompt="<CAPTION>")
    assert caption.status_code == 200
    assert "star" in caption.json()["answer"] or "tree" in caption.json()["answer"]
    found = question(image_encoding=encoded, text_prompt="<OPEN_VOCABULARY_DETECTION> star")
    assert "star" in found.json()["answer"]
    path = question(image_path="/etc/passwd", text_prompt="<CAPTION>")
    assert path.status_code == 400
    assert "path on the server" in path.json()["message"]
    assert question(image_encoding=encoded).status_code == 400
    assert "<CAPTION>" in client.post("/get_prompt_instructions", json={}).json()["instructions"]


def test_the_model_before_runs_on_when_another_cannot_be_deployed(client, bike, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert deploy(client, "someone/nothing-here").status_code == 400
    assert client.get("/is_ready").status_code == 200
    info = client.post("/get_deploy_info", json={}).json()
    assert (info["model_name"], info["device"], info["model_precision"]) == ("demo", "cpu", "FP32")
    assert ask(client, bike).status_code == 200


def test_a_custom_model_needs_a_platform_and_without_one_nothing_changes(client, app):
    params = {
        "model_source": "Custom models",
        "model_files": {"checkpoint": "/a/b/checkpoints/c.pt"},
    }
    answer = client.post("/deploy_from_api", json={"state": {"deploy_params": params}})
    assert answer.status_code == 400
    assert "team files of a platform, and this app has none" in answer.json()["message"]
    assert client.post("/get_deploy_info", json={}).json()["model_name"] == "demo"


def test_a_model_is_deployed_in_another_precision(client, app, bike):
    def precision():
        info = client.post("/get_session_info", json={}).json()
        return info["precision"], ask_state(client, bike, {"details": True}).json()["details"][
            "model"
        ]["precision"]

    named = client.post("/get_session_info", json={}).json()["precisions"]
    assert named[:3] == ["auto", "fp32", "bf16"]
    assert "fp16" not in named
    assert deploy(client, "demo", precision="bf16").status_code == 200
    assert precision() == ("BF16", "bf16")
    assert deploy(client, "demo", precision="fp16").status_code == 400
    assert precision() == ("BF16", "bf16")
    assert deploy(client, "demo").status_code == 200
    assert precision() == ("FP32", "fp32")


def test_a_damaged_checkpoint_leaves_the_model_before_running(client, app, bike, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert deploy(client, str(tmp_path)).status_code == 400
    assert deploy(client, "demo").status_code == 200
    assert ask(client, bike).status_code == 200


def test_a_stopped_model_refuses_until_it_is_deployed_again(client, app, bike):
    app.shutdown_model()
    assert client.get("/is_ready").status_code == 503
    question = {"state": {"image_encoding": "AAAA", "text_prompt": "<CAPTION>"}}
    refused = [
        *(ask(client, bike, route) for route in ("/inference_image", "/inference_batch")),
        client.post("/get_session_info", json={}),
        client.post("/visual_question_answering", json=question),
    ]
    assert [answer.status_code for answer in refused] == [503] * 4
    assert all(answer.headers["Retry-After"] for answer in refused)
    assert deploy(client, "demo").status_code == 200
    assert ask(client, bike).status_code == 200


def test_a_request_may_deploy_in_another_precision_and_is_told_which_runs(client, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert deploy(client, "demo", precision="nf4").status_code == 400
    for asked, told in (("int8", "INT8"), ("bf16", "BF16"), (None, "FP32")):
        assert deploy(client, "demo", runtime="torch", precision=asked).status_code == 200
        info = client.post("/get_deploy_info", json={}).json()
        session = client.post("/get_session_info", json={}).json()
        assert (info["model_precision"], session["precision"]) == (told, told)


def test_an_unavailable_device_is_refused_and_changes_nothing(client, bike):
    answer = deploy(client, "demo", device="cuda:7")
    assert answer.status_code == 400
    assert "cuda:7" in answer.json()["message"]
    assert ask(client, bike).status_code == 200


@pytest.mark.parametrize("seconds", ["soon", -1, 0, True, [1]])
def test_a_timeout_is_a_number_of_seconds(client, bike, seconds):
    form = {"state": json.dumps({"timeout_s": seconds})}
    answer = client.post("/inference_image", files={"files": ("a.png", bike)}, data=form)
    assert answer.status_code == 400
    assert "timeout_s" in answer.json()["message"]


@pytest.mark.parametrize(
    ("path", "part", "work", "state"),
    [
        ("/tag_objects", "answering", "run_tag_objects", {"image_ids": [1]}),
        ("/inference_video_id", "answering", "run_video_id", {"videoId": 1}),
        ("/inference_batch_ids", "answering", "run_image_ids", {"batch_ids": [1]}),
    ],
)
def test_a_run_that_is_waited_for_ends_when_its_client_leaves(
    app, monkeypatch, path, part, work, state
):
    ended = []

    def until_stopped(api, state, inference_request):
        wait_until(inference_request.is_stopped)
        ended.append(state)

    monkeypatch.setattr(getattr(app, part), work, until_stopped)
    monkeypatch.setattr(Services, "api_of", lambda self, request: None)
    scope = scope_of(path, [*JSON, ("host", "localhost")])
    send_to(app.app, scope, parts(json.dumps({"state": state}).encode()))
    assert ended == [state]


@pytest.mark.parametrize(
    "name",
    [
        *("demo", "Florence-2-base", "florence-2-BASE", "someone/nothing-here"),
        *("someone/else", "/models/mine"),
    ],
)
def test_what_may_be_deployed_is_the_published_the_first_and_the_allowed(app, monkeypatch, name):
    asked = []

    def switch(choice):
        asked.append(choice.name)
        raise CheckpointError("It was asked for.")

    monkeypatch.setattr(app.deployment, "switch", switch)
    monkeypatch.setattr("serve.app.resolve", lambda name, **options: None)
    monkeypatch.setenv("FLORENCE_ALLOW_DEPLOY", "someone/else /models/mine")
    with pytest.raises(CheckpointError):
        app.sdk.deploy({"model_name": name, "deploy_params": {"device": "cpu"}})
    assert [one.lower() for one in asked] == [name.lower()]
    with pytest.raises(RequestError, match="--allow-deploy"):
        app.sdk.deploy({"model_name": "someone/other"})


@pytest.mark.parametrize(
    ("sent", "count"),
    [(["auto", "auto", "auto"], 1), (["auto", "bf16"], 2)],
    ids=["the same", "another precision"],
)
def test_a_deployment_that_is_sent_again_while_it_goes_on_is_loaded_once(
    client, app, bike, monkeypatch, sent, count
):
    """A platform's proxy gives up after a minute, and the SDK's client then sends it again."""
    switch, loaded, may_load = app.deployment.switch, [], threading.Event()

    def slowly(choice):
        loaded.append(choice.precision)
        may_load.wait(20)
        return switch(choice)

    with monkeypatch.context() as slow, ThreadPoolExecutor(3) as pool:
        slow.setattr(app.deployment, "switch", slowly)
        answers = [pool.submit(deploy, client, "demo", precision=one) for one in sent]
        wait_until(lambda: loaded)
        time.sleep(0.1)
        may_load.set()
        assert {answer.result(30).status_code for answer in answers} == {200}
    assert len(loaded) == count
    monkeypatch.setattr(app.deployment, "switch", lambda choice: loaded.append("again"))
    deploy(client, "demo", precision=sent[0])
    assert loaded[count:] == ["again"]
    monkeypatch.undo()
    assert deploy(client, "demo").status_code == 200
    assert ask(client, bike).status_code == 200


ONE_CLASS = {
    "only object is ticked": ({"videoId": 1, "settings": {"classes": ["object"]}}, True),
    "more is ticked": ({"videoId": 1, "settings": {"classes": ["object", "car"]}}, False),
    "nothing is said": ({"videoId": 1, "settings": {}}, False),
    "a client that takes what comes": ({"video_id": 1, "settings": {"classes": ["object"]}}, False),
    "an image": ({"image_id": 1, "settings": {"classes": ["object"]}}, False),
}


@pytest.mark.parametrize(("state", "expected"), ONE_CLASS.values(), ids=ONE_CLASS)
def test_a_client_of_videos_that_knows_one_class_gets_it(app, state, expected):
    assert app.answering.settings_of(state).is_one_class is expected


def test_a_full_queue_says_when_to_come_back(serve_locally, busy_model, bike):
    app = serve_locally(max_queued=1)
    scheduler = app.deployment.current.scheduler
    answers = []
    with TestClient(app.app, HERE, raise_server_exceptions=False) as client:
        waiting = threading.Thread(target=lambda: answers.append(ask(client, bike)))
        with busy_model(scheduler):
            waiting.start()
            while scheduler.queue_depth == 0:
                pass
            full = ask(client, bike)
        waiting.join(30)
        assert ask(client, bike).status_code == 200
    assert full.status_code == 503
    assert 1 <= int(full.headers["Retry-After"]) <= 60
    assert full.json()["code"] == "queue_full"
    assert [answer.status_code for answer in answers] == [200]


def test_an_answer_that_is_not_there_in_time_is_given_up(client, app, busy_model, bike):
    form = {"state": json.dumps({"timeout_s": 0.2})}
    with busy_model(app.deployment.current.scheduler):
        late = client.post("/inference_image", files={"files": ("a.png", bike)}, data=form)
    assert late.status_code == 504
    assert ask(client, bike).status_code == 200


def test_settings_beside_the_settings_are_refused_on_every_route(client):
    state = {"image_url": "http://example.com/a.png", "task_prompt": "<CAPTION>"}
    answer = client.post("/inference_image_url", json={"state": state})
    assert answer.status_code == 400
    assert "task_prompt is one of the settings" in answer.json()["message"]


def test_two_different_thresholds_are_refused_before_they_are_merged(client, bike):
    answer = ask(client, bike, conf=0.9, confidence_threshold=0.1)
    assert answer.status_code == 400
    assert "conf" in answer.json()["message"]


def test_a_model_on_the_cpu_has_no_device_to_free(own_client, own_app):
    assert "no device to free" in own_client.post("/freeze_model", json={}).json()["message"]
    own_app.shutdown_model()
    assert own_client.post("/freeze_model", json={}).status_code == 503


def test_a_name_that_no_file_system_takes_is_no_checkpoint(client, bike):
    for name in ("x" * 5000, "a\0b"):
        assert deploy(client, name).status_code == 400
    assert ask(client, bike).status_code == 200


def test_metrics_tell_what_was_done(own_client, bike):
    ask(own_client, bike)
    ask(own_client, b"junk")
    text = own_client.get("/metrics").text
    assert 'florence2_requests_total{route="/inference_image",status="200"} 1.0' in text
    assert 'florence2_requests_total{route="/inference_image",status="400"} 1.0' in text
    assert 'florence2_images_total{outcome="labeled"} 1.0' in text
    assert 'florence2_model_info{device="cpu",name="demo",precision="fp32",runtime="torch"}' in text
    assert "florence2_process_resident_bytes" in text


def test_tasks_are_listed(client):
    tasks = client.get("/tasks").json()["tasks"]
    assert len(tasks) == 15
    assert client.post("/tasks", json={}).json()["tasks"] == tasks


def test_the_sdks_python_interface_works_too(app, image_path):
    path, settings = str(image_path("scene_bike.png")), app.custom_inference_settings_dict
    assert app.inference(path, settings).labels
    predictions, milliseconds = app.predict_benchmark([path], settings)
    assert app._predictions_to_annotation("", predictions[0]) == predictions[0][0].annotation
    assert milliseconds["inference"] > 0


@pytest.mark.parametrize(
    ("device", "why", "is_warned"),
    [
        ("auto", "A GPU can be <expected>.", True),
        ("cpu", "A GPU can be <expected>.", False),
        ("auto", None, False),
    ],
    ids=["chosen here", "asked for", "no GPU to be expected"],
)
def test_a_cpu_where_a_gpu_could_be_is_said_in_log_and_route(
    serve_locally, monkeypatch, caplog, device, why, is_warned
):
    monkeypatch.setattr("serve.model_service.missing_gpu", lambda: why)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    app = serve_locally(device)
    with TestClient(app.app, base_url=HERE) as client:
        info = client.post("/get_session_info", json={}).json()
    took_s = app.deployment.current.model.engine.self_test_s
    app.shutdown_model()
    assert 0 < info["self_test_s"] == pytest.approx(took_s, abs=1e-3)
    expected = f"demo runs on the CPU. {why} The image of the self-test"
    assert info.get("device_warning", "").startswith(expected) == is_warned
    assert (expected in caplog.text) == is_warned
    if is_warned:
        assert f"took {took_s:.2g} s" in info["device_warning"]
    assert app.deployment.device_warning is None


def fail_device(app) -> None:
    """The device under the model that is deployed now fails for good."""
    runtime = app.deployment.current.model.engine.runtime

    def fails(*_):
        raise RuntimeError("CUDA error: device-side assert triggered")

    runtime.encode_bytes = runtime.start = fails
    runtime.is_lost = lambda error: True


def is_ready(client) -> bool:
    shown = client.get("/readyz").status_code == 200
    assert f"florence2_ready {float(shown)}" in client.get("/metrics").text
    return shown


def test_a_device_that_fails_is_shown_and_the_model_loaded_again_once(
    own_app, own_client, bike, monkeypatch
):
    ended: list[tuple[str, int]] = []
    is_ended, may_load, loading = threading.Event(), threading.Event(), threading.Event()
    load = Florence2.load

    def end(sentence, status):
        ended.append((sentence, status))
        is_ended.set()

    def held_load(*choice, **options):
        loading.set()
        assert may_load.wait(60)
        return load(*choice, **options)

    monkeypatch.setattr("serve.app.end_process", end)
    monkeypatch.setattr("serve.app.LAST_ANSWERS_S", 0.0)
    monkeypatch.setattr(Florence2, "load", held_load)
    assert is_ready(own_client)
    fail_device(own_app)
    answer = ask(own_client, bike)
    assert (answer.status_code, answer.json()["code"]) == (503, "device_lost")
    assert "device-side assert triggered" in answer.json()["message"]
    assert loading.wait(60)
    assert not is_ready(own_client)
    meanwhile = ask(own_client, bike)
    assert (meanwhile.status_code, meanwhile.json()["code"]) == (503, "not_deployed")
    assert "Retry-After" in meanwhile.headers
    may_load.set()
    wait_until(lambda: own_app.deployment.is_ready)
    assert is_ready(own_client)
    assert ask(own_client, bike).status_code == 200
    assert ended == []
    fail_device(own_app)
    assert ask(own_client, b"junk").status_code == 400
    assert ask(own_client, bike).status_code == 503
    assert is_ended.wait(60)
    [(sentence, status)] = ended
    assert "start it anew" in sentence
    assert status == 3
    assert not is_ready(own_client)


def test_an_app_inside_of_a_program_leaves_the_program_alone(own_app, monkeypatch):
    monkeypatch.setattr("serve.app.end_process", lambda *_: pytest.fail("it ended"))
    own_app._is_quick_deploy = True
    own_app.end_when_answered("Start it anew.")


def test_a_process_that_ends_waits_for_its_runs(own_app, monkeypatch):
    """Their reports name the images that failed with the device."""
    monkeypatch.setattr("serve.app.LAST_ANSWERS_S", 0.0)
    run = own_app.runs.create()
    was_finished: list[bool] = []
    looked = threading.Event()
    is_finished = run.is_finished

    def looks():
        looked.set()
        return is_finished()

    run.is_finished = looks
    monkeypatch.setattr("serve.app.end_process", lambda *_: was_finished.append(is_finished()))
    ending = threading.Thread(target=own_app.end_when_answered, args=("Start it anew.",))
    ending.start()
    assert looked.wait(60)
    run.on_inference_end()
    ending.join(60)
    assert was_finished == [True]


def test_a_process_ends_with_its_sentence_last():
    code = "from serve.process import end_process; import threading, time;"
    code += "threading.Thread(target=time.sleep, args=(60,)).start(); print('before');"
    code += "end_process('The device failed.', 3)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert (done.stdout, done.stderr.splitlines()[-1]) == ("before\n", "The device failed.")


@pytest.fixture
def room(monkeypatch):
    """The process's budget of bytes, for this app alone."""
    budget = Budget(64 * MIB, "bytes of images")
    for module in ("serve.app", "serve.http.guard", "serve.http.handlers", "serve.answering"):
        monkeypatch.setattr(f"{module}.held_bytes", lambda: budget)
    return budget


def wait_until(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("code", ["queue_full", "no_room"])
def test_uploads_that_were_taken_on_wait_until_there_is_room(client, app, bike, monkeypatch, code):
    full = NoRoomError("full") if code == "no_room" else QueueFullError("full", 0.0)
    full.retry_after_s = 0.0
    predict, refusals = app.predictor.predict, [full, full]

    def busy(*arguments):
        if refusals:
            raise refusals.pop()
        return predict(*arguments)

    monkeypatch.setattr(app.predictor, "predict", busy)
    refused = ask(client, bike)
    assert (refused.status_code, refused.json()["code"]) == (503, code)
    refusals.append(full)
    uuid = ask(client, bike, "/inference_batch_async").json()["inference_request_uuid"]
    run = app.runs.get(uuid)
    wait_until(run.is_finished)
    assert run.exception is None
    assert [classes_in(entry) for entry in run.pop_pending_results()] == [
        ["arrow", "box", "star", "tree"]
    ]


LATER = {
    "a batch": ("/inference_batch_async", "answering", "run_uploads", 2),
    "a video": ("/inference_video_async", "answering", "run_video_file", 1),
}


@pytest.mark.parametrize(("route", "part", "work", "num_files"), LATER.values(), ids=LATER)
@pytest.mark.parametrize("fails", [False, True], ids=["done", "failed"])
def test_what_is_sent_for_later_is_held_until_it_is_done(
    room, own_client, own_app, monkeypatch, route, part, work, num_files, fails
):
    go_on, begun = threading.Event(), threading.Event()
    paths = []

    def slow(source, state, inference_request):
        paths.append(source)
        begun.set()
        assert go_on.wait(20)
        if fails:
            raise ValueError("no such frame")

    monkeypatch.setattr(getattr(own_app, part), work, slow)
    files = [("files", ("../../a.mp4", b"a" * MIB))] * num_files
    assert own_client.post(route, files=files).status_code == 200
    assert begun.wait(20)
    assert num_files * MIB < room.held < num_files * MIB + 5_000
    shown = re.search(r"^florence2_image_bytes_held (\S+)$", own_client.get("/metrics").text, re.M)
    assert float(shown[1]) == room.held
    go_on.set()
    wait_until(lambda: room.held == 0)
    if work == "run_video_file":
        assert not Path(paths[0]).parent.exists()


def test_a_video_goes_to_a_file_in_pieces_and_is_refused_above_the_limit(
    room, own_client, own_app, monkeypatch, tmp_path
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("serve.http.sdk_routes.MAX_VIDEO_BYTES", 3 * MIB)
    refused = own_client.post(
        "/inference_video_async", files=[("files", ("a.mp4", b"a" * (3 * MIB + 1)))]
    )
    assert (refused.status_code, refused.json()["code"]) == (413, "too_large")
    assert room.held == 0
    assert list(tmp_path.glob("video-*")) == []


def test_an_upload_without_room_gets_503_and_the_others_go_on(room, own_client, bike, monkeypatch):
    own_client.app.uploads.wait_s = 0.05
    with room.hold(64 * MIB):
        refused = own_client.post("/inference_image", files=[("files", ("a.png", b"a" * 3 * MIB))])
        assert (refused.status_code, refused.json()["code"]) == (503, "no_room")
        assert int(refused.headers["Retry-After"]) >= 1
        assert ask(own_client, bike).status_code == 200
    assert room.held == 0


def test_pictures_for_the_cache_are_looked_at_before_the_sdk_decodes_them(
    room, own_client, own_app
):
    header = blank_png_header((20_000, 20_000))
    answer = own_client.post(
        "/smart_cache_files",
        files=[("files", ("a.png", header))],
        data={"state": json.dumps({"image_ids": [1]})},
    )
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_image")
    assert "200 million pixels" in answer.json()["message"]


def blank_png_header(size_wh):
    """A PNG that says it has so many pixels."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = size_wh[0].to_bytes(4, "big") + size_wh[1].to_bytes(4, "big")
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)
