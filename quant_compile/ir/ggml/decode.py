"""Blocks of GGUF to numbers, bit by bit: plain torch over bytes, on any device, that compiles and runs on fake tensors.

Reads uint8 blocks [..., bytes]; writes f32. Products and sums are rounded one after the other as the ``gguf`` package rounds them, so
that the numbers are the same to the last bit. Every byte has a meaning: what a file must not hold (scales that are inf or NaN)
gives what f32 arithmetic gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from quant_compile.ir.ggml.grids import look_up
from quant_compile.ir.ggml.types import E2M1_DOUBLED, IQ4_VALUES, PLAIN, TYPES

PLAIN_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def decode(name: str, data: Tensor) -> Tensor:
    """[..., bytes of whole blocks] uint8 -> [..., weights] f32.

    Args:
        name: in ``TYPES`` or ``PLAIN``.
        data: rows of blocks, as a file has them.

    Raises:
        MissingLibraryError: iq1, iq2 and iq3 need the ``gguf`` package.
    """
    if name in PLAIN:
        return data.contiguous().view(PLAIN_DTYPES[name]).float()
    blocks = data.unflatten(-1, (-1, TYPES[name].nbytes))
    return _DECODE[name](blocks).flatten(-2)


# --- pieces ---


def fields(packed: Tensor, width: int, bits: int) -> Tensor:
    """Bit fields of bytes [..., c] -> [..., c * 8 / bits]: of each run of ``width`` bytes the lowest fields first, then the next."""
    runs = packed.contiguous().unflatten(-1, (-1, width))
    mask = (1 << bits) - 1
    return torch.stack([(runs >> shift) & mask for shift in range(0, 8, bits)], -2).flatten(-3)


def half(low: Tensor, high: Tensor) -> Tensor:
    """Two bytes as an f16 -> f32. Put together by arithmetic: blocks of odd sizes lie at odd addresses."""
    bits = (high.view(torch.int8).to(torch.int16) << 8) | low.to(torch.int16)
    return bits.view(torch.float16).float()


def _half_at(blocks: Tensor, place: int) -> Tensor:
    return half(blocks[..., place : place + 1], blocks[..., place + 1 : place + 2])


def _wide(blocks: Tensor, count: int) -> Tensor:
    """Little-endian words of ``count`` bytes [..., c * count] -> [..., c] int64."""
    parts = blocks.unflatten(-1, (-1, count)).to(torch.int64)
    word = parts[..., 0]
    for place in range(1, count):
        word = word | (parts[..., place] << (8 * place))
    return word


def _table(values: tuple[int, ...], codes: Tensor) -> Tensor:
    table = torch.tensor(values, dtype=torch.float32, device=codes.device)
    return table.index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)


def _scaled(scale: Tensor, codes: Tensor) -> Tensor:
    """scale [..., g] * codes [..., weights], each scale for an equal share; written over the codes where they are f32."""
    return codes.float().unflatten(-1, (scale.shape[-1], -1)).mul_(scale.unsqueeze(-1)).flatten(-2)


def _spread(places: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """Fields of words [..., c] -> [..., c * len(shifts)]."""
    return torch.stack([(places >> shift) & mask for shift in shifts], -1).flatten(-2)


# --- one scale, of 32 weights or 256 ---


def _q4_0(b: Tensor) -> Tensor:
    return fields(b[..., 2:], 16, 4).float().sub_(8).mul_(_half_at(b, 0))


def _q4_1(b: Tensor) -> Tensor:
    return fields(b[..., 4:], 16, 4).float().mul_(_half_at(b, 0)).add_(_half_at(b, 2))


def _q5_0(b: Tensor) -> Tensor:
    codes = fields(b[..., 6:], 16, 4) | (fields(b[..., 2:6], 1, 1) << 4)
    return codes.float().sub_(16).mul_(_half_at(b, 0))


def _q5_1(b: Tensor) -> Tensor:
    codes = fields(b[..., 8:], 16, 4) | (fields(b[..., 4:8], 1, 1) << 4)
    return codes.float().mul_(_half_at(b, 0)).add_(_half_at(b, 2))


def _q8_0(b: Tensor) -> Tensor:
    return b[..., 2:].view(torch.int8).float().mul_(_half_at(b, 0))


def _iq4_nl(b: Tensor) -> Tensor:
    return _table(IQ4_VALUES, fields(b[..., 2:], 16, 4)).mul_(_half_at(b, 0))


def _mxfp4(b: Tensor) -> Tensor:
    exponent = b[..., :1].to(torch.int32)
    # Half of 2**(e - 127), since the table has e2m1 doubled; below 2 that is subnormal.
    bits = torch.where(exponent < 2, (exponent + 1) << 21, (exponent - 1) << 23)
    return _table(E2M1_DOUBLED, fields(b[..., 1:], 16, 4)).mul_(bits.view(torch.float32))


def _nvfp4(b: Tensor) -> Tensor:
    code = b[..., :4].to(torch.int32)
    exponent, mantissa = (code >> 3) & 15, code & 7
    normal = (((exponent + 120) << 23) | (mantissa << 20)).view(torch.float32)
    value = torch.where(exponent == 0, mantissa.float() * 2.0**-9, normal)
    scale = torch.where(code == 0x7F, torch.zeros_like(value), value * 0.5)
    return _scaled(scale, _table(E2M1_DOUBLED, fields(b[..., 4:], 8, 4)))


def _tq2_0(b: Tensor) -> Tensor:
    return fields(b[..., :64], 32, 2).float().sub_(1).mul_(_half_at(b, 64))


def _tq1_0(b: Tensor) -> Tensor:
    def trits(packed: Tensor, count: int) -> Tensor:
        # A byte is a fraction of 256 in base 3; what a multiplication by 3 carries out of it is the next digit.
        shifted = torch.stack([(packed.to(torch.int32) * 3**i) & 255 for i in range(count)], -2)
        return ((shifted * 3) >> 8).flatten(-2)

    codes = torch.cat((trits(b[..., :32], 5), trits(b[..., 32:48], 5), trits(b[..., 48:52], 4)), -1)
    return codes.float().sub_(1).mul_(_half_at(b, 52))


# --- scales of scales ---


def six_bits(b: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes -> 8 scales and 8 minima of 6 bits, as q4_k and q5_k have them: the last four of each give their high bits to the first."""
    first, second, rest = b[..., :4], b[..., 4:8], b[..., 8:]
    scales = torch.cat((first & 63, (rest & 15) | ((first >> 2) & 48)), -1)
    minima = torch.cat((second & 63, (rest >> 4) | ((second >> 2) & 48)), -1)
    return scales, minima


