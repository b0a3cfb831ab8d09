"""The page on the platform: the lists of models, device, refreshing of weights, settings."""

from __future__ import annotations

import html
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

from florence2.checkpoint.hub import ProgressUpdate
from florence2.errors import FlorenceError, RequestError
from serve.http.page import NOTICE
from serve.model_service import AUTO, CUSTOM, DEFAULT_MODEL, PRECISION_CHOICES, RUNTIME_NAMES
from serve.platform.experiments import Experiment
from serve.platform.team_files import listed_in_time
from serve.sdk import sly  # noqa: F401  (the SDK's modules are imported after this door)
from serve.sdk_overrides import found_experiments

# isort: split
from supervisely.app.widgets import Button, Checkbox, Field, SelectString, Text, Widget
from supervisely.app.widgets_context import JinjaWidgets
from supervisely.nn.inference.gui.serving_gui_template import ServingGUITemplate

logger = logging.getLogger(__name__)

_REFRESH_HELP: Final = (
    "Every file of the checkpoint is compared with its published hash, and what differs is "
    "downloaded again."
)

_RUNTIME_HELP: Final = (
    "auto: PyTorch on a GPU, and on a CPU the faster of the two, measured at the first start. "
    "OpenVINO converts the checkpoint at its first start, which takes minutes and a copy of its "
    "size on the disk."
)
_PRECISION_HELP: Final = (
    "auto is as exact as labels need. int8 on a CPU is OpenVINO's: about twice as fast as bf16, "
    "and less exact. On a GPU int8 and nf4 keep the layers of the text network in 8 or 4 bits, "
    "with :all the vision tower's too: less memory, and less exact."
)

_NOTHING_DEPLOYED: Final = "Deploy model to see the information."
_NO_TASK: Final = -1
_UNLISTED: Final = (
    "The platform did not list the team's custom models, so some may be missing; look for them "
    "again in a moment."
)


