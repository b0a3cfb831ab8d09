"""Searches in recorded batches give the reference's answers, whoever comes, goes and grows."""

from __future__ import annotations

import pytest
import torch
from recorders import GPU, RECORDERS, Place, TapingRecorder
from tiny_reference import COUNT, SEARCHES, SEEDS, Crowd, mixed_limits, naive_session, settings_of

import florence2.generation.beam_search
from florence2.generation.beam_search import BeamSearch, LocationProbability
from florence2.generation.decode import DecodeBatch
from florence2.generation.kv_cache import StaticSession
from florence2.network import florence
from florence2.network.config import tiny_config
from florence2.network.florence import Florence2Network
from florence2.records import GenerationSettings
from florence2.runtimes import decode_graphs
from florence2.runtimes.decode_graphs import RECORD_AT, Bucket

EAGER = pytest.param(lambda: None, id="eager")
LOCATIONS = LocationProbability(first_location_id=20, radius_bins=2)


@pytest.fixture(autouse=True)
def sizes(monkeypatch):
    """Sizes of which the tiny searches need many."""
    monkeypatch.setattr(decode_graphs, "STEPS", (2, 4, 8, 16, 32))
    monkeypatch.setattr(decode_graphs, "CROSS_LENGTHS", 3)
    monkeypatch.setattr(decode_graphs, "FIRST_STEPS", 2)


@pytest.fixture
def place():
    return Place(SEEDS[0], TapingRecorder())


def crowd_of(place, settings=None, limits=None) -> Crowd:
    return Crowd(place.seed, settings or settings_of(), limits or mixed_limits(), place.device)


def search(place, settings=None, limits=None, **options):
    """A crowd that is searched in one of the place's batches is answered right."""
    crowd = crowd_of(place, settings, limits)
    crowd.run(place.batch(crowd.settings), **options)
    assert (crowd.failed(), crowd.differing()) == ([], [])


@pytest.mark.parametrize("recorder", [EAGER, *RECORDERS])
@pytest.mark.parametrize(("seed", "settings"), SEARCHES.values(), ids=SEARCHES)
def test_whoever_comes_is_answered_as_the_reference_does(seed, settings, recorder, caplog):
    place = Place(seed, recorder())
    for _ in range(2 if place.device == "cpu" else 3):
        search(place, settings)
    assert (place.graphs.num_graphs > 0) == (place.recorder is not None)
    assert "CUDA graphs are off" not in caplog.text


@pytest.mark.parametrize("lag", [1, 2])
def test_news_that_come_late_change_no_answer(place, lag):
    for _ in range(3):
        search(place, flags_lag=lag)
    assert place.graphs.num_graphs > 0


