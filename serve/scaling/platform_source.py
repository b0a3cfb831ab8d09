"""A project of the platform as a source: its images by address, read on whichever machine.

Who may read it is said on every machine by SERVER_ADDRESS and API_TOKEN, as by the variables of a
store's client.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final
from urllib.parse import parse_qs, urlencode, urlsplit

import requests
from fsspec import AbstractFileSystem

from florence2.errors import RequestError
from serve.labeling.images import Findings, is_image, project_name
from serve.labeling.platform_project import datasets_of
from serve.platform.images import check_project_of_images
from serve.platform.team_files import api_of_environment
from serve.scaling.storage import PLATFORM
from serve.sdk import sly

_SDK_RETRIES: Final = 3
_GONE: Final = 404


def project_address(project_id: int, datasets: Sequence[str] = ()) -> str:
    """``supervisely://17?dataset=street``."""
    query = urlencode([("dataset", name) for name in datasets])
    return f"{PLATFORM}://{project_id}" + (f"?{query}" if query else "")


def is_project(address: str) -> bool:
    return address.startswith(f"{PLATFORM}://")


def check_project(address: str) -> None:
    """RequestError for a project that is not there, is none of images, or has none."""
    api, project_id = _platform(), _project_of(address)
    check_project_of_images(api, project_id)
    if next(project_images(address, Findings()), None) is None:
        raise RequestError(
            f"A project to label has images and project {project_id} has none there; choose "
            "another, or other datasets."
        )


def project_images(address: str, findings: Findings) -> Iterator[tuple[str, str, str]]:
    """Key, address and name of each image.

    By datasets, then in the order in which they were added: it stays. ``findings`` is told of those
    that a project on disk cannot hold.
    """
    api, project_id = _platform(), _project_of(address)
    named = parse_qs(urlsplit(address).query).get("dataset", [])
    for dataset_id, path in sorted(datasets_of(api, project_id, named).items()):
        names: set[str] = set()
        for info in api.image.get_list(dataset_id):
            # A PNG ``a`` is ``a.png`` to the SDK, and there may be one.
            key = f"{path}/{info.id}/{info.name}" if info.name in names else f"{path}/{info.name}"
            names.add(info.name)
            if not is_image(key):
                findings.unsupported(key, f".{info.ext}")
                continue
            where = f"{PLATFORM}://{project_id}/{dataset_id}/{info.id}"
            yield key, where, project_name(key, recursive=True)


def _project_of(address: str) -> int:
    host = urlsplit(address).netloc
    if not (host.isascii() and host.isdigit()):
        raise RequestError(
            f"A project of the platform is named by its id, as in {PLATFORM}://17, and {address!r} "
            "is none; correct it."
        )
    return int(host)


def _platform() -> sly.Api:
    api = api_of_environment()
    # What fails is tried again, and named in the end, by who asks.
    api.retry_count = min(api.retry_count, _SDK_RETRIES)
    return api


class PlatformFiles(AbstractFileSystem):  # type: ignore[misc]
    """Images of the platform, for who opens whatever fsspec knows: ``PROJECT/DATASET/IMAGE``."""

    protocol = PLATFORM

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - whatever fsspec gives
        super().__init__(**options)
        self._api = _platform()

    def cat_file(
        self,
        path: str,
        start: int | None = None,
        end: int | None = None,
        **options: Any,  # noqa: ANN401 - as above
    ) -> bytes:
        """The file of an image, or a part. FileNotFoundError where it is gone."""
        try:
            _, dataset_id, image_id = (int(part) for part in path.strip("/").split("/"))
        except ValueError as error:
            raise FileNotFoundError(path) from error
        try:
            found: list[bytes] = self._api.image.download_bytes(dataset_id, [image_id])
        except requests.HTTPError as error:
            if error.response is not None and error.response.status_code == _GONE:
                raise FileNotFoundError(path) from error
            raise
        if not found:
            raise FileNotFoundError(path)
        return found[0][start:end]
