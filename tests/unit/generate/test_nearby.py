"""The probability of a place: its location token's together with the neighbouring bins'."""

from __future__ import annotations

import pytest
import torch

from florence2.generation.beam_search import Nearby
from florence2.tokens import NUM_LOCATION_BINS

FIRST = 7
LAST = FIRST + NUM_LOCATION_BINS - 1
VOCABULARY = LAST + 4


def summed(log_probs: torch.Tensor, token: int, radius: int) -> float:
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
    found = Nearby(FIRST, radius).log_probs(log_probs, parents, tokens, own)
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
    found = Nearby(FIRST, 2).log_probs(log_probs, torch.zeros_like(tokens), tokens, own)
    expected = [summed(log_probs[0, 0], int(token), 2) for token in tokens[0]]
    assert found[0].tolist() == pytest.approx(expected, abs=1e-4)
