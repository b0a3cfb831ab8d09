"""Attributes of objects that are labeled already: what the model says about them, as tags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from florence2.engine.ask import Ask
from florence2.errors import FlorenceError, ImageError, RequestError, shown
from florence2.records import Failure, Result
from florence2.tasks import find_task
from serve.platform.existing_labels import Choice, ImageTask, LabelTask, fetch_labels
from serve.platform.existing_tags import NewTag, TagWriter, Written, ensure_tag_meta
from serve.platform.failures import FailedImageError
from serve.platform.images import Images, Target, resolve
from serve.platform.ledger import Ledger
from serve.platform.pipeline import Batch, Behind, fetch_ahead, split_batches
from serve.platform.registry import InferenceRequest
from serve.platform.run_plan import any_source, batch_size_of
from serve.platform.services import ExistingServices, State
from serve.platform.waiting import room_for_downloads, when_queue_has_room
from serve.predict.annotations import REGION_TEXT_TAGS, TAG_METAS
from serve.predict.naming import clean_text
from serve.sdk import sly
from serve.settings.model import Settings

Asked = tuple[Batch, Sequence["Answers | Failure"]]


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked about which labels."""

    task: str
    classes: frozenset[str] | None
    overwrite: bool


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """What was said about one image's labels, in the order of ``task.labels``."""

    task: ImageTask
    outcomes: tuple[Result | Failure, ...]


def tag_existing_objects(
    api: sly.Api, state: State, request: InferenceRequest, services: ExistingServices
) -> None:
    """Asks a region task about every label of the images, and writes the answers as their tags.

    ``state``: the images as for a run, ``task_prompt``, ``classes``, ``overwrite``, ``settings``.
    Labels stay what they are. One that has the tag is skipped unless ``overwrite``, so a second
    run continues a first. Results tell per image what was written, skipped and failed;
    PartialFailureError at the end for any image that is not whole.
    """
    wish = wish_of(state)
    settings = services.settings_of(_without_task(state), api)
    batch_size = batch_size_of(state, services.default_batch_size)
    images = resolve(api, any_source(state)).without_repeats()
    request.set_stage(InferenceRequest.Stage.INFERENCE, 0, len(images.targets))
    ledger = Ledger(request, len(images.targets), "labels without the tag")
    try:
        run = _Run(services, api, request, wish, settings, ledger, _tag_metas(api, wish, images))
        run.work(images, batch_size)
    except Exception as error:
        ledger.close_broken(error)
        raise
    ledger.close(must_be_whole=True)


def wish_of(state: State) -> Wish:
    """What ``state`` asks for; RequestError for a task that tells nothing about a region."""
    name = state.get("task_prompt")
    known = ", ".join(REGION_TEXT_TAGS)
    if not isinstance(name, str):
        raise RequestError(
            f"task_prompt names what is asked about each label, one of {known}, and "
            f"{shown(name)} was received; choose one."
        )
    token = find_task(name).token
    if token not in REGION_TEXT_TAGS:
        raise RequestError(
            f"Labels can be asked {known}, and {token} was received; choose one of these."
        )
    classes, overwrite = state.get("classes"), state.get("overwrite", False)
    if classes is not None and not (
        isinstance(classes, list) and all(isinstance(one, str) for one in classes)
    ):
        raise RequestError(f"classes is a list of names, and {shown(classes)} was received.")
    if not isinstance(overwrite, bool):
        raise RequestError(f"overwrite is true or false, and {shown(overwrite)} was received.")
    return Wish(token, frozenset(classes) if classes else None, overwrite)


def _without_task(state: State) -> State:
    """Settings without what is named beside them: alone they would be checked against it."""
    settings = state.get("settings")
    if not isinstance(settings, Mapping):
        return state
    return {**state, "settings": {k: v for k, v in settings.items() if k != "task_prompt"}}


def _tag_metas(api: sly.Api, wish: Wish, images: Images) -> dict[int, sly.TagMeta]:
    wanted = TAG_METAS[REGION_TEXT_TAGS[wish.task]]
    projects = {one.project_id for one in images.targets if one.project_id is not None}
    return {one: ensure_tag_meta(api, one, wanted) for one in sorted(projects)}


