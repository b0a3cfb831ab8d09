"""What can be deployed, told before anything that runs is touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from florence2.errors import RequestError
from serve import model_service as deploy_params
from serve.model_service import check_runtime, device_name, named_model, params_from_state

MODELS = json.loads(Path(deploy_params.__file__).with_name("models.json").read_text())


def test_a_request_names_a_model_in_any_case():
    params = params_from_state({"model_name": "florence-2-BASE"}, MODELS)
    assert params["model_files"] == {"checkpoint": "Florence-2-base"}
    assert params["runtime"] == "PyTorch"


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({}, "Florence-2-large"),
        ({"deploy_params": None}, "Florence-2-large"),
        ({"deploy_params": {"model_files": {"checkpoint": "Florence-2-base-ft"}}}, "-base-ft"),
        ({"deploy_params": {"model_info": {"meta": {"model_name": "Florence-2-large-ft"}}}}, "-ft"),
    ],
)
def test_the_model_is_found_wherever_clients_name_it(given, name):
    params = params_from_state(given, MODELS)
    assert params["model_files"]["checkpoint"].endswith(name)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"model_name": "Florence-2-huge"}, "Florence-2-large"),
        ({"model_name": 7}, "7"),
        ({"deploy_params": "cpu"}, "deploy_params"),
        ({"deploy_params": {"device": 0}}, "device"),
        ({"deploy_params": {"runtime": "TensorRT"}}, "PyTorch"),
        ({"deploy_params": {"model_source": "Custom models"}}, "model_name"),
        ({"deploy_params": {"model_files": "x", "model_info": "y"}, "model_name": "z"}, "'z'"),
    ],
)
def test_what_cannot_be_deployed_is_said(state, says):
    with pytest.raises(RequestError, match=says):
        params_from_state(state, MODELS)


def test_another_checkpoint_must_be_allowed_by_its_exact_name():
    allowed = ("demo", "someone/fine-tune")
    params = params_from_state({"model_name": "someone/fine-tune"}, MODELS, allowed)
    assert params["model_files"] == {"checkpoint": "someone/fine-tune"}
    assert params["model_info"]["meta"]["model_name"] == "someone/fine-tune"
    for other in ("someone/other", "someone/fine-tune@main", "/", "..", ["someone/fine-tune"]):
        with pytest.raises(RequestError, match=r"someone/fine-tune.*--allow-deploy"):
            params_from_state({"model_name": other}, MODELS, allowed)


def test_rows_of_the_table_are_not_changed_by_a_deployment():
    row = named_model("Florence-2-base", MODELS)
    row["meta"] = None
    assert named_model("Florence-2-base", MODELS)["meta"]


@pytest.mark.parametrize("runtime", [None, "", "pytorch", "PyTorch", "torch", "auto"])
def test_the_runtime_has_one_name(runtime):
    assert check_runtime(runtime) == "PyTorch"


def test_a_device_nobody_chose_is_chosen(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert [device_name(one) for one in (None, "", "auto", "cuda:1")] == ["cpu"] * 3 + ["cuda:1"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert device_name(None) == "cuda:0"
