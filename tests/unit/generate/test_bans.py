"""The choice of allowed tokens against brute force."""

from __future__ import annotations

import pytest
import torch

from florence2.bans import ban_bos, ban_repeated_ngrams, top_candidates


@pytest.mark.parametrize("ngram", [1, 2, 3, 4])
def test_a_token_is_banned_exactly_if_it_would_repeat_an_ngram(ngram: int):
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


def test_ban_bos_changes_nothing_else():
    log_probs = torch.randn(3, 7)
    banned = log_probs.clone()
    ban_bos(banned)
    assert torch.equal(banned[:, 1:], log_probs[:, 1:])
    assert banned[:, 0].tolist() == [float("-inf")] * 3


@pytest.mark.parametrize("vocab", [50, 4096, 4097, 5120, 51289, 51328])
@pytest.mark.parametrize("count", [2, 6, 40])
def test_top_candidates_equals_topk(vocab: int, count: int):
    generator = torch.Generator().manual_seed(vocab + count)
    log_probs = torch.randn((4, vocab), generator=generator)
    log_probs[1, -count:] = 10 + torch.arange(count).float()
    log_probs[2, : vocab - count // 2] = float("-inf")
    values, ids = top_candidates(log_probs, count)
    assert torch.equal(values, torch.topk(log_probs, count).values)
    assert torch.equal(log_probs.gather(1, ids), values)
    assert all(len(set(row)) == count for row in ids.tolist())
