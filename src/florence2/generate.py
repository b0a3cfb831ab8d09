"""Greedy and beam search over any decoder session, for one batch that is there from the start.

Same tokens as ``generate()`` of transformers 5.23 in float32 but for rounding ties, with the
settings published with Florence-2: the first token is forced to ``<s>``, the last one at the token
limit to ``</s>``, and bans act after the softmax. A tie is a step at which two candidates are
closer than the rounding of float32: another order of summation, by either side, may then choose
the other one. Beyond the reference it returns a log-probability for every token, lets each prompt
of a batch have its own token limit, and drops a prompt's rows once its own result is settled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from florence2.errors import FlorenceError
from florence2.generation.decode import DecodeLoop, Started
from florence2.generation.settings import check_batch
from florence2.nearby import Nearby
from florence2.records import Answer, GenerationSettings
from florence2.space import PlainSpace, Session, Space
from florence2.stopping import Watch


def generate(
    session: Session,
    num_items: int,
    settings: GenerationSettings | Sequence[GenerationSettings],
    max_new_tokens: Sequence[int],
    *,
    before_pass: Watch | None = None,
    nearby: Nearby | None = None,
    space: Space | None = None,
) -> list[Answer | FlorenceError]:
    """Answer every item of the session, in order.

    An item for which the network gives NaN or infinity is a NotFiniteError, which is returned in
    its place: the other items of the batch have their answers.

    ``before_pass`` is called before every pass of the network and may name items to give up: each
    has the error named for it in its place, and the others' answers stay what they are. Once
    every item is settled or given up there is no further pass. Whatever ``before_pass`` raises
    comes through.

    ``max_new_tokens`` has one limit per item, counted as in the reference: the forced ``<s>`` and
    the closing ``</s>`` are among them. It stands for ``settings.max_new_tokens``, which is not
    looked at; all other settings must be the same for the whole batch.

    An item's answer does not depend on what else is in the batch, up to the rounding of the
    network. ``beam_score`` is the reference's ``sequences_scores``: the sum of log-probabilities
    after bans, forced tokens counting 0, over the number of generated tokens to the power of
    ``length_penalty``; for one beam, where the reference has none, the same formula.
    ``truncated`` is set if the limit forced the answer's ``</s>`` although the search itself,
    bans included, ranked another token first for that beam. A limit of 1 leaves room for no
    token at all, which counts as truncated. ``nearby`` asks for ``Answer.near_log_probs``.
    ``space`` says how passes are made, by default plainly.
    """
    shared = check_batch(num_items, settings, max_new_tokens)
    if num_items == 0:
        return []
    batch = _Batch(session, max_new_tokens, before_pass)
    DecodeLoop(batch, shared, space or PlainSpace(), max_rows=num_items, nearby=nearby).run()
    return batch.answers()


class _Batch:
    """A source of items that are all there from the start."""

    def __init__(
        self, session: Session, max_new_tokens: Sequence[int], before_pass: Watch | None
    ) -> None:
        self._session = session
        self._limits = max_new_tokens
        self._before_pass = before_pass
        self._has_started = False
        self._answers: dict[int, Answer | FlorenceError] = {}

    def given_up(self) -> Mapping[int, FlorenceError]:
        """What ``before_pass`` names, as long as there is something to wait for."""
        if self._before_pass is None or self._is_settled():
            return {}
        reasons = self._before_pass()
        return {item: why for item, why in reasons.items() if item not in self._answers}

    def start(self, room: int) -> Started[int] | None:
        """All items at once."""
        if self._has_started or self._is_settled():
            return None
        self._has_started = True
        numbers = range(len(self._limits))
        items = [None if number in self._answers else number for number in numbers]
        return Started(items, self._session, self._limits)

    def settle(self, item: int, answer: Answer | FlorenceError) -> None:
        """Notes an answer."""
        self._answers[item] = answer

    def answers(self) -> list[Answer | FlorenceError]:
        """One per item, in order."""
        return [self._answers[item] for item in range(len(self._limits))]

    def _is_settled(self) -> bool:
        return len(self._answers) == len(self._limits)
