"""The search's rules on hand-made probabilities: bans, stop rules, and what a location scores."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor

from florence2.generation.beam_search import (
    BeamSearch,
    LocationProbability,
    ban_bos,
    ban_repeated_ngrams,
)
from florence2.records import GenerationSettings
from florence2.tokens import NUM_LOCATION_BINS


@pytest.mark.parametrize("ngram", [1, 2, 3, 4])
def test_a_token_is_banned_exactly_if_it_would_repeat_an_ngram(ngram):
    generator = torch.Generator().manual_seed(ngram)
    for length in range(1, 30):
        history = torch.randint(0, 4, (6, length), generator=generator)
        log_probs = torch.randn((6, 5), generator=generator)
        banned = log_probs.clone()
        ban_repeated_ngrams(banned, history, ngram)
        for row, tokens in enumerate(history.tolist()):
            seen = {tuple(tokens[at : at + ngram]) for at in range(length - ngram + 1)}
            for token in range(5):
                repeats = tuple([*tokens, token][-ngram:]) in seen and length >= ngram
                wanted = float("-inf") if repeats else log_probs[row, token].item()
                assert banned[row, token].item() == wanted


@pytest.mark.parametrize("ngram", [1, 2, 3, 4])
@pytest.mark.parametrize("unused", [0, 1, 50])
def test_rows_of_any_length_ban_what_the_reference_bans(ngram, unused):
    generator = torch.Generator().manual_seed(ngram)
    lengths = torch.tensor([2, 3, 5, 8, 20, 20])
    history = torch.randint(0, 4, (6, 20 + unused), generator=generator)
    history[torch.arange(20 + unused) >= lengths.unsqueeze(1)] = -1
    log_probs = torch.randn((6, 7), generator=generator)
    banned = log_probs.clone()
    ban_repeated_ngrams(banned, history, ngram, lengths)
    reference = NoRepeatNGramLogitsProcessor(ngram)
    for row, length in enumerate(lengths.tolist()):
        one = slice(row, row + 1)
        wanted = reference(history[one, :length], log_probs[one].clone())
        assert torch.equal(banned[one], wanted)


class _Columns(TorchDispatchMode):
    """Notes which columns are added to, and what."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.scatter_add_:
            _, _, self.columns, self.added = args
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("used", [2, 9, 60])
def test_what_bans_nothing_adds_to_no_column_twice(used):
    history = torch.full((2, 60), -1)
    history[:, :used] = 0
    history[:, 1] = 3
    with _Columns() as noted:
        ban_repeated_ngrams(torch.zeros(2, 64), history, 3, torch.tensor([used, used]))
    for columns, added in zip(noted.columns, noted.added, strict=True):
        idle = columns[added == 0].tolist()
        assert len(idle) == len(set(idle)) > 0


def test_ban_bos_changes_nothing_else():
    log_probs = torch.randn(3, 7)
    banned = log_probs.clone()
    ban_bos(banned)
    assert torch.equal(banned[:, 1:], log_probs[:, 1:])
    assert banned[:, 0].tolist() == [float("-inf")] * 3


EOS, A, B, C, D = 2, 3, 4, 5, 6


def logits(*rows):
    """[1, rows, 12] with these probabilities; the rest share what is left."""
    table = torch.zeros(len(rows), 12)
    for row, chances in enumerate(rows):
        table[row] = (1 - sum(chances.values())) / (12 - len(chances))
        for token, chance in chances.items():
            table[row, token] = chance
    return table.log().unsqueeze(0)


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "stays_open"),
    [("never", -1.0, True), (False, -1.0, True), (True, -1.0, False)],
)
def test_a_negative_penalty_estimates_from_the_present_length(
    early_stopping, length_penalty, stays_open
):
    settings = GenerationSettings(2, None, length_penalty, early_stopping, 3)
    search = BeamSearch([20], settings, torch.device("cpu"))
    search.advance(logits({EOS: 0.4, A: 0.35, B: 0.2499}))
    assert search.tokens.tolist() == [[A, B]]
    search.advance(logits({EOS: 0.5, D: 0.45}, {C: 0.9}))
    # Best running beam: ln(0.225) * 3 = -4.5 now, but -30 at the limit; worst finished one -5.2.
    assert search.is_open.tolist() == [stays_open]
    [answer] = search.read([0]).wait()
    assert answer.token_ids == ()
    assert answer.beam_score == pytest.approx(math.log(0.4) * 2, abs=1e-5)


