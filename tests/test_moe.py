"""Expert blocks through ``torch.compile``: bad input, policies, changes after compiling, bytes, the ledger.

``plain_inductor`` stands for Inductor; kernels are the reference, so W8A8 results are equal to the eager reference but for the
order of an f32 sum.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import quant_compile
from quant_compile.explain import explain
from quant_compile.ir.errors import ReleasedWeightError, WeightError
from quant_compile.ir.family import family_of
from quant_compile.ir.report import Report
from quant_compile.ir.scheme import parse
from quant_compile.lowering.target import Target
from quant_compile.lowering.weights import STORE, Key, pack_experts
from tests.moe_support import (
    FAMILIES,
    Layers,
    ReferenceExperts,
    Routed,
    TinyExperts,
    TinyMoe,
    expert_parameters,
    moe_reference_of,
    one_thread,
    tokens,
    usual_linears,
)
from tests.runtime_support import CompileCounter, bf16, inner_error, plain_inductor, store_bytes

__all__ = ["one_thread", "plain_inductor"]
pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = "W8A8"
CLOSE = 1e-5
REFERENCE = {"kernels": "reference"}


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def compiled(model: nn.Module, policy: Any = EXACT, **more: Any) -> Any:
    """The model under torch.compile."""
    return torch.compile(model, backend="sglquant", options={"policy": policy, **REFERENCE, **more}, dynamic=False)


def difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference."""
    return float((a.double() - b.double()).abs().max())


