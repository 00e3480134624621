"""GPTQ, as AutoGPTQ, gptqmodel and auto-round write it: integers packed along the input, groups in any order of the input.

    W[:, i] = scales[g_idx[i]] * (q[:, i] - zero[g_idx[i]])

``qweight`` i32 [k bits/32, n], packed along k; ``qzeros`` i32 [g, n bits/32], packed along n; ``scales`` [g, n]; ``g_idx`` [k], which
may be absent. A version 1 file (``checkpoint_format`` ``gptq`` or none) stores zero - 1, ``gptq_v2`` the zero. ``gptq_p`` cuts codes
into planes of 4, 2 and 1 bits, which lie one after the other for every 32 codes, and stores the zero.
Source: gptqmodel 7.7, whose own dequantized weights these formulas give.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quant_compile.checkpoints.description import Description, Keys, Stored, Target, check_pattern
from quant_compile.checkpoints.errors import CheckpointError, cut
from quant_compile.checkpoints.weight import (
    REAL,
    Axes,
    Axis,
    Integers,
    K,
    Module,
    N,
    Quantized,
    Read,
    dense,
    integer_weight,
    packed_along,
    unpack_bits,
)

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
FORMAT = "gptq"
BITS = (2, 3, 4, 5, 6, 7, 8)
# What gptqmodel subtracts from words of 3-bit zero points, in turn; that is not 1 of every field.
THREE_BITS = (0x24924924, 0x92492492, 0x49249249)
_HARMLESS = (
    "quant_method", "meta", "damp_percent", "static_groups", "true_sequential", "model_name_or_path", "model_file_base_name",
    "is_marlin_format", "desc_act", "act_group_aware", "method", "lm_head", "pack_dtype", "quantizer", "dataset",
    "tokenizer", "model_seqlen", "block_name_to_quantize", "module_name_preceding_first_block", "batch_size", "use_cuda_fp16",
    "pad_token_id", "use_exllama", "max_input_length", "exllama_config", "cache_block_outputs", "modules_in_block_to_quantize",
    "backend", "version", "disable_exllama",
)  # fmt: skip


def describe(keys: Keys) -> Description:
    """From ``quantization_config`` or ``quantize_config.json``."""
    version = keys.get("checkpoint_format", str) or keys.get("format", str, "gptq")
    keys.read.add("format")
    if version not in ("gptq", "gptq_v2", "gptq_p"):
        fix = "Fix: save it again as gptq with gptqmodel."
        keys.fail(f"checkpoint_format {version!r} is not read here; gptq, gptq_v2 and gptq_p are", fix)
    bits = keys.number("bits", valid=BITS)
    if bits is None:
        keys.fail("has no bits")
    if bits in (5, 6, 7) and version != "gptq_p":
        keys.fail(f"{bits} bits are stored as gptq_p only")
    meta = keys.get("meta", dict, {})
    theirs = version == "gptq" and "gptqmodel" in str(meta.get("quantizer"))
    stored = Stored(
        FORMAT, bits, keys.group(), keys.get("sym", bool, True), variant=f"{version}{'+' if theirs else ''}"
    )
    special, ignored = _dynamic(keys, stored)
    return Description(
        "gptq",
        keys.where,
        (*special, Target(stored)),
        (*keys.texts("modules_to_not_convert"), *ignored),
        notes=keys.ignored(_HARMLESS),
    )


def _dynamic(keys: Keys, stored: Stored) -> tuple[tuple[Target, ...], tuple[str, ...]]:
    """gptqmodel's overrides: ``+:`` or no sign and a regular expression with other values, ``-:`` for modules left alone."""
    targets: list[Target] = []
    ignored: list[str] = []
    for pattern, values in keys.get("dynamic", dict, {}).items():
        sign, regex = (pattern[0], pattern[2:]) if pattern[:2] in ("+:", "-:") else ("+", pattern)
        check_pattern(f"re:{regex}", f"{keys.where}.dynamic")
        if sign == "-":
            ignored.append(f"re:{regex}")
            continue
        if not isinstance(values, Mapping):
            keys.fail(f"dynamic: {pattern!r} must have values by key")
        own = Keys(values, f"{keys.where}.dynamic.{cut(pattern)}")
        group = own.group() if "group_size" in values else stored.group
        bits = own.number("bits", stored.bits, BITS) or stored.bits
        made = replace(stored, bits=bits, group=group, symmetric=own.get("sym", bool, stored.symmetric))
        targets.append(Target(made, (f"re:{regex}",)))
    return tuple(targets), tuple(ignored)


def axes(stored: Stored) -> Axes | None:
    """Dimensions of a module's tensors; None where codes are cut into planes, which lie between each other."""
    if stored.variant == "gptq_p" and stored.bits not in (2, 4, 8):
        return None
    columns, group = packed_along("k", stored.bits), Axis("k", stored.group)
    return {
        "qweight": (columns, N),
        "qzeros": (group, packed_along("n", stored.bits)),
        "scales": (group, N),
        "g_idx": (K,),
    }


