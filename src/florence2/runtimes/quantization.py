"""Linear layers in 8 or 4 bits: less memory, at a loss of accuracy.

On a GPU by bitsandbytes. ``int8`` is LLM.int8 (arXiv 2208.07339): a scale for every output channel
of a weight and for every row that it is multiplied by, and products of integers. Its search for
outliers is left out: there the host waits for the GPU, which a CUDA graph cannot hold. ``nf4``
(arXiv 2305.14314) keeps of each weight one of 16 values, and a scale for every block of them; sums
are made in the precision of the rest. That rest is every norm, convolution and embedding, the
output projection, whose weight is the embedding with the location bins, and the projection between
tower and text.

On a CPU only the decoder's products gain, and only from int8, by torch itself: a step of few rows
waits for its weights to be read. Runtimes other than torch have ways of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from florence2.errors import DeviceError, PrecisionError
from florence2.network.bart import Attention, DecoderLayer
from florence2.network.florence import Florence2Network
from florence2.runtimes.device import Quantization, cpu_computes_bf16, parse_quantization

logger = logging.getLogger(__name__)

MOST_ERROR: Final = {"int8": 0.1, "nf4": 0.3}
"""The largest sane error of a layer's products: several times what rounding its weights makes."""

_INSTALL: Final = "install it with `pip install 'serve-florence-2[quantized]'`"
_OPERATIONS: Final = {
    "int8": ("int8_vectorwise_quant", "int8_scaled_mm"),
    "nf4": ("quantize_4bit", "gemm_4bit"),
}
# Of GPUs; products of integers begin with Turing.
_INT8_CAPABILITY: Final = (7, 5)
_INT8_MAX: Final = 127
_INT8_ALIGNMENT: Final = 4
_NF4_BLOCKS: Final = (64, 32)
_CHECKED_ROWS: Final = 24
FEW_ROWS: Final = 4
"""Up to so many rows torch's product with int8 weights is the fastest on a CPU."""


def check_quantization(precision: str, device: torch.device) -> None:
    """DeviceError where torch on this device, or what is installed, has no such 8 or 4 bits."""
    wanted = parse_quantization(precision, device)
    if wanted is None:
        return
    scheme = wanted.scheme
    if device.type == "cpu" and _is_of_cpu(wanted, device):
        if not cpu_computes_bf16():
            raise DeviceError(
                f"Precision {precision!r} of the torch runtime needs a CPU with AVX-512 BF16 or "
                "AMX, as all but the decoder's weights are in bf16, and this one has neither; use "
                "runtime 'openvino' or precision 'fp32'."
            )
        return
    if device.type == "cpu":
        raise DeviceError(
            f"Precision {precision!r} of the torch runtime is for GPUs, on a CPU it is slower than "
            "'bf16'; use runtime 'openvino' with 'int8', or precision 'int8' with torch, which is "
            "the decoder's weights."
        )
    if scheme == "int8" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < _INT8_CAPABILITY:
            raise DeviceError(
                "Precision 'int8' needs a GPU of compute capability 7.5 or newer, and this one has "
                f"{capability[0]}.{capability[1]}; use precision 'nf4' or 'fp16'."
            )
    operations(scheme)


