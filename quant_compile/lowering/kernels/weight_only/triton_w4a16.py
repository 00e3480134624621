"""Triton kernels for integer weights under 16-bit (or f32) inputs, and ``w4_tiles``, the layout of 4-bit weights.

Layout ``w4_tiles``: the order in which tensor cores take a 16-bit operand (mma m16n8k16); codes stay in their lane.
Rows are padded to 64, columns to 64; c below is the code, g the group of columns.

* ``data`` [k/16, 2n] int32: 64 rows x 16 columns are 128 consecutive words, [lane 32][i3 4]; lane = 4 * t4 + tq. Nibble
  ``i6*4 + i4*2 + i5`` of a word is c[row = 16*i3 + 8*i4 + t4, column = 8*i5 + 2*tq + i6].
* ``scale`` [g, n] in the weight's dtype: within 64 rows [t4 8][i3 4][i4 2]; one scale per row instead: within 32 rows
  [row/2 % 4][row/8][row % 2].
* ``zero`` [g, n/8] int32, with a zero point: nibbles in the order of grouped scales.
* ``locks`` [2048] int32 zeros: where split-K programs of humming wait for each other; zero again after each call.

Humming's GEMMs read the same planes, so one packed copy serves ``triton_w4a16_gemv`` at one row, ``humming_w4a16`` or
``triton_w4a16`` at a few, and a dequantized copy with cuBLAS (``triton_w4a16_dequant``) at thousands. 8-bit weights
stay in rows.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant_compile.ir.family import Planes, PlaneSpec, Reject, bits_per_weight
from quant_compile.ir.scheme import Scheme
from quant_compile.lowering.kernels._launch import sm_count_of, triton_type
from quant_compile.lowering.kernels._roofline import estimate
from quant_compile.lowering.kernels.weight_only._weight_only import refuse
from quant_compile.lowering.registry import Kernel, Layout, Problem, Rank, anyhow
from quant_compile.lowering.schemes.weight_only import group_of, pack_nibbles, unpack_nibbles
from quant_compile.lowering.target import Target
from quant_compile.lowering.trace import aligned, enqueue, rows_of

TILE_ROWS, TILE_COLUMNS, LOCKS = 64, 64, 2048
CHUNK_ROWS = 2048  # rows that are rearranged at a time, so that packing needs little memory beside its result
NEAR, FAR = 0x43000000, 0x45000000  # bits of 128.0 and 2048.0, see _triton_w4a16
MATMUL_ROWS = 512  # beyond this many rows decoding the weight once per row tile costs more than one dequantized copy

# --- layout w4_tiles ---


def padded(problem: Problem) -> tuple[int, int]:
    """Rows and columns as stored."""
    return -(-problem.n // TILE_ROWS) * TILE_ROWS, -(-problem.k // TILE_COLUMNS) * TILE_COLUMNS


def tile_planes(problem: Problem) -> tuple[PlaneSpec, ...]:
    """Specs of ``data``, ``scale``, ``zero`` (with a zero point) and ``locks``."""
    n, k = padded(problem)
    groups = -(-problem.k // group_of(problem.scheme, problem.k))
    zero = () if problem.scheme.weights.symmetric else (PlaneSpec("zero", (groups, n // 8), torch.int32),)
    return (
        PlaneSpec("data", (k // 16, 2 * n), torch.int32),
        PlaneSpec("scale", (groups, n), problem.dtype),
        *zero,
        PlaneSpec("locks", (LOCKS,), torch.int32),
    )


def pack_tiles(planes: Planes, problem: Problem) -> Planes:
    """Row form -> ``w4_tiles``."""
    n, k = padded(problem)
    data = torch.empty((k // 16, 2 * n), dtype=torch.int32, device=planes[0].device)
    for start in range(0, n, CHUNK_ROWS):
        chunk = _pack_rows(planes[0][start : start + CHUNK_ROWS], min(CHUNK_ROWS, n - start), k, problem.k)
        data[:, 2 * start : 2 * (start + CHUNK_ROWS)] = chunk
    scale = pad(planes[1], (0, 0, 0, n - problem.n)).t()
    scale = channel_order(scale) if _per_channel(problem.scheme) else group_order(scale)
    locks = torch.zeros(LOCKS, dtype=torch.int32, device=data.device)
    if problem.scheme.weights.symmetric:
        return data, scale, locks
    zero = pad(unpack_nibbles(planes[2], planes[1].shape[1]), (0, 0, 0, n - problem.n)).t()
    return data, scale, pack_nibbles(group_order(zero)).view(torch.int32), locks


def _pack_rows(packed: Tensor, rows: int, columns: int, k: int) -> Tensor:
    """Row-form codes of some tiles of rows -> [columns / 16, 2 rows] int32; missing rows and columns are zeros."""
    codes = pad(unpack_nibbles(packed, k), (0, columns - k, 0, rows - packed.shape[0]))
    # dims: tile, i3, i4, t4 | block, i5, tq, i6
    codes = codes.reshape(rows // 64, 4, 2, 8, columns // 16, 2, 4, 2).permute(4, 0, 3, 6, 1, 7, 2, 5)
    return (codes[..., 0] | (codes[..., 1] << 4)).reshape(columns // 16, 8 * rows).view(torch.int32)


def unpack_tiles(planes: Planes, problem: Problem) -> Planes:
    """``w4_tiles`` -> row form, exactly."""
    n, k = padded(problem)
    low_high = planes[0].contiguous().view(torch.uint8).reshape(k // 16, n // 64, 8, 4, 4, 2, 2)
    codes = torch.stack((low_high & 15, low_high >> 4), -1).permute(1, 4, 6, 2, 0, 7, 3, 5).reshape(n, k)
    data = pack_nibbles(codes[: problem.n, : problem.k])
    scale = channel_order_inv(planes[1]) if _per_channel(problem.scheme) else group_order_inv(planes[1])
    scale = scale.t()[: problem.n].contiguous()
    if problem.scheme.weights.symmetric:
        return data, scale
    zero = group_order_inv(unpack_nibbles(planes[2].contiguous().view(torch.uint8), n))
    return data, scale, pack_nibbles(zero.t()[: problem.n])


def _per_channel(scheme: Scheme) -> bool:
    return scheme.weights.group_size is None


def group_order(rows: Tensor) -> Tensor:
    """[g, n] in row order -> within 64 rows [row % 8][row / 8]."""
    return rows.reshape(rows.shape[0], -1, 8, 8).transpose(2, 3).reshape(rows.shape[0], -1)


group_order_inv = group_order  # a transposition of 8 x 8 undoes itself


def channel_order(rows: Tensor) -> Tensor:
    """[g, n] in row order -> within 32 rows [row/2 % 4][row/8][row % 2]."""
    return rows.reshape(rows.shape[0], -1, 4, 4, 2).transpose(2, 3).reshape(rows.shape[0], -1)


channel_order_inv = channel_order  # likewise


W4_TILES = Layout("w4_tiles", pack_tiles, unpack_tiles, tile_planes, row_block=lambda problem: 0)
LAYOUTS = (W4_TILES,)

# --- fit ---

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _bits(problem: Problem) -> float:
    return bits_per_weight(problem.scheme)


def fit_gemv(problem: Problem, m: int, target: Target, bits: int = 4) -> Rank | Reject:
    """One row of x."""
    reject = refuse(problem, target, bits, DTYPES, "triton")
    if reject is not None:
        return reject
    if m != 1:
        return Reject(f"runs one row of x, got {m}")
    cost = estimate(problem, m, target, 0.05, _bits(problem), math_bits=16, bandwidth_efficiency=0.75)
    return Rank(cost)


def fit_matmul(problem: Problem, m: int, target: Target, bits: int = 4) -> Rank | Reject:
    """16-bit x of at most MATMUL_ROWS rows."""
    reject = refuse(problem, target, bits, DTYPES, "triton")
    if reject is not None:
        return reject
    if problem.dtype == torch.float32:
        return Reject("tensor cores would round f32 inputs to TF32")
    if m > MATMUL_ROWS:
        return Reject(f"runs at most {MATMUL_ROWS} rows of x, got {m}")
    launches = 2 if _splits(problem, m, target.sm_count) > 1 else 1
    cost = estimate(
        problem, m, target, 0.08, _bits(problem), math_bits=16, bandwidth_efficiency=0.12, tile_m=16, launches=launches
    )  # measured on an H200: far from the roof, so that it serves only where nothing else of its layout fits
    return Rank(cost)


def fit_dequant(problem: Problem, m: int, target: Target, bits: int = 4) -> Rank | Reject:
    """Any m: a copy of the weight in x's dtype, then cuBLAS."""
    reject = refuse(problem, target, bits, DTYPES, "triton")
    if reject is not None:
        return reject
    copy = problem.n * problem.k * problem.dtype.itemsize
    # 0.64: cuBLAS reaches 0.7 of the peak, and the copy is made before it starts.
    efficiency = 0.05 if problem.dtype == torch.float32 else 0.64
    cost = estimate(
        problem, m, target, efficiency, _bits(problem), math_bits=16, tile_m=64, launches=2, extra_bytes=2.0 * copy
    )
    return Rank(cost)