def routing(count: int = 6, experts: int = 4, top_k: int = 2, hidden: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids and weights."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.rand(count, experts, generator=generator).topk(top_k, -1).indices
    return torch.randn(count, hidden, generator=generator), ids, torch.rand(count, top_k, generator=generator)


def schemes(model: nn.Module) -> dict[str, str | None]:
    """Name -> scheme of every expert weight in the ledger."""
    return {line.names[0]: line.scheme for line in quant_compile.report(model).lines if "_proj" in line.names[0]}


def line_of(report: Report, end: str) -> Any:
    """The ledger's line of the weight whose name ends so."""
    return next(line for line in report.lines if line.names[0].endswith(end))


# --- routing ----------------------------------------------------------------------------------------------------------

x, ids, weights = routing()
ROUTINGS = {
    "usual": ids,
    "one expert": torch.full_like(ids, 2),
    "none for expert 3": ids.clamp(max=2),
    "twice the same": ids[:, :1].expand(-1, 2).contiguous(),
}


@pytest.mark.parametrize("spec", [EXACT, "FP8_DYNAMIC", "W4A16", "W4A8", "MXFP4", "QSERVE_W4A8_CHANNEL"])
def test_any_routing(spec: str, plain_inductor: CompileCounter) -> None:
    """One graph serves all of them; ids out of range add nothing, and read nothing."""
    model = Routed(hidden=32, inner=24)
    run, reference = compiled(model, spec), ReferenceExperts(model.experts, None, spec)
    for name, chosen in ROUTINGS.items():
        assert difference(run(x, chosen, weights), reference(x, chosen, weights)) <= CLOSE, name
    wild = ids.clone()
    wild[0, 0], wild[1, 1], wild[2], wild[3, 0] = 4, -1, torch.tensor([4, 99]), 2**40
    got = run(x, wild, weights)
    assert difference(got, reference(x, wild, weights)) <= CLOSE
    assert not got[2].any() and difference(got, reference(x, ids, weights)) > 1e-2
    assert len(plain_inductor) == 1


@pytest.mark.parametrize(
    ("experts", "hidden", "inner", "spec"),
    [
        (5, 40, 20, "W4A16"),  # groups of 128 wider than a row
        (5, 136, 72, "W4A16"),  # ragged groups
        (3, 136, 72, "FP8_BLOCK"),  # ragged tiles
        (1, 32, 24, "W8A16"),
        (5, 33, 17, EXACT),
    ],
)
def test_odd_sizes(experts: int, hidden: int, inner: int, spec: str, plain_inductor: CompileCounter) -> None:
    """A working kernel, or a reason in the ledger and the block as it was."""
    model = Routed(experts=experts, hidden=hidden, inner=inner)
    given = routing(7, experts, min(2, experts), hidden)
    plain = model(*given)
    got = compiled(model, spec)(*given)
    line = line_of(quant_compile.report(model), "experts.gate_up_proj")
    reference = plain if line.scheme is None else ReferenceExperts(model.experts, None, spec)(*given)
    assert difference(got, reference) <= CLOSE
    assert line.scheme == spec or line.reason


def test_no_tokens(plain_inductor: CompileCounter) -> None:
    """T = 0, in a graph of its own and in one with any number of tokens."""
    empty = torch.empty(0, 32), torch.empty(0, 2, dtype=torch.long), torch.empty(0, 2)
    model = Routed()
    run = compiled(model)
    run(*routing())
    assert run(*empty).shape == (0, 32)
    torch._dynamo.reset()
    anything = torch.compile(model, backend="sglquant", options={"policy": EXACT, **REFERENCE}, dynamic=True)
    reference = ReferenceExperts(model.experts, None, EXACT)
    for count in (6, 9, 0, 1):
        given = routing(count) if count else empty
        assert difference(anything(*given), reference(*given)) <= CLOSE if count else anything(*given).shape == (0, 32)


def test_nan_in_one_expert_is_named(plain_inductor: CompileCounter) -> None:
    model = Layers(TinyMoe(), TinyMoe())
    model.layers[1].experts.down_proj[2, 3, 4] = float("nan")
    with pytest.raises(Exception) as caught:
        compiled(model)(torch.randn(1, 3, 32))
    error = inner_error(caught.value)
    assert isinstance(error, WeightError)
    assert "layers.1.experts.down_proj has NaN or inf values (expert 2)" in str(error)


# --- changes after compiling ------------------------------------------------------------------------------------------


def test_weights_that_change_are_packed_again(plain_inductor: CompileCounter) -> None:
    model = Layers(TinyMoe())
    hidden, run = torch.randn(1, 5, 32), compiled(model)
    experts: TinyExperts = model.layers[0].experts

    def agrees() -> bool:
        return difference(run(hidden), moe_reference_of(model, EXACT)(hidden)) <= CLOSE

    first = run(hidden)
    assert agrees()
    experts.down_proj[1].mul_(3.0)
    assert agrees() and difference(run(hidden), first) > 1e-2
    experts.gate_up_proj = nn.Parameter(torch.randn(4, 48, 32), requires_grad=False)
    assert agrees()
    experts.gate_up_proj.data = torch.randn(4, 48, 32)
    assert agrees()
    experts.down_proj.data.mul_(0.5)
    assert not agrees(), "a limit of torch: such a write does not show"
    assert quant_compile.refresh(model) >= 1
    assert agrees()
    assert len(plain_inductor) == 1


def test_two_instances_share_a_graph_and_nothing_else(plain_inductor: CompileCounter) -> None:
    """One torch.compile of a function of the module: Dynamo guards no Parameter."""
    one, two = TinyMoe(), TinyMoe()
    hidden = torch.randn(1, 5, 32)
    runs = [compiled(model) for model in (one, two)]
    for _ in range(2):
        for model, run in zip((one, two), runs, strict=True):
            assert difference(run(hidden), moe_reference_of(model, EXACT)(hidden)) <= CLOSE
    assert difference(runs[0](hidden), runs[1](hidden)) > 1e-2


def test_layers_compiled_one_by_one(plain_inductor: CompileCounter) -> None:
    model = Layers(TinyMoe(), TinyMoe(), TinyMoe())
    wanted = moe_reference_of(model, EXACT)(hidden := torch.randn(1, 5, 32))
    for layer in model.layers:
        layer.compile(backend="sglquant", options={"policy": EXACT, **REFERENCE}, dynamic=False)
    assert difference(model(hidden), wanted) <= CLOSE
    assert len(plain_inductor) == 1
    quant_compile.report(model).require(1.0)


@pytest.mark.parametrize("root", ["block", "experts"])
def test_a_block_and_its_experts_as_the_compile_root(root: str, plain_inductor: CompileCounter) -> None:
    model = TinyMoe() if root == "block" else TinyExperts()
    given = (torch.randn(1, 5, 32),) if root == "block" else routing()
    reference = moe_reference_of(model, EXACT) if root == "block" else ReferenceExperts(model, None, EXACT)
    assert difference(compiled(model)(*given), reference(*given)) <= CLOSE
    report = quant_compile.report(model)
    assert line_of(report, "gate_up_proj").scheme == line_of(report, "down_proj").scheme == EXACT
    report.require(1.0)


# --- policies ---------------------------------------------------------------------------------------------------------


def test_a_scheme_for_each_block(plain_inductor: CompileCounter) -> None:
    """By rule: one block in INT4, one kept, the rest in the default; also where layers share a graph."""
    policy = {
        "default": EXACT,
        "rules": [
            {"match": "*layers.0.experts*", "scheme": "W4A16"},
            {"match": "*layers.1.experts*", "scheme": "keep", "reason": "small"},
        ],
    }
    for per_layer in (False, True):
        torch._dynamo.reset()
        model = Layers(TinyMoe(), TinyMoe(), TinyMoe())
        hidden = torch.randn(1, 5, 32)
        reference = copy.deepcopy(model)
        for layer, spec in zip(reference.layers, ("W4A16", None, EXACT), strict=True):
            layer.experts = ReferenceExperts(layer.experts, None, spec)
        wanted = reference(hidden)
        run = model if per_layer else compiled(model, policy)
        for layer in model.layers if per_layer else ():
            layer.compile(backend="sglquant", options={"policy": policy, **REFERENCE}, dynamic=False)
        assert difference(run(hidden), wanted) <= CLOSE
        found = schemes(model)
        assert [found[f"layers.{i}.experts.down_proj"] for i in range(3)] == ["W4A16", None, EXACT]
        kept = line_of(quant_compile.report(model), "layers.1.experts.gate_up_proj")
        assert "rule 2" in kept.reason and "small" in kept.reason


def test_experts_alone_and_all_but_experts(plain_inductor: CompileCounter) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(32, 32, bias=False).requires_grad_(False)
            self.mlp = TinyMoe()

        def forward(self, hidden: Tensor) -> Tensor:
            return self.mlp(self.proj(hidden))

    hidden = torch.randn(1, 5, 32)
    cases: list[tuple[Any, str | None, str | None]] = [
        ({"default": "keep", "rules": [{"match": "*", "kind": "moe", "scheme": EXACT}]}, EXACT, None),
        ({"default": EXACT, "rules": [{"match": "*", "kind": "moe", "scheme": "keep"}]}, None, EXACT),
    ]
    for policy, of_experts, of_linears in cases:
        torch._dynamo.reset()
        model = Block()
        linears = lambda name, spec=of_linears: spec if name == "proj" else None  # noqa: E731
        wanted = moe_reference_of(model, of_experts, None, linears)(hidden)
        assert difference(compiled(model, policy)(hidden), wanted) <= CLOSE
        assert schemes(model)["mlp.experts.down_proj"] == of_experts
        report = quant_compile.report(model)
        assert line_of(report, "proj.weight").scheme == of_linears
        assert line_of(report, "router.weight").scheme is None, "routers stay"


def test_different_schemes_for_the_weights_of_a_block_keep_it(plain_inductor: CompileCounter) -> None:
    model, hidden = Layers(TinyMoe()), torch.randn(1, 5, 32)
    policy = {"default": EXACT, "rules": [{"match": "*.down_proj", "scheme": "W4A16"}]}
    assert difference(compiled(model, policy)(hidden), model(hidden)) <= CLOSE
    report = quant_compile.report(model)
    for end in ("gate_up_proj", "down_proj"):
        line = line_of(report, end)
        assert line.scheme is None and "different schemes" in line.reason
        assert line.named, "the policy asked for it, so coverage counts it"
    assert report.coverage < 0.2


def test_two_gguf_types_for_the_weights_of_a_block(plain_inductor: CompileCounter) -> None:
    """Each weight has its own; where nothing serves the two together the block stays as it is."""
    model, hidden = Layers(TinyMoe(inner=64)), torch.randn(1, 5, 32)
    policy: Any = {"default": "keep"}
    policy["rules"] = [
        {"match": f"*.{end}", "scheme": spec}
        for end, spec in (("down_proj", "GGUF_Q8_0"), ("gate_up_proj", "GGUF_Q4_0"))
    ]
    wanted = copy.deepcopy(model)
    for name, parameter in expert_parameters(wanted).items():
        scheme = parse("GGUF_Q8_0" if name.endswith("down_proj") else "GGUF_Q4_0")
        family = family_of(scheme)
        with torch.no_grad():
            for w in parameter:
                w.copy_(family.dequantize_weight(family.quantize_weight(w, scheme), scheme, w.shape[1]))
    assert difference(compiled(model, policy)(hidden), wanted(hidden)) <= CLOSE
    report = quant_compile.report(model)
    assert schemes(model) == {"layers.0.experts.gate_up_proj": "GGUF_Q4_0", "layers.0.experts.down_proj": "GGUF_Q8_0"}
    assert all(end in line_of(report, end).reason for end in ("gate_up_proj", "down_proj")), "the rule of each"

    def explained() -> list[Any]:
        half = Layers(TinyMoe(inner=64, dtype=torch.bfloat16))
        lines = explain(half, {"x": hidden.bfloat16()}, policy, Target.fake("sm90")).report.lines
        return [line for line in lines if "_proj" in line.names[0]]

    assert [(line.scheme, line.bytes_after) for line in explained()] == [
        ("GGUF_Q4_0", 4 * 2 * 64 * 32 * 18 // 32), ("GGUF_Q8_0", 4 * 32 * 64 * 34 // 32),
    ]  # fmt: skip
    policy["rules"][1]["scheme"] = "GGUF_Q5_0"
    reason = "no kernel here multiplies experts of two types under GGUF_Q5_0/GGUF_Q8_0"
    assert [(line.scheme, line.reason) for line in explained()] == [(None, reason)] * 2


def test_an_unknown_block_is_in_the_ledger(plain_inductor: CompileCounter) -> None:
    """With its reason and its text; what is around it and inside its module is quantized."""

    class WithShared(TinyExperts):
        def __init__(self) -> None:
            super().__init__(activation=lambda hidden: torch.tanh(hidden.chunk(2, -1)[0]) * hidden.chunk(2, -1)[1])
            self.shared = nn.Linear(32, 32, bias=False).requires_grad_(False)

        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return super().forward(x, ids, weights) + self.shared(x)

    model = Routed()
    model.experts = WithShared()
    reference = moe_reference_of_linears(model)
    assert difference(compiled(model)(*routing()), reference(*routing())) <= CLOSE
    report = quant_compile.report(model)
    line = line_of(report, "gate_up_proj")
    assert line.scheme is None and line.named
    assert "WithShared reads" in line.reason and "tanh" in line.reason
    assert line_of(report, "shared.weight").scheme == EXACT
    assert report.coverage < 0.5


def moe_reference_of_linears(model: nn.Module) -> nn.Module:
    """Linears quantized, experts as they are."""
    from tests.runtime_support import reference_of

    return reference_of(model, EXACT)


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "most"),
    [
        ("FP8_DYNAMIC", 0.51),
        (EXACT, 0.52),
        ("W4A16", 0.29),
        ("FP8_BLOCK", 0.51),
        ("W4A8", 0.258),
        ("NVFP4A16", 0.29),
        ("MXFP4", 0.266),
        ("QSERVE_W4A8_CHANNEL", 0.256),
        ("QSERVE_W4A8_GROUP", 0.262),
    ],
)
def test_bytes_after_release(spec: str, most: float, plain_inductor: CompileCounter) -> None:
    model = Layers(TinyMoe(experts=3, hidden=256, inner=256, dtype=torch.bfloat16))
    hidden = bf16(1, 4, 256)
    wanted = moe_reference_of(model, spec)(hidden)
    run = compiled(model, spec, release_weights=True)
    got = run(hidden)
    assert float((got - wanted).float().norm() / wanted.float().norm()) < 1e-2
    own = expert_parameters(model)
    before = sum(p.numel() * p.element_size() for p in own.values())
    with torch._C.DisableTorchFunctionSubclass():
        held = store_bytes(model) + sum(p.untyped_storage().nbytes() for p in own.values())
    assert 0.2 < held / before <= most
    report = quant_compile.report(model)
    lines = [line_of(report, end) for end in ("gate_up_proj", "down_proj")]
    assert all(line.released for line in lines)
    assert sum(line.bytes_after for line in lines) == store_bytes(model)


