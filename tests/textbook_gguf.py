"""GGUF types whose scales are searched for, added to the textbook's schemes: our bytes, the numbers of the ``gguf`` package.

That package has no quantizer of these. So what is compared is what becomes of given blocks, not how they were made, and the textbook
itself shares no code with the product.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from quant_compile.ir.ggml.encode import encode
from tests import textbook

SEARCHED = {"Q6_K": 256, "Q5_K": 256, "Q4_K": 256, "IQ4_NL": 32, "IQ4_XS": 256, "Q3_K": 256, "Q2_K": 256}


def searched(name: str, block: int) -> textbook.Textbook:
    """A type's rule."""

    def weight(w: Tensor, _: torch.dtype) -> Tensor:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        blocks = encode(name.lower(), w.cpu()).numpy()
        return torch.from_numpy(dequantize(blocks, GGMLQuantizationType[name])).to(w.device)

    return textbook.Textbook(weight, block=block)


for _name, _block in SEARCHED.items():
    cast(Any, textbook.SCHEMES)[f"GGUF_{_name}"] = searched(_name, _block)
    cast(Any, textbook.POLICIES)[f"GGUF_{_name}"] = f"GGUF_{_name}"
