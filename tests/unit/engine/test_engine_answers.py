"""The engine on real code and a small random checkpoint: what is shared, and what must not be."""

from __future__ import annotations

import copy
import pickle
import threading
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

from florence2 import Ask, Failure, Florence2, FlorenceError, Result
from florence2.cache import EncodedImage
from florence2.engine import Engine
from florence2.errors import CheckpointError, DeviceError, ImageError, RequestError
from florence2.tasks import TASKS, TaskInput
from florence2.training.draw import draw_scene
from florence2.training.scene import make_scene

REGION = (20.0, 30.0, 150.0, 170.0)


def picture(seed: int) -> Image.Image:
    return draw_scene(make_scene(seed))


def ask(image: object, task: str, **search: object) -> Ask:
    takes = next(known.takes for known in TASKS if known.token == task)
    text = "a red car" if takes is TaskInput.TEXT else None
    region = REGION if takes is TaskInput.REGION else None
    return Ask(image, task, text, region, **({"max_new_tokens": 16} | search))


def essence(result: Result) -> tuple[object, ...]:
    return (result.task, result.token_ids, result.objects, result.text, result.truncated)


def assert_close(one: Result, other: Result) -> None:
    """Equal but for the rounding of scores, which depends on the batch's shape."""
    assert one.token_ids == other.token_ids
    assert (one.task, one.text, one.size_wh) == (other.task, other.text, other.size_wh)
    for mine, its in zip(one.objects, other.objects, strict=True):
        assert mine.score == pytest.approx(its.score, abs=1e-4)
        assert replace(mine, score=0.0) == replace(its, score=0.0)


class CountingRuntime:
    """The real runtime, counting images through the tower and prompts through the decoder."""

    def __init__(self, runtime):
        self._runtime = runtime
        self.num_images = 0
        self.batches: list[int] = []
        self.fail_above: int | None = None

    def __getattr__(self, name):
        return getattr(self._runtime, name)

    def encode_images(self, pixels):
        self.num_images += len(pixels)
        return self._runtime.encode_images(pixels)

    def start(self, features, prompt_ids, num_beams, max_new_tokens):
        if self.fail_above is not None and len(features) > self.fail_above:
            raise torch.OutOfMemoryError("no memory left")
        self.batches.append(len(features))
        return self._runtime.start(features, prompt_ids, num_beams, max_new_tokens)


@pytest.fixture
def counting(model):
    runtime = CountingRuntime(model.engine.runtime)
    engine = Engine(
        model.engine.checkpoint, runtime, image_batch=2, prompt_batch=8, cache_bytes=2**22
    )
    return Florence2(engine), runtime


def test_twenty_prompts_on_one_image_run_the_tower_once(counting):
    model, runtime = counting
    image = picture(1)
    asks = [
        Ask(image, "<OPEN_VOCABULARY_DETECTION>", f"thing {i}", max_new_tokens=4) for i in range(20)
    ]
    assert all(isinstance(result, Result) for result in model.run_many(asks))
    assert runtime.num_images == 1
    assert runtime.batches == [8, 8, 4]


def test_the_same_picture_again_comes_from_the_cache(counting):
    model, runtime = counting
    first = model.run("<CAPTION>", picture(2), max_new_tokens=6)
    again = model.run("<CAPTION>", np.asarray(picture(2)), max_new_tokens=6)
    assert runtime.num_images == 1
    assert essence(first) == essence(again)


def test_an_encoded_image_answers_like_the_image_itself(counting):
    model, runtime = counting
    encoded = model.encode(picture(3))
    assert isinstance(encoded, EncodedImage)
    answers = [model.run(task, encoded, max_new_tokens=6) for task in ("<OD>", "<CAPTION>")]
    assert runtime.num_images == 1
    model.engine.cache.clear()
    assert essence(answers[0]) == essence(model.run("<OD>", picture(3), max_new_tokens=6))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_every_task_in_one_mixed_batch_answers_as_alone(model, num_beams):
    images = [picture(4), picture(5)]
    asks = [ask(image, task.token, num_beams=num_beams) for image in images for task in TASKS]
    together = model.run_many(asks)
    for one, result in zip(asks, together, strict=True):
        [alone] = model.run_many([one])
        assert_close(result, alone)


