"""THE schema of a request's settings: every key, its other spellings, and what they mean together.

The docstring of a field is what the settings file and its page of documentation say about it.

The SDK tops a client's dictionary up with the settings file, key by key, before it is read here. So
a key that is left out, null or empty, and one that has the file's own value, mean the same; and
another spelling of such a key has the say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, Final

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from pydantic.fields import FieldInfo

from florence2.errors import RequestError
from florence2.records import MAX_BEAMS, BoxXyxy
from florence2.tasks import Task, TaskInput, parse_steps
from serve.naming import FIXED_SHAPES, OBJECT_CLASS
from serve.settings import values
from serve.settings.errors import hint, refused, sentence, shown
from serve.settings.values import (
    NOTHING,
    ClassName,
    Flag,
    Prompt,
    PromptsByClass,
    Share,
    ShareOrOff,
    TextOrList,
    Tiling,
    classes_of,
    prompts_of,
    split_phrases,
    whole,
    word,
)

DETECTION: Final = "<OD>"
GROUNDING: Final = "<CAPTION_TO_PHRASE_GROUNDING>"
CATEGORY: Final = "<REGION_TO_CATEGORY>"
BOX_SUFFIX: Final = "_bbox"

_MASKS_FORM: Final = frozenset({"mapping", "mode", "text"})
_MODES: Final = frozenset({"text_prompt", "reference_image"})
_ARE_TEXTS: Final = frozenset({"text", "class_suffix", "reference_class_name"})


def _key(default: object, takes: str, *spellings: str) -> Any:  # noqa: ANN401 - as Field itself
    """A field under its own name or one of ``spellings``; ``takes`` is for the documentation."""
    alias = AliasChoices(*spellings) if spellings else None
    return Field(default, validation_alias=alias, json_schema_extra={"takes": takes})


class _Sent(dict[str, object]):
    """What a client sent for one field, by the spellings that it used."""


class _Keys(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_by_name=True, use_attribute_docstrings=True
    )

    @field_validator("*", mode="wrap")
    @classmethod
    def _read(
        cls, value: object, handler: ValidatorFunctionWrapHandler, info: ValidationInfo
    ) -> object:
        """One value for all spellings; RequestError about a wrong one, by the name it has there."""
        if not isinstance(value, _Sent):
            return handler(value)
        read = {}
        for spelling, sent in value.items():
            try:
                read[spelling] = handler(sent)
            except ValidationError as error:
                raise RequestError(sentence(spelling, sent, error)) from error
        name = str(info.field_name)
        if name == "class_thresholds":
            return _joined_thresholds(read.values())
        default = default_in_file(name)
        said = {spelling: one for spelling, one in read.items() if one != default}
        if not said:
            return default
        first, *others = said
        for other in others:
            if said[other] != said[first]:
                raise RequestError(
                    f"{name} is given once, and {first} is {shown(value[first])} and "
                    f"{other} is {shown(value[other])}; keep one of them."
                )
        return said[first]


def _joined_thresholds(several: Iterable[dict[str, float]]) -> dict[str, float]:
    joined: dict[str, float] = {}
    for name, threshold in chain.from_iterable(one.items() for one in several):
        known = joined.setdefault(name, threshold)
        if known != threshold:
            raise RequestError(
                f"A class has one threshold, and {known:g} and {threshold:g} were received for "
                f"{name!r}; keep one of them."
            )
    return joined


@dataclass(frozen=True, slots=True)
class Reference:
    """An object to find more of. ``image_id`` of None is the image that is asked about."""

    image_id: int | None
    box_xyxy: BoxXyxy
    class_name: str


class Settings(_Keys):
    """One request's settings: always complete, cleaned and typed; ``parse_settings`` makes it.

    Boxes are (left, top, right, bottom) in pixels of the original image, right and bottom
    exclusive. Class names are without ``class_suffix``. With a ``reference`` there is neither
    text nor mapping: the reference says what to look for.
    """

    task_prompt: values.TaskPrompt = _key(DETECTION, "task", "task")
    """What to ask: a task such as <OD>, or tasks joined by + such as <OD>+<REGION_TO_SEGMENTATION>.
    """
    text: TextOrList = _key(None, "text or list", "text_prompt", "text_queries", "prompt")
    """What to look for, such as "red car. dog". Full stops, semicolons and line ends part phrases.
    """
    mapping: PromptsByClass = _key({}, "mapping")
    """Classes and their prompts, such as {dog: [puppy, hound], car: red car}."""
    classes: values.Classes = _key(None, "list, or all")
    """Only these classes are returned, such as [dog, car], in any case; empty: all of them."""
    confidence_threshold: values.Confidence = _key(
        0.0, "0 to 1", "conf", "confidence", "confidence_thresh", "box_threshold"
    )
    """Objects with a lower confidence are left out."""
    class_thresholds: values.Thresholds = _key({}, "mapping")
    """Other confidence thresholds for single classes, such as {dog: 0.4, car: 0.2}."""
    calibration: values.Calibration = _key({}, "mapping")
    """For single classes, how many of the objects with a raw score are right, as pairs, such as
    {dog: [[0.2, 0.1], [0.7, 0.9]]}: what comes of it is the confidence, which thresholds are about;
    florence2 tune measures it."""
    nms_threshold: ShareOrOff = _key(0.7, "0 to 1, or off", "iou", "iou_threshold")
    """Two boxes of a class with this IoU or more are one object, and the one with the higher
    confidence stays; off: both stay."""
    containment_threshold: ShareOrOff = _key(None, "0 to 1, or off")
    """Two boxes of a class are also one object when this share of the smaller box is inside the
    larger one; empty or off: never."""
    nms_across_classes: Flag = _key(False, "true or false")
    """Whether boxes of different classes can be one object too."""
    max_box_area: Share = _key(1.0, "0 to 1")
    """Boxes that cover more than this share of the image are left out."""
    geometry: values.Geometry = _key("polygon", "polygon or bitmap")
    """How outlines are returned: polygon or bitmap."""
    sentences_as_classes: Flag = _key(False, "true or false")
    """Whether a described region's sentence is its class; otherwise it is a tag of an "object"."""
    class_suffix: values.Suffix = _key("", "text")
    """Added to the end of every class name."""
    tiling: values.TilingOrOff = _key(None, "mapping, or off")
    """Looks through windows too, for small objects, such as {width: 1024, height: 1024, overlap:
    128}; full_image: false leaves out the look at the whole image."""
    regions: values.Regions = _key((), "boxes", "region", "rectangles")
    """Boxes that a <REGION_...> task is asked about, each [x1, y1, x2, y2] in pixels, such as
    [[10, 20, 200, 180]]."""
    num_beams: Annotated[int, *whole(1, MAX_BEAMS)] | None = _key(None, "whole number")
    """Width of the search; empty: as the checkpoint says, mostly 3."""
    max_new_tokens: Annotated[int, *whole(1, 1_000_000)] | None = _key(None, "whole number")
    """Longest answer in tokens; empty: as the task needs."""
    model: values.ModelName = _key(None, "text")
    """Which adapter answers, by its name among those that the server was started with; empty: none
    of them."""
    run_tag: Flag | None = _key(None, "true or false")
    """Whether each label that a run writes has the run's id in a tag florence2_run, which finds and
    undoes them; empty: on the platform yes, in a folder no."""
    unknown_tags: values.UnknownTags = _key("tag", "tag or description")
    """In an answer about an image of the platform, what words (text, captions) become whose tag its
    project does not have: tag for those who read it; description, of the object or the image, for
    clients that write labels and add no tags; empty: tag."""
    rectangle: values.Rectangle | None = _key(None, "box")
    """Only this part of the image is looked at, such as [10, 20, 200, 180]."""
    reference: Reference | None = None
    """An object to find more of; what the ``reference_`` keys of other clients become."""
    is_one_class: bool = False
    """Whether every object is an "object", for a client that knows no other class."""

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


