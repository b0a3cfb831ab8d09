"""The choice of allowed tokens against brute force."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor

from florence2.generation.beam_search import ban_bos, ban_repeated_ngrams
from florence2.network.linear import top_candidates


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


@pytest.mark.parametrize("ngram", [1, 2, 3, 4])
@pytest.mark.parametrize("unused", [0, 1, 50])
def test_rows_of_any_length_ban_what_the_reference_bans(ngram: int, unused: int):
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
def test_what_bans_nothing_adds_to_no_column_twice(used: int):
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
