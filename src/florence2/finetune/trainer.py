"""transformers' Trainer for Florence-2: batches cut to what memory holds, whole saves, a stop."""

from __future__ import annotations

import errno
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as library_logging

from florence2.budget import memory_limit_bytes
from florence2.errors import FlorenceError
from florence2.finetune.examples import IGNORED, Examples, collate, part_of
from florence2.finetune.model import FineTuned
from florence2.finetune.plan import FineTuningPlan
from florence2.finetune.validation import Validation, Validator, engine_of
from florence2.runtimes.device import gpu_computes_bf16
from florence2.runtimes.torch import is_memory_error

logger = logging.getLogger(__name__)

_STATE: Final = "state"
_WRITING: Final = "writing"
_OLD: Final = "writing-old"
BEST: Final = "best"
_LINES: Final = 200
"""How many points a curve has."""
_QUALITY: Final = "quality"
_MEMORY_SHARE: Final = 0.6
"""Of what is free; the rest is for the work itself, and for others."""
_ROOM_BYTES: Final = 2**20
"""With less left, a disk is as good as full."""
_MEMINFO: Final = Path("/proc/meminfo")
_AVAILABLE: Final = "MemAvailable:"


class TrainingError(FlorenceError):
    """The training cannot go on; what was saved before is whole."""

    code = "training"


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a training is: ``steps_per_s`` of this run, ``left_s`` until its end at that rate."""

    step: int
    steps: int
    loss: float
    rate: float
    steps_per_s: float
    images_per_s: float
    left_s: float


class Watcher:
    """Who is told how a training goes; this one does not listen."""

    def progress(self, now: Progress) -> None:
        """After each step."""

    def validated(self, step: int, found: Validation, *, is_best: bool) -> None:
        """After each validation."""

    def note(self, sentence: str) -> None:
        """Something to know, once."""

    def should_stop(self) -> bool:
        """Asked after each step: whether to save and end now."""
        return False


class FineTuner(Trainer):  # type: ignore[misc]
    """A training of ``tuned`` in ``folder``, which keeps its state, and the best weights so far.

    Trainer's own batch is the whole batch of a step. Here it is cut into parts that fit into
    memory, whose gradients add up to the same step.
    """

    def __init__(
        self,
        tuned: FineTuned,
        plan: FineTuningPlan,
        folder: Path,
        examples: Examples,
        validator: Validator,
        device: torch.device,
        watcher: Watcher,
    ) -> None:
        self.tuned = tuned
        self.plan = plan
        self.folder = folder
        self.validator = validator
        self.watcher = watcher
        self.at_once = min(plan.at_once, plan.batch) if plan.at_once else 0
        self.validations: list[tuple[int, Validation]] = []
        self._saves_into: Path | None = None
        self._validation_device = device
        super().__init__(
            model=tuned.model,
            args=_arguments(plan, folder, device),
            data_collator=collate,
            train_dataset=examples,
            eval_dataset=list(validator.images),
            callbacks=[_Watching(self)],
        )
        self.remove_callback(PrinterCallback)

    @property
    def states(self) -> Path:
        """The folder of what a resume needs."""
        return self.folder / _STATE

    def run(self) -> None:
        """Trains to the end, or until the watcher stops it; goes on from a whole saved state."""
        shutil.rmtree(self.states / _WRITING, ignore_errors=True)
        old = self.states / _OLD
        if old.is_dir() and not (self.folder / BEST).exists():
            # Killed between the two steps that exchange the best weights.
            os.replace(old, self.folder / BEST)
        found = get_last_checkpoint(str(self.states)) if self.states.is_dir() else None
        if found is not None:
            step = found.rsplit("-", 1)[-1]
            self.watcher.note(f"Going on from step {step} of {self.plan.steps}.")
        # Its bars of writing files would come between the lines of the progress.
        library_logging.disable_progress_bar()
        self.train(resume_from_checkpoint=found)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:  # noqa: ANN401
        # The examples have an order of their own, the same after a resume.
        return SequentialSampler(train_dataset or self.train_dataset)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The gradients of one step, in as many parts as memory asks for; its loss."""
        model.train()
        batch: dict[str, Tensor] = self._prepare_inputs(inputs)
        self.at_once = self.at_once or self._fitting(batch)
        while True:
            try:
                return self._accumulated(batch)
            except (RuntimeError, MemoryError) as error:
                if not is_memory_error(error):
                    raise
                if self.at_once == 1:
                    raise TrainingError(
                        f"One image at a time does not fit into the memory of {self.args.device}; "
                        "recompute activations (--checkpointing), train an adapter with "
                        "--freeze-vision, or close other programs."
                    ) from None
            # Outside the handler, whose traceback keeps tensors alive.
            model.zero_grad()
            if self.args.device.type == "cuda":
                torch.cuda.empty_cache()
            self.at_once = max(1, self.at_once // 2)
            parts = math.ceil(self.plan.batch / self.at_once)
            self.watcher.note(
                f"Memory ran out: the batch of {self.plan.batch} images goes through the network "
                f"{self.at_once} at a time now, in {parts} parts that add up to the same step."
            )

    def _fitting(self, batch: dict[str, Tensor]) -> int:
        """How many images to begin with: all where running out of memory can be met.

        A CPU's process is ended instead, so there it is what the image with the longest answer
        keeps for its backward pass that says how many fit.
        """
        count = len(batch["places"])
        if self.args.device.type != "cpu":
            return self.plan.batch
        # A resume must draw the numbers that the first run drew.
        with torch.random.fork_rng(devices=[]):
            one_bytes = kept_bytes(lambda: self.tuned.loss(part_of(batch, count - 1, count), 1))
        fitting = int(_MEMORY_SHARE * available_bytes() / max(one_bytes, 1))
        fitting = max(1, min(fitting, self.plan.batch))
        if fitting < self.plan.batch:
            self.watcher.note(
                f"An image takes {one_bytes / 2**30:.1f} GiB, so the batch of {self.plan.batch} "
                f"goes through the network {fitting} at a time; the step is the same."
            )
        return fitting

    def _accumulated(self, batch: dict[str, Tensor]) -> Tensor:
        num_tokens = (batch["labels"] != IGNORED).sum()
        total = torch.zeros((), device=self.args.device)
        count = len(batch["places"])
        for first in range(0, count, self.at_once):
            part = part_of(batch, first, min(first + self.at_once, count))
            with self.accelerator.autocast():
                loss = self.tuned.loss(part, num_tokens)
            self.accelerator.backward(loss)
            total += loss.detach()
        if not bool(torch.isfinite(total)):
            raise TrainingError(
                f"The loss is {float(total)} at step {self.state.global_step + 1}, so training "
                f"has stopped; {_kept(self.folder)} Try a lower learning rate, or --precision fp32."
            )
        return total

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:  # noqa: ANN401
        """The task's own metrics, by our engine; the best weights so far are kept."""
        self.check_finite()
        self.tuned.model.eval()
        state = self.tuned.merged_state()
        with engine_of(self.tuned.checkpoint, state, self._validation_device) as engine:
            found = self.validator.measure(engine)
        del state
        step, before = self.state.global_step, self.state.best_metric
        is_best = before is None or found.value > before
        if is_best:
            self._whole(self.folder / BEST, self.tuned.save)
        self.validations.append((step, found))
        self.watcher.validated(step, found, is_best=is_best)
        metrics = {f"eval_{_QUALITY}": found.value}
        for one in found.tasks:
            metrics[f"eval_{one.task} {one.metric}"] = one.value
            if one.recall is not None:
                metrics[f"eval_{one.task} recall"] = one.recall
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def check_finite(self) -> None:
        """TrainingError unless all trained weights are finite: nothing else is ever saved."""
        for name, weight in self.tuned.trained():
            if not bool(torch.isfinite(weight).all()):
                raise TrainingError(
                    f"{name} holds numbers that are not finite at step {self.state.global_step}, "
                    f"so training has stopped; {_kept(self.folder)} Try a lower learning rate."
                )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:  # noqa: ANN401
        self.check_finite()
        name = f"checkpoint-{self.state.global_step}"

        def write(folder: Path) -> None:
            self._saves_into = folder
            # The best weights have a folder of their own.
            self.state.best_global_step = None
            try:
                super(FineTuner, self)._save_checkpoint(model, trial)
            finally:
                self._saves_into = None

        self._whole(self.states / name, write, inner=name)
        for old in self.states.glob("checkpoint-*"):
            if old.name != name:
                shutil.rmtree(old, ignore_errors=True)

    def _get_output_dir(self, trial: Any) -> str:  # noqa: ANN401
        return str(self._saves_into or self.states)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ANN401
        folder = Path(output_dir or self.states)
        if self.plan.has_adapter:
            self.tuned.model.save_pretrained(str(folder), save_embedding_layers=False)
        else:
            self.tuned.florence.save_pretrained(str(folder))

    def _whole(self, folder: Path, write: Callable[[Path], None], inner: str = "") -> None:
        """Writes a folder so that a kill leaves the old one or the new one, never a part.

        Raises TrainingError, with nothing half-written left, where it cannot be written.
        """
        writing = self.states / _WRITING
        shutil.rmtree(writing, ignore_errors=True)
        try:
            writing.mkdir(parents=True)
            write(writing)
            _to_disk(writing)
            old = self.states / _OLD
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                os.replace(folder, old)
            os.replace(writing / inner, folder)
            shutil.rmtree(old, ignore_errors=True)
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and is_memory_error(error):
                raise
            raise TrainingError(
                f"{folder} could not be written ({_reason(error, self.folder)}), so training has "
                f"stopped and nothing is half-written; {_kept(self.folder)} Make room, and run the "
                "same command again."
            ) from error
        finally:
            shutil.rmtree(writing, ignore_errors=True)


def kept_bytes(work: Callable[[], Tensor]) -> int:
    """What a forward pass keeps for its backward pass, the weights aside."""
    sizes: dict[int, int] = {}

    def count(value: Tensor) -> Tensor:
        if not isinstance(value, nn.Parameter):
            storage = value.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
        # Alive until all is counted: freed memory would be counted again in its next use.
        result = work()
    del result
    return sum(sizes.values())


def available_bytes() -> int:
    """What this process can still take without anything being swapped or ended."""
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith(_AVAILABLE))
    except (OSError, ValueError, StopIteration):
        return memory_limit_bytes() // 2
    return min(free, memory_limit_bytes())


