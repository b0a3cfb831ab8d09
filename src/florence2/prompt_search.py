"""Prompts of one kind through the decode loop: joining, giving up, memory, results."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol

from florence2.engine.feature_cache import EncodedImage
from florence2.errors import FlorenceError
from florence2.generation.decode import DecodeLoop, Started
from florence2.generation.settings import check_settings
from florence2.memory import out_of_memory
from florence2.records import Answer, GenerationSettings, Result, Timings
from florence2.space import Session
from florence2.stopping import BetweenPasses, Stop
from florence2.tasks import Task

if TYPE_CHECKING:
    from florence2.engine.engine import Engine

logger = logging.getLogger(__name__)

_COMPANY: Final = 4
"""On a GPU prompts join a running batch once a fourth of its rows is free, so several at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One validated prompt for one encoded image, ready to be decoded."""

    task: Task
    image: EncodedImage
    prompt_ids: tuple[int, ...]
    settings: GenerationSettings
    max_new_tokens: int
    stop: Stop | None = None


class PromptFeed(Protocol):
    """Where the engine takes prompts from, and where their results go."""

    def next_settings(self) -> GenerationSettings | None:
        """The search settings of the prompts whose turn it is; None when there are no more."""

    def take(self, room: int, settings: GenerationSettings) -> Sequence[Prompt]:
        """Up to ``room`` prompts with these settings; none when others' turn has come."""

    def settle(self, prompt: Prompt, outcome: Result | FlorenceError) -> None:
        """Takes a prompt's result, or why it has none. Called once for every prompt taken."""


