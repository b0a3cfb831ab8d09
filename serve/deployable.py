"""Loading, switching, freezing and stopping a model, in the SDK's terms."""

from __future__ import annotations

import argparse
import copy
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import psutil
import yaml

from florence2.api import Florence2
from florence2.budget import open_pixels
from florence2.checkpoint.catalog import DEMO, resolve
from florence2.checkpoint.hub import ProgressUpdate
from florence2.runtimes.device import missing_gpu
from serve.gui import florence_gui
from serve.http.bodies import held_bytes
from serve.http.metrics import Metrics
from serve.http.origins import entries_of
from serve.http.waiting import use_own_threads
from serve.local_server import LocalServer
from serve.model_service import (
    ALLOW_DEPLOY_VARIABLE,
    MAX_QUEUED,
    PRECISION_NAMES,
    Deployment,
    IdleTimer,
    ModelChoice,
    ModelMeta,
    check_runtime,
    device_name,
    named_model,
    params_for,
    params_from_state,
)
from serve.predict.predictor import Predictor
from serve.process import end_process
from serve.sdk import sly

# isort: split
from supervisely.app.fastapi.subapp import SUPERVISELY_SERVER_PATH_PREFIX, _MainServer
from supervisely.nn.inference import PromptBasedObjectDetection

logger = logging.getLogger(__name__)

_HERE: Final = Path(__file__).resolve().parent
# Where the SDK looks for a folder of its own; without one of them it refuses to start.
_DATA_DIR_VARIABLES: Final = ("SLY_APP_DATA_DIR", "DEBUG_APP_DIR", "TASK_ID")
# What the process ends with when the device has failed for good; see docs/serving.md.
DEVICE_LOST_STATUS: Final = 3
# Until then runs may end by themselves, and their clients ask once more what came of them.
_MOST_FOR_RUNS_S: Final = 60.0
_LAST_ANSWERS_S: Final = 5.0
_LOOK_AFTER_S: Final = 0.1
_STATE_OF_A_DEPLOYMENT: Final = (
    "model_source",
    "device",
    "runtime",
    "model_precision",
    "_hardware",
    "checkpoint_info",
    "_deploy_params",
)


