"""The DaViT vision tower, token-major (B, N, C); convolutions run on channels-last views.

Source of the architecture: DaViT (arXiv 2204.03645) as published in Florence-2.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from florence2.network.config import VisionConfig
from florence2.network.layers import Conv2d, Linear
from florence2.network.ops import activation

Grid = tuple[int, int]


class ConvEmbed(nn.Module):
    """Patch embedding between stages; LayerNorm before or after the convolution."""

    def __init__(self, config: VisionConfig, stage: int) -> None:
        super().__init__()
        dim_in = config.embed_dim[stage - 1] if stage else config.in_channels
        dim_out = config.embed_dim[stage]
        self.pre_norm = config.patch_prenorm[stage]
        self.conv = Conv2d(
            dim_in,
            dim_out,
            config.patch_size[stage],
            config.patch_stride[stage],
            config.patch_padding[stage],
        )
        self.norm = nn.LayerNorm(dim_in if self.pre_norm else dim_out)

    def forward(self, image: Tensor) -> Tensor:
        """[B, H, W, C_in] -> [B, H', W', C_out]."""
        if self.pre_norm:
            image = self.norm(image)
        image = self.conv(image.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return image if self.pre_norm else cast(Tensor, self.norm(image))


class DepthwiseConv(Conv2d):
    """A 3x3 depthwise convolution over tokens, added to its input."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def residual(self, tokens: Tensor, grid: Grid) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        image = tokens.reshape(-1, *grid, tokens.shape[-1]).permute(0, 3, 1, 2)
        mixed: Tensor = self(image).permute(0, 2, 3, 1).reshape(tokens.shape)
        return tokens + mixed


class WindowAttention(nn.Module):
    """Multi-head attention inside windows; padding tokens take part, as in the original."""

    def __init__(self, config: VisionConfig, stage: int) -> None:
        super().__init__()
        dim = config.embed_dim[stage]
        self.window = config.window_size
        self.heads = config.num_heads[stage]
        self.qkv = Linear(dim, 3 * dim, bias=config.qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        batch, _, dim = tokens.shape
        height, width = grid
        side = self.window
        rows, columns = -(-height // side), -(-width // side)
        image = tokens.view(batch, height, width, dim)
        if rows * side != height or columns * side != width:
            image = functional.pad(
                image, (0, 0, 0, columns * side - width, 0, rows * side - height)
            )
        windows = image.view(batch, rows, side, columns, side, dim).transpose(2, 3)
        windows = windows.reshape(batch * rows * columns, side * side, dim)
        qkv = self.qkv(windows).view(*windows.shape[:2], 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        mixed = mixed.transpose(1, 2).reshape(batch, rows, columns, side, side, dim)
        mixed = mixed.transpose(2, 3).reshape(batch, rows * side, columns * side, dim)
        mixed = mixed[:, :height, :width].reshape(tokens.shape)
        return cast(Tensor, self.proj(mixed))


class ChannelAttention(nn.Module):
    """Attention between the channels of a group, over all tokens."""

    def __init__(self, config: VisionConfig, stage: int) -> None:
        super().__init__()
        dim = config.embed_dim[stage]
        self.groups = config.num_groups[stage]
        self.qkv = Linear(dim, 3 * dim, bias=config.qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        batch, count, dim = tokens.shape
        qkv = self.qkv(tokens).view(batch, count, 3, self.groups, dim // self.groups)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        # Scaled before the sum over all tokens, which would overflow half precision.
        weights = (query * count**-0.5).transpose(-1, -2) @ key
        mixed = value @ weights.softmax(-1).transpose(-1, -2)
        return cast(Tensor, self.proj(mixed.transpose(1, 2).reshape(tokens.shape)))


class FeedForward(nn.Module):
    """Two linear layers with the activation between them."""

    def __init__(self, config: VisionConfig, stage: int) -> None:
        super().__init__()
        dim = config.embed_dim[stage]
        hidden = int(dim * config.mlp_ratio)
        self.activation = activation(config.activation)
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return cast(Tensor, self.fc2(self.activation(self.fc1(tokens))))


class SpatialBlock(nn.Module):
    """Depthwise convolution, window attention, depthwise convolution, feed-forward."""

    def __init__(self, config: VisionConfig, stage: int) -> None:
        super().__init__()
        dim = config.embed_dim[stage]
        self.conv1 = DepthwiseConv(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.window_attn = WindowAttention(config, stage)
        self.conv2 = DepthwiseConv(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = FeedForward(config, stage)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        tokens = self.conv1.residual(tokens, grid)
        tokens = tokens + self.window_attn(self.norm1(tokens), grid)
        tokens = self.conv2.residual(tokens, grid)
        return cast(Tensor, tokens + self.ffn(self.norm2(tokens)))


class ChannelBlock(nn.Module):
    """Depthwise convolution, channel attention, depthwise convolution, feed-forward."""

    def __init__(self, config: VisionConfig, stage: int) -> None:
        super().__init__()
        dim = config.embed_dim[stage]
        self.conv1 = DepthwiseConv(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.channel_attn = ChannelAttention(config, stage)
        self.conv2 = DepthwiseConv(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = FeedForward(config, stage)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        tokens = self.conv1.residual(tokens, grid)
        tokens = tokens + self.channel_attn(self.norm1(tokens))
        tokens = self.conv2.residual(tokens, grid)
        return cast(Tensor, tokens + self.ffn(self.norm2(tokens)))


class Block(nn.Module):
    """One unit of depth: a spatial block, then a channel block."""

    def __init__(self, config: VisionConfig, stage: int) -> None:
        super().__init__()
        self.spatial_block = SpatialBlock(config, stage)
        self.channel_block = ChannelBlock(config, stage)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        return cast(Tensor, self.channel_block(self.spatial_block(tokens, grid), grid))


class VisionTower(nn.Module):
    """All stages."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        stages = range(len(config.embed_dim))
        self.convs = nn.ModuleList(ConvEmbed(config, stage) for stage in stages)
        self.blocks = nn.ModuleList(
            nn.ModuleList(Block(config, stage) for _ in range(config.depths[stage]))
            for stage in stages
        )

    def forward(self, pixels: Tensor) -> tuple[Tensor, Grid]:
        """Pixels [B, 3, H, W] -> tokens [B, N, C] in row order, and their grid (rows, columns)."""
        image = pixels.to(self.dtype).permute(0, 2, 3, 1)
        for embed, blocks in zip(self.convs, self.blocks, strict=True):
            image = embed(image)
            grid = (image.shape[1], image.shape[2])
            tokens = image.flatten(1, 2)
            for block in cast(nn.ModuleList, blocks):
                tokens = block(tokens, grid)
            image = tokens.reshape(-1, *grid, tokens.shape[-1])
        return tokens, grid

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return cast(ConvEmbed, self.convs[0]).conv.weight.dtype
