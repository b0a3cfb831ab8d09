"""A checkpoint ready to load: its files, the shape of its network, its words and its defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from florence2.checkpoint.adapters import Adapter, merged_weights, read_adapter
from florence2.checkpoint.catalog import (
    Verify,
    base_name,
    published_name,
    resolve,
    resolve_adapter,
)
from florence2.checkpoint.converted import Converted, read_converted, source_hash
from florence2.checkpoint.files import (
    ADAPTER_CONFIG,
    CONFIG,
    CONVERTED_NAME,
    CheckpointFiles,
    check_folder,
    read_json,
)
from florence2.checkpoint.hub import ProgressCallback
from florence2.checkpoint.weights import build_network, read_weights, whole_state
from florence2.errors import CheckpointError, shown
from florence2.network.config import NetworkConfig, is_original_config
from florence2.network.florence import Florence2Network
from florence2.pixels import PROCESSOR_FILES, ImageProcessor, image_processor_file
from florence2.records import LIBRARY_DEFAULTS, SETTING_RULES, GenerationSettings, unheeded
from florence2.tokenizer import Vocabulary

_GENERATION_CONFIG: Final = "generation_config.json"

# A length limit there is not taken over: each task has its own budget.
_TAKEN_OVER: Final = ("num_beams", "early_stopping", "no_repeat_ngram_size", "length_penalty")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything about a checkpoint but its weights. ``revision`` is its commit, if known.

    Of an adapter ``folder`` is that of its base, and so is what is read there. ``notes``: what its
    files say that is not obeyed, a sentence each; those about its weights are the loaded network's.
    """

    name: str
    revision: str | None
    folder: Path
    config: NetworkConfig
    vocabulary: Vocabulary
    image_processor: ImageProcessor
    generation: GenerationSettings
    notes: tuple[str, ...] = ()
    converted: Converted | None = None
    """Where the folder holds a converted network in the place of weights."""
    adapter: Adapter | None = None
    """What is merged into the folder's weights."""

    @property
    def identity(self) -> str:
        """What tells these weights from any others on this machine."""
        base = f"{self.folder}@{self.revision}"
        return base if self.adapter is None else f"{base} {self.adapter.joined_hash(base)}"

    def source_hash(self, of_folder: str | None = None) -> str:
        """One hash of the files it is loaded from; ``of_folder`` where the folder's is known."""
        known = of_folder or source_hash(self.folder, check_folder(self.folder))
        return known if self.adapter is None else self.adapter.joined_hash(known)


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
    if files.base is not None:
        return _with_adapter(_opened(files.base), files)
    return _opened(files)


def open_adapter(
    name: str | Path,
    base: Checkpoint,
    *,
    cache_dir: str | Path | None = None,
    offline: bool | None = None,
    progress: ProgressCallback | None = None,
) -> Checkpoint:
    """An adapter of a base that is at hand, whatever path its config has; as ``open_checkpoint``.

    CheckpointError where its config names another one of the published checkpoints.
    """
    if base.adapter is not None or base.converted is not None:
        what = "an adapter" if base.adapter else "a network converted for OpenVINO"
        raise CheckpointError(
            f"Adapters are merged into full weights, and {base.name} is {what}; name the base "
            "itself as the model."
        )
    files = resolve_adapter(name, cache_dir=cache_dir, offline=offline, progress=progress)
    return _with_adapter(base, files)


def _opened(files: CheckpointFiles) -> Checkpoint:
    config = read_json(files.folder / CONFIG)
    is_weightless = CONVERTED_NAME in files.files
    chosen = files.folder / _GENERATION_CONFIG
    generation_config = read_json(chosen) if chosen.is_file() else None
    checkpoint = Checkpoint(
        name=files.name,
        revision=files.revision,
        folder=files.folder,
        config=NetworkConfig.from_dict(config),
        vocabulary=Vocabulary.from_folder(files.folder),
        image_processor=ImageProcessor.from_folder(files.folder),
        generation=generation_settings(config, generation_config),
        notes=_notes(files.folder, config, generation_config),
        converted=read_converted(files.folder) if is_weightless else None,
    )
    _check_image_size(checkpoint)
    return checkpoint


def _with_adapter(base: Checkpoint, files: CheckpointFiles) -> Checkpoint:
    """The base with an adapter to be merged into it; CheckpointError if the two do not fit."""
    adapter = read_adapter(files, base.name, base.revision)
    named, revision = (adapter.settings.get(key) for key in ("base_model_name_or_path", "revision"))
    notes = [adapter.note]
    if isinstance(named, str) and base_name(named, revision) != base.name:
        meant, given = published_name(named), published_name(base.name)
        if meant and given and meant != given:
            raise CheckpointError(
                f"The adapter in {files.folder} was made for {named}, and {base.name} is the "
                "model; load the adapter with its own base."
            )
        if meant is None or given is None:
            notes.append(f"{ADAPTER_CONFIG} in {files.folder} names its base as {named}.")
        if revision and base.revision and revision != base.revision:
            notes.append(
                f"The adapter in {files.folder} was made for revision {revision} of its base."
            )
    _check_tokens(base, files.folder)
    if image_processor_file(files.folder) is not None:
        processor = ImageProcessor.from_folder(files.folder)
        if processor != base.image_processor:
            raise CheckpointError(
                f"{image_processor_file(files.folder)} prepares images in another way than "
                f"{base.name}, into which this adapter is merged; put that file into the base's "
                "folder, or remove it here."
            )
    return replace(base, name=files.name, notes=(*base.notes, *notes), adapter=adapter)


