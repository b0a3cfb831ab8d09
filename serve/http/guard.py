"""The layers around the SDK's server: what is wrong with a request is said before the SDK fails.

``Guard`` is the outermost one. ``install_error_handlers`` puts the innermost one in place, which
answers what a route raises before the SDK's own middleware does.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from florence2.budget import WAIT_S, Budget, Hold
from florence2.errors import FlorenceError, RequestError, StoppedError
from serve.http.errors import (
    ForbiddenError,
    StalledError,
    TooLargeError,
    answer_to,
    answer_to_invalid_form,
    answer_to_refusal,
)
from serve.http.json_bodies import KnownRequest, Servers, checked_json, entries_of
from serve.http.routes import (
    NEVER_SERVED,
    NOT_SERVED_LOCALLY,
    OTHER,
    ROUTE_BY_PATH,
    Route,
    Takes,
)
from serve.limits import MAX_IMAGE_BYTES, MIB, held_bytes, readable_size
from serve.platform.failures import NotFoundError

CountRequest = Callable[[str, int, float], None]

# What web servers write down for a client that left before it got an answer.
_CLIENT_LEFT: Final = 499
_JSON: Final = "application/json"
_FORM: Final = "multipart/form-data"
_POLICY_VIOLATION: Final = 1008
# What asks how a run is going, or stops it, must get through when nothing else does. Every
# connection and run may have this much beyond the budget, so it is no more than that takes.
_ALWAYS_BYTES: Final = MIB // 16
# Of one that waits, to notice that its client left.
_READ_ON_BYTES: Final = MIB // 4
# JSON is held as it came, as text, and as what is in it.
_COPIES_OF_JSON: Final = 3
_LOOK_AFTER_S: Final = 0.05
_STALLED_S: Final = 60.0
_BODY: Final = "florence.body"
_ENDING: Final = (
    "The app ends, and the request was not answered in time; send it again to the session that "
    "comes next."
)
_DISCONNECT: Final = "http.disconnect"
ALLOW_HOSTS_VARIABLE: Final = "FLORENCE_ALLOW_HOSTS"

_AUTHORITY: Final = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?", re.IGNORECASE)
_DEFAULT_PORTS: Final = {"http": "80", "https": "443"}
_FOREIGN_SITES: Final = frozenset({"cross-site", "same-site"})
# A link to the page is no harm: it is opened for a person to see, and does nothing by itself.
_LINKED_PATH: Final = "/"
_SHOWN_CHARACTERS: Final = 100


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


class Guard:
    """Wraps the SDK's Application; everything but the call itself is the Application's.

    ``known_request`` tells whether a running request has an id, and must not block. ``callers``
    are those of an app that no platform's log-in stands before, and None for a session of the
    platform. ``servers`` may be named by requests. ``count_request`` gets
    every answered request: the route of the table or ``"other"``, status, seconds.
    ``path_prefix`` is the SDK's ``SUPERVISELY_SERVER_PATH_PREFIX``. ``uploads`` counts the bodies
    of all requests. ``on_end`` is called once, when the server answers nobody any more and before
    the Application ends; it may block.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        known_request: KnownRequest,
        callers: Callers | None,
        servers: Servers,
        *,
        count_request: CountRequest | None = None,
        path_prefix: str = "",
        uploads: Uploads | None = None,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        self.uploads = uploads or Uploads(held_bytes())
        self._on_end = on_end
        self._app = app
        self._limits = limits
        self._known_request = known_request
        self._callers = callers
        self._servers = servers
        is_local = callers is not None and not servers.is_session
        self._not_served = NEVER_SERVED | NOT_SERVED_LOCALLY if is_local else NEVER_SERVED
        self._count_request = count_request
        self._path_prefix = path_prefix

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._app, name)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._answer_counted(scope, receive, send)
        elif scope["type"] == "websocket" and not self._may_connect(scope):
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
        elif scope["type"] == "lifespan":
            await self._app(scope, partial(self._until_the_end, receive), send)
        else:
            await self._app(scope, receive, send)

    async def _until_the_end(self, receive: Receive) -> Message:
        message = await receive()
        if message["type"] == "lifespan.shutdown" and self._on_end is not None:
            await asyncio.to_thread(self._on_end)
        return message

    def _may_connect(self, scope: Scope) -> bool:
        try:
            if self._callers is not None:
                self._callers.check(scope, path_of(scope, self._path_prefix))
        except ForbiddenError:
            return False
        return True

    async def _answer_counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        started_s = time.perf_counter()
        status = _CLIENT_LEFT
        path = path_of(scope, self._path_prefix)
        body = self.uploads.begin(scope, receive)

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await answer_faults(partial(self._answer, path, body), scope, body.receive, watch)
        except asyncio.CancelledError:
            # The server ends, and waits no longer for this request.
            if status != _CLIENT_LEFT:
                raise
            await answer_to(StoppedError(_ENDING), path)(scope, receive, watch)
        finally:
            await body.end()
            if self._count_request is not None:
                label = path if path in ROUTE_BY_PATH else OTHER
                self._count_request(label, status, time.perf_counter() - started_s)

    async def _answer(
        self, path: str, body: Body, scope: Scope, receive: Receive, send: Send
    ) -> None:
        if self._callers is not None:
            self._callers.check(scope, path)
        if path in self._not_served:
            raise NotFoundError(f"There is no {path} here; see GET / for what there is.")
        route = ROUTE_BY_PATH.get(path)
        content_type = header_of(scope, b"content-type").lower()
        media_type = content_type.partition(";")[0].strip()
        # The SDK takes any mention of it for JSON, wherever it stands in the header.
        if _JSON in content_type and media_type != _JSON:
            raise RequestError(
                f"JSON has Content-Type application/json, and {content_type[:100]} was received; "
                "correct it."
            )
        if route is not None and scope["method"] == "POST":
            _check_content_type(route, content_type, media_type)
        body.limit(self._max_bytes(route, media_type))
        if media_type == _JSON:
            raw = await body.read()
            if raw is None:
                return
            body.replace(
                checked_json(raw, route, is_api_path(path), self._known_request, self._servers)
            )
        await body.hand_to(self._app, send)

    def _max_bytes(self, route: Route | None, media_type: str) -> int:
        if media_type == _FORM:
            return self._limits.multipart_bytes
        if media_type == _JSON and route is not None and route.has_picture:
            return self._limits.encoded_bytes
        return self._limits.json_bytes


