"""Drawn clips with exact truth: things of the scenes that move, cross each other and leave.

Positions are fractions 0..1 of the image, as in ``scene``. Encoding needs the ``video`` extra.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Final

import numpy as np

from florence2.records import BoxXyxy, SizeWh
from florence2_demo import geometry
from florence2_demo.drawing import Pixels, draw_pixels
from florence2_demo.geometry import Points, Pose
from florence2_demo.palette import object_shade
from florence2_demo.scene import Scene, SceneObject, make_scene
from florence2_demo.shapes import shape_of

MIN_VISIBLE: Final = 0.4
"""A thing of which less is seen is not in a frame's truth."""
_MAP_LONG_SIDE_PX: Final = 192
_KINDS: Final = ("ball", "car", "star", "house", "cup", "flower")
_COLOURS: Final = ("red", "yellow", "green", "blue", "purple", "black")


@dataclass(frozen=True, slots=True)
class Mover:
    """A thing on its way: where its centre is at the start, and how far it goes in a second.

    ``sway_xy`` and ``sway_s`` add a swing of that reach and period, so that not all go straight.
    """

    kind: str
    colour: str
    rgb: tuple[int, int, int]
    extent_wh: tuple[float, float]
    start_xy: tuple[float, float]
    per_s_xy: tuple[float, float]
    sway_xy: tuple[float, float] = (0.0, 0.0)
    sway_s: float = 2.0

    def centre_xy(self, time_s: float) -> tuple[float, float]:
        swing = math.sin(2 * math.pi * time_s / self.sway_s)
        x, y = (
            start + speed * time_s + reach * swing
            for start, speed, reach in zip(self.start_xy, self.per_s_xy, self.sway_xy, strict=True)
        )
        return x, y


@dataclass(frozen=True, slots=True)
class Clip:
    """``movers`` stand in front of ``scene``'s background, later ones before earlier ones."""

    scene: Scene
    movers: tuple[Mover, ...]
    num_frames: int
    fps: int

    @property
    def size_wh(self) -> SizeWh:
        return self.scene.size_wh

    def pixels(self, frame: int) -> Pixels:
        """A frame as [h, w, 3] uint8 RGB."""
        things = tuple(thing for _, thing in self._things(frame))
        return draw_pixels(replace(self.scene, objects=things))

    def truth(self, frame: int) -> dict[int, tuple[str, BoxXyxy]]:
        """Kind and box in pixels of every mover that is seen well enough, by its number."""
        width, height = self.size_wh
        return {
            number: (thing.kind, _scaled(thing.box_xyxy, width, height))
            for number, thing in self._things(frame)
            if thing.visible >= MIN_VISIBLE
        }

    def _things(self, frame: int) -> list[tuple[int, SceneObject]]:
        found = []
        for number, mover in enumerate(self.movers):
            pose = Pose(mover.centre_xy(frame / self.fps), mover.extent_wh, 0.0, mirrored=False)
            outline = geometry.posed(shape_of(mover.kind).outline, pose, self.size_wh)
            clipped = geometry.clip_to_image(outline)
            if len(clipped) >= 3:
                found.append((number, _thing(mover, pose, clipped)))
        shares = _visible_shares([thing for _, thing in found], self.size_wh)
        return [
            (number, replace(thing, visible=share))
            for (number, thing), share in zip(found, shares, strict=True)
        ]


def _scaled(box: geometry.FractionBox, width: int, height: int) -> BoxXyxy:
    x1, y1, x2, y2 = box
    return x1 * width, y1 * height, x2 * width, y2 * height


def _thing(mover: Mover, pose: Pose, clipped: Points) -> SceneObject:
    points = geometry.as_pairs(clipped)
    box = geometry.tight_box(clipped)
    return SceneObject(mover.kind, mover.colour, mover.rgb, box, points, points, pose, 1.0, 0.0)


