"""More of an object that the user pointed at: its category becomes the prompt for the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Final

from florence2.engine.ask import Ask
from florence2.engine.encoding import AnyImage
from florence2.errors import RequestError
from florence2.records import Failure, Region, Result
from serve.limits import held_bytes
from serve.naming import OBJECT_CLASS, clean_class_name, clean_text
from serve.platform.failures import FailedImageError
from serve.platform.images import download_images, resolve
from serve.platform.request_state import Source
from serve.sdk import sly
from serve.settings import Reference, Settings

AskAll = Callable[[Sequence[Ask]], Sequence[Result | Failure]]

_CATEGORY_TASK: Final = "<REGION_TO_CATEGORY>"
_GROUNDING_TASK: Final = "<CAPTION_TO_PHRASE_GROUNDING>"


class BadReferenceError(RequestError):
    """Nothing can be looked for with this reference; with another image it may be different."""

    code = "bad_region"


def resolve_reference(
    settings: Settings, api: sly.Api | None, ask: AskAll, image: AnyImage | None
) -> Settings:
    """Settings that look for what is in the reference box, and have no reference any more.

    The box is on the image of ``reference.image_id``, which ``api`` downloads, or without an id on
    ``image``. Results are of the class ``reference.class_name``, or, where that is empty or the
    general "object", of the category itself. Settings without a reference stay as they are.

    Raises BadReferenceError for a box without a category, and what went wrong with the image.
    """
    reference = settings.reference
    if reference is None:
        return settings
    with ExitStack() as held:
        found = _reference_image(reference, api, image, held)
        category = _category(reference, settings, ask, found)
    name = reference.class_name.strip()
    class_name = clean_class_name(category) if name in ("", OBJECT_CLASS) else name
    return settings.model_copy(
        update={
            "task_prompt": _GROUNDING_TASK,
            "text": None,
            "mapping": {class_name: (category,)},
            "reference": None,
        }
    )


def _category(reference: Reference, settings: Settings, ask: AskAll, image: AnyImage) -> str:
    question = Ask(
        image,
        _CATEGORY_TASK,
        region=Region(reference.box_xyxy),
        num_beams=settings.num_beams,
        adapter=settings.model,
    )
    [answer] = ask([question])
    if isinstance(answer, Failure):
        if answer.code in ("bad_request", "bad_region"):
            raise BadReferenceError(answer.message)
        raise FailedImageError(answer)
    said = answer.text or " ".join(found.label for found in answer.objects)
    category = " ".join(clean_text(said).split())
    if not category:
        box = ", ".join(f"{value:g}" for value in reference.box_xyxy)
        raise BadReferenceError(
            f"The reference box must show an object that has a name, and the model found no "
            f"category for [{box}]; draw the box around one object, or give a text instead."
        )
    return category


def _reference_image(
    reference: Reference, api: sly.Api | None, image: AnyImage | None, held: ExitStack
) -> AnyImage:
    found = image
    if reference.image_id is not None:
        [target] = resolve(api, Source(image_ids=(reference.image_id,))).targets
        held.enter_context(held_bytes().hold(target.size_bytes))
        [found] = download_images(api, [target.info])
    if found is None:
        raise RequestError(
            "A reference box needs an image, and none was received; send reference_image_id."
        )
    if isinstance(found, Failure):
        raise FailedImageError(found)
    return found
