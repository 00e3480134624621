"""Weights rounded for inputs with factors (AWQ, SmoothQuant): what calibrate writes, what graphs compute, what reports say."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import quant_compile
from quant_compile import MissingScalesError, SaveError, WeightError
from quant_compile.ir.family import family_of
from quant_compile.ir.scheme import parse
from quant_compile.lowering.rounding.recipe import plane_key
from quant_compile.measure.weights import chosen_by
from quant_compile.rounded import FEWER, INSIDE, NOT_QUANTIZED
from quant_compile.simulate import Simulation
from tests.moe_support import FAMILIES
from tests.runtime_support import CompileCounter, Stack, plain_inductor

__all__ = ["plain_inductor"]

REFERENCE = {"kernels": "reference"}
UP, GATE, DOWN = (f"layers.0.{name}_proj" for name in ("up", "gate", "down"))


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        yield


def data(count: int = 4, rows: int = 100, seed: int = 0) -> list[Tensor]:
    """Inputs of which some columns are much larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.ones(32)
    size[::9] = 15
    return [(torch.randn(rows, 32, generator=generator) * size).bfloat16() for _ in range(count)]


def made(method: str, spec: str, layers: int = 1, **more: Any) -> tuple[nn.Module, quant_compile.Policy]:
    torch.manual_seed(0)
    model = Stack(layers).bfloat16()
    custom = parse(spec).to_fields() if "." in spec else spec
    return model, quant_compile.calibrate(model, data(), {"default": custom, "method": method, **more}, progress=False)


def stored(policy: quant_compile.Policy, name: str, spec: str) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Planes and factor of a weight in the policy's file."""
    factor = quant_compile.options.PolicySource(policy, "").rounding((name,)).factor
    count = len(family_of(parse(spec)).weight_planes(parse(spec), 1, 1, torch.bfloat16))
    with safe_open(str(policy.planes), "pt") as file:
        return tuple(file.get_tensor(plane_key(name, i)) for i in range(count)), factor and factor.read()


@pytest.mark.parametrize(
    ("method", "spec"),
    [
        ("awq", "int4.group16+16"),
        ("awq", "NVFP4"),
        ("awq+gptq", "int4.group16+16"),
        ("smoothquant", "W8A8"),
        ("smoothquant", "W4A8"),
    ],
)
def test_end_to_end(method: str, spec: str, plain_inductor: CompileCounter) -> None:
    """One multiplication for the siblings, which merge; the numbers are the families' over the file's planes; the model is as it was."""
    model, policy = made(method, spec)
    scheme, before, x = parse(spec), copy.deepcopy(model), data(1, seed=9)[0]
    family, shared = family_of(scheme), stored(policy, UP, spec)[1]
    assert shared is not None and torch.equal(shared, stored(policy, GATE, spec)[1])

    def linear(name: str, x: Tensor) -> Tensor:
        planes, factor = stored(policy, name, spec)
        x = x if factor is None else x * factor
        quantized = (x,) if scheme.input_activations is None else family.quantize_input(x, scheme, None)
        return family.linear(quantized, planes, None, scheme, x.dtype)

    plain = model(x).float()
    quant_compile.compile(model, policy=policy, **REFERENCE)
    found = model(x)
    reference = copy.deepcopy(before)
    layer = reference.layers[0]
    for name in ("up", "gate", "down"):
        getattr(layer, f"{name}_proj").forward = lambda h, name=name: linear(f"layers.0.{name}_proj", h)
    torch.testing.assert_close(found, reference(x), rtol=2e-2, atol=2e-2 * float(plain.abs().max()))
    assert float((found.float() - plain).norm() / plain.norm()) < 0.15
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    text = quant_compile.report(model).lines
    assert all(method.split("+")[0] in line.reason for line in text if line.names[0].startswith(UP))
    graph = plain_inductor.graphs[-1].graph
    factors = {node.name for node in graph.find_nodes(op="placeholder") if "input_factor" in node.name}
    products = [node for node in graph.nodes if any(used.name in factors for used in node.all_input_nodes)]
    expected = 1 + (stored(policy, DOWN, spec)[1] is not None)
    assert len(factors) == len(products) == expected
    linears = [node for node in graph.nodes if "names" in node.meta]
    assert sorted(len(node.meta["names"]) for node in linears) == [1, 2]


