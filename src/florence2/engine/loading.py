"""From a checkpoint's files to an engine that has answered: precision, batches, self-test."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from florence2.checkpoint.checkpoint import (
    Checkpoint,
    changed_weights,
    network_of,
    read_whole,
)
from florence2.checkpoint.converted import Converted, read_converted
from florence2.conversion.kept import Conversions, check_choice, notes_of
from florence2.engine.answering import answer, answer_all
from florence2.engine.ask import Ask, Outcome
from florence2.engine.batch_sizes import (
    BatchSizes,
    CudaMeter,
    MemoryMeter,
    image_batch,
    measured_batches,
    prompt_batch,
)
from florence2.engine.encoding import EncodedImage
from florence2.engine.engine import Asker, Engine
from florence2.errors import (
    CheckpointError,
    DeviceError,
    FlorenceError,
    NotFiniteError,
    PrecisionError,
)
from florence2.images import open_image
from florence2.network.florence import Florence2Network
from florence2.runtimes.base import Pixels, Runtime
from florence2.runtimes.cuda_graphs import GraphRunner
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
    has_openvino,
)
from florence2.runtimes.torch import (
    AdapterRuntime,
    TorchRuntime,
    computing,
    upload,
)

logger = logging.getLogger(__name__)

TOLERANCE: Final = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.1}
"""The largest sane error of the visual tokens: several times what rounding alone makes."""

_TOWER: Final = ("model.vision_tower.", "model.multi_modal_projector.")
_VISION: Final = tuple(f"network.{start}" for start in _TOWER)


class _Vision(nn.Module):
    """``encode_images`` as the forward pass of a module, which ``functional_call`` asks for."""

    def __init__(self, network: Florence2Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network.encode_images(pixels)


@torch.inference_mode()
def error_against_fp32(runtime: TorchRuntime, pixels: Pixels) -> float:
    """||f - f32|| / ||f32|| of the visual tokens of ``pixels`` [B, 3, H, W].

    ``f`` is what the runtime gives, ``f32`` the same weights computed with in float32 on the same
    device; infinity where either is not finite. Costs one pass in float32 and room for the vision
    tower's weights in float32 (``float32_bytes``) for that long. Nothing else may use the network
    meanwhile.
    """
    with runtime.computing():
        found = runtime.encode_images(pixels).float()
    weights = {
        name: value.float()
        for name, value in _Vision(runtime.network).state_dict().items()
        if name.startswith(_VISION)
    }
    on_device = upload(pixels, runtime.network.device)
    with computing(on_device.device.type, "fp32"):
        exact = cast(Tensor, functional_call(_Vision(runtime.network), weights, (on_device,)))
    error = float((found - exact).norm() / exact.norm())
    return error if math.isfinite(error) else math.inf


def float32_bytes(network: Florence2Network) -> int:
    """What the weights of the vision tower and its projector take in float32."""
    state = _Vision(network).state_dict()
    return sum(4 * value.numel() for name, value in state.items() if name.startswith(_VISION))


_ROUNDS: Final = 3
"""Steps of a shape are recorded once it has come up a few times, and then replayed."""


_TOKENS: Final = 24
_JOIN_AFTER: Final = 3
_BEAMS: Final = (1, 3)
_TASKS: Final = ("<CAPTION>", "<OD>")


def self_test(engine: Engine, adapter: str | None = None) -> float:
    """One short generation, and its seconds; CheckpointError when it is no real answer.

    Catches weights that load and yet are useless: NaN, nothing at all, or ``<s>`` for ever.
    Numbers that are not finite are a PrecisionError where the precision may be why.
    """
    began = time.perf_counter()
    name = engine.model_of(adapter).checkpoint.name
    encoded = _encoded(engine, probe_picture(), adapter)
    if not bool(torch.isfinite(encoded.features).all()):
        raise _not_finite(engine, name, "its visual features are not finite numbers")
    ask = Ask(encoded, "<CAPTION>", num_beams=1, max_new_tokens=8, adapter=adapter)
    [result] = answer_all(engine, [ask])
    if isinstance(result, NotFiniteError):
        raise _not_finite(engine, name, "its answer to <CAPTION> is not made of finite numbers")
    if isinstance(result, FlorenceError):
        raise result
    if not result.token_ids:
        raise CheckpointError(_useless(engine, name, "its answer to <CAPTION> is empty"))
    return time.perf_counter() - began


def check_recordings(engine: Engine, graphs: GraphRunner, adapter: str | None = None) -> None:
    """Turns recording off unless recorded work gives the tokens of the same work unrecorded.

    Captions and boxes of two pictures, greedy and with beams, of prompts that start together and of
    others that join them. A recording that fails turns recording off by itself.
    """
    if not graphs.is_enabled:
        return
    try:
        recorded = [_answers(engine, adapter) for _ in range(_ROUNDS)][-1]
    except RuntimeError as error:
        graphs.give_up(f"recorded work failed: {error}")
        return
    with graphs.plainly():
        expected = _answers(engine, adapter)
    if recorded != expected:
        graphs.give_up("recorded work gave other tokens than the same work unrecorded")


def _answers(engine: Engine, adapter: str | None) -> list[tuple[int, ...] | str]:
    """The tokens of each prompt, or why it has none."""
    # One after the other, and of two pictures: a recording that does nothing would go unseen
    # where it is asked for what it was recorded with.
    engine.cache.clear()
    probes = (probe_picture(), 255 - probe_picture())
    pictures = [_encoded(engine, picture, adapter) for picture in probes]
    found: list[tuple[int, ...] | str] = []
    for beams in _BEAMS:
        first, later = (
            [
                Ask(image, task, num_beams=beams, max_new_tokens=_TOKENS, adapter=adapter)
                for task, image in zip(_TASKS, images, strict=True)
            ]
            for images in (pictures, pictures[::-1])
        )
        asker = _JoiningAsker(first, later)
        answer(engine, asker)
        outcomes = [asker.outcomes[number] for number in range(len(first) + len(later))]
        found += [str(one) if isinstance(one, FlorenceError) else one.token_ids for one in outcomes]
    return found


def _encoded(
    engine: Engine, picture: np.ndarray[Any, np.dtype[np.uint8]], adapter: str | None
) -> EncodedImage:
    [encoded] = engine.encode([open_image(picture)], model=engine.model_of(adapter))
    if isinstance(encoded, FlorenceError):
        raise encoded
    return encoded


class _JoiningAsker(Asker[int]):
    """Asks of like settings, of which some come when the others have made a few passes."""

    is_awaited = True

    def __init__(self, first: Sequence[Ask], later: Sequence[Ask]) -> None:
        self._waiting = [list(enumerate(first)), list(enumerate(later, start=len(first)))]
        self._num_first = len(first)
        self._num_passes = 0
        self.outcomes: dict[int, Outcome] = {}

    def before_pass(self) -> None:
        self._num_passes += 1

    def next_asks(self, room: int) -> list[tuple[int, Ask]]:
        are_others_done = len(self.outcomes) == self._num_first
        is_early = self._num_passes < _JOIN_AFTER and not are_others_done
        if not self._waiting or (len(self._waiting) == 1 and is_early):
            return []
        return self._waiting.pop(0)

    def settle(self, key: int, outcome: Outcome) -> None:
        self.outcomes[key] = outcome


def probe_picture() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A small picture [64, 64, 3] of two gradients: no two parts of it are alike."""
    gradient = np.linspace(0, 255, 64, dtype=np.uint8)
    return np.stack(np.broadcast_arrays(gradient[:, None], gradient[None], np.uint8(96)), 2)


