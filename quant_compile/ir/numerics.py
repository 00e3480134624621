"""Arithmetic that several scheme families share: scales, rounding onto codes, and row-wise chunking.

All of it is plain torch. Scales multiply on dequantize. Divisions are written as a multiplication by a reciprocal that is
computed once per row, so that eager, Inductor and Triton (whose ``/`` is approximate) round alike up to the last ulp of
that one reciprocal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

FLOAT_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
FLOAT_MAX = {"e4m3": 448.0, "e5m2": 57344.0, "e2m1": 6.0}
# Rows whose largest value is below this become zeros. Large enough that scale and 1/scale are normal f32 numbers.
SMALLEST_AMAX = 2.0**-100
CHUNK_ELEMENTS = 1 << 21
# On a GPU a chunk costs some hundred launches in a search for scales: 16 MiB of f32 occupy it for about as long as these take. Several
# temporaries of this size are held at once, and all of them together should be less than a layer.
GPU_CHUNK_ELEMENTS = 1 << 22


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or inf, without a tensor of answers; a look at values."""
    return not values.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def checksum(x: Tensor) -> int:
    """Of the bytes of a tensor's values in their order: others have, all but certainly, another."""
    flat = x.contiguous().view(-1)
    codes = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total, step = 0, 1 << 22
    for start in range(0, codes.numel(), step):
        part = codes[start : start + step].to(torch.int64)
        weights = torch.arange(start + 1, start + 1 + part.numel(), device=part.device)
        total = (total * 1_000_003 + int((part * weights).sum())) & (2**63 - 1)
    return total


def to_float8(x: Tensor, inverse_scale: Tensor, format: str) -> Tensor:
    """Round ``x * inverse_scale`` (f32) onto e4m3 or e5m2, saturating; NaN stays NaN."""
    limit = FLOAT_MAX[format]
    return (x * inverse_scale).clamp(-limit, limit).to(FLOAT_DTYPES[format])


def to_int8(x: Tensor, inverse_scale: Tensor) -> Tensor:
    """Round ``x * inverse_scale`` (f32) half to even onto -127..127.

    -128 is left out so that negation stays exact, as CUTLASS-based int8 kernels assume.
    """
    return (x * inverse_scale).round().clamp(-127.0, 127.0).to(torch.int8)


def safe_amax(x: Tensor, dim: int | None = -1) -> Tensor:
    """Largest magnitude along ``dim`` (kept; None: of all), f32, never below SMALLEST_AMAX; NaN and inf pass through."""
    if dim is None:
        # By rows first, which fuses with what made x; the zero gives an input without rows an amax too.
        amax = pad(x.abs().amax(-1).flatten(), (0, 1)).amax()
    else:
        amax = x.abs().amax(dim, keepdim=True)
    return amax.to(torch.float32).clamp_min(SMALLEST_AMAX)


def tensor_amax(w: Tensor) -> Tensor:
    """``safe_amax`` of a whole weight without a temporary of its size."""
    low, high = torch.aminmax(w)
    return torch.maximum(-low, high).to(torch.float32).clamp_min(SMALLEST_AMAX)


def row_chunks(w: Tensor, rows: int, elements: int | None = None) -> list[Tensor]:
    """Slices of ``w`` ([n, k]) of a multiple of ``rows`` rows and about as many ``elements``; None: as the device likes them."""
    elements = elements or (GPU_CHUNK_ELEMENTS if w.is_cuda else CHUNK_ELEMENTS)
    step = max(rows, elements // max(1, w.shape[1]) // rows * rows)
    return [w[start : start + step] for start in range(0, w.shape[0], step)] if w.shape[0] > step else [w]


def by_row_chunks(
    w: Tensor, rows: int, function: Callable[[Tensor], tuple[Tensor, ...]], elements: int | None = None
) -> tuple[Tensor, ...]:
    """Apply ``function`` to ``row_chunks`` and join the planes it returns.

    Keeps f32 temporaries at a few chunks instead of a whole layer.
    """
    chunks = row_chunks(w, rows, elements)
    if len(chunks) == 1:
        return function(w)
    return tuple(torch.cat(parts) for parts in zip(*map(function, chunks), strict=True))
