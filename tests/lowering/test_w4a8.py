"""W4A8, W4AFP8 and QServe: codes and bounds of the schemes, sgl-kernel's layouts and calls, Triton kernels without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import quant_compile  # noqa: F401  (registers the schemes)
from quant_compile.ir.errors import SchemeError
from quant_compile.ir.family import Planes, Reject, bits_per_weight, family_of
from quant_compile.ir.numerics import SMALLEST_AMAX
from quant_compile.ir.scheme import STRATEGIES, QuantArgs, Scheme, parse
from quant_compile.lowering.kernels.scaled import sgl_int8
from quant_compile.lowering.kernels.w4a8 import sgl_int8_decoded, sgl_qserve
from quant_compile.lowering.kernels.w4a8 import triton_w4a8 as kernel
from quant_compile.lowering.registry import Layout, Problem, Rank, kernels, layouts
from quant_compile.lowering.schemes import fp8, int8, w4a8, weight_only
from quant_compile.lowering.schemes.weight_only import pack_nibbles, unpack_nibbles
from quant_compile.lowering.target import FAKE_OPS, Target
from tests.lowering.library_schemas import through_schema
from tests.lowering.triton_support import compile_cubin, needs_triton, run_interpreted

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
PRESETS = ("W4A8", "W4AFP8", "QSERVE_W4A8_CHANNEL", "QSERVE_W4A8_GROUP")
GROUP32 = "int4.channel_group32.asym+int8.token.dynamic"
QSERVE = ("QSERVE_W4A8_CHANNEL", "QSERVE_W4A8_GROUP", GROUP32)
SYMMETRIC = ("W4A8", "W4AFP8", "int4.group32+int8.tensor", "int4.channel+fp8e4m3.tensor.dynamic")
QSERVE_OPS = frozenset({"sgl_kernel::qserve_w4a8_per_chn_gemm", "sgl_kernel::qserve_w4a8_per_group_gemm"})
SM90 = Target.fake("sm90")
WITHOUT = Target.fake("sm90", FAKE_OPS - QSERVE_OPS)
examples = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def matrices(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (F32, BF16, F16)) -> Tensor:
    """[n, k] of rows of many magnitudes, off centre or not, with odd k and k below a group; zero rows and groups too."""
    dtype, n = draw(st.sampled_from(dtypes)), draw(st.integers(1, 5))
    k = draw(st.sampled_from([1, 2, 15, 31, 32, 33, 127, 128, 130, 257, 384]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.randn(n, k, generator=generator)
    magnitude = torch.tensor([2.0 ** draw(st.integers(-18, 6)) for _ in range(n)]).unsqueeze(1)
    w = (w + draw(st.sampled_from([0.0, 0.0, 4.0, -4.0]))) * magnitude
    if draw(st.booleans()):
        w[:, : min(k, 128)] = 0
    if draw(st.booleans()):
        w[0] = 0
    return w.to(dtype)


# --- the schemes as data ---


@pytest.mark.parametrize("name", [*PRESETS, GROUP32, *SYMMETRIC])
def test_specs_round_trip(name: str) -> None:
    scheme = parse(name)
    assert scheme.spec == name and Scheme.from_fields(scheme.to_fields()) == scheme
    assert QuantArgs.from_spec(scheme.weights.spec) == scheme.weights


def test_channel_group_is_a_strategy_with_a_group_size() -> None:
    assert "channel_group" in STRATEGIES
    args = QuantArgs(4, "int", "channel_group", symmetric=False, group_size=128)
    assert args.spec == "int4.channel_group128.asym" and QuantArgs.from_spec(args.spec) == args
    assert parse("QSERVE_W4A8_GROUP").weights == args and bits_per_weight(parse("QSERVE_W4A8_GROUP")) == 4 + 16 / 128
    for strategy, size in (("channel_group", None), ("channel", 128)):
        with pytest.raises(SchemeError, match="group_size"):
            QuantArgs(4, "int", strategy, group_size=size)


def test_who_owns_what() -> None:
    assert all(family_of(parse(name)).name == "w4a8" for name in SYMMETRIC)
    assert all(family_of(parse(name)).name == "qserve" for name in QSERVE)
    for name in ("W4A16", "W4A16_ASYM", "int4.channel.asym+16", "int4.group32+16"):
        assert family_of(parse(name)).name == "weight_only"


@pytest.mark.parametrize(
    ("spec", "reasons"),
    [
        ("int4.group128.asym+int8.token.dynamic", ("symmetric 4-bit integers", "per channel or channel_group")),
        ("int4.group24+int8.token.dynamic", ("power of two from 16 up, got 24",)),
        ("int4.channel_group24.asym+int8.token.dynamic", ("power of two from 16 up, got 24",)),
        ("int4.group128+int8.token", ("per-token input scales must be dynamic",)),
        ("int4.group128+int4.token.dynamic", ("8-bit codes",)),
        ("int4.group128+int8.token.asym.dynamic", ("symmetric 8-bit codes",)),
        ("int4.group128+fp8e5m2.token.dynamic", ("must be e4m3, got e5m2",)),
        ("int4.group128+int8.group128.dynamic", ("per token or tensor",)),
        ("int4.channel.asym+fp8e4m3.token.dynamic", ("dynamic symmetric 8-bit integers per token",)),
        ("int4.channel_group128.asym+16", ("dynamic symmetric 8-bit integers per token", "inputs must be quantized")),
        ("int4.channel_group128+int8.token.dynamic", ("asymmetric 4-bit integers",)),
        ("int4.tensor+int8.token.dynamic", ("per group or channel",)),
    ],
)
def test_refusals_say_why(spec: str, reasons: tuple[str, ...]) -> None:
    with pytest.raises(SchemeError) as error:
        family_of(parse(spec))
    assert all(reason in str(error.value) for reason in reasons)


# --- symmetric weights ---


@pytest.mark.parametrize("name", SYMMETRIC)
@examples
@given(matrices())
def test_weights_are_weight_onlys(name: str, w: Tensor) -> None:
    scheme = parse(name)
    family, alone = family_of(scheme), Scheme(scheme.weights)
    ours, theirs = family.quantize_weight(w, scheme), weight_only.quantize_weight(w, alone)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    specs = family.weight_planes(scheme, *w.shape, w.dtype)
    assert [(s.shape, s.dtype) for s in specs] == [(tuple(p.shape), p.dtype) for p in ours]
    back = family.dequantize_weight(ours, scheme, w.shape[1])
    assert torch.equal(back, weight_only.dequantize_weight(theirs, alone, w.shape[1]))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", ["int8", "fp8e4m3"])
def test_inputs_are_those_of_the_eight_bit_families(kind: str, static: bool) -> None:
    flag = "" if static else ".dynamic"
    x, scale = torch.randn(2, 3, 70).bfloat16(), torch.tensor([0.02]) if static else None
    for strategy in ("tensor",) if static else ("token", "tensor"):
        scheme = parse(f"int4.group128+{kind}.{strategy}{flag}")
        owner = (int8 if kind == "int8" else fp8).quantize_input
        got, wanted = family_of(scheme).quantize_input(x, scheme, scale), owner(x, scheme, scale)
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(got, wanted, strict=True))
        assert got[1].shape == ((2, 3, 1) if strategy == "token" else (1,))


def test_codes_are_compressed_tensors() -> None:
    """The weight's codes and bytes, from compressed-tensors' own functions; its scale to the last bit but one."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = parse("W4A8")
    args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=128, symmetric=True)
    for dtype in (F32, BF16, F16):
        w = (torch.randn(64, 512) * 0.05).to(dtype)
        w[3, 128:256] = 0
        data, scale = family_of(scheme).quantize_weight(w, scheme)
        grouped = w.float().unflatten(1, (4, 128))
        theirs, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
        nonzero = grouped.abs().amax(-1) > 0
        assert torch.allclose(scale.float()[nonzero], theirs.to(dtype).float()[nonzero], rtol=torch.finfo(dtype).eps)
        codes = quantize(w.float(), scale.float(), torch.zeros_like(zero), args, dtype=torch.int8)
        assert torch.equal(unpack_nibbles(data, 512), (codes + 8).to(torch.uint8))
        assert torch.equal(pack_to_int32(codes, 4).view(torch.uint8), data)


