"""Which file reads what: formats by name, and the config's ``quant_method`` to its description."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from quant_compile.checkpoints import (
    auto_round,
    awq,
    bitsandbytes,
    compressed_tensors,
    fp8_block,
    gptq,
    modelopt,
    mxfp4,
    torchao,
)
from quant_compile.checkpoints.description import PACKED, Description, Keys, Stored
from quant_compile.checkpoints.gguf import reader as gguf
from quant_compile.checkpoints.weight import Axes, Module, Read


@dataclass(frozen=True)
class Format:
    """A way to store a weight.

    Attributes:
        suffixes: tensors that a module may have, after its name and a dot.
        read: ``(module, stored) -> Quantized | Dense``; also with a dry module.
        axes: which rows and columns of the weight its tensors' dimensions go with, so that ranks read their parts only; None: that is
            not known, and weights are read whole.
        by_header: of a dry module ``read`` looks at dtypes and shapes only, so that modules with the same ones have the same answer.
    """

    suffixes: tuple[str, ...]
    read: Callable[[Module, Stored], Read]
    axes: Callable[[Stored], Axes | None] = lambda stored: None
    by_header: bool = True


FORMATS: dict[str, Format] = {
    gptq.FORMAT: Format(gptq.SUFFIXES, gptq.read, gptq.axes),
    awq.FORMAT: Format(awq.SUFFIXES, awq.read, awq.axes),
    fp8_block.FORMAT: Format(fp8_block.SUFFIXES, fp8_block.read, fp8_block.axes),
    mxfp4.FORMAT: Format(mxfp4.SUFFIXES, mxfp4.read, mxfp4.axes),
    bitsandbytes.FORMAT: Format(bitsandbytes.SUFFIXES, bitsandbytes.read, by_header=False),
    torchao.FORMAT: Format(torchao.SUFFIXES, torchao.read),
    gguf.FORMAT: Format(gguf.SUFFIXES, gguf.read),
    **{
        name: Format(compressed_tensors.SUFFIXES, compressed_tensors.read, compressed_tensors.axes)
        for name in compressed_tensors.FORMATS
    },
    **{name: Format(modelopt.SUFFIXES, modelopt.read) for name in modelopt.FORMATS},
}

METHODS: dict[str, Callable[[Keys], Description]] = {
    "gptq": gptq.describe,
    "awq": awq.describe,
    "compressed-tensors": compressed_tensors.describe,
    "fp8": fp8_block.describe,
    "modelopt": modelopt.describe,
    "auto-round": auto_round.describe,
    "intel/auto-round": auto_round.describe,
    "mxfp4": mxfp4.describe,
    "bitsandbytes": bitsandbytes.describe,
    "torchao": torchao.describe,
    PACKED: lambda keys: Description(PACKED, keys.where),
}
"""``quant_method`` -> its ``describe``."""

SUFFIXES = tuple(
    sorted(
        {suffix for name, format in FORMATS.items() if name != gguf.FORMAT for suffix in format.suffixes},
        key=lambda s: (-len(s), s),
    )
)
"""Every suffix that a tensor's name may have, the longest first; GGUF has other names."""
