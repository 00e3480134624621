"""auto-round: its config says which of the other formats its tensors are in.

``packing_format`` ``auto_round`` and ``auto_round:auto_gptq`` are GPTQ version 1 (symmetric), ``auto_round:auto_awq`` is AWQ (all with zero
points), and the FP4 and FP8 forms have compressed-tensors' names or FineGrainedFP8's. ``extra_config`` overrides single modules, 16 bits
there meaning that a module stays as it is. ``static_kv_dtype``, or ``static_attention_dtype`` for attention's products too, says that
K and V have scales, of a layer or of each head (``static_kv_granularity``).
"""

from __future__ import annotations

import re
from dataclasses import replace

from quant_compile.checkpoints import awq, fp8_block, gptq
from quant_compile.checkpoints.cache import static_of
from quant_compile.checkpoints.description import CacheStored, Description, Keys, Stored, Target, check_pattern, shown
from quant_compile.checkpoints.errors import cut
from quant_compile.ir.kv import HEAD, TENSOR
from quant_compile.ir.scheme import QuantArgs

_HARMLESS = (
    "quant_method", "autoround_version", "iters", "low_gpu_mem_usage", "nsamples", "seqlen", "batch_size", "enable_quanted_input",
    "block_name_to_quantize", "to_quant_block_names", "provider", "amp", "lr", "minmax_lr", "gradient_accumulate_steps", "backend",
    "dataset", "enable_norm_bias_tuning", "scale_dtype", "super_bits", "super_group_size", "act_sym", "act_group_size", "act_data_type",
    "enable_minmax_tuning", "quant_nontext_module", "format", "enable_alg_ext", "enable_torch_compile",
    "supported_types", "quant_lm_head", "optimizer", "rotation_config", "transform_config",
    "activation_scheme", "fmt",
)  # fmt: skip
_GRANULARITIES = {"tensor": TENSOR, "head": HEAD}
_BITS = {gptq.FORMAT: (2, 3, 4, 8), awq.FORMAT: (4,)}


def describe(keys: Keys) -> Description:
    """From ``quantization_config``."""
    packing = keys.get("packing_format", str, "auto_round")
    stored = _stored(keys, packing.removeprefix("auto_round:"), keys.get("data_type", str, "int"))
    targets: list[Target] = []
    ignored = list(keys.texts("modules_to_not_convert"))
    for name, values in keys.get("extra_config", dict, {}).items():
        if not isinstance(values, dict):
            keys.fail(f"extra_config: {name!r} must have values by key")
        pattern = f"re:{name}" if re.search(r"[\\^$*+?(\[|]", name) else name
        check_pattern(pattern, f"{keys.where}.extra_config")
        own = Keys(values, f"{keys.where}.extra_config.{cut(name)}")
        bits = own.number("bits", stored.bits) or stored.bits
        if bits >= 16:
            ignored.append(pattern)
            continue
        _check_bits(own, stored.format, bits)
        group = own.group() if "group_size" in values else stored.group
        made = replace(stored, bits=bits, group=group, symmetric=own.get("sym", bool, stored.symmetric))
        targets.append(Target(made, (pattern,)))
    targets.append(Target(stored))
    return Description("auto-round", keys.where, tuple(targets), tuple(ignored), _cache(keys), keys.ignored(_HARMLESS))


def _cache(keys: Keys) -> CacheStored | None:
    # Where attention's products are quantized, K and V are so in the same way, whatever is said of them alone.
    found = [_cache_of(keys, of) for of in ("static_attention", "static_kv")]
    return found[0] or found[1]


def _cache_of(keys: Keys, of: str) -> CacheStored | None:
    dtype, granularity = keys.get(f"{of}_dtype", str, ""), keys.get(f"{of}_granularity", str, "tensor")
    if granularity not in _GRANULARITIES:
        keys.fail(f"{of}_granularity must be one of {', '.join(_GRANULARITIES)}, got {shown(granularity)}")
    return static_of(f"{of}_dtype {dtype}", keys.where, _GRANULARITIES[granularity]) if dtype else None


def _stored(keys: Keys, packing: str, data_type: str) -> Stored:
    blocks = "weight_block_size" in keys.data or isinstance(keys.data.get("group_size"), list)
    group = None if blocks else keys.group()
    bits, symmetric = keys.number("bits", 4) or 4, keys.get("sym", bool, True)
    act_bits, act_dynamic = keys.number("act_bits", 16) or 16, keys.get("act_dynamic", bool, True)
    if packing in ("auto_round", "auto_gptq", "gptq", "auto_round_gptq") and data_type == "int":
        _check_bits(keys, gptq.FORMAT, bits)
        return Stored(gptq.FORMAT, bits, group, symmetric, variant="gptq")
    if packing in ("auto_awq", "awq"):
        _check_bits(keys, awq.FORMAT, bits)
        return Stored(awq.FORMAT, bits, group, symmetric)
    if "nv_fp" in data_type or "nvfp" in packing:
        inputs = QuantArgs(4, "float", "tensor_group", group_size=16) if act_bits == 4 else None
        return Stored("nvfp4-pack-quantized", 4, 16, True, inputs)
    if "mx_fp" in data_type or "mxfp" in packing:
        inputs = QuantArgs(bits, "float", "group", dynamic=True, group_size=32) if act_bits == bits == 4 else None
        return Stored("mxfp4-pack-quantized" if bits == 4 else "mxfp8-quantized", bits, 32, True, inputs)
    if bits == 8 and ("fp" in data_type or "fp8" in packing):
        return _fp8(keys, act_bits, act_dynamic, blocks)
    return keys.fail(
        f"packing_format {packing!r} with data_type {data_type!r} is not read here", "Fix: save it again as auto_round."
    )


def _check_bits(keys: Keys, format: str, bits: int) -> None:
    valid = _BITS.get(format, ())
    if valid and bits not in valid:
        keys.fail(f"bits must be one of {', '.join(map(str, valid))}, got {shown(bits)}")


def _fp8(keys: Keys, act_bits: int, act_dynamic: bool, blocks: bool) -> Stored:
    block = keys.block("weight_block_size" if "weight_block_size" in keys.data else "group_size") if blocks else None
    if block is not None:
        inputs = QuantArgs(8, "float", "group", dynamic=True, group_size=block[1]) if act_bits == 8 else None
        return Stored(fp8_block.FORMAT, 8, inputs=inputs, variant=f"{block[0]}x{block[1]}")
    if act_bits != 8:
        return Stored("float-quantized", 8)
    inputs = QuantArgs(8, "float", "token", dynamic=True) if act_dynamic else QuantArgs(8, "float", "tensor")
    return Stored("float-quantized", 8, inputs=inputs)
