"""Qwen3-MoE and GPT-OSS end to end: logits and tokens of ``generate`` (prefill and decode over a static cache).

The reference is eager: it quantizes every expert and every linear by its scheme's own torch functions, token by token; no
graph, no pass, no store, no kernel. Without Inductor results are those of the reference to the last bit or nearly, in bf16.
Through Inductor, which is asked to round where eager does, Qwen3-MoE runs in bf16 and GPT-OSS in f32: Inductor moves the
logits of the unquantized bf16 GPT-OSS by 1 % already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quant_compile
from quant_compile.ir.family import family_of
from quant_compile.ir.report import Report
from tests.moe_support import (
    FAMILIES,
    ReferenceExperts,
    expert_parameters,
    moe_reference_of,
    one_thread,
    tokens,
    usual_linears,
)
from tests.runtime_support import CompileCounter, plain_inductor

__all__ = ["one_thread", "plain_inductor"]
pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 2e-2
STEPS = 5
SCHEMES = ("FP8_DYNAMIC", "W8A8", "W4A16", "FP8_BLOCK")


@dataclass(frozen=True)
class Outcome:
    """What one family gave under one scheme: tokens and, for each new one, logits [steps, B, V]."""

    model: nn.Module
    report: Report
    got: tuple[Tensor, Tensor]
    wanted: tuple[Tensor, Tensor]
    plain: tuple[Tensor, Tensor]


def generated(model: Any) -> tuple[Tensor, Tensor]:
    """Prefill and decode over a static cache."""
    ids = tokens()
    with torch.inference_mode():
        result = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=STEPS,
            do_sample=False,
            cache_implementation="static",
            disable_compile=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return result.sequences, torch.stack(result.logits)


def outcome_of(name: str, spec: str, dtype: torch.dtype, **options: Any) -> Outcome:
    """Compile and generate once."""
    torch._dynamo.reset()
    family = FAMILIES[name]
    model = family.make(dtype=dtype)
    wanted = generated(moe_reference_of(model, spec, family, usual_linears(spec)))
    plain = generated(model)
    quant_compile.compile(model, spec, inductor={"emulate_precision_casts": True}, **options)
    got = generated(model)
    return Outcome(model, quant_compile.report(model), got, wanted, plain)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def check(outcome: Outcome, tolerance: float) -> None:
    """Logits, tokens and ledger."""
    got, wanted, plain = outcome.got, outcome.wanted, outcome.plain
    assert torch.equal(got[0], wanted[0])
    assert len(set(got[0][:, -STEPS:].flatten().tolist())) > 2, "tokens that are all alike show nothing"
    for mine, expected in zip(got[1], wanted[1], strict=True):
        assert relative_error(mine, expected) <= tolerance
    assert relative_error(plain[1][0], wanted[1][0]) > TOLERANCE, "no quantization at all must fail"
    lines = {line.names[0]: line for line in outcome.report.lines}
    assert all(lines[name].scheme and lines[name].kernels for name in expert_parameters(outcome.model))
    assert outcome.report.coverage == 1.0


@pytest.mark.parametrize("spec", SCHEMES)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_without_inductor(name: str, spec: str, plain_inductor: CompileCounter) -> None:
    check(outcome_of(name, spec, torch.bfloat16), 5e-3)
    assert len(plain_inductor) == 2, "one graph for prefill, one for decode"


class Nvfp4Experts(ReferenceExperts):
    """Expert after expert: all tokens share NVFP4's global scale, the hidden layer of each expert has its own."""

    def forward(self, x: Tensor, ids: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """As the block that it stands for."""
        assert ids is not None and weights is not None and self.scheme is not None
        scheme, family, out = self.scheme, family_of(self.scheme), torch.zeros_like(x, dtype=torch.float32)
        data, scale, whole = family.quantize_input(x, scheme, None)
        for expert, (up, down) in enumerate(zip(*self.planes, strict=True)):
            rows, place = torch.where(ids == expert)
            if rows.numel():
                hidden = self.act(family.linear((data[rows], scale[rows], whole), up, None, scheme, x.dtype))
                y = family.linear(family.quantize_input(hidden, scheme, None), down, None, scheme, x.dtype)
                out.index_add_(0, rows, y.float() * weights[rows, place].float().unsqueeze(-1))
        return out.to(x.dtype)


# Planes of experts by bf16 bytes: codes, the scale of each row or group (a whole row of 64 or 32 here) and, of QServe, zeros.
FOUR_BITS = {"W4A8": 0.25 + 2 / 96, "NVFP4": 0.25 + 1 / 32 + 4 / 96, "QSERVE_W4A8_CHANNEL": 0.25 + 3 / 96}


@pytest.mark.parametrize("spec", FOUR_BITS)
def test_four_bits_without_inductor(spec: str, plain_inductor: CompileCounter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Released at the first call, so decode has only the planes."""
    if spec == "NVFP4":
        monkeypatch.setattr("tests.moe_support.ReferenceExperts", Nvfp4Experts)
    outcome = outcome_of("qwen3_moe", spec, torch.bfloat16, release_weights=True)
    check(outcome, 5e-3)
    assert len(plain_inductor) == 2, "one graph for prefill, one for decode"
    experts = expert_parameters(outcome.model)
    lines = [line for line in outcome.report.lines if line.names[0] in experts]
    held, before = sum(line.bytes_after for line in lines), sum(p.numel() * 2 for p in experts.values())
    assert len(lines) == 2 and all(line.released for line in lines)
    assert held == pytest.approx(FOUR_BITS[spec] * before, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "spec", "dtype"),
    [
        ("qwen3_moe", "FP8_DYNAMIC", torch.bfloat16),
        ("qwen3_moe", "W4A16", torch.bfloat16),
        ("gpt_oss", "W8A8", torch.float32),
    ],
)
def test_with_inductor(name: str, spec: str, dtype: torch.dtype) -> None:
    check(outcome_of(name, spec, dtype), TOLERANCE)
