"""Bodies of all requests share one budget: counted as they arrive, waited for, given back."""

from __future__ import annotations

import asyncio
import json

from asgi_requests import FORM, JSON, guard_around, scope_of

from florence2.budget import Budget
from serve.http.guard import Uploads, client_is_gone, keep_body
from serve.limits import MIB

PATH = "/inference_batch"
PIECE = b"a" * MIB
GONE = {"type": "http.disconnect"}
PATIENCE_S = 20
MAX_PIECE_OF_THE_SERVER = 2**16


class Client:
    """One request whose body is sent piece by piece."""

    def __init__(self, guard, *pieces, path=PATH, headers=FORM, is_last=True):
        self._waiting = asyncio.Queue()
        self._scope = scope_of(path, headers)
        self._sent = []
        self._task = asyncio.create_task(guard(self._scope, self._waiting.get, self._send))
        if pieces:
            self.send(*pieces, is_last=is_last)

    async def _send(self, message):
        self._sent.append(message)

    def send(self, *pieces, is_last=False):
        for number, piece in enumerate(pieces, start=1):
            more = not is_last or number < len(pieces)
            self._waiting.put_nowait({"type": "http.request", "body": piece, "more_body": more})

    def leave(self):
        self._waiting.put_nowait(GONE)

    async def answer(self):
        await asyncio.wait_for(self._task, PATIENCE_S)
        start, *bodies = self._sent
        text = b"".join(message.get("body", b"") for message in bodies)
        return start["status"], dict(start["headers"]), text

    async def end(self):
        await asyncio.wait_for(self._task, PATIENCE_S)
        return self._sent


class Slow:
    """An app that reads a body and answers once it is let go on."""

    def __init__(self):
        self.go_on = asyncio.Event()
        self.whole = 0
        self.kept = []
        self.keeps = False
        self.gone = []

    async def __call__(self, scope, receive, send):
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            more = message.get("more_body", False)
        self.whole += 1
        self.gone.append(client_is_gone(scope))
        if self.keeps:
            self.kept.append(keep_body(scope))
        await self.go_on.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})


class Desk:
    def __init__(self, mib=8, wait_s=PATIENCE_S, stalled_s=PATIENCE_S):
        self.budget = Budget(mib * MIB, "bytes of images")
        self.inner = Slow()
        uploads = Uploads(self.budget, wait_s, stalled_s)
        self.guard = guard_around(self.inner, uploads=uploads)

    @property
    def held_mib(self):
        return self.budget.held / MIB

    async def until(self, condition):
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(0.002)


def at_desk(**options):
    """The story as a test, played at a desk with these options."""

    def test_of(story):
        async def played():
            await story(Desk(**options))

        return lambda: asyncio.run(played())

    return test_of


@at_desk()
async def test_a_body_is_held_until_its_request_is_answered(desk):
    client = Client(desk.guard, PIECE, PIECE, PIECE)
    await desk.until(lambda: desk.inner.whole == 1)
    assert desk.held_mib == 3
    desk.inner.go_on.set()
    assert (await client.answer())[0] == 200
    assert desk.held_mib == 0


@at_desk()
async def test_a_client_that_leaves_after_its_body_has_waited_for_room_is_noticed(desk):
    first = Client(desk.guard, *[PIECE] * 7)
    await desk.until(lambda: desk.inner.whole == 1)
    second = Client(desk.guard, PIECE * 2)
    await asyncio.sleep(0.2)
    assert desk.inner.whole == 1
    desk.inner.go_on.set()
    await first.answer()
    desk.inner.go_on.clear()
    await desk.until(lambda: desk.inner.whole == 2)
    second.leave()
    await desk.until(lambda: desk.inner.gone[1].is_set())
    desk.inner.go_on.set()
    await second.end()
    assert desk.held_mib == 0


@at_desk()
async def test_a_body_is_counted_as_it_arrives_whatever_was_announced(desk):
    client = Client(
        desk.guard, PIECE, PIECE, headers=[*FORM, ("content-length", "1")], is_last=False
    )
    await desk.until(lambda: desk.held_mib == 2)
    client.leave()
    await client.end()
    assert desk.held_mib == 0


@at_desk()
async def test_json_counts_for_its_copies(desk):
    client = Client(
        desk.guard,
        b'{"state": {"a": "',
        PIECE,
        path="/visual_question_answering",
        headers=JSON,
        is_last=False,
    )
    await desk.until(lambda: desk.held_mib > 2.9)
    client.leave()
    await client.end()
    assert desk.held_mib == 0


async def fill(desk, mib):
    """A request whose body is here and whose answer takes long."""
    other = Client(desk.guard, *[PIECE] * mib)
    whole = desk.inner.whole
    await desk.until(lambda: desk.inner.whole == whole + 1)
    return other


@at_desk()
async def test_who_finds_no_room_waits_for_another_request_to_be_answered(desk):
    other = await fill(desk, 7)
    client = Client(desk.guard, PIECE, PIECE, PIECE)
    await asyncio.sleep(0.1)
    assert desk.inner.whole == 1
    desk.inner.go_on.set()
    assert (await other.answer())[0] == 200
    assert (await client.answer())[0] == 200
    assert desk.held_mib == 0


