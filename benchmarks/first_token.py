"""Time to the first token of ``generate``, all stacks in one process and taking turns sample by sample.

Hosts are shared, and their speed changes by a factor of two within seconds; a first token of a short prompt is host time. What
``generate.py`` measures one stack after the other can therefore differ by more than the stacks do. Here each turn runs every
stack once, in an order drawn anew, so that such changes hit all alike. Medians count; the least is recorded beside them.

A prompt of a length that has come before can be replayed from a CUDA graph, one of a new length cannot: both are measured.

    python benchmarks/first_token.py            # on a GPU: Llama-3-8B's shape, 16 layers
    python benchmarks/first_token.py --smoke    # tiny, on a CPU: does it run?
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine, table, write_result
from generate_worker import LLAMA, Setup, Worker

STACKS = ("hf-eager", "inductor", "FP8_DYNAMIC", "W4A16", "W4A8")
PROMPTS = (32, 128, 512, 2048)
TURNS = 40
BF16 = ("hf-eager", "inductor")


def worker(stack: str, folder: str, options: dict[str, Any], smoke: bool) -> Worker:
    """A stack of ``generate.py``, which nobody competes with for the device."""
    device = "cpu" if smoke else "cuda"
    lock = str(Path(folder) / "device.lock")
    setup = Setup(LLAMA, stack, "first", ((1, 8),), (), 4, device, smoke, options, time.time() + 3600, folder, lock)
    return Worker(setup)


def first(stack: Worker, inputs: dict[str, torch.Tensor]) -> float:
    """Milliseconds of one ``generate`` of one token."""
    return stack.generate(inputs, 1) * 1e3


def measure(workers: dict[str, Worker], prompt: int, turns: int, fresh: bool) -> dict[str, list[float]]:
    """Samples of every stack at one prompt length, or at lengths below it that never come twice; what compiles does so before."""
    for name, made in workers.items():
        inputs = made.inputs(1, prompt)
        made.fresh(1, prompt)
        for _ in range(3):
            first(workers[name], inputs)
    out: dict[str, list[float]] = {name: [] for name in workers}
    order = random.Random(prompt)
    for turn in range(turns):
        inputs = next(iter(workers.values())).inputs(1, prompt - 1 - turn if fresh else prompt)
        for name in order.sample(list(workers), len(workers)):
            out[name].append(first(workers[name], inputs))
    return out


def rows_of(samples: dict[str, list[float]], prompt: int, fresh: bool) -> list[dict[str, Any]]:
    """A row of each stack, with its ratio to the faster of bf16's two."""
    middle = {name: statistics.median(values) for name, values in samples.items()}
    best = min(middle[name] for name in BF16)
    return [
        {
            "prompt": prompt, "lengths": "new" if fresh else "same", "stack": name, "ms": middle[name],
            "least_ms": min(values), "samples": len(values),
            "speedup": best / middle[name],
        }
        for name, values in samples.items()
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU, two turns")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--stacks", default=",".join(STACKS))
    parser.add_argument("--prompts", default=",".join(map(str, PROMPTS)))
    parser.add_argument("--guard", default="never_slower", help="passed on to quant_compile.compile; empty: not")
    parser.add_argument("--out", type=Path, default=RESULTS / "first_token.json")
    args = parser.parse_args(argv)
    turns, prompts = (2, [8]) if args.smoke else (args.turns, [int(prompt) for prompt in args.prompts.split(",")])
    stacks = list(dict.fromkeys((*BF16, *args.stacks.split(","))))
    options = {"guard": args.guard} if args.guard else {}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        workers: dict[str, Worker] = {}
        for stack in stacks:
            started = time.perf_counter()
            made = worker(stack, folder, options, args.smoke)
            made.load()
            made.prepare()
            made.fresh(1, prompts[-1])
            first(made, made.inputs(1, prompts[-1]))
            workers[stack] = made
            print(f"{stack}: ready after {time.perf_counter() - started:.0f} s", flush=True)
        meta = {
            "benchmark": "first_token",
            "machine": machine("cpu" if args.smoke else "cuda"),
            "settings": {"turns": turns, **options},
        }
        for prompt in prompts:
            for fresh in (False, True):
                count = min(turns, prompt // 4) if fresh else turns
                rows += rows_of(measure(workers, prompt, count, fresh), prompt, fresh)
                write_result(args.out, rows, meta, quiet=True)
    keys = ("prompt", "lengths", "stack", "ms", "least_ms", "speedup")
    print(table(list(keys), [[row[key] for key in keys] for row in rows]))


if __name__ == "__main__":
    main()
