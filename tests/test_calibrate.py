"""Static activation scales: what calibration measures, where it saves, and static schemes end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import quant_compile
from quant_compile import MissingScalesError, OptionError, Policy
from quant_compile.lowering.weights import STORE
from tests.runtime_support import UNMERGED, CompileCounter, Mlp, Stack, bf16, plain_inductor, reference_of

__all__ = ["plain_inductor"]

REFERENCE = {"kernels": "reference"}
LARGEST = {"FP8": 448.0, "W8A8_STATIC": 127.0}


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        yield


def batches() -> list[Tensor]:
    return [bf16(5, 32, seed=seed) * (seed + 1) for seed in range(3)]


def inputs_of(model: nn.Module, data: list[Any]) -> dict[str, Tensor]:
    """Every input of every linear over ``data``, watched by hooks."""
    seen: dict[str, list[Tensor]] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            watch = lambda _m, args, name=name: seen.setdefault(name, []).append(args[0].float().flatten())  # noqa: E731
            hooks.append(module.register_forward_pre_hook(watch))
    for batch in data:
        model(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("spec", LARGEST)
def test_amax_end_to_end(spec: str, plain_inductor: CompileCounter) -> None:
    model, data = Stack(2).bfloat16(), batches()
    wanted = {
        f"{name}.input_scale": x.abs().amax().view(1) * (1.0 / LARGEST[spec])
        for name, x in inputs_of(model, data).items()
    }
    policy = quant_compile.calibrate(model, data, {"default": spec, **UNMERGED}, progress=False)
    assert policy.scales is not None
    scales = load_file(str(policy.scales))
    assert scales.keys() == wanted.keys()
    for name, value in wanted.items():
        assert scales[name].dtype == torch.float32 and scales[name].shape == (1,)
        torch.testing.assert_close(scales[name], value)
    reference = reference_of(model, spec, scales)
    quant_compile.compile(model, policy, **REFERENCE)
    for x in (*data, data[0] * 50):  # the last saturates
        assert torch.equal(model(x), reference(x))
    assert not torch.equal(model(data[0]), reference_of(model, "W8A8" if spec != "FP8" else "FP8_DYNAMIC")(data[0]))
    assert quant_compile.report(model).require(1.0).lines[0].scheme == spec


FORMS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "F.linear keywords": (lambda m, x: torch.nn.functional.linear(weight=m.weight, input=x), (48, 32)),
    "addmm keywords": (lambda m, x: torch.addmm(mat1=x, mat2=m.weight, input=m.bias), (32, 48)),
    "matmul keywords": (lambda m, x: torch.matmul(other=m.weight, input=x), (32, 48)),
    "__rmatmul__": (lambda m, x: m.weight.__rmatmul__(x), (32, 48)),
    "mm of aten": (lambda m, x: torch.ops.aten.mm(x, m.weight), (32, 48)),
    "W @ x.T": (lambda m, x: (m.weight @ x.T).T, (48, 32)),
    "W.mT": (lambda m, x: x @ m.weight.mT, (48, 32)),
    "einsum": (lambda m, x: torch.einsum("...k,nk->...n", [x, m.weight]), (48, 32)),
    "einsum, weight first": (lambda m, x: torch.einsum("khd,tk->thd", m.weight, x), (32, 4, 12)),
    "tensordot": (lambda m, x: torch.tensordot(x, m.weight, dims=([-1], [1])), (48, 32)),
    "conv1d": (lambda m, x: torch.nn.functional.conv1d(x.t(), m.weight), (48, 32, 1)),
    "vector": (lambda m, x: torch.stack([torch.mv(m.weight, row) for row in x]), (48, 32)),
    "slice": (lambda m, x: torch.nn.functional.linear(x, m.weight[1]), (3, 48, 32)),
    "slice of a matrix": (lambda m, x: x @ m.weight.view(3, 32, 48)[2], (96, 48)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_way_to_write_a_linear_is_measured(form: str) -> None:
    """The input is measured, not the bias or the weight, wherever the call names its operands."""
    forward, shape = FORMS[form]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(shape) / 6)
            self.bias = nn.Parameter(torch.full((48,), 100.0))

        def forward(self, x: Tensor) -> Any:
            return forward(self, x)

    model, x = Model().eval(), torch.randn(7, 32)
    x[0, 0] = 9.0
    policy = quant_compile.calibrate(model, [x], "FP8", progress=False)
    scales = load_file(str(policy.scales))
    assert scales.keys() == {"weight.input_scale"}
    torch.testing.assert_close(scales["weight.input_scale"], torch.tensor([9.0 / LARGEST["FP8"]]))
    plain = model(x)
    quant_compile.compile(model, policy, **REFERENCE)
    found = model(x)
    assert quant_compile.report(model).require(1.0).lines[0].scheme == "FP8" and not quant_compile.report(model).misses
    assert 1e-5 < float((found - plain).norm() / plain.norm()) < 0.06


def test_static_with_inductor() -> None:
    model, data = Mlp(), [x.float() for x in batches()]
    policy = quant_compile.calibrate(model, data, "w8a8_static", progress=False)
    reference = reference_of(model, "W8A8_STATIC", load_file(str(policy.scales)))
    quant_compile.compile(model, policy)
    for x in data:
        torch.testing.assert_close(model(x), reference(x), rtol=1e-3, atol=1e-3)


def test_percentile_is_below_amax_and_above_most_values() -> None:
    model = nn.Linear(32, 32)
    x = torch.randn(4000, 32)
    x[0, 0] = 1000.0
    amax = load_file(str(quant_compile.calibrate(model, [x], "fp8", path="a.safetensors", progress=False).scales))
    cut = load_file(
        str(quant_compile.calibrate(model, [x], "fp8", percentile=99.9, path="b.safetensors", progress=False).scales)
    )
    assert float(next(iter(amax.values()))) * 448 == pytest.approx(1000)
    wanted = torch.quantile(x.abs().flatten(), 0.999)
    assert float(next(iter(cut.values()))) * 448 == pytest.approx(float(wanted), rel=0.02)
    with safe_open("b.safetensors", framework="pt") as opened:
        assert opened.metadata()["percentile"] == "99.9"


def test_saved_beside_a_yaml_policy_and_loaded_by_it(tmp_path: Path, plain_inductor: CompileCounter) -> None:
    path = tmp_path / "policies" / "mine.yaml"
    path.parent.mkdir()
    path.write_text(
        "# my policy\nversion: 1\ndefault: W8A8_STATIC\nrules:\n  - {match: layers.1.up_proj, scheme: keep}\n",
        encoding="utf-8",
    )
    model = Stack(2).bfloat16()
    made = quant_compile.calibrate(model, batches(), path, progress=False)
    assert made.scales == path.with_suffix(".scales.safetensors") and made.scales.is_file()
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# my policy\n") and "scales: mine.scales.safetensors" in text
    loaded = Policy.load(path)
    assert loaded == made and loaded.content_hash == made.content_hash
    scales = load_file(str(loaded.scales))
    assert "layers.1.up_proj.input_scale" not in scales and "layers.0.up_proj.input_scale" in scales
    run = torch.compile(model, backend="sglquant", options={"policy": str(path), **REFERENCE})
    reference = reference_of(model, lambda name: None if name == "layers.1.up_proj" else "W8A8_STATIC", scales)
    x = bf16(5, 32)
    assert torch.equal(run(x), reference(x))


def test_calibrating_again_into_the_same_file_is_noticed(tmp_path: Path, plain_inductor: CompileCounter) -> None:
    """The policy compares equal, only the scales file's bytes differ: compiled code must not keep the old scales."""
    model, x = Mlp().bfloat16(), bf16(5, 32)
    for compile_again in (True, False):
        for factor in (1.0, 7.0):
            policy = quant_compile.calibrate(
                model, [x * factor], "w8a8_static", path=tmp_path / "s.safetensors", progress=False
            )
            if compile_again or factor == 1.0:
                quant_compile.compile(model, policy, **REFERENCE)
            reference = reference_of(model, "W8A8_STATIC", load_file(str(policy.scales)))
            assert torch.equal(model(x), reference(x)), (compile_again, factor)


