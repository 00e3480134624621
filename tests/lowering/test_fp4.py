"""NVFP4 and MXFP4 as arithmetic: rounding, scales, packing, swizzle, special values; equality with compressed-tensors and torch."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

import quant_compile  # noqa: F401  (registers the schemes)
from quant_compile.ir import numerics
from quant_compile.ir.errors import SchemeError
from quant_compile.ir.family import FAMILIES, Family, Planes, Reject, bits_per_weight, family_of
from quant_compile.ir.scheme import PRESETS, QuantArgs, Scheme, parse
from quant_compile.lowering import ops as kernel_ops
from quant_compile.lowering.kernels.fp4._fp4 import padded, swizzle, unswizzle
from quant_compile.lowering.registry import Problem
from quant_compile.lowering.schemes import fp4
from quant_compile.lowering.select import Dispatch
from quant_compile.passes.lower import _template

NAMES = (*fp4.NV_PRESETS, *fp4.MX_PRESETS)
QUANTIZED_INPUTS = tuple(name for name in NAMES if PRESETS[name].input_activations is not None)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("normal", "zero", "constant", "denormal", "outlier", "tiny", "huge", "steps")

every_scheme = pytest.mark.parametrize("name", NAMES)
every_weight = pytest.mark.parametrize("name", ["NVFP4A16", "MXFP4A16"])
every_input = pytest.mark.parametrize("name", QUANTIZED_INPUTS)
examples = settings(max_examples=40, deadline=None, derandomize=True)


def of(name: str) -> tuple[Family, Scheme]:
    scheme = PRESETS[name]
    return family_of(scheme), scheme


def group_of(scheme: Scheme) -> int:
    assert scheme.weights.group_size is not None
    return scheme.weights.group_size


def row(kind: str, k: int, dtype: torch.dtype) -> Tensor:
    """k numbers of one kind."""
    x = torch.randn(k)
    if kind == "zero":
        x = torch.zeros(k)
    elif kind == "constant":
        x = torch.full((k,), float(x[0]))
    elif kind == "denormal":
        x = x * torch.finfo(dtype).smallest_normal * 0.01
    elif kind == "outlier":
        x[0] = 1000.0
    elif kind == "tiny":
        x = x * 2.0**-20
    elif kind == "huge":
        x = x * (torch.finfo(dtype).max / 64)
    elif kind == "steps":  # multiples of 1/16: many ties
        x = torch.randint(-128, 129, (k,)) / 16
    return x.to(dtype)


@st.composite
def matrices(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS) -> Tensor:
    """[n, k] of mixed rows; k odd, below a group, and multiples of it."""
    dtype = draw(st.sampled_from(DTYPES))
    rows = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=9))
    k = draw(st.sampled_from([1, 2, 3, 15, 16, 17, 31, 32, 33, 64, 100, 130, 257]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    return torch.stack([row(kind, k, dtype) for kind in rows])


def local_scales(planes: Planes, scheme: Scheme, k: int) -> Tensor:
    """Scale of each element, f32 [..., k]: from torch's own reading of e4m3 and e8m0."""
    if len(planes) == 3:
        scale = planes[1].float() * planes[2]
    else:
        scale = planes[1].view(torch.float8_e8m0fnu).float()
    return scale.repeat_interleave(group_of(scheme), -1)[..., :k]


def nearest(x: Tensor) -> Tensor:
    """Codes of x (any shape) by exhaustive search in f64: the nearest value, of two equally near the even code."""
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
    distance = (x.double().abs().unsqueeze(-1) - values).abs()
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # even codes first: argmin takes the first of equals
    code = order[distance[..., order].argmin(-1)]
    return (code + 8 * (x < 0)).to(torch.uint8)


# --- codes ---


@given(st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=64))
@examples
def test_rounding_is_to_the_nearest_and_to_even(values: list[float]) -> None:
    x = torch.tensor(values)
    assert torch.equal(fp4.round_e2m1(x), nearest(x))


