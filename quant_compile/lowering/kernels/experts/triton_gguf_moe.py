"""Fused mixture-of-experts blocks with GGUF weights (Q8_0, Q4_0, Q4_K, Q5_K, Q6_K) under 16-bit inputs in Triton.

``triton_gguf_moe_decode`` for few (token, expert) pairs and ``triton_gguf_moe`` for any number of tokens, from the layout
``experts_gguf_planes``: ``gguf_planes`` of each expert, one after the other. Each of the two products has a type of its own. The
frame is ``_frame``, the Triton source ``_triton_gguf_moe``. MXFP4 blocks are multiplied by ``triton_moe4`` as MXFP4A16
(``experts_gguf_mxfp4``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, PlaneSpec, Reject, family_of
from quant_compile.ir.moe import MoeProblem
from quant_compile.ir.scheme import parse
from quant_compile.lowering.kernels._launch import ceil, pow2, triton_type
from quant_compile.lowering.kernels._roofline import roof
from quant_compile.lowering.kernels.experts import triton_moe4
from quant_compile.lowering.kernels.experts._frame import (
    DecodePlan,
    Pairs,
    Plan,
    Rows,
    Tiles,
    activation_constants,
    add,
    decode,
    decode_bytes,
    few_pairs,
    grouped,
    grouped_rank,
    interpreted,
    reject_block,
    source,
)
from quant_compile.lowering.kernels.gguf import triton_gguf as dense
from quant_compile.lowering.kernels.gguf import triton_gguf_mxfp4
from quant_compile.lowering.kernels.gguf.triton_gguf import BYTE, FAR, FORMS, GROUP, NEAR, Form, weight_of
from quant_compile.lowering.moe import MoeKernel, MoeLayout
from quant_compile.lowering.registry import Layout, Problem, Rank
from quant_compile.lowering.schemes.gguf import block_of
from quant_compile.lowering.target import Target

STACKED_PLANES = "experts_gguf_planes"


# --- layouts ---


def _one(problem: MoeProblem, n: int, k: int) -> Problem:
    """One expert's weight as a linear."""
    return Problem(problem.scheme, n, k, problem.dtype)


def _stacked(name: str, layout: Layout) -> MoeLayout:
    """A layout of linears, for each expert."""

    def planes(problem: MoeProblem, n: int, k: int) -> tuple[PlaneSpec, ...]:
        specs = layout.planes(_one(problem, n, k))
        return tuple(PlaneSpec(s.name, (problem.experts, *s.shape), s.dtype) for s in specs)

    return MoeLayout(
        name,
        planes,
        lambda rows, problem, n, k: layout.pack(rows, _one(problem, n, k)),
        lambda packed, problem, n, k: layout.unpack(packed, _one(problem, n, k)),
    )


MOE_LAYOUTS = (
    _stacked(STACKED_PLANES, dense.GGUF_PLANES),
    _stacked("experts_gguf_mxfp4", triton_gguf_mxfp4.LAYOUTS[0]),
)


def _form(problem: MoeProblem) -> Form:
    """How the codes of a block of one scheme lie, or of the weight whose half it is."""
    return FORMS[block_of(problem.scheme).name]


def _constants(problem: MoeProblem) -> dict[str, Any]:
    """What both forms take of a half: how codes and scales lie, the activation, and the dtype."""
    activation = activation_constants(problem.activation)
    activation["ACT"] = activation.pop("KIND")
    return {**_form(problem).constants, **activation, "OUT": triton_type(problem.dtype)}


# --- steps of the grouped form ---


