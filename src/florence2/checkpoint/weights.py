"""A checkpoint's weights, in either published layout, and the network that holds them."""

from __future__ import annotations

import json
import pickle
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from florence2.checkpoint.files import PICKLED, SAFETENSORS, weight_files
from florence2.errors import CheckpointError
from florence2.network.config import NetworkConfig
from florence2.network.florence import Florence2Network, temporal_table

__all__ = ["build_network", "read_file", "read_weights", "whole_state"]

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
                f"The weights hold {name}, part of an adapter that is not merged, among full "
                "weights; save the adapter by itself (save_pretrained of peft) and load that."
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


# What the readers of torch and safetensors raise on files that were cut or overwritten.
DAMAGE: Final = (
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
    SafetensorError,
)

EMBEDDINGS: Final = (
    SHARED,
    "model.language_model.encoder.embed_tokens.weight",
    "model.language_model.decoder.embed_tokens.weight",
)

FRAMES: Final = "model.multi_modal_projector.visual_temporal_embed.pos_idx_to_embed"

_NUMBER: Final = re.compile(r"\d+")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's folder on the CPU, under the names and in the precision stored.

    Takes the files that ``weight_files`` names. Nothing in a file is executed.
    """
    files = weight_files(path.name for path in folder.iterdir() if path.is_file())
    if not files:
        raise CheckpointError(
            f"The folder {folder} must hold weights such as {SAFETENSORS} or {PICKLED}, but has "
            "none; download the checkpoint completely."
        )
    path = folder / files[0]
    return _read_shards(path) if path.suffix == ".json" else read_file(path)


def build_network(
    config: NetworkConfig, state: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> Florence2Network:
    """A network with exactly the weights of a state in either layout, in ``dtype``, on the CPU.

    The vocabulary has as many rows as the embedding, whatever the config says. The tied copies
    of the embedding may be absent, and the table of frames; an ``lm_head`` that differs from the
    embedding is kept apart. What no network has is left out, which the network's ``notes`` say.
    The state is copied, never shared.
    """
    filled = whole_state(state)
    embedding, head = filled[SHARED], filled[HEAD]
    config = config.with_vocab_size(embedding.shape[0])
    with torch.device("meta"):
        network = Florence2Network(config)
    vision = config.vision
    if FRAMES not in filled:
        filled[FRAMES] = temporal_table(vision.max_temporal_embeddings, vision.embed_dim[-1])
    network.notes = _leave_unused(network.state_dict(), filled)
    _check_state(network.state_dict(), filled)
    tied = same_values(head, embedding)
    copies = {
        name: value.to(dtype=dtype, memory_format=torch.contiguous_format, copy=True)
        for name, value in filled.items()
        if name not in EMBEDDINGS and not (tied and name == HEAD)
    }
    shared = embedding.to(dtype=dtype, memory_format=torch.contiguous_format, copy=True)
    copies.update(dict.fromkeys(EMBEDDINGS, shared))
    copies.setdefault(HEAD, shared)
    network.load_state_dict(copies, strict=True, assign=True)
    if tied:
        network.tie()
    return network.eval()


def whole_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state under native names, with each tied copy of the embedding that a file left out."""
    native = convert_state(state)
    embedding = _embedding(native)
    return {**native, **dict.fromkeys(EMBEDDINGS, embedding), HEAD: native.get(HEAD, embedding)}


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, as ``read_weights``."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with path.open("rb") as file:
            # Files from before torch 1.6 are not archives and cannot be mapped.
            is_archive = file.read(2) == b"PK"
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except FileNotFoundError:
        raise CheckpointError(
            f"The weight file {path} is named by its index but does not exist; "
            "download the checkpoint completely."
        ) from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"The weight file {path} is damaged or holds more than tensors, which is never "
            "loaded; download it again or take a safetensors file."
        ) from error
    except DAMAGE as error:
        raise _damaged(path) from error
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise CheckpointError(
            f"The weight file {path} must hold named tensors only, got {type(loaded).__name__} "
            "with other things; export the plain state of the model."
        )
    return loaded


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(index) from error
    state: dict[str, Tensor] = {}
    for name in files:
        if Path(name).name != name:
            raise CheckpointError(
                f"The index {index} may only name files of its own folder, got {name!r}; "
                "download the checkpoint again."
            )
        state.update(read_file(index.parent / name))
    absent = sorted(set(places) - set(state))
    if absent:
        raise CheckpointError(
            f"The index {index} names {listed(absent)}, which its files do not hold; "
            "download the checkpoint again."
        )
    return state


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"The weight file {path} is cut or damaged; download it again.")


def _embedding(state: Mapping[str, Tensor]) -> Tensor:
    """The shared embedding, stored under whichever of its tied names a file has kept."""
    present = [name for name in (*EMBEDDINGS, HEAD) if name in state]
    if not present:
        raise CheckpointError(
            f"The weights must have {SHARED}, which is missing; download the checkpoint again."
        )
    embedding = state[present[0]]
    for name in present[1:]:
        if name != HEAD and not same_values(state[name], embedding):
            raise CheckpointError(
                f"{name} must equal {present[0]}, but its values differ; "
                "networks with separate input embeddings are not supported."
            )
    return embedding


def _leave_unused(expected: Mapping[str, Tensor], received: dict[str, Tensor]) -> tuple[str, ...]:
    """Takes out what the network has no place for; notes about it."""
    unused = sorted(set(received) - set(expected))
    kinds = {_NUMBER.sub("#", name) for name in expected}
    of_more_layers = [name for name in unused if _NUMBER.sub("#", name) in kinds]
    if of_more_layers:
        raise CheckpointError(
            f"The weights hold {listed(of_more_layers)}, more layers than config.json asks for; "
            "check that both come from the same checkpoint."
        )
    for name in unused:
        del received[name]
    if not unused:
        return ()
    return (f"The weights hold {listed(unused)}, which Florence-2 does not use; left out.",)


def _check_state(expected: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> None:
    for name, value in received.items():
        if not value.is_floating_point():
            raise CheckpointError(
                f"The weights are quantised ({name} holds {value.dtype}), and only floating point "
                "weights can be loaded; take the folder that they were quantised from."
            )
    missing = sorted(set(expected) - set(received))
    if missing:
        raise CheckpointError(
            f"The weights lack {listed(missing)}, which config.json asks for; "
            "check that both come from the same checkpoint."
        )
    for name, value in received.items():
        if value.shape != expected[name].shape:
            raise CheckpointError(
                f"{name} must have the shape {tuple(expected[name].shape)} by config.json, "
                f"got {tuple(value.shape)}; check that both come from the same checkpoint."
            )


def listed(names: Iterable[str]) -> str:
    """The first few names and how many more."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
