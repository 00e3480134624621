"""The block types of GGUF as data: how many weights a block holds, in how many bytes, and the number a file names it by.

Reads and writes nothing; ``decode`` turns blocks into numbers, ``encode`` numbers into blocks. A row of k weights is k / size blocks,
one after the other. Source: the GGUF specification and ggml's block structures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockType:
    """One type.

    Attributes:
        name: as policies write it: ``q4_k``.
        number: in a GGUF file.
        size: weights in a block.
        nbytes: bytes of a block.
        bits: of one code, as the name has them; ``8 * nbytes / size`` bits are stored a weight.
        encodes: numbers can be turned into it; else only a file brings it.
    """

    name: str
    number: int
    size: int
    nbytes: int
    bits: int
    encodes: bool = True


TYPES: Mapping[str, BlockType] = {
    block.name: block
    for block in (
        BlockType("q4_0", 2, 32, 18, 4),
        BlockType("q4_1", 3, 32, 20, 4),
        BlockType("q5_0", 6, 32, 22, 5),
        BlockType("q5_1", 7, 32, 24, 5),
        BlockType("q8_0", 8, 32, 34, 8),
        BlockType("q2_k", 10, 256, 84, 2),
        BlockType("q3_k", 11, 256, 110, 3),
        BlockType("q4_k", 12, 256, 144, 4),
        BlockType("q5_k", 13, 256, 176, 5),
        BlockType("q6_k", 14, 256, 210, 6),
        BlockType("iq2_xxs", 16, 256, 66, 2, encodes=False),
        BlockType("iq2_xs", 17, 256, 74, 2, encodes=False),
        BlockType("iq3_xxs", 18, 256, 98, 3, encodes=False),
        BlockType("iq1_s", 19, 256, 50, 1, encodes=False),
        BlockType("iq4_nl", 20, 32, 18, 4),
        BlockType("iq3_s", 21, 256, 110, 3, encodes=False),
        BlockType("iq2_s", 22, 256, 82, 2, encodes=False),
        BlockType("iq4_xs", 23, 256, 136, 4),
        BlockType("iq1_m", 29, 256, 56, 1, encodes=False),
        BlockType("tq1_0", 34, 256, 54, 2),
        BlockType("tq2_0", 35, 256, 66, 2),
        BlockType("mxfp4", 39, 32, 17, 4),
        # Its 8-bit scales stand below a scale of the whole tensor, which is no part of the blocks.
        BlockType("nvfp4", 40, 64, 36, 4, encodes=False),
    )
}
PLAIN: Mapping[str, BlockType] = {
    block.name: block
    for block in (BlockType("f32", 0, 1, 4, 32), BlockType("f16", 1, 1, 2, 16), BlockType("bf16", 30, 1, 2, 16))
}
"""Numbers as they are: no scheme, a weight that is kept."""
BY_NUMBER: Mapping[int, BlockType] = {block.number: block for block in (*TYPES.values(), *PLAIN.values())}

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the codes of iq4_nl and iq4_xs stand for, ascending."""
E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice what the codes of mxfp4 and nvfp4 stand for."""
HALVES: Mapping[str, tuple[int, ...]] = {
    **{name: (0,) for name in ("q4_0", "q5_0", "q8_0", "iq4_nl", "iq4_xs", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq1_s")},
    **{name: (0, 2) for name in ("q4_1", "q5_1", "q4_k", "q5_k")},
    "q2_k": (80, 82), "q3_k": (108,), "q6_k": (208,), "tq1_0": (52,), "tq2_0": (64,),
}  # fmt: skip
"""Where a block's f16 scales and minima begin; of types that have them in one piece."""
