"""A one-shot sum over ranks in one launch, with the residual add, the RMSNorm and the codes of each token that follow it.

Ranks read each other's rows through symmetric memory (``lowering/symmetric.py``). The launch waits for the other ranks on the GPU, and so
may be part of a CUDA graph.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, Reject, family_of
from quant_compile.ir.numerics import FLOAT_DTYPES, FLOAT_MAX
from quant_compile.ir.scheme import Scheme
from quant_compile.lowering.kernels._launch import pow2
from quant_compile.lowering.registry import Norm
from quant_compile.lowering.symmetric import Workspace

LONGEST = 16384  # columns that a program holds in registers
INT8_MAX = 127.0
FAMILIES = ("fp8", "int8", "w4a8")  # whose input planes are codes and one scale for each token


@lru_cache(maxsize=1)
def _source() -> Any:
    return import_module("quant_compile.lowering.kernels.collectives._triton_all_reduce")


def codes_of(scheme: Scheme) -> tuple[torch.dtype, float] | None:
    """Dtype and largest magnitude of the codes that the kernel makes of a token; None: it makes none of this scheme."""
    a = scheme.input_activations
    if a is None or family_of(scheme).name not in FAMILIES or a.strategy != "token" or not a.dynamic:
        return None
    return (torch.int8, INT8_MAX) if a.type == "int" else (FLOAT_DTYPES[str(a.format)], FLOAT_MAX[str(a.format)])


def fit(k: int, dtype: torch.dtype) -> Reject | None:
    """Why rows of k values cannot be added by it; None: they can."""
    if dtype not in (torch.bfloat16, torch.float16):
        return Reject(f"adds bfloat16 or float16, not {str(dtype).removeprefix('torch.')}")
    return Reject(f"a row has at most {LONGEST} values, not {k}") if k > LONGEST else None


def run(
    x: Tensor, residual: Tensor | None, norm: Norm | None, scheme: Scheme | None, keep: bool, space: Workspace
) -> Planes:
    """x [m, k] of every rank, contiguous, residual [m, k] -> the sum; of its norm rows (``keep``), codes and scales (``scheme``)."""
    m, k = x.shape
    h = torch.empty_like(x)
    y = torch.empty_like(x) if norm is not None and keep else None
    made = codes_of(scheme) if norm is not None and scheme is not None else None
    codes = None if made is None else torch.empty((m, k), dtype=made[0], device=x.device)
    scales = None if made is None else torch.empty((m, 1), dtype=torch.float32, device=x.device)
    block = max(pow2(k), 128)
    if m:
        _source().all_reduce_kernel[(m,)](
            x, residual, None if norm is None else norm.weight, space.bases, space.counts, h, y, codes, scales, k,
            0.0 if norm is None else norm.eps, space.flags_at, space.limit_ns,
            RANK=space.rank, WORLD=space.world, LIMITED=space.limit_ns > 0,
            WEIGHTING="" if norm is None else norm.weighting, LIMIT=0.0 if made is None else made[1],
            BLOCK=block, num_warps=min(16, max(4, block // 512)),
        )  # fmt: skip
    return tuple(plane for plane in (h, y, codes, scales) if plane is not None)
