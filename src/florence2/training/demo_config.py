"""The size and shape of the demo checkpoint: a real Florence-2, small enough to train on a CPU.

Same network, tokenizer scheme, task prompts and location bins as the published checkpoints; the
vision tower keeps 16 pixels per visual token (its last stage does not halve the grid again), so
that a 192-pixel input still has 144 tokens to locate things with.
"""

from __future__ import annotations

from typing import Final

from florence2.network.config import NetworkConfig
from florence2.tokens import ADDED_TOKENS

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
