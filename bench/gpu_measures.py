"""What ``bench/gpu.py`` measures, each as a row of figures."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from florence2.benchmark.plan import Case
from florence2.benchmark.sides import OurSide, ReferenceSide
from florence2.generation.decode import generate
from florence2.network.florence import Florence2Network
from florence2.pixels import ImageProcessor
from florence2.records import Answer, GenerationSettings
from florence2.runtimes.device import PRECISIONS
from florence2.runtimes.torch import TorchRuntime

BEAMS = 3
PROMPT_TOKENS = 13

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Axes:
    """Images or prompts of one batch, ascending; answers' lengths, short and long; prompts."""

    batches: Sequence[int]
    tokens: tuple[int, int]
    prompts: int
    repeats: int

    def ask_cases(self) -> list[Case]:
        """One prompt on one and on many images, and many prompts on one image."""
        ends = sorted({self.batches[0], self.batches[-1]})
        cases = [Case(batch, 1, BEAMS, tokens) for batch in ends for tokens in self.tokens]
        return [*cases, Case(1, self.prompts, BEAMS, self.tokens[0])]


@dataclass(frozen=True, slots=True)
class Floors:
    """What this device does at most: operations and bytes per second, measured in this run."""

    flops_per_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Work:
    """What the network needs: operations of an image and a prompt, bytes of a decoder step."""

    vision_flops: int
    prompt_flops: int
    vision_bytes: int
    step_bytes: int
    step_bytes_per_prompt: int


def seconds(device: torch.device, work: Callable[[], object], repeats: int) -> float:
    """The median time of ``work`` after two runs to warm up, until the device is done."""
    spent = []
    for _ in range(repeats + 2):
        _settle(device)
        began = time.perf_counter()
        work()
        _settle(device)
        spent.append(time.perf_counter() - began)
    return statistics.median(spent[2:])


