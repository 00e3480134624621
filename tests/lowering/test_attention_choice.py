"""What is chosen for an attention and why, how the kernel is asked and called, and that Inductor's code launches it itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensor

from quant_compile.ir.attend import attend
from quant_compile.ir.family import Reject
from quant_compile.ir.kv import decode, encode, parse_cache
from quant_compile.lowering import attention, ops, sides
from quant_compile.lowering.attention import (
    GROUPED,
    WRITTEN,
    AttentionKernel,
    AttentionProblem,
    choose_attention,
)
from quant_compile.lowering.expand import expanding
from quant_compile.lowering.kernels.attention import offered, triton_prefill
from quant_compile.lowering.registry import Rank
from quant_compile.lowering.sides import without_guards
from quant_compile.lowering.target import Target
from quant_compile.lowering.trace import analysed_once
from tests.lowering.test_expand import Stop, cubins, on_sm90
from tests.passes.test_fusion import sm90

__all__ = ["on_sm90", "sm90"]

SM90 = Target.fake("sm90")
DECODE = AttentionProblem(
    2, 8, 2, 64, 64, 1, 512, torch.bfloat16, "bool", repeated=True, cached=True
)  # Llama's, over a static cache
PREFILL = replace(DECODE, tokens=300, mask="none", cached=False)
PROMPT = replace(DECODE, tokens=None, length=None)  # of any length, padded or continued


def kernel(name: str, answer: Rank | Reject) -> AttentionKernel:
    return AttentionKernel(name, lambda problem, target: answer, lambda *given: given[0])


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three kernels: one refuses, and of the others one is faster."""
    made = [kernel("slow", Rank(9.0)), kernel("refuses", Reject("it never serves")), kernel("fast", Rank(2.0))]
    monkeypatch.setattr(attention, "attention_kernels", lambda: {k.name: k for k in made})
    monkeypatch.setattr(ops, "attention_kernels", lambda: {"triton_decode": made[0]})


def test_the_cheapest_kernel_serves_few_tokens_over_a_cache(served: None) -> None:
    chosen = choose_attention(DECODE, SM90)
    assert (chosen.runs, chosen.reason) == ("fast", "the cache is read once, to its filled length")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokens": 17, "mask": "none"}, "more than 16 tokens, without a mask"),
        ({"tokens": None, "mask": "none", "cached": False, "repeated": False}, "more than 16 tokens, without a mask"),
        ({"tokens": 17, "is_causal": True, "mask": "none"}, "it is causal without a mask"),
        (
            {"tokens": None, "cached": False, "repeated": False},
            "its keys are no static cache that the graph writes to, and not repeated in memory",
        ),
        ({"cached": False}, "its keys are no static cache that the graph writes to"),
        ({"is_causal": True, "mask": "none"}, "it is causal without a mask"),
        ({"mask": "other"}, "its mask is not one of every token and key"),
    ],
)
def test_what_no_kernel_is_asked_for_stays_as_written(served: None, changes: dict[str, Any], reason: str) -> None:
    chosen = choose_attention(replace(DECODE, **changes), SM90)
    assert (chosen.runs, chosen.reason) == (WRITTEN, reason)


@pytest.mark.parametrize(
    "changes", [{}, {"tokens": 17}, {"cached": False}, {"cached": False, "repeated": False, "codes": "e4m3"}]
)
def test_many_tokens_under_a_mask_are_served(served: None, changes: dict[str, Any]) -> None:
    """Over a cache, over codes of one, and where K and V would be repeated."""
    chosen = choose_attention(replace(PROMPT, **changes), SM90)
    assert (chosen.runs, chosen.reason) == (
        "fast",
        "K and V are not repeated in memory, and what the mask hides is not read",
    )