class ClientKeys(_Keys):
    """Keys that other clients set themselves; they become fields of ``Settings``."""

    mode: values.Mode | None = _key(None, "text_prompt or reference_image")
    """Whether text and mapping say what to look for, or the reference_ keys do; empty: the
    reference, if there is one."""
    reference_image_id: Annotated[int, *whole(1, 2**53)] | None = _key(None, "whole number")
    """The image that the reference is on; empty: the image that is asked about."""
    reference_bbox: values.Corners | None = _key(None, "box")
    """An object to find more of, as [top, left, bottom, right] in whole pixels, the last ones
    included."""
    reference_class_name: ClassName = _key(OBJECT_CLASS, "text")
    """The class of what is found by the reference; empty: "object"."""
    inference_mode: values.InferenceMode | None = _key(None, "full_image or sliding_window")
    """Whether to look at the image through the windows of sliding_window_params."""
    sliding_window_params: values.SlidingWindow = _key(values.DEFAULT_SLIDING_WINDOW, "mapping")
    """windowWidth, windowHeight, overlapX and overlapY in pixels; other entries are let through."""

    def reference(self) -> Reference | None:
        """The object that the ``reference_`` keys are about."""
        if self.reference_bbox is None:
            if self.mode != "reference_image":
                return None
            raise RequestError(
                "mode reference_image needs the box of an object and got none; add for example "
                "reference_bbox: [20, 10, 180, 200]."
            )
        y1, x1, y2, x2 = self.reference_bbox
        box_xyxy = float(min(x1, x2)), float(min(y1, y2)), max(x1, x2) + 1.0, max(y1, y2) + 1.0
        return Reference(self.reference_image_id, box_xyxy, self.reference_class_name)

    def tiling(self, own: Tiling | None) -> Tiling | None:
        """The windows of a client that has a sliding window, otherwise our ``own``."""
        if self.inference_mode != "sliding_window":
            return own
        if own not in (None, self.sliding_window_params):
            raise RequestError(
                "Windows are given once, and both tiling and sliding_window_params have some; "
                "leave out tiling."
            )
        return self.sliding_window_params


