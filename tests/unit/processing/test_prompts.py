"""Sentences equal the reference's; input that does not fit the task is one plain sentence."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from florence2.engine.ask import MAX_PROMPT_CHARS, check_prompt_length, prompt_sentence
from florence2.errors import RequestError
from florence2.records import Region, clip_region, region_bins
from florence2.tasks import TASKS, TaskInput, find_task, passthrough_task
from florence2.tokenizer import Vocabulary

SIZE_WH = (640, 480)
TEXTS = [
    "a red car",
    "  padded  ",
    "{braces} {0} {input}",
    "中文, café",
    "a <and> b",
    "1 < 2 > 0",
    "x\ny",
]
INPUTS = {
    TaskInput.NONE: [""],
    TaskInput.TEXT: TEXTS,
    TaskInput.REGION: ["<loc_1><loc_2><loc_30><loc_999>", " <loc_0><loc_0><loc_0><loc_0> "],
}
CASES = [(task, text) for task in TASKS for text in INPUTS[task.takes]]


@pytest.fixture(scope="module")
def vocabulary(native_folder):
    return Vocabulary.from_folder(native_folder)


@pytest.mark.parametrize(("task", "text"), CASES, ids=[f"{t.name}-{x!r}" for t, x in CASES])
def test_prompts_equal_the_reference(task, text, reference, vocabulary):
    sentence = prompt_sentence(task, text, None, SIZE_WH)
    assert reference._construct_prompts(task.token + text) == [sentence]
    framed = f"<s>{sentence}</s>"
    expected = reference.tokenizer(framed, add_special_tokens=False).input_ids
    assert vocabulary.encode_prompt(sentence) == expected


def test_regions_are_quantised_like_the_reference(reference):
    torch = pytest.importorskip("torch")
    boxes = [(0, 0, 640, 480), (1, 2, 3, 4), (10.25, 20.75, 333.3, 444.4), (639.9, 479.9, 640, 480)]
    for box in boxes:
        theirs = reference.post_processor.quantize(
            torch.tensor([box], dtype=torch.float64), SIZE_WH
        )
        assert list(region_bins(box, SIZE_WH)) == theirs[0].tolist()
    sentence = prompt_sentence(
        find_task("region_category"), None, Region((64, 48, 960, 240)), SIZE_WH
    )
    assert sentence == "What is the region <loc_100><loc_100><loc_999><loc_500>?"


@given(
    bins=st.lists(st.integers(0, 999), min_size=4, max_size=4),
    size_wh=st.tuples(st.integers(1, 20_000), st.integers(1, 20_000)),
)
def test_the_middle_of_a_bin_is_in_that_bin(bins, size_wh):
    sizes = (*size_wh, *size_wh)
    x1, y1, x2, y2 = ((b + 0.5) * s / 1000 for b, s in zip(bins, sizes, strict=True))
    assert list(region_bins((x1, y1, x2, y2), size_wh)) == bins


def test_a_region_partly_outside_is_clipped():
    assert clip_region((-5, -5, 10, 1000), SIZE_WH) == (0.0, 0.0, 10.0, 480.0)


OD, GROUND, REGION = find_task("OD"), find_task("phrase_grounding"), find_task("region_ocr")
BOX = Region((1, 2, 3, 4))
REFUSED = [
    ("text unwanted", OD, "car", None, "takes no text"),
    ("region unwanted", OD, None, BOX, "takes no region"),
    ("region for a text task", GROUND, "car", BOX, "takes no region"),
    ("text missing", GROUND, None, None, "needs a text"),
    ("text blank", GROUND, " \n ", None, "needs a text"),
    ("text not a string", GROUND, 7, None, "must be a string"),
    ("text too long", GROUND, "x" * 10_000, None, "at most 4000 characters, and 10000"),
    ("start token", GROUND, "a <s> b", None, "token <s>"),
    ("end token", GROUND, "a</s>", None, "token </s>"),
    ("padding", GROUND, "<pad>", None, "token <pad>"),
    ("image token", GROUND, "see <image>", None, "token <image>"),
    ("another task", GROUND, "<OD> car", None, "token <OD>"),
    ("the same task", GROUND, "<CAPTION_TO_PHRASE_GROUNDING>car", None, "token <CAPTION_TO"),
    ("outline token", GROUND, "<poly>", None, "token <poly>"),
    ("location", GROUND, "car <loc_5>", None, "token <loc_5>"),
    ("lone surrogate", GROUND, "\ud800", None, "valid Unicode"),
    ("region missing", REGION, None, None, "needs a region"),
    ("region as words", REGION, "the left half", None, "needs a region such as"),
    ("three locations", REGION, "<loc_1><loc_2><loc_3>", None, "needs a region such as"),
    ("inverted locations", REGION, "<loc_9><loc_2><loc_3><loc_4>", None, "x1 <= x2"),
    ("region and text", REGION, "car", BOX, "and no text"),
    ("inverted", REGION, None, Region((30, 2, 3, 4)), "x1 < x2"),
    ("no area", REGION, None, Region((3, 2, 3, 4)), "x1 < x2"),
    ("right of the image", REGION, None, Region((640, 2, 650, 4)), "which is 640x480"),
    ("above the image", REGION, None, Region((1, -9, 5, 0)), "which is 640x480"),
    ("shares of the image", REGION, None, Region((0.1, 0.2, 0.9, 0.8)), "multiply shares"),
    ("the whole as shares", REGION, None, Region((0, 0, 1, 1)), "multiply shares"),
    ("under a pixel", REGION, None, Region((7.2, 2, 7.9, 400)), "at least one pixel"),
    ("a sliver of it on the image", REGION, None, Region((-9, 2, 0.5, 4)), "which is 640x480"),
    ("not a number", REGION, None, Region((math.nan, 2, 3, 4)), "finite"),
    ("infinite", REGION, None, Region((0, 0, math.inf, 4)), "finite"),
]


@pytest.mark.parametrize(
    ("task", "text", "region", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_refused_with_one_sentence(task, text, region, message):
    with pytest.raises(RequestError, match=message) as raised:
        prompt_sentence(task, text, region, SIZE_WH)
    assert "\n" not in str(raised.value)


@given(text=st.text(max_size=60))
def test_any_text_is_taken_whole_or_refused(text, vocabulary):
    try:
        sentence = prompt_sentence(GROUND, text, None, SIZE_WH)
    except RequestError:
        return
    assert sentence == f"Locate the phrases in the caption: {text.strip()}"
    ids = vocabulary.encode_prompt(sentence)
    assert vocabulary.answer_text(ids) == sentence


def test_locations_beyond_the_last_bin_are_clamped():
    sentence = prompt_sentence(REGION, "<loc_0><loc_0><loc_1000><loc_1000>", None, SIZE_WH)
    assert sentence == "What text is in the region <loc_0><loc_0><loc_999><loc_999>?"


def test_a_prompt_must_fit_the_positions():
    check_prompt_length(447, 447)
    with pytest.raises(RequestError, match="at most 447 tokens with this checkpoint, and 448"):
        check_prompt_length(448, 447)


def test_custom_tasks_pass_through():
    task = passthrough_task("<DocVQA>")
    assert prompt_sentence(task, " What is it? ", None, SIZE_WH) == "<DocVQA>What is it?"
    assert prompt_sentence(task, None, None, SIZE_WH) == "<DocVQA>"
    assert prompt_sentence(task, "at <loc_5>", None, SIZE_WH) == "<DocVQA>at <loc_5>"
    with pytest.raises(RequestError, match="token </s>"):
        prompt_sentence(task, "</s>", None, SIZE_WH)
    with pytest.raises(RequestError, match="Unknown task"):
        find_task("<DocVQA>")
    for token in ("<OD>", "<od>", "<poly>", "<s>", "<loc_5>", "DocVQA", "<a><b>", "<image>", ""):
        with pytest.raises(RequestError):
            passthrough_task(token)


def test_the_longest_text_is_taken():
    assert prompt_sentence(GROUND, "x" * MAX_PROMPT_CHARS, None, SIZE_WH).endswith("x")
