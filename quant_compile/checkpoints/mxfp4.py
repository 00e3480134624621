"""MXFP4 of GPT-OSS: fused experts, e2m1 in groups of 32 below a power of two.

    W[n, k] = e2m1(nibble) * 2**(scale - 127)

``*_blocks`` u8 [E, n, k/32, 16], low nibble first, and ``*_scales`` u8 [E, n, k/32]; rows of gate and up alternate. What is handed
to ``read`` is one expert.
"""

from __future__ import annotations

import torch

from quant_compile.checkpoints.description import Description, Keys, Stored, Target
from quant_compile.checkpoints.weight import Axes, Axis, Module, N, Read, check_e8m0, mxfp4_weight

SUFFIXES = ("blocks", "scales")
FORMAT = "mxfp4"


def describe(keys: Keys) -> Description:
    """From ``quantization_config``."""
    stored = Stored(FORMAT, 4, 32)
    ignored = keys.texts("modules_to_not_convert")
    return Description(
        "mxfp4", keys.where, (Target(stored),), ignored, notes=keys.ignored(("quant_method", "dequantize"))
    )


def axes(stored: Stored) -> Axes:
    """Dimensions of a module's tensors."""
    group = Axis("k", 32)
    return {"blocks": (N, group), "scales": (N, group)}


def read(module: Module, stored: Stored) -> Read:
    """An expert's planes."""
    groups = module.groups(32)
    packed = module.tensor("blocks", (torch.uint8,), (module.n, groups, 16)).reshape(module.n, -1)
    scale = module.tensor("scales", (torch.uint8,), (module.n, groups))
    check_e8m0(module, "scales", scale)
    return mxfp4_weight(module, packed, scale, stored.inputs)
