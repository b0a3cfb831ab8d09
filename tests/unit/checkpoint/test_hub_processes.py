"""What only whole processes show: variables read at import, a kill, two downloads at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from hub_files import REPOSITORY, WEIGHTS, folder_of
from hub_standin import HubStandin

SCRIPT = """
import json, sys
from florence2.errors import CheckpointError
from florence2.checkpoint.catalog import resolve
try:
    found = resolve(sys.argv[1], cache_dir=sys.argv[2])
    print(json.dumps({"folder": str(found.folder), "files": found.files}))
except CheckpointError as error:
    print(json.dumps({"error": str(error)}))
"""


def start(hub: HubStandin, cache: Path, **variables: str) -> subprocess.Popen[str]:
    kept = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(cache / "hf-home")}
    environment |= {"NO_PROXY": "127.0.0.1", "HOME": str(cache)} | variables
    command = [sys.executable, "-c", SCRIPT, REPOSITORY, str(cache)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> dict[str, object]:
    output, _ = process.communicate(timeout=60)
    return json.loads(output)


def test_endpoint_and_offline_from_the_environment(hub, cache):
    cache.mkdir()
    offline = answer(start(hub, cache, HF_HUB_OFFLINE="1"))
    assert "switched off" in str(offline["error"])
    assert hub.requests == []
    online = answer(start(hub, cache))
    assert online["folder"] == str(folder_of(hub, cache))
    assert answer(start(hub, cache, HF_HUB_OFFLINE="1")) == online


def test_killed_download_goes_on_where_it_was(hub, cache):
    cache.mkdir()
    hub.faults.delay_s_per_chunk = 0.01
    process = start(hub, cache)
    part = folder_of(hub, cache) / f"{WEIGHTS}.part"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (part.exists() and part.stat().st_size > 1_000_000):
        time.sleep(0.01)
    process.kill()
    process.wait()
    have = part.stat().st_size
    assert have > 1_000_000
    hub.faults.delay_s_per_chunk = 0.0
    hub.served.clear()
    assert "folder" in answer(start(hub, cache))
    size = len(hub.repositories[REPOSITORY].files[WEIGHTS])
    rest = [s for s in hub.gets(WEIGHTS) if s.start]
    assert [(s.start, s.sent) for s in rest] == [(have, size - have)]


def test_two_processes_fetch_each_file_once(hub, cache):
    cache.mkdir()
    hub.faults.delay_s_per_chunk = 0.002
    first, second = start(hub, cache), start(hub, cache)
    assert answer(first) == answer(second)
    assert len(hub.gets(WEIGHTS)) == 1
    content = (folder_of(hub, cache) / WEIGHTS).read_bytes()
    assert content == hub.repositories[REPOSITORY].files[WEIGHTS]
