"""How the KV cache is kept: schemes as data, and quantization of K and V and its inverse in plain torch.

    codes = round(x / scale) as 8-bit floats or integers,  values = codes * scale

Codes [B, H, L, D] are bytes (uint8 for floats, which ``index_copy_`` writes on every device) or int8; scales are f32 planes of their
own, so that rows of codes stay aligned: [B, H, L, 1] where each token of each head has one, [1, H, 1, 1] or [1, 1, 1, 1] where they
are fixed. Scales are those of all schemes (``ir.numerics``): largest magnitude / largest code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant_compile.ir.errors import SchemeError
from quant_compile.ir.numerics import FLOAT_DTYPES, FLOAT_MAX, safe_amax, to_float8, to_int8

BITS = "e4m3 by bits"  # e4m3 that is made and read by arithmetic on integers
TOKEN, HEAD, TENSOR = "token", "head", "tensor"
_NAMES = {"FP8": "e4m3", "FP8_E5M2": "e5m2", "INT8": "int8"}


@dataclass(frozen=True)
class CacheScheme:
    """How K and V of a layer are kept.

    Attributes:
        format: of codes: ``e4m3``, ``e5m2`` or ``int8``.
        scale: ``token`` (one for each token and head, made as tokens come), ``head`` or ``tensor`` (fixed, from a scales file).
    """

    format: str = "e4m3"
    scale: str = TOKEN

    @property
    def name(self) -> str:
        """As policies write it: ``FP8``, ``INT8_HEAD``."""
        stem = next(name for name, format in _NAMES.items() if format == self.format)
        return stem if self.scale == TOKEN else f"{stem}_{self.scale.upper()}"

    @property
    def dynamic(self) -> CacheScheme:
        """The same with a scale for each token and head."""
        return CacheScheme(self.format)

    @property
    def codes(self) -> torch.dtype:
        """What codes are."""
        return torch.int8 if self.format == "int8" else FLOAT_DTYPES[self.format]

    @property
    def stored(self) -> torch.dtype:
        """What the plane of codes is."""
        return torch.int8 if self.format == "int8" else torch.uint8

    @property
    def largest(self) -> float:
        """The largest code."""
        return 127.0 if self.format == "int8" else FLOAT_MAX[self.format]

    @property
    def fixed(self) -> bool:
        """Scales are there before the first token."""
        return self.scale != TOKEN


NAMES = tuple(f"{stem}{end}" for stem in _NAMES for end in ("", "_HEAD", "_TENSOR"))


def parse_cache(name: str) -> CacheScheme:
    """The scheme of a name, in any case.

    Raises:
        SchemeError: there is none of that name.
    """
    wanted = name.upper()
    if wanted not in NAMES:
        raise SchemeError(f"unknown scheme of the KV cache {name!r}; valid: {', '.join(NAMES)}")
    scale = next((kind for kind in (HEAD, TENSOR) if wanted.endswith(f"_{kind.upper()}")), TOKEN)
    stem = wanted if scale == TOKEN else wanted[: -len(scale) - 1]
    return CacheScheme(_NAMES[stem], scale)


def encode(x: Tensor, scheme: CacheScheme, scale: Tensor | None = None, by_bits: bool = False) -> tuple[Tensor, Tensor]:
    """K or V [B, H, T, D] -> codes as they are stored, and their scales: made here [B, H, T, 1], or those given.

    A row with a NaN or an inf has such a scale, and its values are NaN. int8 has no NaN: there a NaN under a fixed scale is 0.

    Args:
        by_bits: make e4m3 by arithmetic on integers, for devices whose compilers have no such type; the codes are the same.
    """
    made = safe_amax(x) * (1.0 / scheme.largest) if scale is None else scale
    inverse = made.reciprocal()
    if scheme.format == "int8":
        return to_int8(torch.nan_to_num(x.float() * inverse, 0.0), torch.ones_like(inverse)), made
    if by_bits:
        return _e4m3_of((x.float() * inverse).clamp(-scheme.largest, scheme.largest)), made
    return to_float8(x.float(), inverse, scheme.format).view(torch.uint8), made


def decode(codes: Tensor, scale: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    """Codes as they are stored and their scales -> K or V in ``dtype``; format: a scheme's, or BITS."""
    if format == BITS:
        plain = _of_e4m3(codes)
    else:
        plain = (codes if format == "int8" else codes.view(FLOAT_DTYPES[format])).float()
    return (plain * scale).to(dtype)


def _e4m3_of(x: Tensor) -> Tensor:
    """f32 within e4m3's range -> its bytes, rounded half to even: three bits of the mantissa, below 2^-6 multiples of 2^-9."""
    word = x.view(torch.int32)
    size = word & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)  # exponents are biased by 127 there, by 7 here
    tiny = (x.abs() * 512.0).round().nan_to_num(0.0).to(torch.int32)
    code = torch.where(size < 121 << 23, tiny, normal)
    code = torch.where(x.isnan(), 0x7F, code)
    return (code | ((word >> 24) & 0x80)).to(torch.uint8)


def _of_e4m3(codes: Tensor) -> Tensor:
    """Bytes of e4m3 -> f32, by way of f16 with the same bits in its upper half, which is 2^8 times smaller."""
    wide = codes.to(torch.int16)
    half = ((wide & 0x80) << 8 | (wide & 0x7F) << 7).view(torch.float16).float() * 256.0
    return torch.where((wide & 0x7F) == 0x7F, float("nan"), half)
