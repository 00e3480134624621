"""MoE blocks on grouped GEMMs of torch, sgl-kernel and humming.

All sort the chosen (token, expert) pairs by expert, gather the tokens' rows in that order, multiply every expert's range of
rows by its own weight in one launch, and sum a token's rows. They differ in the grouped GEMM alone. Gathered rows and the
hidden layer are written to memory, which pays for prompts; for a few tokens a fused kernel is better.

A library that is present but fails here (another version's signature, a missing architecture) must not fail a model:
before the first answer of ``fit`` on a device each GEMM runs a small block and is compared with the reference.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, PlaneSpec, Reject, family_of
from quant_compile.ir.moe import Activation, MoeProblem, moe_reference, random_ids, stack_planes
from quant_compile.ir.numerics import FLOAT_MAX, SMALLEST_AMAX
from quant_compile.lowering.kernels._library import arch_from, fp8_blocks, fp8_rows, multiple, row_scale
from quant_compile.lowering.kernels.experts._moe import Groups, estimate_moe, group_pairs, weigh_and_sum
from quant_compile.lowering.kernels.weight_only import humming_w4a16
from quant_compile.lowering.kernels.weight_only.triton_w4a16 import LOCKS, pack_tiles, tile_planes, unpack_tiles
from quant_compile.lowering.moe import MoeKernel, MoeLayout, moe_kernels, moe_layouts
from quant_compile.lowering.registry import Problem, Rank
from quant_compile.lowering.target import Target

# CUTLASS's grouped GEMM keeps tensor maps of every multiprocessor here: some 90 kB on a H200.
WORKSPACE_BYTES = 1 << 20
# sgl-kernel prepares all experts' pointers in one thread block.
SGL_EXPERTS = 1024
# Kernels around the two GEMMs: sorting (7), inverse order (2), gathering (3), activation, the sum.
LAUNCHES = 14
# Where a sum of the first product differs in its last bits, the hidden layer's code may be the next one, 6 % away.
TRIAL_TOLERANCE = 3e-2


@dataclass(frozen=True)
class Product:
    """One of the two grouped products: rows [T * k, k] of experts' ranges times w [E, n, k] -> [T * k, n]."""

    problem: MoeProblem
    n: int
    k: int

    def empty(self, rows: int, device: torch.device) -> Tensor:
        """Where the result goes; rows of dropped pairs stay as they are."""
        return torch.empty((rows, self.n), dtype=self.problem.dtype, device=device)


GroupedMm = Callable[[Planes, Planes, Groups, Product], Tensor]


# ---- what lies around the products


def _gather(x: Planes, tokens: Tensor) -> Planes:
    """Rows of some tokens; a scale of the whole tensor stays. Codes move as 8-byte words."""
    data = x[0].view(torch.int64).index_select(0, tokens).view(x[0].dtype)
    return (data, *(plane if plane.dim() == 1 else plane.index_select(0, tokens) for plane in x[1:]))


def _activate(hidden: Tensor, groups: Groups, b13: Tensor | None, scale2: Tensor | None, problem: MoeProblem) -> Planes:
    """[r, 2 i] -> input planes of the second product."""
    a = problem.scheme.input_activations
    if not hidden.is_cuda:
        if b13 is not None:
            hidden = hidden + b13[groups.experts.long().clamp(max=problem.experts - 1)]
        inner = problem.activation(hidden)
        return (inner,) if a is None else family_of(problem.scheme).quantize_input(inner, problem.scheme, scale2)
    return activate(hidden, groups, b13, scale2, problem)


