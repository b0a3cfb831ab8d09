"""The platform, as far as the SDK's own clients can tell: a server on this machine.

It answers the public API over real HTTP, passes requests on to a running app the way the platform's
proxies do, keeps a log of calls, and breaks on demand: fails the n-th call of a method, answers
late, sends damaged images; by chance as platform_faults.py beside it says.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import requests
import uvicorn
from platform_faults import REFUSED_WITH, Fault, Hanging, RandomFaults, cut
from platform_methods import METHODS, Parts
from platform_state import (
    TEAM_ID,
    WORKSPACE_ID,
    Json,
    PlatformState,
    Refused,
    StoredFile,
    StoredImage,
)
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

TOKEN = "token-of-the-labeler"
TASK_ID = 42
SESSION_TOKEN = "session-of-the-app"
BOUNDARY = "part-of-many"


@dataclass(frozen=True)
class Call:
    method: str
    payload: Any


@dataclass
class Faults:
    """What breaks, by method; counts start at 1 and count the calls made after the request.

    ``by_chance`` breaks calls whatever their method.
    """

    statuses: dict[str, dict[int, int]] = field(default_factory=dict)
    gates: dict[str, threading.Event] = field(default_factory=dict)
    damaged: set[int] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    seen: dict[str, int] = field(default_factory=dict)
    by_chance: RandomFaults | None = None
    hanging: Hanging = field(default_factory=Hanging)

    def fail(self, method: str, *, call: int = 1, times: int = 1, status: int = 500) -> None:
        """The n-th call from now on, and so many in a row, get this status and change nothing."""
        first = self.seen.get(method, 0) + call
        self.statuses.setdefault(method, {}).update(
            dict.fromkeys(range(first, first + times), status)
        )

    def lose(self, method: str) -> None:
        """The next call of this method is carried out, and a proxy answers that it was not."""
        self.lost.add(method)

    @contextmanager
    def held(self, method: str) -> Iterator[threading.Event]:
        """Calls of this method are answered only after the event is set, or the block ends."""
        gate = self.gates[method] = threading.Event()
        try:
            yield gate
        finally:
            gate.set()
            self.gates.pop(method, None)

    def damage(self, image_id: int) -> None:
        """From now on the bytes of this image are cut in half."""
        self.damaged.add(image_id)

    def cut_file(self, path: str) -> None:
        """From now on the bytes of this file of the team end in the middle."""
        self.cut.add(path)

    def status_of_this_call(self, method: str) -> int | None:
        self.seen[method] = self.seen.get(method, 0) + 1
        return self.statuses.get(method, {}).get(self.seen[method])


class PlatformDouble:
    """A platform at ``address`` that holds ``state`` and passes requests on to ``app_url``."""

    def __init__(self, port: int = 0) -> None:
        self.app_url: str | None = None
        self.port = port
        routes = [
            Route("/public/api/v3/{method:path}", self._public, methods=["POST", "GET"]),
            Route(f"/net/{SESSION_TOKEN}/{{command:path}}", self._net, methods=["POST", "GET"]),
        ]
        self._routes = Starlette(routes=routes)
        self.reset()

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            # Only uvicorn's own object can end a connection without an answer.
            scope["abort"] = send.__self__.transport.abort
        await self._routes(scope, receive, send)

    def reset(self) -> None:
        self.state, self.faults, self.calls = PlatformState(), Faults(), list[Call]()

    def start(self) -> None:
        """Listens, after a stop on the same port again."""
        config = uvicorn.Config(
            self._app,
            host="127.0.0.1",
            port=self.port,
            log_level="critical",
            ws="none",
            interface="asgi3",
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("The double of the platform did not start.")
            self._thread.join(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]

    def stop(self, *, at_once: bool = False) -> None:
        """Stops listening, ``at_once`` also in the middle of calls."""
        self._server.should_exit = True
        self._server.force_exit = at_once
        self._thread.join(10)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def count(self, method: str) -> int:
        return sum(call.method == method for call in self.calls)

    async def _public(self, request: Request) -> Response:
        name = request.path_params["method"]
        payload = await self._payload(request)
        await self.faults.hanging.wait()
        by_chance = self.faults.by_chance
        fault = None if by_chance is None else by_chance.draw(name)
        if fault is Fault.DROPPED:
            request.scope["abort"]()
            return Response()
        return await run_in_threadpool(self._answer_or_break, name, payload, request.headers, fault)

    async def _payload(self, request: Request) -> Any:
        if request.method == "GET":
            return dict(request.query_params)
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            is_image = request.path_params["method"] == "images.bulk.upload"
            return await (_uploaded_images if is_image else _uploaded)(request)
        return json.loads(await request.body() or b"{}")

    def _answer_or_break(
        self, name: str, payload: Any, headers: Any, fault: Fault | None
    ) -> Response:
        if fault in REFUSED_WITH:
            return _refusal(Refused(f"{name} fails by chance.", status=REFUSED_WITH[fault]))
        if fault is Fault.SLOW and self.faults.by_chance is not None:
            self.faults.by_chance.wait()
        answer = self._answer(name, payload, headers)
        if fault is Fault.LOST:
            return _refusal(Refused("The answer was lost on its way.", status=504))
        return cut(answer) if fault is Fault.CUT else answer

    def _answer(self, name: str, payload: Any, headers: Any) -> Response:
        self.calls.append(Call(name, payload))
        if gate := self.faults.gates.get(name):
            gate.wait(60)
        if status := self.faults.status_of_this_call(name):
            return _refusal(Refused(f"{name} fails as the test asked.", status=status))
        try:
            if headers.get("x-api-key") != TOKEN:
                raise Refused("The token is not known.", status=403, kind="AUTH")
            answer = self._respond(self._result(name, payload))
            if name not in self.faults.lost:
                return answer
            self.faults.lost.remove(name)
            raise Refused("The answer was lost on its way.", status=504)
        except Refused as refused:
            return _refusal(refused)

    def _result(self, name: str, payload: Any) -> Any:
        if name == "tasks.info":
            return self._task_info(payload["id"])
        if name == "tasks.request.direct":
            return self._pass_on(payload)
        if name not in METHODS:
            raise Refused(f"The double has no method {name!r}.", status=404)
        return METHODS[name](self.state, payload)

    def _respond(self, result: Any) -> Response:
        if isinstance(result, Response):
            return result
        if isinstance(result, StoredImage):
            return Response(self._sent(result.id, result.content), media_type=result.mime)
        if isinstance(result, StoredFile):
            content = result.content
            is_cut = result.path in self.faults.cut
            return Response(content[: len(content) // 2] if is_cut else content)
        if isinstance(result, Parts):
            return self._multipart(result)
        return JSONResponse(result)

    def _sent(self, image_id: int, content: bytes) -> bytes:
        return content[: len(content) // 2] if image_id in self.faults.damaged else content

    def _multipart(self, parts: Parts) -> Response:
        lines = []
        for image_id, content in parts.items():
            head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{image_id}"\r\n\r\n'
            lines.append(head.encode() + self._sent(image_id, content) + b"\r\n")
        body = b"".join(lines) + f"--{BOUNDARY}--\r\n".encode()
        return Response(body, media_type=f"multipart/form-data; boundary={BOUNDARY}")

    def _task_info(self, task_id: int | str) -> Json:
        # The SDK sends what stood in the environment.
        if str(task_id) != str(TASK_ID):
            raise Refused(f"Task {task_id} is not found.", status=404)
        meta = {"sessionToken": SESSION_TOKEN, "app": {"id": 1, "moduleId": 1}}
        row = {"id": TASK_ID, "type": "app", "status": "started", "meta": meta}
        return {**row, "teamId": TEAM_ID, "workspaceId": WORKSPACE_ID}

    def _pass_on(self, payload: Json) -> Response:
        if payload["taskId"] != TASK_ID:
            raise Refused(f"Task {payload['taskId']} is not found.", status=404)
        body = {
            "state": payload["state"],
            "context": payload["context"],
            "api_token": TOKEN,
            "server_address": self.address,
        }
        answer = requests.post(f"{self.app_url}/{payload['command']}", json=body, timeout=60)
        return _copied(answer)

    async def _net(self, request: Request) -> Response:
        body, command = await request.body(), request.path_params["command"]
        kept = {"content-type", "x-api-key"}
        headers = {name: value for name, value in request.headers.items() if name in kept}
        answer = await run_in_threadpool(
            requests.request,
            request.method,
            f"{self.app_url}/{command}",
            data=body,
            headers=headers,
            timeout=60,
        )
        return _copied(answer)


async def _uploaded(request: Request) -> Json:
    """Files as the SDK sends them: name, folder and content, three parts for each."""
    async with request.form(max_files=10_000, max_fields=30_000) as form:
        parts = form.multi_items()
        if [key for key, _ in parts] != ["name", "path", "file"] * (len(parts) // 3):
            raise Refused("A file is sent as name, path and file, in this order.")
        values = [one if isinstance(one, str) else await one.read() for _, one in parts]
    files = list(zip(values[::3], values[1::3], values[2::3], strict=True))
    return {"teamId": int(request.query_params["teamId"]), "files": files}


async def _uploaded_images(request: Request) -> list[bytes]:
    """Files of images as the SDK sends them, a part for each."""
    async with request.form(max_files=10_000) as form:
        return [await one.read() for one in form.values() if not isinstance(one, str)]


def _copied(answer: requests.Response) -> Response:
    headers = {name: answer.headers[name] for name in ("Retry-After",) if name in answer.headers}
    kind = answer.headers.get("content-type")
    return Response(answer.content, answer.status_code, headers=headers, media_type=kind)


def _refusal(refused: Refused) -> Response:
    details: Json = {"type": refused.kind, "message": str(refused)}
    if refused.errors:
        details["errors"] = refused.errors
    body = {"error": str(refused), "details": [details]}
    return JSONResponse(body, status_code=refused.status)
