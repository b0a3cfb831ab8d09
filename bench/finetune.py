"""Figures of fine-tuning: a thirteenth class, time per step, and memory.

python bench/finetune.py class FOLDER     # 300 steps on the demo checkpoint teach boats
python bench/finetune.py step             # base: ours against the public guides' plain loop
python bench/finetune.py memory           # base: LoRA, batch 1, float32
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Final

import numpy as np
import torch

from florence2.benchmark.run import write_checkpoint
from florence2.checkpoint.checkpoint import open_checkpoint
from florence2.finetune.examples import IGNORED, Example, Spelled, collate
from florence2.finetune.model import FineTuned, make_model
from florence2.finetune.plan import FineTuningPlan
from florence2.finetune.run import fine_tune, num_visual_tokens
from florence2.finetune.targets import Vocabulary, pair_question
from florence2.finetune.trainer import Progress, Watcher
from florence2.finetune.validation import Validation, Validator, engine_of
from florence2.labeled.records import LabeledData
from florence2.runtimes.torch import normalise
from florence2.tasks import find_task
from florence2.tokens import PAD_ID
from florence2_demo.labeled_scenes import NEW_KIND, labeled_scenes, scenes_with_new_kind
from florence2_demo.lexicon import KINDS

# Any id that no prompt has.
_IMAGE_ID: Final = 51_000
_TASK = "<OD>"
_FIRST_TRAINING = 2_000_000
_FIRST_VALIDATION = 2_500_000
_FIRST_HELD_OUT = 3_000_000


class _Printed(Watcher):
    def progress(self, now: Progress) -> None:
        if now.step % 20 == 0:
            seconds = 1 / now.steps_per_s
            print(f"{now.step}/{now.steps} loss {now.loss:.3f} {seconds:.2f} s a step", flush=True)

    def validated(self, step: int, found: Validation, *, is_best: bool) -> None:
        print(f"step {step}: {found.tasks[0].metric} {found.value:.4f}")

    def note(self, sentence: str) -> None:
        print(sentence)


def measure(tuned: FineTuned, data: LabeledData) -> tuple[float, float]:
    """Recall of the new kind at an overlap of one half, and mAP of the twelve others."""
    vocabulary = Vocabulary(data.classes)
    validator = Validator(data.images, (find_task(_TASK),), vocabulary)
    with engine_of(tuned.checkpoint, tuned.merged_state(), torch.device("cpu")) as engine:
        found = validator.measure(engine).tasks[0].by_class
    known = [found[kind].average_precision for kind in KINDS if kind in found]
    return found[NEW_KIND].recall, statistics.fmean(known)


def teach_a_class(folder: Path, steps: int, batch: int, rate: float | None) -> None:
    """300 steps on scenes of which half have boats; the other half is replay."""
    training = labeled_scenes(
        scenes_with_new_kind(_FIRST_TRAINING, 400, share=0.5), folder / "training"
    )
    validation = labeled_scenes(
        scenes_with_new_kind(_FIRST_VALIDATION, 40, share=0.5), folder / "val"
    )
    held_out = labeled_scenes(
        scenes_with_new_kind(_FIRST_HELD_OUT, 200, share=0.5), folder / "held-out"
    )
    plan = FineTuningPlan(
        "demo",
        (_TASK,),
        steps=steps,
        batch=batch,
        prompts=1,
        rate=rate,
        augmentations=("flip", "colour"),
        validate_every=max(1, steps // 3),
        device="cpu",
    )
    before = measure(make_model(open_checkpoint("demo"), plan), held_out)
    start = time.perf_counter()
    fine_tune(training, validation, plan, folder / "out", _Printed())
    spent_s = time.perf_counter() - start
    tuned = make_model(open_checkpoint("demo"), plan)
    tuned.model.load_adapter(str(folder / "out" / "best"), "default")
    after = measure(tuned, held_out)
    print(
        f"{steps} steps of {batch} images: {spent_s:.0f} s with {torch.get_num_threads()} threads"
    )
    print(
        f"recall of {NEW_KIND}s at IoU 0.5, 200 held-out scenes: {before[0]:.3f} -> {after[0]:.3f}"
    )
    print(f"mAP of the twelve known kinds: {before[1]:.4f} -> {after[1]:.4f}")


def _random(
    size: str, folder: Path, plan: FineTuningPlan, num_questions: int = 1
) -> tuple[FineTuned, dict[str, torch.Tensor]]:
    """A network with random weights, and a batch of noise with boxes to learn."""
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(size, folder)
    tuned = make_model(open_checkpoint(folder), plan)
    rng = np.random.default_rng(0)
    question = pair_question("<OD>", "thing<loc_1><loc_2><loc_3><loc_4>" * 5)
    spelled = Spelled.of(question, tuned.checkpoint)
    width, height = tuned.checkpoint.image_processor.size_wh
    scaled = [rng.integers(0, 256, (height, width, 3), np.uint8) for _ in range(plan.batch)]
    asked = (spelled,) * num_questions
    return tuned, collate([Example(at, one, asked) for at, one in enumerate(scaled)])


def plain_step(tuned: FineTuned, batch: dict[str, torch.Tensor]) -> None:
    """A step of the public guides' loop: the model's own loss on the processor's tensors."""
    # An example of the guides is an image with one question.
    pixels = normalise(batch["scaled"], tuned.table)[batch["image_of"]]
    image = torch.full((len(pixels), num_visual_tokens(tuned.checkpoint)), _IMAGE_ID)
    ids = torch.cat([image, batch["prompt_ids"]], dim=1)
    tuned.florence.config.image_token_id = _IMAGE_ID
    loss = tuned.model(
        input_ids=ids, pixel_values=pixels, attention_mask=ids.ne(PAD_ID), labels=batch["labels"]
    ).loss
    loss.backward()


