"""The benchmark compares equal work: same weights, same prompts, same tokens."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from florence2.errors import FlorenceError
from serve.cli.main import app

CONTRACT = {
    "ours_s",
    "reference_fp32_s",
    "reference_bf16_s",
    "ratio_fp32",
    "ratio_bf16",
    "peak_memory_mib",
    "reference_peak_memory_mib",
}

A_ROW = {
    **{"size": "base", "runtime": "torch", "precision": "bf16"},
    **{"batch": 1, "prompts": 20, "beams": 3, "tokens": 30},
    **{"ours_s": 2.0, "reference_fp32_s": 50.0, "reference_bf16_s": None, "others_s": 60.0},
    **{"ratio_fp32": 25.0, "ratio_bf16": None, "ratio_others": 30.0, "same_tokens": None},
    **{"peak_memory_mib": 100.0, "reference_peak_memory_mib": 200.0, "others_measured_asks": 4},
    "measured_asks": {"ours": 20, "reference_fp32": 20, "others": 4},
    "failed": {"reference_bf16": "no memory"},
}


def run(*words):
    return CliRunner().invoke(app, ["benchmark", *words])


def test_a_small_run_writes_rows_whose_sides_did_the_same(tmp_path):
    file, plot, copy = tmp_path / "rows.json", tmp_path / "plot.svg", tmp_path / "copy.svg"
    axes = ["--size", "tiny", "--tokens", "4", "--repeats", "1", "--prompts", "1,2"]
    outcome = run(*axes, "--no-bf16-reference", "--json", str(file), "--plot", str(plot))
    assert outcome.exit_code == 0, outcome.output
    content = json.loads(file.read_text(encoding="utf-8"))
    assert [row["prompts"] for row in content["rows"]] == [1, 2]
    for row in content["rows"]:
        assert set(row) >= CONTRACT
        assert row["same_tokens"]
        assert row["ratio_fp32"] == pytest.approx(row["reference_fp32_s"] / row["ours_s"])
        assert row["ratio_bf16"] is None
        assert row["ratio_others"] == pytest.approx(row["others_s"] / row["ours_s"])
        assert min(row["peak_memory_mib"], row["reference_peak_memory_mib"]) > 100
        for side, whole_s in (("ours", row["ours_s"]), ("others", row["others_s"])):
            assert sum(row["stages_s"][side].values()) == pytest.approx(whole_s, rel=0.01)
    [growth] = content["growth"]
    assert (growth["per"], growth["counts"]) == ("prompt", [1, 2])
    assert {"torch", "transformers", "cores", "threads"} <= set(content["machine"])
    # The same table and plot can be had from the file alone.
    later = run("--from", str(file), "--plot", str(copy))
    assert later.exit_code == 0, later.output
    assert "each further prompt costs" in later.output
    assert later.output in outcome.output
    assert copy.read_bytes() == plot.read_bytes()


def test_the_table_says_what_failed_and_what_was_measured_in_part(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"machine": {}, "rows": [A_ROW]}), encoding="utf-8")
    outcome = run("--from", str(file))
    assert outcome.exit_code == 0, outcome.output
    assert "the reference in bf16 failed: no memory." in outcome.output
    assert "one prompt at a time measured on 4 of 20 answers" in outcome.output
    # 60 / 2 s, counted over all answers
    assert "30.00x*" in outcome.output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--size", "huge"], "Unknown size 'huge'"),
        (["--tokens", "many"], "whole numbers"),
        (["--prompts", "0"], "The prompts are whole numbers of at least 1"),
        (["--runtime", "onnx"], "Unknown runtime 'onnx'"),
        (["--precision", "int4"], "Unknown precision 'int4'"),
        (["--precision", "fp32,int4"], "Unknown precision 'int4'"),
        (
            ["--runtime", "torch", "--precision", "fp32,nf4"],
            "'nf4' of the torch runtime is for GPUs",
        ),
        (["--device", "gpu"], "Unknown device 'gpu'"),
        (["--tokens", "2000"], "at most 1024 tokens"),
        (["--repeats", "0"], "at least 1 timed run"),
        (["--full", "--size", "base"], "sizes were named besides"),
        (["--from", "nowhere.json"], "nowhere.json is none"),
    ],
)
def test_a_bad_axis_gets_one_sentence(words, expected):
    outcome = run(*words)
    assert isinstance(outcome.exception, FlorenceError)
    assert expected in str(outcome.exception)
