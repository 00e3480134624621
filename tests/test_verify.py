"""``verify: true``: kernels and passes that are damaged on purpose are refused by name and number, and what is right is proven."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quant_compile
from quant_compile.ir.errors import OptionError, VerifyError
from quant_compile.ir.family import family_of
from quant_compile.ir.graph import PlaneRef, copy_graph
from quant_compile.lowering import ops
from quant_compile.lowering.moe import moe_kernels
from quant_compile.lowering.registry import kernels
from quant_compile.lowering.target import Target
from quant_compile.lowering.weights import STORE
from quant_compile.passes import PIPELINE
from quant_compile.runtime import decide
from quant_compile.runtime.decide import Found
from quant_compile.runtime.replay import Comparison, other_kernels, replay
from quant_compile.runtime.truth import TOLERANCE, error_of, truths
from quant_compile.runtime.verified import STAYS
from tests.attention_support import DECODERS, generated, seeded, static_cache
from tests.ir.tracing import _joined_bias, packed_planes, plan_for, relative_error, trace
from tests.moe_support import TinyMoe
from tests.passes.test_fuse_input import Block, LlamaRMSNorm, with_residual
from tests.passes.test_lower import lowered
from tests.runtime_support import CompileCounter, Mlp, plain_inductor
from tests.test_attention import like_a_gpu

__all__ = ["like_a_gpu", "plain_inductor"]

merging: Any = importlib.import_module("quant_compile.passes.merge_siblings")
X = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    ops._ready.cache_clear()
    with torch.no_grad():
        yield
    ops._ready.cache_clear()


def model(hidden: int = 32) -> Mlp:
    torch.manual_seed(0)
    return Mlp(hidden=hidden).eval().requires_grad_(False)


def run(made: nn.Module, policy: Any = "W8A8", x: Tensor = X, **options: Any) -> tuple[Tensor, quant_compile.Report]:
    quant_compile.compile(made, policy, **({"verify": True} | options))
    return made(x), quant_compile.report(made)


def damage(monkeypatch: pytest.MonkeyPatch, name: str, factor: float) -> None:
    """A kernel whose scale is off by a factor."""
    kernel = kernels()[name]
    monkeypatch.setitem(kernels(), name, replace(kernel, run=lambda *args: kernel.run(*args) * factor))


@pytest.fixture
def swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planes of merged siblings are joined in another order than their results are cut."""
    right = merging._joined_plane
    monkeypatch.setattr(merging, "_joined_plane", lambda graph, nodes, *more: right(graph, nodes[::-1], *more))


def test_what_is_right_is_proven(plain_inductor: CompileCounter) -> None:
    made = model()
    y, report = run(made)
    lines = {line.names[0]: line for line in report.lines}
    assert report.coverage == 1 and report.timings["verify"] > 0
    assert all(line.verified is not None and line.verified <= TOLERANCE for line in lines.values())
    assert len(plain_inductor) == 1
    assert torch.equal(run(model(), verify=False)[0], y)


def test_nothing_is_replayed_unless_it_is_asked_for(plain_inductor: CompileCounter) -> None:
    _, report = run(model(), verify=None)
    assert "verify" not in report.timings and all(line.verified is None for line in report.lines)


