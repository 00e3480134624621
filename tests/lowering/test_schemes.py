"""Every scheme as arithmetic: error bounds, packing, special rows, planes as declared, specs as text. No kernels, no graphs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import quant_compile  # noqa: F401  (registers the schemes)
from quant_compile.ir import numerics
from quant_compile.ir.errors import SchemeError
from quant_compile.ir.family import FAMILIES, Family, Planes, bits_per_weight, family_of
from quant_compile.ir.scheme import PRESETS, QuantArgs, Scheme, parse
from quant_compile.lowering.schemes.weight_only import pack_nibbles, unpack_nibbles
from quant_compile.policy import Policy
from tests.textbook import SCHEMES as TEXTBOOK

INT8 = QuantArgs(8, "int", "token", dynamic=True)
CUSTOM = {
    "W4 group 64": Scheme(QuantArgs(4, "int", "group", group_size=64)),
    "W4 group 32": Scheme(QuantArgs(4, "int", "group", group_size=32)),
    "W4 group 16": Scheme(QuantArgs(4, "int", "group", group_size=16)),
    "W4 channel": Scheme(QuantArgs(4, "int", "channel")),
    "W4 group 32 asym": Scheme(QuantArgs(4, "int", "group", group_size=32, symmetric=False)),
    "W4 channel asym": Scheme(QuantArgs(4, "int", "channel", symmetric=False)),
    "W8A8 tensor": Scheme(QuantArgs(8, "int", "tensor"), INT8),
    "W8A8 tensor inputs": Scheme(QuantArgs(8, "int", "channel"), QuantArgs(8, "int", "tensor", dynamic=True)),
    "FP8 weights only": Scheme(QuantArgs(8, "float", "channel")),
    "e5m2 both": Scheme(
        QuantArgs(8, "float", "channel", format="e5m2"), QuantArgs(8, "float", "token", dynamic=True, format="e5m2")
    ),
    "FP8 block 32": Scheme(
        QuantArgs(8, "float", "block", block_structure=(64, 32)),
        QuantArgs(8, "float", "group", dynamic=True, group_size=32),
    ),
}
# FP4 has packed codes and scales of scales: its own file, test_fp4.py. So have blocks of GGUF: test_gguf.py.
OWN_FILE = ("nvfp4", "mxfp4", "gguf")
ALL: dict[str, Scheme] = {name: s for name, s in PRESETS.items() if family_of(s).name not in OWN_FILE} | CUSTOM
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = ("normal", "zero", "constant", "denormal", "outlier", "positive", "tiny", "huge")

every_scheme = pytest.mark.parametrize("name", ALL)
# QServe's scales are f16 whatever the weight is, and of two levels; test_w4a8 has their bounds.
one_scale = pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("QSERVE")])
examples = settings(max_examples=12, deadline=None, derandomize=True)


def row(kind: str, k: int, dtype: torch.dtype) -> Tensor:
    """k numbers of one kind, f32 but representable in ``dtype``."""
    x = torch.randn(k)
    if kind == "zero":
        x = torch.zeros(k)
    elif kind == "constant":
        x = torch.full((k,), float(x[0]))
    elif kind == "denormal":
        x = x * torch.finfo(dtype).smallest_normal * 0.01
    elif kind == "outlier":
        x[0] = 1000.0
    elif kind == "positive":
        x = x.abs() + 3
    elif kind == "tiny":
        x = x * 2.0**-60
    elif kind == "huge":
        x = x * (torch.finfo(dtype).max / 64)
    return x.to(dtype).float()


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Tensor, torch.dtype]:
    """[n, k] of mixed rows, odd sizes included, and its dtype."""
    dtype = draw(st.sampled_from(DTYPES))
    kinds = draw(st.lists(st.sampled_from(ROWS), min_size=1, max_size=9))
    k = draw(st.sampled_from([1, 2, 3, 15, 16, 17, 31, 64, 127, 128, 130, 257]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    return torch.stack([row(kind, k, dtype) for kind in kinds]).to(dtype), dtype


def steps(args: QuantArgs, scale: Tensor, x: Tensor) -> Tensor:
    """Largest error that rounding ``x`` (f32) under ``scale`` may leave, element by element.

    Integers: half a step; below a scale that was itself rounded to 16 bits the ends of the range move by less than 2**-8
    of their size (8 or 15 steps). Floats: half a unit in the last place, 2**-4 (e4m3) or 2**-3 (e5m2) of the value, and
    half the smallest subnormal below. A millionth is added for f32 arithmetic.
    """
    if args.type == "float":
        relative, subnormal = (2.0**-4, 2.0**-9) if args.format == "e4m3" else (2.0**-3, 2.0**-16)
        bound = torch.maximum(x.abs() * relative, scale * subnormal / 2)
    elif args.num_bits == 4:
        bound = scale * (0.5 + (8 if args.symmetric else 15) * 2.0**-8)
    else:
        bound = scale * 0.5
    return bound + x.abs() * 1e-6 + torch.finfo(torch.float32).smallest_normal


def full_scale(scheme: Scheme, planes: Planes, n: int, k: int) -> Tensor:
    """Scale of each element of a weight, f32 [n, k]."""
    w, scale = scheme.weights, planes[1].float()
    if w.block_structure is not None:
        rows, columns = w.block_structure
        return scale.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
    if w.group_size is not None:
        return scale.repeat_interleave(w.group_size, 1)[:, :k]
    return scale.expand(n, k)


@one_scale
@examples
@given(matrices())
def test_weight_error_is_within_half_a_step(name: str, matrix: tuple[Tensor, torch.dtype]) -> None:
    scheme, (w, _) = ALL[name], matrix
    family, (n, k) = family_of(scheme), w.shape
    planes = family.quantize_weight(w, scheme)
    back = family.dequantize_weight(planes, scheme, k)
    assert back.dtype == torch.float32 and back.shape == (n, k)
    scale = full_scale(scheme, planes, n, k)
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert ((back - w.float()).abs() <= steps(scheme.weights, scale, w.float())).all()
    if scheme.weights.strategy not in ("tensor", "block"):
        assert (back[w.eq(0).all(1)] == 0).all(), "zero rows stay zero"


@one_scale
@examples
@given(matrices())
def test_scale_is_no_larger_than_needed(name: str, matrix: tuple[Tensor, torch.dtype]) -> None:
    """The bound above would hold for a scale that is far too coarse; this one says how fine it has to be."""
    scheme, (w, dtype) = ALL[name], matrix
    planes = family_of(scheme).quantize_weight(w, scheme)
    spread = float(w.float().max().clamp_min(0) - w.float().min().clamp_max(0))
    amax = float(w.float().abs().max())
    a = scheme.weights
    largest = {"e4m3": 448.0, "e5m2": 57344.0}.get(a.format or "", 127.0 if a.num_bits == 8 else 7.5)
    wanted = amax / largest if a.symmetric else spread / 15.0
    floor = numerics.SMALLEST_AMAX if a.num_bits == 8 else max(numerics.SMALLEST_AMAX, torch.finfo(dtype).tiny)
    assert float(planes[1].float().max()) <= max(wanted, floor) * (1 + 2.0**-7)


@every_scheme
@examples
@given(matrices())
def test_planes_are_as_declared(name: str, matrix: tuple[Tensor, torch.dtype]) -> None:
    scheme, (w, dtype) = ALL[name], matrix
    family, (n, k) = family_of(scheme), w.shape
    specs, planes = family.weight_planes(scheme, n, k, dtype), family.quantize_weight(w, scheme)
    assert [(spec.shape, spec.dtype) for spec in specs] == [(tuple(p.shape), p.dtype) for p in planes]
    assert sum(spec.nbytes for spec in specs) == sum(p.numel() * p.element_size() for p in planes)


def test_bits_per_weight_is_what_planes_take() -> None:
    for name, scheme in ALL.items():
        specs = family_of(scheme).weight_planes(scheme, 1024, 4096, torch.bfloat16)
        bits = 8 * sum(spec.nbytes for spec in specs) / (1024 * 4096)
        assert bits == pytest.approx(bits_per_weight(scheme), abs=0.02), name


@pytest.mark.parametrize("name", [n for n, s in ALL.items() if s.weights.num_bits == 8])
@examples
@given(matrices())
def test_quantizing_again_changes_nothing(name: str, matrix: tuple[Tensor, torch.dtype]) -> None:
    """8-bit codes reach the end of their range, so the scale comes back. INT4 does not: see the next test."""
    scheme, (w, _) = ALL[name], matrix
    family, k = family_of(scheme), w.shape[1]
    once = family.dequantize_weight(family.quantize_weight(w, scheme), scheme, k)
    twice = family.dequantize_weight(family.quantize_weight(once, scheme), scheme, k)
    assert torch.allclose(twice, once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [n for n in one_scale.args[1] if ALL[n].weights.num_bits == 4])
@examples
@given(matrices())
def test_int4_values_are_whole_steps(name: str, matrix: tuple[Tensor, torch.dtype]) -> None:
    """amax / 7.5 is met by no code, hence no idempotence; but each value is a whole number of steps within the range."""
    scheme, (w, _) = ALL[name], matrix
    family, (n, k) = family_of(scheme), w.shape
    planes = family.quantize_weight(w, scheme)
    whole = family.dequantize_weight(planes, scheme, k) / full_scale(scheme, planes, n, k)
    assert torch.allclose(whole, whole.round(), rtol=0, atol=1e-5)
    assert whole.abs().max() <= (8 if scheme.weights.symmetric else 15) + 1e-5


@given(st.integers(0, 5), st.integers(0, 40), st.integers(0, 2**31))
@settings(deadline=None, derandomize=True)
def test_nibbles_survive_packing(rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.shape == (rows, -(-columns // 2)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_nibbles(packed, columns), codes)


def test_even_columns_are_low_nibbles() -> None:
    assert pack_nibbles(torch.tensor([[1, 2, 3]])).tolist() == [[0x21, 0x03]]


def activations(name: str) -> tuple[Family, Scheme, QuantArgs]:
    scheme = ALL[name]
    assert scheme.input_activations is not None
    return family_of(scheme), scheme, scheme.input_activations


QUANTIZED_INPUTS = [name for name, scheme in ALL.items() if scheme.input_activations is not None]
every_input = pytest.mark.parametrize("name", QUANTIZED_INPUTS)
static_inputs = pytest.mark.parametrize("name", [name for name in QUANTIZED_INPUTS if ALL[name].static])
dynamic_inputs = pytest.mark.parametrize("name", [name for name in QUANTIZED_INPUTS if not ALL[name].static])


def input_scale(args: QuantArgs, scale: Tensor, k: int) -> Tensor:
    """Scale of each element of an input, broadcastable to it."""
    return scale.repeat_interleave(args.group_size, -1)[..., :k] if args.group_size else scale


@every_input
@examples
@given(matrices())
def test_input_error_is_within_half_a_step(name: str, matrix: tuple[Tensor, torch.dtype]) -> None:
    (family, scheme, args), (x, _) = activations(name), matrix
    given_scale = None
    if scheme.static:
        given_scale = numerics.safe_amax(x, None).reshape(1) / (448.0 if args.type == "float" else 127.0)
    codes, scale = family.quantize_input(x, scheme, given_scale)[:2]
    full = input_scale(args, scale, x.shape[1])
    back = codes.float() * full
    assert codes.shape == x.shape
    assert ((back - x.float()).abs() <= steps(args, full.expand_as(back), x.float())).all()


@every_input
def test_input_shapes(name: str) -> None:
    """[..., k] in, codes [..., k] and the family's scale shape out; rows do not look at each other unless by tensor."""
    family, scheme, args = activations(name)
    x = torch.randn(2, 3, 100).bfloat16()
    given_scale = torch.tensor([0.02]) if scheme.static else None
    codes, scale = family.quantize_input(x, scheme, given_scale)[:2]
    assert codes.shape == x.shape and scale.dtype == torch.float32
    groups = -(-100 // args.group_size) if args.group_size else 1
    assert tuple(scale.shape) == ((1,) if args.strategy == "tensor" else (2, 3, groups))
    if args.strategy != "tensor":
        alone = family.quantize_input(x[1:, 2:], scheme, given_scale)[0]
        assert torch.equal(alone.float(), codes[1:, 2:].float())


@static_inputs
def test_static_input_saturates(name: str) -> None:
    """Values past the calibrated range end at the largest code, and never wrap or become NaN."""
    family, scheme, args = activations(name)
    codes, _ = family.quantize_input(torch.tensor([[1e4, -1e4, 0.0]]), scheme, torch.tensor([1.0]))
    largest = 448.0 if args.type == "float" else 127.0
    assert codes.float().tolist() == [[largest, -largest, 0.0]]


@dynamic_inputs
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_spoil_their_row_and_no_other(name: str, bad: float) -> None:
    family, scheme, args = activations(name)
    w = family.quantize_weight(torch.randn(5, 64), scheme)
    x = torch.randn(3, 64)
    clean = family.linear(family.quantize_input(x, scheme, None), w, None, scheme, torch.float32)
    x[1, 7] = bad
    spoiled = family.linear(family.quantize_input(x, scheme, None), w, None, scheme, torch.float32)
    assert not torch.isfinite(spoiled[1]).any(), "a NaN or inf must not vanish"
    if args.strategy != "tensor":
        assert torch.equal(spoiled[[0, 2]], clean[[0, 2]])


@every_scheme
@pytest.mark.parametrize("kind", ["zero", "constant", "denormal"])
def test_linear_over_special_rows_is_finite(name: str, kind: str) -> None:
    scheme = ALL[name]
    family = family_of(scheme)
    w = torch.stack([row(kind, 40, torch.float32), torch.randn(40)])
    x = torch.stack([torch.randn(40), row(kind, 40, torch.float32)])
    planes = (x,) if scheme.input_activations is None else family.quantize_input(x, scheme, scale_for(scheme, x))
    y = family.linear(planes, family.quantize_weight(w, scheme), None, scheme, torch.float32)
    assert torch.isfinite(y).all()
    if kind == "zero":
        assert y[1, 0] == 0


def scale_for(scheme: Scheme, x: Tensor) -> Tensor | None:
    """What calibration on ``x`` alone would give a static scheme."""
    if not scheme.static:
        return None
    return x.abs().max().float().reshape(1) / family_of(scheme).largest_input(scheme)


@every_scheme
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_is_the_product_of_dequantized_operands(name: str, dtype: torch.dtype) -> None:
    scheme = ALL[name]
    family = family_of(scheme)
    x, w, bias = torch.randn(2, 3, 200).to(dtype), torch.randn(37, 200).to(dtype), torch.randn(37).to(dtype)
    w_planes = family.quantize_weight(w, scheme)
    x_planes: Planes = (x,)
    left = x.float()
    if scheme.input_activations is not None:
        x_planes = family.quantize_input(x, scheme, scale_for(scheme, x))
        left = x_planes[0].float() * input_scale(scheme.input_activations, x_planes[1], 200)
    wanted = left @ family.dequantize_weight(w_planes, scheme, 200).t()
    # f32 sums in another order; the result is rounded once to its dtype.
    tolerance = 1e-5 + {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    for added in (None, bias):
        got = family.linear(x_planes, w_planes, added, scheme, dtype)
        expected = wanted if added is None else wanted + added.float()
        assert got.dtype == dtype
        assert float((got.float() - expected).norm() / expected.norm()) <= tolerance


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-3)], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", [name for name in TEXTBOOK if name in PRESETS and TEXTBOOK[name].block == 1])
def test_values_are_those_of_the_textbook(name: str, dtype: torch.dtype, share: float) -> None:
    """Another implementation, from the definitions.

    It divides by the scale where the product multiplies by its reciprocal, so a tie may fall the other way, and ties are
    not rare among bf16 numbers: f32 data for the strict comparison, a few codes in a thousand for bf16. Under the scale
    amax / 7.5 the largest magnitude of a group of 128 always is a tie, hence one code in a hundred for W4A16 and its kin.
    """
    share = 1e-2 if name in ("W4A16", "W4A8", "W4AFP8") else share
    scheme, book = PRESETS[name], TEXTBOOK[name]
    family = family_of(scheme)
    w = torch.randn(150, 300).to(dtype)
    back = family.dequantize_weight(family.quantize_weight(w, scheme), scheme, 300)
    assert differing(back, book.weight(w.float(), w.dtype)) <= share
    if book.inputs is not None:
        assert scheme.input_activations is not None
        planes = family.quantize_input(w, scheme, scale_for(scheme, w))
        if family.name in ("nvfp4", "mxfp4"):  # the planes of an input are those of a weight
            got = family.dequantize_weight(planes, scheme, 300)
        else:
            got = planes[0].float() * input_scale(scheme.input_activations, planes[1], 300)
        assert differing(got, book.inputs(w.float(), w.float().abs().max())) <= share


