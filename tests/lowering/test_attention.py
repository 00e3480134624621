"""Decode attention and the quantized cache's writes: the reference against SDPA, kernels against the reference, refusals, cubins."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from quant_compile.ir.family import Reject
from quant_compile.lowering.kernels.attention import reference, triton_decode
from quant_compile.lowering.kernels.attention.triton_decode import Attention, Plan
from quant_compile.lowering.target import FAKE_OPS, Target
from tests.lowering.triton_support import compile_cubin, mend_bfloat16, needs_triton, run_interpreted

E4M3, E5M2, F16, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16
# Relative Frobenius error: p and the result are rounded once to f16 (2**-12 each on average over a row) or bf16 (2**-9).
TOLERANCE = {F16: 1e-3, BF16: 5e-3}


def mend_dot() -> None:
    """Let Triton 3.6's interpreter multiply bf16: it takes the bits for integers."""
    import numpy as np
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    original = builder.create_dot

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar.name != "bf16":
            return handle
        values = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(values, interpreter.tl.float32)

    builder.create_dot = lambda self, a, b, *more: original(self, wide(a), wide(b), *more)


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def filled(b: int, t: int, length: int, filled: int, left: tuple[int, ...] = (), window: int = 0) -> Tensor:
    """[b, 1, t, length]: the t last of ``filled`` tokens look back, to ``left`` padding, or over ``window`` tokens."""
    keys, query = torch.arange(length), torch.arange(filled - t, filled)[:, None]
    seen = (keys <= query) & ((keys > query - window) if window else torch.tensor(True))
    start = torch.tensor(left or (0,) * b).reshape(b, 1, 1, 1)
    return seen & (keys >= start)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


class Case:
    """Seeded tensors of one attention: q and caches as dtype, codes with scales where ``cache`` is a dtype of codes."""

    def __init__(
        self, b: int, heads: int, kv: int, t: int, d: int, length: int, *, dv: int = 0, dtype: torch.dtype = F16,
        cache: torch.dtype | None = None, scales: str = "token", device: str = "cpu",
    ) -> None:  # fmt: skip
        g = torch.Generator(device).manual_seed(heads * 100 + t + length)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, device=device)

        self.q, self.scale = random(b, t, heads, d).transpose(1, 2).to(dtype), 1 / math.sqrt(d)
        k, v = random(b, kv, length, d).to(dtype), random(b, kv, length, dv or d).to(dtype)
        # Tokens of unlike sizes, so that a scale at the wrong token shows.
        v = v * torch.logspace(-2, 1, length, device=device)[torch.randperm(length, generator=g, device=device), None]
        self.k, self.v = k, v.to(dtype)
        self.scales: dict[str, Tensor] = {}
        if cache is not None:
            self.k, self.scales["k_scale"] = self.coded(self.k, cache, scales)
            self.v, self.scales["v_scale"] = self.coded(self.v, cache, scales)

    def coded(self, x: Tensor, cache: torch.dtype, scales: str) -> tuple[Tensor, Tensor]:
        fixed = None
        if scales != "token":
            fixed = x.float().abs().amax((0, 2, 3)) / reference.LARGEST[cache]
            fixed = fixed.amax() if scales == "tensor" else fixed
        return reference.quantize(x, cache, fixed)

    def wanted(self, mask: Tensor | None = None, **more: Any) -> Tensor:
        return reference.attention(self.q, self.k, self.v, mask, self.scale, **self.scales, **more)

    def found(self, mask: Tensor | None = None, *, plan: Plan | None = None, **more: Any) -> Tensor:
        return triton_decode.decode(self.q, self.k, self.v, mask, self.scale, plan=plan, **self.scales, **more)

    def check(self, mask: Tensor | None = None, *, plan: Plan | None = None, **more: Any) -> None:
        found = self.found(mask, plan=plan, **more)
        assert found.transpose(1, 2).is_contiguous()
        wrong = error(found, self.wanted(mask, **more))
        assert wrong <= TOLERANCE[self.q.dtype], (wrong, self.q.shape, self.k.shape, self.k.dtype, plan)


def plan(splits: int, block_n: int = 16, block_m: int = 16) -> Plan:
    return Plan(block_m, block_n, splits, 4, 2)


# --- interpreted ---


def check_groups() -> None:
    """Groups of 1, 4 and 8 heads, 1 and 3 queries, one split and several, several blocks of rows; keys that fill no block."""
    for heads, kv, t, splits in ((2, 2, 1, 1), (4, 1, 3, 3), (8, 1, 1, 2), (8, 1, 3, 2)):
        case = Case(2, heads, kv, t, 32, 75)
        case.check(plan=plan(splits))
        case.check(filled(2, t, 75, 40, left=(0, 7)), plan=plan(splits))
    Case(1, 2, 1, 1, 64, 64).check()  # the plan of ``plan_of``, whole blocks
