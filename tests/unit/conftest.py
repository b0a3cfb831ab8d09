"""A small random checkpoint, a small tokenizer, and the reference's processor around it."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from openvino_tools import write_small_checkpoint
from tokenizers import ByteLevelBPETokenizer
from torch import nn

from florence2.network.florence import Florence2Network
from florence2.tasks import BANNED_PHRASES, TASKS
from florence2.tokenizer import Vocabulary
from florence2.tokens import ADDED_TOKENS, IMAGE, MASK, location_token
from florence2_demo.checkpoint import demo_config, save_checkpoint

# Machines that run tests are shared; how long an example takes says nothing there. A run tries the
# same examples as the last one; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("shared", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "shared"))

DEMO = Path(__file__).parents[2] / "demo" / "checkpoint"
BASE_SIZE = 700
SAMPLE_TEXTS = [
    *(task.sentence.replace("{input}", "a red car, two dogs and 龍") for task in TASKS),
    "A green car parked in front of a yellow building; café, naïve, 中文 и кириллица 👍🏽.",
    "the image shows people walking past 12 wheels of a truck",
]


@pytest.fixture(scope="session")
def original_folder(tmp_path_factory):
    """What an original repository holds: BART's vocabulary, none of Florence-2's own tokens."""
    folder = tmp_path_factory.mktemp("original")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        SAMPLE_TEXTS * 10,
        vocab_size=BASE_SIZE - 1,
        min_frequency=1,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        show_progress=False,
    )
    trained.save_model(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    vocab[MASK] = len(vocab)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def reference(original_folder):
    """The reference's processor, set up the way its own conversion script does it."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = transformers.RobertaTokenizer.from_pretrained(original_folder)
    tokens = [
        transformers.AddedToken(token, special=True, normalized=False)
        for token in (*ADDED_TOKENS, IMAGE)
    ]
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.image_token = IMAGE
    tokenizer.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
    image_processor = CLIPImageProcessorPil(
        size={"height": 768, "width": 768},
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    image_processor.image_seq_length = 5
    kinds = ["ocr", "pure_text", "description_with_bboxes", "description_with_polygons"]
    kinds += ["polygons", "bboxes", "description_with_bboxes_or_polygons"]
    return transformers.Florence2Processor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        post_processor_config={
            **{kind: {} for kind in kinds},
            "phrase_grounding": {"banned_grounding_tokens": sorted(BANNED_PHRASES)},
        },
    )


@pytest.fixture(scope="session")
def native_folder(reference, tmp_path_factory):
    """The same tokenizer saved by the reference: one file, its own ``<image>`` included."""
    folder = tmp_path_factory.mktemp("native")
    reference.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    """Random, tiny, and of small images: for what does not depend on how good an answer is."""
    return write_small_checkpoint(tmp_path_factory.mktemp("small") / "tiny")


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory):
    """Its answers hold a fair share of boxes, and it is sane in every precision."""
    folder = tmp_path_factory.mktemp("random")
    weights = shutil.ignore_patterns("config.json", "model.safetensors")
    shutil.copytree(DEMO, folder, ignore=weights, dirs_exist_ok=True)
    vocabulary = Vocabulary.from_folder(folder)
    torch.manual_seed(11)
    network = Florence2Network(demo_config(-(-vocabulary.size // 64) * 64))
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            nn.init.normal_(module.weight, std=1.2 / math.sqrt(module.weight[0].numel()))
    first = vocabulary.encode(location_token(0))[0]
    with torch.no_grad():
        network.model.language_model.shared.weight[first : first + 1000] *= 1.5
    save_checkpoint(network, folder)
    return folder
