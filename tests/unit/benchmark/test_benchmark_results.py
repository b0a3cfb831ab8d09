"""Rows: what a further image or prompt costs, the file of a run, and the plot drawn from it."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from benchmark_tools import a_row

from florence2.benchmark.plan import Case
from florence2.benchmark.report import draw_plot
from florence2.benchmark.results import growth_of, load_rows, save_rows
from florence2.errors import RequestError

DOCS = Path(__file__).resolve().parents[3] / "docs"
MACHINE = {"processor": "A & B", "threads": 2, "torch": "2", "transformers": "5"}
SVG = "{http://www.w3.org/2000/svg}"


def bars(svg, kind):
    rects = ElementTree.fromstring(svg).iter(f"{SVG}rect")
    # The first of a kind is the legend's.
    return [float(one.get("width")) for one in rects if one.get("class") == kind][1:]


def words(svg):
    return [one.text for one in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_bars_are_as_long_as_the_ratios():
    svg = draw_plot([a_row((1.0, 4.0, 2.0, 4.0)), a_row((2.0, 2.0, 1.0, 4.0))], MACHINE)
    [four, one], [two, half] = bars(svg, "fp32"), bars(svg, "bf16")
    assert [four / one, two / one, half / one] == pytest.approx([4, 2, 0.5], rel=0.01)
    assert {"4.00x", "2.00x", "1.00x", "0.50x"} <= set(words(svg))


def test_a_figure_that_is_not_there_has_no_bar_but_a_reason():
    rows = [
        a_row((1, 4, None, 4)),
        a_row((1, 4, None, 4), failed={"reference_bf16": "no memory"}),
        a_row((None, 4, 2, 4), failed={"ours": "no memory"}),
    ]
    svg = draw_plot(rows, MACHINE)
    assert (len(bars(svg, "fp32")), len(bars(svg, "bf16"))) == (2, 0)
    assert {"not measured", "failed"} <= set(words(svg))


def test_no_row_is_still_a_plot():
    assert "reference in float32" in words(draw_plot([], MACHINE))


def test_the_plot_of_the_docs_is_the_one_of_their_file():
    machine, rows = load_rows(DOCS / "benchmark.json")
    assert (DOCS / "benchmark.svg").read_text(encoding="utf-8") == draw_plot(rows, machine)


def test_a_saved_run_comes_back_as_it_was(tmp_path):
    rows = [a_row((1.5, 4.0, None, 5.0), failed={"reference_bf16": "no memory"})]
    file = tmp_path / "new" / "rows.json"
    save_rows(file, MACHINE, rows)
    assert load_rows(file) == (MACHINE, rows)
    assert [path.name for path in file.parent.iterdir()] == ["rows.json"]


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"machine": {}, "rows": [{"a": 1}]}'])
def test_a_file_without_rows_is_refused_in_one_sentence(content, tmp_path):
    file = tmp_path / "rows.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(RequestError, match=r"rows.json is none; name such a file\."):
        load_rows(file)


def test_the_slope_of_a_line_is_found_for_each_side():
    # ours 1 + 0.25 K, the reference 4 K, others 5 K
    rows = [
        a_row((1 + 0.25 * count, 4.0 * count, 2.0 * count, 5.0 * count), Case(1, count, 3, 30))
        for count in (20, 1, 5)
    ]
    [growth] = growth_of(rows)
    assert (growth.per, growth.counts) == ("prompt", (1, 5, 20))
    assert growth.slopes_s == pytest.approx(
        {"ours": 0.25, "reference_fp32": 4.0, "reference_bf16": 2.0, "others": 5.0}
    )
    # (1 + 0.25 K) / K at 1, 5, 20
    assert growth.each_s["ours"] == pytest.approx((1.25, 0.45, 0.3))


def test_images_and_prompts_are_series_of_their_own():
    cases = [Case(1, 1, 3, 30), Case(8, 1, 3, 30), Case(1, 5, 3, 30), Case(8, 5, 3, 30)]
    rows = [a_row((1.0 * case.asks, 1.0, 1.0, 1.0), case) for case in cases]
    found = {growth.per: growth.counts for growth in growth_of(rows)}
    assert found == {"image": (1, 8), "prompt": (1, 5)}


def test_rows_that_differ_otherwise_are_no_series():
    alike = (1, 1, 1, 1)
    rows = [a_row(alike, precision="fp32"), a_row(alike, Case(1, 5, 3, 30))]
    assert growth_of(rows) == []


def test_a_side_without_all_figures_has_no_slope():
    rows = [
        a_row((1, 4, None, 5), failed={"reference_bf16": "no memory"}),
        a_row((2, 20, 9, 25), Case(1, 5, 3, 30)),
    ]
    [growth] = growth_of(rows)
    assert set(growth.slopes_s) == {"ours", "reference_fp32", "others"}
