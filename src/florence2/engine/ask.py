"""From a question to prompts for the network, and from their answers to one result.

The steps of a cascade ask about what was found before: one that takes text gets the text before
it, one that takes a region is asked once for every box before it. A caption has no boxes, so before
a region step its phrases are grounded first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from florence2.checkpoint.checkpoint import Checkpoint
from florence2.engine.encoding import AnyImage, EncodedImage
from florence2.errors import FlorenceError, RequestError, as_value, shown
from florence2.postprocess import parse
from florence2.records import (
    Answer,
    Box,
    BoxXyxy,
    Failure,
    GenerationSettings,
    Object,
    Polygon,
    Quad,
    Region,
    Result,
    SizeWh,
    Text,
    Timings,
    check_settings,
    clip_region,
    region_bins,
    region_on_image,
)
from florence2.stopping import Stop
from florence2.tasks import TASKS, OutputKind, Task, TaskInput, parse_steps, passthrough_task
from florence2.tokenizer import DROPPED_TOKENS, MARKERS
from florence2.tokens import AND, NUM_LOCATION_BINS, location_token

AnyRegion = Region | Sequence[float] | str
Located = Box | Quad | Polygon
Outcome = Result | FlorenceError

_SEARCH_SETTINGS: Final = (
    "num_beams",
    "max_new_tokens",
    "length_penalty",
    "early_stopping",
    "no_repeat_ngram_size",
)


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """A task prompt, or a cascade of them, for one image.

    ``region`` is (x1, y1, x2, y2) in pixels of the original image, or the model's own spelling
    ``<loc_x1><loc_y1><loc_x2><loc_y2>``. A Failure of ``encode`` as the image stays that Failure.
    A setting of None is the checkpoint's own; ``max_new_tokens`` of None is the task's own budget.
    ``is_custom`` says that ``task`` is a fine-tune's own token, which is passed on as it is and
    answered with text. ``stop`` is asked before every pass of the network: once it gives an error
    nobody waits for the answer any longer, and that error is the answer. ``adapter`` is one of
    those that the checkpoint was loaded with; None is the checkpoint itself.
    """

    image: AnyImage
    task: str
    text: str | None = None
    region: AnyRegion | None = None
    num_beams: int | None = None
    max_new_tokens: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    no_repeat_ngram_size: int | None = None
    is_custom: bool = False
    stop: Stop | None = field(default=None, repr=False)
    adapter: str | None = None

    def settings(self, defaults: GenerationSettings) -> GenerationSettings:
        """The checkpoint's search settings with this ask's own put over them."""
        given = {
            name: value.item() if isinstance(value, np.generic) else value
            for name in _SEARCH_SETTINGS
            if (value := getattr(self, name)) is not None
        }
        if not given:
            return defaults
        settings = replace(defaults, **given)
        check_settings(settings)
        return settings

    def steps(self) -> tuple[Task, ...]:
        """The task, or those of the cascade; RequestError for what is none."""
        if not isinstance(self.task, str):
            raise RequestError(
                f"A task is a name such as <CAPTION>, and {shown(self.task)} was received; "
                "name one."
            )
        return (passthrough_task(self.task),) if self.is_custom else parse_steps(self.task)


def failure_of(error: FlorenceError, image: object) -> Failure:
    """An error in the place of a result; it names an ``image`` that was given by path."""
    name: str | None = None
    if isinstance(image, Failure):
        name = image.image
    elif isinstance(image, str) or hasattr(image, "__fspath__"):
        name = str(image)
    return Failure(error.code, str(error), name)


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One validated prompt about a cascade's image, ready to be decoded.

    ``place`` is its number among the prompts of its step.
    """

    cascade: Cascade
    place: int
    task: Task
    prompt_ids: tuple[int, ...]
    settings: GenerationSettings
    max_new_tokens: int

    @property
    def image(self) -> EncodedImage:
        """What it is about."""
        return self.cascade.image

    @property
    def adapter(self) -> str | None:
        """The one that answers it."""
        return self.cascade.ask.adapter

    def given_up(self) -> FlorenceError | None:
        """Why nobody waits for the answer any longer."""
        stop = self.cascade.ask.stop
        return None if stop is None else stop()

    def result(self, answer: Answer, timings_s: Timings) -> Result:
        """What an answer says about the image."""
        vocabulary, size_wh = self.cascade.checkpoint.vocabulary, self.image.size_wh
        tokens = vocabulary.answer_tokens(answer.token_ids, answer.log_probs, answer.near_log_probs)
        parsed = parse(tokens, self.task, size_wh)
        notes = parsed.notes
        if answer.truncated:
            notes = (*notes, f"the answer was cut at {self.max_new_tokens} tokens")
        return Result(
            task=self.task.token,
            size_wh=size_wh,
            objects=parsed.objects,
            text=parsed.text,
            answer=vocabulary.answer_text(answer.token_ids),
            token_ids=answer.token_ids,
            truncated=answer.truncated,
            notes=notes,
            log_probs=answer.log_probs,
            near_log_probs=answer.near_log_probs,
            timings_s=timings_s,
        )


