"""The tower through recordings gives what it gives without, for every batch size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from replaying import ReplayingRecorder

from florence2.network.config import tiny_config
from florence2.network.florence import Florence2Network
from florence2.pixels import ImageProcessor
from florence2.runtimes.cuda_graphs import VISION_BUCKETS as BUCKETS
from florence2.runtimes.cuda_graphs import GraphRunner, VisionGraphs
from florence2.runtimes.torch import TorchRuntime

CPU = torch.device("cpu")
RNG = np.random.default_rng(3)
IMAGES = RNG.integers(0, 256, (20, 48, 48, 3), dtype=np.uint8)
TABLE = ImageProcessor().lookup_table


def pixels_of(images):
    values = np.stack([TABLE[channel][images[..., channel]] for channel in range(3)], axis=1)
    return np.ascontiguousarray(values)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(5)
    return Florence2Network(tiny_config())


@pytest.fixture(scope="module")
def plain(network):
    return TorchRuntime(network, CPU, "fp32")


@pytest.fixture
def recorder():
    return ReplayingRecorder()


@pytest.fixture
def recorded(network, recorder):
    return TorchRuntime(network, CPU, "fp32", graphs=GraphRunner(recorder))


@pytest.mark.parametrize("count", [1, 2, 5, 7, 16, 17])
def test_a_batch_of_any_size_gives_the_same_features(plain, recorded, count):
    for images in (IMAGES[:count], IMAGES[-count:]):
        expected = plain.encode_images(pixels_of(images))
        for features in (
            recorded.encode_images(pixels_of(images)),
            recorded.encode_bytes(images, TABLE),
            plain.encode_bytes(images, TABLE),
        ):
            torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


def test_features_are_not_overwritten_by_the_next_batch(recorded):
    first = recorded.encode_images(pixels_of(IMAGES[:2]))
    kept = first.clone()
    recorded.encode_images(pixels_of(IMAGES[2:4]))
    assert torch.equal(first, kept)


def test_batches_share_the_recording_of_the_next_larger_size(recorded, recorder):
    for count in (5, 6, 5):
        recorded.encode_images(pixels_of(IMAGES[:count]))
    assert recorded.graphs.num_graphs == 1
    assert recorder.events.count("replay") == 3
    recorded.encode_images(pixels_of(IMAGES[:7]))
    assert recorded.graphs.num_graphs == 2


def test_the_padding_never_costs_more_than_half_of_the_batch():
    sizes = {count: min(size for size in BUCKETS if size >= count) for count in range(1, 17)}
    assert all(2 * size <= 3 * count for count, size in sizes.items())


def test_a_batch_above_the_largest_size_is_not_recorded(recorded, recorder):
    recorded.encode_images(pixels_of(IMAGES[: BUCKETS[-1] + 1]))
    assert recorder.events == []


def test_the_rows_that_fill_a_batch_up_are_copies_of_its_first_image():
    seen = []
    graphs = VisionGraphs(GraphRunner(ReplayingRecorder()), buckets=(4,))

    def encode(received):
        seen.append(received.clone())
        return received * 2

    received = torch.tensor([[1.0], [2.0]])
    assert graphs.run("twice", received, encode).tolist() == [[2.0], [4.0]]
    assert seen[-1].tolist() == [[1.0], [2.0], [1.0], [1.0]]


def test_two_tables_are_two_recordings(recorded):
    darker = TABLE - 1
    features = [recorded.encode_bytes(IMAGES[:1], table) for table in (TABLE, darker, TABLE)]
    assert torch.equal(features[0], features[2])
    assert not torch.allclose(features[0], features[1], atol=1e-3)


@pytest.mark.parametrize("leave", ["park", "free_memory", "close"])
def test_recordings_are_given_up_when_memory_is(network, recorder, leave):
    runtime = TorchRuntime(
        Florence2Network(network.config), CPU, "fp32", graphs=GraphRunner(recorder)
    )
    runtime.encode_images(pixels_of(IMAGES[:1]))
    assert recorder.num_alive == 1
    getattr(runtime, leave)()
    assert recorder.num_alive == runtime.graphs.num_graphs == 0


def test_weights_that_were_moved_are_laid_out_for_speed_again(network, monkeypatch):
    runtime = TorchRuntime(Florence2Network(network.config), CPU, "fp32")
    before = runtime.encode_images(pixels_of(IMAGES[:1]))
    laid_out = []
    monkeypatch.setattr(runtime.network, "prepare_for_inference", lambda: laid_out.append(True))
    runtime.park()
    runtime.resume()
    assert laid_out == [True]
    assert torch.equal(runtime.encode_images(pixels_of(IMAGES[:1])), before)