def test_a_wrong_scale_is_refused(plain_inductor: CompileCounter, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(monkeypatch, "torch_cpu_int_mm", 1.02)
    made = model()
    eager = made(X)
    y, report = run(made, kernels={"*": "torch_cpu_int_mm"})
    torch.testing.assert_close(y, eager)  # nothing is left of the damaged kernel
    assert report.coverage == 0
    for name, reason in report.skips:
        assert f"{name} by torch_cpu_int_mm" in reason or "+" in reason
        assert "is 2.00e-02 from the unfused reference" in reason and "may be 5.0e-03" in reason
        assert "at tests/runtime_support.py:" in reason and "_proj(" in reason
    assert len(report.skips) == 3


def test_swapped_siblings_are_refused_and_the_others_stay(plain_inductor: CompileCounter, swapped: None) -> None:
    made = model()
    eager = made(X)
    y, report = run(made)
    assert sorted(name for name, _ in report.skips) == ["gate_proj.weight", "up_proj.weight"]
    assert all("gate_proj.weight + up_proj.weight by" in reason for _, reason in report.skips)
    down = next(line for line in report.lines if line.names[0] == "down_proj.weight")
    assert down.scheme == "W8A8" and down.verified is not None
    assert 0 < relative_error(y, eager) < 2e-2


def test_a_consumer_that_reads_the_wrong_sibling_is_seen(
    plain_inductor: CompileCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands for what is read off those who read it, so that a pass cannot name it wrongly."""
    right = merging._merge

    def crossed(graph: Any, siblings: list[Any]) -> None:
        right(graph, siblings)
        first, second = list(graph.find_nodes(op="call_method", target="narrow"))[-2:]
        readers = dict.fromkeys(first.users), dict.fromkeys(second.users)
        for reader in readers[0]:
            reader.replace_input_with(first, second)
        for reader in readers[1]:
            reader.replace_input_with(second, first)

    monkeypatch.setattr(merging, "_merge", crossed)
    _, report = run(model())
    assert sorted(name for name, _ in report.skips) == ["gate_proj.weight", "up_proj.weight"]


def test_a_matrix_that_is_read_the_wrong_way_is_seen(
    plain_inductor: CompileCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Truth and kernels go by one reading of the graph; the model's own operation is what it is held to."""
    right = decide.find_sites

    def turned(*args: Any) -> Any:
        sites, misses = right(*args)
        return [replace(site, transposed=True) for site in sites], misses

    monkeypatch.setattr(decide, "find_sites", turned)
    made = nn.Sequential(nn.Linear(32, 32)).eval().requires_grad_(False)
    _, report = run(made)
    ((name, reason),) = report.skips
    assert name == "0.weight" and "the product as it was matched, in 16 bits, is" in reason


def test_strict_makes_it_an_error(plain_inductor: CompileCounter, swapped: None) -> None:
    made = model()
    with pytest.raises(VerifyError, match=r"gate_proj\.weight") as error:
        run(made, {"default": "W8A8", "strict": True, "verify": True}, verify=None)
    assert "the policy is strict" in str(error.value) and "Fix: strict: false" in str(error.value)
    assert "and may be 5.0e-03" in str(error.value)


def test_what_cannot_be_taken_back_is_an_error(plain_inductor: CompileCounter, monkeypatch: pytest.MonkeyPatch) -> None:
    made = model()
    quant_compile.compile(made, "W8A8", release_weights=True)
    made(X)
    damage(monkeypatch, "torch_cpu_int_mm", 1.5)
    ops._ready.cache_clear()
    torch._dynamo.reset()
    with pytest.raises(VerifyError, match="its original values are released"):
        run(made, release_weights=True, kernels={"*": "torch_cpu_int_mm"})
    assert all(STORE.entry(parameter).released for parameter in made.parameters())


def test_a_kernel_that_fails_is_refused_with_what_it_says(
    plain_inductor: CompileCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> Tensor:
        raise RuntimeError("no such instruction")

    kernel = kernels()["torch_cpu_int_mm"]
    monkeypatch.setitem(kernels(), kernel.name, replace(kernel, run=fails))
    _, report = run(model(), kernels={"*": "torch_cpu_int_mm"})
    assert len(report.skips) == 3 and all("RuntimeError: no such instruction" in reason for _, reason in report.skips)


def test_compiling_again_tries_again(plain_inductor: CompileCounter) -> None:
    made = model()
    with pytest.MonkeyPatch.context() as patch:
        damage(patch, "torch_cpu_int_mm", 1.5)
        assert run(made, kernels={"*": "torch_cpu_int_mm"})[1].coverage == 0
    ops._ready.cache_clear()
    torch._dynamo.reset()
    assert run(made, kernels={"*": "torch_cpu_int_mm"})[1].coverage == 1


def test_compiling_without_it_proves_nothing(plain_inductor: CompileCounter) -> None:
    made = model()
    assert all(line.verified is not None for line in run(made)[1].lines)
    torch._dynamo.reset()
    _, report = run(made, verify=False)
    assert report.coverage == 1 and all(line.verified is None for line in report.lines)


def test_experts(plain_inductor: CompileCounter, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 8, 32)
    torch.manual_seed(0)
    made = TinyMoe()
    _, report = run(made, "W8A8", x)
    experts = [line for line in report.lines if "experts" in line.names[0]]
    assert all(line.scheme == "W8A8" and line.verified is not None for line in experts)
    kernel = moe_kernels()["torch_cpu_moe"]
    monkeypatch.setitem(moe_kernels(), kernel.name, replace(kernel, run=lambda *args: kernel.run(*args) * 1.2))
    torch._dynamo.reset()
    _, report = run(TinyMoe(), "W8A8", x)
    assert [name for name, reason in report.skips if "by torch_cpu_moe" in reason] == [
        line.names[0] for line in experts
    ]


def test_attention_that_is_refused_stays_as_it_was_written(
    like_a_gpu: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = seeded(DECODERS["llama3"])
    wanted = generated(made, made, static_cache(made), True, steps=2)
    cache = static_cache(made)
    quant_compile.compile(made, {"default": "keep", "verify": True})
    right = ops.attend
    monkeypatch.setattr(ops, "attend", lambda *args, **more: right(*args, **more) * 1.1)
    torch._dynamo.reset()
    got = generated(made, made, cache, True, steps=2)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    (note,) = [note for note in quant_compile.report(made).notes if note.startswith(STAYS)]
    assert "sglq_kernels.attention is 1.00e-01 from the unfused reference" in note


# --- at the level of graphs ---


def compared(block: nn.Module, spec: str, *inputs: Tensor) -> list[Comparison]:
    """The comparisons of a block that is lowered for a GPU with kernels of its own for inputs."""
    traced = trace(block, *inputs)
    plan = plan_for(traced, spec, target=Target.fake("sm100"))
    pristine = copy_graph(traced.gm)
    found = Found.of(pristine, traced.parameters)
    gm = traced.gm
    for one_pass in PIPELINE:
        gm, _ = one_pass(gm, plan)
    refs = [node.meta["plane"] for node in gm.graph.find_nodes(op="placeholder") if "plane" in node.meta]
    planes = [
        packed_planes(ref, traced)[ref.index] if isinstance(ref, PlaneRef) else _joined_bias(ref, traced)
        for ref in refs
    ]
    wanted = truths(found, plan.decisions, traced.parameters, frozenset())
    return list(replay(pristine, gm, wanted, frozenset(), traced.arguments, planes))


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 3, 72, generator=generator).bfloat16(), torch.randn(2, 3, 72, generator=generator).bfloat16()


def test_a_fused_norm_is_proven() -> None:
    found = compared(Block(LlamaRMSNorm(72), with_residual), "MXFP4", *inputs())
    assert all(comparison.holds for comparison in found)
    assert {name for comparison in found for name in comparison.names} == {"first.weight", "second.weight"}
    assert any(comparison.original.startswith("add") or comparison.original == "h" for comparison in found)


@pytest.mark.parametrize("wrong", ["eps", "sum"])
def test_a_wrong_fused_norm_is_refused(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def normed(x: Tensor, norm: Any) -> Tensor:
        """Without the square root."""
        wide = x.float()
        return norm.weight * (wide / (wide.pow(2).mean(-1, keepdim=True) + norm.eps)).to(x.dtype)

    if wrong == "eps":
        monkeypatch.setattr(ops, "normed", normed)
    else:  # x + x
        fusing: Any = importlib.import_module("quant_compile.passes.fuse_input")
        residual_terms = fusing.residual_terms
        monkeypatch.setattr(fusing, "residual_terms", lambda x: tuple(reversed(residual_terms(x)))[:1] * 2)
    found = [one for one in compared(Block(LlamaRMSNorm(72), with_residual), "MXFP4", *inputs()) if not one.holds]
    named = {name for one in found for name in (*one.names, *one.readers)}
    assert named == {"first.weight", "second.weight"}
    assert any("behind sglq_kernels.norm_quantize" in one.what for one in found)


def test_kernels_of_other_numbers_of_rows_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = trace(nn.Linear(32, 16, bias=False), torch.randn(3, 32))
    gm, *_ = lowered(traced, "W8A8")
    node = next(iter(gm.graph.find_nodes(op="call_function", target=ops.linear)))
    scheme = quant_compile.PRESETS["W8A8"]
    family = family_of(scheme)
    x = family.quantize_input(torch.randn(3, 32), scheme, None)
    w = family.quantize_weight(torch.randn(16, 32), scheme)
    text = node.args[-1].replace("4096=reference", "8=reference;4096=torch_cpu_int_mm")
    damage(monkeypatch, "torch_cpu_int_mm", 1.1)
    y = ops.linear(list(x), list(w), None, text)
    ((name, error),) = other_kernels(node, [list(x), list(w), None, text], {}, y)
    assert name == "torch_cpu_int_mm" and error == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(
    ("got", "error"),
    [
        (lambda y: y, 0.0),
        (lambda y: y * 1.5, 0.5),
        (lambda y: y.double(), float("inf")),
        (lambda y: y[:1], float("inf")),
        (lambda y: torch.where(y == y[0, 0], float("nan"), y), float("inf")),
        (lambda y: None, float("inf")),
    ],
)
def test_errors(got: Callable[[Tensor], Any], error: float) -> None:
    y = torch.arange(1.0, 7.0).reshape(2, 3)
    assert error_of(got(y), y) == pytest.approx(error)
    unknown = torch.where(y == 1, float("nan"), y)  # what the truth does not tell, nothing is held to
    assert error_of(y * 1.0, unknown) == 0


def test_bad_values(tmp_path: Any) -> None:
    with pytest.raises(OptionError, match="verify must be true or false"):
        quant_compile.compile(model(), "W8A8", verify="yes")
    policy = quant_compile.Policy.load({"default": "W8A8", "verify": True})
    assert quant_compile.Policy.load(policy.save(tmp_path / "p.yaml")).verify


def damaged(monkeypatch: pytest.MonkeyPatch, damage: Callable[[Tensor], Tensor]) -> None:
    kernel = kernels()["torch_cpu_int_mm"]
    monkeypatch.setitem(kernels(), kernel.name, replace(kernel, run=lambda *args: damage(kernel.run(*args))))


PINNED: Any = {"kernels": {"*": "torch_cpu_int_mm"}}


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_first_call_that_says_nothing_proves_nothing(
    value: float, plain_inductor: CompileCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged(monkeypatch, lambda y: y * 3)
    made = model()
    wanted = made(X)
    _, report = run(made, x=torch.full((3, 32), value), **PINNED)
    assert all(line.verified is None for line in report.lines)
    assert relative_error(made(X), wanted) < 1e-6
    assert quant_compile.report(made).coverage == 0.0


def test_nothing_is_released_or_locked_before_it_is_proven(
    plain_inductor: CompileCounter, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    damaged(monkeypatch, lambda y: y * 3)
    made, lock = model(), tmp_path / "model.lock"
    wanted = made(X)
    run(made, x=torch.zeros(3, 32), release_weights=True, lock=lock, **PINNED)
    assert not lock.exists()
    assert relative_error(made(X), wanted) < 1e-6
    assert quant_compile.report(made).coverage == 0.0 and "torch_cpu_int_mm" not in lock.read_text()


def test_what_is_zero_at_every_call_is_not_replayed_for_ever(plain_inductor: CompileCounter) -> None:
    made = model()
    for linear in made.children():
        if isinstance(linear, nn.Linear):
            linear.weight.zero_()
    run(made)
    for _ in range(6):
        made(X)
    report = quant_compile.report(made)
    assert any("not proven" in note for note in report.notes)
    spent = report.timings["verify"]
    made(X)
    assert quant_compile.report(made).timings["verify"] == spent


def _no_row_but_the_first(y: Tensor) -> Tensor:
    return torch.cat([y[:1], torch.zeros_like(y[1:])])


def _no_column(y: Tensor) -> Tensor:
    return torch.cat([y[:, :5], torch.zeros_like(y[:, 5:6]), y[:, 6:]], 1)


@pytest.mark.parametrize("damage", [_no_row_but_the_first, _no_column])
def test_what_is_small_beside_the_rest_counts(
    damage: Callable[[Tensor], Tensor], plain_inductor: CompileCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged(monkeypatch, damage)
    torch.manual_seed(0)
    made, x = nn.Sequential(nn.Linear(32, 30_000 if damage is _no_column else 64, bias=False)), torch.randn(8, 32)
    x[0] *= 1000
    found, report = run(made.requires_grad_(False), x=x, **PINNED)
    assert report.coverage == 0.0 and torch.equal(found, made[0](x))


def test_strict_says_the_same_at_each_call(plain_inductor: CompileCounter, swapped: None) -> None:
    made = model()
    quant_compile.compile(made, {"default": "W8A8", "strict": True}, verify=True)
    for _ in range(3):
        with pytest.raises(VerifyError, match="policy is strict"):
            made(X)


def test_a_lock_keeps_what_was_proven(
    plain_inductor: CompileCounter, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    damaged(monkeypatch, lambda y: y * 1.1)
    for _ in range(2):
        torch._dynamo.reset()
        _, report = run(model(), lock=tmp_path / "model.lock", **PINNED)
        assert report.coverage == 0.0
        assert not [note for note in report.notes if "changed since the lock" in note]
    assert "torch_cpu_int_mm" not in (tmp_path / "model.lock").read_text()