class DeployableApp(PromptBasedObjectDetection):  # type: ignore[misc]
    """The part of the app that has a model; each override says what it shields from."""

    FRAMEWORK_NAME = "Florence-2"
    MODELS = str(_HERE / "models.json")
    APP_OPTIONS = str(_HERE / "app_options.yaml")
    INFERENCE_SETTINGS = str(_HERE / "inference_settings.yaml")

    def __init__(self, *, local: LocalServer | None = None, **sdk_options: Any) -> None:  # noqa: ANN401
        # All of it before the SDK's constructor, which may load a model.
        self._local = local
        self._deploying = threading.Lock()
        self._idle = IdleTimer(self._freeze_model)
        self._meta = ModelMeta()
        self.device_warning: str | None = None
        self.metrics = Metrics()
        self.deployment = Deployment(
            self.metrics.observe_batch,
            max_batch=local.max_batch if local else None,
            max_queued=local.max_queued if local else MAX_QUEUED,
            on_hopeless=self._end_when_answered,
        )
        self.predictor = Predictor(self.deployment, self.metrics)
        use_own_threads(_MainServer().get_server(), SUPERVISELY_SERVER_PATH_PREFIX)
        self.metrics.watch_memory(_resident_bytes, self._device_bytes)
        self.metrics.watch_ready(lambda: self.deployment.is_ready)
        self.metrics.watch_budget("open_pixels", "Pixels of images", open_pixels())
        self.metrics.watch_budget("image_bytes", "Bytes of uploads and downloads", held_bytes())
        if not any(os.environ.get(name) for name in _DATA_DIR_VARIABLES):
            # Unlike Path.home, it takes a user without a home.
            sdk_options.setdefault("model_dir", os.path.expanduser("~/.cache/supervisely"))
        with florence_gui():
            super().__init__(**sdk_options)

    def _download_pretrained_model(
        self, model_files: Mapping[str, str], log_progress: bool = True, headless: bool = False
    ) -> dict[str, str]:
        """The checkpoint's files, whole and verified, with progress on the page.

        The SDK would open every value as an address; ours are names that the engine resolves.
        """
        name = model_files["checkpoint"]
        refresh = self.gui is not None and self.gui.refresh
        progress = None if self.gui is None or not log_progress else self.gui.shows_download(name)
        resolve(name, progress=progress or _log_progress(name), refresh=refresh)
        if self.gui is not None:
            self.gui.download_progress.hide()
        return dict(model_files)

    def _load_model_headless(self, **deploy_params: Any) -> None:  # noqa: ANN401
        """What runs now goes on running, and is reported as before, when the next one fails."""
        with self._deploying:
            before = {name: getattr(self, name) for name in _STATE_OF_A_DEPLOYMENT}
            try:
                super()._load_model_headless(**deploy_params)
            except BaseException:
                for name, value in before.items():
                    setattr(self, name, value)
                self._model_served = self.deployment.is_deployed
                raise

    def _load_model(self, deploy_params: dict[str, Any]) -> None:
        deploy_params["device"] = device_name(deploy_params.get("device"))
        deploy_params["runtime"] = check_runtime(deploy_params.get("runtime"))
        super()._load_model(deploy_params)

    def load_model(
        self,
        model_files: Mapping[str, str],
        model_info: Mapping[str, Any],
        model_source: str,
        device: str,
        runtime: str,
        **others: Any,  # noqa: ANN401
    ) -> None:
        """Loads a checkpoint in place of the one that runs.

        :param model_files: the checkpoint's name under "checkpoint"
        :type model_files: dict
        :param model_info: its row in models.json
        :type model_info: dict
        :param model_source: where it comes from
        :type model_source: str
        :param device: cpu, cuda or cuda:N
        :type device: str
        :param runtime: PyTorch
        :type runtime: str
        """
        local = self._local or LocalServer(model_files["checkpoint"])
        choice = ModelChoice(model_files["checkpoint"], device, local.precision, local.runtime)
        model = self.deployment.switch(choice).model
        self.model_precision = PRECISION_NAMES[model.precision]
        self._model_meta = self.model_meta
        self.metrics.set_model(model.name, model.device, model.precision, "torch")
        self._warn_of_a_cpu(model)

    def _warn_of_a_cpu(self, model: Florence2) -> None:
        """Says where everybody looks that a model is slow for want of a GPU that could be there."""
        why = missing_gpu() if model.device == "cpu" and not self._is_cpu_asked_for else None
        warning = why and (
            f"{model.name} runs on the CPU. {why} The image of the self-test, with a caption of a "
            f"few words, took {model.engine.self_test_s:.2g} s."
        )
        if warning:
            logger.warning(warning)
        self._show_device_warning(warning)

    def _show_device_warning(self, text: str | None) -> None:
        self.device_warning = text
        if self.gui is not None:
            self.gui.show_device_warning(text)

    @property
    def _is_cpu_asked_for(self) -> bool:
        """Whether a command line named the CPU; the page offers nothing else without a GPU."""
        if self._local is not None:
            return self._local.device == "cpu"
        return bool(self._is_cli_deploy and self._args.device == "cpu" and _names_device(sys.argv))

    def _deploy_headless(
        self, model: str, device: str | None = None, runtime: str | None = None
    ) -> DeployableApp:
        """``Florence2App(model=...)`` of a program: any checkpoint that the engine can resolve.

        The SDK asks for the hardware of a device that nobody named, and fails.
        """
        params = params_for(named_model(model, self.pretrained_models), device, runtime)
        params["model_files"] = self._download_model_files(params)
        self._load_model_headless(**params)
        self._schedule_freeze_on_inactivity()
        return self

    def deploy_from_state(self, state: dict[str, Any]) -> dict[str, str]:
        """A ``/deploy_from_api`` request.

        The SDK's own stops what runs before it looks at the request.
        """
        params = params_from_state(state, self.pretrained_models, self._deployable_names())
        params["model_files"] = self._download_model_files(params)
        self._load_model_headless(**params)
        self._schedule_freeze_on_inactivity()
        if self.gui is not None:
            self.set_params_to_gui(params)
            self.gui.set_deployed(params["device"])
        return {"result": "model was successfully deployed"}

    def _deployable_names(self) -> tuple[str, ...]:
        """What a request may deploy besides ``models.json``."""
        allowed = tuple(entries_of(os.environ.get(ALLOW_DEPLOY_VARIABLE)))
        if self._local is not None:
            return (DEMO, self._local.model, *self._local.allow_deploy, *allowed)
        if self._args is not None and self._args.model:
            return (DEMO, self._args.model, *allowed)
        return allowed

    def shutdown_model(self) -> None:
        """Stops and frees the model; the SDK would leave its weights where they are."""
        self.deployment.stop()
        self.metrics.clear_model()
        self._show_device_warning(None)
        self._idle.cancel()
        super().shutdown_model()

    def is_model_deployed(self) -> bool:
        """What ``/is_ready`` says; the SDK would go on saying so when the device has failed."""
        return bool(self._model_served) and self.deployment.is_ready

    def _end_when_answered(self, sentence: str) -> None:
        """Ends a process that can answer nothing more, so that it is started anew.

        One that a program made the app in is the program's.
        """
        if self._is_quick_deploy:
            return
        runs = self.inference_requests_manager._inference_requests
        end = time.monotonic() + _MOST_FOR_RUNS_S
        while time.monotonic() < end and not all(run.is_finished() for run in list(runs.values())):
            time.sleep(_LOOK_AFTER_S)
        time.sleep(_LAST_ANSWERS_S)
        end_process(sentence, DEVICE_LOST_STATUS)

    def freeze(self) -> str:
        """Moves the weights from the device to memory; what was done, in a sentence.

        Raises StoppedError when no model is deployed.
        """
        current = self.deployment.current
        if self.deployment.is_frozen:
            return "The model is in memory already; the next request brings it back."
        if not self.deployment.freeze():
            return f"The model runs on {current.model.device}, so there is no device to free."
        return "The model was moved to memory; the next request brings it back."

    def _freeze_model(self) -> None:
        """When it was idle; the SDK would load the weights again from disk, twice."""
        if self.deployment.is_deployed:
            logger.info(self.freeze())

    def _unfreeze_model(self) -> None:
        self.deployment.wake()

    @property
    def _model_frozen(self) -> bool:
        return self.deployment.is_frozen

    @_model_frozen.setter
    def _model_frozen(self, _value: bool) -> None:
        """The SDK sets it; the deployment knows."""

    def _schedule_freeze_on_inactivity(self) -> None:
        self._idle.touch(self._inactivity_timeout)

    @cached_property
    def _default_settings(self) -> dict[str, Any]:
        loaded: dict[str, Any] = yaml.safe_load(self._custom_inference_settings)
        return loaded

    @property
    def custom_inference_settings_dict(self) -> dict[str, Any]:
        """The settings file's values; the SDK reads the file's text anew for every request."""
        return copy.deepcopy(self._default_settings)

    @property
    def api(self) -> sly.Api | None:
        """The platform of the environment; None where there is none, which the SDK fails on."""
        if self._api is None and not os.environ.get("SERVER_ADDRESS"):
            return None
        return super().api

    @property
    def model_meta(self) -> sly.ProjectMeta:
        """Every class and tag that answers may have, and the classes seen so far."""
        return self._meta.snapshot()

    def get_classes(self) -> list[str]:
        """The names of the classes that are known now."""
        return [obj_class.name for obj_class in self.model_meta.obj_classes]

    def get_info(self) -> dict[str, Any]:
        """What clients are told when they connect."""
        info: dict[str, Any] = super().get_info()
        model = self.deployment.current.model
        info["app_name"] = "Serve Florence-2"
        info["model_name"] = model.name
        info["device"] = model.device
        info["precision"] = self.model_precision
        info["runtime"] = "torch"
        info["notes"] = list(model.notes)
        info["self_test_s"] = round(model.engine.self_test_s, 3)
        if self.device_warning:
            info["device_warning"] = self.device_warning
        # The SDK says True whether or not what its tracker needs is installed; asking it logs.
        from supervisely.nn.tracker import TRACKING_LIBS_INSTALLED

        info["tracking_on_videos_support"] = TRACKING_LIBS_INSTALLED
        return info

    def _device_bytes(self) -> float:
        engine = self.deployment.current.model.engine if self.deployment.is_deployed else None
        return float(engine.memory_bytes) if engine is not None else 0.0

    def _parse_cli_deploy_args(self) -> tuple[argparse.Namespace | None, bool]:
        """A local server is the SDK's "deploy" mode; its own reads the command line of any program.

        Without ``--device`` the SDK means cuda:0, also on machines that have none.
        """
        if self._local is not None:
            return argparse.Namespace(mode="deploy", model=self._local.model, settings=None), True
        arguments, is_cli = super()._parse_cli_deploy_args()
        if is_cli and not _names_device(sys.argv):
            arguments.device = device_name(None)
        return arguments, is_cli

    def _get_deploy_params_from_args(self) -> tuple[dict[str, Any], bool]:
        """Any checkpoint that the engine can resolve, not only those of ``models.json``."""
        row = named_model(self._args.model, self.pretrained_models)
        device = self._local.device if self._local is not None else self._args.device
        return params_for(row, device), True


def _names_device(words: Sequence[str]) -> bool:
    return any(word.split("=")[0] == "--device" for word in words)


def _resident_bytes() -> float:
    return float(psutil.Process().memory_info().rss)


def _log_progress(name: str) -> Callable[[ProgressUpdate], None]:
    """Every tenth of a download as a line of the log."""
    reported = -1

    def report(update: ProgressUpdate) -> None:
        nonlocal reported
        tenth = 10 * update.done_bytes // max(update.total_bytes, 1)
        if tenth > reported:
            reported = tenth
            logger.info("%s: %d %% of %d bytes", name, 10 * tenth, update.total_bytes)

    return report
