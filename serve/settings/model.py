"""What a request asks for, after it was checked: the record that the whole app works from."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from florence2.records import BoxXyxy, SizeWh
from florence2.tasks import Task, parse_steps
from serve.phrases import Prompt, classes_of, prompts_of, split_phrases

Geometry = Literal["polygon", "bitmap"]

DEFAULT_NMS: float = 0.7


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Tiling(_Record):
    """Windows that an image is looked at through, in pixels of the original image."""

    size_wh: SizeWh
    overlap_wh: SizeWh
    full_image: bool = True


class Reference(_Record):
    """An object to find more of. ``image_id`` of None is the image that is asked about."""

    image_id: int | None
    box_xyxy: BoxXyxy
    class_name: str


class Settings(_Record):
    """One request's settings: always complete, cleaned and typed; ``parse_settings`` makes it.

    Boxes are (left, top, right, bottom) in pixels of the original image, right and bottom
    exclusive. Class names are without ``class_suffix``. With a ``reference`` there is neither
    text nor mapping: the reference says what to look for.
    """

    task_prompt: str = Field(
        default="<OD>",
        description="What to ask: a task such as <OD>, or tasks joined by + such as "
        "<OD>+<REGION_TO_SEGMENTATION>.",
    )
    text: str | None = Field(
        default=None,
        description='What to look for, such as "red car. dog". Full stops, semicolons and line '
        "ends part phrases.",
    )
    mapping: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="Classes and their prompts, such as {dog: [puppy, hound], car: red car}.",
    )
    classes: tuple[str, ...] | None = Field(
        default=None,
        description="Only these classes are returned, such as [dog, car], in any case; empty: all "
        "of them.",
    )
    confidence_threshold: float = Field(
        default=0.0, description="Objects with a lower confidence are left out."
    )
    class_thresholds: dict[str, float] = Field(
        default_factory=dict,
        description="Other confidence thresholds for single classes, such as {dog: 0.4, car: 0.2}.",
    )
    nms_threshold: float | None = Field(
        default=DEFAULT_NMS,
        description="Two boxes of a class with this IoU or more are one object, and the one with "
        "the higher confidence stays; off: both stay.",
    )
    containment_threshold: float | None = Field(
        default=None,
        description="Two boxes of a class are also one object when this share of the smaller box "
        "is inside the larger one; empty or off: never.",
    )
    nms_across_classes: bool = Field(
        default=False,
        description="Whether boxes of different classes can be one object too.",
    )
    max_box_area: float = Field(
        default=1.0, description="Boxes that cover more than this share of the image are left out."
    )
    geometry: Geometry = Field(
        default="polygon", description="How outlines are returned: polygon or bitmap."
    )
    class_suffix: str = Field(default="", description="Added to the end of every class name.")
    sentences_as_classes: bool = Field(
        default=False,
        description="Whether a described region's sentence is its class; otherwise it is a tag of "
        'an "object".',
    )
    tiling: Tiling | None = Field(
        default=None,
        description="Looks through windows too, for small objects, such as {width: 1024, height: "
        "1024, overlap: 128}; full_image: false leaves out the look at the whole image.",
    )
    regions: tuple[BoxXyxy, ...] = Field(
        default=(),
        description="Boxes that a <REGION_...> task is asked about, each [x1, y1, x2, y2] in "
        "pixels, such as [[10, 20, 200, 180]].",
    )
    rectangle: BoxXyxy | None = Field(
        default=None,
        description="Only this part of the image is looked at, such as [10, 20, 200, 180].",
    )
    reference: Reference | None = Field(default=None, description="An object to find more of.")
    num_beams: int | None = Field(
        default=None, description="Width of the search; empty: as the checkpoint says, mostly 3."
    )
    max_new_tokens: int | None = Field(
        default=None, description="Longest answer in tokens; empty: as the task needs."
    )

    @property
    def steps(self) -> tuple[Task, ...]:
        """The tasks of ``task_prompt`` in order."""
        return parse_steps(self.task_prompt)

    @property
    def phrases(self) -> tuple[str, ...]:
        """The phrases of ``text``, each once."""
        return () if self.text is None else tuple(split_phrases(self.text))

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """One question per image and prompt: mapped ones with their class; no text has one."""
        return prompts_of(self.phrases, self.mapping)

    @property
    def classes_by_phrase(self) -> dict[str, str]:
        """The class of each phrase asked for, by ``phrase_key``, as ``class_of`` takes it."""
        return classes_of(self.phrases, self.mapping)
