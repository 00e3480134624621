"""One or two tokens times W4A8 weights in humming's layout ``w4_flat``, where its own GEMM leaves bandwidth unused.

It shares the packed copy of ``humming_4bit``, so decoding one token needs no other. The Triton source, in
``_triton_flat_gemv``, is imported at the first launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, Reject, bits_per_weight
from quant_compile.lowering.kernels._launch import sm_count_of
from quant_compile.lowering.kernels._roofline import estimate
from quant_compile.lowering.kernels.w4a8 import humming_4bit
from quant_compile.lowering.registry import Kernel, Problem, Rank
from quant_compile.lowering.target import Target
from quant_compile.lowering.trace import aligned, enqueue, rows_of

TOKENS = 2  # measured on an H200: with four, humming's tensor cores are faster


@dataclass(frozen=True)
class Plan:
    """How a launch is cut up.

    Attributes:
        rows: rows of w per program.
        parts: stretches of k that run side by side in a program.
        warps: warps per program.
    """

    rows: int
    parts: int
    warps: int


def fit(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """What ``humming_w4a8`` serves (without it no kernel reads the layout at other m), up to two tokens."""
    refusal = humming_4bit.fit_int8(problem, m, target)
    if isinstance(refusal, Reject):
        return refusal
    if not target.has("triton"):
        return Reject("triton is not installed")
    if m > TOKENS:
        return Reject(f"serves at most {TOKENS} rows of x, got {m}")
    return Rank(estimate(problem, m, target, 1 / 50, bits_per_weight(problem.scheme), bandwidth_efficiency=0.8))


@lru_cache(maxsize=1)
def _source() -> Any:
    return import_module("quant_compile.lowering.kernels.w4a8._triton_flat_gemv")


@lru_cache(maxsize=1)
def _interpreted() -> bool:
    return "Interpreted" in type(_source().flat_kernel).__name__


def plan(problem: Problem, sm_count: int) -> Plan:
    """As measured on an H200: many stretches of k, fewer where rows alone make programs enough."""
    spans = problem.k // (problem.scheme.weights.group_size or 128)
    if problem.n >= 64 * sm_count:
        return Plan(32, 16, 8)
    return Plan(16, 32, 8) if spans % 32 == 0 else Plan(16, 16, 16)


def tokens_of(problem: Problem, m: int, target: Target | None = None) -> int:
    """Rows of x of a program."""
    return min(4, 1 << (m - 1).bit_length())


def run(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """x int8 [m, k], m at most two, scale [m, 1] or [1] f32, times ``w4_flat`` -> [m, n]; sums of a group are exact.

    Source: the family's ``linear``.
    """
    return launch(x, w, bias, problem, plan(problem, sm_count_of(x[0].device)))


def launch(x: Planes, w: Planes, bias: Tensor | None, problem: Problem, chosen: Plan) -> Tensor:
    """Run one plan, for up to four tokens; arguments and result as for ``run``."""
    codes = x[0].contiguous()
    words = codes if aligned(codes, 16) else codes.clone()
    m, n, group = words.shape[0], problem.n, problem.scheme.weights.group_size
    tokens = tokens_of(problem, rows_of(codes))
    columns = group or 128
    spans = problem.k // columns
    y = torch.empty((m, n), dtype=problem.dtype, device=words.device)
    enqueue(
        _source().flat_kernel, (n // chosen.rows, -(-m // tokens)),
        words, w[0], x[1], w[1], bias, y, m, n, spans, 0 if x[1].numel() == 1 else x[1].stride(0),
        M=tokens, ROWS=chosen.rows, PARTS=chosen.parts, CHUNKS=columns // 32, GROUPED=group is not None,
        EVEN=spans % chosen.parts == 0, ASM=not _interpreted(), num_warps=chosen.warps,
    )  # fmt: skip
    return y


KERNELS = (Kernel("triton_flat_gemv", "w4_flat", fit, run, recorded=tokens_of),)
