"""The app as the platform's agent starts it, in production mode, and a hub with its checkpoints.

The hub offers the demo checkpoint under the names of published ones; a program that takes its
hashes for theirs stands before uvicorn.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from app_server import ROOT, SDK_ENVIRONMENT
from hub_standin import HubStandin, Repository, hub_standin

from florence2.checkpoint.catalog import KNOWN_CHECKPOINTS

# As the platform names them to its apps; these have no name that a shell could set.
CONTEXT = {"context.teamId": "3", "context.workspaceId": "5", "context.userId": "7"}
AUTOSTART = {"modal.state.autostart": "true"}
_DEMO = ROOT / "demo" / "checkpoint"
_WITH_THE_HUBS_HASHES = """
import sys, uvicorn
from dataclasses import replace
from florence2.checkpoint import catalog
sha256, size = sys.argv[1], int(sys.argv[2])
for name, known in catalog.KNOWN_BY_NAME.items():
    catalog.KNOWN_BY_NAME[name] = replace(known, weights_bytes=size, weights_sha256=sha256)
sys.argv = ["uvicorn", *sys.argv[3:]]
uvicorn.main()
"""


def production_environment(address: str, token: str, task_id: int, **more: str) -> dict[str, str]:
    """What the agent sets, of what the app and the SDK read."""
    return {
        **SDK_ENVIRONMENT,
        **CONTEXT,
        "SERVER_ADDRESS": address,
        "API_TOKEN": token,
        "TASK_ID": str(task_id),
        "SUPERVISELY_TASK_ID": str(task_id),
        "ENV": "production",
        "APP_NAME": "Serve Florence-2",
        "LOG_LEVEL": "INFO",
        **more,
    }


def entrypoint(port: int) -> list[str]:
    """That of config.json on this machine only, on another port, and less patient at its end."""
    words = shlex.split(json.loads((ROOT / "config.json").read_text("utf-8"))["entrypoint"])
    own = {"--host": "127.0.0.1", "--port": str(port), "--timeout-graceful-shutdown": "1"}
    for option, value in own.items():
        words[words.index(option) + 1] = value
    return [sys.executable, *words[1:]]


@contextmanager
def published_checkpoints() -> Iterator[tuple[HubStandin, Callable[[int], list[str]]]]:
    """A hub that has all of them, and the entrypoint of an app that knows them by its hashes."""
    files = {path.name: path.read_bytes() for path in _DEMO.iterdir() if path.is_file()}
    with hub_standin() as hub:
        for known in KNOWN_CHECKPOINTS:
            hub.repositories[known.repository] = _Pinned(files, (known.revision,))
        [weights] = [
            sibling
            for sibling in hub.repositories[known.repository].listing("")["siblings"]
            if sibling["rfilename"] == "model.safetensors"
        ]
        arguments = [weights["lfs"]["sha256"], str(weights["size"])]

        def command(port: int) -> list[str]:
            words = entrypoint(port)
            uvicorn = words.index("uvicorn")
            return [words[0], "-c", _WITH_THE_HUBS_HASHES, *arguments, *words[uvicorn + 1 :]]

        yield hub, command


class _Pinned(Repository):
    """A repository at the commit that is asked for."""

    @property
    def commit(self) -> str:
        return self.branches[0]


def hub_environment(hub: HubStandin, cache: Mapping[str, str]) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.endpoint, "NO_PROXY": "127.0.0.1,localhost", **cache}
