"""``Florence2``: a checkpoint's abilities as methods, on an image or a list of images."""

# A Result for an image and a list for a list; keywords are the fields of Ask, checked there.
# ruff: noqa: ANN401

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

from florence2.checkpoint.checkpoint import Checkpoint, open_adapter, open_checkpoint
from florence2.checkpoint.hub import ProgressCallback
from florence2.conversion.kept import Calibration, Conversions, check_choice
from florence2.engine.answering import answer_all
from florence2.engine.ask import AnyRegion, Ask, failure_of
from florence2.engine.encoding import AnyImage
from florence2.engine.engine import Engine
from florence2.engine.loading import load_engine
from florence2.errors import (
    CheckpointError,
    DeviceError,
    FlorenceError,
    RequestError,
    shown,
    unknown_name,
)
from florence2.records import Failure, Result
from florence2.runtimes.device import check_precision, choose_device

__all__ = ["Ask", "Florence2"]

logger = logging.getLogger(__name__)

RUNTIMES: Final = ("auto", "torch", "openvino")
CACHE_BYTES: Final = 256 * 2**20
GRANULARITIES: Final = {
    "normal": "<CAPTION>",
    "detailed": "<DETAILED_CAPTION>",
    "very_detailed": "<MORE_DETAILED_CAPTION>",
}

Granularity = Literal["normal", "detailed", "very_detailed"]
LabelsMode = Literal["classes", "captions"]
Images = AnyImage | list[AnyImage] | tuple[AnyImage, ...]


