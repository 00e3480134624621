"""The matcher of attention over latents on small functions: the ways to write it that are known, and every near miss with its reason.

What is found is absorbed, and gives what eager gave.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from quant_compile.ir import ops
from quant_compile.ir.attention import find_attention
from quant_compile.ir.family import family_of
from quant_compile.ir.kv import CacheScheme, encode
from quant_compile.ir.latent import LatentMiss, LatentSite, find_latent
from quant_compile.ir.scheme import parse
from quant_compile.lowering import ops as kernel_ops
from quant_compile.lowering.attention import WRITTEN, AttentionChoice
from quant_compile.lowering.latent import ABSORBED
from quant_compile.passes.absorb_latent import absorb_latent
from quant_compile.passes.insert_attention import insert_attention
from quant_compile.passes.insert_quant import insert_quant
from quant_compile.passes.lower import lower
from quant_compile.passes.plan import PassReport
from tests.ir.tracing import Holder, Traced, plan_for, relative_error, run, trace

B, HEADS, T, LENGTH, NOPE, ROPE, DV, RANK = 2, 4, 3, 10, 6, 4, 8, 12
# f32, and sums in another order.
CLOSE = 3e-6
CHOICE = AttentionChoice(ABSORBED, "a test")
SHAPES = {
    "q": (B, HEADS, T, NOPE + ROPE),
    "latent": (B, 1, LENGTH, RANK),
    "rope": (B, 1, LENGTH, ROPE),
    "new": (B, 1, T, RANK),
    "turned": (B, 1, T, ROPE),
}
Kv = tuple[Tensor, Tensor]


def tensors() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    seen = torch.rand(B, 1, T, LENGTH, generator=g) > 0.3
    seen[..., 0] = True
    return {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()} | {"seen": seen}


def parts(m: Any, latent: Tensor, first: int = NOPE, second: int = DV) -> Kv:
    """K without rope, V: two parts of what the linear gives each head."""
    y = F.linear(latent, m.w).view(B, LENGTH, -1, NOPE + DV).transpose(1, 2)
    return tuple(torch.split(y, [first, second], dim=-1))  # type: ignore[return-value]


def filled(m: Any, latent: Tensor, rope: Tensor) -> Kv:
    """As transformers does."""
    k, v = parts(m, latent)
    key = k.new_empty(B, HEADS, LENGTH, NOPE + ROPE)
    key[..., :NOPE].copy_(k)
    key[..., NOPE:].copy_(rope.expand(-1, HEADS, -1, -1))
    return key, v


def assigned(m: Any, latent: Tensor, rope: Tensor) -> Kv:
    k, v = parts(m, latent)
    key = k.new_empty(B, HEADS, LENGTH, NOPE + ROPE)
    key[:, :, :, NOPE:] = rope.expand(-1, HEADS, -1, -1)
    key[:, :, :, :NOPE] = k
    return key, v


def joined(m: Any, latent: Tensor, rope: Tensor) -> Kv:
    k, v = parts(m, latent)
    return torch.cat((k, rope.expand(-1, HEADS, -1, -1)), dim=-1), v.contiguous()


def rope_first(m: Any, latent: Tensor, rope: Tensor) -> Kv:
    k, v = parts(m, latent)
    return torch.cat((rope.expand(B, HEADS, LENGTH, ROPE), k), 3), v


def value_first(m: Any, latent: Tensor, rope: Tensor) -> Kv:
    v, k = parts(m, latent, DV, NOPE)
    return torch.cat((k, rope.expand(-1, HEADS, -1, -1)), -1), v


def sliced(m: Any, latent: Tensor, rope: Tensor) -> Kv:
    y = F.linear(latent, m.w).reshape(B, LENGTH, HEADS, NOPE + DV).permute(0, 2, 1, 3)
    key = torch.cat((y[..., :NOPE], rope.expand(-1, HEADS, -1, -1)), -1)
    return key, y.narrow(3, NOPE, DV)


def attended(make: Callable[..., Kv], after: Callable[..., Any] | None = None, **given: Any) -> Callable[..., Any]:
    """A step: the cache is written, K and V are made of it, and attended to; ``after`` makes more of K and V."""

    def forward(m: Any, q: Tensor, latent: Tensor, rope: Tensor, new: Tensor, turned: Tensor, seen: Tensor) -> Any:
        at = torch.arange(T, device=q.device)
        latent.index_copy_(2, at, new)
        rope.index_copy_(2, at, turned)
        k, v = make(m, latent, rope)
        y = F.scaled_dot_product_attention(q, k, v, seen, **given)
        return y if after is None else (y, after(k, v, latent))

    return forward


def traced_of(forward: Callable[..., Any], **changes: Tensor) -> tuple[Traced, Any]:
    """The graph of a step, and what eager gives; both start from the same cache."""
    g = torch.Generator().manual_seed(1)
    weights = {"w": torch.randn(HEADS * (NOPE + DV), RANK, generator=g) / 3} | changes
    module, inputs = Holder(forward, **weights), tensors()
    wanted = module(*(x.clone() for x in inputs.values()))
    return trace(module, *inputs.values()), wanted


def found_in(traced: Traced) -> list[LatentSite | LatentMiss]:
    attention, _ = find_attention(traced.gm)
    return find_latent(traced.gm, attention, traced.sites)


def absorbed(
    traced: Traced, spec: str | None = None, choice: AttentionChoice = CHOICE
) -> tuple[fx.GraphModule, list[PassReport]]:
    """The graph after the passes that matter here, and their reports; ``spec``: scheme of the linear."""
    attention, misses = find_attention(traced.gm)
    plan = plan_for(
        traced, {"w": spec}, attention=tuple(attention), attention_misses=tuple(misses),
        choose_attention=lambda problem, rows: AttentionChoice(WRITTEN, "no kernel"), choose_latent=lambda problem: choice,
    )  # fmt: skip
    gm, reports = traced.gm, list[PassReport]()
    for one_pass in (absorb_latent, insert_attention, insert_quant, lower):
        gm, report = one_pass(gm, plan)
        reports.append(report)
    return gm, reports


WAYS = {
    "filled": filled,
    "assigned": assigned,
    "joined": joined,
    "rope first": rope_first,
    "value first": value_first,
    "sliced": sliced,
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_write_it(way: str) -> None:
    """Nothing is left of the linear, nor of what was made of it."""
    traced, wanted = traced_of(attended(WAYS[way]))
    (site,) = found_in(traced)
    assert isinstance(site, LatentSite), site
    assert (site.key_row, site.value_row) == ((DV, 0) if way == "value first" else (0, NOPE))
    assert site.rope_at == (0 if way == "rope first" else NOPE)
    gm, (report, *_) = absorbed(traced)
    called = [str(n.target) for n in gm.graph.nodes if n.op not in ("placeholder", "output")]
    assert called[1:] == ["index_copy_", "index_copy_", "sglq.latent_attention.default"]  # after ``arange``
    assert relative_error(run(gm, traced), wanted) < CLOSE
    assert report.rewrote and not report.refused
    assert not [n for n in gm.graph.nodes if n.op not in ("placeholder", "output") and not n.users][2:], (
        "but the writes"
    )


@pytest.mark.parametrize("stored", ["[n, k]", "[k, n]"])
def test_a_quantized_weight_is_made_of_its_planes(stored: str) -> None:
    """As the family dequantizes it, whatever way it is stored; its input is not quantized any more."""
    turned = stored == "[k, n]"

    def straight(m: Any, latent: Tensor, rope: Tensor) -> Kv:
        y = (latent @ m.w if turned else F.linear(latent, m.w)).view(B, LENGTH, -1, NOPE + DV).transpose(1, 2)
        return torch.cat((y[..., :NOPE], rope.expand(-1, HEADS, -1, -1)), -1), y[..., NOPE:]

    weight = torch.randn(HEADS * (NOPE + DV), RANK, generator=torch.Generator().manual_seed(2)) / 3
    scheme = parse("W8A8")
    values = family_of(scheme).dequantize_weight(family_of(scheme).quantize_weight(weight, scheme), scheme, RANK)
    traced, _ = traced_of(attended(straight), w=weight.t().contiguous() if turned else weight)
    _, wanted = traced_of(attended(straight), w=values.t().contiguous() if turned else values)
    gm, reports = absorbed(traced, "W8A8")
    assert relative_error(run(gm, traced), wanted) < CLOSE
    assert not gm.graph.find_nodes(op="call_function", target=kernel_ops.linear)
    assert not [n for n in gm.graph.find_nodes(op="placeholder") if n.meta.get("argument") in traced.names], (
        "the weight"
    )
    (dispatch,) = reports[-1].dispatches.values()
    assert dispatch.ranges == "absorbed by attention, in float32 made of its planes at each step"
    assert not reports[2].rewrote, "insert_quant leaves the linear to the attention"


def test_a_cache_in_codes_is_read_as_it_is() -> None:
    scheme = CacheScheme("int8")

    def forward(m: Any, q: Tensor, seen: Tensor, *cache: Tensor) -> Tensor:
        latent, latent_scale, rope, rope_scale, at = cache
        for plane in cache[:4]:
            plane.index_copy_(2, at, plane[:, :, :T].clone())
        values = ops.cache_values(latent, latent_scale, "int8", torch.float32)
        ropes = ops.cache_values(rope, rope_scale, "int8", torch.float32)
        return F.scaled_dot_product_attention(q, *filled(m, values, ropes), seen)

    t = tensors()
    cache = (*encode(t["latent"], scheme), *encode(t["rope"], scheme), torch.arange(T))
    module = Holder(forward, w=torch.randn(HEADS * (NOPE + DV), RANK, generator=torch.Generator().manual_seed(1)) / 3)
    wanted = module(t["q"], t["seen"], *cache)
    traced = trace(module, t["q"], t["seen"], *cache)
    (site,) = found_in(traced)
    assert isinstance(site, LatentSite) and site.codes == "int8", site
    gm, _ = absorbed(traced)
    assert relative_error(run(gm, traced), wanted) < CLOSE
    assert not gm.graph.find_nodes(op="call_function", target=ops.cache_values)


def another(m: Any, latent: Tensor, rope: Tensor) -> Kv:
    k, v = parts(m, latent)
    return torch.cat((k, rope.expand(-1, HEADS, -1, -1)), -1), v


def scaled(m: Any, latent: Tensor, rope: Tensor) -> Kv:
    """A norm, or anything else, between the cache and the linear is computed of the whole cache: so is what is absorbed."""
    return another(m, latent * 2.0, rope)


def biased(m: Any, latent: Tensor, rope: Tensor) -> Kv:
    y = F.linear(latent, m.w, m.w[:, 0]).view(B, LENGTH, -1, NOPE + DV).transpose(1, 2)
    return torch.cat((y[..., :NOPE], rope.expand(-1, HEADS, -1, -1)), -1), y[..., NOPE:]


def own_ropes(m: Any, latent: Tensor, rope: Tensor) -> Kv:
    k, v = parts(m, latent)
    return torch.cat((k, rope + k[..., :ROPE]), -1), v


def written_late(m: Any, latent: Tensor, rope: Tensor) -> Kv:
    k, v = another(m, latent, rope)
    latent.mul_(2.0)
    return k, v


def gap(m: Any, latent: Tensor, rope: Tensor) -> Kv:
    k, v = parts(m, latent)
    key = k.new_zeros(B, HEADS, LENGTH, NOPE + ROPE)
    key[..., :NOPE].copy_(k)
    key[..., NOPE + 1 :].copy_(rope[..., 1:].expand(-1, HEADS, -1, -1))
    return key, v


MISSES: dict[str, tuple[Callable[..., Any], str]] = {
    "k is read again": (attended(filled, lambda k, v, latent: k.sum()), "is read by sum_1 as well"),
    "v is read again": (attended(joined, lambda k, v, latent: v + 1), "as well"),
    "no cache": (attended(scaled), "its latents are no static cache that the graph writes to"),
    "a bias": (attended(biased), "has a bias"),
    "ropes of each head": (attended(own_ropes), "the other part of its key is not one head that all share"),
    "written in between": (attended(written_late), "is written by mul_"),
    "columns of no part": (attended(gap), "its key has columns that are none of its parts"),
}


@pytest.mark.parametrize("name", MISSES)
def test_near_misses_stay_as_they_are_written(name: str) -> None:
    forward, reason = MISSES[name]
    traced, _ = traced_of(forward)
    before = [n.format_node() for n in traced.gm.graph.nodes]
    (miss,) = found_in(traced)
    assert isinstance(miss, LatentMiss) and reason in miss.reason, miss
    gm, (_, report, *_) = absorbed(traced)
    assert [n.format_node() for n in gm.graph.nodes] == before
    (line,) = report.attention
    assert line.runs == WRITTEN and line.reason.startswith(
        "no kernel; K and V are computed of the whole cache at each step: "
    )
    assert reason in line.reason


def test_what_is_not_chosen_is_not_touched() -> None:
    traced, _ = traced_of(attended(filled))
    before = [n.format_node() for n in traced.gm.graph.nodes]
    gm, (_, report, *_) = absorbed(traced, choice=AttentionChoice(WRITTEN, "too many"))
    assert [n.format_node() for n in gm.graph.nodes] == before
    assert report.attention[0].reason.endswith("at each step: too many")


def test_attention_over_other_caches_is_none_of_it() -> None:
    def plain(m: Any, latent: Tensor, rope: Tensor) -> Kv:
        return latent.expand(-1, HEADS, -1, -1)[..., : NOPE + ROPE], latent.expand(-1, HEADS, -1, -1)

    traced, _ = traced_of(attended(plain))
    assert found_in(traced) == []
