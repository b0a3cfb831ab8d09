"""Every rule of the parser that the reference does not share, by example."""

import json

import pytest
from parsing_junk import location, pieces_of, text_piece

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
    parse,
    parse_answer_text,
)
from florence2.records import Box, Polygon, Quad, Result, Text
from florence2.tasks import find_task

SIZE_WH = (1000, 2000)


def at(*bins):
    """Pixels of the bins on an image of SIZE_WH."""
    return tuple((b + 0.5) * (2 if i % 2 else 1) for i, b in enumerate(bins))


def locs(*bins):
    return "".join(f"<loc_{b}>" for b in bins)


def box(label, *bins):
    return Box(at(*bins), label, None)


SQUARE = (10, 10, 20, 10, 20, 20, 10, 20)
ONE = locs(1, 2, 3, 4)

BOX_TASKS = [
    ("script", f"龍が{ONE}", [box("龍が", 1, 2, 3, 4)], {}),
    ("newline", f"a\nb{ONE}", [box("a\nb", 1, 2, 3, 4)], {}),
    ("angle brackets", f"a<b>c{ONE}", [box("a<b>c", 1, 2, 3, 4)], {}),
    ("special tokens", f"</s><s><s>c<pad>ar</s>{ONE}<pad>", [box("car", 1, 2, 3, 4)], {}),
    ("swapped", f"car{locs(3, 4, 1, 2)}", [box("car", 1, 2, 3, 4)], {SWAPPED: 1}),
    ("swapped in y", f"car{locs(1, 4, 3, 2)}", [box("car", 1, 2, 3, 4)], {SWAPPED: 1}),
    ("no width", f"car{locs(5, 2, 5, 4)}", [], {NO_AREA: 1}),
    ("no height", f"car{locs(1, 4, 3, 4)}{ONE}", [box("car", 1, 2, 3, 4)], {NO_AREA: 1}),
    ("leftover", f"car{ONE}{locs(5, 6)}", [box("car", 1, 2, 3, 4)], {LEFTOVER_LOCATIONS: 2}),
    ("cut off", f"car{ONE}dog{locs(7)}", [box("car", 1, 2, 3, 4)], {LEFTOVER_LOCATIONS: 1}),
    ("unplaced", f"car{ONE}dog", [box("car", 1, 2, 3, 4)], {UNPLACED_TEXT: 1}),
    ("unlabeled", f"{ONE}{ONE}", [], {UNLABELED: 2}),
    ("blank label", f" \n{ONE}", [], {UNLABELED: 1}),
    ("1000", f"car{locs(1, 2, 1000, 1000)}", [box("car", 1, 2, 999, 999)], {}),
    ("stray marker", f"<od>car{ONE}</od>", [box("car", 1, 2, 3, 4)], {STRAY_MARKERS: 2}),
    ("marker inside", f"car{locs(1, 2)}<sep>{ONE}", [box("car", 1, 2, 3, 4)],
     {STRAY_MARKERS: 1, LEFTOVER_LOCATIONS: 2}),
    ("blanks only", " \n ", [], {}),
]  # fmt: skip


def notes_of(counts):
    return tuple(f"{what}: {count}" for what, count in counts.items())


@pytest.mark.parametrize(
    ("answer", "objects", "notes"), [c[1:] for c in BOX_TASKS], ids=[c[0] for c in BOX_TASKS]
)
@pytest.mark.parametrize("task", ["<OD>", "<OPEN_VOCABULARY_DETECTION>"])
def test_labeled_boxes(task, answer, objects, notes):
    result = parse_answer_text(task, answer, SIZE_WH)
    assert list(result.objects) == objects
    assert result.notes == notes_of(notes)
    assert result.text is None


def polygon(*rings):
    return Polygon(tuple(at(*ring) for ring in rings), "", None)


