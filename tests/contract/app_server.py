"""The real app in a process of its own, the way ``florence2 serve`` starts it.

A process, because the SDK's application, server and states exist once per process.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import requests

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class AppServer:
    """One app; its log is ``log_path``. ``options`` are added to the command."""

    def __init__(self, folder: Path, env: Mapping[str, str], options: Sequence[str] = ()) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = folder / "app.log"
        command = [sys.executable, "-m", "serve.cli", "serve", "--model", "demo"]
        self._command = [*command, "--device", "cpu", "--port", str(self.port), *options]
        self._env = {**_clean_env(), "SLY_APP_DATA_DIR": str(folder), **env}
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def start(self, *, until: str = "/is_ready") -> None:
        """Returns when the path answers 200; raises with the log when the app ends before that."""
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, env=self._env, cwd=self._folder
            )
        deadline = time.monotonic() + PATIENCE_S
        while not self._answers(until):
            if self._process.poll() is not None:
                raise RuntimeError(f"The app ended with {self._process.returncode}:\n{self.log}")
            if time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"The app was not ready in {PATIENCE_S:.0f} s:\n{self.log}")
            time.sleep(0.1)

    def _answers(self, path: str) -> bool:
        try:
            return requests.get(self.url + path, timeout=5).status_code == 200
        except requests.ConnectionError:
            return False

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _clean_env() -> dict[str, str]:
    """This environment without what would tell the app about another platform or proxy."""
    dropped = ("SERVER_ADDRESS", "API_TOKEN", "TASK_ID", "TEAM_ID", "WORKSPACE_ID", "ENV")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    source = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    return {**kept, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
