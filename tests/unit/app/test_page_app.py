"""The app with its page, as the platform starts it, with no platform behind the address."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import forked_processes
import pytest

import serve

STEPS = Path(__file__).with_name("app_steps.py")
ROOT = Path(__file__).parents[3]


def run_steps(folder: Path, way: str) -> dict:
    done = forked_processes.run(
        [sys.executable, str(STEPS), way],
        {
            "PATH": "/usr/bin:/bin",
            "HOME": str(folder),
            "FLORENCE2_CACHE": str(folder / "cache"),
            "HF_ENDPOINT": "http://127.0.0.1:9",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}",
        },
        ROOT,
        timeout_s=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict:
    return run_steps(tmp_path_factory.mktemp("page"), "page")


def test_large_is_chosen_among_exactly_four(seen):
    assert seen["gui"] == "Florence2Gui"
    assert seen["chosen"] == "Florence-2-large"
    assert seen["models"] == [
        "Florence-2-base",
        "Florence-2-large",
        "Florence-2-base-ft",
        "Florence-2-large-ft",
    ]


def test_serve_deploys_what_is_chosen_on_the_page(seen):
    assert seen["served"] == {
        "model_files": {"checkpoint": "Florence-2-large"},
        "device": "cpu",
        "runtime": "OpenVINO",
        "precision": "int8:all",
    }


def test_weights_that_cannot_be_had_are_told_about(seen):
    assert "cannot be reached" in seen["refused"]


def test_the_page_is_there_before_a_model_is(seen):
    assert seen["before"] == [503, 503]
    assert seen["after"] == [200, 200]


def test_clients_find_the_app_by_name_and_kind(seen):
    assert seen["session"]["app_name"] == "Serve Florence-2"
    assert seen["session"]["task type"] == "prompt-based object detection"
    assert seen["session"]["sliding_window_support"] == "basic"


def test_settings_keep_their_comments(seen):
    file = Path(serve.__file__).with_name("inference_settings.yaml").read_text(encoding="utf-8")
    assert seen["settings"] == file
    assert seen["shown"]


def test_a_request_from_outside_does_not_change_the_page(seen):
    assert seen["polluted"] is False


def test_an_app_that_its_developer_runs_for_the_platform_keeps_pages_of_others_out(seen):
    assert seen["callers"] == {
        "its own page": 200,
        "the tunnel of its developer": 200,
        "a page of others": 403,
        "a name that leads here": 403,
    }


def test_a_cpu_where_a_gpu_could_be_is_on_the_page(seen):
    assert seen["warning"].startswith("demo runs on the CPU. A GPU can be expected here. The image")
    assert seen["warning"] == seen["session"]["device_warning"]
    assert seen["warning after stopping"] is None


def test_stopping_on_the_page_frees_the_model(seen):
    assert seen["stopped"] == [False, False]


def test_a_restarted_app_has_its_model_back_and_loads_it_once(seen):
    assert seen["restarted"] == {"deployed": True, "name": "demo", "loads": 1}


def test_an_app_without_a_page_is_deployed_by_requests(tmp_path):
    seen = run_steps(tmp_path, "plain")
    assert (seen["first"], seen["ready"], seen["labels"]) == (503, 200, 4)
    assert "cannot be reached" in seen["refused"]
    assert seen["device"] == "cpu"


def test_a_program_deploys_by_name(tmp_path):
    seen = run_steps(tmp_path, "quick")
    assert seen == {"labels": 4, "model": "demo", "precision": "FP32", "device": "cpu"}


def test_an_automatic_start_that_fails_leaves_the_page(tmp_path):
    seen = run_steps(tmp_path, "autostart")
    assert seen["before"] == [503, 503]
    assert seen["after"] == [200, 200]


def test_refreshing_is_asked_of_the_checkpoint(app, monkeypatch):
    asked: list[dict] = []
    monkeypatch.setattr(
        "serve.app.resolve", lambda name, **options: asked.append({"name": name, **options})
    )

    class Page:
        refresh = True
        shows_download = staticmethod(lambda name: print)
        download_progress = type("Bar", (), {"hide": staticmethod(lambda: None)})

    app._gui = Page()
    app._download_pretrained_model({"checkpoint": "Florence-2-base"})
    app._gui = None
    app._download_pretrained_model({"checkpoint": "Florence-2-base"})
    assert [(one["name"], one["refresh"]) for one in asked] == [
        ("Florence-2-base", True),
        ("Florence-2-base", False),
    ]
    assert all(callable(one["progress"]) for one in asked)
