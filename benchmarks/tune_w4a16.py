"""Sweep of the 4-bit weight-only kernels on the GPU: configurations of ours against humming's and tinygemm's own.

    python benchmarks/tune_w4a16.py --seconds 200 --out benchmarks/results/tune_w4a16.json

For each shape and number of rows it checks every candidate against the reference first, then times the right ones in
CUDA graphs with weights rotated past the L2, and prints per cell the best of each family. One decode step of Llama-3-8B
is summed at the end. A candidate that fails is named with its error and left out.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Deadline, Timing, collect, copies_for, last_line, machine, table, time_calls, write_result

import quant_compile.lowering.schemes  # noqa: F401  registers the presets
from quant_compile.ir.family import Planes, Reject
from quant_compile.ir.scheme import parse
from quant_compile.lowering.kernels.weight_only import humming_w4a16, torch_int4
from quant_compile.lowering.kernels.weight_only import triton_w4a16 as w4
from quant_compile.lowering.registry import Problem
from quant_compile.lowering.schemes import weight_only
from quant_compile.lowering.target import Target

SHAPES = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (8192, 28672))
ROWS = (1, 4, 16, 64, 512, 4096)
LLAMA = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
TOLERANCE = 5e-3
FAMILIES = ("gemv", "matmul", "dequant", "humming", "hummer", "tinygemm", "bf16")
Run = Callable[[Planes, Planes], torch.Tensor]


def gemv_configs(deep: bool) -> Iterator[dict[str, int]]:
    """Rows per program, warps and stages of the one-row kernel."""
    grid = ((8, 4, 1), (8, 8, 1), (4, 4, 1), (4, 8, 1), (2, 4, 1), (2, 8, 1), (8, 16, 1), (4, 16, 1))
    piped = ((8, 4, 2), (4, 4, 2), (4, 8, 2), (8, 4, 3), (2, 4, 3), (8, 8, 2))
    more = ((4, 4, 3), (4, 8, 3), (2, 4, 2), (2, 8, 2), (4, 2, 1), (2, 2, 1), (4, 4, 4), (8, 2, 3))
    for quads, warps, stages in (*grid, *piped, *(more if deep else ())):
        yield {"Q": quads, "W": warps, "UNROLL": 1, "STAGES": stages}


def matmul_configs(m: int, deep: bool) -> Iterator[dict[str, int]]:
    """Tiles of the tensor-core kernel."""
    yield w4.matmul_config(m)
    rows = max(16, min(128, 1 << (m - 1).bit_length()))
    for tiles, blocks, warps, stages in ((1, 4, 4, 3), (1, 8, 4, 2), (2, 4, 4, 3), (2, 4, 8, 3), (1, 8, 2, 3)):
        yield {"BM": rows, "NB": tiles, "RB": blocks, "W": warps, "STAGES": stages}
        if not deep and m != 16:
            return


def humming_configs(m: int, deep: bool) -> Iterator[dict[str, Any]]:
    """Variations of humming's own schedule for few rows: tiles of a warp, stages, CTAs per SM."""
    if m > 64:
        return
    block_m = 8 if m <= 8 else math.ceil(m / 16) * 16
    options = [(128, 64, 32, s, c) for s in (3, 4, 6) for c in (1, 2)] + [(128, 32, 32, 4, 1), (64, 32, 32, 4, 2)]
    options += [(64, 32, 64, 4, 2), (64, 64, 32, 4, 2), (128, 32, 64, 4, 1), (128, 64, 64, 4, 1)] if deep else []
    for block_k, warp_n, warp_k, stages, ctas in options:
        yield {
            "mma_type": "mma",
            "block_shape": (block_m, 128, block_k),
            "warp_shape": (block_m, warp_n, warp_k),
            "num_stages": stages,
            "num_ctas_per_sm": ctas,
            "use_stream_k": True,
            "use_tma": False,
            "use_warp_spec": False,
        }


