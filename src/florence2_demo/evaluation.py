"""How good a checkpoint is: its answers about held-out drawn scenes against the exact truth."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Final, Protocol

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from florence2 import Ask, Florence2
from florence2.errors import FlorenceError, RequestError
from florence2.evaluation.detection import (
    IOU_THRESHOLDS,
    ImageBoxes,
    MeanAveragePrecision,
    count_matches,
    outline_iou,
    pooled,
    rankings,
)
from florence2.evaluation.metrics import (
    Estimate,
    Metric,
    Ratio,
    character_errors,
    estimate,
    one_spaced,
    resamplings,
)
from florence2.records import Box, BoxXyxy, Failure, Polygon, Quad, Result
from florence2.tasks import TASKS, find_task
from florence2_demo.drawing import draw_scene
from florence2_demo.examples import Example, applies, example
from florence2_demo.language import has_known_words, plain_label
from florence2_demo.scene import make_scene
from florence2_demo.score_study import ScoreStudy

ALL_TASKS: Final = tuple(task.token for task in TASKS)
HELD_OUT_SEEDS: Final = range(400_000)
"""Nothing else draws scenes from these: tokenizer, demo pictures and training begin above."""

FIGURES: Final = (
    "od_map50",
    "od_map",
    "grounding_recall50",
    "ovd_recall50",
    "proposal_recall50",
    "segmentation_miou",
    "ocr_cer",
    "category_accuracy",
    "caption_exact",
    "ece",
)
"""The figures that name a checkpoint's quality, in the order of the report; others follow."""


