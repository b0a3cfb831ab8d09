"""The platform's public applications: what each sends in order, and what it makes of the answers.

Each is written after its public source, with what is on its page as attributes and what its
buttons do as methods; docs/serving.md lists what they send. What they get wrong is kept, as
a user of theirs meets it too.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from contract_calls import annotation_of, meta_of
from platform_double import TASK_ID

from serve.sdk import sly

# isort: split
from supervisely.nn.inference.inference import _exclude_duplicated_predictions
from supervisely.nn.model.model_api import ModelAPI

PROMPT_BASED = "prompt-based object detection"
CONFIDENCE = sly.TagMeta("confidence", sly.TagValueType.ANY_NUMBER)


@dataclass
class ByTask:
    """What the applications have in common that ask a task."""

    api: sly.Api
    info: dict[str, Any] = field(default_factory=dict)
    meta: sly.ProjectMeta = field(default_factory=sly.ProjectMeta)
    text: str = ""
    """The settings as they stand in the editor."""

    def send(self, command: str, *, timeout: int = 60, **state: Any) -> Any:
        return self.api.task.send_request(
            TASK_ID, command, state, timeout=timeout, retries=1, raise_error=True
        )

    def connect(self) -> None:
        self.info = self.send("get_session_info")
        self.meta = sly.ProjectMeta.from_json(self.send("get_output_classes_and_tags"))
        settings = self.send("get_custom_inference_settings")["settings"]
        self.text = settings if isinstance(settings, str) else yaml.dump(settings)

    def edit(self, **values: Any) -> None:
        """The user changes values in the editor; the comments stay."""
        for key, value in values.items():
            line = f"{key}: {json.dumps(value)}"
            edited, count = re.subn(
                rf"^{key}:.*$", lambda _, line=line: line, self.text, flags=re.M
            )
            self.text = edited if count else f"{self.text}\n{line}\n"

    def read(self, entry: Any, size: tuple[int, int]) -> sly.Annotation:
        """Classes that were not announced become boxes; what does not fit is nothing at all."""
        try:
            annotation = entry["annotation"]
            if self.info["task type"] == PROMPT_BASED:
                self.meta = with_confidence(self.meta)
                for title in dict.fromkeys(item["classTitle"] for item in annotation["objects"]):
                    if self.meta.get_obj_class(title) is None:
                        self.meta = self.meta.add_obj_class(sly.ObjClass(title, sly.Rectangle))
            return sly.Annotation.from_json(annotation, self.meta)
        except Exception:  # noqa: BLE001 - as the applications do
            return sly.Annotation(size)


class AnnotationTool(ByTask):
    """NN Image Labeling: one image of the tool at a time."""

    error = ""

    def press(
        self, image_id: int, figure_id: int | None = None, add_mode: str = "merge"
    ) -> sly.Annotation | None:
        """The button to apply the model; with a figure it writes a reference into the settings."""
        info = self.api.image.get_info_by_id(image_id)
        project_id = self.api.dataset.get_info_by_id(info.dataset_id).project_id
        meta = meta_of(self.api, project_id)
        before = annotation_of(self.api, image_id)
        if figure_id is not None:
            self._refer_to(before.get_label_by_id(figure_id), image_id)
            return None
        settings = yaml.safe_load(self.text)
        try:
            entry = self.send("inference_image_id", image_id=image_id, settings=settings)
        except Exception as error:  # noqa: BLE001 - shown, and an empty annotation is gone on with
            self.error = str(error)
            entry = {"annotation": sly.Annotation((info.height, info.width)).to_json()}
        found = self.read(entry, (info.height, info.width))
        found = self._fitted(found, project_id, meta)
        result = before.merge(found) if add_mode == "merge" else found
        self.api.annotation.upload_ann(image_id, result)
        return found

    def _refer_to(self, label: sly.Label, image_id: int) -> None:
        box = label.geometry.to_bbox()
        self.edit(
            mode="reference_image",
            reference_image_id=image_id,
            reference_class_name=label.obj_class.name,
            reference_bbox=[box.top, box.left, box.bottom, box.right],
        )

    def _fitted(
        self, found: sly.Annotation, project_id: int, meta: sly.ProjectMeta
    ) -> sly.Annotation:
        """Its classes are added to the project, under other names where they have another shape.

        ``meta`` is from before the model was asked: what somebody added meanwhile goes again.
        """
        meta = with_confidence(meta)
        labels = []
        for label in found.labels:
            name, number = label.obj_class.name, 0
            shape = label.geometry.geometry_name()
            while (known := meta.get_obj_class(name)) is not None and (
                known.geometry_type.geometry_name() != shape
            ):
                number += 1
                name = f"{label.obj_class.name}_pred" + (f"_{number}" if number > 1 else "")
            known = known or label.obj_class.clone(name=name)
            if meta.get_obj_class(name) is None:
                meta = meta.add_obj_class(known)
            labels.append(label.clone(obj_class=known))
        self.api.project.update_meta(project_id, meta)
        return found.clone(labels=labels)


class ApplyToImages(ByTask):
    """Apply NN to Images Project: a project made anew, two images at a time, or in windows."""

    window: dict[str, Any] | None = None

    def preview_windows(self, image_id: int) -> list[dict[str, Any]]:
        """The frames of the film of its windows: rectangles, and labels of classes it knows."""
        entry = self.send(
            "inference_image_id", timeout=200, image_id=image_id, settings=self._settings()
        )
        slides = entry["data"]["slides"]
        for slide in slides:
            sly.Rectangle.from_json(slide["rectangle"])
            slide["labels"] = [sly.Label.from_json(label, self.meta) for label in slide["labels"]]
        return slides

    def apply(self, project_id: int, dataset_id: int, add_mode: str = "merge") -> int:
        """The new project's id."""
        meta = meta_of(self.api, project_id)
        result = self.api.project.create(5, "street_inference", change_name_if_conflict=True)
        self.api.project.update_meta(result.id, meta)
        target = self.api.dataset.create(result.id, "labeled")
        images = self.api.image.get_list(dataset_id)
        for start in range(0, len(images), 2):
            batch = images[start : start + 2]
            ids = [info.id for info in batch]
            found = self._found(dataset_id, ids)
            read = [
                self.read(entry, (info.height, info.width))
                for info, entry in zip(batch, found, strict=True)
            ]
            meta = with_confidence(meta)
            for label in (label for one in read for label in one.labels):
                if meta.get_obj_class(label.obj_class.name) is None:
                    meta = meta.add_obj_class(label.obj_class)
            self.api.project.update_meta(project_id, meta)
            self.api.project.update_meta(result.id, meta)
            if add_mode == "merge":
                before = self.api.annotation.download_batch(dataset_id, ids)
                read = _exclude_duplicated_predictions(
                    self.api, read, dataset_id, ids, self._settings().get(_IOU), meta
                )
                read = [
                    sly.Annotation.from_json(one.annotation, meta).merge(new)
                    for one, new in zip(before, read, strict=True)
                ]
            copies = self.api.image.upload_ids(target.id, [one.name for one in batch], ids)
            self.api.annotation.upload_anns([one.id for one in copies], read)
        project_id: int = result.id
        return project_id

    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = yaml.safe_load(self.text) or {}
        if self.window is not None:
            settings |= {"inference_mode": "sliding_window", "sliding_window_params": self.window}
        return settings

    def _found(self, dataset_id: int, ids: Sequence[int]) -> list[Any]:
        """An entry for each image; what is wrong with it is left to ``read``."""
        settings = self._settings()
        if self.window is not None and self.info["async_image_inference_support"] is True:
            return [self._in_background(image_id, settings) for image_id in ids]
        answer = self.send(
            "inference_batch_ids", dataset_id=dataset_id, batch_ids=list(ids), settings=settings
        )
        if not isinstance(answer, list) or len(answer) != len(ids):
            raise RuntimeError("An application of the platform asks for them one by one now.")
        return answer

    def _in_background(self, image_id: int, settings: dict[str, Any]) -> Any:
        """What stands as result in the first progress that says that nothing is going on."""
        started = self.send("inference_image_id_async", image_id=image_id, settings=settings)
        uuid = started["inference_request_uuid"]
        while True:
            progress = self.send("get_inference_progress", inference_request_uuid=uuid)
            if not progress["is_inferring"]:
                return progress["result"]
            time.sleep(0.05)


