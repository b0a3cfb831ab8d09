"""From a checkpoint to an engine that has answered: runtime, precision, batches, adapters."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch

from florence2.checkpoint.checkpoint import (
    Checkpoint,
    changed_weights,
    network_of,
    read_whole,
)
from florence2.checkpoint.converted import Converted, read_converted
from florence2.conversion.kept import Conversions, check_choice, notes_of
from florence2.engine.batch_sizes import (
    BatchSizes,
    CudaMeter,
    image_batch,
    measured_batches,
    prompt_batch,
)
from florence2.engine.checks import (
    VISION_WEIGHTS,
    answer_s,
    check_recordings,
    check_where_it_fits,
    self_test,
)
from florence2.engine.engine import Engine
from florence2.errors import (
    CheckpointError,
    DeviceError,
    FlorenceError,
    PrecisionError,
)
from florence2.runtimes.base import Runtime
from florence2.runtimes.device import (
    PRECISIONS,
    base_precision,
    choose_precision,
    parse_quantization,
)
from florence2.runtimes.openvino import (
    MODELS,
    ConvertedNetwork,
    OpenVinoRuntime,
    cpu_computes_int8,
    has_openvino,
)
from florence2.runtimes.torch import (
    AdapterRuntime,
    TorchRuntime,
)

logger = logging.getLogger(__name__)

MEASURED_FROM_D_MODEL: Final = 512
"""Smaller networks answer in milliseconds in either runtime: nothing to measure for."""

Load = Callable[[str, bool], Engine]
"""Loads in a precision; the flag says that another one may be taken instead."""


def load_engine(
    checkpoint: Checkpoint,
    device: torch.device,
    precision: str,
    cache_bytes: int,
    runtime: str = "auto",
    conversions: Conversions | None = None,
    adapters: Mapping[str, Checkpoint] = MappingProxyType({}),
) -> Engine:
    """An engine on ``device`` that has answered once; what its checkpoint notes is logged.

    ``adapters`` of this checkpoint, by the names that asks call them by.

    ``runtime``: torch, openvino (on a CPU; converts the checkpoint at first, see ``Conversions``),
    or auto, the faster of the two as far as it is known or worth measuring. ``precision`` as for
    ``choose_precision``; where openvino runs it, ``auto`` is int8 if that was measured to cost
    less than a point on a user's own images (``Conversions.int8_loss``). Where ``auto`` chose one
    that this checkpoint is not sane in (NaN, infinity, or on a GPU features far from float32's),
    it is loaded in fp32 instead, with a warning. One asked for by name stays: NaN and infinity
    raise PrecisionError, features that are far off are a warning.
    """
    if checkpoint.converted is not None:
        engine = _load_converted_folder(
            checkpoint, checkpoint.converted, device, precision, cache_bytes, runtime
        )
    else:
        conversions = conversions or Conversions()
        used = chosen_runtime(checkpoint, device, precision, runtime, conversions)
        if used == "openvino":
            engine = _load_openvino(
                checkpoint, device, precision, cache_bytes, conversions, adapters
            )
        else:
            engine = _load_torch(checkpoint, device, precision, cache_bytes, adapters)
    for note in engine.notes:
        logger.warning("Checkpoint %s: %s", checkpoint.name, note)
    return engine


def _load_torch(
    checkpoint: Checkpoint,
    device: torch.device,
    precision: str,
    cache_bytes: int,
    adapters: Mapping[str, Checkpoint],
) -> Engine:
    def load(used: str, is_free: bool) -> Engine:
        return _load(checkpoint, device, used, cache_bytes, is_free, adapters)

    return _in_precision(checkpoint, device, precision, load)


def _load_openvino(
    checkpoint: Checkpoint,
    device: torch.device,
    precision: str,
    cache_bytes: int,
    conversions: Conversions,
    adapters: Mapping[str, Checkpoint],
) -> Engine:
    """Its conversion, made where there is none yet, and one for every adapter.

    ``auto`` is int8 where that was measured to cost next to nothing; of adapters nobody knows.
    """
    loss = conversions.int8_loss(checkpoint) if precision in ("auto", "int8") else None
    takes_int8 = loss is not None and precision == "auto" and not adapters and cpu_computes_int8()
    if takes_int8:
        conversions.progress(
            f"{checkpoint.name} is loaded in int8, which precision auto takes since it was "
            f"measured on your images: {loss}."
        )
    advice = (
        f"florence2 evaluate DATA --model {shlex.quote(checkpoint.name)} --precision int8 "
        "--against fp32 measures it on your labeled images"
    )

    def load(used: str, is_free: bool) -> Engine:
        folder = conversions.folder_for(checkpoint, used)
        converted = read_converted(folder)

        def beside(adapter: Checkpoint) -> tuple[Runtime, bool]:
            own_folder = conversions.folder_for(adapter, used)
            runtime = OpenVinoRuntime(ConvertedNetwork(own_folder, adapter.config.text, used))
            # No weights are read to see what was changed.
            return runtime, _tower_sha256(read_converted(own_folder)) != _tower_sha256(converted)

        notes = notes_of(converted, loss, advice)
        engine = _load_converted(checkpoint, folder, converted, notes, cache_bytes)
        _add_adapters(engine, adapters, beside)
        return engine

    return _in_precision(checkpoint, device, precision, load, "int8" if takes_int8 else None)


_TOWER_FILE: Final = f"{MODELS[0]}.bin"


def _tower_sha256(converted: Converted) -> str | None:
    return next(record.sha256 for record in converted.files if record.name == _TOWER_FILE)


def _in_precision(
    checkpoint: Checkpoint,
    device: torch.device,
    precision: str,
    load: Load,
    auto: str | None = None,
) -> Engine:
    """Loaded in the precision; where ``auto`` chose one that is not sane, in fp32.

    ``auto`` is what it chooses, where that is settled.
    """
    used = auto or choose_precision(precision, device, checkpoint.config.text.d_model)
    is_free = precision == "auto" and used != "fp32"
    try:
        return load(used, is_free)
    except PrecisionError as error:
        if not is_free:
            raise
        logger.warning("%s It is loaded in fp32 instead.", error)
    # Outside the handler, whose traceback keeps the first engine's memory.
    return load("fp32", False)


def _load_converted_folder(
    checkpoint: Checkpoint,
    converted: Converted,
    device: torch.device,
    precision: str,
    cache_bytes: int,
    runtime: str,
) -> Engine:
    """What was converted by itself: it has one precision, and no weights for another runtime."""
    if runtime == "torch":
        raise DeviceError(
            f"{checkpoint.folder} holds a network converted for OpenVINO, which runtime 'torch' "
            "does not run; use runtime 'openvino', or the checkpoint that it was made from."
        )
    check_choice("openvino", device, "auto")
    if precision not in ("auto", converted.precision):
        raise DeviceError(
            f"{checkpoint.folder} was converted to {converted.precision}, and {precision!r} was "
            "asked for; leave the precision out, or convert the checkpoint again."
        )
    notes = notes_of(converted)
    return _load_converted(checkpoint, checkpoint.folder, converted, notes, cache_bytes)


def _load_converted(
    checkpoint: Checkpoint,
    folder: Path,
    converted: Converted,
    notes: tuple[str, ...],
    cache_bytes: int,
) -> Engine:
    checkpoint = replace(checkpoint, notes=(*checkpoint.notes, *converted.notes, *notes))
    network = ConvertedNetwork(folder, checkpoint.config.text, converted.precision)
    if converted.size_wh != checkpoint.image_processor.size_wh:
        raise CheckpointError(
            f"{folder} was converted for images of {converted.size_wh[0]} x "
            f"{converted.size_wh[1]} pixels, and the checkpoint works with "
            f"{checkpoint.image_processor.size_wh[0]} x {checkpoint.image_processor.size_wh[1]}; "
            "convert it again."
        )
    engine = Engine(
        checkpoint,
        OpenVinoRuntime(network),
        image_batch=image_batch(checkpoint, "cpu"),
        prompt_batch=prompt_batch(checkpoint, "cpu"),
        cache_bytes=cache_bytes,
    )
    try:
        engine.self_test_s = self_test(engine)
    except BaseException:
        engine.close()
        raise
    return engine


def chosen_runtime(
    checkpoint: Checkpoint,
    device: torch.device,
    precision: str,
    runtime: str,
    conversions: Conversions,
) -> str:
    """The runtime for ``runtime``, which may be auto.

    On a GPU torch. On a CPU openvino where it was measured to be the faster one for this
    checkpoint, precision and machine; it is measured at first, where the library is installed and
    the network is large enough for seconds to be at stake.
    """
    if runtime != "auto" or device.type != "cpu" or not has_openvino():
        return "torch" if runtime == "auto" else runtime
    if precision == "int8":
        return "openvino"
    if parse_quantization(precision, device):
        return "torch"
    d_model = checkpoint.config.text.d_model
    if d_model < MEASURED_FROM_D_MODEL:
        return "torch"
    used = choose_precision(precision, device, d_model)
    try:
        return conversions.faster_runtime(checkpoint, used, partial(_answer_s_with, checkpoint))
    except FlorenceError as error:
        logger.warning("%s The torch runtime is used.", error)
        return "torch"


def _answer_s_with(checkpoint: Checkpoint, used: str, folder: Path | None) -> float:
    """As ``answer_s``, by the conversion in ``folder``, or without one by torch."""
    if folder is None:
        engine = _load(checkpoint, torch.device("cpu"), used, 0, False, {})
    else:
        engine = _load_converted(checkpoint, folder, read_converted(folder), (), 0)
    try:
        return answer_s(engine)
    finally:
        engine.close()


def _load(
    checkpoint: Checkpoint,
    device: torch.device,
    used: str,
    cache_bytes: int,
    is_free: bool,
    adapters: Mapping[str, Checkpoint],
) -> Engine:
    dtype = PRECISIONS[base_precision(used, device)]
    whole = read_whole(checkpoint)
    network = network_of(checkpoint, {**whole, **changed_weights(checkpoint, whole)}, dtype)
    checkpoint = replace(checkpoint, notes=(*checkpoint.notes, *network.notes))
    runtime = TorchRuntime(network, device, used)
    if not adapters:
        # Read into memory, from some kinds of files.
        whole = {}

    def beside(adapter: Checkpoint) -> tuple[Runtime, bool]:
        changed = changed_weights(adapter, whole)
        has_own_tower = any(name.startswith(VISION_WEIGHTS) for name in changed)
        if runtime.quantization is None:
            return AdapterRuntime(runtime, changed, len(adapters)), has_own_tower
        merged = network_of(adapter, {**whole, **changed}, dtype)
        own_runtime = TorchRuntime(merged, device, used, idle_share=len(adapters))
        return own_runtime, has_own_tower

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
        _add_adapters(engine, adapters, beside)
        if device.type == "cuda":
            meter = CudaMeter(device)
            with runtime.computing():
                check_where_it_fits(checkpoint, runtime, meter, is_free)
                # All adapters together keep as much while idle as their base does.
                kept = runtime.most_idle_bytes + runtime.most_prompt_bytes if adapters else 0
                _take_over(engine, measured_batches(checkpoint, runtime, meter, cache_bytes + kept))
    except BaseException:
        engine.close()
        raise
    return engine


def _add_adapters(
    engine: Engine,
    adapters: Mapping[str, Checkpoint],
    beside: Callable[[Checkpoint], tuple[Runtime, bool]],
) -> None:
    """Loads adapters beside their base; each has answered once then.

    ``beside`` gives an adapter's runtime, and whether its vision tower is not the base's.
    """
    try:
        for name, checkpoint in adapters.items():
            runtime, has_own_tower = beside(checkpoint)
            if not isinstance(runtime, AdapterRuntime):
                note = (
                    f"Runtime {runtime.name} in {runtime.precision} holds all weights of this "
                    "adapter once more; with torch in fp32, bf16 or fp16 it shares its base's."
                )
                checkpoint = replace(checkpoint, notes=(*checkpoint.notes, note))
            engine.add_adapter(name, checkpoint, runtime, has_own_tower=has_own_tower)
            self_test(engine, name)
            if isinstance(runtime, TorchRuntime):
                check_recordings(engine, runtime.graphs, name)
    except BaseException:
        engine.close()
        raise


def _take_over(engine: Engine, sizes: BatchSizes) -> None:
    engine.image_batch, engine.prompt_batch = sizes.images, sizes.prompts
    logger.info("Batches: %d images, %d prompts", sizes.images, sizes.prompts)
