"""Where what is known of runs is on the platform: in the project, and image by image in team files.

A run's manifest stands in the custom data of the project under ``florence2_runs``, by its id, and
beside it in the team files are lines about each image, and a page about all of them:
``/florence2/runs/PROJECT/RUN``.
"""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from requests.exceptions import HTTPError

from serve.platform.failures import NotFoundError
from serve.platform.patience import Tried, at_once, status_of
from serve.platform.team_files import read_files, read_texts, write_text
from serve.provenance import Manifest, Written, newest_first, sort_labels
from serve.run_page.page import PAGE_NAME
from serve.sdk import sly

# isort: split
from supervisely.api.file_api import FileInfo

CUSTOM_DATA_KEY: Final = "florence2_runs"
UPLOAD: Final = "upload"
"""The mode of a run that labeled a folder or a bucket, from which its labels were uploaded."""
MAX_RUNS: Final = 100
"""In the custom data of a project; of older runs only the team files know."""
_MAX_SETTINGS: Final = 4000
_FOLDER: Final = "/florence2/runs"
MANIFEST: Final = "manifest.json"
IMAGES: Final = "/images-"
UNDONE: Final = "undone.json"
UNSAVED: Final = "unsaved.jsonl"
INTENDED: Final = "intended"
"""The outcome of an image whose labels are about to be written."""

# Custom data are read, added to and written back as a whole.
_custom_data_lock: Final = threading.Lock()


def folder_of(project_id: int, run_id: str) -> str:
    """Of a run, among the team files."""
    return f"{_FOLDER}/{project_id}/{run_id}"


def page_path(project_id: int, run_id: str) -> str:
    """Where among the team files the page about a run over more than one image is."""
    return f"{folder_of(project_id, run_id)}/{PAGE_NAME}"


def info_of(api: sly.Api, project_id: int) -> sly.ProjectInfo:
    """NotFoundError where there is none."""
    info = api.project.get_info_by_id(project_id)
    if info is None:
        raise NotFoundError(
            f"Project {project_id} does not exist or is not visible to this account; check the id."
        )
    return info


def team_of(api: sly.Api, project_id: int) -> int:
    """The team whose files those of a project are."""
    team_id: int = info_of(api, project_id).team_id
    return team_id


def note_run(
    api: sly.Api,
    project_id: int,
    manifest: Manifest,
    tried: Tried = at_once,
    image_lines: Sequence[str] | None = None,
) -> None:
    """The manifest in a file, with ``image_lines`` in it, and in the project's custom data.

    Who may not change a project may still write files, and of two processes that change it at once
    one loses what it noted there. What cannot be kept is told in the log.
    """

    def keep_file() -> None:
        stored = manifest.to_json()
        if image_lines is not None:
            stored["images"] = [json.loads(line) for line in image_lines]
        path = f"{folder_of(project_id, manifest.run)}/{MANIFEST}"
        text = json.dumps(stored, ensure_ascii=False, indent=2)
        write_text(api, team_of(api, project_id), path, text)

    for keep in (keep_file, partial(keep_manifest, api, project_id, manifest)):
        try:
            tried(keep)
        except Exception as error:  # noqa: BLE001  (the SDK and its transport raise anything)
            sly.logger.warning(
                f"The manifest of run {manifest.run} cannot be kept for project {project_id}: "
                f"{error!r}"
            )


def keep_manifest(api: sly.Api, project_id: int, manifest: Manifest) -> None:
    """The manifest in the project's custom data, in the place of an earlier one of the run."""
    stored = manifest.to_json()
    if len(json.dumps(stored["settings"])) > _MAX_SETTINGS:
        stored["settings"] = {}
    with _custom_data_lock:
        data = dict(info_of(api, project_id).custom_data or {})
        runs = data.get(CUSTOM_DATA_KEY)
        runs = {**runs, manifest.run: stored} if isinstance(runs, dict) else {manifest.run: stored}
        # Clicks in an annotation tool are many, and must not hide the runs over projects.
        ordered = sorted(runs, key=lambda run: (_is_over_many(runs[run]), _started(runs[run])))
        gone = set(ordered[:-MAX_RUNS])
        data[CUSTOM_DATA_KEY] = {run: one for run, one in runs.items() if run not in gone}
        api.project.update_custom_data(project_id, data, silent=True)