_IOU = "existing_objects_iou_thresh"


class ApplyFlorence(ByTask):
    """Apply Florence-2 to Images Project: boxes by text, out of which another model makes masks."""

    def connect(self) -> None:
        self.meta = sly.ProjectMeta.from_json(self.send("get_output_classes_and_tags"))

    def apply(self, project_id: int, dataset_id: int, prompt: str) -> tuple[int, list[Any]]:
        """The new project's id, and what the second model is asked about: name and corners."""
        meta = with_confidence(meta_of(self.api, project_id))
        result = self.api.project.create(5, "street - (Annotated)", change_name_if_conflict=True)
        target = self.api.dataset.create(result.id, "ds")
        images, labeled, asked = self.api.image.get_list(dataset_id), [], []
        for info in images:
            settings = {"mapping": None, "mode": "text_prompt", "text": prompt}
            entry = self.send(
                "inference_image_id", timeout=500, image_id=info.id, settings=settings
            )
            for label in entry["annotation"]["objects"]:
                if meta.get_obj_class(label["classTitle"]) is None:
                    meta = meta.add_obj_class(sly.ObjClass(label["classTitle"], sly.Rectangle))
                # Any of these letters at the end goes, so that a "box" has no name left.
                name = label["classTitle"].rstrip("_bbox")  # noqa: B005
                asked.append((name, label["points"]["exterior"]))
            found = sly.Annotation.from_json(entry["annotation"], meta)
            self.api.project.update_meta(result.id, meta)
            before = self.api.annotation.download(info.id).annotation
            labeled.append(sly.Annotation.from_json(before, meta).add_labels(found.labels))
        copies = self.api.image.upload_ids(
            target.id, [one.name for one in images], [one.id for one in images]
        )
        self.api.annotation.upload_anns([one.id for one in copies], labeled)
        return result.id, asked


