"""Scales of blocks that hold scales of scales: the best of a few candidates by weighted least squares, then rounded to their few bits.

The idea is that of llama.cpp's quantizers without an importance matrix (k-quants, ikawrakow 2023): a step a little smaller or larger than
the range asks for often leaves less error; given the codes, scale and minimum have a closed form; large numbers count for more. It is
written anew for whole tensors. The candidates are fewer, one rule weighs all types, and once the scales are rounded the scales above them
are fitted again, so the bytes are not llama.cpp's.

Numbers lie as [sub, groups, blocks], so that sums over a group run along whole vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from quant_compile.ir.ggml.types import IQ4_VALUES

LEAST_HALF = 2.0**-24


@dataclass(frozen=True)
class Affine:
    """x = d * scale * code - dmin * minimum: ``d`` and ``dmin`` [b, 1] f32, the others int32 [b, groups] and [b, size]."""

    d: Tensor
    dmin: Tensor
    scales: Tensor
    minima: Tensor
    codes: Tensor


@dataclass(frozen=True)
class Signed:
    """x = d * scale * value of the code: ``d`` [b, 1] f32, the others int32 [b, groups] and [b, size]."""

    d: Tensor
    scales: Tensor
    codes: Tensor


@dataclass(frozen=True)
class Levels:
    """What codes stand for.

    Attributes:
        first: the lowest value, which no other exceeds in magnitude; the largest number of a group is put near it.
        tries: what is added to it for each candidate.
        value: numbers [..] -> the nearest values, f32.
        code: numbers [..] -> the nearest codes, int32.
    """

    first: float
    tries: tuple[float, ...]
    value: Callable[[Tensor], Tensor]
    code: Callable[[Tensor], Tensor]


def whole(low: int, high: int) -> Levels:
    """The integers from low to high."""

    def value(x: Tensor) -> Tensor:
        return x.round().clamp_(low, high)

    tries = tuple(round(0.15 * i, 2) for i in range(-6, 7))
    return Levels(low, tries, value, lambda x: _integers(value(x)))


_IQ4_MIDDLES = [a + b for a, b in pairwise(IQ4_VALUES)]  # doubled
# Code by half units: the middles between two values are whole or half numbers, so a half unit lies on one side of each.
_IQ4_CODES = [
    sum(middle <= half for middle in _IQ4_MIDDLES) for half in range(_IQ4_MIDDLES[0] - 1, _IQ4_MIDDLES[-1] + 1)
]


def _iq4_place(x: Tensor) -> Tensor:
    doubled = (x * 2).floor_().sub_(_IQ4_MIDDLES[0] - 1)
    return _integers(doubled.clamp_(0, len(_IQ4_CODES) - 1))


def _iq4_code(x: Tensor) -> Tensor:
    return torch.tensor(_IQ4_CODES, dtype=torch.int32, device=x.device)[_iq4_place(x)]


def _iq4_value(x: Tensor) -> Tensor:
    values = [float(IQ4_VALUES[code]) for code in _IQ4_CODES]
    return torch.tensor(values, device=x.device)[_iq4_place(x)]


IQ4 = Levels(IQ4_VALUES[0], tuple(range(-7, 8, 2)), _iq4_value, _iq4_code)
AFFINE_TRIES = tuple(round(0.15 * i, 2) for i in range(-5, 8))


def affine(x: Tensor, sub: int, top: int, most: int) -> Affine:
    """Codes 0..top, scales and minima 0..most of groups of ``sub``, of x [b, size] f32."""
    t = _turned(x, sub)
    w = _weights(t)
    scale, offset = _best_affine(t, w, top)
    d, dmin = _of_scales(scale.amax(0) / most), _of_scales(-offset.amin(0) / most)
    scales, minima = _steps(scale, d, 0, most), _steps(-offset, dmin, 0, most)
    codes = _affine_codes(t, d * scales, dmin * minima, top)
    d, dmin = _fitted(t, w, codes * scales, minima, d, dmin)
    codes = _affine_codes(t, d * scales, dmin * minima, top)
    return Affine(d.unsqueeze(-1), dmin.unsqueeze(-1), _integers(scales).t(), _integers(minima).t(), _back(codes))


def signed(x: Tensor, sub: int, levels: Levels, low: int | None, high: int | None) -> Signed:
    """Codes of ``levels``, scales low..high of groups of ``sub``; without these the one group's scale is ``d``."""
    t = _turned(x, sub)
    w = _weights(t)
    scale = _best_signed(t, w, levels)
    if low is None or high is None:
        d, scales = _rounded_half(scale[0]), torch.ones_like(scale)
    else:
        peak = scale.gather(0, scale.abs().argmax(0, keepdim=True)).squeeze(0)
        d = _of_scales(peak / low)
        scales = _steps(scale, d, low, high)
        values = levels.value(_over(t, d * scales)) * scales
        whole_scale = (w * t * values).sum((0, 1)) / (w * values.square()).sum((0, 1))
        d = _rounded_half(torch.where(whole_scale.isfinite(), whole_scale, d))
    codes = levels.code(_over(t, d * scales))
    return Signed(d.unsqueeze(-1), _integers(scales).t(), _back(codes))


# --- one group's scale ---


