"""Experts of one up projection, an activation and a down projection, without a gate: found, quantized, and kept where nothing runs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quant_compile
from quant_compile.ir.family import family_of
from quant_compile.ir.moe import Activation, MoeProblem
from quant_compile.ir.scheme import parse
from quant_compile.lowering.moe import moe_fits
from quant_compile.lowering.select import Request
from quant_compile.lowering.target import Target
from tests.runtime_support import CompileCounter, plain_inductor

__all__ = ["plain_inductor"]
EXPERTS, HIDDEN, INNER, TOKENS = 4, 32, 48, 7
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu2": lambda up: F.relu(up).square(),
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda up: F.gelu(up, approximate="tanh"),
}


class Experts(nn.Module):
    """top-2 of ``EXPERTS``; ``up`` is [E, I, H]."""

    def __init__(self, kind: str, biased: bool) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.act = KINDS[kind]
        self.up = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) * 0.2)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) * 0.2)
        self.up_bias = nn.Parameter(torch.randn(EXPERTS, INNER)) if biased else None
        self.down_bias = nn.Parameter(torch.randn(EXPERTS, HIDDEN)) if biased else None

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat, rows = ids.reshape(-1), x.repeat_interleave(ids.shape[1], 0).unsqueeze(-1)
        hidden = torch.bmm(self.up[flat], rows).squeeze(-1)
        hidden = hidden if self.up_bias is None else hidden + self.up_bias[flat]
        out = torch.bmm(self.down[flat], self.act(hidden).unsqueeze(-1)).squeeze(-1)
        out = out if self.down_bias is None else out + self.down_bias[flat]
        return (out * weights.reshape(-1, 1)).reshape(*ids.shape, -1).sum(1)


class Block(nn.Module):
    """A router and its experts."""

    def __init__(self, kind: str, biased: bool = False) -> None:
        super().__init__()
        self.experts = Experts(kind, biased)
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2, -1)
        return self.experts(x, ids, weights)


def quantized(model: Block, spec: str, x: Tensor) -> Tensor:
    """Token by token from the scheme's own functions."""
    scheme = parse(spec)
    family = family_of(scheme)

    def times(row: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        planes = (row,) if scheme.input_activations is None else family.quantize_input(row, scheme, None)
        return family.linear(planes, family.quantize_weight(weight, scheme), bias, scheme, row.dtype)

    e = model.experts
    weights, ids = model.router(x).softmax(-1).topk(2, -1)
    out = torch.zeros_like(x)
    for t, j in ((t, j) for t in range(x.shape[0]) for j in range(2)):
        i = int(ids[t, j])
        up = times(x[t : t + 1], e.up[i], None if e.up_bias is None else e.up_bias[i])
        down = times(e.act(up), e.down[i], None if e.down_bias is None else e.down_bias[i])
        out[t] += weights[t, j] * down[0]
    return out


@pytest.mark.parametrize("door", ["compile", "backend"])
@pytest.mark.parametrize(
    ("kind", "biased", "spec"),
    [
        ("relu2", False, "W8A16"), ("relu2", True, "W8A8"), ("gelu", True, "FP8_DYNAMIC"), ("silu", False, "W8A8"),
        ("relu", True, "W4A16"), ("gelu_tanh", False, "MXFP4A16"),
    ],
)  # fmt: skip
def test_experts_without_a_gate(kind: str, biased: bool, spec: str, door: str, plain_inductor: CompileCounter) -> None:
    model, x = Block(kind, biased).eval(), torch.randn(TOKENS, HIDDEN)
    torch._dynamo.reset()
    with torch.no_grad():
        plain, wanted = model(x), quantized(model, spec, x)
        if door == "compile":
            quant_compile.compile(model, {"default": spec, "strict": True})
            found = model(x)
        else:
            found = torch.compile(model, backend="sglquant", options={"policy": spec})(x)
    assert float((found - wanted).norm() / wanted.norm()) <= 1e-3
    assert float((found - plain).norm() / plain.norm()) > 2e-3, "nothing was quantized"
    report = quant_compile.report(model).require(1.0)
    schemes: dict[str, Any] = {line.names[0]: line.scheme for line in report.lines}
    assert schemes["experts.up"] == schemes["experts.down"] == parse(spec).spec and not report.misses


def test_an_unknown_activation_is_named(plain_inductor: CompileCounter) -> None:
    model = Block("relu2").eval()
    model.experts.act = torch.tanh
    with torch.no_grad():
        quant_compile.compile(model, "W8A16")
        model(torch.randn(TOKENS, HIDDEN))
    skips = dict(quant_compile.report(model).skips)
    assert {"experts.up", "experts.down"} <= skips.keys() and "its activation" in skips["experts.up"]


@pytest.mark.parametrize("target", ["sm90", "sm100"])
def test_kernels_with_a_gate_refuse(target: str) -> None:
    """Every kernel for GPUs puts gate and up together; none may be given experts that have no gate."""
    problem = MoeProblem(parse("W8A8"), 8, 256, 512, 2, Activation("relu2", gated=False), torch.bfloat16)
    answers = moe_fits(problem, Target.fake(target), Request(), 16)
    assert answers and all(isinstance(answer, str) for answer in answers.values())
    assert answers["triton_moe"] == "multiplies experts with a gate only"


@pytest.mark.parametrize("kind", KINDS)
def test_the_activation_as_text(kind: str) -> None:
    activation = Activation(kind, gated=False)
    assert Activation.parse(activation.text) == activation
    hidden = torch.randn(3, 5)
    torch.testing.assert_close(activation(hidden), KINDS[kind](hidden))
