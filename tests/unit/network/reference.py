"""The reference network with the same random weights, and small helpers to compare with it."""

from __future__ import annotations

import dataclasses

import torch

from florence2.network.config import NetworkConfig, tiny_config
from florence2.network.florence import Florence2Network

TINY: dict[str, NetworkConfig] = {
    "demo strides": tiny_config(),
    "published strides": tiny_config(patch_stride=(4, 2, 2, 2), window_size=2),
    "two stages": tiny_config(
        embed_dim=(16, 24),
        depths=(1, 2),
        patch_stride=(4, 2),
        window_size=5,
        layers=(1, 1),
        max_positions=256,
    ),
    "wide window": tiny_config(
        embed_dim=(8, 16, 32), depths=(1, 1, 1), patch_stride=(4, 2, 2), window_size=12
    ),
    "scaled embedding": dataclasses.replace(
        tiny_config(), text=dataclasses.replace(tiny_config().text, scale_embedding=True)
    ),
}
IMAGE_SIZES_HW = [(64, 64), (80, 112)]


def random_network(config, seed=0, gain=0.7):
    """Weights that make every part matter: biases and norms are random too.

    Products keep the size of their input, or rounding would grow from layer to layer.
    """
    torch.manual_seed(seed)
    network = Florence2Network(config)
    for name, parameter in network.named_parameters():
        with torch.no_grad():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim == 1 or "embed" in name or "shared" in name:
                parameter.normal_(std=0.1)
            else:
                parameter.normal_(std=gain * parameter[0].numel() ** -0.5)
    return network.prepare_for_inference()


def reference_of(network):
    """transformers' network with these weights, in their precision."""
    from transformers import Florence2Config, Florence2ForConditionalGeneration

    config = Florence2Config(**network.config.to_native_dict())
    with torch.device("meta"):
        reference = Florence2ForConditionalGeneration(config)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    reference.load_state_dict(state, strict=True, assign=True)
    reference.tie_weights()
    return reference.eval()


def reference_states(reference, pixels, ids, mask):
    """The encoder's states for images followed by prompts."""
    visual = reference.model.get_image_features(pixels).pooler_output
    vectors = torch.cat([visual, reference.get_input_embeddings()(ids)], dim=1)
    full = torch.cat([mask.new_ones(visual.shape[:2]), mask], dim=1).long()
    encoder = reference.model.language_model.encoder
    return encoder(inputs_embeds=vectors, attention_mask=full).last_hidden_state


def reference_logits(reference, ids, states, mask):
    """Teacher-forced logits [B, L, V]."""
    rows = reference.model.language_model.decoder(
        input_ids=ids, encoder_hidden_states=states, encoder_attention_mask=mask.long()
    ).last_hidden_state
    return reference.lm_head(rows)


def relative_error(ours, reference):
    """The largest difference over the largest reference value."""
    difference = (ours.float() - reference.float()).abs().max()
    return float(difference / reference.float().abs().max())


def rms_error(ours, reference):
    """The norm of the difference over the reference's norm, for reduced precision."""
    return float((ours.float() - reference.float()).norm() / reference.float().norm())


def prompts(lengths, vocab_size):
    """Prompts <s> ... </s> padded on the right, and their mask."""
    ids = torch.full((len(lengths), max(lengths)), 1)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(4, vocab_size, (length,))
        ids[row, 0], ids[row, length - 1] = 0, 2
    return ids, ids != 1
