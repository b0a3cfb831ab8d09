"""The demo checkpoint behind a scheduler, with a runtime whose passes can be looked at."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from engine_tools import engine_on
from scheduler_tools import Sender, WatchedRuntime

from florence2.engine.scheduler import BatchReport, Scheduler


@pytest.fixture(scope="session")
def model(load):
    return load("demo")


@pytest.fixture
def runtime(model):
    return WatchedRuntime(model.engine.runtime)


@pytest.fixture
def engine(model, runtime):
    return engine_on(model, runtime)


@pytest.fixture
def reports():
    return list[BatchReport]()


@pytest.fixture
def start(engine, reports):
    """Makes schedulers that are closed when the test is over."""
    started: list[Scheduler] = []

    def make(**options):
        scheduler = Scheduler(engine, **({"observer": reports.append} | options))
        started.append(scheduler)
        return scheduler

    yield make
    for scheduler in started:
        scheduler.close()


@pytest.fixture
def scheduler(start):
    return start()


@pytest.fixture
def send_to():
    """``send_to(scheduler)`` sends requests to it, each on a thread of its own."""
    with ThreadPoolExecutor(max_workers=64) as threads:
        yield lambda scheduler: Sender(scheduler, threads)


@pytest.fixture
def send(scheduler, send_to):
    """Sends requests to the scheduler of the test."""
    yield send_to(scheduler)
    scheduler.close()
