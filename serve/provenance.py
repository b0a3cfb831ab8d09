"""Which run made a label: its id, the tag that says so, digests of what it wrote, its manifest."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final, Literal

from serve.sdk import sly
from serve.version import VERSION

RUN_TAG: Final = sly.TagMeta(
    "florence2_run",
    sly.TagValueType.ANY_STRING,
    color=[120, 120, 130],
    applicable_to=sly.TagApplicableTo.OBJECTS_ONLY,
)
MODEL_KEYS: Final = ("name", "revision", "adapter", "adapter_sha256")
"""What makes a model another one: the same labels are to be had in another precision or runtime."""
_ID_BYTES: Final = 4
_DIGEST_BYTES: Final = 6
_DECIMALS: Final = 3

RunState = Literal["running", "done", "stopped", "failed", "undone", "undone in part"]
Json = Mapping[str, Any]


def new_run_id() -> str:
    """Eight hex digits that no other run of a project is likely to have."""
    return secrets.token_hex(_ID_BYTES)


def now() -> str:
    """The time in UTC, to the second, as ISO 8601 has it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def with_run_tag(
    annotation: sly.Annotation, run_id: str, meta: sly.TagMeta = RUN_TAG
) -> sly.Annotation:
    """The annotation with the run's id as a tag of each label; ``meta`` as the project has it."""
    tag = sly.Tag(meta, run_id)
    return annotation.clone(labels=[label.add_tag(tag) for label in annotation.labels])


def label_digest(label: Json, run_tag: str | None) -> str:
    """12 hex digits of a label's JSON: equal for one class, geometry, description and tags but
    ``run_tag``.

    Ids, times and who changed it do not count; neither does how a mask is compressed.
    """
    tags = sorted(_tag_key(tag) for tag in label.get("tags", ()) if tag.get("name") != run_tag)
    told = label.get("description") or ""
    return _digest(label.get("classTitle"), label.get("geometryType"), _shape(label), tags, told)


def image_tag_digest(tag: Json) -> str:
    """As ``label_digest``, for a tag of the image such as its caption."""
    return _digest(_tag_key(tag))


def fingerprint_of(*what: object) -> str:
    """12 hex digits that are equal for equal things; JSON's types, and what ``str`` tells apart."""
    return _digest(*what)


def run_of_label(label: Json, run_tag: str | None) -> str | None:
    """The id of the run that a label says it is of."""
    values = (tag.get("value") for tag in label.get("tags", ()) if tag.get("name") == run_tag)
    return next((value for value in values if isinstance(value, str)), None)


def _digest(*what: object) -> str:
    text = json.dumps(what, ensure_ascii=False, sort_keys=True, default=str)
    encoded = text.encode("utf-8", "backslashreplace")
    return hashlib.blake2b(encoded, digest_size=_DIGEST_BYTES).hexdigest()


def _tag_key(tag: Json) -> str:
    value = tag.get("value")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return json.dumps([tag.get("name"), _rounded(value) if is_number else value], default=str)


def _shape(label: Json) -> object:
    bitmap = label.get("bitmap")
    if isinstance(bitmap, Mapping):
        mask = sly.Bitmap.base64_2_data(bitmap["data"])
        pixels = hashlib.blake2b(mask.astype(bool).tobytes()).hexdigest()
        return [_rounded(bitmap.get("origin")), mask.shape, pixels]
    names = ("points", "nodes", "vertices", "edges", "x", "y")
    return {name: _rounded(label[name]) for name in names if name in label}


def _rounded(value: object) -> object:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return round(float(value), _DECIMALS)
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, Sequence) else str(value)


@dataclass(frozen=True, slots=True)
class Written:
    """The digests of what a run wrote on one image, a digest for each label and image tag."""

    labels: tuple[str, ...] = ()
    image_tags: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.labels or self.image_tags)

    @classmethod
    def of(cls, annotation: Json, run_tag: str | None) -> Written:
        """Of an annotation's JSON."""
        return cls(
            tuple(label_digest(one, run_tag) for one in annotation.get("objects", ())),
            tuple(image_tag_digest(one) for one in annotation.get("tags", ())),
        )


@dataclass(frozen=True, slots=True)
class Sorted:
    """An image's labels, seen from one run; indices of its JSON's ``objects`` and ``tags``.

    ``changed`` are those that the run tag names and that are not, or no longer, as the run wrote
    them. ``num_gone`` were written and cannot be told from others, or are deleted.
    """

    unchanged: tuple[int, ...] = ()
    image_tags: tuple[int, ...] = ()
    changed: tuple[int, ...] = ()
    num_gone: int = 0