def operations(scheme: str) -> Any:  # noqa: ANN401 - torch's namespace of operations
    """bitsandbytes' operations; DeviceError where it is missing or too old for this scheme."""
    # On some CPUs it warns of a library for them that it would download, and we do not compute
    # with it there.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError as error:
        raise DeviceError(
            f"Precision {scheme!r} needs bitsandbytes, which cannot be imported ({error}); "
            f"{_INSTALL}."
        ) from error
    known = torch.ops.bitsandbytes
    if missing := [name for name in _OPERATIONS[scheme] if not hasattr(known, name)]:
        raise DeviceError(
            f"Precision {scheme!r} needs a bitsandbytes with {missing[0]}, which "
            f"{bitsandbytes.__version__} does not have; {_INSTALL}."
        )
    return known


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [C_out, C_in] as integers up to 127 of either sign, and what 127 is in each row."""
    exact = weight.float()
    largest = exact.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
    return (exact * (_INT8_MAX / largest).unsqueeze(1)).round_().to(torch.int8), largest


class PackedInt8Linear(nn.Module):
    """A linear layer on a CPU whose weights are int8, and what it multiplies is not."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """``weight`` [C_out, C_in]."""
        super().__init__()
        packed, largest = _int8(weight)
        self.register_buffer("weight", packed)
        self.register_buffer("scale", (largest / _INT8_MAX).to(weight.dtype))
        self.register_buffer("bias", bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., C_in] -> [..., C_out]."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        if rows.shape[0] <= FEW_ROWS:
            product = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            product = functional.linear(rows, self.weight.to(rows.dtype)).mul_(self.scale)
        if self.bias is not None:
            product.add_(self.bias)
        return product.view(*hidden.shape[:-1], -1)


class Int8Linear(nn.Module):
    """A linear layer in int8. Its buffers may be moved, and must not be cast."""

    weight: Tensor
    weight_max: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """``weight`` [C_out, C_in]."""
        super().__init__()
        self._operations = operations("int8")
        packed, largest = _int8(weight)
        self.register_buffer("weight", packed)
        self.register_buffer("weight_max", largest)
        # The kernel that scales the sums back adds a bias of this precision by itself.
        self.register_buffer("bias", None if bias is None else bias.to(torch.float16))

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., C_in] -> [..., C_out]."""
        # The kernels read float16 only.
        rows = hidden.reshape(-1, hidden.shape[-1]).to(torch.float16).contiguous()
        quantized, row_max, _ = self._operations.int8_vectorwise_quant(rows)
        product: Tensor = self._operations.int8_scaled_mm(
            quantized, self.weight, row_max, self.weight_max, bias=self.bias, dtype=hidden.dtype
        )
        return product.view(*hidden.shape[:-1], -1)


