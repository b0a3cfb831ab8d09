"""The figures of an evaluation as sections of an HTML report, with the worst images drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from PIL import Image, ImageDraw

from florence2.errors import ImageError
from florence2.evaluation.html_report import Curve, HtmlReport
from florence2.evaluation.measure import (
    FIGURES,
    ClassFigures,
    Confusion,
    Evaluation,
    ImageMistakes,
    TextEvaluation,
    TextFigures,
    class_key,
    rings_of,
    true_rings,
)
from florence2.evaluation.metrics import Estimate
from florence2.images import open_image
from florence2.labeled.records import LabeledImage, LeftOut, Ring

WORST: Final = 12
"""How many images or answers with mistakes are shown."""
_SHOWN_SIDE_PX: Final = 560
_MOST_NAMED: Final = 20
_MOST_CONFUSED: Final = 25
_MOST_CURVES: Final = 8
_MOST_UNLABELED: Final = 10
_RIGHT, _TRUE, _WRONG, _MISSED = "#0072b2", "#009e73", "#d52b00", "#e6b800"
_EDGE: Final = "#202020"
_MOST_SAID: Final = 4
_UNIT: Final = (0.0, 1.0)


def located_sections(
    report: HtmlReport, evaluation: Evaluation, images: Mapping[str, LabeledImage]
) -> None:
    """Figures of each class, curves, calibration, confusion, and the worst images drawn.

    ``images`` are the labeled ones by name; one file is open at a time.
    """
    total = evaluation.total
    report.text(
        f"{len(evaluation.images)} images with {total.num_true} labeled objects; overlaps are of "
        f"{evaluation.by}. Each figure has its 95 % interval over images drawn anew. Precision, "
        "recall and F1 are at an overlap of 0.5, of what has at least the score of the threshold; "
        "IoU is the mean overlap of what was rightly found."
    )
    if evaluation.unlabeled:
        report.text(unlabeled_sentence(evaluation))
    report.table(_FIGURE_HEAD, [_figure_row(one) for one in (total, *evaluation.classes)])
    curves = [
        Curve(one.name, one.curve)
        for one in sorted(evaluation.classes, key=lambda one: -one.num_true)[:_MOST_CURVES]
        if one.curve
    ]
    if curves:
        report.section("Precision and recall")
        if len(evaluation.classes) > _MOST_CURVES:
            report.text(f"Of the {_MOST_CURVES} classes with the most labeled objects.")
        report.curves(curves, "recall", "precision", x_range=_UNIT, y_range=_UNIT)
    _calibration(report, evaluation)
    report.section("Confusion")
    report.text(
        "Rows are what is there, columns what it was called. Nothing: not found, or not there."
    )
    report.table(*_confusion_table(evaluation.confusion))
    _worst_images(report, evaluation.images, images)


def text_sections(report: HtmlReport, evaluation: TextEvaluation) -> None:
    """Figures of texts, and the worst answers beside what would be right."""
    report.table(TEXT_HEAD, [text_row(one) for one in evaluation.figures])
    worst = [one for one in evaluation.answers if not one.is_exact][:WORST]
    if worst:
        report.section("The worst answers")
        report.table(
            ("image", "about", "wanted", "answered"),
            [(one.image, one.subject, " / ".join(one.wanted), one.found) for one in worst],
        )


def named_section(report: HtmlReport, title: str, named: Sequence[LeftOut]) -> None:
    """What failed or was left out, the first of it by name."""
    if not named:
        return
    report.section(f"{title}: {len(named)}")
    report.table(("name", "reason"), [(one.name, one.reason) for one in named[:_MOST_NAMED]])
    if len(named) > _MOST_NAMED:
        report.text(f"... and {len(named) - _MOST_NAMED} more, which the JSON file names.")


TEXT_HEAD: Final = ("about", "texts", "exact", "characters wrong")
_FIGURE_HEAD: Final = (
    "class", "there", "found", "threshold", *FIGURES.values(), "best F1", "at score",
)  # fmt: skip


def _figure_row(one: ClassFigures) -> tuple[object, ...]:
    """One class, or all, under ``_FIGURE_HEAD``."""
    # Beside each other, values and intervals are wider than a page.
    estimates = (shown(getattr(one, key)).replace(" (", "\n(") for key in FIGURES)
    return (
        one.name,
        one.num_true,
        one.num_found,
        one.threshold,
        *estimates,
        one.best_f1,
        one.best_threshold,
    )


def text_row(one: TextFigures) -> tuple[object, ...]:
    """One subject, or all, under ``TEXT_HEAD``."""
    return one.name, one.exact.count, shown(one.exact), shown(one.character_errors)


def unlabeled_sentence(evaluation: Evaluation) -> str:
    """What was found that the data cannot judge."""
    most = [*evaluation.unlabeled.items()][:_MOST_UNLABELED]
    listed = ", ".join(f"{name} ({count})" for name, count in most)
    return (
        f"Of classes that the data does not have {sum(evaluation.unlabeled.values())} objects were "
        f"found, which are in no figure: {listed}."
    )


def shown(value: Estimate) -> str:
    """A figure with its interval, such as "0.912 (0.87-0.95)"; empty where there is none."""
    if value.value is None:
        return ""
    return f"{value.value:.3f} ({value.low:.2f}-{value.high:.2f})"


def _calibration(report: HtmlReport, evaluation: Evaluation) -> None:
    total = evaluation.total
    if not total.reliability:
        return
    report.section("Calibration")
    report.text(
        "Scores can be trusted where the share that is right equals them, on the diagonal: of what "
        "has a score of 0.8 four in five are right. ECE is the mean distance from it."
    )
    points = [(one.score, one.right) for one in total.reliability]
    report.curves(
        [Curve("as found", points), Curve("as it should be", [(0.0, 0.0), (1.0, 1.0)])],
        "mean score",
        "share right",
        x_range=_UNIT,
        y_range=_UNIT,
    )
    report.table(
        ("scores from", "predictions", "mean score", "share right"),
        [(f"{one.low:.1f}", one.count, one.score, one.right) for one in total.reliability],
    )
    lows = sorted({one.low for one in total.reliability})
    report.text("Of each class, by the lowest score of a bin: the share right, and of how many.")
    report.table(
        ("class", *(f"{low:.1f}" for low in lows)),
        [
            (one.name, *(_bin_cell(one, low) for low in lows))
            for one in evaluation.classes
            if one.reliability
        ],
    )


def _bin_cell(figures: ClassFigures, low: float) -> str | None:
    found = [one for one in figures.reliability if one.low == low]
    return f"{found[0].right:.2f} of {found[0].count}" if found else None


def _confusion_table(
    confusion: Confusion,
) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
    """Of many classes those with the most mistakes, and nothing."""
    last = len(confusion.names) - 1
    wrong = {
        place: sum(confusion.counts[place]) + sum(row[place] for row in confusion.counts)
        - 2 * confusion.counts[place][place]
        for place in range(last)
    }  # fmt: skip
    chosen = sorted(sorted(wrong, key=lambda place: -wrong[place])[:_MOST_CONFUSED])
    chosen.append(last)
    head = ("there", *(confusion.names[place] for place in chosen))
    rows: list[tuple[object, ...]] = [
        (confusion.names[row], *(confusion.counts[row][column] or None for column in chosen))
        for row in chosen
    ]
    return head, rows


def _worst_images(
    report: HtmlReport, mistakes: Sequence[ImageMistakes], images: Mapping[str, LabeledImage]
) -> None:
    worst = [one for one in mistakes if one.wrong + one.missed][:WORST]
    if not worst:
        return
    report.section("The worst images")
    report.text(
        "Blue: rightly found, with what is there in green. Red: found and not there, or of another "
        "class. Yellow: there and not found."
    )
    for one in worst:
        caption = _caption(one, images[one.name])
        try:
            with open_image(images[one.name].path) as opened:
                picture = drawn(opened.image, images[one.name], one)
        except ImageError as error:
            report.text(f"{caption} ({error})")
            continue
        report.picture(picture, caption)


def _caption(mistakes: ImageMistakes, image: LabeledImage) -> str:
    """How many are right, wrong and missed, and which the first mistakes are."""
    said = []
    for found, true in mistakes.pairs:
        called = "" if found is None else mistakes.found[found].label
        there = "" if true is None else image.objects[true].label
        if called and there and class_key(called) != class_key(there):
            said.append(f"{there} called {called}")
        elif not there:
            said.append(f"{called} not there")
        elif not called:
            said.append(f"{there} missed")
    more = len(said) - _MOST_SAID
    named = ", ".join(said[:_MOST_SAID]) + (f" and {more} more" if more > 0 else "")
    return (
        f"{mistakes.name}: {mistakes.right} right, {mistakes.wrong} wrong, {mistakes.missed} "
        f"missed ({named})"
    )


def drawn(picture: Image.Image, image: LabeledImage, mistakes: ImageMistakes) -> Image.Image:
    """A small copy of an image with what was found and what is there."""
    scale = min(1.0, _SHOWN_SIDE_PX / max(picture.size))
    small = picture.resize([max(1, round(side * scale)) for side in picture.size])
    draw = ImageDraw.Draw(small)
    for rings, color in _lines(image, mistakes):
        for ring in rings:
            points = [value * scale for value in (*ring, *ring[:2])]
            # A dark edge, for colors that are the image's own too.
            draw.line(points, fill=_EDGE, width=4)
            draw.line(points, fill=color, width=2)
    return small


def _lines(image: LabeledImage, mistakes: ImageMistakes) -> Iterator[tuple[Sequence[Ring], str]]:
    """Wrong and missed ones come last, over the others."""
    by_color: dict[str, list[Sequence[Ring]]] = {
        color: [] for color in (_TRUE, _RIGHT, _MISSED, _WRONG)
    }
    for found, true in mistakes.pairs:
        is_right = (
            found is not None
            and true is not None
            and class_key(mistakes.found[found].label) == class_key(image.objects[true].label)
        )
        if true is not None:
            by_color[_TRUE if is_right else _MISSED].append(true_rings(image.objects[true]))
        if found is not None:
            by_color[_RIGHT if is_right else _WRONG].append(rings_of(mistakes.found[found]))
    for color, several in by_color.items():
        yield from ((rings, color) for rings in several)
