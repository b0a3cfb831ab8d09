"""THE table of the app's routes: the SDK's and ours, and what the body of each must be.

The guard checks bodies by it, and the metrics take their labels from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from starlette.types import Scope


class Body(Enum):
    """What a route reads from the body of a request."""

    OPTIONAL = "nothing, or a JSON object"
    STATE = "a JSON object with the object 'state'"
    FORM = "a multipart form"


class RequestId(Enum):
    """Whether a route speaks about a running request, by ``state.inference_request_uuid``."""

    NONE = "none"
    ANY = "given, known or not"
    KNOWN = "given and known"


@dataclass(frozen=True, slots=True)
class Route:
    """``path`` has one segment. ``has_picture``: its JSON may carry a picture in base64.

    ``waits``: its answer may take as long as the platform or the model takes, and must not keep
    other routes from being answered.
    """

    path: str
    body: Body = Body.OPTIONAL
    request_id: RequestId = RequestId.NONE
    has_picture: bool = False
    waits: bool = False


def _about_a_request(path: str, request_id: RequestId = RequestId.KNOWN) -> Route:
    return Route(path, Body.STATE, request_id)


ROUTES: Final[tuple[Route, ...]] = (
    Route("/"),
    Route("/livez"),
    Route("/is_alive"),
    Route("/is_running"),
    Route("/readyz"),
    Route("/is_ready"),
    Route("/tasks"),
    Route("/metrics"),
    Route("/get_prompt_instructions"),
    Route("/visual_question_answering", Body.STATE, has_picture=True, waits=True),
    Route("/get_session_info"),
    Route("/get_tracking_settings"),
    Route("/get_custom_inference_settings"),
    Route("/get_model_meta"),
    Route("/get_output_classes_and_tags"),
    Route("/get_deploy_settings"),
    Route("/get_deploy_info"),
    Route("/get_status"),
    Route("/list_pretrained_models"),
    Route("/list_pretrained_model_infos"),
    Route("/is_deployed"),
    Route("/freeze_model", waits=True),
    Route("/deploy_from_api", Body.STATE, waits=True),
    Route("/run_speedtest", Body.STATE, waits=True),
    Route("/tag_objects", Body.STATE, waits=True),
    Route("/tag_objects_async", Body.STATE),
    Route("/smart_cache", Body.STATE, waits=True),
    Route("/smart_cache_files", Body.FORM, waits=True),
    Route("/inference_image", Body.FORM, waits=True),
    Route("/inference_batch", Body.FORM, waits=True),
    Route("/inference_batch_async", Body.FORM, waits=True),
    Route("/inference_video_async", Body.FORM, waits=True),
    Route("/inference_image_id", Body.STATE, waits=True),
    Route("/inference_image_id_async", Body.STATE),
    Route("/inference_image_url", Body.STATE, waits=True),
    Route("/inference_batch_ids", Body.STATE, waits=True),
    Route("/inference_batch_ids_async", Body.STATE),
    Route("/inference_video_id", Body.STATE, waits=True),
    Route("/inference_video_id_async", Body.STATE),
    Route("/inference_project_id_async", Body.STATE),
    Route("/tracking_by_detection", Body.STATE),
    _about_a_request("/get_inference_progress"),
    _about_a_request("/get_inference_status"),
    _about_a_request("/get_inference_result"),
    _about_a_request("/get_preparing_progress"),
    _about_a_request("/pop_inference_results"),
    _about_a_request("/stop_inference"),
    # Clients clear a request once more than needed, which the SDK answers with success.
    _about_a_request("/clear_inference_request", RequestId.ANY),
)

ROUTE_BY_PATH: Final = {route.path: route for route in ROUTES}

# Opens a port of a debugger in the container; a deployed app has no use for it.
NEVER_SERVED: Final = frozenset({"/debug"})

# On the platform its page asks the first for the token, and its agent stops the app by the
# second, both behind the platform's own log-in. Without the platform nothing asks who calls.
NOT_SERVED_LOCALLY: Final = frozenset({"/sly/session-info", "/sly/shutdown", "/shutdown"})


def path_of(scope: Scope, path_prefix: str = "") -> str:
    """The path as the table has it: without the server's root and the SDK's path prefix."""
    path: str = scope["path"]
    for prefix in (scope.get("root_path", ""), path_prefix):
        if prefix and path.startswith(prefix + "/"):
            path = path[len(prefix) :]
    return path


def is_api_path(path: str) -> bool:
    """Whether the path has exactly one segment, as every route of the SDK's API and ours has.

    A widget's route has the widget's id before the name of the event.
    """
    return path.strip("/") != "" and "/" not in path.strip("/")
