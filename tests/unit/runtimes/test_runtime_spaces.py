"""Where a runtime searches, what it gives up with its memory, and what it tells a session."""

from __future__ import annotations

import pytest
import torch
from taping import TapingRecorder

from florence2.generation.beam_search import PREFIX
from florence2.generation.decode import PlainSpace, generate
from florence2.network.config import tiny_config
from florence2.network.florence import Florence2Network
from florence2.records import GenerationSettings
from florence2.runtimes.cuda_graphs import LENGTHS, GraphRunner
from florence2.runtimes.decode_graphs import GraphSpace
from florence2.runtimes.torch import TorchRuntime

CPU = torch.device("cpu")
SETTINGS = GenerationSettings(num_beams=3)
PROMPTS = [[0, 5, 6, 7, 2], [0, 9, 2], [0, 8, 8, 8, 8, 8, 2]]
LIMITS = [20, 20, 20]


@pytest.fixture
def network():
    torch.manual_seed(5)
    network = Florence2Network(tiny_config())
    for weight in network.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=1.5 / weight.shape[1] ** 0.5)
    return network


@pytest.fixture
def recorder():
    return TapingRecorder()


@pytest.fixture
def runtime(network, recorder):
    return TorchRuntime(network, CPU, "fp32", graphs=GraphRunner(recorder))


def answers_of(runtime, prompts=PROMPTS):
    torch.manual_seed(7)
    width = runtime.network.config.text.d_model
    features = [torch.randn(4, width) for _ in prompts]
    session = runtime.start(features, prompts, SETTINGS.num_beams, max(LIMITS))
    count = len(prompts)
    space = runtime.space(SETTINGS, None)
    found = generate(session, count, SETTINGS, LIMITS[:count], space=space)
    return [answer.token_ids for answer in found]


def test_steps_are_recorded_where_work_is(network, runtime):
    assert isinstance(runtime.space(SETTINGS, None), GraphSpace)
    assert isinstance(TorchRuntime(network, CPU, "fp32").space(SETTINGS, None), PlainSpace)
    with runtime.graphs.paused():
        assert isinstance(runtime.space(SETTINGS, None), PlainSpace)


def test_recorded_or_not_the_answers_are_the_same(runtime):
    recorded = [answers_of(runtime) for _ in range(3)]
    assert runtime.graphs.num_graphs > 0
    with runtime.graphs.paused():
        assert recorded == [answers_of(runtime)] * 3
    assert all(len(tokens) > 5 for tokens in recorded[0])


def test_in_reduced_precision_too(network, recorder):
    runtime = TorchRuntime(network, CPU, "bf16", graphs=GraphRunner(recorder))

    def answers():
        torch.manual_seed(7)
        features = [torch.randn(4, network.config.text.d_model).bfloat16() for _ in PROMPTS]
        session = runtime.start(features, PROMPTS, SETTINGS.num_beams, max(LIMITS))
        space = runtime.space(SETTINGS, None)
        found = generate(session, len(PROMPTS), SETTINGS, LIMITS, space=space)
        return [answer.token_ids for answer in found]

    recorded = [answers() for _ in range(3)]
    assert runtime.graphs.num_graphs > 1
    with runtime.graphs.plainly():
        assert recorded == [answers()] * 3


@pytest.mark.parametrize("leave", ["park", "free_memory", "close"])
def test_buffers_are_given_up_when_memory_is(runtime, recorder, leave):
    expected = answers_of(runtime)
    assert runtime._decode.idle_bytes > 0
    assert recorder.num_alive > 0
    getattr(runtime, leave)()
    assert runtime._decode.idle_bytes == recorder.num_alive == runtime.graphs.num_graphs == 0
    if leave != "close":
        runtime.resume()
        assert answers_of(runtime) == expected


def test_prompts_of_one_length_need_no_mask(network):
    runtime = TorchRuntime(network, CPU, "fp32")
    features = [torch.zeros(4, runtime.network.config.text.d_model)] * 3
    equal = runtime.start(features, [PROMPTS[0]] * 3, 3, 9)
    mixed = runtime.start(features, PROMPTS, 3, 9)
    assert equal._cross_mask is None
    hidden = torch.isinf(mixed._cross_mask[:, 0, 0]).sum(dim=1)
    assert hidden.tolist() == [2, 4, 0]


def test_recorded_prompts_have_few_lengths_and_sizes(runtime):
    width = runtime.network.config.text.d_model
    lengths = set()
    for count in (1, 2, 3, 3, 4):
        for words in (3, 8, 20):
            ids = [0, *[5] * words, 2]
            session = runtime.start([torch.zeros(4, width)] * count, [ids] * count, 3, 9)
            session.prefill(list(PREFIX))
            lengths.add(session.cross_length)
    assert lengths == {LENGTHS}
    assert runtime.graphs.num_graphs == 3


def test_recorded_prompts_keep_no_more_memory_than_they_may(network, recorder):
    runtime = TorchRuntime(network, CPU, "fp32", graphs=GraphRunner(recorder))
    prompts, width = runtime._prompts, network.config.text.d_model

    def start(beams):
        session = runtime.start([torch.zeros(4, width)], PROMPTS[:1], beams, 9)
        return session.prefill(list(PREFIX))

    expected = start(1)
    each = prompts.num_bytes
    assert each > 0
    prompts._max_bytes = 3 * each
    for beams in (2, 3, 1, 4):
        start(beams)
        assert prompts.num_bytes <= 3 * each
    # Of 1, 2, 3 and 4 beams those of 2 were not asked for any longer.
    assert runtime.graphs.num_graphs == recorder.num_alive == 3
    prompts._max_bytes = 0
    assert torch.equal(start(1), expected)
    assert prompts.num_bytes > 0
    start(5)
    assert runtime.graphs.num_graphs == recorder.num_alive == 1


def test_a_session_is_its_own_whatever_is_recorded_after_it(runtime):
    width = runtime.network.config.text.d_model
    torch.manual_seed(1)
    features = [torch.randn(4, width), torch.randn(4, width)]
    first = runtime.start(features[:1], PROMPTS[:1], 3, 9)
    before = [part.clone() for part in (first.prefill(list(PREFIX)), *first.layer_tensors())]
    runtime.start(features[1:], PROMPTS[1:2], 3, 9)
    for part, expected in zip(first.layer_tensors(), before[1:], strict=True):
        assert torch.equal(part, expected)
    with runtime.graphs.paused():
        plain = runtime.start(features[:1], PROMPTS[:1], 3, 9)
        torch.testing.assert_close(plain.prefill(list(PREFIX)), before[0])


def test_a_prompt_is_never_padded_beyond_what_the_network_reads(runtime):
    limit = runtime.network.config.text.max_position_embeddings
    width = runtime.network.config.text.d_model
    ids = [0, *[5] * (limit - 6), 2]
    session = runtime.start([torch.zeros(4, width)], [ids], 1, 9)
    assert session.cross_length == limit


@pytest.mark.parametrize("prefix", [(), (2,), (0, 2), (2, 0, 5)])
def test_a_recorded_session_has_the_prefix_of_all_answers(runtime, prefix):
    width = runtime.network.config.text.d_model
    session = runtime.start([torch.zeros(4, width)], PROMPTS[:1], 1, 9)
    with pytest.raises(RuntimeError, match="prefix"):
        session.prefill(list(prefix))


def test_prompts_together_are_answered_as_alone(runtime):
    together = answers_of(runtime)
    assert answers_of(runtime, PROMPTS[:1]) == together[:1]
