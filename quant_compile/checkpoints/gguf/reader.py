"""Blocks of a GGUF file to planes, which they are already; values where no plane serves, with the reason.

Reads the tensors of one linear, or of one expert; a type's numbers come from ``ir/ggml``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quant_compile.checkpoints.description import Description, Stored
from quant_compile.checkpoints.errors import CheckpointError
from quant_compile.checkpoints.weight import REAL, Dense, Module, Read, dense, with_inputs
from quant_compile.ir.ggml.decode import decode
from quant_compile.ir.ggml.types import BY_NUMBER, HALVES
from quant_compile.ir.numerics import CHUNK_ELEMENTS
from quant_compile.ir.scheme import QuantArgs

FORMAT = "gguf"
BLOCKS, SCALE, KEYS, VALUES = "gguf_blocks", "gguf_scale", "gguf_keys", "gguf_values"
SUFFIXES = (BLOCKS, SCALE, KEYS, VALUES)
BY_NAME = {block.name: block for block in BY_NUMBER.values()}


@dataclass(frozen=True)
class Blocks(Stored):
    """How a tensor of a GGUF file is stored; ``variant`` is its type, of ``gguf_values`` where keys and values are apart.

    Attributes:
        keys: type of ``gguf_keys``.
        reason: why its values are needed; empty: planes do.
    """

    keys: str = ""
    reason: str = ""

    @property
    def text(self) -> str:
        """``gguf q4_k``."""
        kinds = dict.fromkeys((self.keys or self.variant, self.variant))
        return f"gguf {' and '.join(kinds)}"


@dataclass(frozen=True)
class GgufDescription(Description):
    """What a file says of its tensors, by name of a module.

    Attributes:
        kinds: how modules are stored whose weights are in blocks.
        types: of all tensors.
    """

    kinds: Mapping[str, Blocks] = field(default_factory=dict[str, Blocks])
    types: tuple[str, ...] = ()

    def stored(self, name: str) -> Stored | None:
        """As ``Description.stored``."""
        return self.kinds.get(name)

    @property
    def text(self) -> str:
        """``GGUF: 193 tensors in q4_k, 65 in f32``."""
        counts = Counter(self.types).most_common()
        return f"GGUF: {', '.join(f'{count} tensors in {name}' for name, count in counts)}"


def blocks_of(name: str, reason: str = "", keys: str = "") -> Blocks:
    """How a tensor of this type is stored."""
    return Blocks(FORMAT, BY_NAME[name].bits, variant=name, keys=keys, reason=reason)


def read(module: Module, stored: Stored) -> Read:
    """Planes of a linear or an expert, or its values."""
    assert isinstance(stored, Blocks)
    if module.has(KEYS):
        return _latents(module, stored)
    name, block = stored.variant, BY_NAME[stored.variant]
    reason = stored.reason or ("its blocks stand below a scale of the tensor" if module.has(SCALE) else "")
    wanted = replace(module, copy=module.copy and not reason)
    if module.k % block.size:
        raise CheckpointError(
            f"{module.info(BLOCKS).where} is of {name}, whose blocks do not divide rows of {module.k}.\n"
            "Fix: load the file with the metadata that it was written with."
        )
    data = wanted.tensor(BLOCKS, (torch.uint8,), (module.n, module.k // block.size * block.nbytes))
    _check_scales(module, name, data)
    if reason:
        return _dense(module, name, data, reason)

    def values() -> Tensor:
        return _values(name, data, module.k, module.dtype)

    return with_inputs(module, QuantArgs.of_blocks(name), (data.contiguous(),), values, None)


def _dense(module: Module, name: str, data: Tensor, reason: str) -> Dense:
    """Values, times the scale of the tensor where it has one."""
    made = _values(name, data, module.k, module.dtype)
    if module.has(SCALE) and not module.dry:
        made = made * module.one(SCALE).to(made.device)
    return dense(module, made, reason)


def _values(name: str, data: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """[..., bytes] -> [..., k], a few rows at a time: in f32 the whole could be many times its blocks."""
    flat = data.reshape(-1, data.shape[-1])
    out = torch.empty((flat.shape[0], k), dtype=dtype, device=data.device)
    if not data.is_meta:
        step = max(1, CHUNK_ELEMENTS // max(1, k))
        for start in range(0, flat.shape[0], step):
            out[start : start + step] = decode(name, flat[start : start + step])
    return out.reshape(*data.shape[:-1], k)


def _latents(module: Module, stored: Blocks) -> Dense:
    """kv_b_proj of DeepSeek out of k_b [heads, k, keys], whose columns are rows of the weight, and v_b [heads, values, k]."""
    keys = _whole(module, KEYS, stored.keys)
    values = _whole(module, VALUES, stored.variant)
    if keys.dim() != 3 or values.dim() != 3 or keys.shape[::2][:1] != values.shape[:1]:
        raise CheckpointError(f"{module.info(KEYS).where} does not fit its values.\nFix: write the file again.")
    keys = keys.transpose(1, 2)
    if keys.shape[2] != module.k or values.shape[2] != module.k:
        raise CheckpointError(f"{module.info(KEYS).where} is not for {module.k} latents.\nFix: write the file again.")
    whole = torch.cat((keys, values), 1).flatten(0, 1)
    if whole.shape != (module.n, module.k):
        have = "x".join(map(str, whole.shape))
        raise CheckpointError(
            f"{module.info(KEYS).where} makes {have}, must be {module.n}x{module.k}.\nFix: write the file again."
        )
    return dense(module, whole, "the file has its keys and values apart, and the keys by columns")


def _whole(module: Module, suffix: str, name: str) -> Tensor:
    info, block = module.info(suffix), BY_NAME[name]
    if info.dtype in REAL:
        return module.tensor(suffix, REAL).to(module.dtype)
    data = module.tensor(suffix, (torch.uint8,))
    _check_scales(module, name, data)
    return _values(name, data, info.shape[-1] // block.nbytes * block.size, module.dtype)


def _check_scales(module: Module, name: str, data: Tensor) -> None:
    """Refuse f16 scales of inf or NaN.

    Raises:
        CheckpointError: there is one.
    """
    if module.dry:
        return
    blocks = data.reshape(-1, BY_NAME[name].nbytes)
    for place in HALVES.get(name, ()):
        bad = (blocks[:, place + 1] & 0x7C) == 0x7C
        if bool(bad.any()):
            where = next(iter(module.tensors.values())).name
            what = f"{module.files.tensors[where].where} holds a scale of NaN or inf in block {int(bad.nonzero()[0])}"
            raise CheckpointError(f"{what}.\nFix: download or write the file again.")
