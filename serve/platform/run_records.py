"""The books of one run that writes to the platform: what it did so far, kept as it goes.

They lie where ``run_store.py`` says, and are what a run goes on from that was cut off, stopped, or
not whole.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Final

from florence2.records import Failure
from serve.platform.images import Target
from serve.platform.lease import Lease, RunHeldError, taken
from serve.platform.page import Answer, HeldAnswers, add_line, draw_missing, page_of
from serve.platform.patience import Patience, Tried, at_once
from serve.platform.request_state import Destination
from serve.platform.run_store import (
    IMAGES,
    INTENDED,
    UNSAVED,
    folder_of,
    image_rows,
    info_of,
    note_run,
    noted_rows,
    page_path,
    runs_of,
    team_of,
    written_in,
)
from serve.platform.team_files import read_texts, write_text
from serve.predict.predictor import Predicted
from serve.provenance import (
    MODEL_KEYS,
    RUN_TAG,
    Manifest,
    RunState,
    Written,
    fingerprint_of,
    new_run_id,
    now,
    run_of_label,
    sort_labels,
)
from serve.run_page.drawing import scores_of
from serve.run_page.figures import RunFigures
from serve.sdk import sly
from serve.settings import Settings, changed_settings, raw_settings

_HOLDER: Final = "holder.json"
_BEGUN: Final = "begun"
"""In the place of a run's id: who begins a run that nobody knows yet."""
_SAVE_AFTER_S: Final = 30.0
_LINES_PER_FILE: Final = 1000
_DONE: Final = frozenset({"labeled", "empty", "skipped"})


@dataclass(slots=True)
class _ProjectBooks:
    """One run's books about one project.

    ``lines`` are those of the file that is not full yet, of which the last ``num_unsaved`` are not
    in team files.
    """

    manifest: Manifest
    lines: list[str] = field(default_factory=list)
    num_unsaved: int = 0
    num_files: int = 0
    saved_at: float = field(default_factory=time.monotonic)
    counts: Counter[str] = field(default_factory=Counter)
    is_announced: bool = False
    has_written: bool = False
    has_intents: bool = False
    team_id: int | None = None
    lease: Lease | None = None
    figures: RunFigures = field(default_factory=RunFigures)
    num_before: int = 0

    @property
    def unsaved(self) -> Sequence[str]:
        """The lines that are not in team files."""
        return self.lines[len(self.lines) - self.num_unsaved :]

    def add(self, line: Mapping[str, Any], counts: Counter[str]) -> None:
        """What became of one more image."""
        self.lines.append(json.dumps(line, ensure_ascii=False))
        self.num_unsaved += 1
        self.counts += counts


