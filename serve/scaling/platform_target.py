"""Labeled images on their way into a project of the platform: files, labels, and whose they are."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from requests.exceptions import HTTPError

from florence2.errors import GenerationCancelledError, RequestError
from florence2.records import Failure
from serve.labeling.files import OutputError
from serve.labeling.journal import JOURNAL_NAME, Entry, settled_entries
from serve.labeling.project import DATASET, project_folder
from serve.labeling.undo import runs_in
from serve.platform.failures import failure_of
from serve.platform.images import check_project_of_images
from serve.platform.patience import Patience, PlatformAwayError, status_of
from serve.platform.run_store import IMAGES, UPLOAD, folder_of, note_run, runs_of, team_of
from serve.platform.team_files import asked_once, write_text
from serve.platform.upload import meta_lock, with_compatible_tags
from serve.provenance import RUN_TAG, Manifest, Written, sort_labels
from serve.sdk import sly

# isort: split
from supervisely.nn.inference.inference import update_meta_and_ann

_NO_RIGHTS: Final = (401, 403)


@dataclass(frozen=True, slots=True)
class Uploaded:
    """What became of a unit. ``added`` images are new on the platform, ``kept`` ones had labels or
    tags there, ``labels`` and ``image_tags`` were written; ``runs`` are images, labels and tags by
    the run that made them, as far as its labels can be undone.
    """

    names: Sequence[str] = ()
    added: int = 0
    kept: int = 0
    labels: int = 0
    image_tags: int = 0
    runs: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    failures: Sequence[Sequence[str]] = ()

    @classmethod
    def of_json(cls, stored: bytes) -> Uploaded:
        return cls(**json.loads(stored))


class LabeledFolder:
    """What ``florence2 label`` wrote for some images: their files, labels, and what was noted."""

    def __init__(self, root: Path) -> None:
        self._folder = project_folder(root) / DATASET
        self.meta = _meta_in(self._folder.parent)
        self.entries = {one.name: one for one in settled_entries(root / JOURNAL_NAME)}
        self.manifests = {one.run: one for one in runs_in(root)}
        if str(self.meta.project_type or "images") != "images":
            raise RequestError(
                f"Labeled images are uploaded, and {str(root)!r} holds a video; upload its project "
                "with the SDK, or label the video on the platform."
            )

    def image(self, name: str) -> Path:
        return self._folder / "img" / name

    def annotation(self, name: str) -> dict[str, Any]:
        """Its JSON as it is now; OSError and ValueError."""
        found = json.loads((self._folder / "ann" / f"{name}.json").read_text("utf-8"))
        return dict(found)


def _meta_in(project: Path) -> sly.ProjectMeta:
    """OutputError where nothing was labeled yet, or somebody changed it to what is none."""
    path = project / "meta.json"
    try:
        return sly.ProjectMeta.from_json(json.loads(path.read_text("utf-8")))
    except (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise OutputError(
            f"Labels are uploaded with their classes, and {str(path)!r} has none that can be read "
            f"({error}); go on with florence2 label, or mend the file."
        ) from error


@dataclass(slots=True)
class _Image:
    """An image on its way: what it is here, then what it is there.

    ``was_there`` is None until the platform has said so; ``is_kept``: it had labels there.
    """

    entry: Entry
    path: Path
    stored: dict[str, Any]
    image_id: int = 0
    was_there: bool | None = None
    is_kept: bool = False
    written: Written = field(default_factory=Written)

    @property
    def name(self) -> str:
        return self.entry.name


def _images_of(
    folder: LabeledFolder, names: Collection[str]
) -> tuple[list[_Image], dict[str, Failure]]:
    """The images, and those whose files cannot be read."""
    images: list[_Image] = []
    failures: dict[str, Failure] = {}
    for name in sorted(names):
        try:
            if not folder.image(name).is_file():
                raise FileNotFoundError(f"its file {name!r} is gone")
            stored = folder.annotation(name)
            sly.Annotation.from_json(stored, folder.meta)
        except (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            failures[name] = Failure(
                "bad_annotation",
                f"An image is uploaded with its annotation, and one of both cannot be read ({error}"
                "); mend them or label the image again.",
            )
            continue
        images.append(_Image(folder.entries[name], folder.image(name), stored))
    return images, failures


class PlatformTarget:
    """The project that images go to."""

    def __init__(self, api: sly.Api, project_id: int, should_stop: Callable[[], bool]) -> None:
        check_project_of_images(api, project_id)
        self._api, self._id = api, project_id
        self._patience = Patience(partial(api.project.get_info_by_id, self._id), should_stop)
        self._lock = threading.Lock()
        self._datasets: dict[str, int] = {}
        self._known: dict[str, Manifest] | None = None
        self._announced: dict[str, Manifest] = {}
        # By part and run, the line about each image.
        self._noted: dict[int, dict[str, dict[str, str]]] = {}
        # Notes of an earlier upload stay: it may have gone to another dataset.
        self._notes = f"{IMAGES}{time.time_ns():020}-"
        self._team_id = team_of(api, self._id)

    def upload(
        self, folder: LabeledFolder, names: Collection[str], dataset: str, number: int
    ) -> Uploaded:
        """Brings these images and their labels, which are noted as part ``number`` of their runs.

        Raises FlorenceError where going on makes no sense.
        """
        images, failures = _images_of(folder, names)
        dataset_id = self._tried(partial(self._dataset_id, dataset))
        for run in {one.entry.run for one in images}:
            self._announce(folder.manifests.get(run))
        failures |= self._each(images, partial(self._bring, dataset_id, folder, number))
        brought = [one for one in images if one.name not in failures]
        runs: dict[str, Counter[str]] = {}
        for one in brought:
            if one.entry.run in self._announced:
                counts = {
                    "images": 1,
                    one.entry.state: 1,
                    "labels": len(one.written.labels),
                    "tags": len(one.written.image_tags),
                }
                runs.setdefault(one.entry.run, Counter()).update(counts)
        self._tried(partial(self._note, dataset_id, number, brought))
        self._noted.pop(number, None)
        return Uploaded(
            [one.name for one in brought],
            added=sum(not one.was_there for one in brought),
            kept=sum(one.is_kept for one in brought),
            labels=sum(len(one.stored.get("objects", ())) for one in brought if not one.is_kept),
            image_tags=sum(len(one.stored.get("tags", ())) for one in brought if not one.is_kept),
            runs={run: dict(counts) for run, counts in runs.items()},
            failures=[(name, one.code, one.message) for name, one in failures.items()],
        )

    def ended(self, units: Collection[Uploaded]) -> None:
        """Notes of the runs what all these are together; only where no other part of them can have
        come to the platform."""
        for run, manifest in self._announced.items():
            counts: Counter[str] = Counter()
            for unit in units:
                counts.update(unit.runs.get(run, {}))
            self._keep_manifest(replace(manifest, counts=dict(counts)))

    def _dataset_id(self, name: str) -> int:
        with self._lock:
            if name not in self._datasets:
                try:
                    found = self._api.dataset.get_or_create(self._id, name)
                except HTTPError:
                    # Another machine has made it meanwhile, or the SDK's own first try.
                    found = self._api.dataset.get_info_by_name(self._id, name)
                    if found is None:
                        raise
                self._datasets[name] = found.id
            return self._datasets[name]

    def _announce(self, manifest: Manifest | None) -> None:
        """Before any label of a run is there; without counts it says that some may be missing."""
        if manifest is None:
            return
        with self._lock:
            if manifest.run in self._announced:
                return
            if self._known is None:
                known = self._tried(partial(runs_of, self._api, self._id))
                self._known = {one.run: one for one in known}
            manifest = replace(manifest, mode=UPLOAD, counts={}, fingerprint=None)
            if (before := self._known.get(manifest.run)) is not None:
                manifest = replace(
                    manifest,
                    run_tag=before.run_tag,
                    resumed=before.resumed + before.state.startswith("undone"),
                )
            self._announced[manifest.run] = manifest
        self._keep_manifest(manifest)

    def _keep_manifest(self, manifest: Manifest) -> None:
        note_run(self._api, self._id, manifest, self._tried)

    def _each(
        self, images: Sequence[_Image], bring: Callable[[Sequence[_Image]], None]
    ) -> dict[str, Failure]:
        """All together and, where that fails, one by one; why which one failed."""
        if not images:
            return {}
        try:
            self._tried(partial(bring, images))
        except Exception as error:  # noqa: BLE001  (the SDK and its transport raise anything)
            self._check_goes_on(error)
            sly.logger.debug(f"{len(images)} images cannot be uploaded together: {error!r}")
        else:
            return {}
        failures: dict[str, Failure] = {}
        for one in images:
            try:
                self._tried(partial(bring, [one]))
            except Exception as error:  # noqa: BLE001  (as above)
                self._check_goes_on(error)
                failures[one.name] = failure_of(
                    error, "It cannot be uploaded", "upload_failed", "upload again"
                )
        return failures

    def _check_goes_on(self, error: Exception) -> None:
        """Raises what ends an upload, such as a project that was deleted meanwhile."""
        if isinstance(error, PlatformAwayError | GenerationCancelledError):
            raise error
        self._tried(partial(check_project_of_images, self._api, self._id))

    def _tried(self, work: Callable[[], Any]) -> Any:  # noqa: ANN401 - what the work gives
        return self._patience.tried(work)

    def _bring(
        self, dataset_id: int, folder: LabeledFolder, number: int, images: Sequence[_Image]
    ) -> None:
        """Images that are not there, and labels where none are. It can be done again."""
        names = [one.name for one in images]
        there = self._stored(dataset_id, names)
        for one in images:
            if one.was_there is None:
                one.was_there = one.name in there
            if one.name in there:
                _check_same(one, there[one.name])
        if new := [one for one in images if one.name not in there]:
            # Where the SDK tries again, it sends what is left of the body, and waits for ever.
            found = asked_once(self._api).image.upload_paths(
                dataset_id,
                [one.name for one in new],
                [str(one.path) for one in new],
                # Another machine may have brought them meanwhile.
                conflict_resolution="skip",
            )
            there |= _by_name(found, names)
        for one in images:
            one.image_id = there[one.name].id
        wanted = self._labels_missing(dataset_id, folder, images, new)
        # Before they are there: of labels without a tag nobody could tell whose they are.
        self._note(dataset_id, number, images)
        if wanted:
            self._api.annotation.upload_anns(*map(list, zip(*wanted, strict=True)))

    def _stored(self, dataset_id: int, names: Sequence[str]) -> dict[str, sly.ImageInfo]:
        wanted = [{"field": "name", "operator": "in", "value": list(names)}]
        return _by_name(self._api.image.get_list(dataset_id, filters=wanted), names)

    def _labels_missing(
        self,
        dataset_id: int,
        folder: LabeledFolder,
        images: Sequence[_Image],
        new: Sequence[_Image],
    ) -> list[tuple[int, sly.Annotation]]:
        """What is to be written, by the image's id there."""
        names = {one.name for one in new}
        ids = [one.image_id for one in images if one.name not in names]
        stored = self._api.annotation.download_json_batch(dataset_id, ids) if ids else []
        stored_by_id = dict(zip(ids, stored, strict=True))
        fitted = self._fitted([sly.Annotation.from_json(one.stored, folder.meta) for one in images])
        wanted: list[tuple[int, sly.Annotation]] = []
        for one, annotation in zip(images, fitted, strict=True):
            there = stored_by_id.get(one.image_id, {})
            has_labels = bool(there.get("objects") or there.get("tags"))
            one.is_kept = bool(one.was_there) and has_labels
            one.written = self._written(one, annotation, folder)
            if has_labels:
                one.written = self._still_there(one, there)
            elif annotation.labels or annotation.img_tags:
                # An annotation takes the place of what is there, also of what is said of the image.
                told = there.get("description") or annotation.img_description
                wanted.append((one.image_id, annotation.clone(img_description=told)))
        return wanted

    def _fitted(self, annotations: Sequence[sly.Annotation]) -> list[sly.Annotation]:
        """Under the names that the project has for classes and tags, which it is given as far as
        it lacks them."""
        with meta_lock:
            meta = known = sly.ProjectMeta.from_json(self._api.project.get_meta(self._id))
            fitted = []
            for one in annotations:
                meta, renamed, _ = update_meta_and_ann(meta, with_compatible_tags(one, meta))
                fitted.append(renamed)
            if meta is not known:
                self._api.project.update_meta(self._id, meta)
        return fitted

    def _written(self, image: _Image, fitted: sly.Annotation, folder: LabeledFolder) -> Written:
        """What its run made of an image and nobody changed here, as it is on the platform."""
        entry, manifest = image.entry, self._announced.get(image.entry.run)
        if manifest is None:
            return Written()
        before = folder.manifests[entry.run].run_tag
        made = Written(tuple(entry.labels), tuple(entry.image_tags))
        ours = sort_labels(image.stored, entry.run, before, made)
        run_tag = manifest.run_tag
        if before is not None and (found := _run_tag_of(fitted, entry.run)) not in (None, run_tag):
            run_tag = found
            with self._lock:
                self._announced[entry.run] = replace(manifest, run_tag=found)
            self._keep_manifest(self._announced[entry.run])
        all_of_it = Written.of(fitted.to_json(), run_tag)
        return Written(
            tuple(all_of_it.labels[at] for at in ours.unchanged),
            tuple(all_of_it.image_tags[at] for at in ours.image_tags),
        )

    def _still_there(self, image: _Image, there: Mapping[str, Any]) -> Written:
        """What of it an earlier try, or another process, has brought: the rest is a person's."""
        manifest = self._announced.get(image.entry.run)
        if manifest is None:
            return Written()
        found = sort_labels(there, manifest.run, manifest.run_tag, image.written)
        all_of_it = Written.of(there, manifest.run_tag)
        return Written(
            tuple(all_of_it.labels[at] for at in found.unchanged),
            tuple(all_of_it.image_tags[at] for at in found.image_tags),
        )

    def _note(self, dataset_id: int, number: int, images: Sequence[_Image]) -> None:
        """What the runs have written on these images, beside what is noted of others of a part."""
        lines: dict[str, dict[str, str]] = {}
        for one in images:
            if one.entry.run in self._announced:
                lines.setdefault(one.entry.run, {})[one.name] = _line(one, dataset_id)
        noted = self._noted.setdefault(number, {})
        for run, new in lines.items():
            before = noted.get(run, {})
            if (now := before | new) != before:
                path = f"{folder_of(self._id, run)}{self._notes}{number:06}.jsonl"
                self._write_lines(path, now.values())
                noted[run] = now

    def _write_lines(self, path: str, lines: Iterable[str]) -> None:
        try:
            write_text(self._api, self._team_id, path, "\n".join(lines) + "\n")
        except HTTPError as error:
            if status_of(error) not in _NO_RIGHTS:
                raise
            sly.logger.warning(
                "This account may not write team files, so what is uploaded now cannot be taken "
                f"back by florence2 undo: {path} is missing."
            )


