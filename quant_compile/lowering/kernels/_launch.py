"""What launches of Triton kernels share on the host: sizes of grids, Triton's types, tensor descriptors, and the device.

Triton is imported at the first launch, so that kernels can be read and asked on machines without it.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from quant_compile.lowering.target import Target

TYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.int8: "int8",
    torch.float8_e4m3fn: "float8e4nv",
    torch.float8_e5m2: "float8e5",
}


def ceil(size: int, block: int) -> int:
    """Blocks that cover ``size``."""
    return -(-size // block)


def pow2(value: int) -> int:
    """The least power of two from ``value`` up."""
    return 1 << max(0, value - 1).bit_length()


@lru_cache(maxsize=None)
def triton_type(dtype: torch.dtype) -> Any:
    """Triton's name for a dtype, as a constant of a kernel."""
    return getattr(import_module("triton.language"), TYPES[dtype])


def descriptor(data: Tensor, rows: int, columns: int) -> Any:
    """Tensor descriptor of all rows of ``data``, which is loaded in blocks [rows, columns]."""
    kind = import_module("triton.tools.tensor_descriptor").TensorDescriptor
    return kind.from_tensor(data.view(-1, data.shape[-1]), [rows, columns])


def target_of(device: torch.device) -> Target:
    """The launch's device; the interpreter, which runs on CPU tensors, plays an sm90."""
    return Target.of(device) if device.type == "cuda" else Target.fake("sm90")


@lru_cache(maxsize=None)
def sm_count_of(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the interpreter."""
    return Target.of(device).sm_count if device.type == "cuda" else 1
