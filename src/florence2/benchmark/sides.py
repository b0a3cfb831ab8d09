"""A side of the comparison: ours, or ``generate()`` of transformers in two ways; and its process.

``python -m florence2.benchmark.sides`` is a side in a process of its own, so that its memory is its
own and its end is not ours. It reads a question a line from stdin and answers with a JSON line: a
Measured, or why the run failed.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, TextIO, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import nn

from florence2.api import Ask, Florence2
from florence2.benchmark.plan import TASK, Case, case_images, case_texts
from florence2.checkpoint.checkpoint import open_checkpoint
from florence2.conversion.convert import convert
from florence2.engine.answering import answer_all
from florence2.errors import FlorenceError
from florence2.images import open_image
from florence2.records import GenerationSettings
from florence2.runtimes.device import PRECISIONS
from florence2.tasks import BANNED_PHRASES, OutputKind
from florence2.tokens import BOS, BOS_ID, DECODER_START_ID, EOS, EOS_ID, PAD_ID

OURS: Final = "ours"
REFERENCE: Final = "reference"
CONVERT: Final = "convert"
OTHERS: Final = "others"
"""The reference as it is usually served: one prompt at a time, nothing kept."""

STAGES: Final = ("preprocess_s", "vision_s", "prompt_s", "decode_s")
NUM_VISUAL_TOKENS: Final = 577

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of a case on one side: seconds by stage, the answers' tokens, and memory.

    The answers are in the order of the images, and within an image of its prompts. An answer that
    was not measured, because the run reached its limit, is None there. Memory as ``PeakMemory``
    counts it, 0 where a side runs in no process of its own.
    """

    stages_s: Mapping[str, float]
    token_ids: tuple[tuple[int, ...] | None, ...]
    loading_mib: float = 0.0
    running_mib: float = 0.0

    @property
    def measured_asks(self) -> int:
        """Answers that the seconds are for."""
        return sum(ids is not None for ids in self.token_ids)

    @property
    def spent_s(self) -> float:
        """Seconds that the run took."""
        return sum(self.stages_s.values())

    @property
    def whole_stages_s(self) -> dict[str, float]:
        """By stage for all asks; those that were not measured count as the mean of the others."""
        asks, measured = len(self.token_ids), self.measured_asks
        return {stage: spent * asks / measured for stage, spent in self.stages_s.items()}

    @property
    def whole_s(self) -> float:
        """Seconds of all asks."""
        return self.spent_s * len(self.token_ids) / self.measured_asks


class OurSide:
    """Encode, prepare, answer, with the batches that the engine itself makes."""

    def __init__(self, folder: Path, device: str, runtime: str, precision: str) -> None:
        self.engine = Florence2.load(
            folder, device=device, runtime=runtime, precision=precision
        ).engine
        self.device = torch.device(device)
        self._spent = {"vision": 0.0, "prompt": 0.0}
        loaded = self.engine.runtime
        loaded.encode_bytes = self._timed("vision", loaded.encode_bytes)  # type: ignore[method-assign]
        loaded.start = self._timed("prompt", loaded.start)  # type: ignore[method-assign]

    def _timed(self, stage: str, call: Callable[..., Value]) -> Callable[..., Value]:
        def timed(*values: object, **named: object) -> Value:
            began = time.perf_counter()
            found = call(*values, **named)
            settle(self.device)
            self._spent[stage] += time.perf_counter() - began
            return found

        return timed

    def run(self, case: Case, round_index: int, limit_s: float) -> Measured:
        """All prompts of all images at once, from pictures in memory to parsed results.

        ``limit_s`` is for the sides that answer one call after another; this one is always whole.
        """
        images = case_images(case, round_index)
        settings = GenerationSettings(num_beams=case.beams, max_new_tokens=case.tokens)
        texts = case_texts(case)
        self.engine.cache.clear()
        self._spent = dict.fromkeys(self._spent, 0.0)
        began = time.perf_counter()
        encoded = [_value(one) for one in self.engine.encode([open_image(one) for one in images])]
        asks = [Ask(image, TASK, text, **asdict(settings)) for image in encoded for text in texts]
        prepared = time.perf_counter()
        results = [_value(one) for one in answer_all(self.engine, asks)]
        settle(self.device)
        answered = time.perf_counter()
        vision_s, prompt_s = self._spent["vision"], self._spent["prompt"]
        stages_s = {
            "preprocess_s": prepared - began - vision_s,
            "vision_s": vision_s,
            "prompt_s": prompt_s,
            "decode_s": answered - prepared - prompt_s,
        }
        return Measured(stages_s, tuple(result.token_ids for result in results))


