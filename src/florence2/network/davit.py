"""The DaViT vision tower on images [B, H, W, C]; convolutions run on channels-last views."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from florence2.network.config import VisionConfig
from florence2.network.linear import BiasedLinear, Conv2d, activation

Slab = tuple[slice, slice]

# Bytes of the widest layer's values, four times the channels, and tokens: a product of fewer
# tokens takes longer each, because its weight is laid out anew. Whichever gives the larger slab.
SLAB_BYTES: Final = 4 * 2**20
SLAB_TOKENS: Final = 2048
# Two threads share a slab of this size; more threads get larger slabs.
SLAB_THREADS: Final = 2
# Just below the largest block (32 MiB) that glibc takes a lesson from.
LESSON_BYTES: Final = 2**25 - 2**16


@functools.cache
def keep_freed_memory() -> None:
    """Has the C library keep a slab's memory for the next one.

    glibc gives memory back to the system, which clears it anew, when twice as much lies free as
    the largest block freed so far. One large block, of which nothing is touched, teaches it that.
    """
    torch.empty(LESSON_BYTES, dtype=torch.uint8)


def runs_in_slabs(image: Tensor) -> bool:
    """Whether blocks run in slabs: on a CPU, and where no gradients need the values between."""
    return image.device.type == "cpu" and not torch.is_grad_enabled()


def slabs(image: Tensor, side: int = 1) -> Iterator[Slab]:
    """Slices of images and of their rows that together cover ``image`` [B, H, W, C].

    A slab holds whole images, or rows of one image: a multiple of ``side`` except for the last.
    """
    batch, height, width, dim = image.shape
    tokens = max(SLAB_BYTES // (4 * dim * image.element_size()), SLAB_TOKENS)
    tokens *= max(torch.get_num_threads() // SLAB_THREADS, 1)
    images = max(tokens // (height * width), 1)
    units = -(-height // side)
    parts = -(-units // max(tokens // width // side, 1))
    rows = -(-units // parts) * side
    for first in range(0, batch, images):
        for row in range(0, height, rows):
            yield slice(first, min(first + images, batch)), slice(row, min(row + rows, height))


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
    """A 3x3 depthwise convolution, added to its input."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def residual(self, image: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        return image + self._mixed(image)

    def residual_of(self, image: Tensor, slab: Slab) -> Tensor:
        """The rows of a slab of ``residual(image)``, in memory of their own."""
        rows = slab[1]
        first = max(rows.start - 1, 0)
        mixed = self._mixed(image[slab[0], first : rows.stop + 1])
        return mixed[:, rows.start - first : rows.stop - first].add_(image[slab])

    def _mixed(self, image: Tensor) -> Tensor:
        mixed: Tensor = self(image.permute(0, 3, 1, 2))
        return mixed.permute(0, 2, 3, 1)