@dataclass(frozen=True)
class _Run:
    services: ExistingServices
    api: sly.Api
    request: InferenceRequest
    wish: Wish
    settings: Settings
    ledger: Ledger
    tag_metas: dict[int, sly.TagMeta]

    def work(self, images: Images, batch_size: int) -> None:
        names = {project_id: meta.name for project_id, meta in self.tag_metas.items()}
        choice = Choice(names, self.wish.classes, self.wish.overwrite)
        behind: Behind[Asked] = Behind(self._write_all)
        fetched = fetch_ahead(
            split_batches(images.targets, batch_size),
            lambda batch: fetch_labels(self.api, batch, choice, self.services.download),
            room=room_for_downloads(self.request, is_bulk=True),
        )
        try:
            with closing(fetched):
                for batch, tasks in fetched:
                    if self.request.is_stopped():
                        break
                    behind.put((batch, self._ask_all(tasks)))
        finally:
            behind.finish()

    def _ask_all(self, tasks: Sequence[ImageTask | Failure]) -> list[Answers | Failure]:
        """All labels of the batch in one request; those of an image share its features."""
        asks = [ask for task in tasks for ask in self._asks(task)]
        try:
            outcomes = iter(self._answers(asks))
        except FlorenceError:
            if not self.request.is_stopped():
                raise
            outcomes = iter([Failure("cancelled", "The run was stopped.")] * len(asks))
        return [
            task
            if isinstance(task, Failure)
            else _answers(task, tuple(next(outcomes) for _ in task.labels))
            for task in tasks
        ]

    def _answers(self, asks: Sequence[Ask]) -> Sequence[Result | Failure]:
        if not asks:
            return []
        outcomes = when_queue_has_room(
            lambda: self.services.ask(asks, should_stop=self.request.is_stopped),
            self.request.is_stopped,
        )
        for outcome in outcomes:
            if isinstance(outcome, Failure) and outcome.code == "not_deployed":
                raise FailedImageError(outcome)
        return outcomes

    def _asks(self, task: ImageTask | Failure) -> list[Ask]:
        if isinstance(task, Failure) or task.image is None:
            return []
        return [
            Ask(
                task.image,
                self.wish.task,
                region=label.region,
                num_beams=self.settings.num_beams,
                max_new_tokens=self.settings.max_new_tokens,
            )
            for label in task.labels
        ]

    def _write_all(self, asked: Asked) -> None:
        for target, answers in zip(*asked, strict=True):
            if isinstance(answers, Failure):
                if self.ledger.fail(target, answers):
                    self.request.add_results([_entry(target, error=answers)])
            elif not _is_cut(answers, self.request):
                self._write(target, answers)

    def _write(self, target: Target, answers: Answers) -> None:
        failures: dict[int, Failure] = {}
        tags: list[NewTag] = []
        unanswered = 0
        for label, outcome in zip(answers.task.labels, answers.outcomes, strict=True):
            if isinstance(outcome, Failure):
                failures[label.figure_id] = outcome
            elif text := _words(outcome):
                tags.append(NewTag(label, text))
            else:
                unanswered += 1
        written = self._write_tags(target, [tag for tag in tags if not tag.is_there])
        skipped = answers.task.num_skipped + len(tags) - written.count - len(written.failures)
        failures.update(written.failures)
        error = _summary(target, failures, answers.task.labels)
        entry = _entry(target, written.count, skipped, unanswered, failures, error)
        self.request.add_results([entry])
        if error is None:
            self.ledger.done(1)
        else:
            self.ledger.fail(target, error)

    def _write_tags(self, target: Target, tags: Sequence[NewTag]) -> Written:
        if not tags or target.project_id is None:
            return Written(0, {})
        meta = self.tag_metas[target.project_id]
        return TagWriter(self.api, target.project_id, meta, self.wish.overwrite).write(target, tags)


def _answers(task: ImageTask, outcomes: tuple[Result | Failure, ...]) -> Answers | Failure:
    """An image that cannot be opened is one failure, and not one of each of its labels."""
    first = outcomes[0] if outcomes else None
    if isinstance(first, Failure) and first.code == ImageError.code:
        return first
    return Answers(task, outcomes)


def _is_cut(answers: Answers, request: InferenceRequest) -> bool:
    """Whether the run was stopped before all labels of the image were answered."""
    return request.is_stopped() and any(
        isinstance(one, Failure) and one.code == "cancelled" for one in answers.outcomes
    )


def _words(result: Result) -> str:
    return clean_text(result.text or " ".join(found.label for found in result.objects))


def _summary(
    target: Target, failures: Mapping[int, Failure], labels: Sequence[LabelTask]
) -> Failure | None:
    if not failures:
        return None
    first = next(iter(failures.values()))
    return Failure(
        first.code,
        f"{len(failures)} of {len(labels)} labels of image {target.image_id} have no tag, the "
        f"first because: {first.message}",
    )


def _entry(
    target: Target,
    written: int = 0,
    skipped: int = 0,
    unanswered: int = 0,
    failures: Mapping[int, Failure] | None = None,
    error: Failure | None = None,
) -> dict[str, Any]:
    return {
        "image_id": target.image_id,
        "name": target.name,
        "dataset_id": target.dataset_id,
        "project_id": target.project_id,
        "annotation": None,
        "data": None,
        "written": written,
        "skipped": skipped,
        "unanswered": unanswered,
        "failed": [
            {"label_id": figure_id, "code": failure.code, "message": failure.message}
            for figure_id, failure in (failures or {}).items()
        ],
        "error": None if error is None else {"code": error.code, "message": error.message},
    }
