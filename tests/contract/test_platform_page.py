"""The page about a run over a project of the platform, in the team files beside its lines."""

from __future__ import annotations

import json

import pytest
from html_pages import Tags
from platform_state import TEAM_ID, WORKSPACE_ID

from serve.platform.page import Answer, HeldAnswers, add_line, draw_missing
from serve.platform.run_store import CUSTOM_DATA_KEY
from serve.provenance import Manifest
from serve.run_page.figures import RunFigures
from serve.sdk import sly


@pytest.fixture
def run(app, platform, seeded):
    """A run over images of the project, all of them unless told otherwise; its id, the progress at
    its end, and its files."""

    def start(route="inference_project_id_async", into=None, **state):
        settings = {"num_beams": 1, **state.pop("settings", {})}
        asked = {"projectId": seeded.project_id, "settings": settings, **state}
        progress, _ = app.done(route, asked)
        into = into or seeded.project_id
        assert CUSTOM_DATA_KEY in platform.state.project(into).custom_data, progress
        [run_id] = platform.state.project(into).custom_data[CUSTOM_DATA_KEY]
        folder = f"/florence2/runs/{into}/{run_id}/"
        found = platform.state.files_in(TEAM_ID, folder, recursive=True)
        files = {one.path.removeprefix(folder): one.content.decode() for one in found}
        return run_id, progress, files

    return start


def page_in(files):
    tags = Tags(files["report.html"])
    tags.check()
    return tags


def lines_in(files):
    texts = [text for path, text in files.items() if path.endswith(".jsonl")]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def test_a_run_over_a_project_leaves_a_page_that_shows_its_labels(run, platform, seeded):
    run_id, _, files = run(upload_mode="append", settings={"mapping": {"car<b>": ["car"]}})
    tags = page_in(files)
    text = "".join(tags.text)
    assert "Labels of street" in text
    assert "car<b>" in text
    assert f"florence2 undo {seeded.project_id} --run {run_id}" in text
    assert tags.values("src"), "labels are drawn"
    image_id = seeded.image_ids["scene_city.jpg"]
    address = platform.address.rstrip("/")
    assert (
        f"{address}/app/images/{TEAM_ID}/{WORKSPACE_ID}/{seeded.project_id}/"
        f"{seeded.dataset_ids['outside']}#image-{image_id}"
    ) in tags.values("href")


def test_the_figures_can_be_made_of_the_lines_alone(run, platform, seeded):
    run_id, _, files = run(upload_mode="append", settings={"text": "car"})
    figures = RunFigures()
    for line in lines_in(files):
        add_line(figures, line, seeded.project_id)
    stored = platform.state.project(seeded.project_id).custom_data[CUSTOM_DATA_KEY][run_id]
    counts = Manifest.of_json(stored).counts
    assert figures.num_images == counts["images"]
    assert figures.num_labels == counts["labels"] == figures.num_scored
    assert figures.counts["labeled"] == counts["labeled"]
    assert set(figures.classes) == {"car"}


def test_labels_of_another_process_are_drawn_from_what_the_platform_has(run, api, seeded):
    _, _, files = run(upload_mode="append", settings={"text": "car"})
    figures = RunFigures()
    for line in lines_in(files):
        add_line(figures, line, seeded.project_id)
    assert not any(low.jpeg for low in figures.lowest)
    draw_missing(api, figures)
    assert len(figures.lowest) == len(page_in(files).values("src"))
    assert all(low.jpeg for low in figures.lowest)


def test_what_failed_is_named_with_its_place_and_the_skipped_are_counted(run, platform, seeded):
    broken = platform.state.image(seeded.in_dataset("inside")[0])
    broken.name, broken.content = "cut <b>.jpg", b"no image"
    _, progress, files = run(upload_mode="skip_labeled")
    assert progress["exception"] is not None
    tags = page_in(files)
    text = "\n".join(tags.text)
    assert "1 of 5 images failed; all others are done." in text
    assert 'Send the request again as it was, with "resume": true' in text
    assert "cut <b>.jpg" in text
    assert "skip_labeled" in text
    assert "skipped" in text
    assert any(link.endswith(f"#image-{broken.id}") for link in tags.values("href"))


def test_images_that_were_named_by_their_ids_are_not_to_be_gone_on_with(app, platform, seeded):
    ids = list(seeded.image_ids.values())[:2]
    platform.state.image(ids[0]).content = b"no image"
    app.done("inference_batch_ids_async", {"images_ids": ids, "upload_mode": "append"})
    [run_id] = platform.state.project(seeded.project_id).custom_data[CUSTOM_DATA_KEY]
    path = f"/florence2/runs/{seeded.project_id}/{run_id}/report.html"
    text = "".join(page_in({"report.html": platform.state.files[path].content.decode()}).text)
    assert "Send the ids of the images again" in text


def test_labels_of_copies_are_looked_for_in_the_project_that_has_them(run, platform, seeded):
    into = platform.state.add_project("copies")
    platform.state.set_meta(into, sly.ProjectMeta().to_json())
    _, _, files = run(upload_mode="append", into=into.id, output_project_id=into.id)
    tags = page_in(files)
    text = "".join(tags.text)
    assert "Labels of copies" in text
    assert "resume" not in text, "all is done"
    inside = [link for link in tags.values("href") if "/app/images/" in link]
    assert inside
    assert all(f"/{into.id}/" in link and "#" not in link for link in inside)


def test_a_run_into_copies_is_not_to_be_gone_on_with(run, platform, app, seeded):
    into = platform.state.add_project("copies")
    platform.state.set_meta(into, sly.ProjectMeta().to_json())
    platform.state.image(seeded.in_dataset("inside")[0]).content = b"no image"
    _, _, files = run(upload_mode="append", into=into.id, output_project_id=into.id)
    text = "".join(page_in(files).text)
    assert "with its id as output_project_id" in text
    assert "resume" not in text


def test_whose_client_cannot_go_on_is_told_to_take_labels_back_first(run, platform, seeded):
    platform.state.image(seeded.in_dataset("inside")[0]).content = b"no image"
    _, _, files = run(upload_mode="append")
    assert "such as Predict App, labels them a second time" in "".join(page_in(files).text)


def test_one_image_that_somebody_waits_for_has_no_page(app, platform, seeded):
    state = {"image_id": seeded.labeled_id, "upload_mode": "append", "settings": {"num_beams": 1}}
    assert app.post("inference_image_id", state).status_code == 200
    found = platform.state.files_in(TEAM_ID, "/florence2/runs", recursive=True)
    assert not [one for one in found if one.path.endswith(".html")]


def test_pictures_are_held_only_as_far_as_there_is_room():
    held = HeldAnswers()
    for image_id in range(40):
        held.keep(image_id, Answer(is_truncated=True, picture=bytes(4_000_000)))
    answers = [held.take(image_id) for image_id in range(40)]
    assert all(answer.is_truncated for answer in answers)
    assert sum(answer.picture is not None for answer in answers) == 16
    held.keep(41, Answer(picture=b"image"))
    assert held.take(41).picture == b"image"
    assert held.take(41) == Answer()
