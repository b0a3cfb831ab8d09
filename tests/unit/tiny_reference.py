"""Tiny random Florence-2 models of transformers, their answers, and who asks for ours."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Florence2Config, Florence2ForConditionalGeneration
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutput

from florence2.errors import FlorenceError
from florence2.generation.decode import DecodeBatch, DecodeLoop, EncodedItems, generate
from florence2.generation.kv_cache import DecoderSession
from florence2.network.config import NetworkConfig
from florence2.network.florence import Florence2Network
from florence2.records import Answer, GenerationSettings
from florence2.tokens import ANSWER_PREFIX, BOS_ID, DECODER_START_ID, EOS_ID, PAD_ID

SEEDS = (0, 3, 5)
VOCAB = 120
WIDTH = 16
POSITIONS = 40
LONGEST_PROMPT = 7
COUNT = 24
MODES = [(1, True), (3, True), (3, False), (4, "never")]


@dataclass(frozen=True, eq=False)
class Prompts:
    """Encoder states [items, longest, WIDTH] and their mask [items, longest]."""

    states: Tensor
    mask: Tensor

    def pick(self, items):
        """Some of the prompts, padded no further than they need."""
        longest = int(self.mask[items].sum(dim=1).max())
        return Prompts(self.states[items, :longest], self.mask[items, :longest])


@dataclass(frozen=True)
class Expected:
    """What the reference generated for one prompt: raw ids after the start token, its score."""

    ids: list[int]
    score: float | None

    @property
    def token_ids(self):
        ids = self.ids[: self.ids.index(EOS_ID)]
        while ids and ids[0] == BOS_ID:
            ids = ids[1:]
        return tuple(ids)

    @property
    def length(self):
        """Generated tokens, forced ones included."""
        return self.ids.index(EOS_ID) + 1


@functools.cache
@torch.inference_mode(False)
def tiny_model(seed):
    """A random model with sharp distributions that ends its answers at various lengths."""
    text = {
        "model_type": "bart",
        "vocab_size": VOCAB,
        "d_model": WIDTH,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": BOS_ID,
        "pad_token_id": PAD_ID,
        "eos_token_id": EOS_ID,
        "decoder_start_token_id": DECODER_START_ID,
        "is_encoder_decoder": True,
    }
    vision = {
        "embed_dim": [8, 8, 8, 8],
        "num_heads": [1, 1, 1, 1],
        "num_groups": [1, 1, 1, 1],
        "depths": [1, 1, 1, 1],
        "projection_dim": WIDTH,
        "window_size": 2,
    }
    torch.manual_seed(seed)
    config = Florence2Config(text_config=text, vision_config=vision, image_token_id=VOCAB - 1)
    model = Florence2ForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.model.language_model.named_parameters():
            if weight.dim() == 2:
                scale = 0.5 if "embed" in name else 1.2 / weight.shape[1] ** 0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
        model.model.language_model.shared.weight[EOS_ID] *= 3.0
    return model


@functools.cache
@torch.inference_mode(False)
def random_prompts(seed, items):
    """Random encoder states of 2 to ``LONGEST_PROMPT`` positions."""
    generator = torch.Generator().manual_seed(1000 + seed)
    lengths = torch.randint(2, LONGEST_PROMPT + 1, (items, 1), generator=generator)
    states = torch.randn((items, LONGEST_PROMPT, WIDTH), generator=generator) * 1.5
    return Prompts(states, (torch.arange(LONGEST_PROMPT) < lengths).long())


class _BanBos(LogitsProcessor):
    """Our own rule for ``no_repeat_ngram_size=0``: no ``<s>`` after the first step."""

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > 1:
            scores = scores.clone()
            scores[:, BOS_ID] = -torch.inf
        return scores


@functools.cache
def expected_answers(model, prompts, settings, max_new_tokens):
    """The reference's ``generate()`` on all prompts in one batch."""
    options: dict[str, Any] = {}
    if settings.num_beams > 1:
        options.update(
            length_penalty=settings.length_penalty, early_stopping=settings.early_stopping
        )
    if settings.no_repeat_ngram_size:
        options.update(no_repeat_ngram_size=settings.no_repeat_ngram_size)
    else:
        options.update(logits_processor=LogitsProcessorList([_BanBos()]))
    with torch.inference_mode():
        output = model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=prompts.states),
            attention_mask=prompts.mask,
            num_beams=settings.num_beams,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            forced_bos_token_id=BOS_ID,
            forced_eos_token_id=EOS_ID,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
    scores = output.sequences_scores.tolist() if settings.num_beams > 1 else None
    return [
        Expected(ids[1:], scores[at] if scores else None)
        for at, ids in enumerate(output.sequences.tolist())
    ]