KEYS: Final[dict[str, FieldInfo]] = {**Settings.model_fields, **ClientKeys.model_fields}
"""Every key that a request's settings may have, in the order of the settings file."""
del KEYS["reference"], KEYS["is_one_class"]

SPELLINGS: Final[dict[str, tuple[str, ...]]] = {
    name: (name, *getattr(field.validation_alias, "choices", ())) for name, field in KEYS.items()
}
"""Every key with the other names that it may have."""

_WHY_LET_THROUGH: Final = {
    "is read by the SDK when it merges labels": "existing_objects_iou_thresh",
    "is added by the SDK to every request": "sliding_window_mode",
    "is about words of another model; box_threshold is understood": "text_threshold",
    "is how a client groups images": "batch_size",
    "is another model's input size": "img_size",
    "chooses what is labeled, not how": "recursive image_ids video_ids dataset_ids project_ids",
    "is about the client's own screen": "show_progress",
    "is about where labels are written": "upload_mode predictions_mode iou_merge_threshold "
    "model_prediction_suffix output_project_id",
    "is how the SDK reads a project": "cache_project_on_model cache_datasets_on_model",
    "is about frames of a video": "start_frame start_frame_index num_frames frames_count end_frame "
    "end_frame_index step stride direction duration tracking tracking_config tracker "
    "tracker_settings",
    "is meant for a segmentation model that is asked next": "input_image_id bbox_class_name",
}
LET_THROUGH: Final = {key: why for why, keys in _WHY_LET_THROUGH.items() for key in keys.split()}
"""Keys that clients send with every model and that change nothing here, with the reason."""

_KNOWN: Final = dict.fromkeys([*chain.from_iterable(SPELLINGS.values()), *LET_THROUGH])


def default_in_file(name: str) -> object:
    """What counts as nothing said: the SDK puts it wherever a request has none."""
    if name == "unknown_tags":
        # Clients that write labels themselves send the file as it came; others leave the key out.
        return "description"
    return None if name == "task_prompt" else KEYS[name].get_default(call_default_factory=True)


def parse_settings(raw: Mapping[str, object] | None) -> Settings:
    """The settings of a request, complete and checked.

    Raises RequestError, with one sentence about the first thing that is wrong.
    """
    sent = _sent(raw)
    client = ClientKeys.model_validate(
        {name: sent.pop(name) for name in ClientKeys.model_fields if name in sent}
    )
    reference = client.reference()
    read = Settings.model_validate(sent)
    asked = {reference.class_name} if reference else set(read.classes_by_phrase.values())
    task = _choose_task(read, reference)
    regions, rectangle = read.regions, read.rectangle
    if parse_steps(task)[0].takes is TaskInput.REGION and rectangle is not None and not regions:
        regions, rectangle = (rectangle,), None
    settings = read.model_copy(
        update={
            "task_prompt": task,
            "classes": _without_echo(read.classes, asked),
            "class_suffix": BOX_SUFFIX if is_form_for_masks(raw or {}) else read.class_suffix,
            "tiling": client.tiling(read.tiling),
            "regions": regions,
            "rectangle": rectangle,
            "reference": reference,
        }
    )
    _check_inputs(settings)
    _check_calibration(settings)
    return settings


