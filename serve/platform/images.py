"""The images of a run as the platform knows them, in the order asked for, and their bytes.

What a request for a run says is checked here, and what a run needs of the app is one record.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from requests.exceptions import ConnectionError as ConnectionFailed
from requests.exceptions import HTTPError, Timeout

from florence2.engine.ask import AnyImage, Ask
from florence2.errors import RequestError, shown, unknown_name
from florence2.records import Failure, Result
from serve.platform.failures import failure_of
from serve.sdk import sly
from serve.settings import Settings

UploadMode = Literal["append", "iou_merge", "replace", "create"]

MAX_BATCH_SIZE: Final = 256
DEFAULT_MERGE_IOU: Final = 0.9
UPLOAD_MODES: Final[tuple[UploadMode, ...]] = ("append", "iou_merge", "replace", "create")
IMAGE_ID_KEYS: Final = ("batch_ids", "image_ids", "images_ids", "imageIds", "image_id", "imageId")
PROJECT_ID_KEYS: Final = ("projectId", "project_id")
DATASET_ID_KEYS: Final = ("dataset_ids", "datasetIds")


@dataclass(frozen=True, slots=True)
class Destination:
    """Where labels go. ``mode`` of None: they are returned and nothing is changed.

    ``iou``: predictions that overlap an existing label of their class by this or more are left
    out; None keeps all. ``suffix`` goes behind names that the project has with another meaning.
    """

    mode: UploadMode | None = None
    project_id: int | None = None
    iou: float | None = None
    suffix: str | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """The images: either their ids, or a project and, unless None, its datasets."""

    image_ids: tuple[int, ...] = ()
    project_id: int | None = None
    dataset_ids: tuple[int, ...] | None = None


def ids_source(state: State) -> Source:
    """The images named in ``state``; RequestError when there are none or they are no ids."""
    found = _ids(state, IMAGE_ID_KEYS)
    if not found:
        raise RequestError("A request needs at least one image id, and none was received; send it.")
    return Source(image_ids=found)


def project_source(state: State) -> Source:
    """The project named in ``state``, and its datasets if some are."""
    found = _ids(state, PROJECT_ID_KEYS)
    if not found or len(found) > 1:
        raise RequestError(
            f"A run needs one project id, and {shown(list(found or ()))} was received; send it as "
            "project_id."
        )
    return Source(project_id=found[0], dataset_ids=_ids(state, DATASET_ID_KEYS))


def any_source(state: State) -> Source:
    """Image ids if ``state`` has any, or else its project."""
    return ids_source(state) if _given(state, IMAGE_ID_KEYS) is not None else project_source(state)


def batch_size_of(state: State, default: int) -> int:
    """How many images are predicted at a time, 1 to 256."""
    value = state.get("batch_size")
    if value is None:
        return min(max(default, 1), MAX_BATCH_SIZE)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_BATCH_SIZE:
        raise RequestError(
            f"batch_size is a whole number from 1 to {MAX_BATCH_SIZE}, and {shown(value)} was "
            "received; change it or leave it out."
        )
    return value


def destination_of(state: State) -> Destination:
    """Where the labels of the run go."""
    mode = state.get("upload_mode")
    if mode is not None and mode not in UPLOAD_MODES:
        received = mode if isinstance(mode, str) else shown(mode)
        raise RequestError(unknown_name("upload_mode", received, UPLOAD_MODES))
    project_id = state.get("output_project_id")
    if project_id is not None:
        project_id = _id("output_project_id", project_id)
        mode = mode or "append"
    iou = _iou(state)
    if mode == "iou_merge" and iou is None:
        iou = DEFAULT_MERGE_IOU
    return Destination(mode, project_id, iou, _suffix(state))


def _suffix(state: State) -> str | None:
    suffix = state.get("model_prediction_suffix")
    if suffix is not None and not isinstance(suffix, str):
        raise RequestError(
            f"model_prediction_suffix is text, and {shown(suffix)} was received; leave it out."
        )
    return suffix or None


def _iou(state: State) -> float | None:
    """The platform's apps put it into the settings, and the SDK's client beside them."""
    settings = state.get("settings")
    inside = settings.get("existing_objects_iou_thresh") if isinstance(settings, dict) else None
    candidates = (
        inside,
        state.get("existing_objects_iou_thresh"),
        state.get("iou_merge_threshold"),
    )
    value = next((candidate for candidate in candidates if candidate is not None), None)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise RequestError(
            f"existing_objects_iou_thresh is a number from 0 to 1, and {shown(value)} was "
            "received; change it or leave it out."
        )
    return float(value) or None


def _given(state: State, keys: tuple[str, ...]) -> tuple[str, object] | None:
    return next(((key, state[key]) for key in keys if state.get(key) is not None), None)


def _ids(state: State, keys: tuple[str, ...]) -> tuple[int, ...] | None:
    given = _given(state, keys)
    if given is None:
        return None
    key, value = given
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(_id(key, one) for one in values)


def _id(key: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RequestError(
            f"{key} takes whole numbers from 1, and {shown(value)} was received; send the "
            "platform's own ids."
        )
    return value


_IDS_PER_REQUEST: Final = 500
_UNKNOWN_SIZE: Final = 1_000_000
_UNKNOWN_PIXELS: Final = 4_000_000
_IMAGES_PROJECT: Final = "images"


class NotFoundError(RequestError):
    """The platform has no such thing, or this account may not see it."""

    code = "not_found"


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


def _by_ids(api: sly.Api, image_ids: Sequence[int]) -> Images:
    infos = _infos(api, image_ids)
    if not infos:
        raise NotFoundError(_missing_image(image_ids[0]).message)
    datasets = {one: api.dataset.get_info_by_id(one) for one in _datasets_in(infos.values())}
    targets = [
        Target(one, datasets[infos[one].dataset_id].project_id, infos[one])
        if one in infos
        else Target(one, failure=_missing_image(one))
        for one in image_ids
    ]
    return Images(tuple(targets), datasets)


def _datasets_in(infos: Iterable[sly.ImageInfo]) -> list[int]:
    return list(dict.fromkeys(info.dataset_id for info in infos))


def _missing_image(image_id: int) -> Failure:
    return Failure(
        "not_found",
        f"Image {image_id} does not exist, is archived, or is not visible to this account; check "
        "the id.",
    )


def _infos(api: sly.Api, image_ids: Sequence[int]) -> dict[int, sly.ImageInfo]:
    """The images that exist. The SDK's own batch call raises for all of them when one does not."""
    infos: dict[int, sly.ImageInfo] = {}
    waiting = dict.fromkeys(image_ids)
    while waiting:
        image_id, _ = waiting.popitem()
        info = _info_or_none(api, image_id)
        if info is None:
            continue
        infos[image_id] = info
        for ids in _parts(list(waiting), _IDS_PER_REQUEST):
            filters = [{"field": "id", "operator": "in", "value": ids}]
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


