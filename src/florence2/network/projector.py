"""From the tower's tokens to the visual tokens that the text encoder reads."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from florence2.errors import ImageError
from florence2.network.config import VisionConfig
from florence2.network.davit import Grid
from florence2.network.layers import Embedding, Linear


class PositionEmbedding2D(nn.Module):
    """Learned tables of columns (first half of the channels) and rows (second half)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        dim = config.embed_dim[-1]
        self.limit = config.max_position_embeddings
        self.row_embeddings = Embedding(self.limit, dim // 2)
        self.column_embeddings = Embedding(self.limit, dim - dim // 2)

    def forward(self, grid: Grid) -> Tensor:
        """[rows * columns, C]."""
        rows, columns = grid
        if max(grid) > self.limit:
            raise ImageError(
                f"The vision grid may have at most {self.limit} rows and columns, "
                f"got {rows} x {columns}; use a smaller input size."
            )
        column_part = self.column_embeddings.weight[:columns].expand(rows, -1, -1)
        row_part = self.row_embeddings.weight[:rows, None].expand(-1, columns, -1)
        return torch.cat([column_part, row_part], dim=-1).flatten(0, 1)


class TemporalEmbedding(nn.Module):
    """The sine and cosine table over frames; an image is frame 0."""

    pos_idx_to_embed: Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        table = torch.empty(config.max_temporal_embeddings, config.embed_dim[-1])
        self.register_buffer("pos_idx_to_embed", table)

    def fill(self) -> None:
        """Computes the table; most checkpoints bring their own."""
        self.pos_idx_to_embed.copy_(temporal_table(*self.pos_idx_to_embed.shape))


def temporal_table(frames: int, dim: int) -> Tensor:
    """Sines and cosines of each frame's number in turn, from fast to slow: [frames, dim]."""
    rates = torch.exp(torch.arange(dim // 2) * (-math.log(10000) / (dim // 2)))
    angles = torch.arange(frames)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class Projector(nn.Module):
    """Adds positions, puts the mean token in front, projects to the text width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.image_projection = Linear(config.embed_dim[-1], config.projection_dim, bias=False)
        self.image_proj_norm = nn.LayerNorm(config.projection_dim)
        self.image_position_embed = PositionEmbedding2D(config)
        self.visual_temporal_embed = TemporalEmbedding(config)

    def forward(self, features: Tensor, grid: Grid) -> Tensor:
        """[B, N, C] of a grid -> [B, 1 + N, d_model]."""
        features = features + self.image_position_embed(grid)
        features = features + self.visual_temporal_embed.pos_idx_to_embed[0]
        features = torch.cat([features.mean(dim=1, keepdim=True), features], dim=1)
        return cast(Tensor, self.image_proj_norm(self.image_projection(features)))
