"""Well-formed answers give the reference's dictionary, but with whole labels and coordinates."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from florence2.postprocess import parse_answer_text
from florence2.tasks import BANNED_PHRASES, TASKS, OutputKind, passthrough_task

SIZE_WH = (1024, 683)


def locs(*bins):
    return "".join(f"<loc_{b}>" for b in bins)


BOX, OTHER = locs(54, 375, 906, 707), locs(710, 276, 908, 537)
QUAD = locs(10, 20, 200, 21, 201, 60, 11, 59)
RING = locs(10, 10, 100, 12, 120, 300, 40, 310)
HOLE = locs(50, 50, 60, 52, 61, 90)

ANSWERS = {
    OutputKind.TEXT: [
        "",
        "A green car parked in front of a yellow building.",
        "  padded  ",
        "two\nlines",
        f"car{BOX}",
        "café, 中文 & < > 100 %",
    ],
    OutputKind.LABELED_BOXES: [
        "",
        f"car{BOX}",
        f"car{BOX}door{OTHER}",
        f"wheel{BOX}{OTHER}{locs(1, 2, 3, 4)}",
        f" padded label {BOX}",
        f"a red car, parked{BOX}two-door car (old){OTHER}",
        f"car{BOX}{locs(7)}",
        f"car{locs(5, 6)}",
        "no box at all",
        f"car{BOX} and some words",
    ],
    OutputKind.BOXES: ["", BOX, BOX + OTHER, BOX + OTHER + locs(1, 2), locs(1, 2, 3)],
    OutputKind.GROUNDING: [
        "",
        f"A green car{BOX} parked by trees{OTHER}{BOX}",
        f"the image{BOX}a dog{OTHER}",
        f"The image{BOX}",
        f"it{BOX}one another{BOX}lots{BOX}",
    ],
    OutputKind.OCR: [
        "",
        f"EXIT{QUAD}",
        f"EXIT{QUAD}no. 7, <left>{locs(1, 2, 30, 4, 50, 60, 7, 80)}",
        f"  a b  {QUAD}",
        "no place",
    ],
    OutputKind.POLYGONS: [
        "",
        RING,
        f"{RING}<sep>{HOLE}",
        f"<poly>{RING}</poly>",
        f"<poly>{RING}<sep>{HOLE}</poly><poly>{HOLE}</poly>",
        RING + locs(5),
    ],
    OutputKind.BOXES_OR_POLYGONS: [
        "",
        f"car{BOX}{OTHER}dog{BOX}",
        f"car<poly>{RING}</poly>",
        f"car<poly>{RING}<sep>{HOLE}</poly><poly>{HOLE}</poly>dog<poly>{RING}</poly>",
    ],
}
CASES = [(task, answer) for task in TASKS for answer in ANSWERS[task.output]]


def check(reference, task, answer):
    ours = parse_answer_text(task, answer, SIZE_WH).to_dict()
    theirs = reference.post_process_generation(text=answer, task=task.token, image_size=SIZE_WH)
    if isinstance(theirs[task.token], dict):
        counted = sum(len(v) for k, v in theirs[task.token].items() if "labels" in k)
        assert ours[task.token].pop("scores") == [None] * counted
    compare(ours, theirs)


def compare(ours, theirs):
    """The same structure, where the reference has cut each coordinate to a whole number."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            compare(ours[key], value)
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            compare(one, other)
    elif isinstance(theirs, str):
        assert ours == theirs
    else:
        assert isinstance(ours, float)
        # float32 there, so a whole number may have been missed by a hair.
        assert theirs - 1e-3 <= ours < theirs + 1 + 1e-3


@pytest.mark.parametrize("frame", ["{}", "</s><s>{}</s>"], ids=["bare", "framed"])
@pytest.mark.parametrize(("task", "answer"), CASES, ids=[f"{t.name}-{a}" for t, a in CASES])
def test_answers_equal_the_reference(task, answer, frame, reference):
    check(reference, task, frame.format(answer))


PHRASES = st.text("abc XYZ019.,'-", min_size=1, max_size=12).filter(str.strip)
BINS = st.integers(0, 999)


@st.composite
def box_text(draw):
    x, y = draw(st.tuples(st.integers(0, 998), st.integers(0, 998)))
    return locs(x, y, draw(st.integers(x + 1, 999)), draw(st.integers(y + 1, 999)))


QUADS = (
    st.lists(BINS, min_size=8, max_size=8)
    .filter(lambda b: len(set(b[::2])) > 1 and len(set(b[1::2])) > 1)
    .map(lambda b: locs(*b))
)
RINGS = st.lists(st.tuples(BINS, BINS), min_size=3, max_size=6, unique=True).map(
    lambda points: locs(*(value for point in points for value in point))
)
OUTLINES = st.lists(RINGS, min_size=1, max_size=3).map("<sep>".join)
MARKED = st.lists(OUTLINES.map(lambda o: f"<poly>{o}</poly>"), min_size=1, max_size=3).map("".join)
BOXES = st.lists(box_text(), min_size=1, max_size=3).map("".join)


def labeled(bodies):
    return st.lists(st.builds("{}{}".format, PHRASES, bodies), max_size=4).map("".join)


WELL_FORMED = {
    OutputKind.LABELED_BOXES: labeled(BOXES),
    OutputKind.GROUNDING: labeled(BOXES),
    OutputKind.BOXES: BOXES,
    OutputKind.OCR: labeled(QUADS),
    OutputKind.POLYGONS: OUTLINES | MARKED,
    OutputKind.BOXES_OR_POLYGONS: labeled(BOXES) | labeled(MARKED),
}
PLACED = [task for task in TASKS if task.output in WELL_FORMED]


@pytest.mark.parametrize("task", PLACED, ids=[task.name for task in PLACED])
@given(data=st.data())
def test_any_well_formed_answer_equals_the_reference(task, reference, data):
    check(reference, task, data.draw(WELL_FORMED[task.output]))


def test_banned_phrases_are_the_published_ones():
    assert len(BANNED_PHRASES) == 72
    for phrase in ("I", "the image", "one another", "a", "whose"):
        assert phrase in BANNED_PHRASES


def test_custom_tasks_answer_in_text(reference):
    check(reference, passthrough_task("<DocVQA>"), f" forty-two{BOX} ")