class Nf4Linear(nn.Module):
    """A linear layer in nf4. Its buffers may be moved, and must not be cast."""

    weight: Tensor
    block_max: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """``weight`` [C_out, C_in]."""
        super().__init__()
        self._operations = operations("nf4")
        self._shape = tuple(weight.shape)
        self._block = next(size for size in _NF4_BLOCKS if weight.shape[1] % size == 0)
        packed, largest = self._operations.quantize_4bit(
            weight.contiguous(), self._block, "nf4", torch.uint8
        )
        self.register_buffer("weight", packed)
        self.register_buffer("block_max", largest)
        self.register_buffer("bias", bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., C_in] -> [..., C_out]."""
        product: Tensor = self._operations.gemm_4bit(
            hidden.contiguous(),
            self.weight,
            self._shape,
            self.block_max,
            self._block,
            "nf4",
            bias=self.bias,
        )
        return product


Make = Callable[[Sequence[nn.Linear]], nn.Module]
"""The quantised layer of some linear layers of one input, their outputs one after the other."""


class QuantizedAttention(Attention):
    """``Attention`` whose projections are quantised, those of one input as one layer."""

    def __init__(self, attention: Attention, make: Make, *, is_cross: bool) -> None:
        # The projections that the constructor makes are what is replaced here.
        nn.Module.__init__(self)
        self.heads = attention.heads
        self.fused, self._fused_transposed = None, ()
        query, key, value = attention.q_proj, attention.k_proj, attention.v_proj
        together = [[query], [key, value]] if is_cross else [[query, key, value]]
        self.in_proj = nn.ModuleList(make(layers) for layers in together)
        self.add_module("out_proj", make([attention.out_proj]))

    def fuse(self) -> None:
        """Nothing: they are."""

    def project_query(self, hidden: Tensor) -> Tensor:
        """Of cross-attention: [B, L, dim] -> queries [B, heads, L, head_dim]."""
        return self._heads(self.in_proj[0](hidden), 1)[0]

    def project_key_value(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Of cross-attention: [B, L, dim] -> keys and values, each [B, heads, L, head_dim]."""
        key, value = self._heads(self.in_proj[1](hidden), 2)
        return key, value

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of self-attention: queries, keys and values, each [B, heads, L, head_dim]."""
        query, key, value = self._heads(self.in_proj[0](hidden), 3)
        return query, key, value


@torch.no_grad()
def quantize(network: Florence2Network, wanted: Quantization, device: torch.device) -> None:
    """Replaces the layers that ``wanted`` names, one after the other, by ones on ``device``.

    So the device holds no more than one of them in full. Every layer multiplies once, which shows
    whether the library works there: PrecisionError for products that are far off, DeviceError where
    there are none. To be called once the network has its precision, before it is moved.
    """
    kind = PackedInt8Linear if _is_of_cpu(wanted, device) else _LAYERS[wanted.scheme]
    errors: list[float] = []

    def make(layers: Sequence[nn.Linear]) -> nn.Module:
        weight = torch.cat([layer.weight.detach() for layer in layers]).to(device)
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        bias = torch.cat(biases).to(device) if biases else None
        try:
            layer = kind(weight, bias)
            error = _product_error(layer, weight, bias)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AttributeError) as failure:
            raise DeviceError(
                f"{wanted.scheme} cannot be computed with what is installed on {device}: "
                f"{' '.join(str(failure).split())[:200]}; use another precision."
            ) from failure
        if not error <= MOST_ERROR[wanted.scheme]:
            raise PrecisionError(
                f"The products of a layer of {weight.shape[0]} x {weight.shape[1]} in "
                f"{wanted.scheme} may be at most {MOST_ERROR[wanted.scheme]:g} from the exact "
                f"ones, relative to their size, and are {error:.2g} from them; use precision bf16."
            )
        errors.append(error)
        return layer

    before = _num_bytes(network)
    for parent, name, module in list(_replaceable(network, wanted)):
        if isinstance(module, Attention):
            is_cross = isinstance(parent, DecoderLayer) and module is parent.encoder_attn
            parent.add_module(name, QuantizedAttention(module, make, is_cross=is_cross))
        else:
            parent.add_module(name, make([module]))
    logger.info(
        "%d products (%s) in %s, %.2g from the exact ones on average, %.2g at most; "
        "weights of %d MiB take %d MiB",
        len(errors),
        wanted.part,
        wanted.scheme,
        sum(errors) / max(len(errors), 1),
        max(errors, default=0.0),
        before >> 20,
        _num_bytes(network) >> 20,
    )


def _is_of_cpu(wanted: Quantization, device: torch.device) -> bool:
    return device.type == "cpu" and wanted == ("int8", "decoder")


_LAYERS: Final[dict[str, Callable[[Tensor, Tensor | None], nn.Module]]] = {
    "int8": Int8Linear,
    "nf4": Nf4Linear,
}


def _replaceable(
    network: Florence2Network, wanted: Quantization
) -> Iterator[tuple[nn.Module, str, Attention | nn.Linear]]:
    """The layers of the parts asked for: what holds each, under which name, and itself."""
    text, tower = network.model.language_model, network.model.vision_tower
    roots: list[nn.Module] = []
    if wanted.part == "decoder" or wanted.has_text:
        roots.append(text.decoder.layers)
    if wanted.has_text:
        roots.append(text.encoder.layers)
    if wanted.has_vision:
        roots.append(tower.blocks)
    alignment = _INT8_ALIGNMENT if wanted.scheme == "int8" else _NF4_BLOCKS[-1]
    for root in roots:
        for parent in root.modules():
            if isinstance(parent, Attention):
                continue
            for name, module in parent.named_children():
                inside = module.q_proj if isinstance(module, Attention) else module
                is_aligned = isinstance(inside, nn.Linear) and not inside.in_features % alignment
                if is_aligned and isinstance(module, Attention | nn.Linear):
                    yield parent, name, module


def _product_error(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> float:
    """||y - y32|| / ||y32|| of products with random rows, the larger of few and of more of them."""
    random = torch.Generator().manual_seed(weight.shape[1])
    rows = torch.randn(_CHECKED_ROWS, weight.shape[1], generator=random)
    rows = rows.to(weight.device, weight.dtype)
    exact = functional.linear(rows.float(), weight.float(), None if bias is None else bias.float())
    # Few rows are multiplied by kernels of their own.
    errors = [
        (layer(rows[:count]).float() - exact[:count]).norm() / exact[:count].norm()
        for count in (FEW_ROWS, _CHECKED_ROWS)
    ]
    # Unlike Python's, this maximum is NaN where one of them is.
    return float(torch.stack(errors).amax())


def _num_bytes(network: Florence2Network) -> int:
    return sum(
        weight.numel() * weight.element_size()
        for weight in (*network.parameters(), *network.buffers())
    )
