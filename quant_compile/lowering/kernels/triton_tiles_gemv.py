"""A few tokens times 4-bit weights in the layouts of ``humming_4bit``, where humming's own GEMMs leave bandwidth unused.

They share humming's packed copy, so decoding needs no other: ``triton_flat_gemv`` (W4A8, up to four tokens),
``triton_wide_gemv`` (W4AFP8 in groups of 128) and ``triton_fp4_tiles_gemv`` (NVFP4A16, MXFP4A16; both up to eight). The last
two rest on how Triton deals threads to tensors, so each is tried on a small problem before it is chosen. The Triton source,
in ``_triton_tiles_gemv``, is imported at the first launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, Reject, family_of
from quant_compile.lowering.kernels import humming_4bit
from quant_compile.lowering.kernels._roofline import estimate
from quant_compile.lowering.kernels.triton_w4a16 import sm_count_of
from quant_compile.lowering.registry import Fit, Kernel, Problem, Rank
from quant_compile.lowering.target import Target

FLAT_TOKENS, TOKENS = 4, 8
TRIAL_TOLERANCE = 5e-3  # one rounding of the output


@dataclass(frozen=True)
class Plan:
    """How a launch is cut up.

    Attributes:
        rows: rows of w per program.
        parts: stretches of k that run side by side in a program.
        warps: warps per program.
        groups: groups of columns that a thread takes at a time (fp4 only).
    """

    rows: int
    parts: int
    warps: int
    groups: int = 1


# --- run ---


@lru_cache(maxsize=1)
def _source() -> Any:
    return import_module("quant_compile.lowering.kernels._triton_tiles_gemv")


@lru_cache(maxsize=1)
def _interpreted() -> bool:
    return "Interpreted" in type(_source().flat_kernel).__name__


def _words(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[m, k] as words of ``dtype``; k is a multiple of 128 here."""
    x = x.contiguous()
    return (x.clone() if x.data_ptr() % 16 else x).view(dtype)


def _sx_row(scale: Tensor) -> int:
    return 0 if scale.numel() == 1 else scale.stride(0)


def flat_plan(problem: Problem, sm_count: int) -> Plan:
    """Programs for every SM."""
    return Plan(32 if problem.n >= 64 * sm_count else 16, 8, 4)


