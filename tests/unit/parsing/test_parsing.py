"""Every rule of the parser that the reference does not share, by example."""

import json
import math

import pytest
from answer_tokens import location, text_token, tokens_of

from florence2.errors import RequestError
from florence2.postprocess import (
    CUT_OUTLINE,
    LEFTOVER_LOCATIONS,
    NO_AREA,
    STRAY_MARKERS,
    SWAPPED,
    TOO_FEW_POINTS,
    TOO_GENERAL,
    UNLABELED,
    UNPLACED_TEXT,
    object_score,
    parse,
    parse_answer_text,
)
from florence2.records import Box, Polygon, Quad, Result, Text
from florence2.tasks import OutputKind, find_task
from florence2.tokenizer import joined_text

SIZE_WH = (1000, 2000)


def at(*bins):
    """Pixels of the bins on an image of SIZE_WH."""
    return tuple((b + 0.5) * (2 if i % 2 else 1) for i, b in enumerate(bins))


def locs(*bins):
    return "".join(f"<loc_{b}>" for b in bins)


def box(label, *bins):
    return Box(at(*bins), label, None)


def quad(label, *bins):
    return Quad(at(*bins), label, None)


def polygon(label, *rings):
    return Polygon(tuple(at(*ring) for ring in rings), label, None)


def text(label):
    return Text(label, None)


SQUARE = (10, 10, 20, 10, 20, 20, 10, 20)
LINE = (1, 2, 30, 2, 30, 40, 1, 40)
ONE, S, Q = locs(1, 2, 3, 4), locs(*SQUARE), locs(*LINE)
CAR, OUTLINE = box("car", 1, 2, 3, 4), polygon("", SQUARE)

