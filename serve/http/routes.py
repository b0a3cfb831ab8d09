"""THE table of the app's routes: the SDK's and ours, and what the body of each must be.

The guard checks bodies by it, and the metrics take their labels from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final


class Takes(Enum):
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
    takes: Takes = Takes.OPTIONAL
    request_id: RequestId = RequestId.NONE
    has_picture: bool = False
    waits: bool = False


def _about_a_request(path: str, request_id: RequestId = RequestId.KNOWN) -> Route:
    return Route(path, Takes.STATE, request_id)


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
    Route("/visual_question_answering", Takes.STATE, has_picture=True, waits=True),
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
    Route("/deploy_from_api", Takes.STATE, waits=True),
    Route("/run_speedtest", Takes.STATE, waits=True),
    Route("/tag_objects", Takes.STATE, waits=True),
    Route("/tag_objects_async", Takes.STATE),
    Route("/list_runs", Takes.STATE, waits=True),
    Route("/undo_run", Takes.STATE, waits=True),
    Route("/smart_cache", Takes.STATE, waits=True),
    Route("/smart_cache_files", Takes.FORM, waits=True),
    Route("/inference_image", Takes.FORM, waits=True),
    Route("/inference_batch", Takes.FORM, waits=True),
    Route("/inference_batch_async", Takes.FORM, waits=True),
    Route("/inference_video_async", Takes.FORM, waits=True),
    Route("/inference_image_id", Takes.STATE, waits=True),
    Route("/inference_image_id_async", Takes.STATE),
    Route("/inference_image_url", Takes.STATE, waits=True),
    Route("/inference_batch_ids", Takes.STATE, waits=True),
    Route("/inference_batch_ids_async", Takes.STATE),
    Route("/inference_video_id", Takes.STATE, waits=True),
    Route("/inference_video_id_async", Takes.STATE),
    Route("/inference_project_id_async", Takes.STATE),
    Route("/tracking_by_detection", Takes.STATE),
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

# What everything that is not in the table is counted as.
OTHER: Final = "other"

# Opens a port of a debugger in the container; a deployed app has no use for it.
NEVER_SERVED: Final = frozenset({"/debug"})

# On the platform its page asks the first for the token, and its agent stops the app by the
# second, both behind the platform's own log-in. Without the platform nothing asks who calls.
NOT_SERVED_LOCALLY: Final = frozenset({"/sly/session-info", "/sly/shutdown", "/shutdown"})