def run_flat(x: Planes, w: Planes, bias: Tensor | None, problem: Problem, plan: Plan | None = None) -> Tensor:
    """x int8 [m, k], m at most four, scale [m, 1] or [1] f32, times ``w4_flat`` -> [m, n]; sums of a group are exact.

    Source: the family's ``linear``.
    """
    words = _words(x[0], torch.int64)
    m, n, group = words.shape[0], problem.n, problem.scheme.weights.group_size
    tokens = min(FLAT_TOKENS, 1 << (m - 1).bit_length())
    plan = plan or flat_plan(problem, sm_count_of(words.device))
    columns = group or 128
    spans = problem.k // columns
    y = torch.empty((m, n), dtype=problem.dtype, device=words.device)
    _source().flat_kernel[(n // plan.rows, -(-m // tokens))](
        words, w[0], x[1], w[1], bias, y, m, n, spans, _sx_row(x[1]),
        M=tokens, ROWS=plan.rows, PARTS=plan.parts, CHUNKS=columns // 32, GROUPED=group is not None,
        EVEN=spans % plan.parts == 0, ASM=not _interpreted(), num_warps=plan.warps,
    )  # fmt: skip
    return y


def wide_plan(problem: Problem, sm_count: int) -> Plan:
    """Programs for every SM."""
    return Plan(32 if problem.n >= 64 * sm_count else 16, 8, 8)


def run_wide(x: Planes, w: Planes, bias: Tensor | None, problem: Problem, plan: Plan | None = None) -> Tensor:
    """x e4m3 [m, k], m at most eight, scale [m, 1] or [1] f32, times ``w4_wide8`` -> [m, n].

    Source: the family's ``linear``.
    """
    words, n = _words(x[0], torch.int32), problem.n
    m, groups = words.shape[0], problem.k // 128
    plan = plan or wide_plan(problem, sm_count_of(words.device))
    y = torch.empty((m, n), dtype=problem.dtype, device=words.device)
    _source().wide_kernel[(n // plan.rows,)](
        words, w[0], x[1], w[1].view(torch.int32), bias, y, m, n, groups, _sx_row(x[1]),
        SUBS=plan.rows // 16, PARTS=plan.warps, EVEN=groups % plan.warps == 0, BF16=problem.dtype == torch.bfloat16,
        num_warps=plan.warps,
    )  # fmt: skip
    return y


def fp4_plan(problem: Problem) -> Plan:
    """128 bytes of each thread in flight."""
    return Plan(64, 8, 8, 8 if problem.scheme.weights.group_size == 16 else 4)


def run_fp4(x: Planes, w: Planes, bias: Tensor | None, problem: Problem, plan: Plan | None = None) -> Tensor:
    """x [m, k] bf16 or f16, m at most eight, times ``fp4_tiles`` -> [m, n]; f32 sums are rounded once.

    Source: the family's ``linear``.
    """
    words, n, scale = _words(x[0], torch.int32), problem.n, w[1].view(torch.int16)
    m, groups, e8m0 = words.shape[0], scale.shape[0], len(w) == 3
    plan = plan or fp4_plan(problem)
    y = torch.empty((m, n), dtype=problem.dtype, device=words.device)
    _source().fp4_kernel[(n // 64,)](
        words, w[0], scale, None if e8m0 else w[3], bias, y, m, n, groups, words.shape[1],
        BLOCKS=2 if e8m0 else 1, GROUPS=plan.groups, PARTS=plan.warps,
        EVEN=groups % (plan.warps * plan.groups) == 0, E8M0=e8m0, BF16=problem.dtype == torch.bfloat16,
        HAS_E4M3=_has_e4m3(words.device), num_warps=plan.warps,
    )  # fmt: skip
    return y


@lru_cache(maxsize=None)
def _has_e4m3(device: torch.device) -> bool:
    return Target.of(device).arch >= 89


# --- fit ---


@lru_cache(maxsize=None)
def _trial(name: str, problem: Problem, device: int) -> str | None:
    """Run a kernel on a small problem of this kind; None when it agrees with the family, else what went wrong."""
    family, where = family_of(problem.scheme), torch.device("cuda", device)
    kernel = next(kernel for kernel in KERNELS if kernel.name == name)
    layout = next(layout for layout in humming_4bit.LAYOUTS if layout.name == kernel.layout)
    try:
        with torch.inference_mode(False), torch.no_grad():
            generator = torch.Generator(where).manual_seed(0)
            w = torch.randn(problem.n, problem.k, generator=generator, device=where).to(problem.dtype)
            x: Planes = (torch.randn(3, problem.k, generator=generator, device=where).to(problem.dtype),)
            if problem.scheme.input_activations is not None:
                scale = torch.full((1,), 0.03, device=where) if problem.scheme.static else None
                x = family.quantize_input(x[0], problem.scheme, scale)
            rows = family.quantize_weight(w, problem.scheme)
            wanted = family.linear(x, rows, None, problem.scheme, torch.float32)
            got = kernel.run(x, layout.pack(rows, problem), None, problem).float()
            error = float((got - wanted).norm() / wanted.norm())
    except Exception as failure:  # whatever a compiler does, the answer is that the kernel cannot be used
        return f"{type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0]}"
    return None if error <= TRIAL_TOLERANCE else f"differs from the reference by {error:.1e}"


def _tried(name: str, problem: Problem, target: Target) -> Reject | None:
    """Targets that are not this machine are believed."""
    if target.ops is not None or not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
        return None
    small = Problem(problem.scheme, 128, 1024, problem.dtype)
    reason = _trial(name, small, torch.cuda.current_device())
    return None if reason is None else Reject(f"fails here: {reason}")


def _fit(name: str, layout_fit: Fit, tokens: int, bandwidth: float, math: float) -> Fit:
    """The fit of a kernel for what humming serves: its layout needs a kernel for every m anyway."""

    def fit(problem: Problem, m: int, target: Target) -> Rank | Reject:
        refusal = layout_fit(problem, m, target)
        if isinstance(refusal, Reject):
            return refusal
        if not target.has("triton"):
            return Reject("triton is not installed")
        if m > tokens:
            return Reject(f"serves at most {tokens} rows of x, got {m}")
        refusal = _tried(name, problem, target)
        bits = problem.scheme.bits_per_weight
        return refusal or Rank(estimate(problem, m, target, math, bits, bandwidth_efficiency=bandwidth))

    return fit


def _kernel(
    name: str, layout: str, layout_fit: Fit, tokens: int, share: float, math: float, run: Callable[..., Tensor]
) -> Kernel:
    return Kernel(name, layout, _fit(name, layout_fit, tokens, share, math), run)


KERNELS = (
    _kernel("triton_flat_gemv", "w4_flat", humming_4bit.fit_int8, FLAT_TOKENS, 0.8, 1 / 50, run_flat),
    _kernel("triton_wide_gemv", "w4_wide8", humming_4bit.fit_fp8_wide, TOKENS, 0.8, 1 / 8, run_wide),
    _kernel("triton_fp4_tiles_gemv", "fp4_tiles", humming_4bit.fit_fp4, TOKENS, 0.75, 1 / 8, run_fp4),
)
