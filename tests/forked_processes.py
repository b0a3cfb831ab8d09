"""Commands of Python in processes of their own, forked from one that has imported the app.

The imports take seconds of a core each time, and are none of what most tests are about; those of
the start itself start Python. Run as a program, with the number of a socket, it is the process that
the others are forked from; ``start`` and ``run`` speak to it.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

MESSAGE_BYTES = 1_000_000


def start(
    command: Sequence[str], env: Mapping[str, str], cwd: Path, stdout: BinaryIO, stderr: BinaryIO
) -> ForkedProcess:
    """What ``[sys.executable, "-m" or "-c" or a file, ...]`` would start."""
    return _template().start(command, env, cwd, (stdout.fileno(), stderr.fileno()))


def run(
    command: Sequence[str], env: Mapping[str, str], cwd: Path, timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """The same, once it has ended; raises where it has not in time."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = start(command, env, cwd, stdout, stderr)
        try:
            status = process.wait(timeout_s)
        finally:
            process.kill()
        said = []
        for stream in (stdout, stderr):
            stream.seek(0)
            said.append(stream.read().decode())
    return subprocess.CompletedProcess(command, status, *said)


class ForkedProcess:
    """As ``subprocess.Popen`` where the names are equal."""

    def __init__(self, template: _Template, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._template = template
        # Until its status is asked for it is there, if only as one that has ended.
        self._descriptor = os.pidfd_open(pid)

    def poll(self) -> int | None:
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        status = self._ended(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return status

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)
        self.wait()

    def _send(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._descriptor], [], [], timeout)[0]:
            os.close(self._descriptor)
            self.returncode = self._template.ask({"ended": self.pid})
        return self.returncode


class _Template:
    """The process that the others are forked from."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        root = Path(__file__).parents[1]
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "src")])},
        )
        theirs.close()
        atexit.register(self._close)

    def start(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        cwd: Path,
        descriptors: tuple[int, int],
    ) -> ForkedProcess:
        order = {"words": [*command[1:]], "env": dict(env), "cwd": str(cwd)}
        return ForkedProcess(self, self.ask(order, descriptors))

    def ask(self, order: Mapping[str, object], descriptors: Sequence[int] = ()) -> int:
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(order).encode()], descriptors)
            return int(self._socket.recv(MESSAGE_BYTES))

    def _close(self) -> None:
        self._socket.close()
        self._process.wait(30)


@functools.cache
def _template() -> _Template:
    return _Template()


def _serve(connection: socket.socket) -> list[str]:
    """The words of a command, in each process that was forked for one."""
    while True:
        message, descriptors, *_ = socket.recv_fds(connection, MESSAGE_BYTES, 2)
        if not message:
            # The tests are done, or are gone without a word.
            sys.exit()
        order = json.loads(message)
        if "ended" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["ended"], 0)[1])
        else:
            answer = os.fork()
            if not answer:
                connection.close()
                return _prepared(order, descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
        connection.send(str(answer).encode())


def _prepared(order: Mapping[str, object], descriptors: Sequence[int]) -> list[str]:
    for number, descriptor in enumerate(descriptors, 1):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    sys.path[0] = order["cwd"]
    return order["words"]


def _import_the_app() -> None:
    # Where it is installed pandas imports it, and it starts threads at once.
    sys.modules["pyarrow"] = None
    for name in ("serve.app", "serve.cli.main", "uvicorn.main"):
        importlib.import_module(name)
    del sys.modules["pyarrow"]
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("Only a process without threads can be forked.")
    gc.collect()
    gc.freeze()


def _become(words: Sequence[str]) -> None:
    """What Python does with the words that its command line has after it."""
    if words[0] == "-m":
        sys.argv = ["-m", *words[2:]]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})
    else:
        sys.argv = [*words]
        runpy.run_path(words[0], run_name="__main__")


def _main() -> None:
    _import_the_app()
    _become(_serve(socket.socket(fileno=int(sys.argv[1]))))


if __name__ == "__main__":
    _main()
