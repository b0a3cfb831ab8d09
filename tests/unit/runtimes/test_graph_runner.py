"""Recorded work is done exactly as often as it is asked for, whatever the warm-up did."""

from __future__ import annotations

import gc
import logging
import threading

import pytest
import torch
from recorders import CPU, CUDA, RECORDERS, ReplayingRecorder, device_of

from florence2.runtimes import cuda_graphs as graphs
from florence2.runtimes.cuda_graphs import WARM_UPS, BucketedGraphs, GraphRunner, make_runner


class Step:
    """Reads and writes a counter, and writes a row of a history that it does not read."""

    def __init__(self, size=8, device=CPU):
        self.counter = torch.zeros(1, dtype=torch.long, device=device)
        self.history = torch.zeros(16, size, device=device)
        # Whole numbers, whose sums are exact in whatever order.
        self.weight = torch.randint(-9, 10, (size, size), device=device).to(torch.float32)
        self.num_calls = 0

    def __call__(self):
        self.num_calls += 1
        row = (self.counter + 1).to(torch.float32).expand(1, len(self.weight)) @ self.weight
        self.history.index_copy_(0, self.counter, row)
        self.counter += 1

    def check(self, steps):
        """So many were done, no row was left out, and none was written beyond."""
        rows = torch.arange(1, steps + 1, device=self.weight.device)[:, None]
        expected = rows.expand(-1, len(self.weight)).to(torch.float32) @ self.weight
        assert self.counter.item() == steps
        torch.testing.assert_close(self.history[:steps], expected)
        assert not self.history[steps:].any()


def run(runner, steps):
    """Runs steps by their names, each with its state."""
    for name, step in steps.items():
        runner.run(name, step, [step.counter])


def steps_of(names, device=CPU, sizes=(8, 64, 16)):
    return {name: Step(size, device) for name, size in zip(names, sizes, strict=False)}


@pytest.fixture(params=RECORDERS)
def any_recorder(request):
    return request.param()


@pytest.fixture
def any_runner(any_recorder):
    return GraphRunner(any_recorder)


@pytest.fixture
def recorder():
    return ReplayingRecorder()


@pytest.fixture
def runner(recorder):
    return GraphRunner(recorder)


def test_every_run_does_the_work_once(any_recorder, any_runner):
    step = Step(device=device_of(any_recorder))
    for expected in range(1, 11):
        run(any_runner, {"step": step})
        step.check(expected)
    assert any_runner.num_graphs == 1


def test_recordings_share_memory_without_spoiling_each_other(any_recorder, any_runner):
    steps = steps_of("abc", device_of(any_recorder))
    for _ in range(5):
        run(any_runner, steps)
    for step in steps.values():
        step.check(5)


def test_dropped_and_cleared_recordings_are_made_again(any_recorder):
    runner = GraphRunner(any_recorder, max_graphs=2)
    steps = steps_of("abc", device_of(any_recorder))
    for turn in range(6):
        run(runner, steps)
        assert runner.num_graphs == 2
        if turn % 2:
            runner.clear()
            assert runner.num_graphs == 0
    for step in steps.values():
        step.check(6)


def test_the_work_outlives_its_caller(any_recorder, any_runner):
    device = device_of(any_recorder)
    step = Step(device=device)
    history, weight = step.history, step.weight.clone()
    run(any_runner, {"step": step})
    del step
    gc.collect()
    torch.full((2**20,), 7.0, device=device)  # takes memory that was freed, if any was
    any_runner.run("step", Step(device=device))
    torch.testing.assert_close(history[1:2], torch.full((1, 8), 2.0, device=device) @ weight)


@pytest.mark.parametrize("recorder", RECORDERS[1:])
def test_work_that_waits_for_the_device_runs_without_a_recording(recorder, caplog):
    runner, device = GraphRunner(recorder()), device_of(recorder())
    step, other = Step(device=device), Step(device=device)

    def waiting():
        if step.counter.item() >= 0:
            step()

    before = torch.cuda.current_stream() if device == CUDA else None
    for _ in range(3):
        runner.run("waiting", waiting, [step.counter])
    assert before == (torch.cuda.current_stream() if device == CUDA else None)
    # The memory that recordings share may be spoiled: there are no others from here on.
    for _ in range(3):
        run(runner, {"step": other})
    for one in (step, other):
        one.check(3)
    assert runner.num_graphs == 0
    assert len(caplog.messages) == 1


