"""THE list of what this app changes in the Supervisely SDK, and uses of it by private names.

``OVERRIDES`` says of each what it shields users from, the test that shows it, and when it can go.
Code that fits nowhere else is below the list; the overridden methods themselves are those of
``serve.app.Florence2App``, ``serve.gui.Florence2Gui`` and ``serve.platform.registry``, and routes
that stand before the SDK's are in ``serve.http``.

A new version of the SDK fails ``tests/unit/app/test_sdk_overrides.py`` until ``SDK_VERSION`` is
changed here, which is to be done once this list was gone through: an entry whose defect is gone is
taken out together with its code.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from florence2.checkpoint.catalog import BASE_FOLDER, CHECKPOINT_NAMES, DEMO, base_names
from florence2.checkpoint.files import ADAPTER_CONFIG
from florence2.errors import RequestError
from serve.http.json_bodies import entries_of
from serve.model_service import ALLOW_DEPLOY_VARIABLE, params_from_state
from serve.platform.registry import InferenceRequest
from serve.sdk import sly

# isort: split
from supervisely.app.fastapi import subapp
from supervisely.nn.experiments import ExperimentInfo
from supervisely.nn.inference import PromptBasedObjectDetection
from supervisely.nn.inference import gui as sdk_gui
from supervisely.nn.inference import inference as sdk_inference
from supervisely.nn.inference.gui import serving_gui_template
from supervisely.nn.inference.uploader import Uploader

SDK_VERSION: Final = "6.74.51"

ASKED_AT: Final = "asked_at"
"""When a model was asked for: one that another request brought since is not loaded once more."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Override:
    """One change to the SDK. ``names`` are the SDK's, parted by spaces, used private ones too.

    ``test`` is the id of one that shows it.
    """

    names: str
    shields_from: str
    test: str
    until: str


# What the SDK reports of the model that runs.
REPORTED: Final = (
    "model_source",
    "device",
    "runtime",
    "model_precision",
    "_hardware",
    "checkpoint_info",
    "_deploy_params",
    "_model_served",
)

_APP: Final = "tests/unit/app/test_local_app.py::"
_PAGE: Final = "tests/unit/app/test_page_app.py::"
_HTTP: Final = "tests/unit/http/"
_PLATFORM: Final = "tests/unit/platform/"
_CONTRACT: Final = "tests/contract/"
_CLIENTS: Final = _CONTRACT + "test_public_applications.py::"
_CUSTOM: Final = _CONTRACT + "test_custom_models.py::"

