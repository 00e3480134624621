"""Every read of a matrix is a site or has a name, whatever matchers know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quant_compile
from quant_compile.ir import batched, experts, sites
from quant_compile.ir.account import Use, account, plain_name
from quant_compile.ir.inline import inline
from tests.ir.tracing import Holder, trace
from tests.runtime_support import CompileCounter, plain_inductor

__all__ = ["plain_inductor"]
W, X = torch.randn(16, 16), torch.randn(3, 16)

# what a forward does -> the one way in which the account says that W is read; None: a site
FORMS: dict[str, tuple[Callable[..., Any], Use | None]] = {
    "linear": (lambda s, x: F.linear(x, s.W), None),
    "a linear of another weight": (lambda s, x: F.linear(s.V, s.W), None),
    "a linear over a sum of weights": (lambda s, x: F.linear(x, s.W + s.V), Use.PRODUCT),
    "a linear over joined weights": (lambda s, x: F.linear(x, torch.cat((s.W, s.V))), Use.PRODUCT),
    "a linear between two weights": (lambda s, x: F.linear(x, torch.lerp(s.W, s.V, 0.3)), Use.PRODUCT),
    "a product of weights first": (lambda s, x: x @ (s.V @ s.W), Use.PRODUCT),
    "a normalised weight": (lambda s, x: F.linear(x, F.normalize(s.W, dim=1)), Use.PRODUCT),
    "masked by a buffer": (lambda s, x: F.linear(x, s.W * s.mask), Use.PRODUCT),
    "masked by an input": (lambda s, x: F.linear(x, torch.where(x[0] > 0, s.W, 0.0)), Use.PRODUCT),
    "distances": (lambda s, x: torch.cdist(x, s.W), Use.PRODUCT),
    "outer products": (lambda s, x: torch.kron(x, s.W), Use.PRODUCT),
    "attention over it": (lambda s, x: F.scaled_dot_product_attention(x[None], s.W[None], s.W[None]), Use.PRODUCT),
    "rows looked up": (lambda s, x: s.W[x.argmax(-1)], Use.TABLE),
    "an embedding": (lambda s, x: F.embedding(x.argmax(-1), s.W), Use.TABLE),
    "a convolution": (lambda s, x: F.conv1d(x[None, :, :], s.W[:, :3, None].expand(16, 3, 2)), Use.CONVOLUTION),
    "products summed by hand": (lambda s, x: (x[:, None, :] * s.W).sum(-1), Use.PRODUCT),
    "added": (lambda s, x: x[:, None] + s.W, Use.OTHER),
    "in a branch": (
        lambda s, x: torch.cond(x.sum() > 0, lambda y: F.linear(y, s.W), lambda y: F.linear(y, s.W) + 1, (x,)),
        Use.PRODUCT,
    ),
    "looked up in a branch": (
        lambda s, x: torch.cond(
            x.sum() > 0, lambda y: s.W[y.argmax(-1)] + 0.0, lambda y: s.W[y.argmin(-1)] + 0.0, (x,)
        ),
        Use.TABLE,
    ),
    "given away": (lambda s, x: (x + 1, s.W.float() * 2), Use.RETURNED),
}


@pytest.mark.parametrize("form", FORMS)
def test_how_a_weight_is_read(form: str) -> None:
    function, use = FORMS[form]
    module = Holder(function, W=W.clone(), V=W.clone())
    module.register_buffer("mask", torch.ones(16, 16))
    traced = trace(module, X)
    reads = account(traced.gm, traced.parameters, [(site.node, site.slot) for site in traced.sites], ())
    uses = {read.use for read in reads if traced.names[read.slot] == "W"}
    assert uses == (set[Use]() if use is None else {use})
    assert all(read.reason for read in reads)


def test_bodies_of_wrappers_become_part_of_the_graph() -> None:
    from torch.utils.checkpoint import checkpoint

    def nested(s: Any, x: torch.Tensor) -> torch.Tensor:
        def inner(y: torch.Tensor) -> torch.Tensor:
            return torch.relu(F.linear(y, s.W))

        def outer(y: torch.Tensor) -> torch.Tensor:
            return F.linear(checkpoint(inner, y, use_reentrant=False), s.V)

        return checkpoint(outer, x, use_reentrant=False) + 1

    module = Holder(nested, W=W.clone(), V=torch.randn(8, 16))
    traced = trace(module, X)
    opened = inline(traced.gm)
    found, _ = sites.find_sites(opened, traced.parameters)
    assert {traced.names[site.slot] for site in found} == {"W", "V"}
    with torch.no_grad():
        torch.testing.assert_close(opened(*traced.arguments)[0], module(X))


class Attends(nn.Module):
    """Attention of torch's own, as its users call it."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=how.pop("batch_first", True), **how)
        self.call: dict[str, Any] = {}

    def forward(self, x: torch.Tensor) -> Any:
        return self.attention(x, x, x, **self.call)[0]


def encoder(**how: Any) -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, **how), 2)


