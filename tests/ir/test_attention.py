"""The matcher on small functions: every way to write attention that is known, and every near miss with its reason.

What is found is replaced by the op, and gives what eager gave.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from quant_compile.ir.attend import attend
from quant_compile.ir.attention import AttentionMiss, AttentionSite, find_attention
from quant_compile.ir.graph import copy_graph, verify
from quant_compile.lowering.attention import AttentionChoice, problem_of
from quant_compile.passes.insert_attention import replace_attention
from tests.ir.tracing import Holder, Traced, trace

B, HEADS, GROUPS, T, LENGTH, D, DV = 2, 4, 2, 3, 10, 16, 8
# f32, and sums in another order.
CLOSE = 2e-6


def tensors(seed: int = 0, heads: int = GROUPS) -> dict[str, Tensor]:
    """q, k, v, masks and sinks of one attention."""
    g = torch.Generator().manual_seed(seed)
    seen = torch.rand(B, 1, T, LENGTH, generator=g) > 0.3
    seen[..., 0] = True
    return {
        "q": torch.randn(B, HEADS, T, D, generator=g),
        "k": torch.randn(B, heads, LENGTH, D, generator=g),
        "v": torch.randn(B, heads, LENGTH, DV, generator=g),
        "seen": seen,
        "added": torch.where(seen, 0.0, -1e30),
        "sinks": torch.randn(HEADS, generator=g),
    }


def repeat_kv(x: Tensor, times: int = HEADS // GROUPS) -> Tensor:
    b, heads, length, size = x.shape
    return x[:, :, None, :, :].expand(b, heads, times, length, size).reshape(b, heads * times, length, size)


def repeat_by_unsqueeze(x: Tensor) -> Tensor:
    return x.unsqueeze(2).expand(-1, -1, HEADS // GROUPS, -1, -1).contiguous().view(B, HEADS, LENGTH, -1)


def repeat_by_interleave(x: Tensor) -> Tensor:
    return x.repeat_interleave(HEADS // GROUPS, dim=1)


def found_in(
    function: Callable[..., Any], *inputs: Any, dynamic: bool | None = False
) -> tuple[Traced, list[AttentionSite], list[AttentionMiss]]:
    """What is found in the graph of a function of ``inputs``."""
    traced = trace(Holder(lambda m, *x: function(*x)), *inputs, dynamic=dynamic)
    return traced, *find_attention(traced.gm)


def the_same(traced: Traced, sites: list[AttentionSite], wanted: Tensor) -> None:
    """The replaced graph gives what eager gave."""
    gm = traced.gm
    for site in sites:
        replace_attention(gm.graph, site, AttentionChoice("truth", "a test"))
    (y,) = verify(gm, "quantized")(*traced.arguments)
    error = float((y - wanted).abs().max() / wanted.abs().max())
    assert error < CLOSE, error
    assert not [n for n in gm.graph.nodes if n.op not in ("placeholder", "output") and not n.users], (
        "nothing is left over"
    )


def eager(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float = 0.25, repeat: Callable[..., Tensor] = repeat_kv
) -> Tensor:
    scores = torch.matmul(q, repeat(k).transpose(2, 3)) * scale
    scores = scores if mask is None else scores + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, p=0.0, training=False)
    return torch.matmul(weights, repeat(v)).transpose(1, 2).contiguous()


def in_place(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ repeat_kv(k).mT
    scores /= 4.0
    scores += mask
    return scores.softmax(-1) @ repeat_kv(v)


def capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.matmul(q, repeat_kv(k).permute(0, 1, 3, 2)) * 0.25
    scores = torch.tanh(scores / 5.0) * 5.0 + mask
    return torch.matmul(torch.softmax(scores, dim=-1), repeat_kv(v))


def with_sinks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
    scores = torch.matmul(q, repeat_kv(k).transpose(2, 3)) * 0.25 + mask
    more = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    joined = torch.cat([scores, more], dim=-1)
    joined = joined - joined.max(dim=-1, keepdim=True).values
    weights = F.softmax(joined, dim=-1, dtype=joined.dtype)[..., :-1]
    return torch.matmul(F.dropout(weights, p=0.1, training=False).to(v.dtype), repeat_kv(v))


def sdpa(repeat: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v, mask: F.scaled_dot_product_attention(q, repeat(k), repeat(v), mask).transpose(1, 2)


def own(x: Tensor) -> Tensor:
    return x


GROUPED_WAYS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "sdpa": (sdpa(repeat_kv), "seen"),
    "sdpa unsqueeze": (sdpa(repeat_by_unsqueeze), "seen"),
    "sdpa interleave": (sdpa(repeat_by_interleave), "seen"),
    "sdpa added": (sdpa(repeat_kv), "added"),
    "sdpa enable_gqa": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m, enable_gqa=True),
        "seen",
    ),
    "products": (eager, "added"),
    "products in place": (in_place, "added"),
    "softcap": (capped, "added"),
    "mask first": (lambda q, k, v, m: torch.softmax(m + (q @ repeat_kv(k).mT) / 4, -1) @ repeat_kv(v), "added"),
}


@pytest.mark.parametrize("way", GROUPED_WAYS)
def test_each_way_to_write_it_is_found_with_the_kept_heads(way: str) -> None:
    function, mask = GROUPED_WAYS[way]
    t = tensors()
    given = (t["q"], t["k"], t["v"], t[mask])
    traced, sites, misses = found_in(function, *given)
    assert not misses and len(sites) == 1
    (site,) = sites
    assert [str(x) for x in (site.q, site.k, site.v, site.mask)] == [f"l_inputs_{i}_" for i in range(4)]
    assert site.repeated == (way != "sdpa enable_gqa") and not site.cached
    assert site.softcap == (5.0 if way == "softcap" else 0.0) and site.scale == 0.25
    the_same(traced, sites, function(*given))


def test_sinks_are_found() -> None:
    t = tensors()
    given = (t["q"], t["k"], t["v"], t["added"], t["sinks"])
    traced, sites, misses = found_in(with_sinks, *given)
    assert not misses and len(sites) == 1 and sites[0].sinks is not None and sites[0].sinks.op == "placeholder"
    the_same(traced, sites, with_sinks(*given))


def test_without_groups_and_masks() -> None:
    t = tensors(heads=HEADS)
    given = (t["q"], t["k"], t["v"])
    for causal in (False, True):

        def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool = causal) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.5)

        traced, sites, misses = found_in(plain, *given)
        assert not misses and len(sites) == 1 and sites[0].is_causal is causal and not sites[0].repeated
        the_same(traced, sites, plain(*given))


def test_one_head_for_all_is_found() -> None:
    t = tensors(heads=1)

    def multi_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k.expand(-1, HEADS, -1, -1), v.expand(-1, HEADS, -1, -1))

    given = (t["q"], t["k"], t["v"])
    traced, sites, _ = found_in(multi_query, *given)
    assert len(sites) == 1 and problem_of(sites[0]).kv_heads == 1
    the_same(traced, sites, multi_query(*given))


def test_a_row_that_sees_no_key_gives_zeros_as_sdpa_does() -> None:
    t = tensors()
    seen = t["seen"].clone()
    seen[0, 0, 1] = False
    y = attend(t["q"], t["k"], t["v"], seen, 0.25)
    wanted = F.scaled_dot_product_attention(t["q"], t["k"], t["v"], seen, scale=0.25, enable_gqa=True)
    assert torch.equal(y[0, :, 1], torch.zeros(HEADS, DV)) and torch.allclose(y, wanted, atol=1e-6)


def test_under_autocast_it_is_a_miss_where_dtypes_change() -> None:
    """torch casts what each function reads there; the op would not."""
    t = tensors()

    def cast(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return (
                F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), mask)
                + eager(q, k, v, None).mT.transpose(1, 2).sum()
            )

    _, sites, misses = found_in(cast, t["q"], t["k"], t["v"], t["seen"])
    assert not sites and len(misses) == 2 and all("autocast" in miss.reason for miss in misses)


def test_lengths_that_are_symbols_add_no_conditions() -> None:
    t = tensors()

    def step(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), mask)

    for x, dims in ((t["k"], 2), (t["v"], 2), (t["seen"], 3)):
        torch._dynamo.mark_dynamic(x, dims)
    traced = trace(Holder(lambda m, *x: step(*x)), t["q"], t["k"], t["v"], t["seen"], dynamic=None)
    symbols = [n for n in traced.gm.graph.nodes if isinstance(n.meta.get("example_value"), torch.SymInt)]
    assert symbols
    env = symbols[0].meta["example_value"].node.shape_env
    before = len(env.guards)
    sites, misses = find_attention(traced.gm)
    assert not misses and len(sites) == 1 and sites[0].repeated
    assert problem_of(sites[0]).length is None and problem_of(sites[0]).tokens == T
    assert len(env.guards) == before


def over_cache(write: Callable[..., Any]) -> Callable[..., Tensor]:
    def step(q: Tensor, keys: Tensor, values: Tensor, new: Tensor, at: Tensor, mask: Tensor) -> Tensor:
        return write(q, keys, values, new, at, mask)

    return step


def updates(q: Tensor, keys: Tensor, values: Tensor, new: Tensor, at: Tensor, mask: Tensor) -> Tensor:
    keys.index_copy_(2, at, new)
    values.index_copy_(2, at, new)
    return F.scaled_dot_product_attention(q, repeat_kv(keys), repeat_kv(values), mask)


def writes_late(q: Tensor, keys: Tensor, values: Tensor, new: Tensor, at: Tensor, mask: Tensor) -> Tensor:
    k, v = repeat_kv(keys), repeat_kv(values)
    keys.index_copy_(2, at, new)
    return F.scaled_dot_product_attention(q, k, v, mask)


def changes_the_copy(q: Tensor, keys: Tensor, values: Tensor, new: Tensor, at: Tensor, mask: Tensor) -> Tensor:
    k = repeat_kv(keys)
    k.mul_(2)
    return F.scaled_dot_product_attention(q, k, repeat_kv(values), mask)


def cache_inputs() -> tuple[Any, ...]:
    t = tensors()
    return t["q"], t["k"], torch.randn(B, GROUPS, LENGTH, D), torch.randn(B, GROUPS, 1, D), torch.tensor([4]), t["seen"]


def test_a_cache_that_is_written_before_is_one() -> None:
    _, sites, misses = found_in(updates, *cache_inputs())
    assert not misses and [site.cached for site in sites] == [True]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (writes_late, "is written by index_copy_ while it is read"),
        (changes_the_copy, "a part of it, is written by mul_"),
    ],
)
def test_a_write_in_between_is_a_miss(function: Callable[..., Tensor], reason: str) -> None:
    _, sites, misses = found_in(function, *cache_inputs())
    assert not sites and len(misses) == 1 and reason in misses[0].reason


def returns_weights(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
    weights = torch.softmax(q @ k.mT + mask, -1)
    return weights @ v, weights


def second_reader(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
    scores = q @ k.mT
    return torch.softmax(scores + mask, -1) @ v + scores.sum()


def drops(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.dropout(torch.softmax(q @ k.mT + mask, -1), 0.5, training=True) @ v


def masked_fill(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT).masked_fill(mask < 0, -1e9), -1) @ v


def head_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (torch.softmax(q @ k.mT + mask, -1) * 0.5) @ v


def drops_a_key(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT + mask, -1)[..., :-1] @ v[:, :, 1:]


def writes_the_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
    mask = mask.expand(B, HEADS, T, LENGTH).clone()
    mask += q @ k.mT
    return torch.softmax(mask, -1) @ v


def writes_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
    scores = mask.expand(B, HEADS, T, LENGTH).clone()
    torch.matmul(q, k.mT, out=scores)
    return torch.softmax(scores, -1) @ v, scores


def through(*dtypes: torch.dtype) -> Callable[..., Any]:
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        weights = torch.softmax(q @ k.mT + mask, -1)
        for dtype in dtypes:
            weights = weights.to(dtype)
        return weights @ v

    return attention


def sinks_like(make: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """Sinks that are not one for each head, of numbers that the mask has."""

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = q @ k.mT
        more = make(mask[0, 0, 0, :HEADS].clone())
        return torch.softmax(torch.cat([scores, more], -1), -1)[..., :-1] @ v

    return attention


ROUNDS = "a dtype that rounds them more"
NOT_HEADS = "its sinks are not one for each head"
NEAR: dict[str, tuple[Callable[..., Any], str]] = {
    "added in place to the mask": (writes_the_mask, "added to a tensor in place"),
    "by add_": (
        lambda q, k, v, m: torch.softmax((m * 1.0).expand(B, HEADS, T, LENGTH).clone().add_(q @ k.mT), -1) @ v,
        "in place",
    ),
    "truth values added": (lambda q, k, v, m: torch.softmax(q @ k.mT + (m < 0), -1) @ v, "truth values are added"),
    "weights in bf16": (through(torch.bfloat16, torch.float32), ROUNDS),
    "weights in fp8": (through(torch.float8_e4m3fn, torch.float32), ROUNDS),
    "weights in int": (through(torch.int32, torch.float32), ROUNDS),
    "a slice of sinks": (sinks_like(lambda s: s[:1].reshape(1, 1, 1, 1).expand(B, HEADS, T, -1)), NOT_HEADS),
    "weights returned": (returns_weights, "its weights are read by"),
    "second reader": (second_reader, "is read by sum"),
    "dropout": (drops, "drops out weights at random (p=0.5, training=True)"),
    "sdpa dropout": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, dropout_p=0.1),
        "drops out weights at random (dropout_p=0.1)",
    ),
    "masked_fill": (masked_fill, "go through masked_fill before the softmax"),
    "head mask": (head_mask, "go through mul before they are multiplied with V"),
    "two masks": (lambda q, k, v, m: torch.softmax(q @ k.mT + m + m, -1) @ v, "two tensors are added to its scores"),
    "number added": (lambda q, k, v, m: torch.softmax(q @ k.mT + 1.0, -1) @ v, "a number is added"),
    "scale tensor": (lambda q, k, v, m: torch.softmax(q @ k.mT * m, -1) @ v, "multiplied by what is no number"),
    "over queries": (lambda q, k, v, m: torch.softmax(q @ k.mT + m, -2) @ v, "its softmax is over dimension -2"),
    "keys as stored": (
        lambda q, k, v, m: torch.softmax(q @ k.reshape(B, HEADS, D, LENGTH), -1) @ v,
        "keys are stored transposed",
    ),
    "no sink": (drops_a_key, "a column of its weights is dropped that is no sink"),
    "tanh alone": (
        lambda q, k, v, m: torch.softmax(torch.tanh(q @ k.mT / 5.0) * 4.0, -1) @ v,
        "its softcap is none that is known",
    ),
    "flat heads": (
        lambda q, k, v, m: torch.bmm(torch.softmax(torch.bmm(q[0], k[0].mT), -1), v[0]),
        "go through bmm before they are multiplied with V",
    ),
    "three dimensions": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q[0], k[0], v[0]),
        "have not four dimensions",
    ),
}


@pytest.mark.parametrize("near", NEAR)
def test_what_nearly_is_attention_is_a_miss_with_its_reason(near: str) -> None:
    function, reason = NEAR[near]
    t = tensors(heads=HEADS)
    traced = trace(Holder(lambda m, *x: function(*x)), t["q"], t["k"], t["v"], t["added"])
    before = [n.format_node() for n in traced.gm.graph.nodes]
    sites, misses = find_attention(copy_graph(traced.gm))
    assert not sites and len(misses) == 1
    assert reason in misses[0].reason, misses[0].reason
    assert before == [n.format_node() for n in traced.gm.graph.nodes]


def test_sinks_in_another_order_are_found_in_that_order() -> None:
    t = tensors(heads=HEADS)

    def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        more = sinks[[3, 2, 1, 0]].reshape(1, -1, 1, 1).expand(B, -1, T, -1)
        return torch.softmax(torch.cat([q @ k.mT, more], -1), -1)[..., :-1] @ v

    given = t["q"], t["k"], t["v"], t["sinks"]
    traced, sites, _ = found_in(attention, *given)
    assert len(sites) == 1
    the_same(traced, sites, attention(*given))


@pytest.mark.parametrize("dim", [0, 2])
def test_sinks_for_each_sequence_or_token_are_none_for_heads(dim: int) -> None:
    """Where there are as many of them as heads."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(HEADS, HEADS, HEADS, D, generator=g) for _ in range(3))
    shape = [-1 if i == dim else 1 for i in range(4)]

    def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        more = sinks.view(shape).expand(HEADS, HEADS, HEADS, 1)
        return torch.softmax(torch.cat([q @ k.mT, more], -1), -1)[..., :-1] @ v

    _, sites, misses = found_in(attention, q, k, v, torch.randn(HEADS, generator=g))
    assert not sites and "one for each head" in misses[0].reason


