"""Experts written by hand, all computed densely: bmm, matmul and einsum over Parameters [E, n, k] are quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

import quant_compile
from quant_compile.ir.batched import BatchedSite, find_batched
from quant_compile.ir.family import family_of
from quant_compile.ir.graph import copy_graph
from quant_compile.ir.scheme import parse
from tests.runtime_support import CompileCounter, plain_inductor

__all__ = ["plain_inductor"]
EXPERTS, HIDDEN, INNER, TOKENS = 3, 32, 48, 5
Product = Callable[[Tensor, Tensor], Tensor]


class Dense(nn.Module):
    """Every expert for every token, mixed by a router; ``gate`` is stored [E, n, k], ``up`` [E, k, n]."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        torch.manual_seed(3)
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.gate = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) * 0.2)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) * 0.2)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        if self.form == "einsum":
            gate, up = torch.einsum("td,eid->tei", x, self.gate), torch.einsum("td,edi->tei", x, self.up)
            return (torch.einsum("tei,edi->ted", silu(gate) * up, self.down) * scores.unsqueeze(-1)).sum(1)
        if self.form == "bmm":
            rows = x.expand(EXPERTS, *x.shape)
            gate, up = torch.bmm(rows, self.gate.transpose(1, 2)), torch.bmm(rows, self.up)
            y = torch.bmm(silu(gate) * up, self.down.transpose(-1, -2))
        elif self.form == "left":
            gate, up = (self.gate @ x.t()).mT, x @ self.up
            y = torch.matmul(silu(gate) * up, self.down.mT)
        else:
            y = (silu(x @ self.gate.mT) * (x @ self.up)) @ self.down.mT
        return (y * scores.t().unsqueeze(-1)).sum(0)


def quantized(model: Dense, spec: str, x: Tensor) -> Tensor:
    """The same block from the scheme's own functions, expert by expert."""
    scheme = parse(spec)
    family = family_of(scheme)

    def times(rows: Tensor, weight: Tensor) -> Tensor:
        planes = (rows,) if scheme.input_activations is None else family.quantize_input(rows, scheme, None)
        return family.linear(planes, family.quantize_weight(weight, scheme), None, scheme, rows.dtype)

    scores = model.router(x).softmax(-1)  # kept by convention
    total = torch.zeros_like(x)
    for e in range(EXPERTS):
        hidden = silu(times(x, model.gate[e])) * times(x, model.up[e].t().contiguous())
        total += times(hidden, model.down[e]) * scores[:, e : e + 1]
    return total


@pytest.mark.parametrize("spec", ["FP8_DYNAMIC", "W8A8", "FP8_BLOCK", "W4A16", "W8A16"])
@pytest.mark.parametrize("form", ["einsum", "bmm", "matmul", "left"])
def test_products_with_all_experts(form: str, spec: str, plain_inductor: CompileCounter) -> None:
    model, x = Dense(form).eval(), torch.randn(TOKENS, HIDDEN)
    with torch.no_grad():
        quant_compile.compile(model, spec)
        found, again = model(x), model(x)
        wanted = quantized(model, spec, x)
    assert float((found - wanted).norm() / wanted.norm()) <= 1e-3 and torch.equal(found, again)
    report = quant_compile.report(model).require(1.0)
    experts = [line for line in report.lines if line.names[0] != "router.weight"]
    assert [line.scheme for line in experts] == [parse(spec).spec] * 3 and not report.misses
    assert all(line.bytes_after < line.bytes_before for line in experts)
    with torch.no_grad():
        model.down.mul_(-2)
        assert float((model(x) - quantized(model, spec, x)).norm() / wanted.norm()) <= 2e-3, "an update is seen"


def test_a_wrong_expert_is_seen() -> None:
    """The bound above tells experts apart."""
    model, x = Dense("bmm").eval(), torch.randn(TOKENS, HIDDEN)
    with torch.no_grad():
        wanted = quantized(model, "W8A8", x)
        model.down[1].mul_(1.05)
        assert float((quantized(model, "W8A8", x) - wanted).norm() / wanted.norm()) > 5e-3


def sites_of(function: Callable[..., Any], *inputs: Tensor) -> list[BatchedSite]:
    found: list[BatchedSite] = []

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN))

        def forward(self, *values: Tensor) -> Any:
            return function(self.w, *values)

    def backend(gm: torch.fx.GraphModule, values: list[Any]) -> Any:
        parameters = {i: v for i, v in enumerate(values) if isinstance(v, nn.Parameter)}
        found.extend(find_batched(copy_graph(gm), parameters, ()))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(Module(), backend=backend, fullgraph=True)(*inputs)
    return found


