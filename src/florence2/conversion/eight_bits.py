"""Models in 8 bits, by NNCF: weights alone, or products of weights and activations.

Activations need their ranges, which are taken from images. Embeddings, norms, softmax and the sums
between layers stay as they are, and so do the logits that a search compares (``rescored``).
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from florence2.checkpoint.checkpoint import Checkpoint
from florence2.errors import DeviceError
from florence2.network.florence import Florence2Network
from florence2.runtimes.openvino import CompiledModel, cpu_computes_int8, in_own_thread
from florence2.tasks import TASKS

INSTALL_NNCF: Final = 'pip install "serve-florence-2[int8]"'

_TEXT: Final = "a person. a red car. the sign on the left"
_ENCODED_IMAGES: Final = 8
"""Images that the encoder's ranges are taken from, each with a task's prompt."""

Pixels = npt.NDArray[np.float32]


def check_int8() -> None:
    """DeviceError where this CPU would be slower with 8-bit integers than without."""
    if not cpu_computes_int8():
        raise DeviceError(
            "Precision 'int8' needs a CPU with dot products of 8-bit integers (AVX-512 VNNI, "
            "AVX-VNNI, AMX or Arm's dotprod), which this one does not have; use 'fp32' or 'auto'."
        )


def nncf() -> Any:  # noqa: ANN401 - the library is optional
    """The library; DeviceError where it is not installed."""
    # It sends what it is used for to a server of its maker, unless it believes to be tested.
    os.environ.setdefault("NNCF_CI", "1")
    try:
        import nncf as library
    except ImportError as error:
        raise DeviceError(
            f"Converting to int8 needs the nncf package, which cannot be imported ({error}); "
            f"install it with {INSTALL_NNCF}."
        ) from error
    library.set_log_level(logging.ERROR)
    return library


def quantized(model: Any, inputs: Sequence[Any], only: str = "") -> Any:  # noqa: ANN401
    """Weights and activations in 8 bits, the ranges of the latter from ``inputs`` of the model.

    Of the products whose name begins with ``only``; of the others, the weights alone.
    """
    library = nncf()
    others = [
        node.get_friendly_name()
        for node in model.get_ops()
        if node.get_type_name() == "MatMul" and not node.get_friendly_name().startswith(only)
    ]

    def quantize() -> Any:  # noqa: ANN401
        return library.quantize(
            model,
            library.Dataset(list(inputs)),
            subset_size=len(inputs),
            model_type=library.ModelType.TRANSFORMER,
            preset=library.QuantizationPreset.MIXED,
            ignored_scope=library.IgnoredScope(names=others) if others else None,
        )

    # It runs the model in OpenVINOs of its own, several of them.
    with _quiet():
        made = in_own_thread(quantize)
    return compressed(made) if others else made


def compressed(model: Any) -> Any:  # noqa: ANN401
    """Weights in 8 bits, each row with a scale of its own."""
    library = nncf()
    with _quiet():
        return library.compress_weights(model, mode=library.CompressWeightsMode.INT8_SYM)


@torch.inference_mode()
def encoder_inputs(
    network: Florence2Network, checkpoint: Checkpoint, vision: Path, images: Sequence[Pixels]
) -> list[Mapping[str, Pixels]]:
    """What the encoder's model is given for some images [1, H, W, 3] with prompts of all tasks."""
    encoder = network.model.language_model.encoder
    tower = CompiledModel(vision, "int8", torch.get_num_threads())
    sentences = [task.sentence.replace("{input}", _TEXT) for task in TASKS]
    inputs: list[Mapping[str, Pixels]] = []
    for number, image in enumerate(images[:_ENCODED_IMAGES]):
        features = torch.empty(tower.output_shape("features"))
        tower.run({"pixels": torch.from_numpy(image)}, {"features": features})
        ids = checkpoint.vocabulary.encode_prompt(sentences[number % len(sentences)])
        vectors = torch.cat([features, encoder.embed(torch.tensor([ids]))], dim=1)
        vectors = vectors + encoder.positions(vectors.shape[1])
        mask = np.zeros((1, 1, 1, vectors.shape[1]), np.float32)
        inputs.append({"vectors": vectors.numpy(), "mask": mask})
    tower.close()
    return inputs


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within it, what the library draws on the terminal is dropped."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
