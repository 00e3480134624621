"""A small block with what the passes are for: siblings of unequal size, one bias among them, a transposed weight, a kept one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.ir.tracing import Holder, Traced, eager_linear, trace

QKV: Mapping[str, str | None] = {"q": "W8A8", "k": "W8A8", "v": "W8A8", "o": None}


def forward(m: Any, x: Tensor) -> Tensor:
    """q, k and v read x; v is stored [k, n]; o reads their sum."""
    q, k, v = F.linear(x, m.q, m.bias), F.linear(x, m.k), x @ m.v
    return F.linear(torch.cat([q, k, v], -1), m.o)


def block() -> Holder:
    """Weights of forward: 24, 8 and 8 rows of 40."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (24, 40), "k": (8, 40), "v": (40, 8), "o": (16, 40), "bias": (24,)}
    return Holder(forward, **{name: torch.randn(shape, generator=generator) / 6 for name, shape in shapes.items()})


def example() -> Tensor:
    """An input of block."""
    return torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1))


def traced_block() -> Traced:
    """Dynamo's graph of the block."""
    return trace(block(), example())


def wanted(m: Any, x: Tensor, schemes: Mapping[str, str | None], scales: Mapping[str, float] | None = None) -> Tensor:
    """What the block computes when each weight follows its scheme."""

    def linear(name: str, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        spec = schemes[name]
        return F.linear(x, w, bias) if spec is None else eager_linear(x, w, bias, spec, (scales or {}).get(name))

    q, k, v = linear("q", x, m.q, m.bias), linear("k", x, m.k), linear("v", x, m.v.t())
    return linear("o", torch.cat([q, k, v], -1), m.o)
