"""``guard: never_slower`` on the GPU: what is measured, what is kept where 16 bits win, and what is quantized where they do not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import quant_compile
from quant_compile.ir.family import Reject, family_of
from quant_compile.ir.scheme import parse
from quant_compile.lowering import tune
from quant_compile.lowering.guard import Plain, Product, Quantize
from quant_compile.lowering.registry import Problem
from quant_compile.lowering.select import choose
from quant_compile.lowering.target import Target
from quant_compile.lowering.tune_guard import guard_times

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Times of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tune.timings.cache_clear()
    with torch.no_grad():
        yield
    tune.timings.cache_clear()


class One(nn.Module):
    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.one = nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x)


@pytest.mark.parametrize("spec", ["FP8_DYNAMIC", "W8A8", "W4A16", "FP8", "MXFP4"])
def test_every_part_of_a_chain_is_measured_once_and_kept_on_disk(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, device = parse(spec), torch.device("cuda")
    target, problem = Target.of(device), Problem(scheme, 4096, 4096, torch.bfloat16)
    jobs: list[Any] = [Plain(4096, 4096, torch.bfloat16, False), Plain(4096, 4096, torch.bfloat16, True)]
    if scheme.input_activations is not None:
        jobs += [Quantize(scheme, 4096, torch.bfloat16, fused) for fused in (False, True)]
    if spec != "MXFP4" or target.arch >= 100:
        jobs.append(Product(choose(problem, target).kernel_for(1).name, problem))
    time_of = guard_times(target, "quick", device)
    assert not isinstance(time_of, Reject)
    first = [time_of(job, m) for job in jobs for m in (1, 40)]
    for found in first:
        assert not isinstance(found, Reject) and 0 < found < 1e4, found
    # Reading 32 MiB takes 4 to 40 µs on any GPU since the A100.
    assert 4 < first[0] < 60  # type: ignore[operator]
    tune.timings.cache_clear()
    monkeypatch.setattr(tune, "graph_time", lambda calls: pytest.fail("measured again"))
    again = guard_times(target, "quick", device)
    assert not isinstance(again, Reject)
    assert [again(job, m) for job in jobs for m in (1, 40)] == first


def deviation(y: Tensor, truth: Tensor) -> float:
    return float((y - truth).float().norm() / truth.float().norm())


@pytest.mark.parametrize(("spec", "n", "k", "m"), [
    ("W4A16", 4096, 4096, 8192), ("W4A16", 16384, 8192, 1), ("FP8_DYNAMIC", 16384, 8192, 1), ("FP8_DYNAMIC", 16, 2048, 1),
])  # fmt: skip
def test_a_linear_is_what_the_ledger_says_by_its_own_times(spec: str, n: int, k: int, m: int) -> None:
    """Many tokens are bound by tensor cores, which multiply W4A16's weights as 16 bits; one token is bound by bytes."""
    model = One(n, k)
    quant_compile.compile(model, {"default": spec, "strict": True}, guard="never_slower")
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    y = model(x)
    (line,) = quant_compile.report(model).lines
    scheme, family = parse(spec), family_of(parse(spec))
    plain = F.linear(x, model.one.weight)
    given = (x,) if scheme.input_activations is None else family.quantize_input(x, scheme, None)
    weight = family.quantize_weight(model.one.weight, scheme)
    truth = family.linear(given, weight, None, scheme, x.dtype)
    print(spec, n, k, m, line.guarded or line.scheme)
    if line.guarded:
        assert line.scheme is None and deviation(y, plain) < 1e-2 < deviation(truth, plain)
    else:
        assert line.scheme == spec and deviation(y, truth) < 1e-2  # FP8 tensor cores add in 14 bits
    if n == 16384:
        assert not line.guarded, "half of the bytes and fewer win at one token"


@pytest.mark.parametrize("policy", ["FP8_DYNAMIC", "W4A16"])
def test_generate_with_the_guard(policy: str) -> None:
    """Tokens come out, whatever is kept in bf16; twice the same where no kernel of humming's serves, whose sums vary in their last bit."""
    sizes: dict[str, Any] = {"vocab_size": 512, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 4, "eos_token_id": None, "pad_token_id": 0}
    with torch.device("cuda"):
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=8192)).to(torch.bfloat16).eval()
    prompt = torch.randint(3, 500, (1, 3000), device="cuda")
    plain = model(prompt).logits[:, -1].float()
    quant_compile.compile(model, {"default": policy, "strict": True}, guard="never_slower")
    made = model.generate(prompt, max_new_tokens=16, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert made.sequences.shape == (1, 3016)
    # Seeded random weights: W4A16 everywhere has 0.92 here.
    assert torch.cosine_similarity(made.logits[0].float(), plain).item() > 0.85
    short = model.generate(prompt[:, :64], max_new_tokens=16, do_sample=False)
    again = model.generate(prompt[:, :64], max_new_tokens=16, do_sample=False)
    report = quant_compile.report(model)
    assert again.shape == short.shape == (1, 80)
    if not any("humming" in (line.kernels or "") for line in report.lines):
        assert torch.equal(again, short)
    named = [line for line in report.lines if line.named]
    assert report.coverage == 1.0 and len(named) == 28 and not report.misses
    for line in named:
        assert line.scheme == policy or line.guarded, line
    print(*sorted({text for _, text in report.guarded}), sep="\n")


def test_released_originals_leave_the_guard_nothing_to_do() -> None:
    model = One(16, 2048)
    quant_compile.compile(model, "FP8_DYNAMIC", guard="never_slower", release_weights=True)
    model(torch.randn(1, 2048, device="cuda", dtype=torch.bfloat16))
    report = quant_compile.report(model)
    assert report.lines[0].released and not report.guarded
    assert any("never_slower is not applied" in note for note in report.notes)
