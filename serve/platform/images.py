"""The images of a run as the platform knows them, in the order asked for, and their bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from requests.exceptions import ConnectionError as ConnectionFailed
from requests.exceptions import HTTPError, Timeout

from florence2.engine.encoding import AnyImage
from florence2.errors import GenerationCancelledError, RequestError
from florence2.records import Failure
from serve.platform.failures import NotFoundError, failure_of
from serve.platform.patience import PlatformAwayError, Tried, at_once
from serve.platform.request_state import Source
from serve.platform.run_store import info_of
from serve.sdk import sly

_IDS_PER_REQUEST: Final = 500
_UNKNOWN_SIZE: Final = 1_000_000
_UNKNOWN_PIXELS: Final = 4_000_000
_IMAGES_PROJECT: Final = "images"

Fetched = TypeVar("Fetched")


@dataclass(frozen=True, slots=True)
class Target:
    """One image to do: what the platform says about it, or why it cannot be done."""

    image_id: int
    project_id: int | None = None
    info: sly.ImageInfo | None = None
    failure: Failure | None = None

    @property
    def name(self) -> str | None:
        return None if self.info is None else self.info.name

    @property
    def dataset_id(self) -> int | None:
        return None if self.info is None else self.info.dataset_id

    @property
    def size_bytes(self) -> int:
        """Of the file; a guess where the platform does not say."""
        size = None if self.info is None else self.info.size
        return int(size) if size else _UNKNOWN_SIZE

    @property
    def num_pixels(self) -> int:
        """Of the picture; a guess where the platform does not say."""
        if self.info is None or not self.info.width or not self.info.height:
            return _UNKNOWN_PIXELS
        return int(self.info.width * self.info.height)


@dataclass(frozen=True, slots=True)
class Images:
    """The targets of a run, and the datasets they are in by id."""

    targets: tuple[Target, ...]
    datasets: dict[int, Any]

    def without_repeats(self) -> Images:
        """Each image once: labels that are added twice are there twice."""
        by_id = {target.image_id: target for target in self.targets}
        return Images(tuple(by_id.values()), self.datasets)


def resolve(api: sly.Api | None, source: Source) -> Images:
    """The images of ``source``. An unknown one is a target with a failure, unless all are.

    RequestError, or NotFoundError, which is one, when there is nothing to work on.
    """
    if api is None:
        raise RequestError(
            "Images are named by id, and this app is not connected to a platform; start it with "
            "SERVER_ADDRESS and API_TOKEN or send the image itself."
        )
    if source.project_id is None:
        return _by_ids(api, source.image_ids)
    return _of_project(api, source.project_id, source.dataset_ids)


def check_project_is_there(api: sly.Api, project_id: int | None) -> None:
    """NotFoundError where it was deleted while a run went on."""
    if project_id is not None and api.project.get_info_by_id(project_id) is None:
        raise NotFoundError(
            f"Project {project_id} was deleted while the run went on, or is not visible to this "
            "account any more."
        )


def check_project_of_images(api: sly.Api, project_id: int) -> None:
    """RequestError for a project of another kind, NotFoundError where there is none."""
    project = info_of(api, project_id)
    if str(project.type) != _IMAGES_PROJECT:
        raise RequestError(
            f"Only projects of images can be labeled, and project {project_id} is of "
            f"{project.type}; choose another."
        )


def _by_ids(api: sly.Api, image_ids: Sequence[int]) -> Images:
    infos = image_infos(api, image_ids)
    dataset_ids = dict.fromkeys(info.dataset_id for info in infos.values())
    found = {one: api.dataset.get_info_by_id(one) for one in dataset_ids}
    datasets = {dataset_id: dataset for dataset_id, dataset in found.items() if dataset is not None}
    # One that is deleted at this moment may go before its images do.
    infos = {one: info for one, info in infos.items() if info.dataset_id in datasets}
    if not infos:
        raise NotFoundError(_missing_image(image_ids[0]).message)
    targets = [
        Target(one, datasets[infos[one].dataset_id].project_id, infos[one])
        if one in infos
        else Target(one, failure=_missing_image(one))
        for one in image_ids
    ]
    return Images(tuple(targets), datasets)


def _missing_image(image_id: int) -> Failure:
    return Failure(
        "not_found",
        f"Image {image_id} does not exist, is archived, or is not visible to this account; check "
        "the id.",
    )


def image_infos(api: sly.Api, image_ids: Iterable[int]) -> dict[int, sly.ImageInfo]:
    """The images that exist. The SDK's own batch call raises for all of them when one does not."""
    infos: dict[int, sly.ImageInfo] = {}
    waiting = dict.fromkeys(image_ids)
    while waiting:
        image_id, _ = waiting.popitem()
        info = _info_or_none(api, image_id)
        if info is None:
            continue
        infos[image_id] = info
        ids = list(waiting)
        for start in range(0, len(ids), _IDS_PER_REQUEST):
            value = ids[start : start + _IDS_PER_REQUEST]
            filters = [{"field": "id", "operator": "in", "value": value}]
            found = api.image.get_list(info.dataset_id, filters=filters)
            infos.update({one.id: one for one in found})
        waiting = {one: None for one in waiting if one not in infos}
    return infos