def test_layers_share_a_graph_and_have_their_own_factors(plain_inductor: CompileCounter) -> None:
    model, policy = made("awq", "int4.group16+16", layers=2)
    first, second = (stored(policy, f"layers.{i}.up_proj", "int4.group16+16")[1] for i in range(2))
    assert first is not None and second is not None and not torch.equal(first, second)
    x = data(1, seed=3)[0]
    plain = model(x).float()
    for layer in model.layers:
        layer.compile(backend="sglquant", options={"policy": policy, **REFERENCE})
    assert float((model(x).float() - plain).norm() / plain.norm()) < 0.25


def test_static_scales_are_those_of_multiplied_inputs() -> None:
    _, policy = made("smoothquant", "W8A8_STATIC")
    factor = stored(policy, UP, "W8A8_STATIC")[1]
    assert factor is not None and policy.scales is not None
    largest = max(float((x * factor).abs().max()) for x in data())
    with safe_open(str(policy.scales), "pt") as file:
        assert float(file.get_tensor(f"{UP}.input_scale")) == pytest.approx(largest / 127, rel=1e-3)
    again = quant_compile.calibrate(
        made("smoothquant", "W8A8_STATIC")[0],
        data(),
        {"default": "W8A8_STATIC", "planes": str(policy.planes)},
        progress=False,
    )
    with safe_open(str(again.scales), "pt") as file:
        assert float(file.get_tensor(f"{UP}.input_scale")) == pytest.approx(largest / 127, rel=1e-3)


@pytest.mark.parametrize(("method", "spec"), [("awq", "NVFP4"), ("smoothquant", "W8A8")])
def test_simulated_as_compiled(method: str, spec: str, plain_inductor: CompileCounter) -> None:
    model, policy = made(method, spec)
    x = data(1, seed=9)[0]
    with Simulation(chosen_by(policy, model)):
        simulated = model(x).float()
    plain = model(x).float()
    quant_compile.compile(model, policy=policy, **REFERENCE)
    found = model(x).float()
    # Codes flip where a 16-bit step moves an input; far less than what quantization does.
    assert float((simulated - found).norm()) < 0.35 * float((found - plain).norm())


def test_release_restore_refresh_uncompile(plain_inductor: CompileCounter) -> None:
    model, policy = made("awq", "int4.group16+16")
    x, source = data(1)[0], copy.deepcopy(model.state_dict())
    plain = model(x)
    quant_compile.compile(model, policy=policy, release_weights=True, **REFERENCE)
    first = model(x)
    assert torch.equal(model(x), first)
    quant_compile.restore(model, source)
    assert torch.equal(model(x), first)
    quant_compile.restore(model, source)
    quant_compile.uncompile(model)
    assert torch.equal(model(x), plain)
    quant_compile.compile(model, policy=policy, **REFERENCE)
    assert torch.equal(model(x), first)
    assert quant_compile.refresh(model) and torch.equal(model(x), first)
    model.get_parameter(f"{UP}.weight").mul_(1.01)
    with pytest.raises(WeightError, match="not those of this weight"):
        model(x)
    model.load_state_dict(source)
    quant_compile.uncompile(model)
    assert torch.equal(model(x), plain)
    quant_compile.compile(model, policy={"default": "W4A16"}, **REFERENCE)
    model(x)
    assert not any("input_factor" in node.name for node in plain_inductor.graphs[-1].graph.nodes)


