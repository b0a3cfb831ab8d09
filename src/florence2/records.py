"""The frozen records that travel between the layers: what is asked, and what comes back.

Coordinates are floats in pixels of the original image, x before y, origin top left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from florence2.errors import RequestError, shown
from florence2.tasks import OutputKind, TaskInput, find_task
from florence2.tokens import (
    BOS_ID,
    DECODER_START_ID,
    EOS_ID,
    NUM_LOCATION_BINS,
)

BoxXyxy = tuple[float, float, float, float]
SizeWh = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Region:
    """A box on the image that a region task asks about, in pixels of the original image."""

    box_xyxy: BoxXyxy


class TokenKind(Enum):
    """What a token of an answer is."""

    TEXT = "text"
    LOCATION = "location"
    MARKER = "marker"


@dataclass(frozen=True, slots=True)
class AnswerToken:
    """One token of an answer, or one stretch of a raw string.

    ``data`` is what it spells in UTF-8, possibly part of a character. ``location_bin`` is 0 to
    999 for a location and None for the rest. ``log_prob`` is a natural logarithm, None if unknown;
    ``near_log_prob`` that of the bin or one near it, the same as ``log_prob`` for the rest.
    """

    kind: TokenKind
    data: bytes
    location_bin: int | None = None
    log_prob: float | None = None
    near_log_prob: float | None = None


Tokens = tuple[AnswerToken, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """A labeled box.

    ``score`` is in [0, 1], see ``florence2.postprocess``; it is None for an object that was parsed
    from a string, whose probabilities nobody knows. ``tokens`` are those that spell the label and
    the place, in this order, as of every object; in a cascade those of each step, one after the
    other. Of an object that several tiles saw they are those of one of them. Objects are compared
    without them.
    """

    box_xyxy: BoxXyxy
    label: str
    score: float | None
    tokens: Tokens = field(default=(), repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Quad:
    """Four corners of a text line, clockwise from its top left: (x1, y1, ..., x4, y4)."""

    quad_xy: tuple[float, float, float, float, float, float, float, float]
    label: str
    score: float | None
    tokens: Tokens = field(default=(), repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Polygon:
    """One object's outline as one or more rings, each (x1, y1, x2, y2, ...)."""

    rings_xy: tuple[tuple[float, ...], ...]
    label: str
    score: float | None
    tokens: Tokens = field(default=(), repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Text:
    """A caption, a category or read text that has no place on the image of its own."""

    label: str
    score: float | None
    tokens: Tokens = field(default=(), repr=False, compare=False)


Object = Box | Quad | Polygon | Text


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How an answer is searched for. The defaults are those published with the checkpoints.

    ``max_new_tokens`` of ``None`` takes the task's own budget from the task table.
    ``no_repeat_ngram_size`` of 0 switches the ban off; ``<s>`` is then banned after the first
    step instead, because the large checkpoints would repeat it for ever.
    ``early_stopping``: True stops once every beam slot is filled, False once no running beam can
    beat the filled slots by the usual estimate, "never" by the strict bound.
    """

    num_beams: int = 3
    max_new_tokens: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool | str = True
    no_repeat_ngram_size: int = 3


@dataclass(frozen=True, slots=True)
class Timings(Mapping[str, float]):
    """Seconds spent on a result; also a mapping, so ``timings_s["decode"]`` works.

    ``vision`` is 0 when the image was encoded before. Images and prompts run in batches: each is
    the time of the whole batch. On a GPU work goes on in the background, and counts where its
    result is waited for, mostly in ``decode``.
    """

    vision: float = 0.0
    prompt: float = 0.0
    decode: float = 0.0

    def __getitem__(self, key: str) -> float:
        if key not in ("vision", "prompt", "decode"):
            raise KeyError(key)
        value: float = getattr(self, key)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(("vision", "prompt", "decode"))

    def __len__(self) -> int:
        return 3


@dataclass(frozen=True, slots=True)
class Answer:
    """What the decode loop returns for one prompt.

    ``token_ids`` start after the decoder's start token and end before ``</s>`` and padding;
    ``log_probs`` has one natural logarithm per token id, from the plain softmax over the
    vocabulary (bans and forced tokens do not distort it). ``near_log_probs`` are the same, but for
    a location token the logarithm of the probability of any bin within a few bins of it, banned
    ones among them; they are empty when the loop was not told which tokens are locations.
    ``beam_score`` is the search's own length-normalised score, of log-probabilities after bans and
    forced tokens. ``truncated`` says that the token limit cut the answer.
    """

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    beam_score: float
    truncated: bool
    near_log_probs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to one request on one image.

    ``log_probs`` and ``near_log_probs`` are those of the Answer, or empty where unknown. The
    ``timings_s`` of a cascade are its first step's; each of its ``steps`` has its own.
    """

    task: str
    size_wh: SizeWh
    objects: tuple[Object, ...]
    text: str | None
    answer: str
    token_ids: tuple[int, ...]
    truncated: bool
    notes: tuple[str, ...] = ()
    steps: tuple[Result, ...] = ()
    log_probs: tuple[float, ...] = ()
    near_log_probs: tuple[float, ...] = ()
    timings_s: Timings = Timings()

    def to_dict(self) -> dict[str, Any]:
        """The dictionary of the reference's ``post_process_generation``, plus scores.

        Same keys and nesting; coordinates are floats, and ``scores`` stands beside the boxes.
        """
        return result_to_dict(self)


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that could not be answered; never the same thing as an empty result."""

    code: str
    message: str
    image: str | None = None


def result_to_dict(result: Result) -> dict[str, Any]:
    """``{task token: answer}`` with the reference's keys and nesting; JSON-ready.

    - text tasks: the answer's string, its location tokens included, without white space around;
    - boxes: ``bboxes``, ``labels``, ``scores``; OCR: ``quad_boxes``, ``labels``, ``scores``;
    - polygons: ``polygons`` (per object a list of rings), ``labels``, ``scores``;
    - boxes or polygons: ``bboxes``, ``bboxes_labels``, ``polygons``, ``polygons_labels``, and
      ``scores`` of the boxes, then of the polygons.

    Coordinates are floats in pixels; a score is None where it is unknown. A cascade has one entry
    per step; the entry of a step that asked about regions is the list of its answers.
    """
    if not result.steps:
        return {result.task: _answer(result)}
    merged: dict[str, Any] = {}
    for step in result.steps:
        for token, answer in result_to_dict(step).items():
            if _takes_region(token):
                merged.setdefault(token, []).append(answer)
            else:
                merged[token] = answer
    return merged


def _answer(result: Result) -> str | dict[str, Any]:
    output = _output_of(result.task)
    boxes = [found for found in result.objects if isinstance(found, Box)]
    polygons = [found for found in result.objects if isinstance(found, Polygon)]
    if output is OutputKind.TEXT:
        return result.answer.strip()
    if output is OutputKind.OCR:
        quads = [found for found in result.objects if isinstance(found, Quad)]
        return {"quad_boxes": [list(quad.quad_xy) for quad in quads]} | _labels(quads)
    if output is OutputKind.POLYGONS:
        return {"polygons": [_rings(polygon) for polygon in polygons]} | _labels(polygons)
    if output is OutputKind.BOXES_OR_POLYGONS:
        return {
            "bboxes": [list(box.box_xyxy) for box in boxes],
            "bboxes_labels": [box.label for box in boxes],
            "polygons": [_rings(polygon) for polygon in polygons],
            "polygons_labels": [polygon.label for polygon in polygons],
            "scores": [box.score for box in boxes] + [polygon.score for polygon in polygons],
        }
    return {"bboxes": [list(box.box_xyxy) for box in boxes]} | _labels(boxes)


def _labels(objects: list[Box] | list[Quad] | list[Polygon]) -> dict[str, Any]:
    found: list[Object] = [*objects]
    return {
        "labels": [one.label for one in found],
        "scores": [one.score for one in found],
    }


def _rings(polygon: Polygon) -> list[list[float]]:
    return [list(ring) for ring in polygon.rings_xy]


def _output_of(token: str) -> OutputKind:
    try:
        return find_task(token).output
    except RequestError:
        # A fine-tune's own task; it answers in text.
        return OutputKind.TEXT


def _takes_region(token: str) -> bool:
    try:
        return find_task(token).takes is TaskInput.REGION
    except RequestError:
        return False


MAX_BEAMS: Final = 32

LENGTH_PENALTY_RANGE: Final = (-1.0, 10.0)


def _is_penalty(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    low, high = LENGTH_PENALTY_RANGE
    return low <= value <= high


def _is_early_stopping(value: object) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and value == "never")


def _is_int(value: object, low: int, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


@dataclass(frozen=True, slots=True)
class SettingRule:
    """What a search setting may be, in code and in words."""

    allows: Callable[[object], bool]
    says: str
    hint: str


SETTING_RULES: Final = {
    "num_beams": SettingRule(
        lambda value: _is_int(value, 1, MAX_BEAMS),
        f"a whole number from 1 to {MAX_BEAMS}",
        "use 1 for speed or 3 as published",
    ),
    "max_new_tokens": SettingRule(
        lambda value: value is None or _is_int(value, 1),
        "a whole number of at least 1",
        "leave it out to take the task's own budget",
    ),
    "length_penalty": SettingRule(
        _is_penalty,
        f"a number from {LENGTH_PENALTY_RANGE[0]:g} to {LENGTH_PENALTY_RANGE[1]:g}",
        "use 1 as published",
    ),
    "early_stopping": SettingRule(
        _is_early_stopping, 'true, false or "never"', "use true as published"
    ),
    "no_repeat_ngram_size": SettingRule(
        lambda value: _is_int(value, 0),
        "a whole number of at least 0",
        "use 0 to switch the ban off or 3 as published",
    ),
}
"""The one table of limits: for requests and for a checkpoint's own files."""

LIBRARY_DEFAULTS: Final = {
    "num_beams": 1,
    "early_stopping": False,
    "no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
}
"""What transformers means by a setting that a ``generation_config.json`` leaves out."""

# What a checkpoint may ask for and this search has not, with the values that ask for nothing:
# an answer is never shorter than the start token and <s>.
_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "do_sample": (False,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0, 1, 2),
    "min_new_tokens": (0, 1),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "constraints": ([],),
    "sequence_bias": ([], {}),
    "forced_decoder_ids": ([],),
    "forced_bos_token_id": (BOS_ID,),
    "forced_eos_token_id": (EOS_ID, [EOS_ID]),
    "eos_token_id": (EOS_ID, [EOS_ID]),
    "decoder_start_token_id": (DECODER_START_ID,),
    "exponential_decay_length_penalty": (),
    "renormalize_logits": (False,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "stop_strings": ([],),
    "max_time": (),
    "num_return_sequences": (1,),
    "prompt_lookup_num_tokens": (0,),
}

_OF_SAMPLING: Final = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}


