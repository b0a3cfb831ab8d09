"""``florence2 evaluate DATA``: the answers that users would get, and what they labeled."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from florence2.engine.ask import Ask
from florence2.engine.scheduler import Priority
from florence2.errors import RequestError, unknown_name
from florence2.evaluation.html_report import HtmlReport
from florence2.evaluation.loss import PrecisionLoss
from florence2.evaluation.measure import (
    FIGURES,
    Evaluation,
    Located,
    TextAnswer,
    TextEvaluation,
    box_around,
    class_key,
    measure,
    measure_texts,
    rings_of,
)
from florence2.evaluation.report import (
    TEXT_HEAD,
    located_sections,
    named_section,
    shown,
    text_row,
    text_sections,
    unlabeled_sentence,
)
from florence2.labeled.json_lines import TEXT_CLASS, located_in, task_of
from florence2.labeled.records import (
    LabeledData,
    LabeledImage,
    LabeledObject,
    LeftOut,
    WantedAnswer,
)
from florence2.records import Box, Failure, Polygon, Quad, Region, Result, Text
from florence2.tasks import OutputKind, Task, TaskInput
from serve.console import printable
from serve.labeled_data import shapes_of
from serve.naming import OBJECT_CLASS
from serve.predict.annotations import IMAGE_TEXT_TAGS
from serve.predict.predictor import Call, Predictor
from serve.sdk import sly
from serve.settings import Settings, raw_settings

REPORT_FILE: Final = "report.html"
JSON_FILE: Final = "evaluation.json"
_OCR, _OCR_LINES = "<OCR>", "<OCR_WITH_REGION>"
_OBJECT_TEXTS: Final = {"<REGION_TO_DESCRIPTION>": "description", "<REGION_TO_OCR>": TEXT_CLASS}
# What they find has no class of the data.
_CLASSLESS: Final = ("<REGION_PROPOSAL>", "<DENSE_REGION_CAPTION>", _OCR_LINES)
_BULK: Final = Call(Priority.BULK)
_SHOWN: Final = 10
_FAILED: Final = "Images that could not be answered, in no figure"
_LEFT_OUT: Final = "Left out of the data"


@dataclass(frozen=True, slots=True)
class Question:
    """One question about an image; ``wanted`` are the texts that would answer it.

    ``region`` may be the model's own spelling. ``class_name`` is the class of what it locates,
    where the answer names none. ``subject`` is what figures of texts are sorted by.
    """

    task: str
    text: str | None = None
    region: Region | str | None = None
    is_custom: bool = False
    subject: str = ""
    wanted: tuple[str, ...] = ()
    class_name: str | None = None

    @property
    def asked(self) -> tuple[object, ...]:
        """What two questions share that are the same."""
        return self.task, self.text, self.region


Questions = Mapping[str, Sequence[Question]]


@dataclass(frozen=True, slots=True)
class TaskPlan:
    """One task: the images that are asked, with the objects that would be right answers.

    ``by`` says what is compared. Images are asked their ``questions``, by their names; where there
    are none, as the app would be with the ``settings``, and ``texts`` are what would be right.
    """

    task: str
    data: LabeledData
    by: Literal["boxes", "outlines", "texts"]
    settings: Settings
    questions: Questions = field(default_factory=dict)
    texts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def plans_of(data: LabeledData, settings: Settings, *, has_task: bool) -> list[TaskPlan]:
    """What is asked about labeled data: the task of the settings, or else what its lines ask.

    Raises RequestError where nothing that is labeled answers the task.
    """
    if has_task or data.format != "jsonl":
        return [_settings_plan(data, settings)]
    by_task: dict[str, list[tuple[LabeledImage, WantedAnswer]]] = {}
    for image in data.images:
        for wanted in image.answers:
            task, _ = task_of(wanted)
            by_task.setdefault(task.token if task else _own_task(wanted), []).append(
                (image, wanted)
            )
    return [_lines_plan(data, token, lines, settings) for token, lines in by_task.items()]


def class_mapping(data: LabeledData) -> dict[str, tuple[str, ...]]:
    """Every class of the data, asked for by its name."""
    return {name: (name.replace("_", " "),) for name in data.classes}


def _settings_plan(data: LabeledData, settings: Settings) -> TaskPlan:
    last = settings.steps[-1]
    if last.takes is TaskInput.REGION and len(settings.steps) == 1:
        return _region_plan(data, last, settings)
    texts = {image.name: wanted for image in data.images if (wanted := _wanted_texts(image, last))}
    if last.output is OutputKind.TEXT and len(settings.steps) == 1:
        if not texts:
            tag = IMAGE_TEXT_TAGS[last.token]
            raise _nothing_labeled(last, f"image has a tag {tag!r} or an answer to it")
        images = tuple(image for image in data.images if image.name in texts)
        return TaskPlan(last.token, replace(data, images=images), "texts", settings, texts=texts)
    if last.token in _CLASSLESS:
        data = _classless(data, only_text=last.token == _OCR_LINES)
    else:
        data = _asked_classes(data, settings)
    if not any(image.objects for image in data.images):
        raise _nothing_labeled(last, "object is labeled")
    by: Literal["boxes", "outlines"] = "outlines" if last.output is OutputKind.POLYGONS else "boxes"
    lines = texts if last.token == _OCR_LINES else {}
    return TaskPlan(settings.task_prompt, data, by, settings, texts=lines)


def _nothing_labeled(task: Task, what: str) -> RequestError:
    return RequestError(
        f"{task.token} is compared with labels, and no {what} in the data; label some, or choose "
        "another --task."
    )


def _wanted_texts(image: LabeledImage, task: Task) -> tuple[str, ...]:
    """The texts that would answer a question about a whole image."""
    wanted = [one.suffix for one in image.answers if task_of(one)[0] == task]
    tag = image.tags.get(IMAGE_TEXT_TAGS.get(task.token, ""))
    wanted += [tag] if tag else []
    if not wanted and task.token in (_OCR, _OCR_LINES):
        lines = [one for one in image.objects if one.texts.get(TEXT_CLASS)]
        lines.sort(key=lambda one: (one.box_xyxy[1] + one.box_xyxy[3], one.box_xyxy[0]))
        wanted = ["\n".join(one.texts[TEXT_CLASS] for one in lines)] if lines else []
    return tuple(wanted)


def _asked_classes(data: LabeledData, settings: Settings) -> LabeledData:
    """Without the classes that are not looked for, which would all count as missed."""
    asked = set(map(class_key, settings.classes or ()))
    if settings.steps[0].takes is TaskInput.TEXT:
        asked |= set(map(class_key, settings.classes_by_phrase.values()))
    if not asked:
        return data
    if asked.isdisjoint(map(class_key, data.classes)):
        raise RequestError(unknown_name("class", min(asked), data.classes))
    images = tuple(
        replace(i, objects=tuple(one for one in i.objects if class_key(one.label) in asked))
        for i in data.images
    )
    classes = tuple(name for name in data.classes if class_key(name) in asked)
    return replace(data, images=images, classes=classes)


def _classless(data: LabeledData, *, only_text: bool) -> LabeledData:
    """Everything of one class, or the lines of text only."""
    name = TEXT_CLASS if only_text else OBJECT_CLASS
    images = tuple(
        replace(
            image,
            objects=tuple(
                replace(one, label=name)
                for one in image.objects
                if not only_text or TEXT_CLASS in (one.label, *one.texts)
            ),
            crowds=() if only_text else tuple(replace(one, label=name) for one in image.crowds),
        )
        for image in data.images
    )
    return replace(data, images=images, classes=(name,))


def _region_plan(data: LabeledData, task: Task, settings: Settings) -> TaskPlan:
    """A question about each object."""
    by: Literal["outlines", "texts"] = "texts" if task.output is OutputKind.TEXT else "outlines"
    questions: dict[str, list[Question]] = {}
    for image in data.images:
        for one in image.objects:
            text = one.label
            if task.token in _OBJECT_TEXTS:
                text = one.texts.get(_OBJECT_TEXTS[task.token], "")
            if text:
                question = Question(
                    task.token,
                    region=Region(one.box_xyxy),
                    subject=one.label,
                    wanted=(text,),
                    class_name=one.label,
                )
                questions.setdefault(image.name, []).append(question)
    if not questions:
        tag = _OBJECT_TEXTS.get(task.token)
        raise _nothing_labeled(task, f"object has a tag {tag!r}" if tag else "object is labeled")
    without = settings.model_copy(update={"regions": ()})
    return TaskPlan(task.token, _only(data, questions), by, without, questions)


def _only(data: LabeledData, questions: Questions) -> LabeledData:
    images = tuple(image for image in data.images if image.name in questions)
    return replace(data, images=images)


def _own_task(wanted: WantedAnswer) -> str:
    """The token of a fine-tune's own task; the whole prefix where there is none."""
    token, bracket, _ = wanted.prefix.partition(">")
    return token + bracket


