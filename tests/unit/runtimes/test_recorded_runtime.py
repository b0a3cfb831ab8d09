"""A runtime that records its work gives what it gives without, and keeps what it says."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from recorders import CPU, TABLE, pixels_of

from florence2.generation.decode import DecodeBatch, generate
from florence2.records import GenerationSettings
from florence2.runtimes.cuda_graphs import GraphRunner
from florence2.runtimes.decode_graphs import RecordedBatch
from florence2.runtimes.torch import PROMPT_LENGTHS, TorchRuntime
from florence2.runtimes.torch import VISION_BUCKETS as BUCKETS

IMAGES = np.random.default_rng(3).integers(0, 256, (20, 48, 48, 3), dtype=np.uint8)
SETTINGS = GenerationSettings(num_beams=3)
PROMPTS = [[0, 5, 6, 7, 2], [0, 9, 2], [0, 8, 8, 8, 8, 8, 2]]
LIMITS = [20, 20, 20]


@pytest.fixture
def plain(network):
    return TorchRuntime(copy.deepcopy(network), CPU, "fp32")


@pytest.mark.parametrize("count", [1, 2, 5, 7, 16, 17])
def test_a_batch_of_any_size_gives_the_same_features(plain, runtime, count):
    for images in (IMAGES[:count], IMAGES[-count:]):
        expected = plain.encode_images(pixels_of(images))
        for features in (
            runtime.encode_images(pixels_of(images)),
            runtime.encode_bytes(images, TABLE),
            plain.encode_bytes(images, TABLE),
        ):
            torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


def test_features_are_not_overwritten_by_the_next_batch(runtime):
    first = runtime.encode_images(pixels_of(IMAGES[:2]))
    kept = first.clone()
    runtime.encode_images(pixels_of(IMAGES[2:4]))
    assert torch.equal(first, kept)


def test_batches_share_the_recording_of_the_next_larger_size(runtime, recorder):
    for count in (5, 6, 5):
        runtime.encode_images(pixels_of(IMAGES[:count]))
    assert runtime.graphs.num_graphs == 1
    assert recorder.events.count("replay") == 3
    runtime.encode_images(pixels_of(IMAGES[:7]))
    assert runtime.graphs.num_graphs == 2


def test_the_padding_never_costs_more_than_half_of_the_batch():
    sizes = {count: min(size for size in BUCKETS if size >= count) for count in range(1, 17)}
    assert all(2 * size <= 3 * count for count, size in sizes.items())


def test_a_batch_above_the_largest_size_is_not_recorded(runtime, recorder):
    runtime.encode_images(pixels_of(IMAGES[: BUCKETS[-1] + 1]))
    assert recorder.events == []


def test_two_tables_are_two_recordings(runtime):
    darker = TABLE - 1
    features = [runtime.encode_bytes(IMAGES[:1], table) for table in (TABLE, darker, TABLE)]
    assert torch.equal(features[0], features[2])
    assert not torch.allclose(features[0], features[1], atol=1e-3)


def test_weights_that_were_moved_are_laid_out_for_speed_again(plain, monkeypatch):
    before = plain.encode_images(pixels_of(IMAGES[:1]))
    laid_out = []
    monkeypatch.setattr(plain.network, "prepare_for_inference", lambda: laid_out.append(True))
    plain.park()
    plain.resume()
    assert laid_out == [True]
    assert torch.equal(plain.encode_images(pixels_of(IMAGES[:1])), before)


def features_of(runtime, count, value=None):
    """Visual tokens of so many images, random or all of one value."""
    shape = (count, 4, runtime.network.config.text.d_model)
    torch.manual_seed(7)
    values = torch.randn(shape) if value is None else torch.full(shape, value)
    return list(values.to(runtime.network.dtype))


def answers_of(runtime, prompts=PROMPTS):
    count = len(prompts)
    features = features_of(runtime, count)
    session = runtime.start(features, prompts, SETTINGS.num_beams, max(LIMITS))
    found = generate(session, runtime.decode_batch(SETTINGS), LIMITS[:count])
    return [answer.token_ids for answer in found]


def test_steps_are_recorded_where_work_is(runtime, plain):
    assert isinstance(runtime.decode_batch(SETTINGS), RecordedBatch)
    with runtime.graphs.paused():
        assert type(runtime.decode_batch(SETTINGS)) is DecodeBatch
    assert type(plain.decode_batch(SETTINGS)) is DecodeBatch


def test_recorded_or_not_the_answers_are_the_same(runtime):
    recorded = [answers_of(runtime) for _ in range(3)]
    assert runtime.graphs.num_graphs > 0
    with runtime.graphs.paused():
        assert recorded == [answers_of(runtime)] * 3
    assert all(len(tokens) > 5 for tokens in recorded[0])


def test_in_reduced_precision_too(network, recorder):
    runtime = TorchRuntime(copy.deepcopy(network), CPU, "bf16", graphs=GraphRunner(recorder))
    recorded = [answers_of(runtime) for _ in range(3)]
    assert runtime.graphs.num_graphs > 1
    with runtime.graphs.plainly():
        assert recorded == [answers_of(runtime)] * 3


@pytest.mark.parametrize("leave", ["park", "free_memory", "close"])
def test_all_that_is_recorded_is_given_up_when_memory_is(runtime, recorder, leave):
    expected = answers_of(runtime)
    runtime.encode_images(pixels_of(IMAGES[:1]))
    assert runtime.batch_pool.idle_bytes > 0
    assert recorder.num_alive > 1
    getattr(runtime, leave)()
    assert runtime.batch_pool.idle_bytes == recorder.num_alive == runtime.graphs.num_graphs == 0
    if leave != "close":
        runtime.resume()
        assert answers_of(runtime) == expected


def test_recorded_prompts_have_few_lengths_and_sizes(runtime):
    lengths = set()
    for count in (1, 2, 3, 3, 4):
        for words in (3, 8, 20):
            ids = [0, *[5] * words, 2]
            session = runtime.start(features_of(runtime, count, 0.0), [ids] * count, 3, 9)
            session.prefill()
            lengths.add(session.cross_length)
    assert lengths == {PROMPT_LENGTHS}
    assert runtime.graphs.num_graphs == 3


def test_recorded_prompts_keep_no_more_memory_than_they_may(runtime, recorder):
    prompts = runtime.prompt_graphs

    def start(beams):
        return runtime.start(features_of(runtime, 1, 0.0), PROMPTS[:1], beams, 9).prefill()

    expected = start(1)
    each = prompts.num_bytes
    assert each > 0
    prompts.max_bytes = 3 * each
    for beams in (2, 3, 1, 4):
        start(beams)
        assert prompts.num_bytes <= 3 * each
    # Of 1, 2, 3 and 4 beams those of 2 were not asked for any longer.
    assert runtime.graphs.num_graphs == recorder.num_alive == 3
    prompts.max_bytes = 0
    assert torch.equal(start(1), expected)
    assert prompts.num_bytes > 0
    start(5)
    assert runtime.graphs.num_graphs == recorder.num_alive == 1


def test_a_session_is_its_own_whatever_is_recorded_after_it(runtime):
    features = features_of(runtime, 2)

    def parts_of(session):
        return [part.clone() for cache in session.caches() for part in cache]

    first = runtime.start(features[:1], PROMPTS[:1], 3, 9)
    logits, before = first.prefill(), parts_of(first)
    runtime.start(features[1:], PROMPTS[1:2], 3, 9)
    for part, expected in zip(parts_of(first), before, strict=True):
        assert torch.equal(part, expected)
    with runtime.graphs.paused():
        plain = runtime.start(features[:1], PROMPTS[:1], 3, 9)
        torch.testing.assert_close(plain.prefill(), logits)


def test_a_prompt_is_never_padded_beyond_what_the_network_reads(runtime):
    limit = runtime.network.config.text.max_position_embeddings
    ids = [0, *[5] * (limit - 6), 2]
    session = runtime.start(features_of(runtime, 1, 0.0), [ids], 1, 9)
    assert session.cross_length == limit


def test_a_recorded_session_is_prefilled_once(runtime):
    session = runtime.start(features_of(runtime, 1), PROMPTS[:1], 1, 9)
    session.prefill()
    with pytest.raises(RuntimeError, match="prefill comes once"):
        session.prefill()


def test_prompts_together_are_answered_as_alone(runtime, plain):
    together = answers_of(runtime)
    assert answers_of(runtime, PROMPTS[:1]) == together[:1]
    assert answers_of(plain) == together
