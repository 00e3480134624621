"""The call path: planes by Parameter identity, one packed copy, updates noticed, policies compared by content."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import quant_compile
from quant_compile import GradModeError, Policy
from quant_compile.ir.errors import GraphError, OptionError
from quant_compile.ir.family import family_of
from quant_compile.ir.scheme import PRESETS, parse
from quant_compile.lowering.weights import STORE
from quant_compile.model.ledger import LEDGER, MORE_COPIES
from tests.runtime_support import (
    EXACT,
    UNMERGED,
    CompileCounter,
    Mlp,
    Stack,
    bf16,
    dynamo_config,
    inner_error,
    plain_inductor,
    reference_linear,
    reference_of,
    store_bytes,
)

__all__ = ["dynamo_config", "plain_inductor"]

REFERENCE = {"kernels": "reference"}
INT8 = {"policy": EXACT, **REFERENCE}


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def compiled(model: nn.Module, policy: Any = EXACT, **options: Any) -> nn.Module:
    return quant_compile.compile(model, policy, **{**REFERENCE, **options})


# -- graphs that group siblings differently ---------------------------------------------------------------------------

INT4 = {"policy": "W4A16", "kernels": {"*": "torch_cpu_int4pack"}}  # its layout cannot be cut


class Attention(nn.Module):
    """q, k and v of one input, with or without v, or with k and v of another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(128, n, bias=False) for n in (32, 16, 48))

    def forward(self, x: Tensor, form: str) -> tuple[Tensor, ...]:
        if form == "qkv":
            return self.q(x), self.k(x), self.v(x)
        if form == "qk":
            return self.q(x), self.k(x)
        y = x * 2
        return self.q(x), self.k(x), self.k(y), self.v(y)


def expected(reference: Any, x: Tensor, form: str) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return reference(x, form)


def close(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    # torch's int4 kernel rounds scale and zero point, product and sum to bf16: a few times 2^-9 of the output.
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).norm() <= 1e-2 * b.norm()


@pytest.mark.parametrize("release", [False, True], ids=["kept", "released"])
def test_alternating_groups_in_a_layout_that_cannot_be_cut(release: bool, plain_inductor: CompileCounter) -> None:
    model, x = Attention().bfloat16(), bf16(3, 128)
    reference = reference_of(model, "W4A16")
    run = torch.compile(model, backend="sglquant", options={**INT4, "release_weights": release}, dynamic=False)
    counts, before = [], STORE.packed
    for form in ("qkv", "qk") * 3:
        close(run(x, form), expected(reference, x, form))
        counts.append(STORE.packed - before)
    assert counts == [1, 2, 2, 2, 2, 2] and len(plain_inductor) == 2
    report = quant_compile.report(model)
    gc.collect()
    assert sum(line.bytes_after for line in report.lines) == store_bytes(model), "both copies are counted"
    reasons = {line.names[0]: line.reason for line in report.lines}
    assert [name for name, reason in reasons.items() if MORE_COPIES in reason] == ["q.weight", "k.weight"]


def test_groups_that_overlap_in_one_graph(plain_inductor: CompileCounter) -> None:
    model, x = Attention().bfloat16(), bf16(3, 128)
    wanted = expected(reference_of(model, "W4A16"), x, "qk+kv")
    run = torch.compile(model, backend="sglquant", options=INT4, dynamic=False)
    before = STORE.packed
    for _ in range(3):
        close(run(x, "qk+kv"), wanted)
        assert STORE.packed - before == 2