# --- run, 4 bits ---


@lru_cache(maxsize=None)
def _kernels() -> Any:
    from quant_compile.lowering.kernels.weight_only import _triton_w4a16

    return _triton_w4a16


def _pairs(x: Tensor) -> Tensor:
    """x [m, k] of 16 bits, to be read as words of two inputs; k is padded to even."""
    if x.shape[1] % 2:
        x = pad(x, (0, 1))
    return x if aligned(x, 4) else x.clone()


def gemv_config(n: int, k: int, group: int, sm_count: int) -> dict[str, int]:
    """Rows per program (8Q) and warps (W): programs for every SM, and enough loads in flight to cover their latency."""
    tiles = -(-n // TILE_ROWS)
    quads = 4 if tiles >= 2 * sm_count else 2  # measured on an H200 at 4096 to 28672 rows
    columns = 16 * _blocks_per_chunk(group)
    warps = 4
    while warps > 1 and warps * 8 // quads > max(1, -(-k // columns)):
        warps //= 2
    return {"Q": quads, "W": warps, "UNROLL": 1, "STAGES": 1}


def _blocks_per_chunk(group: int) -> int:
    """16-column blocks that a thread adds up under one scale: at most 8, and never across a group."""
    return min(8, max(1, group // 16))


def run_gemv(
    x: Planes, w: Planes, bias: Tensor | None, problem: Problem, config: dict[str, int] | None = None
) -> Tensor:
    """x [1, k] times 4-bit weights in ``w4_tiles`` -> [1, n], f32 sums rounded once.

    Source: this file; codes are multiplied as 128 + q or 2048 + q in f32 and the constants taken off per group.
    """
    scheme, row = problem.scheme, x[0]
    padded_n, padded_k = padded(problem)
    channel = _per_channel(scheme)
    group = 128 if channel else group_of(scheme, problem.k)
    settings = config or gemv_config(problem.n, problem.k, group, sm_count_of(row.device))
    j = _blocks_per_chunk(group)
    chunks = -(-padded_k // (16 * j))
    in_flight = max(1, settings["W"] * 8 // settings["Q"])
    wide = problem.dtype == torch.float32
    y = row.new_empty(1, problem.n)
    enqueue(
        _kernels().gemv_w4_kernel,
        (padded_n // (8 * settings["Q"]),),
        row if wide else _pairs(row),
        w[0],
        w[1],
        None if scheme.weights.symmetric else w[2],
        bias,
        y,
        problem.n,
        problem.k + (0 if wide else problem.k % 2),
        padded_k // 16,
        padded_n,
        1 if channel else w[1].shape[0],
        chunks,
        NEAR,
        FAR,
        0,
        J=j,
        CHUNKS_PER_GROUP=chunks + in_flight if channel else group // (16 * j),
        CHANNEL=channel,
        EVEN=problem.k == chunks * 16 * j and chunks % in_flight == 0,
        X32=wide,
        BF16=problem.dtype == torch.bfloat16,
        S32=wide,
        Q=settings["Q"],
        G=in_flight,
        UNROLL=settings["UNROLL"],
        STAGES=settings["STAGES"],
        OUT=triton_type(problem.dtype),
        num_warps=settings["W"],
    )
    return y


def _decode_arguments(w: Planes, problem: Problem, blocks_per_step: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What every kernel that decodes tiles takes: planes and sizes, and the constants."""
    padded_n, padded_k = padded(problem)
    channel = _per_channel(problem.scheme)
    blocks = padded_k // 16
    group = group_of(problem.scheme, problem.k)
    planes = (w[0], w[1])
    zero = None if problem.scheme.weights.symmetric else w[2]
    constants = {
        "BLOCKS_PER_GROUP": blocks + blocks_per_step if channel else group // 16,
        "CHANNEL": channel,
        "EVEN": blocks % blocks_per_step == 0,
        "BF16": problem.dtype == torch.bfloat16,
        "OUT": triton_type(problem.dtype),
    }
    return (*planes, zero, blocks, padded_n, 1 if channel else w[1].shape[0]), constants


def dequantize(w: Planes, problem: Problem) -> Tensor:
    """``w4_tiles`` -> [n, k] in the problem's dtype, each weight rounded once."""
    tiles, blocks_per_step = 1, 8
    (data, scale, zero, blocks, padded_n, groups), constants = _decode_arguments(w, problem, blocks_per_step)
    out = torch.empty(problem.n, problem.k, dtype=problem.dtype, device=data.device)
    grid = (-(-blocks // blocks_per_step), padded_n // (64 * tiles))
    enqueue(
        _kernels().dequantize_w4_kernel, grid,
        data, scale, zero, out, problem.n, problem.k, blocks, padded_n, groups, NEAR, FAR,
        **constants, S32=problem.dtype == torch.float32, NB=tiles, RB=blocks_per_step, num_warps=4,
    )  # fmt: skip
    return out


def run_dequant(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """x [m, k] times a dequantized copy of the weight, by cuBLAS -> [m, n]."""
    dense = dequantize(w, problem).t()
    return torch.mm(x[0], dense) if bias is None else torch.addmm(bias, x[0], dense)


def matmul_config(m: int) -> dict[str, int]:
    """Tile of ``triton_w4a16``: rows of x (BM), 64-row tiles of w (NB), 16-column blocks a step (RB), warps, stages."""
    if m <= 32:
        return {"BM": 16 if m <= 16 else 32, "NB": 1, "RB": 8, "W": 4, "STAGES": 3}
    if m <= 64:
        return {"BM": 64, "NB": 1, "RB": 4, "W": 4, "STAGES": 3}
    return {"BM": 128, "NB": 2, "RB": 4, "W": 8, "STAGES": 3}


def _splits(problem: Problem, m: int, sm_count: int, config: dict[str, int] | None = None) -> int:
    """Parts of k, so that every SM has about two programs and each part at least 512 columns."""
    settings = config or matmul_config(m)
    programs = -(-problem.n // (64 * settings["NB"])) * -(-m // settings["BM"])
    wanted = max(1, 2 * sm_count // programs)
    return min(wanted, max(1, problem.k // 512), 16)


def recorded_matmul(problem: Problem, m: int, target: Target) -> object:
    """How a launch for m rows is cut up."""
    return tuple(matmul_config(m).items()), _splits(problem, m, target.sm_count)


def run_matmul(
    x: Planes, w: Planes, bias: Tensor | None, problem: Problem, config: dict[str, int] | None = None
) -> Tensor:
    """x [m, k] bf16 or f16 times 4-bit weights decoded in registers, on tensor cores -> [m, n].

    Parts of k are summed in a fixed order, so equal inputs give equal bits.
    """
    rows = x[0]
    m = rows.shape[0]
    settings = config or matmul_config(rows_of(rows))
    (data, scale, zero, blocks, padded_n, groups), constants = _decode_arguments(w, problem, settings["RB"])
    splits = settings.get("SPLITS") or _splits(problem, rows_of(rows), sm_count_of(rows.device), settings)
    per_split = math.ceil(blocks / settings["RB"] / splits) * settings["RB"]
    splits = -(-blocks // per_split)
    y = rows.new_empty(m, problem.n)
    parts = y if splits == 1 else torch.empty(splits, m, problem.n, dtype=torch.float32, device=rows.device)
    grid = (-(-padded_n // (64 * settings["NB"])), -(-m // settings["BM"]), splits)
    enqueue(
        _kernels().matmul_w4_kernel, grid,
        rows, data, scale, zero, bias if splits == 1 else None, parts,
        m, problem.n, problem.k, blocks, padded_n, groups, NEAR, FAR, per_split,
        **constants, BM=settings["BM"], NB=settings["NB"], RB=settings["RB"], SPLIT=splits > 1,
        num_warps=settings["W"], num_stages=settings["STAGES"],
    )  # fmt: skip
    return y if splits == 1 else _sum_parts(parts, None, bias, y)


def _sum_parts(parts: Tensor, scale: Tensor | None, bias: Tensor | None, y: Tensor) -> Tensor:
    """f32 parts [splits, m, n] -> y [m, n]."""
    block = 1024
    enqueue(
        _kernels().sum_parts_kernel,
        (-(-y.numel() // block),),
        parts,
        scale,
        bias,
        y,
        y.numel(),
        y.shape[1],
        parts.shape[0],
        BLOCK=block,
        OUT=triton_type(y.dtype),
        num_warps=4,
    )
    return y


# --- run, 8 bits ---


def _codes8(w: Planes) -> Tensor:
    """int8 codes, or e4m3 as bytes: Triton takes no pointer to e4m3 below sm89."""
    return w[0].view(torch.uint8) if w[0].is_floating_point() else w[0]


def run_gemv8(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """x [1, k] times rows [n, k] of int8 or e4m3 with a scale per row [n, 1] -> [1, n], f32 sums rounded once."""
    n, k = problem.n, problem.k
    rows, columns, warps = 8, 1024, 4
    y = x[0].new_empty(1, n)
    even = n % rows == 0 and k % columns == 0
    enqueue(
        _kernels().gemv_w8_kernel,
        (-(-n // rows),),
        x[0],
        _codes8(w),
        w[1],
        bias,
        y,
        n,
        k,
        EVEN=even,
        BN=rows,
        BK=columns,
        OUT=triton_type(problem.dtype),
        FP8=w[0].is_floating_point(),
        num_warps=warps,
    )
    return y


def _matmul8_config(problem: Problem, m: int, sm_count: int) -> tuple[tuple[int, int, int], int]:
    """Tile (rows of x, rows of w, columns a step) and parts of k of ``triton_w8a16``."""
    bm, bn, bk = (16, 64, 128) if m <= 16 else (64, 64, 64) if m <= 64 else (128, 128, 64)
    programs = -(-problem.n // bn) * -(-m // bm)
    return (bm, bn, bk), min(max(1, 2 * sm_count // programs), max(1, problem.k // 512), 16)


def recorded_matmul8(problem: Problem, m: int, target: Target) -> object:
    """How a launch for m rows is cut up."""
    return _matmul8_config(problem, m, target.sm_count)


def run_matmul8(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """x [m, k] bf16 or f16 times rows [n, k] of int8 or e4m3, exact in 16-bit floats, then the scale per row -> [m, n]."""
    rows, (n, k) = x[0], (problem.n, problem.k)
    m = rows.shape[0]
    (bm, bn, bk), splits = _matmul8_config(problem, rows_of(rows), sm_count_of(rows.device))
    per_split = math.ceil(k / bk / splits) * bk
    splits = -(-k // per_split)
    y = rows.new_empty(m, n)
    parts = y if splits == 1 else torch.empty(splits, m, n, dtype=torch.float32, device=rows.device)
    enqueue(
        _kernels().matmul_w8_kernel, (-(-n // bn), -(-m // bm), splits),
        rows, _codes8(w), w[1], bias, parts, m, n, k, per_split,
        EVEN=k % bk == 0, BM=bm, BN=bn, BK=bk, SPLIT=splits > 1, OUT=triton_type(problem.dtype),
        FP8=w[0].is_floating_point(), num_warps=8 if bm == 128 else 4, num_stages=3,
    )  # fmt: skip
    return y if splits == 1 else _sum_parts(parts, w[1], bias, y)


def run_dequant8(x: Planes, w: Planes, bias: Tensor | None, problem: Problem) -> Tensor:
    """x [m, k] times a dequantized copy of rows of 8 bits, by cuBLAS -> [m, n]."""
    n, k = problem.n, problem.k
    dense = torch.empty(n, k, dtype=problem.dtype, device=w[0].device)
    enqueue(
        _kernels().dequantize_w8_kernel,
        (-(-k // 512), -(-n // 16)),
        _codes8(w),
        w[1],
        dense,
        n,
        k,
        BN=16,
        BK=512,
        OUT=triton_type(problem.dtype),
        FP8=w[0].is_floating_point(),
        num_warps=4,
    )
    return torch.mm(x[0], dense.t()) if bias is None else torch.addmm(bias, x[0], dense.t())


def fit_gemv8(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """One row of x under 8-bit weights."""
    return fit_gemv(problem, m, target, 8)


def fit_matmul8(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """16-bit x of at most MATMUL_ROWS rows under 8-bit weights."""
    return fit_matmul(problem, m, target, 8)


def fit_dequant8(problem: Problem, m: int, target: Target) -> Rank | Reject:
    """Any m under 8-bit weights."""
    return fit_dequant(problem, m, target, 8)


KERNELS = (
    Kernel("triton_w4a16_gemv", "w4_tiles", fit_gemv, run_gemv, recorded=anyhow),
    Kernel("triton_w4a16", "w4_tiles", fit_matmul, run_matmul, recorded=recorded_matmul),
    Kernel("triton_w4a16_dequant", "w4_tiles", fit_dequant, run_dequant, recorded=anyhow),
    Kernel("triton_w8a16_gemv", "rows", fit_gemv8, run_gemv8, recorded=anyhow),
    Kernel("triton_w8a16", "rows", fit_matmul8, run_matmul8, recorded=recorded_matmul8),
    Kernel("triton_w8a16_dequant", "rows", fit_dequant8, run_dequant8, recorded=anyhow),
)
