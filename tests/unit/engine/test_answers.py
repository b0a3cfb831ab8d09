"""What is asked of the engine: what answers share, and what must not be."""

from __future__ import annotations

import copy
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from engine_tools import TORCH_ONLY, ask, assert_all_close, captions, codes, essence, picture
from safetensors.torch import load_file, save_file

from florence2 import Ask, Florence2, FlorenceError
from florence2.engine.ask import join_region_answers, regions_of
from florence2.engine.encoding import EncodedImage, FeatureCache
from florence2.errors import CheckpointError, ImageError, RequestError
from florence2.records import Box, Polygon, Quad, Region, Result, Text
from florence2.tasks import TASKS, find_task


@pytest.fixture
def counting(engine, runtime):
    return Florence2(engine), runtime


def test_twenty_prompts_on_one_image_run_the_tower_once(counting):
    model, runtime = counting
    things = [f"thing {number}" for number in range(20)]
    asks = [Ask(picture(1), "<OPEN_VOCABULARY_DETECTION>", t, max_new_tokens=4) for t in things]
    assert not any(codes(model.run_many(asks)))
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
    assert_all_close(together, [model.run_many([one])[0] for one in asks])


def test_threads_with_different_tasks_get_the_serial_answers(model):
    asks = [[ask(picture(seed), task.token)] for seed in (6, 7) for task in TASKS[:8]]
    serial = [model.run_many(one)[0] for one in asks]
    with ThreadPoolExecutor(len(asks)) as threads:
        found = [one[0] for one in threads.map(model.run_many, asks)]
    assert_all_close(found, serial)


def test_no_memory_halves_the_batch_and_answers_everything(counting):
    model, runtime = counting
    asks = captions(*[8] * 8, max_new_tokens=4)
    expected = model.run_many(asks)
    runtime.batches.clear()
    runtime.fail_above = 3
    assert_all_close(model.run_many(asks), expected)
    assert runtime.batches == [2, 2, 2, 2]
    runtime.fail_above = 0
    assert codes(model.run_many(asks[:1])) == ["out_of_memory"]