def test_rounding_at_and_beside_every_midpoint() -> None:
    middle = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert fp4.round_e2m1(middle).tolist() == [0, 2, 2, 4, 4, 6, 6]
    up, down = middle.nextafter(torch.tensor(9.0)), middle.nextafter(torch.tensor(0.0))
    assert fp4.round_e2m1(up).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert fp4.round_e2m1(down).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert fp4.round_e2m1(-up).tolist() == [9, 10, 11, 12, 13, 14, 15]
    big = torch.tensor([6.0, 7.0, 1e30, float("inf"), -float("inf"), 0.0, -0.0, -0.1])
    assert fp4.round_e2m1(big).tolist() == [7, 7, 7, 7, 15, 0, 0, 8]


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**31))
@examples
def test_codes_survive_packing(rows: int, pairs: int, seed: int) -> None:
    codes = torch.randint(0, 16, (rows, 2 * pairs), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = fp4.pack_codes(codes)
    assert packed.shape == (rows, pairs) and packed.dtype == torch.uint8
    assert torch.equal(packed & 15, codes[:, 0::2]) and torch.equal(packed >> 4, codes[:, 1::2])
    assert torch.equal(fp4.unpack_codes(packed), codes)


def test_decoding_gives_the_sixteen_values() -> None:
    got = fp4.decode_e2m1(fp4.pack_codes(torch.arange(16, dtype=torch.uint8)))
    wanted = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    assert torch.equal(got, wanted) and torch.equal(got.signbit(), wanted.signbit())


def test_e8m0_is_read_as_torch_reads_it() -> None:
    """All 256 bytes, bit by bit."""
    bytes_ = torch.arange(256).to(torch.uint8)
    got, wanted = fp4.decode_e8m0(bytes_), bytes_.view(torch.float8_e8m0fnu).float()
    assert torch.equal(got[:255], wanted[:255]) and got[255].isnan() and wanted[255].isnan()


def test_torch_cannot_convert_e2m1_on_cpu() -> None:
    """Where it can, codes should be compared with it as scales are: this test then says so by failing."""
    with pytest.raises(NotImplementedError):
        torch.tensor([[0x21]], dtype=torch.uint8).view(torch.float4_e2m1fn_x2).float()


# --- weights ---


def bound(x: Tensor, scale: Tensor) -> Tensor:
    """Largest error that rounding x under ``scale`` may leave: half the gap between the values around it."""
    size = (x / scale).abs()
    gap = torch.where(size <= 2, 0.25, torch.where(size <= 4, 0.5, 1.0))
    return gap * scale * (1 + 1e-6) + x.abs() * 1e-6


@every_weight
@examples
@given(matrices())
def test_weight_error_is_within_half_a_gap(name: str, w: Tensor) -> None:
    family, scheme = of(name)
    planes = family.quantize_weight(w, scheme)
    back, scale = family.dequantize_weight(planes, scheme, w.shape[1]), local_scales(planes, scheme, w.shape[1])
    assert back.dtype == torch.float32 and back.shape == w.shape
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert ((back - w.float()).abs() <= bound(w.float(), scale)).all()
    assert (back[w == 0] == 0).all()


@every_weight
@examples
@given(matrices())
def test_codes_are_the_nearest_under_the_scale_as_stored(name: str, w: Tensor) -> None:
    family, scheme = of(name)
    planes, k = family.quantize_weight(w, scheme), w.shape[1]
    codes = fp4.unpack_codes(planes[0])
    assert torch.equal(codes[:, :k], nearest(w.float() / local_scales(planes, scheme, k)))
    assert (codes[:, k:] == 0).all(), "columns past k are zeros"


@examples
@given(matrices())
def test_nvfp4_scales_by_their_definition(w: Tensor) -> None:
    """In f64; e4m3 by search over its values. The f32 of the product may differ by an ulp, hence the neighbours at ties."""
    family, scheme = of("NVFP4A16")
    _, scale, whole = family.quantize_weight(w, scheme)
    amax = w.double().abs().max().clamp_min(numerics.SMALLEST_AMAX)
    assert torch.allclose(whole.double(), amax / 2688, rtol=1e-6, atol=0) and (whole == whole[0]).all()
    groups = torch.nn.functional.pad(w.double(), (0, -w.shape[1] % 16)).unflatten(1, (-1, 16)).abs().amax(-1)
    wanted = (groups / 6 / whole.double()).clamp(2.0**-9, 448.0)
    values = torch.arange(1, 127).to(torch.uint8).view(torch.float8_e4m3fn).double()
    best = (wanted.unsqueeze(-1) - values).abs().amin(-1)
    assert ((scale.double() - wanted).abs() <= best + wanted * 2e-7).all()


@examples
@given(matrices())
def test_mxfp4_scales_by_their_definition(w: Tensor) -> None:
    family, scheme = of("MXFP4A16")
    _, scale = family.quantize_weight(w, scheme)
    groups = torch.nn.functional.pad(w.double(), (0, -w.shape[1] % 32)).unflatten(1, (-1, 32)).abs().amax(-1)
    significand, exponent = torch.frexp(groups)  # significand in [0.5, 1)
    wanted = torch.where(groups > 0, exponent - 1 + (significand >= 0.875) - 2 + 127, 0).clamp_min(0)
    assert torch.equal(scale.long(), wanted.long())
    assert (groups / scale.view(torch.float8_e8m0fnu).double() < 7).all()


@every_scheme
@examples
@given(matrices())
def test_planes_are_as_declared(name: str, w: Tensor) -> None:
    family, scheme = of(name)
    specs, planes = family.weight_planes(scheme, *w.shape, w.dtype), family.quantize_weight(w, scheme)
    assert [(spec.shape, spec.dtype) for spec in specs] == [(tuple(p.shape), p.dtype) for p in planes]
    assert all(plane.is_contiguous() for plane in planes)


def test_bits_per_weight() -> None:
    assert [bits_per_weight(PRESETS[name]) for name in NAMES] == [4.5, 4.5, 4.5, 4.25, 4.25]


@every_weight
@examples
@given(matrices(("normal", "constant", "tiny", "steps")))
def test_quantizing_again_changes_nothing(name: str, w: Tensor) -> None:
    """A group's largest value gets the code 6 (MXFP4: 4 or 6), so scale and codes come back; e4m3 must not be subnormal."""
    family, scheme = of(name)
    first = family.quantize_weight(w, scheme)
    once = family.dequantize_weight(first, scheme, w.shape[1])
    second = family.quantize_weight(once, scheme)
    twice = family.dequantize_weight(second, scheme, w.shape[1])
    same = torch.ones_like(once, dtype=torch.bool)
    if name == "NVFP4A16":
        same = (first[1].float() >= 2.0**-6).repeat_interleave(16, 1)[:, : w.shape[1]]
    else:
        nonzero = once.abs().amax() > 0
        assert not nonzero or torch.equal(first[1][once.abs().amax(1) > 0], second[1][once.abs().amax(1) > 0])
    assert torch.allclose(twice[same], once[same], rtol=1e-6, atol=0)


@every_weight
def test_representable_values_come_back_exactly(name: str) -> None:
    family, scheme = of(name)
    group = group_of(scheme)
    codes = torch.randint(0, 16, (24, 4 * group), dtype=torch.uint8)
    codes[:, ::group] = 7
    if name == "NVFP4A16":
        scale = torch.randint(0x08, 0x7E, (24, 4)).to(torch.uint8).view(torch.float8_e4m3fn)  # normal numbers
        scale.view(torch.uint8)[3, 2] = 0x7E  # 448
        planes: Planes = (fp4.pack_codes(codes), scale, torch.full((24, 1), 2.0**-7))
    else:
        planes = (fp4.pack_codes(codes), torch.randint(10, 240, (24, 4)).to(torch.uint8))
    w = family.dequantize_weight(planes, scheme, 4 * group)
    again = family.quantize_weight(w, scheme)
    assert torch.equal(family.dequantize_weight(again, scheme, 4 * group), w)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(again[1:], planes[1:]))


