"""Many different clients for minutes: every answer is the serial one, and nothing grows."""

from __future__ import annotations

import http.client
import http.server
import itertools
import json
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import requests
from contract_calls import App
from platform_double import TOKEN
from platform_seed import IMAGES, seed

from serve.sdk import sly

pytestmark = pytest.mark.soak

SOAK_S = float(os.environ.get("FLORENCE_SOAK_S", "300"))
WARM_UP_SHARE = 0.25
TIMEOUT_S = 240
SCENES = sorted(IMAGES.glob("scene_*"))
ASKED: dict[str, dict[str, Any]] = {
    "objects": {"task_prompt": "<OD>", "num_beams": 1},
    "caption": {"task_prompt": "<CAPTION>"},
    "phrases": {"text": "car. tree. moon", "num_beams": 1},
    "classes": {"mapping": {"vehicle": "car"}, "num_beams": 2},
    "text": {"task_prompt": "<OCR_WITH_REGION>", "num_beams": 1},
    "outline": {"task_prompt": "<REFERRING_EXPRESSION_SEGMENTATION>", "text": "tree"},
}
# Answers that ask to come back later; every other one but 200 is a fault here.
LATER = {503}
MOST_GROWTH = 1.06
GROWN_MIB = 40
Question = tuple[str, str]


@dataclass
class Load:
    """What the clients share: the app, what it answers one at a time, and what they met."""

    app: App
    platform_ids: dict[str, int]
    web: str
    api: sly.Api
    expected: dict[Question, Any] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    until: float = 0.0

    def learn(self) -> None:
        """The serial answers."""
        for path, (name, settings) in itertools.product(SCENES, ASKED.items()):
            [entry] = self.app.upload_images([path], settings)
            self.expected[path.name, name] = entry["annotation"]

    def note(self, client: str, question: Question, annotation: Any) -> None:
        self.counts[client] += 1
        if not is_same(annotation, self.expected[question]):
            self.wrong.append(f"{client} {question}: {json.dumps(annotation)[:400]}")

    def is_answered(self, client: str, answer: requests.Response) -> bool:
        if answer.status_code in LATER:
            self.counts[f"{client}, told to come later"] += 1
            time.sleep(float(answer.headers["Retry-After"]))
            return False
        if answer.status_code != 200:
            self.wrong.append(f"{client}: {answer.status_code} {answer.text[:300]}")
            return False
        return True


def is_same(found: Any, expected: Any) -> bool:
    """Equal but for what batches of other sizes change in a score."""
    if isinstance(found, float) and isinstance(expected, float):
        return abs(found - expected) <= 3e-4
    if isinstance(found, dict) and isinstance(expected, dict):
        if found.keys() != expected.keys():
            return False
        return all(is_same(found[key], expected[key]) for key in found if key not in VARYING)
    if isinstance(found, list) and isinstance(expected, list):
        ordered = zip(sorted(found, key=_place), sorted(expected, key=_place), strict=False)
        return len(found) == len(expected) and all(is_same(*pair) for pair in ordered)
    return bool(found == expected)


VARYING = {"id", "key", "createdAt", "updatedAt", "labelerLogin"}


def _place(item: Any) -> str:
    """What equal lists are ordered by: labels by class and place, whatever their scores."""
    if isinstance(item, dict) and "classTitle" in item:
        return json.dumps([item["classTitle"], item.get("points"), item.get("bitmap")])
    return ""


def one_image(load: Load, chance: random.Random) -> None:
    question, path = chosen(chance)
    answer = requests.post(
        f"{load.app.url}/inference_image",
        files={"files": path.read_bytes()},
        data={"settings": json.dumps({"settings": ASKED[question[1]]})},
        timeout=TIMEOUT_S,
    )
    if load.is_answered("one image", answer):
        load.note("one image", question, answer.json()["annotation"])


def a_batch(load: Load, chance: random.Random) -> None:
    name = chance.choice(list(ASKED))
    paths = chance.choices(SCENES, k=4)
    answer = requests.post(
        f"{load.app.url}/inference_batch",
        files=[("files", (one.name, one.read_bytes())) for one in paths],
        data={"settings": json.dumps({"settings": ASKED[name]})},
        timeout=TIMEOUT_S,
    )
    if load.is_answered("a batch", answer):
        for path, entry in zip(paths, answer.json(), strict=True):
            load.note("a batch", (path.name, name), entry["annotation"])


def a_url(load: Load, chance: random.Random) -> None:
    question, path = chosen(chance)
    state = {"image_url": f"{load.web}/{path.name}", "settings": ASKED[question[1]]}
    answer = requests.post(
        f"{load.app.url}/inference_image_url", json={"state": state}, timeout=TIMEOUT_S
    )
    if load.is_answered("an address", answer):
        load.note("an address", question, answer.json()["annotation"])


