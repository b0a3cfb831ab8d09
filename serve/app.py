"""The app on the platform: the SDK's base for prompt-based detection, its parts by composition.

Everything here is the SDK's interface, and every override is one of ``serve.sdk_overrides``: what
each shields users from is said there.
"""

from __future__ import annotations

import argparse
import copy
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import psutil
import torch
import uvicorn
import yaml
from fastapi import Request

from florence2.api import Florence2
from florence2.budget import open_pixels
from florence2.checkpoint.catalog import resolve
from florence2.checkpoint.hub import ProgressCallback
from florence2.engine.encoding import AnyImage
from florence2.engine.scheduler import Priority
from florence2.errors import RequestError
from florence2.runtimes.device import choose_devices
from serve.answering import Answering, merged_settings, predict_path
from serve.gui import Florence2Gui, log_download
from serve.http.guard import Callers, Guard, Limits, install_error_handlers
from serve.http.handlers import Services, register_routes, use_own_threads
from serve.http.json_bodies import Servers
from serve.http.metrics import Metrics
from serve.http.sdk_routes import register_sdk_routes
from serve.limits import held_bytes
from serve.model_service import (
    AUTO,
    CUSTOM,
    DEVICES_VARIABLE,
    MAX_QUEUED,
    RUNTIME_NAMES,
    Deployment,
    ModelChoice,
    ModelMeta,
    check_runtime,
    deployable_on,
    device_name,
    engine_runtime,
    params_for_name,
)
from serve.platform.experiments import FRAMEWORK
from serve.platform.registry import InferenceRequest, RequestsManager
from serve.platform.team_files import Fetched, fetch, remove_superseded
from serve.predict.predictor import Call, Predicted, Predictor
from serve.process import end_process
from serve.sdk import sly
from serve.sdk_overrides import (
    ASKED_AT,
    SdkMethods,
    kept_report,
    optional_autostart,
    own_page,
    use_prompt_uploader,
)
from serve.settings import parse_settings
from serve.settings.generated import text_with
from serve.video.frames import has_library

# isort: split
from supervisely.app.fastapi.subapp import SUPERVISELY_SERVER_PATH_PREFIX, _MainServer
from supervisely.nn.inference import PromptBasedObjectDetection
from supervisely.nn.utils import CheckpointInfo, DeployInfo

HOST_VARIABLE: Final = "FLORENCE_HOST"
PORT_VARIABLE: Final = "FLORENCE_PORT"
DEFAULT_HOST: Final = "127.0.0.1"
# Where the entrypoint of config.json listens, whose command line the app does not see.
_EVERY_ADDRESS: Final = "0.0.0.0"
_HERE: Final = Path(__file__).resolve().parent
# Where the SDK looks for a folder of its own; without one of them it refuses to start.
_DATA_DIR_VARIABLES: Final = ("SLY_APP_DATA_DIR", "DEBUG_APP_DIR", "TASK_ID")
# Requests wait in threads for the one model thread; the SDK would allow cpu_count + 4 of them.
_REQUEST_THREADS: Final = 128
# What the process ends with when the device has failed for good; see docs/serving.md.
DEVICE_LOST_STATUS: Final = 3
# Until then runs may end by themselves, and their clients ask once more what came of them.
MOST_FOR_RUNS_S: Final = 60.0
LAST_ANSWERS_S: Final = 5.0
# When the session is ended: for requests to be answered, as the entrypoint of config.json has it,
# and then for runs to note what they have done.
_MOST_FOR_ANSWERS_S: Final = 5
_MOST_FOR_STOPPED_RUNS_S: Final = 5.0

use_prompt_uploader()


@dataclass(frozen=True, slots=True)
class LocalServer:
    """Serving without the platform: which model, how, and the socket to listen on.

    ``callers`` and ``servers`` of None are those of the environment. ``allow_deploy`` are
    checkpoints that requests may deploy beside the published ones; ``adapters`` are those of
    ``model`` that requests may name, each a name and a folder or hub id; ``other_devices`` answer
    beside ``device``.
    """

    model: str
    device: str = "auto"
    precision: str = "auto"
    runtime: str = "auto"
    max_batch: int | None = None
    max_queued: int = MAX_QUEUED
    listener: socket.socket | None = None
    callers: Callers | None = None
    servers: Servers | None = None
    allow_deploy: tuple[str, ...] = ()
    adapters: tuple[tuple[str, str], ...] = ()
    other_devices: tuple[str, ...] = ()


