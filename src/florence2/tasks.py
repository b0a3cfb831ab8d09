"""THE table: the 15 task prompts, what each takes and gives, and how they are joined by ``+``.

Prompts, validation, the command's help, the settings file and the docs are made from it.
Sentences and output kinds: the published processor of Florence-2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final

from florence2.errors import RequestError, unknown_name
from florence2.tokens import ADDED_TOKENS, BOS, IMAGE, MASK, PAD, UNK

# Published in the processor files of the checkpoints; compared as they are, case included.
_PRONOUNS: Final = (
    "it I me mine you your yours he him his she her hers they them their theirs one oneself "
    "we us our ours its myself yourself himself herself itself ourselves yourselves themselves"
)
_POINTERS: Final = "this that these those who whom whose which what"
_AMOUNTS: Final = (
    "all another any anybody anyone anything each everybody everyone everything few many nobody "
    "none several some somebody someone something"
)
_WORDS: Final = "image images the a an lots"
_PHRASES: Final = ("each other", "one another", "the image", "a group", "other objects", "a set")

BANNED_PHRASES: Final = frozenset(
    (*" ".join((_PRONOUNS, _POINTERS, _AMOUNTS, _WORDS)).split(), *_PHRASES)
)


class TaskInput(Enum):
    """What a task needs besides the image."""

    NONE = "nothing"
    TEXT = "text"
    REGION = "region"
    OPTIONAL_TEXT = "text or nothing"


class OutputKind(Enum):
    """How an answer is spelled, and so which parser reads it."""

    TEXT = "pure_text"
    OCR = "ocr"
    GROUNDING = "phrase_grounding"
    LABELED_BOXES = "description_with_bboxes"
    BOXES = "bboxes"
    POLYGONS = "polygons"
    BOXES_OR_POLYGONS = "description_with_bboxes_or_polygons"


@dataclass(frozen=True, slots=True)
class Task:
    """One task prompt. ``max_new_tokens`` is the budget used when the caller names none."""

    token: str
    name: str
    sentence: str
    takes: TaskInput
    output: OutputKind
    max_new_tokens: int
    summary: str


_NONE, _TEXT, _REGION = TaskInput.NONE, TaskInput.TEXT, TaskInput.REGION

# fmt: off
TASKS: Final[tuple[Task, ...]] = (
    Task("<CAPTION>", "caption", "What does the image describe?",
         _NONE, OutputKind.TEXT, 128, "one sentence about the image"),
    Task("<DETAILED_CAPTION>", "detailed_caption",
         "Describe in detail what is shown in the image.",
         _NONE, OutputKind.TEXT, 256, "a few sentences about the image"),
    Task("<MORE_DETAILED_CAPTION>", "more_detailed_caption",
         "Describe with a paragraph what is shown in the image.",
         _NONE, OutputKind.TEXT, 512, "a paragraph about the image"),
    Task("<OD>", "object_detection", "Locate the objects with category name in the image.",
         _NONE, OutputKind.LABELED_BOXES, 1024, "every object's box and category"),
    Task("<DENSE_REGION_CAPTION>", "dense_region_caption",
         "Locate the objects in the image, with their descriptions.",
         _NONE, OutputKind.LABELED_BOXES, 1024, "every object's box and a short description"),
    Task("<REGION_PROPOSAL>", "region_proposal", "Locate the region proposals in the image.",
         _NONE, OutputKind.BOXES, 1024, "boxes of whatever is there, without labels"),
    Task("<CAPTION_TO_PHRASE_GROUNDING>", "phrase_grounding",
         "Locate the phrases in the caption: {input}",
         _TEXT, OutputKind.GROUNDING, 1024, "boxes for the phrases of a text"),
    Task("<OPEN_VOCABULARY_DETECTION>", "open_vocabulary_detection",
         "Locate {input} in the image.",
         _TEXT, OutputKind.BOXES_OR_POLYGONS, 1024, "boxes or polygons for one named thing"),
    Task("<REFERRING_EXPRESSION_SEGMENTATION>", "referring_segmentation",
         "Locate {input} in the image with mask",
         _TEXT, OutputKind.POLYGONS, 1024, "the polygon of what a phrase refers to"),
    Task("<REGION_TO_SEGMENTATION>", "region_segmentation",
         "What is the polygon mask of region {input}",
         _REGION, OutputKind.POLYGONS, 1024, "the polygon of the object in a region"),
    Task("<REGION_TO_CATEGORY>", "region_category", "What is the region {input}?",
         _REGION, OutputKind.TEXT, 64, "a region's category"),
    Task("<REGION_TO_DESCRIPTION>", "region_description",
         "What does the region {input} describe?",
         _REGION, OutputKind.TEXT, 128, "a region's description"),
    Task("<REGION_TO_OCR>", "region_ocr", "What text is in the region {input}?",
         _REGION, OutputKind.TEXT, 256, "the text in a region"),
    Task("<OCR>", "ocr", "What is the text in the image?",
         _NONE, OutputKind.TEXT, 1024, "all text in the image"),
    Task("<OCR_WITH_REGION>", "ocr_with_region",
         "What is the text in the image, with regions?",
         _NONE, OutputKind.OCR, 1024, "each line of text with its quad"),
)
# fmt: on

_BY_NAME: Final = {task.token.lower(): task for task in TASKS} | {task.name: task for task in TASKS}
_CUSTOM_TOKEN: Final = re.compile(r"<[A-Za-z][A-Za-z0-9_ -]{0,63}>")
_GROUNDING: Final = "<CAPTION_TO_PHRASE_GROUNDING>"
# What the step before may give.
_FIRST_OUTPUTS: Final = {
    TaskInput.TEXT: (OutputKind.TEXT,),
    TaskInput.REGION: (
        OutputKind.LABELED_BOXES,
        OutputKind.BOXES,
        OutputKind.GROUNDING,
        OutputKind.BOXES_OR_POLYGONS,
        OutputKind.OCR,
    ),
}


def find_task(name: str) -> Task:
    """The task for a token (``<OD>``, any case, brackets optional) or a friendly name.

    Raises RequestError naming the nearest known task.
    """
    key = name.strip().lower()
    task = _BY_NAME.get(key) or _BY_NAME.get(f"<{key}>") or _BY_NAME.get(key.replace(" ", "_"))
    if task is None:
        raise RequestError(unknown_name("task", name, [t.token for t in TASKS]))
    return task


def passthrough_task(token: str, max_new_tokens: int = 1024) -> Task:
    """A fine-tune's own task, such as ``<DocVQA>``: the token and the text go in as they are.

    Its answer is text. Never reached by ``find_task``, so a misspelt task stays an error.
    Raises RequestError for a published task or another token with a meaning of its own.
    """
    if _CUSTOM_TOKEN.fullmatch(token) is None:
        raise RequestError(
            f"A custom task is a word in angle brackets such as <DocVQA>, and {token!r} was "
            "received; correct it."
        )
    if token.lower() in _BY_NAME or token in (*ADDED_TOKENS, BOS, PAD, UNK, MASK, IMAGE):
        raise RequestError(
            f"{token} has a meaning of its own and cannot be a custom task; ask for it by name."
        )
    return Task(
        token,
        token.strip("<>").lower(),
        token + "{input}",
        TaskInput.OPTIONAL_TEXT,
        OutputKind.TEXT,
        max_new_tokens,
        "a fine-tune's own task",
    )


def parse_steps(name: str) -> tuple[Task, ...]:
    """The tasks of ``"<OD>"`` or ``"<CAPTION>+<CAPTION_TO_PHRASE_GROUNDING>"``, in order.

    Raises RequestError when a step cannot take what the one before it gives.
    """
    named = [find_task(part) for part in name.split("+")]
    steps: list[Task] = []
    for task in named:
        if steps and task.takes is TaskInput.REGION and _is_caption(steps[-1]):
            steps.append(find_task(_GROUNDING))
        if steps:
            _check_follows(steps[-1], task)
        steps.append(task)
    return tuple(steps)


def next_tasks(task: Task) -> tuple[Task, ...]:
    """The tasks that can be the next step of a cascade, behind ``task``."""
    following = []
    for one in TASKS:
        try:
            parse_steps(f"{task.token}+{one.token}")
        except RequestError:
            continue
        following.append(one)
    return tuple(following)


def _is_caption(task: Task) -> bool:
    return task.takes is TaskInput.NONE and task.output is OutputKind.TEXT


def _check_follows(before: Task, task: Task) -> None:
    if task.takes is TaskInput.NONE:
        raise RequestError(
            f"A later step of a cascade takes text or a region, and {task.token} takes neither; "
            "ask for it on its own."
        )
    if before.takes is TaskInput.REGION or before.output not in _FIRST_OUTPUTS[task.takes]:
        raise RequestError(
            f"{task.token} takes {task.takes.value}, which {before.token} does not give; "
            "begin the cascade with a caption, a detection or a proposal task."
        )
