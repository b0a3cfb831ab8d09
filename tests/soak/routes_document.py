"""An OpenAPI document of the app's routes, made of their table: what each takes and may answer."""

from __future__ import annotations

from typing import Any

from serve.http.errors import STATUS_BY_CODE, UNEXPECTED, status_of
from serve.http.routes import ROUTES, RequestId, Route, Takes
from serve.platform.request_state import (
    DATASET_ID_KEYS,
    IMAGE_ID_KEYS,
    PROJECT_ID_KEYS,
    UPLOAD_MODES,
)
from serve.settings import Settings

Json = dict[str, Any]
READ_ONLY = ("/", "/livez", "/readyz", "/metrics")
ANY: Json = {}
IDS: Json = {"type": "array", "items": {"type": "integer"}, "maxItems": 4}
STATE: Json = {
    "settings": {"type": "object", "properties": dict.fromkeys(Settings.__annotations__, ANY)},
    **{key: {"anyOf": [IDS, {"type": "integer"}]} for key in IMAGE_ID_KEYS},
    **{key: {"type": "integer"} for key in PROJECT_ID_KEYS},
    **dict.fromkeys(DATASET_ID_KEYS, IDS),
    "upload_mode": {"enum": [*UPLOAD_MODES, None]},
    "resume": {"type": "boolean"},
    "max_failures": {"type": "string"},
    "batch_size": {"type": "integer"},
    "details": {"type": "boolean"},
    "text_prompt": {"type": "string"},
    "image_encoding": {"type": "string"},
    "image_url": {"type": "string"},
    "region": {"type": "array", "items": {"type": "number"}},
    "rectangle": ANY,
    "deploy_params": {"type": "object"},
    "model_name": {"type": "string"},
    "run": {"type": "string"},
    "videoId": {"type": "integer"},
    "startFrameIndex": {"type": "integer"},
    "framesCount": {"type": "integer", "maximum": 4},
    "image_hashes": {"type": "array", "items": {"type": "string"}},
    "num_iterations": {"type": "integer", "maximum": 2},
    "inference_request_uuid": {"type": "string"},
}
FILE: Json = {"type": "string", "format": "binary"}
FORM: Json = {
    "type": "object",
    "properties": {
        "files": {"type": "array", "items": FILE, "maxItems": 3},
        "settings": {"type": "string"},
        "state": {"type": "string"},
    },
}


def document() -> Json:
    paths = {route.path: {_method_of(route): _operation(route)} for route in ROUTES}
    info = {"title": "Serve Florence-2", "version": "1"}
    return {"openapi": "3.1.0", "info": info, "paths": paths}


def statuses() -> set[int]:
    """What a route of ours may answer: all of THE table but what nobody foresaw."""
    own = {200, 405, 411, 415, 422, *STATUS_BY_CODE.values()}
    return own - {status_of(UNEXPECTED)}


def _method_of(route: Route) -> str:
    return "get" if route.path in READ_ONLY else "post"


def _operation(route: Route) -> Json:
    answers = {str(status): {"description": "see errors.py"} for status in sorted(statuses())}
    if _method_of(route) == "get":
        return {"responses": answers}
    return {"requestBody": {"required": True, "content": _content(route)}, "responses": answers}


def _content(route: Route) -> Json:
    if route.takes is Takes.FORM:
        return {"multipart/form-data": {"schema": FORM}}
    needs_id = route.request_id is RequestId.KNOWN
    state: Json = {"type": "object", "properties": STATE}
    if needs_id:
        state["required"] = ["inference_request_uuid"]
    required = ["state"] if route.takes is Takes.STATE else []
    body = {
        "type": "object",
        "properties": {"state": state, "context": {"type": "object"}},
        "required": required,
    }
    return {"application/json": {"schema": body}}
