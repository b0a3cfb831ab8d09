"""The report of a training: its curves, its figures by class, and answers beside the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from PIL import Image, ImageDraw

from florence2.errors import ImageError
from florence2.evaluation.html_report import COLORS, Curve, HtmlReport
from florence2.images import open_image

_PICTURE_PX: Final = 420
_FONT_PX: Final = 20
"""The page shows two pictures in half of their width."""
_WORDS: Final = 300


def write_report(path: Path, record: Mapping[str, Any], curves: Mapping[str, Any]) -> None:
    """Writes the page, which opens offline.

    ``record`` is what ``training.json`` holds; ``curves`` has ``losses`` and ``validations`` by
    step and ``samples``, see ``florence2.finetune.run.Curves``.
    """
    report = HtmlReport(f"Training of {record['model']}")
    _summary(report, record)
    _curves(report, curves)
    for task in record.get("by_task", ()):
        _by_class(report, task)
    if curves["samples"]:
        report.section("Answers of the best weights beside the truth")
        report.text("Left what is there, right what was found.")
        for sample in curves["samples"]:
            _sample(report, sample)
    report.section("Settings")
    report.table(("setting", "value"), sorted(_flat(record["training"])))
    report.write(path)


def _summary(report: HtmlReport, record: Mapping[str, Any]) -> None:
    report.code(record["command"] or "florence2.finetune.run.fine_tune")
    metric = record["metric"]
    found = (
        "nothing was measured yet" if metric is None else f"{metric['name']} {metric['value']:.4f}"
    )
    images = record["images"]
    report.table(
        ("", ""),
        [
            ("status", record["status"]),
            ("best", f"{found}, at step {record['best_step']}"),
            ("tasks", ", ".join(record["tasks"]) or "pairs of prefix and suffix"),
            ("method", record["method"]),
            ("images", f"{images['train']} to learn from, {images['val']} to measure on"),
            ("left out", str(len(record["left_out"]))),
        ],
    )


def _curves(report: HtmlReport, curves: Mapping[str, Any]) -> None:
    report.section("Loss")
    report.curves([Curve("loss", [tuple(point) for point in curves["losses"]])], "step", "loss")
    by_task: dict[str, list[tuple[float, float]]] = {}
    for one in curves["validations"]:
        for task in one["tasks"]:
            by_task.setdefault(f"{task['task']} {task['metric']}", []).append(
                (one["step"], task["value"])
            )
    if by_task:
        report.section("On the images to measure on")
        lines = [Curve(name, points) for name, points in by_task.items()]
        report.curves(lines, "step", "quality", y_range=(0.0, 1.0))


def _by_class(report: HtmlReport, task: Mapping[str, Any]) -> None:
    report.section(f"{task['task']}: {task['metric']} {task['value']:.4f}")
    report.table(
        ("class", "objects", "average precision", "recall at IoU 0.5"),
        [
            (name, one["count"], one["average_precision"], one["recall"])
            for name, one in task["by_class"].items()
        ],
    )


def _sample(report: HtmlReport, sample: Mapping[str, Any]) -> None:
    caption = f"{sample['name']}, {sample['task']}"
    said = [
        " / ".join(one["label"] for one in sample[side] if not one["rings"])[:_WORDS]
        for side in ("wanted", "found")
    ]
    if any(said):
        caption += f": wanted {said[0]!r}, found {said[1]!r}"
    try:
        picture = open_image(sample["image"]).image
    except ImageError:
        # It was there when it was learned from; the words are still worth showing.
        report.text(caption)
        return
    report.picture(_side_by_side(picture, sample["wanted"], sample["found"]), caption)


def _side_by_side(
    picture: Image.Image, wanted: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]
) -> Image.Image:
    scale = _PICTURE_PX / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    small = picture.resize(size)
    names = sorted({one["label"] for one in (*wanted, *found)})
    both = Image.new("RGB", (2 * size[0] + 6, size[1]), "white")
    for place, objects in enumerate((wanted, found)):
        drawn = small.copy()
        canvas = ImageDraw.Draw(drawn)
        for one in objects:
            color = COLORS[names.index(one["label"]) % len(COLORS)]
            for ring in one["rings"]:
                points = [value * scale for value in ring]
                canvas.polygon(points, outline=color, width=2)
                score = "" if one["score"] is None else f" {one['score']:.2f}"
                _write(canvas, (min(points[0::2]), min(points[1::2])), one["label"] + score, color)
        both.paste(drawn, (place * (size[0] + 6), 0))
    return both


def _write(canvas: ImageDraw.ImageDraw, at_xy: tuple[float, float], text: str, color: str) -> None:
    if not text:
        return
    box = canvas.textbbox(at_xy, text, font_size=_FONT_PX)
    canvas.rectangle(box, fill=color)
    canvas.text(at_xy, text, fill="white", font_size=_FONT_PX)


def _flat(settings: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{before}{name} ")
        else:
            rows.append((f"{before}{name}", str(value)))
    return rows
