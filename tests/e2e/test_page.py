"""The page of ``florence2 serve`` in a browser, against the app with the demo checkpoint.

The browser is Debian's Chromium; without one these tests are left out, unless
``FLORENCE_REQUIRE_BROWSER`` says that they may not be, as CI does.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
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
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

from florence2.tasks import TASKS, next_tasks
from serve.http.page import register_page

IMAGES = ROOT / "demo" / "images"
TABLE = IMAGES / "photo_table.jpg"
SAMPLES = [
    *sorted(path.name for path in IMAGES.glob("scene_*")),
    *sorted(path.name for path in IMAGES.glob("photo_*")),
]
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
    expect(page.get_by_role("img", name=f"The image {SAMPLES[0]}")).to_be_visible()


def field(page: Page, name: str) -> Locator:
    """The field whose label begins with a name."""
    controls = page.locator("input, select, textarea")
    return controls.and_(page.get_by_label(re.compile(f"^{name}")))


def choose(page: Page, image, task: str = "Object detection", then: str = "", **more) -> None:
    field(page, "Image of your own").set_input_files(image)
    field(page, "Task").select_option(task)
    if then:
        field(page, "Then").select_option(then)
    if more:
        page.get_by_text("More settings").click()
        field(page, "As JSON").fill(json.dumps(more))


def ask(page: Page) -> dict:
    """What the app answered, once the page shows it."""
    with page.expect_response("**/inference_image") as asked:
        page.get_by_role("button", name="Ask").click()
    expect(message(page)).not_to_have_text("Asking…")
    return asked.value.json()


def view(page: Page, name: str = "This answer") -> Locator:
    return page.get_by_role("article", name=name)


def rows(shown: Locator) -> list[list[str]]:
    listed = shown.locator(".objects tbody tr:visible").all()
    return [row.locator("td").all_inner_texts() for row in listed]


def rows_of(answer: dict, threshold: float = 0) -> list[list[str]]:
    """What the table of objects should say of an answer with confidences only."""
    return [
        [label["classTitle"], label["geometryType"], f"{label['tags'][0]['value']:.3f}"]
        for label in answer["annotation"]["objects"]
        if label["tags"][0]["value"] >= threshold
    ]


def text_in(shown: Locator, part: str) -> str:
    """The text of a folded part of an answer."""
    return shown.locator(f"{part} pre").text_content() or ""


def color_at(page: Page, x: float, y: float) -> list[int]:
    script = "(canvas, [x, y]) => [...canvas.getContext('2d').getImageData(x, y, 1, 1).data]"
    return view(page).locator("canvas").evaluate(script, [x, y])


def drawing(shown: Locator) -> str:
    return shown.locator("canvas").evaluate("canvas => canvas.toDataURL()")


def move_to(page: Page, x: float, y: float) -> None:
    """The mouse to a pixel of the image."""
    canvas = view(page).locator("canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    scale = box["width"] / canvas.evaluate("canvas => canvas.width")
    page.mouse.move(box["x"] + x * scale, box["y"] + y * scale)


def message(page: Page) -> Locator:
    return page.locator("#message")


def settings_shown(page: Page) -> dict:
    """The settings in the command for curl."""
    words = shlex.split(page.locator("#curl").inner_text())
    [state] = [word.removeprefix("state=") for word in words if word.startswith("state=")]
    return json.loads(state)["settings"]


# The files of the page

JS = "text/javascript"


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/", "text/html"),
        *((f"/page/{name}.js", JS) for name in ("app", "answer", "commands", "drawing")),
        ("/page/style.css", "text/css"),
    ],
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


def test_the_samples_are_the_images_of_a_folder_and_nothing_else(tmp_path):
    shutil.copy(TABLE, tmp_path / "b c.jpg")
    shutil.copy(IMAGES / "scene_bike.png", tmp_path / "a.png")
    shutil.copy(TABLE, tmp_path / "scene_c.jpg")
    (tmp_path / "notes.txt").write_text("no image")
    server = FastAPI()
    register_page(server, tmp_path)
    client = TestClient(server)
    assert client.get("/page/samples").json() == ["scene_c.jpg", "a.png", "b c.jpg"]
    sent = client.get("/page/samples/b%20c.jpg")
    assert (sent.headers["Content-Type"], sent.content) == ("image/jpeg", TABLE.read_bytes())
    for other in ("notes.txt", "..%2F..%2Fpyproject.toml", "%2e%2e/style.css"):
        assert client.get(f"/page/samples/{other}").status_code == 404


def test_without_images_there_are_no_samples(page, app):
    page.route("**/page/samples", lambda route: route.fulfill(json=[]))
    page.goto(app.url)
    expect(page.get_by_text("Ready", exact=True)).to_be_visible()
    expect(view(page).get_by_text("Choose a sample or an image of your own.")).to_be_visible()
    expect(page.get_by_role("group", name="Sample image")).to_be_hidden()
    page.get_by_role("button", name="Ask").click()
    expect(message(page)).to_have_text("Choose an image first.")


# What it says before anything is asked


def test_the_page_says_what_runs_and_what_can_be_asked(page, app):
    listed = requests.get(f"{app.url}/tasks", timeout=60).json()
    expect(page.get_by_role("heading", level=1)).to_have_text("demo")
    assert page.locator("#facts .chip").all_inner_texts() == ["cpu", "fp32", "torch"]
    expect(page.locator("footer")).to_have_text(f"Serve Florence-2 {listed['version']}")
    options = field(page, "Task").locator("option")
    names = {task["name"].replace("_", " ") for task in listed["tasks"]}
    assert {name.lower() for name in options.all_inner_texts()} == names
    assert options.count() == len(TASKS) == 15
    expect(field(page, "Task")).to_have_value("<OD>")
    table = [row.locator("td").all_inner_texts() for row in page.locator("#tasks tbody tr").all()]
    needs = {"nothing": "", "text": "a text", "region": "a region"}
    assert table == [
        [task["token"], needs[task["takes"]], task["summary"]] for task in listed["tasks"]
    ]
    page.get_by_text("All settings").click()
    expect(page.locator("#settings pre")).to_contain_text("task_prompt")


def test_every_cascade_of_two_tasks_can_be_chosen(page):
    for task in TASKS:
        field(page, "Task").select_option(task.token)
        following = [following.token for following in next_tasks(task)]
        expect(page.locator("#next-row")).to_be_visible(visible=bool(following))
        options = page.locator("#next option")
        values = options.evaluate_all("all => all.map(one => one.value)")
        assert sorted(values) == sorted(["", *following])
        for then in following[:1]:
            field(page, "Then").select_option(then)
            assert settings_shown(page) == {"task_prompt": f"{task.token}+{then}"}


def test_the_page_warns_of_a_cpu_where_a_gpu_could_be(page):
    warning = page.get_by_role("alert")
    expect(warning).to_contain_text("demo runs on the CPU. A GPU can be expected here")


# Asking


def test_an_uploaded_photograph_gets_its_boxes_with_names_and_scores(page):
    choose(page, TABLE)
    expect(page.get_by_role("img", name="The image photo_table.jpg")).to_be_visible()
    expect(view(page).get_by_text("Choose a sample or an image of your own.")).to_be_hidden()
    photograph = drawing(view(page))
    answer = ask(page)
    expect(message(page)).to_have_text(re.compile(r"4 objects in \d+\.\d s\."))
    assert rows(view(page)) == rows_of(answer)
    assert {row[0] for row in rows(view(page))} == {"ball", "box"}
    drawn = {}
    for label in answer["annotation"]["objects"]:
        [[left, top], [right, bottom]] = label["points"]["exterior"]
        # The names stand on the upper edges, and the first box has a picture's edge on its left.
        edges = [(right, (top + bottom) // 2), ((left + right) // 2, bottom)]
        red, green, _, _ = color_at(page, *edges[1])
        drawn.setdefault(label["classTitle"], []).append(red > green)
        assert all(max(color_at(page, *edge)) > 150 for edge in edges)
    assert drawn == {"box": [True, True], "ball": [False, False]}
    assert drawing(view(page)) != photograph
    assert json.loads(text_in(view(page), ".json")) == answer["annotation"]
    assert text_in(view(page), ".raw") == f"<OD>\n{answer['details']['answers'][0]['answer']}"
    # Another image is another question.
    choose(page, IMAGES / "scene_bike.png")
    expect(view(page).locator(".objects")).to_be_hidden()
    expect(view(page).locator(".json")).to_be_hidden()


def test_a_sample_is_asked_about_with_two_clicks(page, tmp_path):
    radios = page.get_by_role("group", name="Sample image").get_by_role("radio")
    assert radios.count() == len(SAMPLES)
    expect(radios.first).to_be_checked()
    page.get_by_role("radio", name="scene bike").check(force=True)
    expect(page.get_by_role("img", name="The image scene_bike.png")).to_be_visible()
    answer = ask(page)
    assert [row[0] for row in rows(view(page))] == ["tree", "box", "arrow", "star"]
    # Nobody has it as a file, so the command fetches it.
    assert run_curl(page, tmp_path)["annotation"] == without_ids(answer["annotation"])
    assert run_python(page, tmp_path) == without_ids(answer["annotation"])
    choose(page, TABLE)
    expect(page.get_by_role("img", name="The image photo_table.jpg")).to_be_visible()
    assert page.locator("#samples input:checked").count() == 0


@pytest.mark.parametrize(
    ("task", "then", "fields", "image", "shown"),
    [
        (
            "Caption",
            "",
            {},
            "photo_table.jpg",
            ["caption", "a white arrow, a blue ball, a yellow ball and a green box", "0."],
        ),
        ("OCR", "", {}, "scene_bike.png", ["ocr_text", "HOME", "BIKE"]),
        ("OCR with region", "", {}, "scene_bike.png", ["text: HOME", "polygon", "text: BIKE"]),
        ("Phrase grounding", "", {"Text": "blue ball"}, "photo_table.jpg", ["blue ball", "recta"]),
        ("Referring segmentation", "", {"Text": "box"}, "photo_table.jpg", ["box", "polygon"]),
        (
            "Region category",
            "",
            {"Region in pixels": "440, 250, 717, 526"},
            "photo_table.jpg",
            ["box", "rectangle"],
        ),
        ("Object detection", "Region segmentation", {}, "scene_bike.png", ["star", "polygon"]),
        ("Caption", "Phrase grounding", {}, "photo_table.jpg", ["caption", "blue ball"]),
    ],
)
def test_a_task_shows_the_fields_it_takes_and_its_answer(page, task, then, fields, image, shown):
    choose(page, IMAGES / image, task, then)
    for name in ("Text", "Region in pixels"):
        expect(field(page, name)).to_be_visible(visible=name in fields)
    for name, value in fields.items():
        field(page, name).fill(value)
    ask(page)
    expect(message(page)).not_to_have_class("bad")
    for text in shown:
        expect(view(page)).to_contain_text(text)
    expect(view(page).locator(".question")).to_contain_text(
        ", then ".join(filter(None, [task, then]))
    )


def test_a_region_is_dragged_on_the_image_and_its_mask_is_drawn(page):
    choose(page, TABLE, "Region segmentation")
    field(page, "Outlines as").select_option("bitmaps")
    move_to(page, 717, 526)
    page.mouse.down()
    move_to(page, 440, 250)
    page.mouse.up()
    region = [int(number) for number in field(page, "Region").input_value().split(", ")]
    assert region == pytest.approx([440, 250, 717, 526], abs=2)
    inside, outside = (560, 400), (150, 100)
    before = [color_at(page, *point) for point in (inside, outside)]
    [label] = ask(page)["annotation"]["objects"]
    assert label["geometryType"] == "bitmap"
    assert color_at(page, *inside) != before[0]
    assert color_at(page, *outside) == before[1]
    move_to(page, *inside)
    expect(view(page).locator(".tokens").get_by_role("status")).to_contain_text("least sure")
    # A click is no box; it leaves the one before.
    move_to(page, *outside)
    page.mouse.down()
    page.mouse.up()
    assert field(page, "Region").input_value() == ", ".join(map(str, region))


def test_a_large_photograph_is_pointed_at_in_its_own_pixels(page, tmp_path):
    large = tmp_path / "large.jpg"
    Image.open(TABLE).resize((4000, 3000)).save(large)
    choose(page, large)
    canvas = view(page).locator("canvas")
    expect(page.get_by_role("img", name="The image large.jpg")).to_be_visible()
    assert canvas.evaluate("one => [one.width, one.height]") == [2048, 1536]
    answer = ask(page)
    [[left, top], [right, bottom]] = answer["annotation"]["objects"][0]["points"]["exterior"]
    move_to(page, 2048 / 4000 * (left + right) / 2, 2048 / 4000 * (top + bottom) / 2)
    expect(view(page).locator("tr.highlighted")).to_have_count(1)
    field(page, "Task").select_option("Region category")
    move_to(page, 512, 256)
    page.mouse.down()
    move_to(page, 1024, 1024)
    page.mouse.up()
    region = [int(number) for number in field(page, "Region").input_value().split(", ")]
    assert region == pytest.approx([1000, 500, 2000, 2000], abs=8)


WITH_A_FILE = """text => {
  const transfer = new DataTransfer(), bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  transfer.items.add(new File([bytes], "a.jpg", { type: "image/jpeg" }));
  return transfer;
}"""


def test_an_image_is_dropped_anywhere(page):
    transfer = page.evaluate_handle(WITH_A_FILE, b64encode(TABLE.read_bytes()).decode())
    page.locator("footer").dispatch_event("dragover", {"dataTransfer": transfer})
    expect(view(page).locator(".stage")).to_have_class("stage over")
    page.locator("footer").dispatch_event("drop", {"dataTransfer": transfer})
    expect(view(page).locator(".stage")).to_have_class("stage")
    expect(page.get_by_role("img", name="The image a.jpg")).to_be_visible()
    assert len(ask(page)["annotation"]["objects"]) == 4


def test_an_image_is_pasted_and_a_text_stays_a_text(page):
    transfer = page.evaluate_handle(WITH_A_FILE, b64encode(TABLE.read_bytes()).decode())
    paste = """transfer => document.activeElement.dispatchEvent(
      new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true }))"""
    with_text = page.evaluate_handle(
        "transfer => { transfer.setData('text/plain', 'a word'); return transfer; }",
        page.evaluate_handle(WITH_A_FILE, b64encode(TABLE.read_bytes()).decode()),
    )
    with_text.evaluate(paste)
    expect(page.get_by_role("img", name=f"The image {SAMPLES[0]}")).to_be_visible()
    transfer.evaluate(paste)
    expect(page.get_by_role("img", name="The image a.jpg")).to_be_visible()
    assert page.locator("#samples input:checked").count() == 0


# Several classes with prompts


def add_class(page: Page, name: str, prompts: str) -> Locator:
    page.get_by_role("button", name="Add a class").click()
    added = page.locator(".class-row").last
    expect(added.get_by_role("textbox", name="Class")).to_be_focused()
    page.keyboard.type(name)
    page.keyboard.press("Tab")
    page.keyboard.type(prompts)
    return added


def test_classes_have_prompts_of_their_own(page):
    choose(page, IMAGES / "scene_bike.png", "Phrase grounding")
    expect(field(page, "Text")).to_have_attribute("required", "")
    add_class(page, "plant", "tree. a green tree")
    add_class(page, "star", "")
    add_class(page, "plant", "flower")
    gone = add_class(page, "gone", "house")
    gone.get_by_role("button", name="Remove this class").click()
    expect(page.get_by_role("button", name="Add a class")).to_be_focused()
    expect(field(page, "Text")).not_to_have_attribute("required", "")
    assert settings_shown(page)["mapping"] == {
        "plant": "tree. a green tree\nflower",
        "star": "star",
    }
    ask(page)
    assert {row[0] for row in rows(view(page))} == {"plant", "star"}
    # A task that takes no text has no use for them, and they are still there afterwards.
    field(page, "Task").select_option("Caption")
    assert settings_shown(page) == {"task_prompt": "<CAPTION>"}
    field(page, "Task").select_option("Phrase grounding")
    assert set(settings_shown(page)["mapping"]) == {"plant", "star"}


def test_a_name_is_a_class_whatever_it_means_to_a_browser(page):
    choose(page, IMAGES / "scene_bike.png", "Phrase grounding")
    add_class(page, "__proto__", "star")
    assert settings_shown(page)["mapping"] == {"__proto__": "star"}
    ask(page)
    assert [row[0] for row in rows(view(page))] == ["__proto__"]


def test_prompts_without_a_class_are_not_sent(page):
    choose(page, TABLE, "Phrase grounding")
    field(page, "Text").fill("ball")
    added = add_class(page, "", "box")
    page.get_by_role("button", name="Ask").click()
    expect(added.get_by_role("textbox", name="Class")).to_be_focused()
    expect(message(page)).to_be_empty()


# The threshold


def test_the_threshold_hides_objects_without_another_request(page, tmp_path):
    choose(page, IMAGES / "scene_home.jpg")
    shutil.copy(IMAGES / "scene_home.jpg", tmp_path)
    answer = ask(page)
    scores = sorted(one["score"] for one in answer["details"]["objects"])
    assert len(rows(view(page))) == len(scores) > 3
    everything = drawing(view(page))
    requests_made: list[str] = []
    page.on("request", lambda request: requests_made.append(request.url))
    slider = field(page, "Lowest confidence")
    threshold = round(sum(scores[1:3]) / 2, 2)
    slider.fill(str(threshold))
    expect(page.locator("#threshold-value")).to_have_text(f"{threshold:.2f}")
    assert rows(view(page)) == rows_of(answer, threshold)
    assert 0 < len(rows(view(page))) < len(scores)
    assert drawing(view(page)) != everything
    expect(page.get_by_role("img", name=f"{len(rows(view(page)))} objects")).to_be_visible()
    assert requests_made == []
    # What the commands ask for is what is left.
    assert settings_shown(page) == {"task_prompt": "<OD>", "confidence_threshold": threshold}
    left = without_ids(json.loads(text_in(view(page), ".json")))
    assert run_curl(page, tmp_path)["annotation"] == left
    assert run_python(page, tmp_path) == left
    # It stays for the next answer, and lets everything back.
    ask(page)
    assert rows(view(page)) == rows_of(answer, threshold)
    slider.fill("1")
    assert rows(view(page)) == []
    expect(view(page).locator(".objects")).to_be_hidden()
    slider.fill("0")
    assert rows(view(page)) == rows_of(answer)


@pytest.mark.parametrize(
    ("more", "sent", "left"),
    [
        ({"conf": 0.3}, {"conf": 0.95}, {"ball"}),
        ({"confidence_threshold": 0.99}, {"confidence_threshold": 0.99}, set()),
        (
            {"class_thresholds": {"Box": 0.1}},
            {"class_thresholds": {"Box": 0.1}, "confidence_threshold": 0.95},
            {"ball", "box"},
        ),
    ],
)
def test_the_threshold_goes_with_what_the_settings_say_of_one(page, tmp_path, more, sent, left):
    choose(page, TABLE, **more)
    shutil.copy(TABLE, tmp_path)
    field(page, "Lowest confidence").fill("0.95")
    ask(page)
    assert settings_shown(page) == {"task_prompt": "<OD>", **sent}
    shown = json.loads(text_in(view(page), ".json"))
    assert run_curl(page, tmp_path)["annotation"] == without_ids(shown)
    assert {one["classTitle"] for one in shown["objects"]} <= left


# Tokens


def test_an_object_shows_its_tokens_from_its_row_and_from_the_image(page):
    choose(page, IMAGES / "scene_bike.png")
    answer = ask(page)
    tokens = view(page).locator(".tokens")
    expect(tokens).to_be_hidden()
    plain = drawing(view(page))
    for number, how in enumerate(("hover", "focus")):
        getattr(view(page).locator(".objects tbody tr").nth(number), how)()
        spelled = answer["details"]["objects"][number]["tokens"]
        expect(tokens.locator("li code")).to_have_text([one["text"] for one in spelled])
        expect(tokens.locator("li").first).to_contain_text(f"{100 * spelled[0]['probability']:.1f}")
        near = f"near {100 * spelled[1]['near_probability']:.1f} %"
        expect(tokens.locator("li").nth(1)).to_contain_text(near)
        assert drawing(view(page)) != plain
    [[left, top], [right, bottom]] = answer["annotation"]["objects"][3]["points"]["exterior"]
    move_to(page, (left + right) / 2, (top + bottom) / 2)
    star = answer["details"]["objects"][3]["tokens"]
    expect(tokens.locator("li code")).to_have_text([one["text"] for one in star])
    expect(tokens.get_by_role("status")).to_contain_text("star: 5 tokens; the least sure, ")
    expect(view(page).locator("tr.highlighted")).to_contain_text("star")
    # They stay to be read once the mouse is elsewhere.
    move_to(page, 5, 5)
    expect(view(page).locator("tr.highlighted")).to_have_count(0)
    expect(tokens).to_be_visible()
    field(page, "Lowest confidence").fill("1")
    expect(tokens).to_be_hidden()


def test_a_caption_shows_its_tokens(page):
    choose(page, TABLE, "Caption")
    [text] = ask(page)["details"]["texts"]
    view(page).locator(".tags p").focus()
    # No word has a place.
    expect(view(page).locator(".near-help")).to_be_hidden()
    codes = view(page).locator(".tokens li code").all_text_contents()
    assert codes == [token["text"] for token in text["tokens"]]
    assert "".join(codes).strip() == text["text"]


# Times


def test_the_second_question_about_an_image_has_no_vision_stage(page, tmp_path):
    unseen = tmp_path / "unseen.png"
    Image.new("RGB", (320, 240), (9, 99, 199)).save(unseen)
    choose(page, unseen)
    first = ask(page)["details"]
    times = view(page).locator(".times")
    stages = times.locator("dt")
    expect(stages).to_have_text([re.compile(f"^{one}") for one in (*first["seconds"], "rest")])
    expect(times.locator("dd").first).to_have_text(f"{first['seconds']['vision']:.3f} s")
    expect(times.locator(".bar .vision")).to_be_visible()
    encoded = view(page).get_by_text("Image already encoded: no vision stage")
    expect(encoded).to_be_hidden()
    field(page, "Task").select_option("Caption")
    ask(page)
    expect(encoded).to_be_visible()
    expect(times.locator(".bar .vision")).to_have_count(0)
    expect(stages).to_have_text([re.compile(f"^{one}") for one in ("prompt", "decode", "rest")])


# Two answers


def test_an_answer_is_kept_beside_the_next_one(page):
    kept = view(page, "Kept answer")
    expect(page.get_by_role("button", name="Keep")).to_be_disabled()
    choose(page, IMAGES / "scene_home.jpg")
    first = ask(page)
    page.get_by_role("button", name="Keep").click()
    assert rows(kept) == rows(view(page)) == rows_of(first)
    choose(page, IMAGES / "scene_bike.png", "Phrase grounding")
    field(page, "Text").fill("star. tree")
    second = ask(page)
    assert (rows(kept), rows(view(page))) == (rows_of(first), rows_of(second))
    facts = "demo, fp32 on cpu (torch)"
    expect(kept.locator(".question")).to_have_text(f"Object detection · scene_home.jpg · {facts}")
    expect(view(page).locator(".question")).to_have_text(
        f"Phrase grounding · star. tree · scene_bike.png · {facts}"
    )
    # However long what was asked is, the pictures are at one height.
    view(page).locator(".question").evaluate("one => one.append(' and so on'.repeat(40))")
    boxes = [shown.locator(".stage").bounding_box() for shown in (view(page), kept)]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    assert boxes[0]["y"] == boxes[1]["y"]
    # Both are filtered, and each has tokens of its own.
    field(page, "Lowest confidence").fill("0.98")
    assert (rows(kept), rows(view(page))) == (rows_of(first, 0.98), rows_of(second, 0.98))
    kept.locator(".objects tbody tr:visible").first.hover()
    expect(kept.locator(".tokens")).to_be_visible()
    expect(view(page).locator(".tokens")).to_be_hidden()
    kept.get_by_role("button", name="Remove").click()
    expect(kept).to_be_hidden()
    expect(page.get_by_role("button", name="Keep")).to_be_focused()


def test_two_precisions_are_compared(page):
    choose(page, IMAGES / "scene_home.jpg")
    ask(page)
    page.get_by_role("button", name="Keep").click()
    page.get_by_text("Precision of the model").click()
    precision = field(page, "Precision")
    assert precision.locator("option").all_inner_texts()[:3] == ["auto", "fp32", "bf16"]
    expect(precision).to_have_value("fp32")
    precision.select_option("bf16")
    page.get_by_role("button", name="Load").click()
    expect(message(page)).to_have_text("Loaded. Ask again to compare.")
    expect(page.locator("#facts")).to_contain_text("bf16")
    ask(page)
    expect(view(page).locator(".question")).to_contain_text("demo, bf16 on cpu")
    expect(view(page, "Kept answer").locator(".question")).to_contain_text("demo, fp32 on cpu")
    assert {row[0] for row in rows(view(page))} == {"moon", "house", "ball"}
    precision.select_option("fp32")
    page.get_by_role("button", name="Load").click()
    expect(page.locator("#facts")).to_contain_text("fp32")


def test_a_runtime_is_chosen_where_there_are_several(page, app, console):
    """And one that cannot be loaded is said."""

    def offer(route: Route) -> None:
        answer = route.fetch()
        runtimes = ["auto", "torch", "openvino"]
        route.fulfill(response=answer, json={**answer.json(), "runtimes": runtimes})

    expect(field(page, "Runtime")).to_be_hidden()
    page.route("**/get_session_info", offer)
    open_app(page, app)
    page.get_by_text("Precision of the model").click()
    expect(field(page, "Runtime")).to_have_value("torch")
    field(page, "Runtime").select_option("openvino")
    refusal = {"code": "bad_request", "message": f"It does not fit: {MARKUP}."}
    page.route("**/deploy_from_api", lambda route: route.fulfill(status=400, json=refusal))
    with page.expect_request("**/deploy_from_api") as asked:
        page.get_by_role("button", name="Load").click()
    assert asked.value.post_data_json == {
        "state": {
            "model_name": "demo",
            "deploy_params": {"device": "cpu", "precision": "fp32", "runtime": "openvino"},
        }
    }
    expect(message(page)).to_have_text(refusal["message"])
    expect(page.get_by_text("Ready", exact=True)).to_be_visible()
    expect(page.get_by_role("button", name="Ask")).to_be_enabled()
    assert "status of 400" in console.pop()


# The commands


def run_curl(page: Page, folder) -> dict:
    command = ["bash", "-c", page.locator("#curl").inner_text()]
    ran = subprocess.run(command, cwd=folder, capture_output=True, check=True, timeout=60)
    assert ran.stderr == b""
    return without_ids(json.loads(ran.stdout))


def run_python(page: Page, folder) -> dict:
    command = [sys.executable, "-c", page.locator("#python").inner_text()]
    ran = subprocess.run(command, cwd=folder, capture_output=True, check=True, timeout=60)
    return without_ids(json.loads(ran.stdout))


def without_ids(value):
    """The same without what is new in every answer: the ids of labels."""
    if isinstance(value, list):
        return [without_ids(one) for one in value]
    if isinstance(value, dict):
        return {key: without_ids(one) for key, one in value.items() if key not in ("id", "key")}
    return value


ODD = 'it\'s "odd"; a, b\\c $(touch ran) `d`=@.jpg'


@pytest.mark.parametrize(
    ("name", "task", "text", "classes", "more"),
    [
        ("image.jpg", "Phrase grounding", "blue ball", {}, {"confidence_threshold": 0.2}),
        ("image.jpg", "Object detection", "", {}, {"mapping": {"it's": "ball"}}),
        (ODD, "Phrase grounding", "blue ball", {'it\'s "$HOME" \\ `ls`\U0001f44d': "box"}, {}),
        (
            "-",
            "Referring segmentation",
            "ball",
            {"true": "box"},
            {"geometry": "bitmap", "num_beams": 1, "nms_across_classes": True, "classes": None},
        ),
    ],
    ids=["a threshold", "a mapping", "quotes everywhere", "a dash, and words of Python"],
)
def test_the_commands_that_are_shown_give_the_same_answer(
    page, tmp_path, name, task, text, classes, more
):
    image = tmp_path / name
    shutil.copy(TABLE, image)
    choose(page, image, task, **more)
    if text:
        field(page, "Text").fill(text)
    for class_name, prompts in classes.items():
        add_class(page, class_name, prompts)
    answer = ask(page)
    found = {label["classTitle"] for label in answer["annotation"]["objects"]}
    assert found & {"it's", "blue ball", *classes}
    detailed = {key: value for key, value in answer.items() if key != "details"}
    assert run_curl(page, tmp_path) == without_ids(detailed)
    assert run_python(page, tmp_path) == without_ids(answer["annotation"])
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_command_is_copied(page, app):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=app.url)
    for name in ("curl", "python"):
        page.get_by_role("button", name=f"Copy {name}").click()
        expect(message(page)).to_have_text("Copied.")
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied.strip() == page.locator(f"#{name}").inner_text().strip()


# What goes wrong


def test_an_error_of_the_app_is_shown_as_its_sentence(page, console, tmp_path):
    choose(page, TABLE, confidence_treshold=0.3)
    answer = ask(page)
    assert "confidence_threshold" in answer["message"]
    expect(message(page)).to_have_text(answer["message"])
    expect(message(page)).to_have_class("bad")
    damaged = tmp_path / "damaged.png"
    damaged.write_text("no picture")
    field(page, "As JSON").fill("")
    field(page, "Image of your own").set_input_files(damaged)
    expect(message(page)).to_have_text(re.compile("This browser cannot show the file"))
    expect(message(page)).to_have_text(ask(page)["message"])
    assert len(console) == 2
    assert all("status of 400" in console.pop() for _ in range(2))


def test_an_image_that_the_browser_cannot_show_is_answered_all_the_same(page, tmp_path):
    picture = tmp_path / "table.tiff"
    Image.open(TABLE).save(picture)
    choose(page, picture)
    expect(message(page)).to_have_text(re.compile("This browser cannot show the file"))
    answer = ask(page)
    page.get_by_role("button", name="Keep").click()
    assert rows(view(page)) == rows(view(page, "Kept answer")) == rows_of(answer)


@pytest.mark.parametrize("more", ["{", "[]", "null"])
def test_settings_that_are_no_object_are_not_sent(page, more):
    choose(page, TABLE)
    page.get_by_text("More settings").click()
    field(page, "As JSON").fill(more)
    page.get_by_role("button", name="Ask").click()
    expect(message(page)).to_have_text("More settings must be a JSON object; correct them.")
    assert settings_shown(page) == {"task_prompt": "<OD>"}


def test_an_app_that_is_gone_is_said(page, console):
    choose(page, TABLE)
    page.route("**/inference_image", lambda route: route.abort())
    page.get_by_role("button", name="Ask").click()
    expect(message(page)).to_have_text("The app did not answer: Failed to fetch.")
    assert console.pop() == "Failed to load resource: net::ERR_FAILED"
    page.unroute_all()
    page.route("**/page/samples/*", lambda route: route.abort())
    page.get_by_role("radio", name="scene bike").check(force=True)
    expect(message(page)).to_have_text("The sample cannot be had: Failed to fetch.")
    assert console.pop() == "Failed to load resource: net::ERR_FAILED"


def test_an_answer_that_ends_in_the_middle_is_said_and_the_kept_one_stays(page):
    choose(page, TABLE)
    first = ask(page)
    page.get_by_role("button", name="Keep").click()
    cut = {"status": 200, "content_type": "application/json", "body": '{"annotation": {"obj'}
    page.route("**/inference_image", lambda route: route.fulfill(**cut))
    page.get_by_role("button", name="Ask").click()
    expect(message(page)).to_have_text(re.compile("^The app did not answer: "))
    expect(view(page).locator(".objects")).to_be_hidden()
    assert rows(view(page, "Kept answer")) == rows_of(first)
    page.unroute_all()
    assert rows_of(ask(page)) == rows(view(page))


def test_an_answer_is_not_shown_on_another_image(page):
    choose(page, TABLE)
    held: list[Route] = []
    page.route("**/inference_image", lambda route: held.append(route))
    with page.expect_request("**/inference_image"):
        page.get_by_role("button", name="Ask").click()
    expect(page.get_by_role("button", name="Ask")).to_be_disabled()
    field(page, "Image of your own").set_input_files(IMAGES / "scene_bike.png")
    expect(page.get_by_role("img", name="The image scene_bike.png")).to_be_visible()
    held[0].continue_()
    expect(page.get_by_role("button", name="Ask")).to_be_enabled()
    expect(message(page)).to_be_empty()
    expect(view(page).locator(".objects")).to_be_hidden()


def say_markup_of_the_model(route: Route) -> None:
    answer = route.fetch()
    named = dict.fromkeys(("model_name", "device", "precision", "runtime"), MARKUP)
    named |= {"device_warning": MARKUP, "notes": [MARKUP]}
    named |= {"precisions": [MARKUP], "runtimes": [MARKUP] * 3}
    route.fulfill(response=answer, json={**answer.json(), **named})


def with_markup(entry: dict) -> dict:
    """An answer with markup wherever a text may be."""
    details, annotation = entry["details"], entry["annotation"]
    details["model"] = dict.fromkeys(details["model"], MARKUP)
    details["answers"][0]["answer"] = MARKUP
    for one in details["objects"]:
        one["tokens"][0]["text"] = MARKUP
    details["texts"] = [{"tag": MARKUP, "text": MARKUP, **details["objects"][0]}]
    annotation["tags"] = [{"name": MARKUP, "value": MARKUP}]
    annotation["objects"][0]["geometryType"] = MARKUP
    return {**entry, "notes": [MARKUP]}


def test_names_and_texts_never_become_markup(page, app, tmp_path):
    form = {"state": json.dumps({"settings": {"mapping": {MARKUP: "ball"}}, "details": True})}
    with TABLE.open("rb") as sent:
        url = f"{app.url}/inference_image"
        entry = requests.post(url, files={"files": sent}, data=form, timeout=60).json()
    page.route("**/get_session_info", say_markup_of_the_model)
    page.route("**/inference_image", lambda route: route.fulfill(json=with_markup(entry)))
    open_app(page, app)
    expect(page.get_by_role("heading", level=1)).to_have_text(MARKUP)
    expect(page.get_by_role("alert")).to_have_text(MARKUP)
    expect(page.locator("#notes")).to_have_text(f"Note: {MARKUP}")
    assert page.locator("#facts .chip").all_inner_texts() == [MARKUP, MARKUP.lower(), MARKUP]
    image = tmp_path / f"{MARKUP}.jpg"
    shutil.copy(TABLE, image)
    choose(page, image, mapping={MARKUP: "ball"})
    canvas = view(page).locator("canvas")
    expect(canvas).to_have_attribute("aria-label", f"The image {image.name}")
    ask(page)
    expect(message(page)).to_contain_text(f"Note: {MARKUP}.")
    for _ in range(2):
        for number in range(len(rows(view(page)))):
            view(page).locator(".objects tbody tr").nth(number).focus()
            expect(view(page).locator(".tokens li code").first).to_have_text(MARKUP)
        page.get_by_role("button", name="Keep").click()
    for shown in (view(page), view(page, "Kept answer")):
        assert MARKUP in [row[0] for row in rows(shown)]
        expect(shown.locator(".question")).to_contain_text(
            f"{MARKUP}, {MARKUP} on {MARKUP} ({MARKUP})"
        )
        expect(shown.locator(".tags")).to_contain_text(MARKUP)
        assert MARKUP in text_in(shown, ".raw")
    for command in ("#curl", "#python"):
        expect(page.locator(command)).to_contain_text("<img src=x onerror=")
    assert page.locator("img:not(#samples img)").count() == 0
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
