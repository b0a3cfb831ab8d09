"""One question in the caller's own words, before it is validated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from florence2.cache import EncodedImage
from florence2.errors import RequestError
from florence2.generate import check_settings
from florence2.images import ImageSource, LoadedImage
from florence2.records import GenerationSettings, Region

AnyImage = ImageSource | LoadedImage | EncodedImage
AnyRegion = Region | Sequence[float]


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """A task prompt, or a cascade of them, for one image.

    ``region`` is (x1, y1, x2, y2) in pixels of the original image. A setting of None is the
    checkpoint's own; ``max_new_tokens`` of None is the task's own budget. ``is_custom`` says that
    ``task`` is a fine-tune's own token, which is passed on as it is and answered with text.
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

    def settings(self, defaults: GenerationSettings) -> GenerationSettings:
        """The checkpoint's search settings with this ask's own put over them."""
        names = (
            "num_beams",
            "max_new_tokens",
            "length_penalty",
            "early_stopping",
            "no_repeat_ngram_size",
        )
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        settings = replace(defaults, **given)
        check_settings(settings)
        return settings


def as_region(region: AnyRegion | None) -> Region | None:
    """A region from four numbers in pixels, x before y."""
    if region is None or isinstance(region, Region):
        return region
    if isinstance(region, str) or len(region) != 4:
        raise RequestError(
            f"A region is four numbers x1, y1, x2, y2 in pixels, and {region!r} was received."
        )
    x1, y1, x2, y2 = (float(value) for value in region)
    return Region((x1, y1, x2, y2))


def name_of(image: AnyImage) -> str | None:
    """The path of an image given by path."""
    return str(image) if isinstance(image, str) or hasattr(image, "__fspath__") else None
