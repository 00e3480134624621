"""What the product's own Python costs at each call: hundreds of tiny linears in one graph, and nothing behind the wrapper.

Inductor is replaced by a stub that returns at once, so the time of a call is what the backend's function does before and
after the compiled code: find the planes of every weight, check that none has changed, pass them on. Measured for one model
that alone is bound to a graph, for one of several bound to another, and for all of these taking turns.

    python benchmarks/wrapper_cost.py
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import RESULTS, machine, table, write_result

WEIGHTS, MODELS, CALLS = 300, (1, 10), 200
SIZE = 128


class Chain(torch.nn.Module):
    """Linears one after the other."""

    def __init__(self, count: int, device: torch.device) -> None:
        super().__init__()
        make = {"bias": False, "device": device, "dtype": torch.bfloat16}
        self.linears = torch.nn.ModuleList(torch.nn.Linear(SIZE, SIZE, **make) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[m, 128] -> [m, 128]."""
        for linear in self.linears:
            x = linear(x)
        return x


def measure(device: torch.device, weights: int = WEIGHTS, models: Sequence[int] = MODELS) -> dict[str, Any]:
    """Median microseconds of a call of the backend's function: of one model, by the number bound; ``turns_us``: of all in turn.

    Each number of models has a graph of its own, and their first models are called by turns: a host's speed changes within seconds.
    """
    from quant_compile.backend import sglquant
    from quant_compile.runtime import native

    native.is_there() or native.build()  # begun in the background otherwise, and first used by the graphs after it
    y = torch.zeros(1, SIZE, device=device, dtype=torch.bfloat16)
    spent: dict[int, list[float]] = {count: [] for count in models}
    graphs = 0

    def backend_of(count: int) -> Callable[..., Any]:
        def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            nonlocal graphs
            graphs += 1
            policy = "W8A16" if device.type == "cpu" else "FP8_DYNAMIC"
            function = sglquant(gm, inputs, options={"policy": policy, "tune": "off"})

            def timed(*args: Any) -> Any:
                started = time.perf_counter()
                out = function(*args)
                spent[count].append((time.perf_counter() - started) * 1e6)
                return out

            return timed

        return backend

    bound = {count: [Chain(weights, device).eval().requires_grad_(False) for _ in range(count)] for count in spent}
    out: dict[str, Any] = {"weights": weights, "calls": CALLS, "native": native.module() is not None}
    with torch.no_grad(), patch("torch._inductor.compile_fx.compile_fx", lambda *_, **__: lambda *args: (y,)):
        for count, group in bound.items():
            backend = backend_of(count)
            for model in group:
                model.compile(backend=backend, dynamic=False)
            for model in group * 3:
                model(y)
        order = random.Random(weights)
        for _ in range(CALLS):
            for count in order.sample(list(bound), len(bound)):
                bound[count][0](y)
        out |= {f"us_{count}": statistics.median(times[-CALLS:]) for count, times in spent.items()}
        most = max(models)
        for model in itertools.islice(itertools.cycle(bound[most]), CALLS):
            model(y)
        out["turns_us"] = statistics.median(spent[most][-CALLS:])
    return out | {"graphs": graphs}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "wrapper_cost.json")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = measure(device)
    print(table(list(found), [list(found.values())]))
    write_result(args.out, [found], {"benchmark": "wrapper_cost", "machine": machine(device)})


if __name__ == "__main__":
    main()
