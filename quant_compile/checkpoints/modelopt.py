"""modelopt's unified Hugging Face export: one algorithm for a model, or one for each layer.

    FP8                 weight e4m3 * weight_scale; input_scale
    FP8 per channel     weight_scale [n]
    FP8 in blocks       weight_scale [n/bn, 1, k/bk, 1]
    NVFP4               e2m1 * weight_scale * weight_scale_2; input_scale
    INT4_AWQ, W4A8_AWQ  int4 * weight_scale [n, k/g]; the input times pre_quant_scale where that is there. weight_scale_2 of W4A8_AWQ
                        must not be multiplied in.
    MXFP4, MXFP8        as in the OCP formats

int4 is u8 [n/2, k]: row i holds rows 2i (low nibble) and 2i + 1, in two's complement. Fused experts of NVFP4 are packed along the input
([E, k/2, n]); ``names`` hands them over one by one and transposed. Source: modelopt 0.47.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from quant_compile.checkpoints.cache import algorithm_of, stored_of
from quant_compile.checkpoints.description import CacheStored, Description, Keys, Stored, Target, check_pattern
from quant_compile.checkpoints.errors import CheckpointError, cut
from quant_compile.checkpoints.weight import (
    REAL,
    Integers,
    Module,
    Read,
    check_e8m0,
    check_fp8,
    dense,
    fp8_blocks,
    fp8_weight,
    integer_weight,
    mxfp4_weight,
    nvfp4_weight,
    packed_floats,
    powers,
)  # fmt: skip
from quant_compile.ir.scheme import QuantArgs

SUFFIXES = ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "weight_scale_inv")
_FP8 = QuantArgs(8, "float", "tensor")
_NV = QuantArgs(4, "float", "tensor_group", group_size=16)
_TOKEN = QuantArgs(8, "float", "token", dynamic=True)
_HARMLESS = (
    "quant_method",
    "producer",
    "config_groups",
    "version",
    "format",
    "has_zero_point",
    "pre_quant_scale",
)

# quant_algo -> how its weights are stored and what their inputs become; block sizes and groups are in the config.
ALGORITHMS: dict[str, Stored] = {
    "FP8": Stored("modelopt-fp8", 8, inputs=_FP8),
    "FP8_PER_CHANNEL_PER_TOKEN": Stored("modelopt-fp8", 8, inputs=_TOKEN),
    "FP8_PB_WO": Stored("modelopt-fp8", 8, variant="blocks"),
    "FP8_PB_REAL": Stored(
        "modelopt-fp8", 8, inputs=QuantArgs(8, "float", "group", dynamic=True, group_size=128), variant="blocks"
    ),
    "NVFP4": Stored("modelopt-nvfp4", 4, 16, inputs=_NV),
    "NVFP4_AWQ": Stored("modelopt-nvfp4", 4, 16, inputs=_NV),
    "NVFP4_SVDQUANT": Stored("refused", 4),
    "W4A16_NVFP4": Stored("modelopt-nvfp4", 4, 16),
    "W4A8_NVFP4_FP8": Stored("modelopt-nvfp4", 4, 16, inputs=_FP8),
    "W4A16_AWQ": Stored("modelopt-int4", 4, 128),
    "INT4_AWQ": Stored("modelopt-int4", 4, 128),
    "W4A8_AWQ": Stored("modelopt-int4", 4, 128, inputs=_FP8),
    "MXFP4": Stored("modelopt-mxfp4", 4, 32, inputs=QuantArgs(4, "float", "group", dynamic=True, group_size=32)),
    "W4A8_MXFP4_FP8": Stored("modelopt-mxfp4", 4, 32, inputs=_FP8),
    "W4A16_MXFP4": Stored("modelopt-mxfp4", 4, 32),
    "MXFP8": Stored("modelopt-mxfp8", 8, 32),
    "W8A16": Stored("modelopt-int8", 8),
    "W8A8_SQ_PER_CHANNEL": Stored("modelopt-int8", 8, inputs=QuantArgs(8, "int", "token", dynamic=True)),
}
FORMATS = ("modelopt-fp8", "modelopt-nvfp4", "modelopt-int4", "modelopt-mxfp4", "modelopt-mxfp8", "modelopt-int8")


def describe(keys: Keys) -> Description:
    """From ``quantization_config``, or ``quantization`` of ``hf_quant_config.json``."""
    algorithm = keys.get("quant_algo", str)
    if algorithm is None:
        keys.fail("has no quant_algo")
    ignored = (*keys.texts("ignore"), *keys.texts("exclude_modules"))
    kv = _cache(keys)
    group = keys.group()
    if algorithm == "MIXED_PRECISION":
        targets = _mixed(keys)
    else:
        targets = (Target(_stored(keys, algorithm, group)),)
    return Description("modelopt", keys.where, targets, ignored, kv, keys.ignored(_HARMLESS))


def _cache(keys: Keys) -> CacheStored | None:
    """``kv_cache_quant_algo``, or the ``kv_cache_scheme`` that newer exports have in ``config.json``."""
    algorithm, scheme = keys.get("kv_cache_quant_algo", str, ""), keys.child("kv_cache_scheme")
    if algorithm or not scheme or not scheme.data:
        return algorithm_of(algorithm, keys.where)
    return stored_of(scheme)


def _stored(keys: Keys, algorithm: str, group: int | None) -> Stored:
    found = ALGORITHMS.get(algorithm.upper())
    if found is None or found.format == "refused":
        known = ", ".join(name for name, stored in ALGORITHMS.items() if stored.format != "refused")
        keys.fail(f"quant_algo {algorithm!r} is not read here; {known} are", "Fix: export with one of these.")
    if found.format == "modelopt-int4" and group is not None:
        return replace(found, group=group)
    return found


def _mixed(keys: Keys) -> tuple[Target, ...]:
    """``quantized_layers``: an algorithm for each module's name."""
    out: list[Target] = []
    for name, values in keys.get("quantized_layers", dict, {}).items():
        if not isinstance(values, dict) or not isinstance(values.get("quant_algo"), str):
            keys.fail(f"quantized_layers: {name!r} has no quant_algo")
        check_pattern(name, f"{keys.where}.quantized_layers")
        own = Keys(values, f"{keys.where}.quantized_layers.{cut(name)}")
        out.append(Target(_stored(own, values["quant_algo"], own.group()), (name,)))
    if not out:
        keys.fail("MIXED_PRECISION without quantized_layers")
    return tuple(out)


