"""The page that ``florence2 label`` leaves beside its report."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest
from html_pages import Tags
from label_fakes import color_in, one_box, paint, result

from florence2.records import Box, Failure, Quad

EVIL_CLASS = "car<img src=x onerror=alert(1)>"


def page_in(out):
    tags = Tags((out / "report.html").read_text("utf-8"))
    tags.check()
    return tags


def text_in(out):
    return "\n".join(page_in(out).text)


def pictures_in(out):
    return len(page_in(out).values("src"))


@pytest.fixture
def odd_images(tmp_path):
    """Images with names that mean something in HTML, in addresses, or nothing at all as text."""
    folder = tmp_path / "photos #1 <b>"
    names = ["a b%20c.png", "<script>alert(1)<.png", "ü?é#1.png", "quote'\"&.png", "sub/d;x.png"]
    names += ["javascript:alert(1).png", "literal\\xff.png"]
    for number, name in enumerate(names):
        paint(folder / name, number)
    bytes_of_image = (folder / names[0]).read_bytes()
    for name in (b"good\xff.png", b"broken\xfe.png"):
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(bytes_of_image if name.startswith(b"good") else b"nothing")
    (folder / "broken <b>.png").write_bytes(b"nothing")
    return folder


def test_every_link_leads_to_its_file_whatever_that_is_called(label, odd_images):
    done = label(odd_images, "--class", f"{EVIL_CLASS}=car", "--recursive")
    tags = page_in(done.out)
    links = tags.values("href")
    files = [os.path.join(os.fsencode(done.out), unquote_to_bytes(link)) for link in links]
    assert all(os.path.exists(file) for file in files)
    names = {os.path.basename(file) for file in files}
    assert {b"broken\xfe.png", b"broken <b>.png"} <= names
    assert {b"a b%20c.png", b"javascript:alert(1).png"} <= names
    assert not any(":" in link for link in links)


def test_a_hostile_name_of_a_class_stays_a_name(label, odd_images):
    done = label(odd_images, "--class", f"{EVIL_CLASS}=car", "--recursive")
    text = "".join(page_in(done.out).text)
    assert EVIL_CLASS in text
    assert "<script>alert(1)<.png" in text
    assert "2 of 10 images failed; all others are done." in text


def test_the_page_says_what_was_done_and_how_to_undo_and_retry_it(label, images, report_of):
    (images / "1.png").write_bytes(b"this is no image")
    done = label(images, "--class", "cat", "--num-beams", "1")
    text = text_in(done.out)
    [run] = [json.loads(line)["run"] for line in (done.out / "runs.jsonl").open()]
    assert "1 of 5 images failed" in text
    assert f"florence2 undo {done.out} --run {run}" in text
    assert report_of(done.out)["retry_command"] in text
    assert "An image must be in a known format" in text
    assert "num_beams" in text
    assert pictures_in(done.out) == 4


def test_a_later_run_writes_the_page_anew(label, images, model):
    model.answer = lambda ask: (
        Failure("too_slow", "It took too long.") if color_in(ask)[0] == 3 else one_box(ask)
    )
    out = label(images).out
    assert "It took too long." in text_in(out)
    model.answer = one_box
    label(images, "--retry-failed")
    text = text_in(out)
    assert "All 5 images are labeled." in text
    assert "It took too long." not in text
    assert text.count("florence2 undo") == 2, "labels of two runs are there"
    label(images)
    assert text_in(out).count("florence2 undo") == 2, "a run that has nothing to do is none"


def test_a_run_that_stops_says_where_and_how_to_go_on(label, images, model):
    model.answer = lambda ask: Failure("too_slow", "It took too long.")
    out = label(images, "--batch", "1", "--max-failures", "1").out
    text = text_in(out)
    assert "Stopped early after 2 of 5 images, 2 of them failed:" in text
    assert "Go on with:" in text
    assert f"The run was started in {Path.cwd()} on {socket.gethostname()}; type it there." in text
    assert f"{out / 'report.html'} on {socket.gethostname()}; the links of a copy" in text


def test_a_run_that_is_interrupted_has_its_page(label, images, model):
    def interrupt(ask):
        if color_in(ask)[0] >= 2:
            raise KeyboardInterrupt
        return one_box(ask)

    model.answer = interrupt
    done = label(images, "--batch", "1")
    assert done.code == 130
    text = text_in(done.out)
    assert "Stopped by somebody after 2 of 5 images; 3 are still to do." in text
    assert pictures_in(done.out) == 2


def test_what_was_read_has_no_score_and_is_drawn_by_lot(label, images, model):
    quad = Quad((4.0, 4.0, 20.0, 4.0, 20.0, 12.0, 4.0, 12.0), "EXIT <b>", None)
    model.answer = lambda ask: result(ask.task, quad, size=ask.image.size_wh)
    out = label(images, "--task", "<OCR_WITH_REGION>").out
    assert "has no scores" in text_in(out)
    assert "EXIT <b>" in text_in(out)
    assert pictures_in(out) == 5


def test_a_caption_is_shown_below_its_image(label, images, model):
    model.answer = lambda ask: result(ask.task, text="A <b>cat</b>.", size=ask.image.size_wh)
    out = label(images, "--task", "<CAPTION>").out
    assert "A <b>cat</b>." in "".join(page_in(out).text)
    assert pictures_in(out) == 5


def test_labels_that_somebody_changed_or_removed_are_named_and_not_drawn(label, images):
    out = label(images).out
    for name, objects in (("0", []), ("1", [{"classTitle": "of no project"}])):
        changed = out / f"project/ds0/ann/{name}.png.json"
        changed.write_text(json.dumps(json.loads(changed.read_text()) | {"objects": objects}))
    paint(images / "new.png", 9)
    label(images)
    assert pictures_in(out) == 4
    assert "Not drawn" in text_in(out)


def test_labels_of_a_run_that_is_undone_are_not_on_the_next_page(label, images):
    from serve.labeling.undo import runs_in, undo_in

    out = label(images).out
    undo_in(out, runs_in(out)[0].run)
    paint(images / "new.png", 9)
    label(images)
    text = text_in(out)
    assert "All 6 images are labeled." in text
    assert text.count("florence2 undo") == 1


def test_a_journal_of_an_earlier_version_has_a_page_without_classes(label, images):
    out = label(images).out
    journal = out / "journal.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines:
        line.pop("scores", None)
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (out / "report.html").unlink()
    label(images)
    text = text_in(out)
    assert "All 5 images are labeled." in text
    assert "(class not noted)" in text


def test_drawn_previews_are_what_links_lead_to(label, images, model):
    model.answer = lambda ask: result(
        ask.task, Box((4.0, 4.0, 20.0, 20.0), "cat", 0.2), size=ask.image.size_wh
    )
    out = label(images, "--draw").out
    assert "previews/3.png.jpg" in page_in(out).values("href")
