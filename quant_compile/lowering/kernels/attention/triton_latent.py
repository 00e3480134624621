"""Decode attention over latents in Triton: when it serves, how its launch is cut up, and the launch.

Reads the cache as it is, 16 bits or codes, once for each block of rows, to its filled length. Writes its result and scratch of its
own; no host sync, so that it can be captured in a CUDA graph, and recorded in Inductor's graph as other kernels are.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from quant_compile.ir.family import Reject
from quant_compile.ir.kv import BITS
from quant_compile.ir.numerics import dtype_name
from quant_compile.lowering.kernels._launch import ceil, pow2, target_of, triton_type
from quant_compile.lowering.kernels._roofline import roof, shared_memory
from quant_compile.lowering.kernels.attention.torch_latent import around, sizes
from quant_compile.lowering.latent import LatentForm, LatentProblem
from quant_compile.lowering.registry import Rank
from quant_compile.lowering.target import Target
from quant_compile.lowering.trace import enqueue

CODES = {"e4m3": torch.float8_e4m3fn, BITS: torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "int8": torch.int8}
RANKS, ROPES = (64, 128, 256, 512), (32, 64, 128)
MASKS = ("none", "bool", "additive")
SCALES = ("none", "head", "token")
MOST_SPLITS = 64
BLOCK_N, WARPS, STAGES = 32, 8, 2
# A program's q and two blocks of keys in 16 bits, of 512 + 64 values.
SHARED_MEMORY = 160 * 1024
# Shares of the copy bandwidth and of the products that ``fit`` assumes, and kernels around it: two products, q put together.
REACHED, MATH, LAUNCHES = 0.6, 0.3, 6


def fit(problem: LatentProblem, target: Target) -> Rank | Reject:
    """Up to 16 queries, over a cache in the dtype of q or in codes."""
    p, limits = problem, roof(target)
    refused = _refused(p, target)
    if refused is not None:
        return Reject(refused)
    batch, length, tokens = sizes(p)
    rows = p.heads * tokens
    token = (p.rank + p.rope) * p.dtype.itemsize if not p.codes else p.rank + p.rope + 8 * (p.scale == "token")
    read = batch * length * token * ceil(rows, block_rows(rows, bool(p.codes), target))
    products = 2 * batch * rows * length * (2 * p.rank + p.rope)
    own = max(read / (limits.bandwidth * REACHED), products / (limits.math16 * MATH))
    return Rank(limits.launch * LAUNCHES + around(p, target) + own)


def _refused(p: LatentProblem, target: Target) -> str | None:
    if target.device != "cuda" or target.arch < 80:
        return f"needs a CUDA GPU from sm80 up, this is {target.label}"
    if not target.has("triton"):
        return "triton is not installed"
    if shared_memory(target) < SHARED_MEMORY:
        return f"needs {SHARED_MEMORY // 1024} KiB of shared memory"
    if p.dtype not in (torch.bfloat16, torch.float16):
        return f"q must be bfloat16 or float16, not {dtype_name(p.dtype)}"
    if p.rank not in RANKS or p.rope not in ROPES:
        return f"latents must be of {', '.join(map(str, RANKS))} and {', '.join(map(str, ROPES))} values"
    if p.mask not in MASKS or p.mask_heads:
        return "its mask is not one of every token and key for all heads"
    return None


def block_rows(rows: int, codes: bool, target: Target) -> int:
    """Rows of a program: up to 64, of which tensor cores of sm90 multiply at a time; 32 of codes (``triton_decode`` says why)."""
    return max(16, min(32 if codes or target.arch < 90 else 64, pow2(rows)))


def splits_of(batch: int, rows: int, length: int, block_m: int, target: Target) -> int:
    """Programs that share the keys of a sequence: of one an SM the fewest under which a full cache takes the least time."""
    programs, blocks = batch * ceil(rows, block_m), ceil(length, BLOCK_N)
    rounds = {n: ceil(programs * n, target.sm_count) for n in range(1, min(blocks, MOST_SPLITS) + 1)}
    return min(rounds, key=lambda n: rounds[n] * (ceil(blocks, n) + 1))


def run(
    q: Tensor, turned: Tensor, latent: Tensor, rope: Tensor, mask: Tensor | None, scale: float,
    latent_scale: Tensor | None = None, rope_scale: Tensor | None = None, codes: str = "", splits: int | None = None,
) -> Tensor:  # fmt: skip
    """q [B, Hq, T, r] and turned [B, Hq, T, p] over a cache [B, 1, L, r] and [B, 1, L, p] -> [B, Hq, T, r] of q's dtype.

    Args:
        mask: [B|1, 1, T, L], bool or additive.
        latent_scale, rope_scale: of codes: [B, 1, L, 1], or one number.
        splits: of the keys, instead of ``splits_of``.

    Raises:
        ValueError: a tensor does not lie in memory as the kernel reads it.
    """
    target = target_of(q.device)
    q, turned = (x if x.stride(3) == 1 else x.contiguous() for x in (q, turned))
    latent, rope = (_as_read(x, codes, target) for x in (latent, rope))
    b, heads, t, rank = q.shape
    length, rows = latent.shape[2], heads * t
    block_m = block_rows(rows, bool(codes), target)
    splits = splits or splits_of(b, rows, length, block_m, target)
    out = torch.empty(b, t, heads, rank, dtype=q.dtype, device=q.device)
    parts = stats = None
    if splits > 1:
        parts = torch.empty(b * rows * splits * rank, dtype=torch.float32, device=q.device)
        stats = torch.empty(2 * b * rows * splits, dtype=torch.float32, device=q.device)
    kind = "none" if latent_scale is None else "head" if latent_scale.shape[2] == 1 else "token"
    enqueue(
        _source("latent").latent_kernel, (b * ceil(rows, block_m), splits),
        q, turned, latent, rope, mask, latent_scale, rope_scale, out, parts, stats, float(scale), length,
        *q.stride()[:3], *turned.stride()[:3], *_strides(latent), *_strides(rope), *_mask_strides(mask),
        *_strides(latent_scale), *_strides(rope_scale),
        **constants_of(heads, t, rank, rope.shape[3], length, block_m, splits, mask, kind, codes, q.dtype, target),
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    if splits > 1:
        enqueue(
            _source("decode").combine_kernel, (b * rows,), parts, stats, None, out, 1, T=t, GROUP=heads, DV=rank, PDV=rank,
            SPLITS=splits, PS=pow2(splits), STEP=min(8, pow2(splits)), num_warps=4,
        )  # fmt: skip
    return out.transpose(1, 2)


def constants_of(
    heads: int, tokens: int, rank: int, rope: int, length: int, block_m: int, splits: int, mask: Tensor | None, scale: str,
    codes: str, dtype: torch.dtype, target: Target,
) -> dict[str, Any]:  # fmt: skip
    """The constants of ``latent_kernel``."""
    own, scan_rows = ceil(ceil(length, BLOCK_N), splits), pow2(tokens)
    return {
        "T": tokens, "HEADS": heads, "R": rank, "P": rope, "BM": block_m, "BN": BLOCK_N, "SPLITS": splits,
        "SCAN": max(1, min(pow2(own), 4096 // (scan_rows * BLOCK_N))) * BLOCK_N, "SCAN_ROWS": scan_rows,
        "MASK": MASKS.index("none" if mask is None else "bool" if mask.dtype == torch.bool else "additive"),
        "KS": SCALES.index(scale), "CODES": bool(codes), "OPERAND": triton_type(torch.float16 if codes else dtype),
        "EVEN": length % BLOCK_N == 0, "ASM": bool(codes) and target.arch >= 89 and not _interpreted(),
    }  # fmt: skip


def _as_read(x: Tensor, codes: str, target: Target) -> Tensor:
    """A part of the cache as its codes; e4m3 as bytes where the device has no such type."""
    if codes:
        x = x.view(CODES[codes])
        if any(stride % 16 for stride in (x.stride(0), x.stride(2))):
            raise ValueError(f"strides of codes must be multiples of 16, not {x.stride()}")
        if target.arch < 89 and x.dtype == torch.float8_e4m3fn:
            x = x.view(torch.uint8)
    if x.stride(3) != 1:
        raise ValueError(f"the last dimension of the cache must be contiguous, its stride is {x.stride(3)}")
    return x


def _strides(x: Tensor | None) -> tuple[int, int]:
    """Strides along sequences and keys; 0 along what is one number."""
    if x is None:
        return 0, 0
    return tuple(0 if x.shape[dim] == 1 else x.stride(dim) for dim in (0, 2))  # type: ignore[return-value]


def _mask_strides(mask: Tensor | None) -> tuple[int, int, int]:
    if mask is None:
        return 0, 0, 0
    return tuple(0 if mask.shape[dim] == 1 else mask.stride(dim) for dim in (0, 2, 3))  # type: ignore[return-value]


def _interpreted() -> bool:
    """Whether Triton interprets its kernels: inline assembly it does not."""
    return "Interpreted" in type(_source("latent").latent_kernel).__name__


def _source(name: str) -> Any:
    return import_module(f"quant_compile.lowering.kernels.attention._triton_{name}")


LATENT_FORMS = (LatentForm("triton_latent", fit, run),)
