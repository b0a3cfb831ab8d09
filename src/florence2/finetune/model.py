"""The network that is trained: transformers' Florence-2 with the weights of any checkpoint of ours,
with a LoRA adapter of peft or without one.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recomputed
from transformers import Florence2Config, Florence2ForConditionalGeneration

from florence2.checkpoint.catalog import CHECKPOINT_NAMES
from florence2.checkpoint.checkpoint import Checkpoint, load_weights
from florence2.checkpoint.files import ADAPTER_CONFIG, CONFIG, SAFETENSORS, small_files, write_whole
from florence2.errors import RequestError
from florence2.finetune.examples import IGNORED
from florence2.finetune.plan import FineTuningPlan, LoraSettings
from florence2.network.config import is_original_config
from florence2.runtimes.device import choose_device
from florence2.runtimes.torch import normalise
from florence2.tokens import DECODER_START_ID, PAD_ID

_ADAPTER: Final = "default"
_HEAD: Final = "lm_head"
_VISION: Final = ("model.vision_tower.", "model.multi_modal_projector.")
_CACHE_BYTES: Final = 2 * 2**30
_FUSED_FROM_D_MODEL: Final = 512


@dataclass(slots=True)
class FineTuned:
    """A checkpoint on its way to a better one.

    ``florence`` is transformers' network, ``model`` the same or what peft has put around it.
    ``absent_targets`` are those of the plan that no layer of this network is called by.
    """

    checkpoint: Checkpoint
    florence: Florence2ForConditionalGeneration
    model: Any
    table: Tensor
    has_trained_vision: bool
    absent_targets: tuple[str, ...]
    kept: FeatureStore | None

    def visual(self, batch: dict[str, Tensor]) -> Tensor:
        """Visual tokens [B, N, d] of a batch's images.

        Where nothing in the tower is trained no gradients are kept, and where its images are never
        changed either each is encoded once.
        """
        if self.has_trained_vision:
            return self._encode(batch["scaled"])
        with torch.no_grad():
            if self.kept is None:
                return self._encode(batch["scaled"])
            return self.kept.features(batch, self._encode)

    def _encode(self, scaled: Tensor) -> Tensor:
        pixels = normalise(scaled, self.table.to(scaled.device))
        features: Tensor = self.florence.model.get_image_features(pixels).pooler_output
        return features

    def loss(self, batch: dict[str, Tensor], num_tokens: Tensor | int) -> Tensor:
        """Cross entropy of the answers' tokens, summed and divided by ``num_tokens``.

        The vision tower runs once for all questions about an image, and logits are made only where
        there is something to learn. Equal to the network's own loss otherwise.
        """
        visual, labels = self.visual(batch), batch["labels"]
        prompts, language = batch["prompt_ids"], self.florence.model.language_model
        seen = visual.index_select(0, batch["image_of"])
        words = language.shared(prompts).to(visual.dtype)
        mask = torch.cat([prompts.new_ones(seen.shape[:2]), (prompts != PAD_ID).long()], dim=1)
        shifted = labels.masked_fill(labels == IGNORED, PAD_ID).roll(1, dims=1)
        shifted[:, 0] = DECODER_START_ID
        states = language.encoder(
            inputs_embeds=torch.cat([seen, words], dim=1), attention_mask=mask
        ).last_hidden_state
        hidden = language.decoder(
            input_ids=shifted,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            use_cache=False,
        ).last_hidden_state
        learned = labels != IGNORED
        logits = self.florence.lm_head(hidden[learned])
        return functional.cross_entropy(logits.float(), labels[learned], reduction="sum") / (
            num_tokens
        )

    @torch.no_grad()
    def merged_state(self) -> dict[str, Tensor]:
        """The weights under native names in float32, with the adapter in them."""
        state = {
            name.replace(".base_layer.", "."): value.detach().float()
            for name, value in self.florence.state_dict().items()
            if ".lora_" not in name
        }
        for name, layer in self.florence.named_modules():
            if isinstance(layer, LoraLayer) and _ADAPTER in layer.lora_A:
                weight = f"{name}.weight"
                delta = layer.get_delta_weight(_ADAPTER).float()
                state[weight] = state[weight] + delta.to(state[weight].device)
        return state

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights that are trained."""
        return (named for named in self.florence.named_parameters() if named[1].requires_grad)

    def save(self, folder: Path) -> None:
        """An adapter's folder, or a checkpoint's in the native layout, into an empty ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.model, PeftModel):
            # The base of lm_head is the checkpoint's own, and stays there.
            self.model.save_pretrained(str(folder), save_embedding_layers=False)
            _without_traces(folder)
            return
        state = {
            name: value.contiguous().cpu()
            for name, value in self.merged_state().items()
            if not name.endswith("embed_tokens.weight")
            and (name != "lm_head.weight" or self._unties)
        }
        save_file(state, str(folder / SAFETENSORS), metadata={"format": "pt"})
        self._save_beside(folder, state["model.language_model.shared.weight"].shape[0])

    @property
    def _unties(self) -> bool:
        return not self.florence.config.tie_word_embeddings

    def _save_beside(self, folder: Path, vocab_size: int) -> None:
        config = self.checkpoint.config.with_vocab_size(vocab_size).to_native_dict()
        if self._unties:
            config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
        write_whole(folder / CONFIG, json.dumps(config, indent=2) + "\n")
        source = self.checkpoint.folder
        for name in small_files(source):
            if name not in (CONFIG, ADAPTER_CONFIG):
                shutil.copyfile(source / name, folder / name)
        # The search of the original layout's config.json is that of the new checkpoint.
        original = json.loads((source / CONFIG).read_text(encoding="utf-8"))
        if is_original_config(original):
            chosen = self.checkpoint.generation
            search = {
                "num_beams": chosen.num_beams,
                "early_stopping": chosen.early_stopping,
                "no_repeat_ngram_size": chosen.no_repeat_ngram_size,
                "length_penalty": chosen.length_penalty,
            }
            write_whole(folder / "generation_config.json", json.dumps(search, indent=2) + "\n")


class FeatureStore:
    """Visual tokens of images that never change, kept in the machine's memory by their places."""

    def __init__(self, most_bytes: int = _CACHE_BYTES) -> None:
        self._features: dict[int, Tensor] = {}
        self._room = most_bytes

    def features(self, batch: dict[str, Tensor], encode: Any) -> Tensor:  # noqa: ANN401
        """Those of a batch [B, N, d], made where they are not kept yet."""
        places, scaled = batch["places"].tolist(), batch["scaled"]
        new = [at for at, place in enumerate(places) if place not in self._features]
        made = dict(zip(new, encode(scaled[new]), strict=True)) if new else {}
        for at, features in made.items():
            size = features.numel() * features.element_size()
            if size <= self._room:
                self._room -= size
                self._features[places[at]] = features.cpu()
        found = [
            made[at] if at in made else self._features[place].to(scaled.device)
            for at, place in enumerate(places)
        ]
        return torch.stack(found)


