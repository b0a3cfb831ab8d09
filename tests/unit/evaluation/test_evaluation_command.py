"""``florence2 evaluate``: its options, its table, its file."""

import json
from types import SimpleNamespace

import pytest
from evaluation_oracle import Oracle

from florence2_demo.evaluation import FIGURES
from serve.cli.main import main


@pytest.fixture
def loaded(monkeypatch):
    """What was loaded, with an oracle in the place of every checkpoint."""
    calls = []

    def load(name, device, runtime, precision):
        calls.append((name, device, runtime, precision))
        model = Oracle(range(5, 9))
        model.device, model.precision = "cpu", "fp32"
        checkpoint = SimpleNamespace(
            name=name, revision="abc", vocabulary=model, generation=SimpleNamespace(num_beams=3)
        )
        model.engine = SimpleNamespace(checkpoint=checkpoint)
        return model

    monkeypatch.setattr("serve.cli.evaluate.load_model", load)
    return calls


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *arguments])
    return ended.value.code or 0


def test_the_figures_are_printed_and_written(loaded, tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert run("--model", "demo", "--scenes", "4", "--seed", "5", "--json", str(file)) == 0
    content = json.loads(file.read_text(encoding="utf-8"))
    assert (content["checkpoint"], content["revision"]) == ("demo", "abc")
    assert (content["precision"], content["device"]) == ("fp32", "cpu")
    assert (content["scenes"], content["seed"], len(content["tasks"])) == (4, 5, 15)
    assert (content["beams"], content["od_map50"]) == (3, 1.0)
    assert content["images_per_s"] > 0
    assert set(content["interval_95"]) >= set(FIGURES)
    assert set(content["well_formed"]) == set(content["tasks"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in FIGURES)
    assert "demo@abc in fp32 on cpu: scenes 5 to 8" in printed
    assert loaded == [("demo", "auto", "auto", "auto")]


def test_options_reach_the_model(loaded, capsys):
    options = ("--device", "cpu", "--precision", "bf16", "--runtime", "torch", "--batch", "1")
    assert run("--scenes", "2", "--seed", "5", "--tasks", "caption,<OCR>", *options) == 0
    assert loaded == [("demo", "cpu", "torch", "bf16")]
    printed = capsys.readouterr().out
    assert "caption_exact" in printed
    assert "od_map50" not in printed


def test_scores_are_compared_on_request(loaded, tmp_path, capsys):
    file = tmp_path / "figures.json"
    asked = ("--scenes", "4", "--seed", "5", "--tasks", "od,caption")
    assert run(*asked, "--compare-scores", "--json", str(file)) == 0
    rows = json.loads(file.read_text(encoding="utf-8"))["score_definitions"]
    assert rows["near mean"] == {"map50": 1.0, "auroc": None, "ece": 0.0}
    assert "near mean" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--seed", "399999", "--scenes", "2"), "Held-out scenes have the seeds 0 to 399999"),
        (("--tasks", "<ODD>"), "Unknown task '<ODD>'"),
        (("--tasks", "ocr", "--compare-scores"), "add <OD> to --tasks"),
        (("--json", "nowhere/at/all.json"), "a folder that exists"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(arguments, sentence, loaded, capsys):
    assert run(*arguments) == 2
    assert sentence in capsys.readouterr().err
    assert loaded == []
