"""A client that leaves: its work ends, which the app's own metrics tell."""

from __future__ import annotations

import re
import socket
import time

import pytest
import requests
from contract_calls import CITY

MANY = 120
PATIENCE_S = 60.0


def metric(url: str, name: str) -> float:
    text = requests.get(f"{url}/metrics", timeout=30).text
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def form(num_files: int, image: bytes) -> bytes:
    settings = (
        b'--edge\r\nContent-Disposition: form-data; name="settings"\r\n\r\n'
        b'{"settings": {"task_prompt": "<MORE_DETAILED_CAPTION>", "num_beams": 8}}\r\n'
    )
    file = (
        b'--edge\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n'
        b"Content-Type: image/jpeg\r\n\r\n" + image + b"\r\n"
    )
    return settings + file * num_files + b"--edge--\r\n"


@pytest.mark.usefixtures("next_request_works")
def test_work_that_nobody_waits_for_is_given_up(app):
    failed = 'florence2_failures_total{code="cancelled"}'
    before = metric(app.url, failed)
    body = form(MANY, CITY.read_bytes())
    host, port = app.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(
            b"POST /inference_batch HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: multipart/form-data; boundary=edge\r\n"
            + f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        batches = metric(app.url, "florence2_batch_prompts_count")
        while metric(app.url, "florence2_batch_prompts_count") == batches:
            time.sleep(0.05)
    until = time.monotonic() + PATIENCE_S
    while metric(app.url, failed) == before and time.monotonic() < until:
        time.sleep(0.1)
    assert before < metric(app.url, failed) < before + MANY
