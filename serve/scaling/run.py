"""One ``florence2 label --ray``: from a source and a target to committed shards and one report."""

from __future__ import annotations

import csv
import io
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from florence2.errors import FlorenceError, RequestError
from serve.console import say
from serve.labeling.files import OutputError, Workspace
from serve.labeling.images import Findings
from serve.labeling.journal import Entry, Totals
from serve.labeling.progress import progress_bar, stop_on_signals
from serve.labeling.report import FAILED_NAME, REPORT_NAME, Report, RunCounts, write_report
from serve.labeling.run import Job, ModelSource, new_manifest
from serve.labeling.settings import journal_settings
from serve.provenance import Manifest, RunState
from serve.scaling.cluster import Pipeline, Workers, check_device, committed_shards, connected
from serve.scaling.plan import PLAN, Listing, Plan, PlannedImage, Source
from serve.scaling.shards import (
    ATTEMPTS,
    COMMITTED,
    RUN_NAME,
    SHARDS,
    Committed,
    Work,
    committed_in,
    committed_numbers,
)
from serve.scaling.storage import Storage, StorageError, check_target, is_remote
from serve.settings import Settings

RUNS: Final = "runs"
INDEX_NAME: Final = "shards.csv"
DEFAULT_SHARD_SIZE: Final = 100
_FORMAT: Final = 1
_LOOK_AT_PLAN_S: Final = 5.0
_SETTLES, _SETTLE_S = 10, 1.0


@dataclass(frozen=True, slots=True)
class ScaledJob:
    """Where from, where to, and on how much of the cluster at ``address``.

    ``job`` has what folders have too. Nothing here changes what the labels are.
    """

    source: str
    target: str
    address: str
    job: Job
    shard_size: int = DEFAULT_SHARD_SIZE
    workers: int | None = None
    worker_cores: int = 1
    device: str = "auto"


@dataclass(slots=True)
class Merged:
    """All shards that are committed, as one; an image that failed counts by its last shard."""

    totals: Totals = field(default_factory=Totals)
    planned: dict[str, PlannedImage] = field(default_factory=dict)
    num_shards: int = 0

    def add(self, shard: Committed) -> None:
        totals = self.totals
        self.num_shards += 1
        totals.labeled += shard.labeled
        totals.empty += shard.empty
        totals.objects += shard.objects
        totals.truncated += shard.truncated
        totals.noted += shard.noted
        totals.notes.update(shard.notes)
        totals.first_of_many += shard.first_of_many
        for key in shard.settled:
            totals.failures.pop(key, None)
        for key, address, name, code, message in shard.failures:
            self.planned[key] = PlannedImage(key, address, name)
            totals.failures[key] = Entry(
                key, name, "failed", code=code, message=message, run=shard.run
            )


def label_on_cluster(settings: Settings, scaled: ScaledJob, model: ModelSource) -> Report:
    """Labels what is left to label on a Ray cluster; the report, which is also in the target.

    Raises FlorenceError when the run cannot begin; what is committed stays as it is.
    """
    job = scaled.job
    _check_options(scaled)
    check_target(scaled.target)
    target = Storage(scaled.target)
    source = Source(
        scaled.source if is_remote(scaled.source) else str(Path(scaled.source).absolute()),
        recursive=job.recursive,
        skip=target.address,
    )
    if target.local is not None:
        target.local.mkdir(parents=True, exist_ok=True)
    source.check()
    noted = {
        "images": source.address,
        "recursive": job.recursive,
        **journal_settings(settings, model.name),
        "checkpoint": model.fingerprint(),
    }
    manifest = new_manifest(settings, noted)
    work = Work(target, settings, noted, manifest, job.batch, job.coco, job.draw)
    with stop_on_signals(), connected(scaled.address):
        with _noted_as_running(work):
            _begin(work, scaled.shard_size)
            plan = Plan(target, source, scaled.shard_size)
            if job.retry_failed:
                _plan_again(target, plan)
            done = frozenset(committed_numbers(target))
            is_done = plan.listing() is not None and len(done) == plan.num_shards()
        is_on_cpu = scaled.device == "cpu"
        workers = Workers(
            model, noted["checkpoint"], is_on_cpu, scaled.workers, scaled.worker_cores
        )
        pipeline = Pipeline(work, source, scaled.shard_size, workers, done)
        counts, error = (RunCounts(), None) if is_done else _work(pipeline, plan, job)
    # Only now no task of the run commits anything any more.
    if counts.interrupted or error is not None:
        _settled(target)
    if error is not None and not counts.images and not done:
        _keep(work, "failed", counts, str(error))
        raise error
    return _ended(scaled, pipeline, plan, counts, None if error is None else str(error))