def test_a_binding_that_cannot_come_to_rest_is_still_right(
    plain_inductor: CompileCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no room for another group's slab every look at the planes packs: slow, but it ends, and the results are right."""
    monkeypatch.setattr("quant_compile.lowering.weights.MOST_FURTHER", 0)
    model, x = Attention().bfloat16(), bf16(3, 128)
    wanted = expected(reference_of(model, "W4A16"), x, "qk+kv")
    run = torch.compile(model, backend="sglquant", options=INT4, dynamic=False)
    for _ in range(3):
        before = STORE.packed
        close(run(x, "qk+kv"), wanted)
        assert STORE.packed > before, "the case does not arise"
    monkeypatch.undo()
    run(x, "qk+kv")
    before = STORE.packed
    close(run(x, "qk+kv"), wanted)
    assert STORE.packed == before


# -- one graph, many weights ------------------------------------------------------------------------------------------


def test_two_instances_of_one_class_share_a_graph_and_each_is_right(plain_inductor: CompileCounter) -> None:
    first, second = Mlp().bfloat16(), Mlp().bfloat16()
    x = bf16(5, 32)
    run = [torch.compile(model, backend="sglquant", options=INT8) for model in (first, second)]
    for model, call in [*zip((first, second), run), (first, run[0]), (second, run[1])]:
        assert torch.equal(call(x), reference_of(model, EXACT)(x))
    assert len(plain_inductor) == 1, "the trap is one graph for both; without it this test shows nothing"
    assert quant_compile.report(first).coverage == quant_compile.report(second).coverage == 1.0


def test_two_instances_with_inductor() -> None:
    first, second = Mlp().bfloat16(), Mlp().bfloat16()
    x = bf16(5, 32)
    run = [torch.compile(model, backend="sglquant", options={"policy": "w8a16"}) for model in (first, second)]
    for model, call in [*zip((first, second), run), (first, run[0])]:
        torch.testing.assert_close(call(x), reference_of(model, "W8A16")(x), rtol=0.02, atol=0.02)
    assert not torch.equal(run[0](x), run[1](x))


def test_a_second_instance_may_have_another_policy(plain_inductor: CompileCounter) -> None:
    first, second = Mlp().bfloat16(), Mlp().bfloat16()
    x = bf16(5, 32)
    one = torch.compile(first, backend="sglquant", options=INT8)
    two = torch.compile(second, backend="sglquant", options={**INT8, "policy": {"default": "W4A16", **UNMERGED}})
    for _ in range(2):
        assert torch.equal(one(x), reference_of(first, EXACT)(x))
        assert torch.equal(two(x), reference_of(second, "W4A16")(x))


def test_two_threads_with_two_instances_on_one_graph(plain_inductor: CompileCounter) -> None:
    models = [Mlp().bfloat16() for _ in range(2)]
    x = bf16(5, 32)
    wanted = [reference_of(model, EXACT)(x) for model in models]
    calls = [torch.compile(model, backend="sglquant", options=INT8) for model in models]
    calls[0](x)
    wrong: list[Any] = []

    def work(i: int) -> None:
        with torch.no_grad():
            for step in range(150):
                if step % 50 == 10:
                    quant_compile.refresh(models[i])  # the other thread's cached planes must stay right meanwhile
                if not torch.equal(calls[i](x), wanted[i]):
                    wrong.append((i, step))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(plain_inductor) == 1


def test_graph_break_in_the_middle_keeps_names_and_schemes(plain_inductor: CompileCounter) -> None:
    class Broken(Stack):
        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[0](x)
            torch._dynamo.graph_break()
            return self.layers[1](x)

    model = Broken(2).bfloat16()
    policy = {"default": "FP8_DYNAMIC", **UNMERGED, "rules": [{"match": "layers.1.*", "scheme": "W8A8"}]}
    run = torch.compile(model, backend="sglquant", options={"policy": policy, **REFERENCE})
    x = bf16(5, 32)
    wanted = reference_of(model, lambda name: "W8A8" if name.startswith("layers.1") else "FP8_DYNAMIC")(x)
    assert torch.equal(run(x), wanted)
    assert len(plain_inductor) == 2
    report = quant_compile.report(model)
    assert report.coverage == 1.0
    schemes = {line.names[0]: line.scheme for line in report.lines}
    assert schemes["layers.0.up_proj.weight"] == "FP8_DYNAMIC" and schemes["layers.1.up_proj.weight"] == "W8A8"


# -- updates after packing --------------------------------------------------------------------------------------------


def _replace(model: Mlp) -> None:
    model.up_proj.weight = Parameter(bf16(48, 32, seed=7))


def _in_place(model: Mlp) -> None:
    model.up_proj.weight.mul_(2)


def _data_swap(model: Mlp) -> None:
    model.up_proj.weight.data = bf16(48, 32, seed=8)


def _load(model: Mlp) -> None:
    model.load_state_dict({name: value * 3 for name, value in model.state_dict().items()})


def _data_in_place(model: Mlp) -> None:
    model.up_proj.weight.data.mul_(2)
    assert quant_compile.refresh(model) == 3


def _half(model: Mlp) -> None:
    model.half().bfloat16()
    model.down_proj.weight.add_(1)


@pytest.mark.parametrize("update", [_replace, _in_place, _data_swap, _load, _data_in_place, _half])
def test_an_updated_weight_is_packed_again(update: Any, plain_inductor: CompileCounter) -> None:
    model = compiled(Mlp().bfloat16())
    x = bf16(5, 32)
    before = model(x)
    held = store_bytes(model)
    update(model)
    after = model(x)
    assert torch.equal(after, reference_of(model, EXACT)(x))
    assert not torch.equal(after, before)
    gc.collect()
    assert store_bytes(model) == held


def test_data_edits_are_invisible_without_refresh(plain_inductor: CompileCounter) -> None:
    """States the limit that ``refresh`` exists for: torch records nothing of a ``.data`` edit."""
    model = compiled(Mlp().bfloat16())
    x = bf16(5, 32)
    before = model(x)
    model.up_proj.weight.data.mul_(2)
    assert torch.equal(model(x), before)


def test_a_bias_updated_in_place_reaches_merged_siblings(plain_inductor: CompileCounter) -> None:
    model = compiled(Mlp(bias=True).bfloat16())
    x = bf16(5, 32)
    model(x)
    model.up_proj.bias.add_(1)
    assert torch.equal(model(x), reference_of(model, EXACT)(x))


def test_one_of_merged_siblings_changes(plain_inductor: CompileCounter) -> None:
    model = compiled(Mlp().bfloat16())
    x = bf16(5, 32)
    model(x)
    gate = STORE.entry(model.gate_proj.weight)
    model.up_proj.weight.mul_(2)
    assert torch.equal(model(x), reference_of(model, EXACT)(x))
    assert STORE.entry(model.gate_proj.weight) is gate
    slabs = {
        id(pack.slab) for w in (model.gate_proj.weight, model.up_proj.weight) for pack in STORE.entry(w).packs.values()
    }
    assert len(slabs) == 1, "siblings share one slab again"


def test_model_to_another_dtype(plain_inductor: CompileCounter) -> None:
    model = compiled(Mlp().bfloat16())
    x = bf16(5, 32)
    model(x)
    model.to(torch.float16)
    assert torch.equal(model(x.half()), reference_of(model, EXACT)(x.half()))


def test_deepcopy_of_a_compiled_model_is_a_model_of_its_own(plain_inductor: CompileCounter) -> None:
    model = compiled(Mlp().bfloat16())
    x = bf16(5, 32)
    model(x)
    held = store_bytes(model)
    twin = copy.deepcopy(model)
    compiled(twin)
    twin.up_proj.weight.mul_(2)
    assert torch.equal(twin(x), reference_of(twin, EXACT)(x))
    assert torch.equal(model(x), reference_of(model, EXACT)(x))
    assert store_bytes(model) == held == store_bytes(twin)


# -- one packed copy, no growth ---------------------------------------------------------------------------------------


def test_shapes_1_7_300_and_dynamic_share_one_packed_copy(plain_inductor: CompileCounter) -> None:
    model = Mlp().bfloat16()
    static = torch.compile(model, backend="sglquant", options=INT8, dynamic=False)
    dynamic = torch.compile(model, backend="sglquant", options=INT8, dynamic=True)
    wanted = reference_of(model, EXACT)
    weights = [model.gate_proj.weight, model.up_proj.weight, model.down_proj.weight]
    planes = sum(weight.numel() + 4 * weight.shape[0] for weight in weights)  # one byte a code, f32 scale a row
    for run in (static, dynamic):
        for rows in (1, 7, 300):
            x = bf16(rows, 32, seed=rows)
            assert torch.equal(run(x), wanted(x))
            gc.collect()
            assert store_bytes(model) == planes
    assert len(plain_inductor) >= 4
    assert sum(line.bytes_after for line in quant_compile.report(model).lines) == planes


def test_shapes_with_inductor_dynamic() -> None:
    model = Mlp().bfloat16()
    run = torch.compile(model, backend="sglquant", options={"policy": "fp8_dynamic"}, dynamic=True)
    wanted = reference_of(model, "FP8_DYNAMIC")
    held = set()
    for rows in (9, 7, 300, 1):
        x = bf16(rows, 32, seed=rows)
        torch.testing.assert_close(run(x), wanted(x), rtol=0.02, atol=0.02)
        gc.collect()
        held.add(store_bytes(model))
    assert len(held) == 1


class Siblings(nn.Module):
    """Two linears over one input of 300: three groups of 128, the last ragged."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(300, 128), nn.Linear(300, 40, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.a(x), self.b(x)), -1)


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "apart"])
@pytest.mark.parametrize(
    "spec", [*(name for name, s in PRESETS.items() if family_of(s).takes_size(s, 128, 300) is None), "int4.channel+16"]
)
def test_inputs_of_one_dimension(spec: str, merge: bool, plain_inductor: CompileCounter, tmp_path: Path) -> None:
    model, x = Siblings().bfloat16(), bf16(300)
    policy: Any = {"default": spec, "fuse": {"merge_siblings": merge}}
    if parse(spec).static:
        policy = quant_compile.calibrate(model, [x], policy, path=tmp_path / "scales.safetensors", progress=False)
    run = torch.compile(model, backend="sglquant", options={"policy": policy}, dynamic=False)
    y, row = run(x), run(x[None])
    assert y.shape == (168,) and row.shape == (1, 168)
    assert torch.equal(y, row[0])
    scales = {f"{name}.input_scale": STORE.entry(model.get_submodule(name).weight).input_scale for name in "ab"}
    wanted = reference_of(model, spec, {name: scale for name, scale in scales.items() if scale is not None})(x)
    # One step of bf16; the packed CPU kernels round the sum before they add the bias.
    torch.testing.assert_close(y, wanted, rtol=0.008, atol=2e-3)
    assert quant_compile.report(model).coverage == 1.0


def test_inputs_of_one_dimension_with_inductor() -> None:
    model, x = Siblings().bfloat16(), bf16(300)
    y = torch.compile(model, backend="sglquant", options={"policy": "fp8_block"})(x)
    torch.testing.assert_close(y, reference_of(model, "FP8_BLOCK")(x), rtol=0.008, atol=1e-4)


@pytest.mark.parametrize("spec", ["fp8_dynamic", "fp8_block", "w8a8", "w8a16", "w4a16"])
def test_empty_strided_and_expanded_inputs(spec: str, plain_inductor: CompileCounter) -> None:
    model = nn.Linear(32, 48).bfloat16()
    run = torch.compile(model, backend="sglquant", options={"policy": spec, **REFERENCE}, dynamic=False)
    inputs = {
        "no rows": bf16(0, 32),
        "no rows, 3-D": bf16(2, 0, 32),
        "transposed": bf16(32, 6).t(),
        "every other row": bf16(12, 32)[::2],
        "every other column": bf16(6, 64)[:, ::2],
        "expanded": bf16(1, 32).expand(6, 32),
        "one number": bf16(1, 1).expand(6, 32),
        "1-D": bf16(32),
        "4-D permuted": bf16(2, 3, 4, 32).permute(2, 0, 1, 3),
    }
    for name, x in inputs.items():
        y = run(x)
        wanted = reference_linear(x, model, spec)
        assert y.shape == wanted.shape and y.dtype == wanted.dtype, name
        torch.testing.assert_close(y, wanted, rtol=0.008, atol=1e-4)  # one step of bf16
    assert len({entry for entry in STORE.entry(model.weight).packs}) == 1


def test_deleting_the_model_frees_planes_records_and_bindings(plain_inductor: CompileCounter) -> None:
    gc.collect()
    before, records = len(STORE._entries), len(LEDGER._records)
    sessions = len(LEDGER._sessions)
    model = compiled(Mlp(bias=True).bfloat16())
    model(bf16(5, 32))
    planes = [
        weakref.ref(plane) for pack in STORE.entry(model.up_proj.weight).packs.values() for plane in pack.slab.planes
    ]
    weight = weakref.ref(model.up_proj.weight)
    assert planes and len(STORE._entries) > before and len(LEDGER._records) > records
    del model
    gc.collect()
    assert weight() is None, "something holds the Parameter"
    assert len(STORE._entries) == before
    assert len(LEDGER._records) == records
    assert len(LEDGER._sessions) == sessions
    assert all(plane() is None for plane in planes), "a binding or a slab outlived its model"


def test_one_of_two_instances_is_deleted(plain_inductor: CompileCounter) -> None:
    first, second = Mlp().bfloat16(), Mlp().bfloat16()
    x = bf16(5, 32)
    run = [torch.compile(model, backend="sglquant", options=INT8) for model in (first, second)]
    for call in run:
        call(x)
    weight = weakref.ref(first.up_proj.weight)
    del first, run[0], call
    gc.collect()
    assert weight() is None
    assert torch.equal(run[0](x), reference_of(second, EXACT)(x))
    assert len(plain_inductor) == 1


def test_parameters_replaced_at_each_call_do_not_grow_the_store(plain_inductor: CompileCounter) -> None:
    """accelerate's offloading hooks put a new Parameter in place before each call and drop it after."""
    model = Mlp().bfloat16()
    values = {name: value.clone() for name, value in model.state_dict().items()}
    run = torch.compile(model, backend="sglquant", options=INT8)
    x = bf16(5, 32)
    wanted = reference_of(model, EXACT)(x)
    sizes = []
    for _ in range(6):
        for name, value in values.items():
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, Parameter(value.clone()))
        assert torch.equal(run(x), wanted)
        gc.collect()
        sizes.append((len(STORE._entries), len(LEDGER._records), store_bytes()))
    assert len(set(sizes[1:])) == 1, sizes
    assert len(plain_inductor) == 1