def test_each_kernel_serves_its_number_of_tokens() -> None:
    """One that is a symbol is the prefill kernel's; what neither serves names both."""
    runs = {tokens: choose_attention(replace(PROMPT, tokens=tokens), SM90).runs for tokens in (1, 16, 17, 5000, None)}
    assert runs == {1: "triton_decode", 16: "triton_decode"} | dict.fromkeys((17, 5000, None), "triton_prefill")
    coded = replace(PROMPT, codes="e4m3", scale="token")
    assert choose_attention(coded, SM90).runs == "triton_prefill"
    reason = choose_attention(replace(PROMPT, size=48, value_size=48), SM90).reason
    assert "triton_decode: serves up to 16 queries a sequence, known" in reason
    assert "triton_prefill: heads must be of 32, 64" in reason
    assert choose_attention(replace(PROMPT, dtype=torch.float32), SM90).runs == WRITTEN


def test_a_prompt_of_few_tokens_runs_in_the_decode_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a graph for any number of tokens, whose op asks at each call."""
    monkeypatch.setattr(offered, "_host", lambda: SimpleNamespace(decode=lambda *given, **more: "decode"))
    monkeypatch.setattr(offered, "_prefill_host", lambda: SimpleNamespace(prefill=lambda *given, **more: "prefill"))
    for tokens, name in ((1, "decode"), (16, "decode"), (17, "prefill")):
        q = torch.zeros(1, 4, tokens, 16)
        assert offered.run_prefill(q, q, q, None, 0.5, 0.0, None) == name  # type: ignore[comparison-overlap]


def test_a_cpu_keeps_what_was_written(served: None) -> None:
    assert choose_attention(DECODE, Target.fake("cpu")).runs == WRITTEN


def test_the_reasons_of_all_kernels_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "attention_kernels", lambda: {"one": kernel("one", Reject("no such heads"))})
    assert choose_attention(DECODE, SM90).reason == "one: no such heads"
    monkeypatch.setattr(attention, "attention_kernels", dict)
    assert choose_attention(DECODE, SM90).reason == "no attention kernel is installed"


def test_torchs_grouped_form_serves_prefill_that_repeats_without_a_mask() -> None:
    """Only where its flash kernels take it; what is written without repeating stays."""
    assert choose_attention(PREFILL, SM90).runs == GROUPED
    assert choose_attention(replace(PREFILL, is_causal=True, length=300), SM90).runs == GROUPED
    for changes in (
        {"repeated": False},
        {"mask": "other"},
        {"value_size": 32},
        {"size": 288, "value_size": 288},
        {"dtype": torch.float32},
        {"products": True},
        {"is_causal": True},
        {"is_causal": True, "tokens": None, "length": None},
    ):
        assert choose_attention(replace(PREFILL, **changes), SM90).runs == WRITTEN, changes


def test_texts_of_one_kind_are_equal() -> None:
    assert DECODE.text == "8 heads over 2 of 64, 1 token, static cache"
    assert PREFILL.text == replace(PREFILL, tokens=None, length=9).text == "8 heads over 2 of 64, many tokens"
    assert replace(DECODE, kv_heads=8, value_size=32, tokens=3).text == "8 heads of 64 and 32, 3 tokens, static cache"


def test_the_offer_asks_and_calls_the_kernel_in_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Symbols become sizes that do not matter; the call is the host function's."""
    asked: list[Any] = []

    def decode(q: Any, k: Any, v: Any, mask: Any, scale: float, **more: Any) -> Any:
        return q, k, v, mask, scale, more

    host = SimpleNamespace(
        Attention=lambda *sizes: sizes,
        fit=lambda p, target: asked.append(p) or Rank(1.0),
        decode=decode,
    )
    monkeypatch.setattr(offered, "_host", lambda: host)
    problem = replace(DECODE, batch=None, length=None, softcap=True, mask_heads=True)
    assert offered.fit(problem, SM90) == Rank(1.0)
    b, e = torch.bfloat16, torch.float8_e4m3fn
    assert asked == [(1, 8, 2, 1, 64, 64, 4096, b, b, b, "bool", True, "none", "none", True, False)]
    given = ("q", "k", "v", "m", 0.5)
    plain = {"softcap": 30.0, "sinks": "s", "k_scale": None, "v_scale": None}
    assert offered.run(*given, 30.0, "s") == (*given, plain)  # type: ignore[arg-type]
    assert offered.fit(replace(problem, codes="e4m3", scale="token"), SM90) == Rank(1.0)
    assert asked[1] == (1, 8, 2, 1, 64, 64, 4096, b, e, e, "bool", True, "token", "token", True, False)
    k = torch.zeros(1, 2, 8, 16, dtype=torch.uint8)
    found = offered.run(k, k, k, None, 0.5, 0.0, None, k, k, "e4m3")
    assert found[1].dtype == found[2].dtype == e and found[5]["k_scale"] is k


