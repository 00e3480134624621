"""The ``sglq_kernels`` ops: a linear, or an expert block, over packed planes; the number of rows at run time chooses its kernel.

Inputs that Inductor would quantize in several kernels have ops too, which name their one kernel.

    sglq_kernels.linear(x planes, packed w planes, bias?, dispatch) -> [..., n]
    sglq_kernels.dequantize(packed w planes, dispatch) -> [n, k]: values of a weight whose linear runs as something else
    sglq_kernels.batched(x planes, row-form w planes [E, ...], dispatch) -> [E, M, n]
    sglq_kernels.moe(x planes, ids?, weights?, w13 planes, b13?, w2 planes, b2?, scale2?, dispatch) -> [T, H]
    sglq_kernels.reach(mask, queries, keys) -> what anyone sees in each block of a mask, as ``triton_prefill.reach_of`` has it
    sglq_kernels.attention(q, k, v, mask?, scale, softcap, sinks?, kernel, k_scale?, v_scale?, codes, reach?,
        blocks?)
        -> [B, Hq, T, Dv], contiguous as [B, T, Hq, Dv]
    sglq_kernels.latent_attention(q, w, latent, rope, mask?, scale, rope_at, key_row, value_row, value_size, form, latent_scale?,
        rope_scale?, codes) -> [B, Hq, T, value_size]: two products with w, and between them
    sglq_kernels.sum_latents(q in latents, q, latent, rope, mask?, scale, form, latent_scale?, rope_scale?, codes) -> [B, Hq, T, r]
    sglq_kernels.norm_quantize(x, residual?, weight, eps, weighting, spec, scale?, kernel) -> x + residual if given, x planes
    sglq_kernels.quantize_rows(x, maxima, spec, kernel) -> x planes

``dispatch`` is ``Dispatch.text``: the op carries all it needs, so a graph loaded from Inductor's cache or from a package
runs in a fresh process.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from quant_compile.ir.attend import attend, from_latents, split_query, sum_latents
from quant_compile.ir.family import family_of
from quant_compile.ir.ops import dense_ids, expert_rows
from quant_compile.ir.scheme import parse
from quant_compile.lowering.attention import attention_kernels, check_sizes, flat_scale, full_mask
from quant_compile.lowering.latent import latent_forms
from quant_compile.lowering.moe import parse_moe_dispatch
from quant_compile.lowering.registry import Kernel, Norm, Problem, input_kernels, kernels, layouts
from quant_compile.lowering.select import parse_dispatch

LIBRARY = torch.library.Library("sglq_kernels", "DEF")
LIBRARY.define("linear(Tensor[] x, Tensor[] w, Tensor? bias, str dispatch) -> Tensor")


def _linear(x: list[Tensor], w: list[Tensor], bias: Tensor | None, dispatch: str) -> Tensor:
    problem, bounds, chosen = _ready(dispatch)
    lead = x[0].shape[:-1]
    m = math.prod(lead)
    if m == 0 or problem.n == 0:
        return x[0].new_empty((*lead, problem.n), dtype=problem.dtype)
    return run_linear(chosen[bisect_left(bounds, m)], problem, x, w, bias)


@lru_cache(maxsize=None)
def _ready(dispatch: str) -> tuple[Problem, tuple[int, ...], tuple[Kernel, ...]]:
    """A dispatch as calls need it: its problem, the largest m of each range but the last, and the ranges' kernels."""
    chosen = parse_dispatch(dispatch)
    return chosen.problem, tuple(m for m, _ in chosen.table[:-1]), tuple(kernels()[name] for _, name in chosen.table)


def run_linear(
    kernel: Kernel, problem: Problem, x: Sequence[Tensor], w: Sequence[Tensor], bias: Tensor | None
) -> Tensor:
    """One kernel over input planes [..., s] -> [..., n]."""
    data = x[0]
    lead = data.shape[:-1]
    # Not by k: several codes may share an element.
    rows = data.flatten(0, -2) if len(lead) > 1 else data
    if not rows.is_contiguous():
        rows = rows.contiguous()
    planes = (rows, *(_flat_scale(scale, rows.shape[0]) for scale in x[1:]))
    y = kernel.run(planes, tuple(w), bias, problem)
    return y if len(lead) == 1 else y.view(*lead, problem.n)


def _flat_scale(scale: Tensor, m: int) -> Tensor:
    """[..., s] -> [m, s]; a scale of the whole tensor stays [1]."""
    return scale if scale.dim() <= 2 else scale.reshape(m, scale.shape[-1])


