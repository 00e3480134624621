"""Offers the kernels for few and for many queries to the attention of graphs: their problem in the kernels' words, and their calls.

Reads ``triton_decode`` and ``triton_prefill``, which are imported when they are first asked for.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from quant_compile.ir.family import Reject
from quant_compile.ir.kv import BITS
from quant_compile.lowering.attention import MOST_TOKENS, AttentionKernel, AttentionProblem
from quant_compile.lowering.registry import Rank
from quant_compile.lowering.sides import SPLIT
from quant_compile.lowering.target import Target

# Stand for sizes that are symbols: whether a kernel serves depends on none. Of tokens, by what is known of them: nothing, that all
# sequences together have up to SPLIT, or that they have more.
BATCH, LENGTH = 1, 4096
TOKENS = {None: SPLIT, False: SPLIT // 2, True: 4 * SPLIT}
CODES = {"e4m3": torch.float8_e4m3fn, BITS: torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "int8": torch.int8}


@lru_cache(maxsize=1)
def _host() -> Any:
    return import_module("quant_compile.lowering.kernels.attention.triton_decode")


@lru_cache(maxsize=1)
def _prefill_host() -> Any:
    return import_module("quant_compile.lowering.kernels.attention.triton_prefill")


def fit(problem: AttentionProblem, target: Target) -> Rank | Reject:
    """As the decode kernel says of a cache in the dtype of q, or in codes."""
    if problem.tokens is None:
        return Reject(f"serves up to {MOST_TOKENS} queries a sequence, known when the graph is compiled")
    return _host().fit(_in_its_words(problem), target)


def fit_prefill(problem: AttentionProblem, target: Target) -> Rank | Reject:
    """As the prefill kernel says; few queries, where that is known, are the decode kernel's."""
    if problem.tokens is not None and problem.tokens <= MOST_TOKENS:
        return Reject(f"serves more than {MOST_TOKENS} queries a sequence, not {problem.tokens}")
    return _prefill_host().fit(_in_its_words(problem), target)


def _in_its_words(problem: AttentionProblem) -> Any:
    p = problem
    kept, batch = CODES.get(p.codes, p.dtype), p.batch or BATCH
    return _host().Attention(
        batch, p.heads, p.kv_heads, p.tokens or -(-TOKENS[p.many] // batch), p.size, p.value_size, p.length or LENGTH, p.dtype, kept,
        kept, p.mask, p.mask_heads, p.scale, p.scale, p.softcap, p.sinks,
    )  # fmt: skip


def run(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float, sinks: Tensor | None,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, codes: str = "",
) -> Tensor:  # fmt: skip
    """[B, Hq, T, Dv], contiguous as [B, T, Hq, Dv]."""
    k, v = _coded(k, v, codes)
    return _host().decode(q, k, v, mask, scale, softcap=softcap, sinks=sinks, k_scale=k_scale, v_scale=v_scale)


def run_prefill(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float, sinks: Tensor | None,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, codes: str = "", reach: Tensor | None = None,
    blocks: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """The same; a graph for any number of tokens may be called with few, for which decode shares the keys out among programs."""
    if q.shape[2] <= MOST_TOKENS:
        return run(q, k, v, mask, scale, softcap, sinks, k_scale, v_scale, codes)
    k, v = _coded(k, v, codes)
    more = {"k_scale": k_scale, "v_scale": v_scale, "reach": reach, "blocks": blocks}
    return _prefill_host().prefill(q, k, v, mask, scale, softcap=softcap, sinks=sinks, **more)


def blocks_of(problem: AttentionProblem, target: Target) -> tuple[int, int]:
    """Of a mask, as the prefill kernel wants them read."""
    return _prefill_host().blocks_of(_in_its_words(problem), target)


def _coded(k: Tensor, v: Tensor, codes: str) -> tuple[Tensor, Tensor]:
    return (k.view(CODES[codes]), v.view(CODES[codes])) if codes else (k, v)


ATTENTION_KERNELS = (
    AttentionKernel("triton_decode", fit, run),
    AttentionKernel("triton_prefill", fit_prefill, run_prefill, blocks=blocks_of),
)
