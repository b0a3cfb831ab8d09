"""Reports in one HTML file: everything in them is escaped, and nothing comes from elsewhere."""

import math
import re

import pytest
from html_pages import EVIL, Tags
from PIL import Image

from florence2.evaluation.html_report import Curve, Histogram, HtmlReport, Link, Thumbnail


def full_report():
    report = HtmlReport(EVIL)
    report.section(EVIL)
    report.text(EVIL)
    report.code(EVIL)
    report.table((EVIL, "b"), [(EVIL, 1), (EVIL, None)])
    report.curves([Curve(EVIL, [(0, 0), (1, math.nan), (2, 5)]), Curve("b", [(0, 1)])], EVIL, EVIL)
    report.curves([], "x", "y")
    report.picture(Image.new("RGBA", (9, 9)), EVIL)
    report.verdict(EVIL, "bad")
    report.counts([(EVIL, 12_345), ("b", EVIL)])
    report.table(("c",), [(Link(EVIL, EVIL),), (Link(EVIL, "a'\"><b>"),), (Histogram([0, 3]),)])
    report.thumbnails([Thumbnail(b"jpeg", [Link(EVIL), Link(EVIL, "b.jpg")])])
    return report


def test_every_text_is_escaped_and_every_tag_has_its_end():
    tags = Tags(full_report().render())
    tags.check()
    assert "<script" in "".join(tags.text)


def test_nothing_is_loaded_from_elsewhere():
    tags = Tags(full_report().render())
    sources = tags.values("src")
    assert sources
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    (policy,) = [value for name, value in tags.attributes if name == "content" and "src" in value]
    assert policy.startswith("default-src 'none';")


def test_the_file_is_utf_8_whatever_the_names_are(tmp_path):
    full_report().write(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert r"\x1b[31m\x00\ud800" in page
    assert not re.search("[\x00-\x08\x0b-\x1f]", page)


@pytest.mark.parametrize(
    ("cells", "shown"),
    [
        ((0.12345, 7, None), ["0.123", "7", ""]),
        ((math.nan, "0.5 (0.4-0.6)", True), ["", "0.5 (0.4-0.6)", "True"]),
    ],
)
def test_cells_are_short(cells, shown):
    report = HtmlReport("A title")
    report.table(("a", "b", "c"), [cells])
    assert re.findall(r"<td[^>]*>([^<]*)</td>", report.render()) == shown


def test_curves_are_inside_of_their_picture():
    report = HtmlReport("A title")
    report.curves([Curve("a", [(-5, 1e6), (7, 1e6), (9, 2e6)])], "step", "loss")
    (line,) = re.findall(r'<polyline points="([^"]*)"', report.render())
    points = [tuple(map(float, point.split(","))) for point in line.split()]
    assert all(0 <= x <= 520 and 0 <= y <= 300 for x, y in points)
    assert points[0][1] == points[1][1] > points[2][1]


@pytest.mark.parametrize(
    ("href", "is_linked"),
    [
        ("", False),
        ("javascript:alert(1)", False),
        ("JavaScript:alert(1)", False),
        ("data:text/html,x", False),
        ("file:///etc/passwd", False),
        ("project/ds0/img/a%20b.jpg", True),
        ("../photos/javascript%3Aalert%281%29.jpg", True),
        ("https://app.example.org/app/images/1/2/3/4#image-5", True),
    ],
)
def test_a_link_leads_into_a_folder_or_to_a_web_page_and_nowhere_else(href, is_linked):
    report = HtmlReport("a")
    report.table(("image",), [(Link("5.jpg", href),)])
    tags = Tags(report.render())
    assert tags.values("href") == ([href] if is_linked else [])
    assert "5.jpg" in tags.text


def test_bars_are_as_high_as_their_counts_and_what_is_there_is_seen():
    report = HtmlReport("a")
    report.table(("scores",), [(Histogram([0, 1, 10_000]),)])
    [outline] = [value for value in Tags(report.render()).values("d") if value.count("v") > 1]
    heights = [float(up) for up in re.findall(r"v-([\d.]+)", outline)]
    assert len(heights) == 2
    assert heights[0] >= 1
    assert heights[1] > 10 * heights[0]
