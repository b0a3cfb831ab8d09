from concurrent.futures import ThreadPoolExecutor

import pytest
from platform_fakes import FakePlatform, FakePredictor, SdkPart

from serve.platform.registry import RequestsManager
from serve.platform.run import run_image_ids, run_project
from serve.platform.services import RunServices
from serve.sdk import sly
from serve.settings.model import Settings


@pytest.fixture(scope="session")
def manager():
    return RequestsManager(ThreadPoolExecutor(4))


def services(predict=None, **changed):
    app = SdkPart()
    given = {
        "predict": predict or FakePredictor(),
        "settings_of": lambda state, api: Settings(),
        "upload": app.upload_predictions,
        "format_output": app._format_output,
        "model_meta": sly.ProjectMeta,
        "task_id": 3,
        "default_batch_size": 4,
    }
    return RunServices(**{**given, **changed})


def bound(work, run_services):
    """``work`` as the app's method of the SDK's name and arguments."""

    def method(api, state, inference_request):
        return work(api, state, inference_request, run_services)

    return method


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
