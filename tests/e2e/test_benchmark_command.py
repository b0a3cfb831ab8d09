"""The benchmark compares equal work: same weights, same prompts, same tokens."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from florence2.errors import FlorenceError
from serve.cli import app


def test_a_small_run_writes_rows_whose_two_sides_did_the_same(tmp_path):
    file = tmp_path / "rows.json"
    words = ["benchmark", "--size", "tiny", "--tokens", "6", "--repeats", "1", "--prompts", "2"]
    outcome = CliRunner().invoke(app, [*words, "--no-bf16-reference", "--json", str(file)])
    assert outcome.exit_code == 0, outcome.output
    content = json.loads(file.read_text(encoding="utf-8"))
    [row] = content["rows"]
    assert row["same_tokens"]
    assert row["ratio_fp32"] == pytest.approx(row["reference_fp32_s"] / row["ours_s"])
    assert row["ratio_bf16"] is None
    assert min(row["peak_memory_mib"], row["reference_peak_memory_mib"]) > 100
    assert sum(row["ours_stages_s"].values()) == pytest.approx(row["ours_s"], rel=0.01)
    assert {"torch", "transformers", "cores"} <= set(content["machine"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--size", "huge"], "Unknown size 'huge'"),
        (["--tokens", "many"], "whole numbers"),
        (["--runtime", "onnx"], "'onnx' was received"),
        (["--precision", "int8"], "Unknown precision 'int8'"),
        (["--device", "gpu"], "Unknown device 'gpu'"),
        (["--tokens", "2000"], "at most 1024 tokens"),
        (["--repeats", "0"], "at least 1 timed run"),
    ],
)
def test_a_bad_axis_gets_one_sentence(words, expected):
    outcome = CliRunner().invoke(app, ["benchmark", *words])
    assert isinstance(outcome.exception, FlorenceError)
    assert expected in str(outcome.exception)
