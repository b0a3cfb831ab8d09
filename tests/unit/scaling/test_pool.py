"""Workers that answer for one run: side by side, in order, and whatever ends."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from florence2.errors import GenerationCancelledError, RequestError
from florence2.records import Failure
from serve.labeling.progress import stop_on_signals
from serve.predict.predictor import Call
from serve.scaling.pool import ClusterError, WorkerPool

MODEL = {"name": "demo"}
CALL = Call()


def settled(value) -> Future:
    future: Future = Future()
    if isinstance(value, BaseException) and not isinstance(value, RequestError):
        future.set_exception(value)
    else:
        future.set_result(value)
    return future


@pytest.fixture
def cluster():
    """Workers whose answers are the images in capitals; an image in ``deadly`` ends its worker."""
    edge = SimpleNamespace(started=0, sent=[], deadly=set(), told=lambda number: MODEL, never=False)

    def start():
        number, edge.started = edge.started, edge.started + 1

        def predict(images, settings=None):
            edge.sent.append((number, list(images)))
            if edge.never:
                return Future()
            if edge.deadly & set(images):
                return settled(OSError("the process ended"))
            if "refused" in images:
                return settled(RequestError("The prompt is too long."))
            return settled([one.upper() for one in images])

        return SimpleNamespace(told=settled(edge.told(number)), predict=predict, ask=predict)

    edge.pool = lambda count: WorkerPool(start, count)
    return edge


@pytest.mark.parametrize(("count", "most"), [(1, 5), (2, 3), (4, 2), (9, 1)])
def test_a_batch_goes_to_all_workers_and_comes_back_in_order(cluster, count, most):
    pool = cluster.pool(count)
    assert (pool.told(), pool.num_devices) == (MODEL, count)
    assert pool.predict([*"abcde"], None, CALL) == [*"ABCDE"]
    assert pool.ask([*"xy"], CALL) == ["X", "Y"]
    assert pool.predict([], None, CALL) == []
    assert max(len(images) for _, images in cluster.sent) == most


def test_what_a_worker_that_ended_had_in_hand_is_done_by_others(cluster):
    pool = cluster.pool(2)
    cluster.deadly = {"b"}
    found = pool.predict([*"abcd"], None, CALL)
    assert [found[0], found[2], found[3]] == ["A", "C", "D"]
    assert isinstance(found[1], Failure)
    assert found[1].code == "process_ended"
    assert sum("b" in images for _, images in cluster.sent) == 3
    cluster.deadly = set()
    assert pool.predict([*"abcd"], None, CALL) == [*"ABCD"]
    assert cluster.started == 2 + 3


def test_what_a_worker_says_ends_the_call_and_not_the_pool(cluster):
    pool = cluster.pool(2)
    with pytest.raises(RequestError, match="too long"):
        pool.predict(["a", "refused"], None, CALL)
    assert pool.predict(["a", "b"], None, CALL) == ["A", "B"]


def test_a_run_that_is_stopped_waits_for_no_worker(cluster):
    pool = cluster.pool(1)
    pool.told()
    cluster.never = True
    stops = iter([False, True])
    with pytest.raises(GenerationCancelledError):
        pool.predict(["a"], None, Call(should_stop=lambda: next(stops)))
    assert len(cluster.sent) == 1


def test_who_waits_for_workers_that_load_can_be_interrupted():
    pool = WorkerPool(lambda: SimpleNamespace(told=Future()), 1)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with stop_on_signals(), pytest.raises(KeyboardInterrupt):
        pool.told()


@pytest.mark.parametrize(
    ("told", "error", "says"),
    [
        (lambda number: RequestError("No such checkpoint."), RequestError, "No such checkpoint"),
        (lambda number: {"name": f"m{number}"}, RequestError, "one model, and one has {'name'"),
        (lambda number: OSError("killed"), ClusterError, r"5 workers ended .* \(OSError: killed\)"),
    ],
    ids=["refused", "another model", "cannot be started"],
)
def test_workers_that_cannot_begin_end_the_run(cluster, told, error, says):
    cluster.told = told
    pool = cluster.pool(2)
    with pytest.raises(error, match=says):
        pool.predict([*"abc"], None, CALL)
