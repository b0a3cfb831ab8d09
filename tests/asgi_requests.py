"""Requests as an ASGI server hands them on, and a guard to hand them to."""

import asyncio
import json

from serve.http.guard import Guard, Limits
from serve.http.json_bodies import Servers

JSON = [("content-type", "application/json")]
FORM = [("content-type", "multipart/form-data; boundary=x")]


def guard_around(inner, limits=None, callers=None, servers=None, is_known=None, **more):
    """A guard for which every request in the background is known, unless told otherwise."""
    is_known = is_known or (lambda uuid: True)
    return Guard(inner, limits or Limits(), is_known, callers, servers or Servers(), **more)


def scope_of(path, headers=(), method="POST", **more):
    pairs = [(name.encode(), value.encode()) for name, value in headers]
    return {
        "type": "http",
        "method": method,
        "path": path,
        "headers": pairs,
        "query_string": b"",
        "root_path": "",
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "scheme": "http",
        "http_version": "1.1",
        **more,
    }


def parts(*bodies, ends_with_disconnect=False):
    """The messages of a body that arrives in parts, and then the client leaves."""
    messages = [{"type": "http.request", "body": body, "more_body": True} for body in bodies]
    if ends_with_disconnect:
        return [*messages, {"type": "http.disconnect"}]
    messages[-1]["more_body"] = False
    return [*messages, {"type": "http.disconnect"}]


def ask(app, scope, messages):
    """Run one request; returns (status, body, what was sent, messages that were not read)."""
    waiting = list(messages)
    sent = []

    async def receive():
        return waiting.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    if not sent:
        return None, b"", sent, waiting
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], body, sent, waiting


class Inner:
    """An app that remembers what reached it and answers with the body it read."""

    def __init__(self, fail_with=None, start_first=False, read=True):
        self.scopes = []
        self.bodies = []
        self.last_message = None
        self._fail_with = fail_with
        self._start_first = start_first
        self._read = read

    def get_server(self):
        return "the server"

    async def __call__(self, scope, receive, send):
        self.scopes.append(scope)
        if scope["type"] != "http":
            return
        if self._start_first:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        if self._read:
            await self._read_all(receive)
        if self._fail_with is not None:
            raise self._fail_with
        if not self._start_first:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    async def _read_all(self, receive):
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.bodies.append(body)
        self.last_message = await receive()

    @property
    def json(self):
        return json.loads(self.bodies[-1])
