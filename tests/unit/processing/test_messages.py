"""Numbers in sentences for people: durations and sizes as they are said."""

from __future__ import annotations

import re

import pytest

from florence2.checkpoint.hub import megabytes
from florence2.engine.ask import Ask
from florence2.engine.work_queue import Priority, Request
from florence2.errors import shown_s

DURATIONS = {
    0.0: "less than 1 ms",
    0.000976885: "less than 1 ms",
    0.001: "1 ms",
    0.0123456: "12 ms",
    0.25: "250 ms",
    0.9994: "999 ms",
    0.9996: "1 s",
    1.0: "1 s",
    2.5333333: "2.5 s",
    59.94: "59.9 s",
    59.96: "1 min",
    60.0: "1 min",
    83.2: "1 min 23 s",
    3599.7: "1 h",
    7500.0: "2 h 5 min",
    1e6: "277 h 46 min",
}


@pytest.mark.parametrize(("seconds", "text"), DURATIONS.items(), ids=str)
def test_a_duration_is_shown_as_people_say_it(seconds, text):
    assert shown_s(seconds) == text


@pytest.mark.parametrize("seconds", [10**power * 1.23456789 for power in range(-7, 7)])
def test_no_duration_has_more_digits_than_anybody_reads(seconds):
    assert not re.search(r"\d\.\d\d|\d{4}|e[-+]", shown_s(seconds))


@pytest.mark.parametrize("deadline_s", [0.000976885, 0.0, -1.0, -0.5e-9])
def test_a_deadline_that_has_passed_is_said_in_words(deadline_s):
    request = Request([Ask("a.png", "<CAPTION>")], Priority.BULK, 1, deadline_s)
    reason = None
    while reason is None:
        reason = request.wait()
    assert reason.code == "deadline"
    assert re.search(r": less than 1 ms from when it was asked for;", str(reason))


SIZES = {200: "200 bytes", 99_999: "99999 bytes", 100_000: "0.1 MB", 1_540_000_000: "1540.0 MB"}


@pytest.mark.parametrize(("size", "text"), SIZES.items(), ids=str)
def test_a_size_is_shown_as_people_say_it(size, text):
    assert megabytes(size) == text
