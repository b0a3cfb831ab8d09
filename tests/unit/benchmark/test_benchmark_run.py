"""The sides take turns on a case, within a figure's time, each in a process that ends alone."""

from __future__ import annotations

from dataclasses import replace

import psutil
import pytest
from benchmark_tools import ScriptedSides

from florence2.benchmark.plan import BenchmarkPlan, Case, Subject
from florence2.benchmark.run import Setup, Side, SideFailedError, Workers, measure

ALIKE = {"ours_bf16": 1.0, "reference_fp32": 3.0, "reference_bf16": 2.0, "others": 4.0}
CASE = Case(batch=1, prompts=1, beams=3, tokens=30)
BF16 = Subject("base", "torch", "bf16")
SHORT = Case(batch=1, prompts=1, beams=1, tokens=4)
OURS_FP32 = Side("ours", "torch", "fp32")


def test_every_side_is_timed_in_turn_after_a_first_run_that_does_not_count():
    sides = ScriptedSides(ALIKE | {"reference_fp32": [9.0, 3.0, 3.0]})
    [row] = measure(CASE, [BF16], sides.ask, BenchmarkPlan(repeats=2))
    assert sides.asked == [(side, turn) for turn in range(3) for side in ALIKE]
    assert (row.reference_fp32_s, row.ratio_fp32, row.ratio_bf16) == (3.0, 3.0, 2.0)
    assert row.ratio_others == 4.0
    assert row.runs == {"ours": 2, "reference_fp32": 2, "reference_bf16": 2, "others": 2}


def test_a_long_first_run_counts_and_is_the_only_one():
    sides = ScriptedSides(ALIKE | {"reference_fp32": 30.0})
    [row] = measure(CASE, [BF16], sides.ask, BenchmarkPlan(figure_limit_s=45.0))
    assert sides.count("reference_fp32") == 1
    assert row.runs["reference_fp32"] == 1
    assert row.runs["ours"] == 3
    assert row.ratio_fp32 == 30.0


def test_no_run_is_begun_that_would_exceed_the_figures_time():
    # 10 s is a warm-up; then 10 + 10 = 20 fits into 25 s, 30 does not.
    sides = ScriptedSides(ALIKE | {"others": 10.0})
    [row] = measure(CASE, [BF16], sides.ask, BenchmarkPlan(repeats=5, figure_limit_s=25.0))
    assert row.runs["others"] == 2
    assert row.runs["ours"] == 5


def test_two_precisions_of_ours_share_the_references_runs():
    sides = ScriptedSides(ALIKE | {"ours_fp32": 2.0})
    rows = measure(CASE, [Subject("base", "torch", "fp32"), BF16], sides.ask, BenchmarkPlan())
    assert [(row.precision, row.ratio_fp32) for row in rows] == [("fp32", 1.5), ("bf16", 3.0)]
    assert sides.count("reference_fp32") == 4


@pytest.mark.parametrize(
    ("side", "name", "left_out"),
    [
        ("ours_bf16", "ours", ("ours_s", "ratio_fp32", "ratio_bf16", "ratio_others")),
        ("reference_fp32", "reference_fp32", ("reference_fp32_s", "ratio_fp32")),
        ("reference_bf16", "reference_bf16", ("reference_bf16_s", "ratio_bf16")),
        ("others", "others", ("others_s", "ratio_others")),
    ],
)
def test_a_side_that_fails_has_its_reason_and_the_others_their_figures(side, name, left_out):
    sides = ScriptedSides(ALIKE | {side: "no memory"})
    [row] = measure(CASE, [BF16], sides.ask, BenchmarkPlan())
    assert row.failed == {name: "no memory"}
    figures = ("ours_s", "reference_fp32_s", "reference_bf16_s", "others_s")
    ratios = ("ratio_fp32", "ratio_bf16", "ratio_others")
    assert {key for key in (*figures, *ratios) if getattr(row, key) is None} == set(left_out)
    assert sides.count(side) == 1


