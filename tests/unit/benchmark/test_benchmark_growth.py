"""What a further image or prompt costs, fitted to the rows."""

from __future__ import annotations

import pytest

from florence2.benchmark.plan import Case
from florence2.benchmark.rows import growth_of


def test_the_slope_of_a_line_is_found_for_each_side(make_row):
    # ours 1 + 0.25 K, the reference 4 K, others 5 K
    rows = [
        make_row((1 + 0.25 * count, 4.0 * count, 2.0 * count, 5.0 * count), Case(1, count, 3, 30))
        for count in (20, 1, 5)
    ]
    [growth] = growth_of(rows)
    assert (growth.per, growth.counts) == ("prompt", (1, 5, 20))
    assert growth.slopes_s == pytest.approx(
        {"ours": 0.25, "reference_fp32": 4.0, "reference_bf16": 2.0, "others": 5.0}
    )
    # (1 + 0.25 K) / K at 1, 5, 20
    assert growth.each_s["ours"] == pytest.approx((1.25, 0.45, 0.3))


def test_images_and_prompts_are_series_of_their_own(make_row):
    cases = [Case(1, 1, 3, 30), Case(8, 1, 3, 30), Case(1, 5, 3, 30), Case(8, 5, 3, 30)]
    rows = [make_row((1.0 * case.asks, 1.0, 1.0, 1.0), case) for case in cases]
    found = {growth.per: growth.counts for growth in growth_of(rows)}
    assert found == {"image": (1, 8), "prompt": (1, 5)}


def test_rows_that_differ_otherwise_are_no_series(make_row):
    one, five = Case(1, 1, 3, 30), Case(1, 5, 3, 30)
    rows = [make_row((1, 1, 1, 1), one, precision="fp32"), make_row((1, 1, 1, 1), five)]
    assert growth_of(rows) == []


def test_a_side_without_all_figures_has_no_slope(make_row):
    rows = [
        make_row((1, 4, None, 5), Case(1, 1, 3, 30), failed={"reference_bf16": "no memory"}),
        make_row((2, 20, 9, 25), Case(1, 5, 3, 30)),
    ]
    [growth] = growth_of(rows)
    assert set(growth.slopes_s) == {"ours", "reference_fp32", "others"}
