"""How sure the model was of what it spelled: the one definition of ``score``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

from florence2.pieces import Piece

NEAR_BINS: Final = 20
"""A location within so many bins of the chosen one, 2 % of the image, is the same place."""


def object_score(place: Sequence[Piece], label: Sequence[Piece]) -> float | None:
    """The score of a prediction, in [0, 1].

    ``score = g(place) * g(label)``, where ``g`` is the geometric mean of the probabilities of
    the tokens given, and 1 when there are none. The probability of a location token is that of
    any bin within NEAR_BINS of it: a bin is a thousandth of the image, and a network that is sure
    of an edge still spreads its probability over neighbouring bins.

    - ``place``: the object's own location tokens: 4 for a box, 8 for a quad, those of all its
      rings for a polygon, none for a text.
    - ``label``: the tokens of its label. Objects that share one label share this factor.

    All probabilities are of one distribution: the float32 softmax over the whole vocabulary of the
    logits from which the token was chosen, given the tokens before it in the same answer. Nothing
    is taken out of it: what a ban forbids (repeated n-grams, ``<s>``) keeps its share, in the
    normaliser and among the neighbours of a place. So a token that was chosen only because a
    better one was banned has the small probability it had, and a place whose best bin was banned
    has that bin's share too. In reduced precision the best logits of every row are computed in
    float32 (``Florence2Network.next_logits``), the others are rounded. Scores compare within a
    task and checkpoint. The result is None if any of the probabilities is unknown.

    The search itself ranks by other numbers, the reference's: the same log-softmax with -inf
    where a token is banned, not renormalised, and 0 for a forced token; see ``BeamSearch`` and
    ``Answer.beam_score``.
    """
    factors = [
        _geometric_mean(piece.near_log_prob for piece in place),
        _geometric_mean(piece.log_prob for piece in label),
    ]
    return (
        None if None in factors else math.prod(factor for factor in factors if factor is not None)
    )


def _geometric_mean(values: Iterable[float | None]) -> float | None:
    log_probs = list(values)
    known = [log_prob for log_prob in log_probs if log_prob is not None]
    if len(known) < len(log_probs):
        return None
    if not known:
        return 1.0
    mean = sum(min(log_prob, 0.0) for log_prob in known) / len(known)
    # A probability of 0 has the logarithm -inf; a NaN says no more about the object than that.
    return 0.0 if math.isnan(mean) else math.exp(mean)
