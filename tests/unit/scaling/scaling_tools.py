"""Images of one colour, and shards read back by the SDK."""

from __future__ import annotations

import io
from pathlib import Path

from label_fakes import color_of, read_project
from PIL import Image

from serve.scaling.storage import Storage


def picture(number: int) -> bytes:
    """A file of one colour, which tells the fake model which image it is."""
    file = io.BytesIO()
    Image.new("RGB", (64, 48), color_of(number)).save(file, "PNG")
    return file.getvalue()


def read_shard(target: Storage, folder: str, copy: Path):
    """The annotations by image name and the folder of a shard, brought to this machine."""
    for name in target.names(folder, depth=9):
        if "." in name.rsplit("/", 1)[-1]:
            path = copy / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(target.read(f"{folder}/{name}"))
    return read_project(copy)[0], copy