def _without_traces(folder: Path) -> None:
    """Only what loading needs: peft's card of the model says nothing."""
    (folder / "README.md").unlink(missing_ok=True)


def make_model(checkpoint: Checkpoint, plan: FineTuningPlan) -> FineTuned:
    """The checkpoint's network, ready to be trained as the plan says; CheckpointError."""
    network = load_weights(checkpoint, torch.float32)
    state = network.native_state()
    config = Florence2Config(**network.config.to_native_dict())
    # An adapter's own dropout is the noise it learns with; a network that skips layers or drops
    # values besides is none whose features could be kept.
    config.vision_config.drop_path_rate = 0.0
    config.text_config.dropout = 0.0 if plan.has_adapter else plan.dropout
    config.text_config.attention_dropout = config.text_config.activation_dropout = 0.0
    targets = plan.lora.targets if plan.has_adapter else ()
    if "lm_head.weight" not in state and _HEAD in targets:
        # What is learned for the output must not leak into the embedding that it is tied to.
        state["lm_head.weight"] = state["model.language_model.shared.weight"].clone()
    if "lm_head.weight" in state:
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    with torch.device("meta"):
        florence = Florence2ForConditionalGeneration(config)
    florence.load_state_dict(state, strict=False, assign=True)
    embedding = florence.model.language_model.shared
    for part in (florence.model.language_model.encoder, florence.model.language_model.decoder):
        part.embed_tokens.weight = embedding.weight
    if config.tie_word_embeddings:
        florence.lm_head.weight = embedding.weight
    missing = [name for name, value in florence.state_dict().items() if value.is_meta]
    if missing:
        raise RequestError(
            f"transformers' network has weights that {checkpoint.name} has not ({missing[0]}); "
            "train from another checkpoint."
        )
    # On a CPU the backward pass of the fused attention is half of a small network's step.
    is_cpu = choose_device(plan.device).type == "cpu"
    is_small = checkpoint.config.text.d_model < _FUSED_FROM_D_MODEL
    florence.set_attn_implementation("eager" if is_cpu and is_small else "sdpa")
    florence.requires_grad_(True)
    absent: tuple[str, ...] = ()
    model: Any = florence
    if plan.has_adapter:
        model, absent = _with_adapter(florence, checkpoint, plan)
    elif plan.freeze_vision:
        florence.model.vision_tower.requires_grad_(False)
        florence.model.multi_modal_projector.requires_grad_(False)
    if plan.has_checkpointing:
        _save_memory(florence)
    has_trained_vision = any(
        name.startswith(_VISION)
        for name, value in florence.named_parameters()
        if value.requires_grad
    )
    keeps = not has_trained_vision and not plan.augmentations
    table = torch.from_numpy(checkpoint.image_processor.lookup_table)
    store = FeatureStore() if keeps else None
    return FineTuned(checkpoint, florence, model, table, has_trained_vision, absent, store)