def padded(part, dims):
    """As wide as the longest prompt there may be: whom an item is run with changes no bit of it."""
    missing = LONGEST_PROMPT - part.shape[1]
    return nn.functional.pad(part, (0, 0) * (dims - 1) + (0, missing))


def decoder_logits(model, prompts, ids):
    """Logits [items, length, vocab] of whole histories [items, length], without a cache."""
    with torch.inference_mode():
        hidden = model.model.language_model.decoder(
            input_ids=ids,
            encoder_hidden_states=prompts.states,
            encoder_attention_mask=prompts.mask,
            use_cache=False,
        ).last_hidden_state
        return model.lm_head(hidden)


class NaiveSession:
    """The session protocol by re-running the reference's decoder on whole histories."""

    def __init__(self, model, prompts, alter=lambda logits: logits):
        """``alter`` may change logits that are given."""
        self._model, self._alter = model, alter
        # What each item's prompt is, and each item's history [beams, length].
        self._prompts = [prompts.pick([item]) for item in range(len(prompts.states))]
        self._history: list[Tensor] = []
        self.calls: list[tuple[str, int]] = []

    def prefill(self):
        self.calls.append(("prefill", len(self._prompts)))
        self._history = [torch.tensor([ANSWER_PREFIX]) for _ in self._prompts]
        return self._logits()[:, 0]

    def reorder(self, beam_indices):
        self._history = [
            history[chosen] for history, chosen in zip(self._history, beam_indices, strict=True)
        ]

    def step(self, token_ids):
        self.calls.append(("step", len(token_ids)))
        self._history = [
            torch.cat((history, ids.unsqueeze(1)), dim=1)
            for history, ids in zip(self._history, token_ids, strict=True)
        ]
        return self._logits()

    def keep(self, items):
        self.calls.append(("keep", len(items)))
        self._history = [self._history[item] for item in items]
        self._prompts = [self._prompts[item] for item in items]

    def put(self, items, other):
        self.calls.append(("put", len(items)))
        for place, item in enumerate(items):
            self._history[item] = other._history[place]
            self._prompts[item] = other._prompts[place]

    def _logits(self):
        """[items, beams, vocab] after every history; those equally long are run together."""
        found: dict[int, Tensor] = {}
        by_length: dict[int, list[int]] = {}
        for item, history in enumerate(self._history):
            by_length.setdefault(history.shape[1], []).append(item)
        for items in by_length.values():
            histories = torch.stack([self._history[item] for item in items])
            beams = histories.shape[1]
            states = torch.cat([padded(self._prompts[item].states, 2) for item in items])
            mask = torch.cat([padded(self._prompts[item].mask, 1) for item in items])
            spread = Prompts(
                states.repeat_interleave(beams, dim=0), mask.repeat_interleave(beams, dim=0)
            )
            logits = decoder_logits(self._model, spread, histories.flatten(0, 1))[:, -1]
            found |= zip(items, logits.view(len(items), beams, -1), strict=True)
        return self._alter(torch.stack([found[item] for item in range(len(self._history))]))


def naive_session(model, prompts, *_, **options):
    return NaiveSession(model, prompts)


@functools.cache
@torch.inference_mode(False)
def our_network(model, device="cpu"):
    """Our network with the reference's weights."""
    network = Florence2Network(NetworkConfig.from_dict(model.config.to_dict()))
    network.load_state_dict(model.state_dict())
    return network.to(device).prepare_for_inference()


def network_session(model, prompts, num_beams, limits, device="cpu"):
    states, mask = prompts.states.to(device), prompts.mask.bool().to(device)
    return DecoderSession(our_network(model, device), states, mask, num_beams, max(limits))


def differences(answers, expected):
    """Where tokens differ, or scores do by 1e-4 where the reference has one."""
    return [
        at
        for at, (ours, theirs) in enumerate(zip(answers, expected, strict=True))
        if ours.token_ids != theirs.token_ids
        or (theirs.score is not None and abs(ours.beam_score - theirs.score) >= 1e-4)
    ]


