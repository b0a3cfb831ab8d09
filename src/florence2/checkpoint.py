"""A checkpoint ready to load: its files, the shape of its network, its words and its defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from florence2.checkpoint_files import CONFIG, CheckpointFiles, read_json
from florence2.errors import CheckpointError, shown
from florence2.generation_rules import SETTING_RULES
from florence2.hub import ProgressCallback, ProgressUpdate
from florence2.network.config import NetworkConfig, is_original_config
from florence2.network.florence import Florence2Network
from florence2.network.weights import build_network, read_weights
from florence2.processing import ImageProcessor
from florence2.records import GenerationSettings
from florence2.resolve import Verify, resolve
from florence2.vocabulary import Vocabulary

__all__ = [
    "Checkpoint",
    "CheckpointFiles",
    "ProgressUpdate",
    "generation_settings",
    "load_weights",
    "open_checkpoint",
    "resolve",
]

_GENERATION_CONFIG: Final = "generation_config.json"
# A length limit there is not taken over: each task has its own budget.
_TAKEN_OVER: Final = ("num_beams", "early_stopping", "no_repeat_ngram_size", "length_penalty")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything about a checkpoint but its weights. ``revision`` is its commit, if known."""

    name: str
    revision: str | None
    folder: Path
    config: NetworkConfig
    vocabulary: Vocabulary
    image_processor: ImageProcessor
    generation: GenerationSettings


def open_checkpoint(
    name: str | Path,
    *,
    cache_dir: str | Path | None = None,
    offline: bool | None = None,
    progress: ProgressCallback | None = None,
    verify: Verify = "size",
) -> Checkpoint:
    """Finds or downloads a checkpoint and reads all but its weights; arguments as ``resolve``.

    Raises CheckpointError naming the file that is missing, damaged or says something unusable.
    """
    files = resolve(name, cache_dir=cache_dir, offline=offline, progress=progress, verify=verify)
    config = read_json(files.folder / CONFIG)
    chosen = files.folder / _GENERATION_CONFIG
    return Checkpoint(
        name=files.name,
        revision=files.revision,
        folder=files.folder,
        config=NetworkConfig.from_dict(config),
        vocabulary=Vocabulary.from_folder(files.folder),
        image_processor=ImageProcessor.from_folder(files.folder),
        generation=generation_settings(config, read_json(chosen) if chosen.is_file() else {}),
    )


def load_weights(checkpoint: Checkpoint, dtype: torch.dtype) -> Florence2Network:
    """The checkpoint's network in ``dtype`` on the CPU.

    Raises CheckpointError if the weights do not fit the config, or the words do not fit them.
    """
    network = build_network(checkpoint.config, read_weights(checkpoint.folder), dtype)
    vocabulary, rows = checkpoint.vocabulary, network.config.text.vocab_size
    # Visual features are put in front of a prompt, so <image> itself is never looked up.
    is_image_last = vocabulary.image_id == vocabulary.size - 1
    if vocabulary.size - is_image_last > rows:
        raise CheckpointError(
            f"The tokenizer in {checkpoint.folder} has {vocabulary.size} tokens and the weights "
            f"have rows for {rows}; put the tokenizer files that belong to these weights there."
        )
    return network


def generation_settings(
    config: Mapping[str, Any], generation_config: Mapping[str, Any]
) -> GenerationSettings:
    """How a checkpoint's answers are searched for, with nothing left unset.

    ``generation_config.json`` goes before the original layout's ``text_config``, and that before
    the published defaults; null means unset. Raises CheckpointError for a value that a request
    could not have either.
    """
    legacy = config.get("text_config") if is_original_config(config) else None
    chosen: dict[str, Any] = {}
    for file, section in ((CONFIG, legacy), (_GENERATION_CONFIG, generation_config)):
        for key in _TAKEN_OVER:
            value = section.get(key) if isinstance(section, Mapping) else None
            if value is None:
                continue
            rule = SETTING_RULES[key]
            if not rule.allows(value):
                raise CheckpointError(
                    f"{key} in the checkpoint's {file} must be {rule.says}, not {shown(value)}; "
                    "correct it there."
                )
            chosen[key] = value
    return replace(GenerationSettings(), **chosen)
