"""The page of ``GET /`` without the platform: try the model, see how to call it.

Its files are in ``static`` and are sent as they are; what they show they ask the app's own routes
for. They name nothing of anywhere else, so the page works without an internet. The images to try
it with are those of the repository's ``demo/images``, which a wheel has as ``samples``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Final

from fastapi import FastAPI, Request, Response

_HERE: Final = Path(__file__).resolve().parent
_STATIC: Final = _HERE / "static"
_SAMPLES: Final = (_HERE / "samples", _HERE.parents[1] / "demo" / "images")
_MEDIA_TYPES: Final = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".jpg": "image/jpeg",
    ".png": "image/png",
}

# Only this page's own server may be asked, nothing but its own files may run or style it, and no
# text may become markup or script, whoever calls for it.
CONTENT_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'self'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)

NOTICE: Final = "page/unreachable.js"
"""The script that says on the SDK's page that its other scripts cannot be reached."""


def register_page(server: FastAPI, samples: Path | None = None) -> None:
    """Mounts the page, its files and the sample images, which are all read once, now.

    ``/page/samples`` lists the names of the images, none where there is no folder of them.
    """
    # Not below /static, where the SDK mounts the files of an app's own.
    for path in sorted(path for path in _STATIC.iterdir() if path.suffix in _MEDIA_TYPES):
        _register_file(server, "/" if path.suffix == ".html" else f"/page/{path.name}", path)
    images = _images_in(samples or next(filter(Path.is_dir, _SAMPLES), None))
    for path in images:
        _register_file(server, f"/page/samples/{path.name}", path)
    names = json.dumps([path.name for path in images]).encode()
    _register(server, "/page/samples", names, "application/json")


def register_notice(server: FastAPI) -> None:
    """Mounts what the SDK's page runs first, at ``NOTICE``."""
    _register_file(server, f"/{NOTICE}", _STATIC / Path(NOTICE).name)


def _images_in(folder: Path | None) -> list[Path]:
    """The images of a folder; those come first that the demo checkpoint knows best."""
    files = folder.iterdir() if folder else ()
    images = (path for path in files if path.suffix in (".jpg", ".png"))
    return sorted(images, key=lambda path: (not path.name.startswith("scene_"), path.name))


def _register_file(server: FastAPI, route: str, path: Path) -> None:
    _register(server, route, path.read_bytes(), _MEDIA_TYPES[path.suffix])


def _register(server: FastAPI, path: str, content: bytes, media_type: str) -> None:
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
