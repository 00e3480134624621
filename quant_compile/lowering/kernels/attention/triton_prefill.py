"""Prefill attention in Triton: when it can serve (``fit``), how its launches are cut up, and the launches.

Reads K and V as they are cached, in 16 bits or in codes, none repeated; of the mask each element once, then only blocks of it in which
it changes something. Writes its result and scratch of its own: words for blocks of the mask (``reach_of``), and under codes, unless
they are converted in registers, 16-bit values of the blocks that anyone sees. No host sync, so that it can be captured in a CUDA graph,
and recorded in Inductor's graph as other kernels are (``lowering.trace``).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from quant_compile.ir.family import Reject
from quant_compile.lowering.kernels._launch import ceil, pow2, target_of
from quant_compile.lowering.kernels._roofline import roof, shared_memory
from quant_compile.lowering.kernels.attention.triton_decode import (
    CODES,
    HEAD_SIZES,
    LONGEST,
    SCALES,
    Attention,
    _bytes,
    _check_layout,
    _mask_strides,
    _scale_strides,
    _wrong_types,
    problem_of,
)
from quant_compile.lowering.registry import Rank
from quant_compile.lowering.target import Target
from quant_compile.lowering.trace import enqueue, is_tracing

MASKS = ("none", "bool", "additive", "causal")
# Share of the peak of 16-bit products that ``fit`` assumes.
REACHED = 0.4
VALUES_WARPS = 4


@dataclass(frozen=True)
class Plan:
    """How a launch is cut up.

    Attributes:
        block_m: queries of a program.
        block_n: keys of a block.
        warps: of a program.
        stages: blocks that are loaded ahead, and one.
        values: codes become 16-bit values in scratch first; else they are converted in registers.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    values: bool = True


def fit(problem: Attention, target: Target) -> Rank | Reject:
    """Any number of queries, over K and V in 16 bits or in codes."""
    refused = _refused(problem, target)
    if refused is not None:
        return Reject(refused)
    p, limits = problem, roof(target)
    math = 2.0 * p.batch * p.heads * p.tokens * p.length * (p.head_size + p.value_size)
    coded = p.k_dtype in CODES
    values = 2 * p.batch * p.kv_heads * p.length * (p.head_size + p.value_size) if coded else 0
    moved = p.cache_bytes + 2 * values
    launches = 1 + (p.mask != "none") + coded
    return Rank(limits.launch * launches + math / (limits.math16 * REACHED) + moved / limits.bandwidth)


def _refused(p: Attention, target: Target) -> str | None:
    if target.device != "cuda" or target.arch < 80:
        return f"needs a CUDA GPU from sm80 up, this is {target.label}"
    if not target.has("triton"):
        return "triton is not installed"
    if p.batch < 1 or p.tokens < 1:
        return "there is no query"
    if p.kv_heads == 0 or p.heads % p.kv_heads:
        return f"{p.heads} query heads are no multiple of {p.kv_heads} KV heads"
    for size in (p.head_size, p.value_size):
        if size not in HEAD_SIZES:
            return f"heads must be of {', '.join(map(str, HEAD_SIZES))}, not {size}"
    if not 1 <= p.length <= LONGEST:
        return f"needs 1 to {LONGEST} keys, not {p.length}"
    return _wrong_types(p)


def plan_of(problem: Attention, target: Target) -> Plan:
    """The plan of a launch that fills the GPU: one for all numbers of tokens, keys and sequences, so that layers share ``reach_of``.

    Codes become values first: what is read and written then is far less than the products take, and one program's conversion
    serves all queries and heads. Tiles are those that won on an H200 for heads of 128 (benchmarks/results/attention_prefill.json), else
    those that registers and shared memory have room for.
    """
    size, newer = max(problem.head_size, problem.value_size), 90 <= target.arch < 120  # wgmma, tcgen05; else mma.sync
    if size <= 64:
        return Plan(128, 64, 4 if newer else 8, 3)
    if size <= 128:
        whole = problem.head_size == pow2(problem.head_size) and problem.value_size == pow2(problem.value_size)
        if whole and target.arch == 90:
            return Plan(128, 128, 8, 2)  # more than registers hold on sm100
        return Plan(128, 64, 8, 3) if newer else Plan(128, 32, 8, 2)
    return Plan(64, 32, 8, 2)


