"""What goes into the network: pixels from an image, a sentence from a request."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from florence2.errors import CheckpointError, RequestError
from florence2.pieces import DROPPED_TOKENS, MARKERS
from florence2.pixels import Pixels, Scaled, look_up, scale
from florence2.records import Region, SizeWh
from florence2.regions import clip_region, region_bins
from florence2.tasks import TASKS, Task, TaskInput
from florence2.tokens import AND, NUM_LOCATION_BINS, location_token

MAX_PROMPT_CHARS: Final = 4000


PROCESSOR_FILES: Final = ("preprocessor_config.json", "processor_config.json")


_IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)


_IMAGENET_STD: Final = (0.229, 0.224, 0.225)


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


@dataclass(frozen=True)
class ImageProcessor:
    """An image to the network's pixels: squashed to ``size_wh``, scaled and normalised.

    The aspect ratio is not kept and nothing is cropped; every task was trained that way.
    """

    size_wh: SizeWh = (768, 768)
    mean: tuple[float, float, float] = _IMAGENET_MEAN
    std: tuple[float, float, float] = _IMAGENET_STD
    resample: int = Image.Resampling.BICUBIC
    rescale: float = 1 / 255

    @classmethod
    def from_folder(cls, folder: Path) -> ImageProcessor:
        """Read the checkpoint's processor file; without one, the published values hold.

        Raises CheckpointError for a damaged file or for steps this class does not do.
        """
        path = image_processor_file(folder)
        settings = None if path is None else _image_settings(path)
        return cls() if path is None or settings is None else _from_settings(settings, path)

    def resize(self, image: Image.Image, helpers: Executor | None = None) -> Scaled:
        """An 8-bit RGB image at the network's size: uint8 ``[height, width, 3]``.

        A large image is shared with one of ``helpers``; the pixels are the same.
        """
        return scale(image, self.size_wh, self.resample, helpers)

    @cached_property
    def lookup_table(self) -> Pixels:
        """The normalised value of each 8-bit value of each channel: float32 ``[3, 256]``."""
        values = (np.arange(256, dtype=np.float64) * self.rescale).astype(np.float32)
        mean = np.asarray(self.mean, np.float32)[:, None]
        std = np.asarray(self.std, np.float32)[:, None]
        return (values - mean) / std

    def normalise(self, scaled: Scaled) -> Pixels:
        """The network's values for uint8 ``[height, width, 3]``: float32 ``[3, height, width]``.

        A view of memory in the order height, width, channel, which the network computes in;
        ``np.stack`` keeps that order.
        """
        return look_up(scaled, self.lookup_table).transpose(2, 0, 1)

    def pixels(self, image: Image.Image) -> Pixels:
        """The network's input for an 8-bit RGB image, as ``normalise`` gives it."""
        return self.normalise(self.resize(image))


def image_processor_file(folder: Path) -> Path | None:
    """The file of a checkpoint that says how images are prepared; None where none does."""
    paths = (Path(folder) / name for name in PROCESSOR_FILES)
    return next((p for p in paths if p.is_file() and _image_settings(p) is not None), None)


def prompt_sentence(task: Task, text: str | None, region: Region | None, size_wh: SizeWh) -> str:
    """The sentence the network was trained with for this task, without ``<s>`` and ``</s>``.

    ``region`` is in pixels of the original image, whose size is ``size_wh``; a region task also
    takes ``text`` spelled ``<loc_x1><loc_y1><loc_x2><loc_y2>``. Empty text counts as none.

    Raises RequestError if the task's input is missing, unwanted or not usable.
    """
    text = _clean_text(text)
    if task.takes is TaskInput.REGION:
        return task.sentence.replace("{input}", _region_input(task, text, region, size_wh))
    if region is not None:
        raise RequestError(f"{task.token} takes no region, and one was received; leave it out.")
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
        raise RequestError(
            f"{task.token} takes a region and no text, and {_short(text)} was received besides; "
            "leave the text out."
        )
    return _spell_bins(region_bins(clip_region(region.box_xyxy, size_wh), size_wh))


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


def _image_settings(path: Path) -> dict[str, Any] | None:
    """The image part of a processor file, or None if the file has no such part."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is cut or damaged; download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a processor file; download it again.")
    nested = content.get("image_processor")
    if isinstance(nested, dict):
        return nested
    return content if "size" in content or "image_mean" in content else None


def _from_settings(settings: dict[str, Any], path: Path) -> ImageProcessor:
    plain = ImageProcessor()
    try:
        size_wh = _size_of(settings.get("size", {"height": 768, "width": 768}))
        if not settings.get("do_resize", True):
            raise ValueError("do_resize is false")
        crops = settings.get("do_center_crop", False)
        if crops and _size_of(settings.get("crop_size", {})) != size_wh:
            raise ValueError("do_center_crop cuts the image")
        normalises = settings.get("do_normalize", True)
        return ImageProcessor(
            size_wh=size_wh,
            mean=_triple(settings.get("image_mean", plain.mean)) if normalises else (0.0, 0.0, 0.0),
            std=_triple(settings.get("image_std", plain.std)) if normalises else (1.0, 1.0, 1.0),
            resample=Image.Resampling(settings.get("resample", plain.resample)),
            rescale=float(settings.get("rescale_factor", plain.rescale))
            if settings.get("do_rescale", True)
            else 1.0,
        )
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} asks for image steps that Florence-2 does not have ({error}); "
            "use the published file."
        ) from error


def _size_of(size: int | dict[str, int]) -> SizeWh:
    if isinstance(size, int):
        size = {"height": size, "width": size}
    width, height = int(size["width"]), int(size["height"])
    if width < 1 or height < 1:
        raise ValueError(f"size {size}")
    return width, height


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
