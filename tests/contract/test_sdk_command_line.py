"""``python -m serve.main deploy`` and ``predict``: the SDK's command line, with no platform."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import sys
import threading
from pathlib import Path

import forked_processes
import pytest
from app_server import AppServer, sdk_deploy_command
from contract_calls import (
    CITY,
    STREET,
    App,
    assert_refused,
    classes_in,
    refused_now_or_later,
    rows_of,
)
from platform_seed import IMAGES

from serve.sdk import sly


def command_line(folder, *words):
    """The finished process, and its environment without a platform."""
    server = AppServer(folder, {})
    command = [sys.executable, "-m", "serve.main", *words]
    return forked_processes.run(command, server.environment, folder, timeout_s=120)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """``predict`` of a folder with the demo images and one that is damaged; results in ``out``."""
    folder = tmp_path_factory.mktemp("predict")
    images = folder / "images"
    shutil.copytree(IMAGES, images)
    (images / "damaged.jpg").write_bytes(b"broken")
    words = ["predict", str(images), "--model", "demo", "--device", "cpu", "--draw"]
    settings = ["--settings", "text=car", "conf=0.1"]
    return command_line(folder, *words, *settings, "--output", str(folder / "out"))


@pytest.fixture
def predicted(done):
    return Path(done.args[done.args.index("--output") + 1])


def test_every_image_of_a_folder_gets_an_annotation_but_a_damaged_one(predicted):
    written = {path.name.removesuffix(".json") for path in predicted.rglob("*.json")}
    assert written == {path.name for path in IMAGES.iterdir()}


def test_a_damaged_image_is_named_and_the_command_says_that_it_failed(done):
    assert done.returncode == 1
    assert "damaged.jpg" in done.stderr
    assert "Traceback" not in done.stderr


def test_annotations_are_the_sdks_and_fit_their_images(predicted):
    for path in predicted.rglob("*.json"):
        annotation = json.loads(path.read_text("utf-8"))
        image = sly.image.read(str(IMAGES / path.name.removesuffix(".json")))
        assert annotation["size"] == {"height": image.shape[0], "width": image.shape[1]}
    [city] = predicted.rglob("scene_city.jpg.json")
    assert classes_in(json.loads(city.read_text("utf-8"))) == ["car", "car"]


def test_pictures_with_the_labels_are_drawn(predicted):
    drawn = [path for path in predicted.rglob("*") if path.suffix in (".jpg", ".png")]
    assert len(drawn) == len(list(IMAGES.iterdir()))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        pytest.param([str(CITY), "--settings", "no_such=1"], "no_such", id="unknown setting"),
        pytest.param([str(CITY), "--model", "no-such-model"], "no-such-model", id="no model"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(tmp_path, words, says):
    words = ["predict", *words, "--device", "cpu"]
    if "--model" not in words:
        words += ["--model", "demo"]
    done = command_line(tmp_path, *words)
    assert done.returncode not in (0, None)
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """The SDK's ``deploy``, allowed to fetch from this machine."""
    folder = tmp_path_factory.mktemp("deploy")
    server = AppServer(folder, {"FLORENCE_ALLOW_PRIVATE_URLS": "1"}, sdk_deploy_command)
    server.start()
    yield App(server.url)
    server.stop()


@pytest.fixture(scope="module")
def web():
    """A web server with the demo images."""
    handler = functools.partial(QuietHandler, directory=str(IMAGES))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


def test_deploy_serves_without_a_platform(deployed):
    [entry] = deployed.upload_images([CITY], {"text": "car"})
    assert classes_in(entry["annotation"]) == ["car", "car"]


def test_images_of_a_platform_are_refused_where_there_is_none(deployed):
    assert_refused(deployed.post("inference_image_id", {"image_id": 1}), says="SERVER_ADDRESS")
    message = refused_now_or_later(deployed, "inference_project_id_async", {"projectId": 1})
    assert "SERVER_ADDRESS" in message


def test_an_image_by_address_gives_what_its_file_gives(deployed, web):
    answer = deployed.post("inference_image_url", {"image_url": f"{web}/{STREET.name}"})
    assert answer.status_code == 200, answer.text
    [entry] = deployed.upload_images([STREET], {})
    assert rows_of(answer.json()["annotation"]) == rows_of(entry["annotation"])


@pytest.mark.parametrize("path", ["no-such-image.jpg", "../../README.md", ""])
def test_an_address_without_an_image_is_refused(deployed, web, path):
    assert_refused(deployed.post("inference_image_url", {"image_url": f"{web}/{path}"}), 400)