def _linear_fake(x: list[Tensor], w: list[Tensor], bias: Tensor | None, dispatch: str) -> Tensor:
    problem = parse_dispatch(dispatch).problem
    return x[0].new_empty((*x[0].shape[:-1], problem.n), dtype=problem.dtype)


LIBRARY.define("dequantize(Tensor[] w, str dispatch) -> Tensor")


def dequantized(w: list[Tensor], dispatch: str) -> Tensor:
    """Planes in a layout -> [n, k] in the problem's dtype."""
    chosen = parse_dispatch(dispatch)
    problem = chosen.problem
    rows = layouts()[chosen.layout].unpack(tuple(w), problem)
    return family_of(problem.scheme).dequantize_weight(rows, problem.scheme, problem.k).to(problem.dtype)


def _dequantize_fake(w: list[Tensor], dispatch: str) -> Tensor:
    problem = parse_dispatch(dispatch).problem
    return w[0].new_empty((problem.n, problem.k), dtype=problem.dtype)


LIBRARY.impl("dequantize", dequantized, "CompositeExplicitAutograd")
torch.library.register_fake("sglq_kernels::dequantize", _dequantize_fake, lib=LIBRARY)

LIBRARY.define(
    "moe(Tensor[] x, Tensor? ids, Tensor? weights, Tensor[] w13, Tensor? b13, Tensor[] w2, Tensor? b2, Tensor? scale2, "
    "str dispatch) -> Tensor"
)


def _moe(
    x: list[Tensor], ids: Tensor | None, weights: Tensor | None, w13: list[Tensor], b13: Tensor | None, w2: list[Tensor],
    b2: Tensor | None, scale2: Tensor | None, dispatch: str,
) -> Tensor:  # fmt: skip
    chosen = parse_moe_dispatch(dispatch)
    problem, tokens = chosen.problem, x[0].shape[0]
    if tokens == 0:
        return x[0].new_empty((0, problem.hidden), dtype=problem.dtype)
    planes = tuple(plane.contiguous() for plane in x)
    ids = dense_ids(x[0], problem.experts) if ids is None else ids.contiguous()
    weights = None if weights is None else weights.contiguous()
    run = chosen.kernel_for(tokens).run
    return run(planes, ids, weights, tuple(w13), b13, tuple(w2), b2, scale2, problem)


def _moe_fake(
    x: list[Tensor], ids: Tensor | None, weights: Tensor | None, w13: list[Tensor], b13: Tensor | None, w2: list[Tensor],
    b2: Tensor | None, scale2: Tensor | None, dispatch: str,
) -> Tensor:  # fmt: skip
    problem = parse_moe_dispatch(dispatch).problem
    return x[0].new_empty((x[0].shape[0], problem.hidden), dtype=problem.dtype)


LIBRARY.impl("moe", _moe, "CompositeExplicitAutograd")
torch.library.register_fake("sglq_kernels::moe", _moe_fake, lib=LIBRARY)
LIBRARY.define("batched(Tensor[] x, Tensor[] w, str dispatch) -> Tensor")


def _batched(x: list[Tensor], w: list[Tensor], dispatch: str) -> Tensor:
    """Expert by expert with the kernels of linears over row-form planes."""
    chosen = parse_dispatch(dispatch)
    problem, experts, m = chosen.problem, w[0].shape[0], x[0].shape[-2]
    y = x[0].new_empty((experts, m, problem.n), dtype=problem.dtype)
    if m == 0:
        return y
    run = chosen.kernel_for(m).run
    for expert in range(experts):
        planes = tuple(plane.contiguous() for plane in expert_rows(x, expert))
        if chosen.column_scales:
            planes = (planes[0], *(plane.t().contiguous().t() for plane in planes[1:]))
        y[expert] = run(planes, tuple(plane[expert] for plane in w), None, problem)
    return y


def _batched_fake(x: list[Tensor], w: list[Tensor], dispatch: str) -> Tensor:
    problem = parse_dispatch(dispatch).problem
    return x[0].new_empty((w[0].shape[0], x[0].shape[-2], problem.n), dtype=problem.dtype)


LIBRARY.impl("batched", _batched, "CompositeExplicitAutograd")
torch.library.register_fake("sglq_kernels::batched", _batched_fake, lib=LIBRARY)
LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("sglq_kernels::linear", _linear_fake, lib=LIBRARY)

LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, float softcap, Tensor? sinks, str kernel, "
    "Tensor? k_scale=None, Tensor? v_scale=None, str codes='', Tensor? reach=None, int[]? blocks=None) -> Tensor"
)
LIBRARY.define("reach(Tensor mask, int queries, int keys) -> Tensor")


def run_reach(mask: Tensor, queries: int, keys: int) -> Tensor:
    """[.., T, L] -> int32 [B, Hq, blocks of T times blocks of L]."""
    return import_module("quant_compile.lowering.kernels.attention.triton_prefill").reach_of(
        full_mask(mask), queries, keys
    )


def _reach(mask: Tensor, queries: int, keys: int) -> Tensor:
    """On a CPU nobody reads it."""
    return run_reach(mask, queries, keys) if mask.is_cuda else _reach_fake(mask, queries, keys).zero_()


def _reach_fake(mask: Tensor, queries: int, keys: int) -> Tensor:
    full = full_mask(mask)
    assert full is not None
    b, heads, t, length = full.shape
    return mask.new_empty((b, heads, -(-t // queries) * -(-length // keys)), dtype=torch.int32)


LIBRARY.impl("reach", _reach, "CompositeExplicitAutograd")
torch.library.register_fake("sglq_kernels::reach", _reach_fake, lib=LIBRARY)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float, sinks: Tensor | None, kernel: str,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, codes: str = "", reach: Tensor | None = None,
    blocks: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    if q.is_cuda:
        return run_attention(q, k, v, mask, scale, softcap, sinks, kernel, k_scale, v_scale, codes, reach, blocks)
    y = attend(q, k, v, mask, scale, False, softcap, sinks, None, k_scale, v_scale, codes)
    return y.transpose(1, 2).contiguous().transpose(1, 2)


def run_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float, sinks: Tensor | None, kernel: str,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, codes: str = "", reach: Tensor | None = None,
    blocks: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """One kernel; the last dimension of q, k and v contiguous, which it nearly always is."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    mask = full_mask(mask)
    check_sizes(q, k, v, mask)
    coded = (flat_scale(k_scale), flat_scale(v_scale), codes) if codes else ()
    given = {} if reach is None or blocks is None else {"reach": reach, "blocks": (blocks[0], blocks[1])}
    return attention_kernels()[kernel].run(q, k, v, mask, scale, softcap, sinks, *coded, **given)


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float, sinks: Tensor | None, kernel: str,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, codes: str = "", reach: Tensor | None = None,
    blocks: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)


LIBRARY.impl("attention", _attention, "CompositeExplicitAutograd")
torch.library.register_fake("sglq_kernels::attention", _attention_fake, lib=LIBRARY)
LIBRARY.define(
    "latent_attention(Tensor q, Tensor w, Tensor latent, Tensor rope, Tensor? mask, float scale, int rope_at, int key_row, "
    "int value_row, int value_size, str form, Tensor? latent_scale=None, Tensor? rope_scale=None, str codes='') -> Tensor"
)
LIBRARY.define(
    "sum_latents(Tensor q, Tensor turned, Tensor latent, Tensor rope, Tensor? mask, float scale, str form, "
    "Tensor? latent_scale=None, Tensor? rope_scale=None, str codes='') -> Tensor"
)


def _latent_attention(
    q: Tensor, w: Tensor, latent: Tensor, rope: Tensor, mask: Tensor | None, scale: float, rope_at: int, key_row: int,
    value_row: int, value_size: int, form: str, *coded: Any,
) -> Tensor:  # fmt: skip
    own, turned = split_query(q, w, latent.shape[3], rope.shape[3], rope_at, key_row)
    sums = torch.ops.sglq_kernels.sum_latents.default(own, turned, latent, rope, mask, scale, form, *coded)
    return from_latents(sums, w, value_row, value_size)


def run_latents(
    q: Tensor, turned: Tensor, latent: Tensor, rope: Tensor, mask: Tensor | None, scale: float, form: str, *coded: Any
) -> Tensor:
    """One kernel, or plain torch where there is no GPU."""
    run = latent_forms()[form].run
    if not q.is_cuda or run is None:
        return sum_latents(q, turned, latent, rope, mask, scale, *coded).transpose(1, 2).contiguous().transpose(1, 2)
    mask = full_mask(mask)
    check_sizes(q, latent, latent, mask)
    return run(q, turned, latent, rope, mask, scale, *coded)


def _sum_latents_fake(q: Tensor, turned: Tensor, latent: Tensor, *more: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3])).transpose(1, 2)


LIBRARY.impl("latent_attention", _latent_attention, "CompositeImplicitAutograd")
LIBRARY.impl("sum_latents", run_latents, "CompositeExplicitAutograd")
torch.library.register_fake("sglq_kernels::sum_latents", _sum_latents_fake, lib=LIBRARY)
LIBRARY.define(
    "norm_quantize(Tensor x, Tensor? residual, Tensor weight, float eps, str weighting, str spec, Tensor? scale, str kernel) "
    "-> Tensor[]"
)
LIBRARY.define("quantize_rows(Tensor x, Tensor maxima, str spec, str kernel) -> Tensor[]")


def normed(x: Tensor, norm: Norm) -> Tensor:
    """[..., k] -> RMSNorm in x's dtype, as eager torch computes it."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    if norm.weighting == "after_cast":
        return norm.weight * wide.to(x.dtype)
    return (wide * (norm.weight.float() + (norm.weighting == "one_plus"))).to(x.dtype)


def _norm_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weighting: str, spec: str, scale: Tensor | None,
    kernel: str,
) -> list[Tensor]:  # fmt: skip
    """A scale that is given is not among the planes: an op must not return one of its inputs."""
    scheme, norm = parse(spec), Norm(weight, eps, weighting)
    if not x.is_cuda:
        h = x if residual is None else x + residual
        planes = family_of(scheme).quantize_input(normed(h, norm), scheme, scale)
        return [*(() if residual is None else (h,)), *(plane for plane in planes if plane is not scale)]
    rows = residual if residual is None else _rows(residual)
    return _with_lead(x, input_kernels()[kernel].run(_rows(x), rows, norm, scheme, scale))


def _norm_quantize_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weighting: str, spec: str, scale: Tensor | None,
    kernel: str,
) -> list[Tensor]:  # fmt: skip
    sums = [] if residual is None else [x.new_empty(x.shape)]
    return sums + _planes_fake(x, spec)


def _planes_fake(x: Tensor, spec: str) -> list[Tensor]:
    """Codes and scales of groups, which have the form of a weight's."""
    scheme, k = parse(spec), int(x.shape[-1])
    specs = family_of(scheme).weight_planes(scheme, 1, k, x.dtype)[:2]
    return [x.new_empty((*x.shape[:-1], *plane.shape[1:]), dtype=plane.dtype) for plane in specs]


def _quantize_rows(x: Tensor, maxima: Tensor, spec: str, kernel: str) -> list[Tensor]:
    scheme = parse(spec)
    if not x.is_cuda:
        return list(family_of(scheme).quantize_input(x, scheme, None))
    *planes, whole = input_kernels()[kernel].run(_rows(x), maxima.flatten().contiguous(), scheme)
    return [*_with_lead(x, planes), whole]


def _quantize_rows_fake(x: Tensor, maxima: Tensor, spec: str, kernel: str) -> list[Tensor]:
    return [*_planes_fake(x, spec), x.new_empty((1,), dtype=torch.float32)]


def _rows(x: Tensor) -> Tensor:
    """[..., k] -> [m, k], contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _with_lead(x: Tensor, planes: Sequence[Tensor]) -> list[Tensor]:
    """[m, s] of each plane -> x's leading dimensions and s."""
    return [plane.view(*x.shape[:-1], plane.shape[-1]) for plane in planes]


LIBRARY.impl("norm_quantize", _norm_quantize, "CompositeExplicitAutograd")
torch.library.register_fake("sglq_kernels::norm_quantize", _norm_quantize_fake, lib=LIBRARY)
LIBRARY.impl("quantize_rows", _quantize_rows, "CompositeExplicitAutograd")
torch.library.register_fake("sglq_kernels::quantize_rows", _quantize_rows_fake, lib=LIBRARY)

linear = torch.ops.sglq_kernels.linear.default
dequantize = torch.ops.sglq_kernels.dequantize.default
norm_quantize = torch.ops.sglq_kernels.norm_quantize.default
quantize_rows = torch.ops.sglq_kernels.quantize_rows.default
moe = torch.ops.sglq_kernels.moe.default
batched = torch.ops.sglq_kernels.batched.default
latent_attention = torch.ops.sglq_kernels.latent_attention.default
attention = torch.ops.sglq_kernels.attention.default
reach = torch.ops.sglq_kernels.reach.default