def read(module: Module, stored: Stored) -> Read:
    """A linear's planes; the input's order goes with them where groups are not neighbours."""
    bits, n, k = stored.bits, module.n, module.k
    groups = module.groups(stored.group)
    planar = stored.variant == "gptq_p"
    i32 = (torch.int32,)
    words = module.tensor("qweight", i32, (-(-k * bits // 32), n))
    codes = _unpack(words.t(), bits, k, planar)
    scale = module.scale("scales", REAL, (groups, n)).t().contiguous()
    zero = module.tensor("qzeros", i32, (groups, -(-n * bits // 32)))
    zeros = _zeros(zero, n, stored, planar).t()
    order = order_of(module, "g_idx", stored.group)
    if isinstance(order, str):
        return _scattered(module, codes, scale, zeros, bits, order)
    if order is not None:
        codes = codes[:, order]
    made = Integers(codes, scale.to(module.dtype), zeros, bits, stored.group, stored.symmetric, scale.dtype)
    found = integer_weight(module, made, stored.inputs)
    return found if order is None else ordered(found, order)


def ordered(found: Read, order: Tensor) -> Read:
    """A weight whose columns were taken in this order: planes say so, values are put back."""
    if isinstance(found, Quantized):
        return replace(found, gather=order)
    return replace(found, values=torch.empty_like(found.values).index_copy_(1, order, found.values))


def _unpack(rows: Tensor, bits: int, count: int, planar: bool) -> Tensor:
    """i32 [r, w] -> codes [r, count] u8."""
    if not planar or bits in (2, 4, 8):
        return unpack_bits(rows, bits, count)
    blocks = rows.contiguous().reshape(rows.shape[0], -1, bits)
    whole, at, shift = torch.zeros((), dtype=torch.uint8, device=rows.device), 0, 0
    for width in (4, 2, 1):
        if not bits & width or (bits == 3 and width == 4):
            continue
        part = unpack_bits(blocks[..., at : at + width].flatten(0, 1), width, 32)
        whole = whole | (part << shift)
        at, shift = at + width, shift + width
    return whole.reshape(rows.shape[0], -1)[:, :count]


def _zeros(words: Tensor, n: int, stored: Stored, planar: bool) -> Tensor:
    """[g, w] -> zero points [g, n] u8."""
    if stored.variant.startswith("gptq_"):
        return _unpack(words, stored.bits, n, planar)
    if stored.bits == 3:
        return _zeros_of_3_bits(words, n, stored)
    # A zero point of 0 was stored by a subtraction from whole words, which borrows from its neighbour.
    one = torch.tensor(_signed(sum(1 << place for place in range(0, 32, stored.bits))), dtype=torch.int32)
    return unpack_bits(words + one.to(words.device), stored.bits, n)


def _zeros_of_3_bits(words: Tensor, n: int, stored: Stored) -> Tensor:
    """By gptqmodel's constants or by 1 in every field; where zero points are all 4, by that which gives it."""
    plain = (unpack_bits(words, 3, n) + 1) & 7
    if words.shape[1] % 3:
        return plain
    added = torch.tensor([_signed(word) for word in THREE_BITS], dtype=torch.int32, device=words.device)
    theirs = unpack_bits(words + added.repeat(words.shape[1] // 3), 3, n)
    if stored.symmetric and not words.is_meta:
        return theirs if bool((theirs == 4).all()) else plain
    return theirs if stored.variant.endswith("+") else plain


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def order_of(module: Module, suffix: str, group: int | None) -> Tensor | str | None:
    """Which inputs the groups hold, one after the other; None where they are neighbours; a text where groups differ in size."""
    if not module.has(suffix):
        return None
    index = module.tensor(suffix, (torch.int32, torch.int64), (module.k,))
    if module.dry or group is None or bool((index == -1).all()):  # compressed-tensors: no order
        return None
    index = index.long() - module.column // group
    groups = module.groups(group)
    if module.whole is not None and module.whole[1] != module.k and not bool((index // groups == 0).all()):
        raise CheckpointError(
            f"{module.info(suffix).where}: groups of its inputs are spread over all of them (desc_act), and ranks have parts of these.\n"
            "Fix: quantize without desc_act (compressed-tensors: actorder `weight`), or load it on one GPU."
        )
    if int(index.min()) < 0 or int(index.max()) >= groups:
        info = module.info(suffix)
        raise CheckpointError(
            f"{info.where} names groups outside of 0 to {groups - 1}.\nFix: write the checkpoint again."
        )
    if bool((index == torch.arange(module.k, device=index.device) // group).all()):
        return None
    if bool((torch.bincount(index, minlength=groups) != group).any()):
        return "its groups have different sizes"
    return torch.argsort(index, stable=True)


def _scattered(module: Module, codes: Tensor, scale: Tensor, zeros: Tensor, bits: int, reason: str) -> Read:
    """Values where the groups of ``g_idx`` have no common size."""
    index = module.tensor("g_idx", (torch.int32, torch.int64), (module.k,)).long()
    values = (codes.float() - zeros.float()[:, index]) * scale.to(module.dtype).float()[:, index]
    return dense(module, values, reason)
