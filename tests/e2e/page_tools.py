"""What is done and read on the page, for its tests in a browser."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

from app_server import ROOT, AppServer
from playwright.sync_api import Locator, Page, expect

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


def add_class(page: Page, name: str, prompts: str) -> Locator:
    page.get_by_role("button", name="Add a class").click()
    added = page.locator(".class-row").last
    expect(added.get_by_role("textbox", name="Class")).to_be_focused()
    page.keyboard.type(name)
    page.keyboard.press("Tab")
    page.keyboard.type(prompts)
    return added


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
