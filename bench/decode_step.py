"""Where a decoder step's time goes on this CPU, against the time to read its weights once.

    python bench/decode_step.py --size base --precision bf16 --profile

Random weights, one item. A step must read the decoder's weights and the output projection's:
however fast the arithmetic, it cannot be faster than that. The floor is measured in the same run,
by a product of the same weights with one row each, the fastest way found to read them. Of int8 the
bytes are read as if they were bf16.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from florence2.benchmark.plan import SIZES, size_config
from florence2.generation.decode import DecodeBatch, generate
from florence2.generation.kv_cache import DecoderSession
from florence2.network.florence import Florence2Network
from florence2.records import GenerationSettings
from florence2.runtimes.quantization import QuantizedAttention
from florence2.runtimes.torch import TorchRuntime
from florence2.tokens import EOS_ID

SHORT, LONG = 20, 80
ENCODED = 590
OPERATIONS = 7


def main() -> None:
    """Prints a line per number of beams, and the floor."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--precision", choices=("fp32", "bf16", "int8"), default="fp32")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="time by operation, last --beams")
    given = parser.parse_args()
    with torch.inference_mode():
        network = _network(given.size, given.precision)
        read = _weights_of_step(network)
        size_mb = sum(weight.numel() * weight.element_size() for weight in read) / 1e6
        floor_ms = 1000 * _median(lambda: _read(read), given.repeats)
        print(f"{given.size} {given.precision}, {torch.get_num_threads()} threads")
        print(f"weights of a step: {size_mb:.0f} MB, read in {floor_ms:.1f} ms", end=" ")
        print(f"({size_mb / floor_ms:.0f} GB/s)")
        for beams in given.beams:
            step_ms = _step_ms(network, beams, given.repeats)
            print(f"{beams} beams: {step_ms:.1f} ms a step, {step_ms / floor_ms:.2f} x the floor")
        if given.profile:
            for name, spent_ms in _by_operation(network, given.beams[-1]).items():
                print(f"{name:40}{spent_ms:8.2f} ms a step")


def _network(size: str, precision: str) -> Florence2Network:
    torch.manual_seed(1)
    network = Florence2Network(size_config(size))
    # Never among the best, so that every answer is as long as it may be.
    network.model.language_model.shared.weight[EOS_ID] = 0.0
    return TorchRuntime(network, torch.device("cpu"), precision).network


def _weights_of_step(network: Florence2Network) -> list[Tensor]:
    """Without the projections of the encoded prompt, which are made once."""
    read = [network.lm_head.weight]
    for layer in network.model.language_model.decoder.layers:
        own, cross = layer.self_attn, layer.encoder_attn
        if isinstance(own, QuantizedAttention):
            linear = (own.in_proj[0], own.out_proj, cross.in_proj[0], cross.out_proj)
            read += [part.weight.view(torch.bfloat16) for part in (*linear, layer.fc1, layer.fc2)]
            continue
        read += [own.q_proj.weight, own.k_proj.weight, own.v_proj.weight, own.out_proj.weight]
        read += [cross.q_proj.weight, cross.out_proj.weight, layer.fc1.weight, layer.fc2.weight]
    return read


def _read(weights: list[Tensor]) -> None:
    for weight in weights:
        torch.mv(weight, weight[0])


def _step_ms(network: Florence2Network, beams: int, repeats: int) -> float:
    answer = _answerer(network, beams)
    spent_s = _median(lambda: answer(LONG), repeats) - _median(lambda: answer(SHORT), repeats)
    return 1000 * spent_s / (LONG - SHORT)


def _by_operation(network: Florence2Network, beams: int) -> dict[str, float]:
    """Milliseconds a step of the operations that take most, and of all others together."""
    answer = _answerer(network, beams)
    answer(LONG)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        answer(LONG)
    spent = {one.key: one.self_cpu_time_total / 1000 / LONG for one in profiled.key_averages()}
    largest = dict(sorted(spent.items(), key=lambda one: -one[1])[:OPERATIONS])
    return largest | {"all others": sum(spent.values()) - sum(largest.values())}


def _answerer(network: Florence2Network, beams: int) -> Callable[[int], None]:
    states = torch.randn(1, ENCODED, network.config.text.d_model).to(network.dtype)
    mask = torch.ones(1, ENCODED, dtype=torch.bool)

    def answer(tokens: int) -> None:
        session = DecoderSession(network, states, mask, beams, tokens)
        generate(session, DecodeBatch(GenerationSettings(num_beams=beams)), [tokens])

    return answer


def _median(work: Callable[[], None], repeats: int) -> float:
    work()
    spent = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent)


if __name__ == "__main__":
    main()
