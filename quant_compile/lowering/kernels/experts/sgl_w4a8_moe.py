"""MoE blocks of int4 weights under e4m3 inputs (W4AFP8) on sgl-kernel's grouped GEMM for sm90.

The op multiplies int4 rows [E, n, k/2] with bf16 scales of 128 inputs by e4m3 rows of experts' ranges, and the result by one
number. Inputs with a scale per token are multiplied by 1 there and by their scales afterwards, in f32, at the price of one
more rounding.

It reads the layout ``experts_w4a8_cutlass``: ``data`` [E, n, k/2] int8 with two's complement codes, even k in the low nibble;
``scale`` [E, g/u, n u] bf16, where u neighbouring groups of a row lie together: 4 where k is a multiple of 512, else 1.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, PlaneSpec, Reject
from quant_compile.ir.moe import MoeProblem
from quant_compile.lowering.kernels._library import arch_from
from quant_compile.lowering.kernels.experts._moe import Groups, estimate_moe
from quant_compile.lowering.kernels.experts.library_moe import (
    LAUNCHES,
    SGL_EXPERTS,
    Product,
    copies,
    no_bias,
    no_dynamic_tensor,
    present,
    runner,
    sizes,
    trial,
)
from quant_compile.lowering.moe import MoeKernel, MoeLayout
from quant_compile.lowering.registry import Rank
from quant_compile.lowering.target import Target

NAME = "sgl_w4a8_moe"
OP = "sgl_kernel::cutlass_w4a8_moe_mm"
GROUP = 128
# Code + 8 in both nibbles of a byte, and code in two's complement: they differ in the nibbles' upper bits.
OFFSET = 0x88


def _unit(k: int) -> int:
    """Groups of a row whose scales lie together: as many as the op takes in one step."""
    return 4 if k % (4 * GROUP) == 0 else 1


def layout_planes(problem: MoeProblem, n: int, k: int) -> tuple[PlaneSpec, ...]:
    """``data`` and ``scale``."""
    unit, groups = _unit(k), k // GROUP
    return (
        PlaneSpec("data", (problem.experts, n, k // 2), torch.int8),
        PlaneSpec("scale", (problem.experts, groups // unit, n * unit), torch.bfloat16),
    )


def pack(planes: Planes, problem: MoeProblem, n: int, k: int) -> Planes:
    """Row form of one expert -> the layout."""
    data, scale = planes
    unit = _unit(k)
    together = scale.reshape(n, -1, unit).permute(1, 0, 2).reshape(-1, n * unit)
    return (data ^ OFFSET).view(torch.int8), together.contiguous()


def unpack(planes: Planes, problem: MoeProblem, n: int, k: int) -> Planes:
    """Inverse of ``pack``."""
    data, scale = planes
    apart = scale.reshape(-1, n, _unit(k)).permute(1, 0, 2).reshape(n, -1)
    return data.view(torch.uint8) ^ OFFSET, apart.contiguous()


@lru_cache(maxsize=None)
def _op() -> Callable[..., None]:
    importlib.import_module("sgl_kernel")
    return torch.ops.sgl_kernel.cutlass_w4a8_moe_mm.default


def w4a8_grouped(x: Planes, w: Planes, groups: Groups, product: Product) -> Tensor:
    """e4m3 rows with scales [r, 1] or [1] times int4 weights in ``experts_w4a8_cutlass``, bf16 out.

    Problems are (n, rows, k), for the op computes the transpose. Source: sgl-kernel ``cutlass_w4a8_moe_mm``.
    """
    data, scale = x
    rows, experts, device = data.shape[0], product.problem.experts, data.device
    starts = torch.zeros_like(groups.ends)
    starts[1:] = groups.ends[:-1]
    shapes = torch.empty((experts, 3), dtype=torch.int32, device=device)
    shapes[:, 0], shapes[:, 2] = product.n, product.k
    torch.sub(groups.ends, starts, out=shapes[:, 1])
    along_k, along_n = (
        torch.full((experts, 3), size, dtype=torch.int64, device=device) for size in (product.k, product.n)
    )
    per_token = scale.numel() != 1
    factor = torch.ones(1, device=device) if per_token else scale.reshape(1)
    y = product.empty(rows, device)
    _op()(
        y, data, w[0], factor, w[1], starts, shapes, along_k, along_k, along_n, along_n, GROUP, product.problem.top_k
    )  # fmt: skip
    return y.mul_(scale) if per_token else y


def _serves(problem: MoeProblem) -> Reject | None:
    w, a = problem.scheme.weights, problem.scheme.input_activations
    if (w.type, w.num_bits, w.strategy, w.symmetric) != ("int", 4, "group", True) or a is None or a.format != "e4m3":
        return Reject("serves symmetric 4-bit integer weights per group with e4m3 inputs")
    if w.group_size != GROUP:
        return Reject(f"groups must have {GROUP} inputs, got {w.group_size}")
    return no_dynamic_tensor(problem) or no_bias(problem)


def fit(problem: MoeProblem, tokens: int, target: Target) -> Rank | Reject:
    """int4 in groups of 128 under e4m3 inputs per token or with a calibrated scale, bf16, sm90; H and I multiples of 128."""
    refusal = _serves(problem) or arch_from(target, 90, 90) or sizes(problem, GROUP, torch.bfloat16)
    if refusal is None and problem.experts > SGL_EXPERTS:
        refusal = Reject(f"serves up to {SGL_EXPERTS} experts, got {problem.experts}")
    refusal = refusal or present(target, OP, "triton") or trial(NAME, problem, target)
    if refusal is not None:
        return refusal
    # As measured on an H200 for 128 experts of 768 x 2048.
    return Rank(
        estimate_moe(
            problem, tokens, target, 0.12, bandwidth_efficiency=0.4, tile_m=16, launches=LAUNCHES + 12,
            extra_bytes=copies(problem, tokens),
        )
    )  # fmt: skip


MOE_LAYOUTS = (MoeLayout("experts_w4a8_cutlass", layout_planes, pack, unpack),)
MOE_KERNELS = (MoeKernel(NAME, "experts_w4a8_cutlass", fit, runner(w4a8_grouped)),)
