"""Which figure of a task says what a precision loses, and when none of them does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from label_fakes import FakeModel, paint, result

from florence2.conversion.measured_loss import FEWEST_IMAGES
from florence2.evaluation.measure import TextAnswer, measure_texts
from florence2.labeled.records import LeftOut
from serve.cli.main import main
from serve.evaluation import TaskReport
from serve.precision_loss import compared


def report(task, *, failed=()):
    """Texts of as many images as are enough, all of them right."""
    answers = [
        TextAnswer(str(number), task, ("four",), "four")
        for number in range(FEWEST_IMAGES + 1)
        if str(number) not in failed
    ]
    texts = measure_texts(answers, [LeftOut(name, "cut") for name in failed])
    return TaskReport(SimpleNamespace(task=task), None, texts)


FIGURES = {
    "<REGION_TO_CATEGORY>": ("exact texts", None),
    "<DocVQA>": ("exact texts", None),
    "<OCR>": ("right characters", None),
    "<REGION_TO_OCR>": ("right characters", None),
    "<CAPTION>": ("right characters", "how good an answer to <CAPTION> is"),
    "<REGION_TO_DESCRIPTION>": ("right characters", "its characters do not say"),
}


@pytest.mark.parametrize(("task", "expected"), FIGURES.items(), ids=FIGURES)
def test_each_task_has_its_figure_and_what_is_said_freely_has_none(task, expected):
    figure, why_not = expected
    loss = compared([report(task)], [report(task)], "fp32", "int8")
    [lost] = loss.tasks
    assert (lost.figure, lost.points, loss.is_too_much) == (figure, 0.0, False)
    assert loss.why_not == why_not or why_not in loss.why_not


def test_an_image_that_only_one_of_them_answers_is_no_measure():
    loss = compared([report("<OCR>")], [report("<OCR>", failed=("3",))], "fp32", "int8")
    assert loss.tasks[0].images == FEWEST_IMAGES
    assert loss.why_not == "some images were answered by one of the two only"
    both = [report("<OCR>", failed=("3",))]
    assert compared(both, both, "fp32", "int8").why_not is None


def test_a_task_that_cannot_be_compared_leaves_nothing_known():
    nothing = TaskReport(SimpleNamespace(task="<OD>"), None, None)
    loss = compared([report("<OCR>"), nothing], [report("<OCR>"), nothing], "fp32", "int8")
    assert loss.why_not == "<OD> could not be compared"


def test_any_two_precisions_are_compared_one_after_the_other(tmp_path, monkeypatch, capsys):
    closed = []
    model = FakeModel(lambda ask: result(ask.task, text="four"))
    model.engine.checkpoint.name, model.engine.checkpoint.revision = "stand-in", None
    model.device, model.precision, model.runtime = "cpu", "bf16", "torch"
    model.close = lambda: closed.append(len(model.asks))
    loads = model.put_in(monkeypatch)
    paint(tmp_path / "0.png", 0)
    line = '{"image": "0.png", "prefix": "<OCR>", "suffix": "four"}\n'
    (tmp_path / "annotations.jsonl").write_text(line)
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(tmp_path), "--precision", "bf16", "--against", "fp32"])
    assert not ended.value.code
    assert (len(loads), closed) == (2, [1])
    said = capsys.readouterr()
    assert "bf16 against fp32, the same images asked the same:" in said.out
    assert "<OCR> lost 0.00 points of right characters" in said.out
    assert "auto" not in said.err