def settle(device: torch.device) -> None:
    """Waits for the work that a GPU has been given, so that the clock has seen it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _value(outcome: Value | FlorenceError) -> Value:
    if isinstance(outcome, FlorenceError):
        raise outcome
    return outcome


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

    def run_reference(self, case: Case, round_index: int, limit_s: float) -> Measured:
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
        return Measured(stages_s, tuple(tokens))

    def run_others(self, case: Case, round_index: int, limit_s: float) -> Measured:
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
        return Measured(stages_s, tuple(tokens))

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


# The process of a side

_STATUS: Final = Path("/proc/self/status")
_CLEAR: Final = Path("/proc/self/clear_refs")
_KILL_ORDER: Final = Path("/proc/self/oom_score_adj")


class PeakMemory:
    """On a GPU what torch held of its memory at most, on a CPU the largest resident size."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)

    def restart(self) -> None:
        """Counts from now on, with what an earlier run left behind given back first.

        Where the system does not let a process do that, the peak is the one since its start.
        """
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        if sys.platform == "linux":
            trim = getattr(ctypes.CDLL(ctypes.util.find_library("c")), "malloc_trim", None)
            if trim is not None:
                trim(0)
            _write(_CLEAR, "5")

    def peak_mib(self) -> float:
        """MiB at most since ``restart``."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._device) / 2**20
        if _STATUS.is_file():
            for line in _STATUS.read_text(encoding="utf-8").splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 1024
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest / (2**20 if sys.platform == "darwin" else 1024)


def _write(path: Path, text: str) -> None:
    """Asks the system for something that the figures are right without."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError:
        return


RunCase = Callable[[Case, int, float], Measured]

WARM_UP: Final = Case(batch=1, prompts=1, beams=1, tokens=8)
WARM_UP_ROUND: Final = 1_000_000
_CALIBRATION_IMAGES: Final = 3
# What torch and the libraries below it raise when they lack memory or a kernel for a precision.
_FAILURES: Final = (FlorenceError, RuntimeError, MemoryError)


def _load(
    process: str, folder: Path, device: str, runtime: str, precision: str
) -> dict[str, RunCase]:
    """The ways to run a case with what is loaded here, by name."""
    if process == OURS:
        return {OURS: OurSide(folder, device, runtime, precision).run}
    reference = ReferenceSide(folder, device, precision)
    return {REFERENCE: reference.run_reference, OTHERS: reference.run_others}


def main() -> None:
    """``... ours|reference RUNTIME PRECISION FOLDER DEVICE THREADS``, or a conversion.

    ``... convert PRECISION FOLDER OUT`` converts what an OpenVINO side then loads.
    """
    if sys.argv[1] == CONVERT:
        _convert(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
        return
    process, runtime, precision, folder, device, threads = sys.argv[1:]
    # Whatever else is printed, also by libraries in C, goes to stderr.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # When memory runs out, the system ends this process and not the one that writes the rows.
    _write(_KILL_ORDER, "1000")
    torch.set_num_threads(int(threads))
    memory = PeakMemory(device)
    try:
        runs = _load(process, Path(folder), device, runtime, precision)
        # Every side has answered once before it is timed, as ours has when it is loaded.
        next(iter(runs.values()))(WARM_UP, WARM_UP_ROUND, 0.0)
    except _FAILURES as error:
        _say(answers, _failure(error))
        return
    loading_mib = memory.peak_mib()
    _say(answers, {})
    for line in sys.stdin:
        question = json.loads(line)
        memory.restart()
        try:
            run = runs[question["way"]]
            found = run(Case(**question["case"]), question["round_index"], question["limit_s"])
        except _FAILURES as error:
            _say(answers, _failure(error))
            continue
        measured = replace(found, loading_mib=loading_mib, running_mib=memory.peak_mib())
        _say(answers, asdict(measured))


def _convert(precision: str, folder: Path, out: Path) -> None:
    # With random weights any pictures give ranges of activations that hold for all others.
    images = case_images(Case(_CALIBRATION_IMAGES, 1, 1, 1), WARM_UP_ROUND)
    convert(
        open_checkpoint(folder),
        precision,
        out,
        calibration=[np.asarray(image) for image in images] if precision == "int8" else (),
        calibration_source="noise",
    )


def _failure(error: BaseException) -> dict[str, str]:
    lines = str(error).splitlines() or [type(error).__name__]
    return {"failed": lines[0]}


def _say(answers: TextIO, content: Mapping[str, Any]) -> None:
    print(json.dumps(content), file=answers, flush=True)


if __name__ == "__main__":
    main()
