"""``florence2`` in processes of its own with a scripted, slow model.

Each image that the model is asked about leaves its colour in a log, so that a test can tell from
outside what was looked at, and how often. A process is forked from one that has imported
everything: the imports are seconds each, and none of what is tested here. Run as a program, with
the number of a socket, it is that one; ``Commands`` speaks to it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO


class Commands:
    """Starts command lines, each in a process of its own."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._socket = ours
        self._lines = ours.makefile()
        command = [sys.executable, __file__, str(theirs.fileno())]
        self._server = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()

    def start(
        self, words: Sequence[str], seconds: float, log: Path, max_file_bytes: int | None = None
    ) -> Command:
        """``seconds`` is what the model takes for an image."""
        reading, writing = os.pipe()
        order = {"words": words, "seconds": seconds, "log": str(log), "limit": max_file_bytes}
        socket.send_fds(self._socket, [f"{json.dumps(order)}\n".encode()], [writing])
        os.close(writing)
        return Command(self, json.loads(self._lines.readline()), os.fdopen(reading))

    def wait(self, pid: int, *, blocks: bool) -> tuple[int, int] | None:
        """The exit code, negative for a signal, and the peak memory in KiB, once it ended."""
        self._socket.sendall(f"{json.dumps({'wait': pid, 'blocks': blocks})}\n".encode())
        ended = json.loads(self._lines.readline())
        return None if ended is None else tuple(ended)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._server.wait(timeout=30)


class Command:
    """A process that runs one command line; as ``subprocess.Popen`` where the names are equal."""

    def __init__(self, commands: Commands, pid: int, stderr: TextIO) -> None:
        self._commands = commands
        self.pid = pid
        self.stderr = stderr
        self.returncode: int | None = None
        self.peak_kib = 0

    def poll(self) -> int | None:
        self._note(self._commands.wait(self.pid, blocks=False) if self.returncode is None else None)
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self._note(self._commands.wait(self.pid, blocks=True))
        return self.returncode

    def finish(self) -> tuple[int, str]:
        """Its exit code, and what it said, once it ended."""
        said = self.stderr.read()
        return self.wait(), said

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills it, and waits until it is gone."""
        self.send_signal(signal.SIGKILL)
        self.finish()

    def _note(self, ended: tuple[int, int] | None) -> None:
        if ended is not None:
            self.returncode, self.peak_kib = ended


def serve(connection: socket.socket) -> None:
    """Starts and waits for processes as it is told, until the other side is gone."""
    # Where it is installed pandas imports it, and it starts threads at once.
    sys.modules["pyarrow"] = None
    import florence2.api  # noqa: F401 - what every process would import
    import serve.labeling.run  # noqa: F401
    from serve.cli.main import main  # noqa: F401

    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("Only a process without threads can be forked.")
    while True:
        message, descriptors, *_ = socket.recv_fds(connection, 65_536, 1)
        if not message:
            return
        order = json.loads(message)
        if "wait" in order:
            flags = 0 if order["blocks"] else os.WNOHANG
            pid, status, usage = os.wait4(order["wait"], flags)
            answer = [os.waitstatus_to_exitcode(status), usage.ru_maxrss] if pid else None
        else:
            answer = _forked(order, descriptors[0], connection)
        connection.sendall(f"{json.dumps(answer)}\n".encode())


def _forked(order: dict[str, object], stderr: int, connection: socket.socket) -> int:
    pid = os.fork()
    if pid:
        os.close(stderr)
        return pid
    connection.close()
    os.dup2(stderr, 2)
    os.close(stderr)
    if order["limit"] is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"],) * 2)
    code = 70
    try:
        _run(order["words"], order["seconds"], order["log"])
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(words: list[str], seconds: float, path: str) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from label_fakes import FakeModel, color_in, result

    from florence2.records import Box
    from serve.cli.main import main as florence2

    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def answer(ask):
        red, green, _ = color_in(ask)
        number = red + 256 * green
        os.write(log, f"{number}\n".encode())
        boxes = () if number % 3 == 0 else (Box((2.0, 2.0, 9.0, 9.0), f"thing {number % 7}", 0.5),)
        return result(ask.task, *boxes, size=ask.image.size_wh)

    FakeModel(answer, seconds).put_in(_Patch)
    florence2(words)


class _Patch:
    """For this process, for good."""

    setattr = staticmethod(setattr)


if __name__ == "__main__":
    # A process whose parent is gone without a word gets nothing more to do.
    serve(socket.socket(fileno=int(sys.argv[1])))
