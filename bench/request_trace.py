"""Which files of a package one request passes, and how often a thread goes from one to another.

python -P bench/request_trace.py run|post      (-P: this folder's serve.py would hide the app)

Prints a line of JSON: the files, and the changes of file. ``bench/house.py`` calls it.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import socket
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Final

import requests
from PIL import Image

ROOT: Final = Path(__file__).resolve().parents[1]
IMAGE: Final = ROOT / "demo" / "images" / "scene_bike.png"
TASK: Final = "<OD>"
MEASURED: Final = 3
START_S: Final = 120.0
# What an answered request still does behind its answer.
SETTLE_S: Final = 0.2


class FileTrace:
    """The files below ``folder`` that are passed while it is on; a profile function.

    ``files`` are those whose Python functions, methods or comprehensions are called. ``changes``
    counts, within each thread, how often the file being run differs from the one before: a call
    enters the called function's file, a return comes back to its caller's, and files outside the
    folder are passed over. So a helper of another file, called and left, makes two.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = f"{folder}{os.sep}"
        self._is_on = False
        self.files: set[str] = set()
        self.changes = 0
        self._last: dict[int, str] = {}

    def watch_threads(self) -> None:
        """Sees this thread, and those that start from now on."""
        threading.setprofile(self)
        sys.setprofile(self)

    def start(self) -> None:
        self.files, self.changes, self._last = set(), 0, {}
        self._is_on = True

    def stop(self) -> None:
        self._is_on = False

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if not self._is_on or event not in ("call", "return"):
            return
        now = frame if event == "call" else frame.f_back
        if now is None or not (file := now.f_code.co_filename).startswith(self._folder):
            return
        if event == "call":
            self.files.add(file.removeprefix(self._folder))
        thread = threading.get_ident()
        self.changes += self._last.get(thread, file) != file
        self._last[thread] = file


def measure(trace: FileTrace, ask: Callable[[int], None]) -> None:
    """Asks with images of several numbers, the first unseen, and prints the least that was passed.

    The first loads and makes what later requests find. The least, because what a timer does
    beside a request can only add to it.
    """
    ask(0)
    passed = []
    for number in range(1, 1 + MEASURED):
        trace.start()
        ask(number)
        trace.stop()
        passed.append((sorted(trace.files), trace.changes))
    files, changes = min(passed, key=lambda one: (len(one[0]), one[1]))
    if not files:
        raise SystemExit(f"No file of {ROOT} was passed; another installation answered.")
    print("\n" + json.dumps([files, changes]), flush=True)


def fresh_image(number: int) -> bytes:
    """A PNG file of the demo image that no cache has seen: a square of it is the number's."""
    with Image.open(IMAGE) as opened:
        image = opened.convert("RGB")
    # A pixel would be lost where the image is made as small as the network's.
    image.paste((60 * number, 0, 0), (0, 0, 64, 64))
    target = io.BytesIO()
    image.save(target, "PNG")
    return target.getvalue()


def trace_run() -> None:
    """``run(path, "<OD>")`` of two tokens between ``<s>`` and the forced ``</s>``: four ids."""
    import torch

    from florence2 import Florence2

    torch.set_num_threads(1)
    trace = FileTrace(ROOT / "src" / "florence2")
    trace.watch_threads()
    model = Florence2.load("demo", device="cpu", precision="fp32")

    with tempfile.TemporaryDirectory() as folder:

        def ask(number: int) -> None:
            path = Path(folder, f"{number}.png")
            path.write_bytes(fresh_image(number))
            model.run(TASK, path, max_new_tokens=4)

        measure(trace, ask)


def trace_post() -> None:
    """``POST /inference_image`` of one file to ``florence2 serve``, until the app is at rest."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    trace = FileTrace(ROOT / "serve")
    # The client is no part of the app: it starts before the app's threads are watched.
    threading.Thread(target=_ask_and_end, args=(trace, f"http://127.0.0.1:{port}")).start()
    trace.watch_threads()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    command = importlib.metadata.EntryPoint("florence2", project["scripts"]["florence2"], "").load()
    options = {"model": "demo", "device": "cpu", "precision": "fp32", "port": port}
    command(["serve", *(f"--{name}={value}" for name, value in options.items())])


def _ask_and_end(trace: FileTrace, url: str) -> None:
    def ask(number: int) -> None:
        answer = requests.post(
            f"{url}/inference_image",
            files={"files": ("image.png", fresh_image(number), "image/png")},
            data={"settings": json.dumps({"settings": {"task_prompt": TASK}})},
        )
        answer.raise_for_status()
        time.sleep(SETTLE_S)

    code = 1
    try:
        _wait_until_ready(f"{url}/is_ready")
        measure(trace, ask)
        code = 0
    except (requests.RequestException, SystemExit) as error:
        print(error, file=sys.stderr, flush=True)
    finally:
        # The server has the main thread, and nothing of it is needed any more.
        os._exit(code)


def _wait_until_ready(url: str) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        try:
            requests.get(url, timeout=START_S).raise_for_status()
        except requests.RequestException:
            time.sleep(0.1)
        else:
            return
    raise SystemExit(f"The app was not ready in {START_S:.0f} s.")


if __name__ == "__main__":
    {"run": trace_run, "post": trace_post}[sys.argv[1]]()
