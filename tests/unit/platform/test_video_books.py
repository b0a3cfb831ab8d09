"""Which run over a video goes on with which earlier one."""

import json
import os
from types import SimpleNamespace

import pytest
from requests import HTTPError, Response

from serve.platform import lease
from serve.platform import video_books as module
from serve.platform.lease import RunHeldError
from serve.platform.video_books import VideoBooks
from serve.settings import parse_settings

MODEL = {"name": "one", "revision": "a1", "precision": "fp32", "runtime": "torch"}
VIDEO = SimpleNamespace(id=3, name="a.mp4", hash="h", project_id=1)
FRAMES = {"first": 0, "last": 20, "step": 1}


@pytest.fixture
def files(monkeypatch):
    """The files of the team."""
    stored = {}

    def write_text(api, team_id, path, text):
        stored[path] = text

    monkeypatch.setattr(lease, "read_text", lambda api, team_id, path: stored.get(path))
    monkeypatch.setattr(lease, "CONFIRM_S", 0.0)
    for one in (module, lease):
        monkeypatch.setattr(one, "write_text", write_text)
    return stored


@pytest.fixture
def books_of(monkeypatch, files):
    """Begins a run beside earlier ones that came to no end."""
    earlier = []
    monkeypatch.setattr(module, "runs_of", lambda api, project_id: earlier)
    monkeypatch.setattr(module, "read_texts", lambda *_: {})
    monkeypatch.setattr(module, "team_of", lambda *_: 5)

    def begin(model=MODEL, settings=(), mode="append", frames=FRAMES):
        asked = parse_settings({"text": "dog", **dict(settings)})
        books = VideoBooks(SimpleNamespace(), VIDEO, asked, model, mode, frames)
        earlier.append(books.manifest)
        return books

    return begin


@pytest.fixture
def begun(books_of):
    """Begins a run that comes to no end, and gives its id."""

    def begin(**changed):
        with books_of(**changed) as books:
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


def test_nobody_begins_what_another_process_does_until_it_is_done(books_of, files, monkeypatch):
    with books_of() as books:
        [path] = files
        assert path.startswith("/florence2/runs/1/videos/3-")
        assert books.manifest.holder == json.loads(files[path])["who"]
    monkeypatch.setattr(lease, "LEASE_S", 60.0)
    other = {**json.loads(files[path]), "token": "other", "pid": os.getppid(), "is_released": False}
    files[path] = json.dumps(other)
    with pytest.raises(RunHeldError, match="being labeled by the same request now"):
        books_of()
    files[path] = json.dumps({**other, "is_released": True})
    with books_of() as books:
        pass


def test_who_finds_that_another_process_has_the_run_leaves_its_manifest_alone(books_of, files):
    with books_of() as books:
        [path] = files
        files[path] = json.dumps({**json.loads(files[path]), "token": "other"})
        with pytest.raises(RunHeldError, match="being labeled by the same request now"):
            books.check_held(is_fresh=True)
        with pytest.raises(RunHeldError):
            books.ended("failed")
    assert json.loads(files[path])["token"] == "other"
    assert list(files) == [path]


@pytest.mark.parametrize("status", [403, 500])
def test_who_may_not_use_the_files_of_the_team_may_label_all_the_same(
    books_of, monkeypatch, status
):
    response = Response()
    response.status_code = status

    def write_text(*_):
        raise HTTPError(response=response)

    monkeypatch.setattr(lease, "write_text", write_text)
    if status == 500:
        with pytest.raises(HTTPError):
            books_of()
        return
    with books_of() as books, pytest.raises(RunHeldError):
        books_of()
    assert books.manifest.holder is None
