"""Expert blocks in NVFP4 and MXFP4 on the grouped block-scaled GEMMs of torch (sm100) and sgl-kernel (sm100, sm120).

Never run on such a GPU by this project: calls are checked against the libraries' signatures, numbers against an emulation
on CPU that undoes the layout.

Pairs are sorted by expert, as in ``library_moe``. Both libraries read scales in tiles of 128 rows x 4 groups (``_fp4.py``), and
those of an expert's rows begin with a tile of their own: ``Places`` says where. Weights are in the layout
``experts_fp4_swizzled``: ``data`` [E, n, kp/2] u8 as in row form; ``scale`` [E, bytes] in tiles; for NVFP4 ``alpha`` [E, 1]
f32, the global scale that the rows of an expert share.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from quant_compile.ir.family import Planes, PlaneSpec, Reject, family_of
from quant_compile.ir.moe import MoeProblem
from quant_compile.ir.numerics import SMALLEST_AMAX
from quant_compile.ir.scheme import Scheme
from quant_compile.lowering.kernels._library import arch_from, multiple
from quant_compile.lowering.kernels.experts._moe import Groups, estimate_moe, group_pairs
from quant_compile.lowering.kernels.experts.library_moe import (
    LAUNCHES,
    SGL_EXPERTS,
    Product,
    _activate,
    _sum,
    copies,
    no_bias,
    present,
    sizes,
    trial,
)
from quant_compile.lowering.kernels.fp4._fp4 import ROWS, padded, swizzle, unswizzle
from quant_compile.lowering.kernels.fp4.triton_fp4 import GROUPS
from quant_compile.lowering.moe import MoeKernel, MoeLayout
from quant_compile.lowering.registry import Rank
from quant_compile.lowering.schemes.fp4 import NV_RANGE, quantize_nv
from quant_compile.lowering.target import Target

# sgl-kernel's quantizer reads experts' bounds 16 at a time.
BOUNDS = 16


# ---- layout


def _group(problem: MoeProblem) -> int:
    return GROUPS[family_of(problem.scheme).name]


def _nv(problem: MoeProblem) -> bool:
    return _group(problem) == GROUPS["nvfp4"]


def layout_planes(problem: MoeProblem, n: int, k: int) -> tuple[PlaneSpec, ...]:
    """``data``, ``scale`` and, for NVFP4, ``alpha``."""
    groups, experts = -(-k // _group(problem)), problem.experts
    rows, columns = padded(n, groups)
    return (
        PlaneSpec("data", (experts, n, groups * _group(problem) // 2), torch.uint8),
        PlaneSpec("scale", (experts, rows * columns), torch.float8_e4m3fn if _nv(problem) else torch.uint8),
        *([PlaneSpec("alpha", (experts, 1), torch.float32)] if _nv(problem) else []),
    )


def pack(planes: Planes, problem: MoeProblem, n: int, k: int) -> Planes:
    """Row form of one expert -> the layout; its rows share their global scale."""
    return planes[0], swizzle(planes[1]), *(whole[0].reshape(1) for whole in planes[2:])


def unpack(planes: Planes, problem: MoeProblem, n: int, k: int) -> Planes:
    """Inverse of ``pack``."""
    scale = unswizzle(planes[1], n, -(-k // _group(problem)))
    return planes[0], scale, *(alpha.expand(n).unsqueeze(1).contiguous() for alpha in planes[2:])


# ---- rows of experts


@dataclass(frozen=True)
class Places:
    """Where experts' rows begin; entry E stands for dropped pairs.

    Attributes:
        starts: [E + 1] int32: first row of an expert in the sorted order.
        scales: [E + 1] int32: first row of its scales, a multiple of 128.
        rows: [T * k] int64: row of the scales of each sorted row.
        total: rows of scales that any routing fits into.
    """

    starts: Tensor
    scales: Tensor
    rows: Tensor
    total: int


def places(groups: Groups, experts: int) -> Places:
    """Of sorted pairs."""
    rows, device = groups.pairs.numel(), groups.ends.device
    bounds = torch.zeros(experts + 2, dtype=torch.int32, device=device)
    bounds[1:-1], bounds[-1:] = groups.ends, rows
    starts, counts = bounds[:-1], bounds.diff()
    tiles = (counts + (ROWS - 1)) // ROWS * ROWS
    scales = tiles.cumsum(0, dtype=torch.int32) - tiles
    of = groups.experts.long()
    order = torch.arange(rows, device=device)
    most = rows + (ROWS - 1) * min(rows, experts + 1)
    return Places(starts, scales, order + (scales - starts)[of], -(-most // ROWS) * ROWS)


def spread(scale: Tensor, at: Places) -> Tensor:
    """Scales of sorted rows [r, g], g a multiple of 4 -> [total, g] in tiles, zeros between experts."""
    plain = torch.zeros((at.total, scale.shape[1]), dtype=torch.uint8, device=scale.device)
    plain[at.rows] = scale.view(torch.uint8)
    return swizzle(plain).view(scale.dtype).view(at.total, -1)


def global_scales(inner: Tensor, groups: Groups, scale2: Tensor | None, experts: int) -> Tensor:
    """NVFP4's global scale of each expert's hidden rows, [E + 1] f32 (the last: of dropped pairs)."""
    if scale2 is not None:
        return scale2.expand(experts + 1)
    largest = torch.zeros(experts + 1, device=inner.device)
    largest.scatter_reduce_(0, groups.experts.long(), inner.abs().amax(-1).float(), "amax")
    largest = largest.clamp_min(SMALLEST_AMAX)
    return largest / torch.full_like(largest, NV_RANGE)


# ---- the block


@dataclass(frozen=True)
class Operand:
    """Rows of a product.

    Attributes:
        data: codes [r, k/2] u8 in sorted order.
        scale: [total, k/G] in tiles.
        whole: NVFP4's global scale for each expert [E] f32; None in MXFP4.
    """

    data: Tensor
    scale: Tensor
    whole: Tensor | None


Multiply = Callable[[Operand, Planes, Places, Groups, Product], Tensor]
Quantize = Callable[[Tensor, Groups, Places, Tensor | None, MoeProblem], Operand]


def _runner(multiply: Multiply, quantize: Quantize) -> Callable[..., Tensor]:
    def run(
        x: Planes, ids: Tensor, weights: Tensor | None, w13: Planes, b13: Tensor | None, w2: Planes, b2: Tensor | None,
        scale2: Tensor | None, problem: MoeProblem,
    ) -> Tensor:  # fmt: skip
        p = problem
        groups = group_pairs(ids, p.experts)
        at = places(groups, p.experts)
        tokens = groups.pairs // ids.shape[1]
        scale = x[1].view(torch.uint8).index_select(0, tokens).view(x[1].dtype)
        whole = x[2].expand(p.experts).contiguous() if len(x) > 2 else None
        rows = Operand(x[0].index_select(0, tokens), spread(scale, at), whole)
        hidden = multiply(rows, w13, at, groups, Product(p, 2 * p.intermediate, p.hidden))
        (inner,) = _activate(hidden, groups, b13, None, replace(p, scheme=Scheme(p.scheme.weights)))
        out = multiply(quantize(inner, groups, at, scale2, p), w2, at, groups, Product(p, p.hidden, p.intermediate))
        return _sum(out, groups, b2, weights, ids.shape[1], p)

    run.__doc__ = multiply.__doc__
    return run


def quantize_hidden(inner: Tensor, groups: Groups, at: Places, scale2: Tensor | None, problem: MoeProblem) -> Operand:
    """Hidden rows [r, I] -> FP4, as the family quantizes the rows of each expert."""
    if not _nv(problem):
        codes, scale = family_of(problem.scheme).quantize_input(inner, problem.scheme, None)
        return Operand(codes, spread(scale, at), None)
    whole = global_scales(inner, groups, scale2, problem.experts)
    codes, scale = quantize_nv(inner, whole[groups.experts.long()].view(-1, 1, 1))
    return Operand(codes, spread(scale, at), whole[:-1].contiguous())


def _refuse(problem: MoeProblem, target: Target, high: int, schemes: tuple[str, ...]) -> Reject | None:
    if problem.scheme.input_activations is None or family_of(problem.scheme).name not in schemes:
        names = " or ".join(name.upper() for name in schemes)
        return Reject(f"multiplies {names} weights by {names} inputs")
    of = 4 * _group(problem)
    return (
        arch_from(target, 100, high)
        or no_bias(problem)
        or multiple("the hidden size", problem.hidden, of)
        or multiple("the intermediate size", problem.intermediate, of)
    )


def _rank(problem: MoeProblem, tokens: int, target: Target, launches: int) -> Rank:
    extra = copies(problem, tokens)
    cost = estimate_moe(
        problem, tokens, target, 0.5, bandwidth_efficiency=0.6, tile_m=128, launches=launches, extra_bytes=extra
    )
    return Rank(cost)


# ---- torch


def torch_product(x: Operand, w: Planes, at: Places, groups: Groups, product: Product) -> Tensor:
    """FP4 rows of experts' ranges times FP4 weights, bf16 out. Source: ``torch.nn.functional.scaled_grouped_mm``."""
    kind = F.ScalingType.BlockWise1x32 if x.whole is None else F.ScalingType.BlockWise1x16
    recipe, order = [kind], [F.SwizzleType.SWIZZLE_32_4_4]
    bits = torch.float8_e8m0fnu if x.whole is None else torch.float8_e4m3fn
    sides = [[x.scale.view(bits)], [w[1].view(bits)]]
    if x.whole is not None:
        recipe, order = [*recipe, F.ScalingType.TensorWise], [*order, F.SwizzleType.NO_SWIZZLE]
        sides[0].append(x.whole)
        sides[1].append(w[2].reshape(-1))
    fp4 = torch.float4_e2m1fn_x2
    return F.scaled_grouped_mm(
        x.data.view(fp4),
        w[0].view(fp4).transpose(1, 2),
        sides[0],
        recipe,
        sides[1],
        recipe,
        order,
        order,
        offs=groups.ends,
        output_dtype=product.problem.dtype,
    )