class Cascade:
    """One ask on its way, of one step or more: a step's prompts need the results before it.

    ``key`` is the asker's name for it. ``outcome`` is None as long as something is open.
    Raises RequestError at once for an ask that names no task or setting there is.
    """

    def __init__(self, key: object, ask: Ask, image: EncodedImage, checkpoint: Checkpoint) -> None:
        self.key = key
        self.ask = ask
        self.image = image
        self.checkpoint = checkpoint
        self.outcome: Outcome | None = None
        self._steps = ask.steps()
        self._settings = ask.settings(checkpoint.generation)
        self._num_done = 0
        self._regions: list[FoundRegion] = []
        self._found: Result | None = None
        # By the prompts' places; prompts that were held here would keep themselves alive.
        self._outcomes: dict[int, Outcome] = {}
        self._num_prompts = 0

    def next_prompts(self) -> list[Prompt]:
        """The prompts of the next step that has any; none once there is an outcome."""
        while self.outcome is None:
            try:
                prompts = list(self._prompts_of_step())
            except FlorenceError as error:
                self.outcome = as_value(error)
                return []
            if prompts:
                self._num_prompts = len(prompts)
                return prompts
            self._finish_step([])
        return []

    def settle(self, prompt: Prompt, outcome: Outcome) -> bool:
        """Notes a prompt's outcome; whether the step it belongs to is over with it."""
        self._outcomes[prompt.place] = outcome
        if len(self._outcomes) < self._num_prompts:
            return False
        outcomes, self._outcomes = self._outcomes, {}
        self._finish_step([outcomes[place] for place in range(self._num_prompts)])
        return True

    def _prompts_of_step(self) -> Iterator[Prompt]:
        task, before = self._steps[self._num_done], self._found
        if before is None:
            # What a cascade's first step does not take is refused, never ignored.
            yield self._prompt(0, self.ask.text, as_region(self.ask.region))
        elif task.takes is TaskInput.REGION:
            self._regions = regions_of(before)
            asked = [one.region for one in self._regions if one.region is not None]
            for place, region in enumerate(asked):
                yield self._prompt(place, None, region)
        elif before.text:
            yield self._prompt(0, before.text, None)

    def _prompt(self, place: int, text: str | None, region: Region | str | None) -> Prompt:
        task, checkpoint = self._steps[self._num_done], self.checkpoint
        ids = checkpoint.vocabulary.encode_prompt(
            prompt_sentence(task, text, region, self.image.size_wh)
        )
        # Rows of the position table: the longest input, and the longest answer.
        most = checkpoint.config.text.max_position_embeddings
        check_prompt_length(len(ids), most - self.image.features.shape[0])
        asked = self._settings.max_new_tokens
        if asked is not None and asked > most:
            raise RequestError(
                f"max_new_tokens can be at most {most} for {checkpoint.name}, "
                f"and {asked} was received; ask for fewer."
            )
        limit = asked or min(task.max_new_tokens, most)
        # Every prompt has a limit of its own, so those of different limits can share a batch.
        shared = replace(self._settings, max_new_tokens=None)
        return Prompt(self, place, task, tuple(ids), shared, limit)

    def _finish_step(self, outcomes: Sequence[Outcome]) -> None:
        error = next((one for one in outcomes if isinstance(one, FlorenceError)), None)
        if error is not None:
            self.outcome = error
            return
        answers = [one for one in outcomes if isinstance(one, Result)]
        self._found = self._joined(answers)
        self._num_done += 1
        if self._num_done == len(self._steps):
            self.outcome = self._found

    def _joined(self, answers: Sequence[Result]) -> Result:
        before, task = self._found, self._steps[self._num_done]
        if before is None:
            return answers[0]
        name = "+".join(step.token for step in self._steps[: self._num_done + 1])
        if task.takes is TaskInput.REGION:
            return join_region_answers(task, name, before, self._regions, answers)
        if answers:
            return join_text_answer(name, before, answers[0])
        # The step before found no text, so there is nothing to look for.
        return replace(before, task=name, objects=(), steps=(before,))


