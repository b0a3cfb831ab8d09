"""Examples: a prompt about a scene and its exact answer, for each of the 15 tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from florence2.tasks import TASKS, TaskInput
from florence2_demo import language
from florence2_demo.geometry import FractionBox
from florence2_demo.language import Phrase
from florence2_demo.lexicon import ABSENT_WORDS, COLOURS, KINDS, PLURALS, listed, with_article
from florence2_demo.scene import Scene
from florence2_demo.truth import TASK_BY_TOKEN, Truth, ground_truth, locations

TASK_WEIGHTS: Final[dict[str, float]] = {
    "<OD>": 3.0,
    "<DENSE_REGION_CAPTION>": 1.5,
    "<REGION_PROPOSAL>": 1.5,
    "<CAPTION_TO_PHRASE_GROUNDING>": 3.0,
    "<OPEN_VOCABULARY_DETECTION>": 2.0,
    "<REFERRING_EXPRESSION_SEGMENTATION>": 1.5,
    "<REGION_TO_SEGMENTATION>": 1.5,
    "<REGION_TO_CATEGORY>": 1.0,
    "<REGION_TO_DESCRIPTION>": 1.0,
    "<REGION_TO_OCR>": 2.0,
    "<OCR>": 1.5,
    "<OCR_WITH_REGION>": 2.5,
    "<CAPTION>": 1.0,
    "<DETAILED_CAPTION>": 1.0,
    "<MORE_DETAILED_CAPTION>": 1.0,
}
_NO_TEXT_WEIGHT: Final = 0.15


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt about a scene and the right answer; the region is in fractions of the image."""

    scene: Scene
    task: str
    text: str | None
    region_xyxy: FractionBox | None
    truth: Truth

    @property
    def answer(self) -> str:
        """Without ``<s>`` and ``</s>``; empty where the right answer is nothing."""
        return self.truth.answer

    @property
    def region_px(self) -> FractionBox | None:
        """The region in pixels of the scene's own size."""
        if self.region_xyxy is None:
            return None
        x1, y1, x2, y2 = self.region_xyxy
        width, height = self.scene.size_wh
        return x1 * width, y1 * height, x2 * width, y2 * height


def prompt_sentence(example: Example) -> str:
    """The sentence the network reads for an example, as the published processor words it."""
    sentence = TASK_BY_TOKEN[example.task].sentence
    if example.region_xyxy is not None:
        return sentence.replace("{input}", locations(example.region_xyxy))
    return sentence.replace("{input}", (example.text or "").strip())


def applies(scene: Scene, task: str) -> bool:
    """Whether a task can be asked about a scene: reading a region needs text."""
    return task != "<REGION_TO_OCR>" or bool(scene.texts)


def example(scene: Scene, task: str, rng: np.random.Generator) -> Example:
    """A random example of one task that applies to the scene."""
    takes = TASK_BY_TOKEN[task].takes
    text = _TEXTS[task](scene, rng) if takes is TaskInput.TEXT else None
    region = _random_region(scene, task, rng) if takes is TaskInput.REGION else None
    return Example(scene, task, text, region, ground_truth(scene, task, text, region))


def examples(scene: Scene, rng: np.random.Generator) -> list[Example]:
    """One example of every task that applies, in the order of the task table."""
    return [example(scene, task.token, rng) for task in TASKS if applies(scene, task.token)]


def sample_examples(
    scene: Scene,
    rng: np.random.Generator,
    count: int,
    weights: Mapping[str, float] | None = None,
) -> list[Example]:
    """``count`` random examples; tasks are drawn by weight (TASK_WEIGHTS by default).

    Tasks repeat only when ``count`` is larger than the number of tasks that apply. Reading
    a scene without text is asked rarely.
    """
    chosen = weights or TASK_WEIGHTS
    tasks = [task for task in chosen if applies(scene, task) and chosen[task] > 0]
    unlikely = {task for task in tasks if "OCR" in task and not scene.texts}
    shares = np.array([chosen[t] * (_NO_TEXT_WEIGHT if t in unlikely else 1.0) for t in tasks])
    replace = count > len(tasks)
    picks = rng.choice(len(tasks), size=count, replace=replace, p=shares / shares.sum())
    return [example(scene, tasks[int(pick)], rng) for pick in picks]


