"""A shard from its addresses to its committed folder, on whatever machine, however often.

Any number of attempts at one shard may be alive at once. Each writes a folder of its own; the one
whose note under ``committed`` is there first has done the shard, and the others take theirs back.
A folder without a note is nothing. The folder is what ``florence2 label`` writes: a project, a
journal, the run's manifest and the exports.
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from florence2.budget import open_pixels
from florence2.engine.encoding import Preparer
from florence2.engine.scheduler import Priority
from florence2.errors import DeviceLostError, FlorenceError, ImageError
from florence2.records import Failure, SizeWh, clip_region
from serve.labeling.exports import COCO_DIR, export_coco
from serve.labeling.files import opened_workspace, stamp_of
from serve.labeling.images import ImageFile, Loaded, read_ahead
from serve.labeling.journal import Entry, Totals, open_journal
from serve.labeling.pipeline import LookedAt, check_any_hope, written_entry
from serve.labeling.previews import PREVIEWS_DIR, draw_missing_previews
from serve.labeling.project import GrowingProject
from serve.labeling.run import declare_classes, error_sentence
from serve.labeling.undo import keep_manifest
from serve.predict.predictor import Call, OpenImage, Predicted, Predictor, made_ready
from serve.predict.tiling import can_tile
from serve.provenance import Manifest
from serve.scaling.plan import PlannedImage, Shard
from serve.scaling.storage import Storage, StorageError, read_address
from serve.settings import Settings

RUN_NAME: Final = "run.json"
SHARDS: Final = "shards"
COMMITTED: Final = "committed"
ATTEMPTS: Final = "attempts"
_DOWNLOADS: Final = 8
_READERS: Final = 2
# A store that is gone for a moment fails no image.
_RETRY_S: Final = (1.0, 4.0, 15.0)
THIS_PROCESS: Final = secrets.token_hex(6)
"""In notes of attempts: what begins anew after a store failed is no further process."""
# From then on images go through a stage one by one, each noted before.
_CAREFUL_FROM: Final = 2


@dataclass(frozen=True, slots=True)
class Work:
    """What every machine is told of a run. ``noted`` is what decides what the labels are."""

    target: Storage
    settings: Settings
    noted: Mapping[str, Any]
    manifest: Manifest
    batch: int = 8
    coco: bool = False
    draw: bool = False


@dataclass(slots=True, eq=False)
class ShardImage:
    """An image on its way through the stages.

    ``content`` is its file's, ``opened`` what the model looks at: None for an image that is looked
    at in several views, which is opened where the model is. ``problem`` is why it has no labels.
    """

    planned: PlannedImage
    content: bytes = b""
    size_wh: SizeWh = (0, 0)
    is_first_of_many: bool = False
    opened: OpenImage | None = None
    problem: Failure | None = None
    predicted: Predicted | None = None

    @property
    def held_pixels(self) -> int:
        """Of the room of the process that opened it, nothing any more."""
        return 0


@dataclass(frozen=True, slots=True)
class Committed:
    """What became of a shard, as noted when it was committed; its labels are in ``folder``.

    ``failures`` have key, address, name, code and message; ``settled`` are the keys of images that
    had failed in an earlier shard and have labels here, or nothing to label.
    """

    shard: int
    folder: str
    run: str
    images: int
    labeled: int
    empty: int
    objects: int
    truncated: int = 0
    noted: int = 0
    notes: Mapping[str, int] = field(default_factory=dict)
    first_of_many: Sequence[str] = ()
    failures: Sequence[Sequence[str]] = ()
    settled: Sequence[str] = ()

    @classmethod
    def of_json(cls, stored: bytes) -> Committed:
        return cls(**json.loads(stored))


class Attempts:
    """Processes that began a stage with one shard in one run, so that an image which ends them is
    found.

    A process that ends is started again with the same shard. From the third one on images are taken
    one by one, each noted before: those that an earlier process noted and did not get past are not
    taken again.
    """

    def __init__(self, work: Work, shard: Shard, stage: str) -> None:
        self._target = work.target
        self._folder = f"{ATTEMPTS}/{work.manifest.run}/{shard.title}-{stage}"
        known = self._target.names(self._folder)
        noted = [name.split("-") for name in known]
        others = [one for one in noted if one[-1] != THIS_PROCESS]
        passed = {int(place) for kind, place, *_ in noted if kind == "passed"}
        self.blamed = {int(place) for kind, place, *_ in others if kind == "taken"} - passed
        self.is_careful = sum(kind == "start" for kind, *_ in others) >= _CAREFUL_FROM
        self._note(f"start-{THIS_PROCESS}")

    def taken(self, place: int) -> None:
        if self.is_careful:
            self._note(f"taken-{place}-{THIS_PROCESS}")

    def passed(self, place: int) -> None:
        if self.is_careful:
            self._note(f"passed-{place}")

    def failure(self) -> Failure:
        return Failure(
            "process_ended",
            "A process ended while it worked on this image, and two before it with the same shard; "
            "look at the image, or give the machines more memory, and use --retry-failed.",
        )

    def _note(self, name: str) -> None:
        self._target.write(f"{self._folder}/{name}", b"")


def committed_name(number: int) -> str:
    return f"{COMMITTED}/{number:06}.json"


def committed_numbers(target: Storage) -> set[int]:
    """Of the shards that are done."""
    return {int(Path(name).stem) for name in committed_names(target)}


def committed_names(target: Storage) -> list[str]:
    """Of the notes, by their numbers; what else file systems put there is passed over."""
    names = (name for name in target.names(COMMITTED) if name.endswith(".json"))
    return [name for name in names if Path(name).stem.isdecimal()]


def committed_shard(target: Storage, number: int) -> Committed | None:
    """What is noted of a shard that is done; None of another."""
    stored = target.read(committed_name(number))
    return None if stored is None else Committed.of_json(stored)


def committed_in(target: Storage) -> Iterator[Committed]:
    """All shards that are committed, by their numbers."""
    names = (f"{COMMITTED}/{name}" for name in committed_names(target))
    return map(Committed.of_json, target.read_many(names))


def has_one_view(settings: Settings) -> bool:
    """Whether an image is looked at as a whole, so that it can be made ready without the model."""
    is_tiled = settings.tiling is not None and can_tile(settings.task_prompt)
    return settings.reference is None and not is_tiled


def open_shard(work: Work, shard: Shard, preparer: Preparer) -> list[ShardImage]:
    """The images downloaded, opened and scaled; why one cannot be is its own failure."""
    attempts = Attempts(work, shard, "open")
    images = [ShardImage(one) for one in shard.images]
    with tempfile.TemporaryDirectory(prefix="florence2-") as folder:
        if not attempts.is_careful:
            _open(work.settings, images, Path(folder), preparer)
            return images
        for place, one in enumerate(images):
            if place in attempts.blamed:
                one.problem = attempts.failure()
                continue
            attempts.taken(place)
            _open(work.settings, [one], Path(folder), preparer)
            attempts.passed(place)
    return images


def _open(settings: Settings, images: list[ShardImage], folder: Path, preparer: Preparer) -> None:
    by_path: dict[Path, ShardImage] = {}

    def downloaded() -> Iterator[ImageFile]:
        with ThreadPoolExecutor(_DOWNLOADS, thread_name_prefix="download") as pool:
            pending: list[tuple[ShardImage, Future[None]]] = [
                (one, pool.submit(_download, one)) for one in images
            ]
            for place, (one, done) in enumerate(pending):
                done.result()
                if one.problem is None:
                    path = folder / f"{place}{os.path.splitext(one.planned.name)[1]}"
                    path.write_bytes(one.content)
                    by_path[path] = one
                    yield ImageFile(path, one.planned.key, one.planned.name)

    def ready(loaded: Loaded) -> ShardImage:
        one = by_path.pop(loaded.file.path)
        _make_ready(one, loaded, settings, preparer)
        loaded.file.path.unlink()
        return one

    opened = read_ahead(
        downloaded(), ready, threads=_READERS, ahead=2 * _READERS, budget=open_pixels()
    )
    with closing(opened):
        deque(opened, maxlen=0)


def _download(one: ShardImage) -> None:
    for wait_s in (*_RETRY_S, None):
        try:
            one.content = read_address(one.planned.address)
        except FileNotFoundError:
            reason = "Nothing is at this address any more; put the image back and use"
            one.problem = Failure(ImageError.code, f"{reason} --retry-failed.")
        except StorageError as error:
            if wait_s is not None:
                time.sleep(wait_s)
                continue
            one.problem = Failure(error.code, str(error))
        except FlorenceError as error:
            one.problem = Failure(ImageError.code, str(error))
        # Of an address that is none: it is one image's, and ends no run.
        except (LookupError, TypeError, AttributeError, NotImplementedError) as error:
            one.problem = Failure(ImageError.code, error_sentence(error))
        return


def _make_ready(one: ShardImage, loaded: Loaded, settings: Settings, preparer: Preparer) -> None:
    picture = loaded.picture
    if picture is None:
        problem = loaded.problem or ImageError("The image could not be read.")
        # The file lay here for a moment.
        told = str(problem).replace(str(loaded.file.path), one.planned.address)
        one.problem = Failure(problem.code, told)
        return
    one.size_wh, one.is_first_of_many = picture.size_wh, loaded.is_first_of_many
    try:
        for region in settings.regions:
            clip_region(region, picture.size_wh)
        if has_one_view(settings):
            one.opened = made_ready(picture, settings, preparer)
    except FlorenceError as error:
        one.problem = Failure(error.code, str(error))
    finally:
        # Its room is of this process, and what was made of it goes to another.
        picture.close()


def label_shard(
    work: Work, shard: Shard, images: Sequence[ShardImage], predictor: Predictor
) -> None:
    """Asks the model about every image that can be asked about.

    Raises RequestError where nothing can be asked as planned, DeviceLostError.
    """
    attempts = Attempts(work, shard, "label")
    size = 1 if attempts.is_careful else work.batch
    for place, one in enumerate(images):
        if one.problem is None and place in attempts.blamed:
            one.problem = attempts.failure()
    readable = [(place, one) for place, one in enumerate(images) if one.problem is None]
    for begin in range(0, len(readable), size):
        group = readable[begin : begin + size]
        attempts.taken(group[0][0])
        is_first = shard.number == 0 and begin == 0
        _ask(work.settings, [one for _, one in group], predictor, is_first=is_first)
        attempts.passed(group[0][0])


def _ask(
    settings: Settings, group: Sequence[ShardImage], predictor: Predictor, *, is_first: bool
) -> None:
    call = Call(Priority.BULK)
    outcomes: list[Predicted | Failure]
    opened = [one.opened for one in group if one.opened is not None]
    if len(opened) == len(group):
        answers = predictor.answers(opened, call)
        outcomes = [
            predictor.predicted(image, found) for image, found in zip(opened, answers, strict=True)
        ]
    else:
        outcomes = predictor.predict([one.content for one in group], settings, call)
    if is_first:
        check_any_hope(outcomes, len(outcomes), settings)
    for one, outcome in zip(group, outcomes, strict=True):
        one.opened = None
        if isinstance(outcome, Predicted):
            one.predicted = outcome
        elif outcome.code == DeviceLostError.code:
            raise DeviceLostError(outcome.message)
        else:
            one.problem = outcome


def commit_shard(work: Work, shard: Shard, images: Sequence[ShardImage]) -> Committed:
    """Writes the shard's folder and commits it; what holds, which another attempt may have done."""
    if (known := committed_shard(work.target, shard.number)) is not None:
        return known
    name = f"{SHARDS}/shard-{shard.title}-{secrets.token_hex(3)}"
    with tempfile.TemporaryDirectory(prefix="florence2-") as folder:
        built = Path(folder) / "built"
        entries = _build(work, shard, images, Path(folder) / "images", built)
        committed = _committed(work, shard, entries, name)
        work.target.upload(built, name)
    text = json.dumps(asdict(committed), ensure_ascii=False) + "\n"
    # A path may hold bytes that are no text.
    work.target.create(committed_name(shard.number), text.encode("utf-8", "backslashreplace"))
    holds = committed_shard(work.target, shard.number) or committed
    if holds.folder != name:
        work.target.delete(name)
    return holds


