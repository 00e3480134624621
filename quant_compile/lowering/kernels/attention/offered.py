"""Offers the decode kernel to the attention of graphs: their problem in the kernel's words, and their call of it.

Reads ``triton_decode``, which is imported when it is first asked for; without it every problem is refused with that reason.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

from torch import Tensor

from quant_compile.ir.family import Reject
from quant_compile.lowering.attention import AttentionKernel, AttentionProblem
from quant_compile.lowering.registry import Rank
from quant_compile.lowering.target import Target

HOST = "quant_compile.lowering.kernels.attention.triton_decode"
# Stand for sizes that are symbols: whether the kernel serves depends on neither.
BATCH, LENGTH = 1, 4096


@lru_cache(maxsize=1)
def _host() -> Any:
    """``triton_decode``, or None where it is not there."""
    try:
        return import_module(HOST)
    except ModuleNotFoundError as error:
        if error.name != HOST:
            raise
        return None


def fit(problem: AttentionProblem, target: Target) -> Rank | Reject:
    """As the kernel says of a cache in the dtype of q."""
    host = _host()
    if host is None:
        return Reject("the kernel is not part of this installation")
    p = problem
    return host.fit(
        host.Attention(
            p.batch or BATCH, p.heads, p.kv_heads, p.tokens or 1, p.size, p.value_size, p.length or LENGTH, p.dtype, p.dtype,
            p.dtype, p.mask, p.mask_heads, softcap=p.softcap, sinks=p.sinks,
        ),
        target,
    )  # fmt: skip


def run(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """[B, Hq, T, Dv], contiguous as [B, T, Hq, Dv]."""
    return _host().decode(q, k, v, mask, scale, softcap=softcap, sinks=sinks)


ATTENTION_KERNELS = (AttentionKernel("triton_decode", fit, run),)