def test_released_experts_refuse_to_be_read_and_can_be_restored(plain_inductor: CompileCounter, tmp_path: Any) -> None:
    model, hidden = Layers(TinyMoe()), torch.randn(1, 5, 32)
    source = {name: parameter.clone() for name, parameter in model.named_parameters()}
    run = compiled(model, release_weights=True)
    first = run(hidden)
    for read in (
        lambda: torch.save(model.state_dict(), tmp_path / "model.pt"),
        lambda: copy.deepcopy(model),
        lambda: model(hidden),
        lambda: model.layers[0].experts.down_proj.sum(),
        lambda: model.layers[0].experts.down_proj[0],
    ):
        with pytest.raises(ReleasedWeightError, match="released"):
            read()
    assert torch.equal(run(hidden), first)
    with pytest.raises(Exception, match="released"):
        quant_compile.refresh(model)
    quant_compile.restore(model, source)
    assert all(torch.equal(parameter, source[name]) for name, parameter in model.named_parameters())
    copy.deepcopy(model)
    assert torch.equal(run(hidden), first)


class LiveBytes(TorchDispatchMode):
    """The most bytes of storages made while it is active that were alive at a time."""

    def __init__(self, *ignored: Tensor) -> None:
        super().__init__()
        self.most = 0
        self._known = {StorageWeakRef(tensor.untyped_storage()): 0 for tensor in ignored}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._known.setdefault(StorageWeakRef(storage), storage.nbytes())
        self._known = {ref: size for ref, size in self._known.items() if not ref.expired()}
        self.most = max(self.most, sum(self._known.values()))
        return result


