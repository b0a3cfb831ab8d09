"""The page in a browser: its files, asking with it, and what goes wrong."""

from __future__ import annotations

import json
import re
import shutil
from base64 import b64encode

import pytest
import requests
from fastapi import FastAPI
from fastapi.testclient import TestClient
from page_tools import (
    IMAGES,
    MARKUP,
    SAMPLES,
    TABLE,
    add_class,
    ask,
    choose,
    color_at,
    drawing,
    field,
    message,
    move_to,
    open_app,
    rows,
    rows_of,
    run_curl,
    run_python,
    settings_shown,
    text_in,
    view,
    without_ids,
)
from PIL import Image
from playwright.sync_api import Route, expect

from florence2.tasks import TASKS, next_tasks
from serve.http.page import register_page

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


LATE_MODEL = """
const fetchNow = window.fetch;
window.fetch = async (url, options) => {
  if (String(url).includes("get_session_info"))
    await new Promise((done) => setTimeout(done, 400));
  return fetchNow(url, options);
};
window.places = new Set();
const look = () => {
  const first = document.querySelector("#samples input");
  if (first) window.places.add(first.getBoundingClientRect().top);
  requestAnimationFrame(look);
};
look();
"""


def test_samples_stay_where_they_are_first_seen_however_late_the_model_is_described(
    new_page, app, console
):
    page = new_page()
    page.add_init_script(LATE_MODEL)

    def warned(route):
        route.fulfill(json=route.fetch().json() | {"device_warning": "It is slow."})

    page.route("**/get_session_info", warned)
    page.goto(app.url)
    expect(page.get_by_text("It is slow.")).to_be_visible()
    expect(page.get_by_role("img", name=f"The image {SAMPLES[0]}")).to_be_visible()
    assert len(page.evaluate("[...window.places]")) == 1


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
