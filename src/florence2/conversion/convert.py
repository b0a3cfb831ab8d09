"""A checkpoint to a folder that OpenVINO runs: in one precision, measured, and whole."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from florence2.checkpoint.checkpoint import Checkpoint, load_weights
from florence2.checkpoint.converted import (
    Converted,
    is_converted,
    record_of,
)
from florence2.checkpoint.files import small_files
from florence2.checkpoint.hub import megabytes
from florence2.conversion.eight_bits import (
    check_int8,
    compressed,
    encoder_inputs,
    nncf,
    quantized,
)
from florence2.errors import CheckpointError, DeviceError, unknown_name
from florence2.generation.kv_cache import DecoderSession
from florence2.images import open_image
from florence2.network.florence import Florence2Network
from florence2.pixels import ImageProcessor
from florence2.runtimes.openvino import (
    TABLES,
    ConvertedNetwork,
    OpenVinoRuntime,
    cache_dtype,
    openvino,
)
from florence2.tokens import BOS_ID, EOS_ID

logger = logging.getLogger(__name__)

CONVERTED_PRECISIONS: Final = ("fp32", "fp16", "bf16", "int8")
"""What weights are stored in; int8 also multiplies the vision tower's activations in 8 bits."""

Picture = npt.NDArray[np.uint8]
"""An image [H, W, 3] of 8-bit RGB."""

Progress = Callable[[str], None]
"""Told what is begun."""

CALIBRATION_IMAGES: Final = 24
"""More are not looked at: the ranges of activations hardly move after a dozen."""

_BYTES_PER_WEIGHT: Final = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.4}
_ROOM: Final = 1.15
# Weights below are positions and biases, which cost nothing to keep as they are.
_LEAST_STORED: Final = 4096
_PROBE_TOKENS: Final = (0, 250, 520, 790)


def convert(
    checkpoint: Checkpoint,
    precision: str,
    out: Path,
    *,
    calibration: Sequence[Picture] = (),
    calibration_source: str = "",
    progress: Progress = logger.info,
) -> Converted:
    """Writes the converted checkpoint to the folder ``out``, which appears once it is whole.

    ``calibration``: images like those that will be labelled, which int8 needs; the manifest says
    with ``calibration_source`` where they are from. A folder ``out`` that holds an earlier
    conversion is replaced; any other one that is not empty is a CheckpointError. Raises
    CheckpointError or DeviceError with one sentence, and then leaves nothing behind.
    """
    library = openvino()
    _check_request(checkpoint, precision, calibration)
    _check_target(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _check_room(checkpoint, precision, out.parent)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    except OSError as failed:
        raise _not_written(out, failed) from failed
    try:
        progress("Reading the weights")
        network = load_weights(checkpoint, torch.float32).eval().requires_grad_(False)
        calibrated = [_pixels(checkpoint.image_processor, image) for image in _chosen(calibration)]
        versions = {"openvino": str(library.__version__)}
        if precision == "int8":
            versions["nncf"] = str(nncf().__version__)
        _write_models(network, checkpoint, precision, part, calibrated, progress)
        _write_tables(network, precision, part)
        for name in small_files(checkpoint.folder):
            shutil.copyfile(checkpoint.folder / name, part / name)
        progress("Measuring the error against float32")
        error = _measured_error(network, checkpoint, precision, part, calibrated)
        converted = Converted(
            source=_source_name(checkpoint),
            revision=checkpoint.revision,
            source_sha256=checkpoint.source_hash(),
            precision=precision,
            size_wh=checkpoint.image_processor.size_wh,
            versions=versions,
            error=error,
            files=tuple(record_of(path) for path in sorted(part.iterdir())),
            calibration=_calibration_of(calibrated, calibration_source, precision),
            notes=network.notes,
        )
        converted.write(part)
        _put_in_place(part, out)
        return converted
    except (OSError, SafetensorError) as failed:
        raise _not_written(out, failed) from failed
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _source_name(checkpoint: Checkpoint) -> str:
    """Of a folder its last part: where it lay says nothing where the conversion goes."""
    folder = Path(checkpoint.name)
    return folder.name if folder.is_dir() else checkpoint.name


def _not_written(out: Path, failed: Exception) -> CheckpointError:
    why = getattr(failed, "strerror", None) or failed
    return CheckpointError(
        f"The converted checkpoint cannot be written to {out} ({why}); make room there or name "
        "another folder."
    )


def _check_request(checkpoint: Checkpoint, precision: str, calibration: Sequence[Picture]) -> None:
    if precision not in CONVERTED_PRECISIONS:
        raise DeviceError(unknown_name("precision", precision, CONVERTED_PRECISIONS))
    if checkpoint.converted is not None:
        raise CheckpointError(
            f"{checkpoint.folder} is converted already, to {checkpoint.converted.precision}; "
            "convert the checkpoint that it was made from."
        )
    if precision != "int8":
        return
    check_int8()
    nncf()
    if not calibration:
        raise CheckpointError(
            "Precision 'int8' is calibrated on images like those that will be labelled, and none "
            "were given; name a folder of them (florence2 convert --calibration DIR)."
        )


def _check_target(out: Path) -> None:
    if out.is_dir() and not is_converted(out) and any(out.iterdir()):
        raise CheckpointError(
            f"A conversion is written to a new or empty folder, and {out} holds other files; name "
            "another one."
        )
    if out.exists() and not out.is_dir():
        raise CheckpointError(
            f"A conversion is written to a folder, and {out} is a file; name another place."
        )


def _check_room(checkpoint: Checkpoint, precision: str, folder: Path) -> None:
    # A meta network has shapes and no memory.
    with torch.device("meta"):
        network = Florence2Network(checkpoint.config)
    weights = sum(weight.numel() for weight in network.parameters())
    needed = int(weights * _BYTES_PER_WEIGHT[precision] * _ROOM)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"Converting {checkpoint.name} to {precision} takes {megabytes(needed)} and "
            f"{megabytes(free)} are free in {folder}; make room, or name another folder."
        )