@every_weight
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_give_the_planes_of_the_whole(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One global scale, even where the largest value lies in another chunk."""
    family, scheme = of(name)
    w = torch.randn(300, 100).to(dtype)
    w[299, 99] = 77.0
    whole = family.quantize_weight(w, scheme)
    monkeypatch.setattr(numerics, "CHUNK_ELEMENTS", 100 * 70)
    chunked = family.quantize_weight(w, scheme)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(whole, chunked, strict=True))


@every_weight
def test_merged_siblings_keep_their_own_values(name: str) -> None:
    family, scheme = of(name)
    a, b = torch.randn(5, 40), torch.randn(7, 40) * 100
    planes = [family.quantize_weight(w, scheme) for w in (a, b)]
    joined = tuple(torch.cat(parts) for parts in zip(*planes, strict=True))
    apart = torch.cat([family.dequantize_weight(p, scheme, 40) for p in planes])
    assert torch.equal(family.dequantize_weight(joined, scheme, 40), apart)


# --- NaN, inf, zeros ---


@every_weight
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_in_a_weight_surface(name: str, bad: float) -> None:
    """Its group, or with a global scale the whole tensor, is not finite; MXFP4's other groups are untouched."""
    family, scheme = of(name)
    w = torch.randn(4, 100)
    clean = family.dequantize_weight(family.quantize_weight(w, scheme), scheme, 100)
    w[1, 70] = bad
    back = family.dequantize_weight(family.quantize_weight(w, scheme), scheme, 100)
    if name == "NVFP4A16":
        assert not torch.isfinite(back).any()
    else:
        assert back[1, 64:96].isnan().all()
        back[1, 64:96] = clean[1, 64:96]
        assert torch.equal(back, clean)


@every_input
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_in_an_input_spoil_their_row(name: str, bad: float) -> None:
    """Of a static or MX scheme no other row; under a dynamic global scale all."""
    family, scheme = of(name)
    w, x, scale = family.quantize_weight(torch.randn(5, 64), scheme), torch.randn(3, 64), given_scale(scheme)
    clean = family.linear(family.quantize_input(x, scheme, scale), w, None, scheme, torch.float32)
    x[1, 7] = bad
    spoiled = family.linear(family.quantize_input(x, scheme, scale), w, None, scheme, torch.float32)
    assert not torch.isfinite(spoiled[1]).any()
    if name != "NVFP4":
        assert torch.equal(spoiled[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan"), float("inf")])
def test_a_useless_calibrated_scale_surfaces(scale: float) -> None:
    family, scheme = of("NVFP4_STATIC")
    w = family.quantize_weight(torch.randn(5, 64), scheme)
    x = family.quantize_input(torch.randn(3, 64), scheme, torch.tensor([scale]))
    assert not torch.isfinite(family.linear(x, w, None, scheme, torch.float32)).any()


@every_scheme
def test_zeros_stay_zeros(name: str) -> None:
    family, scheme = of(name)
    w = torch.randn(6, 64)
    w[2] = 0
    w[3, 32:] = 0
    for weight in (w, torch.zeros(6, 64)):
        planes = family.quantize_weight(weight, scheme)
        back = family.dequantize_weight(planes, scheme, 64)
        assert (back[weight == 0] == 0).all() and torch.isfinite(local_scales(planes, scheme, 64)).all()


def test_small_groups_beside_large_ones_keep_what_they_can() -> None:
    """A group whose e4m3 scale would round to zero keeps 2**-9 and so may keep nonzero codes."""
    family, scheme = of("NVFP4A16")
    w = torch.zeros(1, 48)
    w[0, 0] = 2688.0  # global 1
    w[0, 16] = 6 * 0.3 * 2.0**-9
    planes = family.quantize_weight(w, scheme)
    assert planes[1].float().tolist() == [[448.0, 2.0**-9, 2.0**-9]] and planes[2].item() == 1
    assert family.dequantize_weight(planes, scheme, 48)[0, 16] == 2 * 2.0**-9


def test_calibration_gives_the_global_scale() -> None:
    family, scheme = of("NVFP4_STATIC")
    x = torch.randn(3, 64)
    calibrated = import_module("quant_compile.calibrating")._scale(x.abs().max(), scheme)
    dynamic = family.quantize_input(x, scheme, None)[2]
    assert calibrated.shape == (1,) and torch.allclose(calibrated, dynamic, rtol=1e-6, atol=0)


def test_a_static_global_scale_saturates() -> None:
    family, scheme = of("NVFP4_STATIC")
    x = torch.tensor([[1e4, -1e4, 0.0]])
    planes = family.quantize_input(x, scheme, torch.tensor([1.0]))
    assert fp4._dequantize_nv(planes)[0, :3].tolist() == [2688.0, -2688.0, 0.0]


# --- inputs and products ---


def given_scale(scheme: Scheme) -> Tensor | None:
    return torch.tensor([0.002]) if scheme.static else None


@every_input
@examples
@given(matrices())
def test_input_equals_a_weight_of_the_same_values(name: str, x: Tensor) -> None:
    """Under the same global scale: the amax of everything, given to the static scheme."""
    family, scheme = of(name)
    weight = family.quantize_weight(x, scheme)
    scale = weight[2][0] if scheme.static else None
    planes = family.quantize_input(x, scheme, scale)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(planes[:2], weight[:2]))
    if len(planes) == 3:
        assert planes[2].shape == (1,) and torch.equal(planes[2], weight[2][0])


@every_input
@pytest.mark.parametrize("shape", [(2, 3, 100), (0, 100), (100,), (2, 0, 32), (4, 7)], ids=str)
def test_input_shapes(name: str, shape: tuple[int, ...]) -> None:
    family, scheme = of(name)
    planes = family.quantize_input(torch.randn(shape).bfloat16(), scheme, given_scale(scheme))
    groups = -(-shape[-1] // group_of(scheme))
    assert planes[0].shape == (*shape[:-1], groups * group_of(scheme) // 2)
    assert planes[1].shape == (*shape[:-1], groups)


@every_input
@pytest.mark.parametrize("k", [96, 100])
def test_input_is_traced_by_dynamo_and_by_the_lowering(name: str, k: int) -> None:
    torch._dynamo.reset()
    family, scheme = of(name)
    scale = given_scale(scheme)

    def quantize(x: Tensor) -> Planes:
        return family.quantize_input(x * 2, scheme, scale)

    compiled = torch.compile(quantize, backend="aot_eager", fullgraph=True, dynamic=True)
    template = fx.GraphModule({}, _template(name, k, scheme.static))
    for x in (torch.randn(3, k).bfloat16(), torch.randn(5, k).bfloat16()):
        wanted = quantize(x)
        for got in (compiled(x), template(x * 2, *([scale] if scale is not None else []))):
            assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, wanted, strict=True))


@every_scheme
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(37, 200), (1, 7), (5, 64)], ids=str)
def test_linear_is_the_product_of_dequantized_operands(name: str, dtype: torch.dtype, n: int, k: int) -> None:
    family, scheme = of(name)
    x, w, bias = torch.randn(2, 3, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    planes = family.quantize_weight(w, scheme)
    inputs, left = operands(x, family, scheme)
    wanted = left @ family.dequantize_weight(planes, scheme, k).double().t()
    tolerance = 1e-5 + {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    for added in (None, bias):
        got = family.linear(inputs, planes, added, scheme, dtype)
        expected = wanted if added is None else wanted + added.double()
        assert got.dtype == dtype and got.shape == (2, 3, n)
        assert float((got.double() - expected).norm() / expected.norm()) <= tolerance


def operands(x: Tensor, family: Family, scheme: Scheme) -> tuple[Planes, Tensor]:
    """Planes of x and what they stand for, f64 [..., k]."""
    if scheme.input_activations is None:
        return (x,), x.double()
    planes = family.quantize_input(x, scheme, given_scale(scheme))
    values = fp4.decode_e2m1(planes[0])[..., : x.shape[-1]]
    return planes, values.double() * local_scales(planes, scheme, x.shape[-1]).double()


@every_scheme
@pytest.mark.parametrize("shape", [(5, 100), (2, 3, 100), (0, 100), (100,)], ids=str)
def test_kernel_op_takes_packed_inputs(name: str, shape: tuple[int, ...]) -> None:
    family, scheme = of(name)
    x, planes, bias = torch.randn(shape), family.quantize_weight(torch.randn(7, 100), scheme), torch.randn(7)
    inputs = (x,) if scheme.input_activations is None else family.quantize_input(x, scheme, given_scale(scheme))
    text = Dispatch(Problem(scheme, 7, 100, torch.float32, True), "rows", ((4096, "reference"),)).text
    got = kernel_ops.linear(list(inputs), list(planes), bias, text)
    wanted = family.linear(inputs, planes, bias, scheme, torch.float32)
    assert got.shape == wanted.shape == (*shape[:-1], 7)
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)


# --- swizzled scales ---


@given(st.integers(1, 300), st.integers(1, 40), st.booleans(), st.integers(0, 2**31))
@examples
def test_swizzle_and_back(rows: int, groups: int, e4m3: bool, seed: int) -> None:
    bytes_ = torch.randint(0, 256, (rows, groups), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    scale = bytes_.view(torch.float8_e4m3fn) if e4m3 else bytes_
    flat = swizzle(scale)
    tall, wide = padded(rows, groups)
    assert flat.dtype == scale.dtype and flat.shape == (tall * wide,)
    assert tall % 128 == 0 and wide % 4 == 0 and tall - rows < 128 and wide - groups < 4
    assert torch.equal(unswizzle(flat, rows, groups).view(torch.uint8), bytes_)
    assert int((flat.view(torch.uint8) != 0).sum()) == int((bytes_ != 0).sum()), "padding is zero bytes"


@given(st.integers(0, 299), st.integers(0, 10))
@examples
def test_swizzled_place_of_a_scale(row: int, group: int) -> None:
    scale = torch.zeros(300, 11, dtype=torch.uint8)
    scale[row, group] = 1
    tile = row // 128 * 3 + group // 4
    within = row % 128
    assert swizzle(scale).argmax() == tile * 512 + within % 32 * 16 + within // 32 * 4 + group % 4


@every_input
@pytest.mark.parametrize(("m", "n", "k"), [(5, 37, 200), (1, 1, 7), (130, 129, 96)], ids=str)
def test_the_whole_path_of_a_block_scaled_kernel(name: str, m: int, n: int, k: int) -> None:
    """quantize -> swizzle -> unswizzle -> dequantize -> multiply in f32 is ``linear``, bit for bit."""
    family, scheme = of(name)
    x, w = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    sides = [family.quantize_input(x, scheme, given_scale(scheme)), family.quantize_weight(w, scheme)]
    through = [(p[0], unswizzle(swizzle(p[1]), *p[1].shape), *p[2:]) for p in sides]
    left, right = (
        (fp4.decode_e2m1(p[0]) * local_scales(p, scheme, 2 * p[0].shape[-1])).reshape(p[0].shape[0], -1)
        for p in through
    )
    assert torch.equal(left @ right.t(), family.linear(sides[0], sides[1], None, scheme, torch.float32))


# --- compressed-tensors ---


def their_args(name: str) -> Any:
    """The QuantizationArgs of compressed-tensors' own preset."""
    preset = pytest.importorskip("compressed_tensors.quantization.quant_scheme").preset_name_to_scheme
    return preset("NVFP4" if name.startswith("NV") else "MXFP4", ["Linear"]).weights


def their_planes(w: Tensor, name: str, whole: Tensor | None) -> tuple[Tensor, Tensor]:
    """(packed codes, scale bytes) of compressed-tensors under their global scale [1] (divides), or None for MXFP4."""
    args = their_args(name)
    from compressed_tensors.compressors.mx_utils import compress_mx_scale
    from compressed_tensors.compressors.nvfp4.helpers import quantize_and_pack_fp4
    from compressed_tensors.quantization.utils import calculate_qparams
    from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales

    grouped = w.unflatten(1, (-1, args.group_size))
    low, high = grouped.amin(-1), grouped.amax(-1)
    if whole is not None:
        scale, _ = calculate_qparams(low, high, args, global_scale=whole)
        packed = quantize_and_pack_fp4(w, scale, global_scale=whole, group_size=args.group_size)
        return packed, scale.to(torch.float8_e4m3fn).view(torch.uint8)
    exponent = generate_mx_scales(torch.maximum(-low, high).float()).clamp(0, 255)
    scale = torch.exp2(exponent - 127)
    packed = quantize_and_pack_fp4(w.float(), scale, group_size=args.group_size)
    assert torch.equal(compress_mx_scale(scale, torch.uint8), exponent.to(torch.uint8))
    return packed, exponent.to(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "outlier", "steps", "constant", "zero"])
def test_mxfp4_is_compressed_tensors_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    family, scheme = of("MXFP4A16")
    w = torch.stack([row(kind, 256, dtype) for _ in range(64)])
    data, scale = family.quantize_weight(w, scheme)
    packed, bytes_ = their_planes(w, "MXFP4", None)
    assert torch.equal(scale, bytes_) and torch.equal(data, packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "outlier", "steps", "constant"])
