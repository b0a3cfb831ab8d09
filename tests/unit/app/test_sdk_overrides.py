"""THE list of what the app changes in the SDK is complete, and was gone through for this SDK.

And what the SDK's runs over videos do behind the model: no wait at the end, no error lost.
"""

from __future__ import annotations

import ast
import inspect
import queue
import re
import threading
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from serve.app import Florence2App
from serve.gui import Florence2Gui
from serve.platform.registry import RequestsManager
from serve.sdk_overrides import OVERRIDES, SDK_VERSION, PromptUploader

# isort: split
from supervisely.nn.inference import inference as sdk_inference
from supervisely.nn.inference import uploader as sdk_uploader
from supervisely.nn.inference.uploader import Uploader

ROOT = Path(__file__).parents[3]
SOURCES = {path: ast.parse(path.read_text("utf-8")) for path in (ROOT / "serve").rglob("*.py")}
LISTED = {name.rsplit(".", 1)[1] for override in OVERRIDES for name in override.names.split()}
SUBCLASSES = (Florence2App, Florence2Gui, RequestsManager)
# Private names of Python that are used: the frames of a stack, and an end without a clean-up.
PYTHONS = {"_getframe", "_exit"}
# Every class has them; they are not the SDK's behaviour.
PLAIN = {"__init__", "__module__", "__doc__", "__annotations__"}
# What the SDK asks every app to say about itself.
DECLARED = {"FRAMEWORK_NAME", "MODELS", "APP_OPTIONS", "INFERENCE_SETTINGS"}


def test_the_list_was_gone_through_for_this_version_of_the_sdk():
    pinned = re.search(r"^supervisely==(\S+)$", (ROOT / "requirements.txt").read_text(), re.M)
    assert {pinned[1], version("supervisely")} == {SDK_VERSION}, (
        "The version of supervisely has changed. Go through OVERRIDES in serve/sdk_overrides.py: "
        "look at each entry in the new version, take out what it no longer gets wrong, and then "
        "change SDK_VERSION there."
    )


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda override: override.names.split()[0])
def test_every_entry_says_why_and_until_when_and_has_a_test(override):
    assert override.shields_from.endswith(".")
    assert override.until
    path, name = override.test.split("::")
    tests = {
        node.name
        for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert name in tests


@pytest.mark.parametrize("kind", SUBCLASSES, ids=lambda kind: kind.__name__)
def test_every_method_that_overrides_one_of_the_sdk_is_listed(kind):
    sdks = {name for base in kind.__mro__[1:-1] for name in vars(base)}
    assert (vars(kind).keys() & sdks) - PLAIN - DECLARED - LISTED == set()


@pytest.mark.parametrize("kind", SUBCLASSES, ids=lambda kind: kind.__name__)
def test_every_private_attribute_that_is_shared_with_the_sdk_is_listed(kind):
    private = r"\.(_[a-z]\w*)"
    sources = map(inspect.getsource, kind.__mro__[1:-1])
    sdks = {name for source in sources for name in re.findall(f"self{private}", source)}
    ours = set(re.findall(private, inspect.getsource(inspect.getmodule(kind))))
    assert (ours & sdks) - LISTED == set()


def test_every_private_name_of_the_sdk_that_is_used_is_listed():
    used = set()
    for path, tree in SOURCES.items():
        ours = {
            getattr(node, "name", None) or getattr(node, "attr", None) or getattr(node, "id", None)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            or (isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store))
        }
        read = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and re.fullmatch(r"_[a-z]\w*", node.attr)
            and node.attr not in ours
        }
        used |= {f"{path.relative_to(ROOT)}: {name}" for name in read - LISTED - PYTHONS}
    assert used == set()


def test_everything_that_is_put_into_a_module_of_the_sdk_is_listed():
    put = set()
    for path, tree in SOURCES.items():
        modules = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            and (node.module or "").split(".")[0] in ("supervisely", "PIL")
            for alias in node.names
        }
        put |= {
            f"{path.relative_to(ROOT)}: {node.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id in modules
            and node.attr not in LISTED
        }
    assert put == set()


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
