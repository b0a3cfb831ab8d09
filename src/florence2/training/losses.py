"""Training losses: soft location targets for the answers, a dense help on the visual tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from florence2.tokens import NUM_LOCATION_BINS

IGNORED = -100


@dataclass(frozen=True, slots=True)
class GridTargets:
    """What lies under each visual token of ``B`` images, as flat grids of ``G`` cells.

    ``objectness`` [B, G] float; ``kind`` and ``colour`` [B, G] long with -1 for none;
    ``boxes_xyxy`` [B, G, 4] in fractions of the image; ``words`` [B, G] long with -1 for none.
    """

    objectness: Tensor
    kind: Tensor
    colour: Tensor
    boxes_xyxy: Tensor
    words: Tensor


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