def _parts(ids: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def _of_project(api: sly.Api, project_id: int, dataset_ids: Sequence[int] | None) -> Images:
    project = api.project.get_info_by_id(project_id)
    if project is None:
        raise NotFoundError(
            f"Project {project_id} does not exist or is not visible to this account; check the id."
        )
    if str(project.type) != _IMAGES_PROJECT:
        raise RequestError(
            f"Only projects of images can be labeled, and project {project_id} is of "
            f"{project.type}; choose another."
        )
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


def download_images(api: sly.Api, infos: Sequence[sly.ImageInfo]) -> list[AnyImage]:
    """The bytes of every image, or its Failure, in order.

    A request that fails is sent again image by image, so that one bad image costs only itself;
    not so one that found no connection, which the SDK has tried for minutes by then.
    """
    ids_of: dict[int, list[int]] = defaultdict(list)
    for info in infos:
        if info.id not in ids_of[info.dataset_id]:
            ids_of[info.dataset_id].append(info.id)
    got: dict[int, AnyImage] = {}
    for dataset_id, ids in ids_of.items():
        got.update(_download_dataset(api, dataset_id, ids))
    return [got[info.id] for info in infos]


def _download_dataset(api: sly.Api, dataset_id: int, ids: list[int]) -> dict[int, AnyImage]:
    try:
        return dict(zip(ids, api.image.download_bytes(dataset_id, ids), strict=True))
    except Exception as error:  # noqa: BLE001  (the SDK and its transport raise what they like)
        if len(ids) == 1 or isinstance(error, ConnectionFailed | Timeout):
            sly.logger.warning(f"Images {ids} cannot be downloaded: {error!r}")
            return {one: failed_download(one, error) for one in ids}
        sly.logger.warning(
            f"{len(ids)} images of dataset {dataset_id} are downloaded one by one, because their "
            f"common download failed: {error!r}"
        )
    return {
        image_id: image
        for one in ids
        for image_id, image in _download_dataset(api, dataset_id, [one]).items()
    }


def failed_download(image_id: int, error: Exception) -> Failure:
    """The failure of an image whose bytes did not come."""
    return failure_of(error, f"Image {image_id} cannot be downloaded", "download_failed")


State = Mapping[str, object]
Download = Callable[[sly.Api, Sequence[sly.ImageInfo]], Sequence[AnyImage]]


class HasAnnotation(Protocol):
    """A predicted image."""

    @property
    def annotation(self) -> sly.Annotation: ...

    @property
    def notes(self) -> tuple[str, ...]: ...


class Predict(Protocol):
    """One outcome per image, in order. ``is_bulk`` work gives way to single images."""

    def __call__(
        self,
        images: Sequence[AnyImage],
        settings: Settings,
        *,
        api: sly.Api,
        is_bulk: bool,
        should_stop: Callable[[], bool],
    ) -> Sequence[HasAnnotation | Failure]: ...


class AskQuestions(Protocol):
    """One outcome per question, in order, as bulk work."""

    def __call__(
        self, asks: Sequence[Ask], *, should_stop: Callable[[], bool]
    ) -> Sequence[Result | Failure]: ...


class Upload(Protocol):
    """``upload_predictions`` of the SDK's ``Inference``, bound to the app."""

    def __call__(
        self, predictions: list[sly.nn.model.prediction.Prediction], **options: object
    ) -> None: ...


@dataclass(frozen=True)
class RunServices:
    """``settings_of`` makes settings of a request's state; what it raises ends the run.

    ``download`` gives one image, or its Failure, per info, in order; it is called from several
    threads. ``format_output`` is the SDK's ``_format_output`` bound to the app. ``task_id`` names
    created projects.
    """

    predict: Predict
    settings_of: Callable[[State, sly.Api], Settings]
    upload: Upload
    format_output: Callable[[list[sly.nn.model.prediction.Prediction]], list[dict[str, object]]]
    model_meta: Callable[[], sly.ProjectMeta]
    task_id: int | None
    default_batch_size: int
    download: Download = download_images


@dataclass(frozen=True)
class ExistingServices:
    """What asking about existing labels needs; see RunServices."""

    ask: AskQuestions
    settings_of: Callable[[State, sly.Api], Settings]
    default_batch_size: int
    download: Download = download_images
