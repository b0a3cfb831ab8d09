"""Devices beside the first: a process each, one queue, nothing lost when a process ends."""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_tools import TORCH_ONLY
from scheduler_tools import PATIENCE_S, held, wait_until

from florence2.engine.ask import Ask
from florence2.engine.encoding import EncodedImage
from florence2.engine.scheduler import Priority
from florence2.engine.work_queue import Request, WorkQueue
from florence2.errors import DeviceError, InternalError
from florence2.records import Failure, Result
from florence2.runtimes.device import choose_devices
from florence2.workers import DeviceWorker, WorkerPlan, share_cores

ROOT = Path(__file__).parents[3]
PLAN = WorkerPlan("demo", "cpu", "torch", "fp32")


IMAGES = sorted(str(path) for path in (ROOT / "demo" / "images").glob("scene_*.png"))[:4]
ASKS = [Ask(image, "<OD>") for image in IMAGES]


@pytest.fixture
def worker(model):
    return DeviceWorker(PLAN, model.engine.preparer)


@pytest.fixture
def pair(start, worker):
    """A scheduler with a process beside it that is loaded."""
    scheduler = start(others=[worker])
    wait_until(lambda: worker.pid is not None)
    return scheduler


def as_seen(result: Result | Failure) -> object:
    """All but the times, and scores to what a batch of another size may change."""
    assert isinstance(result, Result), result
    boxes = [(one.label, one.box_xyxy, round(one.score, 4)) for one in result.objects]
    return result.task, result.size_wh, result.token_ids, boxes


def test_a_process_answers_as_the_first_device_does_and_may_be_killed(
    pair, worker, model, engine, send_to, reports, caplog
):
    wanted = [as_seen(one) for one in model.run_many(ASKS)]
    send = send_to(pair)
    # The first device, which is held, can take none of them.
    with held(pair):
        assert [as_seen(one) for one in send(ASKS, priority=Priority.BULK).get()] == wanted
        assert sum(report.prompts for report in reports) == len(ASKS)
        [given_up] = send(ASKS[:1], should_stop=lambda: True).get()
        [missing] = send([Ask("missing.png", "<OD>")]).get()
        [known] = send([Ask(Failure("bad_image", "It is damaged."), "<OD>")]).get()
        assert (given_up.code, missing.code) == ("cancelled", "bad_image")
        assert known.message == "It is damaged."
        [features] = engine.encode(IMAGES[:1])
        here = send([Ask(features, "<OD>")])
        first = worker.pid
        os.kill(first, signal.SIGSTOP)
        again = send(ASKS, priority=Priority.BULK)
        # All but the one that stays here.
        wait_until(lambda: here.done() or pair.queue_depth == 1)
        os.kill(first, signal.SIGKILL)
        with caplog.at_level(logging.ERROR, "florence2.workers"):
            assert [as_seen(one) for one in again.get()] == wanted
        assert re.search(r"[1-4] questions, is asked again", caplog.text)
        assert worker.pid not in (None, first)
        assert not here.done()
    assert [as_seen(one) for one in here.get()] == wanted[:1]


# The process has a runtime of its own.
@TORCH_ONLY
def test_a_model_that_a_process_cannot_load_is_logged_and_the_first_device_goes_on(
    start, model, caplog
):
    worker = DeviceWorker(replace(PLAN, name="/nowhere"), model.engine.preparer)
    with caplog.at_level(logging.ERROR, "florence2.workers"):
        scheduler = start(others=[worker])
        [result] = scheduler.run([Ask(IMAGES[0], "<CAPTION>")])
        assert isinstance(result, Result)
        wait_until(lambda: "/nowhere" in caplog.text)
        scheduler.close()
    assert worker.pid is None


# The queue that devices share


def queue_with(*requests, num_devices=2, max_batch=8):
    queue = WorkQueue(max_batch, 100, num_devices)
    for request in requests:
        queue.add(request)
    return queue


def request(*images, priority=Priority.BULK):
    return Request([Ask(image, "<OD>") for image in images], priority, 8)