class PredictApp:
    """The SDK's Predict App, without its page: its runs are the SDK's ``ModelAPI``."""

    def __init__(self, api: sly.Api) -> None:
        self.api = api
        self.model: ModelAPI = api.nn.connect(TASK_ID)
        self.classes: list[str] = []
        self.settings: dict[str, Any] = {}

    def connect(self) -> None:
        """All classes are ticked."""
        self.classes = self.model.get_classes()
        settings = self.model.get_settings()
        self.settings = yaml.safe_load(settings) if isinstance(settings, str) else settings

    def run(
        self, image_ids: Sequence[int], upload_mode: str, stop_after: int | None = None
    ) -> list[Any]:
        """The predictions that came; ``stop_after`` so many the user presses Stop."""
        came: list[Any] = []
        with self.model.predict_detached(
            image_ids=list(image_ids),
            inference_mode="full_image",
            model_prediction_suffix="_model",
            inference_settings=self.settings,
            upload_mode=upload_mode,
            classes=self.classes,
        ) as session:
            for prediction in session:
                came.append(prediction)
                if len(came) == stop_after:
                    break
        return came


def with_confidence(meta: sly.ProjectMeta) -> sly.ProjectMeta:
    known = meta.get_tag_meta(CONFIDENCE.name)
    return meta.add_tag_meta(CONFIDENCE) if known is None else meta


def run_video(
    client: PredictApp, video_id: int, *, tracking: bool, stop_after: int | None = None
) -> tuple[list[Any], Any]:
    """Predict App on a video: what came of its frames, and the final result."""
    came: list[Any] = []
    with client.model.predict_detached(
        video_id=video_id,
        tracking=tracking,
        tracking_config={"tracker": "botsort", "track_high_thresh": 0.5},
        inference_mode="full_image",
        inference_settings=client.settings,
        classes=client.classes,
    ) as session:
        for prediction in session:
            came.append(prediction)
            if len(came) == stop_after:
                break
    return came, session.final_result


class ApplyToVideos(ByTask):
    """Apply NN to Videos Project: classes are ticked before anything is asked."""

    def connect(self) -> None:
        """With time for three seconds each, and only to a model of videos."""
        self.info = self.send("get_session_info", timeout=3)
        self.meta = sly.ProjectMeta.from_json(self.send("get_output_classes_and_tags", timeout=3))
        self.text = "# Model settings:\n" + self.send("get_custom_inference_settings")["settings"]
        if self.info["videos_support"] is not True:
            raise TypeError("The model does not label videos.")

    def preview(self, video_id: int, frame: int) -> sly.Annotation:
        """One frame, with the classes that were known when it connected."""
        session = sly.nn.inference.SessionJSON(self.api, TASK_ID, inference_settings=self._yaml())
        [entry] = session.inference_video_id_async(video_id, frame, 1, preparing_cb=_Bar)
        return sly.Annotation.from_json(entry["annotation"], self.meta)

    def annotate(
        self, video_id: int, frames: tuple[int, int], ticked: Sequence[str], tracker: str | None
    ) -> sly.VideoAnnotation:
        """What is uploaded for one video: the ticked classes are all that its project has."""
        settings = self._yaml() | {"classes": list(ticked)}
        session = sly.nn.inference.Session(self.api, TASK_ID, inference_settings=settings)
        meta = self.meta.clone([one for one in self.meta.obj_classes if one.name in ticked])
        first, count = frames[0], frames[1] - frames[0] + 1
        if tracker is not None:
            if tracker not in self.info["tracking_algorithms"]:
                raise ValueError("The model does not track.")
            for _ in session.inference_video_id_async(video_id, first, count, tracker=tracker):
                pass
            found = session.inference_result["video_ann"]
            return sly.VideoAnnotation.from_json(found, project_meta=meta)
        answers = session.inference_video_id_async(video_id, first, count, preparing_cb=_Bar)
        objects = {one.name: sly.VideoObject(one) for one in meta.obj_classes}
        annotations = list(answers)
        labeled = [
            sly.Frame(
                index,
                [
                    sly.VideoFigure(objects[label.obj_class.name], label.geometry, index)
                    for label in annotation.labels
                    if label.obj_class.name in objects
                ],
            )
            for index, annotation in enumerate(annotations, first)
        ]
        return sly.VideoAnnotation(
            annotations[0].img_size,
            len(labeled),
            sly.VideoObjectCollection(list(objects.values())),
            sly.FrameCollection(labeled),
        )

    def _yaml(self) -> dict[str, Any]:
        settings: dict[str, Any] = yaml.safe_load(self.text)
        return settings


class _Bar:
    """A progress bar of a page, as the SDK's client moves it."""

    def __init__(self, message: str, total: int, **_shown: Any) -> None:
        if not isinstance(total, int) or total < 1:
            raise ValueError(f"A bar of {message!r} has no end: {total!r}.")

    def update(self, count: int) -> None:
        """So much more is done."""
