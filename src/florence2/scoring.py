"""How sure the model was of what it spelled: the one definition of ``score``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from florence2.pieces import Piece


def object_score(place: Sequence[Piece], label: Sequence[Piece]) -> float | None:
    """The score of a prediction, in [0, 1].

    ``score = g(place) * g(label)``, where ``g`` is the geometric mean of the probabilities of
    the tokens given, and 1 when there are none.

    - ``place``: the object's own location tokens: 4 for a box, 8 for a quad, those of all its
      rings for a polygon, none for a text.
    - ``label``: the tokens of its label. Objects that share one label share this factor.

    The probabilities are those of the plain softmax when each token was chosen, so scores compare
    within a task and checkpoint. The result is None if any of them is unknown.
    """
    factors = [_geometric_mean(pieces) for pieces in (place, label)]
    return (
        None if None in factors else math.prod(factor for factor in factors if factor is not None)
    )


def _geometric_mean(pieces: Iterable[Piece]) -> float | None:
    log_probs = [piece.log_prob for piece in pieces]
    known = [log_prob for log_prob in log_probs if log_prob is not None]
    if len(known) < len(log_probs):
        return None
    if not known:
        return 1.0
    mean = math.fsum(min(log_prob, 0.0) for log_prob in known) / len(known)
    # A probability of 0 has the logarithm -inf; a NaN says no more about the object than that.
    return 0.0 if math.isnan(mean) else math.exp(mean)
