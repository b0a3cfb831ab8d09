"""On a GPU, searches in recorded buffers give the reference's answers and never wait."""

from __future__ import annotations

import pytest
import torch
from crowd import MODES, Crowd, mixed_limits, settings_of
from recording import Place, small_buckets
from tiny_reference import SEEDS

from florence2 import Ask, Florence2
from florence2.runtimes.cuda_graphs import CudaRecorder
from florence2.runtimes.decode_graphs import RECORD_AT
from florence2_demo.drawing import draw_scene
from florence2_demo.scene import make_scene

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TASKS = ("<OD>", "<CAPTION>", "<OCR>", "<REGION_PROPOSAL>", "<MORE_DETAILED_CAPTION>")


@pytest.fixture
def small(monkeypatch):
    small_buckets(monkeypatch, cross_lengths=8)


def new_place(seed):
    return Place(seed, CudaRecorder(torch.device("cuda")), device="cuda")


def new_crowd(seed, settings):
    return Crowd(seed, settings, mixed_limits(), device="cuda")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("ngram", [0, 3])
@pytest.mark.parametrize(("beams", "early_stopping"), MODES)
def test_whoever_comes_is_answered_as_the_reference_does(beams, early_stopping, ngram, caplog):
    settings = settings_of(beams, early_stopping, ngram)
    for seed in SEEDS:
        place = new_place(seed)
        for _ in range(3):
            crowd = new_crowd(seed, settings)
            crowd.run(place.batch(settings))
            assert (crowd.failed(), crowd.differing()) == ([], [])
        assert place.graphs.num_graphs > 0
    assert "CUDA graphs are off" not in caplog.text


@pytest.mark.usefixtures("small")
def test_other_searches_and_freed_memory_in_between_change_no_answer():
    settings = settings_of()
    place, outer = new_place(SEEDS[0]), new_crowd(SEEDS[0], settings)
    turns, inner = iter(range(10**6)), []

    def meanwhile():
        turn = next(turns)
        if turn % 7 == 3:
            inner.append(new_crowd(SEEDS[0], settings))
            inner[-1].run(place.batch(settings))
        if turn % 11 == 5:
            place.free_memory()

    outer.meanwhile = meanwhile
    outer.run(place.batch(settings))
    assert len(inner) > 2
    assert [crowd.differing() for crowd in (outer, *inner)] == [[]] * (1 + len(inner))


def test_a_recorded_step_does_not_wait_for_the_device():
    settings = settings_of()
    place, crowd = new_place(SEEDS[0]), new_crowd(SEEDS[0], settings)
    for _ in range(2 * RECORD_AT):
        crowd.begin(1)
        crowd.run(place.batch(settings))
    batch, num_steps = place.batch(settings), 0
    advance = batch.advance

    def watched():
        nonlocal num_steps
        num_steps += 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            advance()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    batch.advance = watched
    crowd.begin(1)
    crowd.run(batch)
    assert crowd.differing() == []
    assert num_steps > 10


def test_float32_answers_that_join_and_leave_are_those_asked_alone():
    model = Florence2.load("demo", device="cuda", precision="fp32")
    asks = [Ask(draw_scene(make_scene(seed)), task) for seed in range(6) for task in TASKS]
    alone = [model.run_many([ask])[0].token_ids for ask in asks]
    model.engine.prompt_batch = 8
    for _ in range(2):
        assert [result.token_ids for result in model.run_many(asks)] == alone
    assert model.engine.runtime.graphs.num_graphs > 0
    model.close()


def test_parked_weights_come_back_and_steps_are_recorded_again():
    model = Florence2.load("demo", device="cuda", precision="fp32")
    ask = Ask(draw_scene(make_scene(1)), "<OD>")
    before = model.run_many([ask])[0].token_ids
    model.engine.park()
    assert model.engine.runtime.graphs.num_graphs == 0
    assert [model.run_many([ask])[0].token_ids for _ in range(3)] == [before] * 3
    assert model.engine.runtime.graphs.num_graphs > 0
    model.close()