class RunRecord:
    """The books of one run that writes to the platform; a context around its work.

    The last of what is kept waits for a platform that is away, with ``patience``. What cannot be
    kept is told in the log and ends no run: its labels are there. Only one that ``is_of_project``,
    and is not ``is_copying`` its images, can be gone on with; by ``resume_command``, if it was
    typed.
    """

    def __init__(
        self,
        api: sly.Api,
        settings: Settings,
        model: Mapping[str, Any],
        destination: Destination,
        num_images: int,
        patience: Patience | None = None,
        *,
        is_of_project: bool = True,
        is_copying: bool = False,
        resume_command: str | None = None,
    ) -> None:
        raw = raw_settings(settings)
        mode = destination.mode
        self.writes_tag = settings.run_tag is not False
        self._is_copying, self._resume_command = is_copying, resume_command
        self._api = api
        self._num_images = num_images
        self._tried: Tried = at_once if patience is None else patience.tried
        self._written: dict[int, Written] = {}
        self._annotations: dict[int, sly.Annotation] = {}
        self._answers = HeldAnswers()
        self._started_at = time.monotonic()
        self._intended: dict[int, Written] = {}
        self._failed_before: set[int] = set()
        self._books: dict[int, _ProjectBooks] = {}
        self._early: list[tuple[dict[str, Any], Counter[str]]] = []
        self._num_settled = 0
        self._is_stopped = False
        self._earlier: Manifest | None = None
        self._beginning: Lease | None = None
        self._manifest = Manifest(
            run=new_run_id(),
            model=model,
            task=settings.task_prompt,
            prompts=[prompt.text for prompt in settings.prompts if prompt.text],
            settings=changed_settings(settings),
            run_tag=RUN_TAG.name if self.writes_tag else None,
            started=now(),
            mode=mode,
            # A click, or a few images by their ids, is not gone on with: it is newer than the run
            # over the project that was cut off, and has done next to nothing of it.
            fingerprint=fingerprint_of(
                {key: model[key] for key in MODEL_KEYS if key in model},
                raw,
                [mode, destination.iou, destination.suffix],
            )
            if is_of_project and not is_copying
            else None,
        )

    @property
    def run_id(self) -> str:
        return self._manifest.run

    @property
    def is_bulk(self) -> bool:
        """Whether it is of more than the one image that somebody waits for."""
        return self._num_images > 1

    @property
    def is_resumed(self) -> bool:
        """Whether it goes on with an earlier run."""
        return self._earlier is not None

    @property
    def earlier(self) -> Manifest | None:
        """That of the run that this one goes on with, as it was found."""
        return self._earlier

    @property
    def counts(self) -> Mapping[str, int]:
        """Of all images of the run so far, in whichever process they were done."""
        total: Counter[str] = Counter()
        for books in self._books.values():
            total += books.counts
        return total

    def resume(
        self, project_id: int, image_ids: Collection[int], should_stop: Callable[[], bool]
    ) -> frozenset[int]:
        """Goes on with the newest run over the project that had the same model and settings.

        Those of ``image_ids`` that are done; none where there is no such run, and a new one begins.
        Raises RunHeldError where another process works on it, and what the SDK raises where the
        platform fails.
        """
        found = self._find_earlier(project_id) or self._begin(project_id, should_stop)
        if found is None:
            return frozenset()
        self._earlier = found
        self._manifest = replace(
            found, state="running", finished=None, error=None, counts={}, resumed=found.resumed + 1
        )
        books = self._books_of(project_id)
        books.lease = self._lease(project_id)
        books.lease.take(should_stop)
        try:
            # Only now: until it was held, somebody else may have written more of them.
            return self._read_back(project_id, books, image_ids)
        except BaseException:
            books.lease.release()
            raise

    def _find_earlier(self, project_id: int) -> Manifest | None:
        return next(
            (
                one
                for one in runs_of(self._api, project_id)
                if one.fingerprint == self._manifest.fingerprint
                # What it is called is a folder's name.
                and str(one.run).isalnum()
                and one.state in ("running", "done", "stopped", "failed")
            ),
            None,
        )

    def _begin(self, project_id: int, should_stop: Callable[[], bool]) -> Manifest | None:
        """Of two processes that begin the same, which nobody can see until labels are written, one
        does. The run of the other where that is known by then; RunHeldError as long as it is not.
        """
        team_id = team_of(self._api, project_id)
        path = f"{folder_of(project_id, _BEGUN)}/{self._manifest.fingerprint}.json"
        what = f"A run over project {project_id} with the same settings"
        self._beginning = taken(Lease(self._api, team_id, path, what), should_stop)
        try:
            found = self._find_earlier(project_id)
        except BaseException:
            self._end_beginning()
            raise
        if found is not None:
            self._end_beginning()
        return found

    def _end_beginning(self) -> None:
        if self._beginning is not None:
            self._beginning.release()
            self._beginning = None

    def _read_back(
        self, project_id: int, books: _ProjectBooks, image_ids: Collection[int]
    ) -> frozenset[int]:
        texts = read_texts(self._api, self._team_of(project_id), folder_of(project_id, self.run_id))
        rows = noted_rows(texts)
        for image_id, row in rows.items():
            outcome, written = str(row.get("outcome")), written_in(row)
            if outcome == INTENDED:
                self._intended[image_id] = written
                continue
            if outcome == "failed" and image_id not in image_ids:
                # It is not there any more, or is not asked for now.
                continue
            if outcome == "failed":
                self._failed_before.add(image_id)
            else:
                add_line(books.figures, row, project_id)
            books.counts += _counts_of(outcome, written)
            books.has_written |= bool(written)
        books.num_before = books.figures.num_images
        done = frozenset(one for one in image_ids if rows.get(one, {}).get("outcome") in _DONE)
        self._num_settled = len(done)
        saved = {path: text for path, text in texts.items() if IMAGES in path}
        books.num_files = len(saved)
        books.has_intents = any(UNSAVED in path for path in texts)
        known = noted_rows(saved)
        for path in texts.keys() - saved.keys():
            # These files are written anew without them.
            for row in image_rows(path, texts[path]):
                if row["image_id"] not in known and row.get("outcome") != INTENDED:
                    books.add(row, Counter())
        books.is_announced = True
        if books.lease is not None:
            books.manifest = replace(books.manifest, holder=books.lease.who)
        self._keep_manifest(project_id, books.manifest)
        return done

    def answered(self, target: Target, image: object, predicted: Predicted) -> None:
        """Remembers what the page is to say about an answer once its labels are uploaded."""
        books = None if target.project_id is None else self._books.get(target.project_id)
        picture = None
        if isinstance(image, bytes) and self.is_bulk:
            scores = scores_of(predicted.annotation)
            has_any = bool(scores) or bool(predicted.annotation.img_tags)
            if has_any and (books is None or books.figures.wants_picture(scores)):
                picture = image
        is_truncated = any(result.truncated for result in predicted.results)
        self._answers.keep(target.image_id, Answer(is_truncated, predicted.notes, picture))

    def check_held(self) -> None:
        """RunHeldError where another process has taken the run over."""
        if self._beginning is not None:
            self._beginning.check()
        for books in self._books.values():
            if books.lease is not None:
                books.lease.check()

    def before_upload(self, project_id: int, image_id: int, annotation: sly.Annotation) -> None:
        """Remembers what is written now, under the names that the project has for it."""
        books = self._books_of(project_id)
        if self.writes_tag:
            name = next((one for one in _tag_names(annotation, self.run_id)), None)
            if name is not None and name != books.manifest.run_tag:
                books.manifest = replace(books.manifest, run_tag=name)
                if books.is_announced:
                    self._keep_manifest(project_id, books.manifest)
        written = Written.of(annotation.to_json(), books.manifest.run_tag)
        self._written[image_id] = written
        self._annotations[image_id] = annotation
        books.has_written |= bool(written)
        if self.is_bulk and not books.is_announced:
            # A run that is killed is known all the same.
            self._announce(project_id, books)

    def keep_intents(self, project_id: int) -> None:
        """Before labels are sent that do not say by a tag whose they are: what is sent.

        A run that is killed before it has noted the images finds out by that whether they arrived.
        """
        books = self._books_of(project_id)
        # Those of a batch that are settled together, of whichever dataset.
        intents = dict(self._written)
        tells_itself = [self.writes_tag and one.labels for one in intents.values() if one]
        if not self.is_bulk or self._manifest.mode == "replace" or all(tells_itself):
            return
        books.has_intents = True
        self._write_unsaved(
            project_id, [*books.unsaved, *_intent_lines({**self._intended, **intents})]
        )

    def is_intended(self, image_id: int) -> bool:
        """Whether the run that was cut off may have been about to write on an image."""
        return image_id in self._intended

    def found(self, image_id: int, annotation: Mapping[str, Any], project_id: int) -> bool:
        """Whether the run that was cut off has written on an image and could not note it.

        Where it has, that is remembered as what was written.
        """
        run_tag = self._books_of(project_id).manifest.run_tag
        intended = self._intended.get(image_id, Written())
        ours: list[Any] = []
        if run_tag is not None:
            labels = annotation.get("objects", ())
            ours = [one for one in labels if run_of_label(one, run_tag) == self.run_id]
        if ours:
            labels = Written.of({"objects": ours}, run_tag).labels
            self._written[image_id] = Written(labels, intended.image_tags)
        elif intended and not sort_labels(annotation, self.run_id, run_tag, intended).num_gone:
            self._written[image_id] = intended
        else:
            return False
        self._books_of(project_id).has_written = True
        return True

    def settled(
        self,
        project_id: int | None,
        target: Target,
        failure: Failure | None = None,
        *,
        copied_to: int | None = None,
        is_skipped: bool = False,
    ) -> None:
        """What became of an image; ``copied_to`` is the dataset of the copy that has the labels.

        ``project_id`` is where its labels are, None where nobody knows it or it is not made yet.
        """
        written = self._written.pop(target.image_id, Written())
        annotation = self._annotations.pop(target.image_id, None)
        answer = self._answers.take(target.image_id)
        self._num_settled += 1
        if failure is None:
            self._intended.pop(target.image_id, None)
        elif written:
            self._intended[target.image_id] = written
        outcome = "skipped" if is_skipped else "failed" if failure is not None else "labeled"
        if outcome == "labeled" and not written:
            outcome = "empty"
        line: dict[str, Any] = {
            "image_id": target.image_id,
            "name": target.name,
            "outcome": outcome,
            "dataset_id": target.dataset_id,
            "project_id": None if target.project_id == project_id else target.project_id,
            "copied_to": copied_to,
            **_digests(written),
            "truncated": answer.is_truncated or None,
            "notes": answer.notes,
        }
        if failure is not None:
            line |= {"code": failure.code, "message": failure.message[:500]}
        elif annotation is not None and written.labels:
            line["scores"] = scores_of(annotation)
        line = {key: value for key, value in line.items() if value not in (None, ())}
        counts = _counts_of(outcome, written)
        if project_id is None and not self._books:
            # The project that images are copied to is made with the first one that has labels.
            self._early.append((line, counts))
            return
        if project_id is None:
            # Of an image that is not there nobody knows the project: it is named in one of them.
            project_id = next(iter(self._books))
        books = self._books_of(project_id)
        if target.image_id in self._failed_before:
            self._failed_before.remove(target.image_id)
            books.counts -= _counts_of("failed", Written())
        books.add(line, counts)
        add_line(books.figures, line, project_id, annotation, answer.picture)
        is_due = time.monotonic() - books.saved_at >= _SAVE_AFTER_S
        # Team files that take nothing are tried again when it is due, and not for every image.
        is_full = len(books.lines) == _LINES_PER_FILE
        if self.is_bulk and (is_due or is_full):
            self._save_lines(project_id, books)

    def stopped(self) -> None:
        """The run ends before its last image because it was asked to."""
        self._is_stopped = True

    def __enter__(self) -> RunRecord:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        state: RunState = "done"
        if self._num_settled < self._num_images:
            # Who leaves without an error all the same was asked to.
            is_asked = error is None or isinstance(error, KeyboardInterrupt)
            state = "stopped" if is_asked or self._is_stopped else "failed"
        try:
            self._end(state, None if error is None else str(error))
        finally:
            self._end_beginning()

    def _end(self, state: RunState, error: str | None) -> None:
        for project_id, books in self._books.items():
            lease = books.lease
            try:
                if lease is not None:
                    lease.check()
            except RunHeldError as held:
                sly.logger.warning(str(held))
                if lease is not None:
                    lease.release()
                continue
            manifest = self._close(project_id, books, state, error)
            # One that is new may have been announced only now.
            if books.lease is not None:
                books.lease.release()
            if self.is_bulk:
                self._write_page(project_id, books, manifest)

    def _close(
        self, project_id: int, books: _ProjectBooks, state: RunState, error: str | None
    ) -> Manifest:
        counts = {name: count for name, count in books.counts.items() if count}
        manifest = books.manifest.ended(state, counts, error)
        if self.is_bulk:
            self._save_lines(project_id, books, self._tried)
        elif not books.has_written and not self.is_resumed:
            return manifest
        if books.has_intents and not books.num_unsaved:
            # Of images that were not got to, or failed, nobody knows still what arrived.
            left = {**self._intended, **self._written}
            self._write_unsaved(project_id, _intent_lines(left))
        self._keep_manifest(project_id, manifest)
        return manifest

    def _write_page(self, project_id: int, books: _ProjectBooks, manifest: Manifest) -> None:
        path = page_path(project_id, self.run_id)
        try:
            draw_missing(self._api, books.figures)
        except Exception as error:  # noqa: BLE001  (the SDK and its transport raise anything)
            sly.logger.warning(f"Some labels are not drawn on the page of {self.run_id}: {error!r}")
        try:
            page = page_of(
                self._api,
                info_of(self._api, project_id),
                manifest,
                books.figures,
                num_pending=max(self._num_images - self._num_settled, 0),
                num_images=books.figures.num_images - books.num_before,
                seconds=time.monotonic() - self._started_at,
                is_copying=self._is_copying,
                resume_command=self._resume_command,
            )
            write_text(self._api, self._team_of(project_id), path, page)
        except Exception as error:  # noqa: BLE001  (the SDK and its transport raise anything)
            sly.logger.warning(f"The page of run {self.run_id} is not in {path}: {error!r}")
            return
        sly.logger.info(f"The page of run {self.run_id} is in the team files: {path}")

    def _books_of(self, project_id: int) -> _ProjectBooks:
        books = self._books.get(project_id)
        if books is None:
            books = self._books[project_id] = _ProjectBooks(self._manifest)
            for line, counts in self._early:
                books.add(line, counts)
                add_line(books.figures, line, project_id)
            self._early.clear()
        return books

    def _announce(self, project_id: int, books: _ProjectBooks) -> None:
        books.is_announced = True
        try:
            lease = self._lease(project_id)
            self._tried(lease.start)
            books.lease = lease
            books.manifest = replace(books.manifest, holder=lease.who)
        except Exception as error:  # noqa: BLE001  (the SDK and its transport raise anything)
            sly.logger.warning(f"Nobody can see who works on run {self.run_id}: {error!r}")
        self._keep_manifest(project_id, books.manifest)
        if books.lease is not None:
            self._end_beginning()

    def _lease(self, project_id: int) -> Lease:
        path = f"{folder_of(project_id, self.run_id)}/{_HOLDER}"
        what = f"Run {self.run_id} over project {project_id}"
        return Lease(self._api, self._team_of(project_id), path, what, lambda: self._num_settled)

    def _save_lines(self, project_id: int, books: _ProjectBooks, tried: Tried = at_once) -> None:
        """Writes the file that is not full yet anew, so that there are few to read."""
        books.saved_at = time.monotonic()
        if not books.num_unsaved:
            return
        if not books.is_announced:
            self._announce(project_id, books)
        path = f"{folder_of(project_id, self.run_id)}{IMAGES}{books.num_files:06}.jsonl"
        try:
            text = "\n".join(books.lines) + "\n"
            tried(lambda: write_text(self._api, self._team_of(project_id), path, text))
        except Exception as error:  # noqa: BLE001  (the SDK and its transport raise anything)
            sly.logger.warning(f"What run {self.run_id} did is not in {path} yet: {error!r}")
            return
        books.num_unsaved = 0
        if len(books.lines) >= _LINES_PER_FILE:
            books.num_files += 1
            books.lines.clear()

    def _write_unsaved(self, project_id: int, lines: Sequence[str]) -> None:
        path = f"{folder_of(project_id, self.run_id)}/{UNSAVED}"
        try:
            write_text(self._api, self._team_of(project_id), path, "\n".join(lines) + "\n")
        except Exception as error:  # noqa: BLE001  (as above)
            sly.logger.warning(
                f"If run {self.run_id} is killed now, the next {len(lines)} images may be labeled "
                f"twice: {path} cannot be written: {error!r}"
            )

    def _keep_manifest(self, project_id: int, manifest: Manifest) -> None:
        """With the lines that are in no other file; for one image, which somebody waits for, that
        is one file."""
        lines = self._books_of(project_id).unsaved
        note_run(self._api, project_id, manifest, self._tried, lines)

    def _team_of(self, project_id: int) -> int:
        books = self._books_of(project_id)
        if books.team_id is None:
            books.team_id = team_of(self._api, project_id)
        return books.team_id


def _intent_lines(intended: Mapping[int, Written]) -> list[str]:
    return [
        json.dumps({"image_id": image_id, "outcome": INTENDED, **_digests(written)})
        for image_id, written in intended.items()
    ]


def _digests(written: Written) -> dict[str, Any]:
    return {"labels": written.labels, "image_tags": written.image_tags}


def _counts_of(outcome: str, written: Written) -> Counter[str]:
    counts = Counter({"images": 1, outcome: 1})
    if outcome != "failed":
        counts["labels"] = len(written.labels)
    return counts


def _tag_names(annotation: sly.Annotation, run_id: str) -> Iterator[str]:
    for label in annotation.labels:
        for tag in label.tags:
            if tag.value == run_id and tag.meta.name.startswith(RUN_TAG.name):
                yield tag.meta.name