def our_step(tuned: FineTuned, batch: dict[str, torch.Tensor]) -> None:
    """What a training does with one part of a batch."""
    tuned.loss(batch, (batch["labels"] != IGNORED).sum()).backward()


def time_per_step(
    size: str, batch_size: int, num_questions: int, rounds: int, freeze_vision: bool
) -> None:
    """Ours, and the plain loop's, on one batch in turns; the optimizer is the same.

    The processor's seconds are told too: they stay the same beside other programs.
    """
    plan = FineTuningPlan(size, (), batch=batch_size, freeze_vision=freeze_vision)
    with tempfile.TemporaryDirectory() as name:
        tuned, batch = _random(size, Path(name), plan, num_questions)
    sides = {"ours": our_step, "plain loop": plain_step}
    spent_s: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for _ in range(rounds + 1):
        for side, step in sides.items():
            tuned.model.zero_grad()
            start = time.perf_counter(), time.process_time()
            step(tuned, batch)
            spent_s[side].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    where = "vision frozen" if freeze_vision else "adapters everywhere"
    where += f", {num_questions} questions an image" if num_questions > 1 else ""
    for side, spent in spent_s.items():
        wall_s, processor_s = (statistics.median(one) for one in zip(*spent[1:], strict=True))
        print(
            f"{size}, LoRA, batch {batch_size}, {where}: {side} {wall_s:.2f} s a step, "
            f"{processor_s:.2f} s of the processor"
        )


def memory(size: str) -> None:
    """The most memory that three steps take, weights included."""
    with tempfile.TemporaryDirectory() as name:
        tuned, batch = _random(size, Path(name), FineTuningPlan(size, (), batch=1))
        optimizer = torch.optim.AdamW([weight for _, weight in tuned.trained()])
        for _ in range(3):
            our_step(tuned, batch)
            optimizer.step()
            optimizer.zero_grad()
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{size}, LoRA on text and vision, batch 1, float32: {peak_gib:.2f} GiB at most")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("class", "step", "memory"))
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/boats"))
    parser.add_argument("--size", default="base", help="base, large, or tiny to try it")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each side")
    parser.add_argument("--questions", type=int, default=1, help="about each image; train has 2")
    parser.add_argument("--freeze-vision", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.what == "class":
        teach_a_class(given.folder, given.steps, given.batch or 8, given.rate)
    elif given.what == "step":
        time_per_step(
            given.size, given.batch or 1, given.questions, given.rounds, given.freeze_vision
        )
    else:
        memory(given.size)


if __name__ == "__main__":
    main()