def test_calibration_leaves_the_model_alone_and_ignores_its_compiled_code(plain_inductor: CompileCounter) -> None:
    model, data = Mlp().bfloat16(), batches()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = load_file(str(quant_compile.calibrate(model, data, "fp8", path="a.safetensors", progress=False).scales))
    quant_compile.compile(model, {"default": "W4A16"}, **REFERENCE)
    model(data[0])
    graphs = len(plain_inductor)
    second = load_file(str(quant_compile.calibrate(model, data, "fp8", path="b.safetensors", progress=False).scales))
    assert len(plain_inductor) == graphs
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batches_may_be_mappings_tuples_or_tensors() -> None:
    class Two(Mlp):
        def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
            return super().forward(x * factor)

    model, x = Two().bfloat16(), bf16(5, 32)
    found = []
    for i, batch in enumerate(({"x": x, "factor": 2.0}, (x, 2.0), x * 2.0)):
        policy = quant_compile.calibrate(model, iter([batch]), "fp8", path=f"{i}.safetensors", progress=False)
        found.append(load_file(str(policy.scales)))
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])


def test_weights_under_other_products_are_watched() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1d = _Conv1D()
            self.right = _Right()

        def forward(self, x: Tensor) -> Tensor:
            return self.right(self.conv1d(x) * 3)

    model = Products()
    x = torch.randn(5, 32)
    scales = load_file(str(quant_compile.calibrate(model, [x], "fp8", path="p.safetensors", progress=False).scales))
    assert scales["conv1d.input_scale"] * 448 == pytest.approx(float(x.abs().amax()))
    assert scales["right.input_scale"] * 448 == pytest.approx(float((model.conv1d(x) * 3).abs().amax()))


