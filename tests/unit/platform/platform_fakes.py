"""A platform in memory, at the edge of the network, and a model at the edge of the engine."""

import io
import time
from types import SimpleNamespace

from PIL import Image

from florence2.budget import Budget
from florence2.engine.scheduler import Priority
from florence2.errors import FlorenceError
from florence2.images import open_image
from florence2.records import Failure, Result
from serve.platform.run import RunServices
from serve.platform.upload import SdkUpload
from serve.predict.predictor import Predicted
from serve.sdk import sly
from serve.settings import Settings

# isort: split
from supervisely.nn.inference.inference_request import InferenceRequest

Inference = sly.nn.inference.inference.Inference
Stage = InferenceRequest.Stage
SIZE_WH = (60, 40)
PROJECT, DATASET, OTHER_DATASET = 1, 10, 11


class CodedError(FlorenceError):
    def __init__(self, code):
        super().__init__(f"This is {code}.")
        self.code = code
        self.retry_after_s = 0.1


def png(color=(200, 30, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", SIZE_WH, color).save(buffer, "PNG")
    return buffer.getvalue()


DAMAGED = png()[:60]


def image_info(image_id, dataset_id=DATASET, size=1000):
    fields = dict.fromkeys(sly.ImageInfo._fields)
    fields.update(id=image_id, name=f"{image_id}.png", dataset_id=dataset_id, size=size, meta={})
    return sly.ImageInfo(**fields)


def dataset_info(dataset_id, project_id=PROJECT, parent_id=None):
    name = f"ds{dataset_id}"
    return SimpleNamespace(id=dataset_id, name=name, project_id=project_id, parent_id=parent_id)


def rectangle(name="cat", tlbr=(1, 2, 20, 30), tags=()):
    return sly.Label(sly.Rectangle(*tlbr), sly.ObjClass(name, sly.Rectangle), tags=tags)


def annotation(*labels, tags=()):
    return sly.Annotation(SIZE_WH[::-1], list(labels), img_tags=list(tags))


def wait_until(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def fails_for(*ids, error=ValueError, times=-1):
    """A fault of the platform for requests about one of ``ids``, or all, so often or always."""
    left = [times]

    def fault(asked):
        if left[0] and (not ids or set(asked) & set(ids)):
            left[0] -= 1
            raise error("refused")

    return fault


def failures_of(request):
    """The code of each failure by image id, from the results that wait to be fetched."""
    entries = request.pop_pending_results()
    return {one["image_id"]: one["error"]["code"] for one in entries if one.get("error")}


class FakePlatform:
    """Behaves like ``sly.Api`` where runs touch it. Faults are set on it by the tests.

    ``content``: bytes by image id. ``annotations``: JSON by image id. ``calls``: what was asked.
    ``upload_fault`` and ``download_fault`` are called with ids before the work, and may raise.
    """

    def __init__(self, ids=(), other_ids=(), meta=None):
        infos = [image_info(one) for one in ids]
        infos += [image_info(one, OTHER_DATASET) for one in other_ids]
        self.infos = {info.id: info for info in infos}
        self.content = {info.id: png((info.id % 200, 30, 30)) for info in infos}
        self.annotations = {info.id: annotation().to_json() for info in infos}
        self.metas, self.projects, self.uploads, self.calls = {}, {}, {}, []
        self.add_project(PROJECT, meta)
        datasets = dataset_info(DATASET), dataset_info(OTHER_DATASET, parent_id=DATASET)
        self.datasets = {one.id: one for one in datasets}
        self.upload_fault = self.download_fault = lambda ids: None
        self.image = SimpleNamespace(
            get_info_by_id=self.infos.get,
            get_info_by_id_batch=lambda ids: [self.infos[one] for one in ids],
            get_info_by_name=self._image_by_name,
            get_list=self._images_of,
            download_bytes=self._download,
            copy_batch_optimized=self._copy,
            tag=SimpleNamespace(add_to_objects=self._add_tags),
        )
        self.dataset = SimpleNamespace(
            get_info_by_id=self.datasets.get, get_list=self._datasets_of, create=self._add_dataset
        )
        self.project = SimpleNamespace(
            get_info_by_id=self.projects.get,
            get_meta=lambda project_id: self.metas[project_id].to_json(),
            update_meta=self._update_meta,
            create=self._create_project,
        )
        self.annotation = SimpleNamespace(
            download_batch=lambda dataset_id, ids: [
                SimpleNamespace(annotation=self.annotations[one]) for one in ids
            ],
            download_json_batch=lambda dataset_id, ids: [self.annotations[one] for one in ids],
            upload_anns=self._upload,
        )
        self.advanced = SimpleNamespace(
            get_object_tags=self.tags_of, remove_tag_from_object=self._remove_tag
        )

    def add_project(self, project_id, meta=None):
        made = SimpleNamespace(id=project_id, name="p", type="images", workspace_id=7)
        self.projects[project_id], self.metas[project_id] = made, meta or sly.ProjectMeta()
        return made

    def add_label(self, image_id, label):
        """Labels an image as a person would."""
        self.annotations[image_id] = annotation(label).to_json()
        if self.metas[PROJECT].get_obj_class(label.obj_class.name) is None:
            self.metas[PROJECT] = self.metas[PROJECT].add_obj_class(label.obj_class)

    @property
    def copies(self):
        return [info for info in self.infos.values() if info.id > 1000]

    def classes_uploaded(self, image_id):
        return [label.obj_class.name for label in self.uploads[image_id].labels]

    def tags_of(self, figure_id):
        [tags] = [
            stored["tags"]
            for one in self.annotations.values()
            for stored in one["objects"]
            if stored.get("id") == figure_id
        ]
        return tags

    def called(self, name):
        return [arguments for called, *arguments in self.calls if called == name]

    def _images_of(self, dataset_id, filters=None):
        wanted = self.infos if filters is None else filters[0]["value"]
        infos = self.infos.values()
        return [info for info in infos if info.dataset_id == dataset_id and info.id in wanted]

    def _image_by_name(self, dataset_id, name):
        return next((one for one in self._images_of(dataset_id) if one.name == name), None)

    def _download(self, dataset_id, ids):
        self.calls.append(("download", tuple(ids)))
        self.download_fault(ids)
        assert all(self.infos[one].dataset_id == dataset_id for one in ids)
        return [self.content[one] for one in ids]

    def _copy(self, source, infos, dataset_id, dst_names, **options):
        copies = []
        for info, name in zip(infos, dst_names, strict=True):
            if self._image_by_name(dataset_id, name):
                raise ValueError(f"there is an image {name} already")
            copy = image_info(1000 * dataset_id + info.id, dataset_id)._replace(name=name)
            self.infos[copy.id] = copy
            copies.append(copy)
        return copies

    def _datasets_of(self, project_id, recursive=False):
        assert recursive
        return [one for one in self.datasets.values() if one.project_id == project_id]

    def _add_dataset(self, project_id, name, **options):
        made = dataset_info(50 + len(self.datasets), project_id)
        self.datasets[made.id] = made
        return made

    def _create_project(self, workspace_id, name, **options):
        self.calls.append(("create_project", name))
        return self.add_project(2)

    def _update_meta(self, project_id, meta):
        self.calls.append(("update_meta", project_id))
        tags = [tag.clone(sly_id=900 + number) for number, tag in enumerate(meta.tag_metas)]
        self.metas[project_id] = meta.clone(tag_metas=sly.TagMetaCollection(tags))
        return self.metas[project_id]

    def _upload(self, ids, annotations):
        self.calls.append(("upload", tuple(ids)))
        self.upload_fault(ids)
        for image_id, one in zip(ids, annotations, strict=True):
            self.uploads[image_id], self.annotations[image_id] = one, one.to_json()

    def _add_tags(self, project_id, tags):
        self.calls.append(("add_tags", project_id, tags))
        self.upload_fault([tag["figureId"] for tag in tags])
        names = {meta.sly_id: meta.name for meta in self.metas[project_id].tag_metas}
        for tag in tags:
            stored = {"id": 5000 + tag["figureId"], "tagId": tag["tagId"]}
            stored |= {"name": names[tag["tagId"]], "value": tag["value"]}
            self.tags_of(tag["figureId"]).append(stored)

    def _remove_tag(self, tag_meta_id, figure_id, tag_id):
        tags = self.tags_of(figure_id)
        tags[:] = [tag for tag in tags if tag["id"] != tag_id]


def failure_to_open(image):
    try:
        open_image(image)
    except FlorenceError as error:
        return Failure(error.code, str(error))
    return None


class FakePredictor:
    """A cat on every image that can be opened; ``before`` is called with the images first.

    ``batches``: how many images were asked about together, and whether as bulk work.
    """

    def __init__(self, before=lambda images: None, labels=None):
        self.before = before
        self.labels = [rectangle()] if labels is None else labels
        self.batches = []

    def __call__(self, images, settings, call):
        self.batches.append((len(images), call.priority is Priority.BULK))
        instead = self.before(images)
        if isinstance(instead, Failure):
            return [instead] * len(images)
        return [failure_to_open(one) or Predicted(annotation(*self.labels)) for one in images]


class FakeModel:
    """Says a word about each region of an image that opens: its left edge.

    ``fault`` may give a Failure instead.
    """

    def __init__(self, fault=lambda ask: None, word="thing"):
        self.fault, self.word, self.calls = fault, word, []

    def __call__(self, asks, call=None):
        self.calls.append(list(asks))
        return [self.fault(ask) or failure_to_open(ask.image) or self._said(ask) for ask in asks]

    def _said(self, ask):
        text = f"{self.word} {ask.region.box_xyxy[0]:g}" if self.word else ""
        return Result(ask.task, SIZE_WH, (), text, "", (), False)


def services(predict=None, ask=None, settings=None, budget=None):
    return RunServices(
        predict=predict or FakePredictor(),
        ask=ask or FakeModel(),
        settings_of=lambda state: settings or Settings(num_beams=1),
        upload=SdkUpload().upload_predictions,
        budget=budget or Budget(10**9, "bytes"),
        task_id=3,
        default_batch_size=4,
    )
