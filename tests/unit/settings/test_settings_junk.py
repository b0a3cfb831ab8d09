"""Junk never gets past a RequestError, and settings written out parse to themselves."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from settings_tools import DEFAULTS, merged

from florence2.errors import RequestError
from florence2.tasks import TASKS
from serve.naming import phrase_key
from serve.settings import Settings, parse_settings, raw_settings
from serve.settings.schema import LET_THROUGH, SPELLINGS

NAMES = [name for names in SPELLINGS.values() for name in names]
# Of one setting, beside those of any dictionary; HYPOTHESIS_PROFILE=explore tries five times more.
EXAMPLES = settings.default.max_examples // 4
WORDS = st.sampled_from(
    ["", "none", "off", "all", "true", "0.3", "nan", "1e999", "{a: b}", "[[", "{a: [b, c]}", "*x",
     "&a [*a]", "<OD>", "<loc_3>", "od", "text_prompt", "reference_image", "sliding_window",
     "bitmap", "1,2,3,4", "a. b; c", "\ud800", "\x00", "St. ", "!!python/name:x", "<<: 3", "? "]
) | st.text(max_size=30)  # fmt: skip
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, 2**63])
SCALARS = st.none() | st.booleans() | NUMBERS | WORDS
INNER = ["points", "exterior", "width", "overlap", "windowWidth", "overlapX", "text_prompt", "dog"]
JUNK = st.recursive(
    SCALARS | st.binary(max_size=3) | st.dates(),
    lambda parts: (
        st.lists(parts, max_size=5)
        | st.tuples(parts, parts)
        | st.dictionaries(st.sampled_from(INNER) | SCALARS, parts, max_size=4)
    ),
    max_leaves=8,
)


def outcome(raw):
    """The settings, or the one line that says why not; anything else fails the test."""
    try:
        return parse_settings(raw)
    except RequestError as error:
        return str(error)


def is_sound(answer):
    """Settings that parse to themselves, or a line of a length that people read."""
    if isinstance(answer, Settings):
        return parse_settings(raw_settings(answer)) == answer
    return "\n" not in answer and len(answer) < 1500


@given(raw=st.dictionaries(st.sampled_from([*NAMES, *LET_THROUGH]) | SCALARS, JUNK, max_size=6))
def test_any_dictionary_parses_or_is_refused(raw):
    assert is_sound(outcome(raw))


@pytest.mark.parametrize("setting", SPELLINGS)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_any_value_of_a_key_parses_or_is_refused(setting, data):
    name = data.draw(st.sampled_from(SPELLINGS[setting]))
    assert is_sound(outcome({name: data.draw(JUNK)}))


@given(raw=JUNK)
def test_anything_parses_or_is_refused(raw):
    assert is_sound(outcome(raw))


SHARES = st.floats(0, 1)
OFF_OR_SHARES = st.just("off") | SHARES
PHRASES = st.text("abcdefgh .;,'é龍", min_size=1, max_size=12).filter(lambda t: t.strip(" .;,'"))
CLASS_NAMES = st.text("abcABC _-7龍", min_size=1, max_size=8).filter(str.strip)
CORNERS = st.tuples(*[st.integers(0, 5000)] * 2, *[st.integers(2, 900)] * 2)
FRACTIONS = st.tuples(*[st.floats(0, 900)] * 2, *[st.floats(2, 900)] * 2)
BOXES = (CORNERS | FRACTIONS).map(lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]])
WINDOWS = st.fixed_dictionaries(
    {},
    optional={
        "width": st.integers(64, 4000),
        "height": st.integers(64, 4000),
        "overlap": st.integers(0, 60) | st.lists(st.integers(0, 60), min_size=2, max_size=2),
        "full_image": st.booleans(),
    },
).filter(bool)
USUAL = {
    "classes": st.lists(CLASS_NAMES, max_size=4) | st.just("all"),
    "confidence_threshold": SHARES,
    "class_thresholds": st.dictionaries(
        CLASS_NAMES.map(str.split).map(" ".join).map(str.casefold), SHARES
    ),
    "nms_threshold": OFF_OR_SHARES,
    "containment_threshold": OFF_OR_SHARES,
    "nms_across_classes": st.booleans(),
    "max_box_area": SHARES,
    "geometry": st.sampled_from(["polygon", "bitmap"]),
    "sentences_as_classes": st.booleans(),
    "class_suffix": st.text("_ab (7)", max_size=8),
    "tiling": WINDOWS | st.integers(64, 4000),
    "rectangle": BOXES,
    "num_beams": st.integers(1, 32),
    "max_new_tokens": st.integers(1, 4096),
}
CURVES = st.dictionaries(SHARES, SHARES, min_size=1, max_size=4).map(
    lambda pairs: list(zip(sorted(pairs), sorted(pairs.values()), strict=True))
)
OWN_NAMES = st.lists(CLASS_NAMES, min_size=1, max_size=4, unique_by=phrase_key).map(dict.fromkeys)
KINDS = [
    st.fixed_dictionaries({"task": st.sampled_from([task.name for task in TASKS[:6]])}),
    st.fixed_dictionaries({"text": PHRASES | st.lists(PHRASES, min_size=1, max_size=4)}),
    st.fixed_dictionaries(
        {"mapping": st.dictionaries(CLASS_NAMES, PHRASES, min_size=1, max_size=1)}
    ),
    st.fixed_dictionaries({"mapping": OWN_NAMES}),
    st.fixed_dictionaries(
        {
            "mapping": st.just({"cat": None}),
            "calibration": st.fixed_dictionaries({}, optional={"Cat": CURVES}),
        }
    ),
    st.fixed_dictionaries({"mode": st.just("text_prompt"), "text": PHRASES}),
    st.fixed_dictionaries({"regions": st.lists(BOXES, min_size=1, max_size=3)}),
    st.fixed_dictionaries(
        {"reference_bbox": CORNERS.map(lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]])},
        optional={
            "reference_image_id": st.integers(1, 2**40),
            "reference_class_name": CLASS_NAMES,
        },
    ),
]


@given(kind=st.one_of(KINDS), usual=st.fixed_dictionaries({}, optional=USUAL))
def test_settings_written_out_parse_to_themselves(kind, usual):
    settings = parse_settings(kind | usual)
    written = json.loads(json.dumps(raw_settings(settings)))
    assert parse_settings(written) == settings
    assert parse_settings(merged(written)) == settings
    assert parse_settings(yaml.safe_load(yaml.safe_dump(written))) == settings


@given(kind=st.one_of(KINDS), usual=st.fixed_dictionaries({}, optional=USUAL))
def test_the_merge_with_the_settings_file_changes_nothing(kind, usual):
    alone = kind | usual
    assert parse_settings(merged(alone)) == parse_settings(alone)
    assert parse_settings(DEFAULTS | {"unknown_tags": "tag"} | alone) == parse_settings(alone)


def test_a_long_text_of_abbreviations_is_parted_in_no_time():
    with pytest.raises(RequestError, match="characters and this one has"):
        parse_settings({"text": "A. " * 39_000})