def test_bindings_of_dead_parameters_go(plain_inductor: CompileCounter) -> None:
    from quant_compile.runtime import GraphRunner

    model = Mlp().bfloat16()
    run = torch.compile(model, backend="sglquant", options=INT8)
    x = bf16(5, 32)
    for step in range(4):
        model.up_proj.weight = Parameter(bf16(48, 32, seed=step))
        run(x)
    gc.collect()
    weight = id(model.up_proj.weight)
    runners = [o for o in gc.get_objects() if isinstance(o, GraphRunner)]
    mine = [o for o in runners if any(weight in binding.identities for binding in o._bindings.values())]
    assert len(mine) == 1 and len(mine[0]._bindings) == 1


# -- tied weights -----------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Embedding, one Mlp, a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(40, 32)
        self.mlp = Mlp()
        self.lm_head = nn.Linear(32, 40, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.mlp(self.embed_tokens(ids)))


def test_tied_head_is_quantized_and_its_original_is_kept(plain_inductor: CompileCounter) -> None:
    model = Tied().bfloat16()
    policy = {"default": "FP8_DYNAMIC", **UNMERGED, "rules": [{"match": "lm_head", "scheme": "W8A8"}]}
    ids = torch.arange(6).view(1, 6)
    wanted = reference_of(model, lambda name: "W8A8" if name == "lm_head" else "FP8_DYNAMIC")(ids)
    run = torch.compile(model, backend="sglquant", options={"policy": policy, "release_weights": True, **REFERENCE})
    assert torch.equal(run(ids), wanted)
    report = quant_compile.report(model)
    line = next(line for line in report.lines if "lm_head.weight" in line.names)
    assert set(line.names) == {"embed_tokens.weight", "lm_head.weight"}
    assert line.scheme == "W8A8" and not line.released and "tied embedding" in line.reason
    assert line.bytes_after > line.bytes_before, "planes and the original are both held"
    assert all(other.released for other in report.lines if other is not line)
    assert model.embed_tokens(ids).shape == (1, 6, 32)
    assert quant_compile.release(model) == 0
    assert torch.equal(run(ids), wanted)


