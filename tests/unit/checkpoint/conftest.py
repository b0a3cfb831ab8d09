from __future__ import annotations

import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "network"))

from hub_files import REPOSITORY, files
from hub_standin import hub_standin

from florence2.checkpoint import hub as hub_module


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A running stand-in that the client in this process is pointed at, by HF_ENDPOINT."""
    with hub_standin() as standin:
        monkeypatch.setenv("HF_ENDPOINT", standin.endpoint)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "FLORENCE2_CACHE", "FLORENCE2_DEMO"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "client-cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(hub_module, "STALL_WAIT_S", 0.0)
        huggingface_hub.close_session()
        standin.add(REPOSITORY, files())
        yield standin


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"
