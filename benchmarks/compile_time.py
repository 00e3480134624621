"""Compile time: Inductor bf16 against sglquant with cold caches, and the passes' own time over 5 to 80 layers.

Each compilation runs in a process of its own with empty caches. A trivial function is compiled first, so that imports
and the start of the worker pool count for nobody. What is compiled is one decode step (B=1, static cache) of a Llama.
Quantizing and packing weights, and choosing kernels (tuning and JIT), are shown apart and not in ``compile_s``.
The second table times the passes alone: Inductor is replaced by a stub, and the model is narrow but as deep as said.

    python benchmarks/compile_time.py --out benchmarks/results/compile_time.json                      # on a GPU
    python benchmarks/compile_time.py --device cpu --hidden 256 --out ...                             # on CPU
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import (
    LLAMA_3_8B,
    RESULTS,
    TINY,
    LlamaShape,
    build_llama,
    last_line,
    machine,
    set_position,
    static_cache,
    table,
    write_result,
)

STACKS = ("inductor", "FP8_DYNAMIC")
PASS_LAYERS = (5, 10, 20, 40, 80)
# Keys of ``report(model).timings`` that are not compilation: work on weights, and finding and building kernels.
APART = ("packing", "selection", "tuning", "jit")
CACHE_TOKENS = 128
# The passes run this often over one traced graph; other work on the machine can only add to a time.
PASS_RUNS = 3


# --- workers: one compilation, or the passes at one depth -----------------------------------------------------------


def compile_once(args: argparse.Namespace, stack: str) -> dict[str, Any]:
    """Seconds of the first decode step of a fresh model, less that of a later one, with the parts shown apart."""
    device = torch.device(args.device)
    _warm_up(device)
    model = build_llama(shape_of(args), args.layers, device)
    if stack == "inductor":
        model.compile(dynamic=False)
    else:
        model.compile(backend="sglquant", options={"policy": stack, "tune": args.tune}, dynamic=False)
    cache = static_cache(model.config, 1, CACHE_TOKENS, device, torch.bfloat16)
    ids = torch.ones(1, 1, dtype=torch.long, device=device)

    def step() -> float:
        set_position(cache, 16)
        _synchronize(device)
        started = time.perf_counter()
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        _synchronize(device)
        return time.perf_counter() - started

    first, later = step(), step()
    timings = {} if stack == "inductor" else _timings(model)
    apart = sum(seconds for key, seconds in timings.items() if key.startswith(APART))
    passes = sum(seconds for key, seconds in timings.items() if key.startswith("passes"))
    return {
        "stack": stack,
        "total_s": first - later,
        "apart_s": apart,
        "compile_s": first - later - apart,
        "passes_s": passes,
        "timings": timings,
    }


def time_passes(args: argparse.Namespace, layers: int) -> dict[str, Any]:
    """Seconds of each pass, and of the whole backend without Inductor, at one depth; the least of some runs.

    The model must be one graph without breaks, which a Llama is.
    """
    import torch._inductor.compile_fx as inductor

    from quant_compile.backend import sglquant

    device = torch.device(args.device)
    runs: list[dict[str, float]] = []
    nodes = 0

    def stub(graph: torch.fx.GraphModule, inputs: Sequence[Any], **ignored: Any) -> Any:
        return graph.forward

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        nonlocal nodes
        nodes += len(graph.graph.nodes)
        for _ in range(PASS_RUNS):
            before, started = _timings(model), time.perf_counter()
            runner = sglquant(graph, inputs, options={"policy": args.policy, "tune": "off"})
            elapsed = time.perf_counter() - started
            spent = {key: value - before.get(key, 0.0) for key, value in _timings(model).items()}
            runs.append({key: value for key, value in spent.items() if key.startswith("passes")} | {"backend": elapsed})
        return runner

    inductor.compile_fx = stub
    model = build_llama(TINY, layers, device)
    torch.compile(model, backend=backend, dynamic=False)(torch.ones(1, 8, dtype=torch.long, device=device))
    best = {key: min(run[key] for run in runs) for key in runs[0]}
    passes = {key: value for key, value in best.items() if key.startswith("passes")}
    own = sum(passes.values())
    return {
        "layers": layers,
        "nodes": nodes,
        "passes_s": own,
        "us_per_node": own * 1e6 / nodes,
        "backend_s": best["backend"],
        **passes,
    }


def _timings(model: torch.nn.Module) -> dict[str, float]:
    import quant_compile

    return dict(quant_compile.report(model).timings)


def _warm_up(device: torch.device) -> None:
    x = torch.ones(64, 64, device=device)
    torch.compile(lambda t: (t @ t).relu().sum())(x)
    _synchronize(device)
    torch._dynamo.reset()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def shape_of(args: argparse.Namespace) -> LlamaShape:
    """The Llama-3-8B shape, or a narrow one of ``--hidden``."""
    if args.hidden is None:
        return LLAMA_3_8B
    return replace(TINY, hidden=args.hidden, intermediate=2 * args.hidden, heads=args.hidden // 64)


# --- the parent ------------------------------------------------------------------------------------------------------


def run_worker(args: argparse.Namespace, what: str) -> dict[str, Any]:
    """One worker in a process with caches of its own; a row with ``error`` if it fails or takes too long."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", what, "--out", str(out)]
        command += ["--device", args.device, "--layers", str(args.layers), "--tune", args.tune, "--policy", args.policy]
        command += [] if args.hidden is None else ["--hidden", str(args.hidden)]
        caches = {
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "TRITON_CACHE_DIR": f"{folder}/triton",
            "XDG_CACHE_HOME": f"{folder}/cache",
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        }
        try:
            done = subprocess.run(
                command, env=os.environ | caches, capture_output=True, text=True, timeout=args.limit, check=False
            )
        except subprocess.TimeoutExpired:
            return {"error": f"over its limit of {args.limit:.0f} s"}
        if done.returncode or not out.exists():
            return {"error": last_line(done.stderr)}
        return json.loads(out.read_text())


