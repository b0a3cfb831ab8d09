"""The app with adapters: a request names one, and what runs is told."""

from __future__ import annotations

import hashlib
import json

import pytest
from adapter_tools import pair, write_adapter
from starlette.testclient import TestClient

FC2 = "model.language_model.decoder.layers.0.fc2"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Adapters that change much, so that their answers differ from the base's and one another's."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: write_adapter(folder / name, pair(FC2, ((2, 768), (192, 2)), seed), lora_alpha=100)
        for seed, name in enumerate(("cats", "dogs"))
    }


@pytest.fixture(scope="module")
def client(serve_for_module, folders):
    app = serve_for_module(adapters=tuple((name, str(folder)) for name, folder in folders.items()))
    with TestClient(app.app, "http://127.0.0.1:8000", raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def ask(client, image_path):
    image = image_path("scene_bike.png").read_bytes()

    def ask(**settings):
        state = {"settings": settings, "details": True}
        form = {"state": json.dumps(state)}
        return client.post("/inference_image", files=[("files", ("a.png", image))], data=form)

    return ask


def test_a_request_names_the_adapter_that_answers(ask, client, folders):
    answers = {
        name: ask(**({} if name is None else {"model": name})).json()
        for name in (None, "demo", "cats", "dogs")
    }
    raw = {name: answer["details"]["answers"][0] for name, answer in answers.items()}
    assert raw["demo"] == raw[None]
    assert len({json.dumps(answer) for answer in raw.values()}) == 3
    models = [answer["details"]["model"] for answer in answers.values()]
    assert [model.get("adapter") for model in models] == [None, "demo", "cats", "dogs"]
    refused = ask(model="cat")
    assert refused.status_code == 400
    assert refused.json()["message"] == (
        "Unknown adapter 'cat'. Did you mean 'cats'? Known: demo, cats, dogs."
    )


def test_questions_name_one_too(client, image_path):
    import base64

    image = base64.b64encode(image_path("scene_bike.png").read_bytes()).decode()

    def answer(**state):
        asked = {"image_encoding": image, "text_prompt": "<OD>", **state}
        return client.post("/visual_question_answering", json={"state": asked})

    assert answer().json() == answer(model=None).json() != answer(model="cats").json()
    assert answer(settings={"model": "cats"}).json() == answer(model="cats").json()
    for wrong in ({"model": "cat"}, {"settings": {"model": "cat"}}, {"model": [1]}):
        assert answer(**wrong).status_code == 400


def test_what_is_deployed_is_told(client, folders):
    session = client.post("/get_session_info", json={}).json()
    deployed = client.post("/get_deploy_info", json={}).json()["deploy_params"]
    for told in (session["adapters"], deployed["adapters"]):
        assert told == {
            name: {
                "folder": str(folder),
                "sha256": hashlib.sha256(
                    (folder / "adapter_model.safetensors").read_bytes()
                ).hexdigest(),
                "base": "demo",
                "base_revision": None,
            }
            for name, folder in folders.items()
        }
    assert any(note.startswith("Adapter cats: ") for note in session["notes"])


def test_an_adapter_alone_is_deployed_as_any_checkpoint(serve_locally, folders):
    folder = str(folders["cats"])
    app = serve_locally(allow_deploy=(folder,))
    with TestClient(app.app, "http://127.0.0.1:8000") as client:
        state = {"deploy_params": {"device": "cpu"}, "model_name": folder}
        assert client.post("/deploy_from_api", json={"state": state}).status_code == 200
        session = client.post("/get_session_info", json={}).json()
        assert session["model_name"] == folder
        assert session["adapter"]["base"] == "demo"
        assert "adapters" not in session
