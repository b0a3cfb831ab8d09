"""Trains the demo checkpoint from nothing on drawn scenes; resumable at any step."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from florence2.errors import RequestError
from florence2.network.florence import Florence2Network
from florence2.pixels import ImageProcessor
from florence2.runtimes.device import choose_device
from florence2.tokenizer import Vocabulary
from florence2.tokens import NUM_LOCATION_BINS, PAD_ID, location_token
from florence2_demo.batches import IGNORED, Batch, GridTargets, SceneBatches
from florence2_demo.checkpoint import (
    GRID_SIDE,
    demo_config,
    save_checkpoint,
    write_tokenizer_and_processor,
)
from florence2_demo.lexicon import COLOURS, KINDS, SIGN_WORDS

logger = logging.getLogger(__name__)

_WARM_UP_STEPS = 200
_DECAY_SHARE = 0.35


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

    def learning_rate(self, step: int) -> float:
        """Warm-up, a plateau, then a straight line to zero over the last steps."""
        left = max(self.steps - step, 0) / max(self.steps * _DECAY_SHARE, 1)
        return self.peak_rate * min((step + 1) / _WARM_UP_STEPS, left, 1.0)

    def sigma_bins_at(self, step: int) -> float:
        """How wide a location's target is: 20 bins at first, 4 for the middle, 1.5 at the end.

        While features form, a rough place is worth more than none. In the end a place must be
        likelier than the other answers it competes with in the search.
        """
        final = max(0.0, step / self.steps - 0.5) * 2
        plateau = self.sigma_bins + 16.0 * math.exp(-step / 500)
        return plateau + (self.final_sigma_bins - plateau) * final


def soft_location_log_prob(log_probs: Tensor, bins: Tensor, sigma_bins: float) -> Tensor:
    """Expected log-probability of ``bins`` [N] under a Gaussian over neighbouring bins.

    ``log_probs`` [N, 1000] over the location bins. Neighbouring coordinates are nearly right, and
    a one-hot target hides that from a model that starts from nothing.
    """
    reach = max(1, math.ceil(3 * sigma_bins))
    offsets = torch.arange(-reach, reach + 1, device=bins.device)
    weights = torch.exp(-0.5 * (offsets / sigma_bins) ** 2)
    neighbours = bins[:, None] + offsets
    inside = (neighbours >= 0) & (neighbours < NUM_LOCATION_BINS)
    weights = weights * inside
    weights = weights / weights.sum(1, keepdim=True)
    picked = log_probs.gather(1, neighbours.clamp(0, NUM_LOCATION_BINS - 1))
    return (picked * weights).sum(1)


def answer_loss(
    logits: Tensor, targets: Tensor, first_location_id: int, sigma_bins: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss over the answers' tokens, and the share of text and location tokens that are right.

    ``logits`` [N, V] and ``targets`` [N] of the tokens that count. A location token is right here
    when it is within 20 bins, 2 % of the image.
    """
    log_probs = torch.log_softmax(logits.float(), dim=1)
    chosen = log_probs.gather(1, targets[:, None]).squeeze(1)
    location = (targets >= first_location_id) & (targets < first_location_id + NUM_LOCATION_BINS)
    last = first_location_id + NUM_LOCATION_BINS
    soft = soft_location_log_prob(
        log_probs[location, first_location_id:last],
        targets[location] - first_location_id,
        sigma_bins,
    )
    loss = -(chosen[~location].sum() + soft.sum()) / targets.numel()
    best = log_probs.argmax(1)
    text_right = (best == targets)[~location].float().mean()
    location_right = ((best - targets).abs() <= 20)[location].float().mean()
    return loss, text_right, location_right