def _check_content_type(route: Route, received: str, media_type: str) -> None:
    if route.takes is Takes.STATE and media_type != _JSON:
        wanted = "JSON: set Content-Type to application/json"
    elif route.takes is Takes.FORM and media_type != _FORM:
        wanted = "a multipart form with the field 'files': set Content-Type to multipart/form-data"
    else:
        return
    raise RequestError(
        f"{route.path} takes {wanted}; {received[:100] or 'no Content-Type'} was received."
    )


# How bodies arrive


@dataclass(frozen=True, slots=True)
class Limits:
    """``encoded_bytes`` is for the routes whose JSON carries a picture in base64.

    Base64 needs four bytes for three, so the default fits one picture of ``MAX_IMAGE_BYTES``.
    """

    json_bytes: int = 32 * MIB
    encoded_bytes: int = MAX_IMAGE_BYTES * 4 // 3 + MIB
    multipart_bytes: int = 512 * MIB


def header_of(scope: Scope, name: bytes) -> str:
    """The first value of a header, ``""`` without one; ``name`` is in lower case."""
    return next(headers_of(scope, name), "")


def headers_of(scope: Scope, name: bytes) -> Iterator[str]:
    """All values of a header; ``name`` is in lower case."""
    for key, value in scope["headers"]:
        if key.lower() == name:
            yield value.decode("latin-1")


def client_is_gone(scope: Scope) -> threading.Event:
    """Set once nobody waits for the answer any longer; never set outside of ``Uploads``."""
    body = scope.get(_BODY)
    return body.gone if isinstance(body, Body) else threading.Event()


def keep_body(scope: Scope) -> Hold:
    """The hold of a request's body, which from now on is the caller's to release.

    For work that goes on behind the answer. Empty outside of ``Uploads``.
    """
    body = scope.get(_BODY)
    return body.keep() if isinstance(body, Body) else Hold(Budget(0, "bytes"))


class Uploads:
    """The requests whose bodies arrive now; all of it on the event loop."""

    def __init__(
        self, budget: Budget, wait_s: float = WAIT_S, stalled_s: float = _STALLED_S
    ) -> None:
        self.budget = budget
        self.wait_s = wait_s
        self.stalled_s = stalled_s
        self._arriving: dict[Body, None] = {}

    def begin(self, scope: Scope, receive: Receive) -> Body:
        """One request: use the body's ``scope`` and ``receive``, and end it."""
        body = Body(self, scope, receive)
        self._arriving[body] = None
        return body

    def has_come(self, body: Body) -> None:
        """Nothing more of it will arrive."""
        self._arriving.pop(body, None)

    def take(self, body: Body, count: int) -> bool:
        """Counts that much more of a body if it may be held, and says whether."""
        hold, wanted = body.hold, body.hold.amount + count
        if wanted <= _ALWAYS_BYTES or self._goes_on(body):
            hold.resize(wanted)
            return True
        return self.budget.grow(hold, count, is_bulk=wanted > MAX_IMAGE_BYTES)

    def _goes_on(self, body: Body) -> bool:
        """Whether it is the first of those that arrive, and few besides them will be released."""
        arriving = sum(one.hold.amount for one in self._arriving)
        first = next((one for one in self._arriving if one.hold.amount or one is body), None)
        return first is body and self.budget.held - arriving <= self.budget.capacity // 4


