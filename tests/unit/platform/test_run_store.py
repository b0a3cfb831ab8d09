"""What the files of a run say of its images."""

import json

import pytest

from serve.platform.run_store import IMAGES, UNSAVED, image_rows, noted_rows
from serve.sdk import sly

PLACE = "/florence2/runs/1/3f9a01bc"


def line(image_id, outcome):
    return json.dumps({"image_id": image_id, "outcome": outcome})


@pytest.mark.parametrize(
    ("text", "told"),
    [(f"{line(1, 'empty')}\n", []), (f'{line(1, "empty")}\n{{"image_id": 2', ["1"])],
)
def test_a_line_that_was_cut_off_is_told_and_the_others_count(monkeypatch, text, told):
    said = []
    monkeypatch.setattr(sly.logger, "warning", said.append)
    assert [row["image_id"] for row in image_rows(f"{PLACE}/{UNSAVED}", text)] == [1]
    assert [one.split(" lines")[0] for one in said] == told


def test_a_saved_line_has_the_say_over_one_that_was_not_saved_yet():
    texts = {
        f"{PLACE}{IMAGES}000000.jsonl": line(1, "labeled"),
        f"{PLACE}/{UNSAVED}": f"{line(1, 'intended')}\n{line(2, 'intended')}",
    }
    found = {image_id: row["outcome"] for image_id, row in noted_rows(texts).items()}
    assert found == {1: "labeled", 2: "intended"}
