"""``predict`` of the SDK's command line for a local folder or image."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from florence2.engine.scheduler import Priority
from florence2.errors import RequestError
from florence2.images import open_image
from florence2.records import Failure
from serve.answering import Answering
from serve.console import complain, say
from serve.labeling.previews import draw_preview, preview_pixels
from serve.predict.predictor import Call
from serve.sdk import sly
from serve.settings import parse_settings

_BATCH: Final = 16


def predict_path(answering: Answering, arguments: argparse.Namespace) -> int:
    """Writes ``OUTPUT/[folder/]image.json`` for every image; 1 when some failed.

    The SDK's own sends a whole folder as one batch, which one damaged image ends. Raises
    RequestError for settings or a path that cannot be used.
    """
    source, output = Path(arguments.input), Path(arguments.output)
    settings = parse_settings(arguments.settings or {})
    images = sorted(_images(source))
    if not images:
        raise RequestError(f"Images are labeled, and {source} holds none; name another folder.")
    target = output / source.name if source.is_dir() else output
    target.mkdir(parents=True, exist_ok=True)
    failed = 0
    for start in range(0, len(images), _BATCH):
        batch = images[start : start + _BATCH]
        for path, outcome in zip(
            batch, answering.answer(batch, settings, Call(Priority.BULK)), strict=True
        ):
            if isinstance(outcome, Failure):
                failed += 1
                complain(f"{path.name}: {outcome.message}")
            else:
                _write(path, outcome.annotation, target, draw=arguments.draw)
    say(f"{len(images) - failed} of {len(images)} images are labeled in {target}.")
    return 1 if failed else 0


def _images(source: Path) -> Iterator[Path]:
    if source.is_file():
        yield source
        return
    if not source.is_dir():
        raise RequestError(f"An image or a folder is labeled, and there is no {source}; check it.")
    for path in source.iterdir():
        if path.is_file() and path.suffix.lower() in sly.image.SUPPORTED_IMG_EXTS:
            yield path


def _write(path: Path, annotation: sly.Annotation, target: Path, *, draw: bool) -> None:
    sly.json.dump_json_file(annotation.to_json(), str(target / f"{path.name}.json"))
    if draw:
        pixels = preview_pixels(open_image(path).image)
        draw_preview(pixels, annotation, target / f"{path.stem}.preview.jpg")