class Florence2:
    """A loaded checkpoint.

    Every method takes an image (a path, bytes, a ``PIL.Image``, an RGB array [H, W, 3] of uint8,
    or an ``EncodedImage``) and gives one Result, or raises a FlorenceError; or it takes a list
    and gives a list in order, where an image that fails is a Failure and the others succeed.
    The keywords of ``Ask`` (``num_beams``, ``max_new_tokens``, ...) may be added to any call.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @classmethod
    def load(
        cls,
        name: str | Path = "Florence-2-large",
        device: str = "auto",
        runtime: str = "auto",
        *,
        precision: str = "auto",
        cache_dir: str | Path | None = None,
        offline: bool | None = None,
        progress: ProgressCallback | None = None,
        cache_bytes: int = CACHE_BYTES,
        calibration: Calibration | None = None,
        notify: Callable[[str], None] = logger.info,
        title: str | None = None,
        adapters: Mapping[str, str | Path] | None = None,
    ) -> Florence2:
        """Finds or downloads a checkpoint, loads it and checks that it answers.

        ``name``: a checkpoint's name, a hub repository id, or a local folder. ``device``: auto,
        cpu, cuda, cuda:N. ``runtime``: torch; openvino, on a CPU, which converts the checkpoint at
        its first use; or auto, torch on a GPU and the faster of the two on a CPU. ``precision``:
        auto, fp32, bf16, fp16, int8, nf4; only fp32 gives the reference's tokens, but for rounding
        ties, and ``auto`` is the fastest that this checkpoint is sane in, see ``choose_precision``
        and ``load_engine``. On a CPU int8 is the OpenVINO runtime's, calibrated on the images that
        ``calibration`` gives; int8 and nf4 of torch may name a part of the network, such as
        int8:all, see ``runtimes.quantization``. ``notify`` is told what takes minutes, once, when a
        checkpoint is converted. ``title`` takes the place of a folder as its ``name``.
        ``adapters``: LoRA adapters of this checkpoint by names of your choice, each a folder or hub
        id; they share its weights, and ``adapter=`` of any call names the one that answers. Raises
        CheckpointError or DeviceError with one sentence.
        """
        if runtime not in RUNTIMES:
            raise DeviceError(unknown_name("runtime", str(runtime), RUNTIMES))
        if not isinstance(name, str | Path) or not str(name).strip():
            raise CheckpointError(
                f"A checkpoint is a name such as Florence-2-large or a folder, and {shown(name)} "
                "was received; name one."
            )
        chosen = choose_device(device)
        check_precision(precision, chosen)
        check_choice(runtime, chosen, precision)
        checkpoint = open_checkpoint(name, cache_dir=cache_dir, offline=offline, progress=progress)
        opened = {
            named: open_adapter(
                folder, checkpoint, cache_dir=cache_dir, offline=offline, progress=progress
            )
            for named, folder in _checked_names(adapters or {}, checkpoint).items()
        }
        checkpoint = replace(checkpoint, name=title or checkpoint.name)
        kept = Conversions(None if cache_dir is None else Path(cache_dir), calibration, notify)
        engine = load_engine(checkpoint, chosen, precision, cache_bytes, runtime, kept, opened)
        used = engine.runtime
        logger.info(
            "%s is ready on %s in %s by %s", checkpoint.name, chosen, used.precision, used.name
        )
        return cls(engine)

    @property
    def name(self) -> str:
        """The checkpoint's name."""
        return self.engine.checkpoint.name

    @property
    def device(self) -> str:
        """Where it runs."""
        return self.engine.runtime.device

    @property
    def runtime(self) -> str:
        """What runs it: torch or openvino."""
        return self.engine.runtime.name

    @property
    def precision(self) -> str:
        """The precision it computes in."""
        return self.engine.runtime.precision

    @property
    def notes(self) -> tuple[str, ...]:
        """What the checkpoint's files ask for or hold that is not used, a sentence each.

        Of an adapter also which file is merged into which base.
        """
        return self.engine.notes

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters it was loaded with."""
        return tuple(self.engine.adapters)

    def close(self) -> None:
        """Frees the weights, so that another checkpoint has room; afterwards nothing is answered.

        Every later call for an image raises CheckpointError. Closing twice is closing once.
        """
        self.engine.close()

    def encode(self, image: Images, adapter: str | None = None) -> Any:
        """Runs the vision tower once; give the result to any method in the image's place.

        An adapter that changes the tower has features of its own; all others share those of the
        checkpoint.
        """
        model = self.engine.model_of(adapter)
        if isinstance(image, list | tuple):
            encoded = self.engine.encode(image, model=model)
            return [_valued(value, source) for value, source in zip(encoded, image, strict=True)]
        [single] = self.engine.encode([image], model=model)
        if isinstance(single, FlorenceError):
            raise single
        return single

    def run(
        self,
        task: str,
        image: Images,
        text: str | None = None,
        region: AnyRegion | None = None,
        **search: Any,
    ) -> Any:
        """Any of the 15 task prompts, by token or name, or a cascade of them joined by ``+``."""
        if isinstance(image, list | tuple):
            return self.run_many([Ask(one, task, text, region, **search) for one in image])
        [outcome] = answer_all(self.engine, [Ask(image, task, text, region, **search)])
        if isinstance(outcome, FlorenceError):
            raise outcome
        return outcome

    def run_custom(self, token: str, image: Images, text: str | None = None, **search: Any) -> Any:
        """A prompt that a fine-tune was taught, such as ``<DocVQA>`` with a question as text.

        The token and the text go to the checkpoint as they are; the answer comes back as text.
        """
        return self.run(token, image, text, is_custom=True, **search)

    def run_many(self, asks: Iterable[Ask]) -> list[Result | Failure]:
        """Different questions on different images in shared batches, each image encoded once."""
        if not isinstance(asks, Iterable):
            raise RequestError(
                f"run_many takes a list of Ask, and {type(asks).__name__} was received; put it "
                "into a list."
            )
        listed = list(asks)
        outcomes = answer_all(self.engine, listed)
        return [
            _valued(value, getattr(ask, "image", None))
            for value, ask in zip(outcomes, listed, strict=True)
        ]

    def caption_image(
        self, image: Images, granularity: Granularity = "normal", **search: Any
    ) -> Any:
        """A sentence, a few sentences, or a paragraph about the image."""
        _check_choice("granularity", granularity, GRANULARITIES)
        return self.run(GRANULARITIES[granularity], image, **search)

    def detect_objects(
        self,
        image: Images,
        classes: Sequence[str] | None = None,
        labels_mode: LabelsMode = "classes",
        **search: Any,
    ) -> Any:
        """Boxes of everything, or of ``classes``; ``captions`` describes instead of naming."""
        _check_choice("labels_mode", labels_mode, ("classes", "captions"))
        if classes is not None:
            if labels_mode == "captions":
                raise RequestError(
                    "labels_mode 'captions' finds everything and takes no classes, and "
                    f"{shown(classes)} was received; leave one of the two out."
                )
            named = _named(classes)
            return self.ground_phrase(image, ". ".join(named), **search)
        task = "<OD>" if labels_mode == "classes" else "<DENSE_REGION_CAPTION>"
        return self.run(task, image, **search)

    def ground_phrase(self, image: Images, phrase: str, **search: Any) -> Any:
        """Boxes for the things a text names."""
        return self.run("<CAPTION_TO_PHRASE_GROUNDING>", image, phrase, **search)

    def segment_phrase(self, image: Images, phrase: str, **search: Any) -> Any:
        """The polygon of what a phrase refers to."""
        return self.run("<REFERRING_EXPRESSION_SEGMENTATION>", image, phrase, **search)

    def ocr_image(self, image: Images, **search: Any) -> Any:
        """All text in the image as one string."""
        return self.run("<OCR>", image, **search)

    def parse_document(self, image: Images, **search: Any) -> Any:
        """Each line of text with its quad."""
        return self.run("<OCR_WITH_REGION>", image, **search)

    def segment_region(self, image: Images, region: AnyRegion, **search: Any) -> Any:
        """The polygon of the object in a region."""
        return self.run("<REGION_TO_SEGMENTATION>", image, region=region, **search)

    def classify_image_region(self, image: Images, region: AnyRegion, **search: Any) -> Any:
        """A region's category."""
        return self.run("<REGION_TO_CATEGORY>", image, region=region, **search)

    def caption_image_region(self, image: Images, region: AnyRegion, **search: Any) -> Any:
        """A region's description."""
        return self.run("<REGION_TO_DESCRIPTION>", image, region=region, **search)

    def ocr_image_region(self, image: Images, region: AnyRegion, **search: Any) -> Any:
        """The text in a region."""
        return self.run("<REGION_TO_OCR>", image, region=region, **search)

    def propose_regions(self, image: Images, **search: Any) -> Any:
        """Boxes of whatever is there, without labels."""
        return self.run("<REGION_PROPOSAL>", image, **search)


def _checked_names(
    adapters: Mapping[str, str | Path], checkpoint: Checkpoint
) -> Mapping[str, str | Path]:
    for name in adapters:
        if not isinstance(name, str) or not name.strip() or name == checkpoint.name:
            raise CheckpointError(
                f"An adapter has a name of its own, and {shown(name)} was received; write for "
                'example adapters={"cats": "path/to/the/adapter"}.'
            )
    return adapters


def _named(classes: Sequence[str]) -> list[str]:
    listed = list(classes) if isinstance(classes, Iterable) else []
    if not isinstance(classes, str) and all(isinstance(name, str) for name in listed):
        named = [name.strip() for name in listed if name.strip()]
        if named:
            return named
    raise RequestError(
        f"classes is a list of names, and {shown(classes)} was received; name at least one."
    )


def _check_choice(kind: str, received: object, known: Iterable[str]) -> None:
    names = list(known)
    if not isinstance(received, str) or received not in names:
        raise RequestError(
            unknown_name(kind, received if isinstance(received, str) else shown(received), names)
        )


def _valued(value: Any, image: AnyImage | None) -> Any:
    return failure_of(value, image) if isinstance(value, FlorenceError) else value
