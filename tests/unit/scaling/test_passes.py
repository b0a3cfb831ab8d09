"""When a run over a cluster is done, goes on, or gives up: without a cluster."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from florence2.errors import RequestError
from serve.scaling.cluster import (
    ClusterError,
    PassEndedError,
    Pipeline,
    Stall,
    Workers,
    committed_shards,
    patient_shards,
)
from serve.scaling.plan import Plan, Source
from serve.scaling.shards import commit_shard, open_shard
from serve.scaling.storage import StorageError


@pytest.fixture
def pipeline(bucket, target, work):
    """Four shards of an image each, none of which is done."""
    bucket(a=b"", b=b"", c=b"", d=b"")
    source = Source("memory://in", recursive=False, skip=target.address)
    model = SimpleNamespace(name="demo")
    return Pipeline(work(), source, 1, Workers(model, None), frozenset())


@pytest.fixture
def passes(preparer):
    """Passes that each commit as many shards as it says, and end as ``ends`` says; what each had to
    do is kept."""

    def scripted(*script):
        given = []

        def one_pass(pipeline):
            count, *ends = script[min(len(given), len(script) - 1)]
            plan = Plan(pipeline.work.target, pipeline.source, pipeline.shard_size)
            todo = [one for one in plan.shards() if one.number not in pipeline.done]
            given.append([shard.number for shard in todo])
            for shard in todo[:count]:
                work = pipeline.work
                yield commit_shard(work, shard, open_shard(work, shard, preparer))
            for number, end in enumerate(ends):
                if callable(end):
                    shard = todo[count + number]
                    end(pipeline.work, shard)
                else:
                    raise end

        one_pass.given = given
        return one_pass

    return scripted


def test_what_a_pass_leaves_is_in_the_next_one(pipeline, passes):
    one_pass = passes((2,), (0, PassEndedError("a machine ended")), (1,), (1,))
    found = [one.shard for one in committed_shards(pipeline, one_pass)]
    assert found == [0, 1, 2, 3]
    assert one_pass.given == [[0, 1, 2, 3], [2, 3], [2, 3], [3]]


def test_what_is_done_is_not_given_again(pipeline, passes):
    one_pass = passes((4,))
    done = replace(pipeline, done=frozenset({1, 2}))
    assert [one.shard for one in committed_shards(done, one_pass)] == [0, 3]


def test_a_shard_that_was_committed_by_a_machine_that_ended_counts(pipeline, passes, preparer):
    def silently(work, shard):
        commit_shard(work, shard, open_shard(work, shard, preparer))

    one_pass = passes((3, silently))
    assert [one.shard for one in committed_shards(pipeline, one_pass)] == [0, 1, 2, 3]
    assert len(one_pass.given) == 1


def test_a_run_that_gets_nowhere_is_given_up(pipeline, passes):
    one_pass = passes((1,), (0, PassEndedError("no worker starts")))
    with pytest.raises(ClusterError, match=r"3 shards .* 5 times .*\(no worker starts\)"):
        list(committed_shards(pipeline, one_pass))
    assert len(one_pass.given) == 6


def test_what_ends_a_run_ends_it_at_once(pipeline, passes):
    one_pass = passes((1, RequestError("The prompt is too long.")))
    with pytest.raises(RequestError):
        list(committed_shards(pipeline, one_pass))
    assert len(one_pass.given) == 1


@pytest.mark.parametrize(
    ("machines", "came_s", "now_s", "is_certain"),
    [
        ([{"a", "b"}], [], 61, False),
        ([{"a", "b"}, {"a"}], [], 59, False),
        ([{"a", "b"}, {"a"}], [], 61, True),
        ([{"a"}, {"a", "b"}, {"a"}], [], 61, True),
        ([{"a", "b"}, {"a", "c"}], [], 61, True),
        ([{"a"}, {"a", "b"}], [], 61, False),
        ([{"a", "b"}, {"a"}], [100], 350, False),
        ([{"a", "b"}, {"a"}], [100], 401, True),
    ],
    ids=[
        "all there", "soon", "one lost", "grown and lost", "lost and replaced", "grown",
        "results come slowly", "much too slowly",
    ],
)  # fmt: skip
def test_results_are_lost_once_a_machine_is_and_nothing_comes(machines, came_s, now_s, is_certain):
    stall = Stall(0.0, machines[0])
    for at_s in came_s:
        stall.came(at_s)
    for alive in machines[:-1]:
        assert not stall.is_certain(came_s[-1] if came_s else 0, alive)
    assert stall.is_certain(now_s, machines[-1]) is is_certain


def failing(plan, monkeypatch, fails):
    """The plan's parts cannot be read after the second shard, as often as said."""
    whole, left = list(plan.shards()), [fails]

    def shards(self):
        for shard in whole:
            if shard.number == 2 and left[0]:
                left[0] -= 1
                raise StorageError("gone")
            yield shard

    monkeypatch.setattr(Plan, "shards", shards)
    return plan


def test_planning_waits_for_a_store_that_is_gone(pipeline, target, monkeypatch):
    plan = failing(Plan(target, pipeline.source, 1), monkeypatch, 3)
    slept = []
    found = [one.number for one in patient_shards(plan, {0}, slept.append)]
    assert found == [1, 2, 3]
    assert slept == [5.0, 20.0, 60.0]


def test_planning_ends_where_a_store_stays_away(pipeline, target, monkeypatch):
    plan = failing(Plan(target, pipeline.source, 1), monkeypatch, 99)
    with pytest.raises(StorageError):
        list(patient_shards(plan, set(), lambda wait_s: None))
