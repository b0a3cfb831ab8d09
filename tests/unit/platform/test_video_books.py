"""Which run over a video goes on with which earlier one."""

from types import SimpleNamespace

import pytest

from serve.platform import video_books as module
from serve.platform.video_books import VideoBooks
from serve.settings import parse_settings

MODEL = {"name": "one", "revision": "a1", "precision": "fp32", "runtime": "torch"}
VIDEO = SimpleNamespace(id=3, name="a.mp4", hash="h", project_id=1)
FRAMES = {"first": 0, "last": 20, "step": 1}


@pytest.fixture
def begun(monkeypatch):
    """Begins a run beside earlier ones that came to no end, and gives its manifest."""
    earlier = []
    monkeypatch.setattr(module, "runs_of", lambda api, project_id: earlier)
    monkeypatch.setattr(module, "read_texts", lambda *_: {})
    monkeypatch.setattr(module, "team_of", lambda *_: 5)

    def begin(model=MODEL, settings=(), mode="append", frames=FRAMES):
        asked = parse_settings({"text": "dog", **dict(settings)})
        with VideoBooks(SimpleNamespace(), VIDEO, asked, model, mode, frames) as books:
            earlier.append(books.manifest)
        return books.run_id

    return begin


@pytest.mark.parametrize(
    "changed", [{}, {"model": {**MODEL, "precision": "bf16", "runtime": "openvino"}}]
)
def test_the_same_request_goes_on_also_on_another_machine(begun, changed):
    assert begun() == begun(**changed)


@pytest.mark.parametrize(
    "changed",
    [
        {"model": {**MODEL, "name": "two"}},
        {"model": {**MODEL, "revision": "b2"}},
        {"settings": {"text": "cat"}},
        {"mode": "replace_own"},
        {"frames": {**FRAMES, "step": 5}},
    ],
)
def test_another_request_begins_a_run_of_its_own(begun, changed):
    assert begun() != begun(**changed)
