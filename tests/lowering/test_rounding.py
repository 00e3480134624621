"""Rounding by search and by GPTQ: planes of the right form, never worse than nearest, and what the textbook gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import quant_compile.lowering.schemes  # noqa: F401  registers the families
from quant_compile.ir.family import Planes, family_of
from quant_compile.ir.scheme import Scheme, parse
from quant_compile.lowering.rounding import gptq as rounding
from quant_compile.lowering.rounding.gptq import DAMPING, OWN_DAMPING, OWN_STEP, compensated, corrected, gptq
from quant_compile.lowering.rounding.recipe import (
    AUTO,
    AUTO_COMPENSATED_ON_CPU,
    AUTO_LARGEST_ON_CPU,
    COMPENSATE,
    NEAREST,
    SEARCH,
    Rounding,
    has_choices,
    planes_of,
)
from quant_compile.lowering.rounding.search import grouped, searched
from tests import textbook

SPECS = (
    "W4A16", "W4A16_ASYM", "int4.group32+16", "int4.channel+16", "W4A8", "W4AFP8", "W8A16", "W8A8", "NVFP4", "NVFP4A16", "MXFP4",
)  # fmt: skip
SIZES = ((7, 200), (33, 256), (1, 16), (4, 129))


def weight(n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rows of unlike size, with outliers, a row of zeros and one that is constant."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator) * torch.logspace(-3, 0, n)[:, None]
    w[torch.rand(n, k, generator=generator) > 0.99] *= 6
    if n > 4:
        w[2], w[3] = 0, 0.25
    return w.to(dtype)


def values_of(planes: Planes, scheme: Scheme, k: int) -> Tensor:
    return family_of(scheme).dequantize_weight(planes, scheme, k)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_planes_are_those_of_the_family_and_never_worse(spec: str, size: tuple[int, int]) -> None:
    scheme, (n, k) = parse(spec), size
    family, w = family_of(scheme), weight(n, k)
    importance = torch.rand(k, generator=torch.Generator().manual_seed(1)).add_(0.1)
    nearest = values_of(family.quantize_weight(w, scheme), scheme, k)
    grid = family.grid(w, scheme)
    assert grid is not None
    for given in (None, importance):
        planes = searched(w, scheme, given)
        wanted = [(spec.shape, spec.dtype) for spec in family.weight_planes(scheme, n, k, w.dtype)]
        assert [(tuple(plane.shape), plane.dtype) for plane in planes] == wanted
        weights = torch.ones(k) if given is None else given
        errors = [((values - w.float()).square() * weights).sum() for values in (values_of(planes, scheme, k), nearest)]
        # NVFP4's global scale is another one, which moves every e4m3 scale by up to a sixteenth.
        slack = 1.02 if "NVFP4" in spec else 1 + 1e-5
        assert errors[0] <= errors[1] * slack


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("spec", ["W4A16", "NVFP4A16", "W8A8"])
def test_other_dtypes(spec: str, dtype: torch.dtype) -> None:
    scheme, w = parse(spec), weight(16, 256, dtype=dtype)
    assert (values_of(searched(w, scheme), scheme, 256) - w.float()).norm() <= 0.2 * w.float().norm()


def test_int4_scales_are_near_the_best_there_are() -> None:
    """A fine scan over all scales, negative ones too, in f64: the search is within 2 % of it, nearest rounding is not."""
    w, importance = torch.randn(24, 128), torch.rand(128) + 0.2
    scheme = parse("W4A16")
    best = [textbook.least_int4_error(row, importance) for row in w]

    def errors(planes: Planes) -> Tensor:
        return ((values_of(planes, scheme, 128) - w).square() * importance).sum(1)

    found, nearest = errors(searched(w, scheme, importance)), errors(family_of(scheme).quantize_weight(w, scheme))
    assert float(found.sum()) <= 1.02 * sum(best) < 0.85 * float(nearest.sum())


def test_inputs_that_were_never_seen_keep_their_weights() -> None:
    scheme, w = parse("W4A16"), weight(8, 256)
    importance = torch.zeros(256)
    importance[:4] = 5.0
    values = values_of(searched(w, scheme, importance), scheme, 256)
    assert (values - w.float()).norm() < 0.3 * w.float().norm()
    assert all(
        torch.equal(a, b) for a, b in zip(searched(w, scheme, torch.zeros(256)), searched(w, scheme), strict=True)
    )


def moments_of(k: int, tokens: int = 2000, seed: int = 3) -> Tensor:
    """Of inputs that hang together."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=generator) @ (torch.randn(k, k, generator=generator) * 0.3 + torch.eye(k))
    return x.t() @ x / tokens


