"""Downloads ahead, uploads behind, and their limits."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from platform_fakes import image_info

from florence2.budget import Budget
from florence2.errors import NoRoomError
from serve.platform import pipeline
from serve.platform.images import Target
from serve.platform.pipeline import fetch_ahead, split_batches
from serve.settler import Settler


def targets(*sizes, **changes):
    infos = [image_info(n, size=size)._replace(**changes) for n, size in enumerate(sizes, 1)]
    return [Target(info.id, 1, info) for info in infos]


def ids_of(batch):
    return [target.image_id for target in batch]


@pytest.fixture
def budget():
    return Budget(100, "bytes")


@pytest.fixture
def ahead(budget):
    """Batches of one image each, of so many bytes, fetched ahead."""

    def fetch_sizes(fetch, *sizes, should_stop=lambda: False, **limits):
        batches = split_batches(targets(*sizes), 1)
        return fetch_ahead(batches, fetch, budget, should_stop, is_bulk=True, **limits)

    return fetch_sizes


def used(fetched):
    """What was fetched, whose bytes are held until the next is asked for."""
    for batch, found, hold in fetched:
        with hold:
            yield batch, found


LARGE = {"width": 8000, "height": 6000}
BATCHES = {
    "by number": ([1] * 5, {}, {"size": 2}, [[1, 2], [3, 4], [5]]),
    "by bytes": ([60, 60, 10], {}, {}, [[1], [2, 3]]),
    "by bytes of each batch": ([60, 40, 1, 99, 2], {}, {}, [[1, 2], [3, 4], [5]]),
    "one too large alone": ([10, 500, 10], {}, {}, [[1], [2], [3]]),
    "none": ([], {}, {"size": 2}, []),
    "by pixels": ([1] * 5, LARGE, {}, [[1, 2], [3, 4], [5]]),
    "by pixels, each too large": ([1] * 3, LARGE, {"max_pixels": 1}, [[1], [2], [3]]),
    "a size nobody knows is a megabyte": ([None, 1], {}, {"max_bytes": 1_000_000}, [[1], [2]]),
    "a size nobody knows is no more": ([None, 1], {}, {"max_bytes": 1_000_001}, [[1, 2]]),
}


@pytest.mark.parametrize(("sizes", "info", "limits", "expected"), BATCHES.values(), ids=BATCHES)
def test_batches_are_bounded_by_number_bytes_and_pixels(sizes, info, limits, expected):
    batches = split_batches(targets(*sizes, **info), **{"size": 8, "max_bytes": 100, **limits})
    assert [ids_of(batch) for batch in batches] == expected


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        pytest.param({"max_batches": 3}, 3, id="batches"),
        pytest.param({"max_bytes": 25}, 2, id="bytes"),
        pytest.param({"max_bytes": 5}, 1, id="always one"),
    ],
)
def test_no_more_is_fetched_ahead_than_allowed(ahead, limits, expected):
    gate = threading.Event()
    begun = threading.Semaphore(0)

    def fetch(batch):
        begun.release()
        gate.wait()

    fetched = ahead(fetch, *[10] * 6, **limits)
    with ThreadPoolExecutor(1) as pool:
        consumed = pool.submit(lambda: [ids_of(batch) for batch, _ in used(fetched)])
        for _ in range(expected):
            begun.acquire()
        assert not begun.acquire(blocking=False)
        gate.set()
        assert consumed.result() == [[1], [2], [3], [4], [5], [6]]


def test_what_is_left_is_neither_fetched_nor_held_when_the_reader_closes(budget, ahead):
    fetched = []
    reader = ahead(fetched.append, *[10] * 9, max_batches=2)
    *_, hold = next(reader)
    assert budget.held > hold.amount
    reader.close()
    assert len(fetched) <= 3
    assert budget.held == hold.amount == 10


def test_an_error_while_fetching_reaches_the_reader_and_leaves_nothing_held(budget, ahead):
    def fetch(batch):
        raise OSError("no network")

    with pytest.raises(OSError, match="no network"):
        list(ahead(fetch, 10, 10, 10, 10))
    assert budget.held == 0


def test_runs_share_the_bytes_they_hold_and_never_wait_for_each_other(budget, ahead):
    most, all_of_them = [], threading.Barrier(3)

    def fetch(batch):
        most.append(budget.held)
        return ids_of(batch)

    def run():
        all_of_them.wait(20)
        return [ids for _, ids in used(ahead(fetch, *[40] * 6, 300, 40))]

    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(run) for _ in range(3)]
        for done in runs:
            assert done.result(30) == [[n] for n in range(1, 9)]
    assert max(most) <= 325
    assert (budget.held, budget.num_waiting) == (0, 0)


def test_a_run_that_is_stopped_waits_for_no_room_and_another_is_told(budget, ahead, monkeypatch):
    budget.hold(100)
    [(_, ids)] = used(ahead(ids_of, 50, should_stop=lambda: True))
    assert ids == [1]
    assert (budget.held, budget.num_waiting) == (100, 0)
    monkeypatch.setattr(pipeline, "QUEUE_LIMIT_S", 0.0)
    with pytest.raises(NoRoomError):
        next(ahead(ids_of, 50))


def test_items_are_settled_in_order():
    settled = []
    with Settler(settled.append) as settler:
        for n in range(20):
            settler.put(n)
    assert settled == list(range(20))


def test_the_last_error_is_raised_and_nothing_is_settled_after_one():
    settled = []

    def settle(item):
        settled.append(item)
        if item == 1:
            raise ValueError("the second")

    def work():
        with Settler(settle, max_waiting=3) as settler:
            for n in range(3):
                settler.put(n)

    with pytest.raises(ValueError, match="the second"):
        work()
    assert settled == [0, 1]


def test_putting_waits_for_room():
    is_put = threading.Event()

    def settle(item):
        assert item != 1 or not is_put.wait(0.2), "the second was put before the first was settled"

    with Settler(settle, max_waiting=1) as settler:
        settler.put(1)
        settler.put(2)
        is_put.set()