def _to_disk(folder: Path) -> None:
    """Waits until all files of a folder are on the disk: what is renamed is whole."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _reason(error: BaseException, folder: Path) -> str:
    # What writes weights says of a full disk only where it noticed.
    is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    if is_full or os.strerror(errno.ENOSPC) in str(error) or _is_full(folder):
        return "the disk is full"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < _ROOM_BYTES
    except OSError:
        return False


def _kept(folder: Path) -> str:
    best = folder / BEST
    if best.exists():
        return f"the best weights so far are whole in {best}."
    return "nothing was saved before."


class _Watching(TrainerCallback):  # type: ignore[misc]
    """Tells the watcher of each step, and stops where it says so."""

    def __init__(self, tuner: FineTuner) -> None:
        self._tuner = tuner
        self._began_s = time.monotonic()
        self._first_step = 0
        self._loss = math.nan

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        self._began_s, self._first_step = time.monotonic(), state.global_step

    def on_log(
        self,
        args: Any,  # noqa: ANN401
        state: Any,  # noqa: ANN401
        control: Any,  # noqa: ANN401
        logs: Any = None,  # noqa: ANN401
        **_: Any,  # noqa: ANN401
    ) -> None:
        self._loss = float((logs or {}).get("loss", self._loss))
        if "learning_rate" in (logs or {}):
            self._tell(state, float(logs["learning_rate"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        if self._tuner.watcher.should_stop():
            control.should_training_stop = control.should_save = True

    def _tell(self, state: Any, rate: float) -> None:  # noqa: ANN401
        plan, step = self._tuner.plan, state.global_step
        spent_s = max(time.monotonic() - self._began_s, 1e-6)
        steps_per_s = max(step - self._first_step, 1) / spent_s
        self._tuner.watcher.progress(
            Progress(
                step,
                plan.steps,
                self._loss,
                rate,
                steps_per_s,
                steps_per_s * plan.batch,
                (plan.steps - step) / steps_per_s,
            )
        )


_SCHEDULERS: Final = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant_with_warmup",
}


def _arguments(plan: FineTuningPlan, folder: Path, device: torch.device) -> TrainingArguments:
    precision = training_precision(plan.precision, device)
    arguments = TrainingArguments(
        output_dir=str(folder / _STATE),
        max_steps=plan.steps,
        per_device_train_batch_size=plan.batch,
        learning_rate=plan.learning_rate,
        lr_scheduler_type=_SCHEDULERS[plan.schedule],
        warmup_steps=round(plan.warm_up * plan.steps),
        weight_decay=plan.weight_decay,
        max_grad_norm=1.0,
        optim="adamw_torch",
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=device.type == "cpu",
        seed=plan.seed,
        data_seed=plan.seed,
        eval_strategy="steps",
        eval_steps=plan.validate_every,
        save_strategy="steps",
        save_steps=plan.validate_every,
        logging_strategy="steps",
        logging_steps=max(1, min(plan.validate_every, plan.steps // _LINES)),
        logging_nan_inf_filter=False,
        metric_for_best_model=_QUALITY,
        greater_is_better=True,
        load_best_model_at_end=False,
        remove_unused_columns=False,
        dataloader_num_workers=plan.workers,
        dataloader_pin_memory=device.type == "cuda",
        disable_tqdm=True,
        report_to=[],
        save_total_limit=None,
    )
    # More GPUs would make of it a model in copies; one is trained on.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def training_precision(name: str, device: torch.device) -> str:
    """What is computed in: ``auto`` is mixed bf16 on a GPU that has it, else float32."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and gpu_computes_bf16(device) else "fp32"


def losses(log_history: Sequence[dict[str, float]]) -> list[tuple[int, float]]:
    """The loss over the steps, as Trainer logged it."""
    return [(int(one["step"]), float(one["loss"])) for one in log_history if "loss" in one]