OVERRIDES: Final[tuple[Override, ...]] = (
    # Importing and starting
    Override(
        "PIL.ImageFile.LOAD_TRUNCATED_IMAGES sys.modules",
        "Half of a damaged image labeled as if it were whole; an import that fails in a program "
        "whose name is no module's.",
        "tests/unit/serve/test_sdk_door.py::"
        "test_programs_under_names_that_are_no_modules_may_import_the_sdk",
        "importing supervisely changes nothing of Pillow and imports none of its importers",
    ),
    Override(
        "requests.sessions.HTTPAdapter",
        "A run that waits for ever on a connection that was lost without a word.",
        "tests/unit/serve/test_sdk_door.py::"
        "test_a_platform_that_says_nothing_any_more_is_not_waited_for_for_ever",
        "the SDK's calls have a time limit",
    ),
    Override(
        "subapp.set_autostart_flag_from_state",
        "A start that ends because the platform does not say whether to deploy by itself.",
        _CONTRACT + "test_starting.py::test_calls_that_are_not_essential_may_all_fail",
        "the SDK takes such an answer for a no",
    ),
    Override(
        "inference.get_gpu_count Inference._autostart_delay_time",
        "A start that says nothing for five minutes on a machine with several GPUs, and a session "
        "that cannot be ended meanwhile.",
        _CUSTOM + "test_with_several_gpus_people_have_time_to_choose_one_and_are_told",
        "the SDK waits in a daemon thread, and says so on the page",
    ),
    Override(
        "Inference._deploy_on_autorestart ServingGUITemplate._model_full_info_card "
        "ServingGUITemplate.show_deployed_model_info",
        "Another model in the place of the one that a restarted session had, and nobody told.",
        _CUSTOM + "test_a_session_whose_model_cannot_be_had_again_starts_no_other",
        "the SDK starts no other, and says on the page why",
    ),
    Override(
        "gui.ServingGUITemplate ServingGUITemplate.deploy_with_current_params",
        "A dead app after an automatic start that fails; its constructor takes no class of a page.",
        _PAGE + "test_an_automatic_start_that_fails_leaves_the_page",
        "the SDK's constructor takes the page, and survives such a start",
    ),
    Override(
        "ServingGUITemplate._initialize_extra_widgets ServingGUITemplate._before_deploy_msg "
        "ServingGUITemplate.pretrained_models_table",
        "A page without a way to compare the weights with the hub's, or a reason on it.",
        _PAGE + "test_large_is_chosen_among_exactly_four",
        "never: it is how the SDK has pages extended",
    ),
    Override(
        "serving_gui_template.get_experiment_infos ServingGUITemplate._initialize_layout "
        "ServingGUITemplate.experiment_selector",
        "A page that cannot be made because the platform does not list files, or lists one that "
        "is no experiment.",
        _CUSTOM + "test_team_files_that_cannot_be_listed_leave_the_page_with_an_empty_tab",
        "the SDK makes its page whatever the list of experiments does",
    ),
    Override(
        "ExperimentSelector._rows ExperimentSelector._experiment_infos "
        "ExperimentSelector._rows_search_texts ModelRow._experiment_info ModelRow._model_wiget "
        "ModelRow._task_widget ModelRow._session_widget ModelRow._training_project_widget "
        "Container._widgets",
        "A list that says a model's name alone, as HTML that anybody of the team wrote, with a "
        "link to session -1, and that is made once.",
        _CUSTOM + "test_the_page_lists_fine_tunes_with_task_classes_and_metric",
        "the SDK's list shows task, classes and metric as text, and can be made anew",
    ),
    Override(
        "ServingGUITemplate.model_files",
        "An error of the SDK's where nothing is chosen.",
        _CUSTOM + "test_serving_without_a_choice_is_refused_with_a_sentence",
        "the SDK says it in a sentence on the page",
    ),
    Override(
        "ServingGUITemplate.runtime ServingGUITemplate.get_params_from_gui",
        "A page that offers the SDK's three runtimes only, and no precision.",
        _PAGE + "test_serve_deploys_what_is_chosen_on_the_page",
        "the SDK's list of runtimes is an app's own",
    ),
    Override(
        "ServingGUITemplate.set_inference_settings "
        "ServingGUITemplate._model_inference_settings_widget",
        "Settings on the page without the comments that explain them.",
        _PAGE + "test_settings_keep_their_comments",
        "the SDK shows the file as it is",
    ),
    Override(
        "JinjaWidgets.context Text.text",
        "A page that is a circle turning for ever where its scripts' servers cannot be reached, "
        "and errors whose text is taken for HTML.",
        "tests/soak/test_sdk_page.py::"
        "test_a_browser_that_cannot_reach_the_platforms_servers_is_told_so",
        "the SDK brings its scripts with it, and shows text as text",
    ),
    Override(
        "supervisely.app.content.ContentOrigin",
        "A process that goes on for ever after its server could not start.",
        _CONTRACT + "test_starting.py::test_a_port_that_is_taken_ends_the_process_with_a_sentence",
        "the SDK's threads are daemons",
    ),
    # The server
    Override(
        "Inference._run_server Inference._run_server_in_thread Inference._uvicorn_server "
        "Inference._server_thread",
        "A server of one machine that listens on every address of it, always on port 8000.",
        _CONTRACT + "test_sdk_shields.py::test_the_app_listens_on_this_machine_only",
        "the SDK takes a host, a port and a socket",
    ),
    Override(
        "Inference.app Inference._app subapp._MainServer",
        "A middleware that dies of bodies which are no JSON objects, and gives the token away.",
        _HTTP + "test_http_guard.py::test_the_middleware_really_dies_of_it",
        "the SDK checks bodies and asks who calls",
    ),
    Override(
        "Inference.serve",
        "Exceptions as answers, routes that wait in the threads of all others, and a page.",
        _HTTP + "test_http_threads.py::"
        "test_more_slow_calls_than_threads_leave_the_other_routes_answering",
        "the SDK answers errors as clients need them, and none of its routes blocks others",
    ),
    Override(
        "Inference.api Inference.api_from_request Inference._api",
        "A crash where there is no platform, and a server named by a caller tried for minutes.",
        _CONTRACT + "test_sdk_command_line.py::"
        "test_images_of_a_platform_are_refused_where_there_is_none",
        "the SDK has None for no platform, and its clients take a number of tries",
    ),
    Override(
        "InferenceRequestsManager.create InferenceRequestsManager._inference_requests",
        "Two requests of one moment with one id, which anybody can guess.",
        _PLATFORM + "test_requests_registry.py::"
        "test_requests_of_one_moment_have_names_of_their_own",
        "the SDK names requests at random",
    ),
    Override(
        "InferenceRequestsManager.schedule_task Inference.inference_requests_manager",
        "A line of runs without an end, in as many threads as cores.",
        _PLATFORM + "test_requests_registry.py::"
        "test_only_so_many_are_taken_on_and_one_that_is_done_leaves_its_place",
        "the SDK bounds what it takes on",
    ),
    Override(
        "InferenceRequestsManager.run InferenceRequestsManager._on_inference_start "
        "InferenceRequestsManager._on_inference_end",
        "A run that pauses at 500 results for an hour, as its caller fetches them at the end.",
        _PLATFORM + "test_requests_registry.py::"
        "test_a_request_somebody_waits_for_says_so_and_is_soon_forgotten",
        "the SDK pauses only what is fetched in parts",
    ),
    Override(
        "InferenceRequestsManager._handle_error_in_async",
        "A failed request that keeps all it worked on for an hour.",
        _PLATFORM + "test_requests_registry.py::"
        "test_a_failed_request_keeps_its_error_and_not_what_it_worked_on",
        "the SDK keeps an error without its frames",
    ),
    Override(
        "InferenceRequest.is_inferring",
        "Clients that stop to wait before a request has begun, or before its last results came.",
        _CLIENTS + "test_a_sliding_window_in_the_background_is_there_with_its_last_progress",
        "the SDK says that a request goes on from its acceptance to its end",
    ),
    Override(
        "InferenceRequest.is_expired",
        "A run that is stopped and forgotten while it goes on, as it counted nothing for an hour.",
        _PLATFORM + "test_requests_registry.py::"
        "test_a_run_that_counts_nothing_done_for_an_hour_goes_on_and_one_that_ended_is_forgotten",
        "the SDK forgets no request that goes on",
    ),
    Override(
        "inference._get_log_extra_for_inference_request",
        "The result of one image, which clients read with its progress: the SDK says yes or no.",
        _CLIENTS + "test_a_sliding_window_in_the_background_is_there_with_its_last_progress",
        "the SDK has the result of one image there again",
    ),
    # The model
    Override(
        "Inference._download_custom_model Inference._set_checkpoint_info_custom_model",
        "Files of fine-tunes that nobody has verified, all in one folder by their bare names, and "
        "a checkpoint that is unpickled to look for more.",
        _CUSTOM + "test_an_experiment_that_is_damaged_is_refused_and_the_model_runs_on",
        "the SDK verifies what it downloads, and takes checkpoints that are folders",
    ),
    Override(
        "Inference._download_pretrained_model Inference._download_model_files",
        "Names of checkpoints opened as addresses, and files that nobody has verified.",
        _PAGE + "test_refreshing_is_asked_of_the_checkpoint",
        "never: our checkpoints are names",
    ),
    Override(
        " ".join(["Inference._load_model_headless", *(f"Inference.{name}" for name in REPORTED)]),
        "A model that runs on and is reported as the one that could not be loaded.",
        _APP + "test_the_model_before_runs_on_when_another_cannot_be_deployed",
        "the SDK changes what it reports once the next model runs",
    ),
    Override(
        "Inference._load_model Inference.load_model Inference._model_meta",
        "A device that nobody named, which is None, and a runtime of any name.",
        "tests/unit/app/test_model_service.py::test_a_device_nobody_chose_is_chosen",
        "never: it is how the SDK has models loaded",
    ),
    Override(
        "Inference._deploy_headless Inference._is_quick_deploy",
        "A program's model=NAME that fails where nobody named a device, or on any other name.",
        _PAGE + "test_a_program_deploys_by_name",
        "the SDK chooses a device itself, and leaves names to the app",
    ),
    Override(
        "Inference.shutdown_model",
        "Weights that stay in memory after Stop was pressed.",
        _PAGE + "test_stopping_on_the_page_frees_the_model",
        "never: only the app knows what to free",
    ),
    Override(
        "Inference.is_model_deployed",
        "An app that says it is ready although its device has failed.",
        _APP + "test_a_device_that_fails_is_shown_and_the_model_loaded_again_once",
        "never: only the app knows of its device",
    ),
    Override(
        "Inference._freeze_model Inference._unfreeze_model Inference._model_frozen "
        "Inference._schedule_freeze_on_inactivity",
        "An idle model loaded from disk again, twice, and a thread for every request.",
        "tests/unit/app/test_model_service.py::"
        "test_an_idle_model_moves_to_memory_and_back_on_the_models_thread",
        "the SDK moves weights, with one timer",
    ),
    # What clients are told
    Override(
        "Inference.custom_inference_settings Inference.custom_inference_settings_dict "
        "Inference._custom_inference_settings",
        "The settings file read anew for every request.",
        _CONTRACT + "test_sdk_shields.py::test_settings_of_one_request_do_not_reach_the_next",
        "the SDK reads it once and gives copies",
    ),
    Override(
        "Inference.model_meta Inference.get_classes",
        "Classes that the model has to know beforehand; ours are whatever was asked for.",
        _APP + "test_classes_that_were_seen_are_announced_from_then_on",
        "never: prompts have no closed set of classes",
    ),
    Override(
        "Inference.get_info Inference.get_tracking_settings",
        "Tracking on offer where what it needs is not installed, and an empty answer about it.",
        _CONTRACT + "test_sdk_clients.py::test_the_session_says_what_it_serves",
        "never: the name, the device and its warning are ours to tell",
    ),
    Override(
        "Inference._get_inference_settings",
        "Defaults that hide which form a client's own settings had.",
        "tests/unit/settings/test_settings_clients.py::test_each_client_is_understood",
        "never: the suffix of that form is ours",
    ),
    # Answers
    Override(
        "Inference._inference_auto",
        "Crops and windows that move only some geometries and lose the tags of images.",
        _CONTRACT + "test_sdk_shields.py::test_a_caption_survives_a_rectangle_and_windows",
        "the SDK moves every geometry and keeps image tags",
    ),
    Override(
        "Inference.predict Inference.predict_batch Inference.predict_benchmark "
        "Inference._predictions_to_annotation",
        "Annotations without the tags of images.",
        _APP + "test_the_sdks_python_interface_works_too",
        "never: it is how the SDK asks a model",
    ),
    Override(
        "Inference._inference_images",
        "Uploads kept on disk under names that clients gave, which two may share.",
        _CONTRACT + "test_sdk_shields.py::"
        "test_background_requests_with_one_name_each_get_their_own_image",
        "the SDK makes up its own names",
    ),
    Override(
        "Inference._inference_image_ids",
        "A run that waits a second at its end, and loses the error of its last upload.",
        _PLATFORM + "test_sdk_run_defects.py::"
        "test_the_last_upload_error_is_told_and_the_sdk_swallows_it",
        "the SDK's uploader ends at once and raises",
    ),
    Override(
        "Inference._inference_project_id",
        "A run that one damaged image ends.",
        _PLATFORM + "test_sdk_run_defects.py::"
        "test_one_damaged_image_costs_itself_and_in_the_sdk_the_whole_run",
        "the SDK fails images alone",
    ),
    Override(
        "inference._exclude_duplicated_predictions",
        "Two meanings of a merge: what counts as the same object is the SDK's to say.",
        _CONTRACT + "test_platform_runs.py::test_a_second_merge_adds_nothing",
        "the SDK gives it a public name",
    ),
    Override(
        "inference.Uploader Uploader._q",
        "A second of waiting at the end of its speed test, and the error of the last upload.",
        "tests/unit/app/test_sdk_overrides.py::test_ours_ends_when_everything_is_done",
        "the SDK's uploader ends at once and raises",
    ),
    Override(
        "Inference._inference_video_id Inference._inference_video",
        "An error that is answered with an empty list, a file written where its name says, and "
        "ranges that its own clients send and it does not read.",
        _APP + "test_what_is_sent_for_later_is_held_until_it_is_done",
        "the SDK's routes raise, and name files themselves",
    ),
    Override(
        "Inference._tracking_by_detection",
        "A tracker with packages that have to be compiled, and work that fails where nobody looks.",
        _CONTRACT + "test_video_routes.py::"
        "test_an_annotation_tool_gets_figures_of_its_track_and_is_told",
        "the SDK lets an app follow objects itself",
    ),
    Override(
        "Inference._run_speedtest",
        "Work that is started whatever was sent, and fails where nobody looks.",
        _CONTRACT + "test_bad_bodies.py::test_an_empty_state_is_refused",
        "the SDK's routes check what they start",
    ),
    Override(
        "Inference.cache",
        "Paths made of what a client sent, and a connection that a failure ends.",
        "tests/unit/serve/test_sdk_routes.py::"
        "test_a_cache_that_fails_after_the_answer_is_logged_and_costs_no_connection",
        "the SDK checks what its cache is asked for",
    ),
    Override(
        "Inference._get_deploy_info",
        "Nothing said of an adapter, or of one that an earlier model had.",
        _CONTRACT + "test_custom_models.py::test_an_adapter_is_deployed_with_its_base",
        "the SDK asks the app what else there is to say of a deployment",
    ),
    # The SDK's command line
    Override(
        "Inference._parse_cli_deploy_args Inference._args Inference._is_cli_deploy",
        "Any program's command line taken for the SDK's, and cuda:0 where there is none.",
        _CONTRACT + "test_sdk_command_line.py::test_deploy_serves_without_a_platform",
        "the SDK reads a command line when it is told to, and chooses a device that is there",
    ),
    Override(
        "Inference._get_deploy_params_from_args",
        "Only names of models.json on the command line.",
        _CONTRACT + "test_sdk_command_line.py::test_deploy_serves_without_a_platform",
        "the SDK leaves names to the app",
    ),
    Override(
        "Inference._inference_by_cli_deploy_args Inference._validate_settings",
        "A folder as one batch, which one damaged image ends; settings by other rules.",
        _CONTRACT + "test_sdk_command_line.py::"
        "test_every_image_of_a_folder_gets_an_annotation_but_a_damaged_one",
        "the SDK predicts image by image",
    ),
)


