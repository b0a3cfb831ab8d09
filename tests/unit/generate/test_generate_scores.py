"""Log-probabilities, scores and the truncation mark, each against its own definition."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_reference import (
    SEEDS,
    NaiveSession,
    answer_in_batches,
    decoder_logits,
    expected_answers,
    random_prompts,
    tiny_model,
)

from florence2.generation.decode import DecodeBatch, generate
from florence2.records import GenerationSettings
from florence2.tokens import BOS_ID, DECODER_START_ID, EOS_ID


def answered(seed, count, settings, limit):
    """Our answer to each prompt, the reference's, and the log-softmax of its own tokens.

    This is [generated, vocab] for the reference's raw ids, the closing one included.
    """
    model, prompts = tiny_model(seed), random_prompts(seed, count)
    expected = expected_answers(model, prompts, settings, limit)
    answers = answer_in_batches(model, prompts, settings, limit, 50)
    for item, (answer, one) in enumerate(zip(answers, expected, strict=True)):
        ids = [DECODER_START_ID, *one.ids[: one.length]]
        logits = decoder_logits(model, prompts.pick([item]), torch.tensor([ids[:-1]]))
        yield answer, one, torch.log_softmax(logits[0].double(), dim=-1)


@pytest.mark.parametrize("ngram", [0, 2, 3])
@pytest.mark.parametrize("beams", [1, 3, 5])
def test_log_probs_are_those_of_the_plain_softmax(beams, ngram):
    settings = GenerationSettings(num_beams=beams, no_repeat_ngram_size=ngram)
    for seed in SEEDS:
        for answer, one, plain in answered(seed, 30, settings, 16):
            ids = one.ids[: one.length - 1]
            wanted = [plain[at, token].item() for at, token in enumerate(ids)]
            skipped = len(ids) - len(answer.token_ids)
            assert set(ids[:skipped]) <= {BOS_ID}
            assert answer.log_probs == pytest.approx(wanted[skipped:], abs=2e-5)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_the_greedy_score_follows_the_beam_formula(length_penalty):
    settings = GenerationSettings(num_beams=1, length_penalty=length_penalty)
    for answer, one, plain in answered(SEEDS[0], 30, settings, 16):
        free = one.ids[1 : one.length - (one.length == 16)]
        total = sum(plain[at + 1, token].item() for at, token in enumerate(free))
        assert answer.beam_score == pytest.approx(total / one.length**length_penalty, abs=1e-4)


def test_greedy_is_truncated_exactly_if_a_longer_limit_gives_more():
    settings = GenerationSettings(num_beams=1)
    seen = set()
    for seed in SEEDS:
        model, prompts = tiny_model(seed), random_prompts(seed, 100)
        unlimited = expected_answers(model, prompts, settings, 30)
        for limit in (2, 3, 4, 5, 6, 8, 9):
            answers = answer_in_batches(model, prompts, settings, limit, 50)
            for answer, free in zip(answers, unlimited, strict=True):
                assert answer.truncated == (free.length > limit)
                seen.add((answer.truncated, free.length == limit))
    assert seen == {(True, False), (False, True), (False, False)}


def test_beams_are_truncated_if_the_forced_end_was_not_the_first_choice():
    settings = GenerationSettings(num_beams=3, no_repeat_ngram_size=0)
    seen = set()
    for seed, limit in itertools.product(SEEDS, (3, 5, 8, 12)):
        for answer, one, plain in answered(seed, 100, settings, limit):
            plain[-1][BOS_ID] = -torch.inf
            wanted = one.length == limit and int(plain[-1].argmax()) != EOS_ID
            assert answer.truncated == wanted
            seen.add((answer.truncated, one.length == limit))
    assert seen == {(True, True), (False, True), (False, False)}


def test_a_limit_without_room_is_truncated_and_empty():
    model, prompts = tiny_model(SEEDS[0]), random_prompts(SEEDS[0], 3)
    for beams in (1, 3):
        batch = DecodeBatch(GenerationSettings(num_beams=beams))
        answers = generate(NaiveSession(model, prompts), batch, [1, 1, 6])
        assert [answer.truncated for answer in answers[:2]] == [True, True]
        assert [answer.token_ids for answer in answers[:2]] == [(), ()]
        assert answers[2].token_ids


def prefer_bos(logits):
    """Logits of the large checkpoints, which would begin with ``<s>`` again and again."""
    logits[..., BOS_ID] += 40
    return logits


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("ngram", [0, 3])
def test_leading_bos_tokens_are_stripped_with_their_log_probs(beams, ngram):
    session = NaiveSession(tiny_model(SEEDS[0]), random_prompts(SEEDS[0], 6), prefer_bos)
    settings = GenerationSettings(num_beams=beams, no_repeat_ngram_size=ngram)
    for answer in generate(session, DecodeBatch(settings), [12] * 6):
        assert len(answer.token_ids) == len(answer.log_probs) > 0
        assert answer.token_ids[0] != BOS_ID
        assert EOS_ID not in answer.token_ids
        assert all(log_prob <= 0 for log_prob in answer.log_probs)
        if ngram == 0:
            assert BOS_ID not in answer.token_ids
