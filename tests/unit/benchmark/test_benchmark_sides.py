"""All sides answer the same questions on the same weights, in the same order."""

from __future__ import annotations

import numpy as np
import pytest

from florence2.benchmark.plan import Case, case_images
from florence2.benchmark.sides import OurSide, ReferenceSide
from florence2.tokenizer import Vocabulary

CASE = Case(batch=2, prompts=2, beams=2, tokens=6)
NO_LIMIT_S = 1e9


@pytest.fixture(scope="module")
def reference(tiny_folder):
    pytest.importorskip("transformers")
    return ReferenceSide(tiny_folder, "cpu", "fp32")


@pytest.fixture(scope="module")
def ours(tiny_folder):
    return OurSide(tiny_folder, "cpu", "torch", "fp32")


def test_ours_the_reference_and_one_at_a_time_give_the_same_full_length_answers(reference, ours):
    timings = [
        side(CASE, 0, NO_LIMIT_S)
        for side in (ours.run, reference.run_reference, reference.run_others)
    ]
    assert timings[0].token_ids == timings[1].token_ids == timings[2].token_ids
    # The forced <s> and </s> count, and are not among the ids.
    assert {len(ids) for ids in timings[0].token_ids} == {CASE.tokens - 2}
    assert len(set(timings[0].token_ids)) == CASE.asks
    assert all(spent > 0 for timing in timings for spent in timing.stages_s.values())


def test_after_its_limit_the_reference_begins_no_further_prompt(reference):
    whole = reference.run_reference(CASE, 0, NO_LIMIT_S)
    part = reference.run_reference(CASE, 0, 0.0)
    # One call has the first prompt of both images.
    first, second = whole.token_ids[0], whole.token_ids[2]
    assert part.token_ids == (first, None, second, None)
    assert part.whole_s == pytest.approx(2 * sum(part.stages_s.values()))


def test_after_its_limit_one_at_a_time_begins_no_further_answer(reference):
    assert reference.run_others(CASE, 0, 0.0).measured_asks == 1


def test_every_prompt_of_the_reference_runs_the_tower_and_ours_once_per_image(reference, ours):
    passes = []
    tower = reference.model.model.vision_tower
    handle = tower.register_forward_hook(lambda *_: passes.append("reference"))
    reference.run_reference(CASE, 0, NO_LIMIT_S)
    handle.remove()
    assert len(passes) == CASE.prompts
    handle = ours.engine.runtime.network.model.vision_tower.register_forward_hook(
        lambda _module, inputs, _output: passes.append(len(inputs[0]))
    )
    ours.run(CASE, 0, NO_LIMIT_S)
    ours.run(CASE, 0, NO_LIMIT_S)
    handle.remove()
    # Twice, because nothing of the first run is kept for the second.
    assert sum(count for count in passes if count != "reference") == 2 * CASE.batch


def test_every_round_has_images_of_its_own_that_all_sides_share():
    again = [np.asarray(image) for image in case_images(CASE, 1)]
    assert np.array_equal(again, [np.asarray(image) for image in case_images(CASE, 1)])
    assert not np.array_equal(again, [np.asarray(image) for image in case_images(CASE, 2)])


def test_prompts_are_as_long_as_published_ones(tiny_folder):
    vocabulary = Vocabulary.from_folder(tiny_folder)
    sentence = "Locate the phrases in the caption: a red car"
    assert len(vocabulary.encode_prompt(sentence)) == 13
