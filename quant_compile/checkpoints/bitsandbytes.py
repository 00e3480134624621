"""bitsandbytes: NF4 and FP4 codes in a table of their own, and int8 rows.

    4 bit, one level     table[nibble] * absmax of its 64; the high nibble comes first
    4 bit, two levels    absmax = nested_table[u8] * nested_absmax of its 256 + offset
    int8                 weight * SCB / 127

``weight`` u8 [n k/2, 1], or these bytes as elements of another dtype (``bnb_4bit_quant_storage``), beside ``weight.absmax``,
``weight.quant_map`` and ``weight.quant_state.bitsandbytes__nf4``, a JSON text as bytes. No scheme has such a table, so 4-bit weights become
values of the model's dtype; int8 rows are planes of W8A16.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from quant_compile.checkpoints.description import Description, Keys, Stored, Target
from quant_compile.checkpoints.errors import CheckpointError
from quant_compile.checkpoints.weight import Integers, Module, Read, dense, integer_weight

STATES = tuple(f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
SUFFIXES = (
    "weight", "SCB", "weight_format", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", *STATES
)  # fmt: skip
FORMAT = "bitsandbytes"
STORAGES = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32)
NO_SCHEME = "no scheme has codes that look up a table (NF4, FP4 of bitsandbytes)"
_HARMLESS = (
    "quant_method", "_load_in_4bit", "_load_in_8bit", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight", "llm_int8_threshold",
)  # fmt: skip
LONGEST_STATE = 1 << 16


def describe(keys: Keys) -> Description:
    """From ``quantization_config``."""
    four = keys.get("load_in_4bit", bool, False)
    if four == keys.get("load_in_8bit", bool, False):
        keys.fail("must have one of load_in_4bit and load_in_8bit")
    stored = Stored(FORMAT, 4 if four else 8)
    skipped = keys.texts("llm_int8_skip_modules")
    return Description("bitsandbytes", keys.where, (Target(stored),), skipped, notes=keys.ignored(_HARMLESS))


def read(module: Module, stored: Stored) -> Read:
    """A linear's planes, or its values."""
    return _four_bits(module) if stored.bits == 4 else _eight_bits(module)


def _eight_bits(module: Module) -> Read:
    codes = module.tensor("weight", (torch.int8,), (module.n, module.k))
    row = module.scale("SCB", (torch.float32, torch.float16), (module.n,)).float()
    made = Integers(codes.view(torch.uint8) ^ 0x80, (row / 127.0).reshape(-1, 1), None, 8, None)
    return integer_weight(module, made, None)


def _four_bits(module: Module) -> Read:
    n, k = module.n, module.k
    state_name = next((name for name in STATES if module.has(name)), STATES[0])
    state = _state(module, state_name)
    block = _number(module, state_name, state, "blocksize", int)
    count = n * k
    packed = _packed(module, -(-count // 2))
    table = module.tensor("weight.quant_map", (torch.float32,), (16,))
    absmax = _absmax(module, state_name, state, -(-count // block))
    data = packed.reshape(-1).view(torch.uint8)
    codes = torch.stack((data >> 4, data & 15), -1).reshape(-1)[:count]
    if module.dry:
        values = torch.empty(n, k, device="meta")
    else:
        values = (table[codes.int()] * absmax.repeat_interleave(block)[:count]).reshape(n, k)
    return dense(module, values, NO_SCHEME)


def _packed(module: Module, nbytes: int) -> Tensor:
    """The codes' bytes, which ``bnb_4bit_quant_storage`` lets be elements of any dtype."""
    width = module.info("weight").dtype.itemsize
    size = -(-nbytes // width)
    return module.tensor("weight", STORAGES if nbytes % width == 0 else (torch.uint8,), (size, 1), (1, size), (size,))


def _absmax(module: Module, state_name: str, state: Mapping[str, Any], blocks: int) -> Tensor:
    if not module.has("weight.nested_absmax"):
        return module.tensor("weight.absmax", (torch.float32,), (blocks,))
    codes = module.tensor("weight.absmax", (torch.uint8,), (blocks,))
    size = _number(module, state_name, state, "nested_blocksize", int)
    offset = _number(module, state_name, state, "nested_offset", float)
    table = module.tensor("weight.nested_quant_map", (torch.float32,), (256,))
    outer = module.tensor("weight.nested_absmax", (torch.float32,), (-(-blocks // size),))
    if module.dry:
        return torch.empty(blocks, device="meta")
    return table[codes.int()] * outer.repeat_interleave(size)[:blocks] + offset


def _state(module: Module, name: str) -> Mapping[str, Any]:
    """The JSON that is stored as a tensor of bytes; small, so that it is read for a dry module too."""
    info = module.info(name)
    if info.dtype != torch.uint8 or len(info.shape) != 1 or info.nbytes > LONGEST_STATE:
        raise CheckpointError(f"{info.where} is no quantization state.\nFix: save the checkpoint again.")
    try:
        found = json.loads(bytes(module.files.get(info.name).tolist()).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{info.where} is no JSON: {error}.\nFix: save the checkpoint again.") from None
    if not isinstance(found, dict) or (found.get("shape") is not None and found["shape"] != [module.n, module.k]):
        raise CheckpointError(
            f"{info.where} is of another shape than {module.n}x{module.k}.\nFix: save the checkpoint again."
        )
    return cast(Mapping[str, Any], found)


def _number(module: Module, name: str, state: Mapping[str, Any], key: str, kind: type) -> Any:
    value = state.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or (kind is int and not 0 < value <= 1 << 20):
        raise CheckpointError(f"{module.info(name).where} has {key} {value!r}.\nFix: save the checkpoint again.")
    return kind(value)
