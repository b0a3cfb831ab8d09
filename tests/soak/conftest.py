"""Long runs against the double of the platform, and what they lost: a table at the end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# The double and what speaks to it.
sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))

from app_server import SDK_ENVIRONMENT, AppServer, serve_command
from platform_double import TOKEN, PlatformDouble
from platform_state import TEAM_ID
from soak_project import Overnight, drawn_images, serial_rows
from soak_table import DISK_BYTES, TABLE

# The SDK's own tries and waits, as the platform starts the app with.
TRIES = {
    "SUPERVISELY_PUBLIC_API_RETRIES": "10",
    "SUPERVISELY_PUBLIC_API_RETRY_SLEEP_SEC": "1",
    "SUPERVISELY_SKIP_HTTPS_USER_HELPER_CHECK": "true",
}


def pytest_terminal_summary(terminalreporter) -> None:
    for line in TABLE.lines():
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def images() -> list[bytes]:
    return drawn_images()


@pytest.fixture(scope="session")
def answers(images) -> list[list[tuple]]:
    """What the model says of each image, asked alone."""
    return serial_rows(images)


@pytest.fixture
def platform() -> Iterator[PlatformDouble]:
    double = PlatformDouble()
    double.start()
    yield double
    double.faults.by_chance = None
    double.stop(at_once=True)


@pytest.fixture
def overnight(platform, images, answers) -> Overnight:
    """A project of all the images."""
    return Overnight.of(platform, images, answers)


@pytest.fixture
def start_app(platform, tmp_path):
    """Starts the app, connected to the double; ``env`` over what the platform starts it with."""
    started: list[AppServer] = []

    def start(command: Callable[[int], list[str]] = serve_command, **env: str) -> AppServer:
        folder = tmp_path / f"app-{len(started)}"
        folder.mkdir()
        own = {"SERVER_ADDRESS": platform.address, "API_TOKEN": TOKEN, "TEAM_ID": str(TEAM_ID)}
        server = AppServer(folder, {**TRIES, **own, **env}, command)
        server.start()
        started.append(server)
        platform.app_url = server.url
        return server

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of its own with little room."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("Only who may mount a disk can fill one up.")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture(scope="module")
def module_app(tmp_path_factory) -> Iterator[tuple[PlatformDouble, AppServer]]:
    """A double and an app for all tests of a module; calls of the platform are not tried again."""
    double = PlatformDouble()
    double.start()
    own = {"SERVER_ADDRESS": double.address, "API_TOKEN": TOKEN, "TEAM_ID": str(TEAM_ID)}
    own["FLORENCE_ALLOW_PRIVATE_URLS"] = "1"
    server = AppServer(tmp_path_factory.mktemp("app"), {**SDK_ENVIRONMENT, **own})
    server.start()
    double.app_url = server.url
    yield double, server
    server.stop()
    double.stop(at_once=True)
