"""Ray: a cluster, and the stages of a run as a stream of Ray Data over it.

The only module that imports ray. A row is a shard, which Ray Data neither splits nor joins with
others; how many are in flight is its decision, by what its object store holds.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import socket
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from florence2.engine.ask import Ask
from florence2.engine.encoding import AnyImage
from florence2.engine.scheduler import Priority
from florence2.errors import DeviceLostError, FlorenceError, RequestError
from florence2.records import Failure
from serve.labeling.platform_project import ProjectModel
from serve.labeling.run import ModelSource, error_sentence
from serve.predict.predictor import Call, Predictor
from serve.scaling.plan import Plan, Shard, Source
from serve.scaling.pool import ClusterError, WorkerPool
from serve.scaling.shards import (
    Committed,
    ShardImage,
    Work,
    commit_shard,
    committed_numbers,
    committed_shard,
    label_shard,
    open_shard,
)
from serve.scaling.storage import StorageError
from serve.settings import Settings

LOCAL: Final = "local"
AUTO: Final = "auto"
_INSTALL: Final = "pip install 'serve-florence-2[ray]'"
_CONNECT_S: Final = 5.0
# Beside the workers. A plan mostly waits; opening waits for downloads half of its time.
_PLAN_CPUS: Final = 0
_OPEN_CPUS: Final = 0.5
_COMMIT_CPUS: Final = 0.25
# Kills of machines and processes, each of which begins a task anew.
_MAX_RETRIES: Final = "100"
_DEVICE_LOST: Final = 3
# Ray may wait for ever for results that it makes again, once a machine was lost.
_STALL_S: Final = 60.0
_LOOK_S: Final = 1.0
_ROWS_AHEAD: Final = 100
# An image that ends its process is found in the third pass, see ``Attempts``.
_IDLE_PASSES: Final = 5
# A store may be gone for minutes, beyond what its own client tries again.
_STORE_WAIT_S: Final = (5.0, 20.0, 60.0, 120.0)

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Workers:
    """What loads the model, and how often.

    ``model`` is sent to the machines, and ``checkpoint`` its fingerprint where the run was begun.
    ``cores`` are those of a worker on the CPU, ``most`` the number of workers.
    """

    model: ModelSource
    checkpoint: str | None
    is_on_cpu: bool = False
    most: int | None = None
    cores: int = 1


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A run as the cluster is told of it; ``done`` are shards that are committed already."""

    work: Work
    source: Source
    shard_size: int
    workers: Workers
    done: frozenset[int]


