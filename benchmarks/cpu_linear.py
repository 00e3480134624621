"""CPU kernels against bf16 ``F.linear`` on the linears of the Llama-3-8B shape.

    python benchmarks/cpu_linear.py [--m 1 16] [--schemes W8A16 W4A16] [--rounds 9] [--json FILE]

Contenders take turns, call by call, on weights that rotate through more memory than a last-level cache holds, so that a
busy machine disturbs all of them alike. Times are the minimum and the median of the rounds, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from quant_compile.ir.family import family_of
from quant_compile.ir.scheme import parse
from quant_compile.lowering import schemes as _schemes  # noqa: F401  (registers the families)
from quant_compile.lowering.registry import Kernel, Problem, Rank, kernels, layouts
from quant_compile.lowering.target import Target

# q, k and v merged; o; gate and up merged; down.
SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
CACHE_BYTES = 128 << 20


@dataclass(frozen=True)
class Row:
    """Milliseconds of one contender on one problem."""

    n: int
    k: int
    m: int
    scheme: str
    kernel: str
    best: float
    median: float
    speedup: float


def time_in_turns(calls: dict[str, Callable[[int], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Minimum and median milliseconds of each call, which gets the number of the round."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(0)
    for i in range(1, rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call(i)
            samples[name].append(1e3 * (time.perf_counter() - start))
    return {name: (min(times), statistics.median(times)) for name, times in samples.items()}


def contender(kernel: Kernel, problem: Problem, weights: list[Tensor], x: Tensor) -> Callable[[int], object]:
    """A call of ``kernel`` on its own packed copies of ``weights``; inputs are quantized beforehand."""
    family = family_of(problem.scheme)
    layout = layouts()[kernel.layout]
    packed = [layout.pack(family.quantize_weight(w, problem.scheme), problem) for w in weights]
    quantized = problem.scheme.input_activations is not None
    planes = family.quantize_input(x, problem.scheme, None) if quantized else (x,)
    return lambda i: kernel.run(planes, packed[i % len(packed)], None, problem)


def measure(n: int, k: int, m: int, names: list[str], rounds: int) -> list[Row]:
    """bf16 and every fitting kernel of every scheme on one shape."""
    copies = max(2, -(-CACHE_BYTES // (n * k // 2)))
    weights = [torch.randn(n, k, dtype=torch.bfloat16).mul_(k**-0.5) for _ in range(copies)]
    x = torch.randn(m, k, dtype=torch.bfloat16)
    rows: list[Row] = []
    for name in names:
        problem = Problem(parse(name), n, k, torch.bfloat16)
        calls: dict[str, Callable[[int], object]] = {
            "bf16": lambda i: torch.nn.functional.linear(x, weights[i % len(weights)])
        }
        for kernel in kernels().values():
            if not kernel.reference and isinstance(kernel.fit(problem, m, Target.of("cpu")), Rank):
                calls[kernel.name] = contender(kernel, problem, weights, x)
        times = time_in_turns(calls, rounds)
        rows += [Row(n, k, m, name, kernel, *pair, times["bf16"][0] / pair[0]) for kernel, pair in times.items()]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m", type=int, nargs="+", default=[1])
    parser.add_argument(
        "--schemes", nargs="+", default=["W8A16", "W4A16", "W8A8", "FP8_DYNAMIC", "GGUF_Q4_0", "GGUF_Q4_K", "GGUF_Q8_0"]
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[Row] = []
    with torch.inference_mode():
        for n, k in SHAPES:
            for m in args.m:
                part = measure(n, k, m, args.schemes, args.rounds)
                rows += part
                for r in part:
                    print(
                        f"{r.n:>6}x{r.k:<6} m={r.m:<4} {r.scheme:<12} {r.kernel:<20} "
                        f"{r.best:9.2f} {r.median:9.2f} ms  {r.speedup:5.2f}x",
                        flush=True,
                    )
    if args.json is not None:
        machine = {"torch": torch.__version__, "cpu": platform.processor(), "threads": args.threads}
        capability = torch.backends.cpu.get_cpu_capability()
        result = {"machine": {**machine, "capability": capability}, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
