from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest
from platform_fakes import FakePlatform, services, wait_until
from requests.exceptions import ConnectionError as ConnectionFailed

from serve.platform import patience
from serve.platform.project_run import run_image_ids
from serve.platform.registry import RequestsManager


class Runner:
    """Runs requests through the SDK's own registry, as the app does."""

    def __init__(self, manager):
        self.manager = manager
        self.create = manager.create

    def ids(self, api, state, predict=None):
        """The results, as a client that waits for them gets them; or the error."""
        return self.manager.run(_bound(run_image_ids, predict), api, state)

    def start(self, work, api, state, request=None):
        """The request and the future of work in the background."""
        return self.manager.schedule_task(
            work, api, state, inference_request=request or self.create()
        )

    def finish(self, api, state, predict=None, request=None, work=run_image_ids, **given):
        """The request as it is once the run is over, whatever its end."""
        request, _ = self.start(_bound(work, predict, **given), api, state, request)
        # The SDK sets the stage just after the future's result.
        wait_until(request.is_finished)
        return request


def _bound(work, predict, **given):
    """``work`` as the app's method of the SDK's name and arguments."""
    model = {name: given.pop(name) for name in ("model_of", "is_model_coming") if name in given}
    handed = replace(services(predict, **given), **model)
    return lambda api, state, inference_request: work(api, state, inference_request, handed)


@pytest.fixture(scope="session")
def manager():
    return RequestsManager(ThreadPoolExecutor(4))


@pytest.fixture
def runner(manager):
    return Runner(manager)


@pytest.fixture
def platform():
    return FakePlatform(ids=[1, 2, 3, 4, 5, 6])


@pytest.fixture
def away(monkeypatch):
    """Waits take no time, and the platform that this is called with does not say it is there."""
    moments = count(0.0, 0.01)
    instead = SimpleNamespace(monotonic=lambda: next(moments), sleep=lambda seconds: None)
    monkeypatch.setattr(patience, "time", instead)
    monkeypatch.setattr(patience, "LIMIT_S", 1.0)

    def answer(project_id):
        raise ConnectionFailed("away")

    return lambda platform: setattr(platform.project, "get_info_by_id", answer)
