"""Layers compiled one by one: Dynamo shares graphs between them, or runs out; each layer gets its own scheme."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import quant_compile
from quant_compile.ir.errors import RecompileLimitWarning
from quant_compile.lowering.weights import STORE
from tests.runtime_support import (
    EXACT,
    UNMERGED,
    CompileCounter,
    Stack,
    bf16,
    dynamo_config,
    plain_inductor,
    reference_of,
)

__all__ = ["dynamo_config", "plain_inductor"]

LAYERS = 40
INT8 = {"policy": EXACT, "kernels": "reference"}


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def compile_layers(model: nn.Module, options: dict[str, Any], dynamic: bool | None = None) -> None:
    for layer in model.layers:
        layer.compile(backend="sglquant", options=options, dynamic=dynamic)


class Cache:
    """As transformers' StaticCache: each layer writes its keys at an index that is the layer's own attribute."""

    def __init__(self, layers: int, hidden: int, length: int) -> None:
        self.keys = [torch.zeros(length, hidden, dtype=torch.bfloat16) for _ in range(layers)]

    def update(self, key: Tensor, positions: Tensor, layer_idx: int) -> Tensor:
        return self.keys[layer_idx].index_copy_(0, positions, key)


class CachedLayer(nn.Module):
    def __init__(self, layer_idx: int, hidden: int = 32) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.k_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        keys = cache.update(self.k_proj(x), positions, self.layer_idx)
        return x + 0.01 * nn.functional.hardtanh(x @ keys.t()) @ keys


class CachedStack(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CachedLayer(i) for i in range(layers))

    def forward(self, x: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        for layer in self.layers:
            x = layer(x, positions, cache)
        return x


def generate(model: nn.Module, layers: int) -> list[Tensor]:
    """A prefill of 5 and three decode steps."""
    cache = Cache(layers, 32, 8)
    outputs = [model(bf16(5, 32), torch.arange(5), cache)]
    return outputs + [model(bf16(1, 32, seed=step), torch.tensor([step]), cache) for step in (5, 6, 7)]


def test_40_layers_without_a_cache_are_compiled_at_most_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx as module

    original: Callable[..., Any] = module.compile_fx
    calls: list[int] = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "compile_fx", counting)
    model = Stack(LAYERS)
    with torch._inductor.config.patch(force_disable_caches=True):
        compile_layers(model, {"policy": "w8a16", "kernels": "reference"})
        x = bf16(5, 32).float()
        y = model(x)
    assert 1 <= len(calls) <= 2
    assert quant_compile.report(model).coverage == 1.0
    wanted = reference_of(model, "W8A16")(x)
    torch.testing.assert_close(y, wanted, rtol=1e-3, atol=1e-3)  # f32: only the order of sums differs


def test_40_layers_each_have_their_own_planes(plain_inductor: CompileCounter) -> None:
    model = Stack(LAYERS).bfloat16()
    compile_layers(model, INT8)
    for rows in (5, 7, 300):
        x = bf16(rows, 32)
        assert torch.equal(model(x), reference_of(model, EXACT)(x))
    assert len(plain_inductor) <= 2
    report = quant_compile.report(model).require(1.0)
    assert report.share == 1.0 and len(report.lines) == 3 * LAYERS
    assert report.lines[-1].names == (f"layers.{LAYERS - 1}.down_proj.weight",)


def test_40_layers_with_a_static_cache_are_all_quantized(plain_inductor: CompileCounter, dynamo_config: Any) -> None:
    model = CachedStack(LAYERS).bfloat16()
    compile_layers(model, INT8)
    limit = dynamo_config.recompile_limit
    with pytest.warns(RecompileLimitWarning, match="recompile_limit; raised it"):
        outputs = generate(model, LAYERS)
    assert len(plain_inductor) >= 2 * LAYERS > limit, "layer_idx must be guarded, or the trap is not set"
    for found, wanted in zip(outputs, generate(reference_of(model, EXACT), LAYERS), strict=True):
        assert torch.equal(found, wanted), "a layer ran in bf16"
    report = quant_compile.report(model).require(1.0)
    assert any("recompile_limit" in note and "raised" in note for note in report.notes)
    assert all(len(STORE.entry(layer.k_proj.weight).packs) == 1 for layer in model.layers)


def test_recompile_limit_truly_exhausted_is_said(plain_inductor: CompileCounter, dynamo_config: Any) -> None:
    layers = 14
    dynamo_config.recompile_limit, dynamo_config.accumulated_recompile_limit = 4, 10
    model = CachedStack(layers).bfloat16()
    compile_layers(model, INT8)
    cache, x = Cache(layers, 32, 8), bf16(5, 32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = model(x, torch.arange(5), cache)
    texts = [str(w.message) for w in caught if issubclass(w.category, RecompileLimitWarning)]
    assert any("UNQUANTIZED" in text and "accumulated_recompile_limit" in text for text in texts)
    assert dynamo_config.recompile_limit == 10
    report = quant_compile.report(model)
    assert any("UNQUANTIZED" in note for note in report.notes)
    assert len(plain_inductor) == 10
    assert report.coverage == pytest.approx(10 / layers)
    assert {name.split(".")[1] for name, _ in report.skips} == {"10", "11", "12", "13"}
    mixed = reference_of(model, lambda name: EXACT if int(name.split(".")[1]) < 10 else None)
    assert torch.equal(y, mixed(x, torch.arange(5), Cache(layers, 32, 8))), "what the ledger says is what ran"
    with pytest.raises(quant_compile.CoverageError):
        report.require(1.0)


MIXED = {
    "default": "FP8_DYNAMIC",
    **UNMERGED,
    "rules": [{"match": "re:layers\\.(0|5)\\..*", "scheme": "keep"}, {"match": "layers.2.*", "scheme": "W8A8"}],
}


def mixed_scheme(name: str) -> str | None:
    return {"0": None, "5": None, "2": "W8A8"}.get(name.split(".")[1], "FP8_DYNAMIC")


def test_layers_of_one_graph_keep_their_own_schemes(plain_inductor: CompileCounter) -> None:
    model = Stack(6).bfloat16()
    compile_layers(model, {"policy": MIXED, "kernels": "reference"}, dynamic=True)
    wanted = reference_of(model, mixed_scheme)
    for rows in (9, 7, 300):
        x = bf16(rows, 32)
        assert torch.equal(model(x), wanted(x))
    assert len(plain_inductor) == 3, "one Dynamo graph, one variant for each of kept, FP8 and INT8"
    schemes = {line.names[0].split(".")[1]: line.scheme for line in quant_compile.report(model).lines}
    assert schemes == {"0": None, "1": "FP8_DYNAMIC", "2": "W8A8", "3": "FP8_DYNAMIC", "4": "FP8_DYNAMIC", "5": None}
    report = quant_compile.report(model)
    assert report.coverage == 1.0 and report.share == pytest.approx(4 / 6)
    assert all("rule 1" in line.reason for line in report.lines if line.scheme is None)


class Recorder(nn.Module):
    """Runs the first ``active`` layers and keeps what went in and out of each."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(One() for _ in range(layers))
        self.active = layers

    def forward(self, x: Tensor) -> Tensor:
        self.seen: list[tuple[Tensor, Tensor]] = []
        for layer in self.layers[: self.active]:
            y = layer(x)
            self.seen.append((x, y))
            x = y
        return x


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) + self.proj(x)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).float().norm() / wanted.float().norm())