def _lines_plan(
    data: LabeledData,
    token: str,
    lines: Sequence[tuple[LabeledImage, WantedAnswer]],
    settings: Settings,
) -> TaskPlan:
    """One task of lines of image, prefix and suffix."""
    task, _ = task_of(lines[0][1])
    has_place = task is not None and task.output is not OutputKind.TEXT
    if task is not None and task.takes is TaskInput.NONE:
        asked = settings.model_copy(update={"task_prompt": task.token})
        images = _with_objects(data, lines) if has_place else data
        return _settings_plan(images, asked)
    questions: dict[str, dict[tuple[object, ...], Question]] = {}
    for image, wanted in lines:
        question = _question(token, wanted)
        of_image = questions.setdefault(image.name, {})
        # Several answers to one question are all right.
        before = of_image.get(question.asked)
        texts = (*before.wanted, wanted.suffix) if before else (wanted.suffix,)
        of_image[question.asked] = replace(question, wanted=texts)
    listed = {name: [*of_image.values()] for name, of_image in questions.items()}
    if not has_place or task is None:
        return TaskPlan(token, _only(data, listed), "texts", settings, listed)
    located = _with_objects(data, lines)
    if task.takes is TaskInput.REGION:
        located = _classless(located, only_text=False)
    outlined = task.output is OutputKind.POLYGONS
    return TaskPlan(token, located, "outlines" if outlined else "boxes", settings, listed)


