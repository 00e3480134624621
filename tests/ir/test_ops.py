"""The sglq ops: real results and fakes agree in shape and dtype, and nothing returned is an argument."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from quant_compile.ir import ops
from quant_compile.ir.family import family_of
from quant_compile.ir.moe import random_ids
from quant_compile.ir.scheme import PRESETS, Scheme, parse
from quant_compile.lowering import ops as kernel_ops
from quant_compile.lowering.registry import Problem
from quant_compile.lowering.select import Dispatch

K = 96
# Of GGUF types those that have blocks of 32 and a quantizer.
ABLE = [
    name
    for name, scheme in PRESETS.items()
    if family_of(scheme).takes_size(scheme, 7, K) is None and family_of(scheme).quantizes(scheme) is None
]
SPECS = [*ABLE, "int4.group32+16", "int4.channel.asym+16", "fp8e4m3.channel+16"]
SHAPES = [(5, 96), (2, 3, 96), (0, 96), (96,)]


def scale_for(scheme: Scheme) -> Tensor | None:
    return torch.tensor([0.02]) if scheme.static else None


def signature(values: Tensor | list[Tensor]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes."""
    return [(tuple(value.shape), value.dtype) for value in (values if isinstance(values, list) else [values])]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_fakes_agree(spec: str, shape: tuple[int, ...]) -> None:
    scheme = parse(spec)
    x, w = torch.randn(shape).bfloat16(), torch.randn(7, 96).bfloat16()
    planes = list(family_of(scheme).quantize_weight(w, scheme))

    def quantize(x: Tensor, scale: Tensor | None) -> list[Tensor]:
        return [x] if scheme.input_activations is None else ops.quantize(x, spec, scale)

    def linear(x: list[Tensor], planes: list[Tensor]) -> Tensor:
        return ops.linear(x, planes, None, spec, torch.bfloat16)

    quantized = quantize(x, scale_for(scheme))
    y = linear(quantized, planes)
    back = ops.dequantize(planes, spec, 96)
    mode = FakeTensorMode()
    fake = lambda value: mode.from_tensor(value)  # noqa: E731
    with mode:
        scale = scale_for(scheme)
        faked = quantize(fake(x), fake(scale) if scale is not None and not hasattr(scale, "fake_mode") else scale)
        assert signature(faked) == signature(quantized)
        assert signature(linear(faked, [fake(plane) for plane in planes])) == signature(y)
        assert signature(ops.dequantize([fake(plane) for plane in planes], spec, 96)) == signature(back)
    assert tuple(y.shape) == (*shape[:-1], 7) and back.dtype == torch.float32


@pytest.mark.parametrize("spec", ["FP8", "W8A8_STATIC"])
def test_a_given_scale_is_copied(spec: str) -> None:
    """An op that returns one of its arguments is illegal: Inductor would reuse its memory."""
    scale = torch.tensor([0.5])
    planes = ops.quantize(torch.randn(2, 4), spec, scale)
    assert planes[1].data_ptr() != scale.data_ptr() and torch.equal(planes[1], scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", ["FP8_DYNAMIC", "FP8_TENSOR_DYNAMIC", "FP8_BLOCK", "W8A8", "W8A16", "W4A16"])
def test_kernel_op_equals_the_scheme_for_every_shape(spec: str, shape: tuple[int, ...]) -> None:
    scheme = parse(spec)
    family = family_of(scheme)
    x, w, bias = torch.randn(shape), torch.randn(7, 96), torch.randn(7)
    planes = family.quantize_weight(w, scheme)
    quantized = (x,) if scheme.input_activations is None else family.quantize_input(x, scheme, None)
    text = Dispatch(Problem(scheme, 7, 96, torch.float32, True), "rows", ((4096, "reference"),)).text
    got = kernel_ops.linear(list(quantized), list(planes), bias, text)
    wanted = family.linear(quantized, planes, bias, scheme, torch.float32)
    assert got.shape == wanted.shape == (*shape[:-1], 7)
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_kernel_op_over_a_strided_input() -> None:
    scheme = parse("W8A16")
    planes = list(family_of(scheme).quantize_weight(torch.randn(7, 96), scheme))
    text = Dispatch(Problem(scheme, 7, 96, torch.float32), "rows", ((4096, "reference"),)).text
    x = torch.randn(96, 5).t()
    assert torch.equal(
        kernel_ops.linear([x], planes, None, text), kernel_ops.linear([x.contiguous()], planes, None, text)
    )


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (4, 4), (4, 8), (1, 3)])
def test_random_ids_are_those_of_a_router(experts: int, top_k: int) -> None:
    """Distinct for each token; a rank that holds fewer experts than a token has gets them all."""
    ids = random_ids(50, experts, top_k, "cpu", torch.Generator().manual_seed(0))
    assert ids.shape == (50, top_k) and int(ids.min()) >= 0 and int(ids.max()) < experts
    assert {len(set(row)) for row in ids.tolist()} == {min(experts, top_k)}
    assert set(ids.flatten().tolist()) == set(range(experts))