def test_a_recording_of_one_thread_is_replayed_by_another(any_recorder, any_runner):
    step = Step(device=device_of(any_recorder))
    thread = threading.Thread(target=run, args=(any_runner, {"step": step}))
    thread.start()
    thread.join()
    run(any_runner, {"step": step})
    step.check(2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_other_threads_use_the_device_while_recording():
    runner, stop, failed = make_runner(CUDA), threading.Event(), []

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
            step = Step(device=CUDA)
            for _ in range(3):
                run(runner, {number: step})
            step.check(3)
    finally:
        stop.set()
        thread.join()
    assert failed == []
    assert runner.num_graphs == 20


def test_a_recording_is_made_once_and_replayed(runner, recorder):
    step = Step()
    for _ in range(3):
        run(runner, {"step": step})
    assert recorder.events == ["warm up", "record", "replay", "replay", "replay"]
    assert step.num_calls == WARM_UPS + 3


def test_a_cpu_records_nothing():
    runner, step = make_runner(CPU), Step()
    for expected in range(1, 4):
        run(runner, {"step": step})
        assert (runner.is_enabled, runner.num_graphs, step.num_calls) == (False, 0, expected)
        step.check(expected)


def test_a_recording_knows_the_tensors_of_its_first_call_and_puts_back_its_state_only(runner):
    first, second = Step(), Step()
    runner.run("without state", first)
    first.check(WARM_UPS + 1)
    runner.run("without state", second)
    first.check(WARM_UPS + 2)
    assert second.num_calls == 0


def test_the_least_recently_used_recording_goes_first(recorder):
    runner, steps = GraphRunner(recorder, max_graphs=2), steps_of("abc")
    for name in "abac":
        run(runner, {name: steps[name]})
    assert recorder.num_alive == runner.num_graphs == 2
    assert recorder.events[-5:] == ["warm up", "synchronize", "reset", "record", "replay"]
    recorder.events.clear()
    for name in "acb":
        run(runner, {name: steps[name]})
    assert recorder.events[:3] == ["replay", "replay", "warm up"]
    for step, expected in zip(steps.values(), (3, 2, 2), strict=True):
        step.check(expected)


def test_the_first_failed_recording_is_the_last_one(runner, recorder, caplog):
    steps = steps_of("abc")
    run(runner, {"a": steps["a"]})
    recorder.refuse = True
    with caplog.at_level(logging.WARNING):
        for expected in range(1, 4):
            run(runner, {"b": steps["b"]})
            steps["b"].check(expected)
        recorder.refuse = False
        run(runner, {name: steps[name] for name in "ac"})
    [logged] = caplog.messages
    for part in ("CUDA graphs are off", "recording b failed", "not permitted"):
        assert part in logged
    assert recorder.events.count("record") == 2
    assert recorder.num_alive == runner.num_graphs == 0
    assert not runner.is_enabled
    steps["a"].check(2)
    steps["c"].check(1)


@pytest.mark.parametrize(
    ("value", "is_on"), [("0", False), (" 0 ", False), ("1", True), ("", True), (None, True)]
)
def test_a_variable_turns_recording_off(monkeypatch, value, is_on):
    monkeypatch.setattr(graphs, "CudaRecorder", lambda device: ReplayingRecorder())
    monkeypatch.delenv(graphs.SWITCH, raising=False)
    if value is not None:
        monkeypatch.setenv(graphs.SWITCH, value)
    assert make_runner(torch.device("cuda")).is_enabled == is_on


def test_an_error_of_the_work_comes_through_with_the_state_put_back(runner):
    step = Step()

    def failing():
        step()
        raise torch.OutOfMemoryError("no memory left")

    with pytest.raises(torch.OutOfMemoryError):
        runner.run("step", failing, [step.counter])
    assert step.counter.item() == 0
    run(runner, {"step": step})
    step.check(1)


def test_paused_or_plainly_it_just_runs_and_keeps_what_it_has(runner, recorder):
    step = Step()
    run(runner, {"step": step})
    for within, is_enabled in ((runner.paused, False), (runner.plainly, True)):
        with within():
            # Plainly it goes the ways of recorded work.
            assert runner.is_enabled is is_enabled
            run(runner, {"step": step})
        assert runner.is_enabled
    run(runner, {"step": step})
    assert recorder.events == ["warm up", "record", "replay", "replay"]
    step.check(4)


def test_recording_that_ended_while_paused_stays_ended(runner):
    with runner.paused():
        runner.give_up("a test")
    assert not runner.is_enabled


def test_cleared_it_waits_for_the_device_and_records_anew(runner, recorder):
    first, second = Step(), Step()
    run(runner, {"step": first})
    runner.clear()
    assert recorder.events[-2:] == ["synchronize", "reset"]
    assert recorder.num_alive == runner.num_graphs == 0
    run(runner, {"step": second})
    for step in (first, second):
        step.check(1)


def test_forgotten_recordings_are_made_anew_and_the_others_stay(runner, recorder):
    steps = steps_of("abc")
    run(runner, steps)
    recorder.events.clear()
    runner.forget(["b", "never recorded"])
    assert recorder.events == ["synchronize", "reset"]
    assert recorder.num_alive == runner.num_graphs == 2
    run(runner, steps)
    assert recorder.events.count("record") == 1
    for step in steps.values():
        step.check(2)


def test_the_rows_that_fill_a_batch_up_are_copies_of_its_first_one(runner):
    seen = []
    graphs = BucketedGraphs("twice", runner, (4,))

    def twice(given):
        seen.append(given[0].clone())
        return [given[0] * 2]

    received = [torch.tensor([[1.0], [2.0]])]
    assert graphs.run("any", received, twice)[0].tolist() == [[2.0], [4.0]]
    assert seen[-1].tolist() == [[1.0], [2.0], [1.0], [1.0]]
