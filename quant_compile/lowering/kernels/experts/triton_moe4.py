"""Fused mixture-of-experts blocks with 4-bit weights in Triton: int4 under int8 or e4m3 inputs (W4A8, W4AFP8, QServe's two
forms), FP4 under 16-bit inputs (NVFP4A16, MXFP4A16).

``triton_moe4_decode`` for few (token, expert) pairs and ``triton_moe4`` for any number of tokens, from planes in row form
("experts"). The frame of both is ``_frame``, the Triton source ``_triton_moe4``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, Reject, family_of
from quant_compile.ir.moe import MoeProblem
from quant_compile.ir.scheme import Scheme
from quant_compile.lowering.kernels._launch import ceil, descriptor, pow2, triton_type
from quant_compile.lowering.kernels._roofline import roof, shared_memory
from quant_compile.lowering.kernels.experts._frame import (
    MAGIC,
    DecodePlan,
    Pairs,
    Plan,
    Rows,
    Tiles,
    activation_constants,
    code_of,
    decode,
    decode_bytes,
    down_arguments,
    few_pairs,
    grouped,
    grouped_rank,
    hidden_rows,
    interpreted,
    reject_block,
    scale_strides,
    source,
    warps_of,
)
from quant_compile.lowering.moe import MoeKernel
from quant_compile.lowering.registry import Rank
from quant_compile.lowering.target import Target

WHOLE_ROW = 1 << 24  # columns of a group that no row is longer than
LEAST_GROUP = 64  # 8-bit tensor cores take 32 codes at a time, and a step is half a group: its even or its odd columns


def format_of(scheme: Scheme) -> str:
    """What the kernels multiply: ``fp4`` codes by 16-bit inputs, or int4 codes by ``int8`` or ``float8`` inputs."""
    if scheme.weights.format == "e2m1":
        return "fp4"
    a = scheme.input_activations
    return "float8" if a is not None and a.type == "float" else "int8"


@dataclass(frozen=True)
class Weights:
    """Planes of all experts as the kernels take them.

    Attributes:
        codes: two nibbles a byte.
        scale: [E, n, g] of groups (those of FP4 as bytes), or of rows where ``whole`` is None and g is 1.
        whole: [E, n, 1] above scales of groups: NVFP4's global scale, QServe's scale of rows.
        zero: [E, n, g] zero points of QServe; None: 8.
    """

    codes: Tensor
    scale: Tensor
    whole: Tensor | None = None
    zero: Tensor | None = None


def _weights(planes: Planes, scheme: Scheme) -> Weights:
    if family_of(scheme).name == "qserve":
        codes, scale, zero = planes[0], planes[1], planes[-1]
        return Weights(codes, scale, None, zero) if len(planes) == 3 else Weights(codes, planes[2], scale, zero)
    codes, scale = planes[:2]
    scale = scale.view(torch.uint8) if format_of(scheme) == "fp4" else scale
    return Weights(codes, scale, planes[2] if len(planes) > 2 else None)


def group_of(scheme: Scheme, codes: int) -> int:
    """Units of ``codes`` codes that share a scale (and zero point); 0: scales of rows, applied at the end."""
    if family_of(scheme).name == "qserve" and scheme.weights.group_size is None:
        return WHOLE_ROW // codes
    return (scheme.weights.group_size or 0) // codes


# --- steps of the grouped form ---


def products(
    x: Planes, pairs: Pairs, w13: Planes, b13: Tensor | None, w2: Planes, b2: Tensor | None, scale2: Tensor | None,
    problem: MoeProblem, chosen: Plan,
) -> Tensor:  # fmt: skip
    """All steps between ``align`` and ``add``."""
    hidden = first(x, pairs, w13, b13, scale2, problem, chosen.first)
    return second(hidden, pairs, w2, b2, problem, chosen.second)


def codes_of(scheme: Scheme) -> int:
    """Codes in a unit that the grouped form reads: words of FP4, bytes of int4."""
    return 8 if format_of(scheme) == "fp4" else 2


def parts_of(scheme: Scheme, tiles: Tiles) -> int:
    """Parts of a row in split order; 1 is the plain order."""
    return 1 if tiles.joined else codes_of(scheme)


def split(x: Tensor, parts: int) -> Tensor:
    """[T, k] -> the same rows in split order: columns 0, parts, 2 parts.., then 1, parts + 1.."""
    if parts == 1:
        return x
    y = torch.empty_like(x)
    tokens, size = x.shape[0], x.shape[1] // parts
    block = min(1024 // parts, pow2(size))
    codes = torch.int8 if x.dtype.itemsize == 1 else torch.int16
    source("_triton_moe4").split_kernel[(tokens, ceil(size, block))](
        x.view(codes), y.view(codes), size, BLOCK=block, PARTS=parts, num_warps=4
    )
    return y


def first(
    x: Planes, pairs: Pairs, w13: Planes, b13: Tensor | None, scale2: Tensor | None, problem: MoeProblem, tiles: Tiles
) -> Planes:
    """Hidden layer act(x[token] @ w13[e].T + b13[e]) in the order of ``pairs``, quantized where the scheme says so.

    Returns:
        What ``second`` takes: data [T k, I] in split order (the problem's dtype or codes), then the scale of codes.
    """
    hidden = product(x, pairs, w13, b13, problem, tiles)
    if problem.scheme.input_activations is None:
        return (hidden,)
    return quantize(hidden, problem, scale2 if problem.scheme.static else None)


def product(x: Planes, pairs: Pairs, w13: Planes, b13: Tensor | None, problem: MoeProblem, tiles: Tiles) -> Tensor:
    """``first`` before it is quantized: [T k, I] of the problem's dtype; FP4's in split order, others' as columns come."""
    y = torch.empty((pairs.order.numel(), problem.intermediate), dtype=problem.dtype, device=x[0].device)
    tokens = split(x[0], parts_of(problem.scheme, tiles))
    _launch((tokens, *x[1:]), pairs, w13, b13, y, problem, tiles, gated=True)
    return y


def quantize(hidden: Tensor, problem: MoeProblem, scale2: Tensor | None = None) -> Planes:
    """[rows, I] -> codes in split order and scale ([rows, 1], or the calibrated ``scale2`` [1] as it is)."""
    limit, code = code_of(problem.scheme)
    rows, n = hidden.shape
    codes = torch.empty((rows, n), dtype=code, device=hidden.device)
    scale = scale2 if scale2 is not None else torch.empty((rows, 1), dtype=torch.float32, device=hidden.device)
    block = pow2(n // 2)
    source("_triton_moe4").quantize_split_kernel[(rows,)](
        hidden, scale2, codes, scale, n // 2, BLOCK=block, LIMIT=limit, num_warps=min(8, max(1, block // 256))
    )
    return codes, scale


def second(hidden: Planes, pairs: Pairs, w2: Planes, b2: Tensor | None, problem: MoeProblem, tiles: Tiles) -> Tensor:
    """hidden (in split order) @ w2[e].T + b2[e] as [T k, H], in the order of the pairs; illegal pairs stay unset."""
    y = torch.empty((pairs.order.numel(), problem.hidden), dtype=problem.dtype, device=hidden[0].device)
    _launch(hidden, pairs, w2, b2, y, problem, tiles, gated=False)
    return y


def _launch(
    x: Planes, pairs: Pairs, w: Planes, bias: Tensor | None, y: Tensor, problem: MoeProblem, tiles: Tiles, gated: bool
) -> None:
    """One product of the grouped form."""
    own, codes, most = _weights(w, problem.scheme), codes_of(problem.scheme), pairs.blocks.shape[1]
    data = own.codes.view(torch.int32) if codes == 8 else own.codes
    n, width, step = y.shape[1], data.shape[-1], tiles.block_k // codes
    tma = tiles.tma and width * data.itemsize % 16 == 0
    source("_triton_moe4").grouped4_kernel[(most * ceil(n, tiles.block_n),)](
        x[0], descriptor(data, tiles.block_n, step) if tma else data, x[1] if len(x) > 1 else None,
        own.scale, own.whole, own.zero, bias, y,
        pairs.order, pairs.blocks, most, n, width, own.scale.shape[-1], problem.top_k, scale_strides(x)[0],
        GATED=gated, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, STEP=step, BAND=tiles.band, EVEN=width % step == 0,
        TMA=tma, FORMAT=format_of(problem.scheme), PARTS=parts_of(problem.scheme, tiles),
        GROUP=group_of(problem.scheme, codes),
        **activation_constants(problem.activation), OUT=triton_type(problem.dtype), ASM=not interpreted(),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


# --- steps of the decode form ---


def gated_rows(
    x: Planes, ids: Tensor, w13: Planes, b13: Tensor | None, problem: MoeProblem, rows: Rows, early: bool = False
) -> Planes:
    """Hidden layer of each pair, unsorted: ([T k, I],), then the largest magnitude of each ``rows.block_n`` values
    [T k, I / block_n] f32 where the scheme needs one scale per row. ``early``: the next kernel may start at once."""
    p = problem
    y, amax = hidden_rows(ids, p, rows)
    w = _weights(w13, p.scheme)
    inputs = x[0].view(torch.int64) if format_of(p.scheme) == "int8" else x[0]
    source("_triton_moe4").gated_rows4_kernel[(p.intermediate // rows.block_n, ids.numel())](
        inputs, w.codes.view(torch.int32), x[1] if len(x) > 1 else None, w.scale, w.whole, w.zero, b13, ids, y, amax,
        p.intermediate, p.hidden // 8, w.scale.shape[-1], p.top_k, p.experts, scale_strides(x)[0], MAGIC,
        **_row_constants(p, p.hidden, rows), **activation_constants(p.activation), OUT=triton_type(p.dtype), EARLY=early,
        num_warps=rows.warps,
    )  # fmt: skip
    return (y,) if amax is None else (y, amax)


def down_rows(
    hidden: Planes, ids: Tensor, weights: Tensor | None, w2: Planes, b2: Tensor | None, scale2: Tensor | None,
    problem: MoeProblem, rows: Rows, early: bool = False,
) -> Tensor:  # fmt: skip
    """Quantizes the result of ``gated_rows`` and multiplies, weights and adds it -> [T, H] of the problem's dtype.

    ``early``: only straight after ``gated_rows`` with the same; anything older than that is complete, hidden rows are waited for.
    """
    p = problem
    y = torch.empty((ids.shape[0], p.hidden), dtype=p.dtype, device=ids.device)
    amax, parts, common = down_arguments(hidden, p)
    w = _weights(w2, p.scheme)
    source("_triton_moe4").down_rows4_kernel[(p.hidden // rows.block_n, ids.shape[0])](
        hidden[0], amax, scale2 if p.scheme.static else None, w.codes.view(torch.int32),
        w.scale, w.whole, w.zero, b2, ids, weights, y,
        p.hidden, p.intermediate // 8, w.scale.shape[-1], p.top_k, p.experts, parts, MAGIC,
        **common, **_row_constants(p, p.intermediate, rows), EARLY=early, num_warps=rows.warps, launch_pdl=early,
    )  # fmt: skip
    return y


def _row_constants(problem: MoeProblem, k: int, rows: Rows) -> dict[str, Any]:
    """What both kernels of the decode form take; sizes in words of eight codes."""
    group = group_of(problem.scheme, 8)
    return {
        "BLOCK_N": rows.block_n,
        "BLOCK": rows.block_k // 8,
        "VECTOR": min(4, group or 4),
        "EVEN": k % rows.block_k == 0,
        "FORMAT": format_of(problem.scheme),
        "GROUP": group,
        "ASM": not interpreted(),
    }


# --- choice ---


def plan(problem: MoeProblem, tokens: int, target: Target) -> Plan:
    """How ``triton_moe4`` runs this many tokens on ``target``, without measurement."""
    mean = tokens * problem.top_k / problem.experts
    block_m = min(64, max(16, pow2(int(mean))))
    return Plan(_tiles(problem, block_m, True, target), _tiles(problem, block_m, False, target))


def _tiles(problem: MoeProblem, block_m: int, gated: bool, target: Target) -> Tiles:
    scheme = problem.scheme
    fp4 = format_of(scheme) == "fp4"
    # A product for each place of a word would take more tensor memory than sm100 has.
    joined = fp4 and 100 <= target.arch < 120
    if fp4:  # NVFP4A16 on a H200: programs that share a multiprocessor do more than deep pipelines
        # Eight matrices in registers and a wide product beside them spill on the tensor cores of other archs.
        narrow = block_m == 64 and not 90 <= target.arch < 120
        block_n, block_k, deepest = 64, 128 if joined or narrow else 256, 3 if block_m == 16 else 2
        warps = 8 if narrow else 4
    elif gated and block_m == 16 and 90 <= target.arch < 100 and scheme.weights.group_size == 128:
        return Tiles(block_m, 128, 128, 8, 4, tma=True)  # W4A8 on a H200: a quarter faster than without descriptors
    else:
        block_n = 64 if gated or block_m > 32 else 128
        block_k, deepest, warps = min(128, scheme.weights.group_size or 128), 4, 4
    step = block_k * ((2 if gated else 1) * block_n * 4 + block_m * (16 if fp4 else 8)) // 8
    memory = shared_memory(target)
    return Tiles(block_m, block_n, block_k, warps, max(2, min(deepest, memory // step)), joined=joined)


def decode_plan(problem: MoeProblem, target: Target) -> DecodePlan:
    """How ``triton_moe4_decode`` runs, without measurement: 16 bytes per thread and row where a step divides k."""
    experts, group = pow2(problem.top_k), problem.scheme.weights.group_size or 0
    fp4 = format_of(problem.scheme) == "fp4"
    # NVFP4A16 on a H200: two steps of half the size are faster than one, which holds twice the registers.
    first = _row_step(problem.hidden, min(2048, pow2(problem.hidden) // 2) if fp4 else 4096, group)
    second = _row_step(problem.intermediate, 4096 // experts, group)
    whole = _row_step(1 << 20, 4096 // experts, group)
    return DecodePlan(
        Rows(4, first, warps_of(first * 4)), Rows(4, second, warps_of(whole * 4 * experts)), target.arch >= 90
    )


def _row_step(k: int, most: int, group: int) -> int:
    """The largest step up to ``most`` inputs that divides k, or ``most`` where only short ones do; whole groups."""
    most = max(128, group, min(most, pow2(k)))
    step = gcd(k, most)
    return step if step >= max(group, min(256, most)) else most


def _reject(problem: MoeProblem, target: Target) -> Reject | None:
    scheme, family = problem.scheme, family_of(problem.scheme).name
    a = scheme.input_activations
    if family not in ("w4a8", "qserve", "nvfp4", "mxfp4") or (family in ("nvfp4", "mxfp4") and a is not None):
        return Reject(
            f"multiplies int4 weights under 8-bit inputs and FP4 weights under 16-bit inputs, not {scheme.spec}"
        )
    refusal = reject_block(problem, target, 89 if format_of(scheme) == "float8" else 80)
    if refusal is not None:
        return refusal
    if a is not None and a.strategy == "tensor" and a.dynamic:
        return Reject("one dynamic scale for all tokens of an expert is not computed here")
    group = scheme.weights.group_size or LEAST_GROUP
    if family in ("w4a8", "qserve") and group < LEAST_GROUP:
        return Reject(f"groups must have at least {LEAST_GROUP} columns, got {group}")
    if family == "mxfp4" and (problem.hidden % 32 or problem.intermediate % 32):
        return Reject(
            f"sizes must be multiples of 32, got hidden {problem.hidden}, intermediate {problem.intermediate}"
        )
    return None


def fit(problem: MoeProblem, tokens: int, target: Target) -> Rank | Reject:
    """Any number of tokens; e4m3 inputs from sm89, others from sm80."""
    refusal = _reject(problem, target)
    if refusal is not None:
        return refusal
    p, chosen = problem, plan(problem, tokens, target)
    pairs, quantized = tokens * p.top_k, p.scheme.input_activations is not None
    between = (pairs * (p.hidden + 2.0 * p.intermediate) * 2 + tokens * p.hidden * 2) * p.dtype.itemsize
    return grouped_rank(
        p,
        tokens,
        target,
        chosen.block_m,
        between=between,
        launches=5 + quantized,
        efficiency=0.3,
        bandwidth_efficiency=0.6,
    )


def fit_decode(problem: MoeProblem, tokens: int, target: Target) -> Rank | Reject:
    """Few tokens: at most DECODE_PAIRS pairs."""
    refusal = _reject(problem, target) or few_pairs(problem, tokens)
    if refusal is not None:
        return refusal
    limits = roof(target)
    return Rank(limits.launch * 2 + decode_bytes(problem, tokens) / (limits.bandwidth * 0.5))


run, launch = grouped(plan, products)
run_decode, launch_decode = decode(decode_plan, gated_rows, down_rows)
MOE_KERNELS = (
    MoeKernel("triton_moe4_decode", "experts", fit_decode, run_decode),
    MoeKernel("triton_moe4", "experts", fit, run),
)
