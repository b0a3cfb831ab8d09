"""The numbers that fix a Florence-2 network, read from either published ``config.json``.

Besides, the shapes of the published checkpoints, and small shapes of the same design.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from florence2 import tokens
from florence2.errors import CheckpointError

Value = TypeVar("Value")


def sub_section(config: Mapping[str, Any], name: str, prefix: str = "") -> Mapping[str, Any]:
    """The mapping under ``name``."""
    value = config.get(name)
    if not isinstance(value, Mapping):
        raise CheckpointError(
            f"config.json must have the section {prefix}{name}, got {value!r}; "
            "this is not a Florence-2 checkpoint or its config.json is incomplete."
        )
    return value


def get_field(
    section: Mapping[str, Any],
    where: str,
    name: str,
    read: Callable[[object], Value],
    default: Value | None = None,
) -> Value:
    """``section[name]`` through ``read``; without a default a missing field is an error."""
    if section.get(name) is None:
        if default is not None:
            return default
        raise CheckpointError(
            f"config.json must give {where}.{name}, which is missing; "
            "take config.json from the checkpoint's source."
        )
    try:
        return read(section[name])
    except TypeError:
        raise CheckpointError(
            f"config.json's {where}.{name} has an unusable value, {section[name]!r}; "
            "take config.json from the checkpoint's source."
        ) from None


def check_fixed(section: Mapping[str, Any], where: str, name: str, expected: object) -> None:
    """Raises unless ``section[name]`` is absent or has the one supported value."""
    received = section.get(name, expected)
    if received != expected:
        raise CheckpointError(
            f"config.json's {where} must be {expected!r}, got {received!r}; "
            "this variant of the network is not supported."
        )


def integer(value: object) -> int:
    """A number that counts something."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError
    return value


def number(value: object) -> float:
    """Any number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError
    return float(value)


def flag(value: object) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise TypeError
    return value


def string(value: object) -> str:
    """A text."""
    if not isinstance(value, str):
        raise TypeError
    return value


def several(read: Callable[[object], Value]) -> Callable[[object], tuple[Value, ...]]:
    """A list of what ``read`` reads."""

    def read_list(value: object) -> tuple[Value, ...]:
        if not isinstance(value, (list, tuple)):
            raise TypeError
        return tuple(read(item) for item in value)

    return read_list


integers, flags = several(integer), several(flag)

IMAGE_TOKEN_ID: Final = 51289

ACTIVATIONS: Final = ("gelu", "relu", "gelu_pytorch_tanh")

_POOLINGS: Final = ["spatial_avg_pool", "temporal_avg_pool"]


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The DaViT tower and the tables of the projector; one tuple entry per stage."""

    embed_dim: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    num_groups: tuple[int, ...]
    patch_size: tuple[int, ...]
    patch_stride: tuple[int, ...]
    patch_padding: tuple[int, ...]
    patch_prenorm: tuple[bool, ...]
    window_size: int
    projection_dim: int
    in_channels: int = 3
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    activation: str = "gelu"
    max_position_embeddings: int = 50
    max_temporal_embeddings: int = 100

    def __post_init__(self) -> None:
        for name in _STAGE_FIELDS:
            if len(getattr(self, name)) != len(self.embed_dim):
                raise CheckpointError(
                    f"The vision config's {name} must have one entry per stage "
                    f"({len(self.embed_dim)}), got {len(getattr(self, name))}; "
                    "correct it in config.json."
                )
        for name in ("num_heads", "num_groups"):
            for dim, parts in zip(self.embed_dim, getattr(self, name), strict=True):
                _check_divides(name, parts, dim)
        _check_activation(self.activation)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the last stage's grid for an image of this many pixels."""
        for size, stride, pad in zip(
            self.patch_size, self.patch_stride, self.patch_padding, strict=True
        ):
            height = (height + 2 * pad - size) // stride + 1
            width = (width + 2 * pad - size) // stride + 1
        return height, width


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The BART encoder and decoder. ``max_position_embeddings`` leaves out BART's offset of 2."""

    d_model: int
    encoder_layers: int
    decoder_layers: int
    encoder_attention_heads: int
    decoder_attention_heads: int
    encoder_ffn_dim: int
    decoder_ffn_dim: int
    vocab_size: int
    max_position_embeddings: int
    activation: str = "gelu"
    scale_embedding: bool = False

    def __post_init__(self) -> None:
        _check_divides("encoder_attention_heads", self.encoder_attention_heads, self.d_model)
        _check_divides("decoder_attention_heads", self.decoder_attention_heads, self.d_model)
        _check_activation(self.activation)


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """The whole network. ``num_visual_tokens`` and tables follow from the vision part."""

    vision: VisionConfig
    text: TextConfig
    image_token_id: int = IMAGE_TOKEN_ID

    def __post_init__(self) -> None:
        if self.vision.projection_dim != self.text.d_model:
            raise CheckpointError(
                f"The vision config's projection_dim ({self.vision.projection_dim}) must equal "
                f"the text config's d_model ({self.text.d_model}); correct it in config.json."
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> NetworkConfig:
        """Reads a native or an original ``config.json``; the layout is told by its keys."""
        vision = sub_section(config, "vision_config")
        text = sub_section(config, "text_config")
        return cls(
            vision=_read_original_vision(vision)
            if "dim_embed" in vision
            else _read_native_vision(vision),
            text=_read_text(text),
            image_token_id=get_field(config, "config", "image_token_id", integer, IMAGE_TOKEN_ID),
        )

    def to_native_dict(self) -> dict[str, Any]:
        """A ``config.json`` that ``transformers``' Florence2ForConditionalGeneration loads."""
        vision: dict[str, Any] = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self.vision).items()
        }
        vision["activation_function"] = vision.pop("activation")
        text = dataclasses.asdict(self.text)
        text["activation_function"] = text.pop("activation")
        special = {
            "bos_token_id": tokens.BOS_ID,
            "pad_token_id": tokens.PAD_ID,
            "eos_token_id": tokens.EOS_ID,
            "decoder_start_token_id": tokens.DECODER_START_ID,
        }
        return {
            "architectures": ["Florence2ForConditionalGeneration"],
            "model_type": "florence2",
            "is_encoder_decoder": True,
            "tie_word_embeddings": True,
            "image_token_id": self.image_token_id,
            **special,
            "vision_config": {"model_type": "florence_vision", **vision},
            "text_config": {"model_type": "bart", **text, **special, "tie_word_embeddings": True},
        }

    def with_vocab_size(self, vocab_size: int) -> NetworkConfig:
        """The same network over a vocabulary of another size."""
        text = dataclasses.replace(self.text, vocab_size=vocab_size)
        return dataclasses.replace(self, text=text)


