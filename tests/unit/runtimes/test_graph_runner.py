"""Recorded work is done exactly as often as it is asked for, whatever the warm-up did."""

from __future__ import annotations

import logging

import pytest
import torch
from recorders import ReplayingRecorder

from florence2.runtimes import cuda_graphs as graphs
from florence2.runtimes.cuda_graphs import WARM_UPS, GraphRunner, make_runner


class Counting:
    """Work that reads and writes a counter on the device, and a copy of it that it only writes."""

    def __init__(self):
        self.counter = torch.zeros(3)
        self.shown = torch.zeros(3)
        self.num_calls = 0

    def __call__(self):
        self.num_calls += 1
        self.counter += 1
        self.shown.copy_(self.counter)


@pytest.mark.parametrize("recorder", [None, ReplayingRecorder()], ids=["a CPU", "recording"])
def test_every_run_does_the_work_once(recorder):
    runner, work = GraphRunner(recorder), Counting()
    for expected in range(1, 5):
        runner.run("count", work, [work.counter])
        assert work.counter.tolist() == work.shown.tolist() == [expected] * 3


def test_a_recording_is_made_once_and_replayed():
    recorder = ReplayingRecorder()
    runner, work = GraphRunner(recorder), Counting()
    for _ in range(3):
        runner.run("count", work, [work.counter])
    assert recorder.events == ["warm up", "record", "replay", "replay", "replay"]
    assert work.num_calls == WARM_UPS + 3
    assert runner.num_graphs == 1


def test_a_cpu_records_nothing():
    runner, work = make_runner(torch.device("cpu")), Counting()
    runner.run("count", work, [work.counter])
    assert (runner.is_enabled, runner.num_graphs, work.num_calls) == (False, 0, 1)


def test_a_recording_knows_the_tensors_of_its_first_call_and_puts_back_its_state_only():
    runner, first, second = GraphRunner(ReplayingRecorder()), Counting(), Counting()
    runner.run("without state", first)
    assert first.counter.tolist() == [WARM_UPS + 1] * 3
    runner.run("without state", second)
    assert first.counter.tolist() == [WARM_UPS + 2] * 3
    assert second.num_calls == 0


def test_the_least_recently_used_recording_goes_first():
    recorder = ReplayingRecorder()
    runner, works = GraphRunner(recorder, max_graphs=2), {name: Counting() for name in "abc"}
    for name in "abac":
        runner.run(name, works[name], [works[name].counter])
    assert recorder.num_alive == runner.num_graphs == 2
    assert recorder.events[-5:] == ["warm up", "synchronize", "reset", "record", "replay"]
    recorder.events.clear()
    for name in "acb":
        runner.run(name, works[name], [works[name].counter])
    assert recorder.events[:3] == ["replay", "replay", "warm up"]
    assert [works[name].counter[0].item() for name in "abc"] == [3, 2, 2]


def test_the_first_failed_recording_is_the_last_one(caplog):
    recorder = ReplayingRecorder()
    runner, works = GraphRunner(recorder), {name: Counting() for name in "abc"}
    runner.run("a", works["a"], [works["a"].counter])
    recorder.refuse = True
    with caplog.at_level(logging.WARNING):
        for expected in range(1, 4):
            runner.run("b", works["b"], [works["b"].counter])
            assert works["b"].counter.tolist() == [expected] * 3
        recorder.refuse = False
        for name in "ac":
            runner.run(name, works[name], [works[name].counter])
    [logged] = caplog.messages
    assert "CUDA graphs are off" in logged
    assert "recording b failed" in logged
    assert "not permitted" in logged
    assert recorder.events.count("record") == 2
    assert recorder.num_alive == runner.num_graphs == 0
    assert not runner.is_enabled
    assert [works[name].counter[0].item() for name in "ac"] == [2, 1]


@pytest.mark.parametrize(
    ("value", "is_on"), [("0", False), (" 0 ", False), ("1", True), ("", True), (None, True)]
)
def test_a_variable_turns_recording_off(monkeypatch, value, is_on):
    monkeypatch.setattr(graphs, "CudaRecorder", lambda device: ReplayingRecorder())
    monkeypatch.delenv(graphs.SWITCH, raising=False)
    if value is not None:
        monkeypatch.setenv(graphs.SWITCH, value)
    assert make_runner(torch.device("cuda")).is_enabled == is_on


def test_an_error_of_the_work_comes_through_with_the_state_put_back():
    runner, work = GraphRunner(ReplayingRecorder()), Counting()

    def failing():
        work()
        raise torch.OutOfMemoryError("no memory left")

    with pytest.raises(torch.OutOfMemoryError):
        runner.run("count", failing, [work.counter])
    assert work.counter.tolist() == [0] * 3
    runner.run("count", work, [work.counter])
    assert work.counter.tolist() == [1] * 3


def test_paused_or_plainly_it_just_runs_and_keeps_what_it_has():
    recorder = ReplayingRecorder()
    runner, work = GraphRunner(recorder), Counting()
    runner.run("count", work, [work.counter])
    for within, is_enabled in ((runner.paused, False), (runner.plainly, True)):
        with within():
            # Plainly it goes the ways of recorded work.
            assert runner.is_enabled is is_enabled
            runner.run("count", work, [work.counter])
        assert runner.is_enabled
    runner.run("count", work, [work.counter])
    assert recorder.events == ["warm up", "record", "replay", "replay"]
    assert work.counter.tolist() == [4] * 3


def test_recording_that_ended_while_paused_stays_ended():
    runner = GraphRunner(ReplayingRecorder())
    with runner.paused():
        runner.give_up("a test")
    assert not runner.is_enabled


def test_cleared_it_waits_for_the_device_and_records_anew():
    recorder = ReplayingRecorder()
    runner, first, second = GraphRunner(recorder), Counting(), Counting()
    runner.run("count", first, [first.counter])
    runner.clear()
    assert recorder.events[-2:] == ["synchronize", "reset"]
    assert recorder.num_alive == runner.num_graphs == 0
    runner.run("count", second, [second.counter])
    assert (first.counter[0], second.counter[0]) == (1, 1)


def test_forgotten_recordings_are_made_anew_and_the_others_stay():
    recorder = ReplayingRecorder()
    runner, works = GraphRunner(recorder), {name: Counting() for name in "abc"}
    for name in "abc":
        runner.run(name, works[name], [works[name].counter])
    recorder.events.clear()
    runner.forget(["b", "never recorded"])
    assert recorder.events == ["synchronize", "reset"]
    assert recorder.num_alive == runner.num_graphs == 2
    for name in "abc":
        runner.run(name, works[name], [works[name].counter])
    assert recorder.events.count("record") == 1
    assert [works[name].counter[0].item() for name in "abc"] == [2, 2, 2]