def fit_torch(problem: MoeProblem, tokens: int, target: Target) -> Rank | Reject:
    """NVFP4 or MXFP4 on both sides, bf16, sm100; H and I multiples of 64 (NVFP4) or 128 (MXFP4)."""
    refusal = (
        _refuse(problem, target, 103, ("nvfp4", "mxfp4"))
        or sizes(problem, 16, torch.bfloat16)
        or present(target, "aten::_scaled_grouped_mm_v2", "triton")
        or trial("torch_grouped_fp4_moe", problem, target)
    )
    return refusal or _rank(problem, tokens, target, LAUNCHES + 40)


# ---- sgl-kernel


@lru_cache(maxsize=None)
def _sgl(name: str) -> Callable[..., None]:
    importlib.import_module("sgl_kernel")
    return getattr(torch.ops.sgl_kernel, name).default


def sgl_product(x: Operand, w: Planes, at: Places, groups: Groups, product: Product) -> Tensor:
    """NVFP4 rows of experts' ranges times NVFP4 weights. Source: sgl-kernel ``cutlass_fp4_group_mm``."""
    assert x.whole is not None
    experts, device = product.problem.experts, x.data.device
    shapes = torch.empty((experts, 3), dtype=torch.int32, device=device)
    torch.sub(groups.ends, at.starts[:-1], out=shapes[:, 0])
    shapes[:, 1], shapes[:, 2] = product.n, product.k
    along_k, along_n = (
        torch.full((experts,), size, dtype=torch.int64, device=device) for size in (product.k, product.n)
    )
    y = product.empty(x.data.shape[0], device)
    scale = w[1].view(experts, product.n, -1)
    alphas = x.whole * w[2].reshape(-1)
    _sgl("cutlass_fp4_group_mm")(
        y, x.data, w[0], x.scale, scale, alphas, along_k, along_n, shapes, at.starts[:-1], at.scales[:-1]
    )
    return y


