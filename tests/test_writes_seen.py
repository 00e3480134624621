"""Writes into what linears read, however they are spelled: no read moves across one, and no weight is read as it was before one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quant_compile
from tests.ir.tracing import Holder
from tests.moe_support import one_thread
from tests.runtime_support import CompileCounter, plain_inductor

__all__ = ["one_thread", "plain_inductor"]
pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = 32


@torch.library.custom_op("sglquant_tests::triple", mutates_args=("x",))
def triple(x: Tensor) -> Tensor:
    x.mul_(3)
    return x.sum()


@triple.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(())


@torch.compiler.allow_in_graph
def allowed(x: Tensor) -> Tensor:
    x.mul_(3)
    return x.sum()


def in_a_branch(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > -1e9, lambda z: (z.mul_(3), z.sum())[1], lambda z: z.sum() * 1.0, (x,))


WRITERS: dict[str, Callable[[Tensor], Any]] = {
    "a method": lambda x: x.mul_(3),
    "a dunder": lambda x: x.__imul__(3),
    "an item": lambda x: x.__setitem__(slice(None), x * 3),
    "a custom op": triple,
    "a custom op without its overload": lambda x: torch.ops.sglquant_tests.triple(x),
    "a branch": in_a_branch,
    "a function that Dynamo leaves alone": allowed,
    "out=": lambda x: torch.mul(x, 3, out=x),
}


@pytest.mark.parametrize("policy", ["W8A16", "W8A8"])
@pytest.mark.parametrize("writer", WRITERS)
def test_an_input_that_is_written_between_two_linears(writer: str, policy: str, plain_inductor: CompileCounter) -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        z = x.clone()
        first = F.linear(z, s.W)
        WRITERS[writer](z)
        return first + F.linear(z, s.V)

    check(run, policy)


EDITS: dict[str, Callable[[Any], Tensor]] = {
    "a copy": lambda s: (w := s.W.clone(), w[::2].zero_())[0],
    "a copy that is copied again": lambda s: (w := s.W.clone(), w[::2].zero_())[0].clone(),
    "a copy, turned": lambda s: (w := s.W.clone(), w[::2].zero_())[0].t().contiguous().t(),
    "a copy, in place by a dunder": lambda s: (w := s.W.clone(), w.__imul__(-2))[0],
    "a copy of another type and back": lambda s: (w := s.W.double(), w[::2].zero_())[0].float(),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_weight_whose_copy_is_edited(edit: str, plain_inductor: CompileCounter) -> None:
    check(lambda s, x: F.linear(x, EDITS[edit](s)), "W8A16")


@pytest.mark.parametrize("written", ["copied", "added", "through a view"])
def test_a_bias_that_is_written_between_siblings(written: str, plain_inductor: CompileCounter) -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        first = F.linear(x, s.W, s.b)
        if written == "copied":
            s.c.copy_(x[0])
        elif written == "added":
            s.c.add_(x[0])
        else:
            s.c[:8].fill_(5.0)
        return first + F.linear(x, s.V, s.c)

    check(run, "W8A16", calls=2)


def test_an_embedding_that_scales_its_rows(plain_inductor: CompileCounter) -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        rows = F.embedding(torch.arange(4), s.W, max_norm=0.1)
        return F.linear(x + rows.sum(), s.W)

    check(run, "W8A16", calls=2)


INTO: dict[str, Callable[[Any, Tensor], Any]] = {
    "copy_": lambda s, b: b.copy_(s.W),
    "an item": lambda s, b: b.__setitem__(slice(None), s.W),
    "out=": lambda s, b: torch.mul(s.W, 1.0, out=b),
    "cat": lambda s, b: torch.cat([s.W[:8], s.W[8:]], out=b),
}


@pytest.mark.parametrize("way", INTO)
@pytest.mark.parametrize("buffer", ["new", "registered"])
def test_a_weight_that_is_written_into_another_tensor_is_no_silence(
    way: str, buffer: str, plain_inductor: CompileCounter
) -> None:
    class Copies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Linear(SIZE, SIZE, bias=False)
            self.register_buffer("held", torch.zeros(SIZE, SIZE))

        def forward(self, x: Tensor) -> Tensor:
            into: Any = self.held if buffer == "registered" else torch.zeros(SIZE, SIZE)
            INTO[way](Names(self.own.weight), into)
            return F.linear(self.own(x), into)

    torch._dynamo.reset()
    model, x = Copies().eval().requires_grad_(False), torch.randn(3, SIZE)
    quant_compile.compile(model, "W8A16", kernels="reference")
    with torch.no_grad():
        model(x)
    report = quant_compile.report(model)
    assert report.coverage < 1 and [name for name, _ in report.skips] == ["own.weight"]
    torch._dynamo.reset()
    strict = Copies().eval().requires_grad_(False)
    quant_compile.compile(strict, {"default": "W8A16", "strict": True}, kernels="reference")
    with torch.no_grad(), pytest.raises(Exception, match=r"own\.weight"):
        strict(x)


class Names:
    def __init__(self, weight: Tensor) -> None:
        self.W = weight


def check(run: Callable[[Any, Tensor], Tensor], policy: str, calls: int = 1) -> None:
    """Within rounding of the eager model at each of several calls; a read on the wrong side of a write is off by a third and more."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    values = {name: torch.randn(SIZE, SIZE) for name in "WV"} | {name: torch.randn(SIZE) for name in "bc"}
    plain, model = (Holder(run, **{k: v.clone() for k, v in values.items()}).eval() for _ in range(2))
    quant_compile.compile(model, policy, kernels="reference")
    for seed in range(calls):
        x = torch.randn(4, SIZE, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            wanted, found = plain(x), model(x)
        assert float((found - wanted).norm() / wanted.norm()) < 5e-2