@at_desk(wait_s=0.1)
async def test_who_waits_in_vain_gets_503_and_when_to_come_back(desk):
    other = await fill(desk, 7)
    client = Client(desk.guard, PIECE, PIECE, PIECE)
    status, headers, text = await client.answer()
    assert (status, json.loads(text)["code"]) == (503, "no_room")
    assert int(headers[b"retry-after"]) >= 1
    assert desk.held_mib == 7
    desk.inner.go_on.set()
    await other.answer()


@at_desk(wait_s=0.1)
async def test_what_breaks_on_a_refused_body_does_not_hide_the_503(desk):
    other = await fill(desk, 7)

    async def breaks(scope, receive, send):
        try:
            while True:
                await receive()
        except Exception as error:
            await send({"type": "http.response.start", "status": 400, "headers": []})
            raise ValueError("cannot parse") from error

    guard = guard_around(breaks, uploads=desk.guard.uploads)
    client = Client(guard, PIECE, PIECE, PIECE)
    assert (await client.answer())[0] == 503
    desk.inner.go_on.set()
    await other.answer()


@at_desk()
async def test_one_that_leaves_while_it_waits_waits_no_longer(desk):
    other = await fill(desk, 7)
    client = Client(desk.guard, PIECE, *[b"a" * MAX_PIECE_OF_THE_SERVER] * 3, is_last=False)
    await asyncio.sleep(0.05)
    client.leave()
    assert await client.end() == []
    assert desk.held_mib == 7
    desk.inner.go_on.set()
    await other.answer()


@at_desk()
async def test_small_requests_pass_when_there_is_no_room_left(desk):
    other = await fill(desk, 8)
    client = Client(
        desk.guard,
        b'{"state": {"inference_request_uuid": "1"}}',
        path="/get_inference_progress",
        headers=JSON,
    )
    await desk.until(lambda: desk.inner.whole == 2)
    desk.inner.go_on.set()
    assert (await client.answer())[0] == 200
    await other.answer()


@at_desk()
async def test_two_that_have_half_of_the_room_each_do_not_wait_for_each_other(desk):
    desk.inner.go_on.set()
    clients = [Client(desk.guard) for _ in range(3)]
    for _ in range(6):
        for client in clients:
            client.send(PIECE)
            await asyncio.sleep(0)
    for client in clients:
        client.send(b"", is_last=True)
    for client in clients:
        assert (await client.answer())[0] == 200
    assert desk.held_mib == 0


@at_desk()
async def test_one_that_is_larger_than_everything_passes_alone(desk):
    desk.inner.go_on.set()
    client = Client(desk.guard, *[PIECE] * 20)
    assert (await client.answer())[0] == 200


@at_desk(stalled_s=0.1)
async def test_a_body_that_pauses_too_long_is_given_up(desk):
    client = Client(desk.guard, PIECE, PIECE, is_last=False)
    status, _, text = await client.answer()
    assert (status, json.loads(text)["code"]) == (408, "stalled")
    assert desk.held_mib == 0


@at_desk(stalled_s=0.05)
async def test_a_request_that_is_whole_may_take_as_long_as_it_likes(desk):
    client = Client(desk.guard, PIECE)
    await asyncio.sleep(0.15)
    desk.inner.go_on.set()
    assert (await client.answer())[0] == 200


@at_desk()
async def test_work_behind_an_answer_keeps_what_it_holds_until_it_is_done(desk):
    desk.inner.keeps = True
    desk.inner.go_on.set()
    client = Client(desk.guard, PIECE, PIECE, PIECE)
    assert (await client.answer())[0] == 200
    assert desk.held_mib == 3
    desk.inner.kept[0].release()
    assert desk.held_mib == 0


@at_desk(wait_s=0.06)
async def test_work_behind_answers_is_bounded(desk):
    desk.inner.keeps = True
    desk.inner.go_on.set()
    answers = []
    for _ in range(6):
        client = Client(desk.guard, PIECE, PIECE, PIECE)
        answers.append((await client.answer())[0])
    assert answers == [200, 200, 503, 503, 503, 503]
    assert desk.held_mib == 6


@at_desk(mib=2, wait_s=0.01)
async def test_small_uploads_behind_answers_are_bounded_too(desk):
    desk.inner.keeps = True
    desk.inner.go_on.set()
    answers = []
    for _ in range(20):
        client = Client(desk.guard, PIECE[: MIB // 2])
        answers.append((await client.answer())[0])
    assert answers == [200] * 4 + [503] * 16
    assert desk.held_mib == 2


def test_outside_of_the_guard_nothing_is_held():
    assert keep_body(scope_of(PATH)).amount == 0


@at_desk()
async def test_a_request_without_a_body_passes(desk):
    desk.inner.go_on.set()
    for path in ("/metrics", "/is_ready"):
        assert (await Client(desk.guard, b"", path=path, headers=[]).answer())[0] == 200
