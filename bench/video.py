"""How well objects keep their numbers in drawn clips, for each tracker, and how fast it is.

python -m bench.video --clips 8 --every 1 3 5 10
python -m bench.video --memory

Clips of ``florence2_demo.clips`` (things that move, cross each other, leave and come) are encoded
as MP4 and labeled with the demo checkpoint by the command's own way, asked for the kinds that are
in them. What was found in the asked frames is then followed by each tracker, and all frames are
compared with the truth: a box is right with its class and an IoU of at least 0.5.

IDF1: Ristani et al., Performance measures and a data set for multi-target, multi-camera tracking
(2016). MOTA and switches: Bernardin and Stiefelhagen, Evaluating multiple object tracking
performance: the CLEAR MOT metrics (2008).

The SDK's own tracker is compared where ``lap``, ``cython_bbox`` and ``matplotlib`` are installed
(without its appearance model, whose weights it downloads).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from florence2.evaluation.detection import box_ious
from florence2.records import BoxXyxy
from florence2_demo.clips import Clip, make_clip, write_clip, write_frames
from serve.cli.loading import one_model
from serve.labeling.run import Job, ModelSource
from serve.labeling.settings import label_settings
from serve.predict.predictor import Predictor
from serve.video.frames import Range
from serve.video.journal import Detection, FrameJournal, Seen
from serve.video.run import label_video
from serve.video.tracking import (
    SURE_SCORE,
    LibraryTracker,
    MakeTracker,
    find_tracks,
    followed_frames,
    oc_sort,
    rate_options,
)

RIGHT_IOU = 0.5
Boxes = Mapping[Any, tuple[str, BoxXyxy]]
"""Class and box of everything in a frame, by its number."""


@dataclass
class Counts:
    """What is counted over all frames of a clip; they can be added."""

    truth: int = 0
    found: int = 0
    right_ids: int = 0
    missed: int = 0
    wrong: int = 0
    switches: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            *(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    @property
    def idf1(self) -> float:
        return 2 * self.right_ids / (self.truth + self.found)

    @property
    def mota(self) -> float:
        return 1 - (self.missed + self.wrong + self.switches) / self.truth


def compare(truth: Sequence[Boxes], found: Sequence[Boxes]) -> Counts:
    """What became of the truth of every frame."""
    counts = Counts()
    together: Counter[tuple[Any, Any]] = Counter()
    lengths: tuple[Counter[Any], Counter[Any]] = Counter(), Counter()
    last: dict[Any, Any] = {}
    for real, ours in zip(truth, found, strict=True):
        lengths[0].update(real.keys())
        lengths[1].update(ours.keys())
        ious = _ious(real, ours)
        names = list(real), list(ours)
        together.update(
            (names[0][row], names[1][column]) for row, column in np.argwhere(ious >= RIGHT_IOU)
        )
        pairs = _pairs(names, ious, last)
        counts.missed += len(real) - len(pairs)
        counts.wrong += len(ours) - len(pairs)
        counts.switches += sum(last.get(a, b) != b for a, b in pairs.items())
        last |= pairs
    counts.truth, counts.found = (length.total() for length in lengths)
    overlap = np.array([[together[a, b] for b in lengths[1]] for a in lengths[0]])
    if overlap.size:
        counts.right_ids = int(overlap[linear_sum_assignment(-overlap)].sum())
    return counts


def _ious(real: Boxes, ours: Boxes) -> NDArray[np.float64]:
    """Overlaps [real, ours] of boxes of one class."""
    same = np.array([[kind == name for name, _ in ours.values()] for kind, _ in real.values()])
    ious = box_ious([box for _, box in real.values()], [box for _, box in ours.values()])
    return ious * same.reshape(ious.shape)


def _pairs(
    names: tuple[list[Any], list[Any]], ious: NDArray[np.float64], last: Mapping[Any, Any]
) -> dict[Any, Any]:
    """Who is who: as in the frame before where that is still right, else by the best overlaps."""
    # More than all overlaps together.
    stays = np.array([[last.get(a) == b for b in names[1]] for a in names[0]]).reshape(ious.shape)
    worth = np.where(ious >= RIGHT_IOU, ious + stays * len(names[0]), 0)
    rows, columns = linear_sum_assignment(-worth)
    return {
        names[0][row]: names[1][column]
        for row, column in zip(rows, columns, strict=True)
        if worth[row, column] > 0
    }


class SdkTracker:
    """The SDK's BoT-SORT without appearance and motion of the camera."""

    def __init__(self, asked_rate: float) -> None:
        from supervisely.nn.tracker.botsort.tracker.mc_bot_sort import BoTSORT

        settings = SimpleNamespace(
            name="bench", ablation=False, track_high_thresh=SURE_SCORE, track_low_thresh=0.0,
            new_track_thresh=SURE_SCORE, match_thresh=0.8, proximity_thresh=0.5,
            appearance_thresh=0.25, with_reid=False, cmc_method="none", mot20=False,
            fuse_score=False, track_buffer=rate_options(asked_rate)["lost_track_buffer"],
        )  # fmt: skip
        self._tracker = BoTSORT(settings, frame_rate=asked_rate)

    def follow(self, found: list[Detection], time_s: float) -> list[int | None]:
        rows = [[*one.box_xyxy, one.score, 0] for one in found]
        image = np.zeros((8, 8, 3), np.uint8)
        _, numbers = self._tracker.update(np.array(rows, np.float64).reshape(-1, 6), image)
        return [one["track_id"] for one in numbers]


