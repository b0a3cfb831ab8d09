"""Routes that wait have threads of their own: the others answer, and one too many is told so."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import anyio.to_thread
import pytest
from asgi_requests import JSON, ask, guard_around, parts, scope_of
from fastapi import BackgroundTasks, FastAPI, Request
from fastapi.testclient import TestClient

from florence2.errors import QueueFullError
from serve.http.guard import install_error_handlers
from serve.http.handlers import Waiting, use_own_threads
from serve.http.routes import ROUTES
from serve.platform.registry import RequestsManager

SHARED = 40
"""The threads that the framework has for all plain routes together."""


class Held:
    """A call that waits until it is let go, and counts those who wait."""

    def __init__(self):
        self.gate = threading.Event()
        self.num_waiting = 0
        self._lock = threading.Lock()

    def wait(self):
        with self._lock:
            self.num_waiting += 1
        self.gate.wait(30)
        return {"waited": True}


@pytest.fixture
def held():
    held = Held()
    yield held
    held.gate.set()


@pytest.fixture
def server(held):
    server = FastAPI()
    install_error_handlers(server)
    use_own_threads(server, "/prefix")

    @server.post("/prefix/run_speedtest")
    def run_speedtest(request: Request, tasks: BackgroundTasks) -> dict[str, bool]:
        return held.wait()

    @server.post("/Widget1/clicked")
    def clicked():
        return held.wait()

    @server.get("/is_alive")
    def is_alive():
        return {"running": True}

    return server


@pytest.mark.parametrize("path", ["/prefix/run_speedtest", "/Widget1/clicked"])
def test_more_slow_calls_than_threads_leave_the_other_routes_answering(server, held, path):
    async def crowd():
        limiter = anyio.to_thread.current_default_thread_limiter()
        calls = [asyncio.create_task(call(path, "POST")) for _ in range(SHARED + 1)]
        while held.num_waiting <= SHARED:
            await asyncio.sleep(0.01)
        assert limiter.borrowed_tokens == 0
        alive = await asyncio.wait_for(call("/is_alive", "GET"), 10)
        held.gate.set()
        return alive, await asyncio.gather(*calls)

    async def call(path, method):
        sent, messages = [], parts(b"{}")

        async def receive():
            return messages.pop(0) if messages else await asyncio.Event().wait()

        async def send(message):
            sent.append(message)

        await server(scope_of(path, JSON, method), receive, send)
        return sent[0]["status"], sent[1]["body"]

    alive, calls = asyncio.run(crowd())
    assert alive == (200, b'{"running":true}')
    assert calls == [(200, b'{"waited":true}')] * (SHARED + 1)


def test_one_call_too_many_is_told_when_to_come_back(held):
    server = FastAPI()
    install_error_handlers(server)
    use_own_threads(server, size=2)
    server.post("/freeze_model")(held.wait)
    server.post("/deploy_from_api")(lambda: {"other": True})
    with TestClient(server) as client, ThreadPoolExecutor(2) as others:
        waiting = [others.submit(client.post, "/freeze_model") for _ in range(2)]
        while held.num_waiting < 2:
            pass
        full = client.post("/freeze_model")
        other = client.post("/deploy_from_api")
        held.gate.set()
        assert [one.result().status_code for one in waiting] == [200, 200]
        assert client.post("/freeze_model").status_code == 200
    assert (full.status_code, full.json()["code"]) == (503, "queue_full")
    assert int(full.headers["retry-after"]) >= 1
    assert other.json() == {"other": True}


def test_a_place_is_free_again_after_a_failure():
    def fail():
        raise KeyError

    async def work():
        waiting = Waiting(1)
        for _ in range(3):
            with pytest.raises(KeyError):
                await waiting.run(fail)
        return await waiting.run(lambda: "done")

    assert asyncio.run(work()) == "done"


def test_what_was_told_that_there_is_room_waits_for_its_turn():
    async def work():
        waiting, gate, done = Waiting(1), threading.Event(), []
        first = asyncio.create_task(waiting.run_accepted(gate.wait, 20))
        second = asyncio.create_task(waiting.run_accepted(done.append, "second"))
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            waiting.check_room()
        gate.set()
        await asyncio.gather(first, second)
        return done

    assert asyncio.run(work()) == ["second"]


class Runs:
    """What a route that waits for a run needs: a platform and the SDK's registry."""

    def __init__(self):
        self.runs = RequestsManager(ThreadPoolExecutor(1))

    api_of = staticmethod(lambda request: None)


def test_a_full_place_starts_nothing_that_would_have_to_be_cleared():
    created = []
    services = Runs()
    services.runs.create = created.append

    async def work():
        with pytest.raises(QueueFullError):
            await Waiting(0).run_registered(Request(scope_of("/")), services, print, {})

    asyncio.run(work())
    assert created == []


def test_work_in_the_registry_is_stopped_when_its_client_leaves():
    stopped = []

    def work(api, state, inference_request):
        while not inference_request.is_stopped():
            time.sleep(0.01)
        stopped.append(state)

    async def route(scope, receive, send):
        while (await receive())["type"] == "http.request":
            state = {"a": 1}
            await Waiting().run_registered(Request(scope), Runs(), work, state)

    ask(guard_around(route), scope_of("/tag_objects", JSON), parts(b'{"state": {}}'))
    assert stopped == [{"a": 1}]


def test_who_waits_for_the_registry_takes_no_thread_of_the_background():
    executor = ThreadPoolExecutor(1)
    manager, gate = RequestsManager(executor), threading.Event()
    executor.submit(gate.wait, 30)

    def work(inference_request):
        inference_request.add_results([{"done": True}])

    try:
        assert manager.run(work) == [{"done": True}]
    finally:
        gate.set()


def test_routes_that_tell_how_things_are_never_wait():
    waits = {route.path for route in ROUTES if route.waits}
    assert waits.isdisjoint({"/is_alive", "/is_ready", "/livez", "/readyz", "/metrics", "/tasks"})
    assert waits.isdisjoint({"/get_inference_progress", "/pop_inference_results", "/get_status"})
    assert waits.isdisjoint({"/stop_inference", "/clear_inference_request"})
    assert waits >= {"/tag_objects", "/run_speedtest", "/deploy_from_api", "/smart_cache"}
