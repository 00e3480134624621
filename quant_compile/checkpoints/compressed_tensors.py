"""compressed-tensors, as llm-compressor and auto-round write it: config groups of schemes, and a format for each.

    pack-quantized          (q - 2**(b-1)) * weight_scale, or (q - zero) * weight_scale; q packed along k, zeros packed along n
    int-quantized           weight int8 * weight_scale; values of 4 bits too
    float-quantized         weight e4m3 * weight_scale, per tensor, row or block
    nvfp4-pack-quantized    e2m1 * weight_scale / weight_global_scale
    mxfp4-pack-quantized    e2m1 * 2**(weight_scale - 127), mxfp8-quantized likewise with e4m3

Source: compressed-tensors 0.19 and 0.20, whose own dequantized weights these give.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from quant_compile.checkpoints.cache import stored_of
from quant_compile.checkpoints.description import Description, Keys, Stored, Target
from quant_compile.checkpoints.errors import CheckpointError
from quant_compile.checkpoints.gptq import order_of, ordered
from quant_compile.checkpoints.weight import (
    REAL,
    Axes,
    Axis,
    Integers,
    K,
    Module,
    N,
    Read,
    check_e8m0,
    check_fp8,
    dense,
    fp8_blocks,
    fp8_weight,
    integer_weight,
    mxfp4_weight,
    nvfp4_weight,
    packed_along,
    packed_floats,
    powers,
    unpack_bits,
)  # fmt: skip
from quant_compile.ir.errors import SchemeError
from quant_compile.ir.scheme import QuantArgs

SUFFIXES = (
    "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale",
    "input_scale", "input_zero_point", "input_global_scale",
)  # fmt: skip
METHOD = "compressed-tensors"
PACKED, INT8, FP8, NVFP4, MXFP4 = (
    "pack-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized",
)  # fmt: skip
FORMATS = (PACKED, INT8, "naive-quantized", FP8, NVFP4, MXFP4, "mxfp8-quantized", "mxfp8-pack-quantized")
_HARMLESS = (
    "quant_method",
    "quantization_status",
    "version",
    "global_compression_ratio",
    "provider",
    "autoround_version",
)
# Columns that share a scale, where that is the format's and not the config's.
_GROUPS = {NVFP4: 16, MXFP4: 32, "mxfp8-quantized": 32, "mxfp8-pack-quantized": 32}
_STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group", "token")


def describe(keys: Keys) -> Description:
    """From ``quantization_config``."""
    for key in ("sparsity_config", "transform_config"):
        found = keys.get(key, dict, {})
        if found and found.get("format", "") != "dense":
            keys.fail(f"{key} is not read here", "Fix: save the checkpoint without sparsity and transforms.")
    whole = keys.get("format", str)
    groups = keys.get("config_groups", dict, {})
    targets: list[Target] = []
    for name in groups:
        group = Keys(keys.data["config_groups"], f"{keys.where}.config_groups").child(name)
        if group is None:
            keys.fail(f"config_groups.{name} must be an object")
        targets.append(_group(group, whole))
    # Names before classes of modules, as compressed-tensors has it.
    targets.sort(key=lambda target: "Linear" in target.patterns)
    kv = keys.child("kv_cache_scheme")
    cache = None if kv is None else stored_of(kv)
    return Description(METHOD, keys.where, tuple(targets), keys.texts("ignore"), cache, keys.ignored(_HARMLESS))


def _group(group: Keys, whole: str | None) -> Target:
    weights = group.child("weights")
    if weights is None:
        return Target(None, group.texts("targets"))
    bits, kind, strategy, size, symmetric = _args(weights)
    format = group.get("format", str) or whole or ""
    if format in ("mixed-precision", "dense", ""):
        group.fail(f"format {format!r} does not say how weights are stored")
    if format not in FORMATS:
        group.fail(f"format {format!r} is not read here; {', '.join(FORMATS)} are", "Fix: compress it as one of these.")
    if group.get("output_activations", dict) is not None:
        group.fail("output_activations are not read here", "Fix: quantize inputs instead.")
    block = weights.block("block_structure")
    if strategy == "block" and block is None:
        weights.fail("has no block_structure")
    inputs = _inputs(group.child("input_activations"))
    variant = "x".join(map(str, block)) if block else f"{kind} {strategy}"
    return Target(Stored(format, bits, size, symmetric, inputs, variant), group.texts("targets"))


def _args(keys: Keys) -> tuple[int, str, str, int | None, bool]:
    bits = keys.number("num_bits", 8, (2, 3, 4, 5, 6, 7, 8)) or 8
    kind = keys.get("type", str, "int")
    if kind not in ("int", "float"):
        keys.fail(f"type must be int or float, got {kind!r}")
    size = keys.group()
    strategy = keys.get("strategy", str) or ("group" if size else "tensor")
    if strategy not in _STRATEGIES:
        keys.fail(f"strategy must be one of {', '.join(_STRATEGIES)}, got {strategy!r}")
    return bits, kind, strategy, size, keys.get("symmetric", bool, True)


def _inputs(keys: Keys | None) -> QuantArgs | None:
    """What inputs become; ``local`` means a fixed global scale with scales of groups at run time."""
    if keys is None:
        return None
    bits, kind, strategy, size, symmetric = _args(keys)
    dynamic: Any = keys.get("dynamic", (bool, str), False)
    values: dict[str, Any] = {"group_size": size if strategy in ("group", "tensor_group") else None}
    try:
        return QuantArgs(bits, kind, strategy, symmetric, dynamic is True, **values)
    except SchemeError as error:
        keys.fail(str(error))


def axes(stored: Stored) -> Axes:
    """Dimensions of a module's tensors."""
    rows, columns = (
        map(int, stored.variant.split("x"))
        if "x" in stored.variant
        else (None, _GROUPS.get(stored.format, stored.group))
    )
    scale = (Axis("n", rows), Axis("k", columns))
    if stored.format != PACKED:  # two codes of a float in a byte; zero points in a container each
        codes, zero = Axis("k", 2), scale
    else:
        codes, zero = packed_along("k", stored.bits), (packed_along("n", stored.bits), scale[1])
    return {
        "weight": (N, K), "weight_packed": (N, codes), "weight_scale": scale, "weight_scale_inv": scale, "weight_zero_point": zero,
        "weight_g_idx": (K,),
    }  # fmt: skip