def candidates(
    problem: Problem, m: int, target: Target, device: torch.device, deep: bool
) -> Iterator[tuple[str, str, Callable[[], Run]]]:
    """(family/label, layout, maker of run) of everything to try; makers may raise."""

    def accepts(fit: Callable[..., object]) -> bool:
        return not isinstance(fit(problem, m, target), Reject)

    if accepts(w4.fit_gemv):
        yield "gemv/default", "w4_tiles", lambda: lambda x, w: w4.run_gemv(x, w, None, problem)
        for c in gemv_configs(deep):
            label = f"gemv/Q{c['Q']}W{c['W']}S{c['STAGES']}"
            yield label, "w4_tiles", lambda c=c: lambda x, w: w4.run_gemv(x, w, None, problem, c)
    if accepts(w4.fit_matmul):
        for c in matmul_configs(m, deep):
            label = f"matmul/BM{c['BM']}N{c['NB']}K{c['RB']}W{c['W']}S{c['STAGES']}"
            yield label, "w4_tiles", lambda c=c: lambda x, w: w4.run_matmul(x, w, None, problem, c)
    if m >= 64 and accepts(w4.fit_dequant):
        yield "dequant/", "w4_tiles", lambda: lambda x, w: w4.run_dequant(x, w, None, problem)
    if accepts(humming_w4a16.fit):
        yield "humming/", "w4_tiles", lambda: lambda x, w: humming_w4a16.run(x, w, None, problem)
        for c in humming_configs(m, deep):
            (_, _, bk), (_, wn, wk) = c["block_shape"], c["warp_shape"]
            label = f"hummer/k{bk}w{wn}x{wk}s{c['num_stages']}c{c['num_ctas_per_sm']}"
            yield label, "w4_tiles", partial(_hummer, problem, device, c)
    if m <= 64 and accepts(torch_int4.fit):
        yield "tinygemm/", "tinygemm", lambda: lambda x, w: torch_int4.run(x, w, None, problem)


def _hummer(problem: Problem, device: torch.device, config: dict[str, Any]) -> Run:
    gemm = humming_w4a16.compile_gemm(problem, device, config)
    return lambda x, w: humming_w4a16.launch(gemm, x[0], w)


def checked(
    problem: Problem, m: int, rows: Planes, packed: dict[str, Planes], target: Target, device: torch.device, deep: bool,
    deadline: Deadline,
) -> tuple[dict[str, tuple[str, Run]], dict[str, str]]:  # fmt: skip
    """Candidates that give the reference's result, and the errors of the others."""
    x = torch.randn(m, problem.k, device=device, dtype=problem.dtype)
    reference = weight_only.linear((x,), rows, None, problem.scheme, problem.dtype).float()
    good: dict[str, tuple[str, Run]] = {}
    bad: dict[str, str] = {}
    tries = list(candidates(problem, m, target, device, deep))
    # humming's compiler runs outside this process: start all of a cell's GEMMs at once. Errors come again below.
    with ThreadPoolExecutor(max_workers=max(2, min(12, os.cpu_count() or 2))) as pool:
        for label, _, make in tries:
            if label.startswith("hummer/"):
                pool.submit(make)
    for label, layout, make in tries:
        if deadline.passed:
            bad[label] = "out of time"
            continue
        try:
            run = make()
            difference = (run((x,), packed[layout]).float() - reference).norm() / reference.norm()
            if difference.item() > TOLERANCE or not math.isfinite(difference.item()):
                bad[label] = f"wrong: relative error {difference.item():.1e}"
            else:
                good[label] = (layout, run)
        except Exception as error:  # one broken candidate must not end the sweep
            bad[label] = last_line(error)
    return good, bad


def measure_cell(
    problem: Problem, m: int, copies: list[dict[str, Planes]], good: dict[str, tuple[str, Run]], device: torch.device
) -> dict[str, Timing | str]:
    """Times of the right candidates, and of bf16 cuBLAS over weights of the same shape."""
    x = torch.randn(m, problem.k, device=device, dtype=problem.dtype)
    calls: dict[str, Callable[[int], object]] = {}
    for label, (layout, run) in good.items():
        calls[label] = lambda i, run=run, layout=layout: run((x,), copies[i % len(copies)][layout])
    dense_bytes = problem.n * problem.k * 2
    dense = [torch.randn(problem.n, problem.k, device=device).to(problem.dtype) for _ in range(copies_for(dense_bytes))]
    calls["bf16/"] = lambda i: torch.mm(x, dense[i % len(dense)].t())
    return time_calls(calls, device, max(len(copies), len(dense)), repeats=7, limit_us=20000.0)


def best_of(times: dict[str, Timing | str]) -> dict[str, tuple[str, float]]:
    """Family -> (configuration, microseconds) of its fastest candidate."""
    best: dict[str, tuple[str, float]] = {}
    for label, timing in times.items():
        family, _, config = label.partition("/")
        if isinstance(timing, Timing) and (family not in best or timing.us < best[family][1]):
            best[family] = (config, timing.us)
    return best


