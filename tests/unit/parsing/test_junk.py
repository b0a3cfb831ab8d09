"""No sequence of tokens and no string raises; whatever comes out can be drawn and stored."""

import json

import pytest
from answer_tokens import location, marker, text_token
from hypothesis import given, settings
from hypothesis import strategies as st

from florence2.postprocess import parse, parse_answer_text
from florence2.records import Box, Polygon, Quad, Text, TokenKind
from florence2.tasks import TASKS, OutputKind
from florence2.tokenizer import MARKERS

LOG_PROBS = st.floats(max_value=0.0) | st.just(float("nan"))
JUNK_TOKENS = st.lists(
    st.one_of(
        st.builds(text_token, st.binary(max_size=4), LOG_PROBS),
        st.builds(text_token, st.sampled_from([b"car", b" ", b"the image", b"\n"]), LOG_PROBS),
        st.builds(location, st.integers(0, 999), LOG_PROBS),
        st.builds(location, st.integers(0, 2), LOG_PROBS),
        st.builds(marker, st.sampled_from(["<poly>", "</poly>", "<sep>"]), LOG_PROBS),
        st.builds(marker, st.sampled_from(MARKERS), LOG_PROBS),
    ),
    max_size=60,
)
JUNK_TEXT = st.lists(
    st.one_of(
        st.text(max_size=5),
        st.sampled_from(["<loc_", ">", "<", "</s>", "<s>", "<pad>", "<poly>", "</poly>", "<sep>"]),
        st.integers(0, 1200).map("<loc_{}>".format),
        st.sampled_from(["<loc_99999999999>", "<loc_٣>", "<loc_-1>", "<loc_1.5>", "\ud800"]),
    ),
    max_size=40,
).map("".join)

# Each property is tried with every task, and tasks differ in little but their output.
some_examples = settings(max_examples=settings().max_examples * 2 // 5)

SIZES = st.tuples(st.integers(1, 20_000), st.integers(1, 20_000))
PLACED = [task for task in TASKS if task.output is not OutputKind.TEXT]


def points_of(found):
    if isinstance(found, Box):
        return [found.box_xyxy]
    if isinstance(found, Quad):
        return [found.quad_xy]
    return list(found.rings_xy) if isinstance(found, Polygon) else []


def check_objects(objects, size_wh):
    width, height = size_wh
    for found in objects:
        for ring in points_of(found):
            assert len(ring) % 2 == 0
            assert all(0 < x < width for x in ring[0::2])
            assert all(0 < y < height for y in ring[1::2])
        if isinstance(found, Box):
            x1, y1, x2, y2 = found.box_xyxy
            assert x1 < x2
            assert y1 < y2
        if isinstance(found, Polygon):
            assert found.rings_xy
            assert all(len(ring) >= 6 for ring in found.rings_xy)
        if isinstance(found, Text):
            assert found.label
        assert found.label == found.label.strip()
        assert found.score is None or 0.0 <= found.score <= 1.0


@pytest.mark.parametrize("task", TASKS, ids=[task.name for task in TASKS])
@some_examples
@given(tokens=JUNK_TOKENS, size_wh=SIZES)
def test_any_tokens(task, tokens, size_wh):
    parsed = parse(tokens, task, size_wh)
    check_objects(parsed.objects, size_wh)
    assert all(found.score is not None for found in parsed.objects)
    assert len(parsed.notes) <= 9
    assert (parsed.text is None) == (task.output is not OutputKind.TEXT)


@pytest.mark.parametrize("task", TASKS, ids=[task.name for task in TASKS])
@some_examples
@given(answer=JUNK_TEXT, size_wh=SIZES)
def test_any_string(task, answer, size_wh):
    result = parse_answer_text(task, answer, size_wh)
    check_objects(result.objects, size_wh)
    assert all(found.score is None for found in result.objects)
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize("task", PLACED, ids=[task.name for task in PLACED])
@some_examples
@given(tokens=JUNK_TOKENS)
def test_nothing_is_left_out_without_a_note(task, tokens):
    parsed = parse(tokens, task, (1000, 1000))
    used = sum(len(ring) for found in parsed.objects for ring in points_of(found))
    given_locations = sum(token.kind is TokenKind.LOCATION for token in tokens)
    assert used <= given_locations
    assert used == given_locations or parsed.notes