class Body:
    """One request's body: passed on as it arrives, as soon as there is room for it.

    From its end on it waits for the client to leave, which sets ``gone``.
    """

    def __init__(self, uploads: Uploads, scope: Scope, receive: Receive) -> None:
        self.hold = Hold(uploads.budget)
        self.gone = threading.Event()
        self.scope = {**scope, _BODY: self}
        self._uploads = uploads
        self._receive = receive
        self._read: deque[Message] = deque()
        self._reading: asyncio.Task[Message] | None = None
        self._leaving: asyncio.Task[Message] | None = None
        self._instead: Message | None = None
        self._max_bytes: int | None = None
        self._size = 0
        self._refusal: FlorenceError | None = None
        self._is_kept = False
        is_json = "json" in header_of(scope, b"content-type").lower()
        self._copies = _COPIES_OF_JSON if is_json else 1

    def limit(self, max_bytes: int) -> None:
        """From now on more raises TooLargeError; at once if ``Content-Length`` announces it."""
        self._max_bytes = max_bytes
        announced = header_of(self.scope, b"content-length")
        self._check_size(int(announced) if announced.isdecimal() else 0)

    async def read(self) -> bytes | None:
        """The whole body, or None if the client left before it was sent."""
        parts: list[bytes] = []
        more = True
        while more:
            message = await self.receive()
            if message["type"] == _DISCONNECT:
                return None
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        return b"".join(parts)

    def replace(self, content: bytes) -> None:
        """The app gets this JSON in place of what was read."""
        replaced = (b"content-type", b"content-length", b"transfer-encoding")
        headers = [
            (key, value) for key, value in self.scope["headers"] if key.lower() not in replaced
        ]
        headers += [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(content)),
        ]
        self.scope["headers"] = headers
        self._instead = {"type": "http.request", "body": content, "more_body": False}

    async def hand_to(self, app: ASGIApp, send: Send) -> None:
        """Runs ``app`` on it.

        Raises what ``receive`` raised also where the app made another error of it; an answer that
        the app had already begun is left to it.
        """
        started = False

        async def muted(message: Message) -> None:
            nonlocal started
            if self._refusal is not None and not started:
                return
            started = True
            await send(message)

        try:
            await app(self.scope, self.receive, muted)
        except Exception as error:
            if self._refusal is None or started or error is self._refusal:
                raise
            raise self._refusal from None
        if self._refusal is not None and not started:
            raise self._refusal

    async def receive(self) -> Message:
        """The next message, as ASGI has it; NoRoomError, StalledError or TooLargeError for one."""
        if self._instead is not None:
            message, self._instead = self._instead, None
            return message
        if self._leaving is not None:
            # Whoever asks may be cancelled; the task goes on for whoever asks next.
            return await asyncio.shield(self._leaving)
        try:
            message = await self._next_with_room()
        except FlorenceError as error:
            self._refusal = error
            raise
        if message["type"] == _DISCONNECT:
            self.gone.set()
        elif not message.get("more_body", False):
            self._uploads.has_come(self)
            self._leaving = asyncio.create_task(self._wait_for_leaving())
        return message

    def keep(self) -> Hold:
        """The hold, which ``end`` leaves alone from now on."""
        self._is_kept = True
        return self.hold

    async def end(self) -> None:
        """The request is answered, or its client has left."""
        self._uploads.has_come(self)
        if not self._is_kept:
            self.hold.release()
        for task in (self._reading, self._leaving):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})

    async def _next_with_room(self) -> Message:
        message = await self._next()
        if message["type"] == "http.request":
            count = len(message.get("body", b""))
            if not await self._find_room(count * self._copies):
                return {"type": _DISCONNECT}
            self._size += count
            self._check_size(self._size)
        return message

    def _check_size(self, size: int) -> None:
        if self._max_bytes is not None and size > self._max_bytes:
            raise TooLargeError(
                f"The body of this request can have at most {readable_size(self._max_bytes)}, and "
                "more was sent; send fewer or smaller images at a time."
            )

    async def _next(self) -> Message:
        if self._read:
            return self._read.popleft()
        message = await self._read_on(self._uploads.stalled_s)
        if message is None:
            raise StalledError(
                f"The body of a request must not pause for {self._uploads.stalled_s:g} s, and "
                "this one did; send it again."
            )
        return message

    async def _read_on(self, patience_s: float) -> Message | None:
        """The next message, or None where there is none in time."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._receive())
        await asyncio.wait({self._reading}, timeout=patience_s)
        if not self._reading.done():
            return None
        reading, self._reading = self._reading, None
        return reading.result()

    async def _find_room(self, count: int) -> bool:
        """Waits for it on the event loop; False if the client left meanwhile.

        That it left comes behind what it had sent, so a little more of that is read.
        """
        ends = time.monotonic() + self._uploads.wait_s
        while not self._uploads.take(self, count):
            if time.monotonic() >= ends:
                raise self._uploads.budget.refusal(count, self._uploads.wait_s)
            if sum(len(message.get("body", b"")) for message in self._read) > _READ_ON_BYTES:
                await asyncio.sleep(_LOOK_AFTER_S)
            elif (message := await self._read_on(_LOOK_AFTER_S)) is not None:
                if message["type"] == _DISCONNECT:
                    return False
                self._read.append(message)
        return True

    async def _wait_for_leaving(self) -> Message:
        # Where there was no room at first, somebody is at the next message already.
        reading, self._reading = self._reading, None
        message = await (reading or self._receive())
        while message["type"] != _DISCONNECT:
            message = await self._receive()
        self.gone.set()
        return message


# Who may call


@dataclass(frozen=True, slots=True)
class Callers:
    """The names that the server goes by, besides loopback ones.

    ``names`` were given by whoever started it; pages of these are its own, too, as a proxy may
    stand before it. ``machine_names`` are what it found out itself. ``any_address`` answers to
    every numeric address: a page of others has a name, and never a number, in its ``Host``.
    """

    names: frozenset[str] = frozenset()
    machine_names: frozenset[str] = frozenset()
    any_address: bool = False

    @classmethod
    def of(cls, listens_on: str, names: Iterable[str] = ()) -> Callers:
        """For a server that listens on ``listens_on``; RequestError for what is no name."""
        allowed = frozenset(_checked_name(name) for name in names)
        if not is_everywhere(listens_on):
            own = _authority(f"[{listens_on}]" if ":" in listens_on else listens_on)
            return cls(allowed, frozenset([own[0]] if own else []))
        machine = socket.gethostname().lower().rstrip(".")
        return cls(allowed, frozenset({machine, f"{machine.split('.')[0]}.local"}), True)

    @classmethod
    def from_environment(cls, listens_on: str, names: Iterable[str] = ()) -> Callers:
        """With the names of ``FLORENCE_ALLOW_HOSTS`` besides ``names``."""
        return cls.of(listens_on, [*names, *entries_of(os.environ.get(ALLOW_HOSTS_VARIABLE))])

    def check(self, scope: Scope, path: str) -> None:
        """ForbiddenError for a request or a websocket that a web page of others has sent."""
        host = self._checked_host(_values(scope, b"host"))
        if self._has_own_origin(_values(scope, b"origin"), host):
            # A page on a host that was allowed may be another site, as the browser sees it.
            return
        site = _values(scope, b"sec-fetch-site")
        if _FOREIGN_SITES.intersection(site) and not _is_followed_link(scope, path):
            raise _foreign(f"one on another site ({site[0]})")

    def _checked_host(self, values: list[str]) -> tuple[str, str] | None:
        """The name and the port of ``Host``, which no browser leaves out."""
        if not values:
            return None
        host = _authority(values[0]) if len(values) == 1 else None
        if host is None or not self._answers_to(host[0]):
            raise ForbiddenError(
                "This server answers under its own names only, and the request is for "
                f"{_shown(values)}; use localhost, or have it started with that name in "
                f"--allow-host or {ALLOW_HOSTS_VARIABLE}."
            )
        return host

    def _answers_to(self, name: str) -> bool:
        if name in self.names or name in self.machine_names or name == "localhost":
            return True
        address = _address(name)
        # The SDK's client of an app in the same program asks 0.0.0.0, which is this machine too.
        is_here = address is not None and (address.is_loopback or address.is_unspecified)
        return is_here or (address is not None and self.any_address)

    def _has_own_origin(self, values: list[str], host: tuple[str, str] | None) -> bool:
        """Whether a page of its own is named; ForbiddenError where one of others is."""
        if not values:
            return False
        scheme, _, rest = values[0].lower().partition("://")
        origin = _authority(rest) if len(values) == 1 and scheme in _DEFAULT_PORTS else None
        if origin is None:
            raise _foreign(_shown(values))
        default = _DEFAULT_PORTS[scheme]
        is_own = host is not None and (origin[0], origin[1] or default) == (
            host[0],
            host[1] or default,
        )
        if not is_own and origin[0] not in self.names:
            raise _foreign(_shown(values))
        return True


def is_everywhere(host: str) -> bool:
    """Whether who listens on ``host`` listens on every address of the machine."""
    address = _address(host)
    return not host or (address is not None and address.is_unspecified)


def _checked_name(name: str) -> str:
    found = _authority(f"[{name}]" if _address(name) is not None and ":" in name else name)
    if found is None or found[1]:
        raise RequestError(
            f"A host that is allowed is a name or an address alone, and {name[:100]!r} was "
            "received; write for example label.example.org."
        )
    return found[0]


def _authority(text: str) -> tuple[str, str] | None:
    """Name and port, in one spelling: lower case, no final dot, addresses as Python has them."""
    found = _AUTHORITY.fullmatch(text)
    if found is None:
        return None
    name = found[1].lower().removesuffix(".")
    address = _address(name.strip("[]"))
    if name.startswith("[") and address is None:
        return None
    return str(address) if address is not None else name, found[2] or ""


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _is_followed_link(scope: Scope, path: str) -> bool:
    return (
        scope.get("method") in ("GET", "HEAD")
        and path == _LINKED_PATH
        and _values(scope, b"sec-fetch-mode") == ["navigate"]
        and _values(scope, b"sec-fetch-dest") == ["document"]
    )


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.strip() for value in headers_of(scope, name)]


def _shown(values: list[str]) -> str:
    return repr(", ".join(values)[:_SHOWN_CHARACTERS])


def _foreign(page: str) -> ForbiddenError:
    return ForbiddenError(
        f"This server answers programs and its own page only, and a web page, {page}, sent this; "
        f"have the page's host named in --allow-host or {ALLOW_HOSTS_VARIABLE} if it is yours."
    )


# What is raised becomes an answer


async def answer_faults(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Run ``app``; what it raises becomes an answer, or is raised if one was already begun."""
    started = False

    async def watch(message: Message) -> None:
        nonlocal started
        started = started or message["type"] == "http.response.start"
        await send(message)

    try:
        await app(scope, receive, watch)
    # Whatever a route raises, the client gets a status it can act on and the log the trace.
    except Exception as error:
        if started:
            raise
        await answer_to(error, scope["path"])(scope, receive, send)