def _weights(t: Tensor) -> Tensor:
    """What each number's squared error counts: more the larger it is, and small ones as well."""
    return t.square().mean(0, keepdim=True).sqrt() + t.abs()


def _best_affine(t: Tensor, w: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scale and offset (none above 0) [groups, b] of x = scale * code + offset."""
    low, high = t.amin(0).clamp_max(0), t.amax(0)
    span = high - low
    step = torch.where(span > 0, span.reciprocal(), 0.0)
    wx = w * t
    sum_w, sum_x = w.sum(0), wx.sum(0)
    above = t - low
    best = torch.full_like(span, -torch.inf)
    scale, offset = torch.zeros_like(span), torch.zeros_like(span)
    for more in AFFINE_TRIES:
        codes = (above * ((top + more) * step)).round_().clamp_(0, top)
        xl = (wx * codes).sum(0)
        wl = w * codes
        by_one, by_two = wl.sum(0), wl.mul_(codes).sum(0)
        own_scale, own_offset = _line(sum_w, sum_x, by_one, by_two, xl)
        gain = own_scale * xl + own_offset * sum_x
        better = gain > best
        best = torch.where(better, gain, best)
        scale, offset = torch.where(better, own_scale, scale), torch.where(better, own_offset, offset)
    return scale, offset


def _line(
    sum_w: Tensor, sum_x: Tensor, sum_l: Tensor, sum_ll: Tensor, sum_xl: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scale and offset of least error, the offset 0 where it would be above."""
    determinant = sum_w * sum_ll - sum_l * sum_l
    usable = determinant > 1e-6 * sum_w * sum_ll  # else all codes are one
    scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
    offset = (sum_ll * sum_x - sum_l * sum_xl) / determinant
    flat = sum_ll <= 0
    through_zero = torch.where(flat, 0.0, sum_xl / sum_ll)
    level = torch.where(flat & (sum_w > 0), sum_x / sum_w, 0.0).clamp_max(0)
    usable = usable & (offset <= 0)
    return torch.where(usable, scale, through_zero).clamp_min(0), torch.where(usable, offset, level)


def _best_signed(t: Tensor, w: Tensor, levels: Levels) -> Tensor:
    """Scale [groups, b] of x = scale * value."""
    peak = t.gather(0, t.abs().argmax(0, keepdim=True)).squeeze(0)
    step = torch.where(peak != 0, peak.reciprocal(), 0.0)
    wx = w * t
    best, scale = torch.full_like(peak, -torch.inf), torch.zeros_like(peak)
    for more in levels.tries:
        values = levels.value(t * ((levels.first + more) * step))
        xl, ll = (wx * values).sum(0), values.square_().mul_(w).sum(0)
        own = torch.where(ll > 0, xl / ll, 0.0)
        gain = own * xl
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, own, scale)
    return scale


# --- scales of scales ---


def _fitted(
    t: Tensor, w: Tensor, scaled: Tensor, minima: Tensor, d: Tensor, dmin: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """d and dmin [b] of least error for codes times scales and minima as they are; what has no solution stays."""
    below = -minima.expand_as(scaled)
    ws, wb = w * scaled, w * below
    aa, ab, bb = (ws * scaled).sum((0, 1)), (ws * below).sum((0, 1)), (wb * below).sum((0, 1))
    xa, xb = (ws * t).sum((0, 1)), (wb * t).sum((0, 1))
    determinant = aa * bb - ab * ab
    usable = determinant > 1e-6 * aa * bb
    new_d = torch.where(usable, (bb * xa - ab * xb) / determinant, torch.where(bb > 0, d, xa / aa))
    new_dmin = torch.where(usable, (aa * xb - ab * xa) / determinant, dmin)
    good = new_d.isfinite() & (new_d > 0) & new_dmin.isfinite() & (new_dmin >= 0)
    return _rounded_half(torch.where(good, new_d, d)), _rounded_half(torch.where(good, new_dmin, dmin))


def _steps(scale: Tensor, d: Tensor, low: int, high: int) -> Tensor:
    """scale / d [groups, b], rounded to low..high, f32."""
    return _over(scale, d).round_().clamp_(low, high)


def _affine_codes(t: Tensor, scale: Tensor, minimum: Tensor, top: int) -> Tensor:
    return _over(t + minimum, scale).round_().clamp_(0, top)


def _over(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale, 0 where the scale is."""
    return x * torch.where(scale == 0, 0.0, scale.reciprocal())


def _rounded_half(x: Tensor) -> Tensor:
    return x.to(torch.float16).float()


def _of_scales(x: Tensor) -> Tensor:
    """A scale of scales to f16, the least one instead of none: the scales below it have bits left."""
    half = _rounded_half(x)
    return torch.where((half == 0) & (x != 0), torch.sign(x) * LEAST_HALF, half)


def _integers(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0.0).to(torch.int32)


def _turned(x: Tensor, sub: int) -> Tensor:
    """[b, size] -> [sub, groups, b]."""
    return x.unflatten(-1, (-1, sub)).permute(2, 1, 0).contiguous()


def _back(codes: Tensor) -> Tensor:
    """[sub, groups, b] -> int32 [b, size]."""
    whole_codes = codes if codes.dtype == torch.int32 else _integers(codes)
    return whole_codes.permute(2, 1, 0).flatten(1)
