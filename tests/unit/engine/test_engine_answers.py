"""The engine on real code and a small random checkpoint: what is shared, and what must not be."""

from __future__ import annotations

import copy
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from engine_tools import ask, assert_all_close, captions, codes, essence, picture
from safetensors.torch import load_file, save_file

from florence2 import Ask, Florence2, FlorenceError
from florence2.engine.encoding import EncodedImage
from florence2.errors import CheckpointError, ImageError, RequestError
from florence2.tasks import TASKS


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
