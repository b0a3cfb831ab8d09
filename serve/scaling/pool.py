"""Workers of a cluster that answer for one run: a batch goes to all of them, side by side.

What one that ended had in hand goes to another. Ray is not known here, see ``cluster.py``.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from florence2.engine.ask import Ask
from florence2.engine.encoding import AnyImage
from florence2.errors import FlorenceError, GenerationCancelledError, RequestError
from florence2.records import Failure, Result
from serve.predict.predictor import Call, Predicted
from serve.settings import Settings

_LOOK_S: Final = 0.5
_MOST_FAILED_STARTS: Final = 5
# An image that ended so many workers while it was alone with them ends no further one.
_MOST_ENDED: Final = 2

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class ClusterError(FlorenceError):
    """The cluster ended a run."""

    code = "cluster"


class Worker(Protocol):
    """A process with the model. A future that raises says that the process ended.

    ``told`` comes once the model is loaded: what a manifest says of it. Errors come as values.
    """

    told: Future[Mapping[str, Any] | FlorenceError]

    def predict(
        self, images: Sequence[AnyImage], settings: Settings
    ) -> Future[list[Predicted | Failure] | FlorenceError]: ...

    def ask(self, asks: Sequence[Ask]) -> Future[list[Result | Failure] | FlorenceError]: ...


@dataclass(slots=True)
class _Part:
    """Images of a batch that go to one worker; ``places`` are theirs in the batch."""

    places: Sequence[int]
    num_ended: int = 0


class WorkerPool:
    """As many workers as ``count``, each started again when it ends. A batch waits for the one
    before it, as all workers are asked about it.

    Raises the FlorenceError that a worker gives, RequestError where two of them loaded different
    models, and ClusterError where none can be started.
    """

    def __init__(self, start: Callable[[], Worker], count: int) -> None:
        self.num_devices = count
        self._start = start
        self._starting = [start() for _ in range(count)]
        self._free: list[Worker] = []
        self._told: Mapping[str, Any] | None = None
        self._num_failed_starts = 0
        self._in_use = threading.Lock()

    def told(self, adapter: str | None = None) -> Mapping[str, Any]:
        """What a manifest says of the model, once one worker has it; all were started with the
        same ``adapter``."""
        while self._told is None:
            wait([one.told for one in self._starting], _LOOK_S, FIRST_COMPLETED)
            self._take_started()
        return self._told

    def predict(
        self, images: Sequence[Any], settings: Settings, call: Call
    ) -> list[Predicted | Failure]:
        """An outcome for every image, in order. GenerationCancelledError when told to stop."""
        with self._in_use:
            return self._answers(images, lambda one, part: one.predict(part, settings), call)

    def prepare(self, images: Sequence[Any], settings: Settings, call: Call) -> Sequence[Any]:
        """Workers open images themselves."""
        return images

    def ask(self, asks: Sequence[Ask], call: Call) -> list[Result | Failure]:
        """An answer to every question, in order."""
        with self._in_use:
            return self._answers(asks, lambda one, part: one.ask(part), call)

    def _answers(
        self,
        items: Sequence[Item],
        send: Callable[[Worker, Sequence[Item]], Future[list[Answer | Failure] | FlorenceError]],
        call: Call,
    ) -> list[Answer | Failure]:
        size = -(-len(items) // self.num_devices)
        waiting = deque(
            _Part(range(begin, min(begin + size, len(items))))
            for begin in range(0, len(items), size or 1)
        )
        found: dict[int, Answer | Failure] = {}
        in_hand: dict[Future[list[Answer | Failure] | FlorenceError], tuple[Worker, _Part]] = {}
        try:
            while waiting or in_hand:
                if call.should_stop is not None and call.should_stop():
                    raise GenerationCancelledError("The run was stopped.")
                while waiting and self._free:
                    worker, part = self._free.pop(), waiting.popleft()
                    in_hand[send(worker, [items[place] for place in part.places])] = worker, part
                awaited: list[Future[Any]] = [one.told for one in self._starting]
                awaited += in_hand
                wait(awaited, _LOOK_S, FIRST_COMPLETED)
                self._take_started()
                for done in [one for one in in_hand if one.done()]:
                    worker, part = in_hand.pop(done)
                    if done.exception() is not None:
                        self._starting.append(self._start())
                        waiting.extend(_after_end(part, found))
                        continue
                    self._free.append(worker)
                    answers = done.result()
                    if isinstance(answers, FlorenceError):
                        raise answers
                    found.update(zip(part.places, answers, strict=True))
        finally:
            # They are free once they are done with what nobody waits for any more.
            self._free += [worker for worker, _ in in_hand.values()]
        return [found[place] for place in range(len(items))]

    def _take_started(self) -> None:
        for one in [one for one in self._starting if one.told.done()]:
            self._starting.remove(one)
            if (error := one.told.exception()) is not None:
                self._num_failed_starts += 1
                if self._num_failed_starts >= _MOST_FAILED_STARTS:
                    raise ClusterError(
                        f"{_MOST_FAILED_STARTS} workers ended one after the other while they "
                        f"loaded the model ({type(error).__name__}: {str(error)[:200]}); look at "
                        "Ray's own logs, and go on with the same command."
                    )
                self._starting.append(self._start())
                continue
            told = one.told.result()
            if isinstance(told, FlorenceError):
                raise told
            self._told = told if self._told is None else self._told
            if told != self._told:
                raise RequestError(
                    f"All machines label with one model, and one has {dict(told)} where another "
                    f"has {dict(self._told)}; put the same files there."
                )
            self._num_failed_starts = 0
            self._free.append(one)


def _after_end(part: _Part, found: dict[int, Any]) -> Sequence[_Part]:
    """What is left of a part with which a worker ended: images alone, but for one that ended
    several."""
    if len(part.places) > 1:
        return [_Part([place]) for place in part.places]
    part.num_ended += 1
    if part.num_ended < _MOST_ENDED:
        return [part]
    found[part.places[0]] = Failure(
        "process_ended",
        "Several processes ended while they worked on this image; look at the image, or give the "
        "machines more memory, and start the command again.",
    )
    return []