def test_asymmetric_channels_are_compressed_tensors() -> None:
    """Codes of QServe's weights under the scale and zero point of compressed-tensors' asymmetric channel."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(num_bits=4, type="int", strategy="channel", symmetric=False)
    scheme, w = parse("QSERVE_W4A8_CHANNEL"), torch.randn(64, 300) * 0.05 + 0.01
    data, scale, zero = family_of(scheme).quantize_weight(w, scheme)
    theirs, their_zero = calculate_qparams(w.amin(1, keepdim=True), w.amax(1, keepdim=True), args)
    assert ((scale.float() >= theirs * (1 - 2.0**-22)) & (scale.float() <= theirs * (1 + 2.0**-10))).all()
    assert ((zero.int() - 8 - their_zero.int()).abs() <= 1).all()
    codes = quantize(w, scale.float(), zero.float() - 8, args, dtype=torch.int8)
    # compressed-tensors rounds w / scale + zero, the family round(w / scale) + zero: the same but for ties to even.
    assert (unpack_nibbles(data, 300).int() != codes.int() + 8).float().mean() <= 1e-3


@pytest.mark.parametrize("name", SYMMETRIC)
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_linear_of_groups_is_the_integer_sum_of_each_group(name: str, dtype: torch.dtype) -> None:
    """int64 (int8 inputs) or f64 sums of codes per group, then scales: what every kernel computes."""
    scheme, k = parse(name), 300
    family = family_of(scheme)
    x, w, bias = torch.randn(4, k).to(dtype), (torch.randn(17, k) * 0.1).to(dtype), torch.randn(17).to(dtype)
    x_planes = family.quantize_input(x, scheme, torch.tensor([0.03]) if scheme.static else None)
    w_planes = family.quantize_weight(w, scheme)
    exact = torch.int64 if x_planes[0].dtype == torch.int8 else torch.float64
    codes = unpack_nibbles(w_planes[0], k).to(exact) - 8
    group, total = weight_only.group_of(scheme, k), torch.zeros(4, 17, dtype=torch.float64)
    for i, start in enumerate(range(0, k, group)):
        part = x_planes[0].to(exact)[:, start : start + group] @ codes[:, start : start + group].t()
        total += part.double() * w_planes[1][:, i].double()
    wanted = total * x_planes[1].double() + bias.double()
    got = family.linear(x_planes, w_planes, bias, scheme, dtype)
    # f32 sums, then one rounding to the dtype.
    limit = 1e-5 + {F32: 0.0, F16: 2.0**-11, BF16: 2.0**-8}[dtype]
    assert got.dtype == dtype and float((got.double() - wanted).norm() / wanted.norm()) <= limit


# --- QServe ---


def qserve_steps(scheme: Scheme, planes: Planes, n: int, k: int) -> Tensor:
    """Largest error of each element: half a step, and for two levels half a step of each."""
    scale = planes[1].float()
    if scheme.weights.group_size is None:
        return (scale * 0.5).expand(n, k)
    group = planes[2].float().repeat_interleave(scheme.weights.group_size, 1)[:, :k]
    return scale * (0.5 + 0.5 * group)


@pytest.mark.parametrize("name", QSERVE)
@examples
@given(matrices())
def test_qserve_error_is_within_half_a_step_of_each_level(name: str, w: Tensor) -> None:
    scheme, (n, k) = parse(name), w.shape
    family = family_of(scheme)
    planes = family.quantize_weight(w, scheme)
    specs = family.weight_planes(scheme, n, k, w.dtype)
    assert [(s.shape, s.dtype) for s in specs] == [(tuple(p.shape), p.dtype) for p in planes]
    back = family.dequantize_weight(planes, scheme, k)
    assert ((back - w.float()).abs() <= qserve_steps(scheme, planes, n, k) * (1 + 1e-5)).all()
    assert (back[w == 0] == 0).all(), "zeros stay zeros"


@examples
@given(matrices())
def test_qserve_channel_scale_is_the_next_half(w: Tensor) -> None:
    """No smaller f16 would cover the range, so no value is clipped and no step is wasted."""
    scheme = parse("QSERVE_W4A8_CHANNEL")
    _, scale, zero = family_of(scheme).quantize_weight(w, scheme)
    spread = w.float().amax(1).clamp_min(0) - w.float().amin(1).clamp_max(0)
    wanted = spread.clamp_min(SMALLEST_AMAX).double() / 15
    below = (scale.view(torch.int16) - 1).view(F16).double().reshape(-1)
    assert (scale.double().reshape(-1) >= wanted * (1 - 1e-6)).all() and (below < wanted * (1 + 1e-6)).all()
    assert (zero <= 15).all()


@pytest.mark.parametrize("name", ["QSERVE_W4A8_GROUP", GROUP32])
@examples
@given(matrices())
def test_qserve_levels_stay_in_their_ranges(name: str, w: Tensor) -> None:
    scheme, k = parse(name), w.shape[1]
    planes = family_of(scheme).quantize_weight(w, scheme)
    _, scale, group_scale, zero = planes
    assert ((group_scale >= 1) & (group_scale <= 16)).all() and (zero <= 15).all()
    level1 = w4a8.level1_codes(planes, scheme, k)
    assert level1.abs().max() <= 127, "group_scale * (q - zero) is an int8"
    steps = (w.float() / scale.float()).abs()
    assert steps.max() <= 119 * (1 + 1e-6)
    size = scheme.weights.group_size
    assert size is not None
    for i, part in enumerate((w.float() / scale.float()).round().split(size, 1)):
        spread = part.amax(1).clamp_min(0) - part.amin(1).clamp_max(0)
        assert torch.equal(group_scale[:, i].float(), (spread / 15).ceil().clamp_min(1))


@st.composite
def half_scales(draw: st.DrawFn, rows: int) -> tuple[Tensor, torch.dtype]:
    """[rows, 1] f16 numbers as f32 and a dtype that holds a hundred times each exactly; subnormal ones too."""
    dtype = draw(st.sampled_from([F32, BF16, F16]))
    powers = st.integers(-24, 8).map(lambda e: 2.0**e)
    halves = st.integers(1, 0x5C00).map(lambda bits: float(torch.tensor(bits, dtype=torch.int16).view(F16)))
    numbers = draw(st.lists(halves if dtype == F32 else powers, min_size=rows, max_size=rows))
    return torch.tensor(numbers).unsqueeze(1), dtype


@st.composite
def channel_grids(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [n, k] with both ends in each row, zero points and scales [n, 1], and the weights they stand for."""
    n, k = draw(st.integers(1, 5)), draw(st.sampled_from([2, 3, 31, 64, 257]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    codes = torch.randint(0, 16, (n, k), generator=generator)
    codes[:, 0], codes[:, -1] = 0, 15
    zero = torch.tensor(draw(st.lists(st.integers(0, 15), min_size=n, max_size=n))).unsqueeze(1)
    scale, dtype = draw(half_scales(n))
    return codes, zero, scale, ((codes - zero) * scale).to(dtype)


@examples
@given(channel_grids())
def test_channel_values_on_the_grid_come_back(grid: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Quantizing what is representable, ends of the range included, changes nothing; so neither does doing it twice."""
    scheme, family, (codes, zero, scale, w) = parse("QSERVE_W4A8_CHANNEL"), w4a8.QSERVE, grid
    planes = family.quantize_weight(w, scheme)
    assert torch.equal(planes[1].float(), scale) and torch.equal(planes[2], zero.to(torch.uint8))
    assert torch.equal(unpack_nibbles(planes[0], w.shape[1]), codes.to(torch.uint8))
    back = family.dequantize_weight(planes, scheme, w.shape[1])
    assert torch.equal(back, w.float())
    assert all(torch.equal(a, b) for a, b in zip(family.quantize_weight(back, scheme), planes, strict=True))


@examples
@given(matrices())
def test_channels_that_use_both_ends_quantize_twice_to_the_same(w: Tensor) -> None:
    """Of any weight, 0 counted with it: others span 14, as scales are rounded up, and would get a smaller scale."""
    scheme, family, k = parse("QSERVE_W4A8_CHANNEL"), w4a8.QSERVE, w.shape[1]
    first = family.quantize_weight(w, scheme)
    codes = torch.cat((unpack_nibbles(first[0], k), first[2]), 1).int()
    used = codes.amax(1) - codes.amin(1)
    normal = first[1][:, 0] >= 2.0**-14  # a subnormal scale may be much too large
    assert (used[normal] >= 14).all()
    second = family.quantize_weight(family.dequantize_weight(first, scheme, k), scheme)
    same = (used == 15) | (w == 0).all(1)
    assert all(torch.equal(a[same], b[same]) for a, b in zip(first, second, strict=True))


@st.composite
def group_grids(draw: st.DrawFn, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Codes [n, g, size] with both ends in each group, zero points and group scales [n, g], scales [n, 1] and weights.

    Level 1 is (codes - zero) * group_scale within -119..119; one more group, of 119 and zeros, sets its scale: 119 is no such
    product, so that this group itself does not come back.
    """
    n, groups = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    codes = torch.randint(0, 16, (n, groups, size), generator=generator)
    codes[..., 0], codes[..., -1] = 0, 15
    zero = torch.randint(0, 16, (n, groups), generator=generator)
    largest = 119 // torch.maximum(zero, 15 - zero)
    group_scale = 1 + (torch.rand(n, groups, generator=generator) * largest).long()
    level1 = ((codes - zero.unsqueeze(-1)) * group_scale.unsqueeze(-1)).flatten(1)
    last = torch.zeros(n, size, dtype=level1.dtype)
    last[:, draw(st.integers(0, size - 1))] = draw(st.sampled_from([119, -119]))
    scale, dtype = draw(half_scales(n))
    return codes, zero, group_scale, scale, (torch.cat((level1, last), 1) * scale).to(dtype)


@pytest.mark.parametrize("name", ["QSERVE_W4A8_GROUP", GROUP32])
@examples
@given(st.data())
def test_group_values_on_the_grid_come_back(name: str, data: st.DataObject) -> None:
    """And doing it twice, beside the same 119, changes nothing either."""
    scheme, family = parse(name), w4a8.QSERVE
    size = scheme.weights.group_size
    assert size is not None
    codes, zero, group_scale, scale, w = data.draw(group_grids(size))
    groups, k = codes.shape[1], w.shape[1]
    planes = family.quantize_weight(w, scheme)
    assert torch.equal(planes[1].float(), scale)
    assert torch.equal(planes[2][:, :groups], group_scale.to(torch.int8))
    assert torch.equal(planes[3][:, :groups], zero.to(torch.uint8))
    assert torch.equal(unpack_nibbles(planes[0], k)[:, : groups * size], codes.flatten(1).to(torch.uint8))
    back = family.dequantize_weight(planes, scheme, k)
    assert torch.equal(back[:, : groups * size], w[:, : groups * size].float())
    back[:, groups * size :] = w[:, groups * size :].float()
    assert all(torch.equal(a, b) for a, b in zip(family.quantize_weight(back, scheme), planes, strict=True))


@pytest.mark.parametrize("name", QSERVE)
@pytest.mark.parametrize("k", [1, 31, 127, 128, 300, 4096])
def test_qserve_linear_is_the_int64_computation(name: str, k: int) -> None:
    scheme = parse(name)
    family = family_of(scheme)
    x, w = torch.randn(3, k) + 2.0, torch.randn(9, k) * 0.1 + 0.03
    x_planes, w_planes = family.quantize_input(x, scheme, None), family.quantize_weight(w, scheme)
    codes = unpack_nibbles(w_planes[0], k).long()
    if scheme.weights.group_size is None:
        values = codes - w_planes[2].long()
        assert torch.equal(x_planes[2].reshape(-1).long(), x_planes[0].long().sum(1))
    else:
        size = scheme.weights.group_size
        zero, group = (p.long().repeat_interleave(size, 1)[:, :k] for p in (w_planes[3], w_planes[2]))
        values = (codes - zero) * group
    total = x_planes[0].long() @ values.t()
    wanted = total.float() * x_planes[1] * w_planes[1].reshape(-1).float()
    assert torch.equal(family.linear(x_planes, w_planes, None, scheme, F32), wanted)


def test_qserve_sum_has_the_shape_of_a_scale_and_is_exact_at_the_largest_rows() -> None:
    scheme = parse("QSERVE_W4A8_CHANNEL")
    codes, scale, total = family_of(scheme).quantize_input(torch.ones(2, 3, 131071).bfloat16(), scheme, None)
    assert codes.shape == (2, 3, 131071) and scale.shape == total.shape == (2, 3, 1) and total.dtype == F32
    assert (total == 127 * 131071).all(), "every partial sum of 131071 codes is below 2^24"


@pytest.mark.parametrize("name", [*PRESETS, GROUP32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_surface(name: str, bad: float) -> None:
    """In an input: its row. In a weight: all that shares its scale, and nothing else."""
    scheme, k = parse(name), 256
    family = family_of(scheme)
    x, w = torch.randn(3, k), torch.randn(4, k)
    clean = family.quantize_weight(w, scheme)
    spoiled = x.clone()
    spoiled[1, 5] = bad
    y = family.linear(family.quantize_input(spoiled, scheme, None), clean, None, scheme, F32)
    assert not torch.isfinite(y[1]).any() and torch.isfinite(y[[0, 2]]).all()
    w[2, 7] = bad
    planes = family.quantize_weight(w, scheme)
    shared = slice(0, 128) if name in ("W4A8", "W4AFP8") else slice(0, k)
    back = family.dequantize_weight(planes, scheme, k)
    assert not torch.isfinite(back[2, 7]) and not torch.isfinite(back[2, shared]).all()
    y = family.linear(family.quantize_input(x, scheme, None), planes, None, scheme, F32)
    assert not torch.isfinite(y[:, 2]).any() and torch.isfinite(y[:, [0, 1, 3]]).all()


@pytest.mark.parametrize("name", QSERVE)
def test_a_scale_beyond_f16_surfaces(name: str) -> None:
    scheme, w = parse(name), torch.randn(2, 64)
    w[1] *= 2.0**26
    family = family_of(scheme)
    y = family.linear(
        family.quantize_input(torch.randn(1, 64), scheme, None), family.quantize_weight(w, scheme), None, scheme, F32
    )
    assert torch.isfinite(y[0, 0]) and not torch.isfinite(y[0, 1])


@pytest.mark.parametrize("name", [*PRESETS, *SYMMETRIC])
def test_quantize_input_is_traced_whole(name: str) -> None:
    """One graph without breaks, any number of rows, the same numbers."""
    scheme = parse(name)
    family = family_of(scheme)
    scale = torch.tensor([0.02]) if scheme.static else None
    traced = torch.compile(
        lambda x, s: family.quantize_input(x, scheme, s), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for rows in (2, 5):
        x = torch.randn(rows, 3, 40).bfloat16()
        for got, wanted in zip(traced(x, scale), family.quantize_input(x, scheme, scale), strict=True):
            assert got.dtype == wanted.dtype and torch.equal(got.float(), wanted.float())
    torch._dynamo.reset()


# --- sgl-kernel ---

CHANNEL, GROUPED = (layouts()[name] for name in ("qserve_channel", "qserve_group"))
SGL = {"QSERVE_W4A8_CHANNEL": ("sgl_qserve_channel", CHANNEL), "QSERVE_W4A8_GROUP": ("sgl_qserve_group", GROUPED)}


def qserve_weight(name: str, n: int, k: int, seed: int = 0, dtype: torch.dtype = BF16) -> tuple[Planes, Problem]:
    """Row-form planes of an off-centre random weight, and its problem."""
    generator = torch.Generator().manual_seed(seed)
    w = (torch.randn(n, k, generator=generator) * 0.05 + 0.02).to(dtype)
    scheme = parse(name)
    return family_of(scheme).quantize_weight(w, scheme), Problem(scheme, n, k, dtype)


@pytest.mark.parametrize("name", SGL)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(n=st.integers(1, 9), k=st.integers(1, 4), seed=st.integers(0, 9))
def test_sgl_layouts_unpack_to_what_was_packed(name: str, n: int, k: int, seed: int) -> None:
    layout: Layout = SGL[name][1]
    rows, problem = qserve_weight(name, 32 * n, 128 * k, seed)
    packed = layout.pack(rows, problem)
    assert [(s.shape, s.dtype) for s in layout.planes(problem)] == [(tuple(p.shape), p.dtype) for p in packed]
    assert all(plane.is_contiguous() for plane in packed)
    back = layout.unpack(packed, problem)
    assert [(b.dtype, b.shape) for b in back] == [(r.dtype, r.shape) for r in rows]
    assert all(torch.equal(a, b) for a, b in zip(rows, back, strict=True))


@pytest.mark.parametrize("scale", [2.0**-24, 2.0**-20, 1e-3, 4000.0])
def test_channel_layout_keeps_zero_points_under_any_scale(scale: float) -> None:
    planes = (torch.zeros(128, 64, dtype=torch.uint8), torch.full((128, 1), scale, dtype=F16))
    zero = (torch.arange(128) % 16).to(torch.uint8).reshape(-1, 1)
    problem = Problem(parse("QSERVE_W4A8_CHANNEL"), 128, 128, F16)
    back = CHANNEL.unpack(CHANNEL.pack((*planes, zero), problem), problem)
    assert torch.equal(back[2], zero)


def test_rows_of_the_channel_layout_can_be_cut() -> None:
    rows, problem = qserve_weight("QSERVE_W4A8_CHANNEL", 384, 128)
    block = CHANNEL.row_block(problem)
    whole = CHANNEL.pack(rows, problem)
    part = CHANNEL.pack(tuple(p[block : 2 * block] for p in rows), Problem(problem.scheme, block, 128, BF16))
    assert all(torch.equal(a[block : 2 * block], b) for a, b in zip(whole, part, strict=True))


def fragments(data: Tensor, k: int) -> Tensor:
    """Codes [n, k] as the GEMMs' threads see them, from how those address memory: not the inverse of ``interleave``.

    Lane l of a warp loads 16 bytes of a 32 x 32 tile, four words of four codes. mma m16n8k32 takes B in two registers:
    column (here row) l / 4, k = 4 (l % 4) + 0..3, the second register 16 further. Words 0 and 2 hold rows 0-7 (low
    nibbles) and 16-23 (high), words 1 and 3 rows 8-15 and 24-31; words 2 and 3 are second registers.
    """
    n = data.shape[0]
    flat = data.view(torch.uint8).reshape(n // 32, k // 32, 32, 4, 4)
    codes = torch.full((n // 32, k // 32, 32, 32), 255, dtype=torch.uint8)
    for lane in range(32):
        for word in range(4):
            row, column = lane // 4 + 8 * (word % 2), 4 * (lane % 4) + 16 * (word // 2)
            codes[:, :, row, column : column + 4] = flat[:, :, lane, word] & 15
            codes[:, :, row + 16, column : column + 4] = flat[:, :, lane, word] >> 4
    return codes.transpose(1, 2).reshape(n, k)


def per_row(plane: Tensor) -> Tensor:
    """[g, n] in the threads' order (4 bytes of rows c, c + 8, c + 16, c + 24 after another) -> [n, g]."""
    groups, n = plane.shape
    out = torch.empty((n, groups), dtype=plane.dtype)
    for place in range(n):
        out[place // 32 * 32 + place % 32 // 4 + 8 * (place % 4)] = plane[:, place]
    return out


def check_call(out: Tensor, codes: Tensor, data: Tensor, halves: list[Tensor]) -> None:
    """What the library's entry points check of both GEMMs' arguments."""
    m, k = codes.shape
    assert codes.dtype == data.dtype == torch.int8 and codes.dim() == data.dim() == 2 and k == 2 * data.shape[1]
    assert out.dtype == F16 and tuple(out.shape) == (m, data.shape[0]) and data.shape[0] % 64 == 0 and k % 128 == 0
    assert all(t.is_contiguous() for t in (out, codes, data, *halves))
    sizes = {m, data.shape[0]}
    assert all(h.dtype == F16 and h.numel() in sizes for h in halves)


def channel_double(
    codes: Tensor, data: Tensor, wscales: Tensor, ascales: Tensor, w_szs: Tensor, a_ssums: Tensor, out: Tensor
) -> None:
    """qserve_w4a8_per_chn_gemm(_in_feats, _kernel, _wscales, _ascales, _w_szs, _a_ssums, _out_feats)."""
    check_call(out, codes, data, [wscales, w_szs, ascales, a_ssums])
    assert wscales.numel() == w_szs.numel() == data.shape[0] and ascales.numel() == a_ssums.numel() == codes.shape[0]
    total = (codes.long() @ fragments(data, codes.shape[1]).long().t()).float()
    out.copy_(total * wscales.float() * ascales.float()[:, None] - w_szs.float() * a_ssums.float()[:, None])


def group_double(
    codes: Tensor, data: Tensor, zeros: Tensor, scales_i8: Tensor, wscales: Tensor, ascales: Tensor, out: Tensor
) -> None:
    """qserve_w4a8_per_group_gemm(_in_feats, _kernel, _zeros, _scales_i8, _wscales, _ascales, _out_feats)."""
    check_call(out, codes, data, [wscales, ascales])
    assert wscales.numel() == data.shape[0] and ascales.numel() == codes.shape[0]
    for plane in (zeros, scales_i8):
        assert plane.dtype == torch.int8 and tuple(plane.shape) == (codes.shape[1] // 128, data.shape[0])
        assert plane.is_contiguous()
    scale, zero = (per_row(p).long().repeat_interleave(128, 1) for p in (scales_i8, zeros))
    scaled = fragments(data, codes.shape[1]).long() * scale
    assert scaled.max() <= 255 and scaled.min() >= 0, "four codes are multiplied at once: no carry into the next"
    values = ((scaled + zero + 128) & 255) - 128
    total = (codes.long() @ values.t()).float()
    out.copy_(total * (wscales.float() * ascales.float()[:, None]))


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    called: list[str] = []
    ops = {"qserve_w4a8_per_chn_gemm": channel_double, "qserve_w4a8_per_group_gemm": group_double}

    def op(name: str) -> Callable[..., None]:
        called.append(name)
        return through_schema(name, ops[name])

    monkeypatch.setattr(sgl_qserve, "_op", op)
    return called


@pytest.mark.parametrize("name", SGL)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("magnitude", [1.0, 1e-4, 100.0])
def test_sgl_calls(name: str, dtype: torch.dtype, magnitude: float, doubles: list[str]) -> None:
    """Arguments as the library wants them; results are the family's linear up to f16's rounding of the output.

    Inputs are far off centre and of sizes whose scales f16 holds badly: what the kernel's f16 sides would spoil.
    """
    kernel, layout = kernels()[SGL[name][0]], SGL[name][1]
    rows, problem = qserve_weight(name, 128, 512, dtype=dtype)
    scheme = problem.scheme
    packed = layout.pack(rows, problem)
    for m in (1, 3, 40):
        x = ((torch.randn(m, 512) + 3.0) * magnitude).to(dtype)
        planes = family_of(scheme).quantize_input(x, scheme, None)
        for bias in (None, torch.randn(128).to(dtype)):
            assert isinstance(kernel.fit(problem, m, SM90), Rank)
            got = kernel.run(planes, packed, bias, problem)
            wanted = family_of(scheme).linear(planes, rows, bias, scheme, dtype)
            assert (got.shape, got.dtype) == (wanted.shape, dtype)
            # f16's rounding of the output, and results that it moves across a boundary of their dtype.
            limit = {BF16: 2.5e-3, F16: 6e-4}[dtype]
            assert float((got.float() - wanted.float()).norm() / wanted.float().norm()) <= limit
    assert set(doubles) == {f"qserve_w4a8_per_{'chn' if layout is CHANNEL else 'group'}_gemm"}


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("name", SGL)
def test_sgl_results_of_nan_rows_are_nan(name: str) -> None:
    rows, problem = qserve_weight(name, 128, 128)
    x = torch.randn(3, 128)
    x[1, 4] = float("nan")
    planes = family_of(problem.scheme).quantize_input(x, problem.scheme, None)
    y = kernels()[SGL[name][0]].run(planes, SGL[name][1].pack(rows, problem), None, problem)
    assert y[1].isnan().all() and torch.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize(
    ("name", "spec", "n", "k", "dtype", "target", "words"),
    [
        ("sgl_qserve_channel", "QSERVE_W4A8_CHANNEL", 192, 128, BF16, SM90, "n must be a multiple of 128, got 192"),
        ("sgl_qserve_channel", "QSERVE_W4A8_CHANNEL", 128, 96, BF16, SM90, "k must be a multiple of 128, got 96"),
        ("sgl_qserve_group", "QSERVE_W4A8_GROUP", 96, 128, BF16, SM90, "n must be a multiple of 64, got 96"),
        ("sgl_qserve_group", "QSERVE_W4A8_GROUP", 64, 130, BF16, SM90, "k must be a multiple of 128, got 130"),
        ("sgl_qserve_group", GROUP32, 64, 128, BF16, SM90, "group_size must be 128, got 32"),
        ("sgl_qserve_group", "QSERVE_W4A8_GROUP", 64, 128, F32, SM90, "writes bfloat16 or float16, not float32"),
        ("sgl_qserve_group", "QSERVE_W4A8_CHANNEL", 128, 128, BF16, SM90, "per channel_group"),
        ("sgl_qserve_channel", "QSERVE_W4A8_GROUP", 128, 128, BF16, SM90, "per channel"),
        ("sgl_qserve_channel", "W4A8", 128, 128, BF16, SM90, "uint4 weights"),
        ("sgl_qserve_channel", "QSERVE_W4A8_CHANNEL", 128, 128, BF16, Target.fake("cpu"), "needs a CUDA GPU"),
        ("sgl_qserve_group", "QSERVE_W4A8_GROUP", 64, 128, BF16, WITHOUT, "no qserve_w4a8_per_group_gemm"),
        (
            "sgl_qserve_group",
            "QSERVE_W4A8_GROUP",
            64,
            128,
            BF16,
            Target("cuda", 75, 40, "fake", SM90.ops),
            "sm80 or newer",
        ),
    ],
)
def test_sgl_refusals(
    name: str, spec: str, n: int, k: int, dtype: torch.dtype, target: Target, words: str
) -> None:  # fmt: skip
    answer = kernels()[name].fit(Problem(parse(spec), n, k, dtype), 16, target)
    assert isinstance(answer, Reject) and words in answer.reason


def test_the_double_can_fail() -> None:
    """Codes in plain row order are not what the threads expect."""
    codes = torch.randint(0, 16, (32, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = pack_nibbles(codes)
    assert torch.equal(fragments(sgl_qserve.interleave(packed, 64), 64), codes)
    assert not torch.equal(fragments(packed.view(torch.int8), 64), codes)


# --- CPU ---


@pytest.mark.parametrize("name", [*PRESETS, *SYMMETRIC, GROUP32])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 5, 7), (3, 33, 130), (9, 64, 512)])
def test_cpu_kernel(name: str, m: int, n: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from quant_compile.lowering.kernels.cpu import torch_cpu_4bit

    monkeypatch.setattr(torch_cpu_4bit, "CHUNK_ELEMENTS", 7 * k)
    scheme = parse(name)
    family, problem = family_of(scheme), Problem(scheme, n, k, F32, True)
    x = family.quantize_input(torch.randn(m, k), scheme, torch.tensor([0.03]) if scheme.static else None)
    w, bias = family.quantize_weight(torch.randn(n, k), scheme), torch.randn(n)
    assert isinstance(torch_cpu_4bit.fit(problem, m, Target.fake("cpu")), Rank)
    got, wanted = torch_cpu_4bit.run(x, w, bias, problem), family.linear(x, w, bias, scheme, F32)
    assert float((got - wanted).norm() / wanted.norm()) <= 2e-6


def test_cpu_kernel_refuses_others() -> None:
    fit = kernels()["torch_cpu_4bit"].fit
    assert "CPU only" in fit(Problem(parse("W4A8"), 8, 8, BF16), 1, SM90).reason
    assert "8-bit inputs" in fit(Problem(parse("W4A16"), 8, 8, BF16), 1, Target.fake("cpu")).reason


# --- Triton ---

# Sums of integers are exact until f32 adds groups; f32 output, so that only the order of f32 operations differs.
TOLERANCE = 2e-6
SHARED_LIMIT = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
TRITON = (
    *PRESETS,
    "int4.group64+int8.tensor.dynamic",
    "int4.group256+fp8e4m3.tensor",
    "int4.channel+int8.token.dynamic",
)


def make(spec: str, m: int, n: int, k: int, dtype: torch.dtype, has_bias: bool) -> tuple[Any, ...]:
    """(x planes, w planes, bias, problem, reference output) of seeded random data, off centre."""
    scheme, generator = parse(spec), torch.Generator().manual_seed(1000 * m + n + k)
    family = family_of(scheme)
    x = (torch.randn(m, k, generator=generator) + 0.5).to(dtype)
    w = (torch.randn(n, k, generator=generator) / 8 + 0.02).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype) if has_bias else None
    x_planes = family.quantize_input(x, scheme, torch.tensor([0.02]) if scheme.static else None)
    w_planes = family.quantize_weight(w, scheme)
    problem = Problem(scheme, n, k, dtype, has_bias)
    return x_planes, w_planes, bias, problem, family.linear(x_planes, w_planes, bias, scheme, dtype)


def check(spec: str, m: int, n: int, k: int, has_bias: bool = True, gemv: bool = False, **changes: int) -> None:
    """One launch in the interpreter against the family; QServe's integers must be equal bit for bit."""
    x, w, bias, problem, expected = make(spec, m, n, k, F32, has_bias)
    plan = replace(kernel.config(problem, m, SM90), **changes)
    actual = kernel.run_gemv(x, w, bias, problem) if gemv else kernel.launch(x, w, bias, problem, plan)
    error = float((actual - expected).norm() / expected.norm())
    assert error <= TOLERANCE, f"{spec} {m=} {n=} {k=} {gemv=} {plan}: {error:.1e}"
    if spec.startswith("QSERVE") and not has_bias and (gemv or plan.split == 1):
        assert torch.equal(actual, expected), f"{spec} {m=} {n=} {k=} {gemv=} {plan}: integers are not exact"


def check_scheme(spec: str) -> None:
    """Ragged n, k and m, odd k, k below a group, split k, several tiles each way, with and without bias."""
    check(spec, 1, 37, 300, split=1)
    check(spec, 3, 5, 7, has_bias=False)
    check(spec, 5, 70, 512, has_bias=False, split=1)
    check(spec, 9, 33, 131, split=1, has_bias=False)
    check(spec, 17, 65, 1100, split=2)
    check(spec, 2, 64, 1024, split=4, has_bias=False)
    check(spec, 70, 130, 257, has_bias=False)
    check(spec, 130, 129, 256)
    if isinstance(kernel.fit_gemv(Problem(parse(spec), 16, 64, F32), 1, SM90), Rank):
        for m, k in ((1, 40), (2, 1024), (3, 1032), (4, 4104), (7, 520), (8, 4096)):
            check(spec, m, 9, k, gemv=True, has_bias=m % 2 == 0)


def check_small_groups() -> None:
    """Groups that only dp4a serves: fewer words than a thread holds neighbours, and as many; k of an odd block size."""
    for spec in ("int4.group16+int8.token.dynamic", "int4.group32+int8.tensor.dynamic", GROUP32):
        for m, k in ((1, 72), (3, 1040), (2, 1792)):
            check(spec, m, 9, k, gemv=True)


def check_nan_and_dtypes() -> None:
    """A NaN stays in its row; f16 output is the reference's but for the last bit."""
    for spec in PRESETS:
        x, w, bias, problem, expected = make(spec, 3, 40, 256, F16, True)
        actual = kernel.run(x, w, bias, problem)
        assert actual.dtype == F16
        assert float((actual.float() - expected.float()).norm() / expected.float().norm()) <= 5e-4
        scale = x[1].clone()
        scale[1] = float("nan")
        for run in (kernel.run, kernel.run_gemv) if "FP8" not in spec else (kernel.run,):
            clean, spoiled = run(x, w, bias, problem), run((x[0], scale, *x[2:]), w, bias, problem)
            assert spoiled[1].isnan().all() and torch.equal(spoiled[[0, 2]], clean[[0, 2]])


def check_unaligned_inputs() -> None:
    """Codes that start at an odd byte are copied, not misread."""
    x, w, bias, problem, expected = make("W4A8", 2, 20, 64, F32, True)
    moved = torch.zeros(2 * 64 + 1, dtype=torch.int8)[1:].view(2, 64)
    moved.copy_(x[0])
    for run in (kernel.run, kernel.run_gemv):
        actual = run((moved, x[1]), w, bias, problem)
        assert float((actual - expected).norm() / expected.norm()) <= TOLERANCE


def check_every_code() -> None:
    """All 256 bytes of nibbles through both conversions, against arithmetic; e4m3 in units of 2^-9."""
    codes = torch.arange(16)
    for name in ("W4AFP8", "W4A8"):
        scheme = parse(name)
        data = ((codes[:, None] << 4) | codes[None, :]).reshape(256, 1).to(torch.uint8)
        unit = torch.ones(2, 2).to(torch.int8 if name == "W4A8" else torch.float8_e4m3fn)
        for column in range(2):  # one input at a time is 1: the product is that code
            x = unit.clone() if name == "W4A8" else unit.float()
            x[:, 1 - column] = 0
            x = x.to(unit.dtype)
            y = kernel.run((x, torch.ones(2, 1)), (data, torch.ones(256, 1)), None, Problem(scheme, 256, 2, F32))
            wanted = (data.reshape(-1).int() >> (4 * column) & 15) - 8
            assert torch.equal(y[0], wanted.float())


DECODED = ("QSERVE_W4A8_CHANNEL", "QSERVE_W4A8_GROUP", GROUP32, "int4.channel+int8.token.dynamic")


def check_decoded() -> None:
    """The int8 copy times its scale is the dequantized weight, bit for bit; the GEMM gets both as it wants them."""
    calls: list[tuple[Tensor, ...]] = []
    sgl_int8._op = lambda: lambda *operands: calls.append(operands)
    for spec in DECODED:
        for n, k in ((9, 128), (70, 592), (3, 1040)):
            x, w, _, problem, _ = make(spec, 2, n, k, BF16, False)
            levels, scale = kernel.decode(w, problem)
            wanted = family_of(problem.scheme).dequantize_weight(w, problem.scheme, k)
            assert levels.dtype == torch.int8 and scale.shape == (n, 1) and scale.dtype == F32
            assert torch.equal(levels.float() * scale, wanted), (spec, n, k)
            sgl_int8_decoded.run(x, w, None, problem)
            codes, columns, x_scale, w_scale, dtype, bias = calls[-1]
            assert codes is x[0] and torch.equal(columns, levels.t()) and columns.stride() == (1, k)
            assert torch.equal(x_scale, x[1]) and torch.equal(w_scale, scale) and dtype == BF16 and bias is None


def check_dequantized() -> None:
    """Copies in the model's dtype: each weight rounded once, with packed zero points, ragged groups and odd k."""
    for spec in ("W4A16", "W4A16_ASYM", "int4.channel+16", "int4.channel.asym+16", "int4.group32.asym+16"):
        scheme = parse(spec)
        for n, k in ((9, 130), (17, 592), (3, 1051)):
            for dtype in (F16, F32):  # the interpreter rounds to bf16 in its own way
                w = family_of(scheme).quantize_weight((torch.randn(n, k) / 8 + 0.02).to(dtype), scheme)
                wanted = family_of(scheme).dequantize_weight(w, scheme, k).to(dtype)
                assert torch.equal(kernel.dequantize(w, Problem(scheme, n, k, dtype)), wanted), (spec, n, k, dtype)


@needs_triton
@pytest.mark.parametrize("spec", TRITON)
def test_every_plan_in_interpreter(spec: str) -> None:
    run_interpreted(__name__, "check_scheme", spec)


@needs_triton
@pytest.mark.parametrize(
    "function",
    [
        "check_small_groups",
        "check_decoded",
        "check_dequantized",
        "check_nan_and_dtypes",
        "check_unaligned_inputs",
        "check_every_code",
    ],
)
def test_in_interpreter(function: str) -> None:
    run_interpreted(__name__, function)


@needs_triton
def test_interpreted_check_can_fail() -> None:
    """A check that raises in the interpreter's process fails here: the tests above are not vacuous."""
    with pytest.raises(AssertionError, match="no_such_field"):
        run_interpreted(__name__, "check_with_wrong_plan")


def check_with_wrong_plan() -> None:
    """Raises."""
    check("W4A8", 1, 8, 32, no_such_field=1)


OPTIONAL = ("sw_ptr", "group_scale_ptr", "zero_ptr", "sum_ptr", "bias_ptr")


def weight_types(scheme: Scheme) -> dict[str, str]:
    """Pointer types of what scales and offsets a weight's codes."""
    if scheme.weights.strategy == "channel_group":
        return {"sw_ptr": "*fp16", "group_scale_ptr": "*i8", "zero_ptr": "*u8"}
    if family_of(scheme).name == "qserve":
        return {"sw_ptr": "*fp16", "zero_ptr": "*u8", "sum_ptr": "*fp32"}
    return {"sw_ptr" if scheme.weights.group_size is None else "group_scale_ptr": "*bf16"}


def compile_tile(problem: Problem, plan: kernel.Config, arch: int, even: bool = True) -> Any:
    """The cubin that a launch of ``plan`` would build on ``arch``."""
    from quant_compile.lowering.kernels.w4a8 import _triton_w4a8 as source

    scheme = problem.scheme
    types = {"x_ptr": "*i16", "w_ptr": "*u8", "sx_ptr": "*fp32", **weight_types(scheme)}
    types |= {name: "i32" for name in ("m", "n", "pairs", "groups", "sx_row", "steps")}
    types |= {"y_ptr": "*fp32"} if plan.split > 1 else {"y_ptr": "*bf16", "bias_ptr": "*bf16"}
    constants: dict[str, Any] = {name: None for name in OPTIONAL if name not in types}
    constants |= {"BLOCK_M": plan.block_m, "BLOCK_N": plan.block_n, "STEP": kernel.step_pairs(scheme), "EVEN": even}
    constants |= {"PAIRS_PER_GROUP": (scheme.weights.group_size or 0) // 2, "FLOAT8": kernel.float8(scheme)}
    constants |= {"PROGRESSIVE": "group_scale_ptr" in types and "zero_ptr" in types, "SPLIT": plan.split, "ASM": True}
    options = {"num_warps": plan.warps, "num_stages": plan.stages}
    return compile_cubin(source.tile_kernel, arch, types, constants, aligned=even, **options)


def compile_gemv(problem: Problem, m: int, arch: int, even: bool = True) -> Any:
    """The cubin that ``triton_w4a8_gemv`` would build on ``arch``."""
    from quant_compile.lowering.kernels.w4a8 import _triton_w4a8 as source

    block_n, block_k, warps = kernel.gemv_config(problem, m)
    types = {"x_ptr": "*i64", "w_ptr": "*i32", "sx_ptr": "*fp32", **weight_types(problem.scheme)}
    types |= {"bias_ptr": "*bf16", "y_ptr": "*bf16"}
    types |= {name: "i32" for name in ("m", "n", "words", "groups", "sx_row")}
    constants: dict[str, Any] = {name: None for name in OPTIONAL if name not in types}
    constants |= {"M": m, "BLOCK_N": block_n, "BLOCK_K": block_k, "EVEN": even, "ASM": True}
    constants["WORDS_PER_GROUP"] = (problem.scheme.weights.group_size or 0) // 8
    constants["PROGRESSIVE"] = "group_scale_ptr" in types and "zero_ptr" in types
    return compile_cubin(source.gemv_kernel, arch, types, constants, aligned=even, num_warps=warps)


ARCHES = [(arch, spec) for arch in (80, 89, 90, 100, 120) for spec in PRESETS if arch != 80 or spec != "W4AFP8"]


@needs_triton
@pytest.mark.parametrize(("arch", "spec"), ARCHES)
def test_cubins(arch: int, spec: str) -> None:
    """Every plan of a shape compiles for the arch, within its shared memory, on 8-bit tensor cores and in a pipeline."""
    target = Target.fake(f"sm{arch}")
    problem = Problem(parse(spec), 6144, 4096, BF16, True)
    operands = "e4m3" if spec == "W4AFP8" else "s8"
    for m in (1, 16, 64, 300):
        assert isinstance(kernel.fit(problem, m, target), Rank)
        built = compile_tile(problem, kernel.config(problem, m, target), arch)
        ptx = built.asm["ptx"]
        assert built.asm["cubin"] and built.metadata.shared <= SHARED_LIMIT[arch] * 1024
        fifth = "tcgen05.mma.cta_group::1.kind::" + ("f8f6f4" if operands == "e4m3" else "i8")  # int8 from Triton 3.9
        assert f".{operands}.{operands}" in ptx or (arch == 100 and fifth in ptx), (arch, spec, m)
        assert "cp.async.cg.shared.global" in ptx, "loads of w are asked for ahead"
    if arch == 90:
        assert "wgmma.mma_async" in ptx


@needs_triton
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_gemv_cubins(arch: int) -> None:
    for spec in ("W4A8", "QSERVE_W4A8_CHANNEL", "QSERVE_W4A8_GROUP", "int4.channel+int8.token.dynamic"):
        for m in (1, 2, 4):
            ptx = compile_gemv(Problem(parse(spec), 6144, 4096, BF16, True), m, arch).asm["ptx"]
            assert "dp4a.s32.s32" in ptx and "v4.b32" in ptx, "16 bytes of w a thread and load"


@needs_triton
@pytest.mark.parametrize("arch", [80, 90])
def test_decode_cubins(arch: int) -> None:
    from quant_compile.lowering.kernels.w4a8 import _triton_w4a8 as source

    for spec in DECODED:
        types = {"w_ptr": "*u8", "out_ptr": "*i8", "scale_ptr": "*fp32", **weight_types(parse(spec))}
        types = {name: kind for name, kind in types.items() if name != "sum_ptr"}
        types |= {name: "i32" for name in ("n", "k", "width", "groups")}
        constants: dict[str, Any] = {name: None for name in ("group_scale_ptr", "zero_ptr") if name not in types}
        constants |= {"BLOCK_N": 8, "BYTES": 256, "BYTES_PER_GROUP": (parse(spec).weights.group_size or 0) // 2}
        constants["NIBBLES"] = False
        built = compile_cubin(source.decode_kernel, arch, types, constants, num_warps=4)
        assert built.asm["cubin"] and "v4.b32" in built.asm["ptx"], "16 bytes a thread are stored at once"


@needs_triton
def test_cubins_of_ragged_sizes_and_small_groups() -> None:
    for spec in ("W4A8", "W4AFP8", "QSERVE_W4A8_GROUP", "int4.group64+int8.token.dynamic"):
        problem = Problem(parse(spec), 70, 301, BF16)
        for m in (1, 300):
            assert compile_tile(problem, kernel.config(problem, m, SM90), 90, even=False).asm["cubin"]
    assert compile_gemv(Problem(parse("W4A8"), 70, 1048, BF16), 1, 90, even=False).asm["cubin"]


@pytest.mark.parametrize(
    ("spec", "dtype", "target", "words"),
    [
        ("W4A8", BF16, Target.fake("cpu"), "needs a CUDA GPU"),
        ("W4A8", BF16, Target.fake("sm90", frozenset()), "triton is not installed"),
        ("W4AFP8", BF16, Target.fake("sm80"), "e4m3 inputs need sm89 or newer, this is sm80"),
        ("W4A8", BF16, Target("cuda", 75, 40, "fake", FAKE_OPS), "int8 inputs need sm80 or newer"),
        ("W4A16", BF16, SM90, "multiplies 8-bit inputs by 4-bit weights, not W4A16"),
        ("W8A8", BF16, SM90, "multiplies 8-bit inputs by 4-bit weights, not W8A8"),
        ("W4A8", torch.float64, SM90, "output dtype must be"),
    ],
)
def test_triton_refusals(spec: str, dtype: torch.dtype, target: Target, words: str) -> None:
    for fit in (kernel.fit, kernel.fit_gemv):
        answer = fit(Problem(parse(spec), 64, 128, dtype), 1, target)
        assert isinstance(answer, Reject) and words in answer.reason


@pytest.mark.parametrize(
    ("fit", "spec", "k", "m", "words"),
    [
        (kernel.fit, GROUP32, 128, 1, "groups must have at least 64 columns, got 32"),
        (kernel.fit, "int4.group32+int8.token.dynamic", 128, 1, "got 32"),
        (kernel.fit, "QSERVE_W4A8_CHANNEL", 1 << 18, 1, "at most 131072 for sums in int32, got 262144"),
        (sgl_qserve.fit_channel, "QSERVE_W4A8_CHANNEL", 1 << 18, 1, "at most 131072"),
        (sgl_int8_decoded.fit, "W4A8", 128, 1, "scales of groups that are not integers"),
        (sgl_int8_decoded.fit, "W4AFP8", 128, 1, "under int8 inputs"),
        (sgl_int8_decoded.fit, "W8A8", 128, 1, "4-bit weights"),
        (sgl_int8_decoded.fit, "QSERVE_W4A8_GROUP", 100, 1, "k must be a multiple of 16, got 100"),
        (kernel.fit_gemv, "W4A8", 100, 1, "k must be a multiple of 8, got 100"),
        (kernel.fit_gemv, "W4A8", 128, 9, "serves at most 8 tokens, got 9"),
        (kernel.fit_gemv, "W4AFP8", 128, 1, "int8 inputs only"),
    ],
)
def test_triton_limits(fit: Callable[..., Rank | Reject], spec: str, k: int, m: int, words: str) -> None:
    answer = fit(Problem(parse(spec), 64, k, BF16), m, SM90)
    assert isinstance(answer, Reject) and words in answer.reason


def test_int8_copies_are_for_many_tokens() -> None:
    """Ranked last for a few, first for many where the library is there, refused where it is not."""
    for spec in ("QSERVE_W4A8_CHANNEL", "QSERVE_W4A8_GROUP"):
        problem = Problem(parse(spec), 6144, 4096, BF16)
        for m, first in ((1, False), (16, False), (4096, True)):
            copied, tile = sgl_int8_decoded.fit(problem, m, SM90), kernel.fit(problem, m, SM90)
            assert isinstance(copied, Rank) and isinstance(tile, Rank) and (copied.cost < tile.cost) == first
        for target in (Target.fake("sm100"), Target.fake("sm90", FAKE_OPS - {"sgl_kernel::int8_scaled_mm"})):
            assert isinstance(sgl_int8_decoded.fit(problem, 4096, target), Reject)


def test_costs() -> None:
    """One token goes to the kernel without tensor cores, and every size has one on every arch."""
    problem = Problem(parse("W4A8"), 6144, 4096, BF16)
    one, eight = (kernel.fit_gemv(problem, m, SM90) for m in (1, 8))
    assert isinstance(one, Rank) and isinstance(eight, Rank) and one.cost <= eight.cost
    assert one.cost < kernel.fit(problem, 1, SM90).cost
    for m in (1, 5, 16, 64, 300, 4096):
        for spec in PRESETS:
            assert isinstance(kernel.fit(Problem(parse(spec), 33, 51, BF16), m, SM90), Rank)


# --- inline assembly, which Triton's interpreter cannot run ---


def run_asm(text: str, inputs: list[int], outputs: int) -> list[int]:
    """Run a few PTX integer instructions on 32-bit registers; ``$i`` are the outputs, then the inputs."""
    words: dict[str, int] = {f"${outputs + i}": value for i, value in enumerate(inputs)}

    def value(name: str) -> int:
        return words[name] if name in words else int(name, 0)

    for line in text.replace("{ ", "").replace(" }", "").replace("{a, b}", "a:b").replace("\n", " ").split(";"):
        instruction, _, rest = line.strip().partition(" ")
        if not instruction or instruction == ".reg":
            continue
        target, *arguments = (part.strip() for part in rest.split(","))
        result = _ptx(instruction, [value(a) for a in arguments])
        if ":" in target:
            words |= {name: result >> (32 * i) & 0xFFFFFFFF for i, name in enumerate(target.split(":"))}
        else:
            words[target] = result & 0xFFFFFFFF
    return [words[f"${i}"] for i in range(outputs)]


def _ptx(instruction: str, a: list[int]) -> int:
    match instruction.split(".")[0]:
        case "and":
            return a[0] & a[1]
        case "xor":
            return a[0] ^ a[1]
        case "not":
            return ~a[0]
        case "shl":
            return a[0] << a[1]
        case "shr":
            return a[0] >> a[1]
        case "mul":
            return a[0] * a[1]
        case "mad":
            return a[0] * a[1] + a[2]
        case "mov":
            return a[0]
        case "prmt":
            both = (a[1] << 32 | a[0]).to_bytes(8, "little")
            return int.from_bytes(bytes(both[a[2] >> (4 * i) & 7] for i in range(4)), "little")
        case other:
            raise AssertionError(f"unknown instruction {other}")


@needs_triton
def test_assembly_decodes_every_byte() -> None:
    """All bytes in all four places, with different neighbours: no carry from one code into the next."""
    from quant_compile.lowering.kernels.w4a8 import _triton_w4a8 as source

    for first in range(256):
        four = bytes((first + 67 * i) % 256 for i in range(4))
        word = int.from_bytes(four, "little")
        for text, dtype, unit in ((source.INT8_ASM, torch.int8, 16.0), (source.E4M3_ASM, torch.float8_e4m3fn, 2.0**-9)):
            for shift, out in zip((0, 4), run_asm(text.value, [word], 2), strict=True):
                got = torch.tensor(list(out.to_bytes(4, "little")), dtype=torch.uint8).view(dtype).float()
                assert got.tolist() == [((byte >> shift & 15) - 8) * unit for byte in four]


@needs_triton
def test_assembly_splits_pairs_and_words() -> None:
    from quant_compile.lowering.kernels.w4a8 import _triton_w4a8 as source

    codes = bytes([1, 2, 3, 4, 250, 6, 7, 128])
    low, high = int.from_bytes(codes[:4], "little"), int.from_bytes(codes[4:], "little")
    for out in (run_asm(source.PAIR_ASM.value, [low, high], 2), run_asm(source.WORDS_ASM.value, [high << 32 | low], 2)):
        assert [word.to_bytes(4, "little") for word in out] == [codes[0::2], codes[1::2]]
