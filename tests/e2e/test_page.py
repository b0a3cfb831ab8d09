"""The page of ``florence2 serve`` in a browser, against the app with the demo checkpoint.

The browser is Debian's Chromium; without one these tests are left out, unless
``FLORENCE_REQUIRE_BROWSER`` says that they may not be, as CI does.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import requests
from app_server import ROOT, AppServer, serve_command
from fastapi import FastAPI
from fastapi.testclient import TestClient
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

from serve.http.page import register_page

IMAGES = ROOT / "demo" / "images"
TABLE = IMAGES / "photo_table.jpg"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE_MS = 30_000
MARKUP = "<img src=x onerror=\"document.title='taken'\">"


@pytest.fixture(scope="module")
def app(tmp_path_factory) -> Iterator[AppServer]:
    env = {"CUDA_VISIBLE_DEVICES": "", "NVIDIA_VISIBLE_DEVICES": "all"}
    # It chooses its device itself, so that it warns of a CPU where a GPU could be.
    command = partial(serve_command, device="auto")
    server = AppServer(tmp_path_factory.mktemp("app"), env, command)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        say = pytest.fail if os.environ.get("FLORENCE_REQUIRE_BROWSER") else pytest.skip
        say("The page is tested in Chromium, and none was found; apt-get install chromium.")
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def reported() -> list[str]:
    """The errors that the browser reports, breaches of the page's content policy among them."""
    return []


@pytest.fixture(scope="module")
def new_page(browser, reported):
    """A page in a profile of its own, which has not gone anywhere yet."""

    def open_page(**options: Any) -> Page:
        context = browser.new_context(**options)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("pageerror", lambda error: reported.append(str(error)))
        page.on("console", lambda said: said.type == "error" and reported.append(said.text))
        return page

    return open_page


@pytest.fixture
def console(reported) -> Iterator[list[str]]:
    """What is reported during a test, which fails unless the test takes it out."""
    yield reported
    unexpected = reported.copy()
    reported.clear()
    assert unexpected == []


@pytest.fixture(scope="module")
def tab(new_page) -> Page:
    """One for all tests that need nothing special, as opening one takes most of a test's time."""
    return new_page()


@pytest.fixture
def page(tab, app, console) -> Iterator[Page]:
    open_app(tab, app)
    yield tab
    tab.unroute_all()


def open_app(page: Page, app: AppServer) -> None:
    page.goto(app.url)
    expect(page.get_by_text("Ready", exact=True)).to_be_visible()


def field(page: Page, name: str) -> Locator:
    """The field whose label begins with a name."""
    return page.get_by_label(re.compile(f"^{name}"))


def choose(page: Page, image, task: str = "object detection", **more) -> None:
    field(page, "Image").set_input_files(image)
    field(page, "Task").select_option(task)
    if more:
        page.get_by_text("More settings").click()
        field(page, "As JSON").fill(json.dumps(more))


def ask(page: Page) -> dict:
    """What the app answered, once the page shows it."""
    with page.expect_response("**/inference_image") as asked:
        page.get_by_role("button", name="Ask").click()
    expect(page.locator("#message")).not_to_have_text("Asking…")
    return asked.value.json()


def rows(page: Page) -> list[list[str]]:
    table = page.locator("#objects")
    return [row.locator("td").all_inner_texts() for row in table.locator("tbody tr").all()]


def rows_of(answer: dict) -> list[list[str]]:
    """What the table of objects should say of an answer with confidences only."""
    return [
        [label["classTitle"], label["geometryType"], f"{label['tags'][0]['value']:.3f}"]
        for label in answer["annotation"]["objects"]
    ]


def color_at(page: Page, x: float, y: float) -> list[int]:
    script = "(canvas, [x, y]) => [...canvas.getContext('2d').getImageData(x, y, 1, 1).data]"
    return page.locator("#canvas").evaluate(script, [x, y])


def drawing(page: Page) -> str:
    return page.locator("#canvas").evaluate("canvas => canvas.toDataURL()")


def message(page: Page) -> Locator:
    return page.locator("#message")


