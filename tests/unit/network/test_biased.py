"""A linear layer of the tower gives what ``functional.linear`` gives, whatever adds its bias."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from florence2.network import linear as biased
from florence2.network.linear import BiasedLinear, has_biased_product


def layer_of(dtype: torch.dtype, bias: bool = True) -> BiasedLinear:
    layer = BiasedLinear(24, 40, bias=bias)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (300, 24), (2, 5, 6, 24)])
def test_values_are_those_of_torch(shape: tuple[int, ...], dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    layer = layer_of(dtype, bias)
    values = torch.randn(shape).to(dtype)
    with torch.inference_mode():
        result = layer(values)
        expected = functional.linear(values, layer.weight, layer.bias)
    assert result.shape == expected.shape
    torch.testing.assert_close(result, expected, rtol=1.6e-2, atol=1e-5)


def test_rows_apart_in_memory_are_multiplied_too() -> None:
    layer = layer_of(torch.bfloat16)
    values = torch.randn(4, 9, 24).to(torch.bfloat16)[:, :5]
    with torch.inference_mode():
        torch.testing.assert_close(layer(values), layer(values.contiguous()))


def test_gradients_reach_weight_and_bias() -> None:
    layer = layer_of(torch.bfloat16).requires_grad_(True)
    layer(torch.ones(3, 24, dtype=torch.bfloat16)).sum().backward()
    assert layer.bias.grad is not None
    assert torch.equal(layer.bias.grad, torch.full((40,), 3.0, dtype=torch.bfloat16))
    assert layer.weight.grad is not None


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, TypeError])
def test_a_torch_without_the_call_multiplies_in_the_plain_way(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise error("no such call")

    layer, values = layer_of(torch.bfloat16), torch.ones(3, 24, dtype=torch.bfloat16)
    monkeypatch.setattr(biased, "_biased_product", refuse)
    has_biased_product.cache_clear()
    try:
        with torch.inference_mode():
            assert not has_biased_product()
            expected = functional.linear(values, layer.weight, layer.bias)
            assert torch.equal(layer(values), expected)
    finally:
        has_biased_product.cache_clear()


def test_a_call_with_other_values_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(biased, "_biased_product", lambda rows, weight, bias: rows @ weight.t())
    has_biased_product.cache_clear()
    try:
        assert not has_biased_product()
    finally:
        has_biased_product.cache_clear()
