"""Which device and precision torch computes in, and why a GPU is missing."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import torch

from florence2.errors import DeviceError, unknown_name

NAMES_NO_DEVICE: Final = frozenset({"", "-1", "none", "void", "nodevfiles"})
"""Values of the variables that give a process, or a container, no GPU."""

_VARIABLES: Final = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")

_DRIVER: Final = Path("proc", "driver", "nvidia", "version")

_DRIVER_VERSION: Final = re.compile(r"\b(\d{3,4}(?:\.\d+)+)\b")

_TOO_OLD: Final = "driver on your system is too old"

_FOUND: Final = re.compile(r"found version (\d+)")


def missing_gpu(root: Path = Path("/")) -> str | None:
    """One sentence: what lets expect a GPU, why torch sees none, and what to do about it.

    None where torch sees one, and where nothing below ``root`` or in the environment tells of any.
    """
    if torch.cuda.is_available():
        return None
    error = _error_of_cuda()
    sign = _driver_sign(root) or _variable_sign()
    if sign is None and _TOO_OLD in error:
        sign = "an NVIDIA driver is installed"
    if sign is None:
        return None
    return f"A GPU can be expected here ({sign}), but torch sees none: {_reason(error)}."


def _driver_sign(root: Path) -> str | None:
    try:
        text = (root / _DRIVER).read_text(encoding="utf-8", errors="replace")
    except OSError:
        # A container may have the devices without the file, and Windows' Linux has neither.
        for pattern in ("dev/nvidia[0-9]*", "usr/lib/wsl/lib/libcuda.so*"):
            if found := sorted(root.glob(pattern)):
                return f"there is /{found[0].relative_to(root)}"
        return None
    version = _DRIVER_VERSION.search(text)
    return f"NVIDIA driver {version[1]} is loaded" if version else "an NVIDIA driver is loaded"


def _variable_sign() -> str | None:
    for name in _VARIABLES:
        if name in os.environ and not _names_no_device(name):
            return f"{name}={os.environ[name]}"
    return None


def _names_no_device(name: str) -> bool:
    # A list ends for CUDA where it names something that is no device.
    return os.environ[name].split(",")[0].strip().lower() in NAMES_NO_DEVICE


def _error_of_cuda() -> str:
    """What torch says when it is made to use CUDA, on one line; nothing if it does not mind."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError, OSError, torch.cuda.DeferredCudaCallError) as error:
        return " ".join(str(error).split())
    return ""


def _reason(error: str) -> str:
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA; install the build for CUDA "
            "(pip install torch from PyPI)"
        )
    for name in _VARIABLES:
        if name in os.environ and _names_no_device(name):
            return f"{name}={os.environ[name]!r} hides it; unset it or name a device"
    for text, reason in _REASONS.items():
        if text in error:
            return reason(error)
    first = error.partition(". ")[0].rstrip(".")
    return first or "it does not say why; nvidia-smi may"


def _too_old(error: str) -> str:
    found = _FOUND.search(error)
    # 12040 stands for 12.4, and torch's own message shows it as it is.
    knows = f" knows CUDA {int(found[1]) // 1000}.{int(found[1]) % 1000 // 10} and" if found else ""
    return (
        f"the driver is too old, it{knows} would have to know CUDA {torch.version.cuda}; update "
        "the driver"
    )


_REASONS: Final[dict[str, Callable[[str], str]]] = {
    _TOO_OLD: _too_old,
    "Found no NVIDIA driver": lambda _: (
        "CUDA's part of the driver (libcuda.so.1) cannot be opened; install the driver, and start "
        "a container with the NVIDIA runtime and NVIDIA_DRIVER_CAPABILITIES=compute,utility"
    ),
    "No CUDA GPUs are available": lambda _: (
        "the driver shows no device; name one that exists in CUDA_VISIBLE_DEVICES, or start the "
        "container with one"
    ),
}

PRECISIONS: Final = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

SCHEMES: Final = ("int8", "nf4")
"""Of 8 and 4 bits; ``int8`` alone is on a CPU the OpenVINO runtime's where there is one."""

PARTS: Final = ("decoder", "text", "vision", "all")

