"""The OpenVINO runtime: a converted network on a CPU, in the precision it was converted to.

Vision tower, encoder and decoder are models of ``florence2.conversion.graphs``; the caches, the
masks and the search are torch's, those of ``florence2.generation``. So whatever the torch runtime
does with sessions (batches, joining, reordering, beams over one copy of what they share) is the
same code here.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from florence2.errors import CheckpointError, DeviceError
from florence2.generation.beam_search import LocationProbability
from florence2.generation.decode import DecodeBatch
from florence2.generation.kv_cache import HIDDEN, DecoderSession, additive
from florence2.network.bart import POSITION_OFFSET, LayerCache, check_positions
from florence2.network.config import TextConfig
from florence2.network.florence import rescored
from florence2.pixels import look_up
from florence2.records import GenerationSettings
from florence2.runtimes.base import ImageBytes, Mark, Pixels
from florence2.runtimes.device import cpu_computes_bf16
from florence2.runtimes.torch import HostMark, SharedSetting, Undo, check_bytes
from florence2.tokens import PAD_ID

MODELS: Final = ("vision", "encoder", "decoder")
"""The models of a converted network, each an .xml file with its weights beside it in a .bin."""

TABLES: Final = "embeddings.safetensors"

LAYER_INPUTS: Final = ("cross_key", "cross_value", "own_key", "own_value")
"""What a layer of the decoder's model is given of its cache, as ``LayerCache`` names it."""

_OUT_OF_MEMORY: Final = ("DefaultCPUAllocator", "bad_alloc", "not enough memory", "Cannot allocate")

INSTALL: Final = "pip install openvino"

_INT8_FLAGS: Final = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "asimddp"})
_CPU_INFO: Final = Path("/proc/cpuinfo")


def openvino() -> Any:  # noqa: ANN401 - the library is optional
    """The library; DeviceError where it is not installed or cannot be loaded."""
    try:
        import openvino as library
    except ImportError as error:
        raise DeviceError(
            f"Runtime 'openvino' needs the openvino package, which cannot be imported ({error}); "
            f"install it with {INSTALL}, or use runtime 'torch'."
        ) from error
    return library


Made = TypeVar("Made")


def in_own_thread(work: Callable[[], Made]) -> Made:
    """What ``work`` gives, done in a thread that ends with it.

    OpenVINO's plugin for CPUs gives the thread that loads it another stack for signals. Where
    several are loaded in one thread and not freed in the reverse order, that thread is left with
    one that is gone, and the next signal, such as Ctrl-C, ends the process.
    """
    done: Future[Made] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 - it is raised where the work is waited for
            done.set_exception(error)

    threading.Thread(target=run, name="openvino", daemon=True).start()
    return done.result()


@functools.cache
def core() -> Any:  # noqa: ANN401 - the library is optional
    """The library with its plugin for CPUs, once for all models, see ``in_own_thread``."""

    def load() -> Any:  # noqa: ANN401
        made = openvino().Core()
        # The plugin is loaded when something is asked of it.
        made.get_property("CPU", "FULL_DEVICE_NAME")
        return made

    return in_own_thread(load)


def has_openvino() -> bool:
    """Whether the library can be imported."""
    try:
        openvino()
    except DeviceError:
        return False
    return True


def cpu_computes_int8(cpu_info: Path = _CPU_INFO) -> bool:
    """Whether this CPU has dot products of 8-bit integers; yes where it does not say."""
    try:
        text = cpu_info.read_text(encoding="utf-8")
    except OSError:
        return True
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
    return not lines or bool(_INT8_FLAGS & set(lines[0].split()))


def compute_precision(precision: str) -> str:
    """What OpenVINO computes in besides 8-bit products, in its words.

    fp16 is a way to store: few CPUs compute in it, and those that do overflow in the tower.
    """
    if precision in ("bf16", "int8") and cpu_computes_bf16():
        return "bf16"
    return "f32"


def cache_dtype(precision: str) -> torch.dtype:
    """Of keys and values: what is computed in, so that nothing is converted at each step."""
    return torch.bfloat16 if precision in ("bf16", "int8") else torch.float32


