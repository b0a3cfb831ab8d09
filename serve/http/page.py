"""The page of ``GET /`` without the platform: try the model, see how to call it.

Its files are in ``static`` and are sent as they are; what they show they ask the app's own routes
for. They name nothing of anywhere else, so the page works without an internet.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from fastapi import FastAPI, Request, Response

_STATIC: Final = Path(__file__).parent / "static"

# Not below /static, where the SDK mounts the files of an app's own.
_FILES: Final = (
    ("/", "index.html", "text/html"),
    ("/page/app.js", "app.js", "text/javascript"),
    ("/page/style.css", "style.css", "text/css"),
)

# Only this page's own server may be asked, nothing but its own files may run or style it, and no
# text may become markup or script, whoever calls for it.
CONTENT_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'self'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)


def register_page(server: FastAPI) -> None:
    """Mounts the page and its files, which are read once, now."""
    for path, name, media_type in _FILES:
        _register_file(server, path, (_STATIC / name).read_bytes(), media_type)


def _register_file(server: FastAPI, path: str, content: bytes, media_type: str) -> None:
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {
        "Content-Security-Policy": CONTENT_POLICY,
        "X-Content-Type-Options": "nosniff",
        # Kept, but asked about each time: after an update old and new files do not fit together.
        "Cache-Control": "no-cache",
        "ETag": etag,
    }

    @server.get(path)
    async def file(request: Request) -> Response:
        if etag in request.headers.get("If-None-Match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)