def plan_for(problem: Attention, target: Target) -> Plan:
    """The plan of a launch whose sizes are known: smaller tiles where those of ``plan_of`` are fewer than SMs.

    Codes are converted in registers then: each program by itself, but without a launch before it.
    """
    tiles = problem.batch * problem.heads * ceil(problem.tokens, 128)
    return plan_of(problem, target) if tiles > target.sm_count else _small_plan(problem, target)


def _small_plan(problem: Attention, target: Target) -> Plan:
    """Of smaller tiles, where there are any."""
    sizes = problem.head_size, problem.value_size
    if max(sizes) > 128:
        return plan_of(problem, target)
    if problem.k_dtype in CODES and all(size == pow2(size) for size in sizes):
        return Plan(32, 64, 4, 3, False)
    return Plan(64, 64, 4, 3 if shared_memory(target) >= 160 * 1024 else 2)


def plan_by(problem: Attention, target: Target, blocks: tuple[int, int]) -> Plan | None:
    """The plan of ``blocks_of`` this problem with other sizes, whose blocks are these; None: they are of another GPU."""
    for plan in (plan_of(problem, target), _small_plan(problem, target)):
        if (plan.block_m, plan.block_n) == blocks:
            return plan
    return None


def plans_of(problem: Attention, target: Target) -> list[Plan]:
    """All plans worth comparing, the default one first; those that need more shared memory than there is fail at their launch."""
    found = [plan_of(problem, target)]
    found += [Plan(m, n, w, s) for m in (64, 128) for n in (32, 64, 128) for w in (4, 8) for s in (2, 3, 4)]
    if problem.k_dtype in CODES:
        found += [Plan(m, n, w, s, False) for m in (32, 64) for n in (32, 64) for w in (2, 4) for s in (2, 3)]
    fitting = (plan for plan in found if unsafe(problem, plan, target) is None)
    return list(dict.fromkeys(plan for plan in fitting if _shared(problem, plan) <= shared_memory(target)))


def _shared(p: Attention, plan: Plan) -> int:
    """Bytes of shared memory for queries and the blocks on the way, about."""
    width = p.k_dtype.itemsize if not plan.values else 2
    return 2 * plan.block_m * p.head_size + plan.stages * plan.block_n * (p.head_size + p.value_size) * width


def unsafe(problem: Attention, plan: Plan, target: Target) -> str | None:
    """Why a plan must not run: codes that are converted in registers may not become operands of wgmma or tcgen05.

    Those take K and V from shared memory; what triton 3.6 makes of values that come from registers was wrong on an H200, and read
    outside of the cache (``triton_decode._most_rows``). Triton takes them from 64 rows and four warps up; else it is mma.sync.
    """
    if plan.values or problem.k_dtype not in CODES:
        return None
    for size in (problem.head_size, problem.value_size):
        if size != pow2(size):
            return f"codes of heads of {size} are read in two parts, as values"
    if target.arch in (80, 89, 120) or plan.block_m < 64 or plan.warps < 4:
        return None
    return "codes that are converted in registers would be operands of wgmma or tcgen05"


def blocks_of(problem: Attention, target: Target) -> tuple[int, int]:
    """Queries and keys of a block, for ``reach_of``."""
    plan = plan_for(problem, target)
    return plan.block_m, plan.block_n


