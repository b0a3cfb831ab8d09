"""Asks to results: images are encoded once, prompts of all asks share the rows of a batch."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from florence2.engine.ask import Ask, Cascade, Outcome, Prompt
from florence2.engine.engine import Asker, Encoded, Engine, NamedModel, out_of_memory
from florence2.errors import FlorenceError, RequestError, as_value
from florence2.generation.decode import DecodeLoop, EncodedItems, Session
from florence2.records import Answer, GenerationSettings, Timings

logger = logging.getLogger(__name__)

_JOIN_SHARE: Final = 4
"""On a GPU prompts join a running batch once a fourth of its rows is free, so several at once."""


def answer_all(engine: Engine, asks: Sequence[Ask]) -> list[Outcome]:
    """One result or error per ask, in order; one ask's error does not touch the others."""
    asker = _List(asks)
    answer(engine, asker)
    return [asker.outcomes[number] for number in range(len(asks))]


def answer(engine: Engine, asker: Asker[Any]) -> None:
    """Answers what the asker asks until nothing more comes and everything is settled.

    A row of the batch whose answer is complete is given to the next prompt of the same adapter
    with the same search settings.
    """
    prompts = PromptQueue(engine, asker)
    while (kind := prompts.next_kind()) is not None:
        with engine.in_use():
            PromptSearch(engine, prompts, asker, kind).run()


class _List(Asker[int]):
    """One who has a list of asks, and waits for all of them."""

    def __init__(self, asks: Sequence[Ask]) -> None:
        self._asks = asks
        self.outcomes: dict[int, Outcome] = {}

    def next_asks(self, room: int) -> Sequence[tuple[int, Ask]]:
        asks, self._asks = self._asks, ()
        return list(enumerate(asks))

    def settle(self, key: int, outcome: Outcome) -> None:
        self.outcomes[key] = outcome


class SearchKind(NamedTuple):
    """What prompts have in common that can share a batch."""

    model: NamedModel
    settings: GenerationSettings


class PromptQueue:
    """The prompts of what an asker asks: images are encoded as asks come, outcomes handed back."""

    def __init__(self, engine: Engine, asker: Asker[Any]) -> None:
        self._engine = engine
        self._asker = asker
        self._ready: deque[Prompt] = deque()

    def next_kind(self) -> SearchKind | None:
        """That of the prompt that waits longest; None when no more come."""
        while not self._ready and self._add_asks(self._engine.prompt_batch):
            pass
        return self._kind_of(self._ready[0]) if self._ready else None

    def take(self, room: int, kind: SearchKind) -> list[Prompt]:
        """The next prompts of this kind, and further asks' if no other prompt waits."""
        taken = self._take_ready(room, kind)
        while len(taken) < room and not self._ready and self._add_asks(room - len(taken)):
            taken += self._take_ready(room - len(taken), kind)
        return taken

    def settle(self, prompt: Prompt, outcome: Outcome) -> None:
        """A prompt's outcome, with which its ask's next step may begin."""
        if prompt.cascade.settle(prompt, outcome):
            self._go_on(prompt.cascade)

    def _add_asks(self, room: int) -> bool:
        asks = self._asker.next_asks(room)
        encoded = self._encoded([ask for _, ask in asks])
        begun: list[Cascade] = []
        for place, (key, ask) in enumerate(asks):
            known = place in encoded
            found = self._begun(key, ask, encoded[place]) if known else _no_ask(ask)
            if isinstance(found, Cascade):
                begun.append(found)
            else:
                self._asker.settle(key, found)
        for cascade in begun:
            self._go_on(cascade)
        return bool(asks)

    def _encoded(self, asks: Sequence[Ask]) -> dict[int, Encoded]:
        """The image of each ask by its place, from the tower of its adapter."""
        places: dict[NamedModel, list[int]] = {}
        encoded: dict[int, Encoded] = {}
        for place, ask in enumerate(asks):
            # A list may hold anything: what is no Ask has no image to encode.
            if isinstance(ask, Ask):
                try:
                    model = self._engine.model_of(ask.adapter)
                except RequestError as error:
                    encoded[place] = as_value(error)
                else:
                    places.setdefault(model.encoder, []).append(place)
        for encoder, listed in places.items():
            images, stops = [asks[at].image for at in listed], [asks[at].stop for at in listed]
            found = self._engine.encode(images, stops, self._asker, encoder)
            encoded |= zip(listed, found, strict=True)
        return encoded

    def _begun(self, key: object, ask: Ask, image: Encoded) -> Cascade | FlorenceError:
        # Before the image's own error: an image that several asks gave up has only one's reason.
        reason = None if ask.stop is None else ask.stop()
        if reason is not None:
            return reason
        if isinstance(image, FlorenceError):
            return image
        try:
            model = self._engine.model_of(ask.adapter)
            self._engine.check_image(image, model)
            return Cascade(key, ask, image, model.checkpoint)
        except FlorenceError as error:
            return as_value(error)

    def _go_on(self, cascade: Cascade) -> None:
        self._ready += cascade.next_prompts()
        if cascade.outcome is not None:
            self._asker.settle(cascade.key, cascade.outcome)

    def _kind_of(self, prompt: Prompt) -> SearchKind:
        return SearchKind(self._engine.model_of(prompt.adapter), prompt.settings)

    def _take_ready(self, room: int, kind: SearchKind) -> list[Prompt]:
        taken: list[Prompt] = []
        passed: list[Prompt] = []
        while self._ready and len(taken) < room:
            prompt = self._ready.popleft()
            (taken if self._kind_of(prompt) == kind else passed).append(prompt)
        self._ready.extendleft(reversed(passed))
        return taken