def test_tied_head_is_kept_by_convention(plain_inductor: CompileCounter) -> None:
    model = compiled(Tied().bfloat16())
    ids = torch.arange(6).view(1, 6)
    wanted = reference_of(model, lambda name: None if name == "lm_head" else EXACT)(ids)
    assert torch.equal(model(ids), wanted)
    report = quant_compile.report(model)
    line = next(line for line in report.lines if "lm_head.weight" in line.names)
    assert line.scheme is None and "convention" in line.reason and not line.named
    assert report.coverage == 1.0


# -- policies and options by content ----------------------------------------------------------------------------------


def test_policy_changed_between_two_compiles_of_one_model(plain_inductor: CompileCounter) -> None:
    model = Mlp().bfloat16()
    x = bf16(5, 32)
    for spec in ("fp8_dynamic", "w8a8", "w4a16", "fp8_dynamic"):
        assert torch.equal(compiled(model, {"default": spec, **UNMERGED})(x), reference_of(model, spec)(x)), spec
        report = quant_compile.report(model)
        assert {line.scheme for line in report.lines} == {spec.upper()}, "stale ledger"
        assert {key.spec for key in STORE.entry(model.up_proj.weight).packs} == {spec.upper()}, "stale planes are held"
    compiled(model, {"default": "keep"})
    assert torch.equal(model(x), model.forward(x))
    assert quant_compile.report(model).share == 0.0


