"""Conversions that are made at first use and kept, and what was measured of them.

Which runtime is the faster one, and what int8 costs on a user's own images.
"""

from __future__ import annotations

import functools
import json
import logging
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

from florence2.checkpoint.catalog import default_cache_dir
from florence2.checkpoint.checkpoint import Checkpoint
from florence2.checkpoint.converted import (
    Converted,
    file_sha256,
    is_converted,
    read_converted,
    source_hash,
)
from florence2.checkpoint.files import CONVERTED_NAME, check_folder, read_json, write_whole
from florence2.conversion.convert import Picture, Progress, convert
from florence2.conversion.eight_bits import check_int8
from florence2.conversion.measured_loss import Int8Loss, TaskLoss, read_loss
from florence2.errors import CheckpointError, DeviceError
from florence2.runtimes.device import parse_quantization
from florence2.runtimes.openvino import openvino
from florence2.runtimes.quantization import check_quantization

logger = logging.getLogger(__name__)

FOLDER: Final = "openvino"
"""In the cache of checkpoints."""

_CHOICE: Final = "runtime.json"
_LOSS: Final = "int8-loss.json"
_SHOWN_HASH: Final = 12
_CPU_INFO: Final = Path("/proc/cpuinfo")

Calibration = Callable[[], tuple[Sequence[Picture], str]]
"""Gives images [H, W, 3] of 8-bit RGB like those that will be labelled, and where they are from."""

AnswerSeconds = Callable[[str, Path | None], float]
"""Seconds of an answer in a precision, by the conversion in a folder or, without one, by torch."""


@dataclass(frozen=True, slots=True)
class Conversions:
    """Where converted networks are kept, and what int8 is calibrated on.

    In the cache of checkpoints, by the hash of what they were made from: a folder of weights may be
    read-only, and one that has changed is another checkpoint. ``calibration`` is called for int8
    only.
    """

    cache_dir: Path | None = None
    calibration: Calibration | None = None
    progress: Progress = logger.info

    def folder_for(self, checkpoint: Checkpoint, precision: str) -> Path:
        """The checkpoint's conversion to a precision, whole; made where there is none."""
        openvino()
        folder = self._home(checkpoint) / precision
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(folder.parent / f".{precision}.lock"):
                if not self._is_kept(folder):
                    _clear(folder)
                    images, source = self._calibration(precision)
                    self.progress(f"Converting {checkpoint.name} to {precision} for OpenVINO, once")
                    convert(
                        checkpoint,
                        precision,
                        folder,
                        calibration=images,
                        calibration_source=source,
                        progress=self.progress,
                    )
        except OSError as error:
            raise CheckpointError(
                f"The conversion of {checkpoint.name} cannot be kept in {folder} "
                f"({error.strerror or error}); make that folder writable, or name another cache "
                "folder (FLORENCE2_CACHE)."
            ) from error
        return folder

    def faster_runtime(
        self, checkpoint: Checkpoint, precision: str, answer_s: AnswerSeconds
    ) -> str:
        """torch or openvino, as measured on this machine for this checkpoint and precision."""
        path = self._home(checkpoint) / _CHOICE
        machine = _machine()
        known = _read_choice(path)
        seconds = known.get(precision) if known.get("machine") == machine else None
        if seconds is None:
            folder = self.folder_for(checkpoint, precision)
            self.progress("Measuring which runtime is the faster one here, once")
            seconds = {
                "torch": answer_s(precision, None),
                "openvino": answer_s(precision, folder),
            }
            kept = known if known.get("machine") == machine else {}
            content = {**kept, "machine": machine, precision: seconds}
            try:
                write_whole(path, json.dumps(content, indent=2) + "\n")
            except OSError as error:
                logger.warning("%s cannot be written (%s); next time is measured anew", path, error)
        runtime = "openvino" if seconds["openvino"] < seconds["torch"] else "torch"
        logger.info(
            "%s in %s: an answer takes %.2f s with torch and %.2f s with openvino here",
            checkpoint.name,
            precision,
            seconds["torch"],
            seconds["openvino"],
        )
        return runtime

    def int8_loss(self, checkpoint: Checkpoint) -> Int8Loss | None:
        """That which ``keep_int8_loss`` kept of the conversion to int8 as it is now, or None."""
        home = self._home(checkpoint)
        loss = read_loss(home / _LOSS)
        if loss is None or not self._is_kept(home / "int8"):
            return None
        of_now = self._source(checkpoint), file_sha256(home / "int8" / CONVERTED_NAME)
        return loss if of_now == (loss.source_sha256, loss.conversion_sha256) else None

    def keep_int8_loss(
        self,
        checkpoint: Checkpoint,
        tasks: tuple[TaskLoss, ...],
        *,
        data: str,
        data_sha256: str,
        command: str,
        date: str,
    ) -> Path:
        """Keeps what the conversion to int8, which must be there, lost; precision auto takes it.

        The place of the record; CheckpointError where it cannot be written.
        """
        home = self._home(checkpoint)
        path, manifest = home / _LOSS, home / "int8" / CONVERTED_NAME
        try:
            loss = Int8Loss(
                self._source(checkpoint),
                file_sha256(manifest),
                {**read_converted(manifest.parent).versions, "torch": torch.__version__},
                data,
                data_sha256,
                command,
                date,
                tasks,
            )
            loss.write(path)
        except OSError as error:
            raise CheckpointError(
                f"What int8 costs cannot be kept in {path} ({error.strerror or error}); make that "
                "folder writable, or name another cache folder (FLORENCE2_CACHE)."
            ) from error
        return path

    def forget_int8_loss(self, checkpoint: Checkpoint) -> bool:
        """Removes what was kept, so that auto takes int8 no more; whether there was something."""
        path = self._home(checkpoint) / _LOSS
        was_there = path.is_file()
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{path} lets precision auto take int8, which costs too much, and cannot be "
                f"removed ({error.strerror or error}); remove it."
            ) from error
        return was_there

    def _home(self, checkpoint: Checkpoint) -> Path:
        cache = default_cache_dir() if self.cache_dir is None else self.cache_dir
        found = self._source(checkpoint)[:_SHOWN_HASH]
        return cache / FOLDER / f"{Path(checkpoint.name).name}-{found}"

    def _source(self, checkpoint: Checkpoint) -> str:
        of_folder = _source_hash(checkpoint.folder, _stamp(checkpoint.folder))
        return checkpoint.source_hash(of_folder)

    def _is_kept(self, folder: Path) -> bool:
        if not is_converted(folder):
            return False
        try:
            versions = read_converted(folder).versions
        except CheckpointError as error:
            self.progress(str(error))
            return False
        # Another version may not take the graphs of this one, and has better ones of its own.
        return versions.get("openvino") == str(openvino().__version__)

    def _calibration(self, precision: str) -> tuple[Sequence[Picture], str]:
        if precision != "int8" or self.calibration is None:
            return (), ""
        return self.calibration()


