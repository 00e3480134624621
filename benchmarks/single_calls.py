"""Host and wall time of single calls of a model without CUDA graphs, all stacks in one process and taking turns call by call.

A call without graphs is mostly host time, and hosts are shared: what processes measure one after the other differs by more than the
stacks do. Here every turn calls each stack once, from an idle device, in an order drawn anew. Medians count. ``inductor`` gets its best
for each call: a graph of the call's own sizes. Stacks of sglquant are compiled once, with ``mode="default"``.

    python benchmarks/single_calls.py                    # on a GPU: Llama-3-8B's shape, 16 layers
    python benchmarks/single_calls.py --profile FOLDER   # and where the host is: a sample of stacks for each stack's decode
    python benchmarks/single_calls.py --smoke            # tiny, on a CPU: does it run?
"""

from __future__ import annotations

import argparse
import collections
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine, table, write_result
from first_token import worker
from generate_worker import DEFAULT, LLAMA, Worker

STACKS = ("inductor", "FP8_DYNAMIC", "W4A16")
TURNS, WARM = 40, 4
PROFILED = 300  # calls
ROOM = 64  # tokens of a cache behind the call's
Call = Callable[[], tuple[float, float]]


def measure(stacks: dict[str, Worker], tokens: int, filled: int, turns: int) -> tuple[dict[str, Call], dict[str, Any]]:
    """The calls, and the median of their host and wall times."""
    calls = {name: stack.call_of(tokens, filled, ROOM) for name, stack in stacks.items()}
    for name, call in calls.items():
        if name == "inductor":
            stacks[name].model.compile(dynamic=False)
        for _ in range(WARM):
            call()
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    order = random.Random(tokens)
    for _ in range(turns):
        for name in order.sample(list(calls), len(calls)):
            samples[name].append(calls[name]())
    middle = {
        name: [statistics.median(values) for values in zip(*found, strict=True)] for name, found in samples.items()
    }
    return calls, {name: {"host_ms": host, "wall_ms": wall} for name, (host, wall) in middle.items()}


def profile(call: Call, file: Path) -> None:
    """Write where the host is during many calls: the share of samples that have a line of code on their stack."""
    main, stop = threading.main_thread().ident, threading.Event()
    lines: collections.Counter[str] = collections.Counter()
    leaves: collections.Counter[str] = collections.Counter()

    def sample() -> None:
        while not stop.is_set():
            frame, stack = sys._current_frames().get(main or 0), list[str]()
            while frame is not None:
                stack.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}:{frame.f_lineno}")
                frame = frame.f_back
            lines.update(set(stack))
            leaves[" < ".join(stack[:3])] += 1
            time.sleep(0.0004)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    spent = sorted(call()[0] for _ in range(PROFILED))
    stop.set()
    thread.join()
    total = sum(leaves.values())
    text = [f"median {spent[len(spent) // 2]:.2f} ms while sampled, {total} samples"]
    for counter in (lines, leaves):
        text += ["", *(f"{count / total:.3f} {name}" for name, count in counter.most_common(120))]
    file.write_text("\n".join(text) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU, two turns")
    parser.add_argument("--stacks", default=",".join(STACKS))
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--profile", type=Path, help="write samples of the host's stacks to this folder")
    parser.add_argument("--out", type=Path, default=RESULTS / "single_calls.json")
    args = parser.parse_args(argv)
    first, *more = (8,) if args.smoke else (512, 2048)
    sizes = {"decode": (1, first), **{f"prefill {prompt}": (prompt, 0) for prompt in (first, *more)}}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        stacks = {}
        for name in args.stacks.split(","):
            stacks[name] = worker(name if name == "inductor" else name + DEFAULT, folder, {}, args.smoke)
            stacks[name].load()
            stacks[name].prepare()
        rows: dict[str, dict[str, Any]] = {
            name: {"model": LLAMA, "stack": stack.setup.stack, "cells": {}, "calls": {}}
            for name, stack in stacks.items()
        }
        meta = {
            "benchmark": "single_calls",
            "machine": machine("cpu" if args.smoke else "cuda"),
            "settings": {"turns": args.turns},
        }
        for call, (tokens, filled) in sizes.items():
            calls, found = measure(stacks, tokens, filled, 2 if args.smoke else args.turns)
            for name, times in found.items():
                rows[name]["calls"][call] = times
            print(
                table(["call", "stack", "host_ms", "wall_ms"], [[call, n, *t.values()] for n, t in found.items()]),
                flush=True,
            )
            write_result(args.out, list(rows.values()), meta, quiet=True)
            if args.profile and call == "decode":
                args.profile.mkdir(parents=True, exist_ok=True)
                for name in stacks:
                    profile(calls[name], args.profile / f"{name}.txt")


if __name__ == "__main__":
    main()