class Florence2App(PromptBasedObjectDetection):  # type: ignore[misc]
    """Serves Florence-2 with the interface that the platform's tools expect."""

    FRAMEWORK_NAME = FRAMEWORK
    MODELS = str(_HERE / "models.json")
    APP_OPTIONS = str(_HERE / "app_options.yaml")
    INFERENCE_SETTINGS = str(_HERE / "inference_settings.yaml")

    # An app that is made with a model serves inside of the SDK's constructor.
    _guarded: Guard | None = None

    def __init__(self, *, local: LocalServer | None = None, **sdk_options: Any) -> None:  # noqa: ANN401
        # All of it before the SDK's constructor, which may load a model.
        self._local = local
        self._deploying = threading.Lock()
        self._fetched: dict[str, Fetched] = {}
        self._deployed_last: tuple[dict[str, Any], float] = {}, 0.0
        self.metrics = Metrics()
        self.deployment = Deployment(
            self.metrics.observe_batch,
            max_batch=local.max_batch if local else None,
            max_queued=local.max_queued if local else MAX_QUEUED,
            on_hopeless=self.end_when_answered,
        )
        self._meta = ModelMeta(own_classes=self.deployment.own_classes)
        self.predictor = Predictor(self.deployment, self.metrics)
        self.sdk = SdkMethods(self, local.allow_deploy if local else ())
        self.answering = Answering(self.predictor, self.deployment, self._meta, self.sdk)
        request_threads = ThreadPoolExecutor(_REQUEST_THREADS, thread_name_prefix="request")
        self.runs = RequestsManager(request_threads)
        self._services = Services(
            self.answering, self.deployment, self.metrics, self.runs, self.sdk
        )
        self._watch()
        use_own_threads(_MainServer().get_server(), SUPERVISELY_SERVER_PATH_PREFIX)
        if not any(os.environ.get(name) for name in _DATA_DIR_VARIABLES):
            # Unlike Path.home, it takes a user without a home.
            sdk_options.setdefault("model_dir", os.path.expanduser("~/.cache/supervisely"))
        with own_page(Florence2Gui):
            super().__init__(**sdk_options)

    def _watch(self) -> None:
        process = psutil.Process()
        self.metrics.watch_memory(
            lambda: float(process.memory_info().rss), lambda: self.deployment.device_bytes
        )
        self.metrics.watch_ready(lambda: self.deployment.is_ready)
        self.metrics.watch_budget("open_pixels", "Pixels of images", open_pixels())
        self.metrics.watch_budget("image_bytes", "Bytes of uploads and downloads", held_bytes())

    # Loading a model

    def _download_pretrained_model(
        self, model_files: Mapping[str, str], log_progress: bool = True, headless: bool = False
    ) -> dict[str, str]:
        """The checkpoint's files, whole and verified, with progress on the page."""
        name = model_files["checkpoint"]
        refresh = self.gui is not None and self.gui.refresh
        resolve(name, progress=self._progress(name, log_progress), refresh=refresh)
        if self.gui is not None:
            self.gui.download_progress.hide()
        return dict(model_files)

    def _download_custom_model(
        self,
        model_files: Mapping[str, str],
        log_progress: bool = True,
        model_source: str = CUSTOM,
    ) -> dict[str, str]:
        """The files that a fine-tune's checkpoint stands for, whole and verified, in "folder"."""
        if self.api is None or (team_id := sly.env.team_id(raise_not_found=False)) is None:
            raise RequestError(
                "Custom models are in the team files of a platform, and this app has none of "
                "them; start it with SERVER_ADDRESS, API_TOKEN and TEAM_ID, or with the folder of "
                "the model itself."
            )
        checkpoint = model_files["checkpoint"]
        progress = self._progress(str(checkpoint), log_progress)
        try:
            fetched = fetch(self.api, team_id, checkpoint, self._fine_tunes, progress)
            # Also the base of an adapter, before anything that runs is stopped for it.
            self.sdk.check_base(fetched.folder)
            resolve(fetched.folder, progress=progress)
        finally:
            if self.gui is not None:
                self.gui.download_progress.hide()
        folder = str(fetched.folder)
        self._fetched[folder] = fetched
        # The path in team files and not the file's here: a restarted app downloads it anew.
        return {"checkpoint": checkpoint, "folder": folder}

    @property
    def _fine_tunes(self) -> Path:
        """Where they are downloaded to."""
        return Path(self.model_dir) / "fine-tunes"

    def _progress(self, name: str, log_progress: bool) -> ProgressCallback:
        gui: Florence2Gui | None = self.gui
        return log_download(name) if gui is None or not log_progress else gui.shows_download(name)

    def _load_model_headless(self, **deploy_params: Any) -> None:  # noqa: ANN401
        if deploy_params["model_source"] == CUSTOM:
            deploy_params["model_info"] = self._fetched_for(deploy_params).model_info
        asked_at = deploy_params.pop(ASKED_AT, time.monotonic())
        asked = copy.deepcopy(deploy_params)
        with self._deploying:
            # The platform's proxies give a request up after a minute, and clients send it again.
            params, ended_at = self._deployed_last
            if params == asked and ended_at >= asked_at and self.deployment.is_ready:
                return
            with kept_report(self, lambda: self.deployment.is_deployed):
                super()._load_model_headless(**deploy_params)
            self._deployed_last = asked, time.monotonic()

    def _set_checkpoint_info_custom_model(self, deploy_params: dict[str, Any]) -> None:
        files, fetched = deploy_params["model_files"], self._fetched_for(deploy_params)
        self.checkpoint_info = CheckpointInfo(
            checkpoint_name=Path(files["checkpoint"]).name,
            model_name=fetched.experiment.info.model_name,
            architecture=FRAMEWORK,
            checkpoint_url=fetched.checkpoint_url,
            custom_checkpoint_path=files["checkpoint"],
            model_source=CUSTOM,
        )

    def _fetched_for(self, deploy_params: Mapping[str, Any]) -> Fetched:
        return self._fetched[deploy_params["model_files"]["folder"]]

    def _load_model(self, deploy_params: dict[str, Any]) -> None:
        deploy_params["device"] = device_name(deploy_params.get("device"))
        deploy_params["runtime"] = check_runtime(deploy_params.get("runtime"))
        super()._load_model(deploy_params)

    def _get_deploy_info(self) -> DeployInfo:
        info = super()._get_deploy_info()
        # Not kept with the parameters: what an earlier model had would stay with the next one.
        adapters = _adapters_of(self.deployment.current.model)
        return replace(info, deploy_params={**info.deploy_params, **adapters})

    def load_model(
        self,
        model_files: Mapping[str, str],
        model_info: Mapping[str, Any],
        model_source: str,
        device: str,
        runtime: str,
        precision: str | None = None,
        **others: Any,  # noqa: ANN401
    ) -> None:
        """Loads a checkpoint in place of the one that runs.

        :param model_files: under "checkpoint" its name, or a fine-tune's path in team files
        :type model_files: dict
        :param model_info: its row in models.json, or the experiment of a fine-tune
        :type model_info: dict
        :param model_source: where it comes from
        :type model_source: str
        :param device: cpu, cuda or cuda:N
        :type device: str
        :param runtime: PyTorch, OpenVINO or auto
        :type runtime: str
        :param precision: fp32, bf16, fp16, int8, nf4 or auto; None: as the app was started
        :type precision: str
        """
        local = self._local or LocalServer(model_files["checkpoint"])
        asked = engine_runtime(runtime)
        fetched = self._fetched[model_files["folder"]] if model_source == CUSTOM else None
        choice = ModelChoice(
            str(fetched.folder) if fetched else model_files["checkpoint"],
            device,
            precision or local.precision,
            local.runtime if asked == AUTO else asked,
            self._is_cpu_asked_for,
            adapters=local.adapters if model_files["checkpoint"] == local.model else (),
            other_devices=self._others_beside(device),
        )
        if fetched is not None:
            choice = replace(
                choice,
                title=fetched.experiment.info.experiment_name,
                own_classes=tuple(fetched.model_meta.obj_classes),
                own_settings=fetched.experiment.training.settings,
            )
        model = self.deployment.switch(choice).model
        if fetched is not None:
            remove_superseded(fetched, self._fine_tunes)
        self.model_precision = model.precision.upper()
        self.runtime = RUNTIME_NAMES[model.runtime]
        self._model_meta = self.model_meta
        self.metrics.set_model(model.name, model.device, model.precision, model.runtime)
        self._show_device_warning()

    def _others_beside(self, device: str) -> tuple[str, ...]:
        """The devices that answer beside the chosen one, where the app has several."""
        if self._local is not None:
            listed = [self._local.device, *self._local.other_devices]
        else:
            listed = [*choose_devices(os.environ.get(DEVICES_VARIABLE) or device)]
        [chosen] = choose_devices(device)
        if chosen not in listed:
            return ()
        listed.remove(chosen)
        return tuple(listed)

    @property
    def _is_cpu_asked_for(self) -> bool:
        """Whether a command line named the CPU; the page offers nothing else without a GPU."""
        if self._local is not None:
            return self._local.device == "cpu"
        return bool(self._is_cli_deploy and self._args.device == "cpu" and _names_device(sys.argv))

    def _show_device_warning(self) -> None:
        if self.gui is not None:
            self.gui.show_device_warning(self.deployment.device_warning)

    def _deploy_headless(
        self, model: str, device: str | None = None, runtime: str | None = None
    ) -> Florence2App:
        """``Florence2App(model=...)`` of a program: any checkpoint, or a path in team files."""
        self.sdk.load(params_for_name(model, self.pretrained_models, device, runtime))
        return self

    def shutdown_model(self) -> None:
        """Stops and frees the model."""
        self.deployment.stop()
        self.metrics.clear_model()
        self._show_device_warning()
        super().shutdown_model()

    def is_model_deployed(self) -> bool:
        """What ``/is_ready`` says."""
        return bool(self._model_served) and self.deployment.is_ready

    def end_when_answered(self, sentence: str) -> None:
        """Ends a process that can answer nothing more, so that it is started anew.

        One that a program made the app in is the program's.
        """
        if self._is_quick_deploy:
            return
        self.runs.wait_until_finished(MOST_FOR_RUNS_S)
        time.sleep(LAST_ANSWERS_S)
        end_process(sentence, DEVICE_LOST_STATUS)

    def _freeze_model(self) -> None:
        if self.deployment.is_deployed:
            self.deployment.freeze()

    def _unfreeze_model(self) -> None:
        self.deployment.wake()

    @property
    def _model_frozen(self) -> bool:
        return self.deployment.is_frozen

    @_model_frozen.setter
    def _model_frozen(self, _value: bool) -> None:
        """The SDK sets it; the deployment knows."""

    def _schedule_freeze_on_inactivity(self) -> None:
        self.deployment.touch()

    # What the SDK asks about the model

    @cached_property
    def file_settings(self) -> Mapping[str, Any]:
        """The settings file's values, whatever model is deployed."""
        loaded: dict[str, Any] = yaml.safe_load(self._custom_inference_settings)
        return loaded

    @property
    def custom_inference_settings(self) -> str:
        """The settings file, in which a fine-tune has the task and prompts of its training."""
        return text_with(self._custom_inference_settings, self.deployment.own_settings)

    @property
    def custom_inference_settings_dict(self) -> dict[str, Any]:
        """The values of that file."""
        return copy.deepcopy({**self.file_settings, **self.deployment.own_settings})

    @property
    def api(self) -> sly.Api | None:
        """The platform of the environment; None where there is none."""
        if self._api is None and not os.environ.get("SERVER_ADDRESS"):
            return None
        return super().api

    def api_from_request(self, request: Request) -> sly.Api:
        """The platform of a request; RequestError where there is none."""
        return self._services.api_of(request)

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
        info["devices"] = [model.device, *self.deployment.current.choice.other_devices]
        info["precision"] = self.model_precision
        info["runtime"] = model.runtime
        info["notes"] = list(model.notes)
        info |= _adapters_of(model)
        info |= deployable_on(model.device)
        info["self_test_s"] = round(model.engine.self_test_s, 3)
        if self.deployment.device_warning:
            info["device_warning"] = self.deployment.device_warning
        info["tracking_on_videos_support"] = has_library("trackers")
        return info

    def get_tracking_settings(self) -> dict[str, dict[str, Any]]:
        """None to choose: the name is the SDK's, the tracker and its settings are ours."""
        return {"botsort": {}} if has_library("trackers") else {}

    # Answering in the SDK's terms

    def _get_inference_settings(self, state: dict[str, Any]) -> dict[str, Any]:
        mode = self.sliding_window_mode
        return merged_settings(state, self.file_settings, mode, self.deployment.own_settings)

    def _validate_settings(self, settings: Mapping[str, Any]) -> None:
        parse_settings(settings)

    def _inference_auto(
        self, source: Sequence[AnyImage], settings: Mapping[str, Any]
    ) -> tuple[list[sly.Annotation], list[dict[str, Any]]]:
        priority = Priority.INTERACTIVE if len(source) == 1 else Priority.BULK
        call = Call(priority, api=self.api)
        predicted = self.answering.answer_all(source, parse_settings(settings), call)
        return [one.annotation for one in predicted], [{} for _ in predicted]

    def predict(self, image_path: str, settings: Mapping[str, Any]) -> list[Predicted]:
        """One image by path, in the SDK's terms."""
        return self.predict_batch([image_path], settings)[0]

    def predict_batch(
        self, images_np: Sequence[AnyImage], settings: Mapping[str, Any]
    ) -> list[list[Predicted]]:
        """Images in the SDK's terms: for each a list that ``_predictions_to_annotation`` reads."""
        return self.predict_benchmark(images_np, settings)[0]

    def predict_benchmark(
        self, images_np: Sequence[AnyImage], settings: Mapping[str, Any]
    ) -> tuple[list[list[Predicted]], dict[str, float]]:
        """As ``predict_batch``, with the milliseconds of each stage for the speed test."""
        began = time.perf_counter()
        call = Call(Priority.BULK, api=self.api)
        predicted = self.answering.answer_all(images_np, parse_settings(settings), call)
        inference_s = max((sum(one.timings_s.values()) for one in predicted), default=0.0)
        rest_s = max(time.perf_counter() - began - inference_s, 0.0)
        return [[one] for one in predicted], {
            "preprocess": 0.0,
            "inference": 1000 * inference_s,
            "postprocess": 1000 * rest_s,
        }

    def _predictions_to_annotation(
        self,
        image_path: AnyImage,
        predictions: Sequence[Predicted],
        classes_whitelist: Sequence[str] | None = None,
    ) -> sly.Annotation:
        return predictions[0].annotation

    def _inference_images(
        self,
        images: Sequence[AnyImage],
        state: Mapping[str, Any],
        inference_request: InferenceRequest,
    ) -> None:
        self.answering.run_uploads(images, state, inference_request)

    def _inference_image_ids(
        self, api: sly.Api, state: Mapping[str, Any], inference_request: InferenceRequest
    ) -> None:
        self.answering.run_image_ids(api, state, inference_request)

    def _inference_project_id(
        self, api: sly.Api, state: Mapping[str, Any], inference_request: InferenceRequest
    ) -> None:
        self.answering.run_project(api, state, inference_request)

    # The server

    @property
    def app(self) -> Any:  # noqa: ANN401 - an ASGI app
        """What uvicorn runs: the SDK's application behind the guard."""
        if self._guarded is None and self._app is not None:
            callers, servers = self._allowed()
            self._guarded = Guard(
                self._app,
                Limits(),
                self.runs.knows,
                callers,
                servers,
                count_request=self.metrics.count_request,
                path_prefix=SUPERVISELY_SERVER_PATH_PREFIX,
                on_end=self._stop_runs,
            )
        return self._guarded

    def _stop_runs(self) -> None:
        """Once the server has ended: nobody can ask for what a run finds, only its record stays."""
        self.runs.stop_all()
        self.runs.wait_until_finished(_MOST_FOR_STOPPED_RUNS_S)

    def _allowed(self) -> tuple[Callers | None, Servers]:
        """Who may call, None for all, and which platforms requests may name."""
        is_started_here = bool(self._is_cli_deploy or self._is_quick_deploy)
        if not is_started_here and os.environ.get("SERVER_ADDRESS"):
            # A session has the platform before it. One that a developer runs has not, unless the
            # platform reaches it through its tunnel.
            is_at_home = sly.is_development() and not sly.is_debug_with_sly_net()
            callers = Callers.from_environment(_EVERY_ADDRESS) if is_at_home else None
            return callers, Servers(is_session=True)
        local = self._local
        host = os.environ.get(HOST_VARIABLE, DEFAULT_HOST)
        callers = local.callers if local else None
        servers = local.servers if local else None
        return callers or Callers.from_environment(host), servers or Servers.from_environment()

    def serve(self) -> None:
        """Mounts the routes and, from a command line, runs the server until it is stopped."""
        self.inference_requests_manager = self.runs
        server = _MainServer().get_server()
        install_error_handlers(server, SUPERVISELY_SERVER_PATH_PREFIX)
        register_routes(server, self._services, with_page=self.gui is None)
        register_sdk_routes(server, self._services)
        if self.gui is None:
            super().serve()
            return
        self.gui.has_model = self._has_model
        self.gui.is_starting = True
        if torch.cuda.device_count() > 1 and not os.environ.get(DEVICES_VARIABLE):
            self.gui.autostart_delay_s = self._autostart_delay_time
        with optional_autostart():
            super().serve()
        self.gui.is_starting = False

    def _has_model(self) -> bool:
        with self._deploying:
            return self.is_model_deployed()

    def _deploy_on_autorestart(self) -> dict[str, str]:
        try:
            deployed: dict[str, str] = super()._deploy_on_autorestart()
        except Exception as error:
            self.gui.tell_model_lost(error)
            raise
        return deployed

    def _run_server(self) -> None:
        listener = self._local.listener if self._local else None
        self._uvicorn_server = uvicorn.Server(self._server_config())
        self._uvicorn_server.run(sockets=[listener] if listener else None)

    def _run_server_in_thread(self) -> None:
        self._uvicorn_server = uvicorn.Server(self._server_config())
        self._server_thread = threading.Thread(target=self._uvicorn_server.run, daemon=True)
        self._server_thread.start()

    def _server_config(self) -> uvicorn.Config:
        return uvicorn.Config(
            self.app,
            host=os.environ.get(HOST_VARIABLE, DEFAULT_HOST),
            port=int(os.environ.get(PORT_VARIABLE, "8000")),
            ws="none",
            log_level="warning" if self._local else None,
            timeout_graceful_shutdown=_MOST_FOR_ANSWERS_S,
        )

    # The SDK's command line

    def _parse_cli_deploy_args(self) -> tuple[argparse.Namespace | None, bool]:
        if self._local is not None:
            return argparse.Namespace(mode="deploy", model=self._local.model, settings=None), True
        arguments, is_cli = super()._parse_cli_deploy_args()
        if is_cli and not _names_device(sys.argv):
            arguments.device = device_name(None)
        return arguments, is_cli

    def _get_deploy_params_from_args(self) -> tuple[dict[str, Any], bool]:
        device = self._local.device if self._local is not None else self._args.device
        return params_for_name(self._args.model, self.pretrained_models, device), True

    def _inference_by_cli_deploy_args(self) -> None:
        if self._args.input is None:
            super()._inference_by_cli_deploy_args()
            return
        sys.exit(predict_path(self.answering, self._args))


def _adapters_of(model: Florence2) -> dict[str, Any]:
    """The adapter that was deployed, and those that requests may name."""
    engine = model.engine
    alone, named = engine.checkpoint.adapter, engine.adapters
    found: dict[str, Any] = {} if alone is None else {"adapter": alone.to_dict()}
    if named:
        found["adapters"] = {
            name: one.checkpoint.adapter.to_dict()
            for name, one in named.items()
            if one.checkpoint.adapter is not None
        }
    return found


def _names_device(words: Sequence[str]) -> bool:
    return any(word.split("=")[0] == "--device" for word in words)
