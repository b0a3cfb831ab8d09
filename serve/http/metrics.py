"""What the app counts and measures, in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from serve.http.errors import STATUS_BY_CODE, UNEXPECTED
from serve.http.routes import OTHER, ROUTE_BY_PATH

if TYPE_CHECKING:
    from florence2.budget import Budget
    from florence2.engine.scheduler import BatchReport

Stage = Literal["queue", "vision", "prompt", "decode", "postprocess"]
Outcome = Literal["labeled", "empty", "failed"]

STAGES: Final[tuple[Stage, ...]] = ("queue", "vision", "prompt", "decode", "postprocess")

_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BATCH_SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128)
_MODEL_LABELS: Final = ("name", "device", "precision", "runtime")


class Metrics:
    """The app's counters, in a registry of their own. Every method may be called by any thread.

    Labels come from closed sets, so their number is bounded: a route that is not in the table is
    counted as ``"other"``, a failure's code without a rule as ``"internal_error"``.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "Answered requests.", ("route", "status"))
        self._request_s = self._histogram(
            "request_seconds", "From a request's first byte to its answer's end.", ("route",)
        )
        self._images = self._counter("images", "Images by what became of them.", ("outcome",))
        self._failures = self._counter("failures", "Images that failed, by reason.", ("code",))
        self._stage_s = self._histogram("stage_seconds", "Time in one stage.", ("stage",))
        self._batch = Histogram(
            "florence2_batch_prompts",
            "Prompts that were answered together.",
            buckets=_BATCH_SIZES,
            registry=self._registry,
        )
        self._queued = self._gauge("queue_depth", "Prompts that wait for the model.")
        self._tokens = self._counter("tokens", "Tokens generated.")
        self._token_rate = self._gauge("tokens_per_second", "Token rate of the last batch.")
        self._model = self._gauge("model_info", "1 for the model that is loaded.", _MODEL_LABELS)
        for stage in STAGES:
            self._stage_s.labels(stage)

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """One answered request; ``status`` 499 is a client that left before."""
        label = route if route in ROUTE_BY_PATH else OTHER
        self._requests.labels(label, str(status)).inc()
        self._request_s.labels(label).observe(seconds)

    def count_image(self, outcome: Outcome, code: str | None = None) -> None:
        """One image of a request; ``code`` is the failure's, for ``"failed"``."""
        self._images.labels(outcome).inc()
        if code is not None:
            self._failures.labels(code if code in STATUS_BY_CODE else UNEXPECTED).inc()

    def stage(self, name: Stage, seconds: float) -> None:
        """Seconds that one image or batch spent in a stage."""
        self._stage_s.labels(name).observe(seconds)

    def observe_batch(self, report: BatchReport) -> None:
        """What the scheduler answered; to be given to it as its observer."""
        self._batch.observe(report.together)
        self._queued.set(report.queue_depth)
        self._tokens.inc(report.tokens)
        if report.seconds > 0:
            self._token_rate.set(report.tokens / report.seconds)
        self.stage("queue", report.waited_s)

    def set_model(self, name: str, device: str, precision: str, runtime: str) -> None:
        """The model that is loaded from now on, instead of the one before."""
        self._model.clear()
        self._model.labels(name, device, precision, runtime).set(1)

    def clear_model(self) -> None:
        """No model is loaded any more."""
        self._model.clear()

    def watch_memory(
        self, process_bytes: Callable[[], float], device_bytes: Callable[[], float]
    ) -> None:
        """Where the two memory gauges are read from, each time the metrics are asked for."""
        watched = self._gauge("process_resident_bytes", "Memory of the process.")
        watched.set_function(process_bytes)
        watched = self._gauge("device_memory_bytes", "Memory in use on the model's device.")
        watched.set_function(device_bytes)

    def watch_ready(self, is_ready: Callable[[], bool]) -> None:
        """Where it is read from whether requests are answered now."""
        watched = self._gauge("ready", "1 while requests are answered, as /is_ready says.")
        watched.set_function(lambda: float(is_ready()))

    def watch_budget(self, name: str, what: str, budget: Budget) -> None:
        """Gauges of a budget: what is held, what may be, and who waits for room."""
        gauge = self._gauge(f"{name}_held", f"{what} that are held.")
        gauge.set_function(lambda: budget.held)
        gauge = self._gauge(f"{name}_limit", f"{what} that may be held at a time.")
        gauge.set_function(lambda: budget.capacity)
        gauge = self._gauge(f"{name}_waiting", f"Who waits for room for more {what.lower()}.")
        gauge.set_function(lambda: budget.num_waiting)

    def render(self) -> tuple[bytes, str]:
        """The answer of ``/metrics``: the body and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4

    def _counter(self, name: str, help_text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"florence2_{name}", help_text, labels, registry=self._registry)

    def _gauge(self, name: str, help_text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"florence2_{name}", help_text, labels, registry=self._registry)

    def _histogram(self, name: str, help_text: str, labels: tuple[str, ...]) -> Histogram:
        return Histogram(
            f"florence2_{name}", help_text, labels, buckets=_SECONDS, registry=self._registry
        )
