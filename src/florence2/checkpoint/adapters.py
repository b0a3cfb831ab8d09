"""LoRA adapters as peft saves them: what one changes of its base, merged exactly and in float32.

Sources: LoRA (arXiv 2106.09685), rank-stabilised LoRA (arXiv 2312.03732), and the arithmetic of
peft's ``merge_and_unload``, whose sums these are.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from florence2.checkpoint.converted import file_sha256
from florence2.checkpoint.files import ADAPTER_CONFIG, CheckpointFiles, read_json
from florence2.checkpoint.weights import (
    EMBEDDINGS,
    Layout,
    bare_name,
    listed,
    native_name,
    read_file,
)
from florence2.errors import CheckpointError, shown

# What says how an adapter was made and trained, or what its files say by themselves.
_OF_TRAINING: Final = frozenset({
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "target_modules", "task_type",
})  # fmt: skip
_MERGED: Final = frozenset({
    "alpha_pattern", "init_lora_weights", "lora_alpha", "lora_bias", "r", "rank_pattern",
    "use_rslora",
})  # fmt: skip
_SHOWN: Final = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "activated LoRA",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "LoRA on bare parameters",
    "layer_replication": "repeated layers",
}
# These leave the base's own weights as they are; PiSSA, OLoRA, CorDA and others change them.
_PLAIN_STARTS: Final = (None, True, False, "gaussian", "eva", "orthogonal")

_HALF: Final = re.compile(r"(.+)\.lora_([AB])(?:\.[^.]+)?\.(weight|bias)")
_WRAPPED: Final = re.compile(r"\.(?:base_layer|modules_to_save\.[^.]+)(?=\.)")
_UNKNOWN_PARTS: Final = {
    ".lora_magnitude_vector": "DoRA's magnitudes",
    ".lora_embedding_": "LoRA on an embedding",
    ".trainable_tokens_": "trained tokens",
    ".lora_": "a part of LoRA that is not known here",
}
# Around the names in an adapter's file; patterns are about what is within.
_PEFT: Final = "base_model.model."


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter and the base that it is merged into.

    ``sha256`` of the file of its weights, ``config_sha256`` of its settings, in hex; ``base`` and
    ``base_revision`` as the base was named and found.
    """

    path: Path
    settings: Mapping[str, Any]
    sha256: str
    config_sha256: str
    base: str
    base_revision: str | None

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.path.parent

    @property
    def note(self) -> str:
        """What answers, as a sentence."""
        revision = f" at {self.base_revision}" if self.base_revision else ""
        return (
            f"The adapter in {self.folder} ({self.path.name}, SHA-256 {self.sha256}) is merged "
            f"into {self.base}{revision}."
        )

    def to_dict(self) -> dict[str, str | None]:
        """What tells it from others, as plain JSON."""
        return {
            "folder": str(self.folder),
            "sha256": self.sha256,
            "base": self.base,
            "base_revision": self.base_revision,
        }

    def joined_hash(self, base_hash: str) -> str:
        """One hash of the base's and of all that is merged into it."""
        text = f"{base_hash} {self.sha256} {self.config_sha256}"
        return hashlib.sha256(text.encode()).hexdigest()


def read_adapter(files: CheckpointFiles, base: str, base_revision: str | None) -> Adapter:
    """An adapter's settings, checked; CheckpointError for a kind that cannot be merged."""
    config, path = files.folder / ADAPTER_CONFIG, files.folder / files.files[-1]
    settings = read_json(config)
    _check_settings(settings, config)
    hashes = file_sha256(path), file_sha256(config)
    return Adapter(path, settings, *hashes, base, base_revision)


def _check_settings(settings: Mapping[str, Any], config: Path) -> None:
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise _refused(config, f"is an adapter of the kind {shown(kind)}")
    for name, value in settings.items():
        if name not in _OF_TRAINING and name not in _MERGED and value not in (None, False, [], {}):
            raise _refused(config, f"asks for {_SHOWN.get(name, f'{name} {shown(value)}')}")
    start = settings.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise _refused(
            config,
            f"says that training began with {shown(start)} (init_lora_weights), which changes the "
            "base's own weights",
        )


def _refused(config: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{config} {why}, and only LoRA and rsLoRA are merged here; merge it into its base with "
        "the library that made it, and load the merged checkpoint."
    )


