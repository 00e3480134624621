"""What runs outside of compiled graphs is in the account: skipped frames, breaks, functions that Dynamo leaves alone."""

from __future__ import annotations

import copy
import sys
import threading
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quant_compile
from quant_compile import PolicyError
from quant_compile.runtime import outside
from tests.runtime_support import CompileCounter, plain_inductor

__all__ = ["plain_inductor"]
STRICT = {"default": "W8A16", "strict": True}
X = torch.randn(2, 5, 32)


class Base(nn.Module):
    """Linears around something that Dynamo does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.last = nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.first(x)))

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class ItemInLoop(Base):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
            if x.abs().max().item() > 1e9:
                break
        return x


class PrintInLoop(ItemInLoop):
    def middle(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
            sys.stdout.write(f"{float(x.sum()):.0f}"[:0])
        return x


class Disabled(Base):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(32, 32))

    @torch.compiler.disable
    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.own)


class OfAChild(Base):
    """Multiplies by the weight of a module that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.held = nn.Linear(32, 32)

    @torch.compiler.disable
    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x, self.held.weight)


@pytest.mark.parametrize("kind", [ItemInLoop, PrintInLoop, Disabled, OfAChild])
def test_weights_read_outside_are_named(kind: type[Base], plain_inductor: CompileCounter) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(kind()).eval().requires_grad_(False)
    quant_compile.compile(model, "W8A16", kernels="reference")
    with torch.no_grad():
        model(X)
    report = quant_compile.report(model)
    named = {
        "ItemInLoop": "0.layers.0.weight",
        "PrintInLoop": "0.layers.0.weight",
        "Disabled": "0.own",
        "OfAChild": "0.held.weight",
    }
    reasons = dict(report.skips)
    assert report.coverage < 1.0 and "outside of the compiled graph, because" in reasons[named[kind.__name__]]
    with pytest.raises(quant_compile.CoverageError, match=r"outside of the compiled graph"):
        report.require(1.0)
    torch._dynamo.reset()
    strict = nn.Sequential(kind()).eval().requires_grad_(False)
    quant_compile.compile(strict, STRICT, kernels="reference")
    with (
        torch.no_grad(),
        pytest.raises(PolicyError, match=r"(?s)strict.*outside of the compiled graph.*Fix: ") as caught,
    ):
        strict(X)
    assert named[kind.__name__] in str(caught.value)


