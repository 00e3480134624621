"""Experts with GGUF weights by sgl-kernel's ``ggml_moe_a8_vec``, from blocks as files have them.

Tokens and hidden layer are rounded to Q8_1 (see ``gguf/sgl_gguf``), which no GGUF scheme asks for: it runs only where it is pinned.
Every pair of a token and an expert reads its expert anew.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, Reject, family_of
from quant_compile.ir.moe import MoeProblem
from quant_compile.lowering.kernels._library import arch_from
from quant_compile.lowering.kernels._roofline import roof
from quant_compile.lowering.kernels.gguf.sgl_gguf import MULTIPLIES, ROUNDS
from quant_compile.lowering.moe import MoeKernel
from quant_compile.lowering.registry import Rank
from quant_compile.lowering.schemes.gguf import block_of
from quant_compile.lowering.target import Target


@lru_cache(maxsize=None)
def _op() -> Any:
    importlib.import_module("sgl_kernel")
    return torch.ops.sgl_kernel.ggml_moe_a8_vec.default


def fit(problem: MoeProblem, tokens: int, target: Target) -> Rank | Reject:
    """Any number of tokens, bf16 or f16."""
    for scheme in problem.schemes:
        if family_of(scheme).name != "gguf":
            return Reject("serves weights in GGUF blocks")
        if block_of(scheme).name not in MULTIPLIES:
            return Reject(f"sgl-kernel's ggml_moe_a8_vec does not know {scheme.spec}")
    refusal = arch_from(target, 80)
    if refusal is not None:
        return refusal
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return Reject(f"dtype must be bfloat16 or float16, got {problem.dtype}")
    if not target.has("sgl_kernel::ggml_moe_a8_vec"):
        return Reject("sgl-kernel has no ggml_moe_a8_vec here")
    limits, cells = roof(target), 3.0 * problem.hidden * problem.intermediate
    weights = tokens * problem.top_k * cells * problem.bits_per_weight / 8
    return Rank(limits.launch * 8 + weights / (limits.bandwidth * 0.4))


def run(
    x: Planes, ids: Tensor, weights: Tensor | None, w13: Planes, b13: Tensor | None, w2: Planes, b2: Tensor | None,
    scale2: Tensor | None, problem: MoeProblem,
) -> Tensor:  # fmt: skip
    """The block for tokens [T, H] -> [T, H]; arguments as for ``MoeKernel.run``. Source: sgl-kernel's op, once for each product."""
    p, (tokens, top_k) = problem, ids.shape
    (first, second), pairs = (block_of(scheme).number for scheme in p.schemes), tokens * top_k
    legal = (ids >= 0) & (ids < p.experts)
    chosen = ids.clamp(0, p.experts - 1).to(torch.int32)  # an illegal id is multiplied, and dropped
    flat = chosen.flatten().long()
    hidden = _op()(x[0], w13[0], chosen, top_k, first, 2 * p.intermediate, tokens).view(pairs, -1)
    hidden = p.activation(hidden if b13 is None else hidden + b13[flat]).contiguous()
    parts = _op()(hidden, w2[0], chosen, 1, second, p.hidden, pairs).view(pairs, -1)
    parts = (parts if b2 is None else parts + b2[flat]).view(tokens, top_k, -1).float()
    if weights is not None:
        parts = parts * weights.float().unsqueeze(-1)
    return torch.where(legal.unsqueeze(-1), parts, 0.0).sum(1).to(p.dtype)


MOE_KERNELS = (MoeKernel("sgl_gguf_a8_moe", "experts", fit, run, only_pinned=ROUNDS, mixed=True),)
