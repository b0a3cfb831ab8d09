"""What of the public API the platform's own clients call and the app does not: agents, tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from platform_state import MOMENT, TEAM_ID, USER_ID, WORKSPACE_ID, Json, PlatformState

TASK_ID = 42
# The double answers a start with the task of the agent's number.
AGENT: Json = {
    "id": TASK_ID,
    "name": "labeler's machine",
    "token": "",
    "status": "running",
    "userId": USER_ID,
    "teamId": TEAM_ID,
    "capabilities": {},
    "createdAt": MOMENT,
    "updatedAt": MOMENT,
    "type": "sly_agent",
    "gpuInfo": {"device_memory": [{"available": 8 * 2**30, "total": 16 * 2**30}]},
}


def tasks_listed(state: PlatformState, payload: Json) -> Json:
    """The started tasks of a workspace: the app's, and one of another app that is no model's."""
    ours = {"id": TASK_ID, "meta": {"app": {"id": 1, "moduleId": 1}}}
    other = {"id": TASK_ID + 1, "meta": {}}
    rows = [ours, other] if payload["workspaceId"] == WORKSPACE_ID else []
    return {"total": len(rows), "perPage": 500, "pagesCount": 1, "entities": rows, "after": None}


CLIENT_METHODS: dict[str, Callable[[PlatformState, Any], Any]] = {
    "agents.available": lambda state, asked: [AGENT],
    "tasks.list": tasks_listed,
}
