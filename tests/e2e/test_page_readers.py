"""The page in a browser: by keyboard, screen reader and on small screens, and for strangers."""

from __future__ import annotations

import importlib.util
import re
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
from app_server import ROOT, AppServer
from page_tools import (
    IMAGES,
    SAMPLES,
    TABLE,
    add_class,
    ask,
    choose,
    drawing,
    field,
    message,
    rows,
    view,
)
from playwright.sync_api import Locator, Page, expect

# Who uses it, and with what


def tab_to(page: Page, wanted: Locator) -> None:
    for _ in range(40):
        page.keyboard.press("Tab")
        if wanted.evaluate("one => one === document.activeElement"):
            return
    pytest.fail(f"{wanted} is not reached with the Tab key.")


def test_the_page_is_used_with_the_keyboard_alone(page):
    page.keyboard.press("Tab")
    expect(page.get_by_role("radio").first).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("img", name=f"The image {SAMPLES[1]}")).to_be_visible()
    page.keyboard.press("Tab")
    expect(field(page, "Image of your own")).to_be_focused()
    page.keyboard.press("Tab")
    expect(field(page, "Task")).to_be_focused()
    page.keyboard.type("phrase")
    expect(field(page, "Text")).to_be_visible()
    tab_to(page, field(page, "Text"))
    page.keyboard.type("star. tree")
    page.keyboard.press("Enter")
    expect(message(page)).to_contain_text("2 objects in")
    slider = field(page, "Lowest confidence")
    tab_to(page, slider)
    page.keyboard.press("ArrowRight")
    expect(slider).to_have_value("0.01")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(view(page, "Kept answer")).to_be_visible()
    seen = {drawing(view(page))}
    for row in view(page).locator(".objects tbody tr").all():
        tab_to(page, row)
        seen.add(drawing(view(page)))
        expect(view(page).locator(".tokens li").first).to_be_visible()
    # Each row shows which object it is about.
    assert len(seen) == 3
    tab_to(page, view(page, "Kept answer").get_by_role("button", name="Remove"))
    page.keyboard.press("Space")
    expect(view(page, "Kept answer")).to_be_hidden()


def test_a_file_is_chosen_with_the_keyboard(page):
    # Before the key: Chromium answers it itself where nobody listens yet.
    page.once("filechooser", lambda chooser: chooser.set_files(TABLE))
    field(page, "Image of your own").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("img", name="The image photo_table.jpg")).to_be_visible()


def test_a_screen_reader_is_told_what_there_is(page):
    choose(page, TABLE, "Phrase grounding")
    field(page, "Text").fill("blue ball")
    add_class(page, "box", "")
    ask(page)
    page.get_by_role("button", name="Keep").click()
    view(page).locator(".objects tbody tr").first.focus()
    expect(page.locator("main")).to_match_aria_snapshot("""
      - main:
        - region "Ask":
          - group "Sample image"
          - textbox "Text"
          - group "Classes with prompts of their own":
            - group "Class 1":
              - textbox "Class"
              - textbox "Prompts"
              - button "Remove this class"
            - button "Add a class"
          - button "Ask"
          - status: /Kept/
        - region "Answer":
          - slider "Lowest confidence": "0"
          - button "Keep for comparison"
          - article "This answer":
            - heading "This answer" [level=3]
            - img /The image photo_table.jpg with \\d objects; they are listed below/
            - table:
              - rowgroup:
                - row "Class Shape Confidence"
            - heading "Tokens" [level=4]
            - status: /blue ball. \\d+ tokens; the least sure, .*/
            - list "Tokens of blue ball"
            - heading "Time" [level=4]
            - term: /decode/
            - definition: /\\d s/
          - article "Kept answer":
            - button "Remove"
        - region "Call it":
          - button "Copy curl"
          - button "Copy Python"
        - region "Tasks"
    """)
    unnamed = page.evaluate("""() => [...document.querySelectorAll(
      "input, select, textarea, button, canvas, img, summary, [tabindex]")].filter((one) =>
        one.checkVisibility() && !(one.labels?.length || one.ariaLabel || one.alt
          || one.hasAttribute("aria-labelledby") || one.textContent.trim()))
      .map((one) => one.outerHTML)""")
    assert unnamed == []


