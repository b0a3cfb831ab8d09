"""The decode loop: items join and leave a running batch, and are answered as if alone."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from tiny_reference import (
    COUNT,
    MODES,
    SEARCHES,
    SEEDS,
    Crowd,
    NaiveSession,
    answer_in_batches,
    differences,
    expected_answers,
    expected_by_limit,
    mixed_limits,
    naive_session,
    network_session,
    random_prompts,
    settings_of,
    tiny_model,
)
from torch import Tensor

import florence2.generation.decode
from florence2.errors import FlorenceError, NotFiniteError, RequestError
from florence2.generation.decode import DecodeBatch, generate
from florence2.records import Answer, GenerationSettings


def answers_of(session, settings, limits, **options):
    return generate(session, DecodeBatch(settings), limits, **options)


def naive(count, seed=SEEDS[0], kind=NaiveSession, **options):
    return kind(tiny_model(seed), random_prompts(seed, count), **options)


@pytest.mark.parametrize(("seed", "settings"), SEARCHES.values(), ids=SEARCHES)
def test_whoever_joins_is_answered_as_the_reference_does(seed, settings):
    # Rows that nobody waits for go on beyond the positions, which the reference has not.
    short = [min(limit, 24) for limit in mixed_limits()]
    for make, limits in ((network_session, mixed_limits()), (naive_session, short)):
        crowd = Crowd(seed, settings, limits, session=make)
        crowd.run(max_rows=5)
        assert (crowd.failed(), crowd.differing()) == ([], [])
        assert any(room < 5 for room, _ in crowd.rooms)
        assert all(count <= room <= 5 for room, count in crowd.rooms)


def test_few_free_rows_wait_for_company():
    crowd = Crowd(SEEDS[0], settings_of(), mixed_limits())
    crowd.run(max_rows=8, least_room=4)
    assert (crowd.failed(), crowd.differing()) == ([], [])
    assert all(room >= 4 for room, _ in crowd.rooms)


@pytest.mark.parametrize("names_waiting", [False, True])
def test_the_place_of_what_is_given_up_is_taken_by_another(names_waiting):
    crowd = Crowd(SEEDS[1], settings_of(), [16] * COUNT)
    crowd.names_waiting = names_waiting
    crowd.give_up(0, 7, 8, 21)
    crowd.run(max_rows=4)
    assert (crowd.failed(), crowd.differing()) == ([0, 7, 8, 21], [])


def test_nan_stays_in_its_row_and_is_gone_with_it():
    crowd = Crowd(SEEDS[2], settings_of(), [6, 20, 9, 9, 9, 9])
    crowd.alter = lambda items, states: 0 in items and states[items.index(0)].fill_(torch.nan)
    crowd.random.randint = lambda low, high: 1
    crowd.run(max_rows=2)
    assert (crowd.failed(), crowd.differing()) == ([0], [])


@pytest.mark.parametrize("lag", [1, 2])
def test_answers_that_arrive_late_are_handed_out_once(lag):
    for seed in SEEDS:
        crowd = Crowd(seed, settings_of(), mixed_limits())
        passes = iter(range(10**6))

        def give_some_up(crowd=crowd, passes=passes):
            if next(passes) % 5 == 4 and crowd.in_hand:
                # Among them are some whose answers are on their way already.
                crowd.give_up(min(crowd.in_hand))

        crowd.meanwhile = give_some_up
        crowd.run(max_rows=5, flags_lag=lag)
        assert (crowd.failed(), crowd.differing()) == (sorted(crowd.reasons), [])
        assert 0 < len(crowd.reasons) < COUNT


@pytest.mark.parametrize("at_pass", range(1, 8))
def test_who_waits_for_an_answer_on_its_way_is_taken_in_after_it(at_pass):
    """Two are searched, the first is soon done, and the other is given up about then."""
    crowd = Crowd(SEEDS[0], settings_of(), [5, 24, 9])
    passes = iter(range(10**6))
    crowd.random.randint = lambda low, high: high
    crowd.random.random = lambda: 0.0
    crowd.meanwhile = lambda: next(passes) == at_pass and crowd.give_up(1)
    crowd.run(max_rows=2, flags_lag=1)
    assert (crowd.failed(), crowd.differing()) == ([1], [])


@pytest.mark.parametrize(
    ("seed", "beams", "early_stopping"),
    [(SEEDS[at % 3], *mode) for at, mode in enumerate([*MODES, (5, True)])],
)
def test_each_prompt_keeps_its_own_limit(seed, beams, early_stopping):
    settings = GenerationSettings(
        num_beams=beams, early_stopping=early_stopping, length_penalty=1.5
    )
    limits = [1, 2, 3, 5, 8, 13, 21, 24]
    model, prompts = tiny_model(seed), random_prompts(seed, 24)
    for start in range(0, 24, 8):
        part = prompts.pick(list(range(start, start + 8)))
        order = limits[start // 8 :] + limits[: start // 8]
        # The table is of all prompts; only these eight are looked at.
        expected = expected_by_limit(model, prompts, settings, order * 3)[start : start + 8]
        for make in (network_session, naive_session):
            found = answers_of(make(model, part, beams, order), settings, order)
            assert differences(found, expected) == []


def test_prompt_lengths_mix_without_changing_answers():
    model, prompts = tiny_model(SEEDS[0]), random_prompts(SEEDS[0], 32)
    assert len(set(prompts.mask.sum(dim=1).tolist())) >= 5
    alone, mixed = (answer_in_batches(model, prompts, settings_of(), 16, n) for n in (1, 32))
    for one, other in zip(alone, mixed, strict=True):
        assert (one.token_ids, one.truncated) == (other.token_ids, other.truncated)
        assert one.beam_score == pytest.approx(other.beam_score, abs=1e-4)
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)


@pytest.mark.parametrize(("beams", "early_stopping"), [*MODES, (5, True)])
@pytest.mark.parametrize("compact_at", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("lag", [0, 1, 3])
def test_retirement_does_not_change_answers(monkeypatch, beams, early_stopping, compact_at, lag):
    monkeypatch.setattr(florence2.generation.decode, "COMPACT_AT", compact_at)
    settings = settings_of(beams, early_stopping)
    model, prompts = tiny_model(SEEDS[1]), random_prompts(SEEDS[1], 24)
    expected = expected_answers(model, prompts, settings, 16)
    found = answer_in_batches(model, prompts, settings, 16, 12, flags_lag=lag)
    assert differences(found, expected) == []


def test_rows_are_dropped_by_the_stated_rule():
    session = naive(40)
    limits = [2 + item % 20 for item in range(40)]
    answers_of(session, settings_of(), limits)
    sizes = [size for _, size in session.calls]
    assert sizes[0] == 40
    assert sizes[-1] < 10
    keeps = [at for at, (name, _) in enumerate(session.calls) if name == "keep"]
    assert len(keeps) >= 5
    assert all(sizes[at] <= 0.75 * sizes[at - 1] for at in keeps)
    assert sum(name == "step" for name, _ in session.calls) <= max(limits) - 2


def test_a_prompt_is_decoded_no_longer_than_needed():
    model, prompts = tiny_model(SEEDS[0]), random_prompts(SEEDS[0], 30)
    expected = expected_answers(model, prompts, settings_of(beams=1), 16)
    for item in range(30):
        session = NaiveSession(model, prompts.pick([item]))
        answers_of(session, settings_of(beams=1), [16])
        assert len(session.calls) == max(1, expected[item].length - 1)


class LowSession(NaiveSession):
    """Answers in a low precision, in one buffer that it overwrites with each call."""

    dtype = torch.bfloat16
    widen = False
    buffer: Tensor

    def prefill(self):
        return self._low(super().prefill())

    def step(self, token_ids):
        assert torch.equal(self.buffer, self.given)
        self.buffer.fill_(float("nan"))
        return self._low(super().step(token_ids))

    def _low(self, logits):
        low = logits.to(self.dtype)
        self.buffer = low.float() if self.widen else low
        self.given = self.buffer.clone()
        return self.buffer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_widened_and_left_alone(dtype):
    answers = []
    for widen in (False, True):
        session = naive(12, SEEDS[2], LowSession)
        session.dtype, session.widen = dtype, widen
        answers.append(answers_of(session, settings_of(), [16] * 12))
    assert answers[0] == answers[1]


class StrictSession(NaiveSession):
    """Checks what the loop gives it, of 6 items with 4 beams."""

    reordered = False
    num_items = 6

    def prefill(self):
        logits = super().prefill()
        assert logits.shape == (self.num_items, 120)
        return logits

    def reorder(self, beam_indices):
        assert beam_indices.dtype == torch.long
        assert beam_indices.shape == (self.num_items, 4)
        self.reordered = True
        super().reorder(beam_indices)

    def step(self, token_ids):
        assert self.reordered
        self.reordered = False
        assert token_ids.dtype == torch.long
        assert token_ids.shape == (self.num_items, 4)
        return super().step(token_ids)

    def keep(self, items):
        assert not self.reordered
        assert items == sorted(set(items))
        self.num_items = len(items)
        super().keep(items)


def test_what_a_session_may_rely_on():
    session = naive(6, kind=StrictSession)
    answers_of(session, settings_of(beams=4), [2, 2, 4, 9, 12, 16])
    assert session.calls[1][0] == "keep"


def test_no_items_need_no_network():
    assert answers_of(None, settings_of(), []) == []


def test_more_beams_than_the_vocabulary_has_candidates_are_refused():
    with pytest.raises(RequestError, match="below half of the vocabulary of 120 tokens, not 60"):
        answers_of(naive(1), settings_of(beams=60), [5])


def watched(session, settings, limits, watch):
    """Answers of one session's prompts, all there from the start; ``watch`` names whom to give up.

    It is called before every pass.
    """
    crowd = Crowd(SEEDS[0], settings, limits, session=lambda *_, **__: session)
    crowd.random.randint, crowd.names_waiting = lambda low, high: high, True
    crowd.meanwhile = lambda: len(crowd.answers) < len(limits) and crowd.reasons.update(watch())
    return crowd.run(max_rows=len(limits))


def given_up_at(call, items):
    """Names ``items`` at the given call, counted from 0, and at every later one."""
    reasons = {item: FlorenceError(f"Nobody waits for {item}.") for item in items}
    calls = itertools.count()
    return lambda: reasons if next(calls) >= call else {}


@functools.cache
def undisturbed(settings, compact_at):
    """Answers to eight prompts of which none is given up, with that limit of compacting."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(florence2.generation.decode, "COMPACT_AT", compact_at)
        return answers_of(naive(8), settings, [16] * 8)


