"""A reader of the HTML pages that runs and reports write."""

from __future__ import annotations

from html.parser import HTMLParser

EVIL = "<script src='http://example.org/x.js'>\"&'</script>\x1b[31m\x00\ud800"
# What may stand without an end.
VOID = ("meta", "img", "br", "line", "rect", "polyline", "path")


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

    def values(self, name):
        return [value for key, value in self.attributes if key == name]

    def check(self):
        """Nothing in the page is a program, or left open, or comes from elsewhere."""
        assert not self.open
        assert self.seen.isdisjoint({"script", "link", "iframe", "object", "form", "base"})
        assert not any(name.startswith("on") for name, _ in self.attributes)
        assert all(value.startswith("data:image/jpeg;base64,") for value in self.values("src"))