def test_threads_with_different_tasks_get_the_serial_answers(model):
    asks = [ask(picture(seed), task.token) for seed in (6, 7) for task in TASKS[:8]]
    serial = [model.run_many([one])[0] for one in asks]
    found: dict[int, Result | Failure] = {}

    def work(place: int) -> None:
        [found[place]] = model.run_many([asks[place]])

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(asks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, expected in enumerate(serial):
        assert_close(found[place], expected)


def test_no_memory_halves_the_batch_and_answers_everything(counting):
    model, runtime = counting
    asks = [Ask(picture(8), "<CAPTION>", max_new_tokens=4) for _ in range(8)]
    expected = model.run_many(asks)
    runtime.batches.clear()
    runtime.fail_above = 3
    results = model.run_many(asks)
    assert runtime.batches == [2, 2, 2, 2]
    for mine, its in zip(results, expected, strict=True):
        assert_close(mine, its)


def test_a_request_that_does_not_fit_alone_fails_alone(counting):
    model, runtime = counting
    runtime.fail_above = 0
    [failure] = model.run_many([Ask(picture(8), "<CAPTION>", max_new_tokens=4)])
    assert isinstance(failure, Failure)
    assert failure.code == "out_of_memory"


def test_a_bad_image_in_a_list_is_a_failure_and_the_others_succeed(model, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not an image")
    results = model.run("<CAPTION>", [picture(9), str(broken), picture(10)], max_new_tokens=4)
    assert [type(result) for result in results] == [Result, Failure, Result]
    assert results[1].image == str(broken)
    assert results[1].code == "bad_image"


def test_a_bad_image_alone_raises(model):
    with pytest.raises(ImageError, match="damaged"):
        model.run("<CAPTION>", b"not an image")


BAD_REQUESTS = {
    "unknown task": (("<ODD>", None, None, {}), "Did you mean '<OD>'"),
    "text missing": (("<OPEN_VOCABULARY_DETECTION>", None, None, {}), "needs a text"),
    "text unwanted": (("<CAPTION>", "a car", None, {}), "takes no text"),
    "region missing": (("<REGION_TO_CATEGORY>", None, None, {}), "region"),
    "region outside": (
        ("<REGION_TO_CATEGORY>", None, (5000, 5000, 6000, 6000), {}),
        "lie on the image",
    ),
    "region of three": (("<REGION_TO_CATEGORY>", None, (1, 2, 3), {}), "four numbers"),
    "no beams": (("<CAPTION>", None, None, {"num_beams": 0}), "num_beams"),
    "too many tokens": (("<CAPTION>", None, None, {"max_new_tokens": 5000}), "at most 512"),
    "very long prompt": (("<OPEN_VOCABULARY_DETECTION>", "car " * 2500, None, {}), "at most"),
    "another task's token": (("<OPEN_VOCABULARY_DETECTION>", "a <OD> car", None, {}), "<OD>"),
    "cascade of two captions": (("<CAPTION>+<OCR>", None, None, {}), "takes neither"),
    "region after a region": (
        ("<REGION_TO_CATEGORY>+<REGION_TO_OCR>", None, REGION, {}),
        "does not give",
    ),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_gets_one_plain_sentence(model, name):
    (task, text, region, search), expected = BAD_REQUESTS[name]
    with pytest.raises(RequestError) as caught:
        model.run(task, picture(11), text, region, **search)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_result_can_be_pickled_copied_and_taken_apart(model):
    result = model.run("<CAPTION>", picture(33), max_new_tokens=4)
    assert pickle.loads(pickle.dumps(result)) == copy.deepcopy(result) == result
    assert asdict(result)["timings_s"] == dict(result.timings_s)


def test_the_vision_time_counts_once_and_is_nothing_from_the_cache(model):
    image = picture(34)
    timings = model.run("<CAPTION>", image, max_new_tokens=4).timings_s
    assert set(timings) == {"vision", "prompt", "decode"}
    assert min(timings.values()) > 0
    assert model.run("<CAPTION>", image, max_new_tokens=4).timings_s["vision"] == 0
    encoded = model.encode(picture(35))
    assert model.run("<CAPTION>", encoded, max_new_tokens=4).timings_s["vision"] == 0


def test_an_answer_cut_at_the_limit_says_so(model):
    result = model.run("<OD>", picture(12), num_beams=1, max_new_tokens=3)
    assert result.truncated
    assert any("3 tokens" in note for note in result.notes)


def test_a_region_cascade_asks_about_every_box(model):
    image = picture(14)
    result = model.run("<OD>+<REGION_TO_DESCRIPTION>", image, max_new_tokens=24)
    detection, *described = result.steps
    assert len(described) == len(detection.objects)
    for box, step in zip(detection.objects, described, strict=True):
        alone = model.run("<REGION_TO_DESCRIPTION>", image, region=box.box_xyxy, max_new_tokens=24)
        assert alone.token_ids == step.token_ids


def test_features_of_another_checkpoint_are_refused(model, counting):
    encoded = model.encode(picture(15))
    foreign = EncodedImage(encoded.features, encoded.size_wh, "other@1 torch fp32:abc")
    with pytest.raises(RequestError, match="encode the image again"):
        model.run("<CAPTION>", foreign)


def test_features_that_are_not_numbers_fail_alone_in_their_batch(model):
    good = model.encode(picture(15))
    bad = replace(good, features=torch.full_like(good.features, float("nan")))
    asks = [Ask(image, "<CAPTION>", max_new_tokens=6) for image in (good, bad, good)]
    first, failure, last = model.run_many(asks)
    assert failure.code == "not_finite"
    assert essence(first) == essence(last) == essence(model.run_many(asks[:1])[0])
    with pytest.raises(FlorenceError, match="finite numbers"):
        model.run("<CAPTION>", bad, max_new_tokens=6)


def test_loading_refuses_weights_that_are_not_numbers(checkpoint_folder, tmp_path):
    from shutil import copytree

    from safetensors.torch import load_file, save_file

    folder = copytree(checkpoint_folder, tmp_path / "nan")
    state = load_file(folder / "model.safetensors")
    state = {name: torch.full_like(value, float("nan")) for name, value in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="does not answer"):
        Florence2.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({"device": "gpu"}, "Unknown device 'gpu'"),
        ({"device": "cuda:x"}, "Unknown device"),
        ({"runtime": "onnx"}, "Unknown runtime 'onnx'"),
        ({"device": "cpu", "precision": "int4"}, "Unknown precision"),
        ({"device": "cpu", "precision": "fp16"}, "is for GPUs"),
    ],
)
def test_a_device_that_is_not_there_gets_one_sentence(checkpoint_folder, keywords, expected):
    with pytest.raises(DeviceError, match=expected):
        Florence2.load(checkpoint_folder, **keywords)


METHODS = {
    "caption_image": ((), {"granularity": "detailed"}, "<DETAILED_CAPTION>"),
    "detect_objects": ((), {}, "<OD>"),
    "ground_phrase": (("a car",), {}, "<CAPTION_TO_PHRASE_GROUNDING>"),
    "segment_phrase": (("a car",), {}, "<REFERRING_EXPRESSION_SEGMENTATION>"),
    "ocr_image": ((), {}, "<OCR>"),
    "parse_document": ((), {}, "<OCR_WITH_REGION>"),
    "segment_region": ((REGION,), {}, "<REGION_TO_SEGMENTATION>"),
    "classify_image_region": ((REGION,), {}, "<REGION_TO_CATEGORY>"),
    "caption_image_region": ((REGION,), {}, "<REGION_TO_DESCRIPTION>"),
    "ocr_image_region": ((REGION,), {}, "<REGION_TO_OCR>"),
    "propose_regions": ((), {}, "<REGION_PROPOSAL>"),
}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_asks_its_task_of_an_image_and_of_a_list(model, method):
    arguments, keywords, task = METHODS[method]
    ability = getattr(model, method)
    single = ability(picture(16), *arguments, **keywords, max_new_tokens=4)
    assert single.task == task
    several = ability([picture(16), picture(17)], *arguments, **keywords, max_new_tokens=4)
    assert [result.task for result in several] == [task, task]
    assert_close(several[0], single)


def test_detecting_named_classes_grounds_them(model):
    result = model.detect_objects(picture(16), classes=["car", "tree"], max_new_tokens=4)
    assert result.task == "<CAPTION_TO_PHRASE_GROUNDING>"
    with pytest.raises(RequestError, match="name at least one"):
        model.detect_objects(picture(16), classes=[])
    with pytest.raises(FlorenceError, match="Unknown labels_mode"):
        model.detect_objects(picture(16), labels_mode="boxes")


def test_a_fine_tunes_own_prompt_goes_through_as_it_is_and_comes_back_as_text(model):
    result = model.run_custom("<DocVQA>", picture(16), "What is the total?", max_new_tokens=6)
    expected = model.engine.checkpoint.vocabulary.answer_text(result.token_ids)
    assert result.task == "<DocVQA>"
    assert result.text == expected
    with pytest.raises(RequestError, match="Unknown task"):
        model.run("<DocVQA>", picture(16), "What is the total?")
    with pytest.raises(RequestError):
        model.run_custom("<OD>", picture(16))
