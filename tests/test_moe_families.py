"""Qwen3-MoE and GPT-OSS end to end with real Inductor: logits, and tokens of ``generate``, against an eager quantized reference.

The reference quantizes every expert and every linear by its scheme's own torch functions, token by token: no graph, no pass,
no store, no kernel. Inductor is asked to round where eager does; see test_families.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quant_compile
from quant_compile.ir.report import Report
from tests.moe_support import FAMILIES, expert_parameters, moe_reference_of, one_thread, tokens, usual_linears
from tests.runtime_support import plain_inductor

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


def outcome_of(name: str, spec: str) -> Outcome:
    """Compile and generate once."""
    torch._dynamo.reset()
    family = FAMILIES[name]
    model = family.make(dtype=torch.bfloat16)
    wanted = generated(moe_reference_of(model, spec, family, usual_linears(spec)))
    plain = generated(model)
    quant_compile.compile(model, spec, inductor={"emulate_precision_casts": True})
    return Outcome(model, quant_compile.report(model), generated(model), wanted, plain)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.fixture(
    scope="module", params=[(name, spec) for name in ("qwen3_moe", "gpt_oss") for spec in SCHEMES], ids="-".join
)
def outcome(request: pytest.FixtureRequest) -> Iterator[Outcome]:
    """One family under one scheme."""
    yield outcome_of(*request.param)
    torch._dynamo.reset()


def test_logits_of_prefill_and_decode(outcome: Outcome) -> None:
    for got, wanted, plain in zip(outcome.got[1], outcome.wanted[1], outcome.plain[1], strict=True):
        error = relative_error(got, wanted)
        assert error <= TOLERANCE
        assert relative_error(plain, wanted) > max(2e-3, 1.5 * error), "no quantization is told apart"


def test_tokens(outcome: Outcome) -> None:
    assert torch.equal(outcome.got[0], outcome.wanted[0])
    assert len(set(outcome.got[0][:, 5:].flatten().tolist())) > 2


def test_all_experts_are_quantized(outcome: Outcome) -> None:
    report = quant_compile.report(outcome.model)
    lines = {line.names[0]: line for line in report.lines}
    assert all(lines[name].scheme and lines[name].kernels for name in expert_parameters(outcome.model))
    assert report.coverage == 1.0