def activate(
    hidden: Tensor, groups: Groups, b13: Tensor | None, scale2: Tensor | None, problem: MoeProblem,
    codes: torch.dtype = torch.float8_e4m3fn,
) -> Planes:  # fmt: skip
    """``_activate`` in one launch; ``codes`` of a wider dtype are clamped and not rounded. Source: ``_triton_moe_rows``."""
    from quant_compile.lowering.kernels.experts import _triton_moe_rows as source

    a, act = problem.scheme.input_activations, problem.activation
    rows, size = hidden.shape[0], hidden.shape[1] // 2
    width = 1 << (size - 1).bit_length()
    if a is not None and a.group_size:
        group, count = a.group_size, -(-size // a.group_size)
        per_program = min(8, 1 << (count - 1).bit_length())
    else:
        # A scale per row needs the whole row in one program.
        group, count, per_program = width if a is not None and a.dynamic else min(width, 1024), 1, 1
    quant = "none" if a is None else "dynamic" if a.dynamic else "static"
    out = torch.empty((rows, size), dtype=codes if a is not None else hidden.dtype, device=hidden.device)
    scale = out.new_empty((rows, count), dtype=torch.float32) if quant == "dynamic" else None
    source.activate_kernel[(rows, -(-size // (group * per_program)))](
        hidden, b13, groups.experts, scale2, out, scale, size, count, problem.experts, act.alpha,
        act.limit if act.limit != float("inf") else 0.0, act.shift,
        KIND=act.kind, LIMITED=act.limit != float("inf"), HAS_BIAS=b13 is not None, QUANT=quant, MAX=FLOAT_MAX["e4m3"],
        SMALLEST=SMALLEST_AMAX, G=per_program, GROUP=group, num_warps=max(1, min(16, group * per_program // 512)),
    )  # fmt: skip
    if quant == "none":
        return (out,)
    return out, scale if scale is not None else _known(scale2)


def _known(scale: Tensor | None) -> Tensor:
    if scale is None:
        raise ValueError("a static scheme needs the calibrated scale of the hidden layer")
    return scale


def _sum(
    out: Tensor, groups: Groups, b2: Tensor | None, weights: Tensor | None, top_k: int, problem: MoeProblem
) -> Tensor:
    """Rows in sorted order -> [T, n]."""
    tokens = out.shape[0] // top_k
    if not out.is_cuda:
        if b2 is not None:
            out = out + b2[groups.experts.long().clamp(max=problem.experts - 1)]
        return weigh_and_sum(out, groups, weights, (tokens, top_k), problem.experts)
    return weigh(out, groups, b2, weights, top_k)


def weigh(out: Tensor, groups: Groups, b2: Tensor | None, weights: Tensor | None, top_k: int) -> Tensor:
    """``_sum`` in one launch. Source: ``_triton_moe_rows``."""
    from quant_compile.lowering.kernels.experts import _triton_moe_rows as source

    rows, size = out.shape
    order = torch.arange(rows, dtype=torch.int32, device=out.device)
    place = torch.empty_like(order).scatter_(0, groups.pairs, order)
    y = torch.empty((rows // top_k, size), dtype=out.dtype, device=out.device)
    block = min(1024, 1 << (size - 1).bit_length())
    source.weigh_kernel[(rows // top_k, -(-size // block))](
        out, place, None if weights is None else weights.contiguous(), groups.ends[-1:], b2, groups.experts, y, size,
        TOP_K=top_k, HAS_WEIGHTS=weights is not None, HAS_BIAS=b2 is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return y


def _run(
    x: Planes, ids: Tensor, weights: Tensor | None, w13: Planes, b13: Tensor | None, w2: Planes, b2: Tensor | None,
    scale2: Tensor | None, problem: MoeProblem, product: GroupedMm,
) -> Tensor:  # fmt: skip
    p = problem
    groups = group_pairs(ids, p.experts)
    rows = _gather(x, groups.pairs // ids.shape[1])
    hidden = product(rows, w13, groups, Product(p, 2 * p.intermediate, p.hidden))
    inner = _activate(hidden, groups, b13, scale2, p)
    out = product(inner, w2, groups, Product(p, p.hidden, p.intermediate))
    return _sum(out, groups, b2, weights, ids.shape[1], p)


# ---- torch: FP8 with a scale per row and per token


@lru_cache(maxsize=None)
def _torch_op() -> Callable[..., Tensor]:
    return torch.ops.aten._scaled_grouped_mm.default


def torch_grouped(x: Planes, w: Planes, groups: Groups, product: Product) -> Tensor:
    """e4m3 rows and e4m3 weights, bf16 out. Source: ``torch._scaled_grouped_mm`` (CUTLASS, sm90)."""
    scale = row_scale(x[1], x[0].shape[0]).reshape(-1)
    return _torch_op()(
        x[0],
        w[0].transpose(1, 2),
        scale,
        w[1].squeeze(-1),
        groups.ends,
        None,
        None,
        product.problem.dtype,
        True,
    )


def fit_torch(problem: MoeProblem, tokens: int, target: Target) -> Rank | Reject:
    """FP8 per row with inputs per token or a calibrated scale, bf16, sm90; H and I multiples of 16."""
    refusal = (
        fp8_rows(problem.scheme)
        or no_dynamic_tensor(problem)
        or no_bias(problem)
        or arch_from(target, 90, 90)
        or sizes(problem, 16, torch.bfloat16)
        or present(target, "aten::_scaled_grouped_mm", "triton")
        or trial("torch_grouped_fp8_moe", problem, target)
    )
    return refusal or Rank(cost(problem, tokens, target, 0.6, tile_m=64))


def no_bias(problem: MoeProblem) -> Reject | None:
    if problem.has_bias:
        return Reject("adds biases to rounded products, which moves codes of the hidden layer")
    return None


def no_dynamic_tensor(problem: MoeProblem) -> Reject | None:
    a = problem.scheme.input_activations
    if a is not None and a.strategy == "tensor" and a.dynamic:
        return Reject("a dynamic scale of the whole hidden layer would need all rows before the first is written")
    return None


# ---- sgl-kernel: FP8 in 128x128 blocks


@lru_cache(maxsize=None)
def _sgl(name: str) -> Callable[..., None]:
    importlib.import_module("sgl_kernel")
    return getattr(torch.ops.sgl_kernel, name).default


@dataclass(frozen=True)
class _Sgl:
    """Tensors that describe the experts' problems to CUTLASS: starts [E] i32, sizes [E, 3] i32, strides [E] i64."""

    starts: Tensor
    sizes: Tensor
    row: Tensor
    column: Tensor
    workspace: Tensor


def _describe(groups: Groups, product: Product) -> _Sgl:
    ends, experts = groups.ends, product.problem.experts
    starts = torch.zeros_like(ends)
    starts[1:] = ends[:-1]
    sizes = torch.empty((experts, 3), dtype=torch.int32, device=ends.device)
    torch.sub(ends, starts, out=sizes[:, 0])
    sizes[:, 1], sizes[:, 2] = product.n, product.k
    row, column = (
        torch.full((experts,), size, dtype=torch.int64, device=ends.device) for size in (product.k, product.n)
    )
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=ends.device)
    return _Sgl(starts, sizes, row, column, workspace)


def sgl_grouped(x: Planes, w: Planes, groups: Groups, product: Product) -> Tensor:
    """e4m3 rows with scales [r, k/128], weights with scales [E, n/128, k/128].

    Pointers and layouts are written by the op itself into buffers of E entries.
    Source: sgl-kernel ``fp8_blockwise_scaled_grouped_mm``.
    """
    about, experts, device = _describe(groups, product), product.problem.experts, x[0].device
    pointers = torch.empty((5, experts), dtype=torch.int64, device=device)
    layouts = torch.empty((2, experts, 5), dtype=torch.int32, device=device)
    y = product.empty(x[0].shape[0], device)
    _sgl("fp8_blockwise_scaled_grouped_mm")(
        y, *pointers, x[0], w[0].transpose(1, 2), x[1].contiguous(), w[1].transpose(1, 2), about.row, about.row,
        about.column, layouts[0], layouts[1], about.sizes, about.starts, about.workspace,
    )  # fmt: skip
    return y


def sgl_expert_grouped(x: Planes, w: Planes, groups: Groups, product: Product) -> Tensor:
    """As ``sgl_grouped``, with tiles that follow each expert's number of rows (sm90 only).

    Source: sgl-kernel ``es_fp8_blockwise_scaled_grouped_mm``.
    """
    about = _describe(groups, product)
    y = product.empty(x[0].shape[0], x[0].device)
    _sgl("es_fp8_blockwise_scaled_grouped_mm")(
        y, x[0], w[0].transpose(1, 2), x[1].contiguous(), w[1].transpose(1, 2), about.row, about.row, about.column,
        about.sizes, about.starts, about.workspace,
    )  # fmt: skip
    return y


def _refuse_sgl(problem: MoeProblem, target: Target, op: str, high: int) -> Reject | None:
    if problem.experts > SGL_EXPERTS:
        return Reject(f"serves up to {SGL_EXPERTS} experts, got {problem.experts}")
    return (
        fp8_blocks(problem.scheme)
        or no_bias(problem)
        or arch_from(target, 90, high)
        or sizes(problem, 128, torch.bfloat16, torch.float16)
        or present(target, f"sgl_kernel::{op}", "triton")
    )


def fit_sgl(problem: MoeProblem, tokens: int, target: Target) -> Rank | Reject:
    """FP8 in 128x128 blocks, bf16 or f16, sm90 and sm100; H and I multiples of 128."""
    refusal = _refuse_sgl(problem, target, "fp8_blockwise_scaled_grouped_mm", 100)
    refusal = refusal or trial("sgl_grouped_fp8_moe", problem, target)
    return refusal or Rank(cost(problem, tokens, target, 0.5, tile_m=32 if tokens * problem.top_k <= 2048 else 128))


def fit_sgl_expert(problem: MoeProblem, tokens: int, target: Target) -> Rank | Reject:
    """FP8 in 128x128 blocks, bf16 or f16, sm90; H and I multiples of 128."""
    refusal = _refuse_sgl(problem, target, "es_fp8_blockwise_scaled_grouped_mm", 90)
    refusal = refusal or trial("sgl_expert_fp8_moe", problem, target)
    return refusal or Rank(cost(problem, tokens, target, 0.5, tile_m=32, launches=LAUNCHES + 24))


# ---- humming: 4-bit weights under 16-bit inputs


def _dense(product: Product) -> Problem:
    return Problem(product.problem.scheme, product.n, product.k, product.problem.dtype)


@lru_cache(maxsize=None)
def _humming_gemm(product: Product, top: int, device: torch.device) -> Tensor:
    """One compiled grouped GEMM with humming's own choice of tiles for ``top`` rows; [4] int64 on CPU."""
    from humming.config import LayerConfig
    from humming.kernel.humming import HummingKernel
    from humming.tune import get_heuristics_config

    fields: dict[str, Any] = humming_w4a16.layer_config(_dense(product)) | {"num_experts": product.problem.experts}
    with torch.cuda.device(device):
        layer = LayerConfig(**fields)
        tuning = dict(get_heuristics_config(layer, shape_m=top, gemm_type="grouped_contiguous", device=device))
        return HummingKernel.prepare_kernels(layer.to_str(), {"gemm_type": "grouped_contiguous"}, tuning, device)


def humming_grouped(x: Planes, w: Planes, groups: Groups, product: Product) -> Tensor:
    """bf16 or f16 rows times int4 weights in ``experts_w4_tiles``.

    Split-K programs meet at locks that must be zero when it starts; they are made here and not with the weights, so that
    no caller can hand in others, on which the GPU would wait for ever.
    Source: humming_kernels' grouped contiguous GEMM.
    """
    rows, experts = x[0].shape[0], product.problem.experts
    zeros = torch.zeros(LOCKS + experts + 1, dtype=torch.int32, device=x[0].device)
    locks, bounds = zeros[:LOCKS], zeros[LOCKS:]
    bounds[1:] = groups.ends
    gemm = _humming_gemm(product, 1 << (rows - 1).bit_length(), x[0].device)
    zero = w[2] if len(w) == 3 else None
    return torch.ops.humming.launch_kernel.default(
        gemm, x[0], w[0], w[1], None, None, None, zero, None, None, None, None, None, bounds, locks, 1, 0
    )


def fit_humming(problem: MoeProblem, tokens: int, target: Target) -> Rank | Reject:
    """int4 weights, groups of 32, 64, 128 or a scale per row, bf16 or f16; 2 I, H and I multiples of 128."""
    for product in (
        Product(problem, 2 * problem.intermediate, problem.hidden),
        Product(problem, problem.hidden, problem.intermediate),
    ):
        answer = humming_w4a16.fit(_dense(product), max(1, tokens * problem.top_k // problem.experts), target)
        if isinstance(answer, Reject):
            return Reject(f"[{product.n}, {product.k}]: {answer.reason}")
    refusal = present(target, "triton") or trial("humming_grouped_w4a16_moe", problem, target)
    return refusal or Rank(
        estimate_moe(
            problem, tokens, target, 0.6, math_bits=16, bandwidth_efficiency=0.55, tile_m=16, launches=LAUNCHES + 4,
            extra_bytes=copies(problem, tokens),
        )
    )  # fmt: skip


def _tiles(problem: MoeProblem, n: int, k: int) -> Problem:
    return Problem(problem.scheme, n, k, problem.dtype)


def _tile_planes(problem: MoeProblem, n: int, k: int) -> tuple[PlaneSpec, ...]:
    """``w4_tiles`` of every expert without its locks."""
    return tuple(
        PlaneSpec(s.name, (problem.experts, *s.shape), s.dtype) for s in tile_planes(_tiles(problem, n, k))[:-1]
    )


def _pack(planes: Planes, problem: MoeProblem, n: int, k: int) -> Planes:
    return pack_tiles(planes, _tiles(problem, n, k))[:-1]


# ---- shared by fit


def cost(
    problem: MoeProblem, tokens: int, target: Target, efficiency: float, tile_m: int, launches: int = LAUNCHES + 8
) -> float:
    extra = copies(problem, tokens)
    return estimate_moe(
        problem,
        tokens,
        target,
        efficiency,
        bandwidth_efficiency=0.6,
        tile_m=tile_m,
        launches=launches,
        extra_bytes=extra,
    )


def copies(problem: MoeProblem, tokens: int) -> float:
    """Bytes of gathered rows and of the activated hidden layer, written and read."""
    width = 1 if problem.scheme.input_activations is not None else problem.dtype.itemsize
    return 2.0 * width * tokens * problem.top_k * (problem.hidden + problem.intermediate)


def sizes(problem: MoeProblem, of: int, *dtypes: torch.dtype) -> Reject | None:
    if problem.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return Reject(f"writes {names}, not {str(problem.dtype).removeprefix('torch.')}")
    return multiple("the hidden size", problem.hidden, of) or multiple(
        "the intermediate size", problem.intermediate, of
    )


def present(target: Target, *names: str) -> Reject | None:
    missing = next((name for name in names if not target.has(name)), None)
    return None if missing is None else Reject(f"{missing} is not here")


def trial(name: str, problem: MoeProblem, target: Target) -> Reject | None:
    """Whether a kernel gives right results on this GPU; targets that are not this machine are believed."""
    if target.ops is not None or not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
        return None
    reason = try_small(name, problem.scheme.spec, problem.dtype, torch.cuda.current_device())
    return None if reason is None else Reject(f"fails here: {reason}")


@lru_cache(maxsize=None)
def try_small(name: str, spec: str, dtype: torch.dtype, device: int) -> str | None:
    """Run a kernel on a block of four experts; None when it agrees with the reference, else what went wrong."""
    from quant_compile.ir.scheme import parse

    problem = MoeProblem(parse(spec), 4, 512, 256, 2, Activation("silu"), dtype)
    kernel = (moe_kernels() | {peer.name: peer for peer in PEERS})[name]
    try:
        with torch.inference_mode(False), torch.no_grad():
            error = _error(kernel, problem, torch.device("cuda", device))
    except Exception as failure:  # whatever a library does, the answer is that it cannot be used
        return f"{type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0]}"
    return None if error <= TRIAL_TOLERANCE else f"differs from the reference by {error:.1e}"


def _error(kernel: MoeKernel, problem: MoeProblem, device: torch.device, tokens: int = 24) -> float:
    """Relative Frobenius error on random operands."""
    p, family = problem, family_of(problem.scheme)
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(p.dtype)

    def weight(n: int, k: int) -> Planes:
        return stack_planes([family.quantize_weight(random(n, k) * k**-0.5, p.scheme) for _ in range(p.experts)])

    scale = torch.full((1,), 0.02, device=device) if p.scheme.static else None
    x = random(tokens, p.hidden)
    planes = (x,) if p.scheme.input_activations is None else family.quantize_input(x, p.scheme, scale)
    w13, w2 = weight(2 * p.intermediate, p.hidden), weight(p.hidden, p.intermediate)
    ids = random_ids(tokens, p.experts, p.top_k, device, generator)
    weights = torch.rand((tokens, p.top_k), generator=generator, device=device)
    expected = moe_reference(planes, ids, weights, w13, None, w2, None, p.scheme, p.activation, p.dtype, scale).float()
    pack = moe_layouts()[kernel.layout].pack
    w13, w2 = (
        stack_planes([pack(tuple(q[e] for q in planes), p, n, k) for e in range(p.experts)])
        for planes, n, k in ((w13, 2 * p.intermediate, p.hidden), (w2, p.hidden, p.intermediate))
    )
    got = kernel.run(planes, ids, weights, w13, None, w2, None, scale, p).float()
    error = float((got - expected).norm() / expected.norm())
    return error if error == error else float("inf")


def runner(product: GroupedMm) -> Callable[..., Tensor]:
    def run(
        x: Planes, ids: Tensor, weights: Tensor | None, w13: Planes, b13: Tensor | None, w2: Planes, b2: Tensor | None,
        scale2: Tensor | None, problem: MoeProblem,
    ) -> Tensor:  # fmt: skip
        return _run(x, ids, weights, w13, b13, w2, b2, scale2, problem, product)

    run.__doc__ = product.__doc__
    return run


MOE_LAYOUTS = (
    MoeLayout(
        "experts_w4_tiles",
        _tile_planes,
        _pack,
        lambda planes, p, n, k: unpack_tiles(planes, _tiles(p, n, k)),
    ),
)
MOE_KERNELS = (
    MoeKernel("torch_grouped_fp8_moe", "experts", fit_torch, runner(torch_grouped)),
    MoeKernel("sgl_grouped_fp8_moe", "experts", fit_sgl, runner(sgl_grouped)),
    MoeKernel("sgl_expert_fp8_moe", "experts", fit_sgl_expert, runner(sgl_expert_grouped)),
)
# Not chosen by itself: no decode kernel reads its layout, so the layout loses as a whole, and measuring that would compile
# several GEMMs of seconds each in every process that has humming. The benchmark shows where it would win.
PEERS = (MoeKernel("humming_grouped_w4a16_moe", "experts_w4_tiles", fit_humming, runner(humming_grouped)),)