def _write(path: Path, default: str, more: str = "") -> None:
    path.write_text(f"version: 1\ndefault: {default}\nfuse: {{merge_siblings: false}}\n{more}", encoding="utf-8")


@pytest.mark.parametrize("recompile", [True, False])
def test_policy_file_edited_under_an_unchanged_path(
    recompile: bool, tmp_path: Path, plain_inductor: CompileCounter
) -> None:
    path = tmp_path / "p.yaml"
    model = Mlp().bfloat16()
    x = bf16(5, 32)
    _write(path, "FP8_DYNAMIC")
    run = torch.compile(model, backend="sglquant", options={"policy": str(path), **REFERENCE})
    assert torch.equal(run(x), reference_of(model, "FP8_DYNAMIC")(x))
    for spec in ("W8A8", "W4A16"):
        _write(path, spec, "# another length\n" * len(spec))
        if recompile:
            run = torch.compile(model, backend="sglquant", options={"policy": str(path), **REFERENCE})
        assert torch.equal(run(x), reference_of(model, spec)(x)), spec
        assert {line.scheme for line in quant_compile.report(model).lines} == {spec}
    _write(path, "keep")
    assert torch.equal(run(x), model(x))


def test_policy_file_edited_reaches_every_instance(tmp_path: Path, plain_inductor: CompileCounter) -> None:
    path = tmp_path / "p.yaml"
    _write(path, "FP8_DYNAMIC")
    models = [Mlp().bfloat16() for _ in range(2)]
    runs = [torch.compile(model, backend="sglquant", options={"policy": str(path), **REFERENCE}) for model in models]
    x = bf16(5, 32)
    for run in runs:
        run(x)
    _write(path, "keep", "# edited\n")
    for model, run in zip(models, runs):
        assert torch.equal(run(x), model(x))