def test_a_side_that_fails_later_keeps_what_it_had():
    sides = ScriptedSides(ALIKE | {"reference_bf16": [2.0, 2.0, "no memory"]})
    [row] = measure(CASE, [BF16], sides.ask, BenchmarkPlan())
    assert row.ratio_bf16 == 2.0
    assert row.runs["reference_bf16"] == 1
    assert row.failed == {"reference_bf16": "no memory"}


def test_a_part_of_the_answers_is_counted_over_all_of_them_and_the_row_says_so():
    # 4 of 20 answers in 8 s are 40 s for all.
    case = Case(batch=1, prompts=20, beams=3, tokens=30)
    sides = ScriptedSides(ALIKE | {"others": 8.0}, asks=20, measured={"others": 4})
    [row] = measure(case, [BF16], sides.ask, BenchmarkPlan())
    assert row.others_s == pytest.approx(40.0)
    assert row.ratio_others == pytest.approx(40.0)
    assert sum(row.stages_s["others"].values()) == pytest.approx(40.0)
    assert row.others_measured_asks == 4
    assert row.measured_asks["reference_fp32"] == 20


def test_sides_that_were_not_asked_for_are_not_run():
    sides = ScriptedSides(ALIKE)
    plan = BenchmarkPlan(reference_bf16=False, others=False)
    [row] = measure(CASE, [BF16], sides.ask, plan)
    assert {side for side, _ in sides.asked} == {"ours_bf16", "reference_fp32"}
    assert (row.ratio_bf16, row.ratio_others, row.failed) == (None, None, {})


def running_sides():
    children = psutil.Process().children()
    return [one for one in children if "florence2.benchmark.sides" in one.cmdline()]


@pytest.fixture(scope="module")
def setup(tiny_folder):
    return Setup(tiny_folder, "cpu", threads=1, timeout_s=120.0)


@pytest.fixture(scope="module")
def workers(setup):
    """One side after another is loaded once for the tests that leave it as it was."""
    with Workers(setup) as workers:
        yield workers


def test_a_side_that_was_ended_fails_once_and_is_started_again(workers):
    first = workers.run(OURS_FP32, SHORT, 0, 1.0)
    [process] = running_sides()
    process.kill()
    with pytest.raises(SideFailedError, match="most likely for want of memory"):
        workers.run(OURS_FP32, SHORT, 0, 1.0)
    again = workers.run(OURS_FP32, SHORT, 0, 1.0)
    assert again.token_ids == first.token_ids
    assert min(again.loading_mib, again.running_mib) > 100


def test_what_a_side_cannot_do_is_its_reason_and_it_goes_on(workers):
    too_long = replace(SHORT, tokens=5000)
    with pytest.raises(SideFailedError, match="max_new_tokens can be at most 1024"):
        workers.run(OURS_FP32, too_long, 0, 1.0)
    before = running_sides()
    assert workers.run(OURS_FP32, SHORT, 0, 1.0).measured_asks == 1
    assert running_sides() == before


def test_a_side_that_does_not_load_is_not_tried_again(setup, tmp_path):
    with Workers(replace(setup, folder=tmp_path)) as workers:
        with pytest.raises(SideFailedError, match=r"config\.json"):
            workers.run(OURS_FP32, SHORT, 0, 1.0)
        ending = running_sides()
        with pytest.raises(SideFailedError, match=r"config\.json"):
            workers.run(OURS_FP32, SHORT, 0, 1.0)
        assert set(running_sides()) <= set(ending)


def test_a_side_that_does_not_answer_in_time_is_ended(setup):
    hasty = replace(setup, timeout_s=0.01)
    with Workers(hasty) as workers, pytest.raises(SideFailedError, match=r"within 10 ms"):
        workers.run(OURS_FP32, SHORT, 0, 1.0)