def _check_options(scaled: ScaledJob) -> None:
    job = scaled.job
    check_device(scaled.device)
    for option, is_given, instead in (
        ("--overwrite", job.overwrite, "choose another --out"),
        ("--link", job.link, "leave it out: other machines have no file to link"),
        ("--yolo", job.yolo, "a split needs all images: use --coco and join the shards"),
        (
            "--relabel-changed",
            job.relabel_changed,
            "choose another --out, with a table of what changed",
        ),
    ):
        if is_given:
            raise RequestError(
                f"{option} is for a run on one machine and not for --ray; {instead}."
            )


@contextmanager
def _noted_as_running(work: Work) -> Iterator[None]:
    """Before anything else, as others look who is at work before they begin with other settings;
    a run that cannot begin takes its note back."""
    if work.target.read(RUN_NAME) is None and not work.target.is_empty(but=(RUNS, RUN_NAME)):
        raise OutputError(
            f"A run begins in an empty folder and {work.target.address!r} holds something else; "
            "choose another --out."
        )
    _keep(work, "running")
    try:
        yield
    except BaseException:
        # What ended it is to be told, also where the store is what failed.
        with suppress(StorageError):
            work.target.delete(_manifest_name(work.manifest.run))
        raise


def _begin(work: Work, shard_size: int) -> None:
    """The settings of a target that is new; OutputError for one that holds other labels, or that
    a run with other settings may be at work on."""
    target = work.target
    wanted = json.loads(json.dumps({**work.noted, "shard_size": shard_size}))
    text = json.dumps({"format": _FORMAT, "settings": wanted}, ensure_ascii=False, indent=2)
    content = text.encode("utf-8", "backslashreplace")
    stored = target.read(RUN_NAME)
    if stored is None:
        if target.create(RUN_NAME, content):
            return
        stored = target.read(RUN_NAME) or b"{}"
    key = _difference(target, stored, wanted)
    if key is None:
        return
    before = json.loads(stored)["settings"].get(key)
    begun = (
        f"One target holds one kind of labels and {target.address!r} was begun with {key} "
        f"{before!r}, not {wanted.get(key)!r}"
    )
    if committed_numbers(target):
        raise OutputError(f"{begun}; choose another --out.")
    _check_nobody_runs(work, begun)
    # A run that never got to a shard: nothing is lost with it.
    target.write(RUN_NAME, content)
    try:
        # One that began meanwhile has noted that before it read the earlier settings.
        _check_nobody_runs(work, begun)
    except OutputError:
        target.write(RUN_NAME, stored)
        raise
    target.delete(PLAN)


def _check_nobody_runs(work: Work, begun: str) -> None:
    """OutputError where a run over the target may be at work: a killed one cannot be told."""
    own = _manifest_name(work.manifest.run)
    names = [f"{RUNS}/{name}" for name in work.target.names(RUNS) if name.endswith(".json")]
    for name in names:
        stored = None if name == own else work.target.read(name)
        other = None if stored is None else Manifest.of_json(json.loads(stored))
        if other is not None and other.state == "running":
            raise OutputError(
                f"{begun}, by run {other.run}, which is at work or was killed; wait until it ends, "
                "or choose another --out."
            )