def test_a_variant_compiled_at_call_time_keeps_dynamic_shapes() -> None:
    """With Inductor, since it is Inductor that would fix the first length: 9 rows, then 7, then 300."""
    model = Recorder(6)
    compile_layers(model, {"policy": MIXED, "kernels": "reference"}, dynamic=True)
    wanted = reference_of(model, mixed_scheme)
    model.active = 1
    model(bf16(9, 32).float())  # the traced layer is kept; all others are first seen by a call of the compiled graph
    assert quant_compile.report(model).share == 0.0
    model.active = 6
    for rows in (9, 7, 300, 1):
        model(bf16(rows, 32, seed=rows).float())
        for index, (x, y) in enumerate(model.seen):
            assert y.shape == (rows, 32)
            # f32: a code on the edge may round the other way under Inductor, 1e-2 of the scheme's own error at most
            assert relative(y, wanted.layers[index](x)) < 1e-4, (rows, index)
            assert (relative(y, model.layers[index].forward(x)) < 1e-5) == (mixed_scheme(f"layers.{index}") is None)
    assert quant_compile.report(model).coverage == 1.0


def test_a_variant_compiled_at_call_time_keeps_numbers_that_are_inputs() -> None:
    """With dynamic sizes Dynamo makes an input of a float attribute, as of a norm's eps: each layer has its own, and it may change."""

    class Layer(nn.Module):
        def __init__(self, eps: float) -> None:
            super().__init__()
            self.norm, self.up = LlamaRMSNorm(64, eps), nn.Linear(64, 64, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.norm(x))

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer(eps) for eps in (1e-6, 3.0, 7.0)])

        def forward(self, x: Tensor) -> list[Tensor]:
            return [layer(x) for layer in self.layers]

    model = Layers().bfloat16()
    eager = deepcopy(model)
    policy = {"default": "W8A16", "rules": [{"match": r"re:layers\.[12]\..*", "scheme": "W8A8"}]}
    compile_layers(model, {"policy": policy}, dynamic=True)
    for rows, eps in ((5, 7.0), (7, 7.0), (7, 50.0)):
        model.layers[2].norm.variance_epsilon = eager.layers[2].norm.variance_epsilon = eps
        x = bf16(rows, 64)
        assert all(relative(y, wanted) < 0.03 for y, wanted in zip(model(x), eager(x))), (rows, eps)
    assert {line.scheme for line in quant_compile.report(model).lines if line.scheme} == {"W8A16", "W8A8"}