@pytest.mark.parametrize(
    "spread",
    [
        lambda k: k[..., :, None].expand(B, 1, 4, 4, 4).reshape(B, 4, 4, 4),
        lambda k: k[..., :, None, :].expand(B, 1, 4, 4, 4).reshape(B, 4, 4, 4),
    ],
)
def test_what_repeats_something_else_than_heads_is_left_in_place(spread: Callable[..., Tensor]) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, heads, 4, 4, generator=g) for heads in (4, 1, 1))
    function = lambda q, k, v: F.scaled_dot_product_attention(q, spread(k), spread(v))  # noqa: E731
    wanted = function(q, k, v)
    traced, sites, _ = found_in(function, q, k, v)
    the_same(traced, sites, wanted)


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v, m: torch.softmax(q.mean(2) @ k[0, 0].mT, -1).topk(2)[1],
        lambda q, k, v, m: torch.softmax(q, -1) @ k.mT,
        lambda q, k, v, m: q @ k.mT @ v,
        lambda q, k, v, m: torch.softmax(q @ k.mT, -1).sum(),
    ],
)
def test_a_softmax_without_two_products_is_no_attention(function: Callable[..., Tensor]) -> None:
    t = tensors(heads=HEADS)
    _, sites, misses = found_in(function, t["q"], t["k"], t["v"], t["added"])
    assert not sites and not misses


def test_nodes_of_something_else_are_left_to_it() -> None:
    t = tensors()
    traced, sites, _ = found_in(sdpa(repeat_kv), t["q"], t["k"], t["v"], t["seen"])
    assert find_attention(traced.gm, {sites[0].node}) == ([], [])
    assert find_attention(traced.gm, {sites[0].nodes[0]}) == ([], [])