def _difference(target: Storage, stored: bytes, wanted: Mapping[str, Any]) -> str | None:
    """The first key that a target was begun with in another way."""
    try:
        before = dict(json.loads(stored)["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{RUN_NAME} says what a run labels with and the one in {target.address!r} does not; "
            "choose another --out."
        ) from error
    for key in [*wanted, *before]:
        is_unknown = key == "checkpoint" and None in (before.get(key), wanted.get(key))
        if before.get(key) != wanted.get(key) and not is_unknown:
            return str(key)
    return None


def _plan_again(target: Storage, plan: Plan) -> None:
    """Shards of what failed; a run that was not listed to its end has to go on first."""
    listing = plan.listing()
    merged = _merged(target)
    if listing is None:
        raise RequestError(
            f"{target.address!r} is not done; go on without --retry-failed, and then retry."
        )
    # A retry that was stopped is gone on with.
    waiting = plan.waiting_again(committed_numbers(target), listing.num_shards)
    failed = [merged.planned[key] for key in merged.totals.failures if key not in waiting]
    if failed:
        plan.again(failed)


def _work(pipeline: Pipeline, plan: Plan, job: Job) -> tuple[RunCounts, FlorenceError | None]:
    """Runs until done, stopped or stuck; the second value says what it stuck on."""
    counts = RunCounts()
    started = time.monotonic()
    total = _Total(plan, len(pipeline.done) * pipeline.shard_size)
    try:
        with (
            progress_bar(total) as advance,
            closing(committed_shards(pipeline)) as committed,
        ):
            for shard in committed:
                counts.images += shard.images
                counts.outcomes.update(
                    labeled=shard.labeled,
                    empty=shard.empty,
                    failed=len(shard.failures),
                    labels=shard.objects,
                )
                counts.seconds = time.monotonic() - started
                advance(shard.images)
                job.max_failures.check(counts.outcomes["failed"], counts.images)
    except KeyboardInterrupt:
        counts.interrupted = True
        say("Stopping; shards that are not committed yet are given up.")
    except FlorenceError as error:
        return counts, error
    finally:
        counts.seconds = time.monotonic() - started
    return counts, None


class _Total:
    """How many images a run has to do, as far as the source was listed; asked now and then."""

    def __init__(self, plan: Plan, num_done: int) -> None:
        self._plan, self._num_done = plan, num_done
        self._looked_s = -_LOOK_AT_PLAN_S
        self._known = 0

    def __call__(self) -> int:
        if time.monotonic() - self._looked_s > _LOOK_AT_PLAN_S:
            # Machines are patient with a store that is gone for a moment, and so is a bar.
            with suppress(StorageError):
                self._known = max(0, self._plan.num_planned() - self._num_done)
            self._looked_s = time.monotonic()
        return self._known


def _ended(
    scaled: ScaledJob, pipeline: Pipeline, plan: Plan, counts: RunCounts, error: str | None
) -> Report:
    work, target = pipeline.work, pipeline.work.target
    state: RunState = "stopped" if counts.interrupted else "failed" if error else "done"
    _keep(work, state, counts, error)
    target.delete(f"{ATTEMPTS}/{work.manifest.run}")
    merged = _merged(target)
    listing = plan.listing()
    if listing is not None and not counts.interrupted and error is None:
        _take_back(target)
        if merged.num_shards == plan.num_shards():
            # Also those of runs that were killed.
            target.delete(ATTEMPTS)
    job = scaled.job
    findings = Findings()
    for one in plan.left_out():
        findings.files.append(one)
        if one.code == "unsupported_kind":
            findings.suffixes[Path(one.path).suffix.lower() or "no suffix"] += 1
    findings.subfolders = (listing or Listing()).subfolders
    report = Report(
        totals=merged.totals,
        run=counts,
        pending=plan.num_planned() - merged.totals.images,
        gone=0,
        changed=(),
        not_renewed=(),
        findings=findings,
        relabel_command=job.command(),
        retry_command=job.command("--retry-failed"),
        resume_command=job.command(),
        settings=work.noted,
        error=error,
    )
    _write(target, report)
    for line in _lines(report, merged, listing, target):
        say(line)
    return report


def _settled(target: Storage) -> None:
    """Returns once nothing is committed any more: processes take a moment to end."""
    before = -1
    for _ in range(_SETTLES):
        now_there = len(target.names(COMMITTED))
        if now_there == before:
            return
        before = now_there
        time.sleep(_SETTLE_S)


def _keep(
    work: Work, state: RunState, counts: RunCounts | None = None, error: str | None = None
) -> None:
    """The run's manifest, as it stands."""
    manifest = work.manifest
    if counts is not None:
        manifest = manifest.ended(state, {"images": counts.images, **counts.outcomes}, error)
    text = json.dumps(manifest.to_json(), ensure_ascii=False, indent=2) + "\n"
    work.target.write(_manifest_name(manifest.run), text.encode("utf-8", "backslashreplace"))


def _manifest_name(run: str) -> str:
    return f"{RUNS}/{run}.json"


def _merged(target: Storage) -> Merged:
    merged = Merged()
    for shard in committed_in(target):
        merged.add(shard)
    return merged


def _take_back(target: Storage) -> None:
    """Folders of attempts that came too late, or ended before they could be committed.

    Of shards that are committed only: another run may be at work on the others.
    """
    holds = {one.shard: one.folder for one in committed_in(target)}
    for name in target.names(SHARDS):
        number = name.removeprefix("shard-").partition("-")[0]
        if number.isdecimal() and holds.get(int(number)) not in (None, f"{SHARDS}/{name}"):
            target.delete(f"{SHARDS}/{name}")


def _write(target: Storage, report: Report) -> None:
    """``report.json``, ``failed.csv`` and the list of the shards."""
    with tempfile.TemporaryDirectory(prefix="florence2-") as folder:
        write_report(report, Workspace(Path(folder)))
        for name in (REPORT_NAME, FAILED_NAME):
            path = Path(folder) / name
            if path.exists():
                target.write(name, path.read_bytes())
            else:
                target.delete(name)
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["shard", "folder", "images", "labeled", "empty", "failed", "objects", "run"])
    for one in committed_in(target):
        failed = len(one.failures)
        rows.writerow(
            [
                one.shard,
                one.folder,
                one.images,
                one.labeled,
                one.empty,
                failed,
                one.objects,
                one.run,
            ]
        )
    target.write(INDEX_NAME, table.getvalue().encode())


