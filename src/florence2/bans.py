"""Which tokens a search step may not take, and the best ones that remain.

Everything here works on log-probabilities of one step, ``[rows, vocab]`` float32, in place, on
the device they are on, without a host synchronisation. As in the reference (transformers 5.23,
``generation/logits_process.py``) a ban sets a log-probability to -inf after the softmax; the
others are not renormalised.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from florence2.tokens import BOS_ID

NEVER: Final = float("-inf")

_BLOCK: Final = 128
_SMALL_VOCABULARY: Final = 4096


def ban_repeated_ngrams(
    log_probs: Tensor, history: Tensor, ngram_size: int, lengths: Tensor | None = None
) -> None:
    """Ban every token that would repeat an n-gram of its row.

    ``history`` is ``[rows, length]``: all tokens of each row so far, the decoder's start token
    and ``<s>`` included, because the reference counts them too. Where rows differ, ``lengths``
    [rows] says how many of them each has; the others are -1.
    """
    length = history.shape[1]
    if length < ngram_size:
        return
    windows = history.unfold(1, ngram_size, 1)
    repeats = (windows[..., :-1] == _suffix(history, ngram_size - 1, lengths)).all(dim=-1)
    last = windows[..., -1]
    if lengths is not None:
        repeats = repeats & (last >= 0)
    # What bans nothing adds 0, each to a column of its own: a GPU adds to one column in turn.
    columns = torch.arange(last.shape[1], device=history.device) % log_probs.shape[1]
    penalty = torch.zeros(repeats.shape, dtype=log_probs.dtype, device=log_probs.device)
    log_probs.scatter_add_(
        1, torch.where(repeats, last, columns), penalty.masked_fill_(repeats, NEVER)
    )


def _suffix(history: Tensor, size: int, lengths: Tensor | None) -> Tensor:
    """The last ``size`` tokens of each row: [rows, 1, size]."""
    if lengths is None:
        return history[:, history.shape[1] - size :].unsqueeze(1)
    back = torch.arange(-size, 0, device=history.device)
    # A shorter row has no n-gram to repeat, and one that nobody waits for may be beyond the end.
    places = (lengths.unsqueeze(1) + back).clamp(0, history.shape[1] - 1)
    return history.gather(1, places).unsqueeze(1)


def ban_bos(log_probs: Tensor) -> None:
    """Ban ``<s>``, which the large checkpoints otherwise repeat without end."""
    log_probs.select(1, BOS_ID).fill_(NEVER)


def top_candidates(log_probs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` best tokens of every row, best first: values and ids, both [rows, count].

    Finds the blocks that hold the best maxima first: the winners are all inside the ``count``
    best blocks, so a large vocabulary is only read once, by a plain maximum.
    """
    rows, vocab = log_probs.shape
    blocks = vocab // _BLOCK
    if vocab <= _SMALL_VOCABULARY or blocks < count:
        values, ids = torch.topk(log_probs, count)
        return values, ids
    device = log_probs.device
    whole = blocks * _BLOCK
    maxima = log_probs[:, :whole].view(rows, blocks, _BLOCK).amax(dim=2)
    best_blocks = torch.topk(maxima, count, sorted=False)[1]
    columns = best_blocks.unsqueeze(2) * _BLOCK + torch.arange(_BLOCK, device=device)
    tail = torch.arange(whole, vocab, device=device).expand(rows, -1)
    columns = torch.cat((columns.flatten(1), tail), dim=1)
    values, places = torch.topk(log_probs.gather(1, columns), count)
    return values, columns.gather(1, places)