def _is_over_many(stored: object) -> bool:
    counts = stored.get("counts") if isinstance(stored, dict) else None
    return not isinstance(counts, dict) or counts.get("images") != 1


def _started(stored: object) -> str:
    return str(stored.get("started")) if isinstance(stored, dict) else ""


def runs_of(api: sly.Api, project_id: int) -> list[Manifest]:
    """The runs over a project, the newest first; NotFoundError.

    Custom data are read and written as a whole: of two processes that do so at once, one loses
    what it noted there, and its run is known by its file alone.
    """
    info = info_of(api, project_id)
    stored = (info.custom_data or {}).get(CUSTOM_DATA_KEY)
    found = map(Manifest.of_json, stored.values() if isinstance(stored, dict) else ())
    known = {one.run: one for one in found if one is not None}
    try:
        lost = _lost_runs(api, info, known)
    except HTTPError as error:
        if status_of(error) not in (401, 403):
            raise
        sly.logger.warning(f"Runs that only team files know are not found: {error!r}")
        lost = {}
    return newest_first({**known, **lost}.values())


def _lost_runs(
    api: sly.Api, info: sly.ProjectInfo, known: Mapping[str, Manifest]
) -> dict[str, Manifest]:
    """By their files: runs that ought to be in the custom data, or that came further."""
    folder = f"{_FOLDER}/{info.id}/"
    files: dict[str, dict[str, FileInfo]] = defaultdict(dict)
    for file in api.file.list(info.team_id, folder, recursive=True, return_type="fileinfo"):
        run, _, name = file.path.removeprefix(folder).partition("/")
        files[run][name] = file
    # Of those that were left out on purpose there may be thousands: clicks, and then the oldest.
    is_full = len(known) >= MAX_RUNS
    oldest = ""
    if is_full and all(_is_over_many(one.to_json()) for one in known.values()):
        oldest = min(one.started for one in known.values())
    wanted = []
    for run, names in files.items():
        before, newest = known.get(run), names.get(UNDONE) or names.get(MANIFEST)
        if before is None:
            is_wanted = not is_full or len(names) > 1
        else:
            is_undone = UNDONE in names and not before.state.startswith("undone")
            is_wanted = is_undone or before.state == "running"
        if newest is not None and is_wanted:
            wanted.append(newest)
    wanted.sort(key=lambda file: (str(file.updated_at), file.id))
    lost = {}
    paths = [file.path for file in wanted[-MAX_RUNS:]]
    for path, text in read_files(api, info.team_id, paths).items():
        manifest = Manifest.of_json(_json(text))
        if manifest is None or manifest.run != path.split("/")[-2]:
            continue
        before = known.get(manifest.run)
        is_newer = manifest.started >= oldest if before is None else _is_further(manifest, before)
        if is_newer:
            lost[manifest.run] = manifest
    return lost


def _is_further(manifest: Manifest, before: Manifest) -> bool:
    """A run that was undone is not gone on with any more, unless its labels are uploaded again."""
    if manifest.state.startswith("undone") and before.mode != UPLOAD:
        return True
    return manifest.resumed >= before.resumed


def keep_undone(api: sly.Api, project_id: int, manifest: Manifest) -> None:
    """That a run is undone, also where another process writes the custom data at this moment."""
    path = f"{folder_of(project_id, manifest.run)}/{UNDONE}"
    try:
        write_text(api, team_of(api, project_id), path, json.dumps(manifest.to_json(), indent=2))
    except Exception as error:  # noqa: BLE001  (the SDK and its transport raise anything)
        sly.logger.warning(f"That run {manifest.run} is undone is not in {path}: {error!r}")
    keep_manifest(api, project_id, manifest)


