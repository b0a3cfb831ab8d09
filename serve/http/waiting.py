"""Requests that wait: on threads of their own, until they are answered or their client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from florence2.errors import FlorenceError, GenerationCancelledError
from florence2.stopping import Stop
from serve.http.routes import ROUTE_BY_PATH
from serve.platform.registry import InferenceRequest, RequestsManager

_GONE: Final = "florence.client_is_gone"
_DISCONNECT: Final = "http.disconnect"


def client_is_gone(scope: Scope) -> threading.Event:
    """Set once nobody waits for the answer any longer; never set outside of ``NoticesLeaving``."""
    event = scope.get(_GONE)
    return event if isinstance(event, threading.Event) else threading.Event()


def gone_or_none(is_gone: Callable[[], bool]) -> Stop:
    """What ends a wait that nobody waits for the end of."""
    return lambda: GenerationCancelledError("The client left.") if is_gone() else None


class NoticesLeaving:
    """The app inside; its routes find in the scope whether their client is gone."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        gone = threading.Event()
        watch = _Watch(receive, gone)
        try:
            await self._app({**scope, _GONE: gone}, watch.receive, send)
        finally:
            await watch.end()


class _Watch:
    """Reads the body for the app, and from its end on waits for the client to leave."""

    def __init__(self, receive: Receive, gone: threading.Event) -> None:
        self._receive = receive
        self._gone = gone
        self._leaving: asyncio.Task[Message] | None = None

    async def receive(self) -> Message:
        if self._leaving is not None:
            # Whoever asks may be cancelled; the task goes on for whoever asks next.
            return await asyncio.shield(self._leaving)
        message = await self._receive()
        if message["type"] == _DISCONNECT:
            self._gone.set()
        elif not message.get("more_body", False):
            self._leaving = asyncio.create_task(self._wait())
        return message

    async def _wait(self) -> Message:
        message = await self._receive()
        while message["type"] != _DISCONNECT:
            message = await self._receive()
        self._gone.set()
        return message

    async def end(self) -> None:
        if self._leaving is not None:
            self._leaving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._leaving


Done = TypeVar("Done")

# Those who wait only hold a thread; the queue of the scheduler limits what is in hand.
MAX_WAITING: Final = 256
_MAX_PLAIN: Final = 64
_LOOK_AFTER_S: Final = 0.25


class BusyError(FlorenceError):
    """As many requests of the kind wait as may; the same request can succeed soon."""

    code = "queue_full"


class Waiting:
    """Threads of one kind of work, ``size`` of them; who comes on top is refused."""

    def __init__(self, size: int = MAX_WAITING) -> None:
        self._size = size
        self._count = 0
        self._limiter = CapacityLimiter(size)

    async def run(self, work: Callable[..., Done], *arguments: object) -> Done:
        """``work`` in a thread. BusyError where all of them are taken."""
        self.check_room()
        return await self.run_accepted(work, *arguments)

    async def run_accepted(self, work: Callable[..., Done], *arguments: object) -> Done:
        """As ``run``, for what was told that there is room: it waits for its turn if need be."""
        # Only the thread of the event loop counts.
        self._count += 1
        try:
            return await to_thread.run_sync(work, *arguments, limiter=self._limiter)
        finally:
            self._count -= 1

    def check_room(self) -> None:
        """BusyError where nothing more can be taken on."""
        if self._count >= self._size:
            raise BusyError(
                f"At most {self._size} requests of this kind wait at a time, and all of these "
                "places are taken; send it again in a few seconds."
            )


async def run_wanted(
    request: Request, work: Callable[[Callable[[], bool]], Done], waiting: Waiting
) -> Done:
    """``work`` in a thread, told to stop when nobody waits for its result any longer."""
    return await waiting.run(work, client_is_gone(request.scope).is_set)


async def run_registered(
    request: Request,
    manager: RequestsManager,
    work: Callable[[InferenceRequest], Done],
    waiting: Waiting,
) -> Done:
    """``work`` on a new entry of the SDK's registry, which is stopped when its client leaves."""
    waiting.check_room()
    asked = manager.create()
    stopping = asyncio.create_task(_stop_when_gone(request, asked.stop))
    try:
        return await waiting.run(work, asked)
    finally:
        stopping.cancel()


async def _stop_when_gone(request: Request, stop: Callable[[], None]) -> None:
    gone = client_is_gone(request.scope)
    while not gone.is_set():
        await asyncio.sleep(_LOOK_AFTER_S)
    stop()


def use_own_threads(server: FastAPI, path_prefix: str = "") -> None:
    """Gives every route that may wait threads of its own; for routes that are added from now on.

    ``path_prefix`` is the SDK's ``SUPERVISELY_SERVER_PATH_PREFIX``.
    """

    class OwnThreads(APIRoute):
        def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:  # noqa: ANN401
            route = ROUTE_BY_PATH.get(path.removeprefix(path_prefix))
            if not inspect.iscoroutinefunction(endpoint) and (route is None or route.waits):
                endpoint = _in_own_threads(endpoint)
            super().__init__(path, endpoint, **options)

    server.router.route_class = OwnThreads


def _in_own_threads(endpoint: Callable[..., Done]) -> Callable[..., Any]:
    waiting = Waiting(_MAX_PLAIN)

    @functools.wraps(endpoint)
    async def run(*arguments: object, **named: object) -> Done:
        return await waiting.run(functools.partial(endpoint, *arguments, **named))

    return run