def attends(call: dict[str, Any], **how: Any) -> nn.Module:
    made = Attends(**how)
    made.call = call
    return made


ATTENTION: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: attends({"need_weights": False}),
    "attention with its weights": lambda: attends({}),
    "attention, sequence first": lambda: attends({}, batch_first=False),
    "attention without bias": lambda: attends({"need_weights": False}, bias=False),
    "causal": lambda: attends({"attn_mask": torch.ones(5, 5).triu(1).bool(), "need_weights": False}),
    "padded": lambda: attends({"key_padding_mask": torch.tensor([[False] * 4 + [True]] * 2), "need_weights": False}),
    "encoder": encoder,
    "encoder, norm first": lambda: encoder(norm_first=True),
    "encoder with gelu": lambda: encoder(activation="gelu"),
    "decoder": lambda: Decodes(),
    "a learned query": lambda: Pools(),
    "learned queries, as many as rows": lambda: Pools(rows=3, expanded=True),
}


class Decodes(nn.Module):
    """Self-attention, and cross-attention with other keys than queries, whose joint projection is read in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(32, 4, 64, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, x)


class Pools(nn.Module):
    """Attention of learned queries over the input: a linear between two Parameters, one of them a slice of the joint projection."""

    def __init__(self, rows: int = 1, expanded: bool = False) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, rows, 32))
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.expanded = expanded

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count = x.shape[0]
        queries = self.queries.expand(count, -1, -1) if self.expanded else self.queries.repeat(count, 1, 1)
        return self.attention(queries, x, x)[0]


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_attention_of_torch_is_quantized(name: str, mode: Any, plain_inductor: CompileCounter) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = ATTENTION[name]().eval().requires_grad_(False)
    x = torch.randn(2, 5, 32)
    wanted = ATTENTION[name]().eval().requires_grad_(False)
    wanted.load_state_dict(model.state_dict())
    plain = wanted(x)
    for module in wanted.modules():
        for attribute in ("weight", "in_proj_weight"):
            value = module._parameters.get(attribute)
            if value is not None and value.dim() == 2:
                value.data = int8_rows(value.data)
    quant_compile.compile(model, "W8A16", kernels="reference")
    with mode():
        found = model(x)
    report = quant_compile.report(model)
    assert report.coverage == 1.0 and not report.skips
    torch.testing.assert_close(found, wanted(x), rtol=1e-4, atol=1e-5)
    assert (found - plain).abs().max() > 1e-4


def int8_rows(w: torch.Tensor) -> torch.Tensor:
    scale = w.abs().amax(1, keepdim=True) / 127
    return (w / scale).round() * scale


FORGOTTEN: dict[str, Callable[..., Any]] = {
    "linear": lambda s, x: F.linear(x, s.W),
    "addmm": lambda s, x: torch.addmm(s.b, x, s.W),
    "matmul": lambda s, x: x @ s.W,
    "einsum": lambda s, x: torch.einsum("mk,nk->mn", x, s.W),
    "inner": lambda s, x: torch.inner(x, s.W),
}


@pytest.mark.parametrize("op", FORGOTTEN)
def test_a_matcher_that_is_off_lowers_the_coverage(
    op: str, monkeypatch: pytest.MonkeyPatch, plain_inductor: CompileCounter
) -> None:
    function = FORGOTTEN[op]
    torch._dynamo.reset()
    module = Holder(function, W=W.clone(), b=torch.randn(16)).eval()
    quant_compile.compile(module, "W8A16", kernels="reference")
    with torch.no_grad():
        module(X)
        assert quant_compile.report(module).coverage == 1.0
        torch._dynamo.reset()
        known = sites.product_of
        monkeypatch.setattr(sites, "product_of", lambda node: None if plain_name(node) == op else known(node))
        blind = Holder(function, W=W.clone(), b=torch.randn(16)).eval()
        quant_compile.compile(blind, "W8A16", kernels="reference")
        torch.testing.assert_close(blind(X), function(blind, X))
    report = quant_compile.report(blind)
    assert report.coverage == 0.0 and report.skips[0][0] == "W" and op in report.skips[0][1]


@pytest.mark.parametrize("where", [experts, batched])
def test_experts_that_nobody_looks_for_lower_the_coverage(
    where: Any, monkeypatch: pytest.MonkeyPatch, plain_inductor: CompileCounter
) -> None:
    from quant_compile.runtime import decide

    def dense(s: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("tk,enk->etn", x, s.experts).sum(0)

    monkeypatch.setattr(decide, "find_batched", lambda *_, **__: [])
    monkeypatch.setattr(decide, "find_experts", lambda *_, **__: ([], []))
    module = Holder(dense, experts=torch.randn(4, 8, 16)).eval()
    quant_compile.compile(module, "W8A16", kernels="reference")
    with torch.no_grad():
        module(X)
    report = quant_compile.report(module)
    assert report.coverage == 0.0 and report.skips[0][0] == "experts"
