"""Which rows a plan has."""

from __future__ import annotations

import pytest

from florence2.benchmark.plan import FULL, Axes, BenchmarkPlan, Case, Subject, size_config
from florence2.runtimes.device import choose_device, choose_precision

CHOSEN_ROWS = [
    ("base", "fp32", Case(1, 1, 3, 30)),
    ("base", "fp32", Case(1, 1, 3, 100)),
    ("base", "bf16", Case(1, 1, 3, 30)),
    ("base", "bf16", Case(1, 1, 3, 100)),
    ("large", "bf16", Case(1, 1, 3, 30)),
    ("large", "bf16", Case(1, 1, 3, 100)),
    ("base", "bf16", Case(1, 5, 3, 30)),
    ("base", "bf16", Case(1, 5, 3, 100)),
    ("base", "bf16", Case(1, 20, 3, 30)),
    ("base", "bf16", Case(8, 1, 3, 30)),
    ("base", "bf16", Case(1, 1, 1, 30)),
]


@pytest.mark.parametrize(("size", "precision", "case"), CHOSEN_ROWS)
def test_the_chosen_rows_are_measured_without_naming_axes(size, precision, case):
    assert Subject(size, "torch", precision) in BenchmarkPlan().work()[size][case]


def test_the_full_plan_is_the_whole_product():
    work = BenchmarkPlan(FULL).work()
    # batch 1, 8, 32; prompts 1, 5, 20; beams 1, 3; tokens 30, 100
    assert [len(work[size]) for size in ("base", "large")] == [3 * 3 * 2 * 2] * 2
    assert all(len(subjects) == 2 for cases in work.values() for subjects in cases.values())


def test_blocks_that_name_a_row_twice_measure_it_once():
    block = Axes(("base",), tokens=(30,))
    assert BenchmarkPlan((block, block)).work() == BenchmarkPlan((block,)).work()


def test_automatic_precision_is_the_one_that_is_used():
    used = choose_precision("auto", choose_device("cpu"), size_config("base").text.d_model)
    [[subject]] = (
        BenchmarkPlan((Axes(("base",), precisions=("auto",), tokens=(30,)),))
        .work()["base"]
        .values()
    )
    assert subject.precision == used
