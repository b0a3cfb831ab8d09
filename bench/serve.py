"""What serving costs: requests per second and latency of the app with the demo checkpoint.

python bench/serve.py [--seconds 10] [--json docs/serving.json]

Every figure stands beside its reference, measured in the same run: the same engine called in this
process, for the overhead of one request, and the same app answering one prompt at a time
(``--max-batch 1``), for what shared batches bring. Every image is sent once, so that none is found
in the cache of features.
"""

from __future__ import annotations

import argparse
import http.client
import io
import itertools
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from florence2 import Florence2
from florence2_demo.drawing import draw_scene
from florence2_demo.scene import make_scene

FIRST_SEED = 400_000
CLIENTS = (1, 8, 32)
PER_BATCH = 8
TASK = "<OD>"
BOUNDARY = "part-of-the-form"
WARM_UP = 20
SCENES = 100


@dataclass(frozen=True)
class Row:
    """One load on one endpoint."""

    endpoint: str
    clients: int
    images_per_s: float
    median_ms: float
    p95_ms: float
    one_at_a_time_images_per_s: float
    ratio: float


class Images:
    """JPEG files of drawn scenes, no two alike: each has its number as a pattern in a corner."""

    def __init__(self, count: int) -> None:
        self._scenes = [draw_scene(make_scene(FIRST_SEED + number)) for number in range(SCENES)]
        self._files = [self._file(number) for number in range(count)]
        self._number = itertools.count()

    def _file(self, number: int) -> bytes:
        scene = self._scenes[number % SCENES]
        for bit in range(12):
            shade = 255 * (number >> bit & 1)
            scene.paste((shade, shade, shade), (8 * bit, 0, 8 * bit + 8, 8))
        target = io.BytesIO()
        scene.save(target, "JPEG", quality=90)
        return target.getvalue()

    def take(self) -> bytes:
        """A file that was not taken before."""
        number = next(self._number)
        if number >= len(self._files):
            raise SystemExit("All images were sent; give a larger --images.")
        return self._files[number]


def form(files: list[bytes]) -> bytes:
    """A multipart form with the files and the task."""
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="settings"\r\n\r\n'.encode()
        + json.dumps({"settings": {"task_prompt": TASK}}).encode()
    ]
    parts += [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n'
        "Content-Type: image/jpeg\r\n\r\n".encode()
        + file
        for file in files
    ]
    return b"\r\n".join(parts) + f"\r\n--{BOUNDARY}--\r\n".encode()


@contextmanager
def app(*options: str) -> Iterator[int]:
    """The port of a running app."""
    command = [sys.executable, "-m", "serve.cli.main", "serve", "--port", "0", "--device", "cpu"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    try:
        if process.stderr is None:
            raise SystemExit("The app's messages cannot be read.")
        for line in process.stderr:
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                threading.Thread(target=process.stderr.read, daemon=True).start()
                yield int(found[1])
                return
        raise SystemExit("The app did not start.")
    finally:
        process.terminate()
        process.wait()


def load(
    port: int, endpoint: str, clients: int, seconds: float, images: Images
) -> tuple[float, list[float]]:
    """Images per second, and the milliseconds of every request, under steady load."""
    per_request = 1 if endpoint == "/inference_image" else PER_BATCH
    latencies: list[float] = []
    until = time.perf_counter() + seconds
    began = time.perf_counter()

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        while time.perf_counter() < until:
            body = form([images.take() for _ in range(per_request)])
            sent = time.perf_counter()
            connection.request("POST", endpoint, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != 200:
                raise SystemExit(f"{answer.status}: {content[:200]!r}")
            latencies.append(1000 * (time.perf_counter() - sent))

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spent = time.perf_counter() - began
    return per_request * len(latencies) / spent, latencies


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def in_process_ms(images: Images, seconds: float) -> float:
    """The median of the same question asked in this process."""
    model = Florence2.load("demo", device="cpu")
    times: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < WARM_UP:
        file = images.take()
        began = time.perf_counter()
        model.run(TASK, file)
        times.append(1000 * (time.perf_counter() - began))
    model.close()
    return statistics.median(times[WARM_UP // 2 :])


def measure(seconds: float, images: Images) -> list[Row]:
    rates: dict[tuple[str, str, int], tuple[float, list[float]]] = {}
    cells = [(path, n) for path in ("/inference_image", "/inference_batch") for n in CLIENTS]
    for name, options in (("shared", ()), ("single", ("--max-batch", "1"))):
        with app(*options) as port:
            load(port, "/inference_image", 4, 2.0, images)
            for path, clients in cells:
                rates[name, path, clients] = load(port, path, clients, seconds, images)
    rows = []
    for path, clients in cells:
        rate, latencies = rates["shared", path, clients]
        single, _ = rates["single", path, clients]
        rows.append(
            Row(
                path,
                clients,
                round(rate, 1),
                round(statistics.median(latencies), 1),
                round(percentile(latencies, 0.95), 1),
                round(single, 1),
                round(rate / single, 2),
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="of every cell")
    parser.add_argument("--images", type=int, default=6000, help="no image is sent twice")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    images = Images(options.images)
    alone_ms = in_process_ms(images, options.seconds)
    rows = measure(options.seconds, images)
    overhead_ms = rows[0].median_ms - alone_ms
    print(
        f"in process: {alone_ms:.1f} ms; over HTTP, 1 client: {rows[0].median_ms:.1f} ms; ", end=""
    )
    print(f"overhead {overhead_ms:.1f} ms")
    print("endpoint          clients  images/s  median ms   p95 ms  one at a time  ratio")
    for row in rows:
        print(
            f"{row.endpoint:17} {row.clients:7} {row.images_per_s:9.1f} {row.median_ms:10.1f} "
            f"{row.p95_ms:8.1f} {row.one_at_a_time_images_per_s:14.1f} {row.ratio:6.2f}"
        )
    if options.json:
        report = {
            "in_process_ms": round(alone_ms, 2),
            "overhead_ms": round(overhead_ms, 2),
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