def _question(token: str, wanted: WantedAnswer) -> Question:
    task, text = task_of(wanted)
    if task is None:
        return Question(token, wanted.prefix.removeprefix(token) or None, None, True, token)
    if task.takes is TaskInput.REGION:
        return Question(token, None, text, subject=token, class_name=OBJECT_CLASS)
    return Question(token, text, subject=token)


def _with_objects(
    data: LabeledData, lines: Sequence[tuple[LabeledImage, WantedAnswer]]
) -> LabeledData:
    """The images of these lines, with the objects that these say and no others."""
    images: dict[str, LabeledImage] = {}
    for image, wanted in lines:
        objects = [
            LabeledObject(
                label,
                box_around(found),
                () if isinstance(found, Box) else rings_of(found),
                {TEXT_CLASS: found.label} if isinstance(found, Quad) else {},
            )
            for label, found in located_in(wanted, image.size_wh)
        ]
        before = images.get(image.name, replace(image, objects=()))
        images[image.name] = replace(before, objects=(*before.objects, *objects))
    classes = dict.fromkeys(one.label for image in images.values() for one in image.objects)
    return replace(data, images=tuple(images.values()), classes=tuple(classes))


@dataclass(slots=True)
class _Answers:
    """What was answered about the images of one task; a few numbers for each."""

    located: dict[str, Sequence[Located] | Failure] = field(default_factory=dict)
    texts: list[TextAnswer] = field(default_factory=list)

    def failed(self) -> list[LeftOut]:
        return [
            LeftOut(name, outcome.message)
            for name, outcome in self.located.items()
            if isinstance(outcome, Failure)
        ]


@dataclass(frozen=True, slots=True)
class TaskReport:
    """The figures of one task."""

    plan: TaskPlan
    located: Evaluation | None
    texts: TextEvaluation | None

    @property
    def failed(self) -> tuple[LeftOut, ...]:
        """The images without an answer, which are in no figure."""
        found = self.located or self.texts
        return found.failed if found else ()