class _Change(NamedTuple):
    """What an adapter does to one weight or bias: another value, and something added to it."""

    value: Tensor | None
    added: Tensor | None


def merged_weights(adapter: Adapter, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the base that the adapter changes, merged in float32, by native names.

    ``base``: whole, under native names (``whole_state``). An output projection that is changed is
    no longer tied to the input embedding, which stays as it is. Raises CheckpointError naming what
    does not fit this base, or cannot be merged.
    """
    changes = _changes(adapter, read_file(adapter.path), base)
    merged: dict[str, Tensor] = {}
    for name, change in changes.items():
        value = base[name] if change.value is None else change.value
        result = value.float() if change.added is None else value.float() + change.added
        if not bool(torch.isfinite(result).all()):
            raise CheckpointError(
                f"{adapter.path} makes {name} hold numbers that are not finite; take an earlier "
                "state of that training."
            )
        merged[name] = result
    return merged


def _changes(
    adapter: Adapter, state: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> dict[str, _Change]:
    halves, values = _sorted_parts(adapter, state)
    parameters = {f"{module}.weight": module for module in halves}
    places = _native_places(adapter, [*parameters, *values], base)
    changes: dict[str, _Change] = {}
    for name, value in values.items():
        place = places[name]
        if value.shape != base[place].shape:
            raise CheckpointError(
                f"{adapter.path} has {name} of the shape {tuple(value.shape)}, and it has the "
                f"shape {tuple(base[place].shape)} in {adapter.base}; take the base that the "
                "adapter was made for."
            )
        # peft stores weights of the base too, such as that of an output projection with LoRA.
        if torch.equal(base[place].to(value.dtype), value):
            continue
        if place in EMBEDDINGS:
            raise _is_embedding(adapter, name)
        changes[place] = _Change(value, None)
    for name, module in parameters.items():
        place, parts = places[name], halves[module]
        if place in EMBEDDINGS:
            raise _is_embedding(adapter, module)
        scaling = _scaling(adapter, module, parts)
        added = _weight_change(adapter, module, parts, base[place]) * scaling
        changes[place] = _Change(_value_in(changes, place), added)
        if (bias := parts.get("B.bias")) is not None:
            bias_place = place.removesuffix("weight") + "bias"
            if bias_place not in base or base[bias_place].shape != bias.shape:
                raise CheckpointError(
                    f"{adapter.path} adds to the bias of {module}, which {adapter.base} does not "
                    "have; take the base that the adapter was made for."
                )
            changes[bias_place] = _Change(_value_in(changes, bias_place), bias.float() * scaling)
    if not changes:
        raise CheckpointError(
            f"{adapter.path} changes nothing of {adapter.base}; save the adapter again, or load "
            "the base itself."
        )
    return changes


def _sorted_parts(
    adapter: Adapter, state: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """LoRA's parts by their module (``A.weight``, ``B.weight``, ``B.bias``), and whole values."""
    halves: dict[str, dict[str, Tensor]] = {}
    values: dict[str, Tensor] = {}
    for name, value in state.items():
        if not value.is_floating_point():
            raise CheckpointError(
                f"{adapter.path} holds {name} in {value.dtype}, and only floating point weights "
                "can be merged; save the adapter without quantisation."
            )
        if match := _HALF.fullmatch(name):
            module, half, kind = match.groups()
            parts, key = halves.setdefault(module, {}), f"{half}.{kind}"
            if key in parts:
                raise _twice(adapter, f"{module}.lora_{key}")
            parts[key] = value
            continue
        _check_known(adapter, name)
        plain = _WRAPPED.sub("", name)
        if plain in values:
            raise _twice(adapter, plain)
        values[plain] = value
    for module, parts in halves.items():
        missing = {"A.weight", "B.weight"} - parts.keys()
        if missing:
            raise CheckpointError(
                f"{adapter.path} lacks {module}.lora_{missing.pop()}, one half of a pair; copy the "
                "adapter again, or save it again."
            )
    return halves, values


def _check_known(adapter: Adapter, name: str) -> None:
    """CheckpointError for a part of an adapter that is neither LoRA nor a whole weight."""
    for part, what in _UNKNOWN_PARTS.items():
        if part in name:
            raise CheckpointError(
                f"{adapter.path} holds {name}, {what}, and only LoRA and rsLoRA are merged here; "
                "merge it into its base with the library that made it, and load the merged "
                "checkpoint."
            )


def _native_places(
    adapter: Adapter, names: Iterable[str], base: Mapping[str, Tensor]
) -> dict[str, str]:
    """Each name's native one, read in the layout that the adapter was made on."""
    layouts: tuple[Layout, ...] = ("native", "original")
    read = [{name: native_name(bare_name(name), layout) for name in names} for layout in layouts]
    unknown, places = min(
        (([name for name, place in one.items() if place not in base], one) for one in read),
        key=lambda found: len(found[0]),
    )
    if unknown:
        raise CheckpointError(
            f"{adapter.path} changes {listed(unknown)}, which {adapter.base} does not have; take "
            "the base that the adapter was made for."
        )
    taken: set[str] = set()
    for name, place in places.items():
        if place in taken:
            raise _twice(adapter, name)
        taken.add(place)
    return places


def _value_in(changes: Mapping[str, _Change], place: str) -> Tensor | None:
    return changes[place].value if place in changes else None


def _twice(adapter: Adapter, name: str) -> CheckpointError:
    return CheckpointError(
        f"{adapter.path} holds {name} twice; save one adapter by itself (save_pretrained of peft)."
    )


def _is_embedding(adapter: Adapter, name: str) -> CheckpointError:
    return CheckpointError(
        f"{adapter.path} changes {name}, the input embedding, which is not merged here; merge it "
        "into its base with the library that made it, and load the merged checkpoint."
    )


def _weight_change(
    adapter: Adapter, module: str, parts: Mapping[str, Tensor], weight: Tensor
) -> Tensor:
    """What LoRA adds to a weight, before scaling; the products are those of peft."""
    first, second = parts["A.weight"].float(), parts["B.weight"].float()
    if first.dim() == second.dim() == weight.dim() == 2:
        fits = (second.shape[0], first.shape[1]) == weight.shape
        if fits and first.shape[0] == second.shape[1]:
            return second @ first
    elif first.dim() == second.dim() == weight.dim() == 4:
        if weight.shape[1] == 1 and first.shape[1] == weight.shape[0]:
            raise CheckpointError(
                f"{adapter.path} changes {module}, a depthwise convolution, for which LoRA has no "
                "merged form; train again without that module."
            )
        fits = (second.shape[0], *first.shape[1:]) == weight.shape
        if fits and second.shape[1:] == (first.shape[0], 1, 1):
            return functional.conv2d(first.transpose(0, 1), second).transpose(0, 1)
    shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
    raise CheckpointError(
        f"{adapter.path} has halves of the shapes {shapes} for {module}, which has the shape "
        f"{tuple(weight.shape)} in {adapter.base}; take the base that the adapter was made for."
    )


def _scaling(adapter: Adapter, module: str, parts: Mapping[str, Tensor]) -> float:
    """By how much a module's change counts: alpha / r, or alpha / sqrt(r) of rsLoRA."""
    name = module.removeprefix(_PEFT)
    rank = _number(adapter, "r", "rank_pattern", name)
    alpha = _number(adapter, "lora_alpha", "alpha_pattern", name)
    stored = parts["A.weight"].shape[0]
    if rank != stored:
        raise CheckpointError(
            f"{adapter.path} has rank {stored} for {module}, and its {ADAPTER_CONFIG} says "
            f"{rank:g}; take both files from the same adapter."
        )
    is_rslora = adapter.settings.get("use_rslora")
    return alpha / math.sqrt(stored) if is_rslora else alpha / stored


def _number(
    adapter: Adapter, key: Literal["r", "lora_alpha"], pattern_key: str, module: str
) -> float:
    """A module's own number where a pattern names it, as peft reads them, else that of all."""
    patterns = adapter.settings.get(pattern_key) or {}
    try:
        found = next(
            (
                value
                for pattern, value in patterns.items()
                if re.match(rf"(.*\.)?({pattern})$", module)
            ),
            adapter.settings.get(key, 8),
        )
        number = float(found)
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise CheckpointError(
            f"{key} and {pattern_key} in {adapter.folder / ADAPTER_CONFIG} must be numbers, the "
            f"second by patterns of names, and {shown(patterns or adapter.settings.get(key))} was "
            "found; put the adapter's own file there."
        ) from error
    return number
