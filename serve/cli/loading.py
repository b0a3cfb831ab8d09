"""What commands share: loading a model, a bar for transfers, failures of the platform."""

from __future__ import annotations

import atexit
import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from serve.console import ERR, say
from serve.process import leave_cores_to_others

if TYPE_CHECKING:
    from florence2.api import Florence2
    from florence2.checkpoint.files import CheckpointFiles
    from florence2.checkpoint.hub import ProgressCallback, ProgressUpdate
    from serve.model_service import Deployed


WHOLE_BYTES: Final = 64 * 2**20
_BLOCKS: Final = 64
BLOCK_BYTES: Final = 2**20
# A command sees each image once; features kept for a second look would only take memory.
_CACHE_BYTES: Final = 0


def fingerprint(name: str) -> str | None:
    """What tells two checkpoints of one name apart; None while it is not on this machine.

    Of an adapter its base's and its own.

    The commit it came from, else a hash of its weights: of all of a small file, of 64 blocks
    spread over a large one.
    """
    from florence2.checkpoint.catalog import resolve
    from florence2.checkpoint.files import ADAPTER_CONFIG
    from florence2.errors import CheckpointError

    try:
        found = resolve(name, offline=True)
    except CheckpointError:
        return None
    if found.base is None:
        return _fingerprint_of(found)
    # How strongly an adapter counts stands in its config.
    config = weights_hash(found.folder / ADAPTER_CONFIG)
    several = f"{_fingerprint_of(found.base)} {_fingerprint_of(found)} {config}"
    return hashlib.blake2b(several.encode(), digest_size=16).hexdigest()


def _fingerprint_of(found: CheckpointFiles) -> str:
    if found.revision is not None:
        return found.revision
    weights = [file for file in found.files if file.endswith((".safetensors", ".bin"))]
    hashes = [weights_hash(found.folder / file) for file in weights]
    if len(hashes) == 1:
        return hashes[0]
    return hashlib.blake2b("".join(hashes).encode(), digest_size=16).hexdigest()


def weights_hash(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
        else:
            for number in range(_BLOCKS):
                file.seek(number * (size - BLOCK_BYTES) // (_BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def load_model(name: str, device: str, runtime: str, precision: str = "auto") -> Florence2:
    """The model, or the FlorenceError that says in a sentence why there is none."""
    from florence2.api import Florence2
    from florence2_demo.calibration import calibration_scenes

    chosen: dict[str, Any] = {
        "device": device,
        "runtime": runtime,
        "precision": precision,
        "cache_bytes": _CACHE_BYTES,
        "calibration": calibration_scenes,
        "notify": say,
    }
    with transfer_bar(f"Loading {name}") as progress:
        model = Florence2.load(name, **chosen, progress=progress)
    leave_cores_to_others(model.engine.checkpoint.config.text.d_model)
    return model


@dataclass(frozen=True, slots=True, eq=False)
class OneModel:
    """A model that stays what it is: no other one is deployed, and it never sleeps."""

    current: Deployed

    def wake(self) -> None:
        """It is awake."""


def first_and_others(device: str, devices: str | None) -> tuple[str, tuple[str, ...]]:
    """What ``--device`` and ``--devices`` say; DeviceError, also where both are given."""
    if devices is None:
        return device, ()
    from florence2.errors import DeviceError
    from florence2.runtimes.device import choose_devices

    if device != "auto":
        raise DeviceError(
            f"--devices takes the place of --device, and {device!r} and {devices!r} were given; "
            "leave one out."
        )
    first, *others = choose_devices(devices)
    return first, tuple(others)


def one_model(
    name: str, device: str, runtime: str, precision: str, other_devices: tuple[str, ...] = ()
) -> OneModel:
    """The model behind a scheduler of its own, ``other_devices`` beside it.

    Every thread that computes gets workers of its own from OpenMP, and with more workers than
    cores each operation waits for some to wake: so the thread that loads ends, and its workers
    with it. It is left behind by who presses Ctrl-C.
    """
    from florence2.engine.scheduler import Scheduler
    from florence2.workers import share_cores
    from serve.model_service import Deployed, ModelChoice, others_of

    cores = share_cores(device, other_devices)
    loading: Future[Florence2] = Future()

    def load() -> None:
        try:
            loading.set_result(load_model(name, device, runtime, precision))
        except BaseException as error:  # noqa: BLE001 - it is raised where the model is waited for
            loading.set_exception(error)

    threading.Thread(target=load, name="load", daemon=True).start()
    model = loading.result()
    choice = ModelChoice(name, device, precision, runtime, other_devices=other_devices)
    others = others_of(model, choice, cores, has_clicks=False)
    scheduler = Scheduler(model.engine, has_clicks=False, others=others)
    # A thread that computes must not meet the end of the interpreter.
    atexit.register(scheduler.close)
    return OneModel(Deployed(choice, model, scheduler))


def fetch(name: str) -> None:
    """The checkpoint's files on this machine; CheckpointError when they cannot be had."""
    from florence2.checkpoint.catalog import resolve

    with transfer_bar(f"Loading {name}") as progress:
        resolve(name, progress=progress)


@contextmanager
def transfer_bar(text: str) -> Iterator[ProgressCallback | None]:
    """A bar of a transfer for a person; a log has no use for one."""
    if not ERR.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=ERR, transient=True) as bar:
        task = bar.add_task(text, total=None)

        def show(update: ProgressUpdate) -> None:
            bar.update(task, completed=update.done_bytes, total=update.total_bytes)

        yield show


@contextmanager
def platform_failures_told() -> Iterator[None]:
    """Around calls of the platform: what it fails with becomes an error with one sentence."""
    from florence2.errors import FlorenceError
    from serve.platform.failures import FailedImageError, platform_failure

    try:
        yield
    except Exception as error:
        if isinstance(error, FlorenceError) or (failure := platform_failure(error)) is None:
            raise
        raise FailedImageError(failure) from error
