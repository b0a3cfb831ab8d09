"""Which checkpoint answers now: chosen, loaded, switched, put to sleep, loaded again, stopped."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch

from florence2.api import RUNTIMES, Florence2
from florence2.conversion.kept import check_choice
from florence2.engine.scheduler import Observer, Scheduler
from florence2.errors import DeviceError, RequestError, StoppedError, unknown_name
from florence2.runtimes.device import (
    PRECISIONS,
    SCHEMES,
    check_precision,
    choose_device,
    missing_gpu,
)
from florence2.workers import DeviceWorker, WorkerPlan, share_cores
from serve.naming import FIXED_SHAPES, class_color
from serve.platform.experiments import EXPERIMENTS
from serve.predict.annotations import TAG_METAS
from serve.sdk import sly

logger = logging.getLogger(__name__)


class IdleTimer:
    """``action`` runs when ``timeout_s`` have passed since the last ``touch``; one timer at most.

    The SDK starts a thread for every request instead, and loses some when requests are parallel.
    """

    def __init__(self, action: Callable[[], object]) -> None:
        self._action = action
        self._lock = threading.Lock()
        self._touched = 0.0
        self._timer: threading.Timer | None = None

    def touch(self, timeout_s: float) -> None:
        """Something happened; begin to wait again."""
        with self._lock:
            self._touched = time.monotonic()
            if self._timer is None:
                self._start(timeout_s, timeout_s)

    def cancel(self) -> None:
        """Nothing to wait for until the next ``touch``."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _start(self, wait_s: float, timeout_s: float) -> None:
        self._timer = threading.Timer(wait_s, self._look, (timeout_s,))
        self._timer.daemon = True
        self._timer.start()

    def _look(self, timeout_s: float) -> None:
        with self._lock:
            left = self._touched + timeout_s - time.monotonic()
            if self._timer is None:
                return
            if left > 0:
                self._start(left, timeout_s)
                return
            self._timer = None
        try:
            self._action()
        # A timer thread has nobody to tell; the model stays where it is.
        except Exception:
            logger.exception("The idle model could not be moved away")


PRETRAINED: Final = "Pretrained models"
CUSTOM: Final = "Custom models"
"""Where models come from, as the SDK writes it: published ones, and fine-tunes in team files."""
AUTO: Final = "auto"
RUNTIME_NAMES: Final = {"torch": "PyTorch", "openvino": "OpenVINO"}
"""Runtimes of the engine, and as the SDK and the page write them."""
_SDK_NAMES: Final = tuple(RUNTIME_NAMES.values())
DEFAULT_MODEL: Final = "Florence-2-large"
ALLOW_DEPLOY_VARIABLE: Final = "FLORENCE_ALLOW_DEPLOY"
DEVICES_VARIABLE: Final = "FLORENCE_DEVICES"
"""All devices that an app on the platform uses beside the one that is chosen: all, or a list."""
PRECISION_CHOICES: Final = (
    *PRECISIONS,
    *(name for scheme in SCHEMES for name in (scheme, f"{scheme}:all")),
)
"""What pages offer, where a device has it; int8 and nf4 have more parts."""


def device_name(device: object) -> str:
    """The device's name, chosen here when the caller did not: a GPU if there is one."""
    if device in (None, "", "auto"):
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if not isinstance(device, str):
        raise RequestError(
            f"A device is a name such as cpu or cuda:0, and {device!r} was received; name one."
        )
    return device


def check_runtime(runtime: object) -> str:
    """The runtime as the SDK writes it, or auto; RequestError for one that this app does not have.

    Both the SDK's names and the engine's are understood.
    """
    if runtime in (None, ""):
        return AUTO
    known = {AUTO: AUTO, **RUNTIME_NAMES, **{name.lower(): name for name in _SDK_NAMES}}
    if not isinstance(runtime, str) or runtime.lower() not in known:
        raise RequestError(unknown_name("runtime", str(runtime), [AUTO, *_SDK_NAMES]))
    return known[runtime.lower()]


def engine_runtime(runtime: object) -> str:
    """The runtime as the engine writes it, or auto."""
    named = check_runtime(runtime)
    return next((name for name, shown in RUNTIME_NAMES.items() if shown == named), AUTO)


