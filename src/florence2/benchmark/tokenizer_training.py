"""Trains a byte-level BPE tokenizer that is laid out like the published ones, only smaller.

Ids: ``<s>`` 0, ``<pad>`` 1, ``</s>`` 2, ``<unk>`` 3, the 256 bytes, merged pieces, ``<mask>`` as
the last base id, then ADDED_TOKENS in the published order, then ``<image>``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from florence2.tokens import ADDED_TOKENS, BOS, BOS_ID, EOS, EOS_ID, IMAGE, MASK, PAD, UNK

MODEL_MAX_LENGTH: Final = 1024
_FIRST_TOKENS: Final = (BOS, PAD, EOS, UNK)
_NAMED_TOKENS: Final[dict[str, str]] = {
    "bos_token": BOS,
    "eos_token": EOS,
    "sep_token": EOS,
    "cls_token": BOS,
    "unk_token": UNK,
    "pad_token": PAD,
    "mask_token": MASK,
}


def build_tokenizer(folder: Path, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains on ``texts`` and writes the tokenizer's files into ``folder``.

    ``vocab_size`` counts the base vocabulary including ``<mask>``; it is reached exactly, or
    ValueError says that the texts have too few different words. Any text can be spelled.
    """
    vocabulary, merges = _trained(texts, vocab_size)
    tokenizer = _assembled(vocabulary, merges)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "vocab.json", vocabulary)
    pairs = "".join(f"{left} {right}\n" for left, right in merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{pairs}", encoding="utf-8")
    added = {token: len(vocabulary) + index for index, token in enumerate((*ADDED_TOKENS, IMAGE))}
    _write_json(folder / "added_tokens.json", added)
    _write_json(folder / "special_tokens_map.json", {**_NAMED_TOKENS, "image_token": IMAGE})
    _write_json(folder / "tokenizer_config.json", _config())
    return tokenizer


def _trained(texts: Iterable[str], vocab_size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The base vocabulary in the order of its ids, and the merges in order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=list(_FIRST_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    if len(vocabulary) != vocab_size - 1:
        raise ValueError(
            f"The texts give a vocabulary of {len(vocabulary) + 1}, fewer than the {vocab_size} "
            "asked for. Give more varied texts or ask for a smaller vocabulary."
        )
    vocabulary[MASK] = len(vocabulary)
    return vocabulary, [(left, right) for left, right in model["merges"]]


def _assembled(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        (EOS, EOS_ID), (BOS, BOS_ID), trim_offsets=True, add_prefix_space=False
    )
    tokenizer.add_special_tokens(
        [
            *(AddedToken(token, normalized=False, special=True) for token in _FIRST_TOKENS),
            AddedToken(MASK, lstrip=True, normalized=False, special=True),
            *(AddedToken(token, normalized=False, special=True) for token in ADDED_TOKENS),
            AddedToken(IMAGE, normalized=False, special=True),
        ]
    )
    return tokenizer


def _config() -> dict[str, Any]:
    return {
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "extra_special_tokens": {"image_token": IMAGE},
        "model_max_length": MODEL_MAX_LENGTH,
        "processor_class": "Florence2Processor",
        "tokenizer_class": "BartTokenizer",
        "trim_offsets": True,
        **_NAMED_TOKENS,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
