"""AWQ, as AutoAWQ and auto-round write it: 4-bit integers packed along the output, eight columns of a word in an order of their own.

    W = scales * (q - zero)

``qweight`` i32 [k, n/8] and ``qzeros`` i32 [g, n/8], whose nibble j is column [0, 2, 4, 6, 1, 3, 5, 7][j] of eight; ``scales`` [g, n].
With ``zero_point: false`` the zeros are there and all 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_compile.checkpoints.description import Description, Keys, Stored, Target
from quant_compile.checkpoints.weight import (
    REAL,
    Axes,
    Axis,
    Integers,
    K,
    Module,
    N,
    Read,
    integer_weight,
    packed_along,
    unpack_bits,
)

SUFFIXES = ("qweight", "qzeros", "scales")
FORMAT = "awq"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_HARMLESS = (
    "quant_method", "backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config", "autoround_version", "amp", "sym",
    "data_type", "enable_quanted_input", "provider", "to_quant_block_names", "iters", "low_gpu_mem_usage", "nsamples", "seqlen",
    "batch_size", "format",
)  # fmt: skip


def describe(keys: Keys) -> Description:
    """From ``quantization_config``."""
    version = str(keys.get("version", str, "gemm")).lower()
    if version != "gemm":
        keys.fail(f"version {version!r} is not read here; gemm is", "Fix: save it again as gemm.")
    bits = keys.number("bits", keys.number("w_bit", 4), (4,)) or 4
    group = keys.group("group_size") if "group_size" in keys.data else keys.group("q_group_size")
    stored = Stored(FORMAT, bits, group, not keys.get("zero_point", bool, True))
    return Description(
        "awq", keys.where, (Target(stored),), keys.texts("modules_to_not_convert"), notes=keys.ignored(_HARMLESS)
    )


def axes(stored: Stored) -> Axes:
    """Dimensions of a module's tensors."""
    words, group = packed_along("n", 4), Axis("k", stored.group)
    return {"qweight": (K, words), "qzeros": (group, words), "scales": (group, N)}


def read(module: Module, stored: Stored) -> Read:
    """A linear's planes."""
    groups, words = module.groups(stored.group), -(-module.n // 8)
    codes = _columns(module.tensor("qweight", (torch.int32,), (module.k, words)), module.n).t()
    zeros = _columns(module.tensor("qzeros", (torch.int32,), (groups, words)), module.n).t()
    scale = module.scale("scales", REAL, (groups, module.n)).t().contiguous()
    return integer_weight(
        module, Integers(codes.contiguous(), scale, zeros, 4, stored.group, stored.symmetric), stored.inputs
    )


def _columns(words: Tensor, n: int) -> Tensor:
    """i32 [r, n/8] -> [r, n] u8 in the order of columns."""
    fields = unpack_bits(words, 4, 8 * words.shape[1]).unflatten(1, (-1, 8))
    back = torch.argsort(torch.tensor(ORDER)).to(words.device)
    return fields[..., back].flatten(1)[:, :n]