def a_session(load: Load, chance: random.Random) -> None:
    """The SDK's client: images by id in the background, popped as they come."""
    name = chance.choice(list(ASKED))
    names = chance.sample(sorted(load.platform_ids), k=3)
    session = sly.nn.inference.SessionJSON(load.api, session_url=load.app.url)
    session.set_inference_settings(ASKED[name])
    ids = [load.platform_ids[one] for one in names]
    for image, entry in zip(names, session.inference_image_ids_async(ids), strict=True):
        load.note("a session", (image, name), entry["annotation"])


def a_slow_reader(load: Load, chance: random.Random) -> None:
    """Takes its answer a few bytes at a time."""
    question, path = chosen(chance)
    with sent(load, path, ASKED[question[1]]) as client:
        answer = http.client.HTTPResponse(client)
        answer.begin()
        parts = []
        while part := answer.read(200):
            parts.append(part)
            time.sleep(0.2)
    if answer.status in LATER:
        load.counts["a slow reader, told to come later"] += 1
    elif answer.status != 200:
        load.wrong.append(f"a slow reader: {answer.status}")
    else:
        load.note("a slow reader", question, json.loads(b"".join(parts))["annotation"])


def one_that_leaves(load: Load, chance: random.Random) -> None:
    """Sends all of its request and does not stay for the answer."""
    question, path = chosen(chance)
    with sent(load, path, ASKED[question[1]]):
        time.sleep(chance.random())
    load.counts["one that leaves"] += 1


def chosen(chance: random.Random) -> tuple[Question, Path]:
    path = chance.choice(SCENES)
    return (path.name, chance.choice(list(ASKED))), path


def sent(load: Load, path: Path, settings: dict[str, Any]) -> socket.socket:
    request = requests.Request(
        "POST",
        f"{load.app.url}/inference_image",
        files={"files": path.read_bytes()},
        data={"settings": json.dumps({"settings": settings})},
    ).prepare()
    host, _, port = load.app.url.removeprefix("http://").partition(":")
    client = socket.create_connection((host, int(port)), timeout=TIMEOUT_S)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    client.sendall(f"POST /inference_image HTTP/1.1\r\nHost: {host}\r\n{head}\r\n".encode())
    client.sendall(request.body)
    return client


CLIENTS: tuple[tuple[Callable[[Load, random.Random], None], int], ...] = (
    (one_image, 24),
    (a_batch, 12),
    (a_url, 8),
    (a_session, 8),
    (a_slow_reader, 6),
    (one_that_leaves, 6),
)


@dataclass(frozen=True)
class Sample:
    """What the process holds at a moment."""

    at: float
    mib: float
    threads: int
    descriptors: int


def sample(pid: int) -> Sample:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    values = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    return Sample(
        time.monotonic(),
        int(values["VmRSS"].split()[0]) / 1024,
        int(values["Threads"]),
        len(os.listdir(f"/proc/{pid}/fd")),
    )


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    """A server of the scenes."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(IMAGES))

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_every_answer_is_the_serial_one_and_nothing_grows(module_app, web):
    platform, server = module_app
    load = Load(App(server.url), seed_ids(platform), web, api_of(platform))
    load.learn()
    began = time.monotonic()
    load.until = began + SOAK_S

    def work(client: Callable[[Load, random.Random], None], number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < load.until:
            try:
                client(load, chance)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is told
                load.wrong.append(f"{client.__name__}: {error!r}")
                time.sleep(1)

    kinds = [client for client, count in CLIENTS for _ in range(count)]
    assert len(kinds) == 64
    threads = [threading.Thread(target=work, args=(one, at)) for at, one in enumerate(kinds)]
    samples = [sample(server.pid)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.5)
        samples.append(sample(server.pid))
    time.monotonic() - began
    time.sleep(3)
    after = sample(server.pid)

    warm = [one for one in samples if one.at - began > WARM_UP_SHARE * SOAK_S]
    first, last = warm[: len(warm) // 3], warm[-len(warm) // 3 :]
    for name in ("mib", "threads", "descriptors"):
        _then, _now = (mean(getattr(one, name) for one in part) for part in (first, last))
    assert not load.wrong, (len(load.wrong), load.wrong[:5])
    memory = [mean(one.mib for one in part) for part in (first, last)]
    assert memory[1] < max(memory[0] * MOST_GROWTH, memory[0] + GROWN_MIB)
    assert max(one.threads for one in last) <= max(one.threads for one in first) + 4
    assert after.descriptors <= samples[0].descriptors + 16


def seed_ids(platform) -> dict[str, int]:
    seeded = seed(platform)
    dataset = platform.state.add_dataset(seeded.project_id, "scenes")
    return {
        path.name: platform.state.add_image(dataset.id, path.name, path.read_bytes()).id
        for path in SCENES
    }


def api_of(platform) -> sly.Api:
    return sly.Api(platform.address, TOKEN, retry_count=3)
