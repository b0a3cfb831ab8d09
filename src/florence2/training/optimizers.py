"""Which optimiser moves which parameter, and how the learning rate goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Schedule:
    """Warm-up, a plateau, then a straight line to zero over the last ``decay`` of the steps."""

    peak: float
    steps: int
    warmup: int = 200
    decay: float = 0.35

    def rate(self, step: int) -> float:
        """The learning rate of step ``step``."""
        left = max(self.steps - step, 0) / max(self.steps * self.decay, 1)
        return self.peak * min((step + 1) / self.warmup, left, 1.0)


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


def set_rate(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """Gives every group of every optimiser the same learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