@dataclass(frozen=True, slots=True)
class FoundRegion:
    """A located object of the step before; ``region`` is None where it is under a pixel."""

    located: Located
    region: Region | None


def regions_of(result: Result) -> list[FoundRegion]:
    """Every located object of ``result`` with the region to ask about; polygons as their boxes."""
    return [
        FoundRegion(located, region_on_image(_box_of(located), result.size_wh))
        for located in result.objects
        if not isinstance(located, Text)
    ]


def _box_of(located: Located) -> BoxXyxy:
    """The box around an object; without an area where it has no points."""
    if isinstance(located, Box):
        return located.box_xyxy
    if isinstance(located, Quad):
        points: tuple[float, ...] = located.quad_xy
    else:
        points = tuple(value for ring in located.rings_xy for value in ring)
    if not points:
        return (0.0, 0.0, 0.0, 0.0)
    xs, ys = points[0::2], points[1::2]
    return (min(xs), min(ys), max(xs), max(ys))


def join_region_answers(
    task: Task, name: str, before: Result, regions: Sequence[FoundRegion], answers: Sequence[Result]
) -> Result:
    """One result of the region step ``task``; ``answers`` has one for every region in ``regions``.

    A text answer becomes the label of the box that was found before, which stays with its score
    even if the answer is empty. A polygon has its own score and the label that its region had.
    """
    objects: list[Object] = []
    notes: list[str] = []
    left = iter(answers)
    for place, one in enumerate(regions, start=1):
        found = one.located
        answer = None if one.region is None else next(left)
        if answer is None:
            notes.append(
                f"object {place} ({found.label!r}) is under a pixel and was not asked about"
            )
        if task.output is OutputKind.TEXT:
            label = (answer.text if answer is not None else None) or ""
            said = answer.objects if answer is not None else ()
            tokens = (*found.tokens, *(token for one in said for token in one.tokens))
            objects.append(Box(_box_of(found), label, found.score, tokens))
        elif answer is not None:
            objects += [
                replace(polygon, label=found.label, tokens=(*found.tokens, *polygon.tokens))
                for polygon in answer.objects
                if isinstance(polygon, Polygon)
            ]
    return replace(
        before,
        task=name,
        objects=tuple(objects),
        answer="\n".join(answer.answer for answer in answers),
        token_ids=tuple(token for answer in answers for token in answer.token_ids),
        truncated=before.truncated or any(answer.truncated for answer in answers),
        notes=(*before.notes, *notes, *(note for answer in answers for note in answer.notes)),
        steps=(*(before.steps or (before,)), *answers),
    )


def join_text_answer(name: str, before: Result, answer: Result) -> Result:
    """One result of a text step: the objects of ``answer``, the text of ``before``."""
    return replace(
        answer,
        task=name,
        text=before.text,
        truncated=before.truncated or answer.truncated,
        notes=before.notes + answer.notes,
        timings_s=before.timings_s,
        steps=(*(before.steps or (before,)), answer),
    )


def as_region(region: Region | Sequence[float] | str | None) -> Region | str | None:
    """A region from four numbers in pixels, x before y; RequestError for anything else.

    What is spelled in the model's own tokens stays as it is.
    """
    if region is None or isinstance(region, str):
        return region
    values = region.box_xyxy if isinstance(region, Region) else region
    try:
        if isinstance(values, str | bytes | dict | set) or any(
            isinstance(value, str | bytes | bool) for value in values
        ):
            raise TypeError("not numbers")
        x1, y1, x2, y2 = (float(value) for value in values)
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(
            f"A region is four numbers x1, y1, x2, y2 in pixels, and {shown(values)} was received; "
            "give left, top, right, bottom."
        ) from error
    return Region((x1, y1, x2, y2))


MAX_PROMPT_CHARS: Final = 4000

_LOCATION: Final = r"<loc_([0-9]{1,6})>"
_ANY_LOCATION: Final = re.compile(_LOCATION)
_REGION_TEXT: Final = re.compile(_LOCATION * 4)