def unheeded(section: Mapping[str, Any]) -> str:
    """What a checkpoint's settings ask for that no search here does, as a list; "" for nothing.

    What only shapes sampling counts where sampling is asked for, as in transformers.
    """
    wanted = {
        key: value
        for key, neutral in _NEUTRAL.items()
        if (value := section.get(key)) is not None and value not in neutral
    }
    if "do_sample" in wanted:
        wanted |= {
            key: value
            for key, neutral in _OF_SAMPLING.items()
            if (value := section.get(key)) is not None and value != neutral
        }
    return ", ".join(f"{key} {shown(value)}" for key, value in wanted.items())


def check_settings(settings: GenerationSettings) -> None:
    """Raise ``RequestError`` if a setting is outside what the search supports."""
    for name, rule in SETTING_RULES.items():
        value = getattr(settings, name)
        if not rule.allows(value):
            raise RequestError(f"{name} must be {rule.says}, not {shown(value)}; {rule.hint}.")


def check_vocabulary(vocab: int, beams: int) -> None:
    """RequestError for more beams than the vocabulary has candidates for."""
    if 2 * beams >= vocab:
        raise RequestError(
            f"num_beams must be below half of the vocabulary of {vocab} tokens, not {beams}; "
            "use fewer beams."
        )


# A pixel, less what adding floats may take away from it.
_MIN_SIDE_PX: Final = 1 - 1e-6


