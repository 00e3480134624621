"""``guard: never_slower`` end to end on a CPU, with times that a test gives: what stays in 16 bits where, and what the ledger says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import quant_compile
from quant_compile import backend
from quant_compile.ir.errors import OptionError, PolicyError
from quant_compile.ir.family import Reject, family_of
from quant_compile.ir.scheme import parse
from quant_compile.lowering.guard import Job, Plain, Product

GUARD: dict[str, Any] = {"guard": "never_slower"}
Compiled = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def pretend(monkeypatch: pytest.MonkeyPatch, time_of: Callable[[Job, int], float | Reject]) -> None:
    monkeypatch.setattr(backend, "guard_times", lambda target, level, device: time_of)


def bf16_wins_from(m: int) -> Callable[[Job, int], float]:
    """Quantized products take 1 µs, linears in 16 bits 5 below m and 0.2 above; quantizing is free."""

    def time_of(job: Job, at: int) -> float:
        if isinstance(job, Product):
            return 1.0
        return (5.0 if at < m else 0.2) if isinstance(job, Plain) else 0.0

    return time_of


class Mlp(nn.Module):
    """Two linears of one input and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def reference(model: Mlp, x: Tensor, spec: str) -> Tensor:
    """The model with each linear as its scheme's truth computes it."""
    scheme, family = parse(spec), family_of(parse(spec))

    def linear(x: Tensor, layer: nn.Linear) -> Tensor:
        planes = family.quantize_input(x, scheme, None) if scheme.input_activations else (x,)
        return family.linear(planes, family.quantize_weight(layer.weight, scheme), layer.bias, scheme, x.dtype)

    return linear(F.silu(linear(x, model.gate)) * linear(x, model.up), model.down)


def by_compile(model: nn.Module, policy: Any, **options: Any) -> nn.Module:
    return quant_compile.compile(model, policy, **options)


def by_torch(model: nn.Module, policy: Any, **options: Any) -> nn.Module:
    return torch.compile(model, backend="sglquant", options={"policy": policy, **options})  # type: ignore[return-value]


DOORS = pytest.mark.parametrize("door", [by_compile, by_torch])


@DOORS
@pytest.mark.parametrize("spec", ["W8A8", "W8A16", "FP8_DYNAMIC", "W4A16"])
def test_decode_is_quantized_and_the_prompt_stays_in_16_bits(
    monkeypatch: pytest.MonkeyPatch, spec: str, door: Callable[..., nn.Module]
) -> None:
    pretend(monkeypatch, bf16_wins_from(8))
    model = Mlp()
    compiled = door(model, {"default": spec, "strict": True}, **GUARD)
    for _ in range(2):
        one, many = torch.randn(1, 64), torch.randn(16, 64)
        torch.testing.assert_close(compiled(one), reference(model, one, spec), rtol=0, atol=1e-4)
        torch.testing.assert_close(compiled(many), model.forward(many), rtol=1e-6, atol=1e-6)
        # Both results are far enough apart for the tolerances to tell them.
        assert (reference(model, one, spec) - model.forward(one)).abs().max() > 5e-4
    report = quant_compile.report(model)
    assert [name for name, _ in report.guarded] == ["gate.weight", "up.weight", "down.weight"]
    assert report.coverage == 1.0 and not report.misses and not report.skips
    gate = report.lines[0]
    assert gate.scheme == spec and gate.kernels
    assert f"guard: f32 0.4 µs, {spec} 1.0 µs" in gate.reason and "2 linears of one input" in gate.reason
    down = next(line for line in report.lines if line.names[0] == "down.weight")
    assert f"guard: f32 0.2 µs, {spec} 1.0 µs at m <= 1024" in down.guarded
    assert down.bytes_after > down.bytes_before, "planes and the original"
