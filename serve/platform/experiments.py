"""A fine-tune in the layout that the platform's tools list and deploy: the SDK's experiment.

To the SDK a checkpoint is one file, and its clients take only names that end in .pt. Ours is a
folder, so ``checkpoints/best.pt`` stands for the files in ``checkpoints/best``, and ``model_files``
of ``experiment_info.json`` names them, as it does for the files beside another framework's weights.
What a fine-tune was trained for, and the sizes and hashes of its files, are in a section of ours,
which the SDK passes over.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Final

import torch
import yaml

from florence2.checkpoint.catalog import BASE_FOLDER, CHECKPOINT_NAMES, base_names, resolve
from florence2.checkpoint.converted import file_sha256
from florence2.checkpoint.files import ADAPTER_CONFIG, FileRecord, read_json, write_whole
from florence2.errors import CheckpointError, FlorenceError, RequestError, shown
from florence2.tasks import OutputKind, TaskInput, parse_steps
from serve.naming import class_color, clean_class_name
from serve.predict.annotations import TAG_METAS
from serve.sdk import sly
from serve.settings import parse_settings

# isort: split
from supervisely.nn.experiments import EXPERIMENT_INFO_FILENAME, ExperimentInfo

FRAMEWORK: Final = "Florence-2"
"""The name by which the platform finds our experiments: their folders end with it."""
TASK_TYPE: Final = "prompt-based object detection"
EXPERIMENTS: Final = "/experiments"
INFO_NAME: Final = EXPERIMENT_INFO_FILENAME
META_NAME: Final = "model_meta.json"
CHECKPOINTS: Final = "checkpoints"
EXPERIMENT_FOLDER: Final = "experiment"
"""Where ``write_experiment`` writes, in the folder of a training."""
TRAINING_NAME: Final = "training.json"
BEST_FOLDER: Final = "best"

_NOT_OF_A_TIME: Final = re.compile(r"[^\w.,:+/-]+")
_BEST: Final = f"{CHECKPOINTS}/best.pt"
_OWN: Final = "florence2"
_HYPERPARAMETERS: Final = "hyperparameters.yaml"
_SETTINGS: Final = "settings.yaml"
_CARRIED: Final = ("report.html", _SETTINGS)
# A hard link to another disk, or on a file system that has none.
_NO_LINKS: Final = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP}
_BOXES: Final = {OutputKind.GROUNDING, OutputKind.LABELED_BOXES, OutputKind.BOXES}


@dataclass(frozen=True, slots=True)
class Training:
    """What a fine-tune was trained for; ``settings`` are those that its app offers by default."""

    base: str = ""
    method: str = ""
    tasks: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    metric: tuple[str, float] | None = None
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """Task, classes and metric in a line, for a list."""
        shown_classes = ", ".join(self.classes[:5]) + (", …" if len(self.classes) > 5 else "")
        count = len(self.classes)
        parts = [
            self.method,
            " ".join(self.tasks),
            f"{count} class{'es' * (count != 1)}: {shown_classes}" if count else "",
            f"{self.metric[0]} {self.metric[1]:.3g}" if self.metric else "",
        ]
        return " · ".join(filter(None, parts))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, which ``training_of`` reads."""
        metric = self.metric and {"name": self.metric[0], "value": self.metric[1]}
        return {
            "model": self.base,
            "method": self.method,
            "tasks": list(self.tasks),
            "classes": list(self.classes),
            "metric": metric,
            "settings": dict(self.settings),
        }


@dataclass(frozen=True, slots=True)
class Experiment:
    """One fine-tune in team files, or in a folder that looks the same.

    ``files`` are those of its checkpoint, by their paths in the folder of the experiment, with a
    size of -1 where the experiment does not tell it.
    """

    info: ExperimentInfo
    training: Training
    files: tuple[FileRecord, ...]

    @property
    def root(self) -> PurePosixPath:
        """The folder of the experiment that all files of the checkpoint are in."""
        folders = [str(PurePosixPath(record.name).parent) for record in self.files]
        return PurePosixPath(os.path.commonpath(folders) or ".")


