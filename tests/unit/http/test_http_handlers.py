"""Files and settings of forms, through a real form parser; pictures as base64; the task table."""

import base64
import json
from contextlib import nullcontext

import pytest
from fastapi import Depends, FastAPI, UploadFile
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from florence2.errors import RequestError
from florence2.tasks import TASKS, TaskInput, find_task, parse_steps
from serve.http.errors import TooLargeError
from serve.http.guard import install_error_handlers
from serve.http.handlers import (
    check_fields,
    clean_name,
    decode_image,
    instructions,
    parse_state,
    read_one_upload,
    read_uploads,
    tasks_json,
)
from serve.limits import MAX_FILES


@pytest.fixture
def client():
    server = FastAPI()
    install_error_handlers(server)

    @server.post("/many")
    def many(files: list[UploadFile]):
        return [data.decode() for data in read_uploads(files)]

    @server.post("/small")
    def small(files: list[UploadFile]):
        return len(read_uploads(files, max_bytes=4))

    @server.post("/one")
    def one(files: list[UploadFile]):
        return read_one_upload(files).decode()

    @server.post("/checked", dependencies=[Depends(check_fields)])
    def checked(files: list[UploadFile]):
        return read_uploads(files)[0].decode()

    return TestClient(server)


def send(client, path, files):
    return client.post(path, files=[("files", file) for file in files])


def test_files_come_back_in_order_though_all_have_the_same_name(client):
    # The SDK's own client names them all image_0.png.
    response = send(client, "/many", [("image_0.png", b"a"), ("image_0.png", b"b")])
    assert response.json() == ["a", "b"]


def test_as_many_files_as_the_limit_are_all_answered(client):
    response = send(client, "/many", [("a", str(i).encode()) for i in range(MAX_FILES)])
    assert [int(data) for data in response.json()] == list(range(MAX_FILES))


def test_one_more_is_400(client):
    response = send(client, "/many", [("a", b"x")] * (MAX_FILES + 1))
    assert response.status_code == 400


def test_a_count_above_the_limit_says_both_numbers():
    with pytest.raises(RequestError, match="at most 2 files, and 3 were received"):
        read_uploads([UploadFile(None)] * 3, max_files=2)


def test_no_file_is_refused():
    with pytest.raises(RequestError, match="at least one file"):
        read_uploads([])


def test_a_file_above_its_limit_is_413_and_named(client):
    # the limit of /small is 4 bytes
    assert send(client, "/small", [("a.png", b"1234")]).json() == 1
    response = send(client, "/small", [("a.png", b"1234"), ("../b.png", b"12345")])
    assert response.status_code == 413
    assert "'b.png' has more" in response.json()["message"]


def test_an_upload_of_one_takes_exactly_one(client):
    assert send(client, "/one", [("a.png", b"x")]).json() == "x"
    response = send(client, "/one", [("a.png", b"x")] * 2)
    assert response.status_code == 400
    assert "2 were received" in response.json()["message"]


NAMES = {
    "plain": ("cat.png", "cat.png"),
    "other scripts": ("кот 猫.png", "кот 猫.png"),
    "climbing out": ("../../etc/passwd", "passwd"),
    "of another system": ("C:\\images\\cat.png", "cat.png"),
    "only dots": ("..", "image 3"),
    "empty": ("", "image 3"),
    "missing": (None, "image 3"),
    "ends in a slash": ("folder/", "image 3"),
    "markup": ("<b>.png", "b.png"),
    "line breaks and zero bytes": ("a\r\nb\0.png", "ab.png"),
    "very long": ("x" * 300 + ".png", "x" * 96 + ".png"),
}


@pytest.mark.parametrize(("name", "cleaned"), NAMES.values(), ids=NAMES)
def test_a_name_is_cleaned_for_messages(name, cleaned):
    assert clean_name(name, 2) == cleaned


STATES = {
    "nothing": (None, None, {}),
    "empty texts": ("", "", {}),
    "two empty objects, as FastAPI's defaults are": ("{}", "{}", {}),
    "state": ('{"settings": {"a": 1}}', "{}", {"settings": {"a": 1}}),
    "state wins": ('{"a": 1}', '{"settings": {"a": 2}}', {"a": 1}),
    "settings as the state": ("{}", '{"settings": {"a": 2}}', {"settings": {"a": 2}}),
    "settings without the wrapper": ("{}", '{"a": 2}', {"a": 2, "settings": {"a": 2}}),
    "a spaced empty state does not win": (" {} ", '{"settings": {}}', {"settings": {}}),
}