class Florence2Gui(ServingGUITemplate):  # type: ignore[misc]
    """The SDK's page with Florence-2-large chosen and a way to refresh the weights."""

    list_patience_s = 20.0
    """How long a start waits for the list of the team's fine-tunes."""

    def _initialize_layout(self) -> list[Widget]:
        """The tabs; a platform that does not list the team's fine-tunes leaves theirs empty."""
        # Comes after the scripts of other servers and before those of the page's own parts.
        JinjaWidgets().context["__widget_scripts__"]["unreachable"] = f"./{NOTICE}"
        listed = listed_in_time(self.api, self.team_id, self.list_patience_s)
        found = listed or []
        try:
            widgets = self._layout_with(found)
        except Exception:
            # Of the SDK's lists only that of the projects, for their pictures, asks the platform.
            logger.warning("The projects of fine-tunes cannot be shown", exc_info=True)
            for one in found:
                one.info.project_id = None
            widgets = self._layout_with(found)
        self._describe(found)
        self.unlisted = Text(_UNLISTED, "warning", widget_id="unlisted_experiments")
        self._tell_whether_listed(listed)
        return [*widgets, self.unlisted]

    def _layout_with(self, found: Sequence[Experiment]) -> list[Widget]:
        with found_experiments([one.info for one in found]):
            widgets: list[Widget] = super()._initialize_layout()
        return widgets

    def _describe(self, found: Sequence[Experiment]) -> None:
        """Says of each fine-tune in the list what it was trained for."""
        experiments = {id(one.info): one for one in found}
        selector = self.experiment_selector
        for row in selector._rows:
            one = experiments[id(row._experiment_info)]
            # The SDK shows it as HTML, and anybody of the team may have written it.
            name, model, summary = map(
                html.escape, (one.info.experiment_name, one.info.model_name, one.training.summary)
            )
            row._model_wiget.text = f"<b>{name}</b><br>{model}<br>{summary}"
            if one.info.task_id == _NO_TASK:
                # The SDK shows its number, and a link to a session that never was.
                row._task_widget._widgets[0].text = "uploaded"
                row._session_widget.text = ""
            if one.info.project_id is None:
                row._training_project_widget._widgets[1].text = "not told"
        selector._rows_search_texts = [
            row.search_text() + row._model_wiget.text for row in selector._rows
        ]

    def list_again(self) -> None:
        """Looks for fine-tunes that were uploaded since the list was made; else it stays."""
        found = listed_in_time(self.api, self.team_id, self.list_patience_s)
        self._tell_whether_listed(found)
        if found is None:
            return
        selector = self.experiment_selector
        selector.table.clear()
        selector._experiment_infos = [one.info for one in found]
        selector.set_experiment_infos(selector._experiment_infos)
        self._describe(found)

    def _tell_whether_listed(self, listed: Sequence[Experiment] | None) -> None:
        if listed is None:
            self.unlisted.show()
        else:
            self.unlisted.hide()

    @property
    def model_files(self) -> dict[str, str]:
        """The files of what is chosen; RequestError where nothing is."""
        is_custom = self.model_source == CUSTOM
        if is_custom and self.experiment_selector.get_selected_experiment_info() is None:
            raise RequestError("No custom model is chosen; choose one in the list, then Serve.")
        files: dict[str, str] = super().model_files
        return files

    def _initialize_extra_widgets(self) -> list[Widget]:
        self.pretrained_models_table.set_by_model_name(DEFAULT_MODEL)
        self._refresh = Checkbox("Refresh weights from the hub", widget_id="refresh_weights")
        self.device_warning = Text("", "warning", widget_id="device_warning")
        self.device_warning.hide()
        refresh = Field(self._refresh, title="Weights", description=_REFRESH_HELP)
        self.runtime_choice = SelectString([AUTO, *RUNTIME_NAMES.values()], widget_id="runtime")
        self.precision_choice = SelectString([AUTO, *PRECISION_CHOICES], widget_id="precision")
        runtime = Field(self.runtime_choice, title="Runtime", description=_RUNTIME_HELP)
        precision = Field(self.precision_choice, title="Precision", description=_PRECISION_HELP)
        look = Button("Look for new custom models", "text", widget_id="list_experiments")
        look.click(self.list_again)
        return [look, runtime, precision, refresh, self.device_warning]

    @property
    def runtime(self) -> str:
        """The runtime that is chosen, as the SDK writes it, or auto."""
        chosen = self.runtime_choice
        # The SDK asks before there are widgets.
        return AUTO if chosen is None else str(chosen.get_value())

    def get_params_from_gui(self) -> dict[str, Any]:
        """What Serve deploys."""
        chosen: dict[str, Any] = super().get_params_from_gui()
        return {**chosen, "precision": str(self.precision_choice.get_value())}

    runtime_choice: SelectString | None = None
    is_starting = False
    """Whether the app starts and nobody has pressed anything yet."""
    has_model: Callable[[], bool] = staticmethod(lambda: False)
    """Whether a model is deployed, of which the app tells the page; waits while one is loaded."""
    autostart_delay_s = 0.0
    """How long an automatic start leaves the choice of a device to people."""
    _is_model_lost = False

    def deploy_with_current_params(self) -> None:
        """Serves what is chosen. An automatic start that fails leaves the page, not a dead app.

        A restarted app has its model back before the SDK starts one automatically; one that could
        not get it back starts no other, whose labels nobody asked for.
        """
        if not self.is_starting:
            self._deploy_chosen()
        elif self.has_model() or self._is_model_lost:
            return
        elif self.autostart_delay_s:
            self._deploy_later()
        else:
            self._deploy_unless_served()

    def _deploy_chosen(self) -> None:
        try:
            super().deploy_with_current_params()
        # Whatever it is, somebody may choose another checkpoint or device on the page.
        except Exception as error:
            self._tell_before_deploying(_reason(error), "error")
            raise

    def _deploy_later(self) -> None:
        self._tell_before_deploying(
            "This machine has several GPUs: choose one and press Serve. What is chosen is deployed "
            f"in {self.autostart_delay_s / 60:.0f} minutes if nobody has.",
            "info",
        )
        # A thread that sleeps, as the SDK's does, would hold a session that is ended meanwhile.
        timer = threading.Timer(self.autostart_delay_s, self._deploy_unless_served)
        timer.daemon = True
        timer.start()

    def _deploy_unless_served(self) -> None:
        if self.has_model():
            return
        try:
            self._deploy_chosen()
        except Exception:
            logger.exception("The automatic start failed")

    def tell_model_lost(self, error: Exception) -> None:
        """Says that the model which a restarted session had could not be deployed again."""
        self._is_model_lost = True
        self._tell_before_deploying(
            "The model that this session had before it was started again could not be deployed "
            f"({_reason(error).rstrip('.')}); choose a model and press Serve.",
            "error",
        )

    def _tell_before_deploying(self, text: str, status: str) -> None:
        # The SDK shows it as HTML, and what it names may be a file that anybody uploaded.
        self._before_deploy_msg.set(html.escape(text, quote=False), status)
        # Nobody sees what is in a card that is folded.
        self._model_full_info_card.uncollapse()

    @property
    def refresh(self) -> bool:
        """Whether the weights are to be compared with the hub's before they are loaded."""
        return bool(self._refresh.is_checked())

    def show_device_warning(self, text: str | None) -> None:
        """Shows that a model runs where it should not; nothing where there is no such thing."""
        self.device_warning.text = html.escape(text or "", quote=False)
        if text:
            self.device_warning.show()
        else:
            self.device_warning.hide()

    def shows_download(self, name: str) -> Callable[[ProgressUpdate], None]:
        """Moves the page's progress bar as a download goes on."""
        bar: Any = None
        shown = 0

        def show(update: ProgressUpdate) -> None:
            nonlocal bar, shown
            if bar is None:
                self.download_progress.show()
                bar = self.download_progress(
                    message=f"Downloading {name}",
                    total=update.total_bytes,
                    unit="B",
                    unit_scale=True,
                )
            bar.update(update.done_bytes - shown)
            shown = update.done_bytes

        return show

    def show_deployed_model_info(self, inference: Any) -> None:  # noqa: ANN401 - the SDK's app
        """What runs now; and what was wrong before is not said again when that is stopped."""
        super().show_deployed_model_info(inference)
        self._before_deploy_msg.set(_NOTHING_DEPLOYED, "text")

    def set_inference_settings(self, inference: Any) -> None:  # noqa: ANN401 - the SDK's app
        """The settings file as it is; the SDK would drop its comments."""
        widget = self._model_inference_settings_widget
        widget.set_text(inference.custom_inference_settings, "yaml")
        widget.show()


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, FlorenceError) else repr(error)


def log_download(name: str) -> Callable[[ProgressUpdate], None]:
    """Every tenth of a download as a line of the log, where there is no page."""
    reported = -1

    def report(update: ProgressUpdate) -> None:
        nonlocal reported
        tenth = 10 * update.done_bytes // max(update.total_bytes, 1)
        if tenth > reported:
            reported = tenth
            logger.info("%s: %d %% of %d bytes", name, 10 * tenth, update.total_bytes)

    return report
