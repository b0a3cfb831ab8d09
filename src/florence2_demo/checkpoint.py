"""The demo checkpoint: its shape, its tokenizer, and its folder in the native layout."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import save_file

from florence2.benchmark.tokenizer_training import build_tokenizer
from florence2.network.config import NetworkConfig
from florence2.network.florence import Florence2Network
from florence2.tasks import BANNED_PHRASES, TASKS, OutputKind
from florence2.tokens import ADDED_TOKENS
from florence2_demo.examples import examples
from florence2_demo.lexicon import (
    ABSENT_WORDS,
    BACKGROUND_COLOURS,
    COLOURS,
    KINDS,
    NUMBER_WORDS,
    PATTERNS,
    PLURALS,
    SIGN_WORDS,
)
from florence2_demo.scene import make_scene

IMAGE_SIDE_PX: Final = 192
GRID_SIDE: Final = 12
BASE_VOCABULARY: Final = 900
IMAGE_ID: Final = BASE_VOCABULARY + len(ADDED_TOKENS)
"""``<image>``, the last token of the tokenizer; rows after it only fill up the embedding."""

_VISION: Final = {
    "model_type": "florence_vision",
    "in_channels": 3,
    "depths": [1, 1, 3, 1],
    "patch_size": [7, 3, 3, 3],
    "patch_stride": [4, 2, 2, 1],
    "patch_padding": [3, 1, 1, 1],
    "patch_prenorm": [False, True, True, True],
    "embed_dim": [32, 64, 128, 192],
    "num_heads": [1, 2, 4, 6],
    "num_groups": [1, 2, 4, 6],
    "window_size": 12,
    "drop_path_rate": 0.0,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "projection_dim": 192,
    "max_temporal_embeddings": 4,
    "max_position_embeddings": 16,
}

_TEXT: Final = {
    "model_type": "bart",
    "d_model": 192,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 768,
    "decoder_ffn_dim": 768,
    "max_position_embeddings": 512,
    "activation_function": "gelu",
    "scale_embedding": False,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}


def demo_config(vocab_size: int) -> NetworkConfig:
    """The demo checkpoint's network for a vocabulary of ``vocab_size`` rows."""
    return NetworkConfig.from_dict(
        {
            "model_type": "florence2",
            "vision_config": _VISION,
            "text_config": _TEXT | {"vocab_size": vocab_size},
            "image_token_id": IMAGE_ID,
        }
    )


_GENERATION = {
    # Its places are spread over many bins, so that with several beams a short empty answer can
    # outweigh boxes that are there; one beam finds more (docs/results.md).
    "num_beams": 1,
    # The demo's paragraphs repeat trigrams on purpose ("is on the"); the ban would cut them.
    "no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 2,
}

_IMAGE_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"height": IMAGE_SIDE_PX, "width": IMAGE_SIDE_PX},
    "resample": 3,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_convert_rgb": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "image_seq_length": GRID_SIDE * GRID_SIDE + 1,
}

# Without it the reference's processor reads no answer at all.
_PROCESSOR = {
    "processor_class": "Florence2Processor",
    "post_processor_config": {kind.value: {} for kind in OutputKind}
    | {"description_with_polygons": {}}
    | {OutputKind.GROUNDING.value: {"banned_grounding_tokens": sorted(BANNED_PHRASES)}},
}


_TOKENS: Final = re.compile(r"<[^<>]+>")
_FIRST_SEED: Final = 500_000
_EVERYDAY: Final = (
    "and are as be but by can each every find for from has have here how it its more most not of "
    "one or other over people picture photo please some than that their there these they thing "
    "this to under up very was water which who will woman man child hand head face road street "
    "window wall floor light dark old young round square circle triangle animal food fruit toy "
    "sky grass sand stone wood metal glass paper colour number letter word line shape part near "
    "between behind front above below outside inside many few several another any all between "
    "ing er ed ly tion es al ment able ight ound est ness less ful ive ous ent ant ary ory"
)
"""Rare in the corpus on purpose: pieces that shorten other people's words."""


def tokenizer_texts(num_scenes: int = 1500) -> Iterator[str]:
    """Prompts and answers of ``num_scenes`` scenes, and every word often enough to be a token.

    Words appear at the start of a text and after a space, which byte-level tokens tell apart.
    """
    for _ in range(num_scenes // 5):
        for task in TASKS:
            yield task.sentence.replace("{input}", "")
        for words in (KINDS, COLOURS, tuple(PLURALS.values()), BACKGROUND_COLOURS, PATTERNS):
            yield from words
            yield f" {' '.join(words)}"
        yield f" {' '.join(NUMBER_WORDS)}"
    for _ in range(num_scenes // 15):
        yield from SIGN_WORDS
        yield f" {' '.join((*SIGN_WORDS, *ABSENT_WORDS))}"
    yield _EVERYDAY
    yield f" {_EVERYDAY}"
    for seed in range(_FIRST_SEED, _FIRST_SEED + num_scenes):
        for example in examples(make_scene(seed), np.random.default_rng(seed)):
            yield _TOKENS.sub("", example.text or "")
            yield from filter(None, _TOKENS.split(example.answer))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes ``content`` so that a kill leaves the old file or the new one."""
    partial = path.with_suffix(path.suffix + ".part")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def write_tokenizer_and_processor(folder: Path) -> None:
    """The files beside the weights; made once, the same for every step of a training."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "tokenizer.json").exists():
        return
    write_json(folder / "preprocessor_config.json", _IMAGE_PROCESSOR)
    write_json(folder / "processor_config.json", _PROCESSOR)
    write_json(folder / "generation_config.json", _GENERATION)
    build_tokenizer(folder, tokenizer_texts(), BASE_VOCABULARY)


def save_checkpoint(network: Florence2Network, folder: Path) -> None:
    """Weights in float16 and the config; a tied head is stored once, as in the reference."""
    write_json(folder / "config.json", network.config.to_native_dict())
    shared = "model.language_model.shared.weight"
    tied = ("lm_head.weight", "embed_tokens.weight")
    state = {
        name: tensor.detach().to(torch.float16).cpu().contiguous()
        for name, tensor in network.state_dict().items()
        if name == shared or not name.endswith(tied)
    }
    partial = folder / "model.safetensors.part"
    save_file(state, str(partial), metadata={"format": "pt"})
    os.replace(partial, folder / "model.safetensors")
