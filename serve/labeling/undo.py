"""The runs that labeled a folder, and undoing one of them: what nobody changed since goes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from florence2.errors import FlorenceError, RequestError
from serve.labeling.files import Workspace, hash_of, hash_of_text, opened_workspace
from serve.labeling.journal import (
    JOURNAL_NAME,
    Entry,
    append_entries,
    entries_of_run,
    output_around,
)
from serve.labeling.previews import PREVIEWS_DIR, preview_path
from serve.labeling.project import GrowingProject
from serve.provenance import (
    Manifest,
    RunState,
    Undone,
    Written,
    newest_first,
    now,
    run_of_label,
    sort_labels,
)

RUNS_NAME: Final = "runs.jsonl"
_BATCH: Final = 200


def keep_manifest(workspace: Workspace, manifest: Manifest) -> None:
    """The manifest in ``runs.jsonl``, in the place of an earlier one of the run."""
    path = workspace.root / RUNS_NAME
    known = {one.run: one for one in _manifests(path)} | {manifest.run: manifest}
    lines = [json.dumps(one.to_json(), ensure_ascii=False) + "\n" for one in known.values()]
    # A path may hold bytes that are no text.
    workspace.write_text(path, "".join(lines).encode("utf-8", "backslashreplace").decode())
    workspace.sync()


def runs_in(folder: Path) -> list[Manifest]:
    """The runs that labeled a folder, the newest first; RequestError for another folder."""
    return newest_first(_manifests(_root(folder) / RUNS_NAME))


def undo_in(folder: Path, run_id: str, *, show: bool = False) -> Undone:
    """Deletes the labels of a run as far as they are as it wrote them; what somebody changed or
    added stays and is named. With ``show`` nothing is changed.

    An image of which nothing stays leaves the project with its labels, as if it had never been
    labeled, and the next run labels it. RequestError for a run that the folder does not know.
    """
    root = _root(folder)
    with opened_workspace(root) as workspace:
        manifest = _find(root, run_id)
        project = GrowingProject(workspace, link=False)
        undone = Undone(run_id, show)
        path = root / JOURNAL_NAME
        batch: list[Entry] = []
        # Read before lines are added, which would be read too.
        for entry in list(entries_of_run(path, run_id)):
            try:
                batch.append(_undo_image(workspace, project, manifest, entry, undone))
            except (OSError, FlorenceError) as error:
                undone.failed.append(f"{entry.name}: {error}")
            if len(batch) == _BATCH:
                _note(workspace, path, batch, show=show)
        _note(workspace, path, batch, show=show)
        if not show:
            _keep_undone(workspace, manifest, undone)
    return undone


def _root(folder: Path) -> Path:
    root = output_around(folder.resolve())
    if root is None:
        raise RequestError(
            f"Runs are noted in the folder that florence2 label wrote to, and {str(folder)!r} is "
            "none; name the folder that was given as --out."
        )
    return root


def _manifests(path: Path) -> Iterator[Manifest]:
    if not path.exists():
        return
    # Not by every sign that Unicode parts lines with: prompts may have some.
    for line in path.read_text("utf-8").split("\n"):
        try:
            manifest = Manifest.of_json(json.loads(line))
        except ValueError:
            continue
        if manifest is not None:
            yield manifest


def _find(root: Path, run_id: str) -> Manifest:
    known = runs_in(root)
    for manifest in known:
        if manifest.run == run_id:
            return manifest
    named = ", ".join(one.run for one in known[:10])
    hint = f"choose one of {named}." if named else "no run is noted there."
    raise RequestError(f"{str(root)!r} knows no run {run_id!r}; {hint}")


def _keep_undone(workspace: Workspace, manifest: Manifest, undone: Undone) -> None:
    state: RunState = "undone in part" if undone.num_kept or undone.failed else "undone"
    deleted = undone.num_deleted + manifest.counts.get("deleted", 0)
    counts = {**manifest.counts, "deleted": deleted, "kept": undone.num_kept}
    finished = manifest.finished or now()
    keep_manifest(workspace, replace(manifest, state=state, counts=counts, finished=finished))


def _note(workspace: Workspace, journal: Path, batch: list[Entry], *, show: bool) -> None:
    if not show and batch:
        workspace.sync()
        append_entries(journal, batch)
    batch.clear()


def _undo_image(
    workspace: Workspace, project: GrowingProject, manifest: Manifest, entry: Entry, undone: Undone
) -> Entry:
    """What the journal is to say of an image from now on; with ``is_shown_only`` nothing is done.

    An image on which somebody has worked counts as labeled, by nobody's run.
    """
    gone = Entry(entry.image, entry.name, "undone", run=entry.run)
    path, image = project.annotation_path(entry.name), project.image_path(entry.name)
    if entry.state == "failed" or not path.exists():
        undone.num_gone += len(entry.labels)
        return gone
    stored = _read(path)
    labels, tags = _list_of(stored, "objects"), _list_of(stored, "tags")
    if hash_of(path) == entry.labels_hash:
        labels_left, tags_left = [], []
        num_labels, num_tags = len(labels), len(tags)
    else:
        written = Written(tuple(entry.labels), tuple(entry.image_tags))
        found = sort_labels(stored, manifest.run, manifest.run_tag, written)
        labels_left = [one for at, one in enumerate(labels) if at not in found.unchanged]
        tags_left = [one for at, one in enumerate(tags) if at not in found.image_tags]
        num_labels, num_tags = len(found.unchanged), len(found.image_tags)
        undone.num_gone += max(len(entry.labels) - num_labels - len(labels_left), 0)
    undone.num_deleted += num_labels
    undone.num_image_tags += num_tags
    undone.num_images += bool(num_labels or num_tags)
    if labels_left or tags_left:
        kept = _kept(entry, labels_left, tags_left, manifest)
        undone.keep(kept, len(labels_left) + len(tags_left))
    is_ours = image.exists() and (not entry.hash or hash_of(image) == entry.hash)
    has_more = bool(stored.get("description") or stored.get("customBigData"))
    if not (labels_left or tags_left or has_more) and is_ours:
        if not undone.is_shown_only:
            image.unlink()
            path.unlink()
            preview_path(workspace.root / PREVIEWS_DIR, entry.name).unlink(missing_ok=True)
        return gone
    text = json.dumps({**stored, "objects": labels_left, "tags": tags_left}, ensure_ascii=False)
    if not undone.is_shown_only:
        workspace.write_text(path, text)
    return replace(
        entry,
        state="labeled" if labels_left or tags_left else "empty",
        objects=len(labels_left),
        truncated=0,
        notes=(),
        labels_bytes=len(text.encode("utf-8")),
        labels_hash=hash_of_text(text),
        run="",
        labels=(),
        image_tags=(),
        scores={},
    )


def _kept(
    entry: Entry,
    labels: Sequence[Mapping[str, Any]],
    tags: Sequence[Mapping[str, Any]],
    manifest: Manifest,
) -> str:
    counted: dict[str, int] = {}
    for one in labels:
        name = str(one.get("classTitle"))
        if manifest.run_tag and run_of_label(one, manifest.run_tag) == manifest.run:
            name += " (changed)"
        counted[name] = counted.get(name, 0) + 1
    named = [f"{count} {name}" for name, count in counted.items()]
    named += [f"tag {tag.get('name')}" for tag in tags]
    return f"{entry.name}: {', '.join(named)}"


def _list_of(stored: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    found = stored.get(key)
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _read(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise RequestError(f"the annotation is no JSON ({error}); mend or remove it.") from error
    if not isinstance(stored, dict):
        raise RequestError("the annotation is no JSON object; mend or remove it.")
    return stored