def _info_or_none(api: sly.Api, image_id: int) -> sly.ImageInfo | None:
    try:
        return api.image.get_info_by_id(image_id)
    except HTTPError as error:
        if error.response is not None and error.response.status_code in (403, 404):
            return None
        raise


def _of_project(api: sly.Api, project_id: int, dataset_ids: Sequence[int] | None) -> Images:
    check_project_of_images(api, project_id)
    datasets = {found.id: found for found in api.dataset.get_list(project_id, recursive=True)}
    unknown = [one for one in dataset_ids or () if one not in datasets]
    if unknown:
        raise RequestError(
            f"Project {project_id} has no dataset {unknown[0]}; choose from its own datasets."
        )
    chosen = datasets if dataset_ids is None else dict.fromkeys(dataset_ids)
    targets = [
        Target(info.id, project_id, info)
        for dataset_id in chosen
        for info in api.image.get_list(dataset_id)
    ]
    return Images(tuple(targets), datasets)


def download_images(
    api: sly.Api, infos: Sequence[sly.ImageInfo], tried: Tried = at_once
) -> list[AnyImage]:
    """The bytes of every image, or its Failure, in order; ``tried`` says what is tried again."""
    ids_of: dict[int, list[int]] = defaultdict(list)
    for info in infos:
        if info.id not in ids_of[info.dataset_id]:
            ids_of[info.dataset_id].append(info.id)
    images: dict[int, AnyImage] = {}
    for dataset_id, ids in ids_of.items():
        download = partial(api.image.download_bytes, dataset_id)
        images |= each_or_failure(ids, download, failed_download, tried)
    return [images[info.id] for info in infos]


def failed_download(image_id: int, error: Exception) -> Failure:
    """The failure of an image whose bytes did not come."""
    return failure_of(error, f"Image {image_id} cannot be downloaded", "download_failed")


def each_or_failure(
    ids: list[int],
    fetch: Callable[[list[int]], Iterable[Fetched]],
    failure: Callable[[int, Exception], Failure],
    tried: Tried = at_once,
) -> dict[int, Fetched | Failure]:
    """What the platform has for each id, all fetched together and, where that fails, one by one.

    So one bad image costs only itself. With a platform that is away they are not tried one by one:
    the SDK, or ``tried``, has waited for minutes by then.
    """
    try:
        return dict(zip(ids, tried(partial(fetch, ids)), strict=True))
    except Exception as error:  # noqa: BLE001  (the SDK and its transport raise what they like)
        sly.logger.warning(f"Images {ids} cannot be fetched together: {error!r}")
        is_away = isinstance(error, PlatformAwayError | GenerationCancelledError)
        is_away |= tried is at_once and isinstance(error, ConnectionFailed | Timeout)
        if len(ids) == 1 or is_away:
            return {image_id: _failure_by(failure, image_id, error) for image_id in ids}
    found: dict[int, Fetched | Failure] = {}
    silence: Exception | None = None
    for image_id in ids:
        try:
            if silence is not None:
                raise silence
            [found[image_id]] = tried(partial(fetch, [image_id]))
        except Exception as error:  # noqa: BLE001  (as above)
            sly.logger.warning(f"Image {image_id} cannot be fetched: {error!r}")
            found[image_id] = _failure_by(failure, image_id, error)
            if isinstance(error, PlatformAwayError | GenerationCancelledError):
                silence = error
    return found


def _failure_by(
    failure: Callable[[int, Exception], Failure], image_id: int, error: Exception
) -> Failure:
    """An image that a stopped run has not got to has not failed."""
    if isinstance(error, GenerationCancelledError):
        return Failure(error.code, str(error))
    return failure(image_id, error)