def test_only_the_first_candidates_may_finish():
    search = BeamSearch([20], GenerationSettings(num_beams=2), torch.device("cpu"))
    search.advance(logits({A: 0.5, B: 0.3, EOS: 0.15}))
    assert search.tokens.tolist() == [[A, B]]
    search.advance(logits({EOS: 0.9}, {EOS: 0.9}))
    assert search.is_open.tolist() == [False]
    [answer] = search.read([0]).wait()
    assert answer.token_ids == (A,)
    assert answer.log_probs == pytest.approx([math.log(0.5)], abs=1e-5)
    assert answer.beam_score == pytest.approx((math.log(0.5) + math.log(0.9)) / 3, abs=1e-5)


PLACES = LocationProbability(first_location_id=B, radius_bins=1)
BANNED_NEIGHBOURS = {
    "the place was said before": (1, [{B: 0.9}]),
    "after the same token": (2, [{A: 0.9}, {B: 0.9}, {A: 0.9}]),
    "after the same two tokens": (3, [{A: 0.9}, {D: 0.9}, {B: 0.9}, {A: 0.9}, {D: 0.9}]),
}


@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize(("ngram", "said"), BANNED_NEIGHBOURS.values(), ids=BANNED_NEIGHBOURS)
def test_a_banned_neighbour_counts_for_the_place_and_is_not_chosen(ngram, said, is_static):
    settings = GenerationSettings(num_beams=1, no_repeat_ngram_size=ngram)
    # At the limit </s> is forced, which n-grams of one token ban: all begin with it.
    limit = len(said) + 3
    search = BeamSearch([limit], settings, torch.device("cpu"), PLACES, is_static=is_static)
    for chances in said:
        search.advance(logits(chances))
    search.advance(logits({B: 0.6, C: 0.377}))
    assert search.tokens.tolist() == [[C]]
    search.advance(logits({A: 0.9}))
    [answer] = search.read([0]).wait()
    assert answer.token_ids[-1] == C
    assert math.exp(answer.log_probs[-1]) == pytest.approx(0.377, abs=1e-5)
    assert math.exp(answer.near_log_probs[-1]) == pytest.approx(0.977, abs=3e-3)
    chosen = [max(chances.values()) for chances in said] + [0.377]
    total = sum(math.log(chance) for chance in chosen)
    assert answer.beam_score == pytest.approx(total / limit, abs=1e-5)


FIRST = 7
LAST = FIRST + NUM_LOCATION_BINS - 1
VOCABULARY = LAST + 4


def summed(log_probs, token, radius):
    """The definition, written out for one row."""
    if not FIRST <= token <= LAST:
        return float(log_probs[token])
    low, high = max(FIRST, token - radius), min(LAST, token + radius)
    return float(log_probs[low : high + 1].exp().sum().log())


@pytest.mark.parametrize("radius", [0, 1, 20, 2000])
def test_the_mass_of_the_bins_nearby_is_summed_and_other_tokens_keep_their_own(radius):
    generator = torch.Generator().manual_seed(3)
    log_probs = torch.randn(2, 3, VOCABULARY, generator=generator).mul(4).log_softmax(2)
    tokens = torch.tensor([[FIRST, FIRST + 500, LAST], [2, LAST - 1, VOCABULARY - 1]])
    parents = torch.tensor([[0, 2, 1], [1, 1, 0]])
    own = torch.stack(
        [
            torch.stack([log_probs[item, row, token] for row, token in zip(rows, ids, strict=True)])
            for item, (rows, ids) in enumerate(zip(parents, tokens, strict=True))
        ]
    )
    found = LocationProbability(FIRST, radius).log_probs(log_probs, parents, tokens, own)
    for item in range(2):
        for beam in range(3):
            row = log_probs[item, parents[item, beam]]
            expected = summed(row, int(tokens[item, beam]), radius)
            assert float(found[item, beam]) == pytest.approx(min(expected, 0.0), abs=1e-4)
    assert bool((found >= own - 1e-6).all())


def test_a_first_step_with_one_row_serves_all_beams():
    log_probs = torch.randn(1, 1, VOCABULARY).log_softmax(2)
    tokens = torch.tensor([[FIRST + 3, 1, FIRST + 9]])
    own = log_probs[0, 0, tokens]
    found = LocationProbability(FIRST, 2).log_probs(
        log_probs, torch.zeros_like(tokens), tokens, own
    )
    expected = [summed(log_probs[0, 0], int(token), 2) for token in tokens[0]]
    assert found[0].tolist() == pytest.approx(expected, abs=1e-4)
