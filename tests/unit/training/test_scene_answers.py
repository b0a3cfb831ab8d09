"""Answers: what the reference's own post-processor reads from them is what was drawn."""

import numpy as np
import pytest

from florence2.tasks import TASKS, find_task
from florence2_demo.examples import TASK_WEIGHTS, examples, prompt_sentence, sample_examples
from florence2_demo.language import find_phrases, has_known_words, plain_label
from florence2_demo.lexicon import counted, listed
from florence2_demo.scene import make_scene
from florence2_demo.truth import ground_truth, location_bin, locations

SIZE = 10_000
BIN = SIZE / 1000
SCENES = [make_scene(seed) for seed in range(60)]


class _Tokenizer:
    all_special_tokens = ()


@pytest.fixture(scope="module")
def read():
    """The reference's parser on a picture large enough that its integers lose nothing."""
    module = pytest.importorskip("transformers.models.florence2.processing_florence2")
    kinds = ("pure_text", "ocr", "phrase_grounding", "description_with_bboxes", "bboxes")
    kinds += ("polygons", "description_with_bboxes_or_polygons")
    processor = module.Florence2PostProcessor({kind: {} for kind in kinds}, _Tokenizer())

    def parse(answer: str, task: str) -> list[dict]:
        kind = find_task(task).output.value
        return processor(text=answer, image_size=(SIZE, SIZE), parse_tasks=kind)[kind]

    return parse


def flat_boxes(instances: list[dict]) -> list[tuple[str, list[int]]]:
    found = []
    for instance in instances:
        boxes = instance["bbox"]
        for box in boxes if boxes and isinstance(boxes[0], list) else [boxes]:
            found.append((instance["cat_name"], box))
    return found


def same_place(parsed: list[int], fractions: tuple[float, ...]) -> bool:
    return bool(np.abs(np.array(parsed) - np.array(fractions) * SIZE).max() <= BIN)


BOX_TASKS = [
    "<OD>",
    "<DENSE_REGION_CAPTION>",
    "<REGION_PROPOSAL>",
    "<CAPTION_TO_PHRASE_GROUNDING>",
    "<OPEN_VOCABULARY_DETECTION>",
]


@pytest.mark.parametrize("task", BOX_TASKS)
def test_reference_reads_the_same_boxes(read, task):
    for seed, scene in enumerate(SCENES):
        for made in sample_examples(scene, np.random.default_rng(seed), 3, {task: 1.0}):
            right = made.truth
            parsed = flat_boxes(read(made.answer, task))
            assert len(parsed) == len(right.boxes_xyxy)
            for (label, box), name, expected in zip(
                parsed, right.labels, right.boxes_xyxy, strict=True
            ):
                assert label == name
                assert same_place(box, expected)


@pytest.mark.parametrize(
    "task", ["<REFERRING_EXPRESSION_SEGMENTATION>", "<REGION_TO_SEGMENTATION>"]
)
def test_reference_reads_one_instance_per_polygon(read, task):
    several = 0
    for seed, scene in enumerate(SCENES):
        made = sample_examples(scene, np.random.default_rng(seed), 3, {task: 1.0})
        truths = [example.truth for example in made]
        if task == "<REFERRING_EXPRESSION_SEGMENTATION>":
            truths.append(ground_truth(scene, task, scene.objects[0].kind))
        for right in truths:
            parsed = read(right.answer, task)
            several += len(parsed) > 1
            assert len(parsed) == len(right.polygons_xy)
            for instance, expected in zip(parsed, right.polygons_xy, strict=True):
                (ring,) = instance["polygons"]
                assert same_place(ring, tuple(np.array(expected).ravel()))
    assert several or task == "<REGION_TO_SEGMENTATION>"


def test_reference_reads_the_same_quads(read):
    for scene in SCENES:
        right = ground_truth(scene, "<OCR_WITH_REGION>")
        parsed = read(right.answer, "<OCR_WITH_REGION>")
        assert [p["text"] for p in parsed] == [line.text for line in scene.texts]
        for instance, line in zip(parsed, scene.texts, strict=True):
            assert same_place(instance["quad_box"], tuple(np.array(line.quad_xy).ravel()))


def test_every_task_that_applies_has_one_example_and_all_occur():
    seen = set()
    for seed, scene in enumerate(SCENES):
        made = examples(scene, np.random.default_rng(seed))
        tasks = [example.task for example in made]
        assert len(set(tasks)) == len(tasks)
        seen.update(tasks)
        without = {task.token for task in TASKS} - set(tasks)
        assert without == (set() if scene.texts else {"<REGION_TO_OCR>"})
        for example in made:
            assert "{input}" not in prompt_sentence(example)
    assert seen == {task.token for task in TASKS} == set(TASK_WEIGHTS)


