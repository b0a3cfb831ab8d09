"""The task table as clients get it."""

import json

import pytest

from florence2.tasks import TASKS, TaskInput, find_task
from serve.http.handlers import instructions, tasks_json


def test_every_task_is_listed_in_the_order_of_the_table():
    listed = [entry["token"] for entry in tasks_json()["tasks"]]
    assert listed == [task.token for task in TASKS]


def test_a_task_says_what_it_takes_and_gives():
    grounding = next(t for t in tasks_json()["tasks"] if t["name"] == "phrase_grounding")
    assert grounding == {
        "token": "<CAPTION_TO_PHRASE_GROUNDING>",
        "name": "phrase_grounding",
        "takes": "text",
        "gives": "phrase_grounding",
        "summary": "boxes for the phrases of a text",
    }


def test_what_is_listed_is_plain_json():
    assert json.loads(json.dumps(tasks_json())) == tasks_json()


@pytest.mark.parametrize("entry", tasks_json()["tasks"], ids=lambda entry: entry["name"])
def test_token_and_name_of_a_listed_task_are_both_understood(entry):
    assert find_task(entry["token"]) is find_task(entry["name"])


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_instructions_name_every_task(task):
    found = [line for line in instructions().splitlines() if line.startswith(f"{task.token}: ")]
    assert len(found) == 1
    assert task.summary in found[0]
    assert ("text right after" in found[0]) == (task.takes is TaskInput.TEXT)
