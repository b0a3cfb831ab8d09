"""The two published layouts of weights, told apart and turned into one by their names.

Native: ``transformers``' Florence2ForConditionalGeneration. Original: Microsoft's remote code,
whose map to the native names is that of transformers' published converter. What programs put
around such names when they save a wrapped or a bare model is taken off first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final, Literal

import torch
from torch import Tensor

from florence2.checkpoint.files import MERGING
from florence2.errors import CheckpointError

Layout = Literal["native", "original"]

SHARED: Final = "model.language_model.shared.weight"
HEAD: Final = "lm_head.weight"

# Parts of names that come from wrappers of a model: DataParallel, torch.compile, FSDP,
# activation checkpointing, PEFT. No part of either layout has such a name.
_WRAPPERS: Final = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_model)\."
)
_MODEL: Final = "model."
_LOGITS_BIAS: Final = "language_model.final_logits_bias"
_IMAGE_PROJECTION: Final = "image_projection"
_NATIVE_STARTS: Final = (
    "multi_modal_projector.",
    "language_model.shared.",
    "language_model.encoder.",
    "language_model.decoder.",
)
_ORIGINAL_STARTS: Final = (
    "language_model.model.",
    "language_model.lm_head.",
    "image_proj",
    "image_pos_embed.",
    "visual_temporal_embed.",
)
_ADAPTER: Final = re.compile(r"\.(?:lora_|base_layer\.|modules_to_save\.|original_module\.)")
# What bitsandbytes, GPTQ, AWQ, quanto, torchao and scaled float8 store beside or for a weight.
_QUANTISED: Final = re.compile(
    r"(?:^|\.)(?:SCB|weight_format|qweight|qzeros|scales|g_idx|W_q|scaled_fp8"
    r"|weight\.(?:absmax|quant_|nested_|_data|_scale)\S*|_?weight_(?:scale|qdata)\S*"
    r"|scale_weight|(?:in|out)put_scale|_packed_params\S*)$"
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


def bare_name(name: str) -> str:
    """A stored name without what wrappers put around it, and without ``model.`` in front."""
    name = _WRAPPERS.sub("", name)
    while name.startswith(_MODEL):
        name = name.removeprefix(_MODEL)
    return name


def detect_layout(keys: Iterable[str]) -> Layout:
    """Which layout these names are in; a mixture, or neither, is an error."""
    names = [bare_name(name) for name in keys]
    native = any(name.startswith(_NATIVE_STARTS) for name in names)
    original = any(name.startswith(_ORIGINAL_STARTS) for name in names)
    if native == original:
        found = "both" if native else "neither"
        raise CheckpointError(
            "Weights must be in the native or in the original Florence-2 layout, "
            f"but these {len(names)} names fit {found}; this is not a Florence-2 checkpoint."
        )
    return "native" if native else "original"


def native_name(name: str, layout: Layout) -> str:
    """The native name of a weight with this bare name; one that no rule knows stays as it is."""
    if layout == "native":
        known = name.startswith(("vision_tower.", *_NATIVE_STARTS))
        return f"{_MODEL}{name}" if known else name
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


def convert_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state under native names, whichever layout and wrappers its names are in.

    The original's ``image_projection`` [C, d] becomes a Linear's weight [d, C], and its
    ``final_logits_bias`` is dropped, after a check that it is zero as in every published file.
    Raises CheckpointError for names of an adapter that is not merged or of quantised weights.
    """
    _check_plain(state)
    layout = detect_layout(state)
    converted: dict[str, Tensor] = {}
    for name, value in state.items():
        bare = bare_name(name)
        if layout == "original" and bare == _LOGITS_BIAS:
            _check_zero(value)
            continue
        native = native_name(bare, layout)
        if layout == "original" and bare == _IMAGE_PROJECTION:
            value = value.t()
        if native in converted and not same_values(converted[native], value):
            raise CheckpointError(
                f"The weights hold {native} twice, the second time as {name}, with other values; "
                "keep the one that belongs to this model."
            )
        converted[native] = value
    return converted


def same_values(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same numbers, whatever their precision."""
    if first.shape != second.shape:
        return False
    is_one = first.data_ptr() == second.data_ptr() and first.stride() == second.stride()
    return is_one or torch.equal(first, second.to(first.dtype))


def _check_plain(names: Iterable[str]) -> None:
    for name in names:
        if _ADAPTER.search(name):
            raise CheckpointError(
                f"The weights hold {name}, part of an adapter that is not merged, and only full "
                f"weights can be loaded; merge it after untying lm_head ({MERGING}) and save that."
            )
        if _QUANTISED.search(name):
            raise CheckpointError(
                f"The weights are quantised ({name}), and only floating point weights can be "
                "loaded; take the folder that they were quantised from."
            )


def _check_zero(bias: Tensor) -> None:
    if bool(bias.any()):
        raise CheckpointError(
            f"{_LOGITS_BIAS} must be all zero, got values up to {float(bias.abs().max()):g}; "
            "checkpoints with a bias on their logits are not supported."
        )
