"""What is tried again after a failure of the platform, how often, and what is not."""

from types import SimpleNamespace

import httpx
import pytest
import requests

from florence2.errors import GenerationCancelledError
from serve.platform import patience
from serve.platform.patience import Patience, PlatformAwayError, is_passing


def answered(status):
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(response=response)


KINDS = {
    "busy": (answered(429), True),
    "a fault of its own": (answered(500), True),
    "a proxy without it": (answered(502), True),
    "overloaded": (answered(503), True),
    "too slow": (answered(504), True),
    "refused": (answered(400), False),
    "no rights": (answered(403), False),
    "not there": (answered(404), False),
    "too large": (answered(413), False),
    "no connection": (requests.ConnectionError("x"), True),
    "no answer in time": (requests.Timeout("x"), True),
    "cut off": (requests.exceptions.ChunkedEncodingError("x"), True),
    "given up by the SDK": (requests.exceptions.RetryError("x"), True),
    "cut off, by its other client": (httpx.ReadError("x"), True),
    "its certificate": (requests.exceptions.SSLError("x"), False),
    "not of the platform": (ValueError("x"), False),
}


@pytest.mark.parametrize(("error", "passes"), KINDS.values(), ids=KINDS)
def test_the_kind_of_an_error_says_whether_it_passes(error, passes):
    assert is_passing(error) is passes


class Clock:
    """Time passes only where somebody sleeps."""

    def __init__(self, monkeypatch):
        self.now_s = 0.0
        instead = SimpleNamespace(monotonic=lambda: self.now_s, sleep=self.sleep)
        monkeypatch.setattr(patience, "time", instead)

    def sleep(self, seconds):
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


class Platform:
    """Fails so many calls, or until a moment; ``answers`` what it is asked besides."""

    def __init__(self, clock, fails=0, until_s=0.0, error=requests.ConnectionError):
        self.clock, self.fails, self.until_s, self.error = clock, fails, until_s, error
        self.calls = 0

    def work(self):
        self.calls += 1
        if self.calls <= self.fails or self.clock.now_s < self.until_s:
            raise self.error("away")
        return "done"

    def answers(self):
        if self.clock.now_s < self.until_s:
            raise self.error("away")


def patient(platform, should_stop=lambda: False):
    return Patience(platform.answers, should_stop)


@pytest.mark.parametrize("fails", [0, 1, 3])
def test_a_failure_that_passes_is_tried_a_few_times(clock, fails):
    platform = Platform(clock, fails)
    assert patient(platform).tried(platform.work) == "done"
    assert platform.calls == fails + 1


def test_what_fails_although_the_platform_answers_is_about_what_was_sent(clock):
    platform = Platform(clock, fails=100)
    with pytest.raises(requests.ConnectionError):
        patient(platform).tried(platform.work)
    assert platform.calls == 4
    assert clock.now_s < 10


def test_a_platform_that_is_away_for_two_minutes_is_waited_for(clock):
    platform = Platform(clock, until_s=120)
    assert patient(platform).tried(platform.work) == "done"
    assert 120 <= clock.now_s < 130


def test_a_platform_that_does_not_come_back_is_told_as_away(clock):
    platform = Platform(clock, until_s=10_000)
    with pytest.raises(PlatformAwayError, match="cannot be reached"):
        patient(platform).tried(platform.work)
    assert patience.LIMIT_S <= clock.now_s < patience.LIMIT_S + 10


def test_what_is_refused_is_not_tried_again(clock):
    platform = Platform(clock, fails=100, error=ValueError)
    with pytest.raises(ValueError, match="away"):
        patient(platform).tried(platform.work)
    assert (platform.calls, clock.now_s) == (1, 0.0)


def test_a_run_that_is_stopped_waits_for_nothing(clock):
    platform = Platform(clock, until_s=10_000)
    with pytest.raises(GenerationCancelledError, match=r"was stopped.*cannot be reached"):
        patient(platform, lambda: clock.now_s > 1).tried(platform.work)
    assert clock.now_s < 2
    assert platform.calls == 2


def test_what_is_refused_stays_a_failure_of_a_run_that_is_stopped(clock):
    platform = Platform(clock, fails=100, error=ValueError)
    with pytest.raises(ValueError, match="away"):
        patient(platform, lambda: True).tried(platform.work)