def test_a_policy_file_that_becomes_unreadable_is_an_error_at_every_call(
    tmp_path: Path, plain_inductor: CompileCounter
) -> None:
    path = tmp_path / "p.yaml"
    _write(path, "FP8_DYNAMIC")
    model = Mlp().bfloat16()
    run = torch.compile(model, backend="sglquant", options={"policy": str(path), **REFERENCE})
    x = bf16(5, 32)
    run(x)
    _write(path, "NO_SUCH_SCHEME")
    for _ in range(2):
        with pytest.raises(quant_compile.PolicyError, match="NO_SUCH_SCHEME"):
            run(x)
    _write(path, "W8A8", "# good again\n")
    assert torch.equal(run(x), reference_of(model, "W8A8")(x))


def test_a_policy_dict_changed_in_place_is_noticed(plain_inductor: CompileCounter) -> None:
    model = Mlp().bfloat16()
    policy: dict[str, Any] = {"default": "FP8_DYNAMIC", **UNMERGED, "rules": [{"match": "down_proj", "scheme": "keep"}]}
    x = bf16(5, 32)
    run = torch.compile(model, backend="sglquant", options={"policy": policy, **REFERENCE})
    run(x)
    policy["default"] = "W8A8"
    policy["rules"][0]["scheme"] = "W8A8"
    run = torch.compile(model, backend="sglquant", options={"policy": policy, **REFERENCE})
    assert torch.equal(run(x), reference_of(model, "W8A8")(x))


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ("fp8_dynamic", "fp8_dynamic", True),
        ("fp8_dynamic", "w8a8", False),
        ({"default": "FP8_DYNAMIC"}, {"default": "FP8_DYNAMIC"}, True),
        ({"default": "FP8_DYNAMIC"}, {"default": "W8A8"}, False),
        (Policy.load("fp8_dynamic"), Policy.load("FP8_DYNAMIC"), True),
        (Policy.load("fp8_dynamic"), Policy.load({"default": "FP8_DYNAMIC", "name": "other"}), True),
        (Policy.load("fp8_dynamic"), Policy.load({"default": "FP8_DYNAMIC", "fuse": {"merge_siblings": False}}), False),
    ],
)
def test_equal_options_reuse_code_and_unequal_ones_do_not(
    one: Any, two: Any, same: bool, plain_inductor: CompileCounter
) -> None:
    model, x = Mlp().bfloat16(), bf16(5, 32)
    for policy in (one, two):
        options = {"policy": copy.deepcopy(policy), **REFERENCE}
        torch.compile(model, backend="sglquant", options=options)(x)
    assert len(plain_inductor) == (1 if same else 2)


