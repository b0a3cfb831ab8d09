"""The process's settings are ours while something computes, and the host program's otherwise."""

from __future__ import annotations

import threading

import pytest
import torch

from florence2.runtimes.torch import computing

PRODUCTS, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn


def settings():
    parts = (PRODUCTS, CUDNN.conv, CUDNN.rnn)
    return [part.fp32_precision for part in parts], torch.backends.cuda.cudnn_sdp_enabled()


def everything_faster():
    torch.set_float32_matmul_precision("high")


def everything_fastest():
    torch.set_float32_matmul_precision("medium")


def only_convolutions_exact():
    CUDNN.conv.fp32_precision = "ieee"


def by_both_ways():
    PRODUCTS.fp32_precision = "tf32"
    CUDNN.rnn.fp32_precision = "ieee"


def no_cudnn_attention():
    torch.backends.cuda.enable_cudnn_sdp(False)


HOSTS = {
    "as torch starts": lambda: None,
    "TF32 for products": everything_faster,
    "bf16 for products of a CPU too": everything_fastest,
    "exact convolutions": only_convolutions_exact,
    "both of torch's ways": by_both_ways,
    "no attention of cuDNN's": no_cudnn_attention,
}


@pytest.fixture(params=HOSTS.values(), ids=HOSTS)
def host(request):
    """What the host program has set; torch's own start is put back afterwards."""
    (products, conv, rnn), attention = settings()
    request.param()
    yield settings()
    torch.set_float32_matmul_precision("highest")
    PRODUCTS.fp32_precision, CUDNN.conv.fp32_precision = products, conv
    CUDNN.rnn.fp32_precision = rnn
    torch.backends.cuda.enable_cudnn_sdp(attention)


def test_float32_on_a_gpu_is_computed_in_float32(host):
    with computing("cuda", "fp32"):
        precisions, attention = settings()
        assert "tf32" not in precisions
        assert not attention
    assert settings() == host


def test_reduced_precision_needs_only_another_attention(host):
    with computing("cuda", "bf16"):
        assert settings() == (host[0], False)
    assert settings() == host


def test_a_cpu_leaves_everything_as_it_is(host):
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