def answer_in_batches(
    model, prompts, settings, max_new_tokens, batch, session=network_session, flags_lag=None
):
    """Our answers to all prompts, ``batch`` of them at a time, by default with our network."""
    answers: list[Answer] = []
    for start in range(0, len(prompts.states), batch):
        part = prompts.pick(list(range(start, min(start + batch, len(prompts.states)))))
        limits = [max_new_tokens] * len(part.states)
        made = session(model, part, settings.num_beams, limits)
        answers += generate(made, DecodeBatch(settings), limits, flags_lag=flags_lag)
    return answers


def settings_of(beams=3, early_stopping=True, ngram=3):
    return GenerationSettings(
        num_beams=beams, early_stopping=early_stopping, no_repeat_ngram_size=ngram
    )


SEARCHES = {
    f"{beams}-{early_stopping}-{ngram}": (
        SEEDS[number % 3],
        settings_of(beams, early_stopping, ngram),
    )
    for number, ((beams, early_stopping), ngram) in enumerate(itertools.product(MODES, (0, 3)))
}
"""A seed and its settings: every mode with a ban and without, each with one of the models."""


def mixed_limits(count=COUNT):
    limits = [1, 2, 3, 5, 9, 16, 24, 39]
    return [limits[item % len(limits)] for item in range(count)]


class Crowd:
    """A source of prompts that come at random; ``meanwhile`` is called before every pass.

    ``reasons`` gives prompts up once they are in hand, and also before if ``names_waiting``.
    ``rooms`` are the rooms it was asked for and how many came; ``alter`` may spoil the states of
    the prompts that are to come.
    """

    def __init__(self, seed, settings, limits, device="cpu", session=network_session):
        self.model, self.prompts = tiny_model(seed), random_prompts(seed, len(limits))
        self.settings, self.limits, self.device = settings, limits, device
        self.session = session
        self.meanwhile: Callable[[], object] = lambda: None
        self.alter: Callable[[list[int], object], object] = lambda items, states: None
        self.names_waiting = False
        self.begin(seed)

    def begin(self, seed):
        """All prompts once more."""
        self.random = random.Random(seed)
        self.left = list(range(len(self.limits)))
        self.answers: dict[int, Answer | FlorenceError] = {}
        self.reasons: dict[int, FlorenceError] = {}
        self.rooms: list[tuple[int, int]] = []

    @property
    def in_hand(self):
        return set(range(len(self.limits))) - {*self.left, *self.answers}

    def give_up(self, *items):
        self.reasons |= {item: FlorenceError(f"Nobody waits for {item}.") for item in items}

    def given_up(self):
        self.meanwhile()
        named = {*self.in_hand, *(self.left if self.names_waiting else ())} - {*self.answers}
        return {item: why for item, why in self.reasons.items() if item in named}

    def start(self, room):
        self.left = [item for item in self.left if item not in self.answers]
        if not self.left or (self.in_hand and self.random.random() < 0.5):
            return None
        count = min(self.random.randint(1, room), len(self.left))
        items, self.left = self.left[:count], self.left[count:]
        self.rooms.append((room, count))
        part = self.prompts.pick(items)
        self.alter(items, part.states)
        limits = [self.limits[item] for item in items]
        session = self.session(
            self.model, part, self.settings.num_beams, limits, device=self.device
        )
        return EncodedItems(items, session, limits)

    def settle(self, item, answer):
        assert item not in self.answers
        self.answers[item] = answer

    def run(self, batch=None, max_rows=6, **options):
        batch = DecodeBatch(self.settings) if batch is None else batch
        DecodeLoop(self, batch, max_rows=max_rows, **options).run()
        return [self.answers[item] for item in range(len(self.limits))]

    def failed(self):
        """The items that have an error for an answer."""
        return sorted(i for i, one in self.answers.items() if not isinstance(one, Answer))

    def differing(self):
        """The items that have an answer, and another one than the reference gives."""
        items = [item for item in range(len(self.limits)) if item not in self.failed()]
        expected = expected_by_limit(self.model, self.prompts, self.settings, self.limits)
        found = differences([self.answers[item] for item in items], [expected[i] for i in items])
        return [items[at] for at in found]


def expected_by_limit(model, prompts, settings, limits):
    tables = {limit: expected_answers(model, prompts, settings, limit) for limit in set(limits)}
    return [tables[limit][item] for item, limit in enumerate(limits)]
