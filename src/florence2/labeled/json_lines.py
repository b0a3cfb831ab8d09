"""Lines of ``{image, prefix, suffix}``, as the public guides to fine-tuning keep labels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from florence2.errors import RequestError, shown
from florence2.labeled.reading import Collector, find_image
from florence2.labeled.records import LabeledData, LabeledImage, LabeledObject, WantedAnswer
from florence2.postprocess import parse_answer_text
from florence2.records import Box, Polygon, Quad, SizeWh, Text
from florence2.tasks import TASKS, Task, TaskInput

_CAPTION: Final = "<CAPTION>"
_FIRST: Final = ("annotations.jsonl", "metadata.jsonl")
_IMAGE_FOLDERS: Final = (".", "images", "img", "..", "../images")
# Answers that say where things of a class are; descriptions and proposals name no class.
_LOCATING: Final = (
    "<OD>",
    "<CAPTION_TO_PHRASE_GROUNDING>",
    "<OPEN_VOCABULARY_DETECTION>",
    "<REFERRING_EXPRESSION_SEGMENTATION>",
    "<OCR_WITH_REGION>",
)
TEXT_CLASS: Final = "text"
"""The class of a line of text, which is in the object's ``texts`` under this name too."""


def json_lines_files(path: Path) -> list[Path]:
    """The files of lines that a file or folder is: in it, or else one folder below it.

    Of several in one folder those with the names that libraries expect.
    """
    if path.is_file():
        return [path] if path.suffix.lower() == ".jsonl" else []
    for folders in ([path], sorted(one for one in path.glob("*") if one.is_dir())):
        found: list[Path] = []
        for folder in folders:
            files = sorted(folder.glob("*.jsonl"))
            found += [file for file in files if file.name in _FIRST] or files
        if found:
            return found
    return []


def read_json_lines(source: Path) -> LabeledData:
    """A file of lines, or a folder with some, such as one for each split.

    Every line is one question and its answer; an image may have several. ``objects`` are what the
    answers to tasks that locate something say. Raises RequestError for no such file, or no line.
    """
    files = json_lines_files(source)
    if not files:
        raise RequestError(
            "Lines of image, prefix and suffix are in a .jsonl file, and there is none in "
            f"{str(source)!r}; name it."
        )
    collector = Collector(source, "jsonl")
    for file in files:
        is_split = source.is_dir() and file.parent != source
        _File(file, file.parent.name if is_split else "", collector).read()
    return collector.data(())


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    dataset: str
    collector: Collector

    def read(self) -> None:
        try:
            with self.path.open(encoding="utf-8-sig") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        self._line(f"{self.path.name}:{number}", line)
        except (OSError, ValueError) as error:
            raise RequestError(
                f"A file of lines is UTF-8 text, and {str(self.path)!r} cannot be read ({error}); "
                "mend it."
            ) from error

    def _line(self, place: str, line: str) -> None:
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            content = line.strip()
        name, wanted = _read(content)
        if name is None or wanted is None:
            self.collector.leave_out(
                place, f"A line has image, prefix and suffix, and this one is {shown(content)}."
            )
            return
        path = find_image(name, [self.path.parent / folder for folder in _IMAGE_FOLDERS])
        unique = f"{self.dataset}/{name}" if self.dataset else name
        size_wh = self.collector.size_of(path, unique)
        if size_wh is None:
            return
        self.collector.add(
            LabeledImage(
                path,
                unique,
                size_wh,
                self._objects(unique, wanted, size_wh),
                {},
                self.dataset,
                (wanted,),
            )
        )

    def _objects(
        self, image: str, wanted: WantedAnswer, size_wh: SizeWh
    ) -> tuple[LabeledObject, ...]:
        task, _ = task_of(wanted)
        objects = []
        locates = task is not None and task.token in _LOCATING
        for label, found in located_in(wanted, size_wh) if locates else ():
            placed = self.collector.object(
                image,
                label,
                size_wh,
                box_xyxy=found.box_xyxy if isinstance(found, Box) else None,
                rings_xy=_rings(found),
                texts={TEXT_CLASS: found.label} if isinstance(found, Quad) else None,
            )
            objects += [placed] if placed else []
        return tuple(objects)


def located_in(wanted: WantedAnswer, size_wh: SizeWh) -> Iterator[tuple[str, Box | Polygon | Quad]]:
    """What an answer to a published task locates: what it calls it, and where it is."""
    task, text = task_of(wanted)
    if task is None:
        return
    for found in parse_answer_text(task, wanted.suffix, size_wh).objects:
        if not isinstance(found, Text):
            label = TEXT_CLASS if isinstance(found, Quad) else found.label or text
            yield " ".join(label.split()), found


def task_of(wanted: WantedAnswer) -> tuple[Task | None, str]:
    """The published task of a question, and the text after its token; None for a task of its own.

    A prefix that is a task's sentence instead of its token is understood too.
    """
    prefix = wanted.prefix.strip()
    for task in TASKS:
        if prefix.startswith(task.token):
            return task, prefix.removeprefix(task.token).strip()
        before, _, after = task.sentence.partition("{input}")
        takes_text = task.takes is TaskInput.TEXT
        if prefix == task.sentence or (takes_text and prefix.startswith(before)):
            return task, prefix.removeprefix(before).removesuffix(after).strip()
    return None, prefix


def _rings(found: Box | Polygon | Quad) -> tuple[tuple[float, ...], ...]:
    if isinstance(found, Polygon):
        return found.rings_xy
    return (found.quad_xy,) if isinstance(found, Quad) else ()


def _read(content: object) -> tuple[str | None, WantedAnswer | None]:
    if not isinstance(content, Mapping):
        return None, None
    name = content.get("image", content.get("file_name"))
    return name if isinstance(name, str) and name else None, _wanted(content)


def _wanted(content: Mapping[str, Any]) -> WantedAnswer | None:
    prefix, suffix = content.get("prefix"), content.get("suffix")
    if isinstance(prefix, str) and prefix.strip() and isinstance(suffix, str):
        return WantedAnswer(prefix.strip(), suffix.strip())
    # Captions of images, as libraries of data sets keep them.
    text = content.get("text")
    return WantedAnswer(_CAPTION, text.strip()) if isinstance(text, str) and text.strip() else None
