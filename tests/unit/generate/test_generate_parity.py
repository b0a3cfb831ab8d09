"""The decode loop against ``generate()`` of transformers, token for token."""

from __future__ import annotations

import functools
import itertools

import pytest
from tiny_reference import (
    SEEDS,
    answer_in_batches,
    differences,
    expected_answers,
    naive_session,
    network_session,
    our_network,
    random_prompts,
    tiny_model,
)

from florence2.network import florence
from florence2.records import GenerationSettings

LIMIT = 16


@functools.cache
def setup(seed):
    return tiny_model(seed), random_prompts(seed, 200)


@pytest.mark.parametrize("beams", [1, 3, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_equals_the_reference_singly_and_in_batches(seed, beams):
    model, prompts = setup(seed)
    settings = GenerationSettings(num_beams=beams)
    expected = expected_answers(model, prompts, settings, LIMIT)

    lengths = [answer.length for answer in expected]
    assert sum(length < LIMIT for length in lengths) > 0.4 * len(lengths)
    assert sum(length == LIMIT for length in lengths) > 0.1 * len(lengths)
    assert len(set(lengths)) >= 6
    assert len({answer.token_ids for answer in expected}) > 100

    for batch, session in ((1, network_session), (4, network_session), (20, naive_session)):
        answers = answer_in_batches(model, prompts, settings, LIMIT, batch, session)
        assert differences(answers, expected) == []


def test_beam_counts_give_different_answers():
    model, prompts = setup(SEEDS[0])
    by_beams = [
        expected_answers(model, prompts, GenerationSettings(num_beams=beams), LIMIT)
        for beams in (1, 3, 5)
    ]
    for few, many in itertools.combinations(by_beams, 2):
        changed = sum(a.token_ids != b.token_ids for a, b in zip(few, many, strict=True))
        assert changed > 20


@pytest.mark.parametrize("ngram", [0, 2, 3])
@pytest.mark.parametrize("length_penalty", [0.0, 0.5, 1.0, 2.0, -0.5])
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_every_stop_rule_penalty_and_ban(early_stopping, length_penalty, ngram):
    for seed, beams in zip(SEEDS, (2, 3, 4), strict=True):
        model, prompts = setup(seed)
        prompts = prompts.pick(list(range(40)))
        settings = GenerationSettings(
            num_beams=beams,
            early_stopping=early_stopping,
            length_penalty=length_penalty,
            no_repeat_ngram_size=ngram,
        )
        expected = expected_answers(model, prompts, settings, 20)
        assert differences(answer_in_batches(model, prompts, settings, 20, 10), expected) == []


@pytest.mark.parametrize("ngram", [0, 1, 2, 3, 5])
def test_greedy_with_every_ban_knows_no_stop_rules(ngram):
    for seed, early_stopping in zip(SEEDS, (True, False, "never"), strict=True):
        model, prompts = setup(seed)
        settings = GenerationSettings(1, None, 2.0, early_stopping, ngram)
        expected = expected_answers(model, prompts, settings, 24)
        assert differences(answer_in_batches(model, prompts, settings, 24, 20), expected) == []


def test_the_stop_rules_differ_on_these_prompts():
    model, prompts = setup(SEEDS[1])
    answers = {
        mode: expected_answers(
            model, prompts, GenerationSettings(early_stopping=mode, length_penalty=2.0), 20
        )
        for mode in (True, False, "never")
    }
    assert sum(
        a.token_ids != b.token_ids for a, b in zip(answers[True], answers[False], strict=True)
    )
    assert sum(
        a.token_ids != b.token_ids for a, b in zip(answers[False], answers["never"], strict=True)
    )


@pytest.mark.parametrize("beams", [1, 3, 5])
@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_tight_limits(limit, beams):
    model, prompts = setup(SEEDS[2])
    settings = GenerationSettings(num_beams=beams)
    expected = expected_answers(model, prompts, settings, limit)
    assert max(answer.length for answer in expected) == limit
    assert differences(answer_in_batches(model, prompts, settings, limit, 50), expected) == []


def test_the_large_vocabulary_path(monkeypatch):
    monkeypatch.setattr(florence, "SMALL_VOCABULARY", 0)
    monkeypatch.setattr(florence, "BLOCK", 7)
    for seed, beams in itertools.product(SEEDS, (1, 3, 5)):
        model, prompts = setup(seed)
        settings = GenerationSettings(num_beams=beams)
        expected = expected_answers(model, prompts, settings, LIMIT)
        assert differences(answer_in_batches(model, prompts, settings, LIMIT, 50), expected) == []


class OneForm(dict):
    """The same choice for every weight."""

    def __init__(self, is_transposed):
        self.counts = (is_transposed,) * 60

    def get(self, *_):
        return self.counts


@pytest.mark.parametrize("is_transposed", [False, True])
def test_either_form_of_every_product_gives_the_reference_s_tokens(is_transposed):
    for seed, beams in zip(SEEDS, (1, 3, 5), strict=True):
        model, prompts = setup(seed)
        our_network(model).take_forms(OneForm(is_transposed))
        prompts = prompts.pick(list(range(30)))
        settings = GenerationSettings(num_beams=beams)
        expected = expected_answers(model, prompts, settings, LIMIT)
        for batch in (1, 7):
            answers = answer_in_batches(model, prompts, settings, LIMIT, batch)
            assert differences(answers, expected) == []
        our_network(model).prepare_for_inference()
