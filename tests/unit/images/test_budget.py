"""A budget that threads share: who finds no room waits in line, and nothing is held for ever."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from florence2.budget import Budget, from_environment, memory_limit_bytes
from florence2.errors import FlorenceError, NoRoomError, RequestError

PATIENCE_S = 20


def wait_until(condition):
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.002)


@pytest.fixture
def budget():
    return Budget(100, "pixels")


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as threads:
        yield threads


def test_what_is_released_can_be_held_again(budget):
    with budget.hold(60), budget.hold(40):
        assert budget.held == 100
    assert budget.held == 0


def test_releasing_twice_is_releasing_once(budget):
    hold = budget.hold(60)
    hold.release()
    hold.release()
    assert budget.held == 0


def test_who_finds_no_room_waits_until_there_is_some(budget, pool):
    first = budget.hold(60)
    waiting = pool.submit(budget.hold, 60, wait_s=PATIENCE_S)
    wait_until(lambda: budget.num_waiting == 1)
    first.release()
    assert waiting.result(PATIENCE_S).amount == 60


def test_who_waited_in_vain_is_told_the_rule_and_what_to_do(budget):
    budget.hold(60)
    with pytest.raises(NoRoomError, match=r"At most 100 pixels .* 60 more .* again later\.$") as no:
        budget.hold(60, wait_s=0.01)
    assert no.value.retry_after_s > 0
    assert (budget.held, budget.num_waiting) == (60, 0)


def test_one_whose_client_leaves_stops_waiting(budget, pool):
    budget.hold(60)
    gone = threading.Event()
    left = FlorenceError("The client left.")
    waiting = pool.submit(
        budget.hold, 60, wait_s=PATIENCE_S, stop=lambda: left if gone.is_set() else None
    )
    wait_until(lambda: budget.num_waiting == 1)
    gone.set()
    assert waiting.exception(PATIENCE_S) is left
    assert budget.num_waiting == 0


@pytest.mark.parametrize(
    ("waited_s", "said"),
    [(0.0, "find room;"), (0.000976885, "within less than 1 ms;"), (0.0123, "within 12 ms;")],
)
def test_how_long_one_waited_is_said_as_people_say_it(budget, waited_s, said):
    budget.hold(60)
    with pytest.raises(NoRoomError, match=said):
        budget.hold(60, wait_s=waited_s)


def test_who_came_first_goes_first_however_large(budget, pool):
    first = budget.hold(60)
    large = pool.submit(budget.hold, 75, wait_s=PATIENCE_S)
    wait_until(lambda: budget.num_waiting == 1)
    with pytest.raises(NoRoomError):
        budget.hold(10, wait_s=0)
    first.release()
    assert large.result(PATIENCE_S).amount == 75


def test_a_click_goes_before_bulk_work_that_waits(budget, pool):
    first = budget.hold(100)
    bulk = pool.submit(budget.hold, 70, is_bulk=True, wait_s=PATIENCE_S)
    wait_until(lambda: budget.num_waiting == 1)
    click = pool.submit(budget.hold, 50, wait_s=PATIENCE_S)
    wait_until(lambda: budget.num_waiting == 2)
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


@pytest.mark.parametrize("is_bulk", [False, True], ids=["a click", "bulk work"])
def test_one_that_is_larger_than_everything_passes_beside_little(budget, is_bulk):
    with budget.hold(20), budget.hold(250, is_bulk=is_bulk, wait_s=0):
        assert budget.held == 270
        with pytest.raises(NoRoomError):
            budget.hold(1, wait_s=0)


@pytest.mark.parametrize("is_bulk", [False, True], ids=["clicks", "bulk work"])
def test_two_that_are_larger_than_everything_go_one_after_the_other(budget, pool, is_bulk):
    most = []

    def work():
        with budget.hold(250, is_bulk=is_bulk, wait_s=PATIENCE_S):
            most.append(budget.held)

    for done in [pool.submit(work) for _ in range(8)]:
        done.result(PATIENCE_S)
    assert most == [250] * 8
    assert budget.held == 0


def test_many_threads_leave_nothing_behind(budget, pool):
    def work(number):
        with budget.hold(1 + 13 * number % 90, is_bulk=number % 3 == 0, wait_s=PATIENCE_S):
            assert budget.held <= 100

    for done in [pool.submit(work, number) for number in range(200)]:
        done.result(PATIENCE_S)
    assert (budget.held, budget.num_waiting) == (0, 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", 700), ("  ", 700), ("3", 30), (" 12 ", 120)],
    ids=["not set", "only spaces", "a number", "a number with spaces"],
)
def test_an_administrator_may_set_a_capacity(monkeypatch, text, expected):
    monkeypatch.setenv("A_LIMIT", text)
    assert from_environment("A_LIMIT", 10, 700) == expected


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "much", "1e3", "\u00b2"])
def test_a_capacity_that_is_no_number_is_refused_in_a_sentence(monkeypatch, text):
    monkeypatch.setenv("A_LIMIT", text)
    with pytest.raises(RequestError, match=r"A_LIMIT is a whole number above 0"):
        from_environment("A_LIMIT", 10, 700)


GROUPS = {
    "no control groups": ({}, None),
    "version 2": ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/memory.max": "1000"}, 1000),
    "version 2, the least of all above": (
        {
            "proc/self/cgroup": "0::/a/b",
            "sys/fs/cgroup/a/memory.max": "1000",
            "sys/fs/cgroup/a/b/memory.max": "2000",
        },
        1000,
    ),
    "version 2 without a limit": (
        {"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/memory.max": "max"},
        None,
    ),
    "version 2, the container's own at the top": (
        {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "1000"},
        1000,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "5:cpu:/x\n4:memory:/docker/1",
            "sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes": "1000",
        },
        1000,
    ),
    "version 1, the path is the host's": (
        {
            "proc/self/cgroup": "4:memory,hugetlb:/docker/1",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000",
        },
        1000,
    ),
    "version 1 without a limit": (
        {
            "proc/self/cgroup": "4:memory:/",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        },
        None,
    ),
    "junk": ({"proc/self/cgroup": "\n:\nx", "sys/fs/cgroup/memory.max": "much"}, None),
    "another kind only": ({"proc/self/cgroup": "5:cpu:/x"}, None),
}


@pytest.mark.parametrize(("files", "expected"), GROUPS.values(), ids=GROUPS)
def test_a_container_has_the_memory_of_its_group(tmp_path, files, expected):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    machine = memory_limit_bytes(tmp_path / "nothing")
    assert machine > 2**20
    assert memory_limit_bytes(tmp_path) == (expected or machine)
