"""The write side of a quantized KV cache in Triton: K and V of new tokens are quantized and stored by one launch.

Writes caches and, where scales belong to tokens, scales, in place; reads positions on the device.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from quant_compile.ir.family import Reject
from quant_compile.ir.numerics import dtype_name
from quant_compile.lowering.kernels._launch import pow2, target_of
from quant_compile.lowering.kernels.attention.reference import LARGEST
from quant_compile.lowering.target import Target
from quant_compile.lowering.trace import enqueue

MANTISSA = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2, torch.int8: 0}
LARGEST_HEAD = 1024


def fit(dtype: torch.dtype, cache_dtype: torch.dtype, head_size: int, target: Target) -> Reject | None:
    """Any 16- or 32-bit K and V into a cache of 8-bit codes."""
    if target.device != "cuda" or target.arch < 80:
        return Reject(f"needs a CUDA GPU from sm80 up, this is {target.label}")
    if not target.has("triton"):
        return Reject("triton is not installed")
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return Reject(f"quantizes bfloat16, float16 and float32, not {dtype_name(dtype)}")
    if cache_dtype not in MANTISSA:
        return Reject(f"stores {', '.join(map(dtype_name, MANTISSA))}, not {dtype_name(cache_dtype)}")
    if not 1 <= head_size <= LARGEST_HEAD:
        return Reject(f"stores heads of up to {LARGEST_HEAD}, not {head_size}")
    return None


def store(
    k: Tensor, v: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor, v_scale: Tensor
) -> None:
    """``reference.store`` of k [b, hkv, t, d] and v [b, hkv, t, dv] at ``positions`` [t] int64 of their caches.

    k, v and caches have any strides with the last dimension contiguous. A position outside of the cache is left out.

    Args:
        k_scale: f32: [b, hkv, l], written; one number or [hkv], read: codes are made under it.
        v_scale: likewise.
    """
    b, heads, t, d = k.shape
    k_fixed, v_fixed = k_scale.dim() != 3, v_scale.dim() != 3
    kinds = k_cache.dtype, v_cache.dtype
    if target_of(k.device).arch < 89:  # where Triton takes no pointer to e4m3
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    source: Any = import_module("quant_compile.lowering.kernels.attention._triton_store")
    enqueue(
        source.store_kernel, (b * heads, t),
        k, v, positions, k_cache, v_cache, k_scale, v_scale, heads, k_cache.shape[2],
        *k.stride()[:3], *v.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3],
        *scale_strides(k_scale), *scale_strides(v_scale),
        **constants_of(d, v.shape[3], kinds, (k_fixed, v_fixed)), num_warps=1,
    )  # fmt: skip


def constants_of(d: int, dv: int, kinds: tuple[torch.dtype, torch.dtype], fixed: tuple[bool, bool]) -> dict[str, Any]:
    """The constants of ``store_kernel``."""
    return {
        "D": d,
        "DV": dv,
        "PD": pow2(d),
        "PDV": pow2(dv),
        "K_MANTISSA": MANTISSA[kinds[0]],
        "V_MANTISSA": MANTISSA[kinds[1]],
        "K_LARGEST": LARGEST[kinds[0]],
        "V_LARGEST": LARGEST[kinds[1]],
        "K_FIXED": fixed[0],
        "V_FIXED": fixed[1],
    }


def scale_strides(scale: Tensor | None) -> tuple[int, int, int]:
    """Strides over (sequence, head, token) of a scale, which is absent, one number, [h] or [b, h, l]."""
    if scale is None:
        return 0, 0, 0
    if scale.dim() == 3:
        return scale.stride(0), scale.stride(1), scale.stride(2)
    return 0, 0 if scale.numel() == 1 else scale.stride(0), 0
