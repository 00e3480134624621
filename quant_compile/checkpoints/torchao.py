"""torchao's safetensors: the inner tensors of its subclasses under names of their own, and what they are in the file's metadata.

    W = (_weight_qdata - _weight_zero_point) * _weight_scale

int8 rows are planes of W8A16 or W8A8, float8 rows and tensors of FP8; int8 containers of 4 bits in groups are planes of W4A16. Other
packings, which are for one kernel of one GPU, are refused.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from quant_compile.checkpoints.description import Description, Keys, Stored, Target
from quant_compile.checkpoints.errors import CheckpointError
from quant_compile.checkpoints.weight import REAL, Integers, Module, Read, check_fp8, fp8_weight, integer_weight
from quant_compile.ir.scheme import QuantArgs

SUFFIXES = ("_weight_qdata", "_weight_scale", "_weight_zero_point", "_weight_act_scale")
FORMAT = "torchao"
_DYNAMIC_INT8 = ("Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationInt4WeightConfig")
_DYNAMIC_FP8 = ("Float8DynamicActivationFloat8WeightConfig",)


def describe(keys: Keys) -> Description:
    """From ``quantization_config``; what a module's inputs become is in the name of torchao's config."""
    kind = json.dumps(keys.get("quant_type", (dict, str), {}))
    inputs = None
    if any(name in kind for name in _DYNAMIC_INT8):
        inputs = QuantArgs(8, "int", "token", dynamic=True)
    elif any(name in kind for name in _DYNAMIC_FP8):
        inputs = QuantArgs(8, "float", "token", dynamic=True)
    stored = Stored(FORMAT, 8, inputs=inputs)
    ignored = keys.texts("modules_to_not_convert")
    harmless = ("quant_method", "quant_type_kwargs", "include_input_output_embeddings", "untie_embedding_weights")
    return Description("torchao", keys.where, (Target(stored),), ignored, notes=keys.ignored(harmless))


def read(module: Module, stored: Stored) -> Read:
    """A linear's planes."""
    info = module.info("_weight_qdata")
    if info.shape != (module.n, module.k) or info.dtype not in (torch.int8, torch.float8_e4m3fn):
        shape = "x".join(map(str, info.shape))
        raise CheckpointError(
            f"{info.where} is {info.dtype} of {shape}: a packing of one kernel, which is not read here.\n"
            "Fix: quantize with torchao's plain int8 or float8 forms, or load the original checkpoint with a policy."
        )
    codes = module.tensor("_weight_qdata", (info.dtype,), (module.n, module.k))
    if info.dtype == torch.float8_e4m3fn:
        scale = module.scale("_weight_scale", REAL, (), (1,), (1, 1), (module.n,), (module.n, 1))
        return fp8_weight(module, check_fp8(module, "_weight_qdata", codes), scale, stored.inputs)
    shape: Any = module.info("_weight_scale").shape
    groups = shape[1] if len(shape) == 2 else 1
    if groups < 1 or module.k % groups:
        where = module.info("_weight_scale").where
        raise CheckpointError(f"{where} has {groups} groups for {module.k} inputs.\nFix: write the checkpoint again.")
    group = None if groups == 1 else module.k // max(1, groups)
    shapes = ((module.n, groups), *(((module.n,), (1,), ()) if groups == 1 else ()))
    scale = module.scale("_weight_scale", REAL, *shapes).reshape(-1, groups).expand(module.n, groups)
    bits = 4 if group is not None else 8
    middle = 1 << (bits - 1)
    zero = None
    if module.has("_weight_zero_point"):
        kinds = (torch.int8, torch.int32, torch.int64, *REAL)
        points = module.tensor("_weight_zero_point", kinds, *shapes).reshape(-1, groups)
        zero = points.expand(module.n, groups).to(torch.int32) + middle
    if not module.dry and bits == 4 and (int(codes.min()) < -8 or int(codes.max()) > 7):
        bits, middle = 8, 128
        zero = None if zero is None else zero + 120
    unsigned = (codes.to(torch.int16) + middle).to(torch.uint8)
    return integer_weight(module, Integers(unsigned, scale, zero, bits, group), stored.inputs)
