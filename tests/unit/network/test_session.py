"""Cached decoding gives what the reference gives for each beam's own history, teacher-forced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import (
    TINY,
    prompts,
    random_network,
    reference_logits,
    reference_of,
    reference_states,
    relative_error,
    rms_error,
)

from florence2.errors import RequestError
from florence2.generation.kv_cache import DecoderSession
from florence2.network.config import base_config, large_config, tiny_config
from florence2.tokens import ANSWER_PREFIX

PREFIX = list(ANSWER_PREFIX)


class Replay:
    """Random searches on both sides: every beam's history is kept as a plain list."""

    def __init__(self, config, beams, lengths, dtype=torch.float32, max_new_tokens=100):
        self.vocab_size = config.text.vocab_size
        self.network = random_network(config).to(dtype)
        self.reference: Any = reference_of(self.network).float()
        side = 384 if config.text.vocab_size > 1000 else 64
        torch.manual_seed(2)
        pixels = torch.randn(len(lengths), 3, side, side).to(dtype)
        ids, mask = prompts(lengths, self.vocab_size)
        with torch.inference_mode():
            visual = self.network.encode_images(pixels)
            states, self.mask = self.network.encode_prompts(visual, ids, mask)
            self.states = reference_states(self.reference, pixels.float(), ids, mask)
        self.beams = beams
        self.session = DecoderSession(self.network, states, self.mask, beams, max_new_tokens)
        self.items = list(range(len(lengths)))
        self.histories = [[list(PREFIX) for _ in range(beams)] for _ in lengths]

    def expected(self):
        """The reference's logits [B, beams, V] after every beam's history."""
        rows = []
        with torch.inference_mode():
            for item in self.items:
                ids = torch.tensor(self.histories[item])
                states = self.states[item].expand(self.beams, -1, -1)
                mask = self.mask[item].expand(self.beams, -1)
                rows.append(reference_logits(self.reference, ids, states, mask)[:, -1])
        return torch.stack(rows)

    def step(self, reorder):
        shape = (len(self.items), self.beams)
        if reorder:
            parents = torch.randint(0, self.beams, shape)
            self.session.reorder(parents)
            for item, row in zip(self.items, parents.tolist(), strict=True):
                self.histories[item] = [list(self.histories[item][parent]) for parent in row]
        chosen = torch.randint(0, self.vocab_size, shape)
        for item, row in zip(self.items, chosen.tolist(), strict=True):
            for history, token in zip(self.histories[item], row, strict=True):
                history.append(token)
        return self.session.step(chosen)

    def keep(self, indices):
        self.session.keep(indices)
        self.items = [self.items[index] for index in indices]


TINY_PROMPTS, F32 = [6, 9, 5], torch.float32
SEARCHES = {
    # name: (config, beams, lengths of prompts, precision, steps)
    **{f"{n}, {k} beams": (TINY[n], k, TINY_PROMPTS, F32, 8) for n in TINY for k in (1, 3, 5)},
    # Against the reference in float32 with the same rounded weights.
    **{f"bfloat16, {k} beams": (tiny_config(), k, [6, 9], torch.bfloat16, 8) for k in (1, 3)},
    "equal prompts and a cache that grows": (tiny_config(), 3, [6, 6], F32, 70),
}


@pytest.mark.parametrize(
    ("config", "beams", "lengths", "dtype", "steps"),
    [
        *(pytest.param(*search, id=name) for name, search in SEARCHES.items()),
        pytest.param(base_config(), 3, [8, 12], F32, 4, id="base", marks=pytest.mark.slow),
        pytest.param(large_config(), 3, [8, 12], F32, 4, id="large", marks=pytest.mark.slow),
    ],
)
def test_a_search_has_the_references_logits(config, beams, lengths, dtype, steps):
    replay = Replay(config, beams, lengths, dtype)
    error, limit = (relative_error, 1e-5) if dtype == F32 else (rms_error, 2e-2)
    logits = replay.session.prefill()
    assert error(logits, replay.expected()[:, 0]) < limit
    for step in range(steps):
        logits = replay.step(reorder=step > 0)
        assert error(logits, replay.expected()) < limit, step
        assert replay.session.length == len(PREFIX) + step + 1


def test_dropped_items_leave_the_others_alone():
    replay = Replay(tiny_config(), 3, [6, 9, 5, 7])
    replay.session.prefill()
    for step, kept in enumerate([None, [0, 2, 3], None, [2, 0], [0], None]):
        if kept is not None:
            replay.keep(kept)
            assert replay.session.num_items == len(kept)
        assert relative_error(replay.step(reorder=step > 0), replay.expected()) < 1e-5


def test_random_choices_of_order_and_items():
    for seed in range(10):
        replay = Replay(tiny_config(), 4, [5, 8, 6])
        torch.manual_seed(seed)
        replay.session.prefill()
        for step in range(12):
            logits = replay.step(reorder=bool(torch.rand(()) < 0.7) and step > 0)
            if step == 6:
                replay.keep([2, 0])
        assert relative_error(logits[:, :], replay.expected()) < 1e-5


def test_the_cache_holds_cross_attention_once_per_item_and_few_steps_of_a_long_limit():
    replay = Replay(tiny_config(max_positions=1024), 5, [6, 9], max_new_tokens=1024)
    replay.session.prefill()
    replay.step(reorder=False)
    for cross_key, cross_value, own_key, own_value in replay.session.caches():
        assert cross_key.shape == cross_value.shape == (2, 4, replay.mask.shape[1], 8)
        assert own_key.shape == own_value.shape
        assert own_key.shape[2] <= 256


def test_the_position_table_is_never_overrun():
    replay = Replay(tiny_config(max_positions=32), 2, [6], max_new_tokens=32)
    with pytest.raises(RequestError, match="max_new_tokens may be at most 32"):
        DecoderSession(replay.network, replay.states, replay.mask, 2, 33)
    session = DecoderSession(replay.network, replay.states, replay.mask, 2, 32)
    session.prefill()
    for _ in range(30):
        session.step(torch.full((1, 2), 7))
    with pytest.raises(RequestError, match="at most 32 tokens, got 33"):
        session.step(torch.full((1, 2), 7))


def test_calls_out_of_order_are_refused():
    replay = Replay(tiny_config(), 2, [6])
    with pytest.raises(RuntimeError, match="prefill first"):
        replay.session.step(torch.zeros(1, 2, dtype=torch.long))
    replay.session.prefill()
    with pytest.raises(RuntimeError, match="before any step"):
        replay.session.prefill()