def _by_name(infos: Sequence[sly.ImageInfo], names: Collection[str]) -> dict[str, sly.ImageInfo]:
    """By the names that images have on the platform: the SDK adds what it takes for the right
    extension to those of others."""
    wanted = set(names)
    found = {}
    for info in infos:
        name = info.name if info.name in wanted else info.name.removesuffix(f".{info.ext}")
        if name in wanted:
            found[name] = info
    return found


def _check_same(image: _Image, there: sly.ImageInfo) -> None:
    """RequestError where the image that has this name on the platform is another one."""
    if there.hash != sly.fs.get_file_hash(str(image.path)):
        raise RequestError(
            f"One name in a dataset is one image, and {image.name!r} is another image there; "
            "choose another --dataset."
        )


def _run_tag_of(annotation: sly.Annotation, run: str) -> str | None:
    """What the tag with the run's id is called."""
    for label in annotation.labels:
        for tag in label.tags:
            if tag.value == run and tag.meta.name.startswith(RUN_TAG.name):
                return str(tag.meta.name)
    return None


def _line(image: _Image, dataset_id: int) -> str:
    line = {
        "image_id": image.image_id,
        "name": image.name,
        "outcome": image.entry.state,
        "dataset_id": dataset_id,
        "labels": image.written.labels,
        "image_tags": image.written.image_tags,
    }
    return json.dumps(line, ensure_ascii=False)
