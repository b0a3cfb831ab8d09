"""The real app in a process of its own, the way ``florence2 serve`` starts it.

A process, because the SDK's application, server and states exist once per process. Where the start
is none of what is tested it is forked from one that has imported everything.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import forked_processes
import requests
from forked_processes import ForkedProcess

ROOT = Path(__file__).parents[1]
PATIENCE_S = 120.0
SDK_ENVIRONMENT = {
    "SUPERVISELY_PUBLIC_API_RETRIES": "1",
    "SUPERVISELY_PUBLIC_API_RETRY_SLEEP_SEC": "0",
    "SUPERVISELY_SKIP_HTTPS_USER_HELPER_CHECK": "true",
}
# A port that nobody listens on.
OUT_OF_REACH = "http://127.0.0.1:9"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve_command(port: int, device: str = "cpu") -> list[str]:
    """The local app with the demo checkpoint."""
    options = ["--model", "demo", "--device", device, "--port", str(port)]
    return [sys.executable, "-m", "serve.cli.main", "serve", *options]


def sdk_deploy_command(port: int) -> list[str]:
    """The SDK's own command line; it has no port, the app reads one from the environment."""
    return [sys.executable, "-m", "serve.main", "deploy", "--model", "demo", "--device", "cpu"]


def page_command(port: int) -> list[str]:
    """What the platform starts: the page, with no model until somebody presses Serve."""
    options = ["--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]
    return [sys.executable, "-m", "uvicorn", "serve.main:model.app", *options]


class AppServer:
    """One app, started by a command with ``environment``; its log is ``log_path``.

    With ``is_forked`` it starts in a process that has imported what it imports.
    """

    def __init__(
        self,
        folder: Path,
        env: Mapping[str, str],
        command: Callable[[int], list[str]] = serve_command,
        *,
        is_forked: bool = False,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = folder / "app.log"
        self.command = command(self.port)
        own = {"SLY_APP_DATA_DIR": str(folder), "FLORENCE_PORT": str(self.port)}
        self.environment = {**clean_environment(), **own, **env}
        self._folder = folder
        self._is_forked = is_forked
        self._process: subprocess.Popen[bytes] | ForkedProcess | None = None

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def start(self, *, until: str = "/is_ready") -> None:
        """Returns when the path answers 200; raises with the log when the app ends before that."""
        self.launch()
        try:
            self._wait(until)
        except BaseException:
            self.stop()
            raise

    def launch(self) -> None:
        """Starts it, and waits for nothing."""
        with self.log_path.open("wb") as log:
            start = forked_processes.start if self._is_forked else subprocess.Popen
            self._process = start(
                self.command, stdout=log, stderr=log, env=self.environment, cwd=self._folder
            )

    def _wait(self, until: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not self._answers(until):
            if not self.is_alive():
                raise RuntimeError(f"The app ended before it was ready:\n{self.log}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"The app was not ready in {PATIENCE_S:.0f} s:\n{self.log}")
            time.sleep(0.1)

    def _answers(self, path: str) -> bool:
        try:
            return requests.get(self.url + path, timeout=5).status_code == 200
        except (requests.ConnectionError, requests.Timeout):
            return False

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError("The app was not started.")
        return self._process.pid

    def ended(self, limit_s: float) -> int:
        """Its exit status, once it has ended by itself; raises where it has not in time."""
        if self._process is None:
            raise RuntimeError("The app was not started.")
        return self._process.wait(limit_s)

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """Without a moment for a last word."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def clean_environment() -> dict[str, str]:
    """This environment without what would tell the app about another platform or proxy."""
    dropped = ("SERVER_ADDRESS", "API_TOKEN", "TASK_ID", "TEAM_ID", "WORKSPACE_ID", "ENV")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    source = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    return {**kept, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