S = locs(*SQUARE)
OUTLINE_CASES = [
    ("two points", locs(1, 2, 3, 4), [], {TOO_FEW_POINTS: 1}),
    ("one point often", locs(*(5, 5) * 4), [], {TOO_FEW_POINTS: 1}),
    ("a bad ring among good", f"{S}<sep>{ONE}", [polygon(SQUARE)], {TOO_FEW_POINTS: 1}),
    ("odd", S + locs(7), [polygon(SQUARE)], {LEFTOVER_LOCATIONS: 1}),
    ("cut", f"<poly>{S}</poly><poly>{S}", [polygon(SQUARE)] * 2, {CUT_OUTLINE: 1}),
    ("opened twice", f"<poly>{S}<poly>{S}</poly>", [polygon(SQUARE)] * 2, {CUT_OUTLINE: 1}),
    ("closed unopened", f"{S}</poly>", [polygon(SQUARE)], {STRAY_MARKERS: 1}),
    ("outside", f"{ONE}<poly>{S}</poly>", [polygon(SQUARE)], {LEFTOVER_LOCATIONS: 4}),
    ("empty rings", f"<poly><sep>{S}<sep></poly><poly></poly>", [polygon(SQUARE)], {}),
    ("words", f"car{S}", [polygon(SQUARE)], {UNPLACED_TEXT: 1}),
]


@pytest.mark.parametrize(
    ("answer", "objects", "notes"),
    [c[1:] for c in OUTLINE_CASES],
    ids=[c[0] for c in OUTLINE_CASES],
)
def test_outlines(answer, objects, notes):
    result = parse_answer_text("<REGION_TO_SEGMENTATION>", answer, SIZE_WH)
    assert list(result.objects) == objects
    assert result.notes == notes_of(notes)


def test_boxes_and_polygons_in_one_answer():
    answer = f"car{ONE}dog<poly>{S}</poly><poly>{S}</poly>"
    result = parse_answer_text("<OPEN_VOCABULARY_DETECTION>", answer, SIZE_WH)
    dog = Polygon((at(*SQUARE),), "dog", None)
    assert result.objects == (box("car", 1, 2, 3, 4), dog, dog)
    unlabeled = parse_answer_text("<OPEN_VOCABULARY_DETECTION>", f"<poly>{S}</poly>", SIZE_WH)
    assert unlabeled.objects == ()
    assert unlabeled.notes == notes_of({UNLABELED: 1})


def test_grounding_leaves_out_what_is_too_general():
    result = parse_answer_text("<CAPTION_TO_PHRASE_GROUNDING>", f" the image{ONE}car{ONE}", SIZE_WH)
    assert [found.label for found in result.objects] == ["car"]
    assert result.notes == notes_of({TOO_GENERAL: 1})


def test_ocr():
    quad = (1, 2, 30, 2, 30, 40, 1, 40)
    answer = f"龍\nが{locs(*quad)}\nb</s>{locs(*quad, 5)}x{locs(*(5,) * 8)}{locs(1, 2)}"
    result = parse_answer_text("<OCR_WITH_REGION>", answer, SIZE_WH)
    assert result.objects == (Quad(at(*quad), "龍\nが", None), Quad(at(*quad), "b", None))
    assert result.notes == notes_of({LEFTOVER_LOCATIONS: 3, NO_AREA: 1})
    unlabeled = parse_answer_text("<OCR_WITH_REGION>", locs(*quad), SIZE_WH)
    assert (unlabeled.objects, unlabeled.notes) == ((), notes_of({UNLABELED: 1}))


