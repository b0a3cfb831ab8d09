"""A client that leaves: its work ends, which the app's own metrics tell."""

from __future__ import annotations

import json
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


@pytest.mark.usefixtures("next_request_works")
def test_work_that_nobody_waits_for_is_given_up(app):
    failed = 'florence2_failures_total{code="cancelled"}'
    before = metric(app.url, failed)
    settings = {"task_prompt": "<MORE_DETAILED_CAPTION>", "num_beams": 8}
    files = [("files", ("a.jpg", CITY.read_bytes()))] * MANY
    form = {"settings": json.dumps({"settings": settings})}
    sent = requests.Request("POST", app.url, files=files, data=form).prepare()
    host, port = app.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(
            b"POST /inference_batch HTTP/1.1\r\nHost: localhost\r\n"
            + b"".join(f"{name}: {value}\r\n".encode() for name, value in sent.headers.items())
            + b"\r\n"
            + sent.body
        )
        batches = metric(app.url, "florence2_batch_prompts_count")
        while metric(app.url, "florence2_batch_prompts_count") == batches:
            time.sleep(0.05)
    until = time.monotonic() + PATIENCE_S
    while metric(app.url, failed) == before and time.monotonic() < until:
        time.sleep(0.1)
    assert before < metric(app.url, failed) < before + MANY
