"""A Supervisely project that grows on disk: at every moment the SDK can read what is there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from florence2.errors import FlorenceError, ImageError
from florence2.images import open_image
from serve.console import say
from serve.labeling.files import Stamp, Workspace, hash_of, hash_of_text, stamp_of
from serve.labeling.images import ImageFile, is_image
from serve.labeling.journal import Entry, Source
from serve.naming import class_color
from serve.platform.upload import compatible_tag_meta
from serve.predict.annotations import TAG_METAS
from serve.provenance import RUN_TAG, Written, with_run_tag
from serve.sdk import sly

PROJECT_DIR: Final = "project"
DATASET: Final = "ds0"


class AnnotationError(FlorenceError):
    """An annotation of the project that somebody changed to what is none."""

    code = "bad_annotation"


def project_folder(root: Path) -> Path:
    """Where the project of an output folder is: beside everything else of the run.

    In folders that were begun before this rule it is the folder itself, and stays there.
    """
    has_one = (root / "meta.json").exists() or (root / DATASET).is_dir()
    return root if has_one else root / PROJECT_DIR


@dataclass(frozen=True, slots=True)
class StoredImage:
    """The hash of an image that was written, the size and hash of its labels, and what they are."""

    hash: str
    labels_bytes: int
    labels_hash: str
    written: Written


class GrowingProject:
    """Images and annotations of one dataset, ``ds0``.

    The order is what makes a kill harmless: the classes, then the annotation, then the image. The
    SDK looks for the annotation of every image, and passes over an annotation without one.
    """

    def __init__(self, workspace: Workspace, *, link: bool) -> None:
        self._workspace = workspace
        self._link = link
        self.folder = project_folder(workspace.root)
        self._meta_path = self.folder / "meta.json"
        self._images = self.folder / DATASET / "img"
        self._annotations = self.folder / DATASET / "ann"
        self._meta = self._stored_meta()
        self._run_tag: sly.TagMeta | None = None

    @property
    def meta(self) -> sly.ProjectMeta:
        return self._meta

    def create(self) -> None:
        self._images.mkdir(parents=True, exist_ok=True)
        self._annotations.mkdir(exist_ok=True)
        self._grow([])

    def image_names(self) -> Iterator[str]:
        with os.scandir(self._images) as listed:
            yield from (entry.name for entry in listed if is_image(entry.name))

    def has_annotation(self, name: str) -> bool:
        return self.annotation_path(name).exists()

    def read_annotation(self, name: str) -> sly.Annotation:
        """Raises AnnotationError for a file that the SDK does not take for an annotation."""
        try:
            stored = json.loads(self.annotation_path(name).read_text("utf-8"))
            return sly.Annotation.from_json(stored, self._meta)
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise AnnotationError(
                f"An annotation is a Supervisely one with the classes in meta.json, and that of "
                f"{name!r} is not ({type(error).__name__}: {error}); mend it or remove it."
            ) from error

    def image_path(self, name: str) -> Path:
        return self._images / name

    def annotation_path(self, name: str) -> Path:
        return self._annotations / f"{name}.json"

    def is_kept(self, entry: Entry, closely: bool) -> bool:
        """Whether the files of an image that was done are still here and whole.

        Sizes are compared, and the contents ``closely`` or where the sizes differ. What differs is
        whole all the same if it can be read: then somebody changed it.
        """
        labels, image = self.annotation_path(entry.name), self.image_path(entry.name)
        try:
            sizes = labels.stat().st_size, image.stat().st_size
            if not all(sizes):
                return False
            is_as_written = sizes[0] == entry.labels_bytes and not closely
            if not (is_as_written or _has_hash(labels, entry.labels_hash) or _is_json(labels)):
                return False
            is_as_written = sizes[1] == (entry.size_bytes or sizes[1]) and not closely
            return is_as_written or _has_hash(image, entry.hash) or _is_picture(image)
        except OSError:
            return False

    def declare(self, class_names: Iterable[str], geometry: type) -> None:
        """Adds classes before any image has them, in the user's order."""
        self._grow([sly.ObjClass(name, geometry, class_color(name)) for name in class_names])

    def tag_runs(self) -> str:
        """From now on labels say which run wrote them; the name of the tag that does."""
        self._run_tag = compatible_tag_meta(RUN_TAG, self._meta)
        if self._meta.get_tag_meta(self._run_tag.name) is None:
            self._meta = self._meta.add_tag_meta(self._run_tag)
            self._write_meta()
        name: str = self._run_tag.name
        return name

    def add(
        self,
        file: ImageFile,
        annotation: sly.Annotation,
        stamp: Stamp,
        before: Source | None,
        run_id: str,
    ) -> StoredImage:
        """Writes an image and its labels; ``before`` is what the journal knows of earlier ones.

        Raises ImageError when the image file is not any more what was labeled, which ``stamp``
        tells, or cannot be read; the project is then as if it had never been added.
        """
        self._grow([label.obj_class for label in annotation.labels])
        if self._run_tag is not None:
            annotation = with_run_tag(annotation, run_id, self._run_tag)
        stored = annotation.to_json()
        text = json.dumps(stored, ensure_ascii=False)
        path = self.annotation_path(file.name)
        _check_same(file.path, stamp)
        self._keep_edited(path, text, before.labels_hash if before else "")
        self._workspace.write_text(path, text)
        try:
            found = self._workspace.bring(file.path, self.image_path(file.name), link=self._link)
            _check_same(file.path, stamp)
        except ImageError:
            path.unlink(missing_ok=True)
            self.image_path(file.name).unlink(missing_ok=True)
            raise
        run_tag = None if self._run_tag is None else self._run_tag.name
        written = Written.of(stored, run_tag)
        return StoredImage(found, len(text.encode("utf-8")), hash_of_text(text), written)

    def sync(self) -> None:
        """Returns once all that was added is on the disk."""
        self._workspace.sync()

    def _keep_edited(self, path: Path, text: str, our_hash: str) -> None:
        """Moves an annotation that is not what a run wrote to ``edited``: it may be a person's.

        Such a file is there after a kill, when the image of a labeled pair was removed, or when an
        image that changed is labeled again. ``our_hash`` is that of what the last run wrote.
        """
        if our_hash and path.exists() and hash_of(path) == our_hash:
            return
        try:
            before = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            return
        if before != json.loads(text):
            target = self._workspace.set_aside(path)
            say(f"{path.name} was there and differs from the new labels; it is now {target}")

    def _stored_meta(self) -> sly.ProjectMeta:
        if not self._meta_path.exists():
            return sly.ProjectMeta(tag_metas=list(TAG_METAS.values()))
        stored = sly.ProjectMeta.from_json(json.loads(self._meta_path.read_text("utf-8")))
        missing = [meta for name, meta in TAG_METAS.items() if stored.get_tag_meta(name) is None]
        return stored.add_tag_metas(missing)

    def _grow(self, wanted: Iterable[sly.ObjClass]) -> None:
        """Adds what is missing; a class that appears in a second shape becomes one of any shape."""
        before = self._meta
        for obj_class in wanted:
            known = self._meta.get_obj_class(obj_class.name)
            if known is None:
                self._meta = self._meta.add_obj_class(obj_class)
            elif known.geometry_type not in (obj_class.geometry_type, sly.AnyGeometry):
                anything = known.clone(geometry_type=sly.AnyGeometry)
                others = [c if c.name != known.name else anything for c in self._meta.obj_classes]
                self._meta = self._meta.clone(obj_classes=others)
        if self._meta is not before or not self._meta_path.exists():
            self._write_meta()

    def _write_meta(self) -> None:
        text = json.dumps(self._meta.to_json(), ensure_ascii=False, indent=2)
        self._workspace.write_text(self._meta_path, text)


def _check_same(path: Path, stamp: Stamp) -> None:
    try:
        is_same = stamp_of(path) == stamp
    except OSError as error:
        raise ImageError(
            f"The image was read and is gone now ({error.strerror}); put it back and use "
            "--retry-failed."
        ) from error
    if not is_same:
        raise ImageError("The image changed while it was labeled; use --retry-failed.")


def _has_hash(path: Path, expected: str) -> bool:
    return bool(expected) and hash_of(path) == expected


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text("utf-8")), dict)
    except ValueError:
        return False


def _is_picture(path: Path) -> bool:
    try:
        open_image(path)
    except ImageError:
        return False
    return True
