"""Products with few rows give the same numbers in either form, whichever was measured faster."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from florence2.network import products
from florence2.network.florence import Florence2Network
from florence2.network.presets import tiny_config

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
        forms = {(dtype, weight.shape): (is_transposed,) * len(products.ROW_COUNTS)}
        monkeypatch.setattr(products, "_transposed", forms)
        for offset in (None, bias):
            found = products.product(rows, weight, offset)
            wanted = functional.linear(
                rows.double(), weight.double(), None if offset is None else offset.double()
            )
            assert found.is_contiguous()
            assert found.dtype == dtype
            error = (found - wanted).norm() / wanted.norm()
            assert error < TOLERANCE[dtype]


def test_the_form_is_chosen_by_the_count_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(8, 4)
    forms = {(weight.dtype, weight.shape): (False, True, False, True)}
    monkeypatch.setattr(products, "_transposed", forms)
    used: list[int] = []
    monkeypatch.setattr(
        products,
        "_transposed_product",
        lambda rows, weight, bias: used.append(len(rows)) or functional.linear(rows, weight, bias),
    )
    for count in range(1, 60):
        products.product(torch.randn(count, 4), weight, None)
    assert used == [2, 3, 4, *range(13, 49)]


def test_the_faster_form_is_chosen_and_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[str, torch.Size]] = []
    seconds = {"linear": 2.0, "_transposed_product": 1.0}

    def clock(form, rows, weight) -> float:
        measured.append((form.__name__, weight.shape))
        return seconds[form.__name__] if weight.shape == (8, 4) else 1.0

    monkeypatch.setattr(products, "_transposed", {})
    monkeypatch.setattr(products, "_seconds", clock)
    weights = [torch.randn(8, 4), torch.randn(8, 4), torch.randn(4, 8)]
    products.choose_forms(weights)
    assert products._transposed == {
        (torch.float32, torch.Size((8, 4))): (True,) * 4,
        (torch.float32, torch.Size((4, 8))): (False,) * 4,
    }
    count = len(measured)
    products.choose_forms(weights)
    assert len(measured) == count


def test_a_network_made_ready_has_a_form_for_every_weight_of_its_decoder() -> None:
    network = Florence2Network(tiny_config()).prepare_for_inference()
    decoder = network.model.language_model.decoder
    layer = decoder.layers[0]
    for weight in (network.lm_head.weight, layer.fc1.weight, layer.self_attn.out_proj.weight):
        assert (weight.dtype, weight.shape) in products._transposed
