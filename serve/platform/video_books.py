"""What is kept of a run over a video outside of the process: it goes on where it was cut off.

The run's manifest is in the project's custom data, as that of a run over images; beside it in the
team files are the frames that were looked at, in parts, and at the end what was written.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from serve.platform.lease import Lease, RunHeldError, taken
from serve.platform.run_store import folder_of, note_run, runs_of, team_of
from serve.platform.team_files import read_texts, write_text
from serve.platform.video_labels import VideoLine
from serve.provenance import MODEL_KEYS, RUN_TAG, Manifest, RunState, new_run_id, now
from serve.sdk import sly
from serve.settings import Settings, changed_settings, raw_settings

# isort: split
from supervisely.api.video.video_api import VideoInfo

SAVE_AFTER_S: Final = 20.0
_FRAMES: Final = "frames-"
_WRITTEN: Final = "videos-"
_HOLDERS: Final = "videos"
"""In the place of a run's id: who works on which video is known before the run is."""
_KEY_BYTES: Final = 8
_GOES_ON: Final = ("running", "stopped", "failed")

# Of this process, which is to know them also where it may not use team files.
_at_work: Final[set[tuple[int, str]]] = set()
_at_work_lock: Final = threading.Lock()


class VideoBooks:
    """One run over one video; a context around its work.

    ``lines`` are those of the frames that an earlier process looked at, ``written`` what it wrote.
    What cannot be kept is told in the log and ends no run. From the beginning to the end nobody
    else works on the same.
    """

    def __init__(
        self,
        api: sly.Api,
        info: VideoInfo,
        settings: Settings,
        model: Mapping[str, Any],
        mode: str,
        frames: Mapping[str, int | None],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Waits until it is told whether a process that did the same is alive.

        Raises RunHeldError where it is, GenerationCancelledError where the wait is stopped, and
        what the SDK raises where the platform fails.
        """
        self._api = api
        self._info = info
        asked = dict(raw_settings(settings))
        # Which is part of a request, and no setting that it could spell.
        asked["is_one_class"] = settings.is_one_class
        answering = {key: model[key] for key in MODEL_KEYS if key in model}
        identity = [info.id, info.hash, dict(frames), asked, answering, mode]
        text = json.dumps(identity, sort_keys=True, default=str)
        self._key = hashlib.blake2b(text.encode(), digest_size=_KEY_BYTES).hexdigest()
        self._place = info.id, self._key
        self._lease: Lease | None = None
        self._begin()
        try:
            self._take_lease(should_stop)
            earlier = self._earlier()
            self.writes_tag = settings.run_tag is not False
            self.manifest = earlier or Manifest(
                run=new_run_id(),
                model=model,
                task=settings.task_prompt,
                prompts=[one.text for one in settings.prompts if one.text],
                settings={
                    **changed_settings(settings),
                    "video": {"id": info.id, "name": info.name, **frames},
                },
                run_tag=RUN_TAG.name if self.writes_tag else None,
                started=now(),
                mode=mode,
                counts={"frames": 0},
                # Long settings are not kept.
                fingerprint=self._key,
            )
            self.lines, self.written, self._num_parts = "", VideoLine(info.id, info.name), 0
            if self._lease is not None:
                self.manifest = replace(self.manifest, holder=self._lease.who)
            if earlier is not None:
                self._read()
        except BaseException:
            self._end()
            raise
        self._saved_bytes = 0
        self._saved_at = time.monotonic()

    @property
    def run_id(self) -> str:
        return self.manifest.run

    def _begin(self) -> None:
        with _at_work_lock:
            if self._place in _at_work:
                raise self._held()
            _at_work.add(self._place)

    def _held(self) -> RunHeldError:
        return RunHeldError(
            f"Video {self._info.id} is being labeled by the same request now; wait until that is "
            "done, or stop it."
        )

    def _take_lease(self, should_stop: Callable[[], bool]) -> None:
        video_id, project_id = self._info.id, self._info.project_id
        path = f"{folder_of(project_id, _HOLDERS)}/{video_id}-{self._key}.json"
        what = f"Video {video_id} of project {project_id}"
        lease = Lease(self._api, team_of(self._api, project_id), path, what)
        try:
            self._lease = taken(lease, should_stop)
        except RunHeldError as error:
            raise self._held() from error

    def check_held(self, *, is_fresh: bool = False) -> None:
        """RunHeldError where another process has taken the run over; see ``Lease.check``."""
        if self._lease is None:
            return
        try:
            self._lease.check(is_fresh=is_fresh)
        except RunHeldError as error:
            raise self._held() from error

    def _end(self) -> None:
        if self._lease is not None:
            self._lease.release()
        with _at_work_lock:
            _at_work.discard(self._place)

    def _earlier(self) -> Manifest | None:
        """The run of an equal request that came to no end."""
        for manifest in runs_of(self._api, self._info.project_id):
            if manifest.fingerprint == self._key and manifest.state in _GOES_ON:
                resumed = manifest.resumed + 1
                return replace(
                    manifest, state="running", finished=None, error=None, resumed=resumed
                )
        return None

    def _read(self) -> None:
        for path, text in self._texts():
            name = path.rpartition("/")[2]
            if name.startswith(_FRAMES):
                self.lines += text if text.endswith("\n") or not text else text + "\n"
                self._num_parts += 1
            elif name.startswith(_WRITTEN):
                for line in lines_in(text):
                    self.written = line

    def _texts(self) -> Iterator[tuple[str, str]]:
        team_id = team_of(self._api, self._info.project_id)
        folder = folder_of(self._info.project_id, self.run_id)
        yield from read_texts(self._api, team_id, folder).items()

    def began(self, journal: Path) -> None:
        """The run is known from now on; ``journal`` is the file whose lines are kept."""
        self._journal = journal
        self._saved_bytes = journal.stat().st_size
        self._keep(self.manifest)

    def looked_at(self, num_frames: int, *, is_all: bool = False) -> None:
        """So many frames are in the journal now; keeps them, not too often. RunHeldError."""
        self.check_held()
        self.manifest = replace(
            self.manifest, counts={**self.manifest.counts, "frames": num_frames}
        )
        if not is_all and time.monotonic() - self._saved_at < SAVE_AFTER_S:
            return
        with self._journal.open("rb") as file:
            file.seek(self._saved_bytes)
            new = file.read()
        if new and self._write(f"{_FRAMES}{self._num_parts:06}.jsonl", new.decode()):
            self._num_parts += 1
            self._saved_bytes += len(new)
        self._saved_at = time.monotonic()

    def wrote(self, line: VideoLine, run_tag: str | None) -> None:
        """What is on the platform, before its figures are and once they are. RunHeldError."""
        self.check_held()
        self.written = line
        if run_tag is not None and run_tag != self.manifest.run_tag:
            self.manifest = replace(self.manifest, run_tag=run_tag)
            self._keep(self.manifest)
        self._write(f"{_WRITTEN}000000.jsonl", json.dumps(line.to_json()) + "\n")

    def ended(self, state: RunState, error: str | None = None, **counts: int) -> None:
        """RunHeldError, as then the manifest is somebody else's."""
        self.check_held()
        self._keep(self.manifest.ended(state, {**self.manifest.counts, **counts}, error))

    def __enter__(self) -> VideoBooks:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _write(self, name: str, text: str) -> bool:
        project_id = self._info.project_id
        path = f"{folder_of(project_id, self.run_id)}/{name}"
        try:
            write_text(self._api, team_of(self._api, project_id), path, text)
        except Exception as error:  # noqa: BLE001  (the SDK and its transport raise anything)
            sly.logger.warning(f"What run {self.run_id} did is not in {path} yet: {error!r}")
            return False
        return True

    def _keep(self, manifest: Manifest) -> None:
        note_run(self._api, self._info.project_id, manifest)


def is_over_video(manifest: Manifest) -> bool:
    """Whether a run looked at frames and not at images."""
    return "frames" in manifest.counts


def video_lines(api: sly.Api, project_id: int, run_id: str) -> list[VideoLine]:
    """What a run wrote on videos of a project."""
    folder = folder_of(project_id, run_id)
    texts = read_texts(api, team_of(api, project_id), folder, _WRITTEN)
    return [line for text in texts.values() for line in lines_in(text)]


def lines_in(text: str) -> Iterator[VideoLine]:
    for line in text.splitlines():
        try:
            yield VideoLine.of_json(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            sly.logger.warning(f"A line about a video cannot be read: {line[:80]!r}")