class EvaluatedModel(Protocol):
    """What evaluation needs of a model; ``florence2.Florence2`` is one."""

    def run_many(self, asks: Sequence[Ask]) -> list[Result | Failure]:
        """One result or failure per ask, in order."""
        ...


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """What to ask. ``beams`` of None is the checkpoint's own number; ``batch`` counts scenes."""

    num_scenes: int = 500
    seed: int = 0
    tasks: tuple[str, ...] = ALL_TASKS
    beams: int | None = None
    batch: int = 8
    max_new_tokens: int | None = None
    compare_scores: bool = False

    def __post_init__(self) -> None:
        """RequestError for a plan that cannot be asked."""
        if self.compare_scores and "<OD>" not in self.tasks:
            raise RequestError("--compare-scores compares the boxes of <OD>; add <OD> to --tasks.")
        held_out_seeds(self.seed, self.num_scenes)
        if self.batch < 1:
            raise RequestError(f"A batch is at least one scene, and {self.batch} was received.")


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """The figures, how answers were spelled by task, and the speed of answering."""

    plan: EvaluationPlan
    figures: dict[str, Estimate]
    well_formed: dict[str, float]
    known_words: dict[str, float]
    images_per_s: float
    checkpoint: dict[str, str | None] = field(default_factory=dict)
    score_definitions: dict[str, dict[str, float | None]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers by figure; null for a figure whose task was not asked."""
        measured = {name: m for name, m in self.figures.items() if m.value is not None}
        content = {
            **self.checkpoint,
            "scenes": self.plan.num_scenes,
            "seed": self.plan.seed,
            "beams": self.plan.beams,
            "tasks": list(self.plan.tasks),
            **dict.fromkeys(FIGURES),
            **{name: _rounded(found.value) for name, found in self.figures.items()},
            "interval_95": {n: [_rounded(m.low), _rounded(m.high)] for n, m in measured.items()},
            "counts": {name: found.count for name, found in self.figures.items()},
            "well_formed": {task: _rounded(share) for task, share in self.well_formed.items()},
            "known_words": {task: _rounded(share) for task, share in self.known_words.items()},
            "images_per_s": round(self.images_per_s, 3),
        }
        if self.score_definitions is not None:
            content["score_definitions"] = self.score_definitions
        return content

    def show(self, console: Console) -> None:
        """Prints what was asked, and tables of the figures and of how answers were spelled."""
        known, plan = self.checkpoint, self.plan
        revision = f"@{str(known['revision'])[:12]}" if known["revision"] else ""
        console.print(
            f"{known['checkpoint']}{revision} in {known['precision']} on {known['device']}: "
            f"scenes {plan.seed} to {plan.seed + plan.num_scenes - 1}, {plan.beams} beams, "
            f"{round(self.images_per_s, 3):.2f} images/s",
            markup=False,
        )
        figures = Table("figure", "value", "95 % interval", "of", box=None, pad_edge=False)
        for name, found in self.figures.items():
            if found.value is not None:
                interval = f"{found.low:.3f} to {found.high:.3f}"
                figures.add_row(name, f"{found.value:.3f}", interval, str(found.count))
        console.print(figures)
        forms = Table("task", "well-formed", "known words", box=None, pad_edge=False)
        for name, share in self.well_formed.items():
            forms.add_row(name, f"{share:.3f}", f"{self.known_words[name]:.3f}")
        console.print(forms)
        if self.score_definitions:
            table = Table("score of a box", "mAP50", "AUROC", "ECE", box=None, pad_edge=False)
            for name, row in self.score_definitions.items():
                table.add_row(name, *("" if v is None else f"{v:.3f}" for v in row.values()))
            console.print(table)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def task_tokens(names: Iterable[str]) -> tuple[str, ...]:
    """Tokens of tasks by token or name, in the order of the task table; all for no names."""
    chosen = {find_task(name).token for name in names if name.strip()}
    return tuple(token for token in ALL_TASKS if token in chosen) or ALL_TASKS


def held_out_seeds(seed: int, num_scenes: int) -> range:
    """The seeds of the scenes; RequestError unless all of them are held out."""
    last = HELD_OUT_SEEDS[-1]
    if num_scenes < 1:
        raise RequestError(f"At least one scene is needed, and {num_scenes} were asked for.")
    if seed < 0 or seed + num_scenes - 1 > last:
        raise RequestError(
            f"Held-out scenes have the seeds 0 to {last}, and {num_scenes} from {seed} on were "
            "asked for; choose a lower seed or fewer scenes."
        )
    return range(seed, seed + num_scenes)


def held_out_examples(seed: int, tasks: Sequence[str]) -> list[Example]:
    """One example of each task that applies to the scene of a seed.

    A task's example does not depend on which others are asked.
    """
    scene = make_scene(seed)
    return [
        example(scene, task, np.random.default_rng([seed, ALL_TASKS.index(task), 0xE7A1]))
        for task in tasks
        if applies(scene, task)
    ]


def evaluate_checkpoint(
    model: Florence2, plan: EvaluationPlan, console: Console
) -> EvaluationReport:
    """Measures a loaded checkpoint, with a progress bar where ``console`` is a terminal."""
    checkpoint = model.engine.checkpoint
    plan = replace(plan, beams=plan.beams or checkpoint.generation.num_beams)
    study = ScoreStudy(checkpoint.vocabulary) if plan.compare_scores else None
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Asking", total=plan.num_scenes)
        report = evaluate(model, plan, progress=lambda count: bar.advance(task, count), study=study)
    return replace(
        report,
        checkpoint={
            "checkpoint": checkpoint.name,
            "revision": checkpoint.revision,
            "device": model.device,
            "precision": model.precision,
        },
        score_definitions=study.rows() if study else None,
    )


def evaluate(
    model: EvaluatedModel,
    plan: EvaluationPlan,
    *,
    progress: Callable[[int], None] = lambda _: None,
    study: ScoreStudy | None = None,
) -> EvaluationReport:
    """Measures a model; the same plan always asks the same.

    ``progress`` is called with the number of scenes just done, ``study`` sees the boxes of
    ``<OD>``. Raises FlorenceError at the first question that is not answered: a model that fails
    has no figures.
    """
    answers = _Answers(plan)
    seconds = 0.0
    seeds = held_out_seeds(plan.seed, plan.num_scenes)
    for start in range(0, len(seeds), plan.batch):
        scenes = [held_out_examples(s, plan.tasks) for s in seeds[start : start + plan.batch]]
        asks = [ask for examples in scenes if examples for ask in _asks(examples, plan)]
        began = time.perf_counter()
        outcomes = model.run_many(asks)
        seconds += time.perf_counter() - began
        for asked, outcome in zip(chain(*scenes), outcomes, strict=True):
            result = _answered(asked, outcome)
            answers.add(asked, result)
            if study is not None and asked.task == "<OD>":
                study.add(asked.scene.seed, answers.boxes[-1], result)
        progress(len(scenes))
    return answers.report(plan.num_scenes / seconds if seconds else 0.0)


def _asks(examples: Sequence[Example], plan: EvaluationPlan) -> list[Ask]:
    """The asks about one scene."""
    # One picture object per scene: the engine encodes what is the same object once.
    picture = draw_scene(examples[0].scene)
    return [
        Ask(
            picture,
            one.task,
            one.text,
            one.region_px,
            num_beams=plan.beams,
            max_new_tokens=plan.max_new_tokens,
        )
        for one in examples
    ]


def _answered(asked: Example, outcome: Result | Failure) -> Result:
    if isinstance(outcome, Failure):
        raise FlorenceError(
            f"The model could not answer {asked.task} about scene {asked.scene.seed}, so it "
            f"has no figures: {outcome.message}"
        )
    return outcome


class _Answers:
    """What the answers reached, scene by scene; memory grows by a few numbers per scene."""

    def __init__(self, plan: EvaluationPlan) -> None:
        self._plan = plan
        self._forms: dict[str, list[tuple[bool, bool]]] = {task: [] for task in plan.tasks}
        self._shares = {
            share.name: np.zeros((2, plan.num_scenes))
            for share in _SHARES
            if any(task in plan.tasks for task in share.tasks)
        }
        self.boxes: list[ImageBoxes] = []
        """Of each answer to ``<OD>``."""

    def add(self, asked: Example, result: Result) -> None:
        is_well_formed = not result.notes and not result.truncated
        self._forms[asked.task].append((is_well_formed, has_known_words(result.answer)))
        for share in _SHARES:
            if asked.task in share.tasks:
                scene_number = asked.scene.seed - self._plan.seed
                self._shares[share.name][:, scene_number] += share.of(asked, result)
        if asked.task == "<OD>":
            self.boxes.append(_image_boxes(asked, result))

    def report(self, images_per_s: float) -> EvaluationReport:
        """Every figure of the tasks asked, with its interval over resampled scenes."""
        metrics: dict[str, Metric] = {}
        if "<OD>" in self._forms:
            metrics["od_map50"] = MeanAveragePrecision(rankings(self.boxes, (0.5,)))
            metrics["od_map"] = MeanAveragePrecision(rankings(self.boxes, IOU_THRESHOLDS))
            metrics["ece"] = pooled(self.boxes)
        metrics |= {name: Ratio(*counts) for name, counts in self._shares.items()}
        weights = resamplings(self._plan.num_scenes, self._plan.seed)
        ordered = [*FIGURES, *(name for name in metrics if name not in FIGURES)]
        shares = {task: np.mean(form, axis=0) for task, form in self._forms.items() if form}
        return EvaluationReport(
            self._plan,
            {name: estimate(metrics[name], weights) for name in ordered if name in metrics},
            {task: float(well_formed) for task, (well_formed, _) in shares.items()},
            {task: float(known) for task, (_, known) in shares.items()},
            images_per_s,
        )


def _image_boxes(asked: Example, result: Result) -> ImageBoxes:
    """The boxes of one answer to ``<OD>`` and the true ones; FlorenceError without scores."""
    boxes, labels = _found_boxes(result)
    scores = [thing.score for thing in result.objects if isinstance(thing, Box)]
    known = tuple(score for score in scores if score is not None)
    if len(known) < len(boxes):
        raise FlorenceError("Average precision needs a score for every box, and some have none.")
    return ImageBoxes(boxes, labels, known, asked.truth.boxes_xyxy, asked.truth.labels)


def _found_boxes(result: Result) -> tuple[tuple[BoxXyxy, ...], tuple[str, ...]]:
    """Boxes, and the upright boxes around quads, in fractions of the image; and their labels."""
    width, height = result.size_wh
    found = [
        (thing.box_xyxy if isinstance(thing, Box) else thing.quad_xy, plain_label(thing.label))
        for thing in result.objects
        if isinstance(thing, Box | Quad)
    ]
    boxes = [_around([x / width for x in c[0::2]], [y / height for y in c[1::2]]) for c, _ in found]
    return tuple(boxes), tuple(label for _, label in found)


def _true_boxes(asked: Example) -> tuple[list[BoxXyxy], list[str]]:
    truth = asked.truth
    boxes = [*truth.boxes_xyxy, *(_around(*zip(*quad, strict=True)) for quad in truth.quads_xy)]
    return boxes, [plain_label(label) for label in truth.labels]


def _around(xs: Sequence[float], ys: Sequence[float]) -> BoxXyxy:
    return min(xs), min(ys), max(xs), max(ys)


# What one answer reached, of what it could reach.


def _recall(asked: Example, result: Result) -> tuple[float, float]:
    true_boxes, true_labels = _true_boxes(asked)
    matches = count_matches(*_found_boxes(result), true_boxes, true_labels)
    return matches, len(true_boxes)


def _precision(asked: Example, result: Result) -> tuple[float, float]:
    boxes, labels = _found_boxes(result)
    return count_matches(boxes, labels, *_true_boxes(asked)), len(boxes)


def _outline(asked: Example, result: Result) -> tuple[float, float]:
    """The outlines are compared with the full ones, not with the twelve points answers spell."""
    width, height = result.size_wh
    found = [
        [value / (height if place % 2 else width) for place, value in enumerate(ring)]
        for thing in result.objects
        if isinstance(thing, Polygon)
        for ring in thing.rings_xy
    ]
    true = [[*chain(*thing.outline_xy)] for thing in asked.truth.objects]
    return (outline_iou(found, true), 1) if true else (0, 0)


def _read_errors(asked: Example, result: Result) -> tuple[float, float]:
    written = "\n".join(asked.truth.labels)
    return (character_errors(result.text or "", written), 1) if written else (0, 0)


def _silence(asked: Example, result: Result) -> tuple[float, float]:
    return (0, 0) if asked.truth.labels else (float(not (result.text or "").strip()), 1)


def _label(asked: Example, result: Result) -> tuple[float, float]:
    [true] = asked.truth.labels
    return float(plain_label(result.text or "") == true), 1


def _exact(asked: Example, result: Result) -> tuple[float, float]:
    return float(one_spaced(result.text or "") == one_spaced(asked.truth.answer)), 1


@dataclass(frozen=True, slots=True)
class _Share:
    """A figure's name, the tasks it looks at, and what one answer reached of what it could."""

    name: str
    tasks: tuple[str, ...]
    of: Callable[[Example, Result], tuple[float, float]]


_GROUNDING = ("<CAPTION_TO_PHRASE_GROUNDING>",)
_OVD = ("<OPEN_VOCABULARY_DETECTION>",)
_SEGMENTATION = ("<REFERRING_EXPRESSION_SEGMENTATION>", "<REGION_TO_SEGMENTATION>")
_SHARES: Final = (
    _Share("grounding_recall50", _GROUNDING, _recall),
    _Share("ovd_recall50", _OVD, _recall),
    _Share("proposal_recall50", ("<REGION_PROPOSAL>",), _recall),
    _Share("segmentation_miou", _SEGMENTATION, _outline),
    _Share("ocr_cer", ("<OCR>",), _read_errors),
    _Share("category_accuracy", ("<REGION_TO_CATEGORY>",), _label),
    _Share("caption_exact", ("<CAPTION>",), _exact),
    _Share("grounding_precision50", _GROUNDING, _precision),
    _Share("ovd_precision50", _OVD, _precision),
    _Share("proposal_precision50", ("<REGION_PROPOSAL>",), _precision),
    _Share("dense_caption_recall50", ("<DENSE_REGION_CAPTION>",), _recall),
    _Share("ocr_lines_recall50", ("<OCR_WITH_REGION>",), _recall),
    _Share("ocr_silent_without_text", ("<OCR>",), _silence),
    _Share("region_ocr_cer", ("<REGION_TO_OCR>",), _read_errors),
    _Share("region_description_accuracy", ("<REGION_TO_DESCRIPTION>",), _label),
    _Share("detailed_caption_exact", ("<DETAILED_CAPTION>",), _exact),
    _Share("more_detailed_caption_exact", ("<MORE_DETAILED_CAPTION>",), _exact),
)