@dataclass(frozen=True, slots=True)
class ConvertedNetwork:
    """A converted network on disk, checked: where, of what shape, in which precision."""

    folder: Path
    text: TextConfig
    precision: str

    @property
    def weight_bytes(self) -> int:
        """What its weights take."""
        files = [self.folder / f"{name}.bin" for name in MODELS] + [self.folder / TABLES]
        return sum(file.stat().st_size for file in files)


class CompiledModel:
    """A model ready to run, one call at a time."""

    def __init__(self, path: Path, precision: str, threads: int) -> None:
        library = openvino()
        options = {
            "INFERENCE_PRECISION_HINT": compute_precision(precision),
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            # With 8-bit weights it multiplies in 8 bits, each row's values in groups with a scale
            # of their own: a step is a fifth faster, of 15 rows two fifths. Finer is more exact.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 32 if precision == "int8" else 0,
        }
        try:
            self._compiled: Any = core().compile_model(core().read_model(path), "CPU", options)
        except RuntimeError as error:
            raise CheckpointError(
                f"OpenVINO {library.__version__} cannot run {path}, which was converted by another "
                f"version or damaged; convert the checkpoint again. ({_first_line(error)})"
            ) from error
        self._bf16 = library.Type.bf16
        self._tensor = library.Tensor
        self.forget()

    def forget(self) -> None:
        """Lets go of all tensors, and of the memory that the last run worked in."""
        self._request: Any = self._compiled.create_infer_request()
        # By name what is set, kept alive: the request has its address only.
        self._set: dict[str, tuple[tuple[int, ...], Tensor, Any]] = {}

    def output_shape(self, name: str) -> list[int]:
        """Of an output whose shape does not depend on what is given."""
        return list(self._compiled.output(name).shape)

    def close(self) -> None:
        """Frees the weights for good."""
        self._request = self._compiled = None
        self._set = {}

    def run(self, given: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        """Runs once on tensors by name, contiguous ones, and writes the outputs ``into`` others.

        Outputs that are not named stay with the model.
        """
        for name, tensor in (*given.items(), *into.items()):
            key = (tensor.data_ptr(), *tensor.shape)
            if name not in self._set or self._set[name][0] != key:
                wrapped = self._wrapped(tensor)
                self._request.set_tensor(name, wrapped)
                self._set[name] = key, tensor, wrapped
        self._request.infer()

    def _wrapped(self, tensor: Tensor) -> Any:  # noqa: ANN401
        """The same memory as the library takes it."""
        if tensor.dtype == torch.bfloat16:
            bits = tensor.view(torch.int16).numpy().view(np.uint16)
            return self._tensor(bits, list(tensor.shape), self._bf16)
        return self._tensor(tensor.numpy(), shared_memory=True)


class Embeddings:
    """Tables that are looked up in and not multiplied by: from the file, as far as they are used.

    ``shared`` [V, d_model] of tokens, ``encoder_positions`` and ``decoder_positions``
    [limit + offset, d_model], and ``head`` [V, d_model] where the output projection has a weight
    of its own.
    """

    def __init__(self, path: Path, text: TextConfig) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                tables = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"The embeddings {path} cannot be read ({_first_line(error)}); convert the "
                "checkpoint again."
            ) from error
        self.shared = tables["shared"]
        self.head = tables.get("head", self.shared)
        self.encoder_positions = tables["encoder_positions"]
        self.decoder_positions = tables["decoder_positions"]
        self._scale = text.d_model**0.5 if text.scale_embedding else 1.0

    def tokens(self, ids: Tensor) -> Tensor:
        """Ids [...] -> vectors [..., d_model] in float32."""
        vectors = functional.embedding(ids, self.shared).float()
        return vectors if self._scale == 1.0 else vectors * self._scale


