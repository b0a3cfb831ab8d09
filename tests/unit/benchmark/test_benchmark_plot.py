"""The plot shows the rows of the file it is drawn from."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from florence2.benchmark.report import draw_plot
from florence2.benchmark.rows import load_rows, save_rows
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


def test_bars_are_as_long_as_the_ratios(make_row):
    svg = draw_plot([make_row((1.0, 4.0, 2.0, 4.0)), make_row((2.0, 2.0, 1.0, 4.0))], MACHINE)
    [four, one], [two, half] = bars(svg, "fp32"), bars(svg, "bf16")
    assert [four / one, two / one, half / one] == pytest.approx([4, 2, 0.5], rel=0.01)
    assert {"4.00x", "2.00x", "1.00x", "0.50x"} <= set(words(svg))


def test_a_figure_that_is_not_there_has_no_bar_but_a_reason(make_row):
    rows = [
        make_row((1, 4, None, 4)),
        make_row((1, 4, None, 4), failed={"reference_bf16": "no memory"}),
        make_row((None, 4, 2, 4), failed={"ours": "no memory"}),
    ]
    svg = draw_plot(rows, MACHINE)
    assert (len(bars(svg, "fp32")), len(bars(svg, "bf16"))) == (2, 0)
    assert {"not measured", "failed"} <= set(words(svg))


def test_no_row_is_still_a_plot():
    assert "reference in float32" in words(draw_plot([], MACHINE))


def test_the_plot_of_the_docs_is_the_one_of_their_file():
    machine, rows = load_rows(DOCS / "benchmark.json")
    assert (DOCS / "benchmark.svg").read_text(encoding="utf-8") == draw_plot(rows, machine)


def test_a_saved_run_comes_back_as_it_was(make_row, tmp_path):
    rows = [make_row((1.5, 4.0, None, 5.0), failed={"reference_bf16": "no memory"})]
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
