"""The registry of requests, told which of them somebody stands waiting for."""

from __future__ import annotations

from typing import Any, Final, TypeAlias

from serve.sdk import sly

Manager: TypeAlias = sly.nn.inference.inference_request.InferenceRequestsManager
InferenceRequest: TypeAlias = sly.nn.inference.inference_request.InferenceRequest
AWAITED: Final = "awaited"
FORGET_AFTER_S: Final = 60


class RequestsManager(Manager):  # type: ignore[misc]
    """The SDK's registry, whose ``run`` marks the request as awaited and soon forgets it.

    The SDK pauses every run at 500 results that nobody has fetched. The caller of ``run`` fetches
    at the end only, so that pause would last until it is given up an hour later.
    """

    def run(self, func: Any, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:  # noqa: ANN401
        """The results of ``func``, or its error."""
        request: InferenceRequest = kwargs.get("inference_request") or self.create()
        kwargs["inference_request"] = request
        request.context[AWAITED] = True
        try:
            results: list[dict[str, Any]] = super().run(func, *args, **kwargs)
            return results
        finally:
            self.remove_after(request.uuid, FORGET_AFTER_S)
