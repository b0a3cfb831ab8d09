"""Image files and their pixels, and a processor that can be held up."""

from __future__ import annotations

import io
import threading
from dataclasses import dataclass, field

import numpy as np

from florence2.images import open_image
from florence2.pixels import ImageProcessor

RNG = np.random.default_rng(3)
SIZE_WH = (8, 6)
PATIENCE_S = 20


def encoded(picture, kind="PNG", **options):
    """A picture as the bytes of an image file."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def rgb_of(source):
    return np.asarray(open_image(source).image)


def noise(width, height):
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


@dataclass(frozen=True)
class Watched(ImageProcessor):
    """Notes who scales which size where; ``gates`` holds up the images of a width."""

    size_wh: tuple[int, int] = SIZE_WH
    seen: list = field(default_factory=list, hash=False, compare=False)
    gates: dict = field(default_factory=dict, hash=False, compare=False)

    def resize(self, image, helpers=None):
        self.seen.append((image.size, threading.current_thread().name))
        gate = self.gates.get(image.width)
        if gate is not None:
            gate.begun.set()
            assert gate.opened.wait(PATIENCE_S)
        return super().resize(image, helpers)

    @property
    def widths(self):
        return [size[0] for size, _ in self.seen]

    def hold_up(self, width):
        self.gates[width] = Gate()
        return self.gates[width]


class Gate:
    def __init__(self):
        self.begun, self.opened = threading.Event(), threading.Event()
