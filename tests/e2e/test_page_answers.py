"""The page in a browser: what it shows of answers, and the commands for the same."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from page_tools import (
    IMAGES,
    MARKUP,
    TABLE,
    add_class,
    ask,
    choose,
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