class ConvertedDecoder:
    """The decoder's model as a session runs it, see ``StepNetwork``."""

    def __init__(
        self, model: CompiledModel, embeddings: Embeddings, text: TextConfig, precision: str
    ) -> None:
        self._model = model
        self._embeddings = embeddings
        self._text = text
        self._dtype = cache_dtype(precision)
        # Products of 8-bit weights are not as exact as a search that tells near ties apart needs.
        self._is_rescored = precision == "int8"
        # What the last pass wrote; a session's caller is done with it when the next one begins.
        self._outputs: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def position_limit(self) -> int:
        """See ``StepNetwork``."""
        return self._text.max_position_embeddings

    def check_length(self, length: int) -> None:
        """See ``StepNetwork``."""
        check_positions(length, self.position_limit)

    def prefill_logits(
        self,
        token_ids: Tensor,
        caches: Sequence[LayerCache],
        cross_mask: Tensor | None,
        num_exact: int,
    ) -> Tensor:
        """See ``StepNetwork``."""
        items, length = len(caches[0].cross_key), len(token_ids)
        positions = self._embeddings.decoder_positions[POSITION_OFFSET : POSITION_OFFSET + length]
        vectors = (self._embeddings.tokens(token_ids) + positions).expand(items, -1, -1)
        # The cache is empty: one slot that nobody sees stands in for it.
        nothing = caches[0].own_key.new_zeros(*caches[0].own_key.shape[:2], 1, 1)
        nothing = nothing.expand(-1, -1, -1, caches[0].own_key.shape[-1]).contiguous()
        read = [cache._replace(own_key=nothing, own_value=nothing) for cache in caches]
        own_mask = torch.full((items, 1, length, 1), HIDDEN)
        causal = torch.full((length, length), HIDDEN).triu(1)
        logits, hidden, new = self._run(vectors, read, own_mask, causal, cross_mask)
        for cache, (key, value) in zip(caches, new, strict=True):
            cache.own_key[:, :, :length] = key
            cache.own_value[:, :, :length] = value
        return self._exact(logits[:, -1], hidden[:, -1], num_exact)

    def step_logits(
        self,
        token_ids: Tensor,
        position: int | Tensor,
        caches: Sequence[LayerCache],
        slots: slice | Tensor,
        mask: Tensor | None,
        cross_mask: Tensor | None,
        num_exact: int,
    ) -> Tensor:
        """See ``StepNetwork``; of a ``ConvertedSession``, whose places are tensors always."""
        if not isinstance(position, Tensor) or not isinstance(slots, Tensor) or mask is None:
            raise TypeError("A converted decoder takes positions, slots and a mask as tensors.")
        last = len(self._embeddings.decoder_positions) - 1
        places = (position + POSITION_OFFSET).clamp(max=last)
        offsets = functional.embedding(places, self._embeddings.decoder_positions).unsqueeze(1)
        vectors = self._embeddings.tokens(token_ids) + offsets
        # The new tokens have scores of their own; their slots hold what was there before.
        own_mask = mask.to(torch.float32, copy=True)
        chosen = slots[:, None, None, :].expand(-1, 1, own_mask.shape[2], -1)
        own_mask.scatter_(3, chosen, HIDDEN)
        own = torch.full((token_ids.shape[1], token_ids.shape[1]), HIDDEN).fill_diagonal_(0.0)
        logits, hidden, new = self._run(vectors, caches, own_mask, own, cross_mask)
        _put_beams(caches, new, slots)
        return self._exact(logits, hidden, num_exact)

    def _run(
        self,
        vectors: Tensor,
        caches: Sequence[LayerCache],
        own_mask: Tensor,
        new_mask: Tensor,
        cross_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits, states, and of each layer the new keys and values."""
        items, length = vectors.shape[:2]
        heads, head_dim = caches[0].own_key.shape[1], caches[0].own_key.shape[3]
        if cross_mask is None:
            cross_mask = vectors.new_zeros(items, 1, 1, caches[0].cross_key.shape[2])
        given = {
            "vectors": vectors.contiguous(),
            "own_mask": own_mask,
            "new_mask": new_mask[None, None],
            "cross_mask": cross_mask.float(),
        }
        for number, cache in enumerate(caches):
            given |= {f"{name}.{number}": getattr(cache, name) for name in LAYER_INPUTS}
        logits, hidden, made = self._written(len(caches), items, heads, length, head_dim)
        into = {"logits": logits, "hidden": hidden}
        for number, (key, value) in enumerate(made):
            into |= {f"new_key.{number}": key, f"new_value.{number}": value}
        self._model.run(given, into)
        return logits, hidden, [(key, value) for key, value in made]

    def _written(
        self, layers: int, items: int, heads: int, length: int, head_dim: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Where a pass of this shape writes; only the last shape's is kept."""
        shape = layers, 2, items, heads, length, head_dim
        if shape not in self._outputs:
            self._outputs = {
                shape: (
                    torch.empty(items, length, self._text.vocab_size),
                    torch.empty(items, length, heads * head_dim),
                    torch.empty(shape, dtype=self._dtype),
                )
            }
        return self._outputs[shape]

    def _exact(self, logits: Tensor, hidden: Tensor, num_exact: int) -> Tensor:
        if not self._is_rescored:
            return logits
        return rescored(logits, hidden, self._embeddings.head, num_exact)


def _put_beams(
    caches: Sequence[LayerCache], new: Sequence[tuple[Tensor, Tensor]], slots: Tensor
) -> None:
    """New keys and values [B, heads, beams, head_dim] of each layer into ``slots`` [B, beams].

    An item's slots are neighbours, and to copy them takes a tenth of what an index takes.
    """
    beams, capacity = slots.shape[1], caches[0].own_key.shape[2]
    # Those of items that nobody waits for may be beyond the end.
    starts = slots[:, 0].clamp(max=capacity - beams).tolist()
    for cache, (key, value) in zip(caches, new, strict=True):
        for item, start in enumerate(starts):
            cache.own_key[item, :, start : start + beams] = key[item]
            cache.own_value[item, :, start : start + beams] = value[item]


class ConvertedSession(DecoderSession):
    """A session whose caches are handed over whole: what is not filled yet is masked."""

    def _is_together(self) -> bool:
        return False

    def _has_past(self) -> bool:
        return True

    def _end(self) -> int:
        return self._rows["own_mask"].shape[2]


def _leave_cores_to_the_models() -> Undo:
    """torch's workers wait for work by spinning, on the cores that the models run on.

    With both, a step of base took several times its own time on two busy cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    return lambda: torch.set_num_threads(before)


_ONE_THREAD = SharedSetting(_leave_cores_to_the_models)


class OpenVinoRuntime:
    """Runs a converted network on this machine's CPU; see ``Runtime``.

    For one thread at a time, as an engine uses it: passes share what they read and write.
    """

    name = "openvino"
    device = "cpu"

    def __init__(self, network: ConvertedNetwork, threads: int | None = None) -> None:
        """CheckpointError where the library cannot run what is there."""
        self.precision = network.precision
        self._network = network
        threads = torch.get_num_threads() if threads is None else threads
        self._vision, self._encoder, self._decoder = (
            CompiledModel(network.folder / f"{name}.xml", network.precision, threads)
            for name in MODELS
        )
        self._embeddings = Embeddings(network.folder / TABLES, network.text)
        self._steps = ConvertedDecoder(
            self._decoder, self._embeddings, network.text, network.precision
        )
        self._weight_bytes = network.weight_bytes

    def computing(self) -> AbstractContextManager[None]:
        """See ``Runtime``: the models have the cores, and torch's small operations one thread."""
        return _ONE_THREAD.held()

    @torch.inference_mode()
    def encode_images(self, pixels: Pixels) -> Tensor:
        """Visual tokens [B, num_visual_tokens, d_model] of ``pixels`` [B, 3, H, W]."""
        return self._encode(np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)))

    @torch.inference_mode()
    def encode_bytes(self, images_bhwc: ImageBytes, lookup_table: Pixels) -> Tensor:
        """See ``Runtime``; one image after the other, as a CPU gains nothing from batches."""
        check_bytes(images_bhwc, lookup_table)
        values = np.empty(images_bhwc.shape, np.float32)
        for image, pixels in zip(images_bhwc, values, strict=True):
            look_up(image, lookup_table, pixels)
        return self._encode(values)

    def _encode(self, pixels_bhwc: Pixels) -> Tensor:
        return torch.cat([self._encode_one(pixels) for pixels in torch.from_numpy(pixels_bhwc)])

    def _encode_one(self, pixels_hwc: Tensor) -> Tensor:
        features = torch.empty(self._vision.output_shape("features"))
        self._vision.run({"pixels": pixels_hwc.unsqueeze(0)}, {"features": features})
        return features

    @torch.inference_mode()
    def start(
        self,
        features: Sequence[Tensor],
        prompt_ids: Sequence[Sequence[int]],
        num_beams: int,
        max_new_tokens: int,
    ) -> ConvertedSession:
        """A decoding session; prompts of different lengths are padded and masked."""
        visual, text = torch.stack(list(features)), self._network.text
        width = max(len(ids) for ids in prompt_ids)
        padded = torch.tensor([[*ids, *[PAD_ID] * (width - len(ids))] for ids in prompt_ids])
        length = visual.shape[1] + width
        self._steps.check_length(length)
        table = self._embeddings.encoder_positions[POSITION_OFFSET : POSITION_OFFSET + length]
        vectors = torch.cat([visual, self._embeddings.tokens(padded)], dim=1) + table
        ends = torch.tensor([visual.shape[1] + len(ids) for ids in prompt_ids])
        is_filled = torch.arange(length) < ends.unsqueeze(1)
        mask = additive(is_filled, torch.float32)
        shape = (len(prompt_ids), text.decoder_attention_heads, length, -1)
        keys_values = self._encoded(vectors, mask, shape)
        all_seen = all(len(ids) == width for ids in prompt_ids)
        cross_mask = None if all_seen else mask.to(cache_dtype(self.precision))
        return ConvertedSession.over(
            self._steps, keys_values, cross_mask, num_beams, max_new_tokens
        )

    def _encoded(
        self, vectors: Tensor, mask: Tensor, shape: Sequence[int]
    ) -> list[tuple[Tensor, Tensor]]:
        text = self._network.text
        head_dim = text.d_model // text.decoder_attention_heads
        made = torch.empty(
            text.decoder_layers, 2, *shape[:-1], head_dim, dtype=cache_dtype(self.precision)
        )
        into: dict[str, Tensor] = {}
        for number, (key, value) in enumerate(made):
            into |= {f"cross_key.{number}": key, f"cross_value.{number}": value}
        self._encoder.run({"vectors": vectors, "mask": mask}, into)
        return [(key, value) for key, value in made]

    def decode_batch(
        self, settings: GenerationSettings, location_probability: LocationProbability | None = None
    ) -> DecodeBatch:
        """See ``Runtime``."""
        return DecodeBatch(settings, location_probability)

    def mark(self) -> Mark:
        """See ``Runtime``."""
        return HostMark()

    def is_out_of_memory(self, error: BaseException) -> bool:
        """See ``Runtime``; torch and the library say so in words."""
        if isinstance(error, MemoryError):
            return True
        return isinstance(error, RuntimeError) and any(
            words in str(error) for words in _OUT_OF_MEMORY
        )

    def is_lost(self, error: BaseException) -> bool:
        """A CPU is never lost."""
        return False

    def free_memory(self) -> None:
        """Lets go of tensors that only the models still hold."""
        for model in self._models():
            model.forget()

    def _models(self) -> list[CompiledModel]:
        return [self._vision, self._encoder, self._decoder]

    @property
    def weight_bytes(self) -> int:
        """What the weights take as they are stored; 0 once closed."""
        return self._weight_bytes

    def park(self) -> None:
        """On a CPU the weights are in the computer's memory already."""
        self.free_memory()

    def resume(self) -> None:
        """They have not moved."""

    def close(self) -> None:
        """Frees the weights for good."""
        self._weight_bytes = 0
        for model in self._models():
            model.close()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