TEXT_CASES = [
    ("caption", "<CAPTION>", "</s><s> a car </s><pad>", "a car", {}),
    ("category", "<REGION_TO_CATEGORY>", f"car{ONE}", "car", {}),
    ("five places", "<REGION_TO_OCR>", f"a{ONE}<loc_3>", "a", {LEFTOVER_LOCATIONS: 1}),
    ("several", "<REGION_TO_CATEGORY>", f"car{ONE} dog{ONE}", "car dog", {}),
    ("caption with places", "<CAPTION>", f"a car{ONE}", "a car", {LEFTOVER_LOCATIONS: 4}),
    ("lines", "<OCR>", "a\nb\n", "a\nb", {}),
    ("nothing", "<CAPTION>", "</s><s></s>", "", {}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("task", "answer", "text", "notes"), [c[1:] for c in TEXT_CASES], ids=[c[0] for c in TEXT_CASES]
)
def test_texts(task, answer, text, notes):
    result = parse_answer_text(task, answer, SIZE_WH)
    assert result.text == text
    assert result.objects == ((Text(text, None),) if text else ())
    assert result.notes == notes_of(notes)


def test_a_text_task_keeps_the_raw_string_in_the_dictionary():
    result = parse_answer_text("<REGION_TO_CATEGORY>", f"<s> car{ONE}</s>", SIZE_WH)
    assert result.to_dict() == {"<REGION_TO_CATEGORY>": f"car{ONE}"}
    assert (result.text, result.answer) == ("car", f" car{ONE}")


def test_a_character_split_over_tokens_is_put_together():
    data = "龍".encode()
    pieces = [text_piece(data[:1]), text_piece(data[1:]), *map(location, (1, 2, 3, 4))]
    assert parse(pieces, find_task("<OD>"), SIZE_WH).objects[0].label == "龍"


def test_scores_of_boxes_that_share_a_label():
    pieces = pieces_of(("red", -0.2), (" car", -0.4), *((b, -0.1 * b) for b in (1, 2, 3, 4)))
    pieces += pieces_of(*((b, 0.0) for b in (5, 6, 7, 8)))
    first, second = parse(pieces, find_task("<OD>"), SIZE_WH).objects
    assert first.score == pytest.approx(0.5769498)  # exp(-0.25) * exp(-0.3)
    assert second.score == pytest.approx(0.7408182)  # exp(0) * exp(-0.3)


def test_scores_of_other_objects():
    ring = [(b, -0.5) for b in SQUARE]
    (proposal,) = parse(
        pieces_of(*ring[:3], (30, -0.9)), find_task("<REGION_PROPOSAL>"), SIZE_WH
    ).objects
    assert proposal.score == pytest.approx(0.5488116)  # exp(-0.6), no label
    (quad,) = parse(pieces_of(("a", -1.0), *ring), find_task("<OCR_WITH_REGION>"), SIZE_WH).objects
    assert quad.score == pytest.approx(0.2231302)  # exp(-0.5) * exp(-1)
    # The odd location at the end is not part of the ring, nor of its score.
    task = find_task("<REGION_TO_SEGMENTATION>")
    (outline,) = parse(pieces_of(*ring, (9, -50.0)), task, SIZE_WH).objects
    assert outline.score == pytest.approx(0.6065307)
    words = pieces_of(("a", -0.1), (" car", -0.3), *((b, -9.0) for b in (1, 2, 3, 4)))
    (text,) = parse(words, find_task("<REGION_TO_CATEGORY>"), SIZE_WH).objects
    assert text.score == pytest.approx(0.8187308)  # exp(-0.2): the words only


@pytest.mark.parametrize("log_prob", [float("-inf"), float("nan"), 1e-3, -1e308])
def test_odd_probabilities_stay_in_range(log_prob):
    pieces = pieces_of(("a", log_prob), *((b, 0.0) for b in (1, 2, 3, 4)))
    (found,) = parse(pieces, find_task("<OD>"), SIZE_WH).objects
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


@pytest.mark.parametrize("size_wh", [(0, 5), (5, 0), (-1, 5)])
def test_a_size_of_nothing_is_refused(size_wh):
    with pytest.raises(RequestError, match="width and height"):
        parse_answer_text("<OD>", "", size_wh)


def test_an_unknown_task_is_refused():
    with pytest.raises(RequestError, match="Did you mean '<OD>'"):
        parse_answer_text("<ODD>", "", SIZE_WH)
