"""What the state of a request says beside its settings: which images, until when, where to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from florence2.errors import RequestError, shown, unknown_name

State = Mapping[str, object]
UploadMode = Literal["append", "iou_merge", "replace", "create", "skip_labeled", "replace_own"]

MAX_BATCH_SIZE: Final = 256
DEFAULT_MERGE_IOU: Final = 0.9
UPLOAD_MODES: Final[tuple[UploadMode, ...]] = (
    "append", "iou_merge", "replace", "create", "skip_labeled", "replace_own"
)  # fmt: skip
IMAGE_ID_KEYS: Final = ("batch_ids", "image_ids", "images_ids", "imageIds", "image_id", "imageId")
PROJECT_ID_KEYS: Final = ("projectId", "project_id")
DATASET_ID_KEYS: Final = ("dataset_ids", "datasetIds")


@dataclass(frozen=True, slots=True)
class Source:
    """The images: either their ids, or a project and, unless None, its datasets."""

    image_ids: tuple[int, ...] = ()
    project_id: int | None = None
    dataset_ids: tuple[int, ...] | None = None

    @classmethod
    def of_ids(cls, state: State) -> Source:
        """The images named in ``state``; RequestError when there are none or they are no ids."""
        found = _ids(state, IMAGE_ID_KEYS)
        if not found:
            raise RequestError(
                "A request needs at least one image id, and none was received; send it."
            )
        return cls(image_ids=found)

    @classmethod
    def of_project(cls, state: State) -> Source:
        """The project named in ``state``, and its datasets if some are; RequestError."""
        found = _ids(state, PROJECT_ID_KEYS) or ()
        if len(found) != 1:
            raise RequestError(
                f"A run needs one project id, and {shown(list(found))} was received; send it as "
                "project_id."
            )
        return cls(project_id=found[0], dataset_ids=_ids(state, DATASET_ID_KEYS))

    @classmethod
    def of_either(cls, state: State) -> Source:
        """Image ids if ``state`` has any, or else its project; RequestError."""
        has_ids = any(state.get(key) is not None for key in IMAGE_ID_KEYS)
        return cls.of_ids(state) if has_ids else cls.of_project(state)


def is_about_one_image(state: State) -> bool:
    """Whether ``state`` names one image, and no list, which may have one too."""
    value = next((state[key] for key in IMAGE_ID_KEYS if state.get(key) is not None), None)
    return value is not None and not isinstance(value, list | tuple)


@dataclass(frozen=True, slots=True)
class Destination:
    """Where labels go. ``mode`` of None: they are returned and nothing is changed.

    ``skip_labeled`` appends, to images without labels only; ``replace_own`` appends in the place
    of what earlier runs wrote and nobody has changed since.

    ``iou``: predictions that overlap an existing label of their class by this or more are left
    out; None keeps all. ``suffix`` goes behind names that the project has with another meaning.
    """

    mode: UploadMode | None = None
    project_id: int | None = None
    iou: float | None = None
    suffix: str | None = None

    @classmethod
    def of(cls, state: State) -> Destination:
        """Where the labels of the run go; RequestError."""
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
        suffix = state.get("model_prediction_suffix")
        if suffix is not None and not isinstance(suffix, str):
            raise RequestError(
                f"model_prediction_suffix is text, and {shown(suffix)} was received; leave it out."
            )
        return cls(mode, project_id, iou, suffix or None)

    def is_copying(self, project_id: int | None) -> bool:
        """Whether the labels of a project's images go to copies of them."""
        return self.mode == "create" or self.project_id not in (None, project_id)


def check_resume(state: State, source: Source, destination: Destination) -> None:
    """RequestError where ``resume`` goes together with nothing to go on with."""
    resume = state.get("resume")
    if resume is not None and not isinstance(resume, bool):
        raise RequestError(f"resume is true or false, and {shown(resume)} was received.")
    if not resume:
        return
    if destination.mode is None or source.project_id is None:
        raise RequestError(
            "resume goes on with a run that writes labels to a project, and "
            + ("no upload_mode" if destination.mode is None else "ids of images")
            + " came with it; send "
            + ("one." if destination.mode is None else "project_id.")
        )
    if destination.is_copying(source.project_id):
        raise RequestError(
            "A run that copies images to another project cannot be gone on with; leave resume out, "
            "or label the copies: send their project as project_id with upload_mode append."
        )


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


def _iou(state: State) -> float | None:
    """The platform's apps put it into the settings, and the SDK's client beside them."""
    settings = state.get("settings")
    key = "existing_objects_iou_thresh"
    inside = settings.get(key) if isinstance(settings, dict) else None
    given = (inside, state.get(key), state.get("iou_merge_threshold"))
    value = next((value for value in given if value is not None), None)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise RequestError(
            f"{key} is a number from 0 to 1, and {shown(value)} was received; change it or leave "
            "it out."
        )
    return float(value) or None


def _ids(state: State, keys: tuple[str, ...]) -> tuple[int, ...] | None:
    """The ids under the first of ``keys`` that is there."""
    for key in keys:
        value = state.get(key)
        if value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            return tuple(_id(key, one) for one in values)
    return None


def _id(key: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RequestError(
            f"{key} takes whole numbers from 1, and {shown(value)} was received; send the "
            "platform's own ids."
        )
    return value