def _lines(report: Report, merged: Merged, listing: Listing | None, target: Storage) -> list[str]:
    """The report for a terminal."""
    totals, run = report.totals, report.run
    lines = [f"Stopped early: {report.error}"] if report.error else []
    lines += [
        f"{totals.labeled} labeled ({totals.objects} objects), {totals.empty} with nothing found, "
        f"{totals.failed} failed, in {merged.num_shards} committed shards; this run: {run.images} "
        f"images, {run.images_per_second:.2f} images/s.",
        f"Shards: {target.address}/{INDEX_NAME}",
    ]
    if totals.failures:
        counted = Counter(entry.code for entry in totals.failures.values()).most_common()
        named = ", ".join(f"{count} {code}" for code, count in counted)
        lines.append(f"Failed: {named}; all of them in {target.address}/{FAILED_NAME}")
        lines += [f"  {one.image}: {one.message}" for one in list(totals.failures.values())[:5]]
        lines += ["Retry only these with:", report.retry_command]
    if suffixes := report.findings.suffixes:
        lines.append(
            f"{suffixes.total()} files are of kinds that a project cannot hold, all of them in "
            f"{target.address}/{FAILED_NAME}."
        )
    if listing is not None and listing.num_repeated:
        lines.append(f"{listing.num_repeated} rows name an image again and count once.")
    if listing is None:
        lines += [
            f"The source was listed in part: {report.pending} images that are known are still to "
            "do, and those not yet listed; go on with:",
            report.resume_command,
        ]
    elif report.pending:
        lines += [f"{report.pending} images are still to do; go on with:", report.resume_command]
    return lines
