"""Torch on a device: its settings are ours only while we compute, and pixels are the host's."""

from __future__ import annotations

import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from recorders import CPU

from florence2.pixels import ImageProcessor
from florence2.runtimes.torch import computing, normalise, upload

PRODUCTS, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn


def settings():
    parts = (PRODUCTS, CUDNN.conv, CUDNN.rnn)
    return [part.fp32_precision for part in parts], torch.backends.cuda.cudnn_sdp_enabled()


HOSTS = {
    # name: (what products of float32 may be, the precisions of parts, whether cuDNN attends)
    "as torch starts": (None, {}, True),
    "TF32 for products": ("high", {}, True),
    "bf16 for products of a CPU too": ("medium", {}, True),
    "exact convolutions": (None, {CUDNN.conv: "ieee"}, True),
    "both of torch's ways": (None, {PRODUCTS: "tf32", CUDNN.rnn: "ieee"}, True),
    "no attention of cuDNN's": (None, {}, False),
}


@pytest.fixture(params=HOSTS.values(), ids=HOSTS)
def host(request):
    """What the host program has set; torch's own start is put back afterwards."""
    (products, conv, rnn), attention = settings()
    told, parts, has_attention = request.param
    if told is not None:
        torch.set_float32_matmul_precision(told)
    for part, precision in parts.items():
        part.fp32_precision = precision
    if not has_attention:
        torch.backends.cuda.enable_cudnn_sdp(False)
    yield settings()
    torch.set_float32_matmul_precision("highest")
    PRODUCTS.fp32_precision, CUDNN.conv.fp32_precision = products, conv
    CUDNN.rnn.fp32_precision = rnn
    torch.backends.cuda.enable_cudnn_sdp(attention)


def test_a_gpu_computes_float32_as_such_and_needs_another_attention_and_a_cpu_nothing(host):
    with computing("cuda", "fp32"):
        precisions, attention = settings()
        assert "tf32" not in precisions
        assert not attention
    assert settings() == host
    with computing("cuda", "bf16"):
        assert settings() == (host[0], False)
    assert settings() == host
    with computing("cpu", "fp32"):
        assert settings() == host


def test_whoever_leaves_first_does_not_take_the_settings_away(host):
    entered, leave = threading.Event(), threading.Event()

    def compute():
        with computing("cuda", "fp32"):
            entered.set()
            leave.wait(30)

    other = threading.Thread(target=compute)
    with computing("cuda", "fp32"):
        other.start()
        assert entered.wait(30)
    assert "tf32" not in settings()[0]
    leave.set()
    other.join()
    assert settings() == host


def test_an_error_gives_them_back(host):
    with pytest.raises(ZeroDivisionError), computing("cuda", "fp32"):
        raise ZeroDivisionError
    assert settings() == host


@pytest.mark.parametrize("told", ["highest", "high", "medium"])
def test_a_program_can_read_afterwards_what_it_told_torch(told):
    torch.set_float32_matmul_precision(told)
    on_cpu = torch.backends.mkldnn.matmul.fp32_precision
    try:
        with computing("cuda", "fp32"):
            pass
        assert torch.get_float32_matmul_precision() == told
        assert torch.backends.mkldnn.matmul.fp32_precision == on_cpu
    finally:
        torch.set_float32_matmul_precision("highest")
        PRODUCTS.fp32_precision = "none"


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
def test_what_is_no_image_or_table_is_refused(runtime, images, table):
    with pytest.raises(ValueError, match=r"was received\.$"):
        runtime.encode_bytes(images, table)
