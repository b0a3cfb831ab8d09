"""One double of the platform and one app for the whole run; every test gets a fresh project."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from platform_double import TOKEN, PlatformDouble
from platform_seed import Seeded, seed

from serve.sdk import sly

SDK_ENVIRONMENT = {
    "SUPERVISELY_PUBLIC_API_RETRIES": "1",
    "SUPERVISELY_PUBLIC_API_RETRY_SLEEP_SEC": "0",
    "SUPERVISELY_SKIP_HTTPS_USER_HELPER_CHECK": "true",
}


@pytest.fixture(scope="session")
def running_platform() -> Iterator[PlatformDouble]:
    double = PlatformDouble()
    double.start()
    yield double
    double.stop()


@pytest.fixture
def platform(running_platform) -> PlatformDouble:
    """The double, empty and healthy."""
    running_platform.reset()
    return running_platform


@pytest.fixture
def seeded(platform) -> Seeded:
    return seed(platform)


@pytest.fixture
def api(platform, monkeypatch) -> sly.Api:
    for name, value in SDK_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return sly.Api(platform.address, TOKEN, retry_count=1)