@pytest.mark.slow
def test_experts(plain_inductor: CompileCounter) -> None:
    """The block's input may have factors; what is between the two weights may not, and the ledger says so."""
    model = FAMILIES["mixtral"].make("eager")
    ids = torch.randint(0, model.config.vocab_size, (16, 60), generator=torch.Generator().manual_seed(2))
    policy = quant_compile.calibrate(
        model, [{"input_ids": ids, "use_cache": False}], {"default": "int4.group16+16", "method": "awq"}, progress=False
    )
    model.set_experts_implementation("grouped_mm")
    plain = model(input_ids=ids, use_cache=False).logits
    quant_compile.compile(model, policy=policy, **REFERENCE)
    ours = model(input_ids=ids, use_cache=False).logits
    nearest = FAMILIES["mixtral"].make("grouped_mm")
    nearest.load_state_dict(model.state_dict())
    quant_compile.compile(nearest, policy={"default": "int4.group16+16"}, **REFERENCE)
    assert (ours - plain).norm() < (nearest(input_ids=ids, use_cache=False).logits - plain).norm()
    reasons = {
        line.names[0].rpartition(".")[2]: line.reason
        for line in quant_compile.report(model).lines
        if "experts" in line.names[0]
    }
    assert "rounding: awq, search" in reasons["gate_up_proj"] and INSIDE in reasons["down_proj"]


@pytest.mark.slow
def test_a_saved_model(tmp_path: Path, plain_inductor: CompileCounter) -> None:
    """The format of this package has a place for factors; compressed-tensors has none, and nothing is written."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).bfloat16().eval()
    ids = torch.randint(0, 64, (4, 40))
    policy = quant_compile.calibrate(
        model, [{"input_ids": ids}], {"default": "int4.group16+16", "method": "awq"}, progress=False
    )
    quant_compile.compile(model, policy=policy, **REFERENCE)
    wanted = model(input_ids=ids, use_cache=False).logits
    with pytest.raises(SaveError, match="its input is reordered or scaled for its codes"):
        quant_compile.save(model, tmp_path / "ct")
    assert not (tmp_path / "ct" / "model.safetensors").exists()
    quant_compile.save(model, tmp_path / "packed", "packed")
    loaded = quant_compile.load(tmp_path / "packed", **REFERENCE)
    assert_near(loaded(input_ids=ids, use_cache=False).logits, wanted)
    model_dir = tmp_path / "plain"
    quant_compile.uncompile(model)
    model.save_pretrained(model_dir)
    again = quant_compile.load(model_dir, policy=policy, **REFERENCE)
    assert_near(again(input_ids=ids, use_cache=False).logits, wanted)


def assert_near(found: Tensor, wanted: Tensor) -> None:
    """Alike but for sums in another order, which round a 16-bit step otherwise now and then."""
    assert float((found - wanted).float().norm()) < 5e-3 * float(wanted.float().norm())


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_inputs_that_are_no_numbers(method: str) -> None:
    batches = data()
    batches[1][3, 5] = float("nan")
    with pytest.raises(MissingScalesError, match="NaN or inf"):
        quant_compile.calibrate(Stack(1).bfloat16(), batches, {"default": "W4A8", "method": method}, progress=False)
    assert not list(Path().glob("*.safetensors*"))


@pytest.mark.parametrize(
    ("method", "spec", "rows", "reason"), [("awq", "W4A16", 8, FEWER), ("smoothquant", "W4A16", 100, NOT_QUANTIZED)]
)
def test_named_fallbacks(method: str, spec: str, rows: int, reason: str, plain_inductor: CompileCounter) -> None:
    model = Stack(1).bfloat16()
    policy = quant_compile.calibrate(model, data(1, rows), {"default": spec, "method": method}, progress=False)
    quant_compile.compile(model, policy=policy, **REFERENCE)
    model(data(1)[0])
    assert (
        f"search by inputs (no factors: {reason.removeprefix('no factors: ')})"
        in quant_compile.report(model).lines[0].reason
    )
