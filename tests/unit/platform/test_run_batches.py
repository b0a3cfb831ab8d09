"""Downloads ahead, uploads behind, and their limits."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from platform_fakes import image_info

from florence2.budget import Budget
from serve.platform.images import Target
from serve.platform.pipeline import Behind, fetch_ahead, room_for_downloads, split_batches


def targets(*sizes):
    return [Target(n, 1, image_info(n, size=size)) for n, size in enumerate(sizes, 1)]


def ids(batches):
    return [[target.image_id for target in batch] for batch in batches]


@pytest.mark.parametrize(
    ("sizes", "size", "expected"),
    [
        pytest.param([1, 1, 1, 1, 1], 2, [[1, 2], [3, 4], [5]], id="by number"),
        pytest.param([60, 60, 10], 8, [[1], [2, 3]], id="by bytes"),
        pytest.param([60, 40, 1, 99, 2], 8, [[1, 2], [3, 4], [5]], id="by bytes of each batch"),
        pytest.param([10, 500, 10], 8, [[1], [2], [3]], id="one too large alone"),
        pytest.param([], 2, [], id="none"),
    ],
)
def test_batches_are_bounded_by_number_and_bytes(sizes, size, expected):
    assert ids(split_batches(targets(*sizes), size, max_bytes=100)) == expected


def test_batches_are_bounded_by_pixels_too():
    large = image_info(1)._replace(width=8000, height=6000)
    batch = [Target(n, 1, large._replace(id=n)) for n in range(5)]
    assert ids(split_batches(batch, 8)) == [[0, 1], [2, 3], [4]]
    assert ids(split_batches(batch, 8, max_pixels=1)) == [[0], [1], [2], [3], [4]]


def test_an_image_whose_size_nobody_knows_counts_as_a_megabyte():
    assert Target(1, 1, image_info(1, size=None)).size_bytes == 1_000_000


@pytest.mark.parametrize(
    ("max_batches", "max_bytes", "expected"),
    [
        pytest.param(3, 1000, 3, id="batches"),
        pytest.param(3, 25, 2, id="bytes"),
        pytest.param(3, 5, 1, id="always one"),
    ],
)
def test_no_more_is_fetched_ahead_than_allowed(max_batches, max_bytes, expected):
    gate = threading.Event()
    begun = threading.Semaphore(0)

    def fetch(batch):
        begun.release()
        gate.wait()

    batches = split_batches(targets(*[10] * 6), 1)
    consumed = []

    def consume():
        consumed.extend(batch for batch, _ in fetch_ahead(batches, fetch, max_batches, max_bytes))

    thread = threading.Thread(target=consume)
    thread.start()
    for _ in range(expected):
        begun.acquire()
    assert not begun.acquire(blocking=False)
    gate.set()
    thread.join()
    assert ids(consumed) == [[1], [2], [3], [4], [5], [6]]


def test_what_is_left_is_not_fetched_when_the_reader_closes():
    fetched = []
    reader = fetch_ahead(split_batches(targets(*[10] * 9), 1), fetched.append, max_batches=2)
    next(reader)
    reader.close()
    assert len(fetched) <= 3


def test_an_error_while_fetching_reaches_the_reader():
    def fetch(batch):
        raise OSError("no network")

    with pytest.raises(OSError, match="no network"):
        list(fetch_ahead(split_batches(targets(1), 1), fetch))


def test_items_are_settled_in_order():
    settled = []
    behind = Behind(settled.append)
    for n in range(20):
        behind.put(n)
    behind.finish()
    assert settled == list(range(20))


def test_the_last_error_is_raised_and_nothing_is_settled_after_one():
    settled = []

    def settle(item):
        settled.append(item)
        if item == 1:
            raise ValueError("the second")

    behind = Behind(settle, max_waiting=3)
    for n in range(3):
        behind.put(n)
    with pytest.raises(ValueError, match="the second"):
        behind.finish()
    assert settled == [0, 1]


def test_putting_waits_for_room():
    is_put = threading.Event()

    def settle(item):
        assert item != 1 or not is_put.wait(0.2), "the second was put before the first was settled"

    behind = Behind(settle, max_waiting=1)
    behind.put(1)
    behind.put(2)
    is_put.set()
    behind.finish()


def test_runs_share_the_bytes_they_hold_and_never_wait_for_each_other():
    budget = Budget(100, "bytes")
    most, both = [], threading.Barrier(3)

    def room(num_bytes, wait_s):
        hold = budget.hold(num_bytes, is_bulk=True, wait_s=wait_s)
        most.append(budget.held)
        return hold

    def run():
        both.wait(20)
        batches = split_batches(targets(*[40] * 6, 300, 40), 1)
        return ids([batch for batch, _ in fetch_ahead(batches, ids_of, room=room)])

    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(run) for _ in range(3)]
        for done in runs:
            assert done.result(30) == [[n] for n in range(1, 9)]
    assert max(most) <= 325
    assert (budget.held, budget.num_waiting) == (0, 0)


def ids_of(batch):
    return [target.image_id for target in batch]


def test_a_run_that_is_given_up_holds_nothing():
    budget = Budget(100, "bytes")
    fetched = fetch_ahead(
        split_batches(targets(10, 10, 10, 10), 1),
        ids_of,
        room=lambda num_bytes, wait_s: budget.hold(num_bytes, wait_s=wait_s),
    )
    next(fetched)
    assert budget.held > 0
    fetched.close()
    assert budget.held == 0


def test_a_download_that_raises_leaves_nothing_held():
    budget = Budget(100, "bytes")

    def broken(batch):
        raise ValueError("no such host")

    batches = split_batches(targets(10, 10, 10, 10), 1)
    with pytest.raises(ValueError, match="no such host"):
        list(fetch_ahead(batches, broken, room=lambda n, s: budget.hold(n, wait_s=s)))
    assert budget.held == 0


def test_a_run_that_is_stopped_waits_for_no_room(manager, monkeypatch):
    budget = Budget(100, "bytes")
    budget.hold(100)
    monkeypatch.setattr("serve.platform.pipeline.held_bytes", lambda: budget)
    request = manager.create()
    request.stop()
    assert room_for_downloads(request, is_bulk=True)(50, 20.0).amount == 0
    assert (budget.held, budget.num_waiting) == (100, 0)
