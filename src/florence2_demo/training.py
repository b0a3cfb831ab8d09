"""Trains the demo checkpoint from nothing on drawn scenes; resumable at any step."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from florence2.errors import RequestError
from florence2.network.florence import Florence2Network
from florence2.pixels import ImageProcessor
from florence2.runtimes.device import choose_device
from florence2.tokenizer import Vocabulary
from florence2.tokens import NUM_LOCATION_BINS, PAD_ID, location_token
from florence2.training.attention import ExplicitAttention
from florence2.training.batches import Batch, Plan, SceneBatches, on_device, stream
from florence2.training.demo_config import GRID_SIDE, demo_config
from florence2.training.losses import IGNORED, GridHead, answer_loss
from florence2.training.optimizers import Schedule, make_optimizers, set_rate
from florence2.training.words import COLOURS, KINDS, SIGN_WORDS
from florence2_demo.checkpoint import save_checkpoint, write_tokenizer_and_processor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """The trainer's settings; the defaults made the published demo checkpoint."""

    steps: int = 8000
    images_per_batch: int = 16
    prompts_per_image: int = 5
    peak_rate: float = 1.5e-3
    sigma_bins: float = 4.0
    final_sigma_bins: float = 1.5
    save_every_s: float = 240.0
    ramp_steps: int = 600
    seed: int = 0
    workers: int = 1
    precision: str = "bf16"
    device: str = "cpu"

    def check(self) -> None:
        """RequestError for a plan that cannot be run."""
        counts = {
            "steps": self.steps,
            "images": self.images_per_batch,
            "prompts": self.prompts_per_image,
        }
        for name, count in counts.items():
            if count < 1:
                raise RequestError(
                    f"Training needs at least 1 of {name}, and {count} was received; give more."
                )


