"""Serving without the platform."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from serve.http.origins import Callers, Servers
from serve.model_service import MAX_QUEUED


@dataclass(frozen=True, slots=True)
class LocalServer:
    """Serving without the platform: which model, how, and the socket to listen on.

    ``callers`` and ``servers`` of None are those of the environment. ``allow_deploy`` are
    checkpoints that requests may deploy beside the published ones.
    """

    model: str
    device: str = "auto"
    precision: str = "auto"
    runtime: str = "auto"
    max_batch: int | None = None
    max_queued: int = MAX_QUEUED
    listener: socket.socket | None = None
    callers: Callers | None = None
    servers: Servers | None = None
    allow_deploy: tuple[str, ...] = ()