def test_the_op_is_the_truth_on_a_cpu_and_lies_as_kernels_leave_it() -> None:
    q, k, v = torch.randn(2, 8, 3, 16), torch.randn(2, 2, 20, 16), torch.randn(2, 2, 20, 8)
    mask = torch.rand(3, 20) > 0.3
    y = ops.attention(q, k, v, mask, 0.25, 5.0, None, "triton_decode")
    assert torch.equal(y, attend(q, k, v, mask, 0.25, False, 5.0))
    assert y.transpose(1, 2).is_contiguous()
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v, mask)]
        fake = ops.attention(*fakes, 0.25, 5.0, None, "triton_decode")
    assert (fake.shape, fake.stride(), fake.dtype) == (y.shape, y.stride(), y.dtype)


def test_the_op_over_codes() -> None:
    """A scale for each token, or fixed: as if K and V were values."""
    q, k, v = torch.randn(2, 8, 3, 16), torch.randn(2, 2, 20, 16), torch.randn(2, 2, 20, 16)
    for name, fixed in (("FP8", None), ("INT8", None), ("FP8_HEAD", torch.tensor([0.1, 0.2]).reshape(1, 2, 1, 1))):
        scheme = parse_cache(name)
        (kc, ks), (vc, vs) = encode(k, scheme, fixed), encode(v, scheme, fixed)
        y = ops.attention(q, kc, vc, None, 0.25, 0.0, None, "triton_decode", ks, vs, scheme.format)
        values = (decode(codes, scale, scheme.format, q.dtype) for codes, scale in ((kc, ks), (vc, vs)))
        assert torch.equal(y, attend(q, *values, None, 0.25))


@pytest.mark.parametrize("shorter", ["k", "v", "mask", "q"])
def test_sizes_that_do_not_fit_are_an_error_before_memory_is_read(shorter: str, served: None) -> None:
    """Of symbols only the call knows."""
    given = {
        "q": torch.randn(2, 8, 1, 16),
        "k": torch.randn(2, 2, 20, 16),
        "v": torch.randn(2, 2, 20, 8),
        "mask": torch.ones(1, 20, dtype=torch.bool),
    }
    ops.run_attention(*given.values(), 0.25, 0.0, None, "triton_decode")  # type: ignore[arg-type]
    given[shorter] = (
        given[shorter][:1]
        if shorter == "q"
        else given[shorter][..., :19, :]
        if shorter != "mask"
        else given["mask"][:, :19]
    )
    with pytest.raises(ValueError, match="do not fit each other"):
        ops.run_attention(*given.values(), 0.25, 0.0, None, "triton_decode")  # type: ignore[arg-type]


