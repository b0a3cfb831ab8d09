"""How far OpenVINO's answers are from torch's in float32, in each precision, on held-out scenes.

    python bench/openvino_accuracy.py --scenes 500 --json docs/openvino_accuracy.json

The demo checkpoint, all 15 tasks, its own one beam, on a CPU; the scenes and figures are those of
``florence2 evaluate``. int8 is calibrated on the default scenes, which are not among them. With
``--precisions`` only some are measured, and the rows of the others stay as they are in the file.

An answer differs where its tokens do. Of those that differ in fp32 the gap is listed: by how much
torch's log-probabilities of the two tokens differ where the answers part, which with one beam are
the best two candidates there. A gap below 1e-4 is a tie that rounding decides.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import torch

from florence2 import Ask, Failure, Florence2, Result
from florence2.engine.ask import as_region, prompt_sentence
from florence2.engine.checks import probe_picture
from florence2.tasks import find_task
from florence2.tokens import EOS_ID
from florence2_demo.calibration import calibration_scenes
from florence2_demo.evaluation import EvaluationPlan, evaluate

PRECISIONS: Final = ("fp32", "bf16", "int8")
FIGURES: Final = ("od_map", "od_map50", "grounding_recall50", "ocr_cer")
"""Whose loss is stated, in points of a hundred."""


class NotedModel:
    """A model that keeps what it was asked and what it answered."""

    def __init__(self, model: Florence2) -> None:
        self.model = model
        self.asks: list[Ask] = []
        self.results: list[Result] = []
        self._began_s = time.monotonic()

    def run_many(self, asks: Sequence[Ask]) -> list[Result | Failure]:
        """As the model's own."""
        outcomes = self.model.run_many(asks)
        self.asks += asks
        self.results += [one for one in outcomes if isinstance(one, Result)]
        return outcomes

    def tell(self, scenes: int) -> None:
        """Prints how far it is, now and then."""
        if len(self.results) % 500 < scenes * 13:
            spent_s = time.monotonic() - self._began_s
            name = f"{self.model.runtime} {self.model.precision}"
            print(f"{name}: {len(self.results)} answers in {spent_s:.0f} s", flush=True)


def gap_where_they_part(
    exact: Florence2, ask: Ask, tokens: Sequence[int], others: Sequence[int]
) -> float:
    """By how much the log-probabilities of two answers' tokens differ where the answers part.

    As ``exact`` computes them after what both have in common; 0 where they are equal.
    """
    pairs = list(zip_longest(tokens, others, fillvalue=EOS_ID))
    at = next((place for place, (one, other) in enumerate(pairs) if one != other), None)
    if at is None:
        return 0.0
    encoded = exact.encode(ask.image)
    region = None if ask.region is None else as_region(ask.region)
    sentence = prompt_sentence(find_task(ask.task), ask.text, region, encoded.size_wh)
    prompt = exact.engine.checkpoint.vocabulary.encode_prompt(sentence)
    session = exact.engine.runtime.start([encoded.features], [prompt], 1, at + 2)
    logits = session.prefill()[0]
    for token in tokens[:at]:
        session.reorder(torch.zeros(1, 1, dtype=torch.long))
        logits = session.step(torch.tensor([[token]]))[0, 0]
    log_probs = logits.double().log_softmax(-1)
    one, other = pairs[at]
    return abs(float(log_probs[one] - log_probs[other]))


def measured(model: Florence2, plan: EvaluationPlan) -> tuple[NotedModel, dict[str, float]]:
    """The answers to a plan, and its figures."""
    noted = NotedModel(model)
    model.run("<CAPTION>", probe_picture())
    report = evaluate(noted, plan, progress=noted.tell)
    found = {name: report.figures[name].value for name in FIGURES}
    return noted, {name: value for name, value in found.items() if value is not None}


def compared(exact: NotedModel, other: NotedModel, lists_gaps: bool) -> dict[str, Any]:
    """How many answers are equal, and of those that are not the gaps."""
    answers = list(zip(exact.asks, exact.results, other.results, strict=True))
    apart = [(a, one, two) for a, one, two in answers if one.token_ids != two.token_ids]
    by_task: dict[str, int] = {}
    for ask, _, _ in apart:
        by_task[ask.task] = by_task.get(ask.task, 0) + 1
    found: dict[str, Any] = {
        "answers": len(answers),
        "equal": len(answers) - len(apart),
        "equal_share": round(1 - len(apart) / len(answers), 5),
        "different_by_task": by_task,
    }
    if lists_gaps:
        found["different"] = [
            {
                "task": ask.task,
                "text": ask.text,
                "answer": one.answer,
                "openvino": two.answer,
                "gap": gap_where_they_part(exact.model, ask, one.token_ids, two.token_ids),
            }
            for ask, one, two in apart
        ]
        found["largest_gap"] = max((row["gap"] for row in found["different"]), default=0.0)
    return found


def main() -> None:
    """Prints a line per precision, and writes all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    plan = EvaluationPlan(given.scenes, given.seed, beams=1, batch=given.batch)
    exact, exact_figures = measured(Florence2.load("demo", "cpu", "torch", precision="fp32"), plan)
    rows: dict[str, Any] = {"torch fp32": {"figures": exact_figures}}
    with tempfile.TemporaryDirectory() as folder:
        for precision in given.precisions:
            model = Florence2.load(
                "demo",
                "cpu",
                "openvino",
                precision=precision,
                cache_dir=folder,
                calibration=calibration_scenes,
            )
            noted, figures = measured(model, plan)
            points = {name: 100 * (figures[name] - exact_figures[name]) for name in FIGURES}
            rows[f"openvino {precision}"] = {
                **compared(exact, noted, lists_gaps=precision == "fp32"),
                "figures": figures,
                "points_from_torch_fp32": points,
                "notes": list(model.notes),
            }
            model.close()
            print(json.dumps({precision: rows[f"openvino {precision}"]}, indent=1), flush=True)
    if given.json is not None and given.json.is_file():
        earlier = json.loads(given.json.read_text(encoding="utf-8"))
        if (earlier["scenes"], earlier["seed"]) == (given.scenes, given.seed):
            rows = earlier["rows"] | rows
    content = {
        "scenes": given.scenes,
        "seed": given.seed,
        "beams": 1,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "rows": rows,
    }
    if given.json is not None:
        given.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