def sort_labels(annotation: Json, run_id: str, run_tag: str | None, written: Written) -> Sorted:
    """Which labels of an image are a run's and as it wrote them.

    Where the run wrote its tag, a label without it is somebody else's, or somebody took the tag
    off to keep the label. Where it wrote none, only labels are its own that nobody but a model
    made, by their status.
    """
    left, unchanged, changed = Counter(written.labels), [], []
    for index, label in enumerate(annotation.get("objects", ())):
        if run_tag is None:
            is_ours = bool(label.get("nnCreated")) and bool(label.get("nnUpdated"))
        else:
            is_ours = run_of_label(label, run_tag) == run_id
        if not is_ours:
            continue
        digest = label_digest(label, run_tag)
        if left[digest] > 0:
            left[digest] -= 1
            unchanged.append(index)
        elif run_tag is not None:
            changed.append(index)
    tags_left, tags = Counter(written.image_tags), []
    for index, tag in enumerate(annotation.get("tags", ())):
        digest = image_tag_digest(tag)
        if tags_left[digest] > 0:
            tags_left[digest] -= 1
            tags.append(index)
    num_gone = max(left.total() - len(changed), 0) + tags_left.total()
    return Sorted(tuple(unchanged), tuple(tags), tuple(changed), num_gone)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is kept of a run beside its labels: who made them, how, and how it went.

    ``model`` has its name, revision and adapter as far as they are known. ``run_tag`` is the name
    of the tag as labels have it, None where they have none. Times are UTC. A run goes on with an
    earlier one of the same ``fingerprint``: of one model, settings and way of writing; None for
    images that were named by their ids. ``holder`` is the process that works on it, or did last; it
    was gone on with ``resumed`` times.
    """

    run: str
    model: Mapping[str, Any]
    task: str
    prompts: Sequence[str]
    settings: Mapping[str, Any]
    run_tag: str | None
    started: str
    mode: str | None = None
    version: str = VERSION
    state: RunState = "running"
    finished: str | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    error: str | None = None
    fingerprint: str | None = None
    holder: str | None = None
    resumed: int = 0

    def ended(self, state: RunState, counts: Mapping[str, int], error: str | None) -> Manifest:
        """As it is to be kept once the run is over."""
        return replace(self, state=state, finished=now(), counts=dict(counts), error=error)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_json(cls, stored: object) -> Manifest | None:
        """None for what is no manifest, or one of a version that has other keys."""
        if not isinstance(stored, dict):
            return None
        known = {key: value for key, value in stored.items() if key in cls.__slots__}
        try:
            return cls(**known)
        except TypeError:
            return None

    def line(self) -> str:
        """The run for a list in a terminal."""
        model = str(self.model.get("name", ""))
        adapter = self.model.get("adapter")
        counted = ", ".join(f"{count} {name}" for name, count in self.counts.items() if count)
        what = " ".join(filter(None, (self.task, "; ".join(self.prompts))))
        parts = (
            self.run,
            self.started,
            f"running on {self.holder}"
            if self.state == "running" and self.holder
            else str(self.state),
            f"{model} + {adapter}" if adapter else model,
            what if len(what) <= _SHOWN else f"{what[: _SHOWN - 3]}...",
            counted,
        )
        return "  ".join(filter(None, parts))


_SHOWN: Final = 60


def newest_first(manifests: Iterable[Manifest]) -> list[Manifest]:
    """By when they were started; of two in one second the later one of ``manifests``."""
    numbered = enumerate(manifests)
    ordered = sorted(numbered, key=lambda pair: (pair[1].started, pair[0]), reverse=True)
    return [one for _, one in ordered]


@dataclass(slots=True)
class Undone:
    """What undoing a run has done, or would do. ``kept`` and ``failed`` are sentences' beginnings:
    an image, and what of it stays and why."""

    run: str
    is_shown_only: bool
    num_deleted: int = 0
    num_image_tags: int = 0
    num_images: int = 0
    num_kept: int = 0
    num_gone: int = 0
    kept: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def keep(self, what: str, count: int = 1) -> None:
        """``count`` labels stay; the first images are remembered by name."""
        self.num_kept += count
        if len(self.kept) < MAX_NAMED:
            self.kept.append(what)

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "is_shown_only": self.is_shown_only,
            "deleted": self.num_deleted,
            "image_tags_deleted": self.num_image_tags,
            "images": self.num_images,
            "kept": self.num_kept,
            "gone": self.num_gone,
            "kept_labels": list(self.kept),
            "failed": list(self.failed),
        }

    def lines(self) -> list[str]:
        """For a terminal."""
        verb = "would be deleted" if self.is_shown_only else "deleted"
        tags = f" and {self.num_image_tags} tags of images" if self.num_image_tags else ""
        lines = [f"{self.num_deleted} labels{tags} {verb}, on {self.num_images} images."]
        if self.num_kept:
            lines.append(f"{self.num_kept} labels were changed since, or added to, and stay:")
            lines += [f"  {one}" for one in self.kept[:_SHOWN_KEPT]]
            if len(self.kept) > _SHOWN_KEPT:
                lines.append("  ...")
        if self.num_gone:
            lines.append(f"{self.num_gone} that the run wrote are not there any more.")
        if self.failed:
            lines.append(f"{len(self.failed)} could not be done; the same command tries again:")
            lines += [f"  {one}" for one in self.failed[:_SHOWN_KEPT]]
        return lines


MAX_NAMED: Final = 1000
_SHOWN_KEPT: Final = 20