def _read_choice(path: Path) -> dict[str, Any]:
    """What was measured; nothing where that cannot be read."""
    try:
        return read_json(path) if path.is_file() else {}
    except CheckpointError as error:
        logger.warning("%s What it says is measured anew.", error)
        return {}


def _clear(folder: Path) -> None:
    """Removes what is no conversion in its place, and what killed processes left beside it."""
    if not is_converted(folder):
        shutil.rmtree(folder, ignore_errors=True)
    for left in folder.parent.glob(f".{folder.name}.*.part"):
        shutil.rmtree(left, ignore_errors=True)


def check_choice(runtime: str, device: torch.device, precision: str) -> None:
    """DeviceError where a runtime does not run on the device, or not in the precision."""
    if runtime == "openvino":
        if device.type != "cpu":
            raise DeviceError(
                f"Runtime 'openvino' runs on a CPU, and device '{device}' was chosen; use device "
                "'cpu', or runtime 'torch'."
            )
        openvino()
    if precision == "int8" and device.type == "cpu" and runtime != "torch":
        openvino()
        check_int8()
        return
    if runtime == "openvino" and parse_quantization(precision, device):
        raise DeviceError(
            f"Precision {precision!r} is of the torch runtime, and runtime 'openvino' was chosen; "
            "use precision 'int8', or leave the runtime out."
        )
    check_quantization(precision, device)


_COMPARE: Final = "compare a sample with precision fp32 before you rely on it"


def notes_of(
    converted: Converted, loss: Int8Loss | None = None, advice: str = _COMPARE
) -> tuple[str, ...]:
    """What a user of a conversion must know, a sentence each.

    ``loss`` where it was measured on the user's images; else ``advice`` says how it is found out.
    """
    if converted.precision != "int8":
        return ()
    features, logits = (converted.error.get(name, 0.0) for name in ("features", "logits"))
    return (
        f"int8 was calibrated on {converted.calibration}; of a picture, visual features are "
        f"{features:.1%} and logits {logits:.1%} from float32. "
        + (
            f"What that costs on your images is not known: {advice}."
            if loss is None
            else f"What that costs was measured: {loss}."
        ),
    )


def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of a folder's files: the hash is made anew when one changes."""
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


@functools.lru_cache(maxsize=16)
def _source_hash(folder: Path, stamp: tuple[tuple[str, int, int], ...]) -> str:
    return source_hash(folder, check_folder(folder))


def _machine() -> dict[str, Any]:
    """What the measure holds for."""
    name = platform.processor() or platform.machine()
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8").splitlines()
        name = next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        logger.info("The CPU is known as %s only", name)
    return {
        "cpu": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "openvino": str(openvino().__version__),
    }