# "<and>" separates the phrases of a caption, so it is the one added token a text may hold.
_FORBIDDEN_TOKEN: Final = re.compile(
    "|".join(
        re.escape(token)
        for token in (
            *DROPPED_TOKENS,
            *(token for token in MARKERS if token != AND),
            *(task.token for task in TASKS),
        )
    )
)


def prompt_sentence(
    task: Task, text: str | None, region: Region | str | None, size_wh: SizeWh
) -> str:
    """The sentence the network was trained with for this task, without ``<s>`` and ``</s>``.

    ``region`` is in pixels of the original image, whose size is ``size_wh``, or spelled
    ``<loc_x1><loc_y1><loc_x2><loc_y2>``; so may be the ``text`` of a region task instead. Empty
    text counts as none.

    Raises RequestError if the task's input is missing, unwanted or not usable.
    """
    if isinstance(region, str):
        if task.takes is not TaskInput.REGION:
            raise _unwanted_region(task)
        if text:
            raise _unwanted_text(task, shown(text))
        text, region = region, None
    text = _clean_text(text)
    if task.takes is TaskInput.REGION:
        return task.sentence.replace("{input}", _region_input(task, text, region, size_wh))
    if region is not None:
        raise _unwanted_region(task)
    if task.takes is TaskInput.NONE:
        if text:
            raise RequestError(
                f"{task.token} takes no text, and {_short(text)} was received; leave it out "
                "or choose a task that takes text."
            )
        return task.sentence
    if not text and task.takes is TaskInput.TEXT:
        raise RequestError(
            f"{task.token} needs a text, and none was received; say what to look for."
        )
    _check_text(text, task.takes is TaskInput.OPTIONAL_TEXT)
    return task.sentence.replace("{input}", text)


def check_prompt_length(num_prompt_tokens: int, limit: int) -> None:
    """Raise RequestError if a prompt, ``<s>`` and ``</s>`` included, has over ``limit`` tokens."""
    if num_prompt_tokens > limit:
        raise RequestError(
            f"A prompt can have at most {limit} tokens with this checkpoint, and "
            f"{num_prompt_tokens} were received; shorten the text."
        )


def _clean_text(text: str | None) -> str:
    if text is None:
        return ""
    if not isinstance(text, str):
        raise RequestError(f"A text must be a string, and {type(text).__name__} was received.")
    return text.strip()


def _check_text(text: str, allow_locations: bool) -> None:
    if len(text) > MAX_PROMPT_CHARS:
        raise RequestError(
            f"A text can have at most {MAX_PROMPT_CHARS} characters, and {len(text)} were "
            "received; shorten it."
        )
    found = _FORBIDDEN_TOKEN.search(text)
    if found is None and not allow_locations:
        found = _ANY_LOCATION.search(text)
    if found is not None:
        raise RequestError(
            f"A text must not contain the token {found.group()}, which has a meaning of its own "
            "to the model; remove it."
        )
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                "A text must be valid Unicode; remove the lone surrogate."
            ) from error


def _region_input(task: Task, text: str, region: Region | None, size_wh: SizeWh) -> str:
    if region is None:
        return _spell_bins(_bins_of_text(task, text))
    if text:
        raise _unwanted_text(task, _short(text))
    return _spell_bins(region_bins(clip_region(region.box_xyxy, size_wh), size_wh))


def _unwanted_region(task: Task) -> RequestError:
    return RequestError(f"{task.token} takes no region, and one was received; leave it out.")


def _unwanted_text(task: Task, shown_text: str) -> RequestError:
    return RequestError(
        f"{task.token} takes a region and no text, and {shown_text} was received besides; "
        "leave the text out."
    )


def _bins_of_text(task: Task, text: str) -> tuple[int, ...]:
    if not text:
        raise RequestError(f"{task.token} needs a region, and none was received; give a box.")
    match = _REGION_TEXT.fullmatch(text)
    if match is None:
        raise RequestError(
            f"{task.token} needs a region such as <loc_10><loc_20><loc_300><loc_400>, and "
            f"{_short(text)} was received; give a box in pixels instead."
        )
    x1, y1, x2, y2 = (min(int(bin_text), NUM_LOCATION_BINS - 1) for bin_text in match.groups())
    if x1 > x2 or y1 > y2:
        raise RequestError(
            f"A region must have x1 <= x2 and y1 <= y2, and {text} was received; "
            "give left, top, right, bottom."
        )
    return x1, y1, x2, y2


def _spell_bins(bins: Sequence[int]) -> str:
    return "".join(location_token(location_bin) for location_bin in bins)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
