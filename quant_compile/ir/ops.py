"""The ``sglq`` ops: what a rewritten graph means, before kernels are chosen. Each runs on any device as plain torch.

    sglq.quantize(x, spec, scale?) -> planes of the input
    sglq.linear(x planes, w planes, bias?, spec, dtype) -> y
    sglq.batched(x planes, w planes, spec, dtype) -> [E, M, n]: x [E, M, k] or [M, k] times every expert
    sglq.dequantize(w planes, spec, k) -> [n, k] f32
    sglq.moe(x planes, ids?, weights?, w13 planes, b13?, w2 planes, b2?, scale2?, spec, activation, dtype) -> [T, H]
    sglq.attention(q, k, v, mask?, scale, is_causal, softcap, sinks?, softmax?, k_scale?, v_scale?, codes) -> [B, Hq, T, Dv]
    sglq.latent_attention(q, w, latent, rope, mask?, scale, rope_at, key_row, value_row, value_size, latent_scale?, rope_scale?, codes)
        -> [B, Hq, T, value_size]
    sglq.all_reduce(x, codes, group, world) -> the sum of all ranks' x, of which codes are sent (``ir/sums.py``)
    sglq.cache_values(codes, scale, format, dtype) -> [B, H, L, D]: what a quantized KV cache holds (``ir/kv.py``)

``spec`` is ``Scheme.spec``. A 16-bit input has no quantize node: ``sglq.linear`` then takes ``[x]``.
``sglq.moe`` is the block of ``ir/moe.py``, whose ``spec`` may name two schemes (``spec_of``); without ids its rows are in E equal
parts, one expert each; ``none`` is the scheme of unquantized weights. ``sglq.attention`` is that of ``ir/attend.py``, with K and V as
they are kept: a head for each group; with ``codes``, a format of ``ir/kv.py``, they are codes with scales. ``sglq.latent_attention`` is
``attend_latent`` there. ``sglq.cache_values``, ``sglq.latent_attention`` and ``sglq.all_reduce`` decompose into plain torch where they
stay.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quant_compile.ir.attend import attend, attend_latent
from quant_compile.ir.family import family_of
from quant_compile.ir.kv import decode
from quant_compile.ir.moe import NONE, Activation, moe_reference, parse_spec
from quant_compile.ir.scheme import parse
from quant_compile.ir.sums import coded_sum

LIBRARY = torch.library.Library("sglq", "DEF")
LIBRARY.define("quantize(Tensor x, str spec, Tensor? scale=None) -> Tensor[]")
LIBRARY.define("linear(Tensor[] x, Tensor[] w, Tensor? bias, str spec, ScalarType dtype) -> Tensor")
LIBRARY.define(
    "moe(Tensor[] x, Tensor? ids, Tensor? weights, Tensor[] w13, Tensor? b13, Tensor[] w2, Tensor? b2, Tensor? scale2, "
    "str spec, str activation, ScalarType dtype) -> Tensor"
)
LIBRARY.define("batched(Tensor[] x, Tensor[] w, str spec, ScalarType dtype) -> Tensor")
LIBRARY.define("dequantize(Tensor[] w, str spec, SymInt k) -> Tensor")
LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool is_causal, float softcap, Tensor? sinks, "
    "ScalarType? softmax, Tensor? k_scale=None, Tensor? v_scale=None, str codes='') -> Tensor"
)
LIBRARY.define(
    "latent_attention(Tensor q, Tensor w, Tensor latent, Tensor rope, Tensor? mask, float scale, int rope_at, int key_row, "
    "int value_row, int value_size, Tensor? latent_scale=None, Tensor? rope_scale=None, str codes='') -> Tensor"
)
LIBRARY.define("cache_values(Tensor codes, Tensor scale, str format, ScalarType dtype) -> Tensor")
LIBRARY.define("all_reduce(Tensor x, str codes, str group, int world) -> Tensor")


def _quantize(x: Tensor, spec: str, scale: Tensor | None = None) -> list[Tensor]:
    scheme = parse(spec)
    # A fresh copy of a given scale: an op must not return one of its inputs.
    planes = family_of(scheme).quantize_input(x, scheme, scale)
    return [plane.clone() if plane is scale else plane for plane in planes]


def _linear(x: list[Tensor], w: list[Tensor], bias: Tensor | None, spec: str, dtype: torch.dtype) -> Tensor:
    scheme = parse(spec)
    return family_of(scheme).linear(tuple(x), tuple(w), bias, scheme, dtype)


def _linear_fake(x: list[Tensor], w: list[Tensor], bias: Tensor | None, spec: str, dtype: torch.dtype) -> Tensor:
    return x[0].new_empty((*x[0].shape[:-1], w[0].shape[0]), dtype=dtype)


def _dequantize(w: list[Tensor], spec: str, k: int) -> Tensor:
    scheme = parse(spec)
    return family_of(scheme).dequantize_weight(tuple(w), scheme, k)


def _dequantize_fake(w: list[Tensor], spec: str, k: int) -> Tensor:
    return w[0].new_empty((w[0].shape[0], k), dtype=torch.float32)


def _moe(
    x: list[Tensor], ids: Tensor | None, weights: Tensor | None, w13: list[Tensor], b13: Tensor | None, w2: list[Tensor],
    b2: Tensor | None, scale2: Tensor | None, spec: str, activation: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    scheme, scheme2 = (None, None) if spec == NONE else parse_spec(spec)
    ids = dense_ids(x[0], w13[0].shape[0]) if ids is None else ids
    how = Activation.parse(activation)
    return moe_reference(tuple(x), ids, weights, tuple(w13), b13, tuple(w2), b2, scheme, how, dtype, scale2, scheme2)


def _batched(x: list[Tensor], w: list[Tensor], spec: str, dtype: torch.dtype) -> Tensor:
    scheme = parse(spec)
    linear = family_of(scheme).linear
    rows = [
        linear(expert_rows(x, e), tuple(plane[e] for plane in w), None, scheme, dtype) for e in range(w[0].shape[0])
    ]
    return torch.stack(rows)


def expert_rows(x: Sequence[Tensor], expert: int) -> tuple[Tensor, ...]:
    """One expert's planes of x [E, M, k]; planes of an x [M, k], and a scale of the whole tensor, are every expert's."""
    return tuple(plane[expert] if plane.dim() == 3 else plane for plane in x)


def _batched_fake(x: list[Tensor], w: list[Tensor], spec: str, dtype: torch.dtype) -> Tensor:
    return x[0].new_empty((w[0].shape[0], x[0].shape[-2], w[0].shape[1]), dtype=dtype)


def dense_ids(x: Tensor, experts: int) -> Tensor:
    """Expert of each row [T, 1] of a dense block: rows in E equal parts."""
    rows = torch.arange(experts, device=x.device).unsqueeze(1)
    return rows.expand(experts, x.shape[0] // experts).reshape(-1, 1)


def _moe_fake(
    x: list[Tensor], ids: Tensor | None, weights: Tensor | None, w13: list[Tensor], b13: Tensor | None, w2: list[Tensor],
    b2: Tensor | None, scale2: Tensor | None, spec: str, activation: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return x[0].new_empty((x[0].shape[0], w2[0].shape[1]), dtype=dtype)


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool, softcap: float, sinks: Tensor | None,
    softmax: torch.dtype | None, k_scale: Tensor | None = None, v_scale: Tensor | None = None, codes: str = "",
) -> Tensor:  # fmt: skip
    return q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype if softmax is None or codes else v.dtype)


LIBRARY.impl("cache_values", decode, "CompositeImplicitAutograd")
LIBRARY.impl("all_reduce", coded_sum, "CompositeImplicitAutograd")
LIBRARY.impl("latent_attention", attend_latent, "CompositeImplicitAutograd")
LIBRARY.impl("attention", attend, "CompositeExplicitAutograd")
torch.library.register_fake("sglq::attention", _attention_fake, lib=LIBRARY)
LIBRARY.impl("batched", _batched, "CompositeExplicitAutograd")
torch.library.register_fake("sglq::batched", _batched_fake, lib=LIBRARY)
LIBRARY.impl("moe", _moe, "CompositeExplicitAutograd")
torch.library.register_fake("sglq::moe", _moe_fake, lib=LIBRARY)
LIBRARY.impl("quantize", _quantize, "CompositeExplicitAutograd")
LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
LIBRARY.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
torch.library.register_fake("sglq::quantize", _quantize, lib=LIBRARY)
torch.library.register_fake("sglq::linear", _linear_fake, lib=LIBRARY)
torch.library.register_fake("sglq::dequantize", _dequantize_fake, lib=LIBRARY)

quantize = torch.ops.sglq.quantize.default
linear = torch.ops.sglq.linear.default
dequantize = torch.ops.sglq.dequantize.default
moe = torch.ops.sglq.moe.default
batched = torch.ops.sglq.batched.default
attention = torch.ops.sglq.attention.default
latent_attention = torch.ops.sglq.latent_attention.default
cache_values = torch.ops.sglq.cache_values.default
all_reduce = torch.ops.sglq.all_reduce.default