def _build(
    work: Work, shard: Shard, images: Sequence[ShardImage], files: Path, root: Path
) -> list[Entry]:
    files.mkdir()
    with opened_workspace(root) as workspace:
        project = GrowingProject(workspace, link=True)
        with closing(open_journal(workspace, work.noted, project.is_kept)) as journal:
            manifest = work.manifest
            project.create()
            if work.settings.run_tag:
                manifest = replace(manifest, run_tag=project.tag_runs())
            declare_classes(project, work.settings)
            entries = []
            for place, one in enumerate(images):
                path = files / f"{place}{os.path.splitext(one.planned.name)[1]}"
                path.write_bytes(one.content)
                stamp = stamp_of(path)
                file = ImageFile(path, one.planned.key, one.planned.name)
                looked = LookedAt(file, one.size_wh, stamp, one.is_first_of_many)
                outcome = one.predicted or one.problem or Failure("error", "It was not looked at.")
                run = manifest.run
                entries.append(written_entry(looked, outcome, project, journal, run))
            journal.append(entries)
        counts = {"images": len(entries), **Counter[str](entry.state for entry in entries)}
        keep_manifest(workspace, manifest.ended("done", counts, None))
        if work.draw:
            draw_missing_previews(project, root / PREVIEWS_DIR)
        if work.coco:
            export_coco(project, root / COCO_DIR)
    return entries


def _committed(work: Work, shard: Shard, entries: Sequence[Entry], folder: str) -> Committed:
    totals = Totals()
    for entry in entries:
        totals.add(entry)
    addresses = {one.key: one.address for one in shard.images}
    return Committed(
        shard=shard.number,
        folder=folder,
        run=work.manifest.run,
        images=len(entries),
        labeled=totals.labeled,
        empty=totals.empty,
        objects=totals.objects,
        truncated=totals.truncated,
        noted=totals.noted,
        notes=dict(totals.notes),
        first_of_many=totals.first_of_many,
        failures=[
            (one.image, addresses[one.image], one.name, one.code, one.message)
            for one in totals.failures.values()
        ],
        settled=[one.image for one in entries if one.state != "failed"] if shard.is_again else [],
    )