@contextmanager
def connected(address: str) -> Iterator[None]:
    """The cluster at ``address``, which is left as it was; RequestError where there is none.

    ``local`` starts one on this machine that ends with the run, ``auto`` finds the one that this
    machine belongs to.
    """
    _check_address(address)
    # Nothing of a run leaves the network that it is in.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Else its workers take the GPUs out of the sight of tasks that ask for none, and warn of it.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TASK_MAX_RETRIES", _MAX_RETRIES)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise RequestError(
            f"--ray needs Ray Data, which is not installed here; {_INSTALL} on every machine."
        ) from error
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        options["include_dashboard"] = False
    try:
        ray.init(address=address, **options)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise RequestError(
            f"No Ray cluster answers at {address!r} ({_first_line(error)}); start one with `ray "
            "start --head`, or use --ray local for this machine alone."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Ray itself looks for half a minute, and says what it found in many lines."""
    if address in (LOCAL, AUTO):
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise RequestError(
            f"A Ray cluster is named by local, auto or HOST:PORT of its head, and {address!r} is "
            "none of them; from outside of a cluster hand the command over by `ray job submit`."
        )
    try:
        socket.create_connection((host, int(port)), _CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise RequestError(
            f"No Ray cluster answers at {address!r} ({error}); give HOST:PORT of its head, which "
            "`ray start --head` shows, or use --ray local."
        ) from error


class Stall:
    """Whether results that a pass waits for were lost with a machine.

    A cluster that grows may lose a machine and still have more of them than it began with. Results
    may come slowly: only much more than the longest time between two of them is too long.
    """

    def __init__(self, now_s: float, machines: Collection[str]) -> None:
        self._seen = set(machines)
        self._last_s, self._longest_s = now_s, 0.0

    def came(self, now_s: float) -> None:
        """A result is there."""
        self._longest_s = max(self._longest_s, now_s - self._last_s)
        self._last_s = now_s

    def is_certain(self, now_s: float, machines: Collection[str]) -> bool:
        """To be asked now and then, with the machines of the moment."""
        self._seen.update(machines)
        waited_s = now_s - self._last_s
        return waited_s > max(_STALL_S, 3 * self._longest_s) and not self._seen <= {*machines}


def patient_shards(
    plan: Plan, done: Collection[int], sleep: Callable[[float], None] = time.sleep
) -> Iterator[Shard]:
    """The shards that are not ``done``, each once; a store that is gone for minutes is waited for.

    Raises StorageError where it stays away.
    """
    given = set(done)
    waits_s = deque(_STORE_WAIT_S)
    while True:
        try:
            for shard in plan.shards():
                if shard.number not in given:
                    given.add(shard.number)
                    waits_s = deque(_STORE_WAIT_S)
                    yield shard
            return
        except StorageError:
            if not waits_s:
                raise
            sleep(waits_s.popleft())


def committed_shards(
    pipeline: Pipeline, one_pass: Callable[[Pipeline], Iterator[Committed]] | None = None
) -> Generator[Committed]:
    """Runs the pipeline on the connected cluster; each shard as it is committed, in any order.

    A worker that ends takes the shards in its hands with it, and the pass goes on without: Ray
    would keep them for it until there is room for another one, which may be never. What is left
    at the end of a pass is in the next one. Close it to stop. Raises the FlorenceError that ends a
    run, and ClusterError. ``one_pass`` gives what of a pipeline comes through in one pass, or ends
    it by PassEndedError.
    """
    target = pipeline.work.target
    plan = Plan(target, pipeline.source, pipeline.shard_size)
    done, num_idle, reason = set(pipeline.done), 0, ""
    while True:
        before = len(done)
        try:
            for found in (one_pass or _one_pass)(replace(pipeline, done=frozenset(done))):
                done.add(found.shard)
                yield found
        except PassEndedError as error:
            reason = f" ({error})"
        # A shard may be committed by a task whose machine ended before it could say so.
        for number in committed_numbers(target) - done:
            done.add(number)
            if (shard := committed_shard(target, number)) is not None:
                yield shard
        if plan.listing() is not None and len(done) >= plan.num_shards():
            return
        num_idle = 0 if len(done) > before else num_idle + 1
        if num_idle == _IDLE_PASSES:
            raise ClusterError(
                f"{plan.num_shards() - len(done)} shards were given to the cluster {num_idle} "
                f"times and none was committed{reason}; look at Ray's own logs, and go on with the "
                "same command."
            )


def _one_pass(pipeline: Pipeline) -> Iterator[Committed]:
    import ray

    context = ray.data.DataContext.get_current()
    # A row a block, however small: a shard is on its way as soon as it is planned.
    context.target_max_block_size = 1
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # What our own code raises is a row, so these are shards of workers that ended.
    context.max_errored_blocks = -1
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    found = _rows_of(pipeline)
    stall = Stall(time.monotonic(), _machines())
    while True:
        try:
            row = found.get(timeout=_LOOK_S)
        except queue.Empty:
            if stall.is_certain(time.monotonic(), _machines()):
                _reconnect()
                raise PassEndedError("nothing came any more after a machine was lost") from None
            continue
        stall.came(time.monotonic())
        if row is None:
            return
        if isinstance(row, BaseException):
            raise row
        yield row


def _rows_of(pipeline: Pipeline) -> queue.Queue[Any]:
    """What comes out of a pass, then None or what ended it; taken by a thread of its own."""
    import ray

    found: queue.Queue[Any] = queue.Queue(maxsize=_ROWS_AHEAD)

    def take() -> None:
        try:
            rows = _streamed(pipeline).iter_batches(
                batch_size=1, prefetch_batches=0, batch_format="pyarrow"
            )
            for batch in rows:
                for row in _unpacked(batch):
                    found.put(row)
            found.put(None)
        except ray.exceptions.RayError as error:
            found.put(PassEndedError(_first_line(error)))
        # It is raised where the rows are taken.
        except BaseException as error:  # noqa: BLE001
            found.put(error)

    threading.Thread(target=take, name="rows", daemon=True).start()
    return found


def _machines() -> set[str]:
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _reconnect() -> None:
    """Ends all tasks of the run, as a job ends with its driver, and begins a job anew."""
    import ray

    address = ray.get_runtime_context().gcs_address
    ray.shutdown()
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)


class PassEndedError(Exception):
    """Ray gave a pass up, as it does for a result that was on a machine that ended."""


def _streamed(pipeline: Pipeline) -> Any:  # noqa: ANN401 - a ray.data.Dataset
    import ray
    from ray.data import ActorPoolStrategy

    workers = pipeline.workers
    resources = ray.cluster_resources()
    has_gpus = resources.get("GPU", 0) > 0 and not workers.is_on_cpu
    most = workers.most
    if has_gpus:
        # More workers come when the cluster grows.
        needs: dict[str, float] = {"num_gpus": 1}
        opening, committing = {"num_cpus": _OPEN_CPUS}, {"num_cpus": _COMMIT_CPUS}
    else:
        # Workers may take all the cores that are left when a machine is lost, and must be fed.
        most = most or max(1, int((resources.get("CPU", 1) - 1) / workers.cores))
        needs = {"num_cpus": workers.cores}
        opening = committing = {"num_cpus": 0, "concurrency": most}
    rows = {"batch_size": 1, "batch_format": "pyarrow"}
    with warnings.catch_warnings():
        # Of Ray, which has no other way to say what it is to do with workers that end.
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        return (
            ray.data.range(1, override_num_blocks=1)
            .map_batches(_plan, fn_kwargs={"pipeline": pipeline}, num_cpus=_PLAN_CPUS, **rows)
            .map_batches(
                _open,
                fn_kwargs={"work": pipeline.work, "model": workers.model.name},
                **opening,
                **rows,
            )
            .map_batches(
                _Worker,
                fn_constructor_kwargs={"work": pipeline.work, "workers": workers},
                compute=ActorPoolStrategy(min_size=1, max_size=most),
                max_restarts=0,
                max_task_retries=0,
                **needs,
                **rows,
            )
            .map_batches(_commit, fn_kwargs={"work": pipeline.work}, **committing, **rows)
        )


def check_device(device: str) -> None:
    """RequestError for a device that Ray cannot give to each worker."""
    if device not in ("auto", "cpu", "cuda"):
        raise RequestError(
            f"Ray gives each worker a device, and --device {device!r} names one; leave it out, or "
            "give cpu."
        )


def project_workers(
    load: Callable[[], ProjectModel],
    adapter: str | None,
    *,
    is_on_cpu: bool,
    most: int | None,
    cores: int,
) -> WorkerPool:
    """Workers of the connected cluster for a run whose images its driver brings and takes.

    One for each GPU that is there, or for ``cores`` cores where there is none; at most ``most``.
    """
    import ray

    resources = ray.cluster_resources()
    num_gpus = 0 if is_on_cpu else int(resources.get("GPU", 0))
    # The driver needs some of a core, if nobody says otherwise.
    num_cpus = resources.get("CPU", 1) - (most is None)
    num_places = num_gpus or max(1, int(num_cpus / cores))
    needs = {"num_gpus": 1} if num_gpus else {"num_cpus": cores}
    actor = ray.remote(max_restarts=0, max_task_retries=0, **needs)(_Answering)
    count = num_places if most is None else min(num_places, most)
    return WorkerPool(lambda: _RayWorker(actor.remote(load, adapter)), count)


class _RayWorker:
    """A ``Worker`` that is an actor."""

    def __init__(self, actor: Any) -> None:  # noqa: ANN401
        self._actor = actor
        self.told: Future[Any] = actor.told.remote().future()

    def predict(self, images: Sequence[AnyImage], settings: Settings) -> Future[Any]:
        sent: Future[Any] = self._actor.predict.remote(images, settings).future()
        return sent

    def ask(self, asks: Sequence[Ask]) -> Future[Any]:
        sent: Future[Any] = self._actor.ask.remote(asks).future()
        return sent


class _Answering:
    """A process with the model of a run over a project."""

    def __init__(self, load: Callable[[], ProjectModel], adapter: str | None) -> None:
        self._model = _outcome(load)
        self._adapter = adapter

    def told(self) -> object:
        return self._given(lambda model: model.told(self._adapter))

    def predict(self, images: Sequence[AnyImage], settings: Settings) -> object:
        return self._given(lambda model: model.predict(images, settings, Call(Priority.BULK)))

    def ask(self, asks: Sequence[Ask]) -> object:
        return self._given(lambda model: model.ask(asks, Call(Priority.BULK)))

    def _given(self, work: Callable[[ProjectModel], object]) -> object:
        model = self._model
        if isinstance(model, FlorenceError):
            return model

        def done() -> object:
            found = work(model)
            for one in found if isinstance(found, list) else ():
                if isinstance(one, Failure) and one.code == DeviceLostError.code:
                    raise DeviceLostError(one.message)
            return found

        return _outcome(done)


def _plan(batch: Any, pipeline: Pipeline) -> Iterator[Any]:  # noqa: ANN401
    """One task for the whole source. Begun again it gives the same shards: what is done is known
    from the start."""
    plan = Plan(pipeline.work.target, pipeline.source, pipeline.shard_size)
    try:
        for shard in patient_shards(plan, pipeline.done):
            yield _packed(shard)
    except FlorenceError as error:
        yield _packed(error)


def _open(batch: Any, work: Work, model: str) -> Any:  # noqa: ANN401
    def opened(one: Shard | FlorenceError) -> object:
        if isinstance(one, FlorenceError):
            return one
        return _outcome(lambda: (one, open_shard(work, one, _preparer(model))))

    return _packed(*map(opened, _unpacked(batch)))


class _Worker:
    """A process with the model, on a GPU or some cores."""

    def __init__(self, work: Work, workers: Workers) -> None:
        self._work = work
        self._predictor = _outcome(lambda: _predictor(workers))

    def __call__(self, batch: Any) -> Any:  # noqa: ANN401
        return _packed(*map(self._labeled, _unpacked(batch)))

    def _labeled(self, one: FlorenceError | tuple[Shard, list[ShardImage]]) -> object:
        predictor = self._predictor
        if isinstance(one, FlorenceError):
            return one
        if isinstance(predictor, FlorenceError):
            return predictor
        shard, images = one
        problem = _outcome(lambda: label_shard(self._work, shard, images, predictor))
        return problem or (shard, images)


def _commit(batch: Any, work: Work) -> Any:  # noqa: ANN401
    def committed(one: FlorenceError | tuple[Shard, list[ShardImage]]) -> object:
        if isinstance(one, FlorenceError):
            return one
        return _outcome(lambda: commit_shard(work, *one))

    return _packed(*map(committed, _unpacked(batch)))


def _outcome(work: Callable[[], Made]) -> Made | FlorenceError:
    """What ``work`` gives, or why the run ends; done again where the store failed."""
    try:
        for wait_s in _STORE_WAIT_S:
            try:
                return work()
            except StorageError as error:
                logging.getLogger(__name__).warning("%s Tried again in %.0f s.", error, wait_s)
                time.sleep(wait_s)
        return work()
    except DeviceLostError:
        # A device that is lost is lost to this process: a new one takes the shard.
        os._exit(_DEVICE_LOST)
    except FlorenceError as error:
        return error
    # Ray would only say that a task failed.
    except Exception as error:  # noqa: BLE001
        return FlorenceError(error_sentence(error))


_preparers: Final[dict[str, Any]] = {}


def _preparer(model: str) -> Any:  # noqa: ANN401 - a Preparer
    """What scales images as the checkpoint wants them, without its weights; kept by the process."""
    if model not in _preparers:
        from florence2.checkpoint.catalog import resolve
        from florence2.engine.encoding import Preparer
        from florence2.pixels import ImageProcessor

        files = resolve(model)
        folder = (files.base or files).folder
        _preparers[model] = Preparer(ImageProcessor.from_folder(folder), threads=1)
    return _preparers[model]


def _predictor(workers: Workers) -> Predictor:
    found = workers.model.fingerprint()
    if None not in (found, workers.checkpoint) and found != workers.checkpoint:
        raise RequestError(
            f"All machines label with one checkpoint, and {workers.model.name!r} on "
            f"{socket.gethostname()!r} is another one than where the run was begun; put the same "
            "files there."
        )
    return workers.model.load()


def _packed(*rows: object) -> Any:  # noqa: ANN401 - a pyarrow.Table
    import pyarrow as pa

    packed = [pickle.dumps(row, pickle.HIGHEST_PROTOCOL) for row in rows]
    return pa.table({"packed": pa.array(packed, pa.large_binary())})


def _unpacked(batch: Any) -> list[Any]:  # noqa: ANN401 - of a pyarrow.Table
    """What ``_packed`` has of processes of this run."""
    return [pickle.loads(one.as_buffer()) for one in batch.column("packed")]


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
