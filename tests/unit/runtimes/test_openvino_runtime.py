"""The OpenVINO runtime against torch's on the same weights, and what an engine asks of it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from openvino_tools import (
    Twins,
    largest_error,
    random_prompts,
    relative_error,
    searches,
    small_config,
    twins_of,
    write_small_checkpoint,
)

from florence2.errors import RequestError
from florence2.pixels import ImageProcessor
from florence2.runtimes.openvino import ConvertedNetwork, OpenVinoRuntime, cpu_computes_int8

pytestmark = pytest.mark.usefixtures("has_openvino")

TABLE = ImageProcessor().lookup_table
EXACT = 1e-5
"""Of float32: what rounding makes in another order of sums."""


def changed(config, **parts):
    """A network with other fields in its parts."""
    return dataclasses.replace(
        config,
        **{name: dataclasses.replace(getattr(config, name), **new) for name, new in parts.items()},
    )


TANH = {"activation": "gelu_pytorch_tanh"}
RELU = {"activation": "relu"}
NETWORKS = {
    # name: (config, size of images, whether lm_head shares the embedding's weight)
    "windows that divide it, and a head of its own": (small_config(window_size=4), (64, 64), False),
    "windows that do not divide a wide image, and gelu by tanh": (
        changed(small_config(), vision=TANH, text=TANH),
        (112, 80),
        True,
    ),
    "a window larger than the image, and relu": (
        changed(small_config(window_size=20), vision=RELU, text=RELU),
        (64, 64),
        True,
    ),
    "published strides, and no bias of attention": (
        changed(small_config(patch_stride=(4, 2, 2, 2), window_size=2), vision={"qkv_bias": False}),
        (160, 96),
        True,
    ),
    "two stages, a tall image, norms after the patches, and scaled embeddings": (
        changed(
            small_config(embed_dim=(16, 24), depths=(1, 2), patch_stride=(4, 2), layers=(1, 1)),
            vision={"patch_prenorm": (False, False)},
            text={"scale_embedding": True},
        ),
        (48, 96),
        True,
    ),
}


@pytest.mark.parametrize(("config", "size_wh", "is_tied"), NETWORKS.values(), ids=NETWORKS)
def test_every_network_computes_what_torch_does(tmp_path, config, size_wh, is_tied):
    folder = write_small_checkpoint(tmp_path / "small", config, size_wh, is_tied)
    twins = twins_of(folder, tmp_path / "converted")
    assert twins.torch.network.is_tied is is_tied
    pixels = twins.pixels(2)
    features = twins.torch.encode_images(pixels)
    found = twins.openvino.encode_images(pixels)
    assert found.shape == features.shape
    assert largest_error(found, features) < EXACT
    both = searches(twins, list(features), [6, 9], beams=3)
    assert both.prefill() < EXACT
    assert both.steps(4) < EXACT


@pytest.fixture(scope="module")
def twins(tmp_path_factory) -> Twins:
    folder = tmp_path_factory.mktemp("twins")
    return twins_of(write_small_checkpoint(folder / "small"), folder / "converted")


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("lengths", [[7], [5, 5], [6, 11, 4]], ids=["alone", "equal", "different"])
def test_long_searches_have_torchs_logits(twins, beams, lengths):
    both = searches(twins, twins.features(len(lengths)), lengths, beams)
    assert both.prefill() < EXACT
    # More than a session has room for at first.
    assert both.steps(40) < EXACT


def test_a_batch_gives_what_its_prompts_give_alone(twins):
    features, prompts = twins.features(3), random_prompts([6, 11, 4])
    tokens = torch.tensor([[9], [300], [1200]])
    together = twins.openvino.start(features, prompts, 1, 9)
    first, then = together.prefill().clone(), together.step(tokens).clone()
    for number, (image, prompt) in enumerate(zip(features, prompts, strict=True)):
        alone = twins.openvino.start([image], [prompt], 1, 9)
        assert largest_error(alone.prefill()[0], first[number]) < EXACT
        assert largest_error(alone.step(tokens[number : number + 1])[0], then[number]) < EXACT


@pytest.mark.parametrize("beams", [1, 3])
def test_items_leave_and_join_a_running_batch(twins, beams):
    features = twins.features(3)
    running = searches(twins, features, [6, 9, 5], beams)
    running.prefill()
    running.steps(5)
    running.keep([2, 0])
    assert running.steps(2) < EXACT
    # One with a longer prompt, and two that are at another step.
    for lengths, steps, places in (([12], 0, [1]), ([4, 7], 3, [0, 1])):
        joining = searches(twins, features[: len(lengths)], lengths, beams, seed=7)
        assert joining.prefill() < EXACT
        assert steps == 0 or joining.steps(steps) < EXACT
        running.put(places, joining)
        assert running.steps(3) < EXACT
    # An item may be named twice, and grows apart from itself.
    running.keep([1, 0, 1])
    assert running.steps(35) < EXACT


def test_several_sessions_are_open_while_images_are_encoded(twins):
    features = twins.features(2)
    both = [
        searches(twins, features[:count], lengths, beams, seed=beams)
        for count, lengths, beams in ((1, [6], 1), (2, [9, 5], 3), (1, [6], 3))
    ]
    assert max(one.prefill() for one in both) < EXACT
    for _ in range(3):
        assert max(one.step() for one in both) < EXACT
        pixels = twins.pixels(1)
        found = twins.openvino.encode_images(pixels)
        assert largest_error(found, twins.torch.encode_images(pixels)) < EXACT


def test_features_stay_when_other_images_are_encoded(twins):
    pixels = twins.pixels(2)
    first = twins.openvino.encode_images(pixels[:1])
    before = first.clone()
    other = twins.openvino.encode_images(pixels[1:])
    assert torch.equal(first, before)
    assert not torch.equal(first, other)


def test_bytes_are_normalised_as_torch_does(twins):
    width, height = twins.checkpoint.image_processor.size_wh
    images = np.random.default_rng(1).integers(0, 256, (3, height, width, 3), np.uint8)
    found = twins.openvino.encode_bytes(images, TABLE)
    assert largest_error(found, twins.torch.encode_bytes(images, TABLE)) < EXACT
    assert torch.equal(found[1:2], twins.openvino.encode_bytes(images[1:2], TABLE))
    for wrong in (images[0], images.astype(np.float32), images.transpose(0, 3, 1, 2)):
        with pytest.raises(ValueError, match=r"was received\.$"):
            twins.openvino.encode_bytes(wrong, TABLE)


LIMITS = {
    # name: (tokens of the prompt, limit of the answer, what is said)
    "a prompt beyond the positions": (200, 5, "at most 128 tokens, got"),
    "a limit beyond the positions": (6, 129, "max_new_tokens may be at most 128"),
}


@pytest.mark.parametrize(("length", "limit", "said"), LIMITS.values(), ids=LIMITS)
def test_what_has_no_position_is_refused_in_torchs_words(twins, length, limit, said):
    sentences = []
    for runtime in (twins.openvino, twins.torch):
        with pytest.raises(RequestError, match=said) as caught:
            runtime.start(twins.features(1), random_prompts([length]), 1, limit)
        sentences.append(str(caught.value))
    assert sentences[0] == sentences[1]


def test_the_last_position_is_the_last(twins):
    session = twins.openvino.start(twins.features(1), random_prompts([6]), 2, 128)
    session.prefill()
    for _ in range(126):
        assert session.step(torch.full((1, 2), 7)).isfinite().all()
    with pytest.raises(RequestError, match="at most 128 tokens, got 129"):
        session.step(torch.full((1, 2), 7))


def test_a_prompt_that_is_not_finite_spoils_itself_only(twins):
    features = twins.features(2)
    prompts = random_prompts([6, 9])
    expected = twins.openvino.start(features, prompts, 1, 5).prefill()[1].clone()
    features[0] = torch.full_like(features[0], torch.nan)
    found = twins.openvino.start(features, prompts, 1, 5).prefill()
    assert found[0].isnan().any()
    assert largest_error(found[1], expected) < EXACT


def test_memory_is_counted_given_back_and_freed_for_good(twins):
    folder = twins.converted_folder
    own = OpenVinoRuntime(ConvertedNetwork(folder, twins.checkpoint.config.text, "fp32"))
    stored = [*folder.glob("*.bin"), folder / "embeddings.safetensors"]
    assert own.weight_bytes == sum(path.stat().st_size for path in stored) > 100_000
    pixels = np.zeros((1, 3, 64, 64), np.float32)
    before = own.encode_images(pixels)
    session = own.start([before[0]], random_prompts([6]), 1, 9)
    session.prefill()
    expected = session.step(torch.tensor([[8]])).clone()
    for give_back in (own.free_memory, own.park, own.resume):
        give_back()
        assert torch.equal(own.encode_images(pixels), before)
        session = own.start([before[0]], random_prompts([6]), 1, 9)
        session.prefill()
        assert torch.equal(session.step(torch.tensor([[8]])), expected)
    assert own.weight_bytes > 0
    own.close()
    own.close()
    assert own.weight_bytes == 0


def test_memory_is_given_back_between_the_steps_of_a_session(twins):
    both = searches(twins, twins.features(1), [6], beams=3)
    both.prefill()
    for _ in range(2):
        assert both.steps(2) < EXACT
        twins.openvino.free_memory()
    assert both.steps(2) < EXACT


ERRORS = {
    # name: (error, whether it means that there is no memory left)
    "Python": (MemoryError(), True),
    "torch": (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
    "C++": (RuntimeError("Exception from src/inference: std::bad_alloc"), True),
    "oneDNN": (RuntimeError("could not create a memory object: not enough memory"), True),
    "the system": (RuntimeError("mmap failed: Cannot allocate memory"), True),
    "another error": (RuntimeError("Can't set the input tensor: shapes differ"), False),
    "no error of a library": (ValueError("std::bad_alloc"), False),
}


@pytest.mark.parametrize(("error", "is_so"), ERRORS.values(), ids=ERRORS)
def test_a_lack_of_memory_is_known_by_its_words(twins, error, is_so):
    assert twins.openvino.is_out_of_memory(error) is is_so
    assert not twins.openvino.is_lost(error)


def test_it_says_what_it_is_and_how_long_passes_take(twins):
    own = twins.openvino
    assert (own.name, own.device, own.precision) == ("openvino", "cpu", "fp32")
    start = own.mark()
    with own.computing():
        own.encode_images(twins.pixels(1))
    assert own.mark().seconds_since(start) > 0


@pytest.fixture(scope="module")
def bf16(tmp_path_factory) -> Twins:
    folder = tmp_path_factory.mktemp("bf16")
    return twins_of(write_small_checkpoint(folder / "small"), folder / "converted", "bf16")


@pytest.mark.parametrize("beams", [1, 3])
def test_bf16_is_within_its_rounding(bf16, beams):
    pixels = bf16.pixels(2)
    exact = bf16.torch.encode_images(pixels)
    # 8 bits of mantissa: 0.4 % a number, and a few of them in a row.
    assert 1e-4 < relative_error(bf16.openvino.encode_images(pixels), exact) < 0.02
    both = searches(bf16, list(exact), [6, 9], beams, error=relative_error)
    assert 1e-4 < both.prefill() < 0.02
    assert 1e-4 < both.steps(40) < 0.02


def test_batches_of_bf16_are_joined_too(bf16):
    features = bf16.features(2)
    running = searches(bf16, features, [6, 9], 3, error=relative_error)
    joining = searches(bf16, features[:1], [12], 3, error=relative_error, seed=7)
    running.prefill()
    running.steps(2)
    joining.prefill()
    running.put([1], joining)
    assert running.steps(8) < 0.02


INSTRUCTIONS = {
    # name: (the file about the CPU, whether 8-bit products are worth their while)
    "AVX-512": ("processor : 0\nflags\t\t: fpu avx2 avx512_vnni\n", True),
    "AVX": ("flags : avx2 avx_vnni", True),
    "AMX": ("flags : amx_int8 amx_tile", True),
    "Arm": ("Features\t: fp asimd asimddp", True),
    "an old one": ("flags : fpu sse2 avx avx2 fma\n", False),
    "an old Arm": ("Features : fp asimd\n", False),
    "words that only begin so": ("flags : avx512_vnni_not_this\n", False),
    "a file that says nothing of it": ("processor : 0\nmodel name : a CPU\n", True),
}


@pytest.mark.parametrize(("text", "is_so"), INSTRUCTIONS.values(), ids=INSTRUCTIONS)
def test_a_cpu_says_whether_it_multiplies_8_bit_integers(tmp_path, text, is_so):
    (tmp_path / "cpuinfo").write_text(text)
    assert cpu_computes_int8(tmp_path / "cpuinfo") is is_so


def test_a_cpu_that_says_nothing_is_given_a_try(tmp_path):
    assert cpu_computes_int8(tmp_path / "nothing")


AFTER_MODELS = """
import gc, signal, sys
from pathlib import Path
from florence2.runtimes.openvino import CompiledModel

handled = []
signal.signal(signal.SIGINT, lambda *_: handled.append(True))
models = [CompiledModel(Path(path), "fp32", 1) for path in sys.argv[1:]]
while models:
    models.pop(0).close()
    gc.collect()
signal.raise_signal(signal.SIGINT)
print("handled" if handled else "not handled")
"""


def test_a_signal_is_handled_after_models_were_freed_in_the_order_of_their_making(twins):
    """As Ctrl-C in a script that has closed one model and opened another."""
    paths = [str(path) for path in sorted(twins.converted_folder.glob("*.xml"))]
    assert len(paths) == 3
    done = subprocess.run(
        [sys.executable, "-c", AFTER_MODELS, *paths], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "handled"), done.stderr
