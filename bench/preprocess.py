"""What it takes to make an image file ready for the network, against the reference's own way.

python bench/preprocess.py [--repeats 11] [--json FILE]

The reference is Pillow's open and convert, then transformers' ``CLIPImageProcessorPil``. Ours is
the file's bytes to normalised float32 pixels. Both are timed in turn in this process, and each
figure is a median. ``one thread``: on both sides. ``a helper``: large images are scaled by two
threads. ``taken``: how long the model's thread waits for an image that was prepared ahead of it.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from florence2.engine.encoding import PreparedImage, Preparer
from florence2.images import open_image
from florence2.pixels import ImageProcessor

KINDS = {
    "640x480 JPEG, photo": ((640, 480), "JPEG", {"quality": 90}),
    "1280x720 JPEG, photo": ((1280, 720), "JPEG", {"quality": 90}),
    "4000x3000 JPEG, photo": ((4000, 3000), "JPEG", {"quality": 95}),
    "1920x1080 PNG, photo": ((1920, 1080), "PNG", {}),
    "1920x1080 PNG, drawing": ((1920, 1080), "PNG", {}),
}
SEED = 3


@dataclass(frozen=True)
class Row:
    """One kind of file; times are medians in milliseconds, of one thread unless said otherwise.

    ``decode_ms`` is the part of both sides that is Pillow's decoder alone.
    """

    kind: str
    megabytes: float
    decode_ms: float
    reference_ms: float
    ours_ms: float
    ratio: float
    helped_ms: float
    helped_ratio: float
    taken_ms: float
    max_difference: float


def picture(size_wh: tuple[int, int], *, is_drawing: bool) -> Image.Image:
    """Smooth shapes of every size: in eight flat shades, or with a sensor's noise."""
    generator = np.random.default_rng(SEED)
    total = np.zeros((size_wh[1], size_wh[0], 3), np.float32)
    for octave in range(2, 9):
        coarse = generator.standard_normal((2**octave, 2**octave, 3), dtype=np.float32)
        total += cv2.resize(coarse, size_wh, interpolation=cv2.INTER_CUBIC) / 1.5**octave
    total = (total - total.min()) / (total.max() - total.min()) * 255
    if is_drawing:
        total = total // 32 * 32
    else:
        total += 3 * generator.standard_normal(total.shape, dtype=np.float32)
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def medians_ms(repeats: int, sides: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The sides take turns, so that all see the same machine.

    Before each timed run is one that is not, so that no side finds the caches and the free memory
    as another one left them.
    """
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            side()
            began = time.perf_counter()
            side()
            spent[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(times) for name, times in spent.items()}


def taken_ms(file: bytes, preparer: Preparer, repeats: int) -> float:
    """The wait for an image that had its time."""
    waits = []
    for _ in range(repeats):
        # An equal copy, as the next request would send.
        image = bytes(bytearray(file))
        preparer.ahead([image])
        time.sleep(0.3)
        began = time.perf_counter()
        if not isinstance(preparer.take(image), PreparedImage):
            raise SystemExit("The image of the benchmark cannot be opened.")
        waits.append(1000 * (time.perf_counter() - began))
    return statistics.median(waits)


def measure(kind: str, repeats: int) -> Row:
    """One row of the table."""
    size_wh, name, options = KINDS[kind]
    target = io.BytesIO()
    picture(size_wh, is_drawing="drawing" in kind).save(target, name, **options)
    file = target.getvalue()
    processor = ImageProcessor()
    reference_processor = CLIPImageProcessorPil(
        size={"height": 768, "width": 768},
        do_center_crop=False,
        image_mean=list(processor.mean),
        image_std=list(processor.std),
    )

    def reference() -> np.ndarray:
        image = Image.open(io.BytesIO(file)).convert("RGB")
        return np.asarray(reference_processor(image, return_tensors="np")["pixel_values"][0])

    def ours() -> np.ndarray:
        return processor.pixels(open_image(file).image)

    with ThreadPoolExecutor(1) as helper:
        ms = medians_ms(
            repeats,
            {
                "decode": lambda: Image.open(io.BytesIO(file)).load(),
                "reference": reference,
                "ours": ours,
                "helped": lambda: processor.normalise(
                    processor.resize(open_image(file).image, helper)
                ),
            },
        )
    preparer = Preparer(processor)
    row = Row(
        kind=kind,
        megabytes=len(file) / 1e6,
        decode_ms=ms["decode"],
        reference_ms=ms["reference"],
        ours_ms=ms["ours"],
        ratio=ms["ours"] / ms["reference"],
        helped_ms=ms["helped"],
        helped_ratio=ms["helped"] / ms["reference"],
        taken_ms=taken_ms(file, preparer, min(repeats, 5)),
        max_difference=float(np.abs(ours() - reference()).max()),
    )
    preparer.close()
    return row


def shortcuts(kind: str) -> list[str]:
    """How far ways that are faster, and not taken, are from the pixels of the full size."""
    size_wh, name, options = KINDS[kind]
    target = io.BytesIO()
    picture(size_wh, is_drawing=False).save(target, name, **options)
    processor = ImageProcessor()
    whole = processor.resize(open_image(target.getvalue()).image).astype(int)

    def drafted(image: Image.Image) -> Image.Image:
        image.draft("RGB", processor.size_wh)
        return image.resize(processor.size_wh, processor.resample)

    def reduced(image: Image.Image) -> Image.Image:
        return image.resize(processor.size_wh, processor.resample, reducing_gap=2.0)

    lines = []
    for way, make in {"draft mode": drafted, "reducing_gap=2": reduced}.items():
        other = np.asarray(make(Image.open(target))).astype(int)
        apart = np.abs(other - whole)
        lines.append(
            f"{kind}, {way}: {100 * np.mean(apart > 0):.0f} % of the values differ, "
            f"by up to {apart.max()} grey levels"
        )
    return lines


HEADER = (
    f"{'file':23}{'MB':>6}{'decoder':>10}{'reference':>11}{'one thread':>12}{'ratio':>7}"
    f"{'a helper':>10}{'ratio':>7}{'taken':>8}{'difference':>12}"
)


def line(row: Row) -> str:
    """A row as text; times in milliseconds."""
    return (
        f"{row.kind:23}{row.megabytes:6.2f}{row.decode_ms:10.1f}{row.reference_ms:11.1f}"
        f"{row.ours_ms:12.1f}{row.ratio:7.2f}{row.helped_ms:10.1f}{row.helped_ratio:7.2f}"
        f"{row.taken_ms:8.2f}{row.max_difference:12.1e}"
    )


def main() -> None:
    """Prints the table; ``--json`` keeps it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    print(HEADER)
    rows = []
    for kind in KINDS:
        rows.append(measure(kind, options.repeats))
        print(line(rows[-1]), flush=True)
    print("\n".join(shortcuts("4000x3000 JPEG, photo")))
    if options.json:
        content = {"torch": torch.__version__, "pillow": Image.__version__}
        content["rows"] = [asdict(row) for row in rows]
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
