"""A strict policy on random modules: an error that names a weight, or every weight's effect is that of the textbook's integers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import quant_compile
from tests.runtime_support import CompileCounter, plain_inductor

__all__ = ["plain_inductor"]
SIZE = 16
STRICT = {"default": "W8A16", "strict": True}


@dataclass(frozen=True)
class Spelling:
    """One way to write y = x W.

    Attributes:
        call: of (module, x [m, SIZE]).
        columns: the weight is stored [k, n].
    """

    call: Callable[[Any, Tensor], Tensor]
    columns: bool = False


SPELLINGS: dict[str, Spelling] = {
    "linear": Spelling(lambda s, x: F.linear(x, s.w)),
    "linear with bias": Spelling(lambda s, x: F.linear(x, s.w, s.b)),
    "linear by keyword": Spelling(lambda s, x: F.linear(weight=s.w, bias=s.b, input=x)),
    "at": Spelling(lambda s, x: x @ s.w, True),
    "at a transpose": Spelling(lambda s, x: x @ s.w.T),
    "at mT": Spelling(lambda s, x: x @ s.w.mT),
    "weight first": Spelling(lambda s, x: (s.w @ x.T).T),
    "matmul": Spelling(lambda s, x: torch.matmul(x, s.w), True),
    "matmul by keyword": Spelling(lambda s, x: torch.matmul(other=s.w, input=x), True),
    "matmul of both turned": Spelling(lambda s, x: torch.matmul(s.w, torch.transpose(x, dim0=1, dim1=0)).t()),
    "mm by keyword": Spelling(lambda s, x: torch.mm(mat2=s.w, input=x), True),
    "method by keyword": Spelling(lambda s, x: x.matmul(other=s.w), True),
    "addmm": Spelling(lambda s, x: torch.addmm(s.b, x, s.w), True),
    "addmm by keyword": Spelling(lambda s, x: torch.addmm(mat2=s.w, mat1=x, input=s.b), True),
    "addmm scaled": Spelling(lambda s, x: torch.addmm(s.b, x, s.w, beta=2, alpha=3), True),
    "linalg": Spelling(lambda s, x: torch.linalg.matmul(x, s.w), True),
    "einsum": Spelling(lambda s, x: torch.einsum("mk,nk->mn", x, s.w)),
    "einsum, columns": Spelling(lambda s, x: torch.einsum("...k,kn->...n", x, s.w), True),
    "einsum, weight first": Spelling(lambda s, x: torch.einsum("nk,mk->mn", s.w, x)),
    "inner": Spelling(lambda s, x: torch.inner(x, s.w)),
    "tensordot": Spelling(lambda s, x: torch.tensordot(x, s.w, dims=([1], [1]))),
    "bmm": Spelling(lambda s, x: torch.bmm(x[None], s.w[None])[0], True),
    "convolution": Spelling(lambda s, x: F.conv1d(x.T[None], s.w[:, :, None])[0].T),
    "by hand": Spelling(lambda s, x: (x[:, None] * s.w).sum(-1)),
    "joined": Spelling(lambda s, x: F.linear(x, torch.cat((s.w[:8], s.w[8:])))),
    "chunks": Spelling(lambda s, x: torch.cat([F.linear(x, w) for w in s.w.chunk(2)], -1)),
    "between": Spelling(lambda s, x: F.linear(x, torch.lerp(s.w, s.w * 2, 0.5))),
    "checkpoint": Spelling(lambda s, x: checkpoint(lambda y: F.linear(y, s.w), x, use_reentrant=False)),
    "cond": Spelling(
        lambda s, x: torch.cond(x.sum() > 0, lambda y: F.linear(y, s.w), lambda y: F.linear(y, s.w) * 2, (x,))
    ),
    "vmap": Spelling(lambda s, x: torch.vmap(lambda y: F.linear(y, s.w))(x)),
    "disabled": Spelling(lambda s, x: torch.compiler.disable(F.linear)(x, s.w)),
}


class Layer(nn.Module):
    """One spelling over its own weight."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(SIZE, SIZE) / 4)
        self.b = nn.Parameter(torch.randn(SIZE))
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        return SPELLINGS[self.spelling].call(self, x)


def normed(layer: nn.Module) -> nn.Module:
    return parametrizations.weight_norm(layer, "w")


def turned(layer: nn.Module) -> nn.Module:
    return parametrizations.orthogonal(layer, "w")


HOLDERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda layer: layer,
    "sequential": lambda layer: nn.Sequential(layer, nn.Identity()),
    "compiled": lambda layer: torch.compile(layer, backend="eager"),  # type: ignore[dict-item, return-value]
    "weight norm": normed,
    "orthogonal": turned,
}


class Model(nn.Module):
    """Layers one after the other, each in its holder, with residuals."""

    def __init__(self, parts: list[tuple[str, str]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(HOLDERS[holder](Layer(spelling)) for spelling, holder in parts)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def rounded(model: nn.Module) -> nn.Module:
    """A copy whose weights are int8 codes of each output's row, times its scale."""
    made = copy.deepcopy(model)
    for layer in made.modules():
        if isinstance(layer, Layer) and "w" in layer._parameters:
            axis = 0 if SPELLINGS[layer.spelling].columns else 1
            scale = layer.w.data.abs().amax(axis, keepdim=True) / 127
            layer.w.data = (layer.w.data / scale).round() * scale
    return made


PARTS = st.lists(
    st.tuples(st.sampled_from(sorted(SPELLINGS)), st.sampled_from(sorted(HOLDERS))), min_size=1, max_size=3
)


def check(parts: list[tuple[str, str]]) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model(parts).eval().requires_grad_(False)
    wanted, x = rounded(model), torch.randn(3, SIZE)
    names = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
    with torch.no_grad():
        expected, plain = wanted(x), model(x)
    quant_compile.compile(model, STRICT, kernels="reference")
    try:
        with torch.no_grad():
            found = model(x)
    except Exception as error:
        text = str(error)
        assert "Fix: " in text and any(
            name.replace("._orig_mod", "") in text.replace("._orig_mod", "") for name in names
        ), text
        return
    report = quant_compile.report(model)
    assert report.coverage == 1.0 and not report.skips
    assert float((found - expected).norm() / expected.norm()) < 1e-4, parts
    assert float((found - plain).norm() / plain.norm()) > 1e-4, parts


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_each_spelling(spelling: str, plain_inductor: CompileCounter) -> None:
    check([(spelling, "plain")])


@pytest.mark.parametrize("holder", HOLDERS)
def test_each_holder(holder: str, plain_inductor: CompileCounter) -> None:
    check([("linear", holder)])


# The first fault of a kind that is found comes back as an example.
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(parts=PARTS)
@example(parts=[("matmul by keyword", "plain"), ("chunks", "sequential")])
@example(parts=[("linear", "plain"), ("disabled", "plain")])
def test_random_modules(parts: list[tuple[str, str]], plain_inductor: CompileCounter) -> None:
    check(parts)
