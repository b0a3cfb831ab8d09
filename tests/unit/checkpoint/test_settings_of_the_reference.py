"""A checkpoint's own settings give the answers that its own code gives with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_checkpoint import original_files

from florence2 import Florence2
from florence2.checkpoint.checkpoint import load_weights, open_checkpoint

transformers = pytest.importorskip("transformers")

DEMO = Path(__file__).parents[3] / "demo"
FORCED = {"forced_bos_token_id": 0, "forced_eos_token_id": 2}
SPECIAL = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
# Their answers differ with the settings.
QUESTIONS = [("scene_bike.png", "<DETAILED_CAPTION>"), ("photo_meadow.jpg", "<CAPTION>")]
LIMIT = 60

VARIANTS = {
    "nothing but the forced tokens": {},
    "beams alone": {"num_beams": 3},
    "beams and early stopping": {"num_beams": 3, "early_stopping": True},
    "the published settings": {"num_beams": 3, "early_stopping": True, "no_repeat_ngram_size": 3},
    "a penalty": {"num_beams": 3, "length_penalty": -0.5},
    "a null": {"num_beams": 2, "early_stopping": None, "no_repeat_ngram_size": 2},
}


@pytest.fixture(scope="module")
def reference():
    """The demo network as transformers loads it, and its processor."""
    folder = DEMO / "checkpoint"
    model = transformers.Florence2ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    )
    return model.eval(), transformers.AutoProcessor.from_pretrained(folder)


def reference_answers(reference, generation_config) -> list[list[int]]:
    model, processor = reference
    answers = []
    for image, task in QUESTIONS:
        picture = Image.open(DEMO / "images" / image).convert("RGB")
        inputs = processor(text=task, images=picture, return_tensors="pt")
        with torch.inference_mode():
            [row] = model.generate(
                **inputs, generation_config=generation_config, max_new_tokens=LIMIT
            ).tolist()
        answers.append([token_id for token_id in row if token_id not in (0, 1, 2)])
    return answers


def our_answers(folder: Path) -> list[list[int]]:
    model = Florence2.load(folder, device="cpu", precision="fp32")
    return [
        list(model.run(task, str(DEMO / "images" / image), max_new_tokens=LIMIT).token_ids)
        for image, task in QUESTIONS
    ]


@pytest.mark.parametrize("case", VARIANTS)
def test_native_layout_as_transformers_reads_it(reference, tmp_path, case):
    folder = Path(shutil.copytree(DEMO / "checkpoint", tmp_path / "native"))
    chosen = json.dumps({**SPECIAL, **FORCED, **VARIANTS[case]})
    (folder / "generation_config.json").write_text(chosen)
    read = transformers.GenerationConfig.from_pretrained(folder)
    assert our_answers(folder) == reference_answers(reference, read)


ORIGINALS = {
    "the published settings": (
        {"num_beams": 3, "early_stopping": True, "no_repeat_ngram_size": 3},
        {"num_beams": 3, "early_stopping": False},
    ),
    "a penalty": (
        {"num_beams": 3, "early_stopping": True, "length_penalty": 2.0, "no_repeat_ngram_size": 0},
        {"num_beams": 3, "early_stopping": False, "length_penalty": -1.0},
    ),
    "beams of its own": (
        {"num_beams": 2, "early_stopping": False, "no_repeat_ngram_size": 2},
        {"num_beams": 5, "early_stopping": True, "no_repeat_ngram_size": 0},
    ),
}


@pytest.mark.parametrize("case", ORIGINALS)
def test_original_layout_as_the_publishers_code_runs_it(reference, tmp_path, case):
    text_config, outer = ORIGINALS[case]
    network = load_weights(open_checkpoint("demo"), torch.float32)
    content = original_files(network)
    config = json.loads(content["config.json"])
    config["text_config"] |= {"early_stopping": None, **FORCED, **text_config}
    folder = tmp_path / "original"
    folder.mkdir()
    content["config.json"] = json.dumps(config).encode()
    content["generation_config.json"] = json.dumps(outer).encode()
    for name in ("tokenizer.json", "preprocessor_config.json"):
        content[name] = (DEMO / "checkpoint" / name).read_bytes()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    # That code calls generate() of its language model, which has settings from its own section
    # of the config; those of the outer model, from generation_config.json, are never asked.
    inner = transformers.GenerationConfig.from_model_config(dict(config["text_config"]))
    assert our_answers(folder) == reference_answers(reference, inner)
