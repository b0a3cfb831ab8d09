"""What the stand-in hub serves in these tests, where it lands, and what is said when it fails."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hub_standin import HubStandin
from safetensors.numpy import save

from florence2.checkpoint.catalog import resolve
from florence2.errors import CheckpointError

REPOSITORY = "someone/Florence-2-tiny"
WEIGHTS = "model.safetensors"
NO_WEIGHTS = {WEIGHTS: None, "pytorch_model.bin": None}
NOWHERE = "http://127.0.0.1:9"


def weights(num_bytes: int = 3_000_000, seed: int = 0) -> bytes:
    values = np.random.default_rng(seed).integers(0, 255, num_bytes, dtype=np.uint8)
    return save({"weight": values})


def files(**changes: bytes | None) -> dict[str, bytes]:
    """A repository's files, more than are needed; a change of None leaves a file out."""
    content: dict[str, bytes | None] = {
        "README.md": b"# a model",
        "modeling_florence2.py": b"raise SystemExit('remote code ran')",
        "config.json": json.dumps({"vision_config": {"dim_embed": [1]}}).encode(),
        "generation_config.json": b'{"num_beams": 3}',
        "preprocessor_config.json": b"{}",
        "tokenizer.json": b'{"model": "' + b"x" * 20_000 + b'"}',
        "tokenizer_config.json": b"{}",
        "vocab.json": b"{}",
        "pytorch_model.bin": b"PK" + bytes(50_000),
        "model.safetensors": weights(),
        **changes,
    }
    return {name: data for name, data in content.items() if data is not None}


def folder_of(hub: HubStandin, cache: Path) -> Path:
    return cache / REPOSITORY.replace("/", "--") / hub.repositories[REPOSITORY].commit


def place(folder: Path, content: dict[str, bytes] | None = None, **changes: bytes | None) -> Path:
    """A folder with these files, or with those of the repository."""
    folder.mkdir(parents=True)
    for name, data in (files(**changes) if content is None else content).items():
        (folder / name).write_bytes(data)
    return folder


def failure(name: str | Path = REPOSITORY, **options: object) -> str:
    """The one sentence that resolving fails with."""
    with pytest.raises(CheckpointError) as caught:
        resolve(name, **options)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


def damage(path: Path) -> None:
    """Turns a bit of the last byte."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