@pytest.mark.parametrize("k", [64, 200])
def test_gptq_is_the_textbooks(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One scale a row, which is then known before: the same codes but for ties that f32 breaks otherwise."""
    monkeypatch.setattr(rounding, "INVERTED", 96)
    scheme, w, moments = parse("int4.channel+16"), weight(16, k, dtype=torch.float32), moments_of(k)
    planes = gptq(w, scheme, moments.clone())
    assert planes is not None
    theirs = textbook.gptq_values(w, moments, planes[1].float(), -8, 7, DAMPING)
    same = (values_of(planes, scheme, k) - theirs).abs() <= 1e-4 * planes[1].float().abs()
    assert float(same.double().mean()) > 0.98


@pytest.mark.parametrize("spec", ["W4A16", "int4.group32+16", "W4A16_ASYM", "W8A8", "NVFP4A16", "MXFP4A16"])
def test_gptq_loses_less_of_the_output(spec: str) -> None:
    scheme, w, moments = parse(spec), weight(48, 320), moments_of(320)

    def error(planes: Planes | None) -> float:
        assert planes is not None
        difference = values_of(planes, scheme, 320) - w.float()
        return float(((difference @ moments) * difference).sum())

    assert error(gptq(w, scheme, moments.clone())) < 0.8 * error(searched(w, scheme, moments.diagonal()))


def inputs_of(k: int, noise: float, tokens: int = 3000) -> tuple[Tensor, Tensor]:
    """What a model and its quantized self feed one weight."""
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(tokens, k, generator=generator) @ (torch.randn(k, k, generator=generator) * 0.3 + torch.eye(k))
    return x, x + noise * x.std() * torch.randn(tokens, k, generator=generator)


@pytest.mark.parametrize("k", [64, 200])
def test_correction_is_the_textbooks(k: int) -> None:
    w, (x, y) = weight(24, k, dtype=torch.float32), inputs_of(k, 0.3)
    moments, cross = y.t() @ y / len(y), x.t() @ y / len(y)
    before = moments.clone()
    found = corrected(w, moments, cross, (x - y).square().mean(0), len(y))
    theirs = textbook.corrected_values(w, x, y, DAMPING)
    assert found is not None
    change, whole = found.double() - w, theirs - w  # a share of it, as it might be chance
    share = float((change * whole).sum() / whole.square().sum())
    assert 0.6 < share < 1 and torch.allclose(change, share * whole, atol=1e-4 * float(theirs.abs().max()))
    assert torch.allclose(moments, before, rtol=1e-5, atol=0)
    error, uncorrected = ((y @ each.t() - x @ w.t()).norm() for each in (found, w))
    assert error < 0.9 * uncorrected


def test_correction_leaves_a_weight_whose_inputs_are_the_same() -> None:
    w, (x, _) = weight(24, 96), inputs_of(96, 0.0)
    moments = x.t() @ x / len(x)
    found = corrected(w, moments.clone(), moments.clone(), torch.zeros(96), len(x))
    assert (
        found is not None and found.dtype == w.dtype and torch.allclose(found.float(), w.float(), rtol=2**-7, atol=1e-4)
    )


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_correction_refuses_moments_of_no_use(bad: float) -> None:
    w, (x, y) = weight(8, 64), inputs_of(64, 0.1)
    good = y.t() @ y / len(y), x.t() @ y / len(y)
    apart = (x - y).square().mean(0)
    assert corrected(w, torch.full((64, 64), bad), good[1].clone(), apart, len(y)) is None
    if bad != 0.0:
        assert corrected(w, good[0].clone(), torch.full((64, 64), bad), apart, len(y)) is None


@pytest.mark.parametrize(("tokens", "made"), [(100, 0.2), (300, 0.35), (30000, 0.95)])
def test_of_a_correction_that_chance_explains_little_is_made(tokens: int, made: float) -> None:
    """Of inputs whose noise has a part that follows from them, and of noise alone: nothing."""
    w, (y, other) = weight(24, 64, dtype=torch.float32), inputs_of(64, 0.0, 2 * tokens)[0].split(tokens)
    noise = 0.5 * other
    for x, least, most in ((y + noise, 0.0, 0.6 * min(1.0, 64 / tokens) ** 0.5), (1.3 * y + noise, made, 1.05)):
        moments = y.t() @ y / tokens
        full = textbook.corrected_values(w, x, y, DAMPING).float() - w
        found = corrected(w, moments, x.t() @ y / tokens, (x - y).square().mean(0), tokens)
        assert found is not None
        share = float(((found - w) * full).sum() / full.square().sum())
        assert least <= share <= most, share


def test_gptq_refuses_moments_of_no_use() -> None:
    scheme, w = parse("W4A16"), weight(8, 128)
    assert gptq(w, scheme, torch.zeros(128, 128)) is None
    assert gptq(w, scheme, torch.full((128, 128), float("nan"))) is None
    assert gptq(w, parse("FP8_DYNAMIC"), moments_of(128)) is None
    rank_one = torch.ones(128, 128)
    assert gptq(w, scheme, rank_one) is not None


def learned(n: int, k: int) -> Tensor:
    """A weight whose rows lie where a few inputs vary together, as gradients leave them."""
    generator = torch.Generator().manual_seed(5)
    seen = torch.randn(n, k // 8, generator=generator) @ torch.randn(k // 8, k, generator=generator)
    return (seen / seen.std() + 0.3 * torch.randn(n, k, generator=generator)).bfloat16()


@pytest.mark.parametrize("k", [64, 200])
def test_compensation_is_the_textbooks(k: int) -> None:
    scheme, w = parse("int4.channel+16"), learned(48, k).float()
    planes = compensated(w, scheme)
    assert planes is not None
    theirs = textbook.compensated_values(w, w.t() @ w, planes[1].float(), OWN_DAMPING, OWN_STEP)
    same = (values_of(planes, scheme, k) - theirs).abs() <= 1e-4 * planes[1].float().abs()
    assert float(same.double().mean()) > 0.99


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_compensated_planes_are_those_of_the_family(spec: str, size: tuple[int, int]) -> None:
    """As far from the weight as a search's by no more than what was moved, and of the right form."""
    scheme, (n, k) = parse(spec), size
    w = weight(n, k)
    planes = planes_of(w, scheme, Rounding(COMPENSATE))
    wanted = [(spec.shape, spec.dtype) for spec in family_of(scheme).weight_planes(scheme, n, k, w.dtype)]
    assert [(tuple(plane.shape), plane.dtype) for plane in planes] == wanted
    found, nearest = (
        (values_of(each, scheme, k) - w.float()).norm()
        for each in (planes, family_of(scheme).quantize_weight(w, scheme))
    )
    assert found <= 1.25 * nearest


@pytest.mark.parametrize("spec", SPECS)
def test_compensation_loses_less_where_rows_lie_as_inputs_do(spec: str) -> None:
    scheme, w = parse(spec), learned(96, 320)
    moments = w.float().t() @ w.float()

    def error(planes: Planes) -> float:
        difference = values_of(planes, scheme, 320) - w.float()
        return float(((difference @ moments) * difference).sum())

    searching, compensating = (planes_of(w, scheme, Rounding(how)) for how in (SEARCH, COMPENSATE))
    assert error(compensating) < 0.9 * error(searching)


@pytest.mark.parametrize("spec", ["W4A16", "NVFP4A16", "MXFP4A16"])
def test_a_weight_of_many_rows_is_rounded_a_part_at_a_time(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head's f32 would be larger than all else; NVFP4's one scale of the tensor stays that of all rows."""
    scheme, w = parse(spec), learned(100, 256)
    w[70] *= 3
    whole = compensated(w, scheme), gptq(w, scheme, moments_of(256))
    monkeypatch.setattr(rounding, "ELEMENTS", 32 * 256)
    for planes, in_one in zip((compensated(w, scheme), gptq(w, scheme, moments_of(256))), whole, strict=True):
        assert planes is not None and in_one is not None
        assert [(plane.shape, plane.dtype) for plane in planes] == [(plane.shape, plane.dtype) for plane in in_one]
        apart = values_of(planes, scheme, 256) != values_of(in_one, scheme, 256)
        assert float(apart.double().mean()) < 0.01, "other than by sums in another order"


def test_compensation_refuses_values_of_no_use() -> None:
    scheme, w = parse("W4A16"), weight(8, 128)
    assert compensated(w, parse("FP8_DYNAMIC")) is None and compensated(w[:0], scheme) is None
    for bad in (0.0, float("nan"), float("inf")):
        broken = torch.full_like(w, bad)
        assert compensated(broken, scheme) is None
        for ours, theirs in zip(planes_of(broken, scheme, Rounding(COMPENSATE)), searched(broken, scheme), strict=True):
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    before = w.clone()
    assert compensated(w, scheme) is not None and torch.equal(w, before)


@pytest.mark.parametrize("method", [SEARCH, COMPENSATE])
def test_a_group_of_zeros_stays_zero(method: str) -> None:
    for spec in SPECS:
        scheme, w = parse(spec), torch.zeros(4, 64, dtype=torch.bfloat16)
        assert not values_of(planes_of(w, scheme, Rounding(method)), scheme, 64).any(), spec
        w[0] = 1
        assert not values_of(planes_of(w, scheme, Rounding(method)), scheme, 64)[1:].any(), spec


def test_auto_is_what_does_not_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, w = parse("W4A16"), weight(8, 128)
    assert AUTO_COMPENSATED_ON_CPU == 1 << 20 and AUTO_LARGEST_ON_CPU == 1 << 24
    for limits, wanted in (((1024, 4096), COMPENSATE), ((1023, 1024), SEARCH), ((100, 1023), NEAREST)):
        for name, limit in zip(("AUTO_COMPENSATED_ON_CPU", "AUTO_LARGEST_ON_CPU"), limits, strict=True):
            monkeypatch.setattr(f"quant_compile.lowering.rounding.recipe.{name}", limit)
        planes, named = (planes_of(w, scheme, Rounding(how)) for how in (AUTO, wanted))
        assert all(torch.equal(a, b) for a, b in zip(planes, named, strict=True))
        label = Rounding(AUTO).label(scheme, w)
        assert label == ("" if wanted == NEAREST else f"rounding: {wanted}")
        assert label == Rounding(AUTO).label(scheme, w.expand(3, -1, -1)), "of experts each counts for itself"
        others = {COMPENSATE, SEARCH, NEAREST} - {wanted}
        assert all(not torch.equal(planes[0], planes_of(w, scheme, Rounding(how))[0]) for how in others)
    assert not Rounding(AUTO).label(parse("FP8_DYNAMIC"), w)


@pytest.mark.parametrize("spec", ["MXFP4", "MXFP4A16", "FP8_DYNAMIC"])
def test_a_search_without_choices_is_nearest_and_said_so(spec: str) -> None:
    scheme, w = parse(spec), weight(33, 256)
    nearest = family_of(scheme).quantize_weight(w, scheme)
    for plane, wanted in zip(planes_of(w, scheme, Rounding(SEARCH)), nearest, strict=True):
        assert torch.equal(plane.view(torch.uint8), wanted.view(torch.uint8))
    assert not Rounding(SEARCH).label(scheme, w) and not Rounding(AUTO).label(scheme, w)
    assert Rounding(COMPENSATE).label(scheme, w) == ("" if "FP8" in spec else "rounding: compensate")


@pytest.mark.parametrize("spec", SPECS[:-1])
def test_a_search_has_choices(spec: str) -> None:
    assert has_choices(parse(spec))
    assert Rounding(SEARCH).label(parse(spec), weight(33, 256)) == "rounding: search"


def test_groups_are_padded() -> None:
    assert grouped(torch.ones(2, 5), 4).tolist() == [[[1, 1, 1, 1], [1, 0, 0, 0]]] * 2
