"""What an app in production mode asks of the platform: its task, its page's widgets, the workflow.

Joined to the other methods in ``platform_methods``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jsonpatch
from platform_state import TEAM_ID, Json, PlatformState, Refused, check_team

DONE = {"success": True}


def page_data_set(state: PlatformState, payload: Json) -> Json:
    """A patch of what the widgets of the page show, and the whole of what was chosen there."""
    content = payload["payload"]
    session = state.session
    session.page_data = jsonpatch.apply_patch(session.page_data, content.get("data", []))
    session.page_state |= content.get("state", {})
    return DONE


def task_meta_update(state: PlatformState, payload: Json) -> Json:
    state.session.meta |= {name: value for name, value in payload.items() if name != "id"}
    return DONE


def task_output_set(state: PlatformState, payload: Json) -> Json:
    state.session.output = payload["output"]
    return DONE


def input_add(state: PlatformState, payload: Json) -> Json:
    """What a task was made of: of a folder or file, that the team has it."""
    check_team(payload["teamId"])
    if payload["type"] in ("file", "folder"):
        path = payload.get("meta", {}).get("slug") or payload["id"]
        if not state.files_in(TEAM_ID, str(path), recursive=True):
            raise Refused(f"There is nothing at {path!r} in the team files.", status=404)
    state.session.inputs.append(payload)
    return DONE


PRODUCTION_METHODS: dict[str, Callable[[PlatformState, Any], Any]] = {
    "tasks.app-v2.data.set": page_data_set,
    "tasks.meta.update": task_meta_update,
    "tasks.output.set": task_output_set,
    "workflow.node.add-input": input_add,
}
