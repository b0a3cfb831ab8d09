"""A whole training: from labeled images and a plan to weights, figures and a report in a folder."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import transformers
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

from florence2.checkpoint.checkpoint import Checkpoint, open_checkpoint
from florence2.checkpoint.files import ADAPTER_CONFIG, read_json, write_whole
from florence2.errors import ImageError, RequestError
from florence2.finetune.examples import Examples, Spelled, TokenLimits, usable_images
from florence2.finetune.model import make_model
from florence2.finetune.plan import FineTuningPlan, fingerprint, first_difference
from florence2.finetune.report import write_report
from florence2.finetune.targets import Vocabulary, questions_about
from florence2.finetune.trainer import BEST, FineTuner, Progress, Watcher
from florence2.finetune.validation import Sample, Validation, Validator
from florence2.images import open_image
from florence2.labeled.records import LabeledData, LabeledImage, LeftOut
from florence2.records import Box, Object, Polygon, Quad
from florence2.runtimes.device import choose_device
from florence2.tasks import Task, TaskInput

logger = logging.getLogger(__name__)

TRAINING: Final = "training.json"
REPORT: Final = "report.html"
_LOCK: Final = ".lock"
_CURVES: Final = "state/curves.json"
_NAMED: Final = 3
# To open fewer takes no time that anybody wonders about.
_MANY: Final = 1000
# A resume keeps them: they belong to weights that were saved.
_OF_THE_BEST: Final = ("started", "metric", "best_step", "by_task")
_NEEDS_CLASSES: Final = ("<CAPTION_TO_PHRASE_GROUNDING>", "<OPEN_VOCABULARY_DETECTION>")


@dataclass(slots=True)
class Curves:
    """What is shown of a training: points of loss, and every validation as JSON keeps it."""

    losses: list[tuple[int, float]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def until(self, step: int) -> Curves:
        """Without what came after a step, which a resume does again."""
        return Curves(
            [point for point in self.losses if point[0] <= step],
            [one for one in self.validations if one["step"] <= step],
            self.samples,
        )


def fine_tune(
    training: LabeledData,
    validation: LabeledData,
    plan: FineTuningPlan,
    folder: Path,
    watcher: Watcher,
    command: str = "",
    make_tuner: Callable[..., FineTuner] = FineTuner,
) -> dict[str, Any]:
    """Trains into ``folder``, or goes on there; what ``training.json`` says in the end.

    ``folder/best`` is an adapter or a whole checkpoint, of the step that the validation liked best.
    Raises RequestError for what cannot be trained on, with other settings than those the folder was
    begun with too, and TrainingError where it cannot go on.
    """
    plan.check()
    device = choose_device(plan.device)
    if device.index:
        raise RequestError(
            f"Training takes the first GPU that it sees, and {plan.device} was asked for; choose "
            f"it by CUDA_VISIBLE_DEVICES={device.index} and --device cuda."
        )
    checkpoint = open_checkpoint(plan.model)
    if plan.has_adapter and (checkpoint.folder / ADAPTER_CONFIG).is_file():
        raise RequestError(
            f"{plan.model} is an adapter itself, and an adapter is trained on whole weights; train "
            "on its base, or use --method full."
        )
    data = _Data(str(training.source), training.images, validation.images, training.classes)
    vocabulary = _vocabulary(data, plan)
    _check_folder(folder, plan, data)
    # An adapter begins with random numbers.
    transformers.set_seed(plan.seed)
    tuned = make_model(checkpoint, plan)
    limits = TokenLimits.of(checkpoint, num_visual_tokens(checkpoint))
    num_images = len(data.training) + len(data.validation)
    if num_images >= _MANY:
        watcher.note(f"Opening all {num_images} images once, so that a damaged one ends nothing.")
    learned, measured, left_out = _usable(data, plan, vocabulary, checkpoint, limits)
    _tell_left_out(left_out, watcher)
    _tell_empty_classes(learned, vocabulary, watcher)
    for name in tuned.absent_targets:
        watcher.note(f"No layer is called {name}, so it gets no adapter.")
    validator = Validator(
        measured,
        plan.published_tasks(),
        vocabulary,
        fits=lambda question: Spelled.of(question, checkpoint).fits(limits),
    )
    record = _record(data, plan, checkpoint, vocabulary, command, len(learned), len(measured))
    record["left_out"] = [asdict(one) for one in (*training.left_out, *left_out)]
    with _only_training(folder):
        _begin(folder, record)
        examples = Examples(learned, vocabulary, checkpoint, limits, plan)
        keeper = _Keeper(folder, record, watcher)
        tuner = make_tuner(tuned, plan, folder, examples, validator, device, keeper)
        tuner.run()
        is_done = tuner.state.global_step >= plan.steps
        return keeper.finish(tuner.state.global_step, is_done=is_done)


@dataclass(frozen=True, slots=True)
class _Data:
    """What is learned from and what is measured on, and the classes, in the source's order."""

    source: str
    training: Sequence[LabeledImage]
    validation: Sequence[LabeledImage]
    classes: tuple[str, ...]