def test_samples_are_reproducible_and_follow_the_weights():
    scene = SCENES[0]
    first = sample_examples(scene, np.random.default_rng(3), 8)
    assert first == sample_examples(scene, np.random.default_rng(3), 8)
    assert len({example.task for example in first}) == 8
    only = sample_examples(scene, np.random.default_rng(3), 5, {"<OD>": 1.0})
    assert [example.task for example in only] == ["<OD>"] * 5


def test_answers_without_anything_to_find_are_empty():
    scene = next(scene for scene in SCENES if not scene.texts)
    asked = [("<OCR>", None), ("<OCR_WITH_REGION>", None), ("<OPEN_VOCABULARY_DETECTION>", "dog")]
    for task, text in [*asked, ("<CAPTION_TO_PHRASE_GROUNDING>", "dog. sofa")]:
        assert ground_truth(scene, task, text).answer == ""


def test_objects_are_listed_from_left_to_right():
    for scene in SCENES:
        boxes = ground_truth(scene, "<OD>").boxes_xyxy
        centres = [(box[0] + box[2]) / 2 for box in boxes]
        assert centres == sorted(centres)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("red car. dog.", ["red car"]),
        ("two blue stars and an orange fish on a green background", ["blue star", "orange fish"]),
        ("Cars, boxes", ["car", "box"]),
        ("a carpet and a starfish", []),
        ("car. red car. car", ["car", "red car"]),
        ("", []),
    ],
)
def test_phrases_are_found_in_a_text(text, found):
    assert [phrase.words for phrase in find_phrases(text)] == found


def test_a_side_picks_the_outermost_match():
    scene, name = next(
        (scene, first.name)
        for scene in SCENES
        for first in scene.objects
        if sum(other.name == first.name for other in scene.objects) > 1
    )
    task = "<REFERRING_EXPRESSION_SEGMENTATION>"
    matches = ground_truth(scene, task, f"the {name}").objects
    assert ground_truth(scene, task, f"the {name} on the left").objects == matches[:1]
    assert ground_truth(scene, task, f"the {name} on the right").objects == matches[-1:]


def test_region_answers_repeat_the_region():
    scene = SCENES[2]
    thing = scene.objects[0]
    right = ground_truth(scene, "<REGION_TO_DESCRIPTION>", region_xyxy=thing.box_xyxy)
    assert right.answer == thing.name + locations(thing.box_xyxy)
    with pytest.raises(ValueError, match="needs a region"):
        ground_truth(scene, "<REGION_TO_CATEGORY>")


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.0, 0), (0.0009, 0), (0.5, 500), (0.9999, 999), (1.0, 999)]
)
def test_locations_are_floored_and_clamped(fraction, expected):
    assert location_bin(fraction) == expected


def test_words():
    assert counted(1, "orange", "car") == "an orange car"
    assert counted(2, "red", "box") == "two red boxes"
    assert counted(3, "blue", "fish") == "three blue fish"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert listed(["a"]) == "a"


def test_captions_name_every_object():
    for scene in SCENES:
        short = ground_truth(scene, "<CAPTION>").answer
        long = ground_truth(scene, "<MORE_DETAILED_CAPTION>").answer
        for thing in scene.objects:
            assert thing.colour in short
            assert thing.name in long
        for line in scene.texts:
            assert line.text in short
            assert f"says {line.text}." in long


def test_a_referring_prompt_speaks_of_one_thing():
    task = "<REFERRING_EXPRESSION_SEGMENTATION>"
    for seed, scene in enumerate(SCENES):
        for made in sample_examples(scene, np.random.default_rng(seed), 4, {task: 1.0}):
            assert len(made.truth.polygons_xy) == 1


@pytest.mark.parametrize(
    ("label", "plain"),
    [
        ("red cars", "red car"),
        ("The  Star", "star"),
        ("a purple fish", "purple fish"),
        ("human face", "human face"),
        ("", ""),
        ("red car and cup", "red car and cup"),
    ],
)
def test_plain_label(label, plain):
    assert plain_label(label) == plain


@pytest.mark.parametrize(
    ("answer", "known"),
    [
        ("red car<loc_1><loc_2>two stars", True),
        ("STOP\n7", True),
        ("", True),
        ("<poly><loc_3></poly>", True),
        ("carr<loc_1>", False),
        ("A small red car is at the top left. A sign on the right says EXIT.", True),
    ],
)
def test_known_words(answer, known):
    assert has_known_words(answer) is known