def test_no_policy_uses_the_device_default_and_says_so(plain_inductor: CompileCounter) -> None:
    for compile_it in (
        lambda model: torch.compile(model, backend="sglquant", options=REFERENCE),
        lambda model: torch.compile(model, backend="sglquant"),
        lambda model: quant_compile.compile(model),
    ):
        model, x = Mlp().bfloat16(), bf16(5, 32)
        y = compile_it(model)(x)
        torch.testing.assert_close(y, reference_of(model, "W8A16")(x), rtol=0.02, atol=0.02)
        report = quant_compile.report(model)
        assert {line.scheme for line in report.lines} == {"W8A16"}
        assert any("no policy was given" in note and "W8A16" in note for note in report.notes)


def test_inductor_options_and_mode_are_forwarded(plain_inductor: CompileCounter) -> None:
    options = {**INT8, "mode": "max-autotune-no-cudagraphs", "inductor": {"emulate_precision_casts": True}}
    torch.compile(Mlp().bfloat16(), backend="sglquant", options=options)(bf16(5, 32))
    assert plain_inductor.patches[0]["emulate_precision_casts"] is True
    assert plain_inductor.patches[0]["max_autotune"] is True
    torch._dynamo.reset()
    torch.compile(Mlp().bfloat16(), backend="sglquant", mode="max-autotune-no-cudagraphs")(bf16(5, 32))
    assert plain_inductor.patches[1]["max_autotune"] is True


# -- modes of torch ---------------------------------------------------------------------------------------------------


def test_gradients_are_refused_and_the_fix_is_named(plain_inductor: CompileCounter) -> None:
    model, x = Mlp().bfloat16(), bf16(5, 32)
    run = torch.compile(model, backend="sglquant", options=INT8)
    for _ in range(2):
        with torch.enable_grad(), pytest.raises(Exception, match=r"inference_mode\(\)") as caught:
            run(x)
        assert isinstance(inner_error(caught.value), GradModeError)
        run(x)  # code of no_grad must not serve a call with gradients
    with torch.enable_grad():
        model.requires_grad_(False)
        assert torch.equal(run(x), reference_of(model, EXACT)(x))
        with pytest.raises(Exception, match="requires_grad_") as caught:
            run(x.clone().requires_grad_())
        assert isinstance(inner_error(caught.value), GradModeError)


@pytest.fixture
def aot_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """AOTAutograd without Inductor: it traces autocast's casts into the graph and turns autocast off at run time."""
    from torch._dynamo.backends.debugging import aot_eager

    monkeypatch.setattr(
        "torch._inductor.compile_fx.compile_fx", lambda gm, inputs, config_patches=None: aot_eager(gm, inputs)
    )


