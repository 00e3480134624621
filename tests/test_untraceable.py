"""Graphs that Inductor cannot trace: without quantized weights they run as they were traced, with them an error names the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quant_compile
from quant_compile.ir.errors import GraphError
from tests.moe_support import one_thread
from tests.runtime_support import bf16, inner_error, reference_linear

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")
STRICT = {"default": "W8A8", "strict": True}


def positions(most: Tensor) -> Tensor:
    """A size that is the value of a tensor, which Dynamo traces and Inductor does not."""
    return torch.arange(most)


class Around(nn.Module):
    """Linears in the same frame, before and after a piece that cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor, most: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        count = positions(most)
        torch._dynamo.graph_break()
        return self.last(x) + count.sum()


class Inside(nn.Module):
    """The linear and the size in one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 16)

    def forward(self, x: Tensor, most: Tensor) -> Tensor:
        return self.linear(x) + positions(most).sum()


class Nested(Around):
    """The piece is a function of its own."""

    def count(self, most: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return positions(most)

    def forward(self, x: Tensor, most: Tensor) -> Tensor:
        return self.last(self.first(x)) + self.count(most).sum()


def by_package(model: nn.Module, policy: Any) -> Callable[..., Any]:
    return quant_compile.compile(model, policy)


def by_torch(model: nn.Module, policy: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="sglquant", options={"policy": policy})


@pytest.mark.parametrize("door", [by_package, by_torch])
@pytest.mark.parametrize("kind", [Around, Nested])
def test_a_piece_without_weights_runs_as_traced_and_all_linears_are_quantized(door: Any, kind: Any) -> None:
    model, x = kind().bfloat16().requires_grad_(False), bf16(3, 32)
    most = torch.tensor(3)
    hidden = reference_linear(x, model.first, "W8A8")
    wanted = reference_linear(hidden, model.last, "W8A8") + 3
    run = door(model, STRICT)
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(run(x, most), wanted, rtol=2e-2, atol=2e-2)  # one step of bf16 at 3
    report = quant_compile.report(model)
    assert report.coverage == 1.0 and not report.skips


@pytest.mark.parametrize("door", [by_package, by_torch])
def test_a_piece_with_a_quantized_weight_is_an_error_that_names_it(door: Any) -> None:
    model, x, most = Inside().bfloat16().requires_grad_(False), bf16(3, 32), torch.tensor(3)
    plain = copy.deepcopy(model)
    run = door(model, STRICT)
    with torch.inference_mode(), pytest.raises(Exception, match=r"linear\.weight") as caught:
        run(x, most)
    assert isinstance(inner_error(caught.value), GraphError)
    assert "Fix:" in str(caught.value) and "keep" in str(caught.value)
    torch._dynamo.reset()  # and the fix works
    kept = door(model, {"default": "W8A8", "rules": [{"match": "linear", "scheme": "keep"}]})
    with torch.inference_mode():
        torch.testing.assert_close(kept(x, most), plain(x, most))