def _random_region(scene: Scene, task: str, rng: np.random.Generator) -> FractionBox:
    """A box around an object or text line, half of the time as loose as people draw them."""
    boxes = [thing.box_xyxy for thing in scene.objects]
    if task == "<REGION_TO_OCR>":
        boxes = [line.box_xyxy for line in scene.texts]
    box = np.array(boxes[int(rng.integers(len(boxes)))])
    if rng.random() < 0.5:
        sides = np.tile(box[2:] - box[:2], 2)
        box = np.clip(box + rng.uniform(-0.06, 0.06, size=4) * sides, 0, 1)
    x1, y1, x2, y2 = (float(value) for value in box)
    return x1, y1, x2, y2


def _absent(scene: Scene, rng: np.random.Generator) -> str:
    """A phrase that nothing in the scene matches: "purple fish", "tree" or "dog"."""
    if rng.random() < 0.35:
        return str(rng.choice(ABSENT_WORDS))
    while True:
        colour = str(rng.choice(COLOURS)) if rng.random() < 0.5 else None
        phrase = Phrase(str(rng.choice(KINDS)), colour)
        if not phrase.matches(scene):
            return phrase.words


def _present(scene: Scene, rng: np.random.Generator) -> Phrase:
    thing = scene.objects[int(rng.integers(len(scene.objects)))]
    return Phrase(thing.kind, thing.colour if rng.random() < 0.6 else None)


def _mixed_words(scene: Scene, rng: np.random.Generator) -> list[str]:
    """One to four phrases in random order, most of them present; rarely two of one kind."""
    words = [
        _absent(scene, rng) if rng.random() < 0.3 else _present(scene, rng).words
        for _ in range(int(rng.integers(1, 5)))
    ]
    if rng.random() < 0.75:
        words = list({phrase.rpartition(" ")[2]: phrase for phrase in words}.values())
    return list(dict.fromkeys(words))


def _plural(words: str) -> str:
    head, _, kind = words.rpartition(" ")
    return f"{head} {PLURALS.get(kind, kind + 's')}".strip()


def _grounding_text(scene: Scene, rng: np.random.Generator) -> str:
    """A caption, a sentence naming some things, or a list of language."""
    style = rng.random()
    if style < 0.15:
        return language.caption(scene)
    if style < 0.22:
        return language.detailed_caption(scene)
    if style < 0.28:
        return language.more_detailed_caption(scene)
    words = _mixed_words(scene, rng)
    if style < 0.5:
        return listed([with_article(w) if rng.random() < 0.7 else _plural(w) for w in words])
    separator = ". " if style < 0.85 else ", "
    return separator.join(words) + ("." if style < 0.6 else "")


def _named_thing(scene: Scene, rng: np.random.Generator) -> str:
    words = _absent(scene, rng) if rng.random() < 0.15 else _present(scene, rng).words
    return _plural(words) if rng.random() < 0.15 else words


def _referring_text(scene: Scene, rng: np.random.Generator) -> str:
    """One thing in words: "red car", "the car", "the red car on the left".

    Always of one thing, as the published task is asked: were several allowed, the token that
    begins a list of outlines would rival every first location, which no single bin can outweigh.
    """
    phrase = _present(scene, rng)
    words = phrase.words if rng.random() < 0.35 else f"the {phrase.words}"
    several = len(phrase.matches(scene)) > 1
    if several or rng.random() < 0.1:
        return f"{words} {_telling_side(scene, phrase, rng)}"
    return words


def _telling_side(scene: Scene, phrase: Phrase, rng: np.random.Generator) -> str:
    """A side that tells matching things apart: along the axis on which they spread most."""
    centres = np.array([thing.centre_xy for thing in phrase.matches(scene)])
    spread = centres.max(axis=0) - centres.min(axis=0)
    sides = ("on the left", "on the right") if spread[0] >= spread[1] else (
        "at the top", "at the bottom"
    )  # fmt: skip
    return sides[int(rng.integers(2))]


_TEXTS: Final[dict[str, Callable[[Scene, np.random.Generator], str]]] = {
    "<CAPTION_TO_PHRASE_GROUNDING>": _grounding_text,
    "<OPEN_VOCABULARY_DETECTION>": _named_thing,
    "<REFERRING_EXPRESSION_SEGMENTATION>": _referring_text,
}
