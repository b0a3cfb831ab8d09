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
def prompts_of(seed, count):
    return random_prompts(seed, 200).pick(list(range(count)))


def expected_of(seed, settings, limit=LIMIT, count=200):
    return expected_answers(tiny_model(seed), prompts_of(seed, count), settings, limit)


def check(seed, settings, batch, limit=LIMIT, count=200, first=None, session=network_session):
    """Our answers, so many at a time, are the reference's; ``first`` gives us no more of them."""
    model, prompts = tiny_model(seed), prompts_of(seed, first or count)
    answers = answer_in_batches(model, prompts, settings, limit, batch, session)
    assert differences(answers, expected_of(seed, settings, limit, count)[:first]) == []


@pytest.mark.parametrize("beams", [1, 3, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_equals_the_reference_singly_and_in_batches(seed, beams):
    settings = GenerationSettings(num_beams=beams)
    expected = expected_of(seed, settings)
    lengths = [answer.length for answer in expected]
    assert sum(length < LIMIT for length in lengths) > 0.4 * len(lengths)
    assert sum(length == LIMIT for length in lengths) > 0.1 * len(lengths)
    assert len(set(lengths)) >= 6
    assert len({answer.token_ids for answer in expected}) > 100
    # A pass costs as much with one prompt as with twenty.
    check(seed, settings, batch=1, first=40)
    check(seed, settings, batch=4, first=80)
    check(seed, settings, batch=50)
    check(seed, settings, batch=20, first=60, session=naive_session)


def num_changed(some, others):
    return sum(a.token_ids != b.token_ids for a, b in zip(some, others, strict=True))


def test_beam_counts_and_stop_rules_give_different_answers_to_these_prompts():
    by_beams = [expected_of(SEEDS[0], GenerationSettings(num_beams=n)) for n in (1, 3, 5)]
    assert all(num_changed(few, many) > 20 for few, many in itertools.combinations(by_beams, 2))
    at_once, estimated, never = (
        expected_of(SEEDS[1], GenerationSettings(early_stopping=mode, length_penalty=2.0), 20)
        for mode in (True, False, "never")
    )
    assert num_changed(at_once, estimated)
    assert num_changed(estimated, never)


STOP_RULES = [True, False, "never"]
PENALTIES = [0.0, 0.5, 1.0, 2.0, -0.5]
BANS = [0, 2, 3]


@pytest.mark.parametrize("ngram", BANS)
@pytest.mark.parametrize("length_penalty", PENALTIES)
@pytest.mark.parametrize("early_stopping", STOP_RULES)
def test_every_stop_rule_penalty_and_ban(early_stopping, length_penalty, ngram):
    # With one number of beams each, so that any two of the three meet every number.
    turn = STOP_RULES.index(early_stopping) + PENALTIES.index(length_penalty) + BANS.index(ngram)
    settings = GenerationSettings(2 + turn % 3, None, length_penalty, early_stopping, ngram)
    check(SEEDS[turn % 3], settings, batch=20, limit=20, count=40)


@pytest.mark.parametrize("ngram", [0, 1, 2, 3, 5])
def test_greedy_with_every_ban_knows_no_stop_rules(ngram):
    for seed, early_stopping in zip(SEEDS, (True, False, "never"), strict=True):
        settings = GenerationSettings(1, None, 2.0, early_stopping, ngram)
        check(seed, settings, batch=20, limit=24, count=60)


@pytest.mark.parametrize("beams", [1, 3, 5])
@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_tight_limits(limit, beams):
    settings = GenerationSettings(num_beams=beams)
    assert max(answer.length for answer in expected_of(SEEDS[2], settings, limit)) == limit
    check(SEEDS[2], settings, batch=50, limit=limit)


def test_the_large_vocabulary_path(monkeypatch):
    monkeypatch.setattr(florence, "SMALL_VOCABULARY", 0)
    monkeypatch.setattr(florence, "BLOCK", 7)
    for seed, beams in itertools.product(SEEDS, (1, 3, 5)):
        check(seed, GenerationSettings(num_beams=beams), batch=50, count=50)


class OneForm(dict):
    """The same choice for every weight."""

    def __init__(self, is_transposed):
        self.counts = (is_transposed,) * 60

    def get(self, *_):
        return self.counts


@pytest.mark.parametrize("is_transposed", [False, True])
def test_either_form_of_every_product_gives_the_references_tokens(is_transposed):
    for seed, beams in zip(SEEDS, (1, 3, 5), strict=True):
        network = our_network(tiny_model(seed), "cpu")
        network.take_forms(OneForm(is_transposed))
        for batch, first in ((1, 8), (7, 30)):
            check(seed, GenerationSettings(num_beams=beams), batch, count=30, first=first)
        network.prepare_for_inference()
