"""From the dictionary that a client sent to ``Settings``.

The SDK tops a client's dictionary up with the settings file, key by key, before it is read here.
So a key that is left out, null or empty, and one that has the file's own value, mean the same; and
another spelling of such a key has the say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeVar, cast

from florence2.errors import RequestError
from serve.phrases import classes_of, split_phrases
from serve.predict.naming import OBJECT_CLASS
from serve.settings import boxes, choose, values, windows, words
from serve.settings.keys import BY_NAME, KEYS, LET_THROUGH, ONLY_SETTINGS, Key
from serve.settings.model import Geometry, Reference, Settings, Tiling

BOX_SUFFIX: Final = "_bbox"
MAX_IMAGE_ID: Final = 2**53
MAX_TOKENS: Final = 1_000_000

_MASKS_FORM: Final = frozenset({"mapping", "mode", "text"})
_MODES: Final = ("text_prompt", "reference_image")
_INFERENCE_MODES: Final = ("full_image", "sliding_window")
_GEOMETRIES: Final = ("polygon", "bitmap")
_KNOWN: Final = (*(name for key in KEYS for name in key.names), *LET_THROUGH)
_DEFAULT: Final = Settings()
_T = TypeVar("_T")


def parse_settings(raw: Mapping[str, object] | None) -> Settings:
    """The settings of a request, complete and checked.

    Raises RequestError, with one sentence about the first thing that is wrong.
    """
    given = _checked_keys(raw)
    reference = _reference(given)
    text = None if reference else _read(given, "text", values.text, None)
    mapping = (
        _DEFAULT.mapping if reference else _read(given, "mapping", words.mapping, _DEFAULT.mapping)
    )
    phrases = split_phrases(text) if text is not None else []
    regions = _read(given, "regions", boxes.boxes, _DEFAULT.regions)
    rectangle = _read(given, "rectangle", boxes.box, None)
    has_words = bool(phrases or mapping)
    task = choose.choose_task(
        _read(given, "task_prompt", choose.task_name, None),
        has_words=has_words,
        has_regions=bool(regions),
        has_reference=reference is not None,
    )
    if choose.asks_regions(task) and rectangle is not None and not regions:
        regions, rectangle = (rectangle,), None
    choose.check_inputs(
        task,
        text=text,
        has_words=has_words,
        has_regions=bool(regions),
        has_reference=reference is not None,
    )
    asked = {reference.class_name} if reference else set(classes_of(phrases, mapping).values())
    threshold, class_thresholds = _confidence(given)
    num_beams, max_new_tokens = _search(given)
    return Settings(
        task_prompt=task,
        text=text,
        mapping=mapping,
        classes=words.without_echo(_read(given, "classes", words.whitelist, None), asked),
        confidence_threshold=threshold,
        class_thresholds=class_thresholds,
        nms_threshold=_read(given, "nms_threshold", values.share_or_off, _DEFAULT.nms_threshold),
        containment_threshold=_read(given, "containment_threshold", values.share_or_off, None),
        nms_across_classes=_read(given, "nms_across_classes", values.flag, False),
        max_box_area=_read(given, "max_box_area", values.number, _DEFAULT.max_box_area),
        geometry=_read(given, "geometry", _geometry, _DEFAULT.geometry),
        class_suffix=_suffix(given),
        sentences_as_classes=_read(given, "sentences_as_classes", values.flag, False),
        tiling=_tiling(given),
        regions=regions,
        rectangle=rectangle,
        reference=reference,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
    )


def check_placement(state: Mapping[str, object]) -> None:
    """RequestError for settings that stand in a request beside ``settings``.

    They would be ignored without a word, and another question answered.
    """
    for name in state:
        if name in ONLY_SETTINGS:
            raise RequestError(
                f"{name} is one of the settings, and it was received beside them; send "
                f'{{"settings": {{"{name}": ...}}}}.'
            )


def _checked_keys(raw: object) -> Mapping[str, object]:
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        values.refuse("settings", "a mapping of keys to values", raw, '{text: "red car. dog"}')
    for name in raw:
        if name not in _KNOWN:
            raise RequestError(_unknown(name))
    return cast("Mapping[str, object]", raw)


def _unknown(name: object) -> str:
    sentence = values.nearest("setting", name, _KNOWN)
    return sentence if sentence.endswith("?") else sentence.split(";")[0] + "; remove it."


def _read(
    given: Mapping[str, object], name: str, reader: Callable[[str, object], _T], default: _T
) -> _T:
    """What a key says under any of its spellings; ``default`` where it says nothing."""
    key = BY_NAME[name]
    found = {
        spelling: reader(spelling, given[spelling])
        for spelling in key.names
        if not _is_missing(key, given.get(spelling))
    }
    said = {spelling: value for spelling, value in found.items() if value != default}
    for spelling, value in said.items():
        first = next(iter(said))
        if value != said[first]:
            raise RequestError(
                f"{name} is given once, and {first} is {values.shown(given[first])} and "
                f"{spelling} is {values.shown(given[spelling])}; keep one of them."
            )
    return next(iter(said.values()), default)


def _is_missing(key: Key, value: object) -> bool:
    if isinstance(value, str):
        word = value.strip().lower()
        return not word or (not key.is_text and word in values.NOTHING)
    return value is None or (isinstance(value, list | tuple | dict) and not value)


def _word(known: tuple[str, ...]) -> Callable[[str, object], str | None]:
    return lambda name, value: values.choice(name, value, known)


def _geometry(name: str, value: object) -> Geometry:
    return cast("Geometry", values.choice(name, value, _GEOMETRIES))


def _confidence(given: Mapping[str, object]) -> tuple[float, dict[str, float]]:
    by_class = _read(given, "class_thresholds", words.thresholds, _DEFAULT.class_thresholds)
    default = cast("words.Confidence", _DEFAULT.confidence_threshold)
    one = _read(given, "confidence_threshold", words.confidence, default)
    if not isinstance(one, dict):
        return one, by_class
    for name in one.keys() & by_class.keys():
        if one[name] != by_class[name]:
            raise RequestError(
                f"A class has one threshold, and {one[name]:g} and {by_class[name]:g} were "
                f"received for {name!r}; keep one of them."
            )
    return _DEFAULT.confidence_threshold, one | by_class


def _tiling(given: Mapping[str, object]) -> Tiling | None:
    own = _read(given, "tiling", windows.tiling, None)
    if _read(given, "inference_mode", _word(_INFERENCE_MODES), None) != "sliding_window":
        return own
    params = given.get("sliding_window_params")
    missing = _is_missing(BY_NAME["sliding_window_params"], params)
    theirs = windows.sliding_window("sliding_window_params", None if missing else params)
    if own is not None and own != theirs:
        raise RequestError(
            "Windows are given once, and both tiling and sliding_window_params have some; "
            "leave out tiling."
        )
    return theirs


def _reference(given: Mapping[str, object]) -> Reference | None:
    mode = _read(given, "mode", _word(_MODES), None)
    has_box = not _is_missing(BY_NAME["reference_bbox"], given.get("reference_bbox"))
    if mode == "text_prompt" or (mode is None and not has_box):
        return None
    if not has_box:
        raise RequestError(
            "mode reference_image needs the box of an object and got none; add for example "
            "reference_bbox: [20, 10, 180, 200]."
        )
    box = boxes.reference_box("reference_bbox", given["reference_bbox"])
    return Reference(
        image_id=_read(given, "reference_image_id", _image_id, None),
        box_xyxy=box,
        class_name=_read(given, "reference_class_name", values.class_name, OBJECT_CLASS),
    )


def _image_id(name: str, value: object) -> int | None:
    return values.whole(name, value, 1, MAX_IMAGE_ID)


def is_form_for_masks(raw: Mapping[str, object]) -> bool:
    """Whether settings, as the client sent them, are of the form of Apply Florence-2.

    That client sends these keys in every request, whatever their values are, and no others.
    """
    return raw.keys() == _MASKS_FORM and raw["mode"] == "text_prompt"


def _suffix(given: Mapping[str, object]) -> str:
    """The suffix that was asked for, or the one that Apply Florence-2 takes off again.

    It makes masks of the boxes, under the same names without the suffix.
    """
    automatic = BOX_SUFFIX if is_form_for_masks(given) else ""
    return _read(given, "class_suffix", values.suffix, automatic)


def _search(given: Mapping[str, object]) -> tuple[int | None, int | None]:
    def whole(name: str, value: object) -> int | None:
        return values.whole(name, value, 1, _largest(name))

    return _read(given, "num_beams", whole, None), _read(given, "max_new_tokens", whole, None)


def _largest(name: str) -> int:
    # The engine's module is slow to import, and most requests name neither.
    from florence2.generation.settings import MAX_BEAMS

    return MAX_BEAMS if name == "num_beams" else MAX_TOKENS