class SdkMethods:
    """What of the SDK's own is still used, each by the name it has there.

    What it was told is read once. Runs take the platform, a state and an entry of the registry.
    """

    def __init__(self, inference: PromptBasedObjectDetection, allow_deploy: Sequence[str]) -> None:
        self._inference = inference
        self._allow_deploy = tuple(allow_deploy)
        self.upload = inference.upload_predictions
        self.label_video = inference._inference_video
        self.test_speed = inference._run_speedtest

    @staticmethod
    def progress_of(request: InferenceRequest) -> dict[str, Any]:
        """What clients of several years look for in the progress of a request."""
        told: dict[str, Any] = sdk_inference._get_log_extra_for_inference_request(
            request.uuid, request
        )
        return told

    @cached_property
    def api(self) -> sly.Api | None:
        """The platform of the environment, if there is one."""
        return self._inference.api

    @cached_property
    def batch_size(self) -> int:
        size: int = self._inference.get_batch_size()
        return size

    @cached_property
    def default_settings(self) -> dict[str, Any]:
        """The settings file's values."""
        settings: dict[str, Any] = self._inference.file_settings
        return settings

    @cached_property
    def sliding_window_mode(self) -> str:
        mode: str = self._inference.sliding_window_mode
        return mode

    @property
    def task_id(self) -> int | None:
        """Known once the app serves."""
        task_id: int | None = self._inference.task_id
        return task_id

    @property
    def cache(self) -> Any:  # noqa: ANN401 - the SDK's
        """Of images and videos that clients want to be there beforehand."""
        return self._inference.cache

    def deploy(self, state: dict[str, Any]) -> None:
        """A ``/deploy_from_api`` request; the SDK's own stops what runs before it looks at it."""
        params = params_from_state(state, self._inference.pretrained_models, self._deployable())
        self.load(params)
        gui = self._inference.gui
        if gui is not None:
            self._inference.set_params_to_gui(params)
            gui.set_deployed(params["device"])

    def load(self, params: dict[str, Any]) -> None:
        """Downloads what is not there and loads it in place of what runs."""
        asked_at = time.monotonic()
        params["model_files"] = self._inference._download_model_files(params)
        self._inference._load_model_headless(**params, **{ASKED_AT: asked_at})
        self._inference._schedule_freeze_on_inactivity()

    def check_base(self, folder: Path) -> None:
        """RequestError for an adapter of the team whose base this app may not load.

        Anybody of the team may have written it, and its base is downloaded and opened too.
        """
        if not (folder / ADAPTER_CONFIG).is_file():
            return
        name = base_names(folder)[0]
        if Path(name).is_relative_to(folder) or name in (*CHECKPOINT_NAMES, *self._deployable()):
            return
        raise RequestError(
            "An adapter of the team files is merged into a published checkpoint or into what lies "
            f"in {BASE_FOLDER} with it, and this one names {name}; upload it with its base, or "
            f"start the app with that name in --allow-deploy or {ALLOW_DEPLOY_VARIABLE}."
        )

    def _deployable(self) -> tuple[str, ...]:
        """What a request may deploy besides ``models.json``."""
        arguments = self._inference._args
        is_named = arguments is not None and arguments.model
        named = (DEMO, arguments.model, *self._allow_deploy) if is_named else ()
        return (*named, *entries_of(os.environ.get(ALLOW_DEPLOY_VARIABLE)))


