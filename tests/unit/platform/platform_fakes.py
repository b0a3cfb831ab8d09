"""A platform in memory, at the edge of the network, and a predictor at the edge of the model."""

import io
from types import SimpleNamespace

from PIL import Image

from florence2.errors import FlorenceError, ImageError
from florence2.images import open_image
from florence2.records import Failure
from serve.platform.images import RunServices
from serve.sdk import sly
from serve.settings import Settings

Inference = sly.nn.inference.inference.Inference
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


def image_info(image_id, dataset_id=DATASET, size=1000):
    fields = dict.fromkeys(sly.ImageInfo._fields)
    fields.update(id=image_id, name=f"{image_id}.png", dataset_id=dataset_id, size=size, meta={})
    return sly.ImageInfo(**fields)


def rectangle(name="cat", tlbr=(1, 2, 20, 30), tags=(), figure_id=None):
    shape = sly.Rectangle(*tlbr)
    return sly.Label(shape, sly.ObjClass(name, sly.Rectangle), tags=tags, sly_id=figure_id)


def annotation(*labels, tags=()):
    return sly.Annotation(SIZE_WH[::-1], list(labels), img_tags=list(tags))


class FakePlatform:
    """Behaves like ``sly.Api`` where runs touch it. Faults are set on it by the tests.

    ``content``: bytes by image id. ``annotations``: JSON by image id. ``calls``: what was asked.
    ``upload_fault`` and ``download_fault`` are called with ids before the work, and may raise.
    """

    def __init__(self, ids=(), other_ids=(), meta=None):
        infos = [image_info(one) for one in ids] + [image_info(one, 11) for one in other_ids]
        self.infos = {info.id: info for info in infos}
        self.content = {info.id: png((info.id % 200, 30, 30)) for info in infos}
        self.annotations = {info.id: annotation().to_json() for info in infos}
        self.metas = {PROJECT: meta or sly.ProjectMeta()}
        self.projects = {PROJECT: self._project(PROJECT)}
        self.datasets = {
            one: SimpleNamespace(id=one, name=f"ds{one}", project_id=PROJECT, parent_id=parent)
            for one, parent in ((DATASET, None), (OTHER_DATASET, DATASET))
        }
        self.calls = []
        self.uploads = {}
        self.upload_fault = self.download_fault = lambda ids: None
        self.image = self.dataset = self.project = self.annotation = self.advanced = self
        self.image = _Images(self)
        self.dataset = _Datasets(self)
        self.project = _Projects(self)
        self.annotation = _Annotations(self)
        self.advanced = _Advanced(self)

    @staticmethod
    def _project(project_id):
        return SimpleNamespace(id=project_id, name="p", type="images", workspace_id=7)

    def called(self, name):
        return [arguments for called, *arguments in self.calls if called == name]


class _Part:
    def __init__(self, platform):
        self._p = platform


class _Images(_Part):
    def __init__(self, platform):
        super().__init__(platform)
        self.tag = _Tags(platform)

    def get_info_by_id(self, image_id):
        return self._p.infos.get(image_id)

    def get_info_by_id_batch(self, ids):
        return [self._p.infos[one] for one in ids]

    def get_info_by_name(self, dataset_id, name):
        return next((one for one in self.get_list(dataset_id) if one.name == name), None)

    def get_list(self, dataset_id, filters=None):
        self._p.calls.append(("images.list", dataset_id))
        wanted = None if filters is None else filters[0]["value"]
        return [
            info
            for info in self._p.infos.values()
            if info.dataset_id == dataset_id and (wanted is None or info.id in wanted)
        ]

    def download_bytes(self, dataset_id, ids):
        self._p.calls.append(("download", tuple(ids)))
        self._p.download_fault(ids)
        assert all(self._p.infos[one].dataset_id == dataset_id for one in ids)
        return [self._p.content[one] for one in ids]

    def copy_batch_optimized(self, source, infos, dataset_id, dst_names, **options):
        copies = []
        for info, name in zip(infos, dst_names, strict=True):
            if any(one.name == name for one in self.get_list(dataset_id)):
                raise ValueError(f"there is an image {name} already")
            copy = image_info(1000 * dataset_id + info.id, dataset_id)._replace(name=name)
            self._p.infos[copy.id] = copy
            copies.append(copy)
        return copies


