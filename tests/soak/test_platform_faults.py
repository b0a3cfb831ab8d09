"""Runs over a project while something fails: every image is labeled once, or named."""

from __future__ import annotations

import io
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from app_server import AppServer, serve_command
from contract_calls import App, assert_refused
from PIL import Image
from platform_faults import RandomFaults
from soak_project import Overnight
from soak_table import DISK_BYTES, KILLS, TABLE

pytestmark = pytest.mark.soak

OUTAGE_S = float(os.environ.get("FLORENCE_SOAK_OUTAGE_S", "120"))
AT_ONCE = {"SUPERVISELY_PUBLIC_API_RETRY_SLEEP_SEC": "0"}
BATCH = 8
PATH = "inference_project_id_async"


class Run:
    """A run over the project that goes on while the test does something to it."""

    def __init__(self, overnight: Overnight, server: AppServer, **state: object) -> None:
        self.overnight = overnight
        self.app = App(server.url)
        answer = self.app.post(PATH, overnight.state_of_run(batch_size=BATCH, **state))
        assert answer.status_code == 200, answer.text
        self._uuid = answer.json()["inference_request_uuid"]
        self._request = {"inference_request_uuid": self._uuid}

    def wait_for(self, share: float) -> None:
        """Until this share of the images with something on them is labeled."""
        count = share * sum(map(bool, self.overnight.expected.values()))
        while self.overnight.num_labeled() < count:
            progress = self.app.post("get_inference_progress", self._request).json()
            assert not progress["finished"], progress
            time.sleep(0.2)

    def end(self) -> tuple[set[int], str]:
        """The images that the run names as not done, and what it said at its end."""
        progress, results = self.app.finished(self._uuid)
        named = {one["image_id"] for one in results if one.get("error")}
        said = (progress["exception"] or {}).get("message", "")
        assert (progress["stage"] == "Error") == bool(said)
        return named, said


@pytest.fixture
def start_run(overnight, start_app) -> Callable[..., Run]:
    def start(server: AppServer | None = None, **state: object) -> Run:
        return Run(overnight, server or start_app(), **state)

    return start


def check(
    overnight: Overnight, injected: str, times: object, named: set[int] = frozenset()
) -> None:
    """Every image has its labels once, or is named; into the table."""
    found = overnight.found()
    lost = found.bare - named
    count = overnight.num_images
    TABLE.add(injected, times, count, len(named), len(lost), len(found.wrong))
    assert not found.wrong, [
        (one, overnight.expected[one], overnight.platform.state.image(one).annotation["objects"])
        for one in sorted(found.wrong)[:2]
    ]
    assert not lost


def told(faults: RandomFaults) -> str:
    counts = sorted((kind.name, count) for kind, count in faults.counts.items())
    kinds = ", ".join(f"{name} {count}" for name, count in counts)
    return f"{sum(faults.counts.values())} of {faults.num_calls} calls ({kinds})"


@pytest.mark.parametrize(("share", "in_a_row"), [(0.05, 1), (0.3, 25)])
def test_a_share_of_the_calls_fails(overnight, platform, start_app, start_run, share, in_a_row):
    """One by one they are tried again; many in a row may leave images that are named."""
    server = start_app(**({} if in_a_row == 1 else AT_ONCE))
    # Without its images a run does not begin.
    spared = frozenset({"projects.info", "datasets.list", "images.list"})
    faults = RandomFaults(share, seed=13, in_a_row=in_a_row, spared=spared)

    platform.faults.by_chance = faults
    named, _ = start_run(server).end()

    platform.faults.by_chance = None
    check(overnight, f"{share:.0%} of the calls, {in_a_row} in a row", told(faults), named)
    if named:
        _, said = start_run(server, upload_mode="skip_labeled").end()
        assert not said
        check(overnight, "the same, once more", "-")


@pytest.mark.parametrize("how", ["refuses connections", "takes calls and does not answer"])
def test_the_platform_is_gone(overnight, platform, start_run, how):
    run = start_run()
    run.wait_for(0.3)
    if how == "refuses connections":
        platform.stop(at_once=True)
        time.sleep(OUTAGE_S)
        platform.start()
    else:
        with platform.faults.hanging.held():
            time.sleep(OUTAGE_S)
    named, _ = run.end()
    check(overnight, f"the platform {how} for {OUTAGE_S:.0f} s", "1", named)


def test_the_model_is_loaded_anew_again_and_again(overnight, start_run, start_app):
    server = start_app()
    run = start_run(server)
    times = 5
    for number in range(times):
        run.wait_for(0.15 * (number + 1))
        deploy = {"deploy_params": {"device": "cpu"}, "model_name": "demo"}
        answer = run.app.post("deploy_from_api", deploy)
        assert answer.status_code == 200, answer.text
    named, _ = run.end()
    check(overnight, "another model is deployed", times, named)


def test_the_device_fails(overnight, start_app, start_run, tmp_path):
    """The images that it fails with are named; the model is loaded again and does the others."""
    switch = tmp_path / "device-fails"
    program = str(Path(__file__).parent / "app_with_faults.py")
    server = start_app(
        command=lambda port: [sys.executable, program, *serve_command(port)[3:]],
        DEVICE_FAILS=str(switch),
    )
    run = start_run(server)
    run.wait_for(0.4)
    switch.touch()
    named, said = run.end()
    assert "illegal memory access" in said
    assert len(named) == BATCH
    check(overnight, "the device fails for good", 1, named)
    left, said = start_run(server, upload_mode="skip_labeled").end()
    assert not left
    assert not said
    check(overnight, "the same, once more", "-")


def test_the_app_is_killed_at_random_moments(overnight, start_app, start_run):
    chance = random.Random(29)
    server = start_app()
    for number in range(KILLS):
        run = start_run(server, resume=True)
        run.wait_for((number + chance.random()) / (KILLS + 1))
        server.kill()
        server.start()
    named, said = start_run(server, resume=True).end()
    assert not named
    assert not said
    check(overnight, "kill -9 of the app, gone on with by resume", KILLS)


def test_the_disk_of_the_app_is_full(overnight, start_app, start_run, small_disk):
    """What needs no disk goes on; a form that would be kept there is refused in a sentence."""
    (small_disk / "filler").write_bytes(bytes(DISK_BYTES - 40_000))
    server = start_app(TMPDIR=str(small_disk))
    run = start_run(server)
    buffer = io.BytesIO()
    Image.effect_noise((2000, 1000), 90).save(buffer, "PNG")
    refused = run.app.upload("inference_image", [("large.png", buffer.getvalue())])
    assert_refused(refused, 507, says="disk")
    named, said = run.end()
    assert not named, said
    check(overnight, "the disk of the app is full", 1)