class WindowAttention(nn.Module):
    """Multi-head attention inside windows; padding tokens take part, as in the original."""

    def __init__(self, config: VisionConfig, stage: int) -> None:
        super().__init__()
        dim = config.embed_dim[stage]
        self.window = config.window_size
        self.heads = config.num_heads[stage]
        self.qkv = BiasedLinear(dim, 3 * dim, bias=config.qkv_bias)
        self.proj = BiasedLinear(dim, dim)

    def forward(self, image: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        batch, height, width, dim = image.shape
        side = self.window
        rows, columns = -(-height // side), -(-width // side)
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
        return cast(Tensor, self.proj(mixed[:, :height, :width]))


class ChannelAttention(nn.Module):
    """Attention between the channels of a group, over all tokens."""

    def __init__(self, config: VisionConfig, stage: int) -> None:
        super().__init__()
        dim = config.embed_dim[stage]
        self.groups = config.num_groups[stage]
        self.qkv = BiasedLinear(dim, 3 * dim, bias=config.qkv_bias)
        self.proj = BiasedLinear(dim, dim)

    def forward(self, image: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        scores, value = self.scores(image, image.shape[1] * image.shape[2])
        return self.mix(value, scores).view(image.shape)

    def no_scores(self, image: Tensor) -> Tensor:
        """Zeros [B, G, C/G, C/G] to add the scores of parts to, at least in float32."""
        width = image.shape[-1] // self.groups
        dtype = torch.promote_types(image.dtype, torch.float32)
        return torch.zeros(image.shape[0], self.groups, width, width, dtype=dtype)

    def scores(self, image: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The part of the scores that some rows of images of ``count`` tokens give, and values.

        [B, H, W, C] -> [B, G, C/G, C/G] to be summed over an image's parts, and [B, G, H*W, C/G].
        """
        dim = image.shape[-1]
        qkv = self.qkv(image).view(image.shape[0], -1, 3, self.groups, dim // self.groups)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        # Scaled before the sum over all tokens, which would overflow half precision.
        return (query * count**-0.5).transpose(-1, -2) @ key, value

    def mix(self, value: Tensor, scores: Tensor) -> Tensor:
        """Values [B, G, N, C/G] and their images' whole scores -> [B, N, C]."""
        mixed = value @ scores.softmax(-1).transpose(-1, -2)
        return cast(Tensor, self.proj(mixed.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """Two linear layers with the activation between them."""

    def __init__(self, config: VisionConfig, stage: int) -> None:
        super().__init__()
        dim = config.embed_dim[stage]
        hidden = int(dim * config.mlp_ratio)
        self.activation = activation(config.activation)
        self.fc1 = BiasedLinear(dim, hidden)
        self.fc2 = BiasedLinear(hidden, dim)

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

    def forward(self, image: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        image = self.conv1.residual(image)
        image = image + self.window_attn(self.norm1(image))
        image = self.conv2.residual(image)
        return cast(Tensor, image + self.ffn(self.norm2(image)))

    def run_in_slabs(self, image: Tensor, spare: Tensor) -> None:
        """``forward`` written over its input; ``spare`` is memory like it. No gradients."""
        for slab in slabs(image, self.window_attn.window):
            part = self.conv1.residual_of(image, slab)
            torch.add(part, self.window_attn(self.norm1(part)), out=spare[slab])
        for slab in slabs(image):
            part = self.conv2.residual_of(spare, slab)
            torch.add(part, self.ffn(self.norm2(part)), out=image[slab])


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

    def forward(self, image: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        image = self.conv1.residual(image)
        image = image + self.channel_attn(self.norm1(image))
        image = self.conv2.residual(image)
        return cast(Tensor, image + self.ffn(self.norm2(image)))

    def run_in_slabs(self, image: Tensor, spare: Tensor) -> None:
        """``forward`` written over its input; ``spare`` is memory like it. No gradients."""
        attention = self.channel_attn
        count = image.shape[1] * image.shape[2]
        scores = attention.no_scores(image)
        values = []
        for slab in slabs(image):
            part = self.conv1.residual_of(image, slab)
            spare[slab] = part
            some, value = attention.scores(self.norm1(part), count)
            scores[slab[0]] += some
            # A copy, or the values would keep the queries and keys of all slabs.
            values.append(value.contiguous())
        for slab, value in zip(slabs(image), values, strict=True):
            part = spare[slab]
            part += attention.mix(value, scores[slab[0]].to(value.dtype)).view(part.shape)
        del values
        for slab in slabs(image):
            part = self.conv2.residual_of(spare, slab)
            torch.add(part, self.ffn(self.norm2(part)), out=image[slab])


class Block(nn.Module):
    """One unit of depth: a spatial block, then a channel block."""

    def __init__(self, config: VisionConfig, stage: int) -> None:
        super().__init__()
        self.spatial_block = SpatialBlock(config, stage)
        self.channel_block = ChannelBlock(config, stage)

    def forward(self, image: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        return cast(Tensor, self.channel_block(self.spatial_block(image)))

    def run_in_slabs(self, image: Tensor, spare: Tensor) -> None:
        """``forward`` written over its input; ``spare`` is memory like it. No gradients."""
        self.spatial_block.run_in_slabs(image, spare)
        self.channel_block.run_in_slabs(image, spare)


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
        if runs_in_slabs(pixels):
            keep_freed_memory()
        image = pixels.to(self.dtype).permute(0, 2, 3, 1)
        for embed, blocks in zip(self.convs, self.blocks, strict=True):
            image = embed(image)
            if runs_in_slabs(image):
                image = image.contiguous()
                spare = torch.empty_like(image)
                for block in cast(nn.ModuleList, blocks):
                    cast(Block, block).run_in_slabs(image, spare)
                del spare
            else:
                for block in cast(nn.ModuleList, blocks):
                    image = block(image)
        return image.flatten(1, 2), (image.shape[1], image.shape[2])

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return cast(ConvEmbed, self.convs[0]).conv.weight.dtype
