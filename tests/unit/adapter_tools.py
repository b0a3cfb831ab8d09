"""LoRA adapters of a checkpoint, made and merged by peft, and adapters written tensor by tensor."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from florence2.tokenizer import Vocabulary

DEMO = Path(__file__).parents[2] / "demo" / "checkpoint"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT = "base_model.model."
QUERY = "model.language_model.encoder.layers.0.self_attn.q_proj"
WIDTH, RANK = 192, 2
PUBLIC_TARGETS = ["q_proj", "o_proj", "k_proj", "v_proj", "linear", "Conv2d", "fc2"]
"""Of the public guides, without lm_head; o_proj, linear and Conv2d are no names here."""


@functools.cache
@torch.inference_mode(False)
def reference_model(folder):
    """A checkpoint as transformers loads it; to be copied before it is changed."""
    from transformers import Florence2ForConditionalGeneration

    model = Florence2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    # A small checkpoint's config may not say which of its tokens stands for the image.
    model.config.image_token_id = Vocabulary.from_folder(folder).image_id
    return model.eval()


@torch.inference_mode(False)
def peft_adapter(folder, base, seed=0, scale=0.1, **config):
    """An adapter with random values, as peft saves it; the unmerged model of peft."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(reference_model(base)), LoraConfig(**config))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=scale)
            elif weight.requires_grad:
                weight += torch.randn_like(weight) * scale / 5
    model.save_pretrained(folder)
    return model.eval()


def change_config(folder, **changes: Any):
    path = folder / CONFIG
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(settings))


def pair(module=QUERY, shapes=((RANK, WIDTH), (WIDTH, RANK)), seed=0):
    """The two halves of a module's LoRA."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{PEFT}{module}.lora_{half}.weight": torch.randn(shape, generator=generator) * 0.05
        for half, shape in zip("AB", shapes, strict=True)
    }


def write_adapter(folder, state=None, base="demo", **settings: Any):
    """A small adapter of the demo checkpoint, of one module unless there is a ``state``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(pair() if state is None else state, folder / WEIGHTS)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4} | settings
    config = {"base_model_name_or_path": base, **settings}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def renamed(folder, out, names):
    """A copy of an adapter under other names of modules, such as those of the original layout."""
    out.mkdir()
    state = {}
    for name, value in load_file(folder / WEIGHTS).items():
        module, end = name.removeprefix(PEFT).rsplit(".lora_", 1)
        state[f"{PEFT}{names[module]}.lora_{end}"] = value
    save_file(state, out / WEIGHTS)
    (out / CONFIG).write_text((folder / CONFIG).read_text())
    return out