def reach_of(mask: Tensor, queries: int, keys: int) -> Tensor:
    """Words of ``reach_kernel`` for a mask [b, h, t, l], by blocks of so many queries and keys: int32 [b, h, blocks * blocks].

    One dimension for both numbers of blocks: of each torch would ask whether it is 1, and a graph for any sizes be one for some.
    Of every sequence and head, also of those that are spread by stride 0: what the words' sizes are must follow from the mask's.
    """
    b, heads, t, length = mask.shape
    tiles, blocks = ceil(t, queries), ceil(length, keys)
    reach = torch.empty(b, heads, tiles * blocks, dtype=torch.int32, device=mask.device)
    kind = MASKS.index("bool" if mask.dtype == torch.bool else "additive")
    enqueue(
        _source().reach_kernel, (tiles * blocks, b * heads), mask, reach, t, length, heads, *_mask_strides(mask),
        MASK=kind, BM=queries, BN=keys, num_warps=4,
    )  # fmt: skip
    return reach


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    *,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    is_causal: bool = False,
    reach: Tensor | None = None,
    blocks: tuple[int, int] | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """``reference.attention`` for many queries -> [b, hq, t, dv] in q's dtype, which is contiguous as [b, t, hq, dv].

    Arguments are those of ``reference.attention``, of any strides with the last dimension of q, k and v contiguous; ``fit`` tells
    which it takes. Equal inputs give equal bits.

    Args:
        is_causal: query i sees keys 0 to i; without a mask.
        reach: ``reach_of`` the mask; made anew where it is by other blocks than the plan's, or None.
        blocks: those that ``reach`` is by, queries and keys.
        plan: how to cut the launches up, instead of that of ``blocks``, or ``plan_for``.

    Raises:
        ValueError: a tensor does not lie in memory as the kernel reads it; a mask for a causal one; an unsafe plan; words of
            another mask.
    """
    _check_layout(q, k, v, mask)
    if mask is not None and is_causal:
        raise ValueError("attention with a mask cannot be causal as well")
    target = target_of(q.device)
    if target.arch < 89:
        k, v = _bytes(k), _bytes(v)
    problem = problem_of(q, k, v, mask, softcap=softcap, sinks=sinks, k_scale=k_scale, v_scale=v_scale)
    given = None if blocks is None else plan_by(problem, target, blocks)
    settings = plan or given or plan_for(problem, target)
    wrong = unsafe(problem, settings, target)
    if wrong is not None:
        raise ValueError(wrong)
    if scale < 0:  # the kernel takes the largest score for that of the largest product
        q, scale = -q, -scale
    if mask is not None and (reach is None or blocks != (settings.block_m, settings.block_n)):
        reach = reach_of(_unspread(mask), settings.block_m, settings.block_n)
    elif mask is not None and reach is not None:
        _check_reach(reach, mask, settings)
    kind = MASKS.index("causal" if is_causal else problem.mask)
    if settings.values and problem.k_dtype in CODES:
        k, v = _values_of(q, k, v, k_scale, v_scale, reach, problem, settings, kind)
        k_scale = v_scale = None
    out = torch.empty(problem.batch, problem.tokens, problem.heads, problem.value_size, dtype=q.dtype, device=q.device)
    sizes = (float(scale), float(softcap), problem.tokens, problem.length, problem.heads)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *_mask_strides(mask))
    strides += _reach_strides(reach, ceil(problem.tokens, settings.block_m))
    grid = (ceil(problem.tokens, settings.block_m) * problem.batch * problem.heads,)
    launch = {"num_warps": settings.warps, "num_stages": settings.stages}
    constants = constants_of(problem, settings, target, is_causal) | launch
    if k.dtype == q.dtype:
        enqueue(
            _source().prefill_kernel, grid, q, k, v, mask, reach, sinks, out, *sizes, *strides, **constants
        )  # fmt: skip
    else:
        scales = (*_scale_strides(k_scale), *_scale_strides(v_scale))
        enqueue(
            _source().codes_kernel, grid, q, k, v, mask, reach, k_scale, v_scale, sinks, out, *sizes, *strides, *scales,
            **constants,
        )  # fmt: skip
    return out.transpose(1, 2)