@pytest.mark.parametrize(
    ("path", "media_type"),
    [("/", "text/html"), ("/page/app.js", "text/javascript"), ("/page/style.css", "text/css")],
)
def test_a_file_of_the_page_says_what_it_is_and_is_kept_until_it_changes(path, media_type):
    server = FastAPI()
    register_page(server)
    client = TestClient(server)
    sent = client.get(path)
    assert sent.headers["Content-Type"] == f"{media_type}; charset=utf-8"
    assert sent.headers["X-Content-Type-Options"] == "nosniff"
    assert sent.headers["Cache-Control"] == "no-cache"
    policy = sent.headers["Content-Security-Policy"]
    assert "default-src 'none'; script-src 'self'; style-src 'self';" in policy
    assert "unsafe" not in policy
    # The page works without an internet.
    assert not re.findall(r"https?://", sent.text)
    again = client.get(path, headers={"If-None-Match": f'"other", W/{sent.headers["ETag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get(path, headers={"If-None-Match": '"other"'}).content == sent.content


def test_the_page_says_what_runs_and_what_can_be_asked(page, app):
    listed = requests.get(f"{app.url}/tasks", timeout=60).json()
    expect(page.get_by_role("heading", level=1)).to_have_text("demo")
    assert page.locator("#facts .chip").all_inner_texts() == ["cpu", "fp32", "torch"]
    expect(page.locator("footer")).to_have_text(f"Serve Florence-2 {listed['version']}")
    options = field(page, "Task").locator("option")
    assert options.all_inner_texts() == [task["name"].replace("_", " ") for task in listed["tasks"]]
    expect(field(page, "Task")).to_have_value("<OD>")
    table = [row.locator("td").all_inner_texts() for row in page.locator("#tasks tbody tr").all()]
    needs = {"nothing": "", "text": "a text", "region": "a region"}
    assert table == [
        [task["token"], needs[task["takes"]], task["summary"]] for task in listed["tasks"]
    ]
    page.get_by_text("All settings").click()
    expect(page.locator("#settings pre")).to_contain_text("task_prompt")


def test_the_page_warns_of_a_cpu_where_a_gpu_could_be(page):
    warning = page.get_by_role("alert")
    expect(warning).to_contain_text("demo runs on the CPU. A GPU can be expected here")


def test_an_uploaded_photograph_gets_its_boxes_with_names_and_scores(page):
    choose(page, TABLE)
    expect(page.get_by_text("Choose an image, or drop one here.")).to_be_hidden()
    photograph = drawing(page)
    answer = ask(page)
    expect(message(page)).to_have_text(re.compile(r"4 objects in \d+\.\d s\."))
    assert rows(page) == rows_of(answer)
    assert {row[0] for row in rows(page)} == {"ball", "box"}
    drawn = {}
    for label in answer["annotation"]["objects"]:
        [[left, top], [right, bottom]] = label["points"]["exterior"]
        # The names stand on the upper edges, and the first box has a picture's edge on its left.
        edges = [(right, (top + bottom) // 2), ((left + right) // 2, bottom)]
        red, green, _, _ = color_at(page, *edges[1])
        drawn.setdefault(label["classTitle"], []).append(red > green)
        assert all(max(color_at(page, *edge)) > 150 for edge in edges)
    assert drawn == {"box": [True, True], "ball": [False, False]}
    assert drawing(page) != photograph
    page.get_by_text("The answer as JSON").click()
    assert json.loads(page.locator("#raw pre").inner_text()) == answer
    # Another image is another question.
    choose(page, IMAGES / "scene_bike.png")
    expect(page.locator("#objects")).to_be_hidden()


@pytest.mark.parametrize(
    ("task", "fields", "image", "shown"),
    [
        (
            "caption",
            {},
            "photo_table.jpg",
            ["caption", "a white arrow, a blue ball, a yellow ball and a green box"],
        ),
        ("ocr", {}, "scene_bike.png", ["ocr_text", "HOME", "BIKE"]),
        ("ocr with region", {}, "scene_bike.png", ["text: HOME", "polygon", "text: BIKE"]),
        ("phrase grounding", {"Text": "blue ball"}, "photo_table.jpg", ["blue ball", "rectangle"]),
        ("referring segmentation", {"Text": "box"}, "photo_table.jpg", ["box", "polygon"]),
        (
            "region category",
            {"Region in pixels": "440, 250, 717, 526"},
            "photo_table.jpg",
            ["box", "rectangle"],
        ),
    ],
)
def test_a_task_shows_the_fields_it_takes_and_its_answer(page, task, fields, image, shown):
    choose(page, IMAGES / image, task)
    for name in ("Text", "Region in pixels"):
        expect(field(page, name)).to_be_visible(visible=name in fields)
    for name, value in fields.items():
        field(page, name).fill(value)
    ask(page)
    expect(message(page)).not_to_have_class("bad")
    answer = page.locator("section", has=page.get_by_role("heading", name="Answer"))
    for text in shown:
        expect(answer).to_contain_text(text)


def test_a_region_is_dragged_on_the_image_and_its_mask_is_drawn(page):
    choose(page, TABLE, "region segmentation", geometry="bitmap")
    canvas = page.locator("#canvas").bounding_box()
    scale = canvas["width"] / 800
    for step, (x, y) in {"down": (717, 526), "up": (440, 250)}.items():
        page.mouse.move(canvas["x"] + x * scale, canvas["y"] + y * scale)
        getattr(page.mouse, step)()
    region = [int(number) for number in field(page, "Region").input_value().split(", ")]
    assert region == pytest.approx([440, 250, 717, 526], abs=2)
    inside, outside = (560, 400), (150, 100)
    before = [color_at(page, *point) for point in (inside, outside)]
    [label] = ask(page)["annotation"]["objects"]
    assert label["geometryType"] == "bitmap"
    assert color_at(page, *inside) != before[0]
    assert color_at(page, *outside) == before[1]
    # A click is no box; it leaves the one before.
    page.mouse.click(canvas["x"] + 10, canvas["y"] + 10)
    assert field(page, "Region").input_value() == ", ".join(map(str, region))


def test_an_image_can_be_dropped(page):
    script = """text => {
      const dropped = new DataTransfer(), bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
      dropped.items.add(new File([bytes], "a.jpg", { type: "image/jpeg" }));
      return dropped;
    }"""
    transfer = page.evaluate_handle(script, b64encode(TABLE.read_bytes()).decode())
    page.locator("#stage").dispatch_event("drop", {"dataTransfer": transfer})
    expect(page.get_by_role("img", name="The image a.jpg")).to_be_visible()
    assert len(ask(page)["annotation"]["objects"]) == 4


@pytest.mark.parametrize(
    ("task", "text", "more"),
    [
        ("phrase grounding", "blue ball", {"confidence_threshold": 0.2}),
        ("object detection", "", {"mapping": {"it's": "ball"}}),
    ],
)
def test_the_command_that_is_shown_gives_the_same_answer(page, tmp_path, task, text, more):
    choose(page, TABLE, task, **more)
    if text:
        field(page, "Text").fill(text)
    shutil.copy(TABLE, tmp_path / "image.jpg")
    command = ["bash", "-c", page.locator("#curl").inner_text()]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True, timeout=60)
    answer = ask(page)
    assert {"it's", "blue ball"} & {
        label["classTitle"] for label in answer["annotation"]["objects"]
    }
    assert without_ids(json.loads(ran.stdout)) == without_ids(answer)


def without_ids(value):
    """The same without what is new in every answer: the ids of labels."""
    if isinstance(value, list):
        return [without_ids(one) for one in value]
    if isinstance(value, dict):
        return {key: without_ids(one) for key, one in value.items() if key not in ("id", "key")}
    return value


def test_an_error_of_the_app_is_shown_as_its_sentence(page, console, tmp_path):
    choose(page, TABLE, confidence_treshold=0.3)
    answer = ask(page)
    assert "confidence_threshold" in answer["message"]
    expect(message(page)).to_have_text(answer["message"])
    expect(message(page)).to_have_class("bad")
    damaged = tmp_path / "damaged.png"
    damaged.write_text("no picture")
    field(page, "As JSON").fill("")
    field(page, "Image").set_input_files(damaged)
    expect(message(page)).to_have_text(re.compile("This browser cannot show the file"))
    expect(message(page)).to_have_text(ask(page)["message"])
    assert len(console) == 2
    assert all("status of 400" in console.pop() for _ in range(2))


@pytest.mark.parametrize("more", ["{", "[]", "null"])
def test_settings_that_are_no_object_are_not_sent(page, more):
    choose(page, TABLE)
    page.get_by_text("More settings").click()
    field(page, "As JSON").fill(more)
    page.get_by_role("button", name="Ask").click()
    expect(message(page)).to_have_text("More settings must be a JSON object; correct them.")
    expect(page.locator("#curl")).to_contain_text('{"settings":{"task_prompt":"<OD>"}}')


def test_an_app_that_is_gone_is_said(page, console):
    choose(page, TABLE)
    page.route("**/inference_image", lambda route: route.abort())
    page.get_by_role("button", name="Ask").click()
    expect(message(page)).to_have_text("The app did not answer: Failed to fetch.")
    assert console.pop() == "Failed to load resource: net::ERR_FAILED"


def test_an_answer_is_not_shown_on_another_image(page):
    choose(page, TABLE)
    held: list[Route] = []
    page.route("**/inference_image", lambda route: held.append(route))
    with page.expect_request("**/inference_image"):
        page.get_by_role("button", name="Ask").click()
    expect(page.get_by_role("button", name="Ask")).to_be_disabled()
    field(page, "Image").set_input_files(IMAGES / "scene_bike.png")
    expect(page.get_by_role("img", name="The image scene_bike.png")).to_be_visible()
    held[0].continue_()
    expect(page.get_by_role("button", name="Ask")).to_be_enabled()
    expect(message(page)).to_be_empty()
    expect(page.locator("#objects")).to_be_hidden()


def test_names_and_texts_never_become_markup(page, app, tmp_path):

    def rename(route: Route) -> None:
        answer = route.fetch()
        named = dict.fromkeys(("model_name", "device", "precision", "runtime"), MARKUP)
        named |= {"device_warning": MARKUP, "notes": [MARKUP]}
        route.fulfill(response=answer, json={**answer.json(), **named})

    page.route("**/get_session_info", rename)
    open_app(page, app)
    expect(page.get_by_role("heading", level=1)).to_have_text(MARKUP)
    expect(page.get_by_role("alert")).to_have_text(MARKUP)
    expect(page.locator("#notes")).to_have_text(f"Note: {MARKUP}")
    assert page.locator("#facts .chip").all_inner_texts() == [MARKUP, MARKUP.lower(), MARKUP]
    image = tmp_path / f"{MARKUP}.jpg"
    shutil.copy(TABLE, image)
    choose(page, image, mapping={MARKUP: "ball"})
    expect(page.locator("#canvas")).to_have_attribute("aria-label", f"The image {image.name}")
    ask(page)
    assert MARKUP in [row[0] for row in rows(page)]
    expect(page.locator("#curl")).to_contain_text("<img src=x onerror=")
    assert page.locator("img[src]").count() == 0
    assert page.title() == "Florence-2"


def test_what_is_not_of_the_page_neither_runs_nor_styles_it(page, console):
    markup = "text => { document.body.innerHTML = text; }"
    with pytest.raises(Exception, match="TrustedHTML"):
        page.evaluate(markup, MARKUP)
    page.evaluate("""() => {
      document.body.setAttribute("style", "color: rgb(1, 2, 3)");
      document.body.append(Object.assign(document.createElement("iframe"), { src: "/tasks" }));
    }""")
    expect(page.locator("body")).not_to_have_css("color", "rgb(1, 2, 3)")
    for _ in range(100):
        if len(console) >= 3:
            break
        page.wait_for_timeout(20)
    assert all("Content Security Policy" in said or "TrustedHTML" in said for said in console)
    assert len(console) == 3
    console.clear()


def test_the_page_is_used_with_the_keyboard_alone(page):
    # Before the key: Chromium answers it itself where nobody listens yet.
    page.once("filechooser", lambda chooser: chooser.set_files(TABLE))
    page.keyboard.press("Tab")
    expect(field(page, "Image")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("img", name="The image photo_table.jpg")).to_be_visible()
    page.keyboard.press("Tab")
    expect(field(page, "Task")).to_be_focused()
    page.keyboard.type("phrase")
    expect(field(page, "Text")).to_be_visible()
    page.keyboard.press("Tab")
    page.keyboard.type("box. blue ball")
    page.keyboard.press("Enter")
    expect(message(page)).to_contain_text("2 objects in")
    seen = {drawing(page)}
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.locator("#objects tbody tr:focus").count():
            seen.add(drawing(page))
    # Each row shows which object it is about.
    assert len(seen) == 3


def test_the_page_waits_for_a_model(new_page, app, console):
    page = new_page()  # Its clock stays a false one.
    page.clock.install()
    none = {"code": "not_deployed", "message": "No model is loaded; deploy one."}
    page.route("**/get_session_info", lambda route: route.fulfill(status=503, json=none), times=1)
    page.goto(app.url)
    expect(page.locator("#state")).to_have_text("No model is loaded yet")
    expect(page.get_by_role("button", name="Ask")).to_be_disabled()
    assert "status of 503" in console.pop()
    page.clock.run_for(3000)
    expect(page.locator("#state")).to_have_text("Ready")
    expect(page.get_by_role("button", name="Ask")).to_be_enabled()


@pytest.mark.parametrize(
    ("scheme", "background"), [("light", "rgb(246, 247, 249)"), ("dark", "rgb(18, 21, 26)")]
)
def test_the_page_has_the_colours_of_the_readers_system(page, scheme, background):
    page.emulate_media(color_scheme=scheme)
    expect(page.locator("body")).to_have_css("background-color", background)


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
    assert page.frames[1].get_by_text("Try it").count() == 0
    console.clear()
    # A link to the page only opens it.
    page.evaluate("url => { location.href = url; }", app.url)
    expect(page.get_by_text("Ready", exact=True)).to_be_visible()
