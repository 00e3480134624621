"""Factors of inputs: those of the textbooks are tried, what is taken is never worse than none, and what cannot be taken is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import quant_compile.lowering.schemes  # noqa: F401  registers the families
from quant_compile.ir.scheme import parse
from quant_compile.lowering.rounding.factors import (
    MOST,
    POWERS,
    Inputs,
    Member,
    awq_factors,
    fitted,
    multiplied,
    normalized,
    output_error,
    smoothquant_factors,
)
from tests import textbook

K = 128


def rows(count: int = 256, seed: int = 0) -> Tensor:
    """Inputs of which a few columns are much larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.ones(K)
    size[::17] = 20
    return (torch.randn(count, K, generator=generator) * size).bfloat16()


def weight(n: int = 48, seed: int = 1) -> Tensor:
    return torch.randn(n, K, generator=torch.Generator().manual_seed(seed)).bfloat16()


def inputs_of(x: Tensor) -> Inputs:
    return Inputs(x.float().square().mean(0), x.float().abs().amax(0))


@pytest.mark.parametrize(
    ("ours", "theirs"), [(awq_factors, textbook.awq_factor), (smoothquant_factors, textbook.smoothquant_factor)]
)
def test_the_textbooks_factors_are_tried(ours: Callable[..., Any], theirs: Callable[..., Tensor]) -> None:
    x, w = rows(), weight()
    tried = list(ours(inputs_of(x), [w]))
    for step in range(1, POWERS + 1):
        wanted = theirs(x, w, step / POWERS)
        assert any(torch.allclose(s.double(), wanted, rtol=1e-4) for s in tried), step


def test_siblings_share_the_largest_of_their_weights() -> None:
    x, one, other = rows(), weight(seed=1), weight(seed=2) * 3
    joined = smoothquant_factors(inputs_of(x), [torch.cat((one, other))])
    for ours, theirs in zip(smoothquant_factors(inputs_of(x), [one, other]), joined, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_error_is_that_of_the_scheme() -> None:
    """W8A8 by hand: rows of both sides rounded by their largest magnitude, in f64; the search makes the weight's side a little better."""
    x, w, inverse = rows(), weight(), torch.linspace(0.5, 2, K).bfloat16()
    member = Member(w, parse("W8A8"), x)
    plain = x.double() @ w.double().T
    for factor in (None, inverse):
        scaled, weights = x if factor is None else x * factor, multiplied(w, factor)
        found = textbook.rounded_rows(scaled, 127) @ textbook.rounded_rows(weights, 127).T
        wanted = float((found - plain).square().sum() / plain.square().sum())
        ours = output_error(member, inputs_of(x).squares, factor)
        assert 0.6 * wanted < ours < 1.05 * wanted


@pytest.mark.parametrize(
    "spec", ["W4A16", "int4.group32+16", "W4A16_ASYM", "NVFP4A16", "NVFP4", "MXFP4", "W4A8", "W8A8", "W8A8_STATIC"]
)
@pytest.mark.parametrize("factors", [awq_factors, smoothquant_factors])
def test_never_worse_than_none(spec: str, factors: Any) -> None:
    """By the measure that decides; a factor that is taken lowers it."""
    x, w = rows(), weight()
    member, inputs = Member(w, parse(spec), x), inputs_of(x)
    inverse = fitted([member], inputs, factors, torch.bfloat16)
    none = output_error(member, inputs.squares, None)
    if inverse is not None:
        assert inverse.dtype == torch.bfloat16 and inverse.shape == (K,) and bool((inverse > 0).all())
        assert output_error(member, inputs.squares, inverse) < none


@pytest.mark.parametrize("spec", ["W4A16", "NVFP4A16", "W8A8"])
def test_outliers_of_inputs_are_where_it_pays(spec: str) -> None:
    """On rows that were not seen."""
    x, w, unseen = rows(), weight(), rows(seed=5)
    factors = smoothquant_factors if spec == "W8A8" else awq_factors
    inverse = fitted([Member(w, parse(spec), x)], inputs_of(x), factors, torch.bfloat16)
    assert inverse is not None
    member = Member(w, parse(spec), unseen)
    assert output_error(member, inputs_of(x).squares, inverse) < 0.9 * output_error(member, inputs_of(x).squares, None)


def test_the_product_is_the_same() -> None:
    x, w, inverse = rows().double(), weight().double(), torch.linspace(0.1, 8, K).double()
    torch.testing.assert_close((x * inverse) @ multiplied(w, inverse).T, x @ w.T, rtol=1e-5, atol=1e-4)
    assert multiplied(w, None) is w


def test_inputs_that_were_never_seen_get_one() -> None:
    s = normalized(torch.tensor([0.0, 4.0, 1.0, float("inf"), float("nan")]))
    assert s.tolist() == pytest.approx([1.0, 2.0, 0.5, 1.0, 1.0])
    assert normalized(torch.zeros(3)).tolist() == [1, 1, 1]
    wide = normalized(torch.tensor([1e-30, 1.0, 1e30]))
    assert float(wide.min()) == pytest.approx(1 / MOST) and float(wide.max()) == pytest.approx(MOST)


def test_no_factor_where_none_helps() -> None:
    """Inputs alike and weights that are codes already."""
    x = torch.ones(16, K).bfloat16()
    w = (torch.randint(-7, 8, (8, K), generator=torch.Generator().manual_seed(0)).float() / 7.5).bfloat16()
    w[:, ::128] = 1.0
    exact = Member(torch.zeros_like(w), parse("W4A16"), x)
    assert fitted([exact], inputs_of(x), awq_factors, torch.bfloat16) is None