LABELED_BOXES = {
    "script": (f"龍が{ONE}", [box("龍が", 1, 2, 3, 4)], {}),
    "newline": (f"a\nb{ONE}", [box("a\nb", 1, 2, 3, 4)], {}),
    "angle brackets": (f"a<b>c{ONE}", [box("a<b>c", 1, 2, 3, 4)], {}),
    "special tokens": (f"</s><s><s>c<pad>ar</s>{ONE}<pad>", [CAR], {}),
    "swapped": (f"car{locs(3, 4, 1, 2)}", [CAR], {SWAPPED: 1}),
    "swapped in y": (f"car{locs(1, 4, 3, 2)}", [CAR], {SWAPPED: 1}),
    "no width": (f"car{locs(5, 2, 5, 4)}", [], {NO_AREA: 1}),
    "no height": (f"car{locs(1, 4, 3, 4)}{ONE}", [CAR], {NO_AREA: 1}),
    "leftover": (f"car{ONE}{locs(5, 6)}", [CAR], {LEFTOVER_LOCATIONS: 2}),
    "cut off": (f"car{ONE}dog{locs(7)}", [CAR], {LEFTOVER_LOCATIONS: 1}),
    "unplaced": (f"car{ONE}dog", [CAR], {UNPLACED_TEXT: 1}),
    "unlabeled": (f"{ONE}{ONE}", [], {UNLABELED: 2}),
    "blank label": (f" \n{ONE}", [], {UNLABELED: 1}),
    "1000": (f"car{locs(1, 2, 1000, 1000)}", [box("car", 1, 2, 999, 999)], {}),
    "stray marker": (f"<od>car{ONE}</od>", [CAR], {STRAY_MARKERS: 2}),
    "marker inside": (
        f"car{locs(1, 2)}<sep>{ONE}",
        [CAR],
        {STRAY_MARKERS: 1, LEFTOVER_LOCATIONS: 2},
    ),
    "blanks only": (" \n ", [], {}),
}
OUTLINES = {
    "two points": (locs(1, 2, 3, 4), [], {TOO_FEW_POINTS: 1}),
    "one point often": (locs(*(5, 5) * 4), [], {TOO_FEW_POINTS: 1}),
    "a bad ring among good": (f"{S}<sep>{ONE}", [OUTLINE], {TOO_FEW_POINTS: 1}),
    "odd": (S + locs(7), [OUTLINE], {LEFTOVER_LOCATIONS: 1}),
    "cut": (f"<poly>{S}</poly><poly>{S}", [OUTLINE] * 2, {CUT_OUTLINE: 1}),
    "opened twice": (f"<poly>{S}<poly>{S}</poly>", [OUTLINE] * 2, {CUT_OUTLINE: 1}),
    "closed unopened": (f"{S}</poly>", [OUTLINE], {STRAY_MARKERS: 1}),
    "outside": (f"{ONE}<poly>{S}</poly>", [OUTLINE], {LEFTOVER_LOCATIONS: 4}),
    "empty rings": (f"<poly><sep>{S}<sep></poly><poly></poly>", [OUTLINE], {}),
    "words": (f"car{S}", [OUTLINE], {UNPLACED_TEXT: 1}),
}
OPEN_VOCABULARY = {
    "boxes and polygons": (
        f"car{ONE}dog<poly>{S}</poly><poly>{S}</poly>",
        [CAR, polygon("dog", SQUARE), polygon("dog", SQUARE)],
        {},
    ),
    "unlabeled outline": (f"<poly>{S}</poly>", [], {UNLABELED: 1}),
}
GROUNDING = {"too general": (f" the image{ONE}car{ONE}", [CAR], {TOO_GENERAL: 1})}
OCR = {
    "lines": (
        f"龍\nが{Q}\nb</s>{Q}{locs(5)}x{locs(*(5,) * 8)}{locs(1, 2)}",
        [quad("龍\nが", *LINE), quad("b", *LINE)],
        {LEFTOVER_LOCATIONS: 3, NO_AREA: 1},
    ),
    "unlabeled line": (Q, [], {UNLABELED: 1}),
}
ANSWERS = {
    "<OD>": LABELED_BOXES,
    "<OPEN_VOCABULARY_DETECTION>": LABELED_BOXES | OPEN_VOCABULARY,
    "<CAPTION_TO_PHRASE_GROUNDING>": GROUNDING,
    "<REGION_TO_SEGMENTATION>": OUTLINES,
    "<OCR_WITH_REGION>": OCR,
    "<CAPTION>": {
        "caption": ("</s><s> a car </s><pad>", [text("a car")], {}),
        "caption with places": (f"a car{ONE}", [text("a car")], {LEFTOVER_LOCATIONS: 4}),
        "nothing": ("</s><s></s>", [], {}),
    },
    "<REGION_TO_CATEGORY>": {
        "category": (f"car{ONE}", [text("car")], {}),
        "several": (f"car{ONE} dog{ONE}", [text("car dog")], {}),
    },
    "<REGION_TO_OCR>": {"five places": (f"a{ONE}<loc_3>", [text("a")], {LEFTOVER_LOCATIONS: 1})},
    "<OCR>": {"lines of text": ("a\nb\n", [text("a\nb")], {})},
}
CASES = {
    f"{task} {name}": (task, *case)
    for task, cases in ANSWERS.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize(("task", "answer", "objects", "notes"), CASES.values(), ids=CASES)
def test_an_answer_gives_objects_and_notes(task, answer, objects, notes):
    result = parse_answer_text(task, answer, SIZE_WH)
    assert list(result.objects) == objects
    assert result.notes == tuple(f"{what}: {count}" for what, count in notes.items())
    is_text = find_task(task).output is OutputKind.TEXT
    assert result.text == ("".join(found.label for found in objects) if is_text else None)


def test_a_text_task_keeps_the_raw_string_in_the_dictionary():
    result = parse_answer_text("<REGION_TO_CATEGORY>", f"<s> car{ONE}</s>", SIZE_WH)
    assert result.to_dict() == {"<REGION_TO_CATEGORY>": f"car{ONE}"}
    assert (result.text, result.answer) == ("car", f" car{ONE}")


def test_a_character_split_over_tokens_is_put_together():
    data = "龍".encode()
    tokens = [text_token(data[:1]), text_token(data[1:]), *map(location, (1, 2, 3, 4))]
    assert parse(tokens, find_task("<OD>"), SIZE_WH).objects[0].label == "龍"


def test_scores_of_boxes_that_share_a_label():
    tokens = tokens_of(("red", -0.2), (" car", -0.4), *((b, -0.1 * b) for b in (1, 2, 3, 4)))
    tokens += tokens_of(*((b, 0.0) for b in (5, 6, 7, 8)))
    first, second = parse(tokens, find_task("<OD>"), SIZE_WH).objects
    assert first.score == pytest.approx(0.5769498)  # exp(-0.25) * exp(-0.3)
    assert second.score == pytest.approx(0.7408182)  # exp(0) * exp(-0.3)


RING = [(location_bin, -0.5) for location_bin in SQUARE]
WORDS = [("a", -0.1), (" car", -0.3), *((location_bin, -9.0) for location_bin in (1, 2, 3, 4))]
SCORES = {
    "<REGION_PROPOSAL>": ([*RING[:3], (30, -0.9)], -0.6),  # no label
    "<OCR_WITH_REGION>": ([("a", -1.0), *RING], -0.5 - 1.0),
    # The odd location at the end is not part of the ring, nor of its score.
    "<REGION_TO_SEGMENTATION>": ([*RING, (9, -50.0)], -0.5),
    "<REGION_TO_CATEGORY>": (WORDS, -0.2),  # the words only
}


@pytest.mark.parametrize("task", SCORES)
def test_scores_of_other_objects(task):
    spelled, log_score = SCORES[task]
    (found,) = parse(tokens_of(*spelled), find_task(task), SIZE_WH).objects
    assert found.score == pytest.approx(math.exp(log_score))


@pytest.mark.parametrize("log_prob", [float("-inf"), float("nan"), 1e-3, -1e308])
def test_odd_probabilities_stay_in_range(log_prob):
    tokens = tokens_of(("a", log_prob), *((b, 0.0) for b in (1, 2, 3, 4)))
    (found,) = parse(tokens, find_task("<OD>"), SIZE_WH).objects
    assert found.score in (0.0, 1.0)
    json.dumps(found.score, allow_nan=False)


def test_scores_stand_beside_the_boxes():
    objects = (Box((0.0, 1.0, 2.0, 3.0), "a", 0.5), Polygon(((0.0,) * 6,), "b", 0.25))
    common = {"size_wh": (9, 9), "objects": objects, "text": None, "answer": "", "token_ids": ()}
    both = Result(task="<OPEN_VOCABULARY_DETECTION>", truncated=False, **common)
    assert both.to_dict() == {
        "<OPEN_VOCABULARY_DETECTION>": {
            "bboxes": [[0.0, 1.0, 2.0, 3.0]],
            "bboxes_labels": ["a"],
            "polygons": [[[0.0] * 6]],
            "polygons_labels": ["b"],
            "scores": [0.5, 0.25],
        }
    }
    plain = Result(task="<OD>", truncated=False, **common)
    assert plain.to_dict()["<OD>"]["scores"] == [0.5]


def test_a_cascade_has_one_entry_per_step():
    found = parse_answer_text("<OD>", f"car{ONE}dog{ONE}", SIZE_WH)
    asked = [parse_answer_text("<REGION_TO_CATEGORY>", f"{word}{ONE}", SIZE_WH) for word in "ab"]
    for answers in (asked, asked[:1]):
        cascade = Result(
            task="<OD>+<REGION_TO_CATEGORY>",
            size_wh=SIZE_WH,
            objects=(),
            text=None,
            answer="",
            token_ids=(),
            truncated=False,
            steps=(found, *answers),
        )
        assert cascade.to_dict() == {
            **found.to_dict(),
            "<REGION_TO_CATEGORY>": [a.to_dict()["<REGION_TO_CATEGORY>"] for a in answers],
        }


@pytest.mark.parametrize(
    ("task", "size_wh", "message"),
    [
        ("<OD>", (0, 5), "width and height"),
        ("<OD>", (5, 0), "width and height"),
        ("<OD>", (-1, 5), "width and height"),
        ("<ODD>", (5, 5), "Did you mean '<OD>'"),
    ],
)
def test_a_size_of_nothing_and_an_unknown_task_are_refused(task, size_wh, message):
    with pytest.raises(RequestError, match=message):
        parse_answer_text(task, "", size_wh)


@pytest.mark.parametrize(
    ("task", "answer", "spelled"),
    [
        ("<OD>", f"car{ONE}{locs(5, 6, 7, 8)}", [f"car{ONE}", f"car{locs(5, 6, 7, 8)}"]),
        ("<OD>", f"car{ONE}dog{locs(5, 6, 7, 8)}", [f"car{ONE}", f"dog{locs(5, 6, 7, 8)}"]),
        ("<REGION_PROPOSAL>", f"{ONE}{locs(5, 6)}", [ONE]),
        ("<OCR_WITH_REGION>", f"STOP{Q}", [f"STOP{Q}"]),
        (
            "<OPEN_VOCABULARY_DETECTION>",
            f"car<poly>{S}<sep>{locs(1, 2, 30, 2, 30, 40, 9)}</poly>",
            [f"car{S}{locs(1, 2, 30, 2, 30, 40)}"],
        ),
        ("<CAPTION>", "a car", ["a car"]),
        ("<REGION_TO_CATEGORY>", f"car{ONE}", ["car"]),
    ],
)
def test_an_object_has_the_tokens_that_its_score_is_made_of(task, answer, spelled):
    result = parse_answer_text(task, answer, SIZE_WH)
    assert [joined_text(found.tokens) for found in result.objects] == spelled


def test_a_score_can_be_computed_from_the_tokens_of_its_object():
    tokens = tokens_of(("car", -0.5), (1, -1.0), (2, -2.0), (3, -3.0), (4, -2.0), ("dog", -9.0))
    [found] = parse(tokens, find_task("<OD>"), SIZE_WH).objects
    assert found.tokens == tuple(tokens[:5])
    assert found.score == object_score(found.tokens[1:], found.tokens[:1]) == math.exp(-2.5)
