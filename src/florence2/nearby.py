"""How probable a place is: a location token's probability together with its neighbours'."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from florence2.tokens import NUM_LOCATION_BINS


@dataclass(frozen=True, slots=True)
class Nearby:
    """Which token ids are locations, and how many bins away a location still is the same place.

    Neighbouring bins are a thousandth of the image apart, so a network that knows a place well
    spreads its probability over several of them; the chosen token's own share says little.
    """

    first_location_id: int
    radius_bins: int

    def log_probs(self, log_probs: Tensor, parents: Tensor, tokens: Tensor, own: Tensor) -> Tensor:
        """Logarithms [B, beams] of the probability of ``tokens`` [B, beams] or a neighbour.

        ``log_probs`` [B, R, V] by row, without bans: a banned neighbour is as near. ``parents``
        [B, beams] says from which row each token was chosen; ``own`` [B, beams] are the tokens'
        own, kept where a token is no location.
        """
        batch, rows, vocab = log_probs.shape
        first, last = self.first_location_id, self.first_location_id + NUM_LOCATION_BINS - 1
        reach = torch.arange(-self.radius_bins, self.radius_bins + 1, device=tokens.device)
        neighbours = tokens.unsqueeze(2) + reach
        offsets = torch.arange(batch, device=tokens.device).unsqueeze(1) * rows
        places = (parents + offsets).unsqueeze(2) * vocab + neighbours.clamp(first, last)
        found = log_probs.reshape(-1).gather(0, places.view(-1)).view(places.shape)
        found = torch.where((neighbours >= first) & (neighbours <= last), found, -torch.inf)
        is_location = (tokens >= first) & (tokens <= last)
        return torch.where(is_location, found.logsumexp(2).clamp(max=0.0), own)