def test_a_layer_never_seen_at_compile_time_is_packed_at_its_first_call(plain_inductor: CompileCounter) -> None:
    model = Stack(4).bfloat16()
    compile_layers(model, INT8, dynamic=True)
    x = bf16(9, 32)
    model.layers[0](x)
    graphs = len(plain_inductor)
    assert STORE.peek(model.layers[3].up_proj.weight) is None
    wanted = reference_of(model, EXACT)
    for rows in (9, 7, 300):
        x = bf16(rows, 32)
        assert torch.equal(model.layers[3](x), wanted.layers[3](x))
    assert len(plain_inductor) == graphs
    assert len(STORE.entry(model.layers[3].up_proj.weight).packs) == 1


def test_a_layer_that_cannot_have_its_scheme_fails_by_name(plain_inductor: CompileCounter) -> None:
    """The refusal comes at the call that first meets the layer, not silently."""
    model = Stack(3).bfloat16()
    model.layers[2].up_proj.weight[0, 0] = float("nan")
    compile_layers(model, INT8, dynamic=True)
    x = bf16(9, 32)
    with pytest.raises(quant_compile.WeightError, match="NaN or inf"):
        model(x)
    wanted = reference_of(model, lambda name: None if name.startswith("layers.2") else EXACT)
    assert torch.equal(model.layers[1](x), wanted.layers[1](x))


def test_sub_module_compile_names_weights_as_the_model_does(plain_inductor: CompileCounter) -> None:
    model = Stack(2).bfloat16()
    policy = {"default": "keep", "rules": [{"match": "layers.1.up_proj", "scheme": "W8A8"}]}
    model.layers[1].compile(backend="sglquant", options={"policy": policy, "kernels": "reference"})
    x = bf16(9, 32)
    wanted = reference_of(model, lambda name: "W8A8" if name == "layers.1.up_proj" else None)
    assert torch.equal(model(x), wanted(x))
    assert [line.names[0] for line in quant_compile.report(model).lines if line.scheme] == ["layers.1.up_proj.weight"]
