"""Stop rules that random models hardly ever reach, on hand-made probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from florence2.generation.beam_search import BeamSearch, Nearby
from florence2.records import GenerationSettings

EOS, A, B, C, D = 2, 3, 4, 5, 6


def logits(*rows: dict[int, float]) -> Tensor:
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
    early_stopping, length_penalty: float, stays_open: bool
):
    settings = GenerationSettings(2, None, length_penalty, early_stopping, 3)
    search = BeamSearch([20], settings, torch.device("cpu"))
    search.advance(logits({EOS: 0.4, A: 0.35, B: 0.2499}))
    assert search.tokens.tolist() == [[A, B]]
    search.advance(logits({EOS: 0.5, D: 0.45}, {C: 0.9}))
    # Best running beam: ln(0.225) * 3 = -4.5 now, but -30 at the limit; worst finished one -5.2.
    assert search.is_open.tolist() == [stays_open]
    [answer] = search.answers([0])
    assert answer.token_ids == ()
    assert answer.beam_score == pytest.approx(math.log(0.4) * 2, abs=1e-5)


def test_only_the_first_candidates_may_finish():
    search = BeamSearch([20], GenerationSettings(num_beams=2), torch.device("cpu"))
    search.advance(logits({A: 0.5, B: 0.3, EOS: 0.15}))
    assert search.tokens.tolist() == [[A, B]]
    search.advance(logits({EOS: 0.9}, {EOS: 0.9}))
    assert search.is_open.tolist() == [False]
    [answer] = search.answers([0])
    assert answer.token_ids == (A,)
    assert answer.log_probs == pytest.approx([math.log(0.5)], abs=1e-5)
    assert answer.beam_score == pytest.approx((math.log(0.5) + math.log(0.9)) / 3, abs=1e-5)


PLACES = Nearby(first_location_id=B, radius_bins=1)
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
    [answer] = search.answers([0])
    assert answer.token_ids[-1] == C
    assert math.exp(answer.log_probs[-1]) == pytest.approx(0.377, abs=1e-5)
    assert math.exp(answer.near_log_probs[-1]) == pytest.approx(0.977, abs=3e-3)
    chosen = [max(chances.values()) for chances in said] + [0.377]
    total = sum(math.log(chance) for chance in chosen)
    assert answer.beam_score == pytest.approx(total / limit, abs=1e-5)
