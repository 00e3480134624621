"""Weights that accelerate lends to modules for one call: right values, packed once for each content, and lines in the report."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quant_compile
from quant_compile import WeightError
from quant_compile.lowering.weights import STORE
from quant_compile.model.ledger import LEDGER
from quant_compile.runtime import GraphRunner
from tests.runtime_support import CompileCounter, Mlp, Stack, bf16, dynamo_config, plain_inductor, reference_of

__all__ = ["CompileCounter", "dynamo_config", "plain_inductor"]
accelerate = pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.usefixtures("plain_inductor", "dynamo_config"), pytest.mark.filterwarnings("ignore::UserWarning"),
]  # fmt: skip
STRICT = {"default": "W8A8", "strict": True}


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def on_cpu(model: nn.Module, folder: Path) -> None:
    accelerate.cpu_offload(model, execution_device="cpu")


def on_disk(model: nn.Module, folder: Path) -> None:
    accelerate.disk_offload(model, str(folder), execution_device="cpu")


def by_blocks(model: nn.Module, folder: Path) -> None:
    accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=["Mlp"])


def dispatched(model: nn.Module, folder: Path) -> None:
    devices = {"layers.0": "cpu", "layers.1": "disk"}
    accelerate.dispatch_model(model, devices, main_device="cpu", offload_dir=str(folder))


WAYS = [on_cpu, on_disk, by_blocks, dispatched]


def by_package(model: nn.Module) -> Callable[..., Any]:
    return quant_compile.compile(model, STRICT, kernels="reference")


def by_torch(model: nn.Module) -> Callable[..., Any]:
    return torch.compile(model, backend="sglquant", options={"policy": STRICT, "kernels": "reference"})


def sizes() -> tuple[int, ...]:
    gc.collect()
    runners = [found for found in gc.get_objects() if type(found) is GraphRunner]
    return len(STORE._entries), len(LEDGER._records), sum(len(runner._bindings) for runner in runners)


@pytest.mark.parametrize("door", [by_package, by_torch])
@pytest.mark.parametrize("first", ["offloaded", "compiled"])
@pytest.mark.parametrize("way", WAYS)
def test_offloaded_weights(way: Any, first: str, door: Any, tmp_path: Path) -> None:
    model, x = Stack(2).bfloat16().requires_grad_(False), bf16(5, 32)
    wanted, plain = reference_of(model, "W8A8")(x), copy.deepcopy(model)
    if first == "offloaded":
        way(model, tmp_path)
        run = door(model)
    else:
        run = door(model)
        run(x)
        way(model, tmp_path)
    assert torch.equal(run(x), wanted) and torch.equal(run(x), wanted)
    packed, before = STORE.packed, sizes()
    for _ in range(4):
        assert torch.equal(run(x), wanted)
    assert STORE.packed == packed and sizes() == before
    report = quant_compile.report(model)
    assert report.coverage == 1.0 and not report.skips
    assert [line.names for line in report.lines if line.scheme] == [(name,) for name, _ in plain.named_parameters()]
    assert quant_compile.release(model) == sum(p.nbytes for p in model.parameters() if not p.is_meta)  # no lent ones


@pytest.mark.parametrize("way", [on_cpu, on_disk])
def test_other_content_is_seen(way: Any, tmp_path: Path) -> None:
    """In the memory or the file that weights are copied from, or under a new hook."""
    model, x = Mlp().bfloat16().requires_grad_(False), bf16(5, 32)
    other = Mlp().bfloat16().requires_grad_(False)
    way(model, tmp_path / "first")
    run = by_package(model)
    run(x)
    if way is on_cpu:
        model.up_proj._hf_hook.weights_map["weight"].mul_(2)
        changed = copy.deepcopy(other)
        for name in ("up_proj", "gate_proj", "down_proj"):
            changed.get_submodule(name).weight.copy_(model.get_submodule(name)._hf_hook.weights_map["weight"])
        assert torch.equal(run(x), reference_of(changed, "W8A8")(x))
    accelerate.hooks.remove_hook_from_submodules(model)
    torch._dynamo.reset()  # Dynamo does not look again at code that hooks have kept it from compiling
    model.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(run(x), reference_of(other, "W8A8")(x))
    way(model, tmp_path / "second")
    assert torch.equal(run(x), reference_of(other, "W8A8")(x))
    assert quant_compile.refresh(model) == 3
    assert torch.equal(run(x), reference_of(other, "W8A8")(x))


def test_lenders_that_say_nothing_of_their_content() -> None:
    """A map of another kind: values are compared by a checksum."""

    class Source:
        def __init__(self, weights: dict[str, Tensor]) -> None:
            self.weights = weights

        def __getitem__(self, name: str) -> Tensor:
            return self.weights[name].clone()

    model, x = Mlp().bfloat16().requires_grad_(False), bf16(5, 32)
    on_cpu(model, Path())
    kept = {}
    for name in ("up_proj", "gate_proj", "down_proj"):
        hook = model.get_submodule(name)._hf_hook
        kept[name] = {"weight": hook.weights_map["weight"].clone()}
        hook.weights_map = Source(kept[name])
    run = by_package(model)
    wanted = run(x)
    before = STORE.packed
    assert torch.equal(run(x), wanted) and STORE.packed == before
    kept["down_proj"]["weight"].data.zero_()  # which no version tells
    assert torch.equal(run(x), x) and STORE.packed > before


def test_release_weights_leaves_lent_weights_alone(tmp_path: Path) -> None:
    model, x = Stack(2).bfloat16().requires_grad_(False), bf16(5, 32)
    wanted = reference_of(model, "W8A8")(x)
    on_cpu(model, tmp_path)
    run = quant_compile.compile(model, STRICT, kernels="reference", release_weights=True)
    for _ in range(3):
        assert torch.equal(run(x), wanted)
    quant_compile.uncompile(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    torch._dynamo.reset()
    assert torch.equal(quant_compile.compile(model, STRICT, kernels="reference")(x), wanted)


def test_a_meta_model_that_nobody_lends_weights_to_is_refused() -> None:
    model = Stack(2).to("meta")
    with pytest.raises(WeightError, match="meta"):
        quant_compile.compile(model, STRICT)