def differing(got: Tensor, wanted: Tensor) -> float:
    """Share of elements that differ by more than f32 rounding."""
    return float(((got - wanted).abs() > 1e-5 * wanted.abs() + 1e-12).float().mean())


def test_the_textbook_comparison_can_fail() -> None:
    w = torch.randn(150, 300)
    back = family_of(PRESETS["W8A8"]).dequantize_weight(
        family_of(PRESETS["W8A8"]).quantize_weight(w, PRESETS["W8A8"]), PRESETS["W8A8"], 300
    )
    assert differing(back, TEXTBOOK["FP8_DYNAMIC"].weight(w, w.dtype)) > 0.5


@every_scheme
def test_a_block_of_rows_is_quantized_alike_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunked quantization of a big weight gives the planes of an unchunked one."""
    scheme = ALL[name]
    family = family_of(scheme)
    w = torch.randn(300, 96)
    whole = family.quantize_weight(w, scheme)
    monkeypatch.setattr(numerics, "CHUNK_ELEMENTS", 96 * 130)
    chunked = family.quantize_weight(w, scheme)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(whole, chunked, strict=True))
    block = family.row_block(scheme)
    if scheme.weights.strategy != "tensor":
        rows = family.quantize_weight(w[block : 2 * block], scheme)
        assert all(
            torch.equal(a[: len(b)].float(), b.float()) for a, b in zip(rows, (p[_cut(p, block)] for p in whole))
        )


def _cut(plane: Tensor, block: int) -> slice:
    """Rows ``block`` to ``2 * block`` of a plane of 300 rows, or of its blocks."""
    return slice(block, 2 * block) if plane.shape[0] == 300 else slice(1, 2)


@st.composite
def quant_args(draw: st.DrawFn) -> QuantArgs:
    """Any legal arguments, implemented by a family or not."""
    kind = draw(st.sampled_from(["int", "float"]))
    strategy = draw(st.sampled_from(["tensor", "channel", "token", "group", "block", "tensor_group"]))
    bits = draw(st.sampled_from([4, 8])) if kind == "float" else draw(st.integers(2, 8))
    formats = {8: ["e4m3", "e5m2", None], 4: ["e2m1", None]}[bits] if kind == "float" else [None]
    size = draw(st.sampled_from([16, 32, 128])) if strategy in ("group", "tensor_group") else None
    block = draw(st.sampled_from([(128, 128), (1, 64)])) if strategy == "block" else None
    flags = draw(st.booleans()), draw(st.booleans())
    return QuantArgs(bits, kind, strategy, *flags, size, block, draw(st.sampled_from(formats)))


@given(quant_args(), st.none() | quant_args())
@settings(deadline=None, derandomize=True)
def test_specs_and_fields_round_trip(weights: QuantArgs, inputs: QuantArgs | None) -> None:
    scheme = Scheme(weights, inputs)
    assert parse(scheme.spec) == scheme
    assert Scheme.from_fields(scheme.to_fields()) == scheme
    assert QuantArgs.from_spec(weights.spec) == weights


@every_scheme
def test_scheme_survives_text_and_policy(name: str) -> None:
    scheme = ALL[name]
    assert parse(scheme.spec) == scheme and parse(scheme.spec.lower() if name in PRESETS else scheme.spec) == scheme
    assert Policy.load({"default": scheme.to_fields()}).default == scheme
    assert scheme.spec == (name if name in PRESETS else f"{scheme.weights.spec}+{scheme.spec.partition('+')[2]}")


def test_different_schemes_have_different_specs() -> None:
    assert len({scheme.spec for scheme in ALL.values()}) == len(ALL)


@pytest.mark.parametrize(
    "text", ["", "W3A3", "fp8e4m3.channel", "int4.group+16", "nonsense+16", "int4.rows+16", "int4.group8x8+16"]
)
def test_wrong_specs_list_the_presets(text: str) -> None:
    with pytest.raises(SchemeError, match="FP8_DYNAMIC"):
        parse(text)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"weights": {"num_bits": 4, "type": "int", "strategy": "group"}}, "group_size"),
        ({"weights": {"num_bits": 4, "type": "int", "strategy": "channel", "group_size": 32}}, "group_size"),
        ({"weights": {"num_bits": 8, "type": "float", "strategy": "block"}}, "block_structure"),
        ({"weights": {"num_bits": 8, "type": "int", "strategy": "row"}}, "strategy must be one of"),
        ({"weights": {"num_bits": 8, "type": "bfloat", "strategy": "channel"}}, "type must be one of"),
        ({"weights": {"num_bits": 8, "type": "int", "strategy": "channel", "format": "e4m3"}}, "format"),
        ({"weights": {"num_bits": 8, "strategy": "channel"}}, "'type' is missing"),
        ({"weights": {"bits": 8}}, "unknown field 'bits'"),
        ({"weight": {}}, "unknown field 'weight'"),
        ({"input_activations": {}}, "needs weights"),
    ],
)
def test_contradicting_fields_are_errors(fields: dict[str, object], words: str) -> None:
    with pytest.raises(SchemeError, match=words):
        Scheme.from_fields(fields)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(QuantArgs(3, "int", "channel")),
        Scheme(QuantArgs(4, "int", "group", group_size=24)),
        Scheme(QuantArgs(8, "int", "channel", symmetric=False)),
        Scheme(QuantArgs(8, "float", "channel"), INT8),
        Scheme(QuantArgs(8, "float", "channel"), QuantArgs(8, "float", "token")),
        Scheme(QuantArgs(8, "float", "block", block_structure=(128, 128))),
        Scheme(
            QuantArgs(8, "float", "block", block_structure=(128, 128)),
            QuantArgs(8, "float", "group", dynamic=True, group_size=64),
        ),
        Scheme(QuantArgs(4, "float", "tensor_group", group_size=32)),
    ],
    ids=lambda scheme: scheme.spec,
)
def test_schemes_that_nobody_implements_say_why(scheme: Scheme) -> None:
    with pytest.raises(SchemeError) as error:
        family_of(scheme)
    assert all(f"  {family.name}: " in str(error.value) for family in FAMILIES)
    assert "Fix:" in str(error.value)
