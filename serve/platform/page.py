"""The page about what a run did in one project of the platform, beside its lines in team files."""

from __future__ import annotations

import re
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final
from urllib.parse import urljoin

from florence2.budget import open_pixels
from florence2.evaluation.html_report import Link
from florence2.images import LoadedImage, open_image
from serve.provenance import Manifest
from serve.run_page.drawing import draw_label
from serve.run_page.figures import ImageOutcome, LowLabel, RunFigures, State, known_scores
from serve.run_page.page import RunPage, here, render
from serve.sdk import sly

# For the pictures of batches that wait for their upload.
_MAX_HELD_BYTES: Final = 64_000_000
_DRAW_FOR_S: Final = 10.0
"""What is not drawn by then is named only: the page may not keep a run from its end."""
_IMAGE_PLACE: Final = re.compile(r"(\d+)/(\d+)#image-(\d+)")
_STATES: Final[tuple[State, ...]] = ("labeled", "empty", "failed", "skipped")
_GO_ON: Final = (
    'Send the request again as it was, with "resume": true beside upload_mode: the images that are '
    "done are left alone."
)
_TWICE: Final = (
    "A client that cannot send it, such as Predict App, labels them a second time: take back first "
    "what the run wrote."
)
_TYPED: Final = (
    "The run was started {}; any machine with the files that the command names, and with "
    "SERVER_ADDRESS and API_TOKEN, can go on with it."
)
_SEND_AGAIN: Final = "Send the ids of the images again that are not done; resume is for projects."
_COPIED: Final = (
    "A run that copies images cannot be gone on with. Send the ids of the images that have no copy "
    "in this project again, with its id as output_project_id; copies without labels are labeled by "
    "a run over this project with upload_mode skip_labeled."
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said about an image, as far as a page is concerned.

    ``picture`` is the image file, if a label on it is likely to be drawn.
    """

    is_truncated: bool = False
    notes: tuple[str, ...] = ()
    picture: bytes | None = None


class HeldAnswers:
    """Answers that are not settled yet, with pictures as far as a machine has room for them.

    One thread keeps them and another one takes them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: dict[int, Answer] = {}
        self._num_bytes = 0

    def keep(self, image_id: int, answer: Answer) -> None:
        size = len(answer.picture or b"")
        with self._lock:
            if self._num_bytes + size > _MAX_HELD_BYTES:
                answer, size = replace(answer, picture=None), 0
            self._num_bytes += size
            self._answers[image_id] = answer

    def take(self, image_id: int) -> Answer:
        """What was kept for an image, which is then forgotten."""
        with self._lock:
            answer = self._answers.pop(image_id, Answer())
            self._num_bytes -= len(answer.picture or b"")
        return answer


def add_line(
    figures: RunFigures,
    line: Mapping[str, Any],
    project_id: int,
    annotation: sly.Annotation | None = None,
    picture: bytes | None = None,
) -> None:
    """Counts an image by its line in team files, once for each image.

    ``annotation`` is what was written on it and ``picture`` its file, if they are at hand: then its
    labels can be drawn.
    """
    state = next((one for one in _STATES if one == line.get("outcome")), None)
    if state is None:
        return
    outcome = ImageOutcome(
        name=str(line.get("name") or line["image_id"]),
        state=state,
        key=_place(line, project_id),
        scores=known_scores(line.get("scores", {}), len(line.get("labels", ()))),
        num_texts=len(line.get("image_tags", ())),
        is_truncated=bool(line.get("truncated")),
        notes=line.get("notes", ()),
        code=str(line.get("code", "")),
        message=str(line.get("message", "")),
    )
    with ExitStack() as opened:
        if annotation is None or picture is None:
            figures.add(outcome)
        else:
            figures.add(outcome, _Drawing(annotation, picture, opened).draw)


class _Drawing:
    """Opens an image when the first label on it is to be drawn; ``opened`` closes it."""

    def __init__(self, annotation: sly.Annotation, picture: bytes, opened: ExitStack) -> None:
        self._annotation = annotation
        self._picture = picture
        self._opened = opened
        self._image: LoadedImage | None = None

    def draw(self, low: LowLabel) -> None:
        try:
            if self._image is None:
                opened = open_image(self._picture, room=open_pixels().hold)
                self._image = self._opened.enter_context(opened)
            draw_label(self._image.image, self._annotation, low)
        except Exception as error:  # noqa: BLE001  (no drawing is worth the end of a run)
            sly.logger.warning(f"A label of {low.image.name} is not drawn: {error!r}")


def draw_missing(api: sly.Api, figures: RunFigures) -> None:
    """Draws what is to be drawn of images whose files were not at hand, as after another process
    went on with a run: as they are on the platform now.

    Raises what the SDK raises where the platform fails.
    """
    missing: dict[str, list[LowLabel]] = defaultdict(list)
    for low in figures.lowest:
        if low.jpeg is None:
            missing[low.image.key].append(low)
    metas: dict[int, sly.ProjectMeta] = {}
    until = time.monotonic() + _DRAW_FOR_S
    for key, labels in missing.items():
        found = _IMAGE_PLACE.fullmatch(key)
        if found is None:
            continue
        if time.monotonic() > until:
            return
        project_id, dataset_id, image_id = map(int, found.groups())
        if project_id not in metas:
            metas[project_id] = sly.ProjectMeta.from_json(api.project.get_meta(project_id))
        [stored] = api.annotation.download_json_batch(dataset_id, [image_id])
        [picture] = api.image.download_bytes(dataset_id, [image_id])
        annotation = sly.Annotation.from_json(stored, metas[project_id])
        with ExitStack() as opened:
            drawing = _Drawing(annotation, picture, opened)
            for low in labels:
                drawing.draw(low)


def _place(line: Mapping[str, Any], project_id: int) -> str:
    """Where the labeling tool shows an image, below the workspace; of a copy only the dataset is
    known."""
    if line.get("copied_to") is not None:
        return f"{project_id}/{line['copied_to']}"
    if line.get("dataset_id") is None:
        return ""
    source = line.get("project_id", project_id)
    return f"{source}/{line['dataset_id']}#image-{line['image_id']}"


def page_of(
    api: sly.Api,
    project: sly.ProjectInfo,
    manifest: Manifest,
    figures: RunFigures,
    *,
    num_pending: int,
    num_images: int,
    seconds: float,
    is_copying: bool,
    resume_command: str | None,
) -> str:
    """The page as HTML. ``manifest`` is that of the run which has ended; ``num_images`` were done
    now, in ``seconds``. ``is_copying``: the labels are in copies of the images.
    ``resume_command`` is what was typed, if the run was; any machine can go on with it."""
    base = f"app/images/{project.team_id}/{project.workspace_id}"
    has_more = bool(num_pending or figures.counts["failed"])
    has_labels = bool(figures.num_labels) or bool(manifest.counts.get("labels"))
    advice = [_GO_ON, _TWICE] if has_labels else [_GO_ON]
    if resume_command is not None:
        advice = [_TYPED.format(here())]
    elif is_copying:
        advice = [_COPIED]
    elif manifest.fingerprint is None:
        advice = [_SEND_AGAIN]
    page = RunPage(
        title=f"Labels of {project.name}",
        manifest=manifest,
        figures=figures,
        num_pending=num_pending,
        num_images=num_images,
        seconds=seconds,
        href_of=partial(_href, api.server_address, base),
        is_interrupted=manifest.state == "stopped",
        error=manifest.error,
        resume_command=resume_command,
        retry_command=None if num_pending or not figures.counts["failed"] else resume_command,
        advice=advice if has_more else [],
        undo_commands=_undo_commands(project.id, manifest.run) if has_labels else (),
        places={"project": Link(f"{project.name} ({project.id})", api.project.url(project.id))},
    )
    return render(page)


def _undo_commands(project_id: int, run_id: str) -> Sequence[str]:
    return (f"florence2 undo {project_id} --run {run_id}",)


def _href(server: str, base: str, image: ImageOutcome) -> str:
    return urljoin(server, f"{base}/{image.key}") if image.key else ""
