"""Torch's recompile limit, in whatever thread it is met: raised for quantized models alone, and said where it cannot be."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quant_compile
from quant_compile import PolicyError
from quant_compile.ir.errors import RecompileLimitWarning
from tests.runtime_support import CompileCounter, bf16, dynamo_config, inner_error, plain_inductor, reference_of

__all__ = ["dynamo_config", "plain_inductor"]
LIMIT = "accumulated_recompile_limit"
pytestmark = [pytest.mark.usefixtures("plain_inductor"), pytest.mark.filterwarnings("ignore::UserWarning")]


class Flagged(nn.Module):
    """Dynamo makes a graph for each value of a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.flag = nn.Linear(32, 32), nn.Linear(32, 16), 0

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x))) * (1 + self.flag)


class Outer(nn.Module):
    """The same, behind a graph break in a function of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Flagged()

    @property
    def flag(self) -> int:
        return self.inner.flag

    @flag.setter
    def flag(self, value: int) -> None:
        self.inner.flag = value

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        torch._dynamo.graph_break()
        return self.inner(x)


def by_package(model: nn.Module, policy: Any) -> Callable[..., Any]:
    return quant_compile.compile(model, policy, kernels="reference")


def by_torch(model: nn.Module, policy: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="sglquant", options={"policy": policy, "kernels": "reference"})


def in_thread(call: Callable[[], Any]) -> Any:
    """What a call gives or raises in another thread."""
    made: list[Any] = []

    def run() -> None:
        try:
            made.append(call())
        except BaseException as error:
            made.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return made[0]


def called(model: Any, run: Callable[..., Any], flags: range, x: Tensor) -> Tensor:
    out = x
    with torch.no_grad():
        for flag in flags:
            model.flag = flag
            out = run(x)
    return out


@pytest.mark.parametrize("door", [by_package, by_torch])
@pytest.mark.parametrize("kind", [Flagged, Outer])
def test_the_limit_is_raised_for_every_thread(door: Any, kind: Any, dynamo_config: Any) -> None:
    model, x = kind().bfloat16().requires_grad_(False), bf16(3, 32)
    run = door(model, {"default": "W8A8", "strict": True})
    count = dynamo_config.recompile_limit + 1
    for start in (0, count, 2 * count):
        found = in_thread(lambda start=start: called(model, run, range(start, start + count), x))
        assert torch.equal(found, reference_of(model, "W8A8")(x))
    assert torch.equal(called(model, run, range(90, 92), x), reference_of(model, "W8A8")(x))
    report = quant_compile.report(model)
    assert report.coverage == 1.0 and any("raised it to" in note for note in report.notes)


@pytest.mark.parametrize("door", [by_package, by_torch])
@pytest.mark.parametrize("kind", [Flagged, Outer])
@pytest.mark.parametrize("where", [in_thread, lambda call: call()])
def test_a_limit_that_cannot_be_raised_is_in_the_report(door: Any, kind: Any, where: Any, dynamo_config: Any) -> None:
    model, x = kind().bfloat16().requires_grad_(False), bf16(3, 32)
    run = door(model, "W8A8")
    called(model, run, range(3), x)
    assert quant_compile.report(model).coverage == 1.0

    def limited() -> Tensor:
        with torch._dynamo.config.patch({LIMIT: 4}), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return called(model, run, range(3, 7), x)

    assert torch.equal(where(limited), model.forward(x))  # eagerly
    report = quant_compile.report(model)
    assert report.coverage == 0.0 and any(LIMIT in note and "UNQUANTIZED" in note for note in report.notes)
    assert len(report.skips) == 2 and all("recompile limit" in reason for _, reason in report.skips)


@pytest.mark.parametrize("door", [by_package, by_torch])
@pytest.mark.parametrize("where", [in_thread, lambda call: call()])
def test_a_strict_policy_raises_where_the_limit_cannot_be_raised(door: Any, where: Any, dynamo_config: Any) -> None:
    model, x = Flagged().bfloat16().requires_grad_(False), bf16(3, 32)
    run = door(model, {"default": "W8A8", "strict": True})
    called(model, run, range(3), x)

    def limited() -> Any:
        with torch._dynamo.config.patch({LIMIT: 3}):
            try:
                return called(model, run, range(3, 4), x)
            except Exception as error:
                return inner_error(error)

    for _ in range(2):  # torch has not given up on the function
        error = where(limited)
        assert isinstance(error, PolicyError) and LIMIT in str(error) and "Fix:" in str(error), repr(error)
    assert torch.equal(called(model, run, range(5, 6), x), reference_of(model, "W8A8")(x))


def test_functions_under_other_backends_keep_the_limit(dynamo_config: Any) -> None:
    by_torch(Flagged().requires_grad_(False), "W8A8")(torch.randn(3, 32))
    torch._dynamo.reset()  # code is shared by instances
    model, limit = Flagged(), dynamo_config.recompile_limit
    graphs = CompileCounter()

    def count(gm: Any, inputs: Any) -> Any:
        return graphs(gm, inputs)

    with warnings.catch_warnings():
        warnings.simplefilter("error", RecompileLimitWarning)
        called(model, torch.compile(model, backend=count), range(limit + 3), torch.randn(3, 32))
    assert len(graphs) == limit == dynamo_config.recompile_limit
