"""Batches: own limits, mixed lengths, retirement, stopping, what a session may rely on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import partial

import pytest
import torch
from tiny_reference import (
    SEEDS,
    NaiveSession,
    answer_in_batches,
    differences,
    expected_answers,
    naive_session,
    network_session,
    random_prompts,
    tiny_model,
)
from torch import Tensor

import florence2.generation.decode
from florence2.errors import FlorenceError
from florence2.generation.beam_search import NotFiniteError
from florence2.generation.decode import OpenFlags, generate
from florence2.records import Answer, GenerationSettings
from florence2.stopping import Watch

MODES = [(1, True), (3, True), (3, False), (3, "never"), (5, True)]


@pytest.mark.parametrize(("beams", "early_stopping"), MODES)
def test_each_prompt_keeps_its_own_limit(beams: int, early_stopping):
    settings = GenerationSettings(
        num_beams=beams, early_stopping=early_stopping, length_penalty=1.5
    )
    limits = [1, 2, 3, 5, 8, 13, 21, 24]
    for seed in SEEDS:
        model, prompts = tiny_model(seed), random_prompts(seed, 24)
        by_limit = {limit: expected_answers(model, prompts, settings, limit) for limit in limits}
        for start in range(0, 24, 8):
            items = list(range(start, start + 8))
            order = limits[start // 8 :] + limits[: start // 8]
            part = prompts.pick(items)
            expected = [by_limit[limit][item] for item, limit in zip(items, order, strict=True)]
            for make in (network_session, naive_session):
                session = make(model, part, beams, order)
                assert differences(generate(session, 8, settings, order), expected) == []


def test_prompt_lengths_mix_without_changing_answers():
    model, prompts = tiny_model(SEEDS[0]), random_prompts(SEEDS[0], 32)
    assert len(set(prompts.mask.sum(dim=1).tolist())) >= 5
    settings = GenerationSettings()
    alone = answer_in_batches(model, prompts, settings, 16, 1)
    mixed = answer_in_batches(model, prompts, settings, 16, 32)
    for one, other in zip(alone, mixed, strict=True):
        assert one.token_ids == other.token_ids
        assert one.truncated == other.truncated
        assert one.beam_score == pytest.approx(other.beam_score, abs=1e-4)
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)


@pytest.mark.parametrize(("beams", "early_stopping"), MODES)
@pytest.mark.parametrize("compact_at", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("lag", [0, 1, 3])
def test_retirement_does_not_change_answers(
    monkeypatch: pytest.MonkeyPatch, beams: int, early_stopping, compact_at: float, lag: int
):
    monkeypatch.setattr(florence2.generation.decode, "COMPACT_AT", compact_at)
    original = OpenFlags
    monkeypatch.setattr(florence2.generation.decode, "OpenFlags", lambda **_: original(lag=lag))
    settings = GenerationSettings(num_beams=beams, early_stopping=early_stopping)
    model, prompts = tiny_model(SEEDS[1]), random_prompts(SEEDS[1], 24)
    expected = expected_answers(model, prompts, settings, 16)
    assert differences(answer_in_batches(model, prompts, settings, 16, 12), expected) == []


def test_rows_are_dropped_by_the_stated_rule():
    model, prompts = tiny_model(SEEDS[0]), random_prompts(SEEDS[0], 40)
    session = NaiveSession(model, prompts)
    limits = [2 + item % 20 for item in range(40)]
    generate(session, 40, GenerationSettings(), limits)
    sizes = [size for _, size in session.calls]
    assert sizes[0] == 40
    assert sizes[-1] < 10
    keeps = [at for at, (name, _) in enumerate(session.calls) if name == "keep"]
    assert len(keeps) >= 5
    assert all(sizes[at] <= 0.75 * sizes[at - 1] for at in keeps)
    assert sum(name == "step" for name, _ in session.calls) <= max(limits) - 2


def test_a_prompt_is_decoded_no_longer_than_needed():
    model, prompts = tiny_model(SEEDS[0]), random_prompts(SEEDS[0], 30)
    expected = expected_answers(model, prompts, GenerationSettings(num_beams=1), 16)
    for item in range(30):
        session = NaiveSession(model, prompts.pick([item]))
        generate(session, 1, GenerationSettings(num_beams=1), [16])
        assert len(session.calls) == max(1, expected[item].length - 1)


class _HalfSession(NaiveSession):
    """Answers in a low precision, in one buffer that it overwrites with each call."""

    dtype = torch.bfloat16
    widen = False
    buffer: Tensor

    def prefill(self, prefix_ids: list[int]) -> Tensor:
        return self._low(super().prefill(prefix_ids))

    def step(self, token_ids: Tensor) -> Tensor:
        assert torch.equal(self.buffer, self.given)
        self.buffer.fill_(float("nan"))
        return self._low(super().step(token_ids))

    def _low(self, logits: Tensor) -> Tensor:
        low = logits.to(self.dtype)
        self.buffer = low.float() if self.widen else low
        self.given = self.buffer.clone()
        return self.buffer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_widened_and_left_alone(dtype: torch.dtype):
    model, prompts = tiny_model(SEEDS[2]), random_prompts(SEEDS[2], 12)
    answers = []
    for widen in (False, True):
        session = _HalfSession(model, prompts)
        session.dtype, session.widen = dtype, widen
        answers.append(generate(session, 12, GenerationSettings(), [16] * 12))
    assert answers[0] == answers[1]


class _LongNumbers(NaiveSession):
    def prefill(self, prefix_ids: list[int]) -> Tensor:
        assert prefix_ids == [2, 0]
        logits = super().prefill(prefix_ids)
        assert logits.shape == (self.items, 120)
        return logits

    items = 6
    beams = 4
    reordered = False

    def reorder(self, beam_indices: Tensor) -> None:
        assert beam_indices.dtype == torch.long
        assert beam_indices.shape == (len(self._history), self.beams)
        assert int(beam_indices.max()) < len(self._history[0])
        self.reordered = True
        super().reorder(beam_indices)

    def step(self, token_ids: Tensor) -> Tensor:
        assert self.reordered
        self.reordered = False
        assert token_ids.dtype == torch.long
        assert token_ids.shape == (len(self._history), self.beams)
        return super().step(token_ids)

    def keep(self, items: list[int]) -> None:
        assert not self.reordered
        assert items == sorted(set(items))
        super().keep(items)


def test_what_a_session_may_rely_on():
    model = tiny_model(SEEDS[0])
    session = _LongNumbers(model, random_prompts(SEEDS[0], 6))
    generate(session, 6, GenerationSettings(num_beams=4), [2, 2, 4, 9, 12, 16])
    assert session.calls[1][0] == "keep"


def test_no_items_need_no_network():
    assert generate(None, 0, GenerationSettings(), []) == []


def _given_up_at(call: int, items: Iterable[int]) -> Watch:
    """Names ``items`` at the given call, counted from 0, and at every later one."""
    reasons = {item: FlorenceError(f"Nobody waits for {item}.") for item in items}
    calls = itertools.count()
    return lambda: reasons if next(calls) >= call else {}


@pytest.mark.parametrize("compact_at", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("call", [0, 1, 4])
@pytest.mark.parametrize("gone", [(0,), (1, 2, 5, 6, 7), (7,)])
def test_what_is_given_up_leaves_the_other_answers_as_they_are(
    monkeypatch: pytest.MonkeyPatch, compact_at: float, beams: int, call: int, gone: tuple[int, ...]
):
    monkeypatch.setattr(florence2.generation.decode, "COMPACT_AT", compact_at)
    model, prompts = tiny_model(SEEDS[0]), random_prompts(SEEDS[0], 8)
    settings = GenerationSettings(num_beams=beams)
    stay = [item for item in range(8) if item not in gone]
    plain = generate(NaiveSession(model, prompts), 8, settings, [16] * 8)
    others = NaiveSession(model, prompts.pick(stay))
    without = generate(others, len(stay), settings, [16] * len(stay))
    answers = generate(
        NaiveSession(model, prompts), 8, settings, [16] * 8, before_pass=_given_up_at(call, gone)
    )
    given_up = [item for item in gone if not isinstance(answers[item], Answer)]
    assert given_up
    assert [str(answers[item]) for item in given_up] == [f"Nobody waits for {i}." for i in given_up]
    # What was complete by then is no longer given up.
    complete = [item for item in gone if item not in given_up]
    assert [answers[item] for item in complete] == [plain[item] for item in complete]
    assert [answers[item].token_ids for item in stay] == [answer.token_ids for answer in without]


def test_rows_given_up_leave_the_batch():
    session = NaiveSession(tiny_model(SEEDS[0]), random_prompts(SEEDS[0], 8))
    generate(session, 8, GenerationSettings(), [16] * 8, before_pass=_given_up_at(1, range(6)))
    assert session.calls[0] == ("prefill", 8)
    assert session.calls[1] == ("keep", 2)


@pytest.mark.parametrize("passes", [0, 1, 4])
def test_once_everything_is_given_up_there_is_no_further_pass(passes: int):
    session = NaiveSession(tiny_model(SEEDS[0]), random_prompts(SEEDS[0], 8))
    watch = _given_up_at(passes, range(8))
    answers = generate(session, 8, GenerationSettings(), [16] * 8, before_pass=watch)
    assert any(isinstance(answer, FlorenceError) for answer in answers)
    assert sum(name != "keep" for name, _ in session.calls) == passes


def test_an_answer_that_is_complete_is_not_given_up():
    session = NaiveSession(tiny_model(SEEDS[0]), random_prompts(SEEDS[0], 2))
    watch = _given_up_at(3, [0])
    first, _ = generate(session, 2, GenerationSettings(), [2, 16], before_pass=watch)
    assert isinstance(first, Answer)


def test_what_the_watch_raises_comes_through():
    def broken() -> dict[int, FlorenceError]:
        raise TimeoutError("too late")

    session = NaiveSession(tiny_model(SEEDS[0]), random_prompts(SEEDS[0], 2))
    with pytest.raises(TimeoutError, match="too late"):
        generate(session, 2, GenerationSettings(), [16] * 2, before_pass=broken)


def test_a_watch_that_names_nothing_changes_nothing():
    model, prompts = tiny_model(SEEDS[0]), random_prompts(SEEDS[0], 8)
    run = partial(generate, num_items=8, settings=GenerationSettings(), max_new_tokens=[16] * 8)
    plain = run(NaiveSession(model, prompts))
    asked: list[int] = []

    def watch() -> dict[int, FlorenceError]:
        asked.append(1)
        return {}

    session = NaiveSession(model, prompts)
    assert run(session, before_pass=watch) == plain
    assert len(asked) == sum(name != "keep" for name, _ in session.calls)


class _BrokenSession(NaiveSession):
    def prefill(self, prefix_ids: list[int]) -> Tensor:
        return super().prefill(prefix_ids) * float("nan")

    def step(self, token_ids: Tensor) -> Tensor:
        return super().step(token_ids) * float("nan")


class _OneBrokenSession(NaiveSession):
    """The logits of the third prompt are never numbers."""

    def prefill(self, prefix_ids: list[int]) -> Tensor:
        logits = super().prefill(prefix_ids)
        logits[2] = float("nan")
        return logits

    def step(self, token_ids: Tensor) -> Tensor:
        logits = super().step(token_ids)
        if len(logits) == 4:
            logits[2] = float("nan")
        return logits


@pytest.mark.parametrize("beams", [1, 3])
def test_a_network_that_gives_nan_is_an_error_not_an_answer(beams: int):
    session = _BrokenSession(tiny_model(SEEDS[0]), random_prompts(SEEDS[0], 4))
    answers = generate(session, 4, GenerationSettings(num_beams=beams), [16] * 4)
    assert [type(answer) for answer in answers] == [NotFiniteError] * 4
    assert "finite numbers" in str(answers[0])
    assert ". " not in str(answers[0])


@pytest.mark.parametrize("beams", [1, 3])
def test_nan_for_one_prompt_leaves_the_other_answers_as_they_are(beams: int):
    model, prompts = tiny_model(SEEDS[0]), random_prompts(SEEDS[0], 4)
    run = partial(
        generate, num_items=4, settings=GenerationSettings(num_beams=beams), max_new_tokens=[3] * 4
    )
    plain, broken = run(NaiveSession(model, prompts)), run(_OneBrokenSession(model, prompts))
    assert isinstance(broken[2], NotFiniteError)
    assert broken[:2] + broken[3:] == plain[:2] + plain[3:]
