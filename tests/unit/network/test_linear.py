"""Linear layers give what ``functional.linear`` gives, in whatever form they multiply."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from florence2.network import bart, davit
from florence2.network import bart as linear
from florence2.network.config import tiny_config
from florence2.network.florence import Florence2Network

SHAPES = [(64, 16), (16, 64), (16, 16)]
COUNTS = [1, 2, 4, 5, 12, 48, 49, 100]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def layer_of(kind, dtype, bias=True):
    layer = kind(24, 40, bias=bias)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer.to(dtype).requires_grad_(False)


def check_values(layer, values):
    with torch.inference_mode():
        found = layer(values)
        bias = None if layer.bias is None else layer.bias.double()
        wanted = functional.linear(values.double(), layer.weight.double(), bias)
    assert (found.shape, found.dtype) == (wanted.shape, values.dtype)
    assert found.is_contiguous()
    assert (found - wanted).norm() / wanted.norm() < TOLERANCE[values.dtype]


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("count", COUNTS)
def test_both_forms_are_the_same_product(is_transposed, dtype, count):
    for shape in SHAPES:
        for bias in (False, True):
            layer = bart.Linear(shape[1], shape[0], bias=bias)
            for parameter in layer.parameters():
                torch.nn.init.normal_(parameter)
            layer.to(dtype).choose_form({(dtype, layer.weight.shape): (is_transposed,) * 101})
            check_values(layer, torch.randn(count, shape[1]).to(dtype))


def used_counts(monkeypatch, layer):
    """For which counts of rows the layer multiplies in the transposed form."""
    used: list[int] = []

    def noting(rows, weight, bias):
        used.append(len(rows))
        return functional.linear(rows, weight, bias)

    monkeypatch.setattr(bart, "transposed_product", noting)
    for count in range(1, 60):
        layer(torch.randn(1, count, layer.in_features).to(layer.weight.dtype))
    return used


def clock_of(transposed_s, measured=None):
    """A clock by which the plain form takes 1 s and the other what is said of some rows."""

    def clock(form, rows, weight):
        if measured is not None:
            measured.append(weight.shape)
        is_special = weight.shape == (8, 6) and form is bart.transposed_product
        return transposed_s(len(rows)) if is_special else 1.0

    return clock


def test_the_measured_form_is_taken_by_the_count_of_rows_and_measured_once(monkeypatch):
    layers = [bart.Linear(6, 8), bart.Linear(6, 8), bart.Linear(8, 6)]
    weights = [layer.half().weight for layer in layers]
    measured: list[torch.Size] = []
    clock = clock_of(lambda count: 0.5 if count in (3, 24) else 0.95, measured)
    forms = linear.choose_forms(weights, clock=clock)
    assert set(measured) == {(8, 6), (6, 8)}
    num_measured = len(measured)
    assert linear.choose_forms(weights, clock=clock) == forms
    assert len(measured) == num_measured
    for layer in layers:
        layer.choose_form(forms)
    layers[0].bfloat16()  # A form is of one precision only.
    assert used_counts(monkeypatch, layers[0]) == []
    assert used_counts(monkeypatch, layers[1]) == [2, 3, 4, *range(13, 49)]
    assert used_counts(monkeypatch, layers[2]) == []


def test_no_clock_is_asked_for_the_form_of_float32():
    def clock(*_):
        raise AssertionError("float32 was measured")

    weight = torch.randn(4, 4)
    assert linear.choose_forms([weight, weight.to("meta")], clock=clock)[
        weight.dtype, weight.shape
    ][:2] == (False, True)


INTEL = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Xeon\n"
AMD = INTEL.replace("GenuineIntel", "AuthenticAMD")
ARM = "processor\t: 0\nCPU implementer\t: 0x41\n"
WIDENING, NARROWING = (64, 16), (16, 64)
RULE = {
    "AMD widens": (AMD, WIDENING, range(1, 7)),
    "AMD keeps the width": (AMD, (16, 16), range(1, 7)),
    "AMD narrows": (AMD, NARROWING, [1]),
    "Intel widens": (INTEL, WIDENING, [1]),
    "Intel narrows": (INTEL, NARROWING, [1]),
    "ARM widens": (ARM, WIDENING, [1]),
    "no description": (None, WIDENING, [1]),
}


@pytest.mark.parametrize(("processor", "shape", "transposed"), RULE.values(), ids=RULE)
def test_the_form_of_float32_is_a_rule_of_cpu_shape_and_rows(
    monkeypatch, tmp_path, processor, shape, transposed
):
    description = tmp_path / "cpuinfo"
    if processor is not None:
        description.write_text(processor)
    layer = bart.Linear(shape[1], shape[0])
    layer.choose_form(linear.choose_forms([layer.weight], description))
    assert used_counts(monkeypatch, layer) == list(transposed)


def test_a_network_made_ready_has_a_form_for_every_weight_of_its_decoder():
    network = Florence2Network(tiny_config()).bfloat16().prepare_for_inference()
    decoder = network.model.language_model.decoder
    for layer in (network.lm_head, decoder.layers[0].fc1, decoder.layers[0].self_attn.out_proj):
        assert len(layer.transposed) == 49
    network.float()
    assert network.lm_head.transposed == ()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(24,), (1, 24), (300, 24), (2, 5, 6, 24)])
def test_a_linear_layer_of_the_tower(shape, dtype, bias):
    torch.manual_seed(0)
    layer = layer_of(davit.Linear, dtype, bias)
    check_values(layer, torch.randn(shape).to(dtype))
    # Rows that are apart in memory are multiplied too.
    check_values(layer, torch.randn(4, 9, 24).to(dtype)[:, :5])


def test_gradients_reach_weight_and_bias_of_the_tower():
    layer = layer_of(davit.Linear, torch.bfloat16).requires_grad_(True)
    layer(torch.ones(3, 24, dtype=torch.bfloat16)).sum().backward()
    assert layer.bias.grad is not None
    assert torch.equal(layer.bias.grad, torch.full((40,), 3.0, dtype=torch.bfloat16))
    assert layer.weight.grad is not None


def refusing(error):
    def call(*_):
        raise error("no such call")

    return call


CALLS = {
    "a torch without the call": refusing(AttributeError),
    "a CPU without the call": refusing(RuntimeError),
    "a call with other arguments": refusing(TypeError),
    "a call with other values": lambda rows, weight, bias: rows @ weight.t(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_without_the_call_that_adds_the_bias_it_is_added_plainly(monkeypatch, call):
    layer, values = layer_of(davit.Linear, torch.bfloat16), torch.ones(3, 24, dtype=torch.bfloat16)
    monkeypatch.setattr(davit, "product_with_bias", call)
    davit.has_product_with_bias.cache_clear()
    try:
        with torch.inference_mode():
            assert not davit.has_product_with_bias()
            expected = functional.linear(values, layer.weight, layer.bias)
            assert torch.equal(layer(values), expected)
    finally:
        davit.has_product_with_bias.cache_clear()
