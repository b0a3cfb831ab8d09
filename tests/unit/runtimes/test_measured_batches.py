"""Batches follow from what one more image or prompt was measured to cost."""

from __future__ import annotations

import pytest
import torch
from taping import TapingRecorder

from florence2 import Florence2
from florence2.checkpoint.checkpoint import load_weights, open_checkpoint
from florence2.engine import loading
from florence2.runtimes import memory as batch_sizes
from florence2.runtimes.cuda_graphs import VISION_BUCKETS as BUCKETS
from florence2.runtimes.cuda_graphs import GraphRunner
from florence2.runtimes.memory import (
    MOST_IMAGES,
    MOST_PROMPTS,
    BatchSizes,
    Cost,
    fit_batch,
    measure_cost,
    measured_batches,
)
from florence2.runtimes.torch import TorchRuntime

MIB = 2**20

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


def test_what_is_recorded_and_kept_idle_is_not_free(sane_folder):
    checkpoint = open_checkpoint(sane_folder)
    recorder = TapingRecorder()
    runtime = TorchRuntime(
        load_weights(checkpoint, torch.float32), torch.device("cpu"), "fp32", GraphRunner(recorder)
    )
    runtime.most_idle_bytes, runtime.most_prompt_bytes = 150 * MIB, 50 * MIB
    alive = []

    class Meter(FakeMeter):
        def free_bytes(self):
            alive.append(recorder.num_alive)
            return 1000 * MIB

        def peak_bytes(self, work):
            assert recorder.num_alive == 0
            work()
            return 10 * MIB

    assert measured_batches(checkpoint, runtime, Meter(), reserved_bytes=790 * MIB) == (
        BatchSizes(images=1, prompts=1)
    )
    # Recorded at the largest size that fits, and then what is free is asked again.
    assert alive == [0, 1]
    [key] = runtime.graphs._held
    assert key[:3:2] == ("vision", 1)


@pytest.mark.parametrize(
    ("each_mib", "free_mib", "images", "recorded"),
    [(20, 1000, 17, BUCKETS[-1]), (50, 1000, 7, 6), (200, 1000, 1, 1), (400, 1000, 1, 1)],
)
def test_no_pass_is_recorded_that_is_larger_than_what_fits(
    sane_folder, each_mib, free_mib, images, recorded
):
    checkpoint = open_checkpoint(sane_folder)
    runtime = TorchRuntime(
        load_weights(checkpoint, torch.float32),
        torch.device("cpu"),
        "fp32",
        GraphRunner(TapingRecorder()),
    )
    runtime.most_idle_bytes = runtime.most_prompt_bytes = 0
    sizes = []
    encode = runtime.encode_bytes

    class Meter(FakeMeter):
        def free_bytes(self):
            return free_mib * MIB

        def peak_bytes(self, work):
            sizes.clear()
            work()
            return len(sizes[-1]) * each_mib * MIB if sizes else 0

    def encode_bytes(batch, table):
        sizes.append(batch)
        return encode(batch, table)

    runtime.encode_bytes = encode_bytes
    assert measured_batches(checkpoint, runtime, Meter()).images == images
    [key] = runtime.graphs._held
    assert key[:3:2] == ("vision", recorded)


def test_prompts_fill_the_rows_they_are_rounded_up_to(sane_folder, monkeypatch):
    checkpoint = open_checkpoint(sane_folder)
    runtime = TorchRuntime(
        load_weights(checkpoint, torch.float32),
        torch.device("cpu"),
        "fp32",
        GraphRunner(TapingRecorder()),
    )
    runtime.most_idle_bytes = runtime.most_prompt_bytes = 0
    monkeypatch.setattr(batch_sizes, "_longest_answer_bytes", lambda *_: 12 * MIB)
    meter = FakeMeter(1000 * MIB)
    meter.peak_bytes = lambda work: 0 * (work() is None)
    # 450 MiB / 12 MiB are 37 prompts, which would take the rows of 48.
    assert measured_batches(checkpoint, runtime, meter).prompts == 32


@pytest.fixture
def model(sane_folder):
    return Florence2.load(sane_folder, device="cpu")


def measured(model, monkeypatch, meter, no_memory_above=100, reserved_bytes=0):
    """The batches of a model whose passes tell the meter what they were."""
    runtime = model.engine.runtime
    encode, start = runtime.encode_images, runtime.start

    def encode_images(pixels):
        meter.saw("image", len(pixels))
        return encode(pixels)

    def started(features, *rest):
        if len(features) > no_memory_above:
            raise torch.OutOfMemoryError("no memory left")
        meter.saw("prompt", len(features))
        return start(features, *rest)

    monkeypatch.setattr(runtime, "encode_images", encode_images)
    monkeypatch.setattr(runtime, "start", started)
    monkeypatch.setattr(batch_sizes, "_longest_answer_bytes", lambda *_: MIB)
    return measured_batches(model.engine.checkpoint, runtime, meter, reserved_bytes)


def test_both_batches_follow_from_real_passes(model, monkeypatch):
    meter = FakeMeter(1000 * MIB, image=(50 * MIB, 20 * MIB), prompt=(30 * MIB, 9 * MIB))
    sizes = measured(model, monkeypatch, meter)
    assert meter.counts == {"image": [1, 4], "prompt": [1, 4]}
    # 350 MiB for images: (350 - 50) / 20; 450 MiB for prompts: (450 - 30) / (9 + 1).
    assert (sizes.images, sizes.prompts) == (15, 42)


def test_what_is_reserved_is_left_alone(model, monkeypatch):
    meter = FakeMeter(1000 * MIB, image=(0, 20 * MIB), prompt=(0, 9 * MIB))
    sizes = measured(model, monkeypatch, meter, reserved_bytes=600 * MIB)
    # 400 MiB: 140 / 20 and 180 / (9 + 1).
    assert (sizes.images, sizes.prompts) == (7, 18)


def test_a_large_device_is_filled_up_to_the_bounds_only(model, monkeypatch):
    meter = FakeMeter(10**6 * MIB, image=(0, MIB), prompt=(0, MIB))
    sizes = measured(model, monkeypatch, meter)
    assert (sizes.images, sizes.prompts) == (MOST_IMAGES, MOST_PROMPTS)


def test_a_device_that_does_not_hold_the_larger_batch_takes_one(model, monkeypatch):
    meter = FakeMeter(1000 * MIB, image=(0, 10 * MIB), prompt=(0, MIB))
    sizes = measured(model, monkeypatch, meter, no_memory_above=1)
    assert (sizes.images, sizes.prompts) == (35, 1)


def test_the_longest_answer_is_counted_by_its_keys_and_values(model):
    # Keys and values, 3 layers, 192 wide, 512 positions at most, 3 beams, 4 bytes.
    assert batch_sizes._longest_answer_bytes(model.engine.checkpoint, model.engine.runtime) == (
        2 * 3 * 192 * 512 * 3 * 4
    )


def test_on_a_cpu_nothing_is_measured(sane_folder, monkeypatch):
    monkeypatch.setattr(loading, "measured_batches", None)
    engine = Florence2.load(sane_folder, device="cpu").engine
    assert (engine.image_batch, engine.prompt_batch) == (8, 32)
