"""In reduced precision the best logits of every row are float32's of the same states."""

from __future__ import annotations

import pytest
import torch

from florence2.network import florence
from florence2.network.config import tiny_config
from florence2.network.florence import Florence2Network, top_candidates

NUM_EXACT = 16
REDUCED = [torch.bfloat16, torch.float16]


def network_of(dtype):
    torch.manual_seed(5)
    network = Florence2Network(tiny_config())
    # Logits of this size are rounded to sixteenths in bf16.
    torch.nn.init.normal_(network.lm_head.weight, mean=1.0, std=0.06)
    return network.to(dtype).prepare_for_inference()


def rows_of(network, *shape):
    torch.manual_seed(6)
    return torch.rand(*shape, network.config.text.d_model).to(network.dtype)


def exact_logits(network, rows):
    return rows.double() @ network.lm_head.weight.double().t()


@pytest.fixture(params=[0, 10**6], ids=["large vocabulary", "small vocabulary"])
def vocabulary(request, monkeypatch):
    monkeypatch.setattr(florence, "SMALL_VOCABULARY", request.param)
    monkeypatch.setattr(florence, "BLOCK", 4)


@pytest.mark.parametrize("dtype", REDUCED)
@pytest.mark.usefixtures("vocabulary")
def test_the_best_are_float32_and_no_longer_equal(dtype):
    network = network_of(dtype)
    rows = rows_of(network, 40, 3)
    with torch.inference_mode():
        found = network.next_logits(rows, NUM_EXACT)
        rounded = network.lm_head(rows).float()
    exact = exact_logits(network, rows)
    assert found.dtype == torch.float32
    assert found.shape == rounded.shape
    best = found.topk(2).values
    assert bool((best[..., 0] > best[..., 1]).all())
    assert bool((rounded.topk(2).values.diff() == 0).any())
    assert torch.equal(found.argmax(-1), exact.argmax(-1))
    changed = (found != rounded).sum(-1)
    assert int(changed.max()) <= NUM_EXACT < found.shape[-1]
    top = found.topk(6)
    assert torch.allclose(top.values.double(), exact.gather(-1, top.indices), rtol=1e-6)


@pytest.mark.parametrize("dtype", REDUCED)
def test_exact_logits_do_not_depend_on_who_else_is_in_the_batch(dtype):
    network = network_of(dtype)
    rows = rows_of(network, 7)
    with torch.inference_mode():
        together = network.next_logits(rows, NUM_EXACT).topk(3).values
        alone = [network.next_logits(row[None], NUM_EXACT).topk(3).values for row in rows]
    assert torch.equal(together, torch.cat(alone))


def test_all_are_exact_where_the_vocabulary_has_no_more():
    network = network_of(torch.bfloat16)
    rows = rows_of(network, 2, 3)
    with torch.inference_mode():
        found = network.next_logits(rows, 10**6)
    assert torch.allclose(found.double(), exact_logits(network, rows), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_is_left_as_it_is(dtype):
    network = network_of(dtype)
    rows = rows_of(network, 2, 3)
    with torch.inference_mode():
        assert torch.equal(network.next_logits(rows, NUM_EXACT), network.lm_head(rows))


@pytest.mark.parametrize("dtype", REDUCED)
def test_what_is_not_finite_stays_so(dtype):
    network = network_of(dtype)
    rows = rows_of(network, 2, 3)
    rows[0, 1] = torch.nan
    with torch.inference_mode():
        is_nan = network.next_logits(rows, NUM_EXACT).isnan()
    assert bool(is_nan[0, 1].all())
    assert int(is_nan.sum()) == is_nan.shape[-1]


@pytest.mark.parametrize("vocab", [50, 4096, 4097, 5120, 51289, 51328])
@pytest.mark.parametrize("count", [2, 6, 40])
def test_top_candidates_equals_topk(vocab, count):
    generator = torch.Generator().manual_seed(vocab + count)
    log_probs = torch.randn((4, vocab), generator=generator)
    log_probs[1, -count:] = 10 + torch.arange(count).float()
    log_probs[2, : vocab - count // 2] = float("-inf")
    values, ids = top_candidates(log_probs, count)
    assert torch.equal(values, torch.topk(log_probs, count).values)
    assert torch.equal(log_probs.gather(1, ids), values)
    assert all(len(set(row)) == count for row in ids.tolist())