def read(module: Module, stored: Stored) -> Read:
    """A linear's planes."""
    found = _READERS[stored.format](module, stored)
    factor = module.factor("pre_quant_scale")
    return found if factor is None else replace(found, factor=factor)


def _fp8(module: Module, stored: Stored) -> Read:
    n, k = module.n, module.k
    codes = check_fp8(module, "weight", module.tensor("weight", (torch.float8_e4m3fn,), (n, k)))
    given = module.one("input_scale") if module.has("input_scale") else None
    shape = module.info("weight_scale").shape
    if len(shape) in (2, 4) and shape[0] not in (1, n):
        rows, columns = shape[0], shape[2 if len(shape) == 4 else 1]
        block = _block(n, rows), _block(k, columns)
        if (-(-n // block[0]), -(-k // block[1])) != (rows, columns):
            where = module.info("weight_scale").where
            raise CheckpointError(
                f"{where} has {rows}x{columns} blocks, into which no {n}x{k} is cut.\nFix: export it again."
            )
        scale = module.scale("weight_scale", REAL, (rows, 1, columns, 1), (rows, columns)).reshape(rows, columns)
        return fp8_blocks(module, codes, scale, block, stored.inputs)
    if stored.variant == "blocks":
        rows, columns = -(-n // 128), -(-k // 128)
        scale = module.scale("weight_scale", REAL, (rows, 1, columns, 1), (rows, columns)).reshape(rows, columns)
        return fp8_blocks(module, codes, scale, (128, 128), stored.inputs)
    scale = module.scale("weight_scale", REAL, (), (1,), (1, 1), (n,), (n, 1))
    return fp8_weight(module, codes, scale, stored.inputs, given)


def _block(size: int, blocks: int) -> int:
    """The size of a block, as a power of two: 128 unless that many do not fit."""
    return next((block for block in (128, 64, 32, 256) if -(-size // block) == blocks), -(-size // max(1, blocks)))


def _nvfp4(module: Module, stored: Stored) -> Read:
    packed = packed_floats(module, "weight")
    scale = module.scale("weight_scale", (torch.float8_e4m3fn,), (module.n, module.groups(16)))
    given = module.one("input_scale") if module.has("input_scale") else None
    return nvfp4_weight(module, packed, scale, module.one("weight_scale_2"), stored.inputs, given)


def _int4(module: Module, stored: Stored) -> Read:
    packed = module.tensor("weight", (torch.uint8,), (-(-module.n // 2), module.k))
    rows = torch.stack((packed & 15, packed >> 4), 1).flatten(0, 1)[: module.n]
    groups = module.groups(stored.group)
    scale = module.scale("weight_scale", REAL, (module.n, groups), *(((module.n,),) if groups == 1 else ()))
    made = Integers(rows ^ 8, scale.reshape(module.n, groups), None, 4, stored.group)
    given = module.one("input_scale") if module.has("input_scale") else None
    return integer_weight(module, made, stored.inputs, given)


def _int8(module: Module, stored: Stored) -> Read:
    codes = module.tensor("weight", (torch.int8,), (module.n, module.k))
    scale = module.scale("weight_scale", REAL, (), (1,), (module.n,), (module.n, 1)).reshape(-1, 1).expand(module.n, 1)
    made = Integers(codes.view(torch.uint8) ^ 0x80, scale, None, 8, None)
    return integer_weight(module, made, stored.inputs, module.one("input_scale") if module.has("input_scale") else None)


def _mxfp4(module: Module, stored: Stored) -> Read:
    packed = packed_floats(module, "weight")
    scale = module.tensor("weight_scale", (torch.uint8, torch.float8_e8m0fnu), (module.n, module.groups(32)))
    check_e8m0(module, "weight_scale", scale)
    return mxfp4_weight(module, packed, scale, stored.inputs)


def _mxfp8(module: Module, stored: Stored) -> Read:
    codes = check_fp8(module, "weight", module.tensor("weight", (torch.float8_e4m3fn,), (module.n, module.k)))
    scale = module.tensor("weight_scale", (torch.uint8, torch.float8_e8m0fnu), (module.n, module.groups(32)))
    check_e8m0(module, "weight_scale", scale)
    factor = powers(scale)
    return dense(module, codes.float() * factor.repeat_interleave(32, 1)[:, : module.k], "no scheme has MXFP8 weights")


_READERS = {
    "modelopt-fp8": _fp8,
    "modelopt-nvfp4": _nvfp4,
    "modelopt-int4": _int4,
    "modelopt-int8": _int8,
    "modelopt-mxfp4": _mxfp4,
    "modelopt-mxfp8": _mxfp8,
}