@pytest.mark.parametrize("compact_at", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("call", [1, 4])
@pytest.mark.parametrize("gone", [(0,), (1, 2, 5, 6, 7), (7,)])
def test_what_is_given_up_leaves_the_other_answers_as_they_are(
    monkeypatch, compact_at, beams, call, gone
):
    monkeypatch.setattr(florence2.generation.decode, "COMPACT_AT", compact_at)
    settings, stay = settings_of(beams), [item for item in range(8) if item not in gone]
    plain = undisturbed(settings, compact_at)
    answers = watched(naive(8), settings, [16] * 8, given_up_at(call, gone))
    given_up = [item for item in gone if not isinstance(answers[item], Answer)]
    assert given_up
    assert [str(answers[item]) for item in given_up] == [f"Nobody waits for {i}." for i in given_up]
    # What was complete by then is no longer given up.
    complete = [item for item in gone if item not in given_up]
    assert [answers[item] for item in complete] == [plain[item] for item in complete]
    assert [answers[i].token_ids for i in stay] == [plain[i].token_ids for i in stay]


def test_rows_given_up_leave_the_batch():
    session = naive(8)
    watched(session, settings_of(), [16] * 8, given_up_at(1, range(6)))
    assert session.calls[:2] == [("prefill", 8), ("keep", 2)]


@pytest.mark.parametrize("passes", [0, 1, 4])
def test_once_everything_is_given_up_there_is_no_further_pass(passes):
    session = naive(8)
    answers = watched(session, settings_of(), [16] * 8, given_up_at(passes, range(8)))
    assert any(isinstance(answer, FlorenceError) for answer in answers)
    assert sum(name != "keep" for name, _ in session.calls) == passes


def test_an_answer_that_is_complete_is_not_given_up():
    first, _ = watched(naive(2), settings_of(), [2, 16], given_up_at(3, [0]))
    assert isinstance(first, Answer)


def test_what_the_source_raises_comes_through():
    def broken():
        raise TimeoutError("too late")

    with pytest.raises(TimeoutError, match="too late"):
        watched(naive(2), settings_of(), [16] * 2, broken)


def test_the_source_is_asked_before_every_pass():
    session, asked = naive(8), []
    found = watched(session, settings_of(), [16] * 8, lambda: asked.append(1) or {})
    assert found == answers_of(naive(8), settings_of(), [16] * 8)
    assert len(asked) == sum(name != "keep" for name, _ in session.calls)


def broken(prompts):
    """A session of four, in which the logits of some are no numbers as long as all are there."""

    def spoil(logits):
        if len(logits) == 4:
            logits[prompts] = float("nan")
        return logits

    return naive(4, alter=spoil)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_network_that_gives_nan_is_an_error_not_an_answer(beams):
    answers = answers_of(broken(slice(None)), settings_of(beams), [16] * 4)
    assert [type(answer) for answer in answers] == [NotFiniteError] * 4
    assert "finite numbers" in str(answers[0])
    assert ". " not in str(answers[0])


@pytest.mark.parametrize("beams", [1, 3])
def test_nan_for_one_prompt_leaves_the_other_answers_as_they_are(beams):
    plain = answers_of(naive(4), settings_of(beams), [3] * 4)
    found = answers_of(broken(slice(2, 3)), settings_of(beams), [3] * 4)
    assert isinstance(found[2], NotFiniteError)
    assert found[:2] + found[3:] == plain[:2] + plain[3:]
