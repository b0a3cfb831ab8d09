"""How many images and prompts go through the network at once, as said or as measured."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from recorders import CPU

from florence2 import Florence2
from florence2.checkpoint.checkpoint import load_weights, open_checkpoint
from florence2.engine import loading
from florence2.engine.batch_sizes import (
    MOST_IMAGES,
    MOST_PROMPTS,
    BatchSizes,
    Cost,
    fit_batch,
    image_batch,
    measure_cost,
    measured_batches,
    prompt_batch,
)
from florence2.network.config import base_config, large_config
from florence2.runtimes.cuda_graphs import GraphRunner
from florence2.runtimes.torch import VISION_BUCKETS as BUCKETS
from florence2.runtimes.torch import TorchRuntime
from florence2_demo.checkpoint import demo_config

MIB = 2**20

PRESETS = {
    "base": (base_config(), (768, 768)),
    "large": (large_config(), (768, 768)),
    "demo": (demo_config(1024), (192, 192)),
}
ON_A_CPU = {"base": (1, 8), "large": (1, 8), "demo": (8, 32)}


def sizes(preset, device_type):
    config, size_wh = PRESETS[preset]
    checkpoint = SimpleNamespace(config=config, image_processor=SimpleNamespace(size_wh=size_wh))
    return image_batch(checkpoint, device_type), prompt_batch(checkpoint, device_type)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_cpu_has_batches_by_the_network_and_a_gpu_one_size_until_memory_is_measured(preset):
    assert sizes(preset, "cpu") == ON_A_CPU[preset]
    assert sizes(preset, "cuda") == (16, 32)


FITTING = {
    # name: (free, fixed, per item, most), expected
    "what is free over what one costs": ((100, 0, 10, 64), 10),
    "rounded down": ((109, 0, 10, 64), 10),
    "the fixed part is taken off first": ((100, 25, 10, 64), 7),
    "never above the bound": ((10_000, 0, 10, 64), 64),
    "one always": ((5, 0, 10, 64), 1),
    "one when not even the fixed part fits": ((10, 50, 10, 64), 1),
    "items that cost nothing": ((100, 50, 0, 64), 64),
    "items that cost nothing without room": ((10, 50, 0, 64), 1),
}


@pytest.mark.parametrize(("numbers", "expected"), FITTING.values(), ids=FITTING)
def test_a_batch_fits(numbers, expected):
    assert fit_batch(*numbers) == expected


class FakeMeter:
    """Memory of a device that does not exist: what each size of batch takes is given."""

    def __init__(self, free_bytes=0, image=(0, 0), prompt=(0, 0)):
        self.free = free_bytes
        self.costs = {"image": image, "prompt": prompt}
        self.running = None
        self.counts = {"image": [], "prompt": []}

    def free_bytes(self):
        return self.free

    def saw(self, kind, count):
        self.running = kind, count

    def peak_bytes(self, work):
        work()
        kind, count = self.running
        self.counts[kind].append(count)
        fixed, each = self.costs[kind]
        return fixed + count * each


LINES = {
    # name: (fixed, each) of the device, what is measured
    "through the origin": ((0, 10), Cost(0, 10)),
    "with a fixed part": ((50, 3), Cost(50, 3)),
    "flat": ((40, 0), Cost(40, 0)),
    "shrinking counts as flat": ((100, -10), Cost(90, 0)),
}


@pytest.mark.parametrize(("line", "expected"), LINES.values(), ids=LINES)
def test_the_cost_is_the_line_through_two_peaks(line, expected):
    meter, prepared = FakeMeter(image=line), []
    found = measure_cost(meter, lambda n: meter.saw("image", n), lambda: prepared.append(1))
    assert (found, len(prepared)) == (expected, 2)


@pytest.fixture(scope="module")
def checkpoint(small_folder):
    return open_checkpoint(small_folder)


@pytest.fixture
def recorded(checkpoint, recorder):
    """A runtime that records as on a GPU, and keeps no memory for what is idle."""
    network = load_weights(checkpoint, torch.float32)
    runtime = TorchRuntime(network, CPU, "fp32", GraphRunner(recorder))
    runtime.most_idle_bytes = runtime.most_prompt_bytes = 0
    return runtime


def test_what_is_recorded_and_kept_idle_is_not_free(checkpoint, recorded, recorder):
    recorded.most_idle_bytes, recorded.most_prompt_bytes = 150 * MIB, 50 * MIB
    alive = []

    class Meter(FakeMeter):
        def free_bytes(self):
            alive.append(recorder.num_alive)
            return 1000 * MIB

        def peak_bytes(self, work):
            assert recorder.num_alive == 0
            work()
            return 10 * MIB

    found = measured_batches(checkpoint, recorded, Meter(), reserved_bytes=790 * MIB)
    assert found == BatchSizes(images=1, prompts=1)
    # Recorded at the largest size that fits, and then what is free is asked again.
    assert alive == [0, 1]
    [key] = recorded.graphs.keys
    assert key[:3:2] == ("vision", 1)


@pytest.mark.parametrize(
    ("each_mib", "images", "bucket"), [(20, 17, BUCKETS[-1]), (50, 7, 6), (200, 1, 1), (400, 1, 1)]
)
def test_no_pass_is_recorded_that_is_larger_than_what_fits(
    checkpoint, recorded, monkeypatch, each_mib, images, bucket
):
    counts, encode = [], recorded.encode_bytes

    class Meter(FakeMeter):
        def peak_bytes(self, work):
            counts.clear()
            work()
            return counts[-1] * each_mib * MIB if counts else 0

    def encode_bytes(batch, table):
        counts.append(len(batch))
        return encode(batch, table)

    monkeypatch.setattr(recorded, "encode_bytes", encode_bytes)
    assert measured_batches(checkpoint, recorded, Meter(1000 * MIB)).images == images
    [key] = recorded.graphs.keys
    assert key[:3:2] == ("vision", bucket)


def test_prompts_fill_the_rows_they_are_rounded_up_to(checkpoint, recorded):
    # 45 % of the memory is 37 of the longest answers, which would take the rows of 48.
    text = checkpoint.config.text
    longest = 2 * text.decoder_layers * text.d_model * text.max_position_embeddings * 3 * 4
    meter = FakeMeter(int(37.5 * longest / 0.45))
    meter.peak_bytes = lambda work: 0 * (work() is None)
    assert measured_batches(checkpoint, recorded, meter).prompts == 32


@pytest.fixture(scope="module")
def engine(checkpoint_folder):
    return Florence2.load(checkpoint_folder, device="cpu").engine


# Keys and values, 3 layers, 192 wide, 512 positions at most, 3 beams, 4 bytes.
LONGEST_ANSWER = 2 * 3 * 192 * 512 * 3 * 4
PROMPT = 9 * MIB - LONGEST_ANSWER + MIB
MEASURED = {
    # name: (free MiB, image, prompt as (fixed, each), most that fit, reserved MiB), batches
    # 350 MiB for images: (350 - 50) / 20; 450 MiB for prompts: (450 - 30) / 10.
    "by real passes": (1000, (50 * MIB, 20 * MIB), (30 * MIB, PROMPT), 100, 0, (15, 42)),
    # 400 MiB: 140 / 20 and 180 / 10.
    "what is reserved is left alone": (1000, (0, 20 * MIB), (0, PROMPT), 100, 600, (7, 18)),
    "a large device": (10**6, (0, MIB), (0, MIB), 100, 0, (MOST_IMAGES, MOST_PROMPTS)),
    "no room for the larger batch": (1000, (0, 10 * MIB), (0, MIB), 1, 0, (35, 1)),
}


@pytest.mark.parametrize(
    ("free_mib", "image", "prompt", "most", "reserved_mib", "batches"),
    MEASURED.values(),
    ids=MEASURED,
)
def test_both_batches_follow_from_what_passes_take(
    engine, monkeypatch, free_mib, image, prompt, most, reserved_mib, batches
):
    meter = FakeMeter(free_mib * MIB, image, prompt)
    runtime, encode, start = engine.runtime, engine.runtime.encode_images, engine.runtime.start

    def encode_images(pixels):
        meter.saw("image", len(pixels))
        return encode(pixels)

    def started(features, *rest):
        if len(features) > most:
            raise torch.OutOfMemoryError("no memory left")
        meter.saw("prompt", len(features))
        return start(features, *rest)

    monkeypatch.setattr(runtime, "encode_images", encode_images)
    monkeypatch.setattr(runtime, "start", started)
    sizes = measured_batches(engine.checkpoint, runtime, meter, reserved_mib * MIB)
    assert (sizes.images, sizes.prompts) == batches
    assert meter.counts == {"image": [1, 4], "prompt": [1, 4] if most > 1 else [1]}


def test_on_a_cpu_nothing_is_measured(checkpoint_folder, monkeypatch):
    monkeypatch.setattr(loading, "measured_batches", None)
    for name in (checkpoint_folder, "demo"):
        engine = Florence2.load(name, device="cpu").engine
        assert (engine.image_batch, engine.prompt_batch) == ON_A_CPU["demo"]
        assert engine.checkpoint.image_processor.size_wh == PRESETS["demo"][1]
