"""From a checkpoint's files to an engine that has answered: precision, batches, self-test."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Final

import torch

from florence2.checkpoint.checkpoint import Checkpoint, load_weights
from florence2.engine.engine import Engine
from florence2.engine.loading import PrecisionError, check_recordings, probe_picture, self_test
from florence2.images import open_image
from florence2.runtimes.memory import BatchSizes, image_batch, measured_batches, prompt_batch
from florence2.runtimes.memory_meter import CudaMeter, MemoryMeter
from florence2.runtimes.precision import TOLERANCE, error_against_fp32, float32_bytes
from florence2.runtimes.torch import PRECISIONS, TorchRuntime, choose_precision

logger = logging.getLogger(__name__)

_ROOM_FOR_CHECK: Final = 2
"""The float32 check runs where so many times its weights are free: activations need room too."""


def load_engine(
    checkpoint: Checkpoint, device: torch.device, precision: str, cache_bytes: int
) -> Engine:
    """An engine on ``device`` that has answered once; what its checkpoint notes is logged.

    ``precision`` as for ``choose_precision``. Where ``auto`` chose one that this checkpoint is not
    sane in (NaN, infinity, or on a GPU features far from float32's), it is loaded in fp32 instead,
    with a warning. One asked for by name stays: NaN and infinity raise PrecisionError, features
    that are far off are a warning.
    """
    used = choose_precision(precision, device, checkpoint.config.text.d_model)
    is_free = precision == "auto" and used != "fp32"
    engine = None
    try:
        engine = _load(checkpoint, device, used, cache_bytes, is_free)
    except PrecisionError as error:
        if not is_free:
            raise
        logger.warning("%s It is loaded in fp32 instead.", error)
    # Outside the handler, whose traceback keeps the first engine's memory.
    engine = engine or _load(checkpoint, device, "fp32", cache_bytes, False)
    for note in engine.checkpoint.notes:
        logger.warning("Checkpoint %s: %s", checkpoint.name, note)
    return engine


def _load(
    checkpoint: Checkpoint, device: torch.device, used: str, cache_bytes: int, is_free: bool
) -> Engine:
    network = load_weights(checkpoint, PRECISIONS[used])
    checkpoint = replace(checkpoint, notes=(*checkpoint.notes, *network.notes))
    runtime = TorchRuntime(network, device, used)
    engine = Engine(
        checkpoint,
        runtime,
        image_batch=image_batch(checkpoint, device.type),
        prompt_batch=prompt_batch(checkpoint, device.type),
        cache_bytes=cache_bytes,
    )
    try:
        engine.self_test_s = self_test(engine)
        if device.type == "cuda":
            check_recordings(engine, runtime.graphs)
            meter = CudaMeter(device)
            with runtime.computing():
                check_where_it_fits(checkpoint, runtime, meter, is_free)
                _take_over(engine, measured_batches(checkpoint, runtime, meter, cache_bytes))
    except BaseException:
        engine.close()
        raise
    return engine


def check_against_fp32(checkpoint: Checkpoint, runtime: TorchRuntime, is_error: bool) -> float:
    """The error of the visual features against float32, see ``error_against_fp32``.

    Beyond ``TOLERANCE`` a PrecisionError if ``is_error``, else a warning. A pass of the vision
    tower in float32: milliseconds on a GPU, many seconds on a CPU at full size.
    """
    picture = open_image(probe_picture()).image
    error = error_against_fp32(runtime, checkpoint.image_processor.pixels(picture)[None])
    limit = TOLERANCE[runtime.precision]
    logger.info("%s in %s: features within %.2g of fp32", checkpoint.name, runtime.precision, error)
    if error > limit:
        found = (
            f"The visual features of checkpoint {checkpoint.name} in {runtime.precision} may be "
            f"at most {limit:g} from those in fp32, relative to their size, and are {error:.2g} "
            "from them; use precision fp32."
        )
        if is_error:
            raise PrecisionError(found)
        logger.warning(found)
    return error


def check_where_it_fits(
    checkpoint: Checkpoint, runtime: TorchRuntime, meter: MemoryMeter, is_error: bool
) -> bool:
    """``check_against_fp32`` in reduced precision where memory allows; whether it was made."""
    if runtime.precision == "fp32":
        return False
    free, needed = meter.free_bytes(), _ROOM_FOR_CHECK * float32_bytes(runtime.network)
    if free >= needed:
        try:
            check_against_fp32(checkpoint, runtime, is_error)
        except (RuntimeError, MemoryError) as error:
            if not runtime.is_out_of_memory(error):
                raise
        else:
            return True
    logger.info(
        "%s is not checked against fp32: too little memory, %d MiB are free",
        checkpoint.name,
        free >> 20,
    )
    runtime.free_memory()
    return False


def _take_over(engine: Engine, sizes: BatchSizes) -> None:
    engine.image_batch, engine.prompt_batch = sizes.images, sizes.prompts
    logger.info("Batches: %d images, %d prompts", sizes.images, sizes.prompts)
