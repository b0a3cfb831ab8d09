"""Pixels that are normalised on the device equal those of the host to the last bit."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from florence2.network.config import tiny_config
from florence2.network.florence import Florence2Network
from florence2.pixels import ImageProcessor
from florence2.runtimes.torch import TorchRuntime, normalise, upload

CPU = torch.device("cpu")
PROCESSOR = ImageProcessor(size_wh=(40, 32))
# Every byte in every channel, and the channels differ.
BYTES = np.arange(2 * 3 * 256, dtype=np.int64).reshape(2, 16, 16, 3) % 256
IMAGES = np.stack([BYTES, BYTES[:, ::-1]])[:, 0].astype(np.uint8)


def test_the_result_is_the_hosts():
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 70, 3), np.uint8))
    images = np.stack([PROCESSOR.resize(picture), PROCESSOR.resize(picture.rotate(180))])
    expected = [PROCESSOR.pixels(picture), PROCESSOR.pixels(picture.rotate(180))]
    found = normalise(torch.from_numpy(images), torch.from_numpy(PROCESSOR.lookup_table))
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), np.stack(expected))


def test_every_byte_has_the_value_of_its_channel():
    found = normalise(torch.from_numpy(IMAGES), torch.from_numpy(PROCESSOR.lookup_table)).numpy()
    for channel in range(3):
        expected = PROCESSOR.lookup_table[channel][IMAGES[..., channel]]
        assert np.array_equal(found[:, channel], expected)
    assert {value for channel in range(3) for value in IMAGES[..., channel].flat} == set(range(256))


def test_the_pixels_are_laid_out_as_the_network_reads_them():
    found = normalise(torch.from_numpy(IMAGES), torch.from_numpy(PROCESSOR.lookup_table))
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_an_array_of_another_owner_is_uploaded_without_a_warning():
    picture = np.asarray(Image.fromarray(IMAGES[0]))
    assert not picture.flags.writeable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(upload(picture, CPU).numpy(), picture)


def test_a_view_keeps_its_memory_order():
    view = np.zeros((2, 8, 8, 3), np.float32).transpose(0, 3, 1, 2)
    assert upload(view, CPU).is_contiguous(memory_format=torch.channels_last)


WRONG = {
    "pixels instead of bytes": (IMAGES.astype(np.float32), PROCESSOR.lookup_table),
    "channels first": (IMAGES.transpose(0, 3, 1, 2), PROCESSOR.lookup_table),
    "one image without a batch": (IMAGES[0], PROCESSOR.lookup_table),
    "a table of one channel": (IMAGES, PROCESSOR.lookup_table[:1]),
}


@pytest.mark.parametrize(("images", "table"), WRONG.values(), ids=WRONG)
def test_what_is_no_image_or_table_is_refused(images, table):
    runtime = TorchRuntime(Florence2Network(tiny_config()), CPU, "fp32")
    with pytest.raises(ValueError, match=r"was received\.$"):
        runtime.encode_bytes(images, table)
