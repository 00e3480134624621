"""Fused mixture-of-experts blocks in Triton: FP8, INT8, FP8 in blocks, and int8 and int4 weights under 16-bit inputs.

``triton_moe_decode`` for few (token, expert) pairs and ``triton_moe`` for any number of tokens, from planes in row form with a leading
expert ("experts"). The frame of both is ``_frame``, the Triton source ``_triton_moe``.
"""

from __future__ import annotations

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

OLDEST = {"fp8": 89, "fp8_block": 89, "int8": 80, "weight_only": 80}
# sm90's fp8 sum keeps about 14 bits; its error grows like sqrt(k) and passes bf16's own rounding near this k.
IMPRECISE_K = 8192


def groups(scheme: Scheme) -> tuple[int, int]:
    """(rows, columns) of a weight that share a scale inside of a sum; (0, 0) when scales are per row."""
    if scheme.weights.group_size is not None:
        return 1, scheme.weights.group_size
    return scheme.weights.block_structure or (0, 0)


# --- steps of the grouped form ---


def products(
    x: Planes, pairs: Pairs, w13: Planes, b13: Tensor | None, w2: Planes, b2: Tensor | None, scale2: Tensor | None,
    problem: MoeProblem, chosen: Plan,
) -> Tensor:  # fmt: skip
    """All steps between ``align`` and ``add``."""
    hidden = first(x, pairs, w13, b13, scale2, problem, chosen.first)
    if len(hidden) == 1 and problem.scheme.input_activations is not None:
        hidden = quantize(hidden[0], problem)
    return second(hidden, pairs, w2, b2, problem, chosen.second)


def first(
    x: Planes, pairs: Pairs, w13: Planes, b13: Tensor | None, scale2: Tensor | None, problem: MoeProblem, tiles: Tiles
) -> Planes:
    """Hidden layer act(x[token] @ w13[e].T + b13[e]) in the order of ``pairs``.

    Returns:
        ([T k, I] of the problem's dtype,), or its codes and scale where they come at no cost (static scales; groups of
        ``tiles.block_n``).
    """
    p = problem
    device, size = x[0].device, pairs.order.numel()
    limit, code, group = 0.0, p.dtype, 0
    if fuses(p.scheme, tiles.block_n):
        limit, code = code_of(p.scheme)
        group = 0 if p.scheme.static else tiles.block_n
    y = torch.empty((size, p.intermediate), dtype=code, device=device)
    sy = torch.empty((size, ceil(p.intermediate, group)), dtype=torch.float32, device=device) if group else None
    static = scale2 if limit and p.scheme.static else None
    _launch(x, pairs, w13, b13, static, y, sy, limit, p, tiles, gated=True)
    if not limit:
        return (y,)
    return (y, sy) if sy is not None else (y, static if static is not None else x[1])