def _not_finite(engine: Engine, name: str, why: str) -> CheckpointError:
    kind = CheckpointError if engine.runtime.precision == "fp32" else PrecisionError
    return kind(_useless(engine, name, why))


def _useless(engine: Engine, name: str, why: str) -> str:
    advice = "download it again"
    if engine.runtime.precision != "fp32":
        advice += " or use precision fp32"
    return (
        f"Checkpoint {name} loads but does not answer in "
        f"{engine.runtime.precision}: {why}; {advice}."
    )


MEASURED_FROM_D_MODEL: Final = 512
"""Smaller networks answer in milliseconds in either runtime: nothing to measure for."""

_ROOM_FOR_CHECK: Final = 2
"""The float32 check runs where so many times its weights are free: activations need room too."""


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
    ``choose_precision``. Where ``auto`` chose one that this checkpoint is not
    sane in (NaN, infinity, or on a GPU features far from float32's), it is loaded in fp32 instead,
    with a warning. One asked for by name stays: NaN and infinity raise PrecisionError, features
    that are far off are a warning.
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
    """Its conversion, made where there is none yet, and one for every adapter."""

    def load(used: str, is_free: bool) -> Engine:
        folder = conversions.folder_for(checkpoint, used)
        converted = read_converted(folder)

        def beside(adapter: Checkpoint) -> tuple[Runtime, bool]:
            own_folder = conversions.folder_for(adapter, used)
            runtime = OpenVinoRuntime(ConvertedNetwork(own_folder, adapter.config.text, used))
            # No weights are read to see what was changed.
            return runtime, _tower_sha256(read_converted(own_folder)) != _tower_sha256(converted)

        engine = _load_converted(checkpoint, folder, converted, cache_bytes)
        _add_adapters(engine, adapters, beside)
        return engine

    return _in_precision(checkpoint, device, precision, load)


_TOWER_FILE: Final = f"{MODELS[0]}.bin"


def _tower_sha256(converted: Converted) -> str | None:
    return next(record.sha256 for record in converted.files if record.name == _TOWER_FILE)


def _in_precision(
    checkpoint: Checkpoint, device: torch.device, precision: str, load: Load
) -> Engine:
    """Loaded in the precision; where ``auto`` chose one that is not sane, in fp32."""
    used = choose_precision(precision, device, checkpoint.config.text.d_model)
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
    return _load_converted(checkpoint, checkpoint.folder, converted, cache_bytes)


def _load_converted(
    checkpoint: Checkpoint, folder: Path, converted: Converted, cache_bytes: int
) -> Engine:
    notes = (*checkpoint.notes, *converted.notes, *notes_of(converted))
    checkpoint = replace(checkpoint, notes=notes)
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
        return conversions.faster_runtime(checkpoint, used, partial(_answer_s, checkpoint))
    except FlorenceError as error:
        logger.warning("%s The torch runtime is used.", error)
        return "torch"


def _answer_s(checkpoint: Checkpoint, used: str, folder: Path | None) -> float:
    """Seconds of one answer: a pass of the tower, and a short generation with beams.

    By the conversion in ``folder``, or without one by torch. The better of two: others may want
    the cores meanwhile.
    """
    if folder is None:
        engine = _load(checkpoint, torch.device("cpu"), used, 0, False, {})
    else:
        engine = _load_converted(checkpoint, folder, read_converted(folder), 0)
    try:
        return min(
            _seconds_of(engine, picture) for picture in (probe_picture(), 255 - probe_picture())
        )
    finally:
        engine.close()


def _seconds_of(engine: Engine, picture: np.ndarray[Any, np.dtype[np.uint8]]) -> float:
    began = time.perf_counter()
    ask = Ask(picture, "<OD>", num_beams=max(_BEAMS), max_new_tokens=_TOKENS)
    [outcome] = answer_all(engine, [ask])
    if isinstance(outcome, FlorenceError):
        raise outcome
    return time.perf_counter() - began


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
        has_own_tower = any(name.startswith(_TOWER) for name in changed)
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


def check_against_fp32(checkpoint: Checkpoint, runtime: TorchRuntime, is_error: bool) -> float:
    """The error of the visual features against float32, see ``error_against_fp32``.

    Beyond ``TOLERANCE`` a PrecisionError if ``is_error``, else a warning. A pass of the vision
    tower in float32: milliseconds on a GPU, many seconds on a CPU at full size.
    """
    picture = open_image(probe_picture()).image
    error = error_against_fp32(runtime, checkpoint.image_processor.pixels(picture)[None])
    limit = TOLERANCE[runtime.base_precision]
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
    # The products of quantised layers are checked as they are made, when there are exact ones.
    is_quantized = runtime.quantization is not None and runtime.quantization.has_vision
    if runtime.precision == "fp32" or is_quantized:
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
