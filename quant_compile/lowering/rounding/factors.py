"""Factors of inputs: x W^T = (x / s) (W s)^T, with s such that rounding W s, and x / s where inputs are quantized, loses less.

Sources: AWQ, Lin et al. 2023, arXiv 2306.00978: s is a power of how large inputs are; the power is the one whose outputs are nearest to
those of the unrounded weight. SmoothQuant, Xiao et al. 2022, arXiv 2211.10438: s is such that inputs and weights share the outliers of
inputs. Here every choice is rounded as the scheme's search rounds it, and outputs are those of the scheme, quantized inputs included. No
factor at all is among the choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, family_of
from quant_compile.ir.numerics import SMALLEST_AMAX
from quant_compile.ir.scheme import Scheme
from quant_compile.lowering.rounding.search import searched

# Shares of the way from no factor to all of it; the first is none.
POWERS = 10
# s lies within this of its middle: what an input that was hardly seen would get says nothing.
MOST = 1e3
# Rows of a weight whose outputs decide; more of them hardly change which power is best.
OUTPUTS = 256


@dataclass(frozen=True)
class Inputs:
    """What was seen of the inputs of weights that share a factor.

    Attributes:
        squares: [k] f32, E[x^2].
        largest: [k] f32, max |x|.
    """

    squares: Tensor
    largest: Tensor


Factors = Callable[[Inputs, Sequence[Tensor]], Iterator[Tensor]]


@dataclass(frozen=True)
class Member:
    """A weight, or one expert's, whose outputs judge a factor.

    Attributes:
        weight: [n, k].
        scheme: it is rounded to.
        rows: [t, k], some of its inputs.
    """

    weight: Tensor
    scheme: Scheme
    rows: Tensor


def awq_factors(inputs: Inputs, weights: Sequence[Tensor]) -> Iterator[Tensor]:
    """s [k] f32 to try: powers of E[x^2], and the same over what is left for the weights' own size.

    Args:
        weights: [n, k] each; the mean magnitude of each input's weights counts.
    """
    size = inputs.squares.sqrt()
    own = torch.stack([w.float().abs().mean(0) for w in weights]).mean(0)
    for step in range(1, POWERS + 1):
        power = step / POWERS
        yield normalized(size.pow(power))
        yield normalized(size.pow(power) / own.clamp_min(SMALLEST_AMAX).pow(1 - power))


def smoothquant_factors(inputs: Inputs, weights: Sequence[Tensor]) -> Iterator[Tensor]:
    """s [k] f32 to try: max|x|^a / max|w|^(1 - a)."""
    own = torch.stack([w.float().abs().amax(0) for w in weights]).amax(0).clamp_min(SMALLEST_AMAX)
    for step in range(1, POWERS + 1):
        power = step / POWERS
        yield normalized(inputs.largest.pow(power) / own.pow(1 - power))


def normalized(s: Tensor) -> Tensor:
    """With its least and most equally far from one; inputs that were never seen get one."""
    seen = torch.isfinite(s) & (s > 0)
    if not bool(seen.any()):
        return torch.ones_like(s)
    known = s[seen].log()
    middle = (known.amin() + known.amax()) / 2
    return torch.where(seen, s / middle.exp(), 1.0).clamp(1 / MOST, MOST)


def storable(s: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / s as graphs multiply by it, in the dtype of inputs."""
    return s.reciprocal().to(dtype)


def multiplied(w: Tensor, inverse: Tensor | None) -> Tensor:
    """W s in w's dtype, [n, k]."""
    return w if inverse is None else (w.float() / inverse.float()).to(w.dtype)


def output_error(member: Member, squares: Tensor, inverse: Tensor | None) -> float:
    """Squared error of a member's outputs under a factor, relative to the outputs."""
    w, x, scheme = member.weight, member.rows, member.scheme
    if inverse is not None:
        squares, x = squares * inverse.float().square(), x * inverse
    plain = member.rows.float() @ w.float().t()
    planes = searched(multiplied(w, inverse), scheme, squares)
    found = family_of(scheme).linear(quantized(x, scheme), planes, None, scheme, torch.float32)
    return float((found - plain).square().sum() / plain.square().sum().clamp_min(SMALLEST_AMAX))


def quantized(x: Tensor, scheme: Scheme) -> Planes:
    """Planes of inputs, or themselves where they stay; a static scale is that of these inputs."""
    if scheme.input_activations is None:
        return (x,)
    family, scale = family_of(scheme), None
    if scheme.static:
        scale = (x.abs().amax().float().clamp_min(SMALLEST_AMAX) / family.largest_input(scheme)).reshape(1)
    return family.quantize_input(x.contiguous(), scheme, scale)


def fitted(members: Sequence[Member], inputs: Inputs, factors: Factors, dtype: torch.dtype) -> Tensor | None:
    """1 / s [k] in ``dtype`` of least error over all members; None where no factor is at least as good.

    Args:
        factors: ``(inputs, weights) -> s`` [k] to try.
    """
    cut = [Member(_some_rows(m.weight, len(members)), m.scheme, m.rows) for m in members]

    def error(inverse: Tensor | None) -> float:
        return sum(output_error(member, inputs.squares, inverse) for member in cut)

    least, best = error(None), None
    for s in factors(inputs, [member.weight for member in members]):
        inverse = storable(s, dtype)
        found = error(inverse)
        if found < least:
            least, best = found, inverse
    return best


def _some_rows(w: Tensor, members: int) -> Tensor:
    """Rows [n', k] spread over the weight."""
    wanted = max(OUTPUTS // members, 64)
    return w[:: max(1, w.shape[0] // wanted)].contiguous()
