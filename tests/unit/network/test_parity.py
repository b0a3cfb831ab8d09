"""Every stage gives the reference's values for the same random weights."""

from __future__ import annotations

import json

import pytest
import torch
from reference import (
    IMAGE_SIZES_HW,
    TINY,
    prompts,
    random_network,
    reference_logits,
    reference_of,
    reference_states,
    relative_error,
    rms_error,
)
from safetensors.torch import save_file

from florence2.errors import ImageError, RequestError
from florence2.network.config import base_config, large_config, tiny_config

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SIZES = {"base": base_config(), "large": large_config()}


def cases():
    for name, config in TINY.items():
        for size_hw in IMAGE_SIZES_HW:
            yield pytest.param(config, size_hw, torch.float32, (9, 6), 0.7, id=f"{name} {size_hw}")
        yield pytest.param(config, (64, 64), torch.bfloat16, (9, 6), 0.7, id=f"{name}, bfloat16")
    # With branches as strong as at tiny size, rounding alone reaches 2.8 % in the reference too.
    for name, config in SIZES.items():
        for dtype, gain in ((torch.float32, 0.7), (torch.bfloat16, 0.3)):
            values = config, (768, 768), dtype, (9,), gain
            yield pytest.param(*values, id=f"{name} {dtype}", marks=pytest.mark.slow)


@pytest.mark.parametrize(("config", "size_hw", "dtype", "lengths", "gain"), cases())
def test_every_stage_gives_the_references_values(config, size_hw, dtype, lengths, gain):
    """Ours in ``dtype`` against the reference in float32 with the same (rounded) weights."""
    limit = LIMITS[dtype]
    error = relative_error if dtype == torch.float32 else rms_error
    network = random_network(config, gain=gain).to(dtype)
    reference = reference_of(network).float()
    torch.manual_seed(1)
    pixels = torch.randn(len(lengths), 3, *size_hw).to(dtype)
    ids, mask = prompts(lengths, config.text.vocab_size)
    decoder_ids = torch.randint(0, config.text.vocab_size, (len(lengths), 11))
    exact = pixels.float()
    with torch.inference_mode():
        features, grid = network.model.vision_tower(pixels)
        expected = reference.model.vision_tower(exact).last_hidden_state
        assert grid == expected.shape[2:] == config.vision.grid(*size_hw)
        assert error(features, expected.flatten(2).transpose(1, 2)) < limit

        visual = network.encode_images(pixels)
        expected = reference.model.get_image_features(exact).pooler_output
        assert error(visual, expected) < limit

        states, full = network.encode_prompts(visual, ids, mask)
        expected = reference_states(reference, exact, ids, mask)
        assert error(states[full], expected[full]) < limit

        logits = network.decode(decoder_ids, states, full)
        expected = reference_logits(reference, decoder_ids, expected, full)
        assert error(logits, expected) < limit


def test_names_are_the_native_ones():
    network = random_network(tiny_config())
    reference = reference_of(network)
    assert set(network.state_dict()) == set(reference.state_dict())


def test_saved_state_loads_in_the_reference(tmp_path):
    from transformers import Florence2ForConditionalGeneration

    network = random_network(tiny_config())
    save_file(network.native_state(), tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(network.config.to_native_dict()))
    reference, report = Florence2ForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values())
    pixels = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = reference.eval().model.get_image_features(pixels).pooler_output
        assert relative_error(network.encode_images(pixels), expected) < LIMITS[torch.float32]


def test_every_parameter_is_trained():
    network = random_network(tiny_config()).requires_grad_(True)
    ids, mask = prompts([5, 7], 120)
    visual = network.encode_images(torch.randn(2, 3, 64, 64))
    logits = network.decode(ids, *network.encode_prompts(visual, ids, mask))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    assert [name for name, value in network.named_parameters() if value.grad is None] == []


def test_gradients_are_those_of_the_reference():
    network = random_network(tiny_config())
    reference = reference_of(network).requires_grad_(True)
    network.requires_grad_(True)
    torch.manual_seed(3)
    pixels = torch.randn(2, 3, 64, 64)
    ids, mask = prompts([5, 7], 120)
    states, full = network.encode_prompts(network.encode_images(pixels), ids, mask)
    network.decode(ids, states, full).square().mean().backward()
    expected = reference_states(reference, pixels, ids, mask)
    reference_logits(reference, ids, expected, full).square().mean().backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in network.named_parameters():
        scale = max(float(theirs[name].grad.abs().max()), 1e-4)
        assert float((parameter.grad - theirs[name].grad).abs().max()) / scale < 1e-3, name


def test_too_long_a_prompt_is_refused():
    network = random_network(tiny_config(max_positions=40))
    ids, mask = prompts([30], 120)
    visual = network.encode_images(torch.randn(1, 3, 64, 64))
    with pytest.raises(RequestError, match="at most 40 tokens"):
        network.encode_prompts(visual, ids, mask)


def test_too_large_a_grid_is_refused():
    network = random_network(tiny_config())
    with pytest.raises(ImageError, match="at most 50 rows and columns, got 51 x 4"):
        network.encode_images(torch.zeros(1, 3, 51 * 16, 64))