CONTRASTS = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((one) => one / 255)
    .map((one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4))
    .reduce((sum, one, i) => sum + one * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (one) => {
    const color = channels(getComputedStyle(one).backgroundColor);
    return (color[3] ?? 1) > 0 || !one.parentElement ? color : behind(one.parentElement);
  };
  const found = {}, texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const one = texts.currentNode.parentElement;
    const text = texts.currentNode.data.trim();
    if (!text || !one.checkVisibility() || one.closest(":disabled")) continue;
    const lights = [channels(getComputedStyle(one).color), behind(one)].map(light);
    const contrast = (Math.max(...lights) + 0.05) / (Math.min(...lights) + 0.05);
    if (contrast < 4.5) found[text.slice(0, 40)] = contrast;
  }
  return found;
}"""


@pytest.mark.parametrize(
    ("scheme", "background"), [("light", "rgb(246, 247, 249)"), ("dark", "rgb(18, 21, 26)")]
)
def test_the_page_is_read_in_the_colours_of_the_readers_system(page, scheme, background):
    page.emulate_media(color_scheme=scheme)
    expect(page.locator("body")).to_have_css("background-color", background)
    choose(page, TABLE, "Caption", "Phrase grounding")
    ask(page)
    ask(page)
    view(page).locator(".objects tbody tr").first.focus()
    for folded in ("More settings", "Precision of the model", "Raw answer", "Annotation as JSON"):
        page.get_by_text(folded).first.click()
    assert page.evaluate(CONTRASTS) == {}
    field(page, "As JSON").fill("{")
    page.get_by_role("button", name="Ask").click()
    assert page.evaluate(CONTRASTS) == {}


@pytest.mark.parametrize("width", [320, 390, 800])
def test_a_small_screen_shows_everything_without_scrolling_sideways(page, width):
    size = page.viewport_size
    try:
        page.set_viewport_size({"width": width, "height": 700})
        choose(page, IMAGES / "scene_home.jpg", "Dense region caption")
        add_row = page.get_by_role("button", name="Add a class")
        ask(page)
        page.get_by_role("button", name="Keep").click()
        field(page, "Task").select_option("Phrase grounding")
        add_row.click()
        field(page, "Text").fill("house")
        ask(page)
        view(page).locator(".objects tbody tr").first.focus()
        widths = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        assert page.evaluate(widths) == [width, width]
        expect(view(page).locator("canvas")).to_be_in_viewport()
    finally:
        page.set_viewport_size(size)


@pytest.mark.slow
def test_the_picture_of_the_readme_can_be_taken_again(new_page, app, console):
    spec = importlib.util.spec_from_file_location("screenshot", ROOT / "bench" / "screenshot.py")
    screenshot = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(screenshot)
    page = new_page(viewport=screenshot.SIZE)
    screenshot.use(page, app.url)
    for shown in (view(page), view(page, "Kept answer")):
        assert len(rows(shown)) > 1
    taken = screenshot.small_png(page.screenshot())
    assert len(taken) <= screenshot.MOST_BYTES
    committed = ROOT / "docs" / "images" / "page.png"
    assert committed.stat().st_size <= screenshot.MOST_BYTES


class _ForeignPage(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>Foreign</title>")

    def log_message(self, *_: object) -> None:
        """Not into the tests' output."""


@pytest.fixture
def foreign_url() -> Iterator[str]:
    """A page of others, on another port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _ForeignPage)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def answered(app: AppServer) -> Counter:
    """How many requests were answered, by route and status."""
    text = requests.get(f"{app.url}/metrics", timeout=60).text
    counted = re.findall(
        r'^florence2_requests_total{route="(.*)",status="(.*)"} (.*)$', text, re.MULTILINE
    )
    return Counter({(route, status): int(float(count)) for route, status, count in counted})


def test_a_page_of_another_origin_can_neither_read_nor_post_nor_show_it(
    page, app, foreign_url, console
):
    page.goto(foreign_url)
    before = answered(app)
    read = page.evaluate(
        """async url => {
          const form = new FormData();
          form.append("files", new Blob(["x"]), "a.png");
          const frame = Object.assign(document.createElement("iframe"), { src: url });
          document.body.append(frame);
          await new Promise(done => { frame.onload = done; });
          const said = [];
          for (const [path, options] of [
            ["/tasks", {}],
            ["/page/app.js", {}],
            ["/get_session_info", { method: "POST" }],
            ["/inference_image", { method: "POST", body: form }],
            ["/inference_image", { method: "POST", body: form, mode: "no-cors" }],
            ["/freeze_model", { method: "POST", body: "{}", mode: "no-cors" }],
          ]) {
            said.push(await fetch(url + path, options).then(
              (answer) => answer.text(), (error) => error.name));
          }
          return said;
        }""",
        app.url,
    )
    assert read == ["TypeError"] * 4 + ["", ""]
    assert answered(app) - before == {
        ("/", "403"): 1,
        ("/tasks", "403"): 1,
        ("other", "403"): 1,
        ("/get_session_info", "403"): 1,
        ("/inference_image", "403"): 2,
        ("/freeze_model", "403"): 1,
        ("/metrics", "200"): 1,
    }
    assert page.frames[1].get_by_text("Call it").count() == 0
    console.clear()
    # A link to the page only opens it.
    page.evaluate("url => { location.href = url; }", app.url)
    expect(page.get_by_text("Ready", exact=True)).to_be_visible()
