"""8-bit scaled linears in Triton: FP8 per token and channel, FP8 in blocks, INT8; all m, all from row-form weights.

Two kernels of the registry: ``triton_gemv`` for up to four tokens, and ``triton_scaled_mm`` for any number. Reads the
planes of the families fp8, fp8_block and int8 as they are ("rows"). The Triton source, in ``_triton_scaled_mm``, is
imported at the first launch, so that this file can be read and asked on machines without triton.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from math import gcd
from typing import Any

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, Reject, bits_per_weight, family_of
from quant_compile.lowering.kernels._launch import ceil, descriptor, pow2, target_of
from quant_compile.lowering.kernels._roofline import estimate, shared_memory
from quant_compile.lowering.registry import Kernel, Problem, Rank
from quant_compile.lowering.target import Target
from quant_compile.lowering.trace import enqueue, rows_of

GEMV_ROWS = 4
SLICES_ROWS = 16
TALL_ROWS = 128
OLDEST = {"fp8": 89, "fp8_block": 89, "int8": 80}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# sm90's fp8 sum keeps about 14 bits; its error grows like sqrt(k) and passes bf16's own rounding near this k.
IMPRECISE_K = 8192


@dataclass(frozen=True)
class Config:
    """How one launch is cut up.

    Attributes:
        kind: ``gemv``, ``slices``, ``tall`` (tile_kernel with w as its first operand) or ``wide`` (with x first).
        block_m: tokens per program (gemv: 1, 2 or 4; slices and tall: at least m when it fits).
        block_n: rows of w per program.
        block_k: inputs per step (slices: per warp and step).
        warps: warps per program (slices: also the number of slices).
        stages: depth of the load pipeline; 1 for gemv means plain loads into registers.
        split: programs that share one tile's k; above 1 a second kernel adds their parts.
        band: tiles of a grouped program order.
        tma: load through tensor descriptors (sm90 and newer, k a multiple of 16).
        promote: add sm90's short fp8 sums to f32 registers at each step.
        pdl: programmatic dependent launch (sm90 and newer; ignored for wide and tma): start while the kernel before
            still runs, fetch weights into L2, then wait for it.
    """

    kind: str
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    split: int = 1
    band: int = 8
    tma: bool = False
    promote: bool = False
    pdl: bool = False


def groups(problem: Problem) -> tuple[int, int]:
    """(rows, columns) of a weight block that shares a scale; (0, 0) when scales are per row."""
    return problem.scheme.weights.block_structure or (0, 0)


def gemv_config(problem: Problem, m: int, target: Target) -> Config:
    """Programs of a few rows of w and 16 bytes of each row per thread and load."""
    block_k = min(2048, max(512, pow2(problem.k)))
    rows = gcd(4, groups(problem)[0] or 4)
    return Config("gemv", min(pow2(m), GEMV_ROWS), rows, block_k, warps=block_k // 512, stages=1)


def config(problem: Problem, m: int, target: Target) -> Config:
    """How ``triton_scaled_mm`` runs m tokens on ``target``, without measurement."""
    if m <= SLICES_ROWS:
        return _slices_config(problem, m, target)
    if m <= TALL_ROWS:
        return _tall_config(problem, m, target)
    return _wide_config(problem, m, target)


def _slices_config(problem: Problem, m: int, target: Target) -> Config:
    block_k = min(128, groups(problem)[1] or 128)
    block_n = 32 if problem.n >= 64 * target.sm_count else 16
    return Config("slices", 8 if m <= 8 else 16, block_n, block_k, warps=4, stages=4)


def _tall_config(problem: Problem, m: int, target: Target) -> Config:
    block_m = max(16, pow2(m))
    block_k = min(128, groups(problem)[1] or 128)
    block_n = 128 if problem.n >= 128 * target.sm_count else 64
    tiles = ceil(problem.n, block_n)
    steps = ceil(problem.k, block_k)
    split = 1
    while tiles * split < target.sm_count and steps >= 16 * split:
        split *= 2
    stages = _stages(block_n + block_m, block_k, target, most=6)
    return Config(
        "tall", block_m, block_n, block_k, warps=4, stages=stages, split=split, promote=_promote(problem, True)
    )


def _wide_config(problem: Problem, m: int, target: Target) -> Config:
    grouped = groups(problem)[1]
    promote = _promote(problem, False)
    large = target.arch in (90, 100) and not grouped and not promote
    shapes = [(128, 128), (64, 128), *([(128, 256)] if large else [])]
    block_m, block_n = min(shapes, key=lambda shape: _wave_cost(problem, m, target, *shape))
    block_k = min(128, grouped or 128)
    warps = 8 if block_m * block_n >= 128 * 128 and target.arch >= 90 else 4
    stages = _stages(block_m + block_n, block_k, target, most=4)
    tma = target.arch >= 90 and problem.k % 16 == 0
    return Config("wide", block_m, block_n, block_k, warps, stages, tma=tma, promote=promote)


def _wave_cost(problem: Problem, m: int, target: Target, block_m: int, block_n: int) -> float:
    """Time in units of one multiply-add per multiprocessor, larger tiles being more efficient, in whole waves."""
    tiles = ceil(m, block_m) * ceil(problem.n, block_n)
    waves = ceil(tiles, target.sm_count)
    return waves * block_m * block_n * (1 + 64 / block_m + 64 / block_n)


def _stages(rows: int, block_k: int, target: Target, most: int) -> int:
    """Pipeline depth that fits the shared memory of one program, with room for the epilogue."""
    memory = shared_memory(target)
    return max(2, min(most, memory // (rows * block_k)))


def _promote(problem: Problem, free: bool) -> bool:
    if problem.scheme.weights.type == "int" or groups(problem)[1]:
        return False
    return free or problem.k > IMPRECISE_K


def _reject(problem: Problem, target: Target) -> Reject | None:
    if target.device != "cuda":
        return Reject("needs a CUDA GPU")
    if not target.has("triton"):
        return Reject("triton is not installed")
    family = family_of(problem.scheme).name
    if family not in OLDEST:
        return Reject(f"multiplies 8-bit inputs by 8-bit weights, not {problem.scheme.spec}")
    if problem.scheme.input_activations is None:
        return Reject("16-bit inputs are not multiplied by 8-bit weights here")
    if target.arch < OLDEST[family]:
        return Reject(f"{family} needs sm{OLDEST[family]} or newer, this is {target.label}")
    if problem.dtype not in DTYPES:
        return Reject(f"output dtype must be bfloat16, float16 or float32, got {problem.dtype}")
    columns = groups(problem)[1]
    if columns and columns % 128 and columns not in (32, 64):
        return Reject(f"blocks must have 32, 64 or a multiple of 128 columns, got {columns}")
    return None


def fit(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """Any m; FP8 from sm89, INT8 from sm80."""
    refusal = _reject(problem, target)
    if refusal is not None:
        return refusal
    plan = config(problem, m, target)
    efficiency = 0.55 if plan.kind == "wide" else 0.4
    bits = bits_per_weight(problem.scheme)
    extra = 8.0 * plan.split * m * problem.n if plan.split > 1 else 0.0
    cost = estimate(
        problem,
        m,
        target,
        efficiency,
        bits,
        bandwidth_efficiency=0.8,
        tile_m=plan.block_m,
        launches=2 if plan.split > 1 else 1,
        extra_bytes=extra,
    )
    return Rank(cost)


def fit_gemv(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """Up to four tokens."""
    refusal = _reject(problem, target)
    if refusal is not None:
        return refusal
    if m > GEMV_ROWS:
        return Reject(f"serves at most {GEMV_ROWS} tokens, got {m}")
    # Bound by converting and multiplying on ordinary cores: about a sixtieth of the tensor cores' rate.
    cost = estimate(problem, m, target, 1 / 60, bits_per_weight(problem.scheme), bandwidth_efficiency=0.9)
    return Rank(cost)


@lru_cache(maxsize=1)
def _source() -> Any:
    return import_module("quant_compile.lowering.kernels.scaled._triton_scaled_mm")


def _interpreted() -> bool:
    return not hasattr(_source().gemv_kernel, "warmup") or "Interpreted" in type(_source().gemv_kernel).__name__


def run(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """y [m, n] of ``problem.dtype`` from x codes [m, k] and w codes [n, k], float8 or int8, and their f32 scales.

    x scale [m, 1], [1] or [m, g] with any strides; w scale [n, 1] or [n/bn, k/bk]. Formula: (x @ w.T) * x scale *
    w scale + bias, group scales inside the sum. Source: the family's ``linear``.
    """
    return launch(x, w, bias, problem, config(problem, rows_of(x[0]), target_of(x[0].device)))


def run_gemv(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """As ``run``, for at most four tokens."""
    return launch(x, w, bias, problem, gemv_config(problem, rows_of(x[0]), target_of(x[0].device)))


def recorded(problem: Problem, m: int, target: Target) -> Config | None:
    """How a launch for m rows is cut up, where Inductor can launch it: tensor descriptors it cannot make."""
    plan = config(problem, m, target)
    return None if plan.tma else plan


def launch(x: Planes, w: Planes, bias: Tensor | None, problem: Problem, plan: Config) -> Tensor:
    """Run one plan; arguments and result as for ``run``."""
    y = torch.empty((x[0].shape[0], problem.n), dtype=problem.dtype, device=x[0].device)
    x = (x[0].contiguous(), *x[1:])  # codes of a ragged last group may come as a slice of padded ones
    _LAUNCH[plan.kind](x, w, bias, problem, plan, y)
    return y


def _strides(x: Planes, w: Planes, problem: Problem) -> tuple[int, int, int, int]:
    """(x row, x group, w row, w group) strides of the scales."""
    if groups(problem)[1]:
        return x[1].stride(0), x[1].stride(1), w[1].stride(0), w[1].stride(1)
    return (0 if x[1].numel() == 1 else x[1].stride(0)), 0, w[1].stride(0), 0


def _common(problem: Problem, bias: Tensor | None) -> dict[str, Any]:
    group_n, group_k = groups(problem)
    integer = problem.scheme.weights.type == "int"
    return {"GROUP_K": group_k, "GROUP_N": group_n, "INTEGER": integer, "HAS_BIAS": bias is not None}


def _launch_gemv(x: Planes, w: Planes, bias: Tensor | None, problem: Problem, plan: Config, y: Tensor) -> None:
    left, right, k, block_k = x[0], w[0], problem.k, plan.block_k
    dp4a = problem.scheme.weights.type == "int" and k % 4 == 0 and not _interpreted()
    if dp4a:
        k, block_k = k // 4, block_k // 4
    enqueue(
        _source().gemv_kernel,
        (ceil(problem.n, plan.block_n),),
        left,
        right,
        x[1],
        w[1],
        bias,
        y,
        left.shape[0],
        problem.n,
        k,
        *_strides(x, w, problem),
        M=plan.block_m,
        BLOCK_N=plan.block_n,
        BLOCK_K=block_k,
        EVEN_K=k % block_k == 0,
        DP4A=dp4a,
        PIPELINE=plan.stages,
        PDL=plan.pdl,
        launch_pdl=plan.pdl,
        **_common(problem, bias),
        num_warps=plan.warps,
    )


def _launch_slices(x: Planes, w: Planes, bias: Tensor | None, problem: Problem, plan: Config, y: Tensor) -> None:
    enqueue(
        _source().slices_kernel,
        (ceil(problem.n, plan.block_n),),
        x[0],
        w[0],
        x[1],
        w[1],
        bias,
        y,
        x[0].shape[0],
        problem.n,
        problem.k,
        *_strides(x, w, problem),
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        BLOCK_K=plan.block_k,
        SLICES=plan.warps,
        EVEN_K=problem.k % (plan.block_k * plan.warps) == 0,
        PDL=plan.pdl,
        launch_pdl=plan.pdl,
        **_common(problem, bias),
        num_warps=plan.warps,
        num_stages=plan.stages,
    )


def _launch_tile(x: Planes, w: Planes, bias: Tensor | None, problem: Problem, plan: Config, y: Tensor) -> None:
    m, n, k = x[0].shape[0], problem.n, problem.k
    tall = plan.kind == "tall"
    early = plan.pdl and tall and not plan.tma  # the kernel waits for its inputs only where it prefetches w
    x_strides, w_strides = _strides(x, w, problem)[:2], _strides(x, w, problem)[2:]
    x_side = (x, m, n, plan.block_m, x_strides)
    w_side = (w, n, 1, plan.block_n, w_strides)
    a, b = (w_side, x_side) if tall else (x_side, w_side)
    steps = ceil(ceil(k, plan.block_k), plan.split)
    common = _common(problem, bias)
    out = y
    if plan.split > 1:
        raw = torch.int32 if common["INTEGER"] else torch.float32
        out = torch.empty((plan.split, m, n), dtype=raw, device=y.device)
        common["HAS_BIAS"] = False
    operands = [_operand(side[0][0], side[3], plan) for side in (a, b)]
    enqueue(
        _source().tile_kernel,
        (ceil(a[1], a[3]) * ceil(b[1], b[3]), plan.split),
        *operands,
        a[0][1],
        b[0][1],
        bias,
        out,
        a[1],
        b[1],
        k,
        a[2],
        b[2],
        *a[4],
        *b[4],
        steps,
        BLOCK_A=a[3],
        BLOCK_B=b[3],
        BLOCK_K=plan.block_k,
        BAND=plan.band,
        SPLIT=plan.split,
        W_IS_A=tall,
        EVEN_K=k % plan.block_k == 0,
        PROMOTE=plan.promote,
        TMA=plan.tma,
        PDL=early,
        launch_pdl=early,
        **common,
        num_warps=plan.warps,
        num_stages=plan.stages,
    )
    if plan.split > 1:
        _reduce(out, x, w, bias, problem, y)


def _operand(data: Tensor, rows: int, plan: Config) -> Any:
    if not plan.tma:
        return data
    return descriptor(data, rows, plan.block_k)


def _reduce(parts: Tensor, x: Planes, w: Planes, bias: Tensor | None, problem: Problem, y: Tensor) -> None:
    split, m, n = parts.shape
    x_row, _, w_row, _ = _strides(x, w, problem)
    enqueue(
        _source().reduce_kernel,
        (ceil(n, 512), m),
        parts,
        x[1],
        w[1],
        bias,
        y,
        m,
        n,
        x_row,
        w_row,
        SPLIT=split,
        BLOCK=512,
        SCALED=groups(problem)[1] == 0,
        HAS_BIAS=bias is not None,
        num_warps=4,
    )


_LAUNCH: dict[str, Callable[[Planes, Planes, Tensor | None, Problem, Config, Tensor], None]] = {
    "gemv": _launch_gemv,
    "slices": _launch_slices,
    "tall": _launch_tile,
    "wide": _launch_tile,
}

KERNELS = (
    Kernel("triton_scaled_mm", "rows", fit, run, recorded=recorded),
    Kernel("triton_gemv", "rows", fit_gemv, run_gemv, recorded=gemv_config),
)
