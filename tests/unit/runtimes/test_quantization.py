"""Layers in 8 and 4 bits: which they are, how far off they are, and where they are refused."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recorders import CPU, CUDA, GPU, TABLE, TapingRecorder, pixels_of
from torch import nn

from florence2 import Florence2
from florence2.checkpoint.checkpoint import load_weights, open_checkpoint
from florence2.conversion.kept import check_choice
from florence2.engine.checks import check_where_it_fits, self_test
from florence2.engine.engine import Engine
from florence2.errors import DeviceError, PrecisionError
from florence2.network.config import tiny_config
from florence2.network.florence import Florence2Network
from florence2.runtimes import quantization
from florence2.runtimes.cuda_graphs import GraphRunner
from florence2.runtimes.device import (
    SCHEMES,
    Quantization,
    check_precision,
    choose_precision,
    parse_quantization,
)
from florence2.runtimes.quantization import (
    Int8Linear,
    Nf4Linear,
    PackedInt8Linear,
    check_quantization,
)
from florence2.runtimes.torch import TorchRuntime

pytest.importorskip("bitsandbytes")

IMAGES = np.random.default_rng(6).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
PROMPTS = [[0, 5, 6, 2], [0, 9, 8, 7, 4, 2], [0, 2]]
LAYERS = {"int8": Int8Linear, "nf4": Nf4Linear, "int8:decoder": PackedInt8Linear}
ENCODER, DECODER = "language_model.encoder.layers.", "language_model.decoder.layers."
TOWER = "vision_tower.blocks."
DEVICES = [pytest.param(CPU, id="cpu"), pytest.param(CUDA, id="cuda", marks=GPU)]


@pytest.fixture(scope="module")
def wide_network():
    """Random and tiny, of widths that blocks of 64 fit into; it magnifies errors as base does."""
    torch.manual_seed(3)
    config = tiny_config(embed_dim=(64, 64, 64, 64), d_model=64, head_dim=16)
    network = Florence2Network(config)
    for weight in network.parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=0.6 / weight.shape[1] ** 0.5)
    return network


@pytest.fixture
def runtime_in(wide_network):
    """Makes a runtime of the network in a precision."""

    def make(precision, device=CPU, graphs=None):
        return TorchRuntime(copy.deepcopy(wide_network), device, precision, graphs)

    return make


def error(found, expected):
    found, expected = found.float().cpu(), expected.float().cpu()
    return float((found - expected).norm() / expected.norm())


def logits_of(runtime, features, prompts=PROMPTS):
    with runtime.computing():
        return runtime.start(list(features), prompts, 3, 8).prefill()


SPELLINGS = {
    "int8": ("int8", "decoder"),
    "nf4": ("nf4", "decoder"),
    "int8:decoder": ("int8", "decoder"),
    "int8:text": ("int8", "text"),
    "int8:vision": ("int8", "vision"),
    "nf4:all": ("nf4", "all"),
    "int8:": None,
    "int8:head": None,
    "int4": None,
    "bf16": None,
    "bf16:all": None,
    "auto": None,
}


@pytest.mark.parametrize(("precision", "wanted"), SPELLINGS.items(), ids=SPELLINGS)
def test_a_precision_names_bits_and_a_part_of_the_network(precision, wanted):
    wanted = None if wanted is None else Quantization(*wanted)
    assert parse_quantization(precision, CPU) == wanted
    if wanted is not None and ":" not in precision:
        wanted = wanted._replace(part="text")
    assert parse_quantization(precision, CUDA) == wanted


PARTS = {
    "decoder": (DECODER,),
    "text": (ENCODER, DECODER),
    "vision": (TOWER,),
    "all": (ENCODER, DECODER, TOWER),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("part", "places"), PARTS.items(), ids=PARTS)
def test_all_linear_layers_of_a_part_are_quantised_and_nothing_else(
    runtime_in, wide_network, scheme, part, places
):
    network = runtime_in(f"{scheme}:{part}").network
    plain = {
        name
        for name, module in wide_network.model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(places)
    }
    left = {name for name, module in network.model.named_modules() if isinstance(module, nn.Linear)}
    assert not plain & left
    before = dict(wide_network.named_parameters())
    for name, value in network.named_parameters():
        assert torch.equal(value, before[name].to(torch.bfloat16)), name
    assert network.is_tied
    quantised = [
        name
        for name, module in network.model.named_modules()
        if isinstance(module, LAYERS.get(f"{scheme}:{part}", LAYERS[scheme]))
    ]
    assert all(name.startswith(places) for name in quantised)
    # Of q, k and v of self-attention there is one, and of k and v of cross-attention.
    own, cross = (
        sum(f".{kind}.k_proj" in name for name in plain) for kind in ("self_attn", "encoder_attn")
    )
    assert len(quantised) == len(plain) - 2 * own - cross


ERRORS = {
    # precision: the most that features and logits may be off, float32 being exact
    "bf16": (0.015, 0.015),
    "int8:decoder": (0.015, 0.02),
    "int8:text": (0.015, 0.02),
    "nf4:text": (0.015, 0.15),
    "int8:vision": (0.03, 0.02),
    "nf4:vision": (0.2, 0.06),
    "int8:all": (0.03, 0.025),
    "nf4:all": (0.2, 0.2),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("precision", "most"), ERRORS.items(), ids=ERRORS)
def test_features_and_logits_are_near_those_in_float32(runtime_in, precision, most, device):
    exact, runtime = runtime_in("fp32"), runtime_in(precision, device)
    expected, found = (one.encode_bytes(IMAGES, TABLE) for one in (exact, runtime))
    assert 0 < error(found, expected) < most[0]
    assert 0 < error(logits_of(runtime, found), logits_of(exact, expected)) < most[1]


QUANTISED = ["int8:decoder", *(f"{scheme}:all" for scheme in SCHEMES)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", QUANTISED)
def test_a_batch_is_its_items_one_by_one(runtime_in, precision, device):
    runtime = runtime_in(precision, device)
    features = runtime.encode_bytes(IMAGES, TABLE)
    logits = logits_of(runtime, features)
    for place in range(3):
        alone = runtime.encode_bytes(IMAGES[place : place + 1], TABLE)
        assert error(alone[0], features[place]) < 0.02
        # A prompt alone has no padding, and few rows are multiplied in another way.
        found = logits_of(runtime, features[place : place + 1], [PROMPTS[place]])
        assert error(found[0], logits[place]) < 0.02


@pytest.mark.parametrize("precision", QUANTISED)
def test_recorded_work_is_the_same_work(runtime_in, precision):
    recorder = TapingRecorder()
    runtime = runtime_in(precision, graphs=GraphRunner(recorder))
    features = [runtime.encode_bytes(IMAGES[:2], TABLE) for _ in range(3)][-1]
    logits = [logits_of(runtime, features, PROMPTS[:2]) for _ in range(3)][-1]
    assert runtime.graphs.is_enabled
    assert "replay" in recorder.events
    with runtime.graphs.paused():
        assert error(runtime.encode_bytes(IMAGES[:2], TABLE), features) < 1e-6
        # Recorded prompts are padded further.
        assert error(logits_of(runtime, features, PROMPTS[:2]), logits) < 0.02


SMALLER = {
    # precision: bytes of a quantised weight of 64 x 64 and its bias, without bf16's 2 * 65 * 64
    "int8": 64 * (64 + 4 + 2),
    "nf4": 64 * (32 + 4 + 2),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("scheme", "num_bytes"), SMALLER.items(), ids=SMALLER)
def test_the_bytes_of_weights_are_those_that_are_kept(runtime_in, scheme, num_bytes, device):
    plain, runtime = runtime_in("bf16", device), runtime_in(f"{scheme}:all", device)
    # All layers are made of such squares, each with its bias but for those that narrow.
    layers = [m for m in runtime.network.modules() if isinstance(m, LAYERS[scheme])]
    kept = sum(b.numel() * b.element_size() for layer in layers for b in layer.buffers())
    replaced = sum(_bytes_in_bf16(layer) for layer in layers)
    assert plain.weight_bytes - runtime.weight_bytes == replaced - kept
    square = next(layer for layer in layers if layer.bias.numel() == 64 and _width(layer) == 64)
    assert sum(b.numel() * b.element_size() for b in square.buffers()) == num_bytes
    runtime.close()
    assert runtime.weight_bytes == 0


def _width(layer):
    packed = 2 if isinstance(layer, Nf4Linear) else 1
    return packed * layer.weight.numel() // layer.bias.numel()


def _bytes_in_bf16(layer):
    return 2 * layer.bias.numel() * (_width(layer) + 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", QUANTISED)
def test_parked_layers_come_back_as_they_were(runtime_in, precision, device):
    runtime = runtime_in(precision, device)
    before, num_bytes = runtime.encode_bytes(IMAGES, TABLE).cpu(), runtime.weight_bytes
    runtime.park()
    assert runtime.network.device == CPU
    assert runtime.weight_bytes == (num_bytes if device == CPU else 0)
    runtime.resume()
    assert runtime.weight_bytes == num_bytes
    assert error(runtime.encode_bytes(IMAGES, TABLE), before) < 1e-6


@pytest.mark.parametrize("precision", ["int8", "int8:text", "int8:all", "nf4:text", "nf4:all"])
def test_a_checkpoint_answers_in_it(checkpoint_folder, precision):
    checkpoint = open_checkpoint(checkpoint_folder)
    runtime = TorchRuntime(load_weights(checkpoint, torch.bfloat16), CPU, precision)
    engine = Engine(checkpoint, runtime, image_batch=2, prompt_batch=8, cache_bytes=2**24)
    assert self_test(engine) > 0
    assert Florence2(engine).precision == precision
    assert check_where_it_fits(checkpoint, runtime, PlentyOfRoom(), is_error=True) is (
        not precision.endswith("all")
    )


class PlentyOfRoom:
    def free_bytes(self):
        return 2**40

    def peak_bytes(self, work):
        raise NotImplementedError


REFUSED = {
    # precision, device: what the sentence says
    "the tower on a CPU": ("int8:all", CPU, r"'int8:all' of the torch runtime is for GPUs"),
    "the encoder on a CPU": ("int8:text", CPU, r"'openvino' with 'int8', or precision 'int8' with"),
    "4 bits on a CPU": ("nf4", CPU, r"'nf4' of the torch runtime is for GPUs"),
}


@pytest.mark.parametrize(("precision", "device", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_had_is_refused_in_a_sentence(precision, device, words):
    with pytest.raises(DeviceError, match=words) as caught:
        check_quantization(precision, device)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("precision", ["int8:head", "int8:", "int4", None, 8])
def test_a_precision_that_does_not_exist_is_refused_with_those_that_do(precision):
    with pytest.raises(DeviceError, match=rf"'{precision}'.*int8, nf4"):
        check_precision(precision, CPU)


def test_the_openvino_runtime_has_bits_of_its_own():
    with pytest.raises(DeviceError, match=r"'int8:decoder' is of the torch runtime"):
        check_choice("openvino", CPU, "int8:decoder")


@pytest.fixture
def cpu_with(monkeypatch):
    """A CPU that multiplies bf16 itself, or that does not."""

    def set_to(has_bf16):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)

    return set_to


@pytest.mark.parametrize("precision", ["int8", "int8:decoder"])
def test_a_cpu_that_emulates_bf16_has_no_use_for_int8_in_it(cpu_with, precision):
    cpu_with(True)
    check_choice("torch", CPU, precision)
    assert choose_precision(precision, CPU, 768) == precision
    assert choose_precision("auto", CPU, 768) == "bf16"
    cpu_with(False)
    with pytest.raises(DeviceError, match=r"AVX-512 BF16 or AMX.*; use runtime 'openvino' or"):
        check_choice("torch", CPU, precision)


def test_int8_is_loaded_by_name_on_a_cpu(cpu_with, checkpoint_folder):
    cpu_with(True)
    model = Florence2.load(checkpoint_folder, device="cpu", runtime="torch", precision="int8")
    assert model.precision == "int8"
    assert model.run("<OD>", IMAGES[0], max_new_tokens=8).token_ids


def test_the_refusal_comes_before_anything_is_downloaded():
    with pytest.raises(DeviceError, match="is for GPUs"):
        Florence2.load("Florence-2-large", device="cpu", precision="nf4", offline=True)


@pytest.fixture
def a_gpu(monkeypatch):
    """A GPU of a compute capability."""
    monkeypatch.setattr(torch.version, "hip", None)

    def of(capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    of((8, 0))
    return of


def test_integers_are_multiplied_by_gpus_from_turing_on(a_gpu):
    check_quantization("int8", CUDA)
    a_gpu((7, 0))
    check_quantization("nf4", CUDA)
    with pytest.raises(DeviceError, match=r"7\.5 or newer, and this one has 7\.0; use precision"):
        check_quantization("int8", CUDA)


def test_without_the_library_the_sentence_says_how_to_install_it(a_gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(DeviceError, match=r"pip install 'serve-florence-2\[quantized\]'`\.$"):
        check_quantization("nf4", CUDA)


def test_a_library_that_is_too_old_is_told_by_what_it_lacks(a_gpu, monkeypatch):
    monkeypatch.setattr(torch.ops, "bitsandbytes", SimpleNamespace())
    with pytest.raises(DeviceError, match=r"with int8_vectorwise_quant, which \d.*does not have"):
        check_quantization("int8", CUDA)


def no_kernel(*_, **__):
    raise RuntimeError("no kernel image\nis available for this device")


def zeros(rows, *_, **__):
    return torch.zeros(len(rows), 192)


def no_numbers_of_many(rows, *_, **__):
    return torch.full((len(rows), 192), torch.nan if len(rows) > 4 else 0.0)


BROKEN = {
    # name: (what the library does, the error, what its sentence says)
    "it fails": (no_kernel, DeviceError, "on cpu: no kernel image is available for this device; "),
    "it is wrong": (zeros, PrecisionError, "at most 0.3 from the exact ones.* and are 1 from them"),
    "no numbers of many rows": (no_numbers_of_many, PrecisionError, "and are nan from them"),
}


@pytest.mark.parametrize(("gemm", "kind", "words"), BROKEN.values(), ids=BROKEN)
def test_a_library_that_does_not_work_here_is_found_out_while_loading(
    runtime_in, monkeypatch, gemm, kind, words
):
    known = torch.ops.bitsandbytes
    broken = SimpleNamespace(quantize_4bit=known.quantize_4bit, gemm_4bit=gemm)
    monkeypatch.setattr(quantization, "operations", lambda scheme: broken)
    with pytest.raises(kind, match=words):
        runtime_in("nf4:text")


def no_memory(*_, **__):
    raise torch.OutOfMemoryError("no memory left")


def test_memory_that_ends_is_no_fault_of_the_library(runtime_in, monkeypatch):
    monkeypatch.setattr(
        quantization, "operations", lambda scheme: SimpleNamespace(quantize_4bit=no_memory)
    )
    with pytest.raises(torch.OutOfMemoryError):
        runtime_in("nf4:text")


@pytest.mark.parametrize(("precision", "aligned"), [("int8:all", 4), ("nf4:all", 32)])
def test_layers_too_narrow_for_the_library_stay_as_they_are(precision, aligned):
    torch.manual_seed(1)
    network = Florence2Network(tiny_config(embed_dim=(16, 32, 32, 64)))
    runtime = TorchRuntime(network, CPU, precision)
    left = {
        layer.in_features
        for layer in runtime.network.model.vision_tower.modules()
        if isinstance(layer, nn.Linear)
    }
    assert left == ({16} if aligned == 32 else set())
    assert torch.isfinite(runtime.encode_images(pixels_of(IMAGES)).float()).all()