def _chosen(calibration: Sequence[Picture]) -> list[Picture]:
    """Up to ``CALIBRATION_IMAGES`` of them, evenly from all."""
    count = min(CALIBRATION_IMAGES, len(calibration))
    return [calibration[number * len(calibration) // count] for number in range(count)]


def _calibration_of(pixels: Sequence[Any], source: str, precision: str) -> str | None:
    return f"{len(pixels)} images ({source or 'given'})" if precision == "int8" else None


def _pixels(processor: ImageProcessor, picture: Picture) -> npt.NDArray[np.float32]:
    """[1, H, W, 3] as the tower's model takes them."""
    pixels = processor.pixels(open_image(picture).image)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0)[None])


def _write_models(
    network: Florence2Network,
    checkpoint: Checkpoint,
    precision: str,
    folder: Path,
    calibrated: Sequence[npt.NDArray[np.float32]],
    progress: Progress,
) -> None:
    """One after the other, so that only one is in memory beside the weights."""
    from florence2.conversion.graphs import FEED_FORWARD, decoder_model, encoder_model, vision_model

    width, height = checkpoint.image_processor.size_wh
    dtype = cache_dtype(precision)
    made: dict[str, Callable[[], Any]] = {
        "vision": lambda: vision_model(network, height, width),
        "encoder": lambda: encoder_model(network, dtype),
        "decoder": lambda: decoder_model(network, dtype),
    }
    in_8_bits: dict[str, Callable[[Any], Any]] = {
        "vision": lambda model: quantized(model, calibrated),
        # With the activations of its attention in 8 bits, more than a point of recall was lost.
        "encoder": lambda model: quantized(
            model,
            encoder_inputs(network, checkpoint, folder / "vision.xml", calibrated),
            only=FEED_FORWARD,
        ),
        # A step has few rows, and its time is that of reading its weights.
        "decoder": compressed,
    }
    for name, make in made.items():
        progress(f"Converting the {_PARTS[name]}")
        model = make()
        if precision == "int8":
            model = in_8_bits[name](model)
        is_bf16 = precision in ("bf16", "int8")
        if is_bf16:
            _store_in_bf16(model)
        path = folder / f"{name}.xml"
        try:
            openvino().save_model(model, path, compress_to_fp16=precision == "fp16")
        except RuntimeError as error:
            # A full disk, of which its stream says nothing else.
            raise OSError(f"{path.name}: {error}") from error
        if is_bf16:
            _keep_stored(path)
        del model


_PARTS: Final = {
    "vision": "vision tower",
    "encoder": "text encoder",
    "decoder": "decoder",
}


