"""``florence2 label``: a folder of images, or a video, becomes a project on disk; a project of the
platform gets its labels there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NamedTuple

import typer

from florence2.errors import RequestError, unknown_name
from serve.cli.loading import fingerprint, first_and_others, one_model
from serve.cli.options import (
    Batch,
    Beams,
    Device,
    Devices,
    ModelName,
    Precision,
    Runtime,
    Tokens,
)
from serve.console import say

if TYPE_CHECKING:
    from collections.abc import Callable

    from serve.labeling.platform_project import (
        LoadedModel,
        ProjectJob,
        ProjectModel,
        ProjectReport,
    )
    from serve.labeling.report import Report
    from serve.labeling.run import Job, ModelSource
    from serve.platform.request_state import UploadMode
    from serve.predict.predictor import Predictor
    from serve.settings import Settings
    from serve.video.report import VideoReport

DEFAULT_MODEL: Final = "Florence-2-large"

_PROMPT_HELP: Final = (
    'What to look for: "red car. dog" or "red car; dog" asks for two things; '
    '"red car, dog" is one phrase.'
)

# Text, as addresses of object storage are no paths.
Images = Annotated[
    str | None,
    typer.Argument(
        metavar="IMAGES",
        help="A folder of images, one image, or a video; with --ray also s3://... and tables.",
    ),
]
Out = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="The run's folder, with project, report and exports; run again to go on with it.",
    ),
]
Prompt = Annotated[str | None, typer.Option(help=_PROMPT_HELP)]
TaskName = Annotated[
    str | None,
    typer.Option(help="A task of `florence2 tasks`. [default: grounding with a prompt, else <OD>]"),
]
Classes = Annotated[
    list[str] | None,
    typer.Option("--class", metavar="NAME=PROMPT,...", help="A class and the prompts for it."),
]
RegionXyxy = Annotated[
    str | None, typer.Option(metavar="X1,Y1,X2,Y2", help="In pixels, for tasks about a region.")
]
SettingsFile = Annotated[
    Path | None,
    typer.Option(
        "--settings",
        metavar="FILE.yaml",
        help="Settings as the annotation tools take them; an option here takes the place of its "
        "key there.",
    ),
]
ClassThresholds = Annotated[
    list[str] | None,
    typer.Option(
        "--class-threshold",
        metavar="NAME=0.6",
        help="Another threshold for one class, such as dog=0.6; repeatable.",
    ),
]
Nms = Annotated[
    str | None,
    typer.Option(
        metavar="0.7|off",
        help="Two boxes of a class with this IoU or more are one object, and the one with the "
        "higher confidence stays; off: both stay. [default: 0.7]",
    ),
]
GeometryName = Annotated[
    str | None,
    typer.Option(metavar="polygon|bitmap", help="How outlines are written. [default: polygon]"),
]
TilingWindows = Annotated[
    str | None,
    typer.Option(
        "--tiling",
        metavar="SIZE|MAPPING|off",
        help="Look through windows too, for small objects: one number of pixels for both sides, "
        "such as 1024, or '{width: 1024, height: 768, overlap: 128}'; with full_image: false in it "
        "the whole image is not looked at. [default: off]",
    ),
]
Threshold = Annotated[float, typer.Option(help="Drop objects with a lower confidence.")]
Recursive = Annotated[bool, typer.Option("--recursive", help="Look into subfolders too.")]
Link = Annotated[bool, typer.Option("--link", help="Link images into the project, not copy.")]
Coco = Annotated[bool, typer.Option("--coco", help="Write COCO files too.")]
Yolo = Annotated[bool, typer.Option("--yolo", help="Write YOLO files too.")]
ValFraction = Annotated[
    float, typer.Option(help="Share of the images that YOLO files have for validation.")
]
Draw = Annotated[bool, typer.Option("--draw", help="Write previews with the labels drawn on.")]
Retry = Annotated[bool, typer.Option("--retry-failed", help="Only what failed before.")]
MaxFailures = Annotated[
    str | None,
    typer.Option(help="Stop when more images fail: a number, or a share such as 5%."),
]
Relabel = Annotated[
    bool, typer.Option("--relabel-changed", help="Also images that changed since their labels.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Begin anew; earlier labels move to OUT.old-1.")
]

Every = Annotated[
    int | None, typer.Option(min=1, help="Of a video: look at every so-many-th frame. [default: 1]")
]
FirstFrame = Annotated[
    int | None, typer.Option("--from", min=0, help="Of a video: the first frame, counted from 0.")
]
LastFrame = Annotated[
    int | None, typer.Option("--to", min=0, help="Of a video: the last frame, itself included.")
]
Project = Annotated[
    int | None,
    typer.Option(
        metavar="ID",
        min=1,
        help="In place of IMAGES: a project of the platform of SERVER_ADDRESS and API_TOKEN, "
        "labeled where it is; run again to go on with it. With --ray also into --out.",
    ),
]
Datasets = Annotated[
    list[str] | None,
    typer.Option("--dataset", metavar="NAME", help="Of a project: only this dataset; repeatable."),
]
Mode = Annotated[
    str | None,
    typer.Option(
        "--upload-mode",
        metavar="MODE",
        help="Of a project, what becomes of labels that are there: append, skip_labeled, "
        "iou_merge, replace_own, replace. [default: append]",
    ),
]
Again = Annotated[
    bool, typer.Option("--again", help="Of a project: begin anew, whatever earlier runs did.")
]

UploadTo = Annotated[
    int | None,
    typer.Option(
        metavar="ID",
        min=1,
        help="Then upload images and labels into this project, as florence2 upload does.",
    ),
]

_FOR_RAY: Final = "is for a run on a Ray cluster; add --ray ADDRESS"
_NOT_FOR_RAY: Final = "is for a run on one machine and not for --ray"
_IN_PLACE: Final = ("upload_mode", "again")
_FOR_FILES: Final = (
    "images",
    "out",
    "upload_to",
    "recursive",
    "link",
    "coco",
    "yolo",
    "val_fraction",
    "draw",
    "retry_failed",
    "relabel_changed",
    "overwrite",
    "every",
    "from_",
    "to",
    "shard_size",
)
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Label on a Ray cluster: local, auto or HOST:PORT of its head (see docs/scaling.md).",
    ),
]
ShardSize = Annotated[
    int | None,
    typer.Option(min=1, max=10_000, help="With --ray: images committed together. [default: 100]"),
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="With --ray: how many load the model at most. [default: one a GPU]"),
]
WorkerCores = Annotated[
    int | None, typer.Option(min=1, help="With --ray on CPUs: cores of a worker. [default: 1]")
]


def register(app: typer.Typer) -> None:
    app.command("label")(label)


def label(
    context: typer.Context,
    images: Images = None,
    out: Out = None,
    upload_to: UploadTo = None,
    project: Project = None,
    dataset: Datasets = None,
    upload_mode: Mode = None,
    again: Again = False,
    prompt: Prompt = None,
    task: TaskName = None,
    class_: Classes = None,
    region: RegionXyxy = None,
    model: ModelName = DEFAULT_MODEL,
    device: Device = "auto",
    devices: Devices = None,
    runtime: Runtime = "auto",
    precision: Precision = "auto",
    settings_file: SettingsFile = None,
    threshold: Threshold = 0.0,
    class_threshold: ClassThresholds = None,
    nms: Nms = None,
    geometry: GeometryName = None,
    tiling: TilingWindows = None,
    batch: Batch = 8,
    num_beams: Beams = None,
    max_new_tokens: Tokens = None,
    recursive: Recursive = False,
    link: Link = False,
    coco: Coco = False,
    yolo: Yolo = False,
    val_fraction: ValFraction = 0.2,
    draw: Draw = False,
    retry_failed: Retry = False,
    relabel_changed: Relabel = False,
    overwrite: Overwrite = False,
    max_failures: MaxFailures = None,
    every: Every = None,
    from_: FirstFrame = None,
    to: LastFrame = None,
    ray: Ray = None,
    shard_size: ShardSize = None,
    workers: Workers = None,
    worker_cores: WorkerCores = None,
) -> None:
    """Label a folder of images, or a video, into a Supervisely project on disk, or a project of the
    platform; stop and go on at will."""
    is_in_place = project is not None and out is None
    _check_options(context, is_in_place=is_in_place, is_of_project=project is not None)
    from serve.labeling.settings import label_settings
    from serve.limits import FailureLimit

    settings = label_settings(
        file=settings_file,
        task=task,
        prompt=prompt,
        classes=class_ or (),
        region=region,
        threshold=threshold if _is_given(context, "threshold") or not settings_file else None,
        class_thresholds=class_threshold or (),
        nms=nms,
        geometry=geometry,
        tiling=tiling,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        is_for_folders=not is_in_place,
    )
    failure_limit = FailureLimit.parse(max_failures)
    first, others = first_and_others(device, devices)
    if project is not None and out is None:
        from serve.labeling.platform_project import DEFAULT_MODE, ProjectJob

        project_job = ProjectJob(
            project,
            tuple(dataset or ()),
            _mode(upload_mode or DEFAULT_MODE),
            batch,
            again,
            max_failures,
            tuple(context.obj or ()),
        )
        load = partial(_loaded, model, first, runtime, precision, others)
        if ray is None:
            _check_left_out({"--workers": workers, "--worker-cores": worker_cores}, _FOR_RAY)
        else:
            _check_left_out({"--devices": devices}, _NOT_FOR_RAY)
        cluster = None if ray is None else _Cluster(ray, device, workers, worker_cores or 1)
        raise typer.Exit(_labeled_project(settings, project_job, load, cluster).exit_code)
    if project is not None:
        images = _address_of(project, dataset or (), ray)
    if images is None or out is None:
        raise RequestError(
            "A folder of images, or a video, is labeled into another folder: name both, as in "
            "florence2 label photos --out labeled; or name a project of the platform with "
            "--project."
        )
    if upload_to is not None:
        _check_can_upload(images, upload_to)
    from serve.labeling.run import Job, ModelSource

    job = Job(
        images=Path(images),
        out=Path(out),
        batch=batch,
        recursive=recursive,
        link=link,
        coco=coco,
        yolo=yolo,
        val_fraction=val_fraction,
        draw=draw,
        retry_failed=retry_failed,
        relabel_changed=relabel_changed,
        overwrite=overwrite,
        max_failures=failure_limit,
        arguments=tuple(context.obj or ()),
    )
    source = ModelSource(
        model,
        load=partial(_predictor, model, first, runtime, precision, others),
        fingerprint=partial(fingerprint, model),
    )
    video = {"--every": every, "--from": from_, "--to": to}
    scaling = {"--shard-size": shard_size, "--workers": workers, "--worker-cores": worker_cores}
    if ray is None:
        _check_left_out(scaling, _FOR_RAY)
        report = _labeled(settings, job, source, every, from_, to)
        raise typer.Exit(_ended(report.exit_code, out, upload_to))
    _check_left_out(video | {"--devices": devices}, _NOT_FOR_RAY)
    from serve.scaling.run import DEFAULT_SHARD_SIZE, ScaledJob, label_on_cluster

    scaled = ScaledJob(
        images,
        out,
        ray,
        job,
        shard_size=shard_size or DEFAULT_SHARD_SIZE,
        workers=workers,
        worker_cores=worker_cores or 1,
        device=device,
    )
    raise typer.Exit(_ended(label_on_cluster(settings, scaled, source).exit_code, out, upload_to))


def _address_of(project: int, datasets: Sequence[str], ray: str | None) -> str:
    """A project of the platform as the source of labels that go elsewhere; RequestError."""
    if ray is None:
        raise RequestError(
            "Images of a project are labeled into a folder by the workers of --ray; add --ray "
            "local for this machine alone, or leave --out out to label the project itself."
        )
    from serve.scaling.platform_source import project_address

    return project_address(project, datasets)


def _check_can_upload(images: str, project_id: int) -> None:
    """RequestError before anything is labeled rather than after it."""
    from serve.cli.loading import platform_failures_told
    from serve.platform.images import check_project_of_images
    from serve.platform.team_files import api_of_environment
    from serve.video.frames import is_video

    if is_video(Path(images)) and not Path(images).is_dir():
        raise RequestError(
            f"Labeled images are uploaded, and {images!r} is a video; leave --upload-to out, or "
            "label the video on the platform."
        )

    with platform_failures_told():
        check_project_of_images(api_of_environment(), project_id)


def _ended(labeled: int, out: str, upload_to: int | None) -> int:
    """The exit code, after what was labeled was uploaded too if it is to be."""
    if upload_to is None or labeled not in (0, 1):
        return labeled
    from serve.cli.upload import upload_labels

    return max(labeled, upload_labels(out, upload_to))


def _check_left_out(options: Mapping[str, object], rule: str) -> None:
    for option, value in options.items():
        if value is not None:
            raise RequestError(f"{option} {rule}; leave {option} out.")


def _check_options(context: typer.Context, *, is_in_place: bool, is_of_project: bool) -> None:
    """RequestError for options of what is labeled in place beside others, or the other way round.

    ``--dataset`` is for both, but needs a project.
    """
    for name in _FOR_FILES if is_in_place else _IN_PLACE:
        if _is_given(context, name):
            named = "IMAGES" if name == "images" else "--" + name.rstrip("_").replace("_", "-")
            raise RequestError(
                f"{named} is not for a project of the platform, and --project was given without "
                "--out; leave out one of both."
                if is_in_place
                else f"{named} is for a project that is labeled where it is; name it with "
                "--project, and leave --out out."
            )
    if is_of_project and _is_given(context, "images"):
        raise RequestError(
            "IMAGES and --project both name what is labeled; leave out one of both, or name the "
            "project that labels are to go to with --upload-to."
        )
    if not is_of_project and _is_given(context, "dataset"):
        raise RequestError("--dataset is for a project of the platform; name it with --project.")


def _mode(named: str) -> UploadMode:
    from serve.platform.request_state import UPLOAD_MODES

    known = tuple(mode for mode in UPLOAD_MODES if mode != "create")
    for mode in known:
        if mode == named:
            return mode
    raise RequestError(unknown_name("--upload-mode", named, known))


class _Cluster(NamedTuple):
    """What of a Ray cluster labels a project."""

    address: str
    device: str
    workers: int | None
    worker_cores: int


def _labeled_project(
    settings: Settings, job: ProjectJob, load: Callable[[], ProjectModel], cluster: _Cluster | None
) -> ProjectReport:
    """Here, or by the workers of a cluster."""
    if cluster is None:
        return _labeled_in_place(settings, job, load)
    from serve.scaling.cluster import check_device, connected, project_workers

    check_device(cluster.device)
    with connected(cluster.address):
        start = partial(
            project_workers,
            load,
            settings.model,
            is_on_cpu=cluster.device == "cpu",
            most=cluster.workers,
            cores=cluster.worker_cores,
        )
        return _labeled_in_place(settings, job, start)


def _labeled_in_place(
    settings: Settings, job: ProjectJob, load: Callable[[], ProjectModel]
) -> ProjectReport:
    from serve.cli.loading import platform_failures_told
    from serve.labeling.platform_project import label_project
    from serve.platform.team_files import api_of_environment

    with platform_failures_told():
        report = label_project(api_of_environment(), settings, job, load)
    for line in report.lines(job):
        say(line)
    return report


def _labeled(
    settings: Settings,
    job: Job,
    source: ModelSource,
    every: int | None,
    first: int | None,
    last: int | None,
) -> Report | VideoReport:
    """A video by its own way, everything else as images."""
    from serve.labeling.run import label_folder
    from serve.video.frames import Range, is_video

    if is_video(job.images) and not job.images.is_dir():
        from serve.video.run import label_video

        return label_video(settings, job, Range(every or 1, first or 0, last), source)
    video = {"--every": every, "--from": first, "--to": last}
    _check_left_out(video, f"is for a video, and {str(job.images)!r} is none")
    return label_folder(settings, job, source)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _loaded(
    name: str, device: str, runtime: str, precision: str, others: tuple[str, ...]
) -> LoadedModel:
    """For a project of the platform."""
    from serve.labeling.platform_project import LoadedModel
    from serve.predict.predictor import Predictor

    models = one_model(name, device, runtime, precision, others)
    return LoadedModel(Predictor(models), models.current)


def _predictor(
    name: str, device: str, runtime: str, precision: str, others: tuple[str, ...]
) -> Predictor:
    """The same way to labels as the server's, with one model that stays."""
    from serve.predict.predictor import Predictor

    # No reader of these labels was told of classes before.
    return Predictor(one_model(name, device, runtime, precision, others), fixed_shapes={})
