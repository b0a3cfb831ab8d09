"""The page: whole, self-contained, and nothing of the app's names gets in as markup."""

import re
from html.parser import HTMLParser

import pytest

from florence2.tasks import TASKS
from serve.http.page import PageInfo, index_page
from serve.http.page_script import SCRIPT

READY = PageInfo("2.1.0", "Florence-2-base", "cuda:0", "bfloat16", "PyTorch")

# Elements that HTML never closes.
VOID = {"meta", "link", "input", "br", "img"}


class Page(HTMLParser):
    """Every element with its attributes, and the visible text; unclosed elements stay open."""

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def page():
    return Page(index_page(READY))


def test_every_element_is_closed_where_it_should_be(page):
    assert page.open == []


def test_the_model_is_described(page):
    for fact in ("Florence-2-base", "cuda:0", "bfloat16", "PyTorch", "Ready", "2.1.0"):
        assert fact in page.text
    assert page.all("body") == [{"data-ready": "true"}]


def test_without_a_model_the_page_says_so():
    page = Page(index_page(PageInfo("2.1.0")))
    assert "No model is loaded yet" in page.text
    assert "Ready" not in page.text
    assert page.all("body") == [{"data-ready": "false"}]


def test_what_the_checkpoint_notes_stands_on_the_page():
    notes = ("config.json asks for <b>.", "Something is left out.")
    page = Page(index_page(PageInfo("2.1.0", "a", notes=notes)))
    for note in notes:
        assert f"Note: {note}" in page.text
    assert page.all("b") == []


NASTY = "<script>alert('x')</script>\"&"


@pytest.mark.parametrize("field", ["version", "model_name", "device", "precision", "runtime"])
def test_a_name_never_becomes_markup(field):
    facts = {"version": "2.1.0", "model_name": "a", field: NASTY}
    page = Page(index_page(PageInfo(**facts)))
    assert NASTY in page.text
    assert len(page.all("script")) == 1


def test_every_task_can_be_chosen_and_is_explained(page):
    options = {option["value"]: option for option in page.all("option")}
    assert list(options) == [task.token for task in TASKS]
    for task in TASKS:
        assert options[task.token]["data-takes"] == task.takes.value
        assert task.token in page.text
        assert task.summary in page.text


def test_the_page_needs_nothing_from_elsewhere(page):
    html = index_page(READY)
    assert not re.findall(r"https?://", html)
    addresses = [a.get("src") or a.get("href") for _, a in page.elements]
    assert [address for address in addresses if address] == ["data:,", "tasks", "metrics"]


def test_the_policy_lets_the_page_ask_only_its_own_server(page):
    policy = next(m["content"] for m in page.all("meta") if "http-equiv" in m)
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy


def test_what_the_script_looks_for_is_on_the_page(page):
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert set(re.findall(r'\$\("([\w-]+)"\)', SCRIPT)) <= set(ids)
    assert len(ids) == len(set(ids))


def test_every_field_has_a_label(page):
    html = index_page(READY)
    for field in ("file", "task", "text", "region", "more"):
        assert re.search(rf"<label[^>]*>[^<]+<(input|select|textarea) id=\"{field}\"", html)


def test_the_script_never_writes_markup_from_an_answer():
    for danger in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert danger not in SCRIPT


def test_the_script_cannot_end_its_element_early():
    assert "</" not in SCRIPT
    assert "<!--" not in SCRIPT