def quantize(hidden: Tensor, problem: MoeProblem) -> Planes:
    """[rows, I] -> codes and scale [rows, 1 or groups], as the scheme's ``quantize_input`` without a calibrated scale."""
    limit, code = code_of(problem.scheme)
    a = problem.scheme.input_activations
    group = (a.group_size if a is not None else None) or 0
    rows, n = hidden.shape
    codes = torch.empty((rows, n), dtype=code, device=hidden.device)
    scale = torch.empty((rows, ceil(n, group) if group else 1), dtype=torch.float32, device=hidden.device)
    block = max(pow2(n), group, 16)
    source("_triton_moe").quantize_kernel[(rows,)](
        hidden, codes, scale, n, BLOCK=block, GROUP=group, LIMIT=limit, num_warps=min(8, max(1, block // 512))
    )
    return codes, scale


def second(hidden: Planes, pairs: Pairs, w2: Planes, b2: Tensor | None, problem: MoeProblem, tiles: Tiles) -> Tensor:
    """hidden @ w2[e].T + b2[e] as [T k, H] of the problem's dtype, in the order of the pairs; illegal pairs stay unset."""
    y = torch.empty((pairs.order.numel(), problem.hidden), dtype=problem.dtype, device=hidden[0].device)
    _launch(hidden, pairs, w2, b2, None, y, None, 0.0, problem, tiles, gated=False)
    return y


def fuses(scheme: Scheme, block_n: int) -> bool:
    """Whether the first product can quantize its own tile."""
    a = scheme.input_activations
    return a is not None and (scheme.static or a.group_size == block_n)


def _launch(
    x: Planes, pairs: Pairs, w: Planes, bias: Tensor | None, scale2: Tensor | None, y: Tensor, sy: Tensor | None,
    limit: float, problem: MoeProblem, tiles: Tiles, gated: bool,
) -> None:  # fmt: skip
    """One product of the grouped form."""
    scheme = problem.scheme
    n, k = (problem.intermediate, problem.hidden) if gated else (problem.hidden, problem.intermediate)
    group_n, group_k = groups(scheme)
    w4 = scheme.weights.num_bits == 4
    zero = w[2] if w4 and not scheme.weights.symmetric else None
    most = pairs.blocks.shape[1]
    promote = scheme.weights.type == "float" and not group_k and k > IMPRECISE_K
    tma = tiles.tma and w[0].shape[-1] % 16 == 0  # one byte per element, rows must begin at 16 bytes
    data = descriptor(w[0], tiles.block_n, tiles.block_k // (2 if w4 else 1)) if tma else w[0]
    source("_triton_moe").grouped_kernel[(most * ceil(n, tiles.block_n),)](
        x[0], data, x[1] if len(x) > 1 else None, w[1], zero, bias, scale2, y, sy,
        pairs.order, pairs.blocks, most, n, k, w[0].shape[-1], problem.top_k, *scale_strides(x), w[1].stride(0), w[1].stride(1),
        zero.stride(0) if zero is not None else 0, zero.stride(1) if zero is not None else 0,
        GATED=gated, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, BAND=tiles.band,
        EVEN_K=k % tiles.block_k == 0, TMA=tma, W4=w4, GROUP_K=group_k, GROUP_N=group_n, PROMOTE=promote,
        QUANTIZE=limit, **activation_constants(problem.activation), OUT=triton_type(problem.dtype),
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
    unit, constants, zero, strides = _rows_arguments(w13, p, p.hidden, rows)
    data = x[0].view(torch.int32) if unit == 4 else x[0]
    source("_triton_moe").gated_rows_kernel[(p.intermediate // rows.block_n, ids.numel())](
        data, _units(w13[0], unit), x[1] if len(x) > 1 else None, w13[1], zero, b13, ids, y, amax,
        p.intermediate, p.hidden, p.hidden // unit, p.top_k, p.experts, *scale_strides(x), *strides, MAGIC,
        **constants, **activation_constants(p.activation), OUT=triton_type(p.dtype), EARLY=early, num_warps=rows.warps,
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
    unit, constants, zero, strides = _rows_arguments(w2, p, p.intermediate, rows)
    source("_triton_moe").down_rows_kernel[(p.hidden // rows.block_n, ids.shape[0])](
        hidden[0], amax, scale2 if p.scheme.static else None, _units(w2[0], unit), w2[1], zero, b2, ids, weights, y,
        p.hidden, p.intermediate, p.intermediate // unit, p.top_k, p.experts, parts, *strides, MAGIC,
        **common, **constants, EARLY=early, num_warps=rows.warps, launch_pdl=early,
    )  # fmt: skip
    return y


def _unit(scheme: Scheme) -> int:
    """Weights per loaded unit: 32-bit words of 4-bit codes, and of int8 where dp4a multiplies them."""
    if scheme.weights.num_bits == 4:
        return 8
    return 4 if scheme.input_activations is not None and scheme.weights.type == "int" and not interpreted() else 1


def _units(data: Tensor, unit: int) -> Tensor:
    return data if unit == 1 else data.view(torch.int32)


def _rows_arguments(
    w: Planes, problem: MoeProblem, k: int, rows: Rows
) -> tuple[int, dict[str, Any], Tensor | None, tuple[int, int, int, int]]:
    """(unit, constants, zero points, strides of scales and zero points) of one product of the decode form."""
    scheme = problem.scheme
    unit = _unit(scheme)
    group_n, group_k = groups(scheme)
    zero = w[2] if unit == 8 and not scheme.weights.symmetric else None
    constants = {
        "BLOCK_N": rows.block_n,
        "BLOCK": rows.block_k // unit,
        "UNIT": unit,
        "VECTOR": min(4, (group_k or 32) // 8) if unit == 8 else 16 // unit,
        "EVEN": k % rows.block_k == 0,
        "GROUP_K": group_k,
        "GROUP_N": group_n,
    }
    moves = (zero.stride(0), zero.stride(1)) if zero is not None else (0, 0)
    return unit, constants, zero, (w[1].stride(0), w[1].stride(1), *moves)


# --- choice ---


def plan(problem: MoeProblem, tokens: int, target: Target) -> Plan:
    """How ``triton_moe`` runs this many tokens on ``target``, without measurement."""
    # An expert with more pairs than a block is read again: leave room above the mean, less where weights are decoded.
    few = _form(problem.scheme) == "weights"
    mean = (0.75 if few else 1.25) * tokens * problem.top_k / problem.experts
    most = 64 if few or groups(problem.scheme)[1] else 128
    block_m = min(most, max(16, pow2(int(mean))))
    return Plan(_tiles(problem, block_m, True, target), _tiles(problem, block_m, False, target))


# Measured on a H200 (benchmarks/tune_moe.py): block_m -> block_n, warps, stages, descriptors; by form and whether gated.
HOPPER: dict[tuple[str, bool], dict[int, tuple[int, int, int, bool]]] = {
    ("rows", True): {16: (64, 4, 5, False), 32: (64, 4, 5, False), 64: (64, 4, 3, True), 128: (128, 8, 4, True)},
    ("rows", False): {16: (64, 4, 5, False), 32: (128, 8, 4, False), 64: (128, 4, 3, True), 128: (128, 4, 3, True)},
    ("groups", True): {16: (128, 4, 3, True), 32: (128, 4, 3, True), 64: (128, 8, 4, True)},
    ("groups", False): {16: (64, 4, 5, False), 32: (128, 4, 3, True), 64: (128, 4, 3, True)},
    ("weights", True): {16: (64, 4, 3, True), 32: (64, 4, 3, True), 64: (64, 4, 3, True)},
    ("weights", False): {16: (128, 4, 3, True), 32: (128, 4, 3, True), 64: (128, 4, 3, True)},
}


def _form(scheme: Scheme) -> str:
    """Quantized inputs with scales of whole rows, or of groups; or 16-bit inputs."""
    a = scheme.input_activations
    if a is None:
        return "weights"
    return "rows" if a.group_size is None else "groups"


def _tiles(problem: MoeProblem, block_m: int, gated: bool, target: Target) -> Tiles:
    scheme, form = problem.scheme, _form(problem.scheme)
    block_k = min(128, groups(scheme)[1] or 128)
    tma = False
    if 90 <= target.arch < 120:
        block_n, warps, deepest, tma = HOPPER[form, gated][block_m]
        if form == "rows" and not gated and problem.intermediate > IMPRECISE_K:
            warps, deepest = 8, 4  # sums that are promoted need the registers of 8 warps
    else:
        block_n = 64
        warps, deepest = 0, 5
    group = scheme.input_activations.group_size if scheme.input_activations is not None else None
    if gated and group in (64, 128):
        block_n = group
    rows = (2 if gated else 1) * block_n
    step = block_k * (rows * scheme.weights.num_bits + block_m * (16 if form == "weights" else 8)) // 8
    memory = shared_memory(target)
    stages = max(2, min(deepest, memory // step))
    return Tiles(block_m, block_n, block_k, warps or (8 if rows * block_m >= 128 * 64 else 4), stages, tma=tma)


def decode_plan(problem: MoeProblem, target: Target) -> DecodePlan:
    """How ``triton_moe_decode`` runs, without measurement: 16 bytes per thread and row."""
    group_n, group_k = groups(problem.scheme)
    bits, experts = problem.scheme.weights.num_bits, pow2(problem.top_k)
    least = max(128, group_k)
    first = _step(problem.hidden, 4 * 32 * 128 // bits, least)
    second = _step(problem.intermediate, 4 * 32 * 128 // bits // experts, least)
    # Eight bits: two loads of a row per thread before the first multiplication; more rows where that is the whole sum.
    wide = bits == 8
    one_step = wide and first >= problem.hidden
    return DecodePlan(
        Rows(_rows(8 if one_step else 4, group_n), first, warps_of(first * bits // (2 if wide else 1))),
        Rows(
            _rows(8 if wide and not group_k else 4, group_n),
            second,
            warps_of(second * bits * experts * (2 if wide else 1)),
        ),
        early=target.arch >= 90,
    )


def _rows(most: int, group_n: int) -> int:
    """``most`` rows of a weight, or as many as share a scale."""
    return gcd(most, group_n) if group_n > 1 else most


def _step(k: int, most: int, least: int) -> int:
    """A step of at most ``most`` inputs that divides k, or ``most`` where only steps below ``least`` do."""
    most = max(least, min(most, pow2(k)))
    step = gcd(k, most)
    return step if step >= min(512, most) else most


def serves(scheme: Scheme) -> bool:
    """Whether a scheme's family is one of this file's."""
    return family_of(scheme).name in OLDEST


def _reject(problem: MoeProblem, target: Target) -> Reject | None:
    family = family_of(problem.scheme).name
    if not serves(problem.scheme):
        return Reject(f"multiplies 8-bit weights, or int4 weights under 16-bit inputs, not {problem.scheme.spec}")
    return reject_block(problem, target, OLDEST[family]) or _reject_scheme(problem.scheme, family)


def _reject_scheme(scheme: Scheme, family: str) -> Reject | None:
    a = scheme.input_activations
    if a is None and family != "weight_only":
        return Reject("16-bit inputs are not multiplied by 8-bit floats here")
    if a is not None and a.strategy == "tensor" and a.dynamic:
        return Reject("one dynamic scale for all tokens of an expert is not computed here")
    columns = groups(scheme)[1]
    least = 32 if family == "fp8_block" else 16
    if (columns % 128 and columns not in (16, 32, 64)) or 0 < columns < least:
        return Reject(f"groups must have 32, 64 or a multiple of 128 columns, got {columns}")
    return None


def fit(problem: MoeProblem, tokens: int, target: Target) -> Rank | Reject:
    """Any number of tokens; FP8 from sm89, INT8 and 16-bit inputs from sm80."""
    refusal = _reject(problem, target)
    if refusal is not None:
        return refusal
    p, chosen = problem, plan(problem, tokens, target)
    between = tokens * p.top_k * (p.hidden + 2.0 * p.intermediate) * p.dtype.itemsize * 2
    fused = p.scheme.input_activations is None or fuses(p.scheme, chosen.first.block_n)
    return grouped_rank(
        p,
        tokens,
        target,
        chosen.block_m,
        between=between,
        launches=4 + (not fused),
        efficiency=0.4,
        bandwidth_efficiency=0.8,
    )


def fit_decode(problem: MoeProblem, tokens: int, target: Target) -> Rank | Reject:
    """Few tokens: at most DECODE_PAIRS pairs."""
    refusal = _reject(problem, target) or few_pairs(problem, tokens)
    if refusal is not None:
        return refusal
    limits, p = roof(target), problem
    # Scales of groups in the second product cost it half of the bandwidth (measured).
    efficiency = 0.6 if groups(p.scheme)[1] and p.scheme.input_activations is not None else 0.85
    memory = decode_bytes(p, tokens) / (limits.bandwidth * efficiency)
    # Bound by converting and multiplying on ordinary cores: about a sixtieth of the tensor cores' 8-bit rate.
    math = 2.0 * (tokens * p.top_k) * (3.0 * p.hidden * p.intermediate) / (limits.math8 / 60)
    return Rank(limits.launch * 2 + max(memory, math))


run, launch = grouped(plan, products)
run_decode, launch_decode = decode(decode_plan, gated_rows, down_rows)
MOE_KERNELS = (
    MoeKernel("triton_moe_decode", "experts", fit_decode, run_decode),
    MoeKernel("triton_moe", "experts", fit, run),
)