class PromptSearch:
    """Answers prompts of one kind until no more come, as the source of a decode loop.

    Running out of memory starts over, with half as many prompts at a time, what was under way;
    one that does not fit alone fails alone. The engine's limit is lowered to what fitted then,
    unless there was one that did not fit alone: the others may have been short of its memory only.
    A search between two passes of another one lowers nothing: it was short of that one's memory.
    What the asker or a ``Stop`` raises comes through, lack of memory included.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: PromptQueue,
        asker: Asker[Any],
        kind: SearchKind,
    ) -> None:
        self._engine = engine
        self._prompts = prompts
        self._asker = asker
        self._kind = kind
        self._runtime = kind.model.runtime
        self._limit = engine.prompt_limit
        self._is_within = self._limit.num_searches > 0
        self._room = self._limit.now
        # Prompts with a row, each with the seconds of its encoding and when its search began.
        self._in_hand: dict[Prompt, tuple[float, float]] = {}
        self._again: list[Prompt] = []
        self._is_retry = False
        self._has_misfit = False
        # No room beside those in hand: how many fitted, if it turns out to be their number.
        self._is_crowded = False
        self._num_fitting: int | None = None
        self._is_full = False
        self._num_settled = 0
        self._askers_error: Exception | None = None

    def run(self) -> None:
        """Returns once every prompt taken is settled."""
        self._limit.num_searches += 1
        try:
            while not self._runs_to_its_end():
                # Outside any handler: a traceback would keep the failed batch's tensors alive.
                self._engine.free_memory()
                self._start_over()
        finally:
            self._limit.num_searches -= 1
        if self._is_retry and not self._has_misfit:
            self._lower(self._room)

    def given_up(self) -> Mapping[Prompt, FlorenceError]:
        """The prompts in hand that nobody waits for any longer."""
        with self._askers_code():
            self._asker.before_pass()
            reasons = {prompt: prompt.given_up() for prompt in self._in_hand}
        return {prompt: reason for prompt, reason in reasons.items() if reason is not None}

    def start(self, room: int) -> EncodedItems[Prompt] | None:
        """A session with the next prompts."""
        self._is_crowded = self._is_crowded and bool(self._in_hand)
        prompts = [] if self._is_crowded else self._next(min(room, self._pass_size()))
        if not prompts:
            return None
        began = time.perf_counter()
        limits = [prompt.max_new_tokens for prompt in prompts]
        session = self._session_of(prompts, max(limits))
        if session is None:
            # Beside those in hand there is no room: once they are done there may be.
            self._engine.free_memory()
            self._again = prompts + self._again
            self._is_crowded = True
            together = len(self._in_hand) + len(prompts)
            self._num_fitting = max(len(self._in_hand), self._limit.smaller(together))
            return None
        if self._num_fitting is not None:
            # By themselves they fit, so it was their number.
            self._lower(self._num_fitting)
            self._num_fitting = None
        now = time.perf_counter()
        self._in_hand |= dict.fromkeys(prompts, (now - began, now))
        self._is_full = self._is_full or len(self._in_hand) >= self._room
        return EncodedItems(prompts, session, limits)

    def settle(self, item: Prompt, answer: Answer | FlorenceError) -> None:
        """Hands on the result of a prompt in hand."""
        prompt_s, began = self._in_hand.pop(item)
        outcome: Outcome
        with self._askers_code():
            if isinstance(answer, FlorenceError):
                outcome = answer
            else:
                self._note_fit()
                decode_s = time.perf_counter() - began
                outcome = item.result(answer, Timings(item.image.vision_s, prompt_s, decode_s))
            self._prompts.settle(item, outcome)

    def _runs_to_its_end(self) -> bool:
        runtime = self._runtime
        loop = DecodeLoop(
            self,
            runtime.decode_batch(self._kind.settings, self._engine.location_probability),
            max_rows=self._room,
            least_room=self._least_room(),
        )
        try:
            loop.run()
        except (RuntimeError, MemoryError) as error:
            is_ours = error is not self._askers_error and bool(self._in_hand)
            if not is_ours or not runtime.is_out_of_memory(error):
                raise
            logger.warning(
                "%d prompt(s) did not fit into the memory of %s", len(self._in_hand), runtime.device
            )
            return False
        return True

    def _start_over(self) -> None:
        self._num_fitting = None
        if len(self._in_hand) == 1:
            [alone] = self._in_hand
            self._has_misfit = True
            self.settle(alone, out_of_memory(self._engine.runtime.device))
            return
        self._again = [*self._in_hand, *self._again]
        self._room = self._limit.smaller(len(self._in_hand))
        self._is_retry = True
        self._in_hand.clear()

    def _lower(self, size: int) -> None:
        if not self._is_within:
            self._limit.lower(size)

    def _least_room(self) -> int:
        """Free rows that are worth a pass of the tower and the encoder beside a running batch."""
        several = max(1, self._room // _JOIN_SHARE)
        # A CPU gains from company only as far as a batch of images is faster than one by one.
        is_gpu = not self._engine.runtime.device.startswith("cpu")
        return several if is_gpu else max(1, min(several, self._engine.image_batch // 2))

    def _pass_size(self) -> int:
        """Prompts that may be encoded at a time, however many rows are free."""
        if self._asker.is_awaited:
            self._limit.catch_up()
        return self._limit.pass_size(is_awaited=self._asker.is_awaited)

    def _session_of(self, prompts: list[Prompt], max_new_tokens: int) -> Session | None:
        """The prompts encoded; None where there is no room for them beside those in hand."""
        runtime, is_alone = self._runtime, not self._in_hand
        if is_alone:
            self._in_hand |= dict.fromkeys(prompts, (0.0, 0.0))
        try:
            start = runtime.mark()
            session = runtime.start(
                [prompt.image.features for prompt in prompts],
                [prompt.prompt_ids for prompt in prompts],
                self._kind.settings.num_beams,
                max_new_tokens,
            )
            self._limit.begun(len(prompts), start, runtime.mark())
            return session
        except (RuntimeError, MemoryError) as error:
            if is_alone or not runtime.is_out_of_memory(error):
                raise
        return None

    def _next(self, room: int) -> list[Prompt]:
        """Up to ``room`` prompts that somebody waits for; those met on the way are settled."""
        prompts: list[Prompt] = []
        while missing := room - len(prompts):
            if self._again:
                taken, self._again = self._again[:missing], self._again[missing:]
            elif self._is_retry or self._room != self._limit.now:
                # The next search begins with the limit as it is then.
                break
            else:
                with self._askers_code():
                    taken = self._prompts.take(missing, self._kind)
            if not taken:
                break
            with self._askers_code():
                for prompt in taken:
                    reason = prompt.given_up()
                    if reason is None:
                        prompts.append(prompt)
                    else:
                        self._prompts.settle(prompt, reason)
        return prompts

    def _note_fit(self) -> None:
        """As many answers as there are rows, once all of these were in use, are a batch."""
        if self._is_full and not self._is_retry:
            self._num_settled += 1
            if self._num_settled >= self._room:
                self._limit.fitted(self._room)
                self._num_settled, self._is_full = 0, False

    @contextmanager
    def _askers_code(self) -> Iterator[None]:
        """Within it errors are not the device's, such as those of the asker's own code."""
        try:
            yield
        except Exception as error:
            self._askers_error = error
            raise


def _no_ask(value: object) -> FlorenceError:
    return RequestError(
        f"A question is an Ask, and {type(value).__name__} was received; write "
        'Ask(image, "<CAPTION>").'
    )