def test_nvfp4_is_compressed_tensors_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    """Under a global scale that is a power of two, so that multiplying by ours is dividing by theirs."""
    family, scheme = of("NVFP4A16")
    w = torch.stack([row(kind, 256, dtype) for _ in range(64)])
    w[7, 3] = 2688.0  # 21 * 2**7: global 1
    data, scale, whole = family.quantize_weight(w, scheme)
    assert (whole == 1).all()
    # Their scale of a bf16 group is rounded to bf16 halfway: compare from f32 values.
    packed, bytes_ = their_planes(w.float(), "NVFP4", torch.ones(1))
    kept = (w.float().unflatten(1, (-1, 16)).abs().amax(-1) / 6) >= 2.0**-9  # theirs puts 0.125 for smaller ones
    assert kept.float().mean() > 0.9
    assert torch.equal(scale.view(torch.uint8)[kept], bytes_[kept])
    same = kept.repeat_interleave(8, 1)
    assert torch.equal(data[same], packed[same])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nvfp4_is_compressed_tensors_under_any_global_scale(dtype: torch.dtype) -> None:
    """Scales bit for bit; codes too, but for values within f32 rounding of the middle of two codes.

    They divide the scale by 1 / global where ours is multiplied by global: an ulp. A few 16-bit values in a thousand are
    exactly in the middle.
    """
    family, scheme = of("NVFP4A16")
    w = (torch.randn(128, 512) * 0.03).to(dtype)
    data, scale, whole = family.quantize_weight(w, scheme)
    packed, bytes_ = their_planes(w.float(), "NVFP4", whole[0].reciprocal())
    assert torch.equal(scale.view(torch.uint8), bytes_)
    ours, theirs = fp4.unpack_codes(data), fp4.unpack_codes(packed)
    apart = ours != theirs
    size = (w.double() / (scale.double() * whole.double()).repeat_interleave(16, 1)).abs()[apart]
    middle = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
    assert ((size.unsqueeze(-1) / middle - 1).abs().amin(-1) < 2.0**-21).all()
    assert apart.float().mean() < (1e-4 if dtype == torch.float32 else 1e-2)


