"""The shapes of the published checkpoints, and small shapes of the same design."""

from __future__ import annotations

from florence2.network.config import NetworkConfig, TextConfig, VisionConfig


def base_config(vocab_size: int = 51289) -> NetworkConfig:
    """The shape of the published Florence-2-base and Florence-2-base-ft."""
    return tiny_config(
        embed_dim=(128, 256, 512, 1024),
        depths=(1, 1, 9, 1),
        d_model=768,
        layers=(6, 6),
        heads=12,
        vocab_size=vocab_size,
        max_positions=1024,
        head_dim=32,
        window_size=12,
        patch_stride=(4, 2, 2, 2),
    )


def large_config(vocab_size: int = 51289) -> NetworkConfig:
    """The shape of the published Florence-2-large and Florence-2-large-ft."""
    return tiny_config(
        embed_dim=(256, 512, 1024, 2048),
        depths=(1, 1, 9, 1),
        d_model=1024,
        layers=(12, 12),
        heads=16,
        vocab_size=vocab_size,
        max_positions=4096,
        head_dim=32,
        window_size=12,
        patch_stride=(4, 2, 2, 2),
    )


def tiny_config(
    embed_dim: tuple[int, ...] = (16, 32, 32, 64),
    depths: tuple[int, ...] = (1, 1, 2, 1),
    d_model: int = 32,
    layers: tuple[int, int] = (2, 3),
    heads: int = 4,
    vocab_size: int = 120,
    max_positions: int = 128,
    head_dim: int = 8,
    window_size: int = 3,
    patch_stride: tuple[int, ...] = (4, 2, 2, 1),
) -> NetworkConfig:
    """A small network of the same design; ``layers`` are those of encoder and decoder."""
    parts = tuple(dim // head_dim for dim in embed_dim)
    vision = VisionConfig(
        embed_dim=embed_dim,
        depths=depths,
        num_heads=parts,
        num_groups=parts,
        patch_size=(7, *[3] * (len(embed_dim) - 1)),
        patch_stride=patch_stride,
        patch_padding=(3, *[1] * (len(embed_dim) - 1)),
        patch_prenorm=(False, *[True] * (len(embed_dim) - 1)),
        window_size=window_size,
        projection_dim=d_model,
    )
    text = TextConfig(
        d_model, *layers, heads, heads, 4 * d_model, 4 * d_model, vocab_size, max_positions
    )
    return NetworkConfig(vision, text)