def products(
    x: Planes, pairs: Pairs, w13: Planes, b13: Tensor | None, w2: Planes, b2: Tensor | None, scale2: Tensor | None,
    problem: MoeProblem, chosen: Plan,
) -> Tensor:  # fmt: skip
    """All steps between ``align`` and ``add``."""
    first, second = problem.halves
    by_place, step = _placed(first, problem.hidden, chosen.first), chosen.first.block_k // GROUP
    tokens = dense.by_place(x[0], step) if by_place else x[0]
    following = chosen.second.block_k // GROUP if _placed(second, problem.intermediate, chosen.second) else 0
    hidden = product(tokens, pairs, w13, b13, first, chosen.first, gated=True, placed=by_place, following=following)
    return product(hidden, pairs, w2, b2, second, chosen.second, gated=False, placed=following > 0)


def _placed(problem: MoeProblem, k: int, tiles: Tiles) -> bool:
    """Whether the product takes inputs whose columns are ordered by place."""
    return _form(problem).bits != 8 and k % tiles.block_k == 0


def product(
    x: Tensor, pairs: Pairs, w: Planes, bias: Tensor | None, problem: MoeProblem, tiles: Tiles, *,
    gated: bool, placed: bool, following: int = 0,
) -> Tensor:  # fmt: skip
    """Tokens x to the hidden layer [T k, I] in the order of ``pairs``, or that to [T k, H] in the order of the pairs themselves.

    Args:
        placed: x's columns are ordered by place, in steps of the tiles.
        following: groups of the steps for which y's columns are ordered so; 0: they are not.
    """
    n, k = (problem.intermediate, problem.hidden) if gated else (problem.hidden, problem.intermediate)
    y = torch.empty((pairs.order.numel(), n), dtype=problem.dtype, device=x.device)
    groups, step, most = k // GROUP, tiles.block_k // GROUP, pairs.blocks.shape[1]
    source("_triton_gguf_moe").grouped_kernel[(most * ceil(n, tiles.block_n),)](
        x, *weight_of(w, _form(problem)).tensors, bias, y, pairs.order, pairs.blocks, most, n, groups, problem.top_k,
        GATED=gated, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, G=step, BAND=tiles.band, EVEN=groups % step == 0,
        **_constants(problem), ASM=not interpreted(), PLACED=placed, NEXT=following,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return y


# --- steps of the decode form ---


def gated_rows(
    x: Planes, ids: Tensor, w13: Planes, b13: Tensor | None, problem: MoeProblem, rows: Rows, early: bool = False
) -> Planes:
    """Hidden layer of each pair, unsorted: ([T k, I],)."""
    return (_rows(x[0], ids, w13, b13, problem.halves[0], rows, gated=True),)


def down_rows(
    hidden: Planes, ids: Tensor, weights: Tensor | None, w2: Planes, b2: Tensor | None, scale2: Tensor | None,
    problem: MoeProblem, rows: Rows, early: bool = False,
) -> Tensor:  # fmt: skip
    """Multiplies the result of ``gated_rows``, weights and adds it -> [T, H] of the problem's dtype."""
    return add(_rows(hidden[0], ids, w2, b2, problem.halves[1], rows, gated=False), ids, weights, problem)


def _rows(
    x: Tensor, ids: Tensor, w: Planes, bias: Tensor | None, problem: MoeProblem, rows: Rows, *, gated: bool
) -> Tensor:
    p = problem
    n, k = (p.intermediate, p.hidden) if gated else (p.hidden, p.intermediate)
    y = torch.empty((ids.numel(), n), dtype=p.dtype, device=ids.device)
    groups, step = k // GROUP, rows.block_k // GROUP
    source("_triton_gguf_moe").rows_kernel[(n // rows.block_n, ids.numel())](
        x, *weight_of(w, _form(p)).tensors, bias, ids, y, n, groups, p.top_k, p.experts, NEAR, FAR, BYTE, 0,
        GATED=gated, BN=rows.block_n, G=step, EVEN=groups % step == 0, BF16=p.dtype == torch.bfloat16,
        **_constants(p), num_warps=rows.warps,
    )  # fmt: skip
    return y


# --- choice ---


def plan(problem: MoeProblem, tokens: int, target: Target) -> Plan:
    """How ``triton_gguf_moe`` runs this many tokens on ``target``, without measurement."""
    # Eight matrices of weights beside a wide product: only wgmma and tcgen05 leave the registers for it.
    most = 64 if 90 <= target.arch < 120 else 32
    block_m = min(most, max(16, pow2(int(tokens * problem.top_k / problem.experts))))
    # Two warps have mma.sync alone, and seldom wait for each other.
    warps = 2 if block_m == 16 else 4
    first, second = (Tiles(block_m, 64, 64 if _form(half).bits == 8 else 128, warps, 3) for half in problem.halves)
    return Plan(first, second)


def decode_plan(problem: MoeProblem, target: Target) -> DecodePlan:
    """How ``triton_gguf_moe_decode`` runs: one warp, whose threads read a group of eight rows (of 5 and 6 bits four) at a time."""
    first, second = (4 if _form(half).bits in (5, 6) else 8 for half in problem.halves)
    return DecodePlan(Rows(first // 2, 32 * GROUP, 1), Rows(second // 2, 32 * GROUP, 1))


def _reject(problem: MoeProblem, target: Target) -> Reject | None:
    for scheme in problem.schemes:
        if family_of(scheme).name != "gguf":
            return Reject("serves weights in GGUF blocks")
        if block_of(scheme).name not in FORMS:
            return Reject(f"takes apart {', '.join(name.upper() for name in FORMS)}, not {scheme.spec}")
    return reject_block(problem, target, 80)


def fit(problem: MoeProblem, tokens: int, target: Target) -> Rank | Reject:
    """Any number of tokens, sm80 and newer."""
    refusal = _reject(problem, target)
    if refusal is not None:
        return refusal
    p = problem
    between = tokens * p.top_k * (p.hidden + 2.0 * p.intermediate) * p.dtype.itemsize * 2
    return grouped_rank(
        p, tokens, target, plan(p, tokens, target).block_m,
        between=between, launches=4, efficiency=0.25, bandwidth_efficiency=0.4,
    )  # fmt: skip


def fit_decode(problem: MoeProblem, tokens: int, target: Target) -> Rank | Reject:
    """Few tokens: at most DECODE_PAIRS pairs."""
    refusal = _reject(problem, target) or few_pairs(problem, tokens)
    if refusal is not None:
        return refusal
    limits = roof(target)
    return Rank(limits.launch * 3 + decode_bytes(problem, tokens) / (limits.bandwidth * 0.55))


run, launch = grouped(plan, products)
run_decode, launch_decode = decode(decode_plan, gated_rows, down_rows)


# --- MXFP4, as the family mxfp4 multiplies it ---


def _same_numbers(problem: MoeProblem) -> MoeProblem:
    return replace(problem, scheme=parse("MXFP4A16"))


def _fit_mxfp4(
    own: Callable[[MoeProblem, int, Target], Rank | Reject], problem: MoeProblem, tokens: int, target: Target
) -> Rank | Reject:
    if family_of(problem.scheme).name != "gguf" or block_of(problem.scheme).name != "mxfp4":
        return Reject("serves GGUF's MXFP4 blocks")
    return own(_same_numbers(problem), tokens, target)


def _run_mxfp4(own: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return own(*arguments[:-1], _same_numbers(arguments[-1]))


def _mxfp4(name: str, fits: Callable[..., Rank | Reject], runs: Callable[..., Tensor]) -> MoeKernel:
    return MoeKernel(name, "experts_gguf_mxfp4", partial(_fit_mxfp4, fits), partial(_run_mxfp4, runs))


MOE_KERNELS = (
    MoeKernel("triton_gguf_moe_decode", STACKED_PLANES, fit_decode, run_decode, mixed=True),
    MoeKernel("triton_gguf_moe", STACKED_PLANES, fit, run, mixed=True),
    _mxfp4("triton_gguf_mxfp4_moe_decode", triton_moe4.fit_decode, triton_moe4.run_decode),
    _mxfp4("triton_gguf_mxfp4_moe", triton_moe4.fit, triton_moe4.run),
)
