"""The report of a training in a browser: it opens offline, asks for nothing, and can be read."""

from __future__ import annotations

import pytest
from PIL import Image
from playwright.sync_api import expect

from florence2.finetune.report import write_report

NAME = "<b>\u732b</b>"
BOX = {"label": NAME, "score": 0.9, "rings": [[10, 10, 60, 10, 60, 40, 10, 40]]}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    picture = folder / "it's <1>.png"
    Image.new("RGB", (120, 80), "white").save(picture)
    quality = {"average_precision": 0.5, "recall": 0.75, "count": 4}
    tasks = [
        {"task": "<OD>", "metric": "mAP", "value": 0.5, "by_class": {NAME: quality}},
        {"task": "<OCR>", "metric": "characters right", "value": 0.25, "by_class": {}},
    ]
    record = {
        "model": "demo",
        "command": "florence2 train 'it is' --task \"<OD>\"",
        "status": "done",
        "metric": {"name": "mAP", "value": 0.5},
        "best_step": 2,
        "tasks": ["<OD>", "<OCR>"],
        "method": "lora",
        "images": {"train": 3, "val": 1},
        "left_out": [],
        "by_task": tasks,
        "training": {"steps": 2, "lora": {"rank": 16}},
    }
    sample = {"image": str(picture), "name": picture.name, "task": "<OD>"}
    curves = {
        "losses": [[1, 2.0], [2, float("nan")]],
        "validations": [{"step": 2, "value": 0.4, "tasks": tasks}],
        "samples": [{**sample, "found": [BOX], "wanted": [BOX]}],
    }
    write_report(folder / "report.html", record, curves)
    return folder / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_offline_without_a_request_or_an_error(report, new_page, console, scheme):
    page = new_page(color_scheme=scheme, offline=True, viewport={"width": 800, "height": 600})
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    expect(page.get_by_text("florence2 train 'it is' --task \"<OD>\"")).to_be_visible()
    row = page.get_by_role("row", name=f"{NAME} 4 0.500 0.750")
    expect(row).to_be_visible()
    assert asked == [report.as_uri()]
    picture = page.get_by_role("img", name="it's <1>.png, <OD>")
    assert picture.evaluate("image => image.naturalWidth") > 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 800
    colors = page.evaluate(
        "() => { const s = getComputedStyle(document.body); return getComputedStyle("
        "document.documentElement).colorScheme + s.color }"
    )
    assert ("255, 255, 255" in colors) == (scheme == "dark")
    page.context.close()
