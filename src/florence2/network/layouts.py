"""The two published layouts of weights, told apart and turned into one by their names.

Native: ``transformers``' Florence2ForConditionalGeneration. Original: Microsoft's remote code,
whose map to the native names is that of transformers' published converter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final, Literal

from torch import Tensor

from florence2.errors import CheckpointError

Layout = Literal["native", "original"]

_LOGITS_BIAS: Final = "language_model.final_logits_bias"
_IMAGE_PROJECTION: Final = "image_projection"
_NATIVE_STARTS: Final = (
    "model.vision_tower.",
    "model.multi_modal_projector.",
    "model.language_model.",
)
_ORIGINAL_STARTS: Final = (
    "vision_tower.",
    "language_model.",
    "image_proj",
    "image_pos_embed.",
    "visual_temporal_embed.",
)

_TOWER_RULES: Final[tuple[tuple[re.Pattern[str], str], ...]] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(convs\.\d+)\.proj\.", r"\1.conv."),
        (r"\.(conv[12])\.fn\.dw\.", r".\1."),
        (r"\.(?:window|channel)_attn\.norm\.", ".norm1."),
        (r"\.(window_attn|channel_attn)\.fn\.", r".\1."),
        (r"\.ffn\.norm\.", ".norm2."),
        (r"\.ffn\.fn\.net\.", ".ffn."),
    )
)
_OTHER_RULES: Final = (
    ("image_proj_norm.", "model.multi_modal_projector.image_proj_norm."),
    ("image_pos_embed.", "model.multi_modal_projector.image_position_embed."),
    ("visual_temporal_embed.", "model.multi_modal_projector.visual_temporal_embed."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
)


def detect_layout(keys: Iterable[str]) -> Layout:
    """Which layout these names are in; a mixture, or neither, is an error."""
    names = list(keys)
    native = any(name.startswith(_NATIVE_STARTS) for name in names)
    original = any(name.startswith(_ORIGINAL_STARTS) for name in names)
    if native == original:
        found = "both" if native else "neither"
        raise CheckpointError(
            "Weights must be in the native or in the original Florence-2 layout, "
            f"but these {len(names)} names fit {found}; this is not a Florence-2 checkpoint."
        )
    return "native" if native else "original"


def native_name(name: str) -> str:
    """The native name of a weight of either layout; an unknown one stays as it is."""
    if name.startswith("vision_tower."):
        rest = name.removeprefix("vision_tower.")
        for pattern, replacement in _TOWER_RULES:
            rest = pattern.sub(replacement, rest)
        return "model.vision_tower." + rest
    if name == _IMAGE_PROJECTION:
        return "model.multi_modal_projector.image_projection.weight"
    for start, native_start in _OTHER_RULES:
        if name.startswith(start):
            return native_start + name.removeprefix(start)
    return name


def convert_original_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state under native names; one that is native already comes back as it is.

    The original's ``image_projection`` [C, d] becomes a Linear's weight [d, C], and its
    ``final_logits_bias`` is dropped, after a check that it is zero as in every published file.
    """
    if detect_layout(state) == "native":
        return dict(state)
    converted = {}
    for name, value in state.items():
        if name == _LOGITS_BIAS:
            _check_zero(value)
        elif name == _IMAGE_PROJECTION:
            converted[native_name(name)] = value.t()
        else:
            converted[native_name(name)] = value
    return converted


def _check_zero(bias: Tensor) -> None:
    if bool(bias.any()):
        raise CheckpointError(
            f"{_LOGITS_BIAS} must be all zero, got values up to {float(bias.abs().max()):g}; "
            "checkpoints with a bias on their logits are not supported."
        )