def named_model(name: str, models: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of ``models.json`` for a name; for another checkpoint a row of its own."""
    for row in models:
        if row["meta"]["model_name"].lower() == name.lower():
            return dict(row)
    return {
        "Model": name,
        "meta": {
            "task_type": "prompt-based object detection",
            "model_name": name,
            "model_files": {"checkpoint": name},
        },
    }


def params_for(
    row: dict[str, Any], device: object, runtime: object = None, precision: object = None
) -> dict[str, Any]:
    """What ``_load_model_headless`` takes for a row of ``models.json``."""
    files = dict(row["meta"]["model_files"])
    return _params(PRETRAINED, files, row, device, runtime, precision)


def _params(
    source: str,
    files: dict[str, Any],
    info: dict[str, Any],
    device: object,
    runtime: object,
    precision: object,
) -> dict[str, Any]:
    chosen = device_name(device)
    params: dict[str, Any] = {
        "model_source": source,
        "model_files": files,
        "model_info": info,
        "device": chosen,
        "runtime": check_runtime(runtime),
    }
    if precision not in (None, ""):
        params["precision"] = str(precision).lower()
    if params["runtime"] != AUTO or "precision" in params:
        # Before anything that runs is stopped for it.
        asked = params.get("precision", AUTO)
        check_precision(asked, choose_device(chosen))
        check_choice(engine_runtime(runtime), choose_device(chosen), asked)
    return params


def params_for_name(
    name: str, models: Sequence[dict[str, Any]], device: object, runtime: object = None
) -> dict[str, Any]:
    """As ``params_for``, for any checkpoint's name or the path of a fine-tune in team files."""
    if name.startswith(f"{EXPERIMENTS}/") and not Path(name).is_dir():
        return _params(CUSTOM, {"checkpoint": name}, {}, device, runtime, None)
    return params_for(named_model(name, models), device, runtime)


def params_from_state(
    state: dict[str, Any], models: Sequence[dict[str, Any]], allowed: Collection[str] = ()
) -> dict[str, Any]:
    """The deployment that a ``/deploy_from_api`` request asks for.

    ``allowed`` are names beside those of ``models``: a name can be a folder, or any repository of
    the hub. Raises RequestError for what cannot be deployed, before anything that runs is touched.
    """
    given = state.get("deploy_params")
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise RequestError(
            f"deploy_params is an object, and {type(given).__name__} was received; send "
            '{"deploy_params": {"device": "cuda:0"}, "model_name": "Florence-2-base"}.'
        )
    source = given.get("model_source") or PRETRAINED
    how = given.get("device"), given.get("runtime"), given.get("precision")
    if source == CUSTOM:
        files = given.get("model_files")
        checkpoint = files.get("checkpoint") if isinstance(files, dict) else None
        return _params(CUSTOM, {"checkpoint": checkpoint}, {}, *how)
    if source != PRETRAINED:
        raise RequestError(
            f"Models come from the list of this app or from team files ({CUSTOM!r}), and source "
            f"{source!r} was received; send a model_name."
        )
    return params_for(_row_of(state, given, models, allowed), *how)


def _row_of(
    state: dict[str, Any],
    given: dict[str, Any],
    models: Sequence[dict[str, Any]],
    allowed: Collection[str],
) -> dict[str, Any]:
    files, info = given.get("model_files") or {}, given.get("model_info") or {}
    meta = info.get("meta") if isinstance(info, dict) else None
    name = (
        state.get("model_name")
        or (meta or {}).get("model_name")
        or (files.get("checkpoint") if isinstance(files, dict) else None)
        or DEFAULT_MODEL
    )
    known = [row["meta"]["model_name"] for row in models]
    is_known = isinstance(name, str) and name.lower() in [one.lower() for one in known]
    if not is_known and name not in allowed:
        choices = list(dict.fromkeys([*known, *allowed]))
        raise RequestError(
            f"{unknown_name('model', str(name), choices)} Others can be deployed by a request once "
            f"the app is started with their names in --allow-deploy or {ALLOW_DEPLOY_VARIABLE}."
        )
    return named_model(name, models)


def deployable_on(device: str) -> dict[str, list[str]]:
    """The names of runtimes and precisions that a request can deploy on a device."""
    chosen = choose_device(device)
    runtimes = [name for name in RUNTIMES if _is_possible(name, chosen, AUTO)]
    precisions = [name for name in PRECISION_CHOICES if _is_possible(AUTO, chosen, name)]
    return {"runtimes": runtimes, "precisions": [AUTO, *precisions]}


def _is_possible(runtime: str, device: torch.device, precision: str) -> bool:
    try:
        check_precision(precision, device)
        check_choice(runtime, device, precision)
    except DeviceError:
        return False
    return True


MAX_LEARNT: Final = 1000

GEOMETRIES: Final = {"rectangle": sly.Rectangle, "polygon": sly.Polygon, "bitmap": sly.Bitmap}
_FIXED: Final = tuple(
    sly.ObjClass(name, GEOMETRIES[shape], class_color(name)) for name, shape in FIXED_SHAPES.items()
)


class ModelMeta:
    """A growing ``sly.ProjectMeta``; safe to use from any thread.

    At most ``max_learnt`` classes are remembered beside the fixed ones; those seen longest ago go
    first. A class that is seen in a second shape becomes one of any shape, so that every
    annotation that was learnt can be read with a snapshot; a fixed class keeps its shape.

    ``own_classes`` gives those of the model that is deployed now: a fine-tune has some.
    """

    def __init__(
        self,
        max_learnt: int = MAX_LEARNT,
        own_classes: Callable[[], tuple[sly.ObjClass, ...]] = tuple,
    ) -> None:
        self._max_learnt = max_learnt
        self._own_classes = own_classes
        self._learnt: dict[str, sly.ObjClass] = {}
        self._own: tuple[sly.ObjClass, ...] = ()
        self._lock = threading.Lock()
        self._snapshot: sly.ProjectMeta = _meta_of(())

    def snapshot(self) -> sly.ProjectMeta:
        """All classes and tags as they are now; it never changes."""
        own = self._own_classes()
        with self._lock:
            if own is not self._own:
                self._own = own
                self._snapshot = _meta_of(own, self._learnt)
            return self._snapshot

    def learn(self, annotation: sly.Annotation) -> None:
        """Adds the classes of an annotation's labels."""
        with self._lock:
            before = self._shapes()
            for label in annotation.labels:
                seen = label.obj_class
                if seen.name not in FIXED_SHAPES:
                    known = self._learnt.pop(seen.name, seen)
                    self._learnt[seen.name] = _both(known, seen)
            self._forget_and_tell(before)

    def expect(self, classes: Iterable[sly.ObjClass]) -> None:
        """Adds classes that were asked for: clients read the list once, and not each is found then.

        One that is known keeps its shape.
        """
        with self._lock:
            before = self._shapes()
            for asked in classes:
                if asked.name not in FIXED_SHAPES:
                    self._learnt[asked.name] = self._learnt.pop(asked.name, asked)
            self._forget_and_tell(before)

    def _forget_and_tell(self, before: Mapping[str, type]) -> None:
        while len(self._learnt) > self._max_learnt:
            self._learnt.pop(next(iter(self._learnt)))
        if self._shapes() != before:
            self._snapshot = _meta_of(self._own, self._learnt)

    def _shapes(self) -> dict[str, type]:
        """To see a change by: to the SDK a class of any shape equals one of a certain shape."""
        return {name: obj_class.geometry_type for name, obj_class in self._learnt.items()}


def _both(known: sly.ObjClass, seen: sly.ObjClass) -> sly.ObjClass:
    if known.geometry_type in (seen.geometry_type, sly.AnyGeometry):
        return known
    return known.clone(geometry_type=sly.AnyGeometry)


def _meta_of(
    own: Iterable[sly.ObjClass], learnt: Mapping[str, sly.ObjClass] = MappingProxyType({})
) -> sly.ProjectMeta:
    """A fine-tune's own classes come first: they are what people look for in the list."""
    first = [_both(one, learnt.get(one.name, one)) for one in own if one.name not in FIXED_SHAPES]
    named = {one.name for one in first}
    others = [one for one in learnt.values() if one.name not in named]
    return sly.ProjectMeta([*first, *_FIXED, *others], tag_metas=list(TAG_METAS.values()))


MAX_QUEUED: Final = 4096
IDLE_S: Final = 3600.0
RELOADING: Final = (
    "The device failed, and the model is being loaded again; send the request again when "
    "/is_ready says so."
)
NOT_DEPLOYED: Final = (
    "No model is deployed, so nothing can be answered; choose a model and press Serve, or send "
    "the request again when /is_ready says so."
)


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """A checkpoint's name, id or folder, and how it is to run.

    ``is_cpu_asked_for``: nobody is to be warned that it runs on the CPU. ``title``: what people are
    told in the place of a folder.
    """

    name: str
    device: str = "auto"
    precision: str = "auto"
    runtime: str = "auto"
    is_cpu_asked_for: bool = False
    title: str | None = None
    adapters: tuple[tuple[str, str], ...] = ()
    """Names that requests may give, each with an adapter's folder or hub id."""
    other_devices: tuple[str, ...] = ()
    """Further devices, each with a process of its own that answers beside this one."""
    own_classes: tuple[sly.ObjClass, ...] = field(default=(), compare=False)
    """What a fine-tune finds; of a published model nothing is known."""
    own_settings: Mapping[str, object] = field(default_factory=dict, compare=False)
    """What a fine-tune was trained to be asked with."""

    @property
    def shown(self) -> str:
        """What people are told."""
        return self.title or self.name


@dataclass(frozen=True, slots=True, eq=False)
class Deployed:
    """A model that has answered its self-test, and the one thread that runs it."""

    choice: ModelChoice
    model: Florence2
    scheduler: Scheduler

    def told(self, adapter: str | None = None) -> dict[str, str]:
        """What a run's manifest says of the model, with the ``adapter`` that it is asked with."""
        checkpoint = self.model.engine.model_of(adapter).checkpoint
        told = {
            "name": self.choice.shown,
            "revision": self.model.engine.checkpoint.revision,
            "adapter": None if checkpoint.adapter is None else checkpoint.name,
            "adapter_sha256": None if checkpoint.adapter is None else checkpoint.adapter.sha256,
            "precision": self.model.precision,
            "runtime": self.model.runtime,
        }
        return {key: value for key, value in told.items() if value is not None}


class Deployment:
    """At most one model at a time. Safe to use from several threads.

    Two models do not fit on every device, so the one before is freed before the next is loaded,
    and loaded again if the next one fails.

    A model whose device failed for good is loaded again, once. If that fails, or its device fails
    a second time, ``on_hopeless`` is called with a sentence: nothing but a new process helps.

    After an hour without a ``touch`` its weights leave the device.
    """

    def __init__(
        self,
        observer: Observer | None = None,
        *,
        max_batch: int | None = None,
        max_queued: int = MAX_QUEUED,
        load: Callable[[ModelChoice], Florence2] | None = None,
        on_hopeless: Callable[[str], None] | None = None,
    ) -> None:
        self.device_warning: str | None = None
        """That the model is slow for want of a GPU that could be there."""
        self._observer = observer
        self._on_hopeless = on_hopeless
        self._has_reloaded = False
        self._why_none = NOT_DEPLOYED
        self._max_batch = max_batch
        self._max_queued = max_queued
        self._load = load or _load
        self._current: Deployed | None = None
        self._is_frozen = False
        self._is_loading = False
        self._idle = IdleTimer(self._freeze_idle)
        self._lock = threading.RLock()

    @property
    def current(self) -> Deployed:
        """The deployed model; StoppedError when there is none."""
        current = self._current
        if current is None:
            raise StoppedError(self._why_none)
        return current

    @property
    def is_deployed(self) -> bool:
        return self._current is not None

    @property
    def num_devices(self) -> int:
        """How many answer side by side."""
        current = self._current
        return 1 if current is None else current.scheduler.num_devices

    @property
    def is_ready(self) -> bool:
        """Whether a request would be answered: a model is deployed, and its device works."""
        current = self._current
        return current is not None and not current.model.engine.is_lost

    @property
    def is_coming(self) -> bool:
        """Whether a model is being loaded, or about to be as the device of the last one failed."""
        return self._is_loading or not (self._current is None or self.is_ready)

    @property
    def is_frozen(self) -> bool:
        """Whether the weights are away from the device until the next request."""
        return self._is_frozen

    def own_classes(self) -> tuple[sly.ObjClass, ...]:
        """Of the deployed model; nothing without one."""
        current = self._current
        return () if current is None else current.choice.own_classes

    @property
    def own_settings(self) -> Mapping[str, object]:
        """Of the deployed model; nothing without one."""
        current = self._current
        return {} if current is None else current.choice.own_settings

    @property
    def device_bytes(self) -> float:
        """Memory that the model takes on its device; 0 without a model."""
        current = self._current
        return 0.0 if current is None else float(current.model.engine.memory_bytes)

    def switch(self, choice: ModelChoice) -> Deployed:
        """Frees the model before and loads ``choice``; what fails leaves the one before running.

        Requests that wait are refused, to be sent again. Raises CheckpointError or DeviceError.
        """
        with self._lock, self._loading():
            before = self._current
            self._free()
            self._has_reloaded = False
            try:
                self._current = self._started(choice)
            except BaseException:
                if before is not None:
                    self._bring_back(before.choice)
                raise
            self.device_warning = _warning_of(self._current)
            return self._current

    def stop(self) -> None:
        """Ends the model and frees its memory; nothing happens when there is none."""
        with self._lock:
            self._idle.cancel()
            self.device_warning = None
            self._free()

    def touch(self) -> None:
        """The model is in use; begin to wait again until it is idle."""
        self._idle.touch(IDLE_S)

    def freeze(self) -> str:
        """Moves the weights from the device to memory; what was done, in a sentence.

        Raises StoppedError when no model is deployed.
        """
        # While another model is loaded there is none, which nobody has to wait for to be told.
        current = self.current
        with self._lock:
            current = self.current
            if self._is_frozen:
                return "The model is in memory already; the next request brings it back."
            if current.model.device == "cpu":
                return f"The model runs on {current.model.device}, so there is no device to free."
            current.scheduler.park()
            self._is_frozen = True
        return "The model was moved to memory; the next request brings it back."

    def wake(self) -> None:
        """Moves the weights of a frozen model back to its device."""
        if not self._is_frozen:
            return
        with self._lock:
            current = self._current
            if self._is_frozen and current is not None:
                current.scheduler.resume()
            self._is_frozen = False

    def reload(self) -> None:
        """Loads the model again whose device failed, unless another was chosen meanwhile."""
        with self._lock, self._loading():
            lost = self._current
            if lost is None or not lost.model.engine.is_lost:
                return
            logger.error(
                "%s: its device failed; requests in hand failed with it", lost.choice.shown
            )
            self._free()
            self._why_none = RELOADING
            hopeless = (
                f"The device of {lost.choice.shown} failed and the model cannot be loaded again in "
                "this process; start it anew."
            )
            if not self._has_reloaded:
                self._has_reloaded = True
                self._bring_back(lost.choice)
            if self._current is not None:
                logger.warning("%s was loaded again and answers", lost.choice.shown)
                return
            self._why_none = hopeless
        logger.error("%s", hopeless)
        if self._on_hopeless is not None:
            self._on_hopeless(hopeless)

    @contextmanager
    def _loading(self) -> Iterator[None]:
        self._is_loading = True
        try:
            yield
        finally:
            self._is_loading = False

    def _free(self) -> None:
        before, self._current, self._is_frozen = self._current, None, False
        self._why_none = NOT_DEPLOYED
        if before is not None:
            before.scheduler.close()
            before.model.close()

    def _started(self, choice: ModelChoice) -> Deployed:
        # Every thread that computes gets workers of its own from OpenMP, and with more workers
        # than cores it puts them to sleep between any two operations: a request then takes three
        # times as long. So the thread that loads ends, and its workers with it.
        cores = share_cores(choice.device, choice.other_devices)
        with ThreadPoolExecutor(1, thread_name_prefix="load") as loading:
            model = loading.submit(self._load, choice).result()
        scheduler = Scheduler(
            model.engine,
            max_batch=self._max_batch,
            max_queued=self._max_queued,
            observer=self._observer,
            on_lost=self._on_lost,
            others=others_of(model, choice, cores, max_batch=self._max_batch),
        )
        return Deployed(choice, model, scheduler)

    def _on_lost(self) -> None:
        """On the model's thread, which has to end before its model can be freed."""
        threading.Thread(target=self.reload, name="reload", daemon=True).start()

    def _bring_back(self, choice: ModelChoice) -> None:
        try:
            self._current = self._started(choice)
        # The error that is on its way up says why; that nothing runs now is for the log.
        except Exception:
            logger.exception("%s could not be loaded again", choice.shown)

    def _freeze_idle(self) -> None:
        if self.is_deployed:
            logger.info(self.freeze())


def others_of(
    model: Florence2,
    choice: ModelChoice,
    cores: Sequence[tuple[int, ...] | None],
    *,
    max_batch: int | None = None,
    has_clicks: bool = True,
) -> list[DeviceWorker]:
    """The choice's other devices, each to run what ``model`` turned out to be.

    ``cores`` are those of every device, the model's own first, see ``share_cores``.
    """
    return [
        DeviceWorker(
            WorkerPlan(
                choice.name,
                device,
                # What was measured and chosen for the first holds for all.
                model.runtime,
                model.precision,
                choice.title,
                choice.adapters,
                max_batch,
                model.engine.cache.max_bytes,
                has_clicks,
                own_cores,
            ),
            model.engine.preparer,
        )
        for device, own_cores in zip(choice.other_devices, cores[1:], strict=True)
    ]


def _load(choice: ModelChoice) -> Florence2:
    from florence2_demo.calibration import calibration_scenes

    return Florence2.load(
        choice.name,
        choice.device,
        choice.runtime,
        precision=choice.precision,
        calibration=calibration_scenes,
        title=choice.title,
        adapters=dict(choice.adapters),
    )


def _warning_of(deployed: Deployed) -> str | None:
    model = deployed.model
    if model.device != "cpu" or deployed.choice.is_cpu_asked_for or not (why := missing_gpu()):
        return None
    warning = (
        f"{model.name} runs on the CPU. {why} The image of the self-test, with a caption of a "
        f"few words, took {model.engine.self_test_s:.2g} s."
    )
    logger.warning(warning)
    return warning
