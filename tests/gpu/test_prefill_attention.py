"""Prefill attention on the GPU: against the reference at real sizes, in CUDA graphs, in whole models, and in what it reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import quant_compile
from quant_compile.ir.family import Reject
from quant_compile.lowering.kernels.attention import triton_prefill
from quant_compile.lowering.kernels.attention.triton_prefill import Plan
from quant_compile.lowering.target import Target
from tests.attention_support import MIXED, decoder, seeded
from tests.gpu.test_attention import DEVICE, HEADS, replayed, seen, time_of
from tests.lowering.test_attention import BF16, E4M3, E5M2, F16, TOLERANCE, additive
from tests.lowering.test_prefill_attention import Prompt

pytestmark = pytest.mark.gpu

SIZES = (2, 1000, 2112)  # sequences, tokens, room: no multiple of a block
CACHES = [None, E4M3, E5M2, torch.int8]


@pytest.fixture(autouse=True)
def exact_references() -> None:
    """The reference multiplies in f32; TF32 would be less exact than what it judges."""
    assert not torch.backends.cuda.matmul.allow_tf32


class Real(Prompt):
    """A prompt at real sizes, under the plan of its problem unless another is given."""

    def check(self, mask: Tensor | None = None, *, plan: Plan | None = None, **more: Any) -> None:  # type: ignore[override]
        super().check(mask, plan=plan or self.plan(mask), **more)

    def plan(self, mask: Tensor | None) -> Plan:
        return triton_prefill.plan_of(self.problem(mask), Target.of(DEVICE))

    def problem(self, mask: Tensor | None) -> Any:
        return triton_prefill.problem_of(self.q, self.k, self.v, mask, **self.scales)


def case(heads: tuple[int, int, int], **more: Any) -> Real:
    b, t, length = SIZES
    dv = 128 if heads[2] == 192 else 0
    return Real(b, heads[0], heads[1], t, heads[2], length, dv=dv, device=DEVICE, **more)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("heads", [HEADS[0], *HEADS[3:], (32, 32, 96), (32, 8, 32)])
def test_heads_and_caches(heads: tuple[int, int, int], cache: torch.dtype | None) -> None:
    """Padded at the left, and continued over a filled cache, in a window."""
    b, t, length = SIZES
    one = case(heads, dtype=BF16, cache=cache)
    one.check(seen(b, t, length, t, left=(0, 57)))
    one.check(seen(b, t, length, 2100, window=300))


@pytest.mark.parametrize("cache", CACHES)
def test_forms_of_masks(cache: torch.dtype | None) -> None:
    """Additive, none, spread over heads by stride 0; f16."""
    b, t, length = SIZES
    one = case(HEADS[0], dtype=F16, cache=cache)
    one.check(additive(seen(b, t, length, 2100, window=300), F16))
    one.check()
    one.check(seen(1, t, length, 2000).expand(b, 32, t, length))


@pytest.mark.parametrize("cache", CACHES)
def test_plans_are_right(cache: torch.dtype | None) -> None:
    """Some of what benchmarks compare, which checks all: codes converted in registers too."""
    b, t, length = SIZES
    one, mask = case(HEADS[0], dtype=BF16, cache=cache), seen(b, t, length, 2000, left=(0, 57))
    plans = triton_prefill.plans_of(one.problem(mask), Target.of(DEVICE))
    registers = [plan for plan in plans if not plan.values]
    for plan in registers[:: 4 if cache == E4M3 else 8] if cache else plans[1::10]:
        one.check(mask, plan=plan)


@pytest.mark.parametrize("cache", CACHES)
def test_few_tiles(cache: torch.dtype | None) -> None:
    """One sequence of 100 tokens that goes on over a filled cache, by the plan of a launch of these sizes."""
    one = Real(1, 32, 8, 100, 128, 2112, device=DEVICE, dtype=BF16, cache=cache)
    mask = seen(1, 100, 2112, 2000)
    assert triton_prefill.plan_for(one.problem(mask), Target.of(DEVICE)) != one.plan(mask)
    one.check(mask, plan=triton_prefill.plan_for(one.problem(mask), Target.of(DEVICE)))


def test_variants() -> None:
    """Scales of heads and of the whole, sinks, softcap, a mask for each head, a bias, causal without a mask, strides, gaps."""
    b, t, length = SIZES
    mask = seen(b, t, length, 1500, left=(0, 57))
    for scales in ("head", "tensor"):
        case(HEADS[0], dtype=BF16, cache=E4M3, scales=scales).check(mask)
    for cache in (None, E4M3):
        one = case(HEADS[4], dtype=BF16, cache=cache)
        one.check(mask, sinks=torch.randn(64, device=DEVICE, dtype=BF16))
        one.check(mask, softcap=0.5)
    one = case(HEADS[5], dtype=BF16)
    one.check(torch.randn(2, 8, t, length, device=DEVICE, dtype=BF16))
    one.check(torch.rand(2, 8, t, length, device=DEVICE) > 0.4)
    gaps = mask.clone()
    gaps[..., 300:700] = False
    one.check(gaps)
    assert torch.equal(one.found(mask), one.found(mask))
    causal = one.found(None, is_causal=True)
    wanted = one.wanted(seen(1, t, length, t))
    assert float((causal.float() - wanted.float()).norm() / wanted.float().norm()) <= TOLERANCE[BF16]
    one.k, one.v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (one.k, one.v))
    one.check(mask)


@pytest.mark.parametrize("cache", [None, E4M3])
@pytest.mark.parametrize("form", ["bool", "finite", "infinite"])
def test_odd_numbers(form: str, cache: torch.dtype | None) -> None:
    """Rows that see nothing are zeros; NaN before and after what is seen has no influence."""
    b, t, length = SIZES
    one = case(HEADS[0], dtype=BF16, cache=cache)
    mask = seen(b, t, length, 1500, left=(530, 2000))
    forms = {"bool": mask, "finite": additive(mask, BF16)}
    given = forms.get(form, torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, float("-inf")))
    wanted = one.wanted(mask)
    for plane in one.scales.values() if cache else (one.k, one.v):
        plane[:, :, :530], plane[:, :, 1500:] = float("nan"), float("inf")
    found = one.found(given)
    assert not found[1].any() and not found[0, :, :30].any()
    assert float((found[0].float() - wanted[0].float()).norm() / wanted[0].float().norm()) <= TOLERANCE[BF16]


@pytest.mark.parametrize("cache", [None, E4M3])
def test_in_a_cuda_graph(cache: torch.dtype | None) -> None:
    """One graph serves while the cache fills: what is new is q, the mask and the cache; equal inputs give equal bits."""
    b, t, length = SIZES
    one = case(HEADS[0], dtype=BF16, cache=cache)
    mask = seen(b, t, length, t)
    graph, out = replayed(lambda: one.found(mask))
    for end in (1000, 1001, 1536, 2112):
        one.q.normal_()
        mask.copy_(seen(b, t, length, end))
        graph.replay()
        assert float((out.float() - one.wanted(mask).float()).norm() / out.float().norm()) <= TOLERANCE[BF16], end
        assert torch.equal(out, one.found(mask))


@pytest.mark.parametrize("cache", [None, E4M3])
def test_what_is_hidden_takes_no_time(cache: torch.dtype | None) -> None:
    """A prompt of 1024 in room for 16384 takes less than a third of the time of all keys, of which it sees a thirtieth."""
    one = Real(1, 32, 8, 1024, 128, 16384, dtype=BF16, cache=cache, device=DEVICE)
    mask = seen(1, 1024, 16384, 16384)
    graph, _ = replayed(lambda: one.found(mask))
    whole = time_of(graph)
    mask.copy_(seen(1, 1024, 16384, 1024))
    assert time_of(graph) < whole / 3


def test_fit_accepts_what_was_run() -> None:
    problem, target = case(HEADS[0], dtype=BF16, cache=E4M3).problem(None), Target.of(DEVICE)
    assert not isinstance(triton_prefill.fit(problem, target), Reject)
    assert isinstance(triton_prefill.fit(replace(problem, head_size=48), target), Reject)


WIDE = {"hidden_size": 256, "head_dim": 64, "max_position_embeddings": 512}
MODELS = {
    "llama3": decoder(hf.LlamaConfig, hf.LlamaForCausalLM, **WIDE),
    "gemma2": decoder(hf.Gemma2Config, hf.Gemma2ForCausalLM, attn_implementation="eager", **WIDE, **MIXED),
    "gpt_oss": decoder(
        hf.GptOssConfig, hf.GptOssForCausalLM, num_local_experts=4, num_experts_per_tok=2, **WIDE, **MIXED
    ),
}
# What the kernel may add to the error that the model's own bf16 makes, which rounds scores and weights of attention.
WORSE = 1.1


@pytest.mark.parametrize("family", MODELS)
def test_prompts_in_the_kernel(family: str) -> None:
    """A left-padded prompt, and its continuation by a second piece; a policy that quantizes nothing; held to the model in f32."""
    model = seeded(MODELS[family], BF16).cuda()
    exact = seeded(MODELS[family], BF16).float().cuda()
    ids = torch.randint(3, 90, (2, 100), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0

    def run(call: Any, cache: Any) -> Tensor:
        out = []
        for start, end in ((0, 60), (60, 100)):
            given = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end], "past_key_values": cache}
            out.append(call(**given, use_cache=True).logits[:, -1].float())
        return torch.stack(out)

    with torch.no_grad():
        caches = [hf.StaticCache(config=model.config, max_cache_len=300) for _ in range(3)]
        eager, truth = run(model, caches[0]), run(exact, caches[2])
        torch._dynamo.reset()
        quant_compile.compile(model, {"default": "keep"})
        got = run(model, caches[1])
    assert float((got - truth).norm()) <= WORSE * float((eager - truth).norm())
    runs = {line.runs for line in quant_compile.report(model).attention}
    assert "triton_prefill" in runs, quant_compile.report(model).attention


@pytest.mark.parametrize("kv_cache", ["keep", "FP8"])
def test_generate_in_the_kernel(kv_cache: str) -> None:
    """Padded prompts of several lengths in one dynamic graph; codes too: the same tokens twice, and the report names the kernel."""
    model = seeded(MODELS["llama3"], BF16).cuda()
    torch._dynamo.reset()
    quant_compile.compile(model, {"default": "keep"}, kv_cache=kv_cache)
    for length in (40, 61):
        ids = torch.randint(3, 90, (2, length), device=DEVICE)
        mask = torch.ones_like(ids)
        mask[0, :9] = 0
        asked = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
        assert torch.equal(model.generate(**asked), model.generate(**asked))
    assert "triton_prefill" in {line.runs for line in quant_compile.report(model).attention}