def sgl_quantize(inner: Tensor, groups: Groups, at: Places, scale2: Tensor | None, problem: MoeProblem) -> Operand:
    """Hidden rows [r, I] -> NVFP4. Source: sgl-kernel ``scaled_fp4_experts_quant``.

    It multiplies by approximate reciprocals, so that a value near a tie may fall on the other side, and makes zeros of
    groups whose scale would round to zero. Dropped pairs, and empty experts up to a multiple of 16, are experts there.
    """
    (rows, n), experts, device = inner.shape, problem.experts, inner.device
    whole = global_scales(inner, groups, scale2, experts)
    count = (experts // BOUNDS + 1) * BOUNDS
    inverse = torch.ones(count, device=device)
    inverse[: experts + 1] = whole.reciprocal()
    starts = torch.full((count + 1,), rows, dtype=torch.int32, device=device)
    scales = torch.zeros((count + 1,), dtype=torch.int32, device=device)
    starts[: experts + 1], scales[: experts + 1] = at.starts, at.scales
    codes = torch.empty((rows, n // 2), dtype=torch.uint8, device=device)
    tiles = torch.zeros((at.total, n // 64), dtype=torch.int32, device=device)
    _sgl("scaled_fp4_experts_quant")(codes, tiles, inner, inverse, starts, scales)
    return Operand(codes, tiles.view(torch.float8_e4m3fn), whole[:-1].contiguous())


def fit_sgl(problem: MoeProblem, tokens: int, target: Target) -> Rank | Reject:
    """NVFP4 on both sides, bf16 (on sm100 also f16), sm100 and sm120; H a multiple of 128, I of 64, up to 1024 experts."""
    refusal = _refuse(problem, target, 120, ("nvfp4",)) or multiple("the hidden size", problem.hidden, ROWS)
    if refusal is None and problem.experts > SGL_EXPERTS:
        refusal = Reject(f"serves up to {SGL_EXPERTS} experts, got {problem.experts}")
    dtypes = (torch.bfloat16,) if target.arch >= 120 else (torch.bfloat16, torch.float16)
    refusal = refusal or sizes(problem, 64, *dtypes)
    names = ("sgl_kernel::cutlass_fp4_group_mm", "sgl_kernel::scaled_fp4_experts_quant")
    if refusal is None and not all(map(target.has, names)):
        refusal = Reject("sgl-kernel has no cutlass_fp4_group_mm here (its 0.3 series has)")
    refusal = refusal or present(target, "triton") or trial("sgl_grouped_fp4_moe", problem, target)
    return refusal or _rank(problem, tokens, target, LAUNCHES + 36)


MOE_LAYOUTS = (MoeLayout("experts_fp4_swizzled", layout_planes, pack, unpack),)
MOE_KERNELS = (
    MoeKernel("torch_grouped_fp4_moe", "experts_fp4_swizzled", fit_torch, _runner(torch_product, quantize_hidden)),
    MoeKernel("sgl_grouped_fp4_moe", "experts_fp4_swizzled", fit_sgl, _runner(sgl_product, sgl_quantize)),
)