def code_of(
    call: Callable[..., Tensor],
    given: Sequence[Any],
    monkeypatch: pytest.MonkeyPatch,
    dynamic: Mapping[int, Sequence[int]],
    conditions: list[Any] | None = None,
) -> str:
    """Inductor's code for a function of tensors, some of whose sizes (number of the tensor -> dimensions) are symbols.

    Args:
        conditions: gets the environment whose ``guards`` are what Dynamo checks.
    """
    codes: list[str] = []

    def save(code: str) -> None:
        codes.append(code)
        raise Stop

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        mode = next(x.fake_mode for x in (n.meta["example_value"] for n in gm.graph.nodes) if isinstance(x, FakeTensor))
        if conditions is not None and mode.shape_env is not None:
            conditions.append(mode.shape_env)
        with expanding(), analysed_once():
            return compile_fx(gm, list(inputs), config_patches={"cpu_backend": "triton", "force_disable_caches": True})

    monkeypatch.setattr(GraphLowering, "save_output_code", staticmethod(save))
    torch._dynamo.reset()
    for tensor, sizes in dynamic.items():
        torch._dynamo.mark_dynamic(given[tensor], list(sizes))
    with torch.no_grad(), pytest.raises(Exception, match=r"Stop|code is there"):
        torch.compile(call, backend=backend)(*given)
    return codes[-1]


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductors_code_launches_the_kernel_itself(
    dynamic: bool, on_sm90: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a cache that the graph writes: one launch or two, no copy of the cache. A length that is a symbol leaves the op."""

    def step(q: Tensor, keys: Tensor, values: Tensor, at: Tensor, new: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
        keys.index_copy_(2, at, new)
        values.index_copy_(2, at, new)
        return ops.attention(q, keys, values, mask, 0.125, 0.0, sinks, "triton_decode")

    half = torch.bfloat16
    caches = [torch.randn(2, 2, 512, 64, dtype=half) for _ in range(2)]
    given = (
        torch.randn(2, 8, 1, 64, dtype=half),
        *caches,
        torch.tensor([5]),
        torch.randn(2, 2, 1, 64, dtype=half),
        (torch.arange(512) < 6).expand(2, 1, 1, 512),
        torch.randn(8, dtype=half),
    )
    call = code_of(step, given, monkeypatch, {1: [2]} if dynamic else {})
    call = call[call.index("def call") :]
    if dynamic:
        assert "sglq_kernels.attention" in call
        assert not re.search(r"empty_strided\w*\(\([^)]*s\d", call), "a cache is allocated"
        return
    assert "sglq_kernels" not in call, "an op of ours is called"
    assert len(re.findall(r"decode_kernel\w*\.run\(", call)) == 1
    # What is allocated is small: the result and the parts of splits, never a cache.
    sizes = [
        tuple(map(int, re.findall(r"\d+", found))) for found in re.findall(r"empty_strided\w*\(\(([\d, ]+)\)", call)
    ]
    assert sizes and all(torch.Size(size).numel() < caches[0].numel() for size in sizes), sizes


@pytest.mark.parametrize("codes", ["", "e4m3"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductors_code_launches_prefill_itself(
    dynamic: bool, codes: str, on_sm90: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Words of the mask once, then attention twice, and nothing repeated: for any number of sequences, tokens and keys too."""
    blocks = 32 if codes else 64, 64  # fewer tiles than SMs

    def prompt(q: Tensor, keys: Tensor, values: Tensor, at: Tensor, new: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
        keys.index_copy_(2, at, new)
        values.index_copy_(2, at, new)
        coded = (scale, scale, codes) if codes else ()
        reach = ops.reach(mask, *blocks)
        more = {"reach": reach, "blocks": blocks}
        for _ in range(2):
            q = ops.attention(q, keys, values, mask, 0.125, 0.0, None, "triton_prefill", *coded, **more)
        return q

    half, kept = torch.bfloat16, torch.uint8 if codes else torch.bfloat16
    new = torch.zeros(2, 2, 40, 64, dtype=kept)
    given = (
        torch.randn(2, 8, 40, 64, dtype=half),
        *(torch.zeros(2, 2, 512, 64, dtype=kept) for _ in range(2)),
        torch.arange(40),
        new,
        torch.ones(2, 1, 40, 512, dtype=torch.bool).tril(),
        torch.ones(2, 2, 512, 1),
    )
    symbols = {0: [0, 2], 1: [0, 2], 2: [0, 2], 3: [0], 4: [0, 2], 5: [0, 2, 3], 6: [0, 2]} if dynamic else {}
    environments: list[Any] = []
    code = code_of(prompt, given, monkeypatch, symbols, environments)
    call = code[code.index("def call") :]
    assert "sglq_kernels" not in call, "an op of ours is called"
    launches = re.findall(r"(reach|values|prefill|codes)_kernel\w*\.run\(", call)
    assert launches == ["reach", *["codes" if codes else "prefill"] * 2]
    assert all(cubins(code, tmp_path).values())
    if (
        dynamic
    ):  # equal sizes, and how many tokens there are; of blocks, that it is more than one of queries and keys together
        asked = {str(guard.expr) for guard in environments[0].guards}
        blocks_asked = [text for text in asked if "//" in text or "ceil" in text or "floor" in text]
        more_than_one = re.compile(
            r"Ne\([^/]*//[^/]*//[^/]*, 1\)|Max\(1, [^/]*//[^/]*//[^/]*\) > 1"
        )  # the latter by torch 2.15
        assert all(more_than_one.fullmatch(text) for text in blocks_asked), sorted(blocks_asked)
        return
    sizes = [
        tuple(map(int, re.findall(r"\d+", found))) for found in re.findall(r"empty_strided\w*\(\(([\d, ]+)\)", call)
    ]
    repeated = 2 * 8 * 512 * 64
    assert sizes and all(torch.Size(size).numel() < repeated for size in sizes), sizes


@pytest.mark.parametrize("missing", ["blocks", "tokens", "guards"])
def test_what_stays_an_op_under_symbols(missing: str, on_sm90: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that nobody has cut up; few tokens, which are another kernel's; sizes that no one can check any more."""

    def prompt(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        more = {} if missing == "blocks" else {"blocks": (64, 64)}
        reach = ops.reach(mask, 64, 64)
        return ops.attention(q, keys, values, mask, 0.125, 0.0, None, "triton_prefill", reach=reach, **more)

    half, tokens = torch.bfloat16, 12 if missing == "tokens" else 40
    caches = [torch.zeros(1, 2, 512, 64, dtype=half) for _ in range(2)]
    given = (torch.randn(1, 8, tokens, 64, dtype=half), *caches, torch.ones(1, 1, tokens, 512, dtype=torch.bool).tril())
    with without_guards() if missing == "guards" else nullcontext():
        call = code_of(prompt, given, monkeypatch, {0: [2], 1: [2], 2: [2], 3: [2, 3]})
    call = call[call.index("def call") :]
    assert len(re.findall(r"= torch\.ops\.sglq_kernels\.attention\.default\(", call)) == 1
    launched, asked = (
        len(re.findall(text, call)) for text in (r"reach_kernel\w*\.run\(", r"= torch\.ops\.sglq_kernels\.reach")
    )
    assert (launched, asked) == ((0, 1) if missing == "guards" else (1, 0))


def test_sizes_that_are_asked_for_are_checked_at_each_call() -> None:
    """Equal sizes of two tensors, and a side: what differs is compiled anew, and nothing else is."""
    compiled: list[tuple[bool, bool | None]] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        values = (node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder"))
        x, y = (value.shape for value in values if isinstance(value, Tensor))
        compiled.append((sides.equal(x[0], y[1]), sides.beyond(x[0], 16)))
        return gm.forward

    torch._dynamo.reset()
    call = torch.compile(lambda x, y: (x * 2, y * 2), backend=backend, dynamic=True)
    for first, second in ((20, 20), (30, 30), (40, 50), (60, 70), (8, 8), (9, 9), (20, 20)):
        call(torch.zeros(first, 3), torch.zeros(4, second))
    assert compiled == [(True, True), (False, True), (True, False)]


@pytest.mark.parametrize(
    ("batch", "many", "found"), [(1, False, (64, 64)), (1, True, (128, 128)), (16, False, (128, 128))]
)
def test_blocks_of_prompts_of_any_length(batch: int, many: bool, found: tuple[int, int]) -> None:
    """Small ones for a prompt on this side of SPLIT, unless sequences make enough tiles; and there is a plan by them."""
    problem = replace(PROMPT, batch=batch, heads=32, kv_heads=8, size=128, value_size=128, many=many)
    blocks = offered.blocks_of(problem, SM90)
    assert blocks == found
    plan = triton_prefill.plan_by(offered._in_its_words(replace(problem, tokens=3, length=77)), SM90, blocks)
    assert plan is not None and (plan.block_m, plan.block_n) == blocks
    assert triton_prefill.plan_by(offered._in_its_words(problem), SM90, (48, 64)) is None
