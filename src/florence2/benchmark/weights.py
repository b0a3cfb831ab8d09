"""Random checkpoints at the published sizes, written once and read by all sides."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file

from florence2.benchmark.case import all_texts
from florence2.benchmark.tokenizer import build_tokenizer
from florence2.network.config import NetworkConfig, base_config, large_config, tiny_config
from florence2.network.florence import Florence2Network
from florence2.tasks import TASKS
from florence2.tokens import ADDED_TOKENS, EOS_ID

SIZES: Final = ("base", "large", "tiny")
VOCABULARY: Final = 51328
# The words of all prompts; the rest of the embedding's rows are tokens that nobody spells.
_SPELLED: Final = 400


def size_config(size: str) -> NetworkConfig:
    """The shape of ``base`` or ``large``; ``tiny`` is for trying the benchmark itself."""
    if size == "tiny":
        # 24 visual tokens a side, as at full size, but from a very small network.
        return tiny_config(vocab_size=VOCABULARY, max_positions=1024, patch_stride=(4, 2, 2, 2))
    return {"base": base_config, "large": large_config}[size](VOCABULARY)


def write_checkpoint(size: str, folder: Path) -> None:
    """Writes a whole random checkpoint, weights in float16 as published.

    The embedding of ``</s>`` is zero, so that its logit never ranks among the first and every
    answer runs to the token limit: all sides then do the same work.
    """
    texts = [task.sentence.replace("{input}", text) for text in all_texts() for task in TASKS]
    build_tokenizer(folder, texts, _SPELLED)
    torch.manual_seed(1)
    config = replace(size_config(size), image_token_id=_SPELLED + len(ADDED_TOKENS))
    network = Florence2Network(config)
    with torch.no_grad():
        network.model.language_model.shared.weight[EOS_ID] = 0.0
    state = {name: value.to(torch.float16) for name, value in network.native_state().items()}
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_native_dict()), encoding="utf-8")
