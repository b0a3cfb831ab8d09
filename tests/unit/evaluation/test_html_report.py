"""Reports in one HTML file: everything in them is escaped, and nothing comes from elsewhere."""

import math
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from florence2.evaluation.html_report import Curve, HtmlReport

EVIL = "<script src='http://example.org/x.js'>\"&'</script>\x1b[31m\x00\ud800"
# What may stand without an end.
VOID = ("meta", "img", "line", "rect", "polyline")


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.open, self.seen, self.attributes, self.text = [], set(), [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def full_report():
    report = HtmlReport(EVIL)
    report.section(EVIL)
    report.text(EVIL)
    report.code(EVIL)
    report.table((EVIL, "b"), [(EVIL, 1), (EVIL, None)])
    report.curves([Curve(EVIL, [(0, 0), (1, math.nan), (2, 5)]), Curve("b", [(0, 1)])], EVIL, EVIL)
    report.curves([], "x", "y")
    report.picture(Image.new("RGBA", (9, 9)), EVIL)
    return report


def test_every_text_is_escaped_and_every_tag_has_its_end():
    tags = Tags(full_report().render())
    assert not tags.open
    assert tags.seen.isdisjoint({"script", "link", "iframe", "object"})
    assert not any(name.startswith("on") for name, _ in tags.attributes)
    assert "<script" in "".join(tags.text)


def test_nothing_is_loaded_from_elsewhere():
    tags = Tags(full_report().render())
    sources = [value for name, value in tags.attributes if name in ("src", "href")]
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
