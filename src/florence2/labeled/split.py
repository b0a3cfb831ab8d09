"""Which labeled images are for training and which for validation: by dataset, tag, hash or file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Final

from florence2.errors import RequestError, shown, unknown_name
from florence2.labeled.records import LabeledData, LabeledImage

VAL_FRACTION: Final = 0.2
VAL_NAMES: Final = ("val", "valid", "validation")
"""What people call the part that is for validation; they mean the same."""

HELP: Final = (
    "dataset:NAME, tag:NAME, hash:0.2, or file:NAMES.txt; a NAME alone is a dataset or tag"
)

_Chooses = Callable[[LabeledImage], bool]


def split_data(data: LabeledData, split: str | None = None) -> tuple[LabeledData, LabeledData]:
    """The other images, and those that ``split`` chooses: for training, and for validation.

    ``split`` is ``dataset:NAME`` (also the datasets inside it), ``tag:NAME`` (of the image),
    ``hash:FRACTION`` (of the name, so that further images move none), ``file:PATH`` (a name on each
    line), or a name alone, of a dataset or else a tag. Without one it is the dataset for validation
    where there is one, else a fifth by hash.

    Raises RequestError for a split that is none of these or that leaves one side without images.
    """
    if split is None:
        has_val = any(_top(image) in VAL_NAMES for image in data.images)
        split = f"dataset:{VAL_NAMES[0]}" if has_val else f"hash:{VAL_FRACTION}"
    chosen, other = chosen_images(data, split), []
    names = {image.name for image in chosen.images}
    other = [image for image in data.images if image.name not in names]
    if not other and split.startswith("hash:") and len(data.images) > 1:
        # Of a few images the hash may leave one side none.
        other = [max(data.images, key=_share)]
        chosen = replace(chosen, images=tuple(one for one in chosen.images if one != other[0]))
    if not other:
        raise RequestError(
            f"A split leaves images on both sides, and {split!r} chooses all "
            f"{len(data.images)}; label more images or choose another split."
        )
    return replace(data, images=tuple(other)), chosen


def chosen_images(data: LabeledData, split: str) -> LabeledData:
    """The images that ``split`` chooses, see ``split_data``; RequestError where it is none."""
    kind, separator, name = split.partition(":")
    if not separator:
        kind, name = _kind_of_name(data, split), split
    if kind not in _KINDS or not name.strip():
        raise RequestError(f"A split is {HELP}, and {shown(split)} is none of them.")
    chooses = _KINDS[kind](data, name.strip())
    images = tuple(image for image in data.images if chooses(image))
    if not images and kind == "hash":
        images = (min(data.images, key=_share),)
    if not images:
        raise RequestError(f"A split chooses at least one image, and {split!r} chooses none.")
    return replace(data, images=images)


def _kind_of_name(data: LabeledData, name: str) -> str:
    has_dataset = any(_is_in(image, name) for image in data.images)
    has_tag = any(name in image.tags for image in data.images)
    return "tag" if has_tag and not has_dataset else "dataset"


def _by_dataset(data: LabeledData, name: str) -> _Chooses:
    known = sorted({image.dataset for image in data.images if image.dataset})
    if not any(_is_in(image, name) for image in data.images):
        if not known:
            raise RequestError(
                f"These images have no datasets, and {name!r} was asked for; split by hash:0.2, "
                "tag or file."
            )
        raise RequestError(unknown_name("dataset", name, known))
    return lambda image: _is_in(image, name)


def _is_in(image: LabeledImage, name: str) -> bool:
    if name in VAL_NAMES and _top(image) in VAL_NAMES:
        return True
    return image.dataset == name or image.dataset.startswith(f"{name}/")


def _top(image: LabeledImage) -> str:
    return image.dataset.partition("/")[0]


def _by_tag(data: LabeledData, name: str) -> _Chooses:
    """``NAME`` or ``NAME=value``."""
    tag, has_value, value = name.partition("=")
    known = sorted({one for image in data.images for one in image.tags})
    if tag not in known:
        raise RequestError(
            unknown_name("tag", tag, known)
            if known
            else f"No image has a tag, and {tag!r} was asked for; split by hash:0.2 or file."
        )
    return lambda image: tag in image.tags and (not has_value or image.tags[tag] == value)


def _by_hash(_: LabeledData, fraction: str) -> _Chooses:
    try:
        share = float(fraction)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise RequestError(
            f"A fraction of the images is between 0 and 1, and {fraction!r} was received; write "
            "for example hash:0.2."
        )
    return lambda image: _share(image) < share


def _share(image: LabeledImage) -> float:
    """A number from 0 to 1 that an image's name decides."""
    digest = hashlib.sha256(image.name.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6]) / 2**48


def _by_file(data: LabeledData, path: str) -> _Chooses:
    """Names as they are in the data, or the names of the files alone."""
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RequestError(
            f"A file of a split has an image's name on each line, and {path!r} cannot be read "
            f"({reason}); name another one."
        ) from error
    listed = {line.strip() for line in lines if line.strip()}
    known = {spelling for image in data.images for spelling in _spellings(image)}
    unknown = sorted(listed - known)
    if unknown:
        raise RequestError(
            f"{path!r} names {len(unknown)} images that are not in the data, such as "
            f"{unknown[0][:100]!r}; correct it."
        )
    return lambda image: not listed.isdisjoint(_spellings(image))


def _spellings(image: LabeledImage) -> tuple[str, ...]:
    name = PurePosixPath(image.name)
    return image.name, name.name, name.stem, image.path.name


_KINDS: Final[dict[str, Callable[[LabeledData, str], _Chooses]]] = {
    "dataset": _by_dataset,
    "tag": _by_tag,
    "hash": _by_hash,
    "file": _by_file,
}