def compile_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Median of each stack's runs; the stacks take turns. ``ratio`` is to Inductor's compile seconds."""
    runs: dict[str, list[dict[str, Any]]] = {stack: [] for stack in args.stacks}
    for turn in range(args.runs):
        for stack in args.stacks:
            result = run_worker(args, stack)
            runs[stack].append(result)
            print(f"run {turn + 1} {stack}: {result.get('error') or round(result['compile_s'], 2)}", flush=True)
    rows = [median_row(stack, results) for stack, results in runs.items()]
    base = next((row.get("compile_s") for row in rows if row["stack"] == "inductor"), None)
    for row in rows:
        row["ratio"] = row["compile_s"] / base if base and row.get("compile_s") else None
    return rows


def median_row(stack: str, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Median of each number over the runs that worked, and how they spread."""
    good = [result for result in results if "error" not in result]
    errors = [result["error"] for result in results if "error" in result]
    row: dict[str, Any] = {"stack": stack, "runs": len(good), "error": errors[0] if errors else None}
    if not good:
        return row
    for key in ("total_s", "compile_s", "apart_s", "passes_s"):
        row[key] = statistics.median(result[key] for result in good)
    row["all_compile_s"] = [result["compile_s"] for result in good]
    keys = dict.fromkeys(key for result in good for key in result["timings"])
    row["timings"] = {key: statistics.median(result["timings"].get(key, 0.0) for result in good) for key in keys}
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of parent and workers."""
    args = _arguments(argv)
    if args.worker:
        with torch.no_grad():
            depth = args.worker.removeprefix("passes-")
            result = time_passes(args, int(depth)) if depth != args.worker else compile_once(args, args.worker)
        args.out.write_text(json.dumps(result))
        return
    settings = {
        "shape": "Llama-3-8B" if args.hidden is None else f"hidden {args.hidden}",
        "layers": args.layers,
        "runs": args.runs,
        "tune": args.tune,
        "policy_of_passes": args.policy,
        "apart": "quantizing and packing weights, choosing kernels",
    }
    meta = {"benchmark": "compile_time", "machine": machine(args.device), "settings": settings}
    rows = compile_rows(args)
    write_result(args.out, rows, meta)  # kept if the second table is cut off
    passes = [{"layers": layers} | run_worker(args, f"passes-{layers}") for layers in args.pass_layers]
    show(rows, passes)
    write_result(args.out, rows, meta | {"passes": passes})


def show(rows: Sequence[Mapping[str, Any]], passes: Sequence[Mapping[str, Any]]) -> None:
    """Both tables, then every stage of the first."""
    for row in rows:
        for key, seconds in row.get("timings", {}).items():
            print(f"{row['stack']} {key}: {seconds:.3f} s")
    header = ("stack", "runs", "total_s", "apart_s", "compile_s", "passes_s", "ratio", "error")
    print(table(header, [[row.get(key) for key in header] for row in rows]))
    names = [key for key in dict.fromkeys(k for row in passes for k in row) if key.startswith("passes.")]
    header = ("layers", "nodes", "passes_s", "us_per_node", "backend_s", *names, "error")
    print(table(header, [[row.get(key) for key in header] for row in passes]))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stacks", default=",".join(STACKS), help="inductor and any policies")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument(
        "--hidden", type=int, default=None, help="a narrow model (multiple of 128) instead of Llama-3-8B"
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tune", default="quick", choices=["off", "quick", "full"])
    parser.add_argument("--policy", default="FP8_DYNAMIC", help="policy of the pass table")
    parser.add_argument("--pass-layers", default=",".join(map(str, PASS_LAYERS)), help="depths of the pass table")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds one compilation may take")
    parser.add_argument("--smoke", action="store_true", help="one layer on CPU: does it run?")
    parser.add_argument("--out", type=Path, default=RESULTS / "compile_time.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.smoke:
        args.device, args.layers, args.hidden, args.runs, args.pass_layers = "cpu", 1, 256, 1, "1,2"
    args.stacks = [stack for stack in args.stacks.split(",") if stack]
    args.pass_layers = [int(layers) for layers in args.pass_layers.split(",") if layers]
    return args


if __name__ == "__main__":
    main()