def experiment_of(content: object, where: str) -> Experiment:
    """An experiment from the JSON of its ``experiment_info.json``, which is at ``where``.

    Raises CheckpointError for what is none, or is none of ours.
    """
    if not isinstance(content, Mapping):
        raise _not_ours(where, f"it holds {shown(content)} instead of an object")
    try:
        info = ExperimentInfo(**content)
    except (TypeError, ValueError) as error:
        raise _not_ours(where, f"it is incomplete ({error})") from error
    if info.framework_name != FRAMEWORK:
        raise _not_ours(where, f"it was trained with {shown(info.framework_name)}")
    own = content.get(_OWN)
    if own is None:
        own = {}
    if not isinstance(own, Mapping):
        raise _not_ours(where, f"its section {_OWN} is {shown(own)} instead of an object")
    files = info.model_files if isinstance(info.model_files, Mapping) else {}
    names = [name for key, name in files.items() if key != "checkpoint"]
    if not names or not isinstance(info.checkpoints, list) or not info.checkpoints:
        raise _not_ours(where, "it names no files of a checkpoint (checkpoints, model_files)")
    known = own.get("files")
    records = tuple(_record(name, known, where) for name in names)
    _make_listable(info)
    return Experiment(info, training_of(own, where, own.get("settings")), records)


def _make_listable(info: ExperimentInfo) -> None:
    """Other kinds of values in these places end the SDK's list as a whole."""
    is_task = type(info.task_id) is int or (
        isinstance(info.task_id, str) and info.task_id.isdecimal()
    )
    info.task_id = int(info.task_id) if is_task else -1
    info.project_id = info.project_id if type(info.project_id) is int else None
    info.experiment_name, info.model_name = str(info.experiment_name), str(info.model_name)
    info.checkpoints = [str(name) for name in info.checkpoints]
    # The SDK's page shows both as HTML.
    info.datetime = _NOT_OF_A_TIME.sub(" ", str(info.datetime))
    if type(info.evaluation_report_id) is not int:
        info.evaluation_report_id = None


def _not_ours(where: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{where} is not the experiment of a {FRAMEWORK} fine-tune: {why}; choose another, or "
        "upload it again with florence2 upload-model."
    )


def _record(name: object, known: object, where: str) -> FileRecord:
    path = PurePosixPath(name if isinstance(name, str) else "/")
    if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in str(path):
        raise _not_ours(where, f"{shown(name)} is no file inside of it")
    said = known.get(name) if isinstance(known, Mapping) else None
    size, sha256 = (said.get("size"), said.get("sha256")) if isinstance(said, Mapping) else (-1, "")
    if type(size) is not int or not isinstance(sha256, str):
        raise _not_ours(where, f"the size or the hash of {shown(name)} is not one")
    return FileRecord(str(path), size, sha256=sha256 or None)


def training_of(content: Mapping[str, Any], where: str, settings: object = None) -> Training:
    """What a training says of itself; CheckpointError for what cannot be meant.

    Keys: ``model`` (the base), ``method``, ``tasks``, ``classes``, ``prompts`` by class and
    ``metric`` (``name``, ``value``); others are passed over. Without ``settings`` they are made of
    the first task that can be asked of a whole image, with the prompts where it takes words.
    """
    try:
        tasks = _texts(content.get("tasks"))
        classes = tuple(dict.fromkeys(map(clean_class_name, _texts(content.get("classes")))))
        metric = content.get("metric")
        named = None if metric is None else (str(metric["name"]), float(metric["value"]))
        if named is not None and not math.isfinite(named[1]):
            # JSON has no such number, and the platform would read nothing of the file.
            named = None
        if settings is None:
            settings = _settings_for(tasks, classes, content.get("prompts"))
        if not isinstance(settings, Mapping):
            raise ValueError(f"settings are keys with values, not {shown(settings)}")
        # What it says is offered to everyone who connects, so it has to be something.
        parse_settings(settings)
        base, method = str(content.get("model") or ""), str(content.get("method") or "")
    except (
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        OverflowError,
        RecursionError,
        FlorenceError,
    ) as error:
        raise CheckpointError(
            f"What {where} says of its training cannot be used ({error}); correct it, or upload "
            "the fine-tune again with florence2 upload-model."
        ) from error
    return Training(base, method, tasks, classes, named, dict(settings))