def find_run(api: sly.Api, project_id: int, run_id: str) -> Manifest:
    """A run over a project by its id; NotFoundError names those that there are."""
    known = runs_of(api, project_id)
    for manifest in known:
        if manifest.run == run_id:
            return manifest
    if run_id.isalnum():
        folder = folder_of(project_id, run_id)
        texts = read_texts(api, team_of(api, project_id), folder)
        for name in (UNDONE, MANIFEST):
            old = Manifest.of_json(_json(texts.get(f"{folder}/{name}", "")))
            if old is not None:
                return old
    named = ", ".join(one.run for one in known[:10])
    raise NotFoundError(
        f"Project {project_id} knows no run {run_id!r}; "
        + (f"choose one of {named}." if named else "no run is noted in it.")
    )


@dataclass(frozen=True, slots=True)
class ImageLine:
    """What a run wrote on one image; ``copied_to`` is the dataset of its copy, if that has it."""

    image_id: int
    name: str
    copied_to: int | None
    written: Written


def image_lines(api: sly.Api, project_id: int, run_id: str) -> Iterator[ImageLine]:
    """The images on which a run wrote something; a later line about an image has the say."""
    texts = read_texts(api, team_of(api, project_id), folder_of(project_id, run_id))
    for image_id, row in noted_rows(texts).items():
        if written := written_in(row):
            yield ImageLine(image_id, str(row.get("name")), row.get("copied_to"), written)


def noted_rows(texts: Mapping[str, str]) -> dict[int, dict[str, Any]]:
    """What the files of a run, by path, say of each image.

    What is saved has the say; but one that failed may have been tried once more.
    """
    rows: dict[int, dict[str, Any]] = {}

    def order(path_and_text: tuple[str, str]) -> tuple[bool, bool]:
        return IMAGES in path_and_text[0], UNSAVED not in path_and_text[0]

    for path, text in sorted(texts.items(), key=order):
        for row in image_rows(path, text):
            before = rows.get(row["image_id"], {})
            if before.get("outcome") == INTENDED and row.get("outcome") == "failed":
                continue
            rows[row["image_id"]] = row
    return rows


def written_in(row: Mapping[str, Any]) -> Written:
    """What a line says that was written."""
    return Written(tuple(row.get("labels", ())), tuple(row.get("image_tags", ())))


def image_rows(path: str, text: str) -> Iterator[dict[str, Any]]:
    """The lines of one file of a run; those that cannot be read are told in the log."""
    if path.endswith(MANIFEST):
        manifest = _json(text)
        found = manifest.get("images") if isinstance(manifest, dict) else None
        rows = found if isinstance(found, list) else []
    elif path.endswith(".jsonl"):
        # Not by every sign that Unicode parts lines with: names of images may have some.
        rows = [_json(line) for line in text.split("\n") if line]
        if num_broken := rows.count(None):
            sly.logger.warning(
                f"{num_broken} lines of {path} cannot be read; of their images nothing is known."
            )
    else:
        rows = []
    for row in rows:
        if isinstance(row, dict) and isinstance(row.get("image_id"), int):
            yield row


def _json(text: str) -> object:
    try:
        found: object = json.loads(text)
    except ValueError:
        return None
    return found


class OwnLabels:
    """What runs before this one wrote on the images of a project, and nobody has changed since."""

    def __init__(self, api: sly.Api, project_id: int, but_run: str) -> None:
        self._written: dict[int, list[tuple[str, str | None, Written]]] = defaultdict(list)
        for manifest in runs_of(api, project_id):
            if manifest.run in (but_run,) or manifest.state == "undone":
                continue
            for line in image_lines(api, project_id, manifest.run):
                if line.copied_to is None:
                    self._written[line.image_id].append(
                        (manifest.run, manifest.run_tag, line.written)
                    )

    def without(self, image_id: int, annotation: dict[str, Any]) -> dict[str, Any]:
        """An annotation's JSON without them; the very same object where there are none."""
        for run_id, run_tag, written in self._written.get(image_id, ()):
            found = sort_labels(annotation, run_id, run_tag, written)
            if found.unchanged or found.image_tags:
                labels, tags = annotation["objects"], annotation.get("tags", [])
                annotation = {
                    **annotation,
                    "objects": [one for at, one in enumerate(labels) if at not in found.unchanged],
                    "tags": [one for at, one in enumerate(tags) if at not in found.image_tags],
                }
        return annotation
