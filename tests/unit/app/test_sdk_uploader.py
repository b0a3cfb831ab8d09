"""What the SDK's runs over videos do behind the model: no wait at the end, no error lost."""

from __future__ import annotations

import queue
import threading
from types import SimpleNamespace

import pytest

from serve.app import Florence2App  # noqa: F401  (puts it in its place)
from serve.sdk_overrides import PromptUploader

# isort: split
from supervisely.nn.inference import inference as sdk_inference
from supervisely.nn.inference import uploader as sdk_uploader
from supervisely.nn.inference.uploader import Uploader


class EndlessQueue(queue.Queue):
    """Waits for an item however long it was told to wait, so a lost second becomes a stuck one."""

    def __init__(self) -> None:
        super().__init__()
        self.is_idle = threading.Event()

    def get(self, block=True, timeout=None):
        if self.empty():
            self.is_idle.set()
        return super().get(block, None)


@pytest.fixture
def ends(monkeypatch):
    """Whether an uploader ends when it is told to, and what it had done by then."""
    module = SimpleNamespace(Queue=EndlessQueue, Empty=queue.Empty)
    monkeypatch.setattr(sdk_uploader, "queue", module)

    def run(kind: type, items: list[list[int]]) -> tuple[bool, list[int]]:
        done: list[int] = []
        uploader = kind(lambda numbers: done.extend(number for number in numbers if number))
        for item in items:
            uploader.put(item)
        while not (uploader._q.is_idle.wait(10) and len(done) == sum(map(len, items))):
            uploader._q.is_idle.clear()
        uploader.stop()
        uploader._upload_thread.join(1)
        has_ended = not uploader._upload_thread.is_alive()
        uploader._q.put(0)
        return has_ended, done

    return run


def test_the_sdks_own_waits_although_it_was_told_to_stop(ends):
    assert ends(Uploader, [[1, 2]])[0] is False


def test_ours_ends_when_everything_is_done(ends):
    assert ends(PromptUploader, [[1, 2], [3]]) == (True, [1, 2, 3])


def fails(items):
    raise OSError("the platform does not answer")


def test_the_sdks_own_loses_what_the_last_upload_raised():
    with Uploader(fails) as uploader:
        uploader.put([1])
        uploader._upload_thread.join(3)


def test_ours_raises_it():
    with pytest.raises(OSError, match="does not answer"), PromptUploader(fails) as uploader:
        uploader.put([1])


def work_that_fails_too() -> None:
    with PromptUploader(fails) as uploader:
        uploader.put([1])
        uploader._upload_thread.join(3)
        raise ValueError("mine")


def test_what_the_work_itself_raised_goes_first():
    with pytest.raises(ValueError, match="mine"):
        work_that_fails_too()


def test_progress_is_told_of_items_only():
    told: list[int] = []
    with PromptUploader(lambda items: None, notify_f=told.extend) as uploader:
        uploader.put([1, 2])
    assert told == [1, 2]


def test_the_sdks_runs_use_ours():
    assert sdk_inference.Uploader is PromptUploader
