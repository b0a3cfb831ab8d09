"""Notices that a client has left while its request is being answered.

A route cannot: the SDK's middleware stands between it and the server, and swallows that message.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from florence2.errors import GenerationCancelledError
from florence2.stopping import Stop

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