@pytest.mark.parametrize(
    ("spec", "transposed"), [("FP8_DYNAMIC", False), (EXACT, True), ("W4A16", False), ("FP8_BLOCK", True)]
)
def test_packing_holds_one_expert_besides_the_planes(spec: str, transposed: bool) -> None:
    """Its temporary values are those of one expert, however many experts there are."""
    extra: list[int] = []
    for experts in (4, 16):
        weight = torch.randn(experts, 256, 384).bfloat16()
        size = (384, 256) if transposed else (256, 384)
        key = Key(spec, "experts", transposed, torch.bfloat16)
        with LiveBytes(weight) as live:
            planes = pack_experts(weight, key, None, size)
        extra.append(live.most - sum(plane.untyped_storage().nbytes() for plane in planes))
    assert 0 < extra[1] <= extra[0] * 1.05 + 4096
    # Values of one expert in f32, its rounded copy and codes: at most eight bf16 copies of one expert.
    assert extra[1] <= 16 * 256 * 384 * 2


def test_planes_go_with_the_model(plain_inductor: CompileCounter) -> None:
    model = Layers(TinyMoe())
    compiled(model)(torch.randn(1, 5, 32))
    ids_of = {id(p) for p in model.parameters()}
    assert store_bytes(model) > 0
    del model
    torch._dynamo.reset()
    import gc

    gc.collect()
    assert not any(identity in STORE._entries for identity in ids_of)


