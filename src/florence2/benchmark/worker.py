"""One side of the comparison in a process of its own, so that its peak memory is its own.

Reads a case a line from stdin, answers with a JSON line: the stages' seconds, the tokens, and the
process's peak memory so far.
"""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from florence2.benchmark.case import Case
from florence2.benchmark.sides import make_side


def peak_memory_mib(device: str) -> float:
    """On a GPU what torch held at most, on a CPU the process's largest resident size."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """``python -m florence2.benchmark.worker ours|reference FOLDER DEVICE PRECISION THREADS``."""
    kind, folder, device, precision, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    # Nothing but answers may reach stdout: libraries print warnings there.
    answers, sys.stdout = sys.stdout, sys.stderr
    side = make_side(kind, Path(folder), device, precision)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        timing = side.run(Case(**json.loads(line)))
        row = asdict(timing) | {"peak_memory_mib": peak_memory_mib(device)}
        print(json.dumps(row), file=answers, flush=True)


if __name__ == "__main__":
    main()