def _texts(value: object) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else (value or [])
    if not isinstance(listed, list | tuple) or not all(isinstance(one, str) for one in listed):
        raise ValueError(f"a list of names is needed, not {shown(value)}")
    return tuple(listed)


def _settings_for(
    tasks: Sequence[str], classes: Sequence[str], prompts: object
) -> dict[str, object]:
    by_class = prompts if isinstance(prompts, Mapping) else {}
    for task in tasks:
        try:
            takes = parse_steps(task)[0].takes
        except RequestError:
            # A token that only this fine-tune knows; it is asked as a question of its own.
            continue
        if takes is TaskInput.TEXT and classes:
            mapping = {name: by_class.get(name) or name for name in classes}
            return {"task_prompt": task, "mapping": mapping}
        if takes is TaskInput.NONE:
            return {"task_prompt": task}
    return {}


def model_meta_of(training: Training) -> sly.ProjectMeta:
    """The classes of a fine-tune in the shape that its tasks give, and every tag of ours."""
    outputs = {step.output for task in training.tasks for step in _known_steps(task)}
    shapes = {sly.Rectangle if output in _BOXES else sly.Polygon for output in outputs}
    if OutputKind.BOXES_OR_POLYGONS in outputs or len(shapes) > 1:
        shape = sly.AnyGeometry
    else:
        shape = next(iter(shapes), sly.Rectangle)
    classes = [sly.ObjClass(name, shape, class_color(name)) for name in training.classes]
    return sly.ProjectMeta(classes, tag_metas=list(TAG_METAS.values()))


def _known_steps(task: str) -> Sequence[Any]:
    try:
        return [step for step in parse_steps(task) if step.output not in _WITHOUT_OBJECTS]
    except RequestError:
        return ()


_WITHOUT_OBJECTS: Final = {OutputKind.TEXT, OutputKind.OCR}