@pytest.mark.parametrize(("state", "settings", "expected"), STATES.values(), ids=STATES)
def test_the_state_of_a_form_follows_the_rules_of_the_sdk(state, settings, expected):
    assert parse_state(state, settings) == expected


def test_settings_beside_the_settings_are_refused():
    with pytest.raises(RequestError, match="task_prompt is one of the settings"):
        parse_state('{"task_prompt": "<CAPTION>", "batch_size": 2}', "{}")
    with pytest.raises(RequestError, match="geometry is one of the settings"):
        parse_state("{}", '{"geometry": "bitmap", "settings": {}}')


def test_a_setting_as_a_field_of_its_own_is_refused(client):
    files = {"files": ("a.png", b"x")}
    response = client.post("/checked", files=files, data={"task_prompt": "<CAPTION>"})
    assert response.status_code == 400
    assert "task_prompt is one of the settings" in response.json()["message"]
    assert client.post("/checked", files=files, data={"other": "1"}).json() == "x"


def test_what_the_sdk_sends_beside_the_settings_is_kept():
    beside = {"rectangle": [0, 0, 5, 5], "classes": ["cat"], "batch_size": 2, "upload_mode": None}
    assert parse_state(json.dumps(beside), "{}") == beside


BAD_STATES = {
    "not JSON": ("{", "{}", "'state'"),
    "a list": ("[]", "{}", "'state'"),
    "null": ("null", "{}", "'state'"),
    "settings not JSON": ("{}", "task: <OD>", "'settings'"),
    "settings is text": ("{}", json.dumps("<OD>"), "'settings'"),
    "nested too deeply": ("[" * 200_000, "{}", "'state'"),
}


@pytest.mark.parametrize(("state", "settings", "field"), BAD_STATES.values(), ids=BAD_STATES)
def test_a_state_that_is_no_object_is_refused(state, settings, field):
    with pytest.raises(RequestError, match=f"field {field} must be a JSON object"):
        parse_state(state, settings)


@given(data=st.binary(min_size=1), prefix=st.sampled_from(["", "data:image/png;base64,"]))
def test_what_was_encoded_comes_back(data, prefix):
    assert decode_image(prefix + base64.b64encode(data).decode()) == data


ENCODED = base64.b64encode(b"12345").decode()  # MTIzNDU=

TOLERATED = {
    "line breaks": "MTIz\r\nNDU=\n",
    "no padding": "MTIzNDU",
    "a data URL with parameters": "data:image/png;name=a;base64," + ENCODED,
    "a data URL in capitals": "DATA:;BASE64," + ENCODED,
}


@pytest.mark.parametrize("encoded", TOLERATED.values(), ids=TOLERATED)
def test_small_deviations_are_tolerated(encoded):
    assert decode_image(encoded) == b"12345"


JUNK = {
    "nothing": "",
    "only padding": "====",
    "only a prefix": "data:image/png;base64,",
    "missing": None,
    "a number": 5,
    "bytes": b"MTIz",
    "a list": ["MTIz"],
    "other characters": "MT!zNDU=",
    "other scripts": "картинка",
    "a character too many": "MTIzN",
    "an address": "https://example.com/cat.png",
    "a data URL that is not base64": "data:image/svg+xml,<svg/>",
}


@pytest.mark.parametrize("encoded", JUNK.values(), ids=JUNK)
def test_junk_is_refused_in_one_sentence(encoded):
    with pytest.raises(RequestError) as refused:
        decode_image(encoded)
    assert str(refused.value).endswith(".")
    assert len(str(refused.value)) < 200


def test_the_limit_counts_decoded_bytes():
    assert decode_image(ENCODED, max_bytes=5) == b"12345"
    with pytest.raises(TooLargeError, match="at most 4 bytes, and 5 bytes were received"):
        decode_image(ENCODED, max_bytes=4)


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
        "next": [task.token for task in TASKS if task.takes is TaskInput.REGION],
    }


def test_the_tasks_that_follow_another_make_a_cascade_with_it_and_no_others_do():
    for entry in tasks_json()["tasks"]:
        for task in TASKS:
            can_follow = task.token in entry["next"]
            with nullcontext() if can_follow else pytest.raises(RequestError):
                parse_steps(f"{entry['token']}+{task.token}")


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
