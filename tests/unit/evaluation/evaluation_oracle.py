"""A stand-in at the model's edge that knows every scene's exact truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from florence2.ask import Ask
from florence2.images import content_hash
from florence2.parsing import parse
from florence2.pieces import pieces_from_text
from florence2.records import Failure, Result
from florence2.tasks import find_task
from florence2.training.draw import draw_scene
from florence2.training.scene import make_scene
from florence2.training.truth import ground_truth


def spelled_result(task: str, answer: str, size_wh, score: float = 1.0) -> Result:
    """What the engine makes of an answer whose every token has the same probability."""
    from math import log

    pieces = [replace(piece, log_prob=log(score)) for piece in pieces_from_text(answer)]
    parsed = parse(pieces, find_task(task), size_wh)
    return Result(
        task, size_wh, parsed.objects, parsed.text, answer, (), truncated=False, notes=parsed.notes
    )


@dataclass
class Oracle:
    """Recognises a scene by its pixels and answers ``change(truth)``; counts its calls."""

    seeds: range
    change: Callable[[str, str], str] = lambda task, answer: answer

    def __post_init__(self) -> None:
        scenes = [make_scene(seed) for seed in self.seeds]
        self.scenes = {content_hash(draw_scene(scene)): scene for scene in scenes}
        self.calls: list[int] = []
        self.pictures: list[int] = []

    def run_many(self, asks: Sequence[Ask]) -> list[Result | Failure]:
        self.calls.append(len(asks))
        self.pictures.append(len({id(ask.image) for ask in asks}))
        return [self.answer(ask) for ask in asks]

    def answer(self, ask: Ask) -> Result | Failure:
        scene = self.scenes[content_hash(ask.image)]
        size = scene.size_wh
        region = ask.region and tuple(v / size[i % 2] for i, v in enumerate(ask.region))
        truth = ground_truth(scene, ask.task, ask.text, region)
        return spelled_result(ask.task, self.change(ask.task, truth.answer), size)