def test_autocast_decides_the_dtype(aot_eager: None) -> None:
    model = Mlp()
    run = torch.compile(model, backend="sglquant", options=INT8)
    x = bf16(5, 32).float()
    plain = run(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast, wanted = run(x), model(x)
    assert plain.dtype == torch.float32 and cast.dtype == wanted.dtype
    torch.testing.assert_close(plain, reference_of(model, EXACT)(x))
    assert not torch.equal(cast, plain)
    inner = Mlp()
    inner.load_state_dict(model.state_dict())
    inner.bfloat16()
    gated = reference_linear(x.bfloat16(), inner.gate_proj, EXACT)
    up = reference_linear(x.bfloat16(), inner.up_proj, EXACT)
    down = reference_linear(nn.functional.hardtanh(gated) * up, inner.down_proj, EXACT)
    assert torch.equal(cast, x + down)


def test_autocast_over_one_linear_returns_its_dtype(aot_eager: None) -> None:
    model = nn.Linear(32, 48)
    run = torch.compile(model, backend="sglquant", options=INT8)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(bf16(5, 32).float()).dtype == torch.bfloat16
    assert run(bf16(5, 32).float()).dtype == torch.float32


def test_parameters_made_in_inference_mode(plain_inductor: CompileCounter) -> None:
    with torch.inference_mode():
        model = Mlp().bfloat16()
        x = bf16(5, 32)
        run = torch.compile(model, backend="sglquant", options=INT8)
        assert torch.equal(run(x), reference_of(model, EXACT)(x))
        model.up_proj.weight.mul_(2)  # no _version to see this by
        assert quant_compile.refresh(model) == 3
        assert torch.equal(run(x), reference_of(model, EXACT)(x))


def test_planes_born_in_inference_mode_can_be_repacked_outside(plain_inductor: CompileCounter) -> None:
    model, x = Mlp().bfloat16(), bf16(5, 32)
    run = torch.compile(model, backend="sglquant", options=INT8)
    with torch.inference_mode():
        run(x)
    model.up_proj.weight.mul_(2)
    assert torch.equal(run(x), reference_of(model, EXACT)(x))
    with torch.inference_mode():
        assert torch.equal(run(x), reference_of(model, EXACT)(x))


def test_freezing_is_refused(plain_inductor: CompileCounter) -> None:
    model, x = Mlp().bfloat16(), bf16(5, 32)
    with torch._dynamo.config.patch(prepare_freezing=True):
        run = torch.compile(model, backend="sglquant", options=INT8)
        with pytest.raises(Exception, match="prepare_freezing") as caught:
            run(x)
    assert isinstance(inner_error(caught.value), OptionError)


def test_errors_that_dynamo_answers_with_eager_execution_stay_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo turns some exceptions of a backend into a graph break, so that a frame would run in 16 bits in silence."""
    from torch._dynamo.exc import exceptions_allowed_to_be_fallback

    for kind in exceptions_allowed_to_be_fallback:

        def fail(gm: Any, inputs: Any, config_patches: Any = None, kind: Any = kind) -> Any:
            raise kind(torch.ops.aten.mm.default)

        torch._dynamo.reset()
        monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fail)
        run = torch.compile(Mlp().bfloat16(), backend="sglquant", options=INT8)
        with pytest.raises(Exception, match="Inductor cannot compile") as caught:
            run(bf16(5, 32))
        assert isinstance(inner_error(caught.value), GraphError)


def test_python_floats_that_dynamo_passes_as_tensors(plain_inductor: CompileCounter) -> None:
    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)
            self.factor = factor

        def forward(self, x: Tensor, more: float) -> Tensor:
            return self.linear(x * self.factor) * more

    for factor in (0.5, 0.25, 2.0):
        model = Scaled(factor).bfloat16()
        run = torch.compile(model, backend="sglquant", options=INT8, dynamic=True)
        for more in (1.5, 3.0):
            x = bf16(5, 32)
            torch.testing.assert_close(run(x, more), reference_linear(x * factor, model.linear, EXACT) * more)


def test_model_without_linears_runs(plain_inductor: CompileCounter) -> None:
    model = compiled(nn.LayerNorm(32).bfloat16())
    assert torch.equal(model(bf16(5, 32)), model.forward(bf16(5, 32)))
    report = quant_compile.report(model)
    assert report.coverage == 0.0 and report.share == 0.0


def test_a_linear_that_feeds_a_linear(plain_inductor: CompileCounter) -> None:
    """With nothing between the two, the second linear's input is a node that the rewrite of the first has replaced."""
    model, x = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 16)).bfloat16(), bf16(5, 32)
    run = torch.compile(model, backend="sglquant", options=INT8)
    assert torch.equal(run(x), reference_of(model, EXACT)(x))
