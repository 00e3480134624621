"""The ``sglq`` ops: what a rewritten graph means, before kernels are chosen. Each runs on any device as plain torch.

    sglq.quantize(x, spec, scale?) -> planes of the input
    sglq.linear(x planes, w planes, bias?, spec, dtype) -> y
    sglq.dequantize(w planes, spec, k) -> [n, k] f32

``spec`` is ``Scheme.spec``. A 16-bit input has no quantize node: ``sglq.linear`` then takes ``[x]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_compile.ir.family import family_of
from quant_compile.ir.scheme import parse

LIBRARY = torch.library.Library("sglq", "DEF")
LIBRARY.define("quantize(Tensor x, str spec, Tensor? scale=None) -> Tensor[]")
LIBRARY.define("linear(Tensor[] x, Tensor[] w, Tensor? bias, str spec, ScalarType dtype) -> Tensor")
LIBRARY.define("dequantize(Tensor[] w, str spec, SymInt k) -> Tensor")


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


LIBRARY.impl("quantize", _quantize, "CompositeExplicitAutograd")
LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
LIBRARY.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
torch.library.register_fake("sglq::quantize", _quantize, lib=LIBRARY)
torch.library.register_fake("sglq::linear", _linear_fake, lib=LIBRARY)
torch.library.register_fake("sglq::dequantize", _dequantize_fake, lib=LIBRARY)

quantize = torch.ops.sglq.quantize.default
linear = torch.ops.sglq.linear.default
dequantize = torch.ops.sglq.dequantize.default
