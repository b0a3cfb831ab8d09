"""Products with few rows give the same numbers in either form; which one is taken, and why."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from florence2.network import linear as products
from florence2.network.config import tiny_config
from florence2.network.florence import Florence2Network

SHAPES = [(64, 16), (16, 64), (16, 16)]
COUNTS = [1, 2, 4, 5, 12, 48, 49, 100]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("count", COUNTS)
def test_both_forms_are_the_same_product(
    monkeypatch: pytest.MonkeyPatch, is_transposed: bool, dtype: torch.dtype, count: int
) -> None:
    for shape in SHAPES:
        weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
        rows = torch.randn(count, shape[1]).to(dtype)
        monkeypatch.setattr(products, "_is_transposed", lambda *_: is_transposed)
        for offset in (None, bias):
            found = products.product(rows, weight, offset)
            wanted = functional.linear(
                rows.double(), weight.double(), None if offset is None else offset.double()
            )
            assert found.is_contiguous()
            assert found.dtype == dtype
            error = (found - wanted).norm() / wanted.norm()
            assert error < TOLERANCE[dtype]


def test_the_measured_form_is_chosen_by_the_count_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(8, 4, dtype=torch.bfloat16)
    forms = {(weight.dtype, weight.shape): (False, True, False, True)}
    monkeypatch.setattr(products, "_transposed", forms)
    used: list[int] = []
    monkeypatch.setattr(
        products,
        "_transposed_product",
        lambda rows, weight, bias: used.append(len(rows)) or functional.linear(rows, weight, bias),
    )
    for count in range(1, 60):
        products.product(torch.randn(count, 4).to(weight.dtype), weight, None)
    assert used == [2, 3, 4, *range(13, 49)]


def test_the_faster_form_is_chosen_and_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[str, torch.Size]] = []
    seconds = {"linear": 2.0, "_transposed_product": 1.0}

    def clock(form, rows, weight) -> float:
        measured.append((form.__name__, weight.shape))
        return seconds[form.__name__] if weight.shape == (8, 4) else 1.0

    monkeypatch.setattr(products, "_transposed", {})
    monkeypatch.setattr(products, "_seconds", clock)
    weights = [torch.randn(shape).bfloat16() for shape in ((8, 4), (8, 4), (4, 8))]
    products.choose_forms(weights)
    assert products._transposed == {
        (torch.bfloat16, torch.Size((8, 4))): (True,) * 4,
        (torch.bfloat16, torch.Size((4, 8))): (False,) * 4,
    }
    count = len(measured)
    products.choose_forms(weights)
    assert len(measured) == count


def test_no_clock_is_asked_for_the_form_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    def clock(*_: object) -> float:
        raise AssertionError("float32 was measured")

    monkeypatch.setattr(products, "_seconds", clock)
    monkeypatch.setattr(products, "_transposed", {})
    Florence2Network(tiny_config()).prepare_for_inference()
    assert products._transposed == {}


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
) -> None:
    description = tmp_path / "cpuinfo"
    if processor is not None:
        description.write_text(processor)
    monkeypatch.setattr(products, "_PROCESSOR", description)
    weight = torch.randn(shape)
    found = [count for count in range(1, 60) if products._is_transposed(count, weight)]
    assert found == list(transposed)


def test_a_network_made_ready_has_a_form_for_every_weight_of_its_decoder() -> None:
    network = Florence2Network(tiny_config()).bfloat16().prepare_for_inference()
    decoder = network.model.language_model.decoder
    layer = decoder.layers[0]
    for weight in (network.lm_head.weight, layer.fc1.weight, layer.self_attn.out_proj.weight):
        assert (weight.dtype, weight.shape) in products._transposed
