"""What the SDK's own runs get wrong, shown on the SDK, and that ours do not."""

import threading
from types import SimpleNamespace

import pytest
from platform_fakes import (
    DAMAGED,
    Inference,
    Stage,
    annotation,
    fails_for,
    rectangle,
    wait_until,
)

from florence2.images import open_image
from serve.platform.failures import FailedImageError
from serve.platform.upload import SdkUpload
from serve.sdk import sly
from serve.settings import Settings

# isort: split
from supervisely.nn.inference.uploader import Uploader


class SdkApp(SdkUpload):
    """The SDK's own run around a model that finds a cat on every image it can open."""

    _inference_image_ids = Inference._inference_image_ids
    add_results_to_request = Inference.add_results_to_request
    model_meta = sly.ProjectMeta()

    def __init__(self, platform):
        self.cache = SimpleNamespace(
            download_image=lambda api, one: open_image(platform.content[one])
        )

    def _get_inference_settings(self, state):
        return dict(Settings())

    def _get_batch_size_from_state(self, state):
        return state.get("batch_size", 4)

    def _inference_auto(self, source, settings):
        return [annotation(rectangle()) for _ in source], [{} for _ in source]


@pytest.fixture(autouse=True)
def sdk_as_it_is(monkeypatch):
    """The SDK without what the app puts in its places, wherever the app was imported before."""
    monkeypatch.setattr(sly.nn.inference.inference, "Uploader", Uploader)


@pytest.fixture
def sdk_run(runner):
    """The SDK's run of a state: the request when it is over."""

    def run(platform, state):
        work = SdkApp(platform)._inference_image_ids
        request, _ = runner.start(work, platform, dict(state))
        wait_until(request.is_finished)
        return request

    return run


@pytest.fixture
def timed_waits(monkeypatch):
    """The limits in seconds of all waits on conditions that have one."""
    waits = []
    wait = threading.Condition.wait

    def noted(self, timeout=None):
        if timeout:
            waits.append(timeout)
        return wait(self, timeout)

    monkeypatch.setattr(threading.Condition, "wait", noted)
    return waits


def test_one_image_waits_for_no_timer_and_the_sdk_waits_a_second(
    sdk_run, runner, platform, timed_waits
):
    request = sdk_run(platform, {"image_id": 1})
    assert len(request.pop_pending_results()) == 1
    assert max(timed_waits) > 0.9, "the defect is gone from the SDK"

    timed_waits.clear()
    assert len(runner.ids(platform, {"image_id": 1})) == 1
    assert timed_waits == []


def test_the_last_upload_error_is_told_and_the_sdk_swallows_it(sdk_run, runner, platform):
    platform.upload_fault = fails_for(1)
    state = {"image_id": 1, "upload_mode": "append"}
    request = sdk_run(platform, state)
    assert (request.stage, request.exception) == (Stage.FINISHED, None), "the SDK tells it now"

    with pytest.raises(FailedImageError, match="labels of image 1 cannot be uploaded"):
        runner.ids(platform, state)


def test_one_damaged_image_costs_itself_and_in_the_sdk_the_whole_run(sdk_run, runner, platform):
    platform.content[2] = DAMAGED
    state = {"image_ids": [1, 2, 3, 4], "batch_size": 2}
    request = sdk_run(platform, state)
    assert request.stage == Stage.ERROR
    assert request.pop_pending_results() == [], "the SDK keeps the other images now"

    entries = runner.ids(platform, state)
    assert [entry["annotation"] is not None for entry in entries] == [True, False, True, True]