@contextmanager
def kept_report(
    inference: PromptBasedObjectDetection, is_deployed: Callable[[], bool]
) -> Iterator[None]:
    """What fails inside leaves the SDK's report of what runs as it was."""
    before = {name: getattr(inference, name) for name in REPORTED}
    try:
        yield
    except BaseException:
        for name, value in before.items():
            setattr(inference, name, value)
        inference._model_served = is_deployed()
        raise


@contextmanager
def own_page(page: type) -> Iterator[None]:
    """Makes the SDK build this page for the app that is constructed inside.

    Its constructor looks the class up in its module and has no other place to name one.
    """
    before = sdk_gui.ServingGUITemplate
    sdk_gui.ServingGUITemplate = page
    try:
        yield
    finally:
        sdk_gui.ServingGUITemplate = before


@contextmanager
def found_experiments(infos: list[ExperimentInfo]) -> Iterator[None]:
    """Inside, a page that is made lists these fine-tunes, which were looked for before.

    The SDK looks for them while it makes the page, where any failure is the end of the start.
    """
    before = serving_gui_template.get_experiment_infos
    serving_gui_template.get_experiment_infos = lambda *_, **__: infos
    try:
        yield
    finally:
        serving_gui_template.get_experiment_infos = before


@contextmanager
def optional_autostart() -> Iterator[None]:
    """Inside, a platform that does not say whether to deploy by itself does not end the start.

    The SDK asks for it while it mounts its routes, and takes an error for the end. With several
    GPUs it waits for minutes in a thread of its own, which is left to the page here.
    """
    ask, count_gpus = subapp.set_autostart_flag_from_state, sdk_inference.get_gpu_count

    def asked(default: str | None = None) -> None:
        try:
            ask(default)
        except Exception as error:  # noqa: BLE001 - the SDK and its transport raise what they like
            logger.warning(
                "The platform did not say whether to deploy a model by itself (%s: %s); choose one "
                "on the page and press Serve.",
                type(error).__name__,
                error,
            )

    subapp.set_autostart_flag_from_state = asked
    sdk_inference.get_gpu_count = lambda: min(count_gpus(), 1)
    try:
        yield
    finally:
        subapp.set_autostart_flag_from_state = ask
        sdk_inference.get_gpu_count = count_gpus


_END: Final = object()


class PromptUploader(Uploader):  # type: ignore[misc]
    """Ends as soon as its work is done, and raises what the work raised.

    The SDK's looks once a second whether it may end, so every call that uses it takes a second;
    and what its last batch raises is only logged, so labels are lost without a word. Runs over
    images and videos do not use it; the SDK's speed test does.
    """

    def __init__(self, upload_f: Callable[[list[Any]], None], **options: Any) -> None:  # noqa: ANN401
        def upload(items: Sequence[Any]) -> None:
            wanted = [item for item in items if item is not _END]
            if wanted:
                upload_f(wanted)

        super().__init__(upload, **options)

    def stop(self) -> None:
        """Ends once everything that was put is done; wakes the thread that waits for more."""
        super().stop()
        self._q.put(_END)

    def notify(self, items: Sequence[Any]) -> None:
        """Tells of what was done, and of nothing else."""
        super().notify([item for item in items if item is not _END])

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        is_handled = bool(super().__exit__(kind, error, trace))
        if kind is None and self.has_exception() and not is_handled:
            raise self.exception
        return is_handled


def use_prompt_uploader() -> None:
    """Puts it in the place of the SDK's in the SDK's own runs."""
    sdk_inference.Uploader = PromptUploader