def install_error_handlers(server: FastAPI, path_prefix: str = "") -> None:
    """Teach the SDK's server to answer our errors. Call it before ``Inference.serve()``.

    ``serve()`` adds the SDK's own middleware around what is there, and that middleware answers
    every exception with its ``repr``; ours has to stand inside of it to be asked first.
    ``path_prefix`` is the SDK's ``SUPERVISELY_SERVER_PATH_PREFIX``.
    """

    async def on_florence_error(request: Request, error: Exception) -> Response:
        return answer_to(error, request.url.path)

    async def on_invalid_form(request: Request, error: Exception) -> Response:
        if not isinstance(error, RequestValidationError):
            raise error
        return answer_to_invalid_form(error)

    async def on_refusal(request: Request, error: Exception) -> Response:
        """Pages and widgets keep the framework's answer."""
        if not isinstance(error, HTTPException):
            raise error
        path = path_of(request.scope, path_prefix)
        if not is_api_path(path) or error.status_code >= 500 or not isinstance(error.detail, str):
            return await http_exception_handler(request, error)
        return answer_to_refusal(error, path, request.method)

    handlers: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
        FlorenceError: on_florence_error,
        RequestValidationError: on_invalid_form,
        HTTPException: on_refusal,
    }
    for kind, handler in handlers.items():
        server.add_exception_handler(kind, handler)
    server.add_middleware(UnexpectedErrors, path_prefix=path_prefix)


class UnexpectedErrors:
    """Answers what a route of the API did not foresee; pages and widgets keep the SDK's dialog."""

    def __init__(self, app: ASGIApp, path_prefix: str = "") -> None:
        self._app = app
        self._path_prefix = path_prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not is_api_path(path_of(scope, self._path_prefix)):
            await self._app(scope, receive, send)
            return
        await answer_faults(self._app, scope, receive, send)