def evaluate_tasks(
    predictor: Predictor, plans: Sequence[TaskPlan], *, batch: int, console: Console
) -> list[TaskReport]:
    """Asks everything, ``batch`` images at a time, and compares.

    Raises RequestError where not one image could be answered.
    """
    reports = []
    total = sum(len(plan.data.images) for plan in plans)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Asking", total=total)
        for plan in plans:
            answers = _Answers()
            images = plan.data.images
            for start in range(0, len(images), batch):
                group = images[start : start + batch]
                ask = _ask_questions if plan.questions else _ask_as_the_app
                ask(predictor, plan, group, answers)
                bar.advance(task, len(group))
            reports.append(_compared(plan, answers))
    return reports


def _compared(plan: TaskPlan, answers: _Answers) -> TaskReport:
    located = None
    if plan.by != "texts":
        located = measure(
            plan.data,
            answers.located,
            by=plan.by,
            threshold=plan.settings.confidence_threshold,
            class_thresholds=plan.settings.class_thresholds,
        )
    texts = None
    if plan.by == "texts" or answers.texts:
        failed = answers.failed()
        names = {one.name for one in failed}
        texts = measure_texts([one for one in answers.texts if one.image not in names], failed)
    return TaskReport(plan, located, texts)


def _ask_as_the_app(
    predictor: Predictor, plan: TaskPlan, group: Sequence[LabeledImage], answers: _Answers
) -> None:
    """The labels that a user would get, also those below the threshold."""
    # What was labeled has no suffix.
    update = {"class_suffix": "", "confidence_threshold": 0.0, "class_thresholds": {}}
    settings = plan.settings.model_copy(update=update)
    outcomes = predictor.predict([image.path for image in group], settings, _BULK)
    for image, outcome in zip(group, outcomes, strict=True):
        if isinstance(outcome, Failure):
            answers.located[image.name] = outcome
            continue
        objects = _labels(outcome.annotation, plan.data.classes)
        if settings.steps[-1].token in _CLASSLESS:
            objects = [replace(one, label=plan.data.classes[0]) for one in objects]
        answers.located[image.name] = objects
        if image.name in plan.texts:
            said = "\n".join(_text(result) for result in outcome.results)
            answers.texts.append(TextAnswer(image.name, plan.task, plan.texts[image.name], said))


def _labels(annotation: sly.Annotation, classes: Sequence[str]) -> list[Located]:
    """Labels as they would be stored, with the confidence that stands on them."""
    known = {class_key(name) for name in classes}
    objects: list[Located] = []
    for label, box_xyxy, rings in shapes_of(annotation.labels):
        name = label.obj_class.name
        for shape in ("polygon", "bitmap"):
            # What one answer has as boxes and outlines is two classes of the project.
            if class_key(name) not in known:
                name = name.removesuffix(f" ({shape})")
        tag = label.tags.get("confidence")
        score = None if tag is None else float(tag.value)
        if box_xyxy is not None:
            objects.append(Box(box_xyxy, name, score))
        elif rings:
            objects.append(Polygon(rings, name, score))
    return objects


def _ask_questions(
    predictor: Predictor, plan: TaskPlan, group: Sequence[LabeledImage], answers: _Answers
) -> None:
    asked = [(image, one) for image in group for one in plan.questions[image.name]]
    asks = [
        Ask(
            image.path,
            one.task,
            one.text,
            one.region,
            num_beams=plan.settings.num_beams,
            max_new_tokens=plan.settings.max_new_tokens,
            is_custom=one.is_custom,
        )
        for image, one in asked
    ]
    found: dict[str, list[Located]] = {image.name: [] for image in group}
    for (image, question), outcome in zip(asked, predictor.ask(asks, _BULK), strict=True):
        if isinstance(outcome, Failure):
            answers.located[image.name] = outcome
            continue
        if plan.by == "texts":
            said = _text(outcome)
            answers.texts.append(TextAnswer(image.name, question.subject, question.wanted, said))
        for one in outcome.objects:
            if not isinstance(one, Text):
                label = question.class_name or one.label or question.text or OBJECT_CLASS
                found[image.name].append(replace(one, label=label))
    for name, objects in found.items():
        answers.located.setdefault(name, objects)


def _text(result: Result) -> str:
    """What an answer says, its lines one below the other."""
    return result.text or "\n".join(one.label for one in result.objects)