@pytest.mark.parametrize(
    ("function", "letters"),
    [
        (lambda w, x: torch.einsum("bshd,eid->bhsei", x, w), ("012k", "021en")),
        (lambda w, x: torch.einsum("eid,bsgd->ebsgi", w, x), ("012k", "e012n")),
        (lambda w, x: x[0] @ w.mT, ("0k", "e0n")),
    ],
)
def test_letters(function: Callable[..., Any], letters: tuple[str, str]) -> None:
    x = torch.randn(2, 4, 3, HIDDEN) if "2" in letters[0] else torch.randn(1, 4, HIDDEN)
    sites = sites_of(function, x)
    assert [(s.x_letters, s.out_letters) for s in sites] == [letters]
    assert (sites[0].experts, sites[0].n, sites[0].k, sites[0].transposed) == (EXPERTS, INNER, HIDDEN, False)


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: torch.einsum("td,eid->ti", x, w),  # summed over experts
        lambda w, x: torch.einsum("td,eid->te", x, w),  # and over n
        lambda w, x: torch.einsum("eid,eid->ei", w, w),
        lambda w, x: torch.einsum("...d,eid->...ei", x, w),
        lambda w, x: torch.bmm(w, w.mT),
        lambda w, x: x @ (w * 2).mT,
    ],
)
def test_other_products_are_left_alone(function: Callable[..., Any]) -> None:
    assert sites_of(function, torch.randn(TOKENS, HIDDEN)) == []


def test_kept_by_a_rule_and_refused_products_are_in_the_ledger(plain_inductor: CompileCounter) -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("td,eid->ti", x, self.w)

    with torch.no_grad():
        model = Summed().eval()
        quant_compile.compile(model, "W8A8")
        model(torch.randn(TOKENS, HIDDEN))
        (name, reason), *_ = quant_compile.report(model).skips
        assert name == "w" and "einsum" in reason
        kept = Dense("bmm").eval()
        policy = {"default": "W8A8", "rules": [{"match": "up", "scheme": "keep"}, {"match": "down", "scheme": "keep"}]}
        quant_compile.compile(kept, policy)
        kept(torch.randn(TOKENS, HIDDEN))
    lines = quant_compile.report(kept).lines
    assert {line.names[0]: line.scheme for line in lines} == {
        "gate": "W8A8", "up": None, "down": None, "router.weight": None,
    }  # fmt: skip