def region_bins(box_xyxy: BoxXyxy, size_wh: SizeWh) -> tuple[int, int, int, int]:
    """The location bins, 0 to 999, of a box in pixels of an image of ``size_wh``."""
    sizes = (*size_wh, *size_wh)
    x1, y1, x2, y2 = (
        min(max(math.floor(value * NUM_LOCATION_BINS / size), 0), NUM_LOCATION_BINS - 1)
        for value, size in zip(box_xyxy, sizes, strict=True)
    )
    return x1, y1, x2, y2


def check_region(box_xyxy: Sequence[float], name: str = "A region") -> BoxXyxy:
    """The four numbers of a box that is a region on some image.

    Raises RequestError, which calls the box ``name``, unless they are finite, in the order left,
    top, right, bottom, and a pixel or more apart. A box from 0 to 1 counts shares of the image.
    """
    if len(box_xyxy) != 4 or not all(math.isfinite(value) for value in box_xyxy):
        raise RequestError(
            f"{name} is four finite numbers x1, y1, x2, y2 in pixels, and "
            f"{list(box_xyxy)} was received; correct it."
        )
    x1, y1, x2, y2 = (float(value) for value in box_xyxy)
    if x1 >= x2 or y1 >= y2:
        raise RequestError(
            f"{name} must have x1 < x2 and y1 < y2, and "
            f"{list(box_xyxy)} was received; give left, top, right, bottom."
        )
    is_share = min(x1, y1) >= 0 and max(x2, y2) <= 1
    if is_share or not _is_a_pixel(x1, y1, x2, y2):
        raise RequestError(
            f"{name} is in pixels and at least one pixel wide and high, and {list(box_xyxy)} was "
            "received; multiply shares of the image by its width and height."
        )
    return x1, y1, x2, y2


def clip_region(
    box_xyxy: Sequence[float], size_wh: tuple[float, float], name: str = "A region"
) -> BoxXyxy:
    """The part of a region that lies on the image, in pixels.

    Raises RequestError as ``check_region``, and where less than a pixel of it is on the image.
    """
    x1, y1, x2, y2 = check_region(box_xyxy, name)
    width, height = size_wh
    inside = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    if not _is_a_pixel(*inside):
        raise RequestError(
            f"{name} must lie on the image, which is {width}x{height}, and "
            f"{list(box_xyxy)} was received; give it in pixels of the original image."
        )
    return inside


def region_on_image(box_xyxy: Sequence[float], size_wh: tuple[float, float]) -> Region | None:
    """The region of something found, or None where the rules allow none."""
    try:
        return Region(clip_region(box_xyxy, size_wh))
    except RequestError:
        return None


def _is_a_pixel(x1: float, y1: float, x2: float, y2: float) -> bool:
    return x2 - x1 >= _MIN_SIDE_PX and y2 - y1 >= _MIN_SIDE_PX
