"""The page about a run, to be read in the morning: the verdict first, then what to do about it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from florence2.evaluation.html_report import Histogram, HtmlReport, Link, Thumbnail, Tone
from serve.provenance import Manifest
from serve.run_page.figures import LOW_SCORE, ClassFigures, ImageOutcome, LowLabel, RunFigures

PAGE_NAME: Final = "report.html"
_BINS: Final = 20
_MAX_CLASSES: Final = 60
_MAX_NOTES: Final = 20
_MAX_REMARKS: Final = 60
_EXAMPLES_PER_REASON: Final = 5
_MAX_NAME: Final = 120
_MAX_SAID: Final = 60
"""Below a drawing."""
_MAX_MESSAGE: Final = 500
_MAX_VALUE: Final = 2000
_DAY_S: Final = 86_400


@dataclass(frozen=True, slots=True)
class RunPage:
    """What is said about a run.

    ``title`` names what was labeled. ``figures`` are of all images that were done, by this run and
    by those that it went on with; ``num_pending`` images are still to do. ``is_interrupted``:
    somebody stopped it; ``error``: the sentence that it stopped with. ``num_images`` of this run
    took ``seconds``. ``href_of`` gives where an image is opened, empty where nowhere. A command is
    None where there is nothing to do with it; ``advice`` are sentences that stand in their place.
    ``typed_in``: where commands are typed, as ``here`` gives it; empty for anywhere.
    ``undo_commands`` are of every run whose labels are there, ``places`` where things are, by what
    they are, and ``remarks`` sentences about what else is to be known. ``images`` is what images
    are called, such as frames.
    """

    title: str
    manifest: Manifest
    figures: RunFigures
    num_pending: int
    num_images: int
    seconds: float
    href_of: Callable[[ImageOutcome], str]
    is_interrupted: bool = False
    error: str | None = None
    resume_command: str | None = None
    retry_command: str | None = None
    advice: Sequence[str] = ()
    typed_in: str = ""
    undo_commands: Sequence[str] = ()
    places: Mapping[str, Link] = field(default_factory=dict)
    remarks: Sequence[str] = ()
    images: str = "images"
    further_counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_total(self) -> int:
        return self.figures.num_images + self.num_pending


def here() -> str:
    """The folder and the machine that a process works in: its page may be read anywhere."""
    machine = f"on {socket.gethostname()}"
    try:
        folder = os.fsencode(Path.cwd()).decode("utf-8", "backslashreplace")
    except OSError:
        return machine
    return f"in {folder} {machine}"


def original(folder: str) -> Link:
    """Where a page lies whose links are relative to it, for whoever reads a copy."""
    return Link(f"{folder} on {socket.gethostname()}; the links of a copy elsewhere do not open")


def verdict(page: RunPage) -> tuple[str, Tone]:
    """How the run went, in one sentence, and how good that is."""
    counts, total, images = page.figures.counts, page.num_total, page.images
    if page.num_pending:
        return _unfinished(page)
    if not total:
        return f"There were no {images} to label.", "warning"
    everything = f"All {total:,} {images}" if total > 1 else f"The only {images[:-1]}"
    are = "are" if total > 1 else "is"
    if counts["failed"] == total:
        return f"{everything} failed.", "bad"
    if counts["failed"]:
        return f"{counts['failed']:,} of {total:,} {images} failed; all others are done.", "warning"
    if page.error is not None:
        return f"{everything} {are} done, but: {page.error}", "warning"
    if counts["empty"] == total:
        return f"{everything} {are} done, and nothing was found.", "warning"
    if counts["labeled"] == total:
        return f"{everything} {are} labeled.", "good"
    parts = [f"{counts['labeled']:,} labeled"]
    if counts["empty"]:
        parts.append(f"{counts['empty']:,} with nothing found")
    if counts["skipped"]:
        parts.append(f"{counts['skipped']:,} skipped, as they had labels")
    return f"{everything} {are} done: {', '.join(parts)}.", "good"


def _unfinished(page: RunPage) -> tuple[str, Tone]:
    num_failed = page.figures.counts["failed"]
    failed = f", {num_failed:,} of them failed" if num_failed else ""
    after = f"after {page.figures.num_images:,} of {page.num_total:,} {page.images}{failed}"
    if page.error is not None:
        return f"Stopped early {after}: {page.error}", "bad"
    left = f"{page.num_pending:,} are still to do."
    if page.is_interrupted:
        return f"Stopped by somebody {after}; {left}", "warning"
    return f"Ended {after}; {left}", "warning"


def render(page: RunPage) -> str:
    """The page as HTML, at most about 2 MB; it opens offline and needs no script."""
    report = HtmlReport(page.title)
    report.verdict(*verdict(page))
    _counts(report, page)
    _commands(report, page)
    _failures(report, page)
    _review(report, page)
    _lowest(report, page)
    _classes(report, page)
    _remarks(report, page)
    _about(report, page)
    return report.render()


def _counts(report: HtmlReport, page: RunPage) -> None:
    figures = page.figures
    counts = figures.counts
    shown: list[tuple[str, int | str]] = [
        ("labeled", counts["labeled"]),
        ("nothing found", counts["empty"]),
        ("failed", counts["failed"]),
        ("skipped", counts["skipped"]),
        ("still to do", page.num_pending),
        ("labels", figures.num_labels),
        ("texts", figures.num_texts),
        ("answers cut", figures.num_truncated),
        *page.further_counts.items(),
    ]
    always = ("labeled", "failed", "" if figures.num_texts else "labels")
    report.counts([(name, count) for name, count in shown if count or name in always])
    if page.num_images:
        rate = page.num_images / page.seconds if page.seconds else 0.0
        report.text(
            f"This run: {_many(page.num_images, page.images)} in {_duration(page.seconds)}, "
            f"{rate:.2f} {page.images} per second."
        )


def _commands(report: HtmlReport, page: RunPage) -> None:
    commands = {
        "Go on with:": page.resume_command if page.num_pending else None,
        "Try what failed once more with:": page.retry_command,
    }
    for before, command in commands.items():
        if command:
            report.text(before)
            report.code(command)
    if page.typed_in and any(commands.values()):
        report.text(f"The run was started {page.typed_in}; type it there.")
    for sentence in page.advice:
        report.text(sentence)


def _failures(report: HtmlReport, page: RunPage) -> None:
    failures = page.figures.failures
    if not failures:
        return
    report.section(f"What failed, and why: {page.figures.counts['failed']:,}")
    ordered = sorted(failures.items(), key=lambda item: -item[1].count)
    report.table(("reason", page.images), [(code, one.count) for code, one in ordered])
    rows = [
        (_link(page, image), _cut(image.message, _MAX_MESSAGE), code)
        for code, one in ordered
        for image in list(one.examples)[:_EXAMPLES_PER_REASON]
    ]
    report.text("For each reason some by name:")
    report.table((page.images, "what happened", "reason"), rows)


def _review(report: HtmlReport, page: RunPage) -> None:
    """What to look at first, the likeliest to be wrong first."""
    rows = _review_rows(page)
    report.section("What to review first")
    if not rows:
        report.text("Nothing stands out.")
        return
    report.table(("what", "why"), rows)
    examples = _review_examples(page)
    if examples:
        report.text(f"Some of these {page.images}:")
        report.table((page.images, "what"), examples)


def _review_rows(page: RunPage) -> list[tuple[str, str]]:
    figures, rows = page.figures, list[tuple[str, str]]()

    def add(number: int, what: str, why: str, of: str = page.images) -> None:
        if number:
            rows.append((f"{_many(number, of)} with {what}", why))

    why = f"The score is below {LOW_SCORE:g}; the lowest are drawn below."
    add(figures.num_low, "low scores", why, "labels")
    why = "The answer reached the limit of tokens: something may be missing. Raise max_new_tokens."
    add(figures.num_truncated, "answers cut", why)
    limit, number, _ = figures.far_out()
    add(number, "unusually many labels", f"{limit} or more: they may be repetitions.")
    if figures.is_empty_unusual():
        add(figures.counts["empty"], "nothing found", "Nearly all others have labels.")
    for note, number in figures.notes.most_common(_MAX_NOTES):
        add(number, "a note", f"{note[:1].upper()}{note[1:]}.")
    return rows


def _review_examples(page: RunPage) -> list[tuple[Link, str]]:
    """Each image once, with all that is to be said of it."""
    figures = page.figures
    said: dict[str, tuple[ImageOutcome, list[str]]] = {}

    def say(image: ImageOutcome, what: str) -> None:
        said.setdefault(f"{image.key} {image.name}", (image, []))[1].append(what)

    for one in figures.truncated:
        say(one, "answer cut")
    for one in figures.far_out()[2]:
        say(one, _many(one.num_labels, "labels"))
    if figures.is_empty_unusual():
        for one in figures.empty:
            say(one, "nothing found")
    for one in figures.noted:
        say(one, _cut("; ".join(one.notes), _MAX_NAME))
    return [(_link(page, image), ", ".join(what)) for image, what in said.values()]


def _lowest(report: HtmlReport, page: RunPage) -> None:
    figures = page.figures
    lowest = list(figures.lowest)
    if not lowest:
        return
    has_scores = figures.num_scored > 0
    report.section("The lowest-scored labels" if has_scores else "Some answers, by lot")
    if not has_scores:
        report.text(
            "What this task answers has no scores, so that nothing can be said to be the least "
            "sure; these were drawn by lot."
        )
    elif any(one.score is None for one in lowest):
        report.text("Labels without a score are among them by lot, after those with one.")
    else:
        report.text(f"The lowest first; at most three of one {page.images[:-1]}.")
    drawn = [Thumbnail(one.jpeg, _said(page, one)) for one in lowest if one.jpeg is not None]
    if drawn:
        report.thumbnails(drawn)
    others = [one for one in lowest if one.jpeg is None]
    if others:
        report.text("Not drawn, as the image is not at hand or the label not there as it was:")
        report.table(
            ("class", "score", page.images),
            [
                (_cut(one.class_name or "", _MAX_NAME), one.score, _link(page, one.image))
                for one in others
            ],
        )


def _said(page: RunPage, low: LowLabel) -> list[Link]:
    score = "" if low.score is None else f"{low.score:.2f}  "
    lines = [Link(score + _cut(low.class_name, _MAX_SAID))] if low.class_name is not None else []
    image = Link(_cut(low.image.name, _MAX_SAID), page.href_of(low.image))
    return [*lines, *([Link(low.text)] if low.text else []), image]


def _classes(report: HtmlReport, page: RunPage) -> None:
    figures = page.figures
    if not figures.classes:
        return
    report.section("Labels by class")
    ordered = sorted(figures.classes.items(), key=lambda item: (-item[1].num_labels, item[0]))
    if figures.num_scored:
        report.text("Bars are labels by score, from 0 to 1; each class has its own height.")
    else:
        report.text("These labels have no scores.")
    report.table(
        ("class", "labels", "scores", "median score", page.images),
        [_class_row(_cut(name, _MAX_NAME), one) for name, one in ordered[:_MAX_CLASSES]],
    )
    more = len(ordered) - _MAX_CLASSES
    if more > 0 or figures.other_classes.num_labels:
        rest = sum(one.num_labels for _, one in ordered[_MAX_CLASSES:])
        rest += figures.other_classes.num_labels
        known = "" if figures.other_classes.num_labels else f"{more:,} "
        report.text(f"... and {rest:,} labels of {known}further classes.")


def _class_row(name: str, one: ClassFigures) -> tuple[object, ...]:
    if not one.num_scored:
        return name, one.num_labels, "no scores", None, one.num_images
    return name, one.num_labels, Histogram(one.histogram(_BINS)), one.median(), one.num_images


def _remarks(report: HtmlReport, page: RunPage) -> None:
    if not page.remarks:
        return
    report.section("What else there is to know")
    for remark in page.remarks[:_MAX_REMARKS]:
        report.text(_cut(remark, _MAX_VALUE))


def _about(report: HtmlReport, page: RunPage) -> None:
    manifest = page.manifest
    report.section("The run")
    rows: list[tuple[str, object]] = [
        ("run", manifest.run),
        ("model", _model(manifest.model)),
        ("task", manifest.task),
        ("prompts", _cut("; ".join(manifest.prompts), _MAX_VALUE)),
        ("mode", manifest.mode),
        ("started", manifest.started),
        ("finished", manifest.finished),
        ("version", manifest.version),
    ]
    rows += page.places.items()
    report.table(("", ""), [row for row in rows if row[1] not in (None, "")])
    if page.undo_commands:
        where = f", typed {page.typed_in}" if page.typed_in else ""
        report.text(
            f"This takes back what a run wrote, as far as nobody has changed it since{where}:"
        )
        report.code("\n".join(page.undo_commands))
    settings = [(name, _value(value)) for name, value in manifest.settings.items()]
    settings = [(name, value) for name, value in settings if value]
    if settings:
        report.section("Settings")
        report.table(("setting", "value"), settings)


def _model(model: Mapping[str, Any]) -> str:
    named = [f"{name} {value}" for name, value in model.items() if name != "name" and value]
    return ", ".join([str(model.get("name", "")), *named])


def _value(value: object) -> str:
    if value in (None, "", [], {}, ()):
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return _cut(text, _MAX_VALUE)


def _link(page: RunPage, image: ImageOutcome) -> Link:
    return Link(_cut(image.name, _MAX_NAME), page.href_of(image))


def _cut(text: str | None, most: int) -> str:
    text = text or ""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _many(number: int, what: str) -> str:
    """Such as "1 label" or "1,200 labels"."""
    return f"{number:,} {what[:-1] if number == 1 else what}"


def _duration(seconds: float) -> str:
    """Such as "7 h 12 min", "3 min 20 s" or "4.1 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    units = (("d", _DAY_S), ("h", 3600), ("min", 60), ("s", 1))
    parts: list[str] = []
    for name, length in units:
        number, whole = divmod(whole, length)
        if number or parts:
            parts.append(f"{number} {name}")
    return " ".join(parts[:2])