def click(image):
    return request(image, priority=Priority.INTERACTIVE)


def test_what_is_left_is_shared():
    queue = queue_with(request(*"abcdefgh"))
    begun = [queue.next_work(device, 0.0) for device in (0, 1, 0, 1)]
    assert [len(asks) for asks in begun] == [4, 4, 0, 0]


def test_a_device_that_has_work_leaves_the_others_their_part():
    queue = queue_with(request(*"abcd"))
    begun = queue.next_work(1, 0.0)
    assert len(begun) == 2
    # It has room for more, and the first device comes later.
    assert queue.joining(Priority.BULK, 8, 0, 1) == []
    assert len(queue.next_work(0, 0.0)) == 2
    queue.add(request(*"efgh"))
    queue.settle((one, Failure("bad_image", "It is damaged.")) for one in begun)
    assert [len(queue.joining(Priority.BULK, 8, 0, device)) for device in (0, 1)] == [1, 3]


@pytest.mark.parametrize("lose", [WorkQueue.ask_again, WorkQueue.postpone])
def test_what_a_device_gives_back_counts_as_its_work_no_more(lose):
    given_up = request(*"abcd")
    queue = queue_with(given_up)
    begun = queue.next_work(1, 0.0)
    queue.remove(given_up, InternalError())
    lose(queue, begun)
    queue.add(request(*"efgh"))
    assert len(queue.next_work(1, 0.0)) == 2


def test_a_click_goes_to_the_idle_device_that_has_seen_the_image_and_to_another_if_that_is_busy():
    queue = queue_with(click("a"))
    assert queue.next_work(1, 0.0)
    with ThreadPoolExecutor(2) as devices:
        first = devices.submit(queue.next_work, 0, 1.0)
        seen = devices.submit(queue.next_work, 1, PATIENCE_S)
        wait_until(lambda: first.running() and seen.running())
        time.sleep(0.05)
        queue.add(click("a"))
        assert [queued.ask.image for queued in seen.result()] == ["a"]
        assert first.result() == []
    queue.add(click("a"))
    assert queue.next_work(0, 0.0)


@pytest.mark.parametrize(("num_lost", "code"), [(1, None), (2, InternalError.code)])
def test_an_ask_is_asked_again_once(num_lost, code):
    asked = request("a")
    queue = queue_with(asked)
    for device in range(num_lost):
        queue.ask_again(queue.next_work(device, 0.0))
    assert asked.is_done == (code is not None)
    assert [one.code for one in asked.results()] == ([code] if code else [])


def test_what_is_asked_again_about_an_encoded_image_stays_with_the_first_device():
    encoded = EncodedImage(torch.zeros(1, 1), (1, 1), "key")
    queue = queue_with(request(encoded))
    assert queue.next_work(1, 0.0) == []
    queue.postpone(queue.next_work(0, 0.0))
    assert queue.next_work(1, 0.0) == []
    assert len(queue.next_work(0, 0.0)) == 1


# Which devices


@pytest.mark.parametrize(
    ("names", "devices"), [("all", ("cpu",)), ("cpu", ("cpu",)), ("cpu, cpu", ("cpu", "cpu"))]
)
def test_devices_are_named_in_a_list(names, devices):
    assert choose_devices(names) == devices


@pytest.mark.parametrize("names", ["", "cpu,", "cpu,gpu", "cuda:77"])
def test_what_names_no_device_is_refused(names):
    with pytest.raises(DeviceError, match="evice"):
        choose_devices(names)


def test_cores_are_shared_among_processes_on_the_cpu(monkeypatch):
    own = []
    monkeypatch.setattr("torch.set_num_threads", own.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5, 6, 7, 8}, raising=False)
    assert share_cores("cpu", ["cpu"]) == [(4, 6, 8), (5, 7)]
    assert share_cores("cpu", ["cpu"] * 5)[5] == (4,)
    assert own == [3, 1]
    assert share_cores("cpu", []) == [None]