def _with_adapter(
    florence: Florence2ForConditionalGeneration, checkpoint: Checkpoint, plan: FineTuningPlan
) -> tuple[PeftModel, tuple[str, ...]]:
    if checkpoint.adapter is not None:
        raise RequestError(
            f"An adapter is learned for full weights, and {checkpoint.name} is an adapter itself; "
            "train its base, or all weights with --method full."
        )
    present, absent = split_targets(florence, plan.lora, plan.freeze_vision)
    if not present:
        raise RequestError(
            f"No layer of {checkpoint.name} is called {', '.join(plan.lora.targets)}; name some of "
            f"{', '.join(sorted(_layer_names(florence)))}."
        )
    settings = LoraConfig(
        r=plan.lora.rank,
        lora_alpha=plan.lora.alpha,
        lora_dropout=plan.dropout,
        use_rslora=plan.lora.is_rank_stabilised,
        target_modules=list(present),
        exclude_modules=r"model\.(vision_tower|multi_modal_projector)\..*"
        if plan.freeze_vision
        else None,
        bias="none",
    )
    with warnings.catch_warnings():
        # Of names in transformers that peft still uses.
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(florence, settings)
    used = model.peft_config[_ADAPTER]
    used.base_model_name_or_path = _base_name(checkpoint)
    used.revision = checkpoint.revision
    return model, absent


def _base_name(checkpoint: Checkpoint) -> str:
    """What the adapter's users name the base by: a name, or the path of a folder.

    A name of ours is that checkpoint's also where a folder is called so.
    """
    if checkpoint.name not in CHECKPOINT_NAMES and Path(checkpoint.name).is_dir():
        return str(Path(checkpoint.name).absolute())
    return checkpoint.name


def split_targets(
    florence: nn.Module, lora: LoraSettings, freeze_vision: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The targets that layers are called by, and those that none is."""
    known = _layer_names(florence, freeze_vision)
    present = tuple(name for name in lora.targets if name in known)
    return present, tuple(name for name in lora.targets if name not in known)


def _layer_names(florence: nn.Module, freeze_vision: bool = False) -> set[str]:
    """The last parts of the names of all layers that can have an adapter."""
    return {
        name.rsplit(".", 1)[-1]
        for name, module in florence.named_modules()
        if isinstance(module, nn.Linear) and not (freeze_vision and name.startswith(_VISION))
    }


def _save_memory(florence: Florence2ForConditionalGeneration) -> None:
    """Computes activations again where the backward pass needs them, in all blocks."""
    florence.activation_checkpointing_enable({"use_reentrant": False})
    # transformers knows how for the layers of text only.
    for stage in florence.model.vision_tower.blocks:
        for block in stage:
            block.forward = partial(recomputed, block.forward, use_reentrant=False)
