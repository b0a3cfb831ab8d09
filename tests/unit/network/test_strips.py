"""A tower that runs in strips gives the values of one that takes whole images."""

from __future__ import annotations

import pytest
import torch
from reference import IMAGE_SIZES_HW, TINY, random_network, reference_of, rms_error

from florence2.network import davit
from florence2.network.davit import runs_in_strips

FLOAT32_ERROR = 2e-6
# Strips round elsewhere; each of the two is this far from the values in float32.
BFLOAT16_ERROR = 2e-2

# Tokens of a strip: one row, a few rows, a few images.
STRIP_TOKENS = [1, 40, 700]


def limit_strips(monkeypatch, tokens):
    monkeypatch.setattr(davit, "STRIP_BYTES", 0)
    monkeypatch.setattr(davit, "STRIP_TOKENS", tokens)
    monkeypatch.setattr(davit, "STRIP_THREADS", 2**20)


@pytest.mark.parametrize("tokens", STRIP_TOKENS)
@pytest.mark.parametrize("size_hw", IMAGE_SIZES_HW)
@pytest.mark.parametrize("name", TINY)
def test_strips_give_the_values_of_whole_images(monkeypatch, name, size_hw, tokens):
    tower = random_network(TINY[name]).model.vision_tower
    limit_strips(monkeypatch, tokens)
    torch.manual_seed(1)
    pixels = torch.randn(3, 3, *size_hw)
    with torch.enable_grad():
        expected, expected_grid = tower(pixels)
    with torch.inference_mode():
        features, grid = tower(pixels)
        alone = torch.cat([tower(pixels[number, None])[0] for number in range(3)])
    assert grid == expected_grid
    assert rms_error(features, expected) < FLOAT32_ERROR
    assert rms_error(alone, expected) < FLOAT32_ERROR


@pytest.mark.parametrize("tokens", STRIP_TOKENS)
def test_strips_in_bfloat16_are_as_near_to_float32(monkeypatch, tokens):
    network = random_network(TINY["published strides"]).to(torch.bfloat16)
    reference = reference_of(network).float().model.vision_tower
    limit_strips(monkeypatch, tokens)
    torch.manual_seed(1)
    pixels = torch.randn(2, 3, 80, 112).to(torch.bfloat16)
    with torch.inference_mode():
        features, _ = network.model.vision_tower(pixels)
        expected = reference(pixels.float()).last_hidden_state.flatten(2).transpose(1, 2)
    assert rms_error(features, expected) < BFLOAT16_ERROR


def test_scores_of_half_precision_do_not_overflow(monkeypatch):
    limit_strips(monkeypatch, 100)
    attention = random_network(TINY["two stages"]).model.vision_tower.blocks[0][0]
    attention = attention.channel_block.half()
    attention.norm1.weight.fill_(60.0)
    image = torch.randn(1, 40, 40, 16).half()
    with torch.inference_mode():
        attention.run_in_strips(image, torch.empty_like(image))
    assert image.isfinite().all()


def test_pixels_are_left_as_they_are():
    tower = random_network(TINY["two stages"]).model.vision_tower
    pixels = torch.randn(1, 3, 64, 64)
    before = pixels.clone()
    with torch.inference_mode():
        tower(pixels)
    assert torch.equal(pixels, before)


def test_blocks_run_in_strips_only_without_gradients():
    image = torch.zeros(1, 2, 2, 4)
    assert not runs_in_strips(image)
    assert not runs_in_strips(image.to("meta"))
    with torch.no_grad():
        assert runs_in_strips(image)
        assert not runs_in_strips(image.to("meta"))


# (batch, height, width), tokens of a strip, multiple of rows -> rows of the first image's strips,
# images of the first strip.
CUTS = {
    "several whole images": ((5, 4, 4), 40, 1, [4], 2),
    "one whole image": ((2, 4, 4), 16, 1, [4], 1),
    "equal parts": ((1, 48, 4), 160, 1, [24, 24], 1),
    "a shorter last part": ((1, 7, 4), 8, 1, [2, 2, 2, 1], 1),
    "rows of windows": ((1, 30, 4), 60, 12, [12, 12, 6], 1),
    "at least one row of windows": ((1, 24, 4), 1, 12, [12, 12], 1),
    "at least one row": ((1, 3, 9), 1, 1, [1, 1, 1], 1),
    "a window higher than the image": ((2, 5, 4), 1, 12, [5], 1),
}


@pytest.mark.parametrize(("shape", "tokens", "side", "rows", "images"), CUTS.values(), ids=CUTS)
def test_cuts(monkeypatch, shape, tokens, side, rows, images):
    limit_strips(monkeypatch, tokens)
    image = torch.zeros(*shape, 8)
    cuts = list(davit.strips(image, side))
    for strip in cuts:
        image[strip] += 1
    assert (image == 1).all()
    assert [len(range(48)[row]) for number, row in cuts if number.start == 0] == rows
    assert cuts[0][0] == slice(0, images)


def test_strips_grow_with_the_threads(monkeypatch):
    image = torch.zeros(1, 192, 192, 256)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    few = len(list(davit.strips(image)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert few > 4 * len(list(davit.strips(image)))