class Learner(nn.Module):
    """The network and the helping head, with one forward pass that gives the loss."""

    def __init__(self, network: Florence2Network, first_location_id: int) -> None:
        super().__init__()
        self.network = network
        self.first_location_id = first_location_id
        d_model = network.config.text.d_model
        self.head = GridHead(d_model, len(KINDS), len(COLOURS), len(SIGN_WORDS))

    def location_embeddings(self) -> Tensor:
        """The rows [1000, d] of the shared embedding that spell locations."""
        first = self.first_location_id
        return self.network.model.language_model.shared.weight[first : first + NUM_LOCATION_BINS]

    def forward(self, batch: Batch, sigma_bins: float) -> tuple[Tensor, dict[str, float]]:
        visual = self.network.encode_images(batch.pixels)
        grid_loss, corner_error = self.head(
            visual[:, 1:], batch.grid, self.location_embeddings(), sigma_bins
        )
        logits, targets = self._answers(visual, batch)
        loss, text_right, location_right = answer_loss(
            logits, targets, self.first_location_id, sigma_bins
        )
        figures = {
            "answer": loss.item(),
            "grid": grid_loss.item(),
            "corner_error_bins": corner_error.item(),
            "text_right": text_right.item(),
            "location_right": location_right.item(),
        }
        return loss + 0.5 * grid_loss, figures

    def _answers(self, visual: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits and targets of the tokens that count; long answers are run apart from short."""
        repeats = batch.prompt_ids.shape[0] // visual.shape[0]
        prompts = batch.prompt_ids
        states, mask = self.network.encode_prompts(
            visual.repeat_interleave(repeats, dim=0), prompts, prompts != PAD_ID
        )
        lengths = (batch.targets != IGNORED).sum(1)
        order = lengths.argsort()
        logits, targets = [], []
        for rows in (order[: 2 * len(order) // 3], order[2 * len(order) // 3 :]):
            width = int(lengths[rows].max())
            wanted = batch.targets[rows, :width]
            out = self.network.decode(batch.decoder_ids[rows, :width], states[rows], mask[rows])
            keep = wanted != IGNORED
            logits.append(out[keep])
            targets.append(wanted[keep])
        return torch.cat(logits), torch.cat(targets)


def initialise(network: Florence2Network, first_location_id: int, seed: int) -> None:
    """BART's initial weights, with sinusoids for the location embeddings.

    Neighbouring bins then start out alike, so what is learned for one is half learned for the next.
    """
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=0.5 / math.sqrt(module.weight[0].numel()))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.05)
    embedding = network.model.language_model.shared.weight
    with torch.no_grad():
        rows = embedding[first_location_id : first_location_id + NUM_LOCATION_BINS]
        position = torch.linspace(0, 1, NUM_LOCATION_BINS)[:, None]
        frequency = torch.logspace(0, math.log10(150), rows.shape[1] // 2)[None] * math.pi
        angles = position * frequency
        rows.copy_(0.07 * torch.cat([angles.sin(), angles.cos()], dim=1))


class Trainer:
    """Holds what must survive an interruption: weights, optimisers, the step."""

    def __init__(self, folder: Path, plan: TrainingPlan) -> None:
        self.folder = folder
        self.plan = plan
        write_tokenizer_and_processor(folder / "checkpoint")
        self.vocabulary = Vocabulary.from_folder(folder / "checkpoint")
        self.processor = ImageProcessor.from_folder(folder / "checkpoint")
        first = self.vocabulary.encode(location_token(0))[0]
        rows = -(-self.vocabulary.size // 64) * 64
        network = Florence2Network(demo_config(rows))
        initialise(network, first, plan.seed)
        self.device = choose_device(plan.device)
        self.learner = Learner(network, first).to(self.device)
        self.optimizers = make_optimizers(self.learner)
        self.step = 0
        self.is_stopping = False
        if self._state_file.exists():
            self._resume()

    @property
    def _state_file(self) -> Path:
        return self.folder / "training.pt"

    def _resume(self) -> None:
        state = torch.load(self._state_file, weights_only=True, map_location=self.device)
        self.learner.load_state_dict(state["learner"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = int(state["step"])
        logger.info("resumed at step %d", self.step)

    def save(self) -> None:
        """Writes the state for a resume and the checkpoint for use; a kill leaves the old ones."""
        state = {
            "learner": self.learner.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
        }
        partial = self._state_file.with_suffix(".part")
        torch.save(state, partial)
        os.replace(partial, self._state_file)
        save_checkpoint(self.learner.network, self.folder / "checkpoint")

    def run(self) -> None:
        """Trains until the planned step, saving on the way."""
        plan = self.plan
        schedule = Schedule(plan.peak_rate, plan.steps)
        batch_plan = Plan(plan.images_per_batch, plan.prompts_per_image, GRID_SIDE)
        dataset = SceneBatches(
            self.vocabulary, self.processor, batch_plan, self.step, plan.ramp_steps
        )
        batches = stream(dataset, plan.workers)
        saved_at = time.monotonic()
        started_at, started_step = saved_at, self.step
        while self.step < plan.steps and not self.is_stopping:
            set_rate(self.optimizers, schedule.rate(self.step))
            figures = self._step(next(batches))
            self.step += 1
            if self.step % 50 == 0:
                rate = (self.step - started_step) / (time.monotonic() - started_at)
                self._log(figures | {"images_per_s": rate * plan.images_per_batch})
            if time.monotonic() - saved_at > plan.save_every_s:
                self.save()
                saved_at = time.monotonic()
        self.save()

    def _step(self, batch: Batch) -> dict[str, float]:
        sigma = self._sigma_bins()
        half = self.plan.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half), ExplicitAttention():
            loss, figures = self.learner.forward(on_device(batch, self.device), sigma)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        return figures

    def _sigma_bins(self) -> float:
        """How wide a location's target is: 20 bins at first, 4 for the middle, 1.5 at the end.

        While features form, a rough place is worth more than none. In the end a place must be
        likelier than the other answers it competes with in the search.
        """
        plan = self.plan
        final = max(0.0, self.step / plan.steps - 0.5) * 2
        plateau = plan.sigma_bins + 16.0 * math.exp(-self.step / 500)
        return plateau + (plan.final_sigma_bins - plateau) * final

    def _log(self, figures: dict[str, float]) -> None:
        line = {"step": self.step} | {name: round(value, 4) for name, value in figures.items()}
        logger.info("%s", json.dumps(line))
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")


def train(folder: Path, plan: TrainingPlan) -> None:
    """Trains in ``folder`` until the planned step; the same folder goes on where it stopped.

    Ctrl-C and SIGTERM save before they stop. ``folder/checkpoint`` is a checkpoint at any time.
    """
    plan.check()
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(folder, plan)

    def stop(*_: object) -> None:
        logger.info("stopping after this step; the same command goes on from here")
        trainer.is_stopping = True

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        trainer.run()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
