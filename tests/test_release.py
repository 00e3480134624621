"""Releasing the original weights: what goes on, what raises, and what brings them back."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import quant_compile
from quant_compile import ReleasedWeightError, StaleWeightError
from quant_compile.lowering.weights import STORE, ReleasableParameter
from tests.runtime_support import (
    EXACT,
    UNMERGED,
    CompileCounter,
    Mlp,
    Stack,
    bf16,
    plain_inductor,
    reference_of,
    store_bytes,
)

__all__ = ["plain_inductor"]

REFERENCE = {"kernels": "reference"}


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


class Case:
    """A model, its original values and its quantized reference."""

    def __init__(self, model: nn.Module, spec: str = EXACT) -> None:
        self.model = model
        self.original = {name: value.clone() for name, value in model.state_dict().items()}
        self.wanted = reference_of(model, spec)

    def right(self, x: Tensor) -> bool:
        return torch.equal(self.model(x), self.wanted(x))

    def intact(self) -> bool:
        state = self.model.state_dict()
        return state.keys() == self.original.keys() and all(torch.equal(state[n], v) for n, v in self.original.items())


@pytest.fixture
def case(plain_inductor: CompileCounter) -> Case:
    """A released model, called once."""
    made = Case(Mlp(bias=True).bfloat16())
    quant_compile.compile(made.model, EXACT, release_weights=True, **REFERENCE)
    assert made.right(bf16(5, 32))
    return made


def original_bytes(model: nn.Module) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return sum(p.untyped_storage().nbytes() for p in model.parameters())


def test_release_weights_frees_the_originals_at_the_first_call(case: Case) -> None:
    assert original_bytes(case.model) == sum(p.numel() * 2 for p in case.model.parameters() if p.dim() == 1)
    report = quant_compile.report(case.model)
    assert [line.released for line in report.lines] == [line.scheme is not None for line in report.lines]
    assert report.coverage == 1.0
    assert report.bytes_total == sum(p.numel() * 2 for p in case.model.parameters())


def test_compiled_calls_and_recompiles_with_new_shapes_go_on(case: Case, plain_inductor: CompileCounter) -> None:
    for rows in (5, 7, 300, 1, 0):
        assert case.right(bf16(rows, 32)), rows
    graphs = len(plain_inductor)
    assert graphs >= 2
    torch._dynamo.reset()  # a fresh trace of a model whose weights are gone
    for rows in (5, 300):
        assert case.right(bf16(rows, 32)), rows
    assert len(plain_inductor) > graphs
    held = store_bytes(case.model)
    assert held == sum(p.numel() + 4 * p.shape[0] for p in case.model.parameters() if p.dim() == 2)


def test_release_weights_causes_no_recompile(plain_inductor: CompileCounter) -> None:
    """Dynamo guards the class of a weight: one that changed at release would fail every graph compiled before."""
    counts = []
    for release in (False, True):
        torch._dynamo.reset()
        start = len(plain_inductor)
        model = Stack(3).bfloat16()
        quant_compile.compile(model, EXACT, release_weights=release, **REFERENCE)
        for rows in (5, 1, 5, 1, 5):
            model(bf16(rows, 32))
        counts.append(len(plain_inductor) - start)
    assert counts[0] == counts[1]


def test_release_weights_causes_no_recompile_after_a_graph_break(plain_inductor: CompileCounter) -> None:
    class Broken(Stack):
        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[0](x)
            torch._dynamo.graph_break()
            return self.layers[1](x)

    case = Case(Broken(2).bfloat16())
    quant_compile.compile(case.model, EXACT, release_weights=True, **REFERENCE)
    assert case.right(bf16(5, 32))
    graphs = len(plain_inductor)
    assert graphs == 2
    for _ in range(3):
        assert case.right(bf16(5, 32))
    assert len(plain_inductor) == graphs


def test_release_later_compiles_once_more_and_goes_on(plain_inductor: CompileCounter) -> None:
    case = Case(Mlp().bfloat16())
    quant_compile.compile(case.model, EXACT, **REFERENCE)
    x = bf16(5, 32)
    assert case.right(x) and original_bytes(case.model) > 0
    expected = original_bytes(case.model)
    assert quant_compile.release(case.model) == expected
    assert quant_compile.release(case.model) == 0
    assert original_bytes(case.model) == 0
    graphs = len(plain_inductor)
    for _ in range(3):
        assert case.right(x)
    assert len(plain_inductor) <= graphs + 1
    assert quant_compile.report(case.model).coverage == 1.0


def test_release_before_anything_is_packed_frees_nothing(plain_inductor: CompileCounter) -> None:
    model = Mlp().bfloat16()
    assert quant_compile.release(model) == 0
    quant_compile.compile(model, EXACT, **REFERENCE)
    assert quant_compile.release(model) == 0
    assert original_bytes(model) > 0


EAGER_USES = {
    "forward": lambda m: m.forward(bf16(5, 32)),
    "linear": lambda m: m.up_proj(bf16(5, 32)),
    "matmul": lambda m: bf16(5, 32) @ m.up_proj.weight.t(),
    "arithmetic": lambda m: m.up_proj.weight + 1,
    "in-place": lambda m: m.up_proj.weight.mul_(2),
    "clone": lambda m: m.up_proj.weight.clone(),
    "detach and read": lambda m: m.up_proj.weight.detach().sum(),
    "data": lambda m: m.up_proj.weight.data.sum(),
    "item": lambda m: m.up_proj.weight[0, 0].item(),
    "tolist": lambda m: m.up_proj.weight.tolist(),
    "numpy": lambda m: m.up_proj.weight.numpy(),
    "cat in a list": lambda m: torch.cat([m.up_proj.weight, m.gate_proj.weight]),
    "data_ptr": lambda m: m.up_proj.weight.data_ptr(),
    "untyped_storage": lambda m: m.up_proj.weight.untyped_storage(),
    "copy into": lambda m: m.up_proj.weight.copy_(bf16(48, 32)),
    "state_dict": lambda m: m.state_dict(),
    "torch.save": lambda m: torch.save(m.state_dict(), io.BytesIO()),
    "torch.save of the model": lambda m: torch.save(m, io.BytesIO()),
    "pickle": lambda m: pickle.dumps(m.up_proj.weight),
    "deepcopy": lambda m: copy.deepcopy(m),
    "deepcopy of a weight": lambda m: copy.deepcopy(m.up_proj.weight),
    "to dtype": lambda m: m.to(torch.float32),
    "to device": lambda m: m.to("meta"),
    "half": lambda m: m.half(),
    "load_state_dict": lambda m: m.load_state_dict({"up_proj.weight": torch.zeros(48, 32)}, strict=False),
    "equal": lambda m: torch.equal(m.up_proj.weight, m.gate_proj.weight),
    "norm": lambda m: nn.utils.clip_grad_norm_(m.up_proj.weight, 1.0) or m.up_proj.weight.norm(),
}


@pytest.mark.parametrize("use", EAGER_USES)
def test_any_other_use_raises_and_changes_nothing(use: str, case: Case) -> None:
    with pytest.raises(Exception) as caught:
        EAGER_USES[use](case.model)
    text = str(caught.value)
    assert isinstance(caught.value, ReleasedWeightError) or "released" in text, f"{type(caught.value).__name__}: {text}"
    assert "quant_compile.restore" in text, "the fix is named"
    assert case.right(bf16(5, 32)), "compiled calls go on"


def test_metadata_stays_readable(case: Case) -> None:
    w = case.model.up_proj.weight
    assert w.shape == (48, 32) and w.dtype == torch.bfloat16 and w.device.type == "cpu" and w.stride() == (32, 1)
    assert w.numel() == 48 * 32 and w.element_size() == 2 and w.dim() == 2 and not w.is_meta and w.requires_grad
    assert isinstance(w, nn.Parameter) and isinstance(w, ReleasableParameter)
    assert "released" in repr(w) and "48" in repr(w)
    assert dict(case.model.named_parameters()).keys() == case.original.keys()
    assert sum(p.numel() for p in case.model.parameters()) == sum(v.numel() for v in case.original.values())
    assert "Linear" in repr(case.model)


# -- restore ----------------------------------------------------------------------------------------------------------


def _from_state(case: Case, tmp_path: Path) -> Any:
    return case.original


def _from_file(case: Case, tmp_path: Path) -> Any:
    save_file(case.original, str(tmp_path / "model.safetensors"))
    return tmp_path / "model.safetensors"


def _from_shards(case: Case, tmp_path: Path) -> Any:
    for i, (name, value) in enumerate(case.original.items()):
        save_file({name: value}, str(tmp_path / f"model-{i}.safetensors"))
    return str(tmp_path)


def _from_model(case: Case, tmp_path: Path) -> Any:
    other = Mlp(bias=True).bfloat16()
    other.load_state_dict(case.original)
    return other


@pytest.mark.parametrize("source_of", [_from_state, _from_file, _from_shards, _from_model])
def test_restore_brings_the_exact_original_back(
    source_of: Any, case: Case, tmp_path: Path, plain_inductor: CompileCounter
) -> None:
    source = source_of(case, tmp_path)
    planes = {id(pack.slab) for pack in STORE.entry(case.model.up_proj.weight).packs.values()}
    assert quant_compile.restore(case.model, source) == 3
    assert case.intact()
    x = bf16(5, 32)
    plain = Mlp(bias=True).bfloat16()
    plain.load_state_dict(case.original)
    assert torch.equal(case.model.forward(x), plain(x))
    torch.save(case.model.state_dict(), io.BytesIO())
    copied = copy.deepcopy(case.model)
    assert torch.equal(copied.forward(x), plain(x))
    assert {id(pack.slab) for pack in STORE.entry(case.model.up_proj.weight).packs.values()} == planes, "packed twice"
    assert case.right(x)


def test_a_released_model_can_be_released_again_after_restore(case: Case) -> None:
    quant_compile.restore(case.model, case.original)
    quant_compile.release(case.model)
    with pytest.raises(ReleasedWeightError):
        case.model.state_dict()
    assert case.right(bf16(5, 32))
    quant_compile.restore(case.model, case.original)
    assert case.intact()


def test_restore_with_other_values_repacks(case: Case) -> None:
    other = {name: value * 2 for name, value in case.original.items()}
    quant_compile.restore(case.model, {name: value for name, value in other.items() if value.dim() == 2})
    x = bf16(5, 32)
    assert torch.equal(case.model(x), reference_of(_loaded(case, other), EXACT)(x))


def _loaded(case: Case, weights: dict[str, Tensor]) -> nn.Module:
    made = Mlp(bias=True).bfloat16()
    made.load_state_dict({name: weights[name] if value.dim() == 2 else value for name, value in case.original.items()})
    return made


@pytest.mark.parametrize("fault", ["missing", "shape", "empty file", "no file"])
def test_restore_from_a_wrong_source_changes_nothing(fault: str, case: Case, tmp_path: Path) -> None:
    source: Any = dict(case.original)
    if fault == "missing":
        del source["down_proj.weight"]
    elif fault == "shape":
        source["down_proj.weight"] = source["down_proj.weight"][:-1]
    elif fault == "no file":
        source = tmp_path / "nothing.safetensors"
    else:
        source = tmp_path
    with pytest.raises((StaleWeightError, quant_compile.OptionError)) as caught:
        quant_compile.restore(case.model, source)
    assert fault not in ("missing", "shape") or "down_proj.weight" in str(caught.value)
    assert original_bytes(case.model) == sum(p.numel() * 2 for p in case.model.parameters() if p.dim() == 1)
    with pytest.raises(ReleasedWeightError):
        case.model.up_proj.weight.clone()
    assert case.right(bf16(5, 32))


def test_restore_from_a_released_model_is_refused(case: Case) -> None:
    other = Case(Mlp(bias=True).bfloat16())
    quant_compile.compile(other.model, EXACT, release_weights=True, **REFERENCE)
    other.model(bf16(5, 32))
    with pytest.raises((ReleasedWeightError, StaleWeightError)):
        quant_compile.restore(case.model, other.model)
    assert case.right(bf16(5, 32)) and other.right(bf16(5, 32))


def test_restore_of_a_model_that_is_not_released(plain_inductor: CompileCounter) -> None:
    model = Mlp().bfloat16()
    assert quant_compile.restore(model, {}) == 0


def up(k: int, size: int) -> int:
    """k rounded up to groups."""
    return -(-k // size) * size


# What [n, k] weights take, by the tables of docs/formats.md.
PLANE_BYTES: dict[str, Callable[[int, int], int]] = {
    "W4A8": lambda n, k: n * (up(k, 2) // 2 + 2 * (up(k, 128) // 128)),
    "NVFP4A16": lambda n, k: n * (up(k, 16) // 2 + up(k, 16) // 16 + 4),
    "MXFP4": lambda n, k: n * (up(k, 32) // 2 + up(k, 32) // 32),
    "QSERVE_W4A8_GROUP": lambda n, k: n * (up(k, 2) // 2 + 2 + 2 * (up(k, 128) // 128)),
}


@pytest.mark.parametrize("spec", PLANE_BYTES)
def test_four_bit_weights_are_released_restored_and_released_again(spec: str, plain_inductor: CompileCounter) -> None:
    """Ragged groups and bias; only the planes and what is not quantized stay, and every step computes the same numbers."""
    case = Case(Mlp(hidden=130, wide=200, bias=True).bfloat16(), spec)
    sizes = [p.shape for p in case.model.parameters() if p.dim() == 2]
    biases = sum(p.numel() * 2 for p in case.model.parameters() if p.dim() == 1)
    quant_compile.compile(case.model, {"default": spec, **UNMERGED}, release_weights=True, **REFERENCE)
    inputs = [bf16(rows, 130) for rows in (5, 1)]
    assert all(case.right(x) for x in inputs)
    planes = sum(PLANE_BYTES[spec](*size) for size in sizes)

    def released() -> bool:
        return original_bytes(case.model) == biases and store_bytes(case.model) == planes

    assert released()
    report = quant_compile.report(case.model)
    assert sum(line.bytes_after for line in report.lines if line.scheme) == planes
    assert all(line.released for line in report.lines if line.scheme) and report.coverage == 1.0
    with pytest.raises(ReleasedWeightError):
        case.model.state_dict()
    assert quant_compile.restore(case.model, case.original) == 3
    assert case.intact() and store_bytes(case.model) == planes
    plain = Mlp(hidden=130, wide=200, bias=True).bfloat16()
    plain.load_state_dict(case.original)
    assert torch.equal(case.model.forward(inputs[0]), plain(inputs[0]))
    assert quant_compile.release(case.model) == sum(2 * size.numel() for size in sizes)
    assert released() and all(case.right(x) for x in inputs)


# -- what must not be released ----------------------------------------------------------------------------------------


def test_a_weight_that_a_graph_reads_unquantized_is_not_released(plain_inductor: CompileCounter) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(32, 32, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x) + self.proj.weight.sum()

    model = Both().bfloat16()
    x = bf16(5, 32)
    wanted = reference_of(model, EXACT).proj(x) + model.proj.weight.sum()
    quant_compile.compile(model, EXACT, release_weights=True, **REFERENCE)
    assert torch.equal(model(x), wanted) and torch.equal(model(x), wanted)
    assert quant_compile.release(model) == 0
    assert original_bytes(model) > 0
    assert "also read unquantized" in quant_compile.report(model).lines[0].reason


def test_another_scheme_for_a_released_weight_is_refused_with_the_fix(case: Case) -> None:
    quant_compile.compile(case.model, "fp8_dynamic", **REFERENCE)
    with pytest.raises(Exception, match="released as W8A8 and cannot become FP8_DYNAMIC") as caught:
        case.model(bf16(5, 32))
    assert "restore" in str(caught.value)
    quant_compile.compile(case.model, EXACT, **REFERENCE)
    assert case.right(bf16(5, 32))


def test_keep_for_a_released_weight_is_refused_with_the_fix(case: Case) -> None:
    quant_compile.compile(case.model, {"default": "keep"}, **REFERENCE)
    with pytest.raises(Exception, match="released") as caught:
        case.model(bf16(5, 32))
    assert "restore" in str(caught.value)


def test_refresh_of_a_released_model_is_refused(case: Case) -> None:
    with pytest.raises(StaleWeightError, match="restore"):
        quant_compile.refresh(case.model)
    assert case.right(bf16(5, 32))


def test_a_released_parameter_is_replaced(case: Case) -> None:
    case.model.up_proj.weight = nn.Parameter(bf16(48, 32, seed=9))
    x = bf16(5, 32)
    state = {**case.original, "up_proj.weight": bf16(48, 32, seed=9)}
    assert torch.equal(case.model(x), reference_of(_loaded(case, state), EXACT)(x))


def test_policy_file_switch_releases(plain_inductor: CompileCounter, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(f"version: 1\ndefault: {EXACT}\nrelease_weights: true\n", encoding="utf-8")
    case = Case(Mlp().bfloat16())
    quant_compile.compile(case.model, path, **REFERENCE)
    assert case.right(bf16(5, 32)) and original_bytes(case.model) == 0
    kept = Case(Mlp().bfloat16())
    quant_compile.compile(kept.model, path, release_weights=False, **REFERENCE)
    assert kept.right(bf16(5, 32)) and original_bytes(kept.model) > 0


def test_release_with_inductor_prefill_and_decode() -> None:
    case = Case(Mlp())
    quant_compile.compile(case.model, "w8a16", release_weights=True)
    wanted = reference_of(_mlp_of(case), "W8A16")
    for rows in (5, 1, 5, 300):
        x = bf16(rows, 32).float()
        torch.testing.assert_close(case.model(x), wanted(x), rtol=1e-3, atol=1e-4)
    assert original_bytes(case.model) == 0


def _mlp_of(case: Case) -> nn.Module:
    made = Mlp()
    made.load_state_dict(case.original)
    return made
