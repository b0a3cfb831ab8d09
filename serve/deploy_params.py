"""The parameters of a deployment as the SDK passes them around."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Final

import torch

from florence2.errors import RequestError, unknown_name

PRETRAINED: Final = "Pretrained models"
PYTORCH: Final = "PyTorch"
DEFAULT_MODEL: Final = "Florence-2-large"
ALLOW_DEPLOY_VARIABLE: Final = "FLORENCE_ALLOW_DEPLOY"
# As the SDK writes precisions.
PRECISION_NAMES: Final = {"fp32": "FP32", "fp16": "FP16", "bf16": "BF16"}

_RUNTIMES: Final = ("pytorch", "torch", "auto")


def device_name(device: object) -> str:
    """The device's name, chosen here when the caller did not: a GPU if there is one."""
    if device in (None, "", "auto"):
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if not isinstance(device, str):
        raise RequestError(
            f"A device is a name such as cpu or cuda:0, and {device!r} was received; name one."
        )
    return device


def check_runtime(runtime: object) -> str:
    """The runtime as the SDK writes it; RequestError for one that this app does not have."""
    if runtime in (None, ""):
        return PYTORCH
    if not isinstance(runtime, str) or runtime.lower() not in _RUNTIMES:
        raise RequestError(unknown_name("runtime", str(runtime), [PYTORCH]))
    return PYTORCH


def named_model(name: str, models: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of ``models.json`` for a name; for another checkpoint a row of its own."""
    for row in models:
        if row["meta"]["model_name"].lower() == name.lower():
            return dict(row)
    return {
        "Model": name,
        "meta": {
            "task_type": "prompt-based object detection",
            "model_name": name,
            "model_files": {"checkpoint": name},
        },
    }


def params_for(row: dict[str, Any], device: object, runtime: object = None) -> dict[str, Any]:
    """What ``_load_model_headless`` takes for a row of ``models.json``."""
    return {
        "model_source": PRETRAINED,
        "model_files": dict(row["meta"]["model_files"]),
        "model_info": row,
        "device": device_name(device),
        "runtime": check_runtime(runtime),
    }


def params_from_state(
    state: dict[str, Any], models: Sequence[dict[str, Any]], allowed: Collection[str] = ()
) -> dict[str, Any]:
    """The deployment that a ``/deploy_from_api`` request asks for.

    ``allowed`` are names beside those of ``models``: a name can be a folder, or any repository of
    the hub. Raises RequestError for what cannot be deployed, before anything that runs is touched.
    """
    given = state.get("deploy_params")
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise RequestError(
            f"deploy_params is an object, and {type(given).__name__} was received; send "
            '{"deploy_params": {"device": "cuda:0"}, "model_name": "Florence-2-base"}.'
        )
    source = given.get("model_source") or PRETRAINED
    if source != PRETRAINED:
        raise RequestError(
            f"Models come from the list of this app, and source {source!r} was received; send a "
            "model_name."
        )
    row = _row_of(state, given, models, allowed)
    return params_for(row, given.get("device"), given.get("runtime"))


def _row_of(
    state: dict[str, Any],
    given: dict[str, Any],
    models: Sequence[dict[str, Any]],
    allowed: Collection[str],
) -> dict[str, Any]:
    files, info = given.get("model_files") or {}, given.get("model_info") or {}
    meta = info.get("meta") if isinstance(info, dict) else None
    name = (
        state.get("model_name")
        or (meta or {}).get("model_name")
        or (files.get("checkpoint") if isinstance(files, dict) else None)
        or DEFAULT_MODEL
    )
    known = [row["meta"]["model_name"] for row in models]
    is_known = isinstance(name, str) and name.lower() in [one.lower() for one in known]
    if not is_known and name not in allowed:
        choices = list(dict.fromkeys([*known, *allowed]))
        raise RequestError(
            f"{unknown_name('model', str(name), choices)} Others can be deployed by a request once "
            f"the app is started with their names in --allow-deploy or {ALLOW_DEPLOY_VARIABLE}."
        )
    return named_model(name, models)