def test_scores_are_those_of_searching_plainly(place):
    settings = settings_of()
    recorded, plain = crowd_of(place), crowd_of(place)
    found = recorded.run(place.pool.take(settings, LOCATIONS))
    expected = plain.run(DecodeBatch(settings, LOCATIONS))
    assert any(one.near_log_probs != one.log_probs for one in expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.truncated == theirs.truncated
        assert ours.log_probs == pytest.approx(theirs.log_probs, abs=1e-4)
        assert ours.near_log_probs == pytest.approx(theirs.near_log_probs, abs=1e-4)
        assert ours.beam_score == pytest.approx(theirs.beam_score, abs=1e-4)


def test_the_ban_looks_no_further_than_the_steps_of_the_bucket(place, monkeypatch):
    looked, steps_of_buckets = [], []
    ban, view_of = florence2.generation.beam_search.ban_repeated_ngrams, BeamSearch.view

    def noting(log_probs, history, *others):
        looked.append(history.shape[1])
        ban(log_probs, history, *others)

    def viewed(search, num_rows, steps):
        steps_of_buckets.append(steps)
        return view_of(search, num_rows, steps)

    settings = settings_of()
    crowd = crowd_of(place, limits=[39] * COUNT)
    monkeypatch.setattr(BeamSearch, "view", viewed)
    monkeypatch.setattr(florence2.generation.beam_search, "ban_repeated_ngrams", noting)
    crowd.run(place.batch(settings))
    assert crowd.differing() == []
    # The tokens that all begin with, the first one, and the bucket's, up to the position table.
    assert {length for length in looked if length > 2} == {min(3 + n, 41) for n in steps_of_buckets}
    assert min(steps_of_buckets) == 2


def test_logits_of_reduced_precision_can_be_recorded(monkeypatch):
    monkeypatch.setattr(florence, "SMALL_VOCABULARY", 0)
    monkeypatch.setattr(florence, "BLOCK", 8)
    network = Florence2Network(tiny_config()).bfloat16().prepare_for_inference()
    rows = torch.zeros(2, 3, network.config.text.d_model, dtype=torch.bfloat16)
    found = torch.zeros(2, 3, network.config.text.vocab_size)
    with torch.inference_mode():
        recorded = TapingRecorder().record(lambda: found.copy_(network.next_logits(rows, 5)))
        for _ in range(2):
            rows.normal_()
            recorded.replay()
            assert torch.equal(found, network.next_logits(rows, 5))


def test_the_same_once_more_records_nothing(place):
    for _ in range(7):
        place.recorder.events.clear()
        search(place)
    assert "record" not in place.recorder.events
    assert place.recorder.events.count("replay") > 10


def test_rows_steps_and_prompts_grow_in_the_middle_of_answers(place, monkeypatch):
    sizes = []
    enlarge = StaticSession.enlarge

    def noting(session, *size):
        sizes.append(size)
        enlarge(session, *size)

    monkeypatch.setattr(StaticSession, "enlarge", noting)
    settings = settings_of()
    crowd = crowd_of(place, limits=[39] * COUNT)
    space = place.batch(settings)
    lengths = crowd.prompts.mask.sum(dim=1)
    by_length = sorted(range(COUNT), key=lambda item: int(lengths[item]))
    crowd.left = by_length
    crowd.random.randint = lambda low, high: 1 + len(crowd.answers) % 3
    crowd.run(space, max_rows=7)
    assert crowd.differing() == []
    rows, steps, cross = (sorted(set(column)) for column in zip(*sizes, strict=True))
    assert len(rows) > 1
    assert len(steps) > 2
    assert cross == [3, 6, 9]


@pytest.mark.parametrize("recorder", RECORDERS)
def test_other_searches_in_between_have_rows_of_their_own(recorder):
    place = Place(SEEDS[0], recorder())
    outer, inner = crowd_of(place), []

    def ask_in_between():
        if outer.random.random() < 0.1:
            inner.append(crowd_of(place, limits=[16, 9]))
            inner[-1].run(place.batch(outer.settings))

    outer.meanwhile = ask_in_between
    outer.run(place.batch(outer.settings))
    assert len(inner) > 2
    assert [crowd.differing() for crowd in (outer, *inner)] == [[]] * (1 + len(inner))
    assert place.pool.idle_bytes > 0


@pytest.mark.parametrize("recorder", RECORDERS)
def test_memory_freed_in_the_middle_costs_recordings_and_no_answers(recorder):
    place = Place(SEEDS[1], recorder())
    crowd, passes, events = crowd_of(place), iter(range(10**6)), place.recorder.events
    crowd.meanwhile = lambda: next(passes) % 11 or place.free_memory()
    for _ in range(2):
        crowd.begin(SEEDS[1])
        crowd.run(place.batch(crowd.settings))
        assert (crowd.failed(), crowd.differing()) == ([], [])
    assert events.count("record") > place.graphs.num_graphs > 0
    place.free_memory()
    assert place.graphs.num_graphs == place.pool.idle_bytes == 0
    assert events.count("reset") == events.count("record")


def test_nan_stays_in_its_row_and_is_gone_with_it(place):
    crowd = crowd_of(place, limits=[12, 24, 9, 9, 9, 9, 24, 9])
    crowd.alter = lambda items, states: 0 in items and states[items.index(0)].fill_(torch.nan)
    for _ in range(3):
        crowd.begin(SEEDS[0])
        crowd.random.randint = lambda low, high: min(2, high)
        crowd.run(place.batch(crowd.settings), max_rows=3)
        assert (crowd.failed(), crowd.differing()) == ([0], [])
    assert place.graphs.num_graphs > 0


def test_the_place_of_what_is_given_up_is_taken_by_another(place):
    crowd = crowd_of(place, limits=[16] * COUNT)
    crowd.give_up(0, 7, 8, 21)
    crowd.run(place.batch(crowd.settings), max_rows=4)
    assert (crowd.failed(), crowd.differing()) == ([0, 7, 8, 21], [])


def test_searches_of_different_settings_share_no_batch(place):
    for beams in (1, 3, 4, 3, 1):
        search(place, settings_of(beams), mixed_limits(8))


def test_what_was_recorded_for_one_limit_serves_another(place):
    for limit in (24, 39, 7):
        search(place, GenerationSettings(max_new_tokens=limit), [limit] * 8)
    assert len(place.pool.idle_settings) == 1


def test_idle_batches_take_no_more_memory_than_they_may():
    place = Place(SEEDS[0], TapingRecorder(), max_idle_bytes=0)
    for _ in range(2):
        search(place, limits=[39] * 8)
        assert place.pool.idle_bytes == 0
        assert place.graphs.num_graphs == place.recorder.num_alive == 0


def test_ever_new_settings_keep_a_stated_number_of_batches(place, monkeypatch):
    monkeypatch.setattr("florence2.runtimes.decode_graphs.MAX_IDLE", 2)
    for penalty in (0.5, 1.0, 1.5, 2.0, 1.5):
        search(place, GenerationSettings(length_penalty=penalty), mixed_limits(8))
    assert [one.length_penalty for one in place.pool.idle_settings] == [2.0, 1.5]


def test_a_search_that_breaks_off_gives_its_batch_back(place):
    crowd = crowd_of(place, limits=[39] * COUNT)

    def stop():
        if len(crowd.answers) > 3:
            raise KeyboardInterrupt

    crowd.meanwhile = stop
    with pytest.raises(KeyboardInterrupt):
        crowd.run(place.batch(crowd.settings))
    assert place.pool.idle_bytes > 0
    search(place)


def test_a_batch_that_could_not_grow_is_not_used_again(place, monkeypatch):
    settings, enlarge, sizes = settings_of(), StaticSession.enlarge, []

    def run_out(session, num_rows, steps, cross_length):
        sizes.append(steps)
        if len(sizes) == 3:
            # Some tensors have grown by then.
            enlarge(session, num_rows, 3 * steps + 100, cross_length)
            raise torch.OutOfMemoryError("no memory left")
        enlarge(session, num_rows, steps, cross_length)

    monkeypatch.setattr(StaticSession, "enlarge", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        crowd_of(place, limits=[39] * COUNT).run(place.batch(settings))
    assert place.pool.idle_bytes == 0
    search(place)


def test_nothing_can_be_asked_of_a_batch_before_something_joins(place):
    for batch in (place.batch(settings_of()), DecodeBatch(settings_of())):
        for ask in (lambda: batch.search, batch.advance, lambda: batch.keep([])):  # noqa: B023
            with pytest.raises(RuntimeError, match="Nothing has joined"):
                ask()


def test_only_sessions_of_our_own_network_are_recorded(place):
    crowd = Crowd(SEEDS[0], settings_of(), [5], session=naive_session)
    with pytest.raises(TypeError, match=r"for a DecoderSession, not .*NaiveSession"):
        crowd.run(place.batch(crowd.settings))


@pytest.mark.parametrize("recorder", [pytest.param(RECORDERS[-1].values[0], marks=GPU)])
def test_a_recorded_step_does_not_wait_for_the_device(recorder):
    place = Place(SEEDS[0], recorder())
    for _ in range(2 * RECORD_AT):
        search(place)
    batch, num_steps = place.batch(settings_of()), 0
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
    crowd = crowd_of(place)
    crowd.run(batch)
    assert crowd.differing() == []
    assert num_steps > 10


@pytest.mark.parametrize(
    ("needed", "recorded"),
    [
        ((1, 1, 1), (1, 2, 3)),
        ((5, 2, 3), (8, 2, 3)),
        ((24, 3, 4), (24, 4, 6)),
        ((25, 17, 9), (32, 32, 9)),
        ((128, 33, 7), (128, 40, 9)),
        ((129, 40, 7), (256, 40, 9)),
    ],
)
def test_buckets_are_rounded_up(needed, recorded):
    assert Bucket(*needed).rounded(40) == Bucket(*recorded)
