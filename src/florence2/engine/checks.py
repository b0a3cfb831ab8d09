"""Whether a loaded network is sane, its precision and its recordings too, and how fast it is."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Any, Final, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from florence2.checkpoint.checkpoint import Checkpoint
from florence2.engine.answering import answer, answer_all
from florence2.engine.ask import Ask, Outcome
from florence2.engine.batch_sizes import MemoryMeter
from florence2.engine.encoding import EncodedImage
from florence2.engine.engine import Asker, Engine
from florence2.errors import CheckpointError, FlorenceError, NotFiniteError, PrecisionError
from florence2.images import open_image
from florence2.network.florence import Florence2Network
from florence2.runtimes.base import Pixels
from florence2.runtimes.cuda_graphs import GraphRunner
from florence2.runtimes.torch import TorchRuntime, computing, upload

logger = logging.getLogger(__name__)

TOLERANCE: Final = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.1}
"""The largest sane error of the visual tokens: several times what rounding alone makes."""

VISION_WEIGHTS: Final = ("model.vision_tower.", "model.multi_modal_projector.")
"""How the names of the weights begin that visual tokens are made with."""

_VISION: Final = tuple(f"network.{start}" for start in VISION_WEIGHTS)


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


_ROOM_FOR_CHECK: Final = 2
"""The float32 check runs where so many times its weights are free: activations need room too."""


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


def answer_s(engine: Engine) -> float:
    """Seconds of one answer: a pass of the tower, and a short generation with beams.

    The better of two: others may want the cores meanwhile.
    """
    return min(_seconds_of(engine, picture) for picture in (probe_picture(), 255 - probe_picture()))


def _seconds_of(engine: Engine, picture: np.ndarray[Any, np.dtype[np.uint8]]) -> float:
    began = time.perf_counter()
    ask = Ask(picture, "<OD>", num_beams=max(_BEAMS), max_new_tokens=_TOKENS)
    [outcome] = answer_all(engine, [ask])
    if isinstance(outcome, FlorenceError):
        raise outcome
    return time.perf_counter() - began


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