class PromptSearch:
    """Answers a feed's prompts of one kind of settings until it gives no more of them.

    Running out of memory starts over, with half as many prompts at a time, what was under way;
    one that does not fit alone fails alone. The engine's limit is lowered to what fitted then,
    unless there was one that did not fit alone: the others may have been short of its memory only.
    A search between two passes of another one lowers nothing: it was short of that one's memory.
    What the feed, a ``Stop`` or ``between_passes`` raises comes through, lack of memory included.
    """

    def __init__(
        self,
        engine: Engine,
        feed: PromptFeed,
        settings: GenerationSettings,
        between_passes: BetweenPasses | None,
    ) -> None:
        check_settings(settings)
        self._engine = engine
        self._feed = feed
        self._settings = settings
        self._between_passes = between_passes
        self._limit = engine.prompt_limit
        self._is_within = self._limit.num_searches > 0
        self._room = self._limit.now
        self._is_retry = False
        self._has_misfit = False
        self._num_settled = 0
        self._is_full = False
        self._held: int | None = None
        self._callers_error: Exception | None = None
        self._in_hand: dict[Prompt, tuple[float, float]] = {}
        self._again: list[Prompt] = []
        self._is_crowded = False

    def run(self) -> None:
        """Returns once every prompt taken is settled."""
        self._limit.num_searches += 1
        try:
            while not self._runs_to_its_end():
                # Outside any handler: a traceback would keep the failed batch's tensors alive.
                self._engine.runtime.free_memory()
                self._start_over()
        finally:
            self._limit.num_searches -= 1
        if self._is_retry and not self._has_misfit:
            self._lower(self._room)

    def _runs_to_its_end(self) -> bool:
        runtime = self._engine.runtime
        loop = DecodeLoop(
            self,
            self._settings,
            runtime.space(self._settings, self._engine.nearby),
            max_rows=self._room,
            least_room=self._least_room(),
            nearby=self._engine.nearby,
        )
        try:
            loop.run()
        except (RuntimeError, MemoryError) as error:
            is_ours = error is not self._callers_error and bool(self._in_hand)
            if not is_ours or not runtime.is_out_of_memory(error):
                raise
            logger.warning(
                "%d prompt(s) did not fit into the memory of %s", len(self._in_hand), runtime.device
            )
            return False
        return True

    def _lower(self, size: int) -> None:
        if not self._is_within:
            self._limit.lower(size)

    @contextmanager
    def _callers(self) -> Iterator[None]:
        """Within it the callers' code runs, whose errors are not the device's."""
        try:
            yield
        except Exception as error:
            self._callers_error = error
            raise

    def _least_room(self) -> int:
        """Free rows that are worth a pass of the tower and the encoder beside a running batch."""
        company = max(1, self._room // _COMPANY)
        # A CPU gains from company only as far as a batch of images is faster than one by one.
        is_gpu = not self._engine.runtime.device.startswith("cpu")
        return company if is_gpu else max(1, min(company, self._engine.image_batch // 2))

    def _start_over(self) -> None:
        self._held = None
        if len(self._in_hand) == 1:
            [alone] = self._in_hand
            self._has_misfit = True
            self.settle(alone, out_of_memory(self._engine.runtime.device))
            return
        self._again = [*self._in_hand, *self._again]
        self._room = self._limit.smaller(len(self._in_hand))
        self._is_retry = True
        self._in_hand.clear()

    def given_up(self) -> Mapping[Prompt, FlorenceError]:
        """The prompts in hand that nobody waits for any longer."""
        with self._callers():
            if self._between_passes is not None:
                self._between_passes()
            reasons = {prompt: _reason(prompt) for prompt in self._in_hand}
        return {prompt: reason for prompt, reason in reasons.items() if reason is not None}

    def start(self, room: int) -> Started[Prompt] | None:
        """A session with the next prompts of the feed."""
        self._is_crowded = self._is_crowded and bool(self._in_hand)
        prompts = [] if self._is_crowded else self._next(min(room, self._pass_size()))
        if not prompts:
            return None
        began = time.perf_counter()
        limits = [prompt.max_new_tokens for prompt in prompts]
        session = self._session_of(prompts, max(limits))
        if session is None:
            # Beside those in hand there is no room: once they are done there may be.
            self._engine.runtime.free_memory()
            self._again = prompts + self._again
            self._is_crowded = True
            together = len(self._in_hand) + len(prompts)
            self._held = max(len(self._in_hand), self._limit.smaller(together))
            return None
        if self._held is not None:
            # By themselves they fit, so it was their number.
            self._lower(self._held)
            self._held = None
        now = time.perf_counter()
        self._in_hand |= dict.fromkeys(prompts, (now - began, now))
        self._is_full = self._is_full or len(self._in_hand) >= self._room
        return Started(prompts, session, limits)

    def _pass_size(self) -> int:
        """Prompts that may be encoded at a time, however many rows are free."""
        is_awaited = self._between_passes is not None
        if is_awaited:
            self._limit.catch_up()
        return self._limit.pass_size(is_awaited=is_awaited)

    def _session_of(self, prompts: list[Prompt], max_new_tokens: int) -> Session | None:
        runtime, is_alone = self._engine.runtime, not self._in_hand
        if is_alone:
            self._in_hand |= dict.fromkeys(prompts, (0.0, 0.0))
        try:
            start = runtime.mark()
            session = runtime.start(
                [prompt.image.features for prompt in prompts],
                [prompt.prompt_ids for prompt in prompts],
                self._settings.num_beams,
                max_new_tokens,
            )
            self._limit.begun(len(prompts), start, runtime.mark())
            return session
        except (RuntimeError, MemoryError) as error:
            if is_alone or not runtime.is_out_of_memory(error):
                raise
        return None

    def settle(self, item: Prompt, answer: Answer | FlorenceError) -> None:
        """Hands on the result of a prompt in hand."""
        prompt_s, began = self._in_hand.pop(item)
        if isinstance(answer, FlorenceError):
            with self._callers():
                self._feed.settle(item, answer)
            return
        self._note_fit()
        timings = Timings(
            vision=item.image.vision_s, prompt=prompt_s, decode=time.perf_counter() - began
        )
        with self._callers():
            self._feed.settle(item, replace(self._engine.result(item, answer), timings_s=timings))

    def _note_fit(self) -> None:
        """As many answers as there are rows, once all of these were in use, are a batch."""
        if self._is_full and not self._is_retry:
            self._num_settled += 1
            if self._num_settled >= self._room:
                self._limit.fitted(self._room)
                self._num_settled, self._is_full = 0, False

    def _next(self, room: int) -> list[Prompt]:
        prompts: list[Prompt] = []
        while len(prompts) < room:
            missing = room - len(prompts)
            if self._again:
                taken, self._again = self._again[:missing], self._again[missing:]
            elif self._is_retry or self._room != self._limit.now:
                # The next search begins with the limit as it is then.
                break
            else:
                with self._callers():
                    taken = list(self._feed.take(missing, self._settings))
            if not taken:
                break
            prompts += self._wanted(taken)
        return prompts

    def _wanted(self, taken: list[Prompt]) -> list[Prompt]:
        """Those of ``taken`` that somebody waits for; the others are settled."""
        wanted: list[Prompt] = []
        with self._callers():
            for prompt in taken:
                reason = _reason(prompt)
                if reason is None:
                    wanted.append(prompt)
                else:
                    self._feed.settle(prompt, reason)
        return wanted


def _reason(prompt: Prompt) -> FlorenceError | None:
    return None if prompt.stop is None else prompt.stop()


class PromptList:
    """A feed of prompts that are all there from the start, those of like settings together."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._prompts = prompts
        self._waiting: dict[GenerationSettings, list[Prompt]] = {}
        self._outcomes: dict[Prompt, Result | FlorenceError] = {}
        for prompt in prompts:
            self._waiting.setdefault(prompt.settings, []).append(prompt)

    def next_settings(self) -> GenerationSettings | None:
        """In the order of their first prompts."""
        return next(iter(self._waiting), None)

    def take(self, room: int, settings: GenerationSettings) -> list[Prompt]:
        """The next prompts of these settings, in order."""
        waiting = self._waiting.pop(settings, [])
        if waiting[room:]:
            self._waiting = {settings: waiting[room:], **self._waiting}
        return waiting[:room]

    def settle(self, prompt: Prompt, outcome: Result | FlorenceError) -> None:
        """Notes a result."""
        self._outcomes[prompt] = outcome

    def outcomes(self) -> list[Result | FlorenceError]:
        """One per prompt, in order."""
        return [self._outcomes[prompt] for prompt in self._prompts]
