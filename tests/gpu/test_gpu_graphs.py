"""On a GPU, recorded work does what it does without a recording, whatever else goes on."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from florence2.runtimes.cuda_graphs import CudaRecorder, GraphRunner, make_runner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


class Stepping:
    """A step that reads and writes a counter, and writes a row of a history."""

    def __init__(self, size=8):
        self.counter = torch.zeros(1, dtype=torch.long, device=CUDA)
        self.history = torch.zeros(16, size, device=CUDA)
        self.weight = torch.randn(size, size, device=CUDA)

    def __call__(self):
        row = (self.counter + 1).to(torch.float32).expand(1, self.weight.shape[0]) @ self.weight
        self.history.index_copy_(0, self.counter, row)
        self.counter += 1

    def expected(self, steps):
        rows = torch.arange(1, steps + 1, device=CUDA)[:, None].expand(-1, self.weight.shape[0])
        return rows.to(torch.float32) @ self.weight


@pytest.fixture
def runner():
    return make_runner(CUDA)


def test_steps_are_done_once_each(runner):
    step = Stepping()
    for _ in range(10):
        runner.run("step", step, [step.counter])
    assert runner.num_graphs == 1
    assert step.counter.item() == 10
    torch.testing.assert_close(step.history[:10], step.expected(10))
    assert not step.history[10:].any()


def test_recordings_share_memory_without_spoiling_each_other(runner):
    steps = [Stepping(size) for size in (8, 64, 16)]
    for _ in range(5):
        for number, step in enumerate(steps):
            runner.run(number, step, [step.counter])
    for step in steps:
        torch.testing.assert_close(step.history[:5], step.expected(5))


def test_dropped_and_cleared_recordings_are_made_again():
    runner = GraphRunner(CudaRecorder(CUDA), max_graphs=2)
    steps = [Stepping(size) for size in (8, 64, 16)]
    for turn in range(6):
        for number, step in enumerate(steps):
            runner.run(number, step, [step.counter])
        if turn % 2:
            runner.clear()
    assert runner.num_graphs == 0
    for step in steps:
        torch.testing.assert_close(step.history[:6], step.expected(6))


def test_the_work_outlives_its_caller(runner):
    step = Stepping()
    history = step.history
    runner.run("step", step, [step.counter])
    weight = step.weight.clone()
    del step
    gc.collect()
    torch.full((2**20,), 7.0, device=CUDA)  # takes memory that was freed, if any was
    runner.run("step", Stepping())
    expected = torch.full((1, 8), 2.0, device=CUDA) @ weight
    torch.testing.assert_close(history[1:2], expected)


def test_work_that_waits_for_the_device_runs_without_a_recording(runner, caplog):
    step = Stepping()

    def waiting():
        if step.counter.item() >= 0:
            step()

    before = torch.cuda.current_stream()
    for _ in range(3):
        runner.run("waiting", waiting, [step.counter])
    assert torch.cuda.current_stream() == before
    assert step.counter.item() == 3
    assert runner.num_graphs == 0
    assert len(caplog.messages) == 1
    # The memory that recordings share may be spoiled: there are no others from here on.
    other = Stepping()
    for _ in range(3):
        runner.run("step", other, [other.counter])
    assert (other.counter.item(), runner.num_graphs) == (3, 0)
    torch.testing.assert_close(other.history[:3], other.expected(3))


def test_other_threads_use_the_device_while_recording(runner):
    stop, failed = threading.Event(), []

    def use_device():
        try:
            while not stop.is_set():
                host = torch.randn(512, 512).pin_memory()
                assert torch.isfinite(host.to(CUDA, non_blocking=True) @ host.to(CUDA)).all()
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=use_device)
    thread.start()
    try:
        for number in range(20):
            step = Stepping()
            for _ in range(3):
                runner.run(number, step, [step.counter])
            torch.testing.assert_close(step.history[:3], step.expected(3))
    finally:
        stop.set()
        thread.join()
    assert failed == []
    assert runner.num_graphs == 20


def test_a_recording_of_one_thread_is_replayed_by_another(runner):
    step = Stepping()
    thread = threading.Thread(target=runner.run, args=("step", step, [step.counter]))
    thread.start()
    thread.join()
    runner.run("step", step, [step.counter])
    assert step.counter.item() == 2
