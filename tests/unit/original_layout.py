"""The original layout's names for a native state, listed by hand from the published checkpoints."""

from __future__ import annotations

import torch

LINEAR = ("weight", "bias")


def original_names(config):
    """Original name -> native name of every weight but the projection and the tied copies."""
    return {
        **dict(_tower_names(config)),
        **dict(_bart_names(config)),
        "image_proj_norm.weight": "model.multi_modal_projector.image_proj_norm.weight",
        "image_proj_norm.bias": "model.multi_modal_projector.image_proj_norm.bias",
        "image_pos_embed.row_embeddings.weight": (
            "model.multi_modal_projector.image_position_embed.row_embeddings.weight"
        ),
        "image_pos_embed.column_embeddings.weight": (
            "model.multi_modal_projector.image_position_embed.column_embeddings.weight"
        ),
        "visual_temporal_embed.pos_idx_to_embed": (
            "model.multi_modal_projector.visual_temporal_embed.pos_idx_to_embed"
        ),
    }


def _tower_names(config):
    pairs = []
    for stage, depth in enumerate(config.vision.depths):
        for end in LINEAR:
            theirs, ours = f"vision_tower.convs.{stage}", f"model.vision_tower.convs.{stage}"
            pairs.append((f"{theirs}.proj.{end}", f"{ours}.conv.{end}"))
            pairs.append((f"{theirs}.norm.{end}", f"{ours}.norm.{end}"))
        for block in range(depth):
            for kind, attention in (("spatial", "window_attn"), ("channel", "channel_attn")):
                path = f"vision_tower.blocks.{stage}.{block}.{kind}_block"
                for theirs, ours in (
                    ("conv1.fn.dw", "conv1"),
                    ("conv2.fn.dw", "conv2"),
                    (f"{attention}.norm", "norm1"),
                    (f"{attention}.fn.qkv", f"{attention}.qkv"),
                    (f"{attention}.fn.proj", f"{attention}.proj"),
                    ("ffn.norm", "norm2"),
                    ("ffn.fn.net.fc1", "ffn.fc1"),
                    ("ffn.fn.net.fc2", "ffn.fc2"),
                ):
                    pairs += [
                        (f"{path}.{theirs}.{end}", f"model.{path}.{ours}.{end}") for end in LINEAR
                    ]
    return pairs


def _bart_names(config):
    names = ["shared.weight"]
    for part, layers in (
        ("encoder", config.text.encoder_layers),
        ("decoder", config.text.decoder_layers),
    ):
        names += [f"{part}.embed_positions.weight"]
        names += [f"{part}.layernorm_embedding.{end}" for end in LINEAR]
        attentions = ["self_attn"] + (["encoder_attn"] if part == "decoder" else [])
        modules = ["fc1", "fc2", "final_layer_norm"]
        for attention in attentions:
            modules += [f"{attention}.{piece}_proj" for piece in ("q", "k", "v", "out")]
            modules.append(f"{attention}_layer_norm")
        names += [
            f"{part}.layers.{layer}.{module}.{end}"
            for layer in range(layers)
            for module in modules
            for end in LINEAR
        ]
    return [(f"language_model.model.{name}", f"model.language_model.{name}") for name in names]


def original_state(native, config):
    """A native state as the original's files hold it, tied copies and zero bias included."""
    state = {theirs: native[ours] for theirs, ours in original_names(config).items()}
    projection = native["model.multi_modal_projector.image_projection.weight"]
    shared = native["model.language_model.shared.weight"]
    state["image_projection"] = projection.t().contiguous()
    state["language_model.final_logits_bias"] = torch.zeros(1, shared.shape[0])
    for copy in ("model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"):
        state[f"language_model.{copy}.weight"] = shared.clone()
    return state


ORIGINAL_CONFIG = {
    "auto_map": {"AutoModelForCausalLM": "modeling_florence2.Florence2ForConditionalGeneration"},
    "model_type": "florence2",
    "projection_dim": 768,
    "vocab_size": 51289,
    "text_config": {
        "activation_function": "gelu",
        "add_final_layer_norm": False,
        "d_model": 768,
        "decoder_attention_heads": 12,
        "decoder_ffn_dim": 3072,
        "decoder_layers": 6,
        "early_stopping": True,
        "encoder_attention_heads": 12,
        "encoder_ffn_dim": 3072,
        "encoder_layers": 6,
        "forced_bos_token_id": 0,
        "max_position_embeddings": 1024,
        "no_repeat_ngram_size": 3,
        "normalize_before": False,
        "num_beams": 3,
        "scale_embedding": False,
        "vocab_size": 51289,
    },
    "vision_config": {
        "model_type": "davit",
        "depths": [1, 1, 9, 1],
        "dim_embed": [128, 256, 512, 1024],
        "drop_path_rate": 0.1,
        "enable_checkpoint": False,
        "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
        "image_pos_embed": {"max_pos_embeddings": 50, "type": "learned_abs_2d"},
        "num_groups": [4, 8, 16, 32],
        "num_heads": [4, 8, 16, 32],
        "patch_padding": [3, 1, 1, 1],
        "patch_prenorm": [False, True, True, True],
        "patch_size": [7, 3, 3, 3],
        "patch_stride": [4, 2, 2, 2],
        "projection_dim": 768,
        "visual_temporal_embedding": {"max_temporal_embeddings": 100, "type": "COSINE"},
        "window_size": 12,
    },
}
