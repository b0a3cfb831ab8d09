"""The sides that ours is compared with, both on ``generate()`` of transformers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from torch import nn

from florence2.benchmark.case import STAGES, TASK, Case, Timing, case_images, case_texts
from florence2.benchmark.our_side import settle
from florence2.runtimes.device import PRECISIONS
from florence2.tasks import BANNED_PHRASES, OutputKind
from florence2.tokens import BOS, BOS_ID, DECODER_START_ID, EOS, EOS_ID, PAD_ID

NUM_VISUAL_TOKENS: Final = 577


class ReferenceSide:
    """``Florence2ForConditionalGeneration``, called in the two ways that ours is compared with."""

    def __init__(self, folder: Path, device: str, precision: str) -> None:
        from transformers import Florence2ForConditionalGeneration
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.device = torch.device(device)
        self.dtype = PRECISIONS[precision]
        model = Florence2ForConditionalGeneration.from_pretrained(folder, dtype=self.dtype)
        self.model = model.to(self.device).eval()
        self.processor = _processor(folder)
        self._begin()
        self._hook("vision_s", model.model.vision_tower)
        self._hook("vision_s", model.model.multi_modal_projector)
        self._hook("prompt_s", model.model.language_model.encoder)

    def run_reference(self, case: Case, round_index: int, limit_s: float) -> Timing:
        """One ``generate()`` for each prompt, with all images in it.

        The pixels are made once; the vision tower runs for every prompt, as ``generate()`` does.
        After ``limit_s`` seconds no further call is begun.
        """
        images = case_images(case, round_index)
        tokens: list[tuple[int, ...] | None] = [None] * case.asks
        stages_s = self._begin()
        pixels = self._pixels(images)
        for place, text in enumerate(case_texts(case)):
            if place and sum(stages_s.values()) > limit_s:
                break
            rows = self._generate(self._prompts(text, case.batch), pixels, case)
            for image, row in enumerate(rows.tolist()):
                tokens[image * case.prompts + place] = _spoken(row)
            self._note_decoding()
        return Timing(stages_s, tuple(tokens))

    def run_others(self, case: Case, round_index: int, limit_s: float) -> Timing:
        """The way it is usually served: one image and one prompt at a time, nothing kept.

        Each ask is processor, ``generate()``, decoding to text and parsing. After ``limit_s``
        seconds no further ask is begun.
        """
        images = case_images(case, round_index)
        texts = case_texts(case)
        tokens: list[tuple[int, ...] | None] = [None] * case.asks
        stages_s = self._begin()
        for ask in range(case.asks):
            if ask and sum(stages_s.values()) > limit_s:
                break
            image = images[ask // case.prompts]
            tokens[ask] = self._serve(image, texts[ask % case.prompts], case)
            self._note_decoding()
        return Timing(stages_s, tuple(tokens))

    def _serve(self, image: Image.Image, text: str, case: Case) -> tuple[int, ...]:
        inputs = self.processor(images=image, text=TASK + text, return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.device, self.dtype)
        prompt = inputs["input_ids"].to(self.device)
        self._note("preprocess_s")
        rows = self._generate(prompt, pixels, case)
        [answer] = self.processor.batch_decode(rows, skip_special_tokens=False)
        self.processor.post_process_generation(answer, task=TASK, image_size=image.size)
        return _spoken(rows[0].tolist())

    def _pixels(self, images: list[Image.Image]) -> torch.Tensor:
        scaled = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        pixels: torch.Tensor = scaled.to(self.device, self.dtype)
        return pixels

    def _prompts(self, text: str, count: int) -> torch.Tensor:
        """The ids [count, L] that the processor makes of the task with this text."""
        sentence = self.processor.task_prompts_with_input[TASK].format(input=text)
        images = self.processor.image_token * NUM_VISUAL_TOKENS
        words = self.processor.tokenizer(f"{images}{BOS}{sentence}{EOS}", add_special_tokens=False)
        ids = torch.tensor([words["input_ids"]] * count, device=self.device)
        self._note("preprocess_s")
        return ids

    @torch.inference_mode()
    def _generate(self, ids: torch.Tensor, pixels: torch.Tensor, case: Case) -> torch.Tensor:
        out: torch.Tensor = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
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
        return out

    def _begin(self) -> dict[str, float]:
        """The stages' seconds from now on; every second goes to the stage that is noted next."""
        self._spent = dict.fromkeys(STAGES, 0.0)
        self._mark = time.perf_counter()
        return self._spent

    def _note(self, stage: str) -> None:
        settle(self.device)
        now = time.perf_counter()
        self._spent[stage] += now - self._mark
        self._mark = now

    def _note_decoding(self) -> None:
        self._note("decode_s")

    def _hook(self, stage: str, module: nn.Module) -> None:
        """What goes on between the modules, in ``generate()``, counts as decoding."""
        module.register_forward_pre_hook(lambda *_: self._note_decoding())
        module.register_forward_hook(lambda *_: self._note(stage))


def _processor(folder: Path) -> Any:  # noqa: ANN401 - transformers has no types
    """The reference's processor as its conversion script sets it up."""
    from transformers import AutoTokenizer, Florence2Processor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(
        size={"height": 768, "width": 768},
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    images.image_seq_length = NUM_VISUAL_TOKENS
    parsing: dict[str, dict[str, list[str]]] = {kind.value: {} for kind in OutputKind}
    parsing[OutputKind.GROUNDING.value] = {"banned_grounding_tokens": sorted(BANNED_PHRASES)}
    return Florence2Processor(
        image_processor=images,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        post_processor_config=parsing,
    )


def _spoken(row: list[int]) -> tuple[int, ...]:
    """The tokens between the start and ``</s>``, as an Answer holds them."""
    ids = row[1:]
    while ids and ids[0] == BOS_ID:
        ids = ids[1:]
    return tuple(ids[: ids.index(EOS_ID)] if EOS_ID in ids else ids)