class GridHead(nn.Module):
    """Predicts what lies under each visual token; used while training, thrown away after.

    It gives the vision tower a direct signal from the first step, long before the decoder has
    learned to look at it. Corners are spelled with the decoder's own location embeddings, so what
    the visual tokens learn is what the decoder will need to copy.
    """

    def __init__(self, d_model: int, num_kinds: int, num_colours: int, num_words: int) -> None:
        super().__init__()
        self.sizes = (1, num_kinds, num_colours, num_words + 1)
        self.classify = nn.Linear(d_model, sum(self.sizes))
        self.corners = nn.Linear(d_model, 4 * d_model)

    def forward(
        self, visual: Tensor, targets: GridTargets, locations: Tensor, sigma_bins: float
    ) -> tuple[Tensor, Tensor]:
        """Loss of ``visual`` [B, G, d]; ``locations`` [1000, d] are the location embeddings."""
        objectness, kind, colour, words = self.classify(visual).float().split(self.sizes, dim=-1)
        loss = functional.binary_cross_entropy_with_logits(objectness[..., 0], targets.objectness)
        loss = loss + self._reading_loss(words, targets.words)
        covered = targets.kind >= 0
        if not bool(covered.any()):
            return loss, torch.zeros((), device=loss.device)
        loss = loss + functional.cross_entropy(kind[covered], targets.kind[covered])
        loss = loss + functional.cross_entropy(colour[covered], targets.colour[covered])
        corners = self.corners(visual[covered]).view(-1, 4, locations.shape[1])
        logits = corners @ locations.T
        bins = (targets.boxes_xyxy[covered] * NUM_LOCATION_BINS).long().clamp(0, 999).flatten()
        log_probs = torch.log_softmax(logits.float().flatten(0, 1), dim=1)
        loss = loss - soft_location_log_prob(log_probs, bins, sigma_bins).mean()
        error = (log_probs.detach().argmax(1) - bins).abs().float().median()
        return loss, error

    def _reading_loss(self, words: Tensor, targets: Tensor) -> Tensor:
        """Where text is, over all cells, and which word it is, over the few cells that have any."""
        loss = functional.cross_entropy(words.flatten(0, 1), targets.flatten() + 1)
        written = targets >= 0
        if not bool(written.any()):
            return loss
        return loss + functional.cross_entropy(words[written], targets[written] + 1)


def _is_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 2 and "embed" not in name and "shared" not in name


def make_optimizers(model: nn.Module, weight_decay: float = 0.05) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for embeddings, convolutions, norms and biases.

    Muon (orthogonalised momentum) needs far fewer images here than AdamW alone; its update is
    scaled so that both take the same learning rate.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if _is_matrix(name, p)]
    others = [p for name, p in named if not _is_matrix(name, p)]
    return [
        torch.optim.Muon(
            matrices, lr=1e-3, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


class ExplicitAttention(TorchFunctionMode):
    """Replaces ``scaled_dot_product_attention`` while active.

    The fused CPU kernel's backward pass takes almost half of a training step at the demo
    checkpoint's sizes; softmax and two products take a third of that.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401 - the signature is torch's
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        if func is functional.scaled_dot_product_attention:
            return _attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -1e4)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -1e4)
    elif attn_mask is not None:
        scores = scores + attn_mask
    mixed: Tensor = scores.softmax(-1).to(value.dtype) @ value
    return mixed


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

    def batches(self, first: int = 0) -> SceneBatches:
        """The stream of this training, from batch ``first`` on."""
        plan = self.plan
        return SceneBatches(
            self.vocabulary,
            self.processor,
            images=plan.images_per_batch,
            prompts=plan.prompts_per_image,
            grid_side=GRID_SIDE,
            ramp=plan.ramp_steps,
            first=first,
        )

    def run(self) -> None:
        """Trains until the planned step, saving on the way."""
        plan = self.plan
        batches = self.batches(first=self.step).stream(plan.workers)
        saved_at = time.monotonic()
        started_at, started_step = saved_at, self.step
        while self.step < plan.steps and not self.is_stopping:
            figures = self.learn(next(batches), plan.learning_rate(self.step))
            self.step += 1
            if self.step % 50 == 0:
                rate = (self.step - started_step) / (time.monotonic() - started_at)
                self._log(figures | {"images_per_s": rate * plan.images_per_batch})
            if time.monotonic() - saved_at > plan.save_every_s:
                self.save()
                saved_at = time.monotonic()
        self.save()

    def learn(self, batch: Batch, rate: float) -> dict[str, float]:
        """One step at a learning rate; the losses, and shares of tokens that are right."""
        sigma = self.plan.sigma_bins_at(self.step)
        half = self.plan.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half), ExplicitAttention():
            loss, figures = self.learner.forward(batch.to(self.device), sigma)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        return figures

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