def _check_tokens(base: Checkpoint, folder: Path) -> None:
    """CheckpointError where an adapter comes with tokens that its base does not have."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return
    own, known = Vocabulary.from_folder(folder), base.vocabulary
    images = {own.image_id, known.image_id}
    for token_id in range(max(own.size, known.size)):
        if own.bytes_of(token_id) != known.bytes_of(token_id) and token_id not in images:
            raise CheckpointError(
                f"The tokenizer in {folder} has {_token(own, token_id)} as token {token_id}, and "
                f"that of {base.name}, into which this adapter is merged, has "
                f"{_token(known, token_id)}; merge it with the library that made it, and load the "
                "merged checkpoint."
            )


def _token(vocabulary: Vocabulary, token_id: int) -> str:
    spelled = vocabulary.bytes_of(token_id)
    return repr(spelled.decode(errors="replace")) if spelled else "none"


def _notes(
    folder: Path, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None
) -> tuple[str, ...]:
    notes = [
        f"{file} asks for {wanted}, which this search does not have; answers are searched for "
        "without."
        for file, section in _search_sections(config, generation_config)
        if (wanted := unheeded(section))
    ]
    if (folder / ADAPTER_CONFIG).is_file():
        notes.append(
            f"{ADAPTER_CONFIG} lies beside full weights, which are loaded as they are; no adapter "
            "is applied to them."
        )
    return tuple(notes)


def _check_image_size(checkpoint: Checkpoint) -> None:
    """CheckpointError where images of the processor's size have more places than the network."""
    vision, size_wh = checkpoint.config.vision, checkpoint.image_processor.size_wh
    grid = vision.grid(size_wh[1], size_wh[0])
    limit = vision.max_position_embeddings
    if max(grid) <= limit:
        return
    source = image_processor_file(checkpoint.folder)
    if source is None:
        raise CheckpointError(
            f"{checkpoint.folder} holds no {PROCESSOR_FILES[0]}, and the published size of images "
            f"does not fit this network ({max(grid)} rows or columns of {limit}); add that file."
        )
    raise CheckpointError(
        f"{source} asks for images of {size_wh[0]} x {size_wh[1]} pixels, which this network does "
        f"not take ({max(grid)} rows or columns of {limit}); take both from the same checkpoint."
    )


def load_weights(checkpoint: Checkpoint, dtype: torch.dtype) -> Florence2Network:
    """The checkpoint's network in ``dtype`` on the CPU.

    Raises CheckpointError if the weights do not fit the config, or the words do not fit them.
    """
    whole = read_whole(checkpoint)
    return network_of(checkpoint, {**whole, **changed_weights(checkpoint, whole)}, dtype)


def read_whole(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The ``whole_state`` in a checkpoint's folder, which of an adapter is its base's."""
    return whole_state(read_weights(checkpoint.folder))


def network_of(
    checkpoint: Checkpoint, state: Mapping[str, Tensor], dtype: torch.dtype
) -> Florence2Network:
    """The checkpoint's network with the weights of a state; as ``load_weights``, which reads it."""
    network = build_network(checkpoint.config, state, dtype)
    vocabulary, rows = checkpoint.vocabulary, network.config.text.vocab_size
    # Visual features are put in front of a prompt, so <image> itself is never looked up.
    is_image_last = vocabulary.image_id == vocabulary.size - 1
    if vocabulary.size - is_image_last > rows:
        raise CheckpointError(
            f"The tokenizer in {checkpoint.folder} has {vocabulary.size} tokens and the weights "
            f"have rows for {rows}; put the tokenizer files that belong to these weights there."
        )
    return network


def changed_weights(checkpoint: Checkpoint, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint's adapter makes of its base's ``whole_state``; nothing without one.

    In float32, see ``merged_weights``.
    """
    return {} if checkpoint.adapter is None else merged_weights(checkpoint.adapter, whole)


def generation_settings(
    config: Mapping[str, Any], generation_config: Mapping[str, Any] | None
) -> GenerationSettings:
    """How a checkpoint's answers are searched for, with nothing left unset.

    Original layout: ``text_config``, whose settings alone the publisher's code runs, then
    ``generation_config.json``, then the published defaults. Native layout: as transformers means
    it, so what ``generation_config.json`` leaves out is the library's default; without that file
    the published defaults. Null means left out. Raises CheckpointError for a value that a request
    could not have either.
    """
    is_native = not is_original_config(config)
    chosen: dict[str, Any] = {}
    if is_native and generation_config is not None:
        chosen |= LIBRARY_DEFAULTS
    for file, section in reversed(_search_sections(config, generation_config)):
        for key in _TAKEN_OVER:
            value = section.get(key)
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


def _search_sections(
    config: Mapping[str, Any], generation_config: Mapping[str, Any] | None
) -> list[tuple[str, Mapping[str, Any]]]:
    """Where a checkpoint says how to search, each with its file, the one that goes first first."""
    sections = [(_GENERATION_CONFIG, generation_config)] if generation_config else []
    text_config = config.get("text_config")
    if is_original_config(config) and isinstance(text_config, Mapping):
        sections.insert(0, (CONFIG, text_config))
    return sections
