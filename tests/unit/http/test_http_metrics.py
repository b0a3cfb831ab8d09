"""The numbers the app gives away about itself."""

import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from florence2.engine.scheduler import BatchReport, Priority
from serve.http.metrics import STAGES, Metrics


def values_of(metrics):
    """Every sample as {name{labels}: value}, read back by the library's own parser."""
    body, _ = metrics.render()
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


@pytest.fixture
def metrics():
    return Metrics()


def test_two_sets_of_metrics_stand_side_by_side(metrics):
    other = Metrics()
    other.count_image("labeled")
    assert ("florence2_images_total", ("outcome", "labeled")) not in values_of(metrics)


def test_requests_are_counted_by_route_and_status(metrics):
    metrics.count_request("/inference_image", 200, 0.3)
    metrics.count_request("/inference_image", 200, 0.3)
    metrics.count_request("/inference_image", 400, 0.3)
    values = values_of(metrics)
    row = ("florence2_requests_total", ("route", "/inference_image"))
    assert values[*row, ("status", "200")] == 2
    assert values[*row, ("status", "400")] == 1
    seconds = values["florence2_request_seconds_sum", ("route", "/inference_image")]
    assert seconds == pytest.approx(0.9)


def test_unknown_routes_and_codes_share_one_label(metrics):
    for number in range(100):
        metrics.count_request(f"/{number}", 404, 0.0)
        metrics.count_image("failed", f"code {number}")
    values = values_of(metrics)
    assert values["florence2_requests_total", ("route", "other"), ("status", "404")] == 100
    assert values["florence2_failures_total", ("code", "internal_error")] == 100
    assert not [key for key in values if "/7" in str(key) or "code 7" in str(key)]


def test_failures_are_counted_by_code_and_successes_are_not_among_them(metrics):
    metrics.count_image("labeled")
    metrics.count_image("empty")
    metrics.count_image("failed", "bad_image")
    values = values_of(metrics)
    outcomes = {o: values["florence2_images_total", ("outcome", o)] for o in ("labeled", "empty")}
    assert outcomes == {"labeled": 1, "empty": 1}
    failures = [key for key in values if key[0] == "florence2_failures_total"]
    assert failures == [("florence2_failures_total", ("code", "bad_image"))]


def test_a_batch_is_seen_in_all_its_numbers(metrics):
    report = BatchReport(
        priority=Priority.BULK,
        prompts=1,
        images=1,
        queue_depth=7,
        tokens=30,
        seconds=1.5,
        waited_s=0.25,
        together=3,
    )
    metrics.observe_batch(report)
    values = values_of(metrics)
    assert values["florence2_batch_prompts_bucket", ("le", "2.0")] == 0
    assert values["florence2_batch_prompts_bucket", ("le", "4.0")] == 1
    assert values[("florence2_queue_depth",)] == 7
    assert values[("florence2_tokens_total",)] == 30
    # 30 tokens in 1.5 seconds
    assert values[("florence2_tokens_per_second",)] == 20
    assert values["florence2_stage_seconds_sum", ("stage", "queue")] == 0.25


def test_a_batch_that_took_no_time_has_no_rate(metrics):
    report = BatchReport(
        Priority.INTERACTIVE, prompts=1, images=1, queue_depth=0, tokens=0, seconds=0.0, waited_s=0
    )
    metrics.observe_batch(report)
    assert values_of(metrics)[("florence2_tokens_per_second",)] == 0


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_there_before_and_after_its_first_time(metrics, stage):
    key = ("florence2_stage_seconds_count", ("stage", stage))
    assert values_of(metrics)[key] == 0
    metrics.stage(stage, 0.1)
    assert values_of(metrics)[key] == 1


def test_only_the_model_that_is_loaded_is_named(metrics):
    metrics.set_model("Florence-2-base", "cpu", "float32", "PyTorch")
    metrics.set_model("Florence-2-large", "cuda:0", "bfloat16", "PyTorch")
    names = [dict(key[1:])["name"] for key in values_of(metrics) if "model_info" in key[0]]
    assert names == ["Florence-2-large"]
    metrics.clear_model()
    assert not [key for key in values_of(metrics) if "model_info" in key[0]]


def test_memory_is_read_when_it_is_asked_for(metrics):
    used = [10.0]
    metrics.watch_memory(lambda: used[0], lambda: 2 * used[0])
    used[0] = 50.0
    values = values_of(metrics)
    assert values[("florence2_process_resident_bytes",)] == 50
    assert values[("florence2_device_memory_bytes",)] == 100


def test_no_count_of_any_thread_is_lost(metrics):
    def count():
        for _ in range(500):
            metrics.count_request("/tasks", 200, 0.0)

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    key = ("florence2_requests_total", ("route", "/tasks"), ("status", "200"))
    assert values_of(metrics)[key] == 4000


def test_the_content_type_is_the_text_format(metrics):
    assert metrics.render()[1].startswith("text/plain; version=0.0.4")