def write_experiment(
    out: Path,
    *,
    name: str | None = None,
    project_id: int | None = None,
    task_id: int | None = None,
) -> Path:
    """Writes a training's result as an experiment into ``out/experiment`` and returns that folder.

    ``out`` holds ``training.json`` (see ``training_of``), the checkpoint or the adapter in
    ``best``, and maybe ``settings.yaml``, which become the model's own. Weights are linked, not
    copied, where the disk can. A base that is a folder of this machine comes along, as no other
    machine has it. ``name`` is what lists show, by default that of ``out``; ``project_id`` and
    ``task_id`` are the platform's, where it has them. Raises CheckpointError where something is
    missing or cannot be used, OSError where it cannot be written.
    """
    out = out.expanduser().resolve()
    record = read_training(out / TRAINING_NAME)
    training = training_of(record, str(out / TRAINING_NAME), _settings_in(out))
    sources = dict(_files_of(out / BEST_FOLDER))
    target = out / EXPERIMENT_FOLDER
    shutil.rmtree(target, ignore_errors=True)
    (target / CHECKPOINTS / BEST_FOLDER).mkdir(parents=True)
    files = {}
    for inner, source in sources.items():
        placed = f"{CHECKPOINTS}/{BEST_FOLDER}/{inner}"
        _link(source, target / placed)
        files[placed] = {"size": source.stat().st_size, "sha256": file_sha256(source)}
    meta = model_meta_of(training).to_json()
    finished = datetime.fromtimestamp((out / TRAINING_NAME).stat().st_mtime, UTC)
    title = name or out.name
    stem = str(task_id) if task_id is not None else f"{finished:%Y%m%d-%H%M%S}"
    parent = _path_part(title if project_id is None else f"{project_id}_{title}")
    data = record.get("data")
    counts = data if isinstance(data, Mapping) else {}
    base = Path(training.base).name if Path(training.base).is_absolute() else training.base
    info = {
        "experiment_name": title,
        "framework_name": FRAMEWORK,
        "model_name": base or FRAMEWORK,
        "task_type": TASK_TYPE,
        "project_id": project_id,
        # What the SDK's list takes for a training that was no task of the platform.
        "task_id": -1 if task_id is None else task_id,
        "model_files": {
            PurePosixPath(placed).relative_to(_FILES).as_posix(): placed for placed in files
        },
        "model_meta": META_NAME,
        "checkpoints": [_BEST],
        "best_checkpoint": PurePosixPath(_BEST).name,
        "hyperparameters": _HYPERPARAMETERS,
        "artifacts_dir": f"{EXPERIMENTS}/{parent}/{stem}_{FRAMEWORK}/",
        "base_checkpoint": base or None,
        "train_size": counts.get("training_images"),
        "val_size": counts.get("validation_images"),
        "datetime": f"{finished:%Y-%m-%d %H:%M:%S}",
        "evaluation_metrics": dict([training.metric]) if training.metric else None,
        _OWN: {**training.to_json(), "files": files},
    }
    (target / META_NAME).write_text(_json(meta), encoding="utf-8")
    hyperparameters = yaml.safe_dump(record, sort_keys=False, allow_unicode=True)
    (target / _HYPERPARAMETERS).write_text(hyperparameters, encoding="utf-8")
    # What the SDK's own readers of a checkpoint look for in it; nothing of ours reads it.
    stands_for = {"checkpoint": BEST_FOLDER, "model_name": info["model_name"], "files": list(files)}
    torch.save({"model_info": stands_for, "model_meta": meta}, target / _BEST)
    for carried in _CARRIED:
        if (out / carried).is_file():
            _link(out / carried, target / carried)
    # Last, because its being there says that all of it is.
    write_whole(target / INFO_NAME, _json(info))
    return target


_FILES: Final = PurePosixPath(CHECKPOINTS, BEST_FOLDER)


def _settings_in(out: Path) -> object:
    """What the file of settings beside a training says, if there is one."""
    path = out / _SETTINGS
    if not path.is_file():
        return None
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read as YAML ({error}); correct it.") from error
    if not isinstance(loaded, dict):
        return loaded
    return {key: value for key, value in loaded.items() if value not in (None, "", [], {})}


def _files_of(best: Path) -> Iterator[tuple[str, Path]]:
    """The files of a checkpoint or an adapter by their places in its folder."""
    if not best.is_dir():
        raise CheckpointError(
            f"A trained model is in {best}, and there is no such folder; name the folder that "
            "florence2 train wrote to."
        )
    found = [path for path in sorted(best.rglob("*")) if path.is_file()]
    if not found:
        raise CheckpointError(f"A trained model is in {best}, and it is empty; train it first.")
    for path in found:
        yield path.relative_to(best).as_posix(), path
    if not (best / ADAPTER_CONFIG).is_file() or (best / BASE_FOLDER).is_dir():
        return
    # What has a name is there on other machines too; a folder of this one is not.
    bases = [name for name in base_names(best) if name not in CHECKPOINT_NAMES]
    if folder := next((name for name in bases if Path(name).is_dir()), None):
        whole = resolve(folder)
        for name in whole.files:
            yield f"{BASE_FOLDER}/{name}", whole.folder / name


def read_training(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a training; CheckpointError where there is none."""
    return read_json(
        path, "training's file", "name a folder that florence2 train wrote to until its end"
    )


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, target)


def _json(content: object) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _path_part(name: str) -> str:
    """A name as one part of a path in team files."""
    return clean_class_name(name.replace("/", "_").strip(". ")) or FRAMEWORK
