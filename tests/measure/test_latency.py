"""Times of groups: what is summed, siblings as one product, measured times where there are any."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quant_compile.ir.family import Reject
from quant_compile.ir.scheme import parse
from quant_compile.lowering.guard import Plain, Product, Quantize
from quant_compile.lowering.select import Request
from quant_compile.lowering.target import Target
from quant_compile.measure.groups import find_groups
from quant_compile.measure.latency import Latency
from tests.measure.test_attribute import batches, tiny
from tests.test_calibrate_experts import tiny_moe


def test_measured_times_are_summed_over_the_profile() -> None:
    """Three plain linears, or one merged product and the quantization of its input."""
    qkv = find_groups(tiny(1), batches(1)).groups[0]
    asked: list[Any] = []

    def times(job: Any, m: int) -> float | Reject:
        asked.append(job)
        return {Plain: 10.0, Product: 7.0, Quantize: 1.0}[type(job)] * m

    latency = Latency({1: 4, 16: 2}, Target.of("cpu"), Request(), 2, torch.device("cpu"), times)
    assert latency.ms(qkv, None) == pytest.approx(3 * 10 * (4 * 1 + 2 * 16) / 1000)
    assert latency.ms(qkv, parse("W8A16")) == pytest.approx(7 * 36 / 1000)
    assert latency.ms(qkv, parse("W8A8")) == pytest.approx(8 * 36 / 1000)
    products = [job.problem for job in asked if isinstance(job, Product)]
    assert {(problem.n, problem.siblings) for problem in products} == {(3 * 128, 3)}


def test_estimates_of_another_device() -> None:
    """Fewer bytes take less time at one row, of experts too; what has no kernel says so."""
    model = tiny_moe_of(1)
    latency = Latency.of(model, {1: 1}, "sm90", "quick")
    assert latency.how == "estimated on sm90, 1 x m=1"
    for group in find_groups(model, batches(1)).groups:
        plain, quantized = latency.ms(group, None), latency.ms(group, parse("FP8_DYNAMIC"))
        assert isinstance(plain, float) and isinstance(quantized, float) and quantized > 0 and plain > 0
    linear = find_groups(tiny(1), batches(1)).groups[0]
    assert "no kernel" in str(Latency.of(model, {1: 1}, "sm80", "quick").ms(linear, parse("NVFP4")))


def tiny_moe_of(layers: int) -> Any:
    with torch.no_grad():
        model = tiny_moe()
    model.model.layers = model.model.layers[:layers]
    return model
