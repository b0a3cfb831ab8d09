"""The methods of the platform's public API that the app and the SDK's clients call.

A method is a function of the state and the payload. It answers JSON, an image (its bytes are sent)
or Parts (images by id, sent as multipart); what it cannot do it refuses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from platform_state import Json, PlatformState


class Parts(dict[int, bytes]):
    """Contents by image id."""


Method = Callable[[PlatformState, Json], Any]
METHODS: dict[str, Method] = {}


def method(*names: str) -> Callable[[Method], Method]:
    def register(function: Method) -> Method:
        METHODS.update(dict.fromkeys(names, function))
        return function

    return register


def page(rows: list[Json], payload: Json) -> Json:
    """One page with everything that passes the filters."""
    for rule in [*payload.get("filter", []), *payload.get("filters", [])]:
        field, value = rule["field"], rule["value"]
        wanted = value if rule.get("operator") == "in" else [value]
        rows = [row for row in rows if row.get(field) in wanted]
    count = len(rows)
    return {"total": count, "perPage": 500, "pagesCount": 1, "entities": rows, "after": None}


@method("instance.version")
def instance_version(state: PlatformState, payload: Json) -> Json:
    return {"version": "6.99.0"}


@method("tasks.data.set", "tasks.app-v2.data.set")
def task_fields_set(state: PlatformState, payload: Json) -> Json:
    for item in payload.get("fields", []):
        state.task_fields[item["field"]] = item["payload"]
    return {"success": True}


@method("tasks.data.get")
def task_fields_get(state: PlatformState, payload: Json) -> Json:
    return {"result": {name: state.task_fields.get(name) for name in payload["fields"]}}


@method("tasks.meta.update", "tasks.output.set")
def accepted(state: PlatformState, payload: Json) -> Json:
    return {"success": True}


@method("file-storage.list")
def file_list(state: PlatformState, payload: Json) -> list[Json]:
    return copy.deepcopy(state.files)