class _Datasets(_Part):
    def get_info_by_id(self, dataset_id):
        return self._p.datasets[dataset_id]

    def get_list(self, project_id, recursive=False):
        assert recursive
        return [one for one in self._p.datasets.values() if one.project_id == project_id]

    def create(self, project_id, name, **options):
        made = SimpleNamespace(
            id=50 + len(self._p.datasets), name=name, project_id=project_id, parent_id=None
        )
        self._p.datasets[made.id] = made
        return made


class _Projects(_Part):
    def get_info_by_id(self, project_id):
        return self._p.projects.get(project_id)

    def get_meta(self, project_id):
        self._p.calls.append(("meta", project_id))
        return self._p.metas[project_id].to_json()

    def update_meta(self, project_id, meta):
        self._p.calls.append(("update_meta", project_id))
        tags = [tag.clone(sly_id=900 + number) for number, tag in enumerate(meta.tag_metas)]
        self._p.metas[project_id] = meta.clone(tag_metas=sly.TagMetaCollection(tags))
        return self._p.metas[project_id]

    def create(self, workspace_id, name, **options):
        made = FakePlatform._project(2)
        self._p.projects[2], self._p.metas[2] = made, sly.ProjectMeta()
        self._p.calls.append(("create_project", name))
        return made


class _Annotations(_Part):
    def download_batch(self, dataset_id, ids):
        return [SimpleNamespace(annotation=self._p.annotations[one]) for one in ids]

    def download_json_batch(self, dataset_id, ids):
        return [self._p.annotations[one] for one in ids]

    def upload_anns(self, ids, annotations):
        self._p.calls.append(("upload", tuple(ids)))
        self._p.upload_fault(ids)
        for image_id, one in zip(ids, annotations, strict=True):
            self._p.uploads[image_id] = one
            self._p.annotations[image_id] = one.to_json()


class _Tags(_Part):
    def add_to_objects(self, project_id, tags):
        self._p.calls.append(("add_tags", project_id, tags))
        self._p.upload_fault([tag["figureId"] for tag in tags])
        names = {meta.sly_id: meta.name for meta in self._p.metas[project_id].tag_metas}
        for tag in tags:
            stored = {"id": 5000 + tag["figureId"], "tagId": tag["tagId"]}
            stored |= {"name": names[tag["tagId"]], "value": tag["value"]}
            self._p.advanced.tags_of(tag["figureId"]).append(stored)


class _Advanced(_Part):
    def tags_of(self, figure_id):
        found = [
            stored["tags"]
            for one in self._p.annotations.values()
            for stored in one["objects"]
            if stored.get("id") == figure_id
        ]
        return found[0]

    def get_object_tags(self, figure_id):
        return self.tags_of(figure_id)

    def remove_tag_from_object(self, tag_meta_id, figure_id, tag_id):
        self._p.calls.append(("remove_tag", figure_id, tag_id))
        tags = self.tags_of(figure_id)
        tags[:] = [tag for tag in tags if tag["id"] != tag_id]


class FakePredictor:
    """A cat on every image that can be opened; ``before`` is called with the images first."""

    def __init__(self, before=lambda images: None, labels=None):
        self.before = before
        self.labels = [rectangle()] if labels is None else labels
        self.batches = []

    def __call__(self, images, settings, *, api, is_bulk, should_stop):
        self.batches.append((len(images), is_bulk))
        self.before(images)
        return [self._one(image) for image in images]

    def _one(self, image):
        try:
            open_image(image)
        except ImageError as error:
            return Failure(error.code, str(error))
        return SimpleNamespace(annotation=annotation(*self.labels), notes=())


class SdkPart:
    """The parts of the SDK's app that runs hand back to it, real ones."""

    upload_predictions = Inference.upload_predictions
    _format_output = Inference._format_output


def services(predict=None, **changed):
    app = SdkPart()
    given = {
        "predict": predict or FakePredictor(),
        "settings_of": lambda state, api: Settings(),
        "upload": app.upload_predictions,
        "format_output": app._format_output,
        "model_meta": sly.ProjectMeta,
        "task_id": 3,
        "default_batch_size": 4,
    }
    return RunServices(**{**given, **changed})


def bound(work, run_services):
    """``work`` as the app's method of the SDK's name and arguments."""

    def method(api, state, inference_request):
        return work(api, state, inference_request, run_services)

    return method
