"""What a training is asked to do, checked before anything is loaded."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from florence2.errors import RequestError, shown, unknown_name
from florence2.finetune.augmentation import AUGMENTATIONS
from florence2.labeled.records import LabeledImage
from florence2.tasks import Task, find_task

METHODS: Final = ("lora", "full")
SCHEDULES: Final = ("linear", "cosine", "constant")
TRAINING_PRECISIONS: Final = ("auto", "fp32", "bf16", "fp16")
LORA_TARGETS: Final = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
DEFAULT_RATES: Final[Mapping[str, float]] = {"lora": 3e-4, "full": 1e-5}


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The adapter: ``targets`` are the last parts of the names of the layers that get one."""

    targets: tuple[str, ...] = LORA_TARGETS
    rank: int = 16
    alpha: float = 32.0
    is_rank_stabilised: bool = False


@dataclass(frozen=True, slots=True)
class FineTuningPlan:
    """All that decides what comes out of a training, and how it is run.

    ``steps`` are updates of the weights, each on ``batch`` images with up to ``prompts`` questions
    about each. ``at_once`` is how many of them go through the network together, None for as many
    as memory holds. ``rate`` of None is the method's own. ``dropout`` is that of the adapter's
    input, or of the network of text where all weights are trained.
    """

    model: str
    tasks: tuple[str, ...]
    method: str = "lora"
    steps: int = 1000
    batch: int = 8
    prompts: int = 2
    at_once: int | None = None
    rate: float | None = None
    schedule: str = "linear"
    warm_up: float = 0.05
    weight_decay: float = 0.01
    dropout: float = 0.05
    lora: LoraSettings = field(default_factory=LoraSettings)
    freeze_vision: bool = False
    augmentations: tuple[str, ...] = AUGMENTATIONS
    prompts_by_class: Mapping[str, str] = field(default_factory=dict)
    device: str = "auto"
    precision: str = "auto"
    has_checkpointing: bool = False
    validate_every: int = 200
    validation_images: int = 100
    workers: int = 0
    seed: int = 0

    def check(self) -> None:
        """RequestError for a plan that cannot be run."""
        for kind, value, known in (
            ("method", self.method, METHODS),
            ("schedule", self.schedule, SCHEDULES),
            ("precision", self.precision, TRAINING_PRECISIONS),
        ):
            if value not in known:
                raise RequestError(unknown_name(kind, value, known))
        counts = {
            "steps": self.steps,
            "batch": self.batch,
            "prompts": self.prompts,
            "rank": self.lora.rank,
            "validate_every": self.validate_every,
            "validation_images": self.validation_images,
            "at_once": self.batch if self.at_once is None else self.at_once,
        }
        for name, count in counts.items():
            if count < 1:
                raise RequestError(f"{name} must be at least 1, and {count} was received.")
        for name, share in (("warm_up", self.warm_up), ("dropout", self.dropout)):
            if not 0 <= share < 1:
                raise RequestError(
                    f"{name} must be a share from 0 to below 1, and {shown(share)} was received."
                )
        if not 0 < self.lora.alpha < math.inf:
            raise RequestError(
                f"alpha must be a number above 0, and {shown(self.lora.alpha)} was received; twice "
                "the rank is usual."
            )
        if self.rate is not None and not 0 < self.rate < 1:
            raise RequestError(
                f"A learning rate must be between 0 and 1, and {shown(self.rate)} was received; "
                "try 3e-4 for an adapter or 1e-5 for all weights."
            )
        self.published_tasks()

    def published_tasks(self) -> tuple[Task, ...]:
        """The tasks asked about; RequestError for an unknown one."""
        return tuple(dict.fromkeys(find_task(name) for name in self.tasks))

    @property
    def learning_rate(self) -> float:
        """The highest one of the schedule."""
        return DEFAULT_RATES[self.method] if self.rate is None else self.rate

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content

    def settings_of_result(self) -> dict[str, Any]:
        """What decides the weights that come out: a resume must have the same."""
        content = self.to_dict()
        for name in _OF_THE_MACHINE:
            del content[name]
        lora = content.pop("lora")
        return content | ({f"lora {name}": lora[name] for name in lora} if self.has_adapter else {})

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained, and not the weights themselves."""
        return self.method == "lora"


# How a training is run, which changes its numbers by no more than rounding does.
_OF_THE_MACHINE: Final = ("at_once", "device", "has_checkpointing", "workers")


def first_difference(wanted: Mapping[str, Any], kept: Mapping[str, Any]) -> str | None:
    """The first setting that differs, in words; None where all are the same."""
    for name in wanted:
        if wanted[name] != kept.get(name):
            return f"{name} is {shown(wanted[name])} now and was {shown(kept.get(name))}"
    return None


def fingerprint(images: list[LabeledImage]) -> str:
    """A hash of all labels that are trained on, whatever folder they lie in."""
    digest = hashlib.blake2b(digest_size=16)
    for image in images:
        content = [image.name, image.size_wh, image.dataset, sorted(image.tags.items())]
        content += [[one.prefix, one.suffix] for one in image.answers]
        content += [
            [one.label, one.box_xyxy, one.rings_xy, sorted(one.texts.items())]
            for one in image.objects
        ]
        digest.update(json.dumps(content).encode())
    return digest.hexdigest()
