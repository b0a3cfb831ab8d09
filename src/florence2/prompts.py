"""From a task and its input to the sentence that the network reads, and THE rules of a region."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Final

from florence2.errors import RequestError, shown
from florence2.records import BoxXyxy, Region, SizeWh
from florence2.tasks import TASKS, Task, TaskInput
from florence2.tokenizer import DROPPED_TOKENS, MARKERS
from florence2.tokens import AND, NUM_LOCATION_BINS, location_token

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