def test_a_bad_image_is_a_failure_in_a_list_and_an_error_alone(model, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not an image")
    results = model.run("<CAPTION>", [picture(9), str(broken), picture(10)], max_new_tokens=4)
    assert codes(results) == [None, "bad_image", None]
    assert results[1].image == str(broken)
    with pytest.raises(ImageError, match="damaged"):
        model.run("<CAPTION>", b"not an image")


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
    folder = shutil.copytree(checkpoint_folder, tmp_path / "nan")
    state = load_file(folder / "model.safetensors")
    state = {name: torch.full_like(value, float("nan")) for name, value in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="does not answer"):
        Florence2.load(folder, device="cpu")


# OpenVINO's number is settled when it is loaded.
@TORCH_ONLY
def test_answers_do_not_depend_on_how_many_threads_compute(demo):
    asks = [ask(picture(1), "<OD>"), ask(picture(2), "<MORE_DETAILED_CAPTION>")]
    alone = demo.run_many(asks)
    demo.engine.cache.clear()
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        shared = demo.run_many(asks)
    finally:
        torch.set_num_threads(before)
    assert_all_close(shared, alone)


def encoded(key, num_bytes):
    return EncodedImage(torch.zeros(num_bytes, dtype=torch.uint8), (4, 3), key)


def test_the_least_recently_used_image_is_dropped_first():
    cache = FeatureCache(300)
    for key in "abc":
        cache.put(encoded(key, 100))
    assert cache.get("a") is not None
    cache.put(encoded("d", 100))
    assert cache.get("b") is None
    assert all(cache.get(key) is not None for key in "acd")


def test_the_cache_never_holds_more_than_its_bytes():
    cache = FeatureCache(250)
    for number in range(50):
        cache.put(encoded(str(number), 1 + 7 * number))
        assert cache.num_bytes <= 250


def test_an_image_larger_than_the_cache_is_not_kept():
    cache = FeatureCache(10)
    cache.put(encoded("a", 5))
    cache.put(encoded("big", 11))
    assert cache.get("big") is None
    assert cache.get("a") is not None


def test_the_same_key_again_counts_once():
    cache = FeatureCache(100)
    cache.put(encoded("a", 60))
    cache.put(encoded("a", 70))
    assert cache.num_bytes == 70
    cache.clear()
    assert cache.num_bytes == 0


CAR = Box((10.0, 20.0, 60.0, 90.0), "car", 0.9)
LINE = Polygon(((5.0, 5.0, 5.0, 30.0, 5.0, 60.0),), "a line", 0.8)
SIGN = Quad((1.0, 2.0, 9.0, 2.0, 9.0, 7.0, 1.0, 7.0), "STOP", 0.7)
DESCRIBE = find_task("<REGION_TO_DESCRIPTION>")
SEGMENT = find_task("<REGION_TO_SEGMENTATION>")


def result(*objects, text=None):
    return Result("<OD>", (100, 100), objects, text, "", (), truncated=False)


def described(text):
    return result(Text(text, 0.1), text=text)


def test_every_detected_box_stays_with_its_own_score_even_without_a_description():
    before = result(CAR, SIGN)
    joined = join_region_answers(
        DESCRIBE, "both", before, regions_of(before), [described(""), described("a stop sign")]
    )
    assert joined.objects == (
        Box(CAR.box_xyxy, "", 0.9),
        Box((1.0, 2.0, 9.0, 7.0), "a stop sign", 0.7),
    )


def test_a_region_without_area_is_kept_with_a_note_and_not_asked_about():
    before = result(LINE, CAR)
    asked = regions_of(before)
    assert [one.region for one in asked] == [None, Region(CAR.box_xyxy)]
    joined = join_region_answers(DESCRIBE, "both", before, asked, [described("a red car")])
    assert [found.label for found in joined.objects] == ["", "a red car"]
    assert joined.notes == ("object 1 ('a line') is under a pixel and was not asked about",)


def test_a_polygon_has_the_label_of_its_region_and_its_own_score():
    before = result(LINE, CAR)
    outline = Polygon(((1.0, 1.0, 9.0, 1.0, 9.0, 9.0),), "", 0.4)
    joined = join_region_answers(SEGMENT, "both", before, regions_of(before), [result(outline)])
    assert joined.objects == (replace(outline, label="car"),)


def test_a_cascade_asks_about_every_detected_box_and_keeps_its_score(demo):
    image = picture(14)
    joined = demo.run("<OD>+<REGION_TO_DESCRIPTION>", image, max_new_tokens=24)
    detection, *described = joined.steps
    assert len(described) == len(detection.objects) > 0
    for found, box, step in zip(joined.objects, detection.objects, described, strict=True):
        assert (found.box_xyxy, found.score) == (box.box_xyxy, box.score)
        alone = demo.run("<REGION_TO_DESCRIPTION>", image, region=box.box_xyxy, max_new_tokens=24)
        assert alone.token_ids == step.token_ids


@pytest.mark.parametrize("task", ["<REGION_TO_DESCRIPTION>", "<REGION_TO_SEGMENTATION>"])
def test_an_object_of_a_cascade_has_the_tokens_of_each_step(demo, task):
    joined = demo.run(f"<OD>+{task}", picture(14), max_new_tokens=24)
    detection, *answers = joined.steps
    said = [found for answer in answers for found in answer.objects]
    assert [one.tokens for one in joined.objects] == [
        (*before.tokens, *after.tokens)
        for before, after in zip(detection.objects, said, strict=True)
    ]
    assert all(one.tokens for one in (*detection.objects, *said))


def test_an_outline_without_points_has_no_region():
    empty = Polygon(rings_xy=(), label="cat", score=None)
    result = Result("<OD>", (10, 10), (empty,), None, "", (), truncated=False)
    assert [asked.region for asked in regions_of(result)] == [None]
