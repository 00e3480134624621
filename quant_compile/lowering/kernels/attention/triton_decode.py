"""Decode attention with split keys in Triton: when it can serve (``fit``), how its launch is cut up, and the launch.

Reads K and V as they are cached, 16 bits or codes, once. Writes its result and scratch of its own; no host sync, so that it can be
captured in a CUDA graph, and recorded in Inductor's graph as other kernels are (``lowering.trace``).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from quant_compile.ir.family import Reject
from quant_compile.ir.numerics import dtype_name
from quant_compile.lowering.kernels._launch import ceil, pow2, target_of, triton_type
from quant_compile.lowering.kernels._roofline import roof, shared_memory
from quant_compile.lowering.registry import Rank
from quant_compile.lowering.target import Target
from quant_compile.lowering.trace import enqueue

MOST_TOKENS = 16
# One program adds up the parts of a row.
MOST_SPLITS = 64
HEAD_SIZES = (32, 64, 80, 96, 128, 192, 256)
FLOATS = (torch.bfloat16, torch.float16)
CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8)
# Strides along keys are multiplied by keys of a block in 32 bits; no cache comes near.
LONGEST = 1 << 24
MASKS = ("none", "bool", "additive")
SCALES = ("none", "head", "token")
# Share of the copy bandwidth that ``fit`` assumes.
REACHED = 0.8


@dataclass(frozen=True)
class Attention:
    """One attention over a KV cache as kernels see it.

    Attributes:
        batch: sequences.
        heads: query heads, a multiple of ``kv_heads``.
        kv_heads: heads of K and V.
        tokens: queries of each sequence.
        head_size: of q and k.
        value_size: of v and the result.
        length: keys that the cache has room for; the mask says which are filled.
        dtype: of q and the result.
        k_dtype: of k: ``dtype``, or e4m3 (uint8: its bytes), e5m2, int8.
        v_dtype: of v, likewise.
        mask: ``none``, ``bool`` or ``additive``.
        mask_heads: each head has a mask of its own.
        k_scale: ``none``, ``head`` (one number or one for each head) or ``token`` (one for each token and head).
        v_scale: likewise.
        softcap: scores are capped.
        sinks: a logit of each head joins the denominator.
    """

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    head_size: int
    value_size: int
    length: int
    dtype: torch.dtype
    k_dtype: torch.dtype
    v_dtype: torch.dtype
    mask: str = "none"
    mask_heads: bool = False
    k_scale: str = "none"
    v_scale: str = "none"
    softcap: bool = False
    sinks: bool = False

    @property
    def group(self) -> int:
        """Query heads that read one head of K and V."""
        return self.heads // self.kv_heads

    @property
    def cache_bytes(self) -> int:
        """Bytes of K, V and scales per token, all sequences and heads together, times ``length``: what a full cache costs."""
        scales = 4 * ((self.k_scale == "token") + (self.v_scale == "token"))
        token = self.head_size * self.k_dtype.itemsize + self.value_size * self.v_dtype.itemsize + scales
        return self.batch * self.kv_heads * self.length * token


@dataclass(frozen=True)
class Plan:
    """How a launch is cut up.

    Attributes:
        block_m: rows (heads of a group times queries) of a program.
        block_n: keys of a block; blocks are dealt to the splits one by one.
        splits: programs that share the keys of one sequence and KV head.
        warps: of a program.
        stages: blocks that are loaded ahead, and one.
        per_sm: programs that an SM holds at a time, which the splits are counted out for.
    """

    block_m: int
    block_n: int
    splits: int
    warps: int
    stages: int
    per_sm: int = 2


def problem_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Attention:
    """The problem that a call of ``decode`` with these arguments poses."""
    return Attention(
        q.shape[0], q.shape[1], k.shape[1], q.shape[2], q.shape[3], v.shape[3], k.shape[2], q.dtype, k.dtype, v.dtype,
        "none" if mask is None else "bool" if mask.dtype == torch.bool else "additive",
        mask is not None and _stride(mask, 1) != 0, _scale_kind(k_scale), _scale_kind(v_scale), bool(softcap),
        sinks is not None,
    )  # fmt: skip


def fit(problem: Attention, target: Target) -> Rank | Reject:
    """Up to 16 queries a sequence, over a cache in 16 bits or in codes."""
    refused = _refused(problem, target)
    if refused is not None:
        return Reject(refused)
    plan, limits = plan_of(problem, target), roof(target)
    parts = (
        0 if plan.splits == 1 else 8 * problem.batch * problem.heads * problem.tokens * plan.splits * problem.value_size
    )
    launches = 1 if plan.splits == 1 else 2
    return Rank(limits.launch * launches + (problem.cache_bytes + parts) / (limits.bandwidth * REACHED))


def _refused(p: Attention, target: Target) -> str | None:
    if target.device != "cuda" or target.arch < 80:
        return f"needs a CUDA GPU from sm80 up, this is {target.label}"
    if not target.has("triton"):
        return "triton is not installed"
    if not 1 <= p.tokens <= MOST_TOKENS:
        return f"serves 1 to {MOST_TOKENS} queries a sequence, not {p.tokens}"
    if p.batch < 1:
        return "there is no sequence"
    if p.kv_heads == 0 or p.heads % p.kv_heads:
        return f"{p.heads} query heads are no multiple of {p.kv_heads} KV heads"
    for size in (p.head_size, p.value_size):
        if size not in HEAD_SIZES:
            return f"heads must be of {', '.join(map(str, HEAD_SIZES))}, not {size}"
    if not 1 <= p.length <= LONGEST:
        return f"needs 1 to {LONGEST} keys, not {p.length}"
    return _wrong_types(p)


def _wrong_types(p: Attention) -> str | None:
    if p.dtype not in FLOATS:
        return f"q must be bfloat16 or float16, not {dtype_name(p.dtype)}"
    coded = p.k_dtype in CODES
    if coded != (p.v_dtype in CODES):
        return f"K and V must both be codes or both {dtype_name(p.dtype)}, not {dtype_name(p.k_dtype)} and {dtype_name(p.v_dtype)}"
    if not coded and (p.k_dtype != p.dtype or p.v_dtype != p.dtype):
        return f"K and V must be {dtype_name(p.dtype)} as q is, or codes, not {dtype_name(p.k_dtype)} and {dtype_name(p.v_dtype)}"
    return None


def plan_of(problem: Attention, target: Target) -> Plan:
    """The plan of a launch.

    A block of K and V is 32 KiB in 16 bits, half of that in codes, so that what is on the way at two programs an SM of 16 bits, or
    four of codes (64 KiB), keeps HBM busy. Heads above 128 halve the keys of a block. Warps and stages are those that won on an H200
    at 16 sequences of 2048 and 8192 (benchmarks/results/attention_sweep.json), for codes as for 16 bits; two stages where an SM's
    memory is small (sm89, sm120).
    """
    wide = max(pow2(problem.head_size), pow2(problem.value_size)) > 128
    block_n = 32 if wide else 64
    block_m = max(16, min(_most_rows(problem), pow2(problem.group * problem.tokens)))
    warps = 8 if block_m * pow2(problem.value_size) > 64 * 64 else 4
    stages = 3 if shared_memory(target) >= 160 * 1024 else 2
    programs = problem.batch * problem.kv_heads * ceil(problem.group * problem.tokens, block_m)
    per_sm = _per_sm(problem, target, block_m, block_n, warps)
    splits = _splits(programs, ceil(problem.length, block_n), per_sm * target.sm_count)
    return Plan(block_m, block_n, splits, warps, stages, per_sm)


def _per_sm(problem: Attention, target: Target, block_m: int, block_n: int, warps: int) -> int:
    """Programs that an SM holds at a time.

    16 bits: two, which reach the memory's speed. Codes: what registers leave room for; shared memory would hold more. Programs of 128
    threads are two where each row has a mask of its own or there are more than 16 rows, else three (168 registers a thread); and four
    (128) for whole blocks and heads without padding, which is how a static cache is read, up to sm90 only.
    """
    if problem.k_dtype not in CODES:
        return 2
    if block_m > 16 or problem.tokens > 1 or problem.mask_heads:
        return 8 // warps
    padded = (
        any(size != pow2(size) for size in (problem.head_size, problem.value_size)) or problem.length % block_n != 0
    )
    return 3 if padded or block_n < 64 or target.arch not in (80, 90) else 4


def _splits(programs: int, blocks: int, room: int) -> int:
    """The splits, 64 at most, under which a full cache takes the least time, in blocks: ``room`` programs run at a time, and each
    costs about a block more than it reads. Of equals the fewest.
    """
    rounds = {n: ceil(programs * n, room) for n in range(1, min(blocks, MOST_SPLITS) + 1)}
    return min(rounds, key=lambda n: rounds[n] * (ceil(blocks, n) + 1))


def _most_rows(problem: Attention) -> int:
    """Rows of a program at most: 64, and 32 of codes.

    From 64 rows up Triton multiplies with wgmma on sm90 and with tcgen05 on sm100, which take K and V from shared memory: codes would be
    converted in registers, written back, and turned again. On an H200 what triton 3.6 makes of that for heads of 64 under 4 warps gave
    wrong results, and addresses outside of the cache. Up to 32 rows, and on sm120 always, it is mma.sync, with operands in registers.
    """
    return 32 if problem.k_dtype in CODES else 64


def decode(
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
    plan: Plan | None = None,
) -> Tensor:
    """``reference.attention`` for few queries -> [b, hq, t, dv] in q's dtype, which is contiguous as [b, t, hq, dv].

    Arguments are those of ``reference.attention``, of any strides with the last dimension of q, k and v contiguous; ``fit`` tells
    which it takes. Equal inputs give equal bits.

    Args:
        plan: how to cut the launch up, instead of ``plan_of``.

    Raises:
        ValueError: a tensor does not lie in memory as the kernel reads it.
    """
    _check_layout(q, k, v, mask)
    target = target_of(q.device)
    if target.arch < 89:
        k, v = _bytes(k), _bytes(v)
    problem = problem_of(q, k, v, mask, softcap=softcap, sinks=sinks, k_scale=k_scale, v_scale=v_scale)
    settings = plan or plan_of(problem, target)
    source = _source()
    b, t, dv = problem.batch, problem.tokens, problem.value_size
    rows, pairs, splits = problem.group * t, b * problem.kv_heads, settings.splits
    out = torch.empty(b, t, problem.heads, dv, dtype=q.dtype, device=q.device)
    parts = stats = None
    if splits > 1:
        parts = torch.empty(pairs * rows * splits * dv, dtype=torch.float32, device=q.device)
        stats = torch.empty(2 * pairs * rows * splits, dtype=torch.float32, device=q.device)
    enqueue(
        source.decode_kernel, (pairs * ceil(rows, settings.block_m), splits),
        q, k, v, mask, k_scale, v_scale, sinks, out, parts, stats,
        float(scale), float(softcap), problem.length, problem.kv_heads,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *_mask_strides(mask), *_scale_strides(k_scale),
        *_scale_strides(v_scale),
        **constants_of(problem, settings, target), num_warps=settings.warps, num_stages=settings.stages,
    )  # fmt: skip
    if splits > 1:
        enqueue(
            source.combine_kernel, (pairs * rows,), parts, stats, sinks, out, problem.kv_heads,
            **combine_constants(problem, splits), num_warps=4,
        )  # fmt: skip
    return out.transpose(1, 2)


def _check_layout(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(3) != 1:
            raise ValueError(f"the last dimension of {name} must be contiguous, its stride is {x.stride(3)}")
        if x.dtype.itemsize == 1 and any(stride % 16 for stride in x.stride()[:3]):
            raise ValueError(f"strides of {name}'s codes must be multiples of 16, not {x.stride()}")
    if mask is not None and mask.shape[3] < k.shape[2]:
        raise ValueError(f"a mask over {mask.shape[3]} keys cannot serve a cache of {k.shape[2]}")


def constants_of(problem: Attention, plan: Plan, target: Target) -> dict[str, Any]:
    """The constants of ``decode_kernel``; inline assembly has instructions of sm89, and none where Triton interprets."""
    codes = problem.k_dtype in CODES
    shared = not problem.mask_heads
    scan_rows = pow2(problem.tokens) if shared else plan.block_m
    own = ceil(ceil(problem.length, plan.block_n), plan.splits)
    steps = max(1, min(pow2(own), 4096 // (scan_rows * plan.block_n)))
    return {
        "T": problem.tokens,
        "GROUP": problem.group,
        "D": problem.head_size,
        "DV": problem.value_size,
        "PD": pow2(problem.head_size),
        "PDV": pow2(problem.value_size),
        "BM": plan.block_m,
        "BN": plan.block_n,
        "SPLITS": plan.splits,
        "SCAN": steps * plan.block_n,
        "SCAN_ROWS": scan_rows,
        "MASK": MASKS.index(problem.mask),
        "SHARED_MASK": shared,
        "CAP": problem.softcap,
        "KS": SCALES.index(problem.k_scale),
        "VS": SCALES.index(problem.v_scale),
        "CODES": codes,
        "OPERAND": triton_type(torch.float16 if codes else problem.dtype),
        "EVEN": problem.length % plan.block_n == 0,
        "ASM": codes and target.arch >= 89 and not _interpreted(),
    }


def combine_constants(problem: Attention, splits: int) -> dict[str, Any]:
    """The constants of ``combine_kernel``; 16 parts are added at a time, which four warps hold in registers."""
    size = {"DV": problem.value_size, "PDV": pow2(problem.value_size), "SPLITS": splits, "PS": pow2(splits)}
    return {"T": problem.tokens, "GROUP": problem.group, **size, "STEP": min(16, pow2(splits))}


def _interpreted() -> bool:
    """Whether Triton interprets its kernels."""
    return "Interpreted" in type(_source().decode_kernel).__name__


def _source() -> Any:
    return import_module("quant_compile.lowering.kernels.attention._triton_decode")


def _bytes(codes: Tensor) -> Tensor:
    """e4m3 as bytes: Triton takes no pointer to it below sm89."""
    return codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn else codes


def _stride(x: Tensor, dim: int) -> int:
    """The stride along a dimension; 0 where it is spread."""
    return 0 if x.shape[dim] == 1 else x.stride(dim)


def _mask_strides(mask: Tensor | None) -> tuple[int, int, int, int]:
    if mask is None:
        return 0, 0, 0, 0
    return _stride(mask, 0), _stride(mask, 1), _stride(mask, 2), mask.stride(3)


def _scale_kind(scale: Tensor | None) -> str:
    return "none" if scale is None else "token" if scale.dim() == 3 else "head"


def _scale_strides(scale: Tensor | None) -> tuple[int, int, int]:
    """Strides over (sequence, head, token) of a scale, which is absent, one number, [h] or [b, h, l]."""
    if scale is None:
        return 0, 0, 0
    if scale.dim() == 3:
        return scale.stride(0), scale.stride(1), scale.stride(2)
    return 0, 0 if scale.numel() == 1 else scale.stride(0), 0
