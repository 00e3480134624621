"""Weights in the blocks of GGUF files, byte for byte, under 16-bit inputs: one scheme for each block type.

Weight plane: ``blocks`` [n, k / size * bytes] u8, the rows of a file. ``ir/ggml`` has what the bytes mean and how they are made; a type
that only files bring refuses to be quantized to. k must be a multiple of the type's size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_compile.ir.family import Family, Planes, PlaneSpec, Reject, register_family
from quant_compile.ir.ggml.decode import decode
from quant_compile.ir.ggml.encode import encode
from quant_compile.ir.ggml.types import HALVES, TYPES, BlockType
from quant_compile.ir.numerics import CHUNK_ELEMENTS
from quant_compile.ir.scheme import GGUF, QuantArgs, Scheme

LARGEST = torch.finfo(torch.float16).max
PRESETS = {f"GGUF_{name.upper()}": Scheme(QuantArgs.of_blocks(name)) for name in TYPES}


def block_of(scheme: Scheme) -> BlockType:
    """The type that a scheme's weights have."""
    assert scheme.weights.format is not None
    return TYPES[scheme.weights.format]


def accepts(scheme: Scheme) -> Reject | None:
    """Any GGUF type, with 16-bit inputs."""
    if scheme.weights.type != GGUF:
        return Reject(f"weights must have the type {GGUF}")
    return None if scheme.input_activations is None else Reject("inputs must stay in 16 bits")


def takes_size(scheme: Scheme, n: int, k: int) -> Reject | None:
    """Rows of whole blocks."""
    block = block_of(scheme)
    if k % block.size == 0:
        return None
    smaller = "" if block.size == 32 else "; GGUF_Q8_0, Q5_0, Q4_0 and IQ4_NL have blocks of 32"
    return Reject(f"k must be a multiple of {block.size}, the block of {scheme.spec}, got {k}{smaller}")


def takes_values(scheme: Scheme, weight: Tensor) -> Reject | None:
    """No number beyond f16, in which most types keep their scales: some would be inf, and what they scale NaN."""
    if block_of(scheme).name not in HALVES or weight.dtype == torch.float16 or weight.numel() == 0:
        return None
    low, high = torch.aminmax(weight)
    largest = max(-float(low), float(high))
    if not LARGEST < largest < float("inf"):
        return None
    return Reject(f"it has a value of {largest:.3g}, beyond the f16 in which {scheme.spec} keeps its scales")


def quantizes(scheme: Scheme) -> Reject | None:
    """Types that have a quantizer here."""
    if block_of(scheme).encodes:
        return None
    bits = {1: "GGUF_TQ1_0", 2: "GGUF_Q2_K", 3: "GGUF_Q3_K"}.get(scheme.weights.num_bits, "GGUF_MXFP4 or NVFP4A16")
    return Reject(
        f"there is no quantizer for it here, its blocks come from files.\nFix: use {bits}, or `keep` this weight."
    )


def weight_planes(scheme: Scheme, n: int, k: int, dtype: torch.dtype) -> tuple[PlaneSpec, ...]:
    """``blocks``."""
    block = block_of(scheme)
    return (PlaneSpec("blocks", (n, -(-k // block.size) * block.nbytes), torch.uint8),)


def quantize_weight(w: Tensor, scheme: Scheme) -> Planes:
    """[n, k] -> ``blocks``."""
    return (encode(block_of(scheme).name, w),)


def dequantize_weight(planes: Planes, scheme: Scheme, k: int) -> Tensor:
    """What the type's formula says, f32 [n, k]; a few rows at a time, for what decoding needs besides."""
    (blocks,), name = planes, block_of(scheme).name
    step = max(1, CHUNK_ELEMENTS // max(1, k))
    if blocks.shape[0] <= step:
        return decode(name, blocks)
    out = torch.empty((blocks.shape[0], k), dtype=torch.float32, device=blocks.device)
    for start in range(0, blocks.shape[0], step):
        out[start : start + step] = decode(name, blocks[start : start + step])
    return out


def quantize_input(x: Tensor, scheme: Scheme, scale: Tensor | None) -> Planes:
    """Never called: a 16-bit input has no quantize node."""
    raise AssertionError("GGUF schemes leave the input alone")


def linear(x: Planes, w: Planes, bias: Tensor | None, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """x @ dequantized(w).T + bias, in f32, by a few rows of the weight at a time."""
    left, (blocks,) = x[0].float(), w
    step = max(1, CHUNK_ELEMENTS // max(1, left.shape[-1]))
    parts = [
        torch.matmul(left, decode(block_of(scheme).name, blocks[start : start + step]).t())
        for start in range(0, blocks.shape[0], step)
    ]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return (y if bias is None else y + bias.float()).to(dtype)


FAMILY = register_family(
    Family(
        "gguf",
        PRESETS,
        accepts,
        weight_planes,
        quantize_weight,
        dequantize_weight,
        quantize_input,
        linear,
        takes_size=takes_size,
        takes_values=takes_values,
        quantizes=quantizes,
    )
)
