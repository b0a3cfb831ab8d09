"""The runtime and the engine on a GPU: graphs, precisions, parking and batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from florence2 import Ask, Florence2
from florence2.engine.loading import TOLERANCE, CudaMeter, error_against_fp32
from florence2.network.config import base_config
from florence2.network.florence import Florence2Network
from florence2.pixels import ImageProcessor
from florence2.runtimes.device import PRECISIONS
from florence2.runtimes.torch import TorchRuntime
from florence2_demo.drawing import draw_scene
from florence2_demo.scene import make_scene

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
TABLE = ImageProcessor().lookup_table
IMAGES = np.random.default_rng(4).integers(0, 256, (18, 192, 192, 3), dtype=np.uint8)
ROUNDING = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 4e-2}
TASKS = ("<OD>", "<CAPTION>", "<REGION_PROPOSAL>", "<OCR>")


def pixels_of(images):
    values = np.stack([TABLE[channel][images[..., channel]] for channel in range(3)], axis=1)
    return np.ascontiguousarray(values)


def error(found, expected):
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(9)
    return Florence2Network(base_config())


def copy_of(network):
    copy = Florence2Network(network.config)
    copy.load_state_dict(network.state_dict())
    return copy


@pytest.fixture(params=PRECISIONS)
def runtime(request, network):
    copy = copy_of(network)
    runtime = TorchRuntime(copy, CUDA, request.param)
    with runtime.computing():
        yield runtime
    copy.to("meta")
    torch.cuda.empty_cache()


@pytest.mark.parametrize("count", [1, 2, 5, 16, 18])
def test_graphs_on_is_graphs_off(runtime, count):
    images = IMAGES[:count]
    for _ in range(2):
        found = runtime.encode_bytes(images, TABLE)
    with runtime.graphs.paused():
        expected = runtime.encode_bytes(images, TABLE)
    assert runtime.graphs.num_graphs == (count <= 16)
    assert error(found, expected) < ROUNDING[runtime.precision]
    assert error(runtime.encode_images(pixels_of(images)), expected) < ROUNDING[runtime.precision]


def test_a_batch_is_its_images_one_by_one(runtime):
    together = runtime.encode_bytes(IMAGES[:5], TABLE)
    for place in range(5):
        alone = runtime.encode_bytes(IMAGES[place : place + 1], TABLE)
        assert error(together[place], alone[0]) < ROUNDING[runtime.precision]


def test_precisions_are_close_to_float32(runtime):
    assert error_against_fp32(runtime, pixels_of(IMAGES[:1])) < TOLERANCE[runtime.precision]


def test_float32_is_the_cpus(network):
    expected = TorchRuntime(network, torch.device("cpu"), "fp32").encode_images(
        pixels_of(IMAGES[:2])
    )
    runtime = TorchRuntime(copy_of(network), CUDA, "fp32")
    with runtime.computing():
        found = runtime.encode_images(pixels_of(IMAGES[:2]))
    assert error(found.cpu(), expected) < 1e-5


def test_parking_gives_the_memory_back_and_the_features_stay(runtime):
    before = runtime.encode_bytes(IMAGES[:3], TABLE).cpu()
    runtime.park()
    assert runtime.graphs.num_graphs == 0
    assert CudaMeter(CUDA).peak_bytes(lambda: None) == 0
    runtime.resume()
    assert error(runtime.encode_bytes(IMAGES[:3], TABLE).cpu(), before) < 1e-6


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_the_demo_answers_alike_with_and_without_graphs(precision):
    model = Florence2.load("demo", device="cuda", precision=precision)
    asks = [
        Ask(draw_scene(make_scene(seed)), task, num_beams=beams)
        for seed in (1, 2, 3)
        for task in TASKS
        for beams in (1, 3)
    ]
    recorded = model.run_many(asks)
    model.engine.cache.clear()
    with model.engine.runtime.graphs.paused():
        eager = model.run_many(asks)
    same = [one.token_ids == other.token_ids for one, other in zip(recorded, eager, strict=True)]
    # Reduced precision rounds by the shape of the batch, which may tip a near tie.
    assert all(same) if precision == "fp32" else np.mean(same) > 0.8
    model.close()


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_recordings_pass_the_check_at_load(precision, caplog):
    model = Florence2.load("demo", device="cuda", precision=precision)
    assert model.engine.runtime.graphs.is_enabled
    assert "CUDA graphs are off" not in caplog.text
    model.close()


def test_a_variable_turns_recording_off(monkeypatch):
    monkeypatch.setenv("FLORENCE2_CUDA_GRAPHS", "0")
    model = Florence2.load("demo", device="cuda", precision="fp32")
    answers = model.run_many([Ask(draw_scene(make_scene(1)), task) for task in TASKS])
    assert all(answer.token_ids for answer in answers)
    assert model.engine.runtime.graphs.num_graphs == 0
    model.close()


def test_the_encoder_and_the_first_pass_are_recorded(network):
    runtime = TorchRuntime(copy_of(network), CUDA, "fp32")
    features = list(runtime.encode_bytes(IMAGES[:3], TABLE))
    prompts = [[0, 5, 6, 2], [0, 9, 8, 7, 4, 2], [0, 2]]
    for count in (1, 2, 3):
        with runtime.computing():
            session = runtime.start(features[:count], prompts[:count], 3, 20)
            found = session.prefill()
            with runtime.graphs.paused():
                plain = runtime.start(features[:count], prompts[:count], 3, 20)
                expected = plain.prefill()
        assert error(found, expected) < ROUNDING["fp32"]
    assert runtime.graphs.is_enabled


def test_float32_products_are_exact_whatever_the_host_program_chose(network):
    runtime = TorchRuntime(copy_of(network), CUDA, "fp32")
    features = list(runtime.encode_bytes(IMAGES[:1], TABLE))

    def logits():
        with runtime.computing(), runtime.graphs.paused():
            return runtime.start(features, [[0, 5, 6, 2]], 1, 20).prefill()

    expected = logits()
    torch.set_float32_matmul_precision("high")
    try:
        assert torch.equal(logits(), expected)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_float32_gives_the_tokens_of_the_cpu():
    asks = [Ask(draw_scene(make_scene(seed)), task) for seed in (1, 2, 3) for task in TASKS]
    answers = []
    for device in ("cpu", "cuda"):
        model = Florence2.load("demo", device=device, precision="fp32")
        answers.append([result.token_ids for result in model.run_many(asks)])
        model.close()
    assert answers[0] == answers[1]


def test_batches_are_measured_and_fit():
    model = Florence2.load("demo", device="cuda")
    engine = model.engine
    assert 1 <= engine.image_batch <= 64
    assert 1 <= engine.prompt_batch <= 128
    pictures = [draw_scene(make_scene(seed)) for seed in range(engine.image_batch)]
    asks = [Ask(pictures[n % len(pictures)], "<OD>") for n in range(engine.prompt_batch)]
    assert all(result.task == "<OD>" for result in model.run_many(asks))
    model.close()