BF16_FROM_D_MODEL: Final = 512
"""Below, a step is many small operations, which reduced precision makes slower, not faster."""


class Quantization(NamedTuple):
    """Which layers are kept in how many bits: one of ``SCHEMES``, and one of ``PARTS``."""

    scheme: str
    part: str

    @property
    def has_vision(self) -> bool:
        """Whether the vision tower's layers are among them."""
        return self.part in ("vision", "all")

    @property
    def has_text(self) -> bool:
        """Whether the encoder's and the decoder's are."""
        return self.part in ("text", "all")


def parse_quantization(precision: str, device: torch.device) -> Quantization | None:
    """What one of ``SCHEMES`` asks for, alone or with one of ``PARTS`` as in ``int8:all``.

    Alone it is the text network, on a CPU its decoder. None for every other precision.
    """
    scheme, colon, part = precision.partition(":")
    if not colon:
        part = "decoder" if device.type == "cpu" else "text"
    return Quantization(scheme, part) if scheme in SCHEMES and part in PARTS else None


def choose_device(name: str) -> torch.device:
    """The torch device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; DeviceError otherwise."""
    name = str(name)  # None and numbers get the sentence below; a torch.device is as good
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise DeviceError(unknown_name("device", name, ["auto", "cpu", "cuda", "cuda:0"]))
    if kind == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"Device {name!r} needs a CUDA GPU and this machine's torch sees none; use 'cpu'."
        )
    if index and kind == "cuda" and int(index) >= torch.cuda.device_count():
        raise DeviceError(
            f"Device {name!r} does not exist: this machine has {torch.cuda.device_count()} CUDA "
            "device(s), counted from 0."
        )
    return torch.device(kind if kind == "cpu" or not index else name)


def choose_devices(names: str) -> tuple[str, ...]:
    """The devices that ``all``, or a list such as ``cuda:0,cuda:1``, stands for; DeviceError.

    ``all`` are the GPUs of this machine, or the CPU where there is none. One that is named twice
    runs two processes.
    """
    if names.strip().lower() == "all":
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return tuple(f"cuda:{number}" for number in range(num_gpus)) or ("cpu",)
    listed = tuple(str(choose_device(name.strip())) for name in names.split(","))
    return tuple("cuda:0" if name == "cuda" else name for name in listed)


def check_precision(name: str, device: torch.device) -> None:
    """DeviceError for a precision that does not exist, or not on this device."""
    is_known = name in ("auto", *PRECISIONS) or parse_quantization(str(name), device)
    if not is_known:
        raise DeviceError(unknown_name("precision", str(name), ["auto", *PRECISIONS, *SCHEMES]))
    if name == "fp16" and device.type == "cpu":
        raise DeviceError("Precision 'fp16' is for GPUs; on a CPU use 'fp32' or 'bf16'.")


def choose_precision(name: str, device: torch.device, d_model: int) -> str:
    """The precision to compute in; ``auto`` is the fastest that device and network are good at.

    On a GPU bf16 where it computes in it, else fp16. On a CPU bf16 where it has instructions for
    it and the network (``d_model``) is wide enough to wait for its weights; else fp32.
    """
    check_precision(name, device)
    if name != "auto":
        return name
    if device.type == "cpu":
        return "bf16" if d_model >= BF16_FROM_D_MODEL and cpu_computes_bf16() else "fp32"
    return "bf16" if gpu_computes_bf16(device) else "fp16"


def base_precision(name: str, device: torch.device) -> str:
    """The precision of all that is not quantised: the name itself where nothing is."""
    if name in PRECISIONS:
        return name
    return "bf16" if device.type == "cpu" or gpu_computes_bf16(device) else "fp16"


def gpu_computes_bf16(device: torch.device) -> bool:
    """Whether this GPU multiplies bf16 itself: NVIDIA's from compute capability 8.0 on.

    torch's own answer is about the current device, and counts emulation unless asked not to.
    """
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def cpu_computes_bf16() -> bool:
    """Whether this CPU multiplies bf16 itself (AMX, AVX-512 BF16) and does not emulate it."""
    tests = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in tests)
