"""Undoing a run on the platform: what it wrote and nobody has changed since is deleted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from requests.exceptions import HTTPError

from florence2.errors import RequestError, shown
from florence2.records import Failure
from serve.platform.failures import failure_of
from serve.platform.images import each_or_failure, image_infos
from serve.platform.request_state import Source, State
from serve.platform.run_store import ImageLine, find_run, image_lines, keep_undone, runs_of
from serve.platform.video_books import is_over_video, video_lines
from serve.platform.video_labels import undo_line
from serve.provenance import Manifest, Undone, Written, now, sort_labels
from serve.sdk import sly

_BATCH: Final = 100
_FIGURES_PER_CALL: Final = 200
_GONE: Final = 404

ShouldStop = Callable[[], bool]


def runs_asked_for(api: sly.Api, state: State) -> list[Manifest]:
    """The runs over the project that a request names by ``project_id``, the newest first."""
    return runs_of(api, Source.of_project(state).project_id or 0)


def undo_of(api: sly.Api, state: State, should_stop: ShouldStop) -> Undone:
    """Undoes the run that a request names by ``project_id`` and ``run``; see ``undo_run``.

    With ``show`` nothing is changed. RequestError for a state that names none.
    """
    run_id, show = state.get("run"), state.get("show", False)
    project_id = Source.of_project(state).project_id
    if not isinstance(run_id, str) or not run_id.isalnum():
        raise RequestError(
            f"run is the id of a run such as 3f9a01bc, and {shown(run_id)} was received; "
            "/list_runs lists them."
        )
    if not isinstance(show, bool):
        raise RequestError(f"show is true or false, and {shown(show)} was received; correct it.")
    return undo_run(api, project_id or 0, run_id, show=show, should_stop=should_stop)


def undo_run(
    api: sly.Api,
    project_id: int,
    run_id: str,
    *,
    show: bool = False,
    should_stop: ShouldStop = lambda: False,
) -> Undone:
    """Deletes the labels of a run, and the tags that it gave to images, as far as they are as it
    wrote them; what somebody changed stays and is named. With ``show`` nothing is changed.

    What fails is named too; undoing again goes on. NotFoundError for a run that nobody noted.
    """
    manifest = find_run(api, project_id, run_id)
    undone = Undone(run_id, show)
    if is_over_video(manifest):
        return _undo_videos(api, project_id, manifest, undone, should_stop)
    lines = list(image_lines(api, project_id, manifest.run))
    is_whole = _is_whole(manifest, lines)
    found = _images_of(api, project_id, lines, is_whole=is_whole)
    for dataset_id, images in _by_dataset(found).items():
        for start in range(0, len(images), _BATCH):
            if should_stop():
                return undone
            _undo_batch(api, manifest, dataset_id, images[start : start + _BATCH], undone)
    # Without a tag nobody can tell what else the run wrote.
    is_untold = not is_whole and manifest.run_tag is None
    _note(api, project_id, manifest, undone, is_part=is_untold)
    return undone


def _note(
    api: sly.Api, project_id: int, manifest: Manifest, undone: Undone, *, is_part: bool
) -> None:
    """The end of it in the manifest, unless nothing was changed."""
    if undone.is_shown_only:
        return
    is_part = is_part or bool(undone.num_kept or undone.failed)
    state: Any = "undone in part" if is_part else "undone"
    deleted = undone.num_deleted + manifest.counts.get("deleted", 0)
    counts = {**manifest.counts, "deleted": deleted, "kept": undone.num_kept}
    ended = replace(manifest, state=state, counts=counts, finished=manifest.finished or now())
    keep_undone(api, project_id, ended)


def _undo_videos(
    api: sly.Api, project_id: int, manifest: Manifest, undone: Undone, should_stop: ShouldStop
) -> Undone:
    for line in video_lines(api, project_id, manifest.run):
        if should_stop():
            return undone
        undo_line(api, line, manifest.run, manifest.run_tag, undone)
    _note(api, project_id, manifest, undone, is_part=False)
    return undone


@dataclass(frozen=True, slots=True)
class _Image:
    """An image that a run may have written on; ``written`` of None: nobody noted what."""

    info: sly.ImageInfo
    written: Written | None


def _is_whole(manifest: Manifest, lines: Sequence[ImageLine]) -> bool:
    """Whether all that a run wrote is noted: it was not killed, and its files could be kept."""
    num_noted = sum(len(line.written.labels) for line in lines)
    return "images" in manifest.counts and num_noted >= manifest.counts.get("labels", 0)


def _images_of(
    api: sly.Api, project_id: int, lines: Sequence[ImageLine], *, is_whole: bool
) -> Iterator[_Image]:
    """The images of the project that a run wrote on and that are still there."""
    infos = image_infos(api, [one.image_id for one in lines if one.copied_to is None])
    noted = [_Image(infos[line.image_id], line.written) for line in lines if line.image_id in infos]
    copies: dict[int, dict[str, Written]] = defaultdict(dict)
    for line in lines:
        if line.copied_to is not None:
            copies[line.copied_to][line.name] = line.written
    for dataset_id, written in copies.items():
        noted += [
            _Image(info, written[info.name])
            for info in api.image.get_list(dataset_id)
            if info.name in written
        ]
    yield from noted
    if not is_whole:
        # It was killed, or goes on: what it wrote last may be noted nowhere but in its tag.
        yield from _labeled_but(api, project_id, {image.info.id for image in noted})


def _labeled_but(api: sly.Api, project_id: int, noted: set[int]) -> Iterator[_Image]:
    for dataset in api.dataset.get_list(project_id, recursive=True):
        for info in api.image.get_list(dataset.id):
            if info.labels_count and info.id not in noted:
                yield _Image(info, None)


def _by_dataset(images: Iterator[_Image]) -> Mapping[int, list[_Image]]:
    found: dict[int, list[_Image]] = defaultdict(list)
    for image in images:
        found[image.info.dataset_id].append(image)
    return found


def _undo_batch(
    api: sly.Api,
    manifest: Manifest,
    dataset_id: int,
    batch: Sequence[_Image],
    undone: Undone,
) -> None:
    read = partial(api.annotation.download_json_batch, dataset_id)
    stored = each_or_failure([one.info.id for one in batch], read, _unread)
    figure_ids: list[int] = []
    tags: list[tuple[int, int, int]] = []
    for image in batch:
        annotation = stored[image.info.id]
        if isinstance(annotation, Failure):
            undone.failed.append(annotation.message)
            continue
        written = image.written or Written()
        found = sort_labels(annotation, manifest.run, manifest.run_tag, written)
        labels, image_tags = annotation["objects"], annotation.get("tags", [])
        figure_ids += [labels[at]["id"] for at in found.unchanged]
        tags += [
            (image_tags[at]["tagId"], image.info.id, image_tags[at]["id"])
            for at in found.image_tags
        ]
        undone.num_images += bool(found.unchanged or found.image_tags)
        undone.num_gone += found.num_gone
        why = "" if image.written else ", written in the last moments of a run that was cut off"
        for at in found.changed:
            label = labels[at]
            undone.keep(
                f"image {image.info.id} ({image.info.name}): label {label.get('id')} of class "
                f"{label.get('classTitle')!r}{why}"
            )
    if undone.is_shown_only:
        undone.num_deleted += len(figure_ids)
        undone.num_image_tags += len(tags)
        return
    for start in range(0, len(figure_ids), _FIGURES_PER_CALL):
        _delete(api, figure_ids[start : start + _FIGURES_PER_CALL], undone)
    for tag_id, image_id, own_id in tags:
        try:
            api.advanced.remove_tag_from_image(tag_id, image_id, own_id)
        except Exception as error:  # noqa: BLE001  (as above)
            what = f"A tag of image {image_id} cannot be deleted"
            undone.failed.append(failure_of(error, what).message)
        else:
            undone.num_image_tags += 1


def _delete(api: sly.Api, figure_ids: Sequence[int], undone: Undone) -> None:
    """All at once, or, where the platform refuses that, one by one; what is gone is deleted."""
    try:
        api.image.figure.remove_batch(figure_ids, batch_size=_FIGURES_PER_CALL)
    except HTTPError as error:
        status = None if error.response is None else error.response.status_code
        if len(figure_ids) > 1:
            for figure_id in figure_ids:
                _delete(api, [figure_id], undone)
        elif status == _GONE:
            undone.num_deleted += 1
        else:
            what = f"Label {figure_ids[0]} cannot be deleted"
            undone.failed.append(failure_of(error, what).message)
    except Exception as error:  # noqa: BLE001  (the SDK and its transport raise anything)
        undone.failed.append(
            failure_of(error, f"{len(figure_ids)} labels cannot be deleted").message
        )
    else:
        undone.num_deleted += len(figure_ids)


def _unread(image_id: int, error: Exception) -> Failure:
    return failure_of(error, f"The labels of image {image_id} cannot be read", "bad_annotation")