class _Conv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(32, 32)), nn.Parameter(torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class _Right(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 32))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


def test_siblings_with_different_scales_are_neither_shared_nor_merged(
    plain_inductor: CompileCounter, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    model, x = Mlp().bfloat16(), bf16(5, 32)
    for scales, merged in (((0.01, 0.03, 0.02), False), ((0.03, 0.03, 0.02), True)):
        path = tmp_path / f"{merged}.safetensors"
        names = ("gate_proj", "up_proj", "down_proj")
        data = {f"{name}.input_scale": torch.tensor([value]) for name, value in zip(names, scales)}
        save_file(data, str(path))
        quant_compile.compile(model, {"default": "W8A8_STATIC", "scales": str(path)}, **REFERENCE)
        assert torch.equal(model(x), reference_of(model, "W8A8_STATIC", data)(x)), merged
        products = [
            n for n in plain_inductor.graphs[-1].graph.nodes if getattr(n.target, "namespace", "") == "sglq_kernels"
        ]
        assert len(products) == (2 if merged else 3)


def test_layers_of_one_graph_have_their_own_scales(plain_inductor: CompileCounter) -> None:
    """Per-layer compile: the graph traced for layer 0 must run layer 1 with layer 1's scale, and unshared where that differs."""
    model = Stack(3).bfloat16()
    model.layers[1].up_proj.weight.mul_(4)
    policy = quant_compile.calibrate(model, batches(), "w8a8_static", progress=False)
    for layer in model.layers:
        layer.compile(backend="sglquant", options={"policy": policy, **REFERENCE})
    x = bf16(5, 32)
    assert torch.equal(model(x), reference_of(model, "W8A8_STATIC", load_file(str(policy.scales)))(x))
    kept = {float(STORE.entry(layer.down_proj.weight).input_scale) for layer in model.layers}
    assert len(kept) == 3


def test_refusals() -> None:
    model, x = Mlp().bfloat16(), bf16(5, 32)
    with pytest.raises(OptionError, match="no static scheme"):
        quant_compile.calibrate(model, [x], "fp8_dynamic", progress=False)
    with pytest.raises(OptionError, match=r"percentile must lie in \(0, 100\]"):
        quant_compile.calibrate(model, [x], "fp8", percentile=0, progress=False)
    with pytest.raises(OptionError, match="no batches"):
        quant_compile.calibrate(model, [], "fp8", progress=False)
    for one, kind in (({"x": x}, "dict"), (5, "int"), ("batches", "str")):
        with pytest.raises(OptionError, match=rf"iterable of batches, got {kind}. Fix: \[batch\]"):
            quant_compile.calibrate(model, one, "fp8", progress=False)

    class Skips(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](x)

    with pytest.raises(MissingScalesError, match=r"no batch reached layers\.1\.gate_proj \(3 weights"):
        quant_compile.calibrate(Skips(2).bfloat16(), [x], "fp8", path="none.safetensors", progress=False)
    assert not Path("none.safetensors").exists()


def test_progress_bar_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    quant_compile.calibrate(Mlp().bfloat16(), [bf16(5, 32)], "fp8", path="p.safetensors")
    assert "calibrating" in capsys.readouterr().out


def test_a_second_model_leaves_the_scales_of_the_first_alone() -> None:
    """Without a path every calibration has a file of its own: compiled models read theirs again when it changes."""
    one, two = Mlp().bfloat16(), Mlp().bfloat16()
    first = quant_compile.calibrate(one, batches(), "fp8", progress=False)
    assert first.scales is not None
    before = first.scales.read_bytes()
    second = quant_compile.calibrate(two, [10 * x for x in batches()], "fp8", progress=False)
    assert first.scales.name == "fp8.scales.safetensors" and second.scales is not None
    assert second.scales.name == "fp8.2.scales.safetensors" and first.scales.read_bytes() == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_give_no_scale_are_refused_by_name(value: float, tmp_path: Path) -> None:
    with pytest.raises(MissingScalesError, match="NaN or inf somewhere") as caught:
        quant_compile.calibrate(Mlp().bfloat16(), [torch.full((4, 32), value).bfloat16()], "fp8", progress=False)
    assert "the inputs of" in str(caught.value) and not list(tmp_path.glob("*.safetensors"))
