"""Who holds a run, seen by another process: alive, gone, or not to be told from here."""

import json
import os
import threading
from types import SimpleNamespace

import pytest

from florence2.errors import GenerationCancelledError
from serve.platform import lease as module
from serve.platform.lease import Holder, Lease, RunHeldError

ELSEWHERE = {"token": "t", "who": "other, process 7", "machine": "other", "pid": 7, "beat": 3}


@pytest.fixture
def files(monkeypatch):
    """The files of the team; beats come quickly."""
    stored = {}
    monkeypatch.setattr(module, "read_text", lambda api, team_id, path: stored.get(path))
    monkeypatch.setattr(
        module, "write_text", lambda api, team_id, path, text: stored.update({path: text})
    )
    for name, value in {"BEAT_S": 0.02, "LEASE_S": 0.12, "CONFIRM_S": 0.0}.items():
        monkeypatch.setattr(module, name, value)
    return stored


def held_by(files, **changed):
    at = module.now()
    files["/run"] = json.dumps({**ELSEWHERE, "at": at, **changed})


def lease():
    return Lease(SimpleNamespace(), 3, "/run", "Run 3f9a01bc over project 5", lambda: 12)


def taken(should_stop=lambda: False):
    found = lease()
    found.take(should_stop)
    return found


def test_nobody_holds_a_new_run_and_then_its_maker_does(files):
    held = lease()
    held.start()
    stored = Holder.of_text(files["/run"])
    assert (stored.who, stored.num_done) == (held.who, 12)
    assert stored.is_gone() is False
    with pytest.raises(RunHeldError, match="Run 3f9a01bc over project 5 is worked on by"):
        taken()
    held.release()
    assert Holder.of_text(files["/run"]).is_gone() is True
    taken().release()


GONE = {
    "it let go": {"is_released": True},
    "its last sign is of yesterday": {"at": "2020-01-01T00:00:00Z"},
    "it gives no sign": {},
    "its file has keys of a later version": {"beat": None, "unknown": 1},
}


@pytest.mark.parametrize("changed", GONE.values(), ids=GONE)
def test_a_run_whose_holder_is_gone_is_taken_over(files, changed):
    held_by(files, **changed)
    taking = taken()
    assert Holder.of_text(files["/run"]).who == taking.who
    taking.release()


def test_a_run_whose_file_says_nothing_that_can_be_read_is_taken_over(files):
    files["/run"] = "no JSON"
    taken().release()


def test_a_killed_process_of_this_machine_is_known_to_be_gone_at_once(files, monkeypatch):
    monkeypatch.setattr(module, "LEASE_S", 1000.0)
    here = Holder.here()
    held_by(files, machine=here.machine, pid=2**22 + 1)
    taken().release()
    held_by(files, machine=here.machine, pid=here.pid)
    taken().release()


def test_a_living_process_of_this_machine_that_was_just_heard_of_is_not_waited_for(
    files, monkeypatch
):
    monkeypatch.setattr(module, "LEASE_S", 60.0)
    here = Holder.here()
    held_by(files, machine=here.machine, pid=os.getppid())
    assert Holder.of_text(files["/run"]).is_gone() is False
    held_by(files, machine=here.machine, pid=os.getppid(), at="2020-01-01T00:00:00Z")
    assert Holder.of_text(files["/run"]).is_gone() is True


def test_of_two_that_see_at_once_that_nobody_holds_a_run_one_gets_it(files, monkeypatch):
    both_saw = threading.Barrier(2)

    def read_text(api, team_id, path):
        found = files.get(path)
        if found is None:
            both_saw.wait(10)
        return found

    monkeypatch.setattr(module, "read_text", read_text)
    monkeypatch.setattr(module, "CONFIRM_S", 0.2)
    got, refused = [], []

    def take():
        try:
            got.append(taken())
        except RunHeldError as error:
            refused.append(error)

    takers = [threading.Thread(target=take) for _ in range(2)]
    for one in takers:
        one.start()
    for one in takers:
        one.join()
    assert (len(got), len(refused)) == (1, 1)
    got[0].release()


def test_a_holder_that_gives_a_sign_keeps_its_run(files):
    held_by(files)
    ended = threading.Event()

    def beat():
        number = 3
        while not ended.wait(0.01):
            held_by(files, beat=(number := number + 1))

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(RunHeldError, match="other, process 7"):
            taken()
    finally:
        ended.set()
        beating.join()


def test_the_wait_for_a_sign_is_told_and_can_be_stopped(files, monkeypatch):
    told = []
    monkeypatch.setattr(module.sly.logger, "warning", told.append)
    held_by(files)
    with pytest.raises(GenerationCancelledError):
        taken(lambda: True)
    assert "worked on by other, process 7" in told[0]


def test_who_was_thought_gone_finds_out_that_the_run_is_anothers(files):
    held = lease()
    held.start()
    held.check()
    held_by(files, beat=1)
    threading.Event().wait(0.1)
    with pytest.raises(RunHeldError, match="other, process 7"):
        held.check()
    held.release()
    assert Holder.of_text(files["/run"]).who == "other, process 7"
