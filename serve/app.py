"""The app on the platform: a thin subclass of the SDK's base for prompt-based detection.

It hands every way in to one predictor, and shields users from what the SDK gets wrong; each
override says what it is for.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any, Final

import uvicorn
from fastapi import Request

from florence2.errors import RequestError
from serve.answering import AnsweringApp
from serve.cli_predict import predict_path
from serve.http.bodies import Limits, Uploads, held_bytes
from serve.http.errors import install_error_handlers
from serve.http.guard import Guard
from serve.http.handlers import register_routes
from serve.http.origins import Callers, Servers
from serve.process import optional_autostart
from serve.sdk import sly

# isort: split
from supervisely.app.fastapi.subapp import SUPERVISELY_SERVER_PATH_PREFIX, _MainServer

_RETRIES_OF_A_NAMED_SERVER: Final = 2
HOST_VARIABLE: Final = "FLORENCE_HOST"
PORT_VARIABLE: Final = "FLORENCE_PORT"
DEFAULT_HOST: Final = "127.0.0.1"
# Where the entrypoint of config.json listens, whose command line the app does not see.
_EVERY_ADDRESS: Final = "0.0.0.0"


class Florence2App(AnsweringApp):
    """Serves Florence-2 with the interface that the platform's tools expect."""

    # An app that is made with a model serves inside of the SDK's constructor.
    _guarded: Guard | None = None

    def api_from_request(self, request: Request) -> sly.Api:
        """The platform of a request; RequestError where there is none."""
        api = getattr(request.state, "api", None)
        if api is not None and not os.environ.get("SERVER_ADDRESS"):
            # A server that a caller named, and nobody who set the app up.
            api.retry_count = min(api.retry_count, _RETRIES_OF_A_NAMED_SERVER)
        api = api or self.api
        if api is None:
            raise RequestError(
                "Images of the platform need its address and a token, and this app has none of "
                "them; start it with SERVER_ADDRESS and API_TOKEN, or send the image itself."
            )
        return api

    # The server

    @property
    def app(self) -> Any:  # noqa: ANN401 - an ASGI app
        """What uvicorn runs: the SDK's application behind the guard."""
        if self._guarded is None and self._app is not None:
            self._guarded = Guard(
                self._app,
                Limits(),
                lambda uuid: uuid in self.inference_requests_manager._inference_requests,
                self._callers(),
                self._servers(),
                count_request=self.metrics.count_request,
                path_prefix=SUPERVISELY_SERVER_PATH_PREFIX,
                uploads=Uploads(held_bytes()),
            )
        return self._guarded

    def _callers(self) -> Callers | None:
        if not self._is_local:
            # A session has the platform before it. One that a developer runs has not, unless the
            # platform reaches it through its tunnel.
            is_at_home = sly.is_development() and not sly.is_debug_with_sly_net()
            return Callers.from_environment(_EVERY_ADDRESS) if is_at_home else None
        given = self._local.callers if self._local else None
        return given or Callers.from_environment(os.environ.get(HOST_VARIABLE, DEFAULT_HOST))

    def _servers(self) -> Servers:
        if not self._is_local:
            return Servers(is_session=True)
        given = self._local.servers if self._local else None
        return given or Servers.from_environment()

    @property
    def _is_local(self) -> bool:
        """Whether a command line or a program started it: no platform stands before it."""
        is_started_here = bool(self._is_cli_deploy or self._is_quick_deploy)
        return is_started_here or not os.environ.get("SERVER_ADDRESS")

    def serve(self) -> None:
        """Mounts the routes and, from a command line, runs the server until it is stopped."""
        server = _MainServer().get_server()
        install_error_handlers(server, SUPERVISELY_SERVER_PATH_PREFIX)
        register_routes(server, self, with_page=self.gui is None)
        if self.gui is None:
            super().serve()
            return
        self.gui.has_model = self.is_model_deployed
        self.gui.is_starting = True
        with optional_autostart():
            super().serve()
        self.gui.is_starting = False

    def _run_server(self) -> None:
        """The SDK's listens on every address of the machine, always on port 8000."""
        listener = self._local.listener if self._local else None
        self._uvicorn_server = uvicorn.Server(self._server_config())
        self._uvicorn_server.run(sockets=[listener] if listener else None)

    def _run_server_in_thread(self) -> None:
        """For an app that a program made with ``model=``."""
        self._uvicorn_server = uvicorn.Server(self._server_config())
        self._server_thread = threading.Thread(target=self._uvicorn_server.run, daemon=True)
        self._server_thread.start()

    def _server_config(self) -> uvicorn.Config:
        return uvicorn.Config(
            self.app,
            host=os.environ.get(HOST_VARIABLE, DEFAULT_HOST),
            port=int(os.environ.get(PORT_VARIABLE, "8000")),
            ws="none",
            log_level="warning" if self._local else None,
        )

    def _inference_by_cli_deploy_args(self) -> None:
        """``predict`` of the SDK's command line; a damaged image must not end a folder's run."""
        if self._args.input is None:
            super()._inference_by_cli_deploy_args()
            return
        sys.exit(predict_path(self, self._args))