def num_visual_tokens(checkpoint: Checkpoint) -> int:
    """Those of one image: one for each place of the last grid, and their mean."""
    width, height = checkpoint.image_processor.size_wh
    rows, columns = checkpoint.config.vision.grid(height, width)
    return 1 + rows * columns


def _vocabulary(data: _Data, plan: FineTuningPlan) -> Vocabulary:
    unknown = [name for name in plan.prompts_by_class if name not in data.classes]
    if unknown:
        raise RequestError(
            f"A prompt was given for the class {unknown[0]!r}, which the data does not have; its "
            f"classes are {', '.join(data.classes) or 'none'}."
        )
    needing = [task for task in plan.published_tasks() if task.token in _NEEDS_CLASSES]
    if needing and not data.classes:
        raise RequestError(
            f"{needing[0].token} asks for classes by name, and {data.source} has none; label some "
            "objects first."
        )
    return Vocabulary(data.classes, dict(plan.prompts_by_class))


def _usable(
    data: _Data,
    plan: FineTuningPlan,
    vocabulary: Vocabulary,
    checkpoint: Checkpoint,
    limits: TokenLimits,
) -> tuple[list[LabeledImage], list[LabeledImage], list[LeftOut]]:
    tasks = plan.published_tasks()
    if not tasks and not any(image.answers for image in data.training):
        raise RequestError("Training needs at least one task, such as --task <OD>; name one.")
    training, too_long = usable_images(data.training, tasks, vocabulary, checkpoint, limits)
    measured, also = usable_images(data.validation, tasks, vocabulary, checkpoint, limits)
    # A task that no label answers would be taught to say nothing, and measured as perfect.
    unanswered = [task for task in tasks if not _answers(task, data.training, vocabulary)]
    if not training or unanswered:
        asked = ", ".join(task.token for task in unanswered) or "its pairs"
        texts = [task.token for task in unanswered if task.takes is TaskInput.REGION]
        hint = f" ({texts[0]} needs objects)" if texts and not training else ""
        raise RequestError(
            f"{data.source} has {len(data.training)} images to train on and no labels that answer "
            f"{asked}{hint}; label some, or choose another task."
        )
    if not measured:
        raise RequestError(
            f"{data.source} leaves {len(data.validation)} images to measure on, and none has an "
            "answer; training needs at least one image besides those it learns from, so label "
            "more or give a larger share with --val."
        )
    # Spread over all of them, and always the same ones.
    step = max(1, len(measured) // plan.validation_images)
    measured = measured[::step][: plan.validation_images]
    damaged: list[LeftOut] = []
    training, measured = (_readable(images, damaged) for images in (training, measured))
    if not training or not measured:
        raise RequestError(
            f"Training needs images to learn from and to measure on, and on one side none can be "
            f"read (such as {damaged[0].name}: {damaged[0].reason}); mend them."
        )
    return training, measured, [*damaged, *too_long, *also]


def _answers(task: Task, images: Sequence[LabeledImage], vocabulary: Vocabulary) -> bool:
    """Whether some label of the images answers a task, or they bring answers of their own."""
    return any(
        image.answers or any(one.answer for one in questions_about(image, [task], vocabulary))
        for image in images
    )


def _readable(images: Sequence[LabeledImage], damaged: list[LeftOut]) -> list[LabeledImage]:
    """Those that can be opened whole: a header says nothing of what is cut off behind it.

    One that cannot would end the training in the step that meets it.
    """
    readable = []
    for image in images:
        try:
            open_image(image.path)
        except ImageError as error:
            damaged.append(LeftOut(image.name, str(error)))
        else:
            readable.append(image)
    return readable


def _tell_left_out(left_out: Sequence[LeftOut], watcher: Watcher) -> None:
    for one in left_out[:_NAMED]:
        watcher.note(f"{one.name}: {one.reason}")
    if len(left_out) > _NAMED:
        watcher.note(f"{len(left_out) - _NAMED} more are left out; {TRAINING} names them all.")


def _tell_empty_classes(
    images: Sequence[LabeledImage], vocabulary: Vocabulary, watcher: Watcher
) -> None:
    labeled = {thing.label for image in images for thing in image.objects}
    empty = [name for name in vocabulary.classes if name not in labeled]
    if empty and labeled:
        more = f" and {len(empty) - _NAMED} more" if len(empty) > _NAMED else ""
        watcher.note(
            f"No image to learn from has an object of {', '.join(empty[:_NAMED])}{more}; what they "
            "look like is not learned."
        )


def _check_folder(folder: Path, plan: FineTuningPlan, data: _Data) -> None:
    """RequestError where the folder holds another training, or something else."""
    path = folder / TRAINING
    if not path.is_file():
        if folder.exists() and not folder.is_dir():
            raise RequestError(
                f"A training has a folder of its own, and {folder} is a file; name another one "
                "with --out."
            )
        # What a kill or a full disk left of the first file of a training is no one's.
        ours = (f"{TRAINING}.*.new", _LOCK)
        if folder.is_dir() and any(not any(map(one.match, ours)) for one in folder.iterdir()):
            raise RequestError(
                f"{folder} holds other files, and a training needs a folder of its own; name "
                "another one with --out."
            )
        return
    kept = read_json(path)
    wanted = _identity(plan, data)
    difference = first_difference(wanted, kept.get("identity", {}))
    if difference is not None:
        raise RequestError(
            f"{folder} holds a training with other settings: {difference}; give the same settings "
            "to go on with it, or another folder."
        )


def _identity(plan: FineTuningPlan, data: _Data) -> dict[str, Any]:
    labels = fingerprint([*data.training, *data.validation])
    return {**plan.settings_of_result(), "the labels": labels}


def _record(
    data: _Data,
    plan: FineTuningPlan,
    checkpoint: Checkpoint,
    vocabulary: Vocabulary,
    command: str,
    num_training: int,
    num_validation: int,
) -> dict[str, Any]:
    return {
        "format": 1,
        "status": "training",
        "command": command,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "model": checkpoint.name,
        "revision": checkpoint.revision,
        "method": plan.method,
        "tasks": [task.token for task in plan.published_tasks()],
        "classes": list(vocabulary.classes),
        "prompts": {name: vocabulary.phrase(name) for name in vocabulary.classes},
        "data": data.source,
        "images": {"train": num_training, "val": num_validation},
        "metric": None,
        "best_step": None,
        "training": plan.to_dict(),
        "identity": _identity(plan, data),
        "files": [],
    }


@contextmanager
def _only_training(folder: Path) -> Iterator[None]:
    """Nobody else trains into the folder meanwhile; RequestError where somebody does."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(WeakFileLock(folder / _LOCK, timeout=1.0))
        except TimeoutError as error:
            raise RequestError(
                f"Another training is at work in {folder}; wait for its end, or name another "
                "folder with --out."
            ) from error
        yield


def _begin(folder: Path, record: dict[str, Any]) -> None:
    path = folder / TRAINING
    if path.is_file():
        kept = read_json(path)
        record |= {name: kept[name] for name in _OF_THE_BEST if name in kept}
    write_whole(path, json.dumps(record, indent=2) + "\n")


class _Keeper(Watcher):
    """Keeps ``training.json``, the curves and the report up to date; passes on what it is told."""

    def __init__(self, folder: Path, record: dict[str, Any], watcher: Watcher) -> None:
        self._folder = folder
        self._record = record
        self._watcher = watcher
        self._curves = self._kept()
        self._is_first = True

    def _kept(self) -> Curves:
        path = self._folder / _CURVES
        if not path.is_file():
            return Curves()
        kept = read_json(path)
        losses = [(int(step), float(loss)) for step, loss in kept["losses"]]
        return Curves(losses, kept["validations"], kept["samples"])

    def progress(self, now: Progress) -> None:
        if self._is_first:
            self._curves = self._curves.until(now.step - 1)
            self._is_first = False
        self._curves.losses.append((now.step, now.loss))
        self._watcher.progress(now)

    def validated(self, step: int, found: Validation, *, is_best: bool) -> None:
        tasks = [asdict(one) for one in found.tasks]
        self._curves.validations.append({"step": step, "value": found.value, "tasks": tasks})
        if is_best:
            names = sorted({one.metric for one in found.tasks})
            name = names[0] if len(names) == 1 else f"mean of {', '.join(names)}"
            self._record["metric"] = {"name": name, "value": found.value}
            self._record["by_task"] = tasks
            self._record["best_step"] = step
            self._curves.samples = [_sample(one) for one in found.samples]
        self._write()
        self._watcher.validated(step, found, is_best=is_best)

    def note(self, sentence: str) -> None:
        self._watcher.note(sentence)

    def should_stop(self) -> bool:
        return self._watcher.should_stop()

    def _write(self) -> None:
        write_whole(self._folder / _CURVES, json.dumps(asdict(self._curves)) + "\n")
        best = self._folder / BEST
        if best.is_dir():
            files = sorted(path.name for path in best.iterdir() if path.is_file())
            self._record["files"] = [f"{BEST}/{name}" for name in files]
        write_whole(self._folder / TRAINING, json.dumps(self._record, indent=2) + "\n")
        write_report(self._folder / REPORT, self._record, asdict(self._curves))

    def finish(self, step: int, *, is_done: bool) -> dict[str, Any]:
        """Says how the training ended."""
        self._record["status"] = "done" if is_done else "stopped"
        self._record["steps_done"] = step
        (self._folder / _CURVES).parent.mkdir(exist_ok=True)
        self._write()
        return self._record


def _sample(sample: Sample) -> dict[str, Any]:
    return {
        "image": str(sample.image.path),
        "name": sample.image.name,
        "task": sample.task,
        "found": [_drawn(one) for one in sample.found.objects],
        "wanted": [_drawn(one) for one in sample.wanted.objects],
    }


def _drawn(one: Object) -> Mapping[str, Any]:
    """What a drawing shows of an object: its label, score and outlines in pixels."""
    rings: Sequence[Sequence[float]] = ()
    if isinstance(one, Box):
        x1, y1, x2, y2 = one.box_xyxy
        rings = [(x1, y1, x2, y1, x2, y2, x1, y2)]
    elif isinstance(one, Quad):
        rings = [one.quad_xy]
    elif isinstance(one, Polygon):
        rings = one.rings_xy
    return {"label": one.label, "score": one.score, "rings": [list(ring) for ring in rings]}