def _values_of(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, reach: Tensor | None, p: Attention,
    plan: Plan, kind: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """K and V in q's dtype, contiguous; of blocks that no query sees, whatever was in memory."""
    made = [torch.empty(x.shape, dtype=q.dtype, device=q.device) for x in (k, v)]
    r_b, _ = _reach_strides(reach, ceil(p.tokens, plan.block_m))
    heads = 1 if reach is None else reach.shape[1]
    enqueue(
        _source().values_kernel, (ceil(p.length, plan.block_n), p.batch * p.kv_heads),
        k, v, k_scale, v_scale, reach, *made, p.tokens, p.length, p.kv_heads, heads,
        *k.stride()[:3], *v.stride()[:3], *_scale_strides(k_scale), *_scale_strides(v_scale), r_b,
        **values_constants(p, plan, kind), num_warps=VALUES_WARPS,
    )  # fmt: skip
    return made[0], made[1]


def values_constants(p: Attention, plan: Plan, kind: int) -> dict[str, Any]:
    """The constants of ``values_kernel``."""
    sizes = {"D": p.head_size, "DV": p.value_size, "PD": pow2(p.head_size), "PDV": pow2(p.value_size)}
    scales = {"KS": SCALES.index(p.k_scale), "VS": SCALES.index(p.v_scale)}
    return {"MASK": kind, **scales, **sizes, "BM": plan.block_m, "BN": plan.block_n}


def constants_of(problem: Attention, plan: Plan, target: Target, is_causal: bool = False) -> dict[str, Any]:
    """The constants of ``prefill_kernel``, or of ``codes_kernel`` where codes are converted in registers."""
    p = problem
    constants = {
        "GROUP": p.group,
        "MASK": MASKS.index("causal" if is_causal else p.mask),
        "CAP": p.softcap,
        "BM": plan.block_m,
        "BN": plan.block_n,
    }
    if plan.values or p.k_dtype not in CODES:
        return constants | dict(
            zip(("K1", "K2", "V1", "V2"), (*_parts(p.head_size), *_parts(p.value_size)), strict=True)
        )
    scales = {"KS": SCALES.index(p.k_scale), "VS": SCALES.index(p.v_scale)}
    return constants | scales | {"D": p.head_size, "DV": p.value_size, "ASM": target.arch >= 89 and not _interpreted()}


def _parts(size: int) -> tuple[int, int]:
    """A head's size as two powers of two: 80 as 64 and 16, 128 as itself and 0."""
    first = pow2(size) if pow2(size) == size else pow2(size) // 2
    return first, size - first


def _interpreted() -> bool:
    return "Interpreted" in type(_source().prefill_kernel).__name__


def _source() -> Any:
    return import_module("quant_compile.lowering.kernels.attention._triton_prefill")


def _unspread(mask: Tensor) -> Tensor:
    """A mask that is spread over sequences or heads by stride 0, once."""
    for dim in (0, 1):
        mask = mask.narrow(dim, 0, 1) if mask.stride(dim) == 0 else mask
    return mask


def _check_reach(reach: Tensor, mask: Tensor, plan: Plan) -> None:
    """Of a graph that is traced, ``sglq_kernels.reach`` made them of this mask."""
    if is_tracing():
        return
    words = ceil(mask.shape[2], plan.block_m) * ceil(mask.shape[3], plan.block_n)
    fits = all(a in (1, b) for a, b in zip(reach.shape[:2], mask.shape[:2], strict=True))
    if not fits or reach.shape[2] != words or not reach.is_contiguous():
        raise ValueError(f"the words of a mask {tuple(mask.shape)} are {words} for each head, not {tuple(reach.shape)}")


def _reach_strides(reach: Tensor | None, tiles: int) -> tuple[int, int]:
    """Strides of words over sequences and heads, in blocks of queries."""
    if reach is None:
        return 0, 0
    b, heads, _ = reach.shape
    return 0 if b == 1 else heads * tiles, 0 if heads == 1 else tiles
