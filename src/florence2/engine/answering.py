"""Answers many asks: images are encoded once, prompts of all of them share the batch's rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from florence2.engine.ask import AnyImage, Ask
from florence2.engine.cascade import Outcome, Progress
from florence2.engine.engine import Coming, Engine, Prompt
from florence2.engine.feature_cache import EncodedImage
from florence2.engine.prefetch import AnySource
from florence2.errors import FlorenceError, RequestError, as_value
from florence2.images import identity
from florence2.records import Failure, GenerationSettings
from florence2.stopping import BetweenPasses, Stop

__all__ = ["AskRun", "Outcome", "answer_all", "encode_all", "identity"]


Settle = Callable[[int, Outcome], None]
"""Takes the outcome of an ask by its number."""


More = Callable[[int], Sequence[Ask]]
"""Gives up to so many further asks."""


def answer_all(
    engine: Engine, asks: Sequence[Ask], between_passes: BetweenPasses | None = None
) -> list[Outcome]:
    """One result or error per ask, in order; one ask's error does not touch the others.

    ``between_passes`` is called before every pass of the network, and before every image that is
    opened or scaled; it may call this function.
    """
    outcomes: dict[int, Outcome] = {}
    AskRun(engine, outcomes.__setitem__, between_passes).run(asks)
    return [outcomes[number] for number in range(len(asks))]


class AskRun:
    """One run over asks, and over those that come while it lasts.

    ``settle`` has each outcome as soon as it is known, by the ask's number in the order in which
    they came. ``more`` is asked for further ones when rows of the batch are free and nothing else
    waits for them; ``coming`` says whose images may be opened ahead of that.
    """

    def __init__(
        self,
        engine: Engine,
        settle: Settle,
        between_passes: BetweenPasses | None = None,
        more: More | None = None,
        coming: Coming | None = None,
    ) -> None:
        self._engine = engine
        self._settle = settle
        self._between_passes = between_passes
        self._more = more
        self._coming = coming
        self._num_asks = 0
        self._ready: deque[Prompt] = deque()
        self._owners: dict[Prompt, tuple[int, Progress]] = {}

    def run(self, asks: Sequence[Ask] = ()) -> None:
        """Returns once these and all that ``more`` gives are settled."""
        self._add(asks)
        self._engine.answer_feed(self, self._between_passes)

    def next_settings(self) -> GenerationSettings | None:
        """Those of the prompt that waits longest."""
        while not self._ready and self._add_more(self._engine.prompt_batch):
            pass
        return self._ready[0].settings if self._ready else None

    def take(self, room: int, settings: GenerationSettings) -> list[Prompt]:
        """The next prompts with these settings, and further asks' if no other prompt waits."""
        taken = self._take_ready(room, settings)
        while len(taken) < room and not self._ready and self._add_more(room - len(taken)):
            taken += self._take_ready(room - len(taken), settings)
        return taken

    def settle(self, prompt: Prompt, outcome: Outcome) -> None:
        """A prompt's outcome, with which its ask's next step may begin."""
        number, progress = self._owners.pop(prompt)
        if progress.settle(prompt, outcome):
            self._go_on(number, progress)

    def _add_more(self, room: int) -> bool:
        asks = () if self._more is None else self._more(room)
        self._add(asks)
        return bool(asks)

    def _add(self, asks: Sequence[Ask]) -> None:
        first, self._num_asks = self._num_asks, self._num_asks + len(asks)
        # A list may hold anything: what is no Ask has no image to encode.
        known = [ask for ask in asks if isinstance(ask, Ask)]
        images, stops = [ask.image for ask in known], [ask.stop for ask in known]
        encoded = iter(encode_all(self._engine, images, stops, self._between_passes, self._coming))
        begun: list[tuple[int, Progress]] = []
        for number, ask in enumerate(asks, start=first):
            found = self._begun(ask, next(encoded)) if isinstance(ask, Ask) else _no_ask(ask)
            if isinstance(found, Progress):
                begun.append((number, found))
            else:
                self._settle(number, found)
        for number, progress in begun:
            self._go_on(number, progress)

    def _begun(self, ask: Ask, image: EncodedImage | FlorenceError) -> Progress | FlorenceError:
        # Before the image's own error: an image that several asks gave up has only one's reason.
        reason = None if ask.stop is None else ask.stop()
        if reason is not None:
            return reason
        if isinstance(image, FlorenceError):
            return image
        try:
            return Progress(self._engine, ask, image)
        except FlorenceError as error:
            return as_value(error)

    def _go_on(self, number: int, progress: Progress) -> None:
        prompts = progress.next_prompts()
        self._ready += prompts
        self._owners |= dict.fromkeys(prompts, (number, progress))
        if progress.outcome is not None:
            self._settle(number, progress.outcome)

    def _take_ready(self, room: int, settings: GenerationSettings) -> list[Prompt]:
        taken: list[Prompt] = []
        passed: list[Prompt] = []
        while self._ready and len(taken) < room:
            prompt = self._ready.popleft()
            (taken if prompt.settings == settings else passed).append(prompt)
        self._ready.extendleft(reversed(passed))
        return taken


def encode_all(
    engine: Engine,
    images: Sequence[AnyImage],
    stops: Sequence[Stop | None] | None = None,
    between_passes: BetweenPasses | None = None,
    coming: Coming | None = None,
) -> list[EncodedImage | FlorenceError]:
    """The encoded images in order; the same path, object or content is encoded once.

    ``stops`` has one Stop per image; an image given up has the reason in its place.
    """
    settled: dict[int, EncodedImage | FlorenceError] = {}
    to_encode: dict[int, tuple[AnySource, Stop | None]] = {}
    for place, (image, stop) in enumerate(zip(images, stops or [None] * len(images), strict=True)):
        if isinstance(image, EncodedImage):
            settled[place] = replace(image, vision_s=0.0)
        elif isinstance(image, Failure):
            settled[place] = _as_error(image)
        else:
            to_encode[place] = (image, stop)
    encoded = engine.encode(
        [image for image, _ in to_encode.values()],
        [stop for _, stop in to_encode.values()],
        between_passes,
        coming,
    )
    settled |= zip(to_encode, encoded, strict=True)
    return [settled[place] for place in range(len(images))]


def _as_error(failure: Failure) -> FlorenceError:
    reason = FlorenceError(failure.message)
    reason.code = failure.code
    return reason


def _no_ask(value: object) -> FlorenceError:
    return RequestError(
        f"A question is an Ask, and {type(value).__name__} was received; write "
        'Ask(image, "<CAPTION>").'
    )
