"""On a GPU, searches in recorded buffers give the reference's answers and never wait."""

from __future__ import annotations

import pytest
import torch
from crowd import COUNT, Crowd, Place, mixed_limits, settings_of
from tiny_reference import SEEDS

from florence2 import Ask, Florence2
from florence2.runtimes import decode_graphs as decode_buffers
from florence2.runtimes.cuda_graphs import CudaRecorder
from florence2_demo.drawing import draw_scene
from florence2_demo.scene import make_scene

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODES = [(1, True), (3, True), (3, False), (4, "never")]
TASKS = ("<OD>", "<CAPTION>", "<OCR>", "<REGION_PROPOSAL>", "<MORE_DETAILED_CAPTION>")


@pytest.fixture
def small_windows(monkeypatch):
    """Sizes of which the tiny searches need many."""
    monkeypatch.setattr(decode_buffers, "STEPS", (2, 4, 8, 16, 32))
    monkeypatch.setattr(decode_buffers, "CROSS_LENGTHS", 8)
    monkeypatch.setattr("florence2.runtimes.decode_graphs.FIRST_STEPS", 2)


def new_place(seed: int) -> Place:
    return Place(seed, CudaRecorder(torch.device("cuda")), device="cuda")


def new_crowd(seed: int, settings) -> Crowd:
    return Crowd(seed, settings, mixed_limits(), device="cuda")


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("ngram", [0, 3])
@pytest.mark.parametrize(("beams", "early_stopping"), MODES)
def test_whoever_comes_is_answered_as_the_reference_does(beams, early_stopping, ngram, caplog):
    settings = settings_of(beams, early_stopping, ngram)
    for seed in SEEDS:
        place = new_place(seed)
        for _ in range(3):
            crowd = new_crowd(seed, settings)
            crowd.run(place.pool.space(settings, None))
            assert crowd.differing() == []
        assert place.graphs.num_graphs > 0
    assert "CUDA graphs are off" not in caplog.text


@pytest.mark.usefixtures("small_windows")
def test_other_searches_and_freed_memory_in_between_change_no_answer():
    settings = settings_of()
    place, outer = new_place(SEEDS[0]), new_crowd(SEEDS[0], settings)
    turns, inner = iter(range(10**6)), []

    def meanwhile():
        turn = next(turns)
        if turn % 7 == 3:
            inner.append(new_crowd(SEEDS[0], settings))
            inner[-1].run(place.pool.space(settings, None))
        if turn % 11 == 5:
            place.free_memory()

    outer.meanwhile = meanwhile
    outer.run(place.pool.space(settings, None))
    assert len(inner) > 2
    assert outer.differing() == []
    assert [crowd.differing() for crowd in inner] == [[]] * len(inner)


def test_a_recorded_step_does_not_wait_for_the_device():
    settings = settings_of()
    place, crowd = new_place(SEEDS[0]), new_crowd(SEEDS[0], settings)
    for _ in range(2 * decode_buffers.RECORD_AT):
        crowd.left, crowd.answers = list(range(COUNT)), {}
        crowd.random.seed(1)
        crowd.run(place.pool.space(settings, None))
    space, num_steps = place.pool.space(settings, None), 0
    advance = space.advance

    def watched():
        nonlocal num_steps
        num_steps += 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            advance()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    space.advance = watched
    crowd.left, crowd.answers = list(range(COUNT)), {}
    crowd.random.seed(1)
    crowd.run(space)
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