def trackers_to_compare() -> dict[str, MakeTracker]:
    import trackers

    sure = {"high_conf_det_threshold": SURE_SCORE, "minimum_consecutive_frames": 1}
    begins = {"track_activation_threshold": SURE_SCORE}

    def by(kind: Callable[..., object], **options: float) -> MakeTracker:
        return lambda rate: LibraryTracker(kind(**rate_options(rate), **options))

    compared: dict[str, MakeTracker] = {
        "trackers OC-SORT": oc_sort,
        "trackers ByteTrack": by(trackers.ByteTrackTracker, **sure, **begins),
        "trackers BoT-SORT": by(trackers.BoTSORTTracker, **sure, **begins, enable_cmc=False),
        "trackers SORT": by(trackers.SORTTracker, minimum_consecutive_frames=1, **begins),
    }
    try:
        import cython_bbox  # noqa: F401
        import lap  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        print(f"The SDK's own tracker is left out: {error.name} is not installed.")
    else:
        compared["supervisely BoT-SORT"] = SdkTracker
    return compared


def label_clip(
    clip: Clip, video: Path, out: Path, every: int, model: ModelSource
) -> tuple[list[Seen], float]:
    """What was found in the asked frames, and frames of the clip a second."""
    kinds = dict.fromkeys(mover.kind for mover in clip.movers)
    settings = label_settings(prompt=". ".join(kinds))
    report = label_video(settings, Job(video, out), Range(every), model)
    journal = FrameJournal(out / "frames.jsonl")
    return list(journal.seen()), clip.num_frames / report.run.seconds


def followed(clip: Clip, seen: list[Seen], every: int, make: MakeTracker) -> list[Boxes]:
    rate = clip.fps / every
    tracks, _ = find_tracks(seen, rate, make)
    frames: list[dict[Any, tuple[str, BoxXyxy]]] = [{} for _ in range(clip.num_frames)]
    for frame in followed_frames(seen, tracks, rate, make):
        frames[frame.index] = {
            key: (tracks[key].class_name, box) for key, box in frame.boxes.items()
        }
    return list(frames)


def measure(num_clips: int, first_seed: int, strides: Sequence[int]) -> None:
    predictor = Predictor(one_model("demo", "cpu", "auto", "auto"), fixed_shapes={})
    model = ModelSource("demo", lambda: predictor)
    compared = trackers_to_compare()
    clips = [make_clip(first_seed + number) for number in range(num_clips)]
    truth = [[clip.truth(frame) for frame in range(clip.num_frames)] for clip in clips]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        videos = [Path(folder) / f"{number}.mp4" for number in range(num_clips)]
        for clip, video in zip(clips, videos, strict=True):
            write_clip(clip, video)
        for every in strides:
            labeled = [
                label_clip(clip, video, video.with_suffix(f".{every}"), every, model)
                for clip, video in zip(clips, videos, strict=True)
            ]
            speed = num_clips / sum(1 / rate for _, rate in labeled)
            for name, make in compared.items():
                total = sum(
                    (
                        compare(real, followed(clip, seen, every, make))
                        for clip, real, (seen, _) in zip(clips, truth, labeled, strict=True)
                    ),
                    Counts(),
                )
                rows.append(
                    f"| {every} | {name} | {total.idf1:.3f} | {total.mota:.3f} | "
                    f"{total.switches} | {total.wrong} | {total.missed} | {speed:.0f} |"
                )
    print("| every | tracker | IDF1 | MOTA | switches | wrong | missed | frames/s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))


def peak_mib(num_frames: int, every: int) -> float:
    """The peak memory of a process that labels a clip of so many frames."""
    command = [sys.executable, "-m", "bench.video", "--peak", str(num_frames), str(every)]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(ended.stdout.splitlines()[-1]))


def label_and_print_peak(num_frames: int, every: int) -> None:
    predictor = Predictor(one_model("demo", "cpu", "auto", "auto"), fixed_shapes={})
    clip = make_clip(0)
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "clip.mp4"
        write_frames(islice(_over_and_over(clip), num_frames), video, clip.fps)
        model = ModelSource("demo", lambda: predictor)
        label_clip(clip, video, Path(folder) / "out", every, model)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def _over_and_over(clip: Clip) -> Iterator[NDArray[np.uint8]]:
    frames = [clip.pixels(number) for number in range(clip.num_frames)]
    while True:
        yield from frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--every", type=int, nargs="+", default=[1, 3, 5, 10])
    parser.add_argument("--memory", action="store_true", help="peak memory by a clip's length")
    parser.add_argument("--peak", type=int, nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.peak:
        label_and_print_peak(*asked.peak)
    elif asked.memory:
        for num_frames in (500, 2_000, 8_000):
            print(f"{num_frames} frames: {peak_mib(num_frames, 20):.0f} MiB at most")
    else:
        measure(asked.clips, asked.first_seed, asked.every)


if __name__ == "__main__":
    main()