def with_own(raw: Mapping[str, object], own: Mapping[str, object]) -> dict[str, object]:
    """What a client said, with what a fine-tune was trained to be asked where it asks nothing.

    Clients send ``own`` back as they were offered it, so a question is what differs from it. One
    with a question of its own has none of ``own``, which belongs to another question: nor what
    goes with its classes and prompts, where that comes back as it was offered.
    """
    asked = {key for name in _QUESTION for key in SPELLINGS[name]}
    tied = asked | {key for name in _OF_QUESTION for key in SPELLINGS[name]}
    said = {
        key: value
        for key, value in raw.items()
        if key not in tied or key not in own or value != own[key]
    }
    if any(key in asked and not _is_missing(_FIELDS[key], value) for key, value in said.items()):
        return said
    given = {_FIELDS[key] for key in raw if key in _FIELDS and not _is_missing(key, raw[key])}
    return {**raw, **{key: value for key, value in own.items() if _FIELDS[key] not in given}}


_QUESTION: Final = ("task_prompt", "text", "mapping", "regions", "reference_bbox")
_OF_QUESTION: Final = ("calibration", "class_thresholds")
"""What was chosen for the classes and prompts of a question, and says nothing of another."""
_FIELDS: Final = {key: name for name, keys in SPELLINGS.items() for key in keys}


def check_placement(state: Mapping[str, object]) -> None:
    """RequestError for settings that stand in a request beside ``settings``.

    They would be ignored without a word, and another question answered.
    """
    for name in state:
        # The SDK has a meaning of its own for the others.
        if name in Settings.model_fields and name not in ("classes", "rectangle", "reference"):
            raise RequestError(
                f"{name} is one of the settings, and it was received beside them; send "
                f'{{"settings": {{"{name}": ...}}}}.'
            )


def has_sliding_window(raw: object) -> bool:
    """Whether the client that sent these settings looks through windows, which it may show."""
    return isinstance(raw, Mapping) and word(raw.get("inference_mode")) == "sliding_window"


def is_for_one_class(state: Mapping[str, object]) -> bool:
    """Whether a request is that of Apply NN to Videos where only "object" was ticked.

    Its project has the ticked classes and no others, so anything else is lost there. Others spell
    the video differently, or take the classes as they come.
    """
    settings = state.get("settings")
    classes = settings.get("classes") if isinstance(settings, Mapping) else None
    return state.get("videoId") is not None and classes == [OBJECT_CLASS]


def is_form_for_masks(raw: Mapping[str, object]) -> bool:
    """Whether settings, as the client sent them, are of the form of Apply Florence-2.

    That client sends these keys in every request, whatever their values are, and no others. It
    makes masks of the boxes, and takes the suffix off their names again.
    """
    return raw.keys() == _MASKS_FORM and raw["mode"] == "text_prompt"


def _sent(raw: object) -> dict[str, _Sent]:
    """What was said, by the field that it is about; RequestError for an unknown key."""
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        error = refused("a mapping of keys to values", raw, '{text: "red car. dog"}')
        raise RequestError(f"settings{error.after}")
    for key in raw:
        if key not in _KNOWN:
            said, advice = hint(key, _KNOWN).rsplit("; ", 1)
            advice = advice if advice.endswith("?") else "remove it."
            raise RequestError(f"Unknown setting {said}; {advice}")
    sent = {
        name: _Sent({key: raw[key] for key in keys if not _is_missing(name, raw.get(key))})
        for name, keys in SPELLINGS.items()
    }
    confidence = {key: _joined(value) for key, value in sent["confidence_threshold"].items()}
    by_class = {key: confidence.pop(key) for key in [*confidence] if _is_by_class(confidence[key])}
    sent["confidence_threshold"] = _Sent(confidence)
    sent["class_thresholds"] = _Sent(by_class | sent["class_thresholds"])
    unread = _unread(sent)
    return {name: said for name, said in sent.items() if said and name not in unread}


def _is_missing(name: str, value: object) -> bool:
    if isinstance(value, str):
        text = value.strip().lower()
        return not text or (name not in _ARE_TEXTS and text in NOTHING)
    return value is None or (isinstance(value, list | tuple | dict) and not value)


def _joined(value: object) -> object:
    """One mapping of a list of mappings, which some clients send."""
    if not isinstance(value, list | tuple) or not all(isinstance(part, dict) for part in value):
        return value
    return {key: entry for part in value for key, entry in part.items()}


def _is_by_class(confidence: object) -> bool:
    if isinstance(confidence, dict):
        return not confidence or not _MODES.issuperset(confidence)
    return isinstance(confidence, str) and ":" in confidence


