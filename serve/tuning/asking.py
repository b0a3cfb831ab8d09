"""Every prompt about every view of an image, which the vision tower sees once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from typing import Final

from florence2.budget import open_pixels
from florence2.engine.encoding import EncodedImage
from florence2.engine.engine import Encoded
from florence2.engine.scheduler import Priority
from florence2.errors import DeviceLostError, FlorenceError, NoRoomError, RequestError
from florence2.images import open_image
from florence2.labeled.records import LabeledImage, LeftOut
from florence2.records import Failure, Result
from serve.predict.annotations import Found, wanted_in
from serve.predict.predictor import (
    Call,
    OpenImage,
    Patience,
    Predictor,
    in_parts,
    joined_answer,
    questions_of,
    rules_of,
)
from serve.predict.tiling import View, plan_tiles, views_of
from serve.tuning.plan import TuningPlan

BATCH: Final = 8
"""At most so many images are asked about at once."""
# Half of what may wait for the model.
_MAX_ASKS: Final = 2048
_HOPELESS: Final = ("bad_request", "bad_checkpoint", "bad_device")


@dataclass(frozen=True, slots=True)
class Answers:
    """What the model said about the images that it could be asked about.

    ``found`` has for each (place of the tiling, class, prompt) what was found in each image.
    """

    images: list[LabeledImage] = field(default_factory=list)
    found: dict[tuple[int, str, str], list[tuple[Found, ...]]] = field(default_factory=dict)
    failed: list[LeftOut] = field(default_factory=list)
    num_truncated: int = 0
    is_interrupted: bool = False


def ask_all(
    predictor: Predictor,
    images: Sequence[LabeledImage],
    plan: TuningPlan,
    on_images: Callable[[int], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Answers:
    """Every prompt about every view of every image; each view is encoded once.

    An image that fails is named, and counts neither as found nor as missed. Raises RequestError
    where the first images fail alike because of what is asked, and DeviceLostError.
    """
    asked = Answers()
    truncated = 0
    left = list(images)
    while left and not should_stop():
        size = _batch_size(left, plan)
        batch, left = left[:size], left[size:]
        for image, outcome in _batch_answers(predictor, batch, plan):
            if isinstance(outcome, Failure):
                asked.failed.append(LeftOut(image.name, outcome.message))
                if outcome.code in _HOPELESS and not asked.images and len(asked.failed) == size:
                    raise RequestError(outcome.message)
                continue
            asked.images.append(image)
            found, num_cut = outcome
            truncated += num_cut
            for key, shapes in found.items():
                asked.found.setdefault(key, []).append(shapes)
        on_images(len(batch))
    return replace(asked, num_truncated=truncated, is_interrupted=bool(left))


def _batch_size(images: Sequence[LabeledImage], plan: TuningPlan) -> int:
    """How many images are asked about at once."""
    prompts = sum(map(len, plan.prompts.values()))
    asks, size = 0, 0
    for image in images[:BATCH]:
        views = 1
        for tiling in plan.tilings:
            # An image of too many tiles fails when its turn comes.
            with suppress(RequestError):
                if tiling is not None:
                    views += len(plan_tiles(image.size_wh, tiling.size_wh, tiling.overlap_wh))
        asks += prompts * views
        if size and asks > _MAX_ASKS:
            break
        size += 1
    return size


_OfImage = tuple[dict[tuple[int, str, str], tuple[Found, ...]], int]


@dataclass(frozen=True, slots=True, eq=False)
class _Viewed:
    """An open image with all views of all tilings, or why there is none; and those of each."""

    labeled: LabeledImage
    image: OpenImage | Failure
    of_tilings: tuple[tuple[View, ...], ...] = ()

    @property
    def num_pixels(self) -> int:
        return 0 if isinstance(self.image, Failure) else self.image.num_pixels

    def close(self) -> None:
        if isinstance(self.image, OpenImage):
            self.image.close()


def _batch_answers(
    predictor: Predictor, batch: Sequence[LabeledImage], plan: TuningPlan
) -> Iterator[tuple[LabeledImage, _OfImage | Failure]]:
    patience = Patience(is_bulk=True)

    def open_one(labeled: LabeledImage, wait_s: float) -> _Viewed:
        try:
            picture = open_image(labeled.path, room=patience.room(open_pixels(), wait_s))
        except NoRoomError:
            raise
        except FlorenceError as error:
            return _Viewed(labeled, Failure(error.code, str(error)))
        try:
            of_tilings = tuple(views_of(picture, None, tiling) for tiling in plan.tilings)
        except FlorenceError as error:
            picture.close()
            return _Viewed(labeled, Failure(error.code, str(error)))
        views = tuple({view.box_xyxy: view for own in of_tilings for view in own}.values())
        pictures = tuple(view.picture for view in views)
        questions = questions_of(plan.settings)
        image = OpenImage(picture, views, pictures, questions, plan.settings)
        return _Viewed(labeled, image, of_tilings)

    with closing(in_parts(batch, open_one)) as parts:
        for part in parts:
            yield from _part_answers(predictor, part)


def _part_answers(
    predictor: Predictor, part: Sequence[_Viewed]
) -> Iterator[tuple[LabeledImage, _OfImage | Failure]]:
    opened = [one.image for one in part if isinstance(one.image, OpenImage)]
    pictures = [view.picture for image in opened for view in image.views]
    encoded = iter(predictor.encode(pictures) if pictures else ())
    asked: list[tuple[_Viewed, OpenImage]] = []
    for one in part:
        image = one.image
        if isinstance(image, OpenImage):
            image = _encoded(image, [next(encoded) for _ in image.views])
        if isinstance(image, Failure):
            yield one.labeled, image
        else:
            asked.append((one, image))
    if not asked:
        return
    answers = predictor.answers([image for _, image in asked], Call(Priority.BULK))
    for (one, image), own in zip(asked, answers, strict=True):
        yield one.labeled, _of_image(one, image, own)


def _encoded(image: OpenImage, encoded: Sequence[Encoded]) -> OpenImage | Failure:
    """The image with its views as the model sees them, or why one of them cannot be seen."""
    pictures: list[EncodedImage] = []
    for one in encoded:
        if isinstance(one, DeviceLostError):
            raise one
        if isinstance(one, FlorenceError):
            return Failure(one.code, str(one))
        pictures.append(one)
    return replace(image, pictures=tuple(pictures))


def _of_image(
    viewed: _Viewed, image: OpenImage, answers: Sequence[Result | Failure]
) -> _OfImage | Failure:
    results: list[Result] = []
    for answer in answers:
        if isinstance(answer, Failure):
            if answer.code == DeviceLostError.code:
                raise DeviceLostError(answer.message)
            return answer
        results.append(answer)
    rules = rules_of(image.settings)
    size_wh = image.picture.size_wh
    found: dict[tuple[int, str, str], tuple[Found, ...]] = {}
    for number, question in enumerate(image.questions):
        own = results[number * len(image.views) : (number + 1) * len(image.views)]
        by_box = dict(zip((view.box_xyxy for view in image.views), own, strict=True))
        for place, views in enumerate(viewed.of_tilings):
            looked_at = replace(image, views=views)
            answered = joined_answer(
                looked_at, question, rules, [by_box[view.box_xyxy] for view in views]
            )
            key = place, question.class_name or "", question.text or ""
            found[key] = tuple(map(_without_tokens, wanted_in(answered, rules, size_wh)))
    return found, sum(result.truncated for result in results)


def _without_tokens(found: Found) -> Found:
    return replace(found, shape=replace(found.shape, tokens=()))
