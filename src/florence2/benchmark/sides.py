"""The two sides of the comparison: our runtime, and ``generate()`` of transformers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from florence2.benchmark.case import NUM_VISUAL_TOKENS, Case, Timing, case_pixels, case_prompts
from florence2.errors import FlorenceError
from florence2.generate import generate
from florence2.network.config import NetworkConfig
from florence2.network.weights import build_network, read_weights
from florence2.records import Answer, GenerationSettings
from florence2.runtimes.torch import PRECISIONS, TorchRuntime
from florence2.tokens import BOS_ID, DECODER_START_ID, EOS_ID, PAD_ID


class Side(Protocol):
    """Runs a case once and says how long each stage took."""

    def run(self, case: Case) -> Timing: ...


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class OurSide:
    """The engine's runtime and decode loop."""

    def __init__(self, folder: Path, device: str, precision: str) -> None:
        config = NetworkConfig.from_dict(json.loads((folder / "config.json").read_text()))
        network = build_network(config, read_weights(folder), PRECISIONS[precision])
        self.device = torch.device(device)
        self.runtime = TorchRuntime(network, self.device, precision)

    def run(self, case: Case) -> Timing:
        """One vision pass, all prompts of all images in one batch."""
        pixels, prompts = case_pixels(case), case_prompts(case)
        settings = GenerationSettings(num_beams=case.beams)
        count = case.batch * case.prompts
        marks = [time.perf_counter()]
        with torch.inference_mode():
            features = self.runtime.encode_images(pixels)
            _settle(self.device)
            marks.append(time.perf_counter())
            repeated = [row for row in features for _ in prompts]
            session = self.runtime.start(repeated, prompts * case.batch, case.beams, case.tokens)
            _settle(self.device)
            marks.append(time.perf_counter())
            answers = generate(session, count, settings, [case.tokens] * count)
            _settle(self.device)
            marks.append(time.perf_counter())
        started, seen, prompted, done = marks
        tokens = tuple(_ids_of(answer) for answer in answers)
        return Timing(seen - started, prompted - seen, done - prompted, tokens)


class ReferenceSide:
    """``Florence2ForConditionalGeneration.generate()``, one call per prompt of the batch."""

    def __init__(self, folder: Path, device: str, precision: str) -> None:
        from transformers import Florence2ForConditionalGeneration
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.device = torch.device(device)
        self.dtype = PRECISIONS[precision]
        model = Florence2ForConditionalGeneration.from_pretrained(folder, dtype=self.dtype)
        self.image_token = model.config.image_token_id
        self.model = model.to(self.device).eval()
        self._spent = {"vision": 0.0, "prompt": 0.0}
        self._time("vision", model.model.vision_tower)
        self._time("vision", model.model.multi_modal_projector)
        self._time("prompt", model.model.language_model.encoder)

    def _time(self, stage: str, module: nn.Module) -> None:
        began: list[float] = []

        def before(*_: object) -> None:
            _settle(self.device)
            began.append(time.perf_counter())

        def after(*_: object) -> None:
            _settle(self.device)
            self._spent[stage] += time.perf_counter() - began.pop()

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def run(self, case: Case) -> Timing:
        """Every prompt runs the vision tower again, as ``generate()`` does."""
        pixels = torch.from_numpy(case_pixels(case)).to(self.device, self.dtype)
        tokens: list[tuple[int, ...]] = [()] * (case.batch * case.prompts)
        self._spent = dict.fromkeys(self._spent, 0.0)
        began = time.perf_counter()
        for place, prompt in enumerate(case_prompts(case)):
            for image, row in enumerate(self._generate(pixels, prompt, case)):
                tokens[image * case.prompts + place] = row
        _settle(self.device)
        whole = time.perf_counter() - began
        vision, prompt_s = self._spent["vision"], self._spent["prompt"]
        return Timing(vision, prompt_s, whole - vision - prompt_s, tuple(tokens))

    def _generate(
        self, pixels: torch.Tensor, prompt: list[int], case: Case
    ) -> list[tuple[int, ...]]:
        ids = [self.image_token] * NUM_VISUAL_TOKENS + prompt
        rows = torch.tensor([ids] * case.batch, device=self.device)
        with torch.inference_mode():
            out: Any = self.model.generate(
                input_ids=rows,
                attention_mask=torch.ones_like(rows),
                pixel_values=pixels,
                max_new_tokens=case.tokens,
                num_beams=case.beams,
                do_sample=False,
                early_stopping=case.beams > 1,
                no_repeat_ngram_size=3,
                forced_bos_token_id=BOS_ID,
                forced_eos_token_id=EOS_ID,
                decoder_start_token_id=DECODER_START_ID,
                pad_token_id=PAD_ID,
                eos_token_id=EOS_ID,
            )
        return [_spoken(row) for row in out.tolist()]


def _ids_of(answer: Answer | FlorenceError) -> tuple[int, ...]:
    if isinstance(answer, FlorenceError):
        raise answer
    return answer.token_ids


def _spoken(row: list[int]) -> tuple[int, ...]:
    """The tokens between the start and ``</s>``, as an Answer holds them."""
    ids = row[1:]
    while ids and ids[0] == BOS_ID:
        ids = ids[1:]
    return tuple(ids[: ids.index(EOS_ID)] if EOS_ID in ids else ids)


def make_side(kind: str, folder: Path, device: str, precision: str) -> Side:
    """``ours`` or ``reference``."""
    sides: dict[str, Callable[..., Side]] = {"ours": OurSide, "reference": ReferenceSide}
    return sides[kind](folder, device, precision)
