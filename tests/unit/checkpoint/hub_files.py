"""What the stand-in hub serves in these tests, and where it lands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from hub_standin import HubStandin
from safetensors.numpy import save

REPOSITORY = "someone/Florence-2-tiny"


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