def _store_in_bf16(model: Any) -> None:  # noqa: ANN401
    """Weights in float32 become bf16, which is what they are computed with."""
    from openvino import opset15 as ops

    library = openvino()
    for node in model.get_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != library.Type.f32:
            continue
        values = np.array(node.data)
        if values.size < _LEAST_STORED:
            continue
        bits = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
        tensor = library.Tensor(bits.view(np.uint16), list(bits.shape), library.Type.bf16)
        stored = library.op.Constant(tensor, shared_memory=False)
        widened = ops.convert(stored, library.Type.f32)
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(widened.output(0))


def _keep_stored(path: Path) -> None:
    """Has OpenVINO keep weights in memory as they are stored, in the file of a saved model.

    Without this attribute of a conversion from bf16 it makes float32 of them when it compiles, and
    keeps both. Its library sets it for float16 only, and Python cannot set it on a node.
    """
    tree = ElementTree.parse(path)
    layers = {layer.get("id"): layer for layer in tree.iterfind("layers/layer")}
    for edge in tree.iterfind("edges/edge"):
        source, target = layers[edge.get("from-layer")], layers[edge.get("to-layer")]
        is_bf16 = source.find("output/port[@precision='BF16']") is not None
        if source.get("type") == "Const" and target.get("type") == "Convert" and is_bf16:
            info = ElementTree.Element("rt_info")
            ElementTree.SubElement(info, "attribute", name="decompression", version="0")
            target.insert(1, info)
    tree.write(path)


def _write_tables(network: Florence2Network, precision: str, folder: Path) -> None:
    language_model = network.model.language_model
    dtype = cache_dtype(precision)
    tables = {
        "shared": language_model.shared.weight.to(dtype),
        "encoder_positions": language_model.encoder.embed_positions.weight,
        "decoder_positions": language_model.decoder.embed_positions.weight,
    }
    if not network.is_tied:
        tables["head"] = network.lm_head.weight.to(dtype)
    save_file(
        {name: table.detach().contiguous() for name, table in tables.items()}, folder / TABLES
    )


@torch.inference_mode()
def _measured_error(
    network: Florence2Network,
    checkpoint: Checkpoint,
    precision: str,
    folder: Path,
    calibrated: Sequence[npt.NDArray[np.float32]],
) -> dict[str, float]:
    """||a - b|| / ||b|| of visual features, and of the logits after them, to float32's.

    Of one image: the first of the calibration, or a picture of gradients.
    """
    runtime = OpenVinoRuntime(ConvertedNetwork(folder, checkpoint.config.text, precision))
    image = calibrated[0] if calibrated else _pixels(checkpoint.image_processor, _gradients())
    pixels = np.ascontiguousarray(image.transpose(0, 3, 1, 2))
    exact = network.encode_images(torch.from_numpy(pixels))
    found = runtime.encode_images(pixels)
    prompt = [BOS_ID, *_PROBE_TOKENS[1:], EOS_ID]
    ids = torch.tensor([prompt])
    states, mask = network.encode_prompts(exact, ids, torch.ones_like(ids, dtype=torch.bool))
    sides = (
        DecoderSession(network, states, mask, 1, len(_PROBE_TOKENS) + 2),
        runtime.start([found[0]], [prompt], 1, len(_PROBE_TOKENS) + 2),
    )
    exact_logits, found_logits = (_forced_logits(session) for session in sides)
    runtime.close()
    return {
        "features": _relative(found, exact),
        "logits": _relative(found_logits, exact_logits),
    }


def _forced_logits(session: DecoderSession) -> Tensor:
    """After the prefix and after each of a few tokens."""
    logits = [session.prefill().clone()]
    for token in _PROBE_TOKENS:
        session.reorder(torch.zeros(1, 1, dtype=torch.long))
        logits.append(session.step(torch.tensor([[token]]))[:, 0].clone())
    return torch.stack(logits)


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


def _gradients() -> Picture:
    """[64, 64, 3]: no two parts of it are alike."""
    gradient = np.linspace(0, 255, 64, dtype=np.uint8)
    return np.stack(np.broadcast_arrays(gradient[:, None], gradient[None], np.uint8(96)), 2)


def _put_in_place(part: Path, out: Path) -> None:
    """The new folder under its name, an earlier one gone: a kill leaves one of them."""
    part.chmod(0o755)
    if not out.exists():
        part.rename(out)
        return
    if not any(out.iterdir()):
        out.rmdir()
        part.rename(out)
        return
    earlier = part.with_suffix(".earlier")
    out.rename(earlier)
    part.rename(out)
    shutil.rmtree(earlier, ignore_errors=True)