@pytest.mark.parametrize("constant", [{"mode": 1}, [1, 2], {3}], ids=["dict", "list", "set"])
def test_code_without_a_hash_is_looked_at(constant: Any, plain_inductor: CompileCounter) -> None:
    """Code that Dynamo writes around a break may hold such constants, and then the code has no hash."""
    torch._dynamo.reset()

    def doubled(x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        return F.linear(x, own)

    code = doubled.__code__.replace(co_consts=(*doubled.__code__.co_consts, constant))
    with pytest.raises(TypeError):
        hash(code)
    unhashed = FunctionType(code, globals())

    class Calls(Disabled):
        @torch.compiler.disable
        def middle(self, x: torch.Tensor) -> torch.Tensor:
            return unhashed(x, self.own)

    model = Calls().eval().requires_grad_(False)
    quant_compile.compile(model, "W8A16", kernels="reference")
    with torch.no_grad():
        model(X)
    assert "outside of the compiled graph" in dict(quant_compile.report(model).skips)["own"]


def test_dynamos_own_reason_and_place(plain_inductor: CompileCounter) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(ItemInLoop()).eval().requires_grad_(False)
    quant_compile.compile(model, "W8A16", kernels="reference")
    with torch.no_grad():
        model(X)
    reason = dict(quant_compile.report(model).skips)["0.layers.0.weight"]
    assert "item()" in reason and "test_outside.py" in reason and "ItemInLoop." in reason


def test_what_a_rule_keeps_may_run_anywhere(plain_inductor: CompileCounter) -> None:
    torch._dynamo.reset()
    model = Disabled().eval().requires_grad_(False)
    rules = [{"match": "own", "scheme": "keep", "reason": "mine"}]
    quant_compile.compile(model, {**STRICT, "rules": rules}, kernels="reference")
    with torch.no_grad():
        model(X)
    assert quant_compile.report(model).coverage == 1.0


def test_a_whole_model_is_not_watched_for_long(plain_inductor: CompileCounter, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    watched: list[Any] = []
    settle = outside.Outside._settle
    monkeypatch.setattr(outside.Outside, "_settle", lambda *a: (watched.append(a[2]), settle(*a)))
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval().requires_grad_(False)
    quant_compile.compile(model, STRICT, kernels="reference")
    with torch.no_grad():
        for _ in range(5):
            model(X)
    assert len(watched) == 2 and not any(watched)
    assert sys.getprofile() is None


def test_dynamo_is_not_watched_at_work(plain_inductor: CompileCounter, monkeypatch: pytest.MonkeyPatch) -> None:
    """It calls tens of thousands of functions for a frame, before and after what it says of its beginning and end."""
    seen = list[str]()
    look = outside.Outside._look

    def spy(self: outside.Outside, frame: Any, event: str, argument: Any) -> None:
        seen.append(frame.f_code.co_filename)
        look(self, frame, event, argument)

    monkeypatch.setattr(outside.Outside, "_look", spy)
    model = quant_compile.compile(nn.Sequential(nn.Linear(32, 32), nn.ReLU()).eval(), STRICT, kernels="reference")
    with torch.no_grad():
        model(X)
    inside = [name for name in seen if "_dynamo" in name and not name.endswith(("eval_frame.py", "external_utils.py"))]
    assert len(seen) > 10
    assert len(inside) < 0.2 * len(seen), sorted(set(inside))


def test_another_profiler_is_left_alone(plain_inductor: CompileCounter) -> None:
    torch._dynamo.reset()
    model = Disabled().eval().requires_grad_(False)
    quant_compile.compile(model, "W8A16", kernels="reference")

    def mine(*_: Any) -> None: ...

    sys.setprofile(mine)
    try:
        with torch.no_grad():
            model(X)
        assert sys.getprofile() is mine
    finally:
        sys.setprofile(None)
    with torch.no_grad():
        model(X)
    assert "own" in dict(quant_compile.report(model).skips)


def test_every_thread_is_watched(plain_inductor: CompileCounter) -> None:
    torch._dynamo.reset()
    model = Disabled().eval().requires_grad_(False)
    quant_compile.compile(model, STRICT, kernels="reference")
    raised: list[BaseException] = []

    def call() -> None:
        try:
            with torch.no_grad():
                model(X)
        except PolicyError as error:
            raised.append(error)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert raised


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrences_do_not_take_the_linears_with_them(kind: Any, plain_inductor: CompileCounter) -> None:
    torch._dynamo.reset()

    class Recurrent(Base):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(32, 32, batch_first=True)

        def middle(self, x: torch.Tensor) -> torch.Tensor:
            return self.rnn(x)[0]

    model = Recurrent().eval().requires_grad_(False)
    quant_compile.compile(model, "W8A16", kernels="reference")
    with torch.no_grad():
        model(X)
    report = quant_compile.report(model)
    skipped = {name for name, _ in report.skips}
    assert skipped == {"rnn.weight_ih_l0", "rnn.weight_hh_l0"} and 0 < report.coverage < 1
    assert {line.names[0] for line in report.lines if line.scheme} == {"first.weight", "last.weight"}


class Part(nn.Module):
    """A module of the user's own."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.linear = nn.Linear(32, wide)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x))


class Encodes(nn.Module):
    """Has a method beside ``forward`` that a user calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Part(32)
        self.layers = nn.ModuleList(Part(32) for _ in range(2))
        self.head = Part(8)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encode(x) + 1


class Skipped(Encodes):
    """Its own frame is none that Dynamo compiles."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
            if x.abs().max().item() > 1e9:
                break
        return self.head(x)


def rounded(model: nn.Module) -> nn.Module:
    made = copy.deepcopy(model)
    for module in made.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.data.abs().amax(1, keepdim=True) / 127
            module.weight.data = (module.weight.data / scale).round() * scale
    return made


@pytest.mark.parametrize("kind", [Encodes, Skipped])
def test_modules_right_under_a_model_are_quantized_whoever_calls_them(
    kind: type[Any], plain_inductor: CompileCounter
) -> None:
    """By another method than forward, and where Dynamo skips the frame that calls them."""
    torch._dynamo.reset()
    model = kind().eval().requires_grad_(False)
    wanted = rounded(model)
    quant_compile.compile(model, STRICT, kernels="reference")
    with torch.no_grad():
        torch.testing.assert_close(model.encode(X), wanted.encode(X), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(X), wanted(X), rtol=1e-4, atol=1e-5)
    assert quant_compile.report(model).coverage == 1.0
    quant_compile.uncompile(model)
    assert all("_compiled_call_impl" not in vars(module) for module in model.modules())


class Methods(Base):
    """What callers do besides calling the model."""

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x)


BESIDE: dict[str, Any] = {
    "a method": lambda model: model.project(X),
    "forward": lambda model: model.forward(X),
    "a part": lambda model: model.last(X),
    "a stance": lambda model: forced(model),
    "another thing around it": lambda model: [model(X), model.project(X)],
}


def forced(model: nn.Module) -> None:
    with torch.compiler.set_stance("force_eager"):
        model(X)


@pytest.mark.parametrize("beside", BESIDE)
def test_what_runs_besides_the_model_is_seen_on_request(beside: str, plain_inductor: CompileCounter) -> None:
    torch._dynamo.reset()
    for policy in ("W8A16", STRICT):
        model = Methods().eval().requires_grad_(False)
        quant_compile.compile(model, policy)
        with torch.no_grad():
            for _ in range(3):
                model(X)
            with quant_compile.watch(model):
                model(X)
            report = quant_compile.report(model)
            assert report.coverage == 1.0 and not report.skips
            if policy is STRICT:
                with pytest.raises(PolicyError, match=r"last\.weight"), quant_compile.watch(model):
                    BESIDE[beside](model)
                continue
            with quant_compile.watch(model):
                BESIDE[beside](model)
        report = quant_compile.report(model)
        assert report.coverage < 1 and "last.weight" in dict(report.skips)
        assert "ran outside of the compiled graph" in dict(report.skips)["last.weight"]


def test_watching_needs_a_compiled_model_and_the_profile_hook() -> None:
    model = Methods().eval()
    with pytest.raises(quant_compile.OptionError, match="not compiled"), quant_compile.watch(model):
        pass
    quant_compile.compile(model, "W8A16")
    sys.setprofile(lambda *_: None)
    try:
        with pytest.raises(quant_compile.OptionError, match="a profiler is on"), quant_compile.watch(model):
            pass
    finally:
        sys.setprofile(None)