def test_global_scale_is_the_reciprocal_of_theirs() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization.utils import generate_gparam

    w = torch.randn(40, 64)
    whole = family_of(PRESETS["NVFP4"]).quantize_weight(w, PRESETS["NVFP4"])[2]
    assert torch.allclose(whole[0] * generate_gparam(w.min(), w.max()), torch.ones(1), rtol=2.0**-22, atol=0)


@every_weight
def test_their_decoder_reads_our_planes(name: str) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    family, scheme = of(name)
    planes = family.quantize_weight(torch.randn(9, 96), scheme)
    values = helpers.unpack_fp4_from_uint8(planes[0], 9, 96, dtype=torch.float32)
    assert torch.equal(values * local_scales(planes, scheme, 96), family.dequantize_weight(planes, scheme, 96))


# --- torch ---


def torch_float4() -> Any:
    """torch's own conversions to float4_e2m1fn_x2 and to the scales' tiles, from its tests."""
    pytest.importorskip("expecttest")  # which that module imports
    return import_module("torch.testing._internal.common_quantized")


def every_bf16() -> Tensor:
    """All 2**16 - 254 that are not NaN: every midpoint of two codes, its neighbours, subnormals, infinities."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    return x[~x.isnan()]


def without_minus_zero(codes: Tensor, x: Tensor) -> Tensor:
    """-0.0 has the code 8 in torch and 0 here, where a sign is ``x < 0``: the one difference, and the same value."""
    assert (codes[x == 0] & 7 == 0).all()
    return torch.where(x == 0, 0, codes)


def test_rounding_is_torchs_for_every_bf16() -> None:
    x = every_bf16().float()
    assert torch.equal(fp4.round_e2m1(x), without_minus_zero(torch_float4()._f32_to_floatx_unpacked(x, 2, 1), x))


@given(st.lists(st.floats(width=32, allow_nan=False) | st.floats(-9, 9, width=32), min_size=1, max_size=64))
@examples
def test_rounding_is_torchs(values: list[float]) -> None:
    """Also one step of f32 beside every midpoint, where a bf16 cannot be."""
    middle = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    sides = [middle, middle.nextafter(torch.tensor(9.0)), middle.nextafter(torch.tensor(0.0))]
    x = torch.cat([torch.tensor(values), *sides, *(-side for side in sides)])
    assert torch.equal(fp4.round_e2m1(x), without_minus_zero(torch_float4()._f32_to_floatx_unpacked(x, 2, 1), x))


def test_decoding_is_torchs() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    ours, theirs = fp4.decode_e2m1(fp4.pack_codes(codes)), torch_float4()._floatx_unpacked_to_f32(codes, 2, 1)
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32)), "bit by bit: -0.0 too"


def test_packed_codes_are_a_float4_tensor_of_torch() -> None:
    """Even places in the low nibble; scales of 1 because each group's amax is 4 or 6, so the planes hold the codes of x."""
    x = every_bf16()
    x = x[(x != 0) & (x.abs() <= 6)]
    x = x[torch.randperm(len(x))[: 32 * 900]].reshape(-1, 96)
    x[:, ::32] = torch.tensor([4.0, -6.0, 6.0]).bfloat16()
    theirs = torch_float4()._bfloat16_to_float4_e2m1fn_x2(x)
    family, scheme = of("MXFP4A16")
    data, scale = family.quantize_weight(x, scheme)
    assert (scale == 127).all()
    for ours in (data, fp4.pack_codes(fp4.round_e2m1(x.float()))):
        four = ours.view(torch.float4_e2m1fn_x2)
        assert four.dtype == theirs.dtype and four.shape == theirs.shape
        assert torch.equal(four.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("shape", [(300, 11), (1, 1), (37, 130), (128, 4), (129, 5), (256, 3), (127, 8)], ids=str)
def test_swizzle_is_torchs(shape: tuple[int, int], dtype: torch.dtype) -> None:
    scale = torch.randint(0, 256, shape, dtype=torch.uint8).view(dtype)
    theirs = torch_float4().to_blocked(scale)
    assert torch.equal(swizzle(scale).view(torch.uint8), theirs.view(torch.uint8))
    assert torch.equal(unswizzle(theirs, *shape).view(torch.uint8), scale.view(torch.uint8))


# --- who accepts what ---


def e2m1(strategy: str, group: int | None = None, **fields: Any) -> QuantArgs:
    return QuantArgs(4, "float", strategy, group_size=group, **fields)


@pytest.mark.parametrize("name", NAMES)
def test_presets_belong_to_their_family_alone(name: str) -> None:
    scheme = PRESETS[name]
    wanted = "nvfp4" if name.startswith("NV") else "mxfp4"
    answers = {family.name: family.accepts(scheme) for family in FAMILIES}
    assert [key for key, answer in answers.items() if answer is None] == [wanted]
    assert all(isinstance(answer, Reject) and answer.reason for key, answer in answers.items() if key != wanted)
    assert parse(scheme.spec) == scheme and scheme.spec == name
    assert Scheme.from_fields(scheme.to_fields()) == scheme


def test_old_presets_keep_their_family() -> None:
    old = {"W8A8": "int8", "FP8": "fp8", "FP8_DYNAMIC": "fp8", "FP8_BLOCK": "fp8_block", "W4A16": "weight_only"}
    assert {name: family_of(PRESETS[name]).name for name in old} == old


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (Scheme(e2m1("channel")), "per tensor_group of 16"),
        (Scheme(e2m1("tensor_group", 32)), "per tensor_group of 16"),
        (Scheme(e2m1("group", 16)), "per group of 32"),
        (Scheme(e2m1("group", 32, symmetric=False)), "symmetric"),
        (Scheme(e2m1("group", 32, dynamic=True)), "fixed"),
        (Scheme(e2m1("tensor_group", 16), QuantArgs(8, "float", "token", dynamic=True)), "inputs must stay in 16 bits"),
        (Scheme(e2m1("tensor_group", 16), e2m1("group", 32, dynamic=True)), "inputs must stay in 16 bits"),
        (Scheme(e2m1("group", 32), e2m1("group", 32)), "dynamic"),
        (Scheme(QuantArgs(8, "float", "channel"), e2m1("group", 32, dynamic=True)), "inputs must be symmetric 8-bit"),
    ],
    ids=str,
)
def test_other_e2m1_schemes_are_refused(scheme: Scheme, words: str) -> None:
    with pytest.raises(SchemeError) as error:
        family_of(scheme)
    assert words in str(error.value)
    assert all(f"  {family.name}: " in str(error.value) for family in FAMILIES)


@pytest.mark.parametrize("make", [lambda: QuantArgs(8, "float", "channel", format="e2m1"),
                                  lambda: QuantArgs(4, "float", "channel", format="e4m3")])  # fmt: skip
def test_a_format_has_its_number_of_bits(make: Callable[[], QuantArgs]) -> None:
    with pytest.raises(SchemeError, match="bits, not"):
        make()
