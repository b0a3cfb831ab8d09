"""One question in the caller's own words, before it is validated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from florence2.engine.feature_cache import EncodedImage
from florence2.errors import RequestError, shown, unknown_name
from florence2.generation.settings import check_settings
from florence2.images import ImageSource, LoadedImage
from florence2.pixels import PreparedImage
from florence2.records import Failure, GenerationSettings, Region
from florence2.stopping import Stop
from florence2.tasks import Task, TaskInput

AnyImage = ImageSource | LoadedImage | PreparedImage | EncodedImage | Failure


AnyRegion = Region | Sequence[float] | str


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """A task prompt, or a cascade of them, for one image.

    ``region`` is (x1, y1, x2, y2) in pixels of the original image, or the model's own spelling
    ``<loc_x1><loc_y1><loc_x2><loc_y2>``. A Failure of ``encode`` as the image stays that Failure.
    A setting of None is the checkpoint's own; ``max_new_tokens`` of None is the task's own budget.
    ``is_custom`` says that ``task`` is a fine-tune's own token, which is passed on as it is and
    answered with text. ``stop`` is asked before every pass of the network: once it gives an error
    nobody waits for the answer any longer, and that error is the answer.
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

    def settings(self, defaults: GenerationSettings) -> GenerationSettings:
        """The checkpoint's search settings with this ask's own put over them."""
        names = (
            "num_beams",
            "max_new_tokens",
            "length_penalty",
            "early_stopping",
            "no_repeat_ngram_size",
        )
        given = {
            name: value.item() if isinstance(value, np.generic) else value
            for name in names
            if (value := getattr(self, name)) is not None
        }
        settings = replace(defaults, **given)
        check_settings(settings)
        return settings

    def check_task(self) -> None:
        """RequestError for a task that is not even text."""
        if not isinstance(self.task, str):
            raise RequestError(
                f"A task is a name such as <CAPTION>, and {shown(self.task)} was received; "
                "name one."
            )


def input_of(ask: Ask, task: Task) -> tuple[str | None, Region | None]:
    """The text and the region to give to ``task``; a region spelled in tokens is a text."""
    if not isinstance(ask.region, str):
        return ask.text, as_region(ask.region)
    if task.takes is not TaskInput.REGION:
        raise RequestError(f"{task.token} takes no region, and one was received; leave it out.")
    if ask.text:
        raise RequestError(
            f"{task.token} takes a region and no text, and {shown(ask.text)} was received besides; "
            "leave the text out."
        )
    return ask.region, None


def as_region(region: Region | Sequence[float] | None) -> Region | None:
    """A region from four numbers in pixels, x before y; RequestError for anything else."""
    if region is None:
        return None
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


def check_choice(kind: str, received: object, known: Iterable[str]) -> None:
    """RequestError for a value that is not one of the ``known`` names."""
    names = list(known)
    if not isinstance(received, str) or received not in names:
        raise RequestError(
            unknown_name(kind, received if isinstance(received, str) else shown(received), names)
        )


def name_of(image: AnyImage | None) -> str | None:
    """The path of an image given by path, or of the one that a Failure is about."""
    if isinstance(image, Failure):
        return image.image
    return str(image) if isinstance(image, str) or hasattr(image, "__fspath__") else None
