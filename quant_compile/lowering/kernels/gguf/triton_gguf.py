"""Triton kernels for GGUF weights (Q8_0, Q4_0, Q4_K, Q5_K, Q6_K) under 16-bit inputs, and ``gguf_planes``, their layout.

``triton_gguf_gemv`` streams rows of w through plain cores for one or two rows of x, ``triton_gguf`` decodes in registers and
multiplies on tensor cores, ``triton_gguf_dequant`` makes a copy in x's dtype for cuBLAS.

Layout ``gguf_planes``: blocks have odd sizes (18, 34, 144, 176, 210 bytes), which no wide load can read; here what is alike
lies together, in rows, without loss. A group is 32 columns.

* ``data``: q8_0 int8 [n, k]; else u8 [n, k/2], 16 bytes a group: nibble j of the 16-bit word i is column 8 j + i.
* ``high``: q5_k u8 [n, k/8]: bit j + 4 (i % 2) of byte i / 2 of a group is bit 4 of that code. q6_k u8 [n, k/4]: bits 2 j and
  2 j + 1 of byte i are its bits 4 and 5.
* ``scale``: q8_0, q4_0 f16 [n, k/32]; q4_k, q5_k u8 [n, k/16], scale and minimum of each group; q6_k int8 [n, k/16].
* ``super``: q4_k, q5_k f16 [n, k/128], d and dmin of each block; q6_k f16 [n, k/256].

Bytes are those of the blocks, but that the six bits of q4_k's and q5_k's scales take eight: 4.625 bits a weight for 4.5, 5.625 for 5.5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, PlaneSpec, Reject, family_of
from quant_compile.ir.ggml import decode as ggml
from quant_compile.ir.ggml import encode as to_bytes
from quant_compile.lowering.kernels._launch import ceil, sm_count_of, target_of, triton_type
from quant_compile.lowering.kernels._roofline import estimate
from quant_compile.lowering.registry import Kernel, Layout, Problem, Rank, anyhow
from quant_compile.lowering.schemes.gguf import block_of
from quant_compile.lowering.target import Target
from quant_compile.lowering.trace import aligned, enqueue, rows_of

DTYPES = (torch.bfloat16, torch.float16)
GROUP = 32
GEMV_ROWS = 2
MATMUL_ROWS = 128  # beyond this many rows a dequantized copy and cuBLAS need less
PACKED = "gguf_planes"


@dataclass(frozen=True)
class Form:
    """How one type is taken apart.

    Attributes:
        bits: of a code.
        kind: of its scales, see ``_triton_gguf``.
        zero: what codes are too large by.
        stored: bits a weight in ``gguf_planes``.
    """

    bits: int
    kind: str
    zero: float
    stored: float

    @property
    def constants(self) -> dict[str, Any]:
        """What every kernel takes."""
        return {"BITS": self.bits, "KIND": self.kind, "ZERO": self.zero}


FORMS = {
    "q8_0": Form(8, "half", 0.0, 8.5),
    "q4_0": Form(4, "half", 8.0, 4.5),
    "q4_k": Form(4, "affine", 0.0, 4.625),
    "q5_k": Form(5, "affine", 0.0, 5.625),
    "q6_k": Form(6, "signed", 32.0, 6.5625),
}


def form_of(problem: Problem) -> Form:
    """The form of a problem that was accepted."""
    return FORMS[block_of(problem.scheme).name]


# --- layout gguf_planes ---


def planes(problem: Problem) -> tuple[PlaneSpec, ...]:
    """Specs of ``data``, ``high``, ``scale`` and ``super``, those that the type has."""
    block, n = block_of(problem.scheme), problem.n
    name, k = block.name, ceil(problem.k, block.size) * block.size
    if name == "q8_0":
        return PlaneSpec("data", (n, k), torch.int8), PlaneSpec("scale", (n, k // 32), torch.float16)
    data = PlaneSpec("data", (n, k // 2), torch.uint8)
    if name == "q4_0":
        return data, PlaneSpec("scale", (n, k // 32), torch.float16)
    if name == "q6_k":
        return (
            data,
            PlaneSpec("high", (n, k // 4), torch.uint8),
            PlaneSpec("scale", (n, k // 16), torch.int8),
            PlaneSpec("super", (n, k // 256), torch.float16),
        )
    high = (PlaneSpec("high", (n, k // 8), torch.uint8),) if name == "q5_k" else ()
    return (
        data,
        *high,
        PlaneSpec("scale", (n, k // 16), torch.uint8),
        PlaneSpec("super", (n, k // 128), torch.float16),
    )


def _low(codes: Tensor) -> Tensor:
    """Codes [.., k] of four bits and more -> their nibbles as bytes [.., k / 2]."""
    words = codes.unflatten(-1, (-1, 4, 8)).to(torch.int32) & 15
    packed = words[..., 0, :] | (words[..., 1, :] << 4) | (words[..., 2, :] << 8) | (words[..., 3, :] << 12)
    return torch.stack((packed & 255, packed >> 8), -1).to(torch.uint8).flatten(-3)


def _low_inv(data: Tensor) -> Tensor:
    words = data.unflatten(-1, (-1, 8, 2)).to(torch.int32)
    words = words[..., 0] | (words[..., 1] << 8)
    return torch.stack([(words >> (4 * j)) & 15 for j in range(4)], -2).flatten(-3)


def _high(codes: Tensor, bits: int) -> Tensor:
    """Bits 4 and above of codes [.., k] -> bytes [.., k * bits / 8]."""
    words = codes.unflatten(-1, (-1, 4, 8)).to(torch.int32) >> 4
    packed = (
        words[..., 0, :] | (words[..., 1, :] << bits) | (words[..., 2, :] << 2 * bits) | (words[..., 3, :] << 3 * bits)
    )
    if bits == 1:
        packed = packed[..., 0::2] | (packed[..., 1::2] << 4)
    return packed.to(torch.uint8).flatten(-2)


def _high_inv(data: Tensor, bits: int) -> Tensor:
    words = data.to(torch.int32)
    if bits == 1:
        words = torch.stack((words & 15, words >> 4), -1).flatten(-2)
    words = words.unflatten(-1, (-1, 8))
    return torch.stack([((words >> (bits * j)) & ((1 << bits) - 1)) << 4 for j in range(4)], -2).flatten(-3)


def _halves(data: Tensor) -> Tensor:
    """Bytes [n, b, 2 c] -> f16 [n, b * c], bit for bit."""
    return data.flatten(1).contiguous().view(torch.float16)


def pack(row_form: Planes, problem: Problem) -> Planes:
    """``blocks`` -> ``gguf_planes``."""
    block = block_of(problem.scheme)
    b = row_form[0].unflatten(-1, (-1, block.nbytes))
    name = block.name
    if name == "q8_0":
        return b[..., 2:].flatten(1).contiguous().view(torch.int8), _halves(b[..., :2])
    if name == "q4_0":
        return _low(ggml.fields(b[..., 2:], 16, 4)).flatten(1), _halves(b[..., :2])
    if name == "q6_k":
        codes = ggml.fields(b[..., :128], 64, 4) | (ggml.fields(b[..., 128:192], 32, 2) << 4)
        scale = b[..., 192:208].flatten(1).contiguous().view(torch.int8)
        return _low(codes).flatten(1), _high(codes, 2).flatten(1), scale, _halves(b[..., 208:])
    scales, minima = ggml.six_bits(b[..., 4:16])
    pairs = torch.stack((scales, minima), -1).flatten(1)
    if name == "q4_k":
        return _low(ggml.fields(b[..., 16:], 32, 4)).flatten(1), pairs, _halves(b[..., :4])
    codes = ggml.fields(b[..., 48:], 32, 4) | (ggml.fields(b[..., 16:48], 32, 1) << 4)
    return _low(codes).flatten(1), _high(codes, 1).flatten(1), pairs, _halves(b[..., :4])


def unpack(packed: Planes, problem: Problem) -> Planes:
    """``gguf_planes`` -> ``blocks``, exactly."""
    block = block_of(problem.scheme)
    name, blocks = block.name, problem.k // block.size
    b = [plane.contiguous().view(torch.uint8).unflatten(-1, (blocks, -1)) for plane in packed]
    if name == "q8_0":
        parts = (b[1], b[0])
    elif name == "q4_0":
        parts = (b[1], to_bytes.fields(_low_inv(b[0]), 16, 4))
    elif name == "q6_k":
        codes = _low_inv(b[0]) | _high_inv(b[1], 2)
        parts = (to_bytes.fields(codes & 15, 64, 4), to_bytes.fields(codes >> 4, 32, 2), b[2], b[3])
    else:
        codes = _low_inv(b[0])
        pairs = b[-2].unflatten(-1, (8, 2))
        head = (b[-1], to_bytes.six_bits(pairs[..., 0], pairs[..., 1]))
        high = (to_bytes.fields(_high_inv(b[1], 1) >> 4, 32, 1),) if name == "q5_k" else ()
        parts = (*head, *high, to_bytes.fields(codes, 32, 4))
    return (torch.cat(parts, -1).flatten(1),)


GGUF_PLANES = Layout(PACKED, pack, unpack, planes, row_block=lambda problem: 1)
LAYOUTS = (GGUF_PLANES,)


@dataclass(frozen=True)
class Weight:
    """Planes as kernels take them; ``data`` and ``scale`` stand in for what a type has not."""

    data: Tensor
    high: Tensor
    scale: Tensor
    whole: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the order of the kernels' arguments."""
        return self.data, self.high, self.scale, self.whole


