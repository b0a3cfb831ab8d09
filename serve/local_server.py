"""Serving without the platform."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from serve.deployment import MAX_QUEUED


@dataclass(frozen=True, slots=True)
class LocalServer:
    """Serving without the platform: which model, how, and the socket to listen on."""

    model: str
    device: str = "auto"
    precision: str = "auto"
    runtime: str = "auto"
    max_batch: int | None = None
    max_queued: int = MAX_QUEUED
    listener: socket.socket | None = None
