"""A budget that threads share: who finds no room waits in line, and nothing is held for ever."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from image_tools import PATIENCE_S

from florence2.budget import Budget, from_environment, memory_limit_bytes
from florence2.errors import FlorenceError, NoRoomError, RequestError


@pytest.fixture
def budget():
    return Budget(100, "pixels")


@pytest.fixture
def wait_for(budget):
    """Holds an amount in a thread of its own, which has begun to wait."""
    with ThreadPoolExecutor(8) as pool:

        def start(amount, **options):
            before, until = budget.num_waiting, time.monotonic() + PATIENCE_S
            waiting = pool.submit(budget.hold, amount, wait_s=PATIENCE_S, **options)
            while budget.num_waiting == before:
                assert time.monotonic() < until
                time.sleep(0.002)
            return waiting

        yield start


def test_what_is_released_once_or_twice_can_be_held_again(budget):
    with budget.hold(60) as first, budget.hold(40):
        assert budget.held == 100
    first.release()
    assert budget.held == 0


def test_who_finds_no_room_waits_until_there_is_some(budget, wait_for):
    first = budget.hold(60)
    waiting = wait_for(60)
    first.release()
    assert waiting.result(PATIENCE_S).amount == 60


@pytest.mark.parametrize(
    ("waited_s", "said"),
    [
        (0.0, r"At most 100 pixels .* 60 more did not find room; .* again later\.$"),
        (0.000976885, "find room within less than 1 ms;"),
        (0.0123, "find room within 12 ms;"),
    ],
)
def test_who_waited_in_vain_is_told_the_rule_and_what_to_do(budget, waited_s, said):
    budget.hold(60)
    with pytest.raises(NoRoomError, match=said) as refused:
        budget.hold(60, wait_s=waited_s)
    assert refused.value.retry_after_s > 0
    assert (budget.held, budget.num_waiting) == (60, 0)


def test_one_whose_client_leaves_stops_waiting(budget, wait_for):
    budget.hold(60)
    gone, left = threading.Event(), FlorenceError("The client left.")
    waiting = wait_for(60, stop=lambda: left if gone.is_set() else None)
    gone.set()
    assert waiting.exception(PATIENCE_S) is left
    assert budget.num_waiting == 0


def test_who_came_first_goes_first_however_large(budget, wait_for):
    first = budget.hold(60)
    large = wait_for(75)
    with pytest.raises(NoRoomError):
        budget.hold(10, wait_s=0)
    first.release()
    assert large.result(PATIENCE_S).amount == 75


def test_a_click_goes_before_bulk_work_that_waits(budget, wait_for):
    first = budget.hold(100)
    bulk, click = wait_for(70, is_bulk=True), wait_for(50)
    first.release()
    held = click.result(PATIENCE_S)
    assert not bulk.done()
    held.release()
    assert bulk.result(PATIENCE_S).amount == 70


def test_bulk_work_leaves_room_for_a_click(budget):
    for _ in range(7):
        budget.hold(10, is_bulk=True)
    with pytest.raises(NoRoomError):
        budget.hold(10, is_bulk=True, wait_s=0)
    assert budget.hold(30, wait_s=0).amount == 30


@pytest.mark.parametrize("is_bulk", [False, True], ids=["clicks", "bulk work"])
def test_what_is_larger_than_everything_passes_beside_little_and_one_after_the_other(
    budget, is_bulk
):
    most = []

    def work(_):
        with budget.hold(250, is_bulk=is_bulk, wait_s=PATIENCE_S):
            most.append(budget.held)

    with budget.hold(20):
        with budget.hold(250, is_bulk=is_bulk, wait_s=0), pytest.raises(NoRoomError):
            budget.hold(1, wait_s=0)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8), timeout=PATIENCE_S))
    assert most == [270] * 8
    assert budget.held == 0


def test_many_threads_leave_nothing_behind(budget):
    def work(number):
        with budget.hold(1 + 13 * number % 90, is_bulk=number % 3 == 0, wait_s=PATIENCE_S):
            assert budget.held <= 100

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(200), timeout=PATIENCE_S))
    assert (budget.held, budget.num_waiting) == (0, 0)


CAPACITIES = [("", 700), ("  ", 700), ("3", 30), (" 12 ", 120)]
NO_CAPACITIES = ["0", "-1", "1.5", "much", "1e3", "\u00b2"]


@pytest.mark.parametrize(
    ("text", "expected"), [*CAPACITIES, *((text, None) for text in NO_CAPACITIES)]
)
def test_an_administrator_may_set_a_capacity_in_whole_numbers(monkeypatch, text, expected):
    monkeypatch.setenv("A_LIMIT", text)
    if expected is not None:
        assert from_environment("A_LIMIT", 10, 700) == expected
        return
    with pytest.raises(RequestError, match=r"A_LIMIT is a whole number above 0"):
        from_environment("A_LIMIT", 10, 700)


V1 = "sys/fs/cgroup/memory/{}memory.limit_in_bytes"
GROUPS = {
    "no control groups": ("", {}, None),
    "version 2": ("0::/a/b", {"sys/fs/cgroup/a/memory.max": "1000"}, 1000),
    "version 2, the least of all above": (
        "0::/a/b",
        {"sys/fs/cgroup/a/memory.max": "1000", "sys/fs/cgroup/a/b/memory.max": "2000"},
        1000,
    ),
    "version 2 without a limit": ("0::/a", {"sys/fs/cgroup/a/memory.max": "max"}, None),
    "version 2, the container's own at the top": (
        "0::/",
        {"sys/fs/cgroup/memory.max": "1000"},
        1000,
    ),
    "version 1": ("5:cpu:/x\n4:memory:/docker/1", {V1.format("docker/1/"): "1000"}, 1000),
    "version 1, the path is the host's": (
        "4:memory,hugetlb:/docker/1",
        {V1.format(""): "1000"},
        1000,
    ),
    "version 1 without a limit": ("4:memory:/", {V1.format(""): "9223372036854771712"}, None),
    "junk": ("\n:\nx", {"sys/fs/cgroup/memory.max": "much"}, None),
    "another kind only": ("5:cpu:/x", {}, None),
}


@pytest.mark.parametrize(("groups", "limits", "expected"), GROUPS.values(), ids=GROUPS)
def test_a_container_has_the_memory_of_its_group(tmp_path, groups, limits, expected):
    for name, text in {**limits, **({"proc/self/cgroup": groups} if groups else {})}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    machine = memory_limit_bytes(tmp_path / "nothing")
    assert machine > 2**20
    assert memory_limit_bytes(tmp_path) == (expected or machine)