@dataclass(frozen=True, slots=True)
class LabeledReport:
    """What was measured, of which checkpoint, on which data, by which command."""

    data: LabeledData
    checkpoint: Mapping[str, str | None]
    tasks: tuple[TaskReport, ...]
    command: str
    loss: PrecisionLoss | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        against = {} if self.loss is None else {"against": self.loss.to_dict()}
        return {
            **self.checkpoint,
            "data": str(self.data.source),
            "format": self.data.format,
            "images": len(self.data.images),
            "command": self.command,
            **against,
            "left_out": [{"name": one.name, "reason": one.reason} for one in self.data.left_out],
            "tasks": [
                {
                    "task": one.plan.task,
                    "settings": raw_settings(one.plan.settings),
                    "objects": one.located and one.located.to_dict(),
                    "texts": one.texts and one.texts.to_dict(),
                }
                for one in self.tasks
            ],
        }

    def show(self, console: Console) -> None:
        """Prints the figures, and what failed or was left out."""
        _tell(console, self._headline())
        for one in self.tasks:
            _tell(console, one.plan.task)
            if one.located is not None:
                _show_located(console, one.located)
            if one.texts is not None:
                table = Table(*TEXT_HEAD, box=None, pad_edge=False)
                for row in map(text_row, one.texts.figures):
                    table.add_row(*(escape(printable(str(cell))) for cell in row))
                console.print(table)
            _show_named(console, _FAILED, one.failed)
        _show_named(console, _LEFT_OUT, self.data.left_out)
        for line in self.loss.sentences() if self.loss else ():
            _tell(console, line)

    def write(self, out: Path) -> None:
        """``report.html`` and ``evaluation.json`` into a folder, which is made."""
        out.mkdir(parents=True, exist_ok=True)
        report = HtmlReport(f"{self.checkpoint['checkpoint']} on {self.data.source.name}")
        report.text(self._headline())
        report.code(self.command)
        for line in self.loss.sentences() if self.loss else ():
            report.text(line)
        for one in self.tasks:
            report.section(one.plan.task)
            if one.located is not None:
                # Of the task itself: without classes, objects have another label there.
                images = {image.name: image for image in one.plan.data.images}
                located_sections(report, one.located, images)
            if one.texts is not None:
                text_sections(report, one.texts)
            named_section(report, _FAILED, one.failed)
        named_section(report, _LEFT_OUT, self.data.left_out)
        report.write(out / REPORT_FILE)
        write_json(out / JSON_FILE, self.to_dict())

    def _headline(self) -> str:
        known = self.checkpoint
        revision = f"@{str(known['revision'])[:12]}" if known["revision"] else ""
        return (
            f"{known['checkpoint']}{revision} in {known['precision']} on {known['device']}: "
            f"{len(self.data.images)} images of {self.data.source} ({self.data.format})"
        )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _show_named(console: Console, title: str, named: Sequence[LeftOut]) -> None:
    if named:
        _tell(console, f"{title}: {len(named)}")
    for one in named[:_SHOWN]:
        _tell(console, f"  {one.name}: {one.reason}")
    if len(named) > _SHOWN:
        _tell(console, f"  ... and {len(named) - _SHOWN} more")


def _tell(console: Console, text: str) -> None:
    console.print(printable(text), markup=False)


def _show_located(console: Console, evaluation: Evaluation) -> None:
    """Narrow enough for a terminal: intervals stand below the values."""
    names = {key: name for key, name in FIGURES.items() if key != "overlap"}
    head = ("class", "there", "found", *names.values())
    table = Table(*head, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for one in (evaluation.total, *evaluation.classes):
        cells = (shown(getattr(one, key)).replace(" (", "\n").strip(")") for key in names)
        table.add_row(escape(printable(one.name)), str(one.num_true), str(one.num_found), *cells)
    console.print(table)
    total = evaluation.total
    if total.best_f1:
        best = f"{total.best_f1:.3f}, from the score {total.best_threshold:.3f} on"
        _tell(console, f"The best F1 of all is {best}.")
    if evaluation.unlabeled:
        _tell(console, unlabeled_sentence(evaluation))
