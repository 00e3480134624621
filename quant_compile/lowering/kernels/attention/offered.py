"""Offers the decode kernel to the attention of graphs: their problem in the kernel's words, and their call of it.

Reads ``triton_decode``, which is imported when it is first asked for.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from quant_compile.ir.family import Reject
from quant_compile.ir.kv import BITS
from quant_compile.lowering.attention import AttentionKernel, AttentionProblem
from quant_compile.lowering.registry import Rank
from quant_compile.lowering.target import Target

# Stand for sizes that are symbols: whether the kernel serves depends on neither.
BATCH, LENGTH = 1, 4096
CODES = {"e4m3": torch.float8_e4m3fn, BITS: torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "int8": torch.int8}


@lru_cache(maxsize=1)
def _host() -> Any:
    return import_module("quant_compile.lowering.kernels.attention.triton_decode")


def fit(problem: AttentionProblem, target: Target) -> Rank | Reject:
    """As the kernel says of a cache in the dtype of q, or in codes."""
    host, p = _host(), problem
    kept = CODES.get(p.codes, p.dtype)
    return host.fit(
        host.Attention(
            p.batch or BATCH, p.heads, p.kv_heads, p.tokens or 1, p.size, p.value_size, p.length or LENGTH, p.dtype, kept,
            kept, p.mask, p.mask_heads, p.scale, p.scale, p.softcap, p.sinks,
        ),
        target,
    )  # fmt: skip


def run(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float, sinks: Tensor | None,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, codes: str = "",
) -> Tensor:  # fmt: skip
    """[B, Hq, T, Dv], contiguous as [B, T, Hq, Dv]."""
    if codes:
        k, v = (x.view(CODES[codes]) for x in (k, v))
    return _host().decode(q, k, v, mask, scale, softcap=softcap, sinks=sinks, k_scale=k_scale, v_scale=v_scale)


ATTENTION_KERNELS = (AttentionKernel("triton_decode", fit, run),)