# --- families ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_coverage_of_every_family(name: str, plain_inductor: CompileCounter) -> None:
    """Every expert byte is quantized and named in the ledger, which survives a trip through JSON; logits are right."""
    family = FAMILIES[name]
    model = family.make()
    reference = moe_reference_of(model, EXACT, family, usual_linears(EXACT))
    policy = {"default": EXACT, "fuse": {"merge_siblings": False}}
    got = compiled(model, policy)(tokens(), use_cache=False).logits
    report = quant_compile.report(model)
    wanted = expert_parameters(model)
    lines = {line.names[0]: line for line in report.lines}
    assert wanted and all(lines[n].scheme == EXACT and lines[n].kernels == "reference_moe" for n in wanted)
    assert report.coverage >= 0.99
    assert not [line for line in report.lines if line.scheme and "gate.weight" in line.names[0]], "routers stay"
    assert Report.from_json(report.to_json()) == report
    expected = reference(tokens(), use_cache=False).logits
    assert float((got - expected).norm() / expected.norm()) <= 1e-3


# --- loops over modules -----------------------------------------------------------------------------------------------


class Expert(nn.Module):
    """One expert with linears of its own."""

    def __init__(self, hidden: int = 32, inner: int = 24) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(hidden, inner, bias=False), nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        return self.down_proj(F.hardtanh(self.gate_proj(x)) * self.up_proj(x))


class LoopMoe(nn.Module):
    """A loop over experts: over all with masks, or only over those that were chosen, with their tokens."""

    def __init__(self, masks: bool) -> None:
        super().__init__()
        self.masks = masks
        self.router = nn.Linear(32, 4, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(4))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        weights, ids = self.router(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            if self.masks:
                out = out + expert(x) * (weights * (ids == i)).sum(-1, keepdim=True)
                continue
            rows, place = torch.where(ids == i)
            if rows.numel():
                out.index_add_(0, rows, expert(x[rows]) * weights[rows, place].unsqueeze(-1))
        return out


@pytest.mark.parametrize("masks", [True, False])
def test_loops_over_modules(masks: bool, plain_inductor: CompileCounter) -> None:
    """One graph with masks, several with data-dependent control flow: every expert's linears are quantized."""
    from tests.runtime_support import reference_of

    model = Layers(LoopMoe(masks))
    reference = reference_of(model, lambda name: None if name.endswith(".router") else EXACT)
    policy = {"default": EXACT, "fuse": {"merge_siblings": False}}
    run = torch.compile(model, backend="sglquant", options={"policy": policy, **REFERENCE})
    for count in (24, 9):
        hidden = torch.randn(count, 32)
        assert difference(run(hidden), reference(hidden)) <= CLOSE
    report = quant_compile.report(model)
    assert report.coverage == 1.0
    assert sum(line.scheme == EXACT for line in report.lines) == 12
    assert (len(plain_inductor) == 1) or not masks or len(plain_inductor) == 2
