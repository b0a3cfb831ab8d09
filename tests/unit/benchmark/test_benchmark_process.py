"""A side lives in a process of its own, and its end is not the benchmark's."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest

from florence2.benchmark.plan import Case
from florence2.benchmark.run import Setup, Side, SideFailedError, Workers

CASE = Case(batch=1, prompts=1, beams=1, tokens=4)
OURS = Side("ours", "torch", "fp32")


@pytest.fixture
def setup(tiny_folder):
    return Setup(tiny_folder, "cpu", threads=1, timeout_s=120.0)


def test_a_side_that_was_ended_fails_once_and_is_started_again(setup):
    with Workers(setup) as workers:
        first = workers.run(OURS, CASE, 0, 1.0)
        os.kill(workers.process_id(OURS), signal.SIGKILL)
        with pytest.raises(SideFailedError, match="most likely for want of memory"):
            workers.run(OURS, CASE, 0, 1.0)
        again = workers.run(OURS, CASE, 0, 1.0)
    assert again.token_ids == first.token_ids
    assert min(again.loading_mib, again.running_mib) > 100


def test_what_a_side_cannot_do_is_its_reason_and_it_goes_on(setup):
    too_long = replace(CASE, tokens=5000)
    with Workers(setup) as workers:
        with pytest.raises(SideFailedError, match="max_new_tokens can be at most 1024"):
            workers.run(OURS, too_long, 0, 1.0)
        before = workers.process_id(OURS)
        assert workers.run(OURS, CASE, 0, 1.0).measured_asks == 1
        assert workers.process_id(OURS) == before


def test_a_side_that_does_not_load_is_not_tried_again(setup, tmp_path):
    with Workers(replace(setup, folder=tmp_path)) as workers:
        with pytest.raises(SideFailedError, match=r"config\.json"):
            workers.run(OURS, CASE, 0, 1.0)
        assert workers.process_id(OURS) is None
        with pytest.raises(SideFailedError, match=r"config\.json"):
            workers.run(OURS, CASE, 0, 1.0)


def test_a_side_that_does_not_answer_in_time_is_ended(setup):
    hasty = replace(setup, timeout_s=0.01)
    with Workers(hasty) as workers, pytest.raises(SideFailedError, match=r"within 10 ms"):
        workers.run(OURS, CASE, 0, 1.0)