def run_shape(
    spec: str, n: int, k: int, rows_of_x: tuple[int, ...], device: torch.device, deep: bool, deadline: Deadline
) -> list[dict[str, Any]]:
    """All cells of one shape."""
    problem = Problem(parse(spec), n, k, torch.bfloat16)
    target = Target.of(device)
    rows = weight_only.quantize_weight(torch.randn(n, k, device=device, dtype=torch.bfloat16) * 0.02, problem.scheme)
    packed = {"w4_tiles": w4.pack_tiles(rows, problem)}
    if not isinstance(torch_int4.fit(problem, 1, target), Reject):
        packed["tinygemm"] = torch_int4.pack(rows, problem)
    copies = [packed]
    for _ in range(copies_for(n * k // 2) - 1):
        copies.append({name: tuple(plane.clone() for plane in planes) for name, planes in packed.items()})
    out: list[dict[str, Any]] = []
    for m in rows_of_x:
        if deadline.passed:
            break
        good, bad = checked(problem, m, rows, packed, target, device, deep, deadline)
        times = measure_cell(problem, m, copies, good, device)
        bad |= {label: t for label, t in times.items() if isinstance(t, str)}
        us = {label: round(t.us, 2) for label, t in times.items() if isinstance(t, Timing)}
        out.append({"scheme": spec, "n": n, "k": k, "m": m, "best": best_of(times), "us": us, "failed": bad})
        show(out[-1])
        collect(device)
    return out


def show(row: dict[str, Any]) -> None:
    """One cell in a few lines: the best of each family, the leading candidates, failures."""
    best = {family: f"{us:.1f}" + (f" ({config})" if config else "") for family, (config, us) in row["best"].items()}
    cell = f"{row['scheme']} {row['n']}x{row['k']} m={row['m']}: "
    print(cell + "  ".join(f"{f} {t}" for f, t in best.items()), flush=True)
    leaders = sorted(row["us"].items(), key=lambda item: item[1])[:6]
    print("    " + "  ".join(f"{label} {us:.1f}" for label, us in leaders), flush=True)
    for label, why in list(row["failed"].items())[:3]:
        print(f"    FAILED {label}: {why[:160]}", flush=True)


def summary(rows: list[dict[str, Any]]) -> str:
    """Best of each family per cell, ours over the best peer, and one decode step of Llama-3-8B."""
    body = []
    for row in rows:
        us = {family: row["best"][family][1] if family in row["best"] else None for family in FAMILIES}
        ours = min((v for f, v in us.items() if v is not None and f != "bf16"), default=None)
        peers = [us[f] for f in ("humming", "tinygemm") if us[f] is not None]
        ratio = round(ours / min(peers), 3) if ours and peers else None
        body.append([f"{row['scheme']} {row['n']}x{row['k']}", row["m"], *us.values(), ratio])
    text = table(["shape", "m", *FAMILIES, "best/peer"], body)
    for m in (1, 4, 16):
        cells = [r for r in rows if r["m"] == m and (r["n"], r["k"]) in LLAMA and r["scheme"] == "W4A16"]
        if len(cells) == len(LLAMA):
            ours = sum(min(us for f, (_, us) in r["best"].items() if f != "bf16") for r in cells)
            text += f"\nLlama-3-8B linears of one layer, m={m}: {ours:.1f} us"
            if all("humming" in r["best"] for r in cells):
                text += f", humming {sum(r['best']['humming'][1] for r in cells):.1f} us"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=200.0, help="stop starting new cells after this long")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROWS), help="numbers of rows of x")
    parser.add_argument("--schemes", nargs="*", default=["W4A16"])
    parser.add_argument("--deep", action="store_true", help="more candidates")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tune_w4a16 needs a CUDA GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    deadline = Deadline(arguments.seconds)
    rows: list[dict[str, Any]] = []
    # Decode first over all shapes, so that a short budget still answers the question that matters most.
    few = tuple(m for m in arguments.rows if m <= 16)
    many = tuple(m for m in arguments.rows if m > 16)
    for part, spec, (n, k) in itertools.product((few, many), arguments.schemes, SHAPES):
        if part and not deadline.passed:
            try:
                rows += run_shape(spec, n, k, part, device, arguments.deep, deadline)
            except Exception as error:
                print(f"{spec} {n}x{k}: FAILED {last_line(error)}", flush=True)
            collect(device)
        if arguments.out:
            write_result(arguments.out, rows, {"benchmark": "tune_w4a16", **machine(device)})
    print(summary(rows), flush=True)


if __name__ == "__main__":
    main()