def _unread(sent: Mapping[str, _Sent]) -> set[str]:
    """Fields that other keys make meaningless: clients send what is left there from before."""
    mode = word(sent["mode"].get("mode", "reference_image" if sent["reference_bbox"] else ""))
    unread = {"reference_image_id", "reference_bbox", "reference_class_name"}
    if mode == "reference_image":
        unread = {"text", "mapping"}
    if word(sent["inference_mode"].get("inference_mode")) != "sliding_window":
        unread.add("sliding_window_params")
    return unread


def _choose_task(read: Settings, reference: Reference | None) -> str:
    """The task that was named, or the one that fits what was given.

    A reference is found by words. People who pick one in the annotation tool have a task in their
    settings already, so one that takes no text gives way instead of failing.
    """
    if reference is not None and read.steps[0].takes is not TaskInput.TEXT:
        return GROUNDING
    if "task_prompt" in read.model_fields_set:
        return read.task_prompt
    if read.text is not None or read.mapping:
        return GROUNDING
    return CATEGORY if read.regions else DETECTION


def _without_echo(listed: tuple[str, ...] | None, asked: set[str]) -> tuple[str, ...] | None:
    """``listed``, or None where it only repeats what the app advertises and nobody asked for.

    Clients send the classes of the model meta: those it always has, some of them, or all of them
    with the classes that were seen since.
    """
    advertised = FIXED_SHAPES.keys()
    if listed is None or not asked.isdisjoint(advertised & set(listed)):
        return listed
    return None if advertised >= set(listed) or advertised <= set(listed) else listed


def _check_inputs(settings: Settings) -> None:
    """RequestError when something is missing for the first step of the task, or too much."""
    first, text = settings.steps[0], settings.text
    has_words = text is not None or settings.mapping or settings.reference is not None
    if first.takes is TaskInput.TEXT and not has_words:
        raise RequestError(
            f"{first.token} needs to be told what to look for and got no text; "
            'add for example text: "red car. dog".'
        )
    if first.takes is not TaskInput.TEXT and text is not None:
        raise RequestError(
            f"{first.token} takes no text and got {shown(text)}; leave out the text, or leave out "
            f"task_prompt to look for it with {GROUNDING}."
        )
    if first.takes is TaskInput.REGION and not settings.regions:
        raise RequestError(
            f"{first.token} asks about regions of the image and got none; "
            "add for example regions: [[10, 20, 200, 180]]."
        )
    if first.takes is not TaskInput.REGION and settings.regions:
        raise RequestError(
            f"{first.token} takes no region and got some; leave out the regions, or use "
            "rectangle to look at a part of the image."
        )


def _check_calibration(settings: Settings) -> None:
    """RequestError for a class that no answer will have.

    Whoever picks a reference keeps the settings for everything else.
    """
    if settings.steps[0].takes is not TaskInput.TEXT or settings.reference is not None:
        return
    asked = dict.fromkeys(settings.classes_by_phrase.values())
    known = {name.casefold() for name in asked}
    for name in settings.calibration:
        if name.casefold() not in known:
            raise RequestError(
                f"calibration is about classes that are asked for, and {name!r} is none of "
                f"{shown(list(asked))}; leave it out, or give {name!r} a prompt in mapping."
            )


def raw_settings(settings: Settings) -> dict[str, object]:
    """Settings as a request would spell them: plain JSON types that parse to the same settings.

    Without how a client is told of labels that it writes itself: it changes nothing in a run's.
    """
    exclude = {"reference", "is_one_class", "unknown_tags"}
    raw = settings.model_dump(mode="json", exclude=exclude)
    if settings.nms_threshold is None:
        raw["nms_threshold"] = "off"
    if (tiling := settings.tiling) is not None:
        (width, height), overlap = tiling.size_wh, list(tiling.overlap_wh)
        full = tiling.full_image
        raw["tiling"] = {"width": width, "height": height, "overlap": overlap, "full_image": full}
    if (reference := settings.reference) is not None:
        left, top, right, bottom = reference.box_xyxy
        raw |= {
            "mode": "reference_image",
            "reference_image_id": reference.image_id,
            "reference_bbox": [top, left, bottom - 1, right - 1],
            "reference_class_name": reference.class_name,
        }
    return raw


def changed_settings(settings: Settings) -> dict[str, object]:
    """Those of ``raw_settings`` that are not what they are without a word about them."""
    default = raw_settings(parse_settings({}))
    return {
        key: value for key, value in raw_settings(settings).items() if value != default.get(key)
    }
