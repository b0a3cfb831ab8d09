"""The DaViT vision tower on images [B, H, W, C]; convolutions run on channels-last views."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from florence2.network.bart import activation
from florence2.network.config import VisionConfig

Grid = tuple[int, int]
"""Rows and columns of tokens."""

Strip = tuple[slice, slice]
"""Whole images of a batch, or contiguous rows of one of them: slices of images and of rows."""

# Bytes of the widest layer's values, four times the channels, and tokens: a product of fewer
# tokens takes longer each, because its weight is laid out anew. Whichever gives the larger strip.
STRIP_BYTES: Final = 4 * 2**20
STRIP_TOKENS: Final = 2048
# Two threads share a strip of this size; more threads get larger strips.
STRIP_THREADS: Final = 2
# Just below the largest block (32 MiB) that glibc takes a lesson from.
LESSON_BYTES: Final = 2**25 - 2**16


@functools.cache
def keep_freed_memory() -> None:
    """Has the C library keep a strip's memory for the next one.

    glibc gives memory back to the system, which clears it anew, when twice as much lies free as
    the largest block freed so far. One large block, of which nothing is touched, teaches it that.
    """
    torch.empty(LESSON_BYTES, dtype=torch.uint8)


def runs_in_strips(image: Tensor) -> bool:
    """Whether blocks run in strips: on a CPU, and where no gradients need the values between."""
    return image.device.type == "cpu" and not torch.is_grad_enabled()


def strips(image: Tensor, side: int = 1) -> Iterator[Strip]:
    """Slices of images and of their rows that together cover ``image`` [B, H, W, C].

    A strip holds whole images, or rows of one image: a multiple of ``side`` except for the last.
    """
    batch, height, width, dim = image.shape
    tokens = max(STRIP_BYTES // (4 * dim * image.element_size()), STRIP_TOKENS)
    tokens *= max(torch.get_num_threads() // STRIP_THREADS, 1)
    images = max(tokens // (height * width), 1)
    units = -(-height // side)
    parts = -(-units // max(tokens // width // side, 1))
    rows = -(-units // parts) * side
    for first in range(0, batch, images):
        for row in range(0, height, rows):
            yield slice(first, min(first + images, batch)), slice(row, min(row + rows, height))


class Linear(nn.Linear):
    """``nn.Linear`` that starts empty, for many rows.

    In bf16 on a CPU oneDNN adds the bias itself, which spares ``functional.linear`` copies of it.
    """

    def reset_parameters(self) -> None:
        """Leaves the weights empty."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """[..., C_in] -> [..., C_out]."""
        # Two dimensions: of more, those that are not contiguous are multiplied without the bias.
        rows = input.reshape(-1, input.shape[-1])
        is_bf16_of_cpu = input.dtype == torch.bfloat16 and input.device.type == "cpu"
        if is_bf16_of_cpu and self.bias is not None and not torch.is_grad_enabled():
            product = product_with_bias if has_product_with_bias() else functional.linear
        else:
            product = functional.linear
        return product(rows, self.weight, self.bias).view(*input.shape[:-1], -1)


@functools.cache
def has_product_with_bias() -> bool:
    """Whether this torch and CPU have the call, and it gives what ``functional.linear`` gives."""
    numbers = torch.arange(24.0).to(torch.bfloat16)
    rows, weight, bias = numbers[:12].view(6, 2), numbers[12:20].view(4, 2), numbers[20:]
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        product = product_with_bias(rows, weight, bias)
    except (AttributeError, RuntimeError, TypeError):
        # A private call: another torch may lack it, or take other arguments.
        return False
    return torch.allclose(product, functional.linear(rows, weight, bias), rtol=0.02)


def product_with_bias(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``functional.linear`` of [N, C_in] in bf16 on a CPU."""
    call = torch.ops.mkldnn._linear_pointwise
    return cast(Tensor, call(rows, weight, bias, "none", [], ""))


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` that starts empty."""

    def reset_parameters(self) -> None:
        """Leaves the weights empty."""


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

    def residual_of(self, image: Tensor, strip: Strip) -> Tensor:
        """The rows of a strip of ``residual(image)``, in memory of their own."""
        rows = strip[1]
        first = max(rows.start - 1, 0)
        mixed = self._mixed(image[strip[0], first : rows.stop + 1])
        return mixed[:, rows.start - first : rows.stop - first].add_(image[strip])

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
        self.qkv = Linear(dim, 3 * dim, bias=config.qkv_bias)
        self.proj = Linear(dim, dim)

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
        self.qkv = Linear(dim, 3 * dim, bias=config.qkv_bias)
        self.proj = Linear(dim, dim)

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
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return cast(Tensor, self.fc2(self.activation(self.fc1(tokens))))


class AttentionBlock(nn.Module):
    """Depthwise convolution, attention, depthwise convolution, feed-forward."""

    def __init__(self, config: VisionConfig, stage: int, name: str, attention: nn.Module) -> None:
        """``name`` is what the checkpoints call the attention."""
        super().__init__()
        dim = config.embed_dim[stage]
        self._name = name
        self.conv1 = DepthwiseConv(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.add_module(name, attention)
        self.conv2 = DepthwiseConv(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = FeedForward(config, stage)

    def forward(self, image: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        image = self.conv1.residual(image)
        image = image + self.attention(self.norm1(image))
        image = self.conv2.residual(image)
        return cast(Tensor, image + self.ffn(self.norm2(image)))

    @property
    def attention(self) -> nn.Module:
        """The block's attention, whatever its name."""
        return cast(nn.Module, getattr(self, self._name))

    def run_second_half_in_strips(self, spare: Tensor, image: Tensor) -> None:
        """What follows the attention, from ``spare`` into ``image``."""
        for strip in strips(image):
            part = self.conv2.residual_of(spare, strip)
            torch.add(part, self.ffn(self.norm2(part)), out=image[strip])


class SpatialBlock(AttentionBlock):
    """Attention inside windows."""

    window_attn: WindowAttention

    def __init__(self, config: VisionConfig, stage: int) -> None:
        super().__init__(config, stage, "window_attn", WindowAttention(config, stage))

    def run_in_strips(self, image: Tensor, spare: Tensor) -> None:
        """``forward`` written over its input; ``spare`` is memory like it. No gradients."""
        for strip in strips(image, self.window_attn.window):
            part = self.conv1.residual_of(image, strip)
            torch.add(part, self.window_attn(self.norm1(part)), out=spare[strip])
        self.run_second_half_in_strips(spare, image)


class ChannelBlock(AttentionBlock):
    """Attention between channels."""

    channel_attn: ChannelAttention

    def __init__(self, config: VisionConfig, stage: int) -> None:
        super().__init__(config, stage, "channel_attn", ChannelAttention(config, stage))

    def run_in_strips(self, image: Tensor, spare: Tensor) -> None:
        """``forward`` written over its input; ``spare`` is memory like it. No gradients."""
        attention = self.channel_attn
        count = image.shape[1] * image.shape[2]
        scores = attention.no_scores(image)
        values = []
        for strip in strips(image):
            part = self.conv1.residual_of(image, strip)
            spare[strip] = part
            some, value = attention.scores(self.norm1(part), count)
            scores[strip[0]] += some
            # A copy, or the values would keep the queries and keys of all strips.
            values.append(value.contiguous())
        for strip, value in zip(strips(image), values, strict=True):
            part = spare[strip]
            part += attention.mix(value, scores[strip[0]].to(value.dtype)).view(part.shape)
        del values
        self.run_second_half_in_strips(spare, image)


class Block(nn.Module):
    """One unit of depth: a spatial block, then a channel block."""

    def __init__(self, config: VisionConfig, stage: int) -> None:
        super().__init__()
        self.spatial_block = SpatialBlock(config, stage)
        self.channel_block = ChannelBlock(config, stage)

    def forward(self, image: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        return cast(Tensor, self.channel_block(self.spatial_block(image)))

    def run_in_strips(self, image: Tensor, spare: Tensor) -> None:
        """``forward`` written over its input; ``spare`` is memory like it. No gradients."""
        self.spatial_block.run_in_strips(image, spare)
        self.channel_block.run_in_strips(image, spare)


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
        if runs_in_strips(pixels):
            keep_freed_memory()
        image = pixels.to(self.dtype).permute(0, 2, 3, 1)
        for embed, blocks in zip(self.convs, self.blocks, strict=True):
            image = embed(image)
            if runs_in_strips(image):
                image = image.contiguous()
                spare = torch.empty_like(image)
                for block in cast(nn.ModuleList, blocks):
                    cast(Block, block).run_in_strips(image, spare)
                del spare
            else:
                for block in cast(nn.ModuleList, blocks):
                    image = block(image)
        return image.flatten(1, 2), (image.shape[1], image.shape[2])

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return cast(ConvEmbed, self.convs[0]).conv.weight.dtype