_STAGE_FIELDS: Final = (
    "depths",
    "num_heads",
    "num_groups",
    "patch_size",
    "patch_stride",
    "patch_padding",
    "patch_prenorm",
)


def is_original_config(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is in Microsoft's remote-code layout."""
    return "dim_embed" in sub_section(config, "vision_config")


def _read_native_vision(section: Mapping[str, Any]) -> VisionConfig:
    # The published converter writes max_pos_embeddings where the model reads
    # max_position_embeddings; both spellings mean the table's size.
    positions = get_field(section, "vision_config", "max_pos_embeddings", integer, 50)
    return VisionConfig(
        embed_dim=get_field(section, "vision_config", "embed_dim", integers),
        max_position_embeddings=get_field(
            section, "vision_config", "max_position_embeddings", integer, positions
        ),
        max_temporal_embeddings=get_field(
            section, "vision_config", "max_temporal_embeddings", integer, 100
        ),
        **_shared_vision_fields(section),
    )


def _read_original_vision(section: Mapping[str, Any]) -> VisionConfig:
    image_table = sub_section(section, "image_pos_embed", "vision_config.")
    time_table = sub_section(section, "visual_temporal_embedding", "vision_config.")
    check_fixed(image_table, "image_pos_embed.type", "type", "learned_abs_2d")
    check_fixed(time_table, "visual_temporal_embedding.type", "type", "COSINE")
    check_fixed(section, "image_feature_source", "image_feature_source", _POOLINGS)
    return VisionConfig(
        embed_dim=get_field(section, "vision_config", "dim_embed", integers),
        max_position_embeddings=get_field(
            image_table, "vision_config.image_pos_embed", "max_pos_embeddings", integer
        ),
        max_temporal_embeddings=get_field(
            time_table,
            "vision_config.visual_temporal_embedding",
            "max_temporal_embeddings",
            integer,
        ),
        **_shared_vision_fields(section),
    )


def _shared_vision_fields(section: Mapping[str, Any]) -> dict[str, Any]:
    where = "vision_config"
    values: dict[str, Any] = {
        name: get_field(section, where, name, flags if name == "patch_prenorm" else integers)
        for name in _STAGE_FIELDS
    }
    values["window_size"] = get_field(section, where, "window_size", integer)
    values["projection_dim"] = get_field(section, where, "projection_dim", integer)
    values["in_channels"] = get_field(section, where, "in_channels", integer, 3)
    values["mlp_ratio"] = get_field(section, where, "mlp_ratio", number, 4.0)
    values["qkv_bias"] = get_field(section, where, "qkv_bias", flag, True)
    values["activation"] = get_field(section, where, "activation_function", string, "gelu")
    return values


def _read_text(section: Mapping[str, Any]) -> TextConfig:
    check_fixed(section, "text_config.normalize_before", "normalize_before", False)
    check_fixed(section, "text_config.add_final_layer_norm", "add_final_layer_norm", False)
    numbers = {
        item.name: get_field(section, "text_config", item.name, integer)
        for item in dataclasses.fields(TextConfig)
        if item.default is dataclasses.MISSING
    }
    return TextConfig(
        **numbers,
        activation=get_field(section, "text_config", "activation_function", string, "gelu"),
        scale_embedding=get_field(section, "text_config", "scale_embedding", flag, False),
    )


def _check_divides(name: str, parts: int, dim: int) -> None:
    if parts < 1 or dim % parts:
        raise CheckpointError(
            f"config.json's {name} must divide the width {dim}, got {parts}; correct it."
        )


def _check_activation(name: str) -> None:
    if name not in ACTIVATIONS:
        raise CheckpointError(
            f"config.json's activation_function must be one of {', '.join(ACTIVATIONS)}, "
            f"got {name!r}; this variant of the network is not supported."
        )


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
