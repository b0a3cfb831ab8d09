"""A recorder without a GPU: what it records is the work itself, done again at each replay."""

from __future__ import annotations

from contextlib import contextmanager


class ReplayingRecorder:
    """Counts what a GPU would see; ``refuse`` makes recording fail as an unsupported call does."""

    def __init__(self, refuse: bool = False):
        self.refuse = refuse
        self.events: list[str] = []
        self.num_alive = 0

    @contextmanager
    def aside(self):
        self.events.append("aside")
        yield

    def record(self, work):
        self.events.append("record")
        if self.refuse:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        self.num_alive += 1
        return _Replayed(self, work)

    def settle(self):
        self.events.append("settle")


class _Replayed:
    def __init__(self, recorder, work):
        self._recorder = recorder
        self._work = work

    def replay(self):
        self._recorder.events.append("replay")
        self._work()

    def reset(self):
        self._recorder.events.append("reset")
        self._recorder.num_alive -= 1
