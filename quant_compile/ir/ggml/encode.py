"""Numbers to blocks of GGUF, in plain torch: the types with one scale as llama.cpp rounds them, the others by a search (``search``).

Reads finite f32 [b, size]; writes uint8 [b, bytes]. Of q4_0, q4_1, q5_0, q5_1, q8_0, tq1_0, tq2_0 and mxfp4 the bytes are those that the
``gguf`` package gives, which are llama.cpp's, with three exceptions where both leave the result to the machine: a zero that is a minimum
has the sign of the first one, mxfp4 has an exponent of 0 at least, and its exponent is that of the number, not of its logarithm.
Scales beyond f16 are inf, as there; the family lets no weight come so far.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from quant_compile.ir.ggml import search
from quant_compile.ir.ggml.types import TYPES

# Numbers turned into blocks at a time, in a core's own cache. A search is hundreds of short steps, and a few threads on a busy machine
# wait for one another at each of them, ten times as long as they compute: up to FEW_THREADS one does it all, more get their share each.
CHUNK_ELEMENTS = 1 << 17
FEW_THREADS = 4
GPU_CHUNK_ELEMENTS = 1 << 23


def encode(name: str, x: Tensor) -> Tensor:
    """[n, k] of any float dtype, finite, k a multiple of the type's size -> [n, bytes] uint8."""
    block, rows = TYPES[name], x.shape[0]
    out = torch.empty((rows, x.shape[1] // block.size * block.nbytes), dtype=torch.uint8, device=x.device)
    with _threads(x) as chunk:
        step = max(1, chunk // max(1, x.shape[1]))
        for start in range(0, rows, step):
            part = x[start : start + step].float().reshape(-1, block.size)
            out[start : start + step] = _ENCODE[name](part).view(-1, out.shape[1])
    return out


@contextmanager
def _threads(x: Tensor) -> Generator[int]:
    """How many numbers to take at a time; inside, torch has one thread where it has few."""
    threads = torch.get_num_threads()
    if x.is_cuda or not 1 < threads <= FEW_THREADS:
        yield GPU_CHUNK_ELEMENTS if x.is_cuda else CHUNK_ELEMENTS * threads
        return
    torch.set_num_threads(1)
    try:
        yield CHUNK_ELEMENTS
    finally:
        torch.set_num_threads(threads)


# --- pieces ---


def fields(codes: Tensor, width: int, bits: int) -> Tensor:
    """Inverse of ``decode.fields``: codes [b, c], below 2**bits -> bytes [b, c * bits / 8]."""
    runs = codes.to(torch.uint8).unflatten(-1, (-1, 8 // bits, width))
    packed = runs[..., 0, :]
    for place in range(1, 8 // bits):
        packed = packed | (runs[..., place, :] << (place * bits))
    return packed.flatten(-2)


def half_bytes(x: Tensor) -> Tensor:
    """[b, 1] -> the bytes of its f16 [b, 2]."""
    return x.to(torch.float16).contiguous().view(torch.uint8)


def _inverse(d: Tensor) -> Tensor:
    """1 / d, 0 of 0: divided as f32, which ``1.0 / d`` is not on every device."""
    return torch.where(d == 0, 0.0, torch.ones_like(d) / d)


def _codes(x: Tensor) -> Tensor:
    """Integers of f32; what is none (the inverse of a scale that is subnormal is inf) is 0."""
    return torch.where(torch.isfinite(x), x, 0.0).to(torch.int32)


def _rounded(x: Tensor) -> Tensor:
    """To the nearest integer, halves away from zero."""
    size = x.abs()
    whole = size.floor()
    return torch.sign(x) * (whole + (2 * (size - whole)).floor())


def _first(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(-1, index.unsqueeze(-1))


# --- one scale ---


def _signed(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """(d, codes 0..2 half - 1): the number of largest magnitude, the first of those alike, becomes the code 0."""
    d = _first(x, x.abs().argmax(-1)) / -half
    return d, _codes((x * _inverse(d) + (half + 0.5)).trunc()).clamp(0, 2 * half - 1)


def _ranged(x: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """(d, minimum, codes 0..top)."""
    low, high = _first(x, x.argmin(-1)), _first(x, x.argmax(-1))
    d = (high - low) / torch.full_like(low, top)
    return d, low, _codes(((x - low) * _inverse(d) + 0.5).trunc()).clamp(0, top)


def _q4_0(x: Tensor) -> Tensor:
    d, codes = _signed(x, 8)
    return torch.cat((half_bytes(d), fields(codes, 16, 4)), -1)


def _q4_1(x: Tensor) -> Tensor:
    d, low, codes = _ranged(x, 15)
    return torch.cat((half_bytes(d), half_bytes(low), fields(codes, 16, 4)), -1)


def _q5_0(x: Tensor) -> Tensor:
    d, codes = _signed(x, 16)
    return torch.cat((half_bytes(d), fields(codes >> 4, 1, 1), fields(codes & 15, 16, 4)), -1)


def _q5_1(x: Tensor) -> Tensor:
    d, low, codes = _ranged(x, 31)
    return torch.cat((half_bytes(d), half_bytes(low), fields(codes >> 4, 1, 1), fields(codes & 15, 16, 4)), -1)


def _q8_0(x: Tensor) -> Tensor:
    amax = x.abs().amax(-1, keepdim=True)
    d = amax / torch.full_like(amax, 127.0)
    codes = _codes(_rounded(x * _inverse(d))).to(torch.int8)
    return torch.cat((half_bytes(d), codes.view(torch.uint8)), -1)


def _trits(x: Tensor) -> tuple[Tensor, Tensor]:
    """(d, codes 0..2): minus the largest magnitude, zero, the largest."""
    d = x.abs().amax(-1, keepdim=True)
    return d, _codes(_rounded(x * _inverse(d))) + 1


def _tq1_0(x: Tensor) -> Tensor:
    d, codes = _trits(x)

    def packed(part: Tensor, width: int) -> Tensor:
        digits = part.unflatten(-1, (-1, width))
        powers = torch.tensor([81, 27, 9, 3, 1][: digits.shape[-2]], device=x.device).unsqueeze(-1)
        number = (digits * powers).sum(-2)
        return ((number * 256 + 242) // 243).to(torch.uint8)  # as a fraction of 256, rounded up

    parts = packed(codes[:, :160], 32), packed(codes[:, 160:240], 16), packed(codes[:, 240:], 4)
    return torch.cat((*parts, half_bytes(d)), -1)


def _tq2_0(x: Tensor) -> Tensor:
    d, codes = _trits(x)
    return torch.cat((fields(codes, 32, 2), half_bytes(d)), -1)


def _mxfp4(x: Tensor) -> Tensor:
    """e2m1 under 2**e, two octaves below the largest magnitude; ties to the smaller magnitude, and 6 stands for all beyond."""
    amax = x.abs().amax(-1, keepdim=True)
    stored = ((amax.view(torch.int32) >> 23) - 2).clamp_min(0)
    bits = torch.where(stored < 2, (stored + 1) << 21, (stored - 1) << 23)
    half = bits.view(torch.float32)
    size = x.abs()
    codes = torch.zeros_like(x, dtype=torch.int32)
    for middle in (0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0):  # between neighbours of e2m1, doubled
        codes += size > middle * half
    codes = torch.where((x < 0) & (codes > 0), codes + 8, codes)
    return torch.cat((stored.to(torch.uint8), fields(codes, 16, 4)), -1)


# --- by a search ---


def six_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """Inverse of ``decode.six_bits``: [.., 8] each -> [.., 12]."""
    (first, last), (low, high) = scales.split(4, -1), minima.split(4, -1)
    return torch.cat((first | (last >> 4 << 6), low | (high >> 4 << 6), (last & 15) | ((high & 15) << 4)), -1).to(
        torch.uint8
    )


def _q2_k(x: Tensor) -> Tensor:
    found = search.affine(x, 16, 3, 15)
    scales = (found.scales | (found.minima << 4)).to(torch.uint8)
    return torch.cat((scales, fields(found.codes, 32, 2), half_bytes(found.d), half_bytes(found.dmin)), -1)


def _q3_k(x: Tensor) -> Tensor:
    found = search.signed(x, 16, search.whole(-4, 3), -32, 31)
    codes, scales = found.codes + 4, found.scales + 32
    packed = torch.cat((fields(scales & 15, 8, 4), fields(scales >> 4, 4, 2)), -1)
    return torch.cat((fields(codes >> 2, 32, 1), fields(codes & 3, 32, 2), packed, half_bytes(found.d)), -1)


def _q4_k(x: Tensor) -> Tensor:
    found = search.affine(x, 32, 15, 63)
    head = half_bytes(found.d), half_bytes(found.dmin), six_bits(found.scales, found.minima)
    return torch.cat((*head, fields(found.codes, 32, 4)), -1)


def _q5_k(x: Tensor) -> Tensor:
    found = search.affine(x, 32, 31, 63)
    head = half_bytes(found.d), half_bytes(found.dmin), six_bits(found.scales, found.minima)
    return torch.cat((*head, fields(found.codes >> 4, 32, 1), fields(found.codes & 15, 32, 4)), -1)


def _q6_k(x: Tensor) -> Tensor:
    found = search.signed(x, 16, search.whole(-32, 31), -128, 127)
    codes = found.codes + 32
    scales = found.scales.to(torch.int8).view(torch.uint8)
    return torch.cat((fields(codes & 15, 64, 4), fields(codes >> 4, 32, 2), scales, half_bytes(found.d)), -1)


def _iq4_nl(x: Tensor) -> Tensor:
    found = search.signed(x, 32, search.IQ4, None, None)
    return torch.cat((half_bytes(found.d), fields(found.codes, 16, 4)), -1)


def _iq4_xs(x: Tensor) -> Tensor:
    found = search.signed(x, 32, search.IQ4, -32, 31)
    scales = found.scales + 32
    places = torch.arange(0, 16, 2, device=x.device)
    high = ((scales >> 4) << places).sum(-1, keepdim=True)
    words = torch.cat((high & 255, high >> 8), -1).to(torch.uint8)
    return torch.cat((half_bytes(found.d), words, fields(scales & 15, 1, 4), fields(found.codes, 16, 4)), -1)


_ENCODE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "q4_0": _q4_0, "q4_1": _q4_1, "q5_0": _q5_0, "q5_1": _q5_1, "q8_0": _q8_0, "tq1_0": _tq1_0, "tq2_0": _tq2_0,
    "mxfp4": _mxfp4, "q2_k": _q2_k, "q3_k": _q3_k, "q4_k": _q4_k, "q5_k": _q5_k, "q6_k": _q6_k,
    "iq4_nl": _iq4_nl, "iq4_xs": _iq4_xs,
}  # fmt: skip
