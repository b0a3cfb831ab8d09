"""A stand-in at the model's edge that knows every scene's exact truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from florence2.engine.ask import Ask
from florence2.postprocess import parse
from florence2.records import AnswerToken, Failure, Result
from florence2.tasks import find_task
from florence2.tokenizer import tokens_from_text
from florence2_demo.drawing import draw_scene
from florence2_demo.scene import make_scene
from florence2_demo.truth import ground_truth


def pixels_of(picture: Image.Image) -> tuple[tuple[int, int], bytes]:
    return picture.size, picture.tobytes()


@dataclass
class Oracle:
    """Recognises a scene by its pixels and answers ``change(truth)``; counts its calls."""

    seeds: range
    change: Callable[[str, str], str] = lambda task, answer: answer

    def __post_init__(self) -> None:
        scenes = [make_scene(seed) for seed in self.seeds]
        self.scenes = {pixels_of(draw_scene(scene)): scene for scene in scenes}
        self.calls: list[int] = []
        self.pictures: list[int] = []
        self.spelled: list[list[AnswerToken]] = []

    def run_many(self, asks: Sequence[Ask]) -> list[Result | Failure]:
        self.calls.append(len(asks))
        self.pictures.append(len({id(ask.image) for ask in asks}))
        return [self.answer(ask) for ask in asks]

    def answer_tokens(
        self, token_ids: Sequence[int], *log_probs: Sequence[float]
    ) -> list[AnswerToken]:
        """In the vocabulary's place: the tokens of the answer with this number."""
        return self.spelled[token_ids[0]]

    def answer(self, ask: Ask) -> Result | Failure:
        scene = self.scenes[pixels_of(ask.image)]
        size = scene.size_wh
        region = ask.region and tuple(v / size[i % 2] for i, v in enumerate(ask.region))
        truth = ground_truth(scene, ask.task, ask.text, region)
        answer = self.change(ask.task, truth.answer)
        # Every token is certain.
        tokens = [
            replace(token, log_prob=0.0, near_log_prob=0.0) for token in tokens_from_text(answer)
        ]
        self.spelled.append(tokens)
        parsed = parse(tokens, find_task(ask.task), size)
        return Result(
            ask.task,
            size,
            parsed.objects,
            parsed.text,
            answer,
            (len(self.spelled) - 1,),
            truncated=False,
            notes=parsed.notes,
        )