def _affine(d: Tensor, scales: Tensor, dmin: Tensor, minima: Tensor, codes: Tensor) -> Tensor:
    scale, minimum = (d * scales.float()).unsqueeze(-1), (dmin * minima.float()).unsqueeze(-1)
    return codes.float().unflatten(-1, (scales.shape[-1], -1)).mul_(scale).sub_(minimum).flatten(-2)


def _q2_k(b: Tensor) -> Tensor:
    return _affine(
        _half_at(b, 80), b[..., :16] & 15, _half_at(b, 82), b[..., :16] >> 4, fields(b[..., 16:80], 32, 2)
    )  # fmt: skip


def _q3_k(b: Tensor) -> Tensor:
    scales = fields(b[..., 96:104], 8, 4) | (fields(b[..., 104:108], 4, 2) << 4)
    # A high bit that is set adds four to a code that is lower by four.
    codes = (fields(b[..., 32:96], 32, 2) | (fields(b[..., :32], 32, 1) << 2)).float().sub_(4)
    return _scaled(_half_at(b, 108) * (scales.float() - 32), codes)


def _q4_k(b: Tensor) -> Tensor:
    scales, minima = six_bits(b[..., 4:16])
    return _affine(_half_at(b, 0), scales, _half_at(b, 2), minima, fields(b[..., 16:], 32, 4))


def _q5_k(b: Tensor) -> Tensor:
    scales, minima = six_bits(b[..., 4:16])
    codes = fields(b[..., 48:], 32, 4) | (fields(b[..., 16:48], 32, 1) << 4)
    return _affine(_half_at(b, 0), scales, _half_at(b, 2), minima, codes)


def _q6_k(b: Tensor) -> Tensor:
    codes = fields(b[..., :128], 64, 4) | (fields(b[..., 128:192], 32, 2) << 4)
    return _scaled(_half_at(b, 208) * b[..., 192:208].view(torch.int8).float(), codes.float().sub_(32))


def _iq4_xs(b: Tensor) -> Tensor:
    high = _spread(_wide(b[..., 2:4], 2), tuple(range(0, 16, 2)), 3)
    scales = fields(b[..., 4:8], 1, 4) | (high << 4)
    return _scaled(_half_at(b, 0) * (scales.float() - 32), _table(IQ4_VALUES, fields(b[..., 8:], 16, 4)))


