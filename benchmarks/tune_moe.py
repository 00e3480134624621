"""Sweep of the fused MoE kernels on the GPU: tiles of both products in both forms, step by step.

    python benchmarks/tune_moe.py --seconds 150 --out benchmarks/results/tune_moe.json

Candidates are compiled ahead in parallel processes into Triton's cache. Each is checked against the first one's result and
timed in CUDA graphs, with router choices drawn anew for every call, so that experts come from memory as they do in a model.
The default plan is also checked against the torch truth and timed as a whole, beside bf16 grouped products of torch.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from common import Deadline, Timing, collect, last_line, machine, table, time_calls, write_result
from torch import Tensor

import quant_compile.lowering.schemes  # noqa: F401  registers the presets
from quant_compile.ir.family import Planes, family_of
from quant_compile.ir.moe import Activation, MoeProblem, moe_reference
from quant_compile.ir.scheme import Scheme, parse
from quant_compile.lowering.kernels.experts import _frame
from quant_compile.lowering.kernels.experts import triton_moe as moe
from quant_compile.lowering.kernels.experts import triton_moe4 as moe4
from quant_compile.lowering.moe import STACKED
from quant_compile.lowering.target import Target

# scheme, experts, top k, hidden, intermediate
SHAPES = (
    ("FP8_DYNAMIC", 128, 8, 2048, 768),
    ("FP8_DYNAMIC", 8, 2, 4096, 14336),
    ("FP8_BLOCK", 256, 8, 7168, 2048),
    ("W4A16", 128, 8, 2048, 768),
    ("W8A8", 128, 8, 2048, 768),
    ("NVFP4A16", 128, 8, 2048, 768),
    ("NVFP4A16", 8, 2, 4096, 14336),
    ("W4A8", 128, 8, 2048, 768),
    ("W4A8", 8, 2, 4096, 14336),
    ("W4AFP8", 128, 8, 2048, 768),
    ("MXFP4A16", 128, 8, 2048, 768),
)
TOKENS = (1, 16, 64, 512, 2048, 4096)
TOLERANCE = 5e-3
CHOICES = 8  # draws of the router that take turns
KERNELS = {
    "_triton_frame": ("count_kernel", "align_kernel", "sum_kernel"),
    "_triton_moe": ("grouped_kernel", "quantize_kernel", "gated_rows_kernel", "down_rows_kernel"),
    "_triton_moe4": (
        "split_kernel", "quantize_split_kernel", "grouped4_kernel", "gated_rows4_kernel", "down_rows4_kernel",
    ),
}  # fmt: skip
Plan = _frame.Plan | _frame.DecodePlan


def problem_of(spec: str, experts: int, top_k: int, hidden: int, inner: int) -> MoeProblem:
    """A block of plain silu without biases."""
    return MoeProblem(parse(spec), experts, hidden, inner, top_k, Activation("silu"), torch.bfloat16)


def kernels_of(problem: MoeProblem) -> Any:
    """The module that serves a block: steps have one signature in both."""
    return moe if moe.serves(problem.scheme) else moe4


# --- candidates ---


def tiles_of(problem: MoeProblem, tokens: int, target: Target) -> Iterator[_frame.Plan]:
    """The default plan, then others, with block_m around the default's."""
    default = kernels_of(problem).plan(problem, tokens, target)
    yield default
    block_m = default.first.block_m
    grouped = problem.scheme.input_activations is not None and problem.scheme.input_activations.group_size
    shapes = ((64, 4, 4), (64, 4, 3), (128, 8, 3), (128, 4, 3), (128, 8, 4), (32, 4, 5))
    for rows, tma in itertools.product((block_m, block_m * 2, block_m // 2), (False, True)):
        if not 16 <= rows <= 128:
            continue
        for block_n, warps, stages in shapes:
            one = replace(default.second, block_m=rows, block_n=block_n, warps=warps, stages=stages, tma=tma)
            yield _frame.Plan(replace(one, block_n=int(grouped)) if grouped else one, one)


def rows_of(problem: MoeProblem, target: Target) -> Iterator[_frame.DecodePlan]:
    """The default plan of the decode form, then others."""
    default = kernels_of(problem).decode_plan(problem, target)
    yield default
    for block_n, (grow, warps) in itertools.product((2, 4, 8), ((1, 1), (1, 2), (2, 2), (1, 0.5), (0.5, 0.5))):
        first, second = (
            _frame.Rows(block_n, max(128, int(rows.block_k * grow)), max(1, min(8, int(rows.warps * warps))))
            for rows in (default.first, default.second)
        )
        yield _frame.DecodePlan(first, second, default.early)


def plans_of(problem: MoeProblem, tokens: int, target: Target) -> list[Plan]:
    """All distinct candidates for this many tokens, defaults first."""
    plans: list[Plan] = list(tiles_of(problem, tokens, target))
    if tokens * problem.top_k <= 2 * _frame.DECODE_PAIRS:
        plans += rows_of(problem, target)
    return list(dict.fromkeys(plans))


# --- compiling ahead ---


class _Warm:
    """Stands in for a Triton kernel: compiles a launch instead of running it."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        return lambda *arguments, **options: self.function.warmup(*arguments, grid=grid, **options)


def compile_ahead(jobs: Sequence[tuple[MoeProblem, int, Plan]]) -> int:
    """Compile every kernel of some plans, from tensors without data; the number that failed."""
    for module, names in KERNELS.items():
        source = import_module(f"quant_compile.lowering.kernels.experts.{module}")
        for name in names:
            function = getattr(source, name)
            if not isinstance(function, _Warm):
                setattr(source, name, _Warm(function))
    failed = 0
    for problem, tokens, plan in jobs:
        try:
            launch(make_block(problem, "meta"), make_tokens(problem, tokens, "meta"), plan)
        except Exception:  # a candidate that cannot be built is named when its turn to be measured comes
            failed += 1
    return failed


def compile_all(jobs: Sequence[tuple[MoeProblem, int, Plan]], seconds: float) -> None:
    """``compile_ahead`` in as many processes as there are cores."""
    workers = max(1, min(16, (os.cpu_count() or 2) - 1))
    shares = [list(jobs[i :: workers * 4]) for i in range(workers * 4)]
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    futures = [pool.submit(compile_ahead, share) for share in shares if share]
    deadline = Deadline(seconds)
    failed = 0
    for future in futures:
        try:
            failed += future.result(timeout=max(0.1, seconds - deadline.elapsed))
        except Exception as error:
            print(f"compiling ahead: {last_line(error)}", flush=True)
            break
    pool.shutdown(wait=False, cancel_futures=True)
    print(f"compiled {len(jobs)} plans ahead in {deadline.elapsed:.0f} s, {failed} failed", flush=True)


# --- data ---


class Block:
    """Weights of one block."""

    def __init__(self, problem: MoeProblem, w13: Planes, w2: Planes) -> None:
        self.problem, self.w13, self.w2 = problem, w13, w2


class Tokens:
    """Planes of some tokens, and several draws of the router."""

    def __init__(self, x: Planes, ids: list[Tensor], weights: Tensor) -> None:
        self.x, self.ids, self.weights = x, ids, weights


def make_block(problem: MoeProblem, device: str) -> Block:
    """Random codes under random scales that keep results near a model's."""
    p = problem
    planes: list[Planes] = []
    for n, k in ((2 * p.intermediate, p.hidden), (p.hidden, p.intermediate)):
        out: list[Tensor] = []
        for spec in STACKED.planes(p, n, k):
            plane = torch.empty(spec.shape, dtype=spec.dtype, device=device)
            if device != "meta":
                _fill(plane, spec.name, p.scheme, k)
            out.append(plane)
        planes.append(tuple(out))
    return Block(p, *planes)


# Standard deviation of random codes, so that weights come near k**-0.5.
SPREAD = {"float8": 1.0, "float4": 2.9, "int8": 73.0, "int4": 4.6}


def _fill(plane: Tensor, name: str, scheme: Scheme, k: int) -> None:
    size = k**-0.5 / SPREAD[f"{scheme.weights.type}{scheme.weights.num_bits}"]
    uneven = torch.rand(plane.shape, device=plane.device) + 0.5 if name in ("scale", "global") else None
    if uneven is not None and plane.dtype == torch.uint8:  # exponents of powers of two
        plane.copy_((uneven * size).log2().round() + 127)
    elif uneven is not None:  # an e4m3 scale is near 1, its global scale does the rest
        plane.copy_(uneven * (1.0 if plane.dtype == torch.float8_e4m3fn else size))
    else:
        _fill_codes(plane)


def _fill_codes(plane: Tensor) -> None:
    for expert in plane:
        if expert.dtype == torch.float8_e4m3fn:
            expert.copy_(torch.randn(expert.shape, device=plane.device, dtype=torch.float16))
        else:
            low, high = (0, 256) if expert.dtype == torch.uint8 else (-127, 128)
            expert.copy_(torch.randint(low, high, expert.shape, device=plane.device, dtype=torch.int16))


def make_tokens(problem: MoeProblem, tokens: int, device: str) -> Tokens:
    """Normal tokens, and CHOICES draws of top_k distinct experts, all alike likely."""
    p = problem
    x: Planes = (torch.randn(tokens, p.hidden, device=device, dtype=p.dtype),)
    if p.scheme.input_activations is not None:
        x = family_of(p.scheme).quantize_input(x[0], p.scheme, None)
    scores = torch.rand(CHOICES, tokens, p.experts, device=device)
    values, ids = scores.topk(p.top_k, -1)
    return Tokens(x, [i.contiguous() for i in ids], values[0].contiguous())


def launch(block: Block, tokens: Tokens, plan: Plan, choice: int = 0) -> Tensor:
    """A whole block."""
    module = kernels_of(block.problem)
    run: Any = module.launch_decode if isinstance(plan, _frame.DecodePlan) else module.launch
    ids = tokens.ids[choice % CHOICES]
    return run(tokens.x, ids, tokens.weights, block.w13, None, block.w2, None, None, block.problem, plan)


# --- measuring ---


def label_of(tiles: _frame.Tiles | _frame.Rows) -> str:
    """A configuration as one word."""
    if isinstance(tiles, _frame.Rows):
        return f"n{tiles.block_n}k{tiles.block_k}w{tiles.warps}"
    return f"m{tiles.block_m}n{tiles.block_n}k{tiles.block_k}w{tiles.warps}s{tiles.stages}{'t' if tiles.tma else ''}"


def steps(
    block: Block, tokens: Tokens, plans: Sequence[Plan]
) -> Iterator[tuple[str, _frame.Tiles | _frame.Rows, Callable[[int], Tensor]]]:
    """(step, configuration, call) of both products of every plan, each configuration once."""
    p, seen = block.problem, set[tuple[str, _frame.Tiles | _frame.Rows]]()
    hidden: dict[object, Any] = {}
    aligned: dict[int, list[_frame.Pairs]] = {}
    for plan in plans:
        if isinstance(plan, _frame.DecodePlan):
            form, first, second = "rows", decode_first(block, tokens, plan), decode_second(block, tokens, plan, hidden)
        else:
            m = plan.first.block_m
            if m not in aligned:
                aligned[m] = [_frame.align(ids, p.experts, m) for ids in tokens.ids]
            form, first = "tiles", grouped_first(block, tokens, plan, aligned[m])
            second = grouped_second(block, tokens, plan, aligned[m], hidden)
        for name, tiles, call in ((f"{form} 1", plan.first, first), (f"{form} 2", plan.second, second)):
            if (name, tiles) not in seen:
                seen.add((name, tiles))
                yield name, tiles, call


def decode_first(block: Block, tokens: Tokens, plan: _frame.DecodePlan) -> Callable[[int], Tensor]:
    """First product of the decode form."""
    return lambda i: kernels_of(block.problem).gated_rows(
        tokens.x, tokens.ids[i % CHOICES], block.w13, None, block.problem, plan.first
    )[0]


def decode_second(
    block: Block, tokens: Tokens, plan: _frame.DecodePlan, hidden: dict[object, Any]
) -> Callable[[int], Tensor]:
    """Second kernel of the decode form, on hidden rows of one draw."""
    key = ("rows", plan.first.block_n)
    if key not in hidden:
        hidden[key] = kernels_of(block.problem).gated_rows(
            tokens.x, tokens.ids[0], block.w13, None, block.problem, plan.first
        )
    rows = hidden[key]
    return lambda i: kernels_of(block.problem).down_rows(
        rows, tokens.ids[i % CHOICES], tokens.weights, block.w2, None, None, block.problem, plan.second
    )


def grouped_first(
    block: Block, tokens: Tokens, plan: _frame.Plan, pairs: list[_frame.Pairs]
) -> Callable[[int], Tensor]:
    """First product of the grouped form."""
    return lambda i: kernels_of(block.problem).first(
        tokens.x, pairs[i % CHOICES], block.w13, None, None, block.problem, plan.first
    )[0]


def grouped_second(
    block: Block, tokens: Tokens, plan: _frame.Plan, pairs: list[_frame.Pairs], hidden: dict[object, Any]
) -> Callable[[int], Tensor]:
    """Second product of the grouped form, on hidden rows of one draw (their order does not matter to time)."""
    if "tiles" not in hidden:
        rows = kernels_of(block.problem).first(tokens.x, pairs[0], block.w13, None, None, block.problem, plan.first)
        quantized = len(rows) > 1 or block.problem.scheme.input_activations is None
        hidden["tiles"] = rows if quantized else kernels_of(block.problem).quantize(rows[0], block.problem)
    return lambda i: kernels_of(block.problem).second(
        hidden["tiles"], pairs[i % CHOICES], block.w2, None, block.problem, plan.second
    )


def checked(
    block: Block, tokens: Tokens, plans: Sequence[Plan], deadline: Deadline
) -> tuple[dict[str, tuple[_frame.Tiles | _frame.Rows, Callable[[int], Tensor]]], dict[str, str]]:
    """Configurations that agree with the first of their step, and the errors of the others."""
    good: dict[str, tuple[_frame.Tiles | _frame.Rows, Callable[[int], Tensor]]] = {}
    bad: dict[str, str] = {}
    truth: dict[str, Tensor] = {}
    for step, tiles, call in steps(block, tokens, plans):
        label = f"{step}/{label_of(tiles)}"
        if deadline.passed:
            bad[label] = "out of time"
            continue
        try:
            y = call(0).float()
            error = float((y - truth.setdefault(step, y)).norm() / truth[step].norm())
            if error <= TOLERANCE:
                good[label] = (tiles, call)
            else:
                bad[label] = f"wrong: {error:.1e} from the default"
        except Exception as error:  # one broken candidate must not end the sweep
            bad[label] = last_line(error)
    return good, bad


def whole(block: Block, tokens: Tokens, count: int, plans: Sequence[Plan]) -> dict[str, Callable[[int], object]]:
    """Whole blocks: the default plan of each form, its small steps, and bf16 grouped products."""
    p = block.problem
    calls: dict[str, Callable[[int], object]] = {}
    grouped = next(plan for plan in plans if isinstance(plan, _frame.Plan))
    calls["block/tiles"] = lambda i: launch(block, tokens, grouped, i)
    rows = [plan for plan in plans if isinstance(plan, _frame.DecodePlan)]
    if rows:
        calls["block/rows"] = lambda i: launch(block, tokens, rows[0], i)
    if rows and count == 1:
        late = replace(rows[0], early=False)
        calls["block/rows late"] = lambda i: launch(block, tokens, late, i)
        for second in {plan.second for plan in rows}:  # what overlaps cannot be timed apart
            whole_plan = replace(rows[0], second=second)
            calls[f"both/{label_of(second)}"] = lambda i, plan=whole_plan: launch(block, tokens, plan, i)
    calls["step/align"] = lambda i: _frame.align(tokens.ids[i % CHOICES], p.experts, grouped.first.block_m)
    hidden = torch.randn(count * p.top_k, p.intermediate, device=tokens.ids[0].device, dtype=p.dtype)
    if p.scheme.input_activations is not None:
        calls["step/quantize"] = lambda i: kernels_of(p).quantize(hidden, p)
    parts = torch.randn(count * p.top_k, p.hidden, device=hidden.device, dtype=p.dtype)
    calls["step/add"] = lambda i: _frame.add(parts, tokens.ids[i % CHOICES], tokens.weights, p)
    return calls


def bf16_block(problem: MoeProblem, tokens: Tokens) -> Callable[[int], object]:
    """torch's grouped products in bf16 as transformers calls them: sort, gather, product, activation, product, sum."""
    p, device = problem, tokens.ids[0].device
    w13 = torch.randn(p.experts, 2 * p.intermediate, p.hidden, device=device, dtype=p.dtype) * 0.02
    w2 = torch.randn(p.experts, p.hidden, p.intermediate, device=device, dtype=p.dtype) * 0.02
    x = torch.randn(tokens.ids[0].shape[0], p.hidden, device=device, dtype=p.dtype)

    def call(i: int) -> Tensor:
        flat = tokens.ids[i % CHOICES].flatten()
        order = flat.argsort()
        ends = torch.histc(flat[order].float(), p.experts, 0, p.experts - 1).cumsum(0, dtype=torch.int32)
        rows = x[order // p.top_k]
        gate, up = torch._grouped_mm(rows, w13.transpose(1, 2), offs=ends).chunk(2, -1)
        out = torch._grouped_mm(torch.nn.functional.silu(gate) * up, w2.transpose(1, 2), offs=ends)
        out = out * tokens.weights.flatten()[order][:, None].to(p.dtype)
        return torch.zeros_like(out).index_copy_(0, order, out).unflatten(0, (-1, p.top_k)).sum(1)

    return call


def truth_error(block: Block, tokens: Tokens, plan: Plan) -> float:
    """Relative Frobenius error of a plan against the torch truth."""
    p = block.problem
    expected = moe_reference(
        tokens.x, tokens.ids[0], tokens.weights, block.w13, None, block.w2, None, p.scheme, p.activation, p.dtype
    ).float()
    return float((launch(block, tokens, plan).float() - expected).norm() / expected.norm())


def measure_cell(
    block: Block, count: int, plans: Sequence[Plan], device: torch.device, deadline: Deadline, bf16: bool
) -> dict[str, Any]:
    """One shape and number of tokens."""
    p = block.problem
    tokens = make_tokens(p, count, str(device))
    good, bad = checked(block, tokens, plans, deadline)
    errors: dict[str, float] = {}
    if count <= 64:
        for name, form in (("tiles", _frame.Plan), ("rows", _frame.DecodePlan)):
            plan = next((plan for plan in plans if isinstance(plan, form)), None)
            if plan is not None:
                errors[name] = truth_error(block, tokens, plan)
    calls: dict[str, Callable[[int], object]] = {label: call for label, (_, call) in good.items()}
    calls |= whole(block, tokens, count, plans)
    if bf16:
        try:
            calls["block/bf16"] = bf16_block(p, tokens)
        except Exception as error:
            bad["block/bf16"] = last_line(error)
    times = time_calls(calls, device, CHOICES, repeats=5, limit_us=50000.0)
    bad |= {label: t for label, t in times.items() if isinstance(t, str)}
    us = {label: round(t.us, 2) for label, t in times.items() if isinstance(t, Timing)}
    best = {step: min((us[x], x) for x in us if x.startswith(step))[1] for step in {x.split("/")[0] for x in us}}
    configs = {label: asdict(tiles) for label, (tiles, _) in good.items()}
    return {
        "scheme": p.scheme.spec, "experts": p.experts, "top_k": p.top_k, "hidden": p.hidden, "inner": p.intermediate,
        "tokens": count, "best": {step: label for step, label in best.items() if step not in ("block", "step", "both")},
        "us": us, "configs": configs, "error": errors, "failed": bad,
    }  # fmt: skip


def show(row: dict[str, Any]) -> None:
    """One cell in a few lines."""
    us = row["us"]
    name = f"{row['scheme']} E{row['experts']} k{row['top_k']} {row['hidden']}x{row['inner']} T={row['tokens']}"
    print(f"{name}: " + "  ".join(f"{x} {us[x]:.1f}" for x in us if x.startswith(("block", "step"))), flush=True)
    print("    error " + "  ".join(f"{k} {v:.1e}" for k, v in row["error"].items()), flush=True)
    for step in (*sorted(row["best"]), "both"):
        leaders = sorted((us[x], x) for x in us if x.startswith(step))[:4]
        print(f"    {step}: " + "  ".join(f"{x.split('/')[1]} {t:.1f}" for t, x in leaders), flush=True)
    for label, why in list(row["failed"].items())[:3]:
        print(f"    FAILED {label}: {why[:160]}", flush=True)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Whole blocks per cell, beside the sum of the best steps."""
    body = []
    for row in rows:
        us, best = row["us"], row["best"]
        sums = {}
        for form in ("tiles", "rows"):
            pair = [us.get(best.get(f"{form} {i}", "")) for i in (1, 2)]
            sums[form] = round(sum(pair), 1) if None not in pair else None
        blocks = [us.get(f"block/{name}") for name in ("tiles", "rows", "bf16")]
        shape = f"{row['scheme']} E{row['experts']} {row['hidden']}x{row['inner']}"
        body.append([shape, row["tokens"], *blocks, sums["tiles"], sums["rows"]])
    return table(["shape", "T", "tiles", "rows", "bf16", "best tiles 1+2", "best rows 1+2"], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=150.0, help="stop starting new cells after this long")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--tokens", type=int, nargs="*", default=list(TOKENS))
    parser.add_argument("--shapes", type=int, nargs="*", default=list(range(len(SHAPES))), help="numbers of SHAPES")
    parser.add_argument("--no-bf16", action="store_true", help="leave torch's grouped products out")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tune_moe needs a CUDA GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    target = Target.of(device)
    deadline = Deadline(arguments.seconds)
    problems = [problem_of(*SHAPES[i]) for i in arguments.shapes]
    plans = {(p, t): plans_of(p, t, target) for p in problems for t in arguments.tokens}
    jobs = list({(p, plan): (p, t, plan) for (p, t), some in plans.items() for plan in some}.values())
    compile_all(jobs, arguments.seconds * 0.5)
    rows: list[dict[str, Any]] = []
    for p in problems:
        try:
            block = make_block(p, str(device))
            for t in arguments.tokens:
                if not deadline.passed:
                    rows.append(measure_cell(block, t, plans[p, t], device, deadline, not arguments.no_bf16))
                    show(rows[-1])
                    collect(device)
        except Exception as error:
            print(f"{p.scheme.spec} E{p.experts}: FAILED {last_line(error)}", flush=True)
        block = None
        collect(device)
        if arguments.out:
            write_result(arguments.out, rows, {"benchmark": "tune_moe", **machine(device)})
    print(summary(rows), flush=True)


if __name__ == "__main__":
    main()
