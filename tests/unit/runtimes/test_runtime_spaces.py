"""Where a runtime searches, what it gives up with its memory, and what it tells a session."""

from __future__ import annotations

import pytest
import torch
from taping import TapingRecorder

from florence2.generate import generate
from florence2.network.florence import Florence2Network
from florence2.network.presets import tiny_config
from florence2.records import GenerationSettings
from florence2.runtimes.decode_graphs import GraphSpace
from florence2.runtimes.graphs import GraphRunner
from florence2.runtimes.torch import TorchRuntime
from florence2.space import PlainSpace

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


def test_prompts_of_one_length_need_no_mask(runtime):
    features = [torch.zeros(4, runtime.network.config.text.d_model)] * 3
    equal = runtime.start(features, [PROMPTS[0]] * 3, 3, 9)
    mixed = runtime.start(features, PROMPTS, 3, 9)
    assert equal._cross_mask is None
    hidden = torch.isinf(mixed._cross_mask[:, 0, 0]).sum(dim=1)
    assert hidden.tolist() == [2, 4, 0]


def test_prompts_together_are_answered_as_alone(runtime):
    together = answers_of(runtime)
    assert answers_of(runtime, PROMPTS[:1]) == together[:1]
