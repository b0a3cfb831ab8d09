from concurrent.futures import ThreadPoolExecutor

import pytest
from platform_fakes import FakePlatform, bound, services

from serve.platform.project_run import run_image_ids, run_project
from serve.platform.registry import RequestsManager


@pytest.fixture(scope="session")
def manager():
    return RequestsManager(ThreadPoolExecutor(4))


class Runner:
    """Runs requests through the SDK's own registry."""

    def __init__(self, manager):
        self._manager = manager

    def ids(self, api, state, predict=None, **changed):
        """The results, as a client that waits for them gets them; or the error."""
        return self._manager.run(bound(run_image_ids, services(predict, **changed)), api, state)

    def finish(self, api, state, predict=None, request=None, work=run_image_ids, **changed):
        """The request as it is once the run is over, whatever its end."""
        request = request or self._manager.create()
        method = bound(work, services(predict, **changed))
        _, future = self._manager.schedule_task(method, api, state, inference_request=request)
        future.result()
        # Its own callback sets the stage just after the result.
        self._manager._on_inference_end(future, request.uuid)
        return request

    def project(self, api, state, predict=None, **options):
        return self.finish(api, state, predict, work=run_project, **options)

    def create(self):
        return self._manager.create()


@pytest.fixture
def runner(manager):
    return Runner(manager)


@pytest.fixture
def platform():
    return FakePlatform(ids=[1, 2, 3, 4, 5, 6])
