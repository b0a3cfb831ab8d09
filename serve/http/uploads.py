"""The files and the settings of a multipart form, and pictures that arrive as text."""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import File, Form, Request, UploadFile

from florence2.errors import RequestError
from florence2.images import check_header
from serve.http.bodies import MAX_FILES, MAX_IMAGE_BYTES, kind_of, readable_size
from serve.http.errors import TooLargeError
from serve.settings import check_placement

_DATA_URL: Final = re.compile(r"\s*data:[^,;]*(?:;[^,;]*)*;base64,", re.IGNORECASE)
_WHITESPACE: Final = {ord(character): None for character in " \t\r\n"}


def decode_image(encoded: object, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
    """The bytes of an image file sent as base64, with or without ``data:image/png;base64,``.

    Line breaks and missing padding are tolerated. Raises RequestError if it is not base64 and
    TooLargeError for more than ``max_bytes``; whether it is an image shows when it is opened.
    """
    if not isinstance(encoded, str):
        raise RequestError(
            "The image must be text in base64, and "
            f"{kind_of(encoded)} was received; encode the image file."
        )
    prefix = _DATA_URL.match(encoded)
    text = (encoded[prefix.end() :] if prefix else encoded).translate(_WHITESPACE).rstrip("=")
    if len(text) * 3 // 4 > max_bytes:
        raise TooLargeError(
            f"An encoded image can have at most {readable_size(max_bytes)}, and "
            f"{readable_size(len(text) * 3 // 4)} were received; make it smaller."
        )
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(
            f"The image must be in base64, and {text[:20]!r}... is not; encode the image file."
        ) from error
    if not data:
        raise RequestError("The encoded image is empty; encode the image file and send it again.")
    return data


Files = Annotated[Sequence[UploadFile], File()]
FormText = Annotated[str, Form()]
# A form without files gets our sentence, not the framework's.
NO_FILES: Final[tuple[UploadFile, ...]] = ()

_LONGEST_NAME: Final = 100
_PIECE_BYTES: Final = 2**20
_UNPRINTABLE: Final = re.compile(r"[^\w .,()+@=~#&'-]")


@dataclass(frozen=True, slots=True)
class Upload:
    """One file of a form. ``name`` is for people to read: it is never a path, and two files of a
    request may have the same."""

    name: str
    data: bytes


def read_uploads(
    files: Sequence[UploadFile], max_files: int = MAX_FILES, max_bytes: int = MAX_IMAGE_BYTES
) -> list[Upload]:
    """The files of a form in the order they were sent; blocks while it reads.

    Raises RequestError for no file or more than ``max_files``, TooLargeError for one of more
    than ``max_bytes``.
    """
    if not files:
        raise RequestError("The form must have at least one file in 'files'; add it.")
    if len(files) > max_files:
        raise RequestError(
            f"A request can have at most {max_files} files, and {len(files)} were received; "
            "send them in several requests."
        )
    return [_read(file, index, max_bytes) for index, file in enumerate(files)]


def read_one_upload(files: Sequence[UploadFile], max_bytes: int = MAX_IMAGE_BYTES) -> Upload:
    """The file of a form that must have exactly one."""
    return _read(_only(files), 0, max_bytes)


def save_one_upload(files: Sequence[UploadFile], folder: Path, stem: str, max_bytes: int) -> Path:
    """The file of a form that must have exactly one, under a name of our own; never in memory."""
    file = _only(files)
    name = clean_name(file.filename, 0)
    path = folder / (stem + Path(name).suffix[:8])
    left = max_bytes
    with path.open("wb") as saved:
        while piece := file.file.read(_PIECE_BYTES):
            left -= len(piece)
            if left < 0:
                raise _too_large(name, max_bytes)
            saved.write(piece)
    return path


def check_pictures(files: Sequence[UploadFile], max_bytes: int = MAX_IMAGE_BYTES) -> int:
    """The pixels of the largest picture, for what others decode, who look at no header.

    Each file is left at its beginning. Raises TooLargeError for a file, ImageError for a picture
    that is larger than the limits.
    """
    pixels = 0
    for index, file in enumerate(files):
        if (file.size or 0) > max_bytes:
            raise _too_large(clean_name(file.filename, index), max_bytes)
        pixels = max(pixels, math.prod(check_header(file.file)))
        file.file.seek(0)
    return pixels


def _only(files: Sequence[UploadFile]) -> UploadFile:
    if len(files) != 1:
        raise RequestError(
            f"The form must have exactly one file in 'files', and {len(files)} were received; "
            "send one, or use /inference_batch."
        )
    return files[0]


def _read(file: UploadFile, index: int, max_bytes: int) -> Upload:
    name = clean_name(file.filename, index)
    data = file.file.read(max_bytes + 1)
    # What the form's parser holds of it, up to a megabyte a file in memory.
    file.file.close()
    if len(data) > max_bytes:
        raise _too_large(name, max_bytes)
    return Upload(name, data)


def _too_large(name: str, max_bytes: int) -> TooLargeError:
    return TooLargeError(
        f"A file can have at most {readable_size(max_bytes)}, and {name!r} has more; make it "
        "smaller."
    )


async def check_fields(request: Request) -> None:
    """RequestError for a setting that is a field of its own, which nothing would read."""
    check_placement(dict.fromkeys(await request.form()))


def clean_name(name: str | None, index: int) -> str:
    """A file's name for messages: no folders, no unprintable characters, never empty."""
    last = re.split(r"[/\\]", name or "")[-1]
    cleaned = _UNPRINTABLE.sub("", last).strip(" .")[-_LONGEST_NAME:]
    return cleaned or f"image {index + 1}"


def parse_state(form_state: str | None, form_settings: str | None) -> dict[str, Any]:
    """The ``state`` of a form's two text fields, by the rules that the SDK's clients rely on.

    ``state`` wins; without it ``settings`` is taken as the state, so clients send
    ``{"settings": {...}}`` there. Settings sent there without that wrapper would be ignored
    without a word, so they are taken as the settings too.

    Raises RequestError if the field that counts is not a JSON object, or if a ``state`` has
    settings beside ``settings``.
    """
    if form_state and form_state.strip() != "{}":
        state = _parse_object(form_state, "state")
        check_placement(state)
        return state
    state = _parse_object(form_settings or "{}", "settings")
    if not state or "settings" in state:
        check_placement(state)
        return state
    return {**state, "settings": state}


def _parse_object(text: str, field: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"The field {field!r} must be a JSON object, and {text[:60]!r} cannot be read as "
            "one; correct it."
        ) from error
    if not isinstance(value, dict):
        raise RequestError(
            f"The field {field!r} must be a JSON object, and {text[:60]!r} was received; "
            "correct it."
        )
    return value