def _visible_shares(things: list[SceneObject], size_wh: SizeWh) -> list[float]:
    """The share of each full shape that is neither hidden by later ones nor out of the image."""
    scale = _MAP_LONG_SIDE_PX / max(size_wh)
    map_wh = np.array([round(size_wh[0] * scale), round(size_wh[1] * scale)])
    owner = np.zeros((map_wh[1], map_wh[0]), np.uint8)
    wholes = []
    for number, thing in enumerate(things, 1):
        outline = geometry.posed(shape_of(thing.kind).outline, thing.pose, size_wh)
        geometry.fill_polygon(owner, outline * map_wh, number)
        wholes.append(abs(geometry.area(outline)) * float(map_wh.prod()))
    counts = np.bincount(owner.ravel(), minlength=len(things) + 1)
    return [min(1.0, counts[n] / whole) for n, whole in enumerate(wholes, 1)]


def make_clip(
    seed: int, *, seconds: float = 6.0, fps: int = 25, size_wh: SizeWh = (320, 240)
) -> Clip:
    """The clip of a seed, always the same: of four things two cross, one leaves, one comes later.

    Of the two that cross, every second clip has two of one kind.
    """
    rng = np.random.default_rng([seed, 0xC11B])
    scene = make_scene(seed, size_wh=size_wh)
    scene = replace(scene, objects=(), texts=())
    colours = [str(one) for one in rng.permutation(_COLOURS) if one != scene.background.colour]
    kinds = [str(one) for one in rng.permutation(_KINDS)[:4]]
    if seed % 2:
        kinds[1] = kinds[0]
    lanes = rng.permutation([0.24, 0.5, 0.76])
    speed = float(rng.uniform(0.6, 0.8)) / seconds
    drift = float(rng.uniform(0.02, 0.05))
    starts_and_speeds = (
        # Two that meet in the middle of the clip, one a little above the other.
        ((0.14, lanes[0] - drift), (speed, 0.0)),
        ((0.86, lanes[0] + drift), (-speed, 0.0)),
        # One that is gone after two thirds, one that comes in after a third.
        ((0.5, lanes[1]), (0.6 / (0.6 * seconds), 0.0)),
        ((-0.35, lanes[2]), (0.9 / seconds, 0.0)),
    )
    movers = []
    for number, (start, per_s) in enumerate(starts_and_speeds):
        extent = float(rng.uniform(0.2, 0.28))
        stretch = math.sqrt(shape_of(kinds[number]).aspect)
        movers.append(
            Mover(
                kinds[number],
                colours[number],
                object_shade(colours[number], rng),
                (extent * stretch, extent / stretch),
                (float(start[0]), float(start[1])),
                per_s,
                (0.0, float(rng.uniform(0.0, 0.03))),
                float(rng.uniform(1.5, 3.0)),
            )
        )
    return Clip(scene, tuple(movers), round(seconds * fps), fps)


def write_clip(clip: Clip, path: Path) -> None:
    """The clip as a video file of the kind that ``path`` ends in."""
    write_frames((clip.pixels(number) for number in range(clip.num_frames)), path, clip.fps)


def write_frames(
    frames: Iterator[Pixels],
    path: Path,
    fps: int,
    codec: str = "libx264",
    *,
    options: Mapping[str, str] | None = None,
    container_options: Mapping[str, str] | None = None,
) -> None:
    """RGB frames [h, w, 3] of one size as a video; odd sizes keep all their pixels."""
    import av

    with av.open(str(path), "w", options=dict(container_options or {})) as container:
        stream = None
        for pixels in frames:
            if stream is None:
                stream = container.add_stream(
                    codec, rate=Fraction(fps), options=dict(options or {})
                )
                stream.height, stream.width = pixels.shape[:2]
                is_odd = stream.height % 2 or stream.width % 2
                stream.pix_fmt = "yuv444p" if is_odd else "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        if stream is not None:
            container.mux(stream.encode(None))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a drawn clip to try the labeling on.")
    parser.add_argument("path", type=Path, help="such as clip.mp4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=6.0)
    asked = parser.parse_args()
    write_clip(make_clip(asked.seed, seconds=asked.seconds), asked.path)


if __name__ == "__main__":
    main()