def peak_mib(device: torch.device, work: Callable[[], object]) -> float | None:
    """The most memory that ``work`` took beyond what was there, None on a CPU."""
    if device.type != "cuda":
        work()
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    _settle(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def measure_floors(device: torch.device, precision: str, repeats: int) -> Floors:
    """A square product, and a copy that no cache holds."""
    side, count = (8192, 2**29) if device.type == "cuda" else (512, 2**24)
    left = torch.randn(side, side, device=device).to(PRECISIONS[precision])
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product_s = seconds(device, lambda: left @ left, repeats)
    copy_s = seconds(device, lambda: target.copy_(source), repeats)
    return Floors(2 * side**3 / product_s, 2 * count / copy_s)


def count_work(network: Florence2Network, side_px: int) -> Work:
    """Counted on a copy without numbers: nothing is computed."""
    empty = copy.deepcopy(network).to("meta")
    size = network.dtype.itemsize
    with torch.inference_mode(), FlopCounterMode(display=False) as vision:
        features = empty.encode_images(torch.empty(1, 3, side_px, side_px, device="meta"))
    ids = torch.empty(1, PROMPT_TOKENS, dtype=torch.long, device="meta")
    with torch.inference_mode(), FlopCounterMode(display=False) as prompt:
        states, _ = empty.encode_prompts(features, ids, torch.ones_like(ids, dtype=torch.bool))
    text = network.config.text
    decoder = empty.model.language_model.decoder
    read = sum(
        value.numel()
        for name, value in decoder.layers.named_parameters()
        # Keys and values of the image and the prompt are projected once, before the steps.
        if not name.split(".", 1)[1].startswith(("encoder_attn.k_proj", "encoder_attn.v_proj"))
    )
    return Work(
        vision_flops=vision.get_total_flops(),
        prompt_flops=prompt.get_total_flops(),
        vision_bytes=size * sum(one.numel() for one in empty.model.vision_tower.parameters()),
        step_bytes=size * (read + empty.lm_head.weight.numel()),
        step_bytes_per_prompt=size * 2 * text.decoder_layers * states.shape[1] * text.d_model,
    )


def vision_row(
    runtime: TorchRuntime, batch: int, side_px: int, work: Work, floors: Floors, repeats: int
) -> Row:
    """The tower from bytes to features: recorded, not recorded, and their largest difference."""
    device = torch.device(runtime.device)
    shape = (batch, side_px, side_px, 3)
    images = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    table = ImageProcessor().lookup_table
    recorded, eager = _both_ways(runtime, lambda: runtime.encode_bytes(images, table))
    recorded_s = seconds(device, recorded, repeats)
    eager_s = seconds(device, eager, repeats)
    first, second = recorded().float(), eager().float()
    floor_s = max(
        batch * work.vision_flops / floors.flops_per_s, work.vision_bytes / floors.bytes_per_s
    )
    return {
        "batch": batch,
        "graphs_ms": 1e3 * recorded_s,
        "no_graphs_ms": 1e3 * eager_s,
        "ratio": eager_s / recorded_s,
        "floor_ms": 1e3 * floor_s,
        "of_floor": recorded_s / floor_s,
        "difference": float((first - second).norm() / second.norm()),
        "peak_mib": peak_mib(device, eager),
    }


def step_row(
    runtime: TorchRuntime,
    features: torch.Tensor,
    prompts: int,
    work: Work,
    floors: Floors,
    axes: Axes,
) -> Row:
    """A decoder step with all that goes on between two steps, from answers of two lengths."""
    device = torch.device(runtime.device)
    ids = np.random.default_rng(2).integers(4, 400, PROMPT_TOKENS).tolist()

    def answers(tokens: int) -> list[tuple[int, ...]]:
        session = runtime.start([features] * prompts, [ids] * prompts, BEAMS, tokens)
        settings = GenerationSettings(num_beams=BEAMS)
        found = generate(session, runtime.decode_batch(settings), [tokens] * prompts)
        return [one.token_ids if isinstance(one, Answer) else () for one in found]

    short, short_eager = _both_ways(runtime, lambda: answers(axes.tokens[0]))
    long, long_eager = _both_ways(runtime, lambda: answers(axes.tokens[1]))

    def step_s(longer: Callable[[], object], shorter: Callable[[], object]) -> float:
        spent = [seconds(device, one, axes.repeats) for one in (longer, shorter)]
        return (spent[0] - spent[1]) / (axes.tokens[1] - axes.tokens[0])

    recorded_s, eager_s = step_s(long, short), step_s(long_eager, short_eager)
    floor_s = (work.step_bytes + prompts * work.step_bytes_per_prompt) / floors.bytes_per_s
    return {
        "prompts": prompts,
        "graphs_ms": 1e3 * recorded_s,
        "no_graphs_ms": 1e3 * eager_s,
        "ratio": eager_s / recorded_s,
        "floor_ms": 1e3 * floor_s,
        "of_floor": recorded_s / floor_s,
        "same_tokens": long() == long_eager(),
    }


class Asks:
    """Whole asks on both sides: from pictures in memory to answers."""

    def __init__(self, folder: Path, device: str, precision: str) -> None:
        self.ours = OurSide(folder, device, "torch", precision)
        self.reference = ReferenceSide(folder, device, precision)
        self.device = torch.device(device)

    def row(self, case: Case, work: Work, floors: Floors, repeats: int) -> Row:
        """Medians of both sides taking turns. The ratios leave out, and take in, preprocessing."""
        runs: dict[str, list[dict[str, float]]] = {"graphs": [], "no_graphs": [], "reference": []}
        graphs = self.ours.engine.runtime.graphs  # type: ignore[attr-defined]
        same = True
        for turn in range(repeats + 1):
            recorded = self.ours.run(case, turn, 600.0)
            with graphs.paused():
                eager = self.ours.run(case, turn, 600.0)
            reference = self.reference.run_reference(case, turn, 600.0)
            same &= recorded.token_ids == eager.token_ids
            if turn:
                for name, one in zip(runs, (recorded, eager, reference), strict=True):
                    runs[name].append(dict(one.stages_s))
        model = {name: _median(found, without="preprocess_s") for name, found in runs.items()}
        whole = {name: _median(found) for name, found in runs.items()}
        floor_s = _floor_s(case, work, floors)
        return {
            **{"batch": case.batch, "prompts": case.prompts, "tokens": case.tokens},
            "graphs_ms": 1e3 * model["graphs"],
            "no_graphs_ms": 1e3 * model["no_graphs"],
            "reference_ms": 1e3 * model["reference"],
            "ratio": model["reference"] / model["graphs"],
            "whole_ratio": whole["reference"] / whole["graphs"],
            "floor_ms": 1e3 * floor_s,
            "of_floor": model["graphs"] / floor_s,
            "same_tokens": same,
            "peak_mib": self._peak_mib(case),
            "reference_peak_mib": peak_mib(
                self.device, lambda: self.reference.run_reference(case, 0, 600.0)
            ),
        }

    def _peak_mib(self, case: Case) -> float | None:
        """With what the recordings keep, so they are made anew."""
        self.ours.engine.runtime.free_memory()
        return peak_mib(self.device, lambda: self.ours.run(case, 0, 600.0))


def _floor_s(case: Case, work: Work, floors: Floors) -> float:
    operations = case.batch * work.vision_flops + case.asks * work.prompt_flops
    step_bytes = work.step_bytes + case.asks * work.step_bytes_per_prompt
    return operations / floors.flops_per_s + case.tokens * step_bytes / floors.bytes_per_s


def _median(runs: Sequence[dict[str, float]], without: str = "") -> float:
    return statistics.median(
        sum(spent for stage, spent in run.items() if stage != without) for run in runs
    )


def _both_ways(
    runtime: TorchRuntime, work: Callable[[], Any]
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    def recorded() -> Any:  # noqa: ANN401
        with runtime.computing():
            return work()

    def eager() -> Any:  # noqa: ANN401
        with runtime.graphs.paused():
            return recorded()

    return recorded, eager


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def loaded(folder: Path, device: str, precision: str) -> Iterator[Asks]:
    """Both sides on one checkpoint, and their memory back afterwards."""
    asks = Asks(folder, device, precision)
    try:
        yield asks
    finally:
        asks.ours.engine.close()
        del asks.reference.model
        if asks.device.type == "cuda":
            torch.cuda.empty_cache()
