"""One run of the model over asks of one priority, and over those that join it while it lasts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from florence2.encoding import Coming
from florence2.engine.answering import AskRun, More, Outcome, Settle
from florence2.engine.ask import Ask
from florence2.engine.engine import Engine
from florence2.engine.tickets import Priority
from florence2.errors import FlorenceError, as_value
from florence2.scheduler_errors import InternalError
from florence2.scheduler_queue import Piece
from florence2.scheduler_report import Answered

logger = logging.getLogger(__name__)

Deliver = Callable[[Priority, Sequence[Answered], float, int], None]
"""Takes what was answered since the pass before, the seconds since then, the asks in hand then."""

MorePieces = Callable[[Priority, int, int], list[Piece]]
"""Gives up to so many further pieces of a priority, when so many are in hand."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Whose turn it was, and how many requests began together."""

    priority: Priority
    requests: int


class Run:
    """Answers pieces; delivers what is known before every pass, and at the end.

    It holds no piece that is delivered, because a run may last as long as requests come. An error
    that is nobody's fault in particular is that of the asks in hand only if each of them meets it
    alone too.
    """

    def __init__(
        self,
        engine: Engine,
        pieces: list[Piece],
        deliver: Deliver,
        coming: Coming,
        between_passes: Callable[[], None] | None = None,
        more: MorePieces | None = None,
    ) -> None:
        self._engine = engine
        self._deliver = deliver
        self._between_passes = between_passes
        self._more = more
        self._coming = coming
        self._priority = pieces[0].ticket.priority
        self._first = pieces
        self._count = 0
        self._open: dict[int, tuple[Piece, float]] = {}
        self._answered: list[Answered] = []
        self._mark = time.monotonic()

    def answer(self) -> None:
        """Returns once every piece is delivered."""
        try:
            self._run_of(self._settle, self._join).run()
        except FlorenceError as error:
            self._settle_open(as_value(error))
        except Exception:
            logger.exception("A batch of %d prompts failed", len(self._open))
            self._answer_one_by_one()
        self._flush()

    def _answer_one_by_one(self) -> None:
        if len(self._open) == 1:
            self._settle_open(InternalError())
        for number, (piece, _) in list(self._open.items()):
            try:
                self._run_of(partial(self._settle_alone, number), None).run([piece.ask])
            except FlorenceError as error:
                self._settle(number, as_value(error))
            except Exception:
                logger.exception("A prompt failed alone")
                self._settle(number, InternalError())

    def _run_of(self, settle: Settle, more: More | None) -> AskRun:
        return AskRun(self._engine, settle, self._before_pass, more, self._coming)

    def _join(self, room: int) -> list[Ask]:
        pieces, self._first = self._first, []
        if not pieces and self._more is not None:
            pieces = self._more(self._priority, room, len(self._open))
        now = time.monotonic()
        for number, piece in enumerate(pieces, start=self._count):
            self._open[number] = piece, now - piece.ticket.arrived
        self._count += len(pieces)
        return [piece.ask for piece in pieces]

    def _settle(self, number: int, outcome: Outcome) -> None:
        piece, waited_s = self._open.pop(number)
        self._answered.append(Answered(piece, outcome, waited_s))

    def _settle_alone(self, number: int, _: int, outcome: Outcome) -> None:
        self._settle(number, outcome)

    def _settle_open(self, error: FlorenceError) -> None:
        for number in list(self._open):
            self._settle(number, error)

    def _before_pass(self) -> None:
        self._flush()
        if self._between_passes is not None:
            began = time.monotonic()
            self._between_passes()
            self._mark += time.monotonic() - began

    def _flush(self) -> None:
        answered, self._answered = self._answered, []
        if answered:
            now = time.monotonic()
            seconds, self._mark = now - self._mark, now
            together = len(answered) + len(self._open)
            self._deliver(self._priority, answered, seconds, together)
