"""What is no expert block, or one that ``sglq.moe`` cannot compute, stays as it is, with a reason; and nothing is ever misread.

``Seen`` of test_experts.py traces a block and runs the graph with every site replaced: a variation is either refused, or
what it became is compared with what it computes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant_compile.ir import probe as probe_module
from quant_compile.ir.experts import find_experts
from quant_compile.ir.graph import copy_graph
from quant_compile.ir.moe import Activation
from tests.ir.test_experts import Seen, difference
from tests.moe_support import TinyExperts, TinyMoe, gated_silu, one_thread

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

Forward = Callable[..., Any]


class Varied(TinyExperts):
    """The block with another forward."""

    def __init__(self, forward: Forward | None = None, **more: Any) -> None:
        super().__init__(**more)
        self.varied = forward

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, *more: Any) -> Any:
        return super().forward(x, ids, weights) if self.varied is None else self.varied(self, x, ids, weights, *more)


class Around(nn.Module):
    """The block as a submodule."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        return self.experts(x.sin(), ids, weights)


def routing(count: int = 7, experts: int = 4, top_k: int = 2, hidden: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids and weights; each token has distinct experts."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.rand(count, experts, generator=generator).topk(top_k, -1).indices
    return torch.randn(count, hidden, generator=generator), ids, torch.rand(count, top_k, generator=generator)


def look(module: nn.Module, inputs: tuple[Any, ...] | None = None, dynamic: bool | None = False) -> tuple[Seen, Any]:
    """Trace a module; what was seen, and its result."""
    seen = Seen()
    torch._dynamo.reset()
    with torch.no_grad():
        result = torch.compile(module, backend=seen, dynamic=dynamic, fullgraph=True)(*(inputs or routing()))
    return seen, result


def replayed(seen: Seen) -> Tensor:
    """Result of the graph with its blocks replaced."""
    return seen.replay()[0]


def parts(self: TinyExperts, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Flat ids and the first product."""
    flat = ids.reshape(-1)
    rows = x.repeat_interleave(ids.shape[1], 0)
    return flat, torch.bmm(self.gate_up_proj[flat], rows.unsqueeze(-1)).squeeze(-1)


def finish(self: TinyExperts, hidden: Tensor, flat: Tensor, ids: Tensor, weights: Tensor | None) -> Tensor:
    """The second product and the weighted sum."""
    out = torch.bmm(self.down_proj[flat], hidden.unsqueeze(-1)).squeeze(-1)
    out = out if weights is None else out * weights.reshape(-1, 1)
    return out.view(*ids.shape, -1).sum(1)


def activated(activation: Callable[[Tensor], Tensor]) -> Forward:
    """The block with another activation."""

    def forward(self: TinyExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat, hidden = parts(self, x, ids)
        return finish(self, activation(hidden), flat, ids, weights)

    return forward


def halves(function: Callable[[Tensor, Tensor], Tensor]) -> Forward:
    """An activation of (gate, up)."""
    return activated(lambda hidden: function(*hidden.chunk(2, -1)))


# --- what is understood -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forward", "text"),
    [
        (None, "silu"),
        (halves(lambda g, u: F.gelu(g) * u), "gelu"),
        (halves(lambda g, u: u * F.gelu(g, approximate="tanh")), "gelu_tanh"),
        (halves(lambda g, u: F.relu(g) * u), "relu"),
        (halves(lambda g, u: g * torch.sigmoid(g * 1.5) * u), "silu(1.5,inf,0.0)"),
        (halves(lambda g, u: F.silu(g.clamp(max=100.0)) * u.clamp(-100.0, 100.0)), "silu(1.0,100.0,0.0)"),
        (halves(lambda g, u: F.silu(g.clamp(max=3e4)) * u.clamp(-3e4, 3e4)), "silu(1.0,30000.0,0.0)"),
        (halves(lambda g, u: F.silu(g) * (u + 0.25)), "silu(1.0,inf,0.25)"),
    ],
)
@pytest.mark.parametrize("wide", [True, False])
def test_activations(forward: Forward | None, text: str, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told apart by the f64 probe and by the f32 one that large regions get."""
    if not wide:
        monkeypatch.setattr(probe_module, "WIDE_ELEMENTS", 0)
    seen, wanted = look(Around(Varied(forward)))
    assert [site.activation.text for site in seen.sites] == [text] and not seen.misses
    assert difference(replayed(seen), wanted) <= 1e-6
    assert difference(seen.replay((0, 1.05))[0], wanted) > 1e-3


@pytest.mark.parametrize("tokens", [1, 2, 4, 32])
@pytest.mark.parametrize("root", [True, False])
def test_blocks_with_few_tokens_or_as_the_compile_root(tokens: int, root: bool) -> None:
    """Also as many tokens as experts, or as the hidden layer is wide."""
    experts = Varied()
    seen, wanted = look(experts if root else Around(experts), routing(tokens))
    assert len(seen.sites) == 1 and not seen.misses
    assert difference(replayed(seen), wanted) <= 1e-6


@pytest.mark.parametrize("bias", ["both", "first", "second"])
@pytest.mark.parametrize(("tokens", "inner"), [(7, 24), (4, 16)])
def test_biases(bias: str, tokens: int, inner: int) -> None:
    """One or both; also where both biases and the tokens have the same shape."""

    def forward(self: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat, hidden = parts(self, x, ids)
        hidden = gated_silu(hidden if bias == "second" else hidden + self.b13[flat])
        out = torch.bmm(self.down_proj[flat], hidden.unsqueeze(-1)).squeeze(-1)
        out = (out if bias == "first" else out + self.b2[flat]) * weights.reshape(-1, 1)
        return out.view(*ids.shape, -1).sum(1)

    experts = Varied(forward, inner=inner)
    experts.b13 = nn.Parameter(torch.randn(4, 2 * inner), requires_grad=False)
    experts.b2 = nn.Parameter(torch.randn(4, 32), requires_grad=False)
    for module in (Around(experts), experts):
        seen, wanted = look(module, routing(tokens))
        assert not seen.misses
        (site,) = seen.sites
        assert (site.b13 is not None, site.b2 is not None) == (bias != "second", bias != "first")
        assert difference(replayed(seen), wanted) <= 1e-5


def test_one_module_called_twice_is_two_blocks() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Varied()

        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return self.experts(self.experts(x, ids, weights), ids, weights)

    seen, wanted = look(Twice())
    assert len(seen.sites) == 2 and not seen.misses
    assert difference(replayed(seen), wanted) <= 1e-6


def test_products_in_modules_of_their_own() -> None:
    """The block is then the module around both."""

    class Product(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor, flat: Tensor) -> Tensor:
            return torch.bmm(self.weight[flat], x.unsqueeze(-1)).squeeze(-1)

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            source = TinyExperts()
            self.up, self.down = Product(source.gate_up_proj), Product(source.down_proj)

        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            flat = ids.reshape(-1)
            hidden = gated_silu(self.up(x.repeat_interleave(ids.shape[1], 0), flat))
            return (self.down(hidden, flat) * weights.reshape(-1, 1)).view(*ids.shape, -1).sum(1)

    seen, wanted = look(Around(Split()))
    assert [site.module_class for site in seen.sites] == ["Split"] and not seen.misses
    assert difference(replayed(seen), wanted) <= 1e-6


@pytest.mark.parametrize("flat", [False, True])
def test_tokens_in_two_dimensions(flat: bool) -> None:
    """[B, S, H] in and out; and [T, H] in, [B, S, H] out: with symbols for all sizes."""

    class Shaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Varied(reshaped)

        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            rows = x.sin().view(-1, 32)
            return self.experts(rows if flat else x.sin(), ids, weights, x.shape).cos()

    def reshaped(self: TinyExperts, x: Tensor, ids: Tensor, weights: Tensor, shape: torch.Size) -> Tensor:
        chosen, hidden = parts(self, x.reshape(-1, 32), ids)
        return finish(self, gated_silu(hidden), chosen, ids, weights).view(shape)

    seen = Seen()
    torch._dynamo.reset()
    compiled = torch.compile(Shaped(), backend=seen, dynamic=True, fullgraph=True)
    for batch, length in ((3, 5), (6, 4)):
        x, ids, weights = routing(batch * length)
        with torch.no_grad():
            wanted = compiled(x.view(batch, length, -1), ids, weights)
        assert len(seen.sites) == len(seen.graphs) == 1
        assert difference(replayed(seen), wanted) <= 1e-6


def test_constants_that_are_inputs_of_the_graph_are_checked_at_each_call() -> None:
    """With ``dynamic=True`` Dynamo makes floats of a module inputs; what was read from them must not serve other values."""

    class Scaled(TinyExperts):
        alpha = 1.702

        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            flat, hidden = parts(self, x, ids)
            gate, up = hidden.chunk(2, -1)
            return finish(self, gate * torch.sigmoid(gate * self.alpha) * up, flat, ids, weights)

    seen, experts = Seen(), Scaled()
    torch._dynamo.reset()
    compiled = torch.compile(Around(experts), backend=seen, dynamic=True, fullgraph=True)
    for alpha in (1.702, 1.702, 1.25):
        experts.alpha = alpha
        with torch.no_grad():
            wanted = compiled(*routing())
        assert difference(replayed(seen), wanted) <= 1e-6
    assert [site.activation.text for site in seen.sites] == ["silu(1.702,inf,0.0)", "silu(1.25,inf,0.0)"]


# --- refusals ---------------------------------------------------------------------------------------------------------


def refusal(module: nn.Module, *inputs: Any) -> str:
    """The reason for the only miss of a graph without sites; it shows the region."""
    seen, _ = look(module, inputs or None)
    assert not seen.sites and len(seen.misses) == 1
    reason = seen.misses[0].reason
    head, _, region = reason.partition("\n")
    assert head and "bmm" in region, reason
    assert len(seen.misses[0].slots) >= 1
    return head


def test_an_unknown_activation_is_refused() -> None:
    reason = refusal(Around(Varied(halves(lambda g, u: torch.tanh(g) * u))))
    assert reason.startswith("Varied is not understood: its activation") and "silu, gelu, relu" in reason


def test_three_products_are_refused() -> None:
    class Three(TinyExperts):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj = nn.Parameter(torch.randn(4, 48, 32), requires_grad=False)

        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            flat, hidden = parts(self, x, ids)
            rows = x.repeat_interleave(ids.shape[1], 0)
            hidden = gated_silu(hidden + torch.bmm(self.up_proj[flat], rows.unsqueeze(-1)).squeeze(-1))
            return finish(self, hidden, flat, ids, weights)

    assert "Three reads 3 expert weights; a block has two" in refusal(Around(Three()))


def test_a_weight_that_is_used_twice_is_refused() -> None:
    def forward(self: TinyExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat, hidden = parts(self, x, ids)
        return finish(self, gated_silu(hidden), flat, ids, weights) + finish(self, hidden[:, :24], flat, ids, weights)

    assert "3 products with expert weights" in refusal(Around(Varied(forward)))


def test_router_weights_on_inputs_inside_the_block_are_refused() -> None:
    def forward(self: TinyExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat, rows = ids.reshape(-1), x.repeat_interleave(ids.shape[1], 0) * weights.reshape(-1, 1)
        hidden = gated_silu(torch.bmm(self.gate_up_proj[flat], rows.unsqueeze(-1)).squeeze(-1))
        return finish(self, hidden, flat, ids, None)

    assert "what it does with router weights" in refusal(Around(Varied(forward)))


def test_a_block_that_writes_into_its_input_is_refused() -> None:
    def forward(self: TinyExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat, hidden = parts(self, x, ids)
        out = finish(self, gated_silu(hidden), flat, ids, weights)
        x.add_(out)
        return out * 1

    reason = refusal(Around(Varied(forward)))
    assert "add_ writes meanwhile" in reason and "into which" in reason


def test_a_block_that_adds_to_its_input_in_place_is_refused() -> None:
    def forward(self: TinyExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat, hidden = parts(self, x, ids)
        return x.add_(finish(self, gated_silu(hidden), flat, ids, weights))

    assert "writes into its input" in refusal(Around(Varied(forward)))


def test_integer_weights_are_refused() -> None:
    experts = Varied(lambda self, x, ids, weights: in_int8(self, x, ids, weights))
    experts.gate_up_proj = nn.Parameter((experts.gate_up_proj * 100).to(torch.int8), requires_grad=False)

    def in_int8(self: TinyExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat, rows = ids.reshape(-1), x.repeat_interleave(ids.shape[1], 0)
        hidden = torch.bmm(self.gate_up_proj[flat].float() / 100, rows.unsqueeze(-1)).squeeze(-1)
        return finish(self, gated_silu(hidden), flat, ids, weights)

    assert "which is int8, not floating point" in refusal(Around(experts))


def test_two_results_are_refused() -> None:
    def forward(self: TinyExperts, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        flat, hidden = parts(self, x, ids)
        return finish(self, gated_silu(hidden), flat, ids, weights), hidden.mean(1)

    assert "returns 2 values; an expert block returns one tensor" in refusal(Around(Varied(forward)))


def test_a_router_inside_the_block_is_refused() -> None:
    def forward(self: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        scores, chosen = F.linear(x, self.gate).softmax(-1).topk(2, -1)
        flat, hidden = parts(self, x, chosen)
        return finish(self, gated_silu(hidden), flat, chosen, scores)

    experts = Varied(forward)
    experts.gate = nn.Parameter(torch.randn(4, 32), requires_grad=False)
    assert refusal(Around(experts)).startswith("Varied")


def test_einsum_over_all_experts_is_refused_with_its_name() -> None:
    def forward(self: TinyExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        hidden = gated_silu(torch.einsum("th,enh->ten", x, self.gate_up_proj))
        out = torch.einsum("tei,ehi->teh", hidden, self.down_proj)
        dense = torch.zeros(x.shape[0], 4).scatter(1, ids, weights)
        return (out * dense.unsqueeze(-1)).sum(1)

    seen, _ = look(Around(Varied(forward)))
    assert not seen.sites and "einsum over expert weights is not understood" in seen.misses[0].reason


# --- 3-D parameters that are no experts -------------------------------------------------------------------------------


def test_other_parameters_of_three_dimensions_are_no_experts() -> None:
    """A position embedding at the compile root must not make the whole model one region; nor is a convolution's kernel one."""

    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.randn(1, 5, 8), requires_grad=False)
            self.mix = nn.Conv1d(5, 5, 3, padding=1).requires_grad_(False)
            self.head = nn.Linear(8, 8).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mix(x + self.position))

    seen, _ = look(Vision(), (torch.randn(2, 5, 8),))
    assert not seen.sites and not seen.misses


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda w, x: torch.einsum("btk,khd->bthd", x, w), (32, 2, 16)),
        (lambda w, x: torch.einsum("btk,hdk->bthd", x, w), (2, 16, 32)),
        (lambda w, x: torch.einsum("btk,khd->bhtd", x, w), (32, 2, 16)),
        (lambda w, x: torch.nn.functional.conv1d(x.mT, w), (16, 32, 1)),
        (lambda w, x: torch.nn.functional.conv1d(x.mT, w), (16, 32, 3)),
        (lambda w, x: torch.tensordot(x, w, dims=1), (32, 2, 16)),
        (lambda w, x: x @ x.mT @ (x + w[:, :3]), (1, 5, 32)),
        (lambda w, x: torch.nn.functional.linear(x, w.flatten(0, 1)), (2, 16, 32)),
    ],
)
def test_what_reads_a_weight_makes_it_one_of_experts(function: Any, shape: tuple[int, ...]) -> None:
    """Heads of an attention, kernels and tables of positions are none, and do not hide a block beside them."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(shape) * 0.1, requires_grad=False)
            self.experts = TinyMoe()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.experts(x), function(self.w, x)

    seen, _ = look(Model(), (torch.randn(2, 3, 32),))
    assert len(seen.sites) == 1 and not seen.misses


@pytest.mark.parametrize("keywords", ["bmm", "bmm method", "index_select and transpose"])
def test_a_block_whose_operands_are_given_by_name(keywords: str) -> None:
    def times(w: Tensor, ids: Tensor, x: Tensor) -> Tensor:
        if keywords == "bmm":
            return torch.bmm(mat2=x, input=w[ids])
        if keywords == "bmm method":
            return w[ids].bmm(mat2=x)
        chosen = torch.index_select(index=ids, dim=0, input=w)
        return torch.bmm(mat2=chosen.transpose(dim1=1, dim0=2), input=x.mT).mT

    def forward(self: TinyExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat, rows = ids.reshape(-1), x.repeat_interleave(ids.shape[1], 0).unsqueeze(-1)
        hidden = gated_silu(times(self.gate_up_proj, flat, rows).squeeze(-1))
        out = times(self.down_proj, flat, hidden.unsqueeze(-1)).squeeze(-1) * weights.reshape(-1, 1)
        return out.reshape(*ids.shape, -1).sum(1)

    seen, wanted = look(Around(Varied(forward)))
    assert len(seen.sites) == 1 and not seen.misses
    assert difference(replayed(seen), wanted) <= 1e-5


def test_a_root_that_holds_a_weight_itself_does_not_hide_blocks_inside() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.Parameter(torch.randn(2, 32, 16) * 0.1, requires_grad=False)
            self.layers = nn.ModuleList(TinyMoe() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.matmul(x.unsqueeze(1), self.heads).transpose(1, 2).flatten(2)
            for layer in self.layers:
                x = layer(x)
            return x

    seen, wanted = look(Model(), (torch.randn(2, 3, 32),))
    assert len(seen.sites) == 2 and len(seen.misses) == 1
    assert seen.misses[0].reason.startswith("the compiled module reads 1 expert weights")
    assert [node.target for node in seen.misses[0].nodes] == [torch.matmul]
    assert difference(replayed(seen), wanted) <= 1e-5


# --- variations: refused, or right ------------------------------------------------------------------------------------


def shifted(by: int, which: str) -> Forward:
    """One of the products uses another expert."""

    def forward(self: TinyExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        other = (ids + by) % 4
        first, second = (other if which in (name, "both") else ids for name in ("first", "second"))
        _, hidden = parts(self, x, first)
        return finish(self, gated_silu(hidden), second.reshape(-1), ids, weights)

    return forward


def weighted(function: Callable[[Tensor], Tensor]) -> Forward:
    """Router weights are changed inside the block."""

    def forward(self: TinyExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat, hidden = parts(self, x, ids)
        return finish(self, gated_silu(hidden), flat, ids, function(weights))

    return forward


def after(function: Callable[[Tensor], Tensor]) -> Forward:
    """The result is changed inside the block."""

    def forward(self: TinyExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat, hidden = parts(self, x, ids)
        return function(finish(self, gated_silu(hidden), flat, ids, weights))

    return forward


def swapped_tokens(self: TinyExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    flat, hidden = parts(self, x.flip(0), ids)
    return finish(self, gated_silu(hidden), flat, ids, weights)


VARIATIONS: dict[str, Forward] = {
    "gate and up swapped": halves(lambda g, u: F.silu(u) * g),
    "gate alone": halves(lambda g, u: F.silu(g)),
    "up plus one in silu": halves(lambda g, u: F.silu(g + 1) * u),
    "silu of both": halves(lambda g, u: F.silu(g) * F.silu(u)),
    "clamped on one side": halves(lambda g, u: F.silu(g.clamp(max=7.0)) * u.clamp(max=7.0)),
    "clamped twice": halves(lambda g, u: F.silu(g.clamp(-7.0, 7.0)) * u.clamp(-7.0, 7.0)),
    "two limits": halves(lambda g, u: F.silu(g.clamp(max=7.0)) * u.clamp(-5.0, 5.0)),
    "clamped beyond": halves(lambda g, u: F.silu(g) * u.clamp(-500.0, 500.0)),
    "clamped far beyond": halves(lambda g, u: F.silu(g) * u.clamp(-65504.0, 65504.0)),
    "quick gelu": halves(lambda g, u: g * torch.sigmoid(1.702 * g) * u),
    "negative shift": halves(lambda g, u: F.silu(g) * (u - 1)),
    "relu squared": halves(lambda g, u: F.relu(g).square() * u),
    "mish": halves(lambda g, u: F.mish(g) * u),
    "softsign": halves(lambda g, u: F.softsign(g) * u),
    "interleaved": activated(lambda h: F.silu(h[:, 0::2]) * h[:, 1::2]),
    "interleaved, up first": activated(lambda h: F.silu(h[:, 1::2]) * h[:, 0::2]),
    "reversed": activated(lambda h: gated_silu(h.flip(-1))),
    "rolled": activated(lambda h: gated_silu(h.roll(1, -1))),
    "weights squared": weighted(torch.square),
    "weights of the neighbour": weighted(lambda w: w.flip(1)),
    "weights normalized": weighted(lambda w: w / w.sum(-1, keepdim=True)),
    "weights doubled": weighted(lambda w: w * 2),
    "no weights": weighted(torch.ones_like),
    "half the result": after(lambda y: y * 0.5),
    "result plus a number": after(lambda y: y + 1e-3),
    "tokens reversed": after(lambda y: y.flip(0)),
    "sums so far": after(lambda y: y.cumsum(0)),
    "last token lost": after(lambda y: torch.cat((y[:-1], y[-1:] * 0))),
    "inputs reversed": swapped_tokens,
} | {
    f"{which} shifted by {by}": shifted(by, which)
    for which, by in itertools.product(("first", "second", "both"), (1, 2, 3))
}
SAME = {"quick gelu": "silu(1.702,inf,0.0)", "interleaved": "silu"}
"""Those that the formula can say."""


NEGLIGIBLE = {"clamped twice"}
"""Off by less than 1e-5, which is below what the f32 probe of very large regions sees."""


@pytest.mark.parametrize("name", VARIATIONS)
def test_a_variation_is_refused_or_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, wanted = look(Around(Varied(VARIATIONS[name])), routing(9))
    monkeypatch.setattr(probe_module, "WIDE_ELEMENTS", 0)
    assert seen.pristine is not None
    narrow, misses = find_experts(copy_graph(seen.pristine), seen.parameters)
    if name in SAME:
        assert [site.activation.text for site in (*seen.sites, *narrow)] == [SAME[name]] * 2 and not seen.misses
        assert difference(replayed(seen), wanted) <= 1e-5
        return
    assert not seen.sites and len(seen.misses) == 1 and "bmm" in seen.misses[0].reason
    assert name in NEGLIGIBLE or (not narrow and len(misses) == 1)


@pytest.mark.parametrize("alpha", [1.0, 1.702])
@pytest.mark.parametrize("limit", [0.25, 7.0, float("inf")])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_constants_are_read_right(alpha: float, limit: float, shift: float) -> None:
    """Whatever the constants are, the block is a site and computes the same."""

    def act(gate: Tensor, up: Tensor) -> Tensor:
        if limit != float("inf"):
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        gate = F.silu(gate) if alpha == 1.0 else gate * torch.sigmoid(alpha * gate)
        return gate * (up if shift == 0.0 else up + shift)

    seen, wanted = look(Around(Varied(halves(act))))
    (site,) = seen.sites
    assert site.activation == Activation("silu", alpha, limit, shift)
    assert difference(replayed(seen), wanted) <= 1e-5