def read(module: Module, stored: Stored) -> Read:
    """A linear's planes."""
    if stored.format == PACKED:
        return _packed_integers(module, stored)
    if module.has("weight_packed"):
        return _packed_floats(module, stored)
    if module.has("weight") and module.info("weight").dtype == torch.int8:
        return _integers(module, stored)
    if stored.format.startswith("mxfp8"):
        return _mxfp8(module)
    return _floats(module, stored)


def _packed_integers(module: Module, stored: Stored) -> Read:
    n, k, bits = module.n, module.k, stored.bits
    _check_shape(module)
    codes = unpack_bits(module.tensor("weight_packed", (torch.int32,), (n, -(-k * bits // 32))), bits, k)
    groups = module.groups(stored.group)
    scale = _scale(module, groups)
    zero = None
    if module.has("weight_zero_point"):
        words = module.tensor("weight_zero_point", (torch.int32,), (-(-n * bits // 32), groups))
        zero = unpack_bits(words.t(), bits, n).t()
    elif not stored.symmetric:
        module.info("weight_zero_point")
    if module.has("weight_g_idx"):
        return _by_index(module, Integers(codes, scale, zero, bits, stored.group), stored)
    made = Integers(codes, scale, zero, bits, stored.group, stored.symmetric)
    given = module.one("input_scale") if module.has("input_scale") else None
    return integer_weight(module, made, stored.inputs, given)


def _by_index(module: Module, made: Integers, stored: Stored) -> Read:
    """``actorder: group``: column i belongs to group g_idx[i]; the same arithmetic as GPTQ's."""
    order = order_of(module, "weight_g_idx", made.group)
    if isinstance(order, str):
        raise CheckpointError(f"{module.info('weight_g_idx').where}: {order}.\nFix: quantize with actorder `weight`.")
    if order is None:
        return integer_weight(module, replace(made, symmetric=stored.symmetric), stored.inputs)
    found = integer_weight(module, replace(made, codes=made.codes[:, order], symmetric=stored.symmetric), stored.inputs)
    return ordered(found, order)


def _check_shape(module: Module) -> None:
    """``weight_shape`` must be the model's."""
    if not module.has("weight_shape"):
        return
    shape = module.tensor("weight_shape", (torch.int64, torch.int32), (2,))
    n, k = module.whole or (module.n, module.k)
    if not module.dry and shape.tolist() != [n, k]:
        where = module.info("weight_shape").where
        raise CheckpointError(
            f"{where} says {shape.tolist()}, the model has {n}x{k}.\nFix: load the model's own checkpoint."
        )


def _scale(module: Module, groups: int) -> Tensor:
    """[n, g], or [1] for the tensor."""
    shapes = ((module.n, groups), *(((module.n,), (1,), (), (1, 1)) if groups == 1 else ()))
    found = module.scale("weight_scale", REAL, *shapes)
    return found.reshape(-1, groups).expand(module.n, groups)


def _integers(module: Module, stored: Stored) -> Read:
    """int8 containers; the config says how many of their bits are used."""
    codes = module.tensor("weight", (torch.int8,), (module.n, module.k))
    groups = module.groups(stored.group)
    middle = 1 << (stored.bits - 1)
    if not module.dry and codes.numel():

        def fail() -> NoReturn:
            where = module.info("weight").where
            raise CheckpointError(f"{where} has codes beyond {stored.bits} bits.\nFix: correct num_bits in the config.")

        module.ask(torch.aminmax(codes), lambda found: found[0] < -middle or found[1] >= middle, fail)
    zero = None
    if module.has("weight_zero_point"):
        shapes = ((module.n, groups), (1,), (), (module.n,))
        zero = module.tensor("weight_zero_point", (torch.int8,), *shapes).reshape(-1, groups).expand(module.n, groups)
        zero = zero.to(torch.int16) + middle
    unsigned = (codes.to(torch.int16) + middle).to(torch.uint8)
    made = Integers(unsigned, _scale(module, groups), zero, stored.bits, stored.group, stored.symmetric)
    given = module.one("input_scale") if module.has("input_scale") else None
    return integer_weight(module, made, stored.inputs, given)


def _floats(module: Module, stored: Stored) -> Read:
    codes = module.tensor("weight", (torch.float8_e4m3fn, torch.float8_e5m2), (module.n, module.k))
    codes = check_fp8(module, "weight", codes)
    name = "weight_scale" if module.has("weight_scale") else "weight_scale_inv"
    given = module.one("input_scale") if module.has("input_scale") else None
    if "x" not in stored.variant:
        scale = module.scale(name, REAL, (module.n, 1), (module.n,), (1,), (), (1, 1))
        return fp8_weight(module, codes, scale, stored.inputs, given)
    bn, bk = map(int, stored.variant.split("x"))
    scale = module.scale(name, REAL, (-(-module.n // bn), -(-module.k // bk)))
    return fp8_blocks(module, codes, scale, (bn, bk), stored.inputs)


def _packed_floats(module: Module, stored: Stored) -> Read:
    packed = packed_floats(module, "weight_packed")
    if stored.format == MXFP4:
        scale = module.tensor("weight_scale", (torch.uint8, torch.float8_e8m0fnu), (module.n, module.groups(32)))
        check_e8m0(module, "weight_scale", scale)
        return mxfp4_weight(module, packed, scale, stored.inputs)
    scale = module.scale("weight_scale", (torch.float8_e4m3fn,), (module.n, module.groups(16)))
    whole = _reciprocal(module, "weight_global_scale")
    given = _reciprocal(module, "input_global_scale") if module.has("input_global_scale") else None
    return nvfp4_weight(module, packed, scale, whole, stored.inputs, given)


def _reciprocal(module: Module, suffix: str) -> Tensor:
    """[1] f32 of a divisor; one in f64 stands for a scale that no divisor in f32 gives."""
    divisor = module.scale(suffix, (*REAL, torch.float64), (), (1,), (1, 1)).reshape(1)
    wide = divisor if divisor.dtype == torch.float64 else divisor.float()
    return wide.reciprocal().float()


def _mxfp8(module: Module) -> Read:
    """No scheme has e4m3 in groups of 32; in 16 bits its values are exact."""
    codes = check_fp8(module, "weight", module.tensor("weight", (torch.float8_e4m3fn,), (module.n, module.k)))
    scale = module.tensor("weight_scale", (torch.uint8, torch.float8_e8m0fnu), (module.n, module.groups(32)))
    check_e8m0(module, "weight_scale", scale)
    factor = powers(scale)
    values = codes.float() * factor.repeat_interleave(32, 1)[:, : module.k]
    return dense(module, values, "no scheme has MXFP8 weights")