def weight_of(w: Planes, form: Form) -> Weight:
    """``gguf_planes`` of one weight, or of all experts."""
    if form.kind == "half":
        return Weight(w[0], w[0], w[1], w[1])
    return Weight(w[0], w[1] if len(w) == 4 else w[0], w[-2], w[-1])


# --- fit ---


def refuse(problem: Problem, target: Target) -> Reject | None:
    """Why none of these kernels can run the problem; None when one may."""
    if family_of(problem.scheme).name != "gguf":
        return Reject("serves weights in GGUF blocks")
    if block_of(problem.scheme).name not in FORMS:
        return Reject(f"takes apart {', '.join(name.upper() for name in FORMS)}, not {problem.scheme.spec}")
    if target.device != "cuda":
        return Reject("needs a CUDA GPU")
    if target.arch < 80:
        return Reject(f"needs sm80 or newer, this is {target.label}")
    if not target.has("triton"):
        return Reject("triton is not installed")
    return None


def _sixteen(problem: Problem) -> Reject | None:
    if problem.dtype in DTYPES:
        return None
    return Reject(f"x must be bfloat16 or float16, got {str(problem.dtype).removeprefix('torch.')}")


def fit_gemv(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """One or two rows of 16-bit x."""
    reject = refuse(problem, target) or _sixteen(problem)
    if reject is not None:
        return reject
    if m > GEMV_ROWS:
        return Reject(f"runs at most {GEMV_ROWS} rows of x, got {m}")
    return Rank(estimate(problem, m, target, 0.05, form_of(problem).stored, math_bits=16, bandwidth_efficiency=0.65))


def fit_matmul(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """16-bit x of at most MATMUL_ROWS rows."""
    reject = refuse(problem, target) or _sixteen(problem)
    if reject is not None:
        return reject
    if m > MATMUL_ROWS:
        return Reject(f"runs at most {MATMUL_ROWS} rows of x, got {m}")
    plan = matmul_plan(problem, m, target)
    cost = estimate(
        problem, m, target, 0.2, form_of(problem).stored, math_bits=16, bandwidth_efficiency=0.3,
        tile_m=plan.block_m, launches=1 + (form_of(problem).bits != 8) + (plan.splits > 1),
        extra_bytes=8.0 * plan.splits * m * problem.n if plan.splits > 1 else 0.0,
    )  # fmt: skip
    return Rank(cost)


def fit_dequant(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """Any m: a copy of the weight in x's dtype, then cuBLAS."""
    reject = refuse(problem, target)
    if reject is not None:
        return reject
    return Rank(copy_cost(problem, m, target, form_of(problem).stored))


def copy_cost(problem: Problem, m: int, target: Target, bits: float) -> float:
    """Estimate of decoding a weight of ``bits`` bits each into a copy, and of cuBLAS over it."""
    copy = problem.n * problem.k * problem.dtype.itemsize
    # 0.64: cuBLAS reaches 0.7 of the peak, and the copy is made before it starts.
    efficiency = 0.05 if problem.dtype == torch.float32 else 0.64
    return estimate(
        problem, m, target, efficiency, bits, math_bits=16, tile_m=64, launches=2, extra_bytes=2.0 * copy
    )  # fmt: skip


# --- run ---

NEAR, FAR, BYTE = 0x43000000, 0x45000000, 0x43C00000  # bits of 128.0 and 2048.0, and BYTE_MAGIC of _triton_gguf


@lru_cache(maxsize=1)
def _source() -> Any:
    return import_module("quant_compile.lowering.kernels.gguf._triton_gguf")


@lru_cache(maxsize=1)
def _interpreted() -> bool:
    return "Interpreted" in type(_source().gemv_kernel).__name__


def _whole_rows(x: Tensor) -> Tensor:
    """Rows of x, to be read 16 bytes at a time."""
    return x if aligned(x, 16) else x.clone()


@dataclass(frozen=True)
class GemvPlan:
    """Rows of w per program, groups of each row per step (a thread reads one), warps."""

    rows: int
    groups: int
    warps: int


# (rows, warps), from the least work a weight to the most warps.
GEMV_SHAPES = ((8, 1), (4, 1), (4, 2), (2, 2), (2, 4))


def gemv_plan(problem: Problem, m: int, sm_count: int) -> GemvPlan:
    """As many rows as leave ten warps for every SM, which cover the latency of loads; eight rows only where registers hold them."""
    groups, bits = problem.k // GROUP, form_of(problem).bits
    most = 4 if m > 1 or bits in (5, 6) else 8
    shapes = [(rows, warps) for rows, warps in GEMV_SHAPES if rows <= most and (warps == 1 or groups >= 32 * warps)]
    full = [(rows, warps) for rows, warps in shapes if ceil(problem.n, rows) * warps >= 10 * sm_count]
    rows, warps = full[0] if full else shapes[-1]
    return GemvPlan(rows, 32 * warps, warps)


def recorded_gemv(problem: Problem, m: int, target: Target) -> object:
    """How a launch for m rows is cut up."""
    return m, gemv_plan(problem, m, target.sm_count)


def run_gemv(x: Planes, w: Planes, bias: Tensor | None, problem: Problem, plan: GemvPlan | None = None) -> Tensor:
    """x [m, k], m at most two, times rows of ``gguf_planes`` -> [m, n], f32 sums rounded once. Source: the family's ``linear``."""
    rows, form = _whole_rows(x[0]), form_of(problem)
    m, groups = rows.shape[0], problem.k // GROUP
    plan = plan or gemv_plan(problem, rows_of(x[0]), sm_count_of(rows.device))
    y = rows.new_empty(m, problem.n)
    enqueue(
        _source().gemv_kernel, (ceil(problem.n, plan.rows),),
        rows, *weight_of(w, form).tensors, bias, y, m, problem.n, groups, NEAR, FAR, BYTE, 0,
        M=min(GEMV_ROWS, rows_of(x[0])), BN=plan.rows, G=plan.groups, **form.constants,
        EVEN=groups % plan.groups == 0, BF16=problem.dtype == torch.bfloat16, OUT=triton_type(problem.dtype),
        num_warps=plan.warps,
    )  # fmt: skip
    return y


@dataclass(frozen=True)
class MatmulPlan:
    """Tile of ``triton_gguf``: rows of x, rows of w, groups a step, warps, pipeline stages, parts of k."""

    block_m: int
    block_n: int
    groups: int
    warps: int
    stages: int
    splits: int


def matmul_plan(problem: Problem, m: int, target: Target) -> MatmulPlan:
    """Tiles that were the fastest on an H200; parts of k so that SMs have programs enough, each part of at least 512 columns.

    Few tokens are multiplied by two warps, which have mma.sync, not wgmma, and seldom wait for each other.
    """
    bits, newer = form_of(problem).bits, 90 <= target.arch < 120
    if m <= 16:
        tile, per_sm = (16, 64, 4, 2, 3), 6
    elif m <= 32:
        tile, per_sm = (32, 64, 4, 4, 3), 4
    elif m <= 64 or not newer:  # mma.sync has no registers left for wider ones
        tile, per_sm = (64, 128, 4, 4 if newer and bits == 4 else 8, 3), 2
    else:
        tile, per_sm = (128, 128, 2, 8, 3) if bits == 8 else (128, 64, 4, 4, 3), 2
    programs = ceil(problem.n, tile[1]) * ceil(m, tile[0])
    splits = min(max(1, per_sm * target.sm_count // programs), max(1, problem.k // 512), 8)
    return MatmulPlan(*tile, splits)


def recorded_matmul(problem: Problem, m: int, target: Target) -> object:
    """How a launch for m rows is cut up."""
    return matmul_plan(problem, m, target)


def by_place(x: Tensor, groups: int) -> Tensor:
    """x [m, k], the columns of each step of ``groups`` groups ordered by the place of their codes in words of ``gguf_planes``."""
    steps = x.unflatten(1, (-1, groups, 4, 8))
    return steps.transpose(2, 3).flatten(1)


def run_matmul(x: Planes, w: Planes, bias: Tensor | None, problem: Problem, plan: MatmulPlan | None = None) -> Tensor:
    """x [m, k] times rows of ``gguf_planes`` decoded in registers, each weight rounded once, on tensor cores -> [m, n].

    Parts of k are summed in a fixed order, so equal inputs give equal bits. Source: the family's ``linear``.
    """
    rows, form = _whole_rows(x[0]), form_of(problem)
    m, n, groups = rows.shape[0], problem.n, problem.k // GROUP
    plan = plan or matmul_plan(problem, rows_of(x[0]), target_of(rows.device))
    per_split = math.ceil(groups / plan.groups / plan.splits) * plan.groups
    splits = ceil(groups, per_split)
    y = rows.new_empty(m, n)
    parts = y if splits == 1 else torch.empty(splits, m, n, dtype=torch.float32, device=rows.device)
    placed = form.bits != 8 and groups % plan.groups == 0
    if placed:
        rows = by_place(rows, plan.groups)
    enqueue(
        _source().matmul_kernel, (ceil(n, plan.block_n), ceil(m, plan.block_m), splits),
        rows, *weight_of(w, form).tensors, bias if splits == 1 else None, parts, m, n, groups, per_split,
        BM=plan.block_m, BN=plan.block_n, G=plan.groups, **form.constants, EVEN=groups % plan.groups == 0,
        SPLIT=splits > 1, PLACED=placed, OUT=triton_type(problem.dtype), ASM=not _interpreted(),
        num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    if splits > 1:
        sum_parts = import_module("quant_compile.lowering.kernels.weight_only._triton_w4a16").sum_parts_kernel
        enqueue(
            sum_parts, (ceil(m * n, 1024),), parts, None, bias, y, m * n, n, splits,
            BLOCK=1024, OUT=triton_type(problem.dtype), num_warps=4,
        )  # fmt: skip
    return y


def dequantize(w: Planes, problem: Problem) -> Tensor:
    """``gguf_planes`` -> [n, k] in the problem's dtype, each weight rounded once."""
    form, groups, n = form_of(problem), problem.k // GROUP, problem.n
    out = torch.empty(n, problem.k, dtype=problem.dtype, device=w[0].device)
    rows, step = 4, 32
    enqueue(
        _source().dequantize_kernel, (ceil(n, rows), ceil(groups, step)),
        *weight_of(w, form).tensors, out, n, groups,
        BN=rows, G=step, **form.constants, OUT=triton_type(problem.dtype),
        ASM=problem.dtype in DTYPES and not _interpreted(), num_warps=2,
    )  # fmt: skip
    return out


def run_dequant(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """x [m, k] times a dequantized copy of the weight, by cuBLAS -> [m, n]. Source: the family's ``linear``."""
    dense = dequantize(w, problem).t()
    return torch.mm(x[0], dense) if bias is None else torch.addmm(bias, x[0], dense)


KERNELS = (
    Kernel("triton_gguf_gemv", PACKED, fit_gemv, run_gemv, recorded=recorded_gemv),
    Kernel("triton_gguf", PACKED, fit_matmul, run_matmul, recorded=recorded_matmul),
    Kernel("triton_gguf_dequant", PACKED, fit_dequant, run_dequant, recorded=anyhow),
)
