"""Reading a checkpoint's weights and building the network that holds them."""

from __future__ import annotations

import json
import pickle
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from florence2.checkpoint.files import PICKLED, SAFETENSORS, weight_files
from florence2.errors import CheckpointError
from florence2.network.config import NetworkConfig
from florence2.network.florence import Florence2Network
from florence2.network.layouts import HEAD, SHARED, convert_state, same_values
from florence2.network.projector import temporal_table

__all__ = ["build_network", "read_weights"]


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
    return _read_shards(path) if path.suffix == ".json" else _read_file(path)


def build_network(
    config: NetworkConfig, state: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> Florence2Network:
    """A network with exactly the weights of a state in either layout, in ``dtype``, on the CPU.

    The vocabulary has as many rows as the embedding, whatever the config says. The tied copies
    of the embedding may be absent, and the table of frames; an ``lm_head`` that differs from the
    embedding is kept apart. What no network has is left out, which the network's ``notes`` say.
    The state is copied, never shared.
    """
    native = convert_state(state)
    embedding = _embedding(native)
    head = native.get(HEAD, embedding)
    config = config.with_vocab_size(embedding.shape[0])
    with torch.device("meta"):
        network = Florence2Network(config)
    filled = {**native, **dict.fromkeys(EMBEDDINGS, embedding), HEAD: head}
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


def _read_file(path: Path) -> dict[str, Tensor]:
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
        state.update(_read_file(index.parent / name))
    absent = sorted(set(places) - set(state))
    if absent:
        raise CheckpointError(
            f"The index {index} names {_listed(absent)}, which its files do not hold; "
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
            f"The weights hold {_listed(of_more_layers)}, more layers than config.json asks for; "
            "check that both come from the same checkpoint."
        )
    for name in unused:
        del received[name]
    if not unused:
        return ()
    return (f"The weights hold {_listed(unused)}, which Florence-2 does not use; left out.",)


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
            f"The weights lack {_listed(missing)}, which config.json asks for; "
            "check that both come from the same checkpoint."
        )
    for name, value in received.items():
        if value.shape != expected[name].shape:
            raise CheckpointError(
                f"{name} must have the shape {tuple(expected[name].shape)} by config.json, "
                f"got {tuple(value.shape)}; check that both come from the same checkpoint."
            )


def _listed(names: Iterable[str]) -> str:
    """The first few names and how many more."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