def test_a_strict_policy_may_name_weights_that_only_tracing_finds(plain_inductor: CompileCounter) -> None:
    """Parameters that a product reads need no module named like experts, and no name that ends in weight."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixed = Dense("matmul")
            self.turn = nn.Parameter(torch.randn(HIDDEN, HIDDEN) * 0.2)

        def forward(self, x: Tensor) -> Tensor:
            return self.mixed(x @ self.turn)

    policy = {
        "strict": True,
        "default": "keep",
        "rules": [{"match": "mixed.down", "scheme": "W8A16"}, {"match": "turn", "scheme": "W8A8"}],
    }
    model, x = Model(), torch.randn(TOKENS, HIDDEN)
    with torch.no_grad():
        quant_compile.compile(model, policy, kernels="reference")(x)
    schemes = {line.names[0]: line.scheme for line in quant_compile.report(model).lines}
    assert schemes == {
        "mixed.router.weight": None, "mixed.gate": None, "mixed.up": None, "mixed.down": "W8A16", "turn": "W8A8",
    }  # fmt: skip


# name -> (product with slice 1 of w, how w is stored, is a slice [k, n])
SLICES: dict[str, tuple[Callable[..., Tensor], str, bool]] = {
    "F.linear": (lambda w, x: torch.nn.functional.linear(x, w[1]), "enk", False),
    "matmul": (lambda w, x: x @ w[1], "ekn", True),
    "transposed": (lambda w, x: x @ w.transpose(1, 2)[1], "enk", False),
    "slice, then transposed": (lambda w, x: x @ w[1].t(), "enk", False),
    "negative": (lambda w, x: x @ w[-2, :, :], "ekn", True),
    "select": (lambda w, x: x @ torch.select(w, index=1, dim=0), "ekn", True),
    "unbind": (lambda w, x: x @ w.unbind()[1], "ekn", True),
    "chunk": (lambda w, x: x @ w.chunk(EXPERTS)[1].squeeze(0), "ekn", True),
    "rows of a matrix": (lambda w, x: x @ w.view(EXPERTS, HIDDEN, INNER)[1], "ek n", True),
    "narrow": (lambda w, x: x @ w.narrow(0, 1, 1)[0], "ekn", True),
    "a tensor says which": (lambda w, x: x @ w[torch.ones(1, dtype=torch.long)][0], "ekn", True),
    "index_select": (
        lambda w, x: x @ torch.index_select(w, 0, torch.ones(1, dtype=torch.long)).squeeze(0),
        "ekn",
        True,
    ),
}


@pytest.mark.parametrize("spec", ["W8A16", "FP8_BLOCK", "W4A16"])
@pytest.mark.parametrize("form", SLICES)
def test_one_expert_of_a_parameter(form: str, spec: str, plain_inductor: CompileCounter) -> None:
    """Experts that are gone over one by one are quantized with the planes of all; a slice is not packed by itself."""
    function, order, transposed = SLICES[form]

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5)
            shape = (EXPERTS, INNER, HIDDEN) if order == "enk" else (EXPERTS, HIDDEN, INNER)
            stored = torch.randn(shape) * 0.2
            self.w = nn.Parameter(stored.flatten(0, 1) if " " in order else stored, requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return function(self.w, x)

    model, x = Module().eval(), torch.randn(2, TOKENS, HIDDEN)
    scheme = parse(spec)
    family = family_of(scheme)
    with torch.inference_mode():
        expert = model.w.reshape(EXPERTS, *(model.w.shape[-2:] if model.w.dim() == 3 else (HIDDEN, INNER)))[1]
        expert = expert.t().contiguous() if transposed else expert.contiguous()
        planes = (x,) if scheme.input_activations is None else family.quantize_input(x, scheme, None)
        wanted = family.linear(planes, family.quantize_weight(expert, scheme), None, scheme, x.dtype)
        plain = model(x)
        quant_compile.compile(model, {"default": spec, "strict": True})
        found = model(x)
    assert float((found - wanted).norm() / wanted.norm()) <= 1e-5
    assert float((found - plain).norm() / plain.norm()) > 1e-4, "nothing was quantized"
    (line,) = quant_compile.report(model).require(1.0).lines
    assert line.scheme == scheme.spec and line.bytes_after < line.bytes_before


def test_a_loop_over_all_experts_is_quantized(plain_inductor: CompileCounter) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) * 0.2)
            self.b = nn.Parameter(torch.randn(EXPERTS, INNER))

        def forward(self, x: Tensor) -> Tensor:
            parts = x.chunk(EXPERTS)
            return torch.cat([torch.nn.functional.linear(parts[i], self.w[i], self.b[i]) for i in range(EXPERTS)])

    model, x = Loop().eval(), torch.randn(2 * EXPERTS, HIDDEN)
    with torch.no_grad():
        plain = model(x)
        quant_compile.compile(model, "W8A16", release_weights=True)
        found = model(x)
    report = quant_compile.report(model).require(1.0)
    assert 1e-4 < float((found - plain).norm() / plain.norm()) < 0.02 and not report.misses
    assert next(line for line in report.lines if line.names[0] == "w").released


def test_slices_that_are_cut_outside_of_the_graph_are_named(plain_inductor: CompileCounter) -> None:
    """A loop that Dynamo does not enter calls a compiled function with slices: their Parameter is no input of any graph."""

    class Expert(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return x @ w.t()

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(EXPERTS * INNER, HIDDEN) * 0.2)
            self.one = Expert()

        def forward(self, x: Tensor) -> Tensor:
            total = torch.zeros(x.shape[0], INNER)
            for (i,) in torch.nonzero(x.sum() * 0 == torch.zeros(EXPERTS)):
                total = total + self.one(x, self.w.view(EXPERTS, INNER, HIDDEN)[i])
            return total

    model, x = Loop().eval(), torch.randn(TOKENS, HIDDEN)
    with torch.no_grad():
        quant_compile.compile(model, "W8A16")
        model(x)
        report = quant_compile.report(model)
        assert report.coverage == 0.0 and [name for name, _ in report.skips] == ["w"]
        assert "a slice of the weight is taken outside" in report.skips[0][1] and report.policy == "W8A16"
        quant_compile.uncompile(model)
        torch._dynamo.reset()
        quant_compile.compile(model, {"default": "W8A16", "strict": True})
        with pytest.raises(Exception, match="w: a slice of the weight is taken outside"):
            model(x)


@pytest.mark.parametrize("equation", ["bhd,hdk->bhk", "bhd,hkd->bhk"])
def test_one_matrix_for_each_head(equation: str) -> None:
    x = torch.randn(TOKENS, EXPERTS, HIDDEN if equation.endswith("hkd->bhk") else INNER)
    (site,) = sites_of(lambda w, x: torch.einsum(equation, x, w), x)
    assert (site.x_letters, site.out_letters) == ("0ek", "0en")


def test_an_input_that_all_experts_share_may_have_their_dimension() -> None:
    """[b, 1, t, k] times [E, k, n], as matmul widens it."""
    (site,) = sites_of(lambda w, x: x.unsqueeze(1) @ w.mT, torch.randn(2, TOKENS, HIDDEN))
    assert (site.x_letters, site.out_letters, site.squeezed) == ("01k", "0e1n", (1,))


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: torch.bmm(mat2=w.mT, input=x),
        lambda w, x: x.bmm(mat2=w.transpose(dim0=-1, dim1=1)),
        lambda w, x: torch.einsum("enk,emk->emn", [w, x]),
        lambda w, x: torch.baddbmm(batch1=x, batch2=w.permute(dims=(0, 2, 1)), input=torch.zeros(INNER)),
        lambda w, x: torch.matmul(other=w.swapaxes(1, 2), input=x),
    ],
)
def test_operands_by_name(function: Callable[..., Any]) -> None:
    (site,) = sites_of(function, torch.randn(EXPERTS, TOKENS, HIDDEN))
    assert (site.x_letters, site.out_letters, site.transposed) == ("e0k", "e0n", False)