def scales_of(name: str, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset of each 32 weights of q4_0, q4_1 and q4_k [..., size / 32] f32: a weight is scale * code + offset."""
    d = _half_at(blocks, 0)
    if name == "q4_0":
        return d, -8 * d
    second = _half_at(blocks, 2)
    if name == "q4_1":
        return d, second
    scales, minima = six_bits(blocks[..., 4:16])
    return d * scales.float(), -(second * minima.float())


# --- points of codebooks ---


def _signs(bits: Tensor) -> Tensor:
    """[..., c] bytes, a bit a weight -> [..., 8 c]: 1 or -1."""
    return 1 - 2 * _spread(bits, tuple(range(8)), 1).float()


def _even(bits: Tensor) -> Tensor:
    """Seven signs and an eighth that makes the number of minuses even -> eight."""
    folded = bits ^ (bits >> 4)
    folded = folded ^ (folded >> 2)
    return bits | (((folded ^ (folded >> 1)) & 1) << 7)


def _pointed(scale: Tensor, points: Tensor, signs: Tensor) -> Tensor:
    return _scaled(scale, points) * signs


def _iq2_xxs(b: Tensor) -> Tensor:
    pairs = b[..., 2:].unflatten(-1, (8, 8))
    word = _wide(pairs[..., 4:], 4).squeeze(-1)
    scale = _half_at(b, 0) * (0.5 + (word >> 28).float()) * 0.25
    points = look_up("iq2_xxs", pairs[..., :4].flatten(-2))
    return _pointed(scale, points, _signs(_even(_spread(word, (0, 7, 14, 21), 127))))


def _iq2_xs(b: Tensor) -> Tensor:
    words = _wide(b[..., 2:66], 2)
    scale = _half_at(b, 0) * (0.5 + fields(b[..., 66:], 1, 4).float()) * 0.25
    return _pointed(scale, look_up("iq2_xs", words & 511), _signs(_even(words >> 9)))


def _iq2_s(b: Tensor) -> Tensor:
    index = b[..., 2:34].to(torch.int32) | (fields(b[..., 66:74], 1, 2).to(torch.int32) << 8)
    scale = _half_at(b, 0) * (0.5 + fields(b[..., 74:], 1, 4).float()) * 0.25
    return _pointed(scale, look_up("iq2_s", index), _signs(b[..., 34:66]))


def _iq3_xxs(b: Tensor) -> Tensor:
    words = _wide(b[..., 66:], 4)
    scale = _half_at(b, 0) * (0.5 + (words >> 28).float()) * 0.5
    return _pointed(scale, look_up("iq3_xxs", b[..., 2:66]), _signs(_even(_spread(words, (0, 7, 14, 21), 127))))


def _iq3_s(b: Tensor) -> Tensor:
    index = b[..., 2:66].to(torch.int32) | (fields(b[..., 66:74], 1, 1).to(torch.int32) << 8)
    scale = _half_at(b, 0) * (1 + 2 * fields(b[..., 106:], 1, 4).float())
    return _pointed(scale, look_up("iq3_s", index), _signs(b[..., 74:106]))


def _shifted(scale: Tensor, points: Tensor, down: Tensor) -> Tensor:
    """scale * (points + delta), delta 1/8, or -1/8 where ``down`` [..., runs] is set."""
    delta = torch.where(down, -0.125, 0.125).unsqueeze(-1)
    return _scaled(scale, (points.unflatten(-1, (down.shape[-1], -1)) + delta).flatten(-2))


def _iq1_s(b: Tensor) -> Tensor:
    words = _wide(b[..., 34:], 2)
    index = b[..., 2:34].to(torch.int64) | (_spread(words, (0, 3, 6, 9), 7) << 8)
    scale = _half_at(b, 0) * (2 * ((words >> 12) & 7) + 1).float()
    return _shifted(scale, look_up("iq1_s", index), words >> 15 != 0)


def _iq1_m(b: Tensor) -> Tensor:
    words = _wide(b[..., 48:], 2)
    # The scale's f16 lies in the highest four bits of the words.
    low = (words[..., 0:1] >> 12) | ((words[..., 1:2] >> 12) << 4)
    high = (words[..., 2:3] >> 12) | ((words[..., 3:4] >> 12) << 4)
    d = half(low.to(torch.uint8), high.to(torch.uint8))
    above = fields(b[..., 32:48], 1, 4)
    index = b[..., :32].to(torch.int32) | ((above & 7).to(torch.int32) << 8)
    scale = d * (2 * _spread(words, (0, 3, 6, 9), 7) + 1).float()
    return _shifted(scale, look_up("iq1_m", index), above & 8 != 0)


_DECODE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "q4_0": _q4_0, "q4_1": _q4_1, "q5_0": _q5_0, "q5_1": _q5_1, "q8_0": _q8_0,
    "q2_k": _q2_k, "q3_k": _q3_k, "q4_k": _q4_k, "q5_k": _q5_k, "q6_k": _q6_k,
    "iq4_nl": _iq4_nl, "iq4_xs": _iq4_xs, "mxfp4": _mxfp4, "nvfp4": _nvfp4, "tq1_0": _tq1_0, "tq2_0": _tq2_0,
    "iq2_xxs": _iq2_xxs, "iq2_xs": _iq2_xs, "iq2_s": _iq2_s, "iq3_xxs": _iq3_xxs, "iq3_s": _iq3_s,
    "iq1_s": _iq1_s, "iq1_m": _iq1_m,
}  # fmt: skip
