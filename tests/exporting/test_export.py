"""Exported programs: planes under the names of checkpoints, the numbers of schemes for every m, refusals, packages that run alone."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

import quant_compile
from quant_compile.demo import load
from quant_compile.exporting import export as export_module
from quant_compile.exporting.program import joined
from quant_compile.ir.errors import ExportError, GradModeError, OptionError, PolicyError, QuantError, WeightError
from quant_compile.ir.scheme import parse
from quant_compile.lowering.target import Target
from quant_compile.lowering.weights import STORE, Key
from tests.runtime_support import reference_of

ROOT = Path(__file__).parents[2]
HIDDEN, INNER = 64, 96
TOKENS = {"x": {0: Dim("b", min=1, max=64), 1: Dim("t", min=1, max=512)}}
# Sums are rounded to bf16 elsewhere than in the reference, once for each of three products; an input's code may flip for it.
CLOSE = 0.01


class Mlp(nn.Module):
    """Two siblings over one input, a third product, and a matrix that no product reads."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, HIDDEN)
        self.table = nn.Embedding(4, HIDDEN)
        self.register_buffer("shift", torch.full((HIDDEN,), 0.01))
        for linear in (self.gate_proj, self.up_proj, self.down_proj):
            nn.init.normal_(linear.weight, std=0.2)
        nn.init.normal_(self.table.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.hardtanh(self.gate_proj(x)) * self.up_proj(x)) + self.table.weight[0] + self.shift


class Grouped(nn.Module):
    """Attention of four heads over two, which are repeated as transformers writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.kv_proj = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN // 2)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, kv = (proj(x).view(b, t, -1, 16).transpose(1, 2) for proj in (self.q_proj, self.kv_proj))
        kv = kv[:, :, None].expand(b, 2, 2, t, 16).reshape(b, 4, t, 16)
        return F.scaled_dot_product_attention(q, kv, kv, is_causal=True).transpose(1, 2).reshape(b, t, HIDDEN)


def model() -> Mlp:
    torch.manual_seed(0)
    return Mlp().to(torch.bfloat16).eval()


def inputs(*sizes: int) -> Tensor:
    return torch.randn(*sizes, HIDDEN, dtype=torch.bfloat16)


@lru_cache(maxsize=None)
def exported(policy: str, **options: Any) -> quant_compile.Exported:
    """Of ``model()``; its program is read by several tests."""
    return quant_compile.export(model(), (inputs(2, 8),), policy=policy, dynamic_shapes=TOKENS, **options)


def distance(y: Tensor, truth: Tensor) -> float:
    return float((y.float() - truth.float()).norm() / truth.float().norm())


# --- programs ---------------------------------------------------------------------------------------------------------


def test_a_program_holds_planes_under_the_names_of_the_weights() -> None:
    program = exported("W8A16")
    held = {**program.program.state_dict, **program.program.constants}
    assert set(held) == {
        "gate_proj_up_proj.weight_data",
        "gate_proj_up_proj.weight_scale",
        "gate_proj_up_proj.weight_scale_of_torch_cpu_int8pack",
        "down_proj.weight_data",
        "down_proj.weight_scale",
        "down_proj.weight_scale_of_torch_cpu_int8pack",
        "down_proj.bias",
        "table.weight",
        "shift",
    }
    assert held["gate_proj_up_proj.weight_data"].dtype is torch.int8
    assert program.planes["gate_proj_up_proj.weight_data"] == ("gate_proj.weight", "up_proj.weight")
    assert not any(value.requires_grad for value in held.values())


@pytest.mark.parametrize(
    "policy", ["W8A16", "FP8_DYNAMIC", *(pytest.param(p, marks=pytest.mark.slow) for p in ("W4A16", "W8A8"))]
)
def test_programs_compute_what_their_codes_say_for_every_number_of_tokens(policy: str) -> None:
    """33 rows and more have another kernel than 32 under W8A16; one program has both."""
    run = exported(policy).program.module()
    truth = reference_of(model(), policy)
    with torch.no_grad():
        for sizes in ((1, 1), (1, 7), (4, 8), (3, 11), (2, 300)):
            x = inputs(*sizes)
            assert distance(run(x), truth(x)) < CLOSE, sizes


def test_kernels_are_chosen_in_the_program() -> None:
    program = exported("W8A16")
    (use, *more) = program.kernels
    assert "m<=32: torch_cpu_int8pack" in use.kernels and not more
    branches = [node for node in program.program.graph.nodes if "cond" in str(node.target)]
    assert len(branches) == 2


def test_lengths_stay_free_where_heads_are_repeated() -> None:
    torch.manual_seed(0)
    grouped = Grouped().to(torch.bfloat16).eval()
    exported = quant_compile.export(grouped, (inputs(2, 16),), policy="W8A16", dynamic_shapes=TOKENS)
    run = exported.program.module()
    quant_compile.compile(grouped, "W8A16")
    for sizes in ((1, 1), (3, 40)):
        x = inputs(*sizes)
        with torch.no_grad():
            wanted = grouped(x)
            assert (run(x) - wanted).norm() < CLOSE * wanted.norm()


def test_a_damaged_plane_is_seen() -> None:
    run, x = exported("W8A16").program.module(), inputs(2, 8)
    truth = reference_of(model(), "W8A16")
    scale = run.get_buffer("down_proj.weight_scale_of_torch_cpu_int8pack")
    with torch.no_grad():
        scale.mul_(1.05)
        damaged = distance(run(x), truth(x))
        scale.div_(1.05)
        assert distance(run(x), truth(x)) < CLOSE < damaged


def test_the_report_is_that_of_a_compiled_model_and_the_model_stays() -> None:
    module = model()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    program = quant_compile.export(module, (inputs(2, 8),), policy="W4A16")
    report = program.report.require(coverage=1.0)
    lines = {line.names[0]: line for line in report.lines}
    assert report.bytes_total == sum(p.nbytes for p in module.parameters())
    assert (lines["up_proj.weight"].scheme, lines["up_proj.weight"].layout) == ("W4A16", "rows")
    assert lines["table.weight"].scheme is None
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(type(p) is nn.Parameter for p in module.parameters())
    entries = [STORE.peek(p) for p in module.parameters()]
    assert not any(entry.packs for entry in entries if entry is not None)
    assert quant_compile.report(module).policy == "none"


@dataclass
class Output:
    """A class that another process does not have."""

    y: Tensor
    pair: tuple[Tensor, None]


def test_results_have_plain_classes() -> None:
    class Wrapped(Mlp):
        def forward(self, x: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            return Output(super().forward(x), (x, None))

    torch.export.register_dataclass(Output)
    module = Wrapped().to(torch.bfloat16).eval()
    out = quant_compile.export(module, (inputs(2, 8),), policy="W4A16").program.module()(inputs(2, 8))
    assert type(out) is dict and list(out) == ["y", "pair"]
    assert type(out["pair"]) is tuple and out["pair"][1] is None


def test_a_buffer_that_a_model_writes_to_is_one_of_the_program() -> None:
    class Counting(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            self.shift.add_(1)
            return super().forward(x)

    module = Counting().to(torch.bfloat16).eval()
    run = quant_compile.export(module, (inputs(2, 8),), policy="W8A16").program.module()
    x = inputs(2, 8)
    with torch.no_grad():
        assert distance(run(x) + 1, run(x)) < CLOSE


# --- refusals ---------------------------------------------------------------------------------------------------------


def _training() -> nn.Module:
    return model().train()


def _compiled() -> nn.Module:
    return quant_compile.compile(model(), "W8A16")


def _on_meta() -> nn.Module:
    return model().to("meta")


def _lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(8)).eval()


Refusal = tuple[Callable[[], nn.Module], dict[str, Any], type[QuantError], str]
REFUSALS: dict[str, Refusal] = {
    "compiled": (_compiled, {}, ExportError, r"quant_compile\.uncompile\(model\) first"),
    "training": (_training, {}, ExportError, r"model\.eval\(\)"),
    "meta": (_on_meta, {}, WeightError, "gate_proj.weight is on the meta device"),
    "lazy": (_lazy, {}, WeightError, "has no shape yet"),
    "no module": (lambda: F.silu, {}, ExportError, "an nn.Module"),  # pyright: ignore[reportReturnType]
    "policy": (model, {"policy": "W9"}, PolicyError, "W9"),
    "option": (model, {"mode": "default"}, OptionError, "export has no option 'mode'; valid options: kernels"),
    "missing argument": (model, {"args": ()}, ExportError, r"do not fit Mlp\.forward: missing .* 'x'"),
    "argument": (model, {"kwargs": {"y": 1}}, ExportError, "do not fit Mlp.forward"),
    "gradient": (model, {"args": (inputs(2, 8).requires_grad_(),)}, GradModeError, r"input\.detach\(\)"),
    "sizes": (model, {"dynamic_shapes": {"z": {0: Dim("b")}}}, ExportError, "torch.export cannot trace Mlp"),
    "fixed": (model, {"dynamic_shapes": {"x": {2: Dim("h")}}}, ExportError, "torch.export cannot trace Mlp"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    make, changes, error, words = REFUSALS[case]
    module = make()
    with pytest.raises(error, match=words):
        quant_compile.export(module, **{"args": (inputs(2, 8),), "policy": "W8A16"} | changes)


def test_a_released_model_is_refused() -> None:
    module = model()
    weight = module.gate_proj.weight
    STORE.planes((weight,), (Key(parse("W8A16").spec, "rows", False, torch.bfloat16),))
    assert STORE.release(weight)
    with pytest.raises(WeightError, match=r"gate_proj.weight were released .*\n.*restore"):
        quant_compile.export(module, (inputs(2, 8),), policy="W8A16")


def test_exporting_a_compiled_model_by_torch_names_this_function() -> None:
    with pytest.raises(Exception, match=r"quant_compile\.export\(model"), torch.no_grad():
        torch.export.export(_compiled(), (inputs(2, 8),), strict=False)


def test_kernels_that_need_this_package_are_named_before_anything_is_packed() -> None:
    packed = STORE.packed
    with pytest.raises(ExportError, match=r"torch_cpu_4bit of .*down_proj.weight.*Python of this package") as caught:
        exported("W4A8", self_contained=True)
    assert "import quant_compile where the package is run" in str(caught.value)
    assert STORE.packed == packed


@pytest.fixture(scope="module")
def program() -> quant_compile.Exported:
    """One that needs this package."""
    return exported("W4A8")


def test_a_program_says_what_it_needs(program: quant_compile.Exported, tmp_path: Path) -> None:
    assert not program.self_contained
    assert "needs quant_compile: torch_cpu_4bit" in str(program)
    with pytest.raises(ExportError, match="not self-contained"):
        program.package(tmp_path / "model.pt2", self_contained=True)


@pytest.mark.parametrize("write", ["package", "save"])
def test_paths_that_cannot_be_written(program: quant_compile.Exported, tmp_path: Path, write: str) -> None:
    call = getattr(program, write)
    for path, words in (
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "model.pt2", "is not there"),
        (tmp_path / "model.zip", "does not end in .pt2"),
    ):
        with pytest.raises(ExportError, match=words):
            call(path)
    assert not list(tmp_path.iterdir())


def test_a_saved_program_is_read_by_torch(program: quant_compile.Exported, tmp_path: Path) -> None:
    path, x = program.save(tmp_path / "model.pt2"), inputs(2, 8)
    with torch.no_grad():
        assert torch.equal(torch.export.load(path).module()(x), program.program.module()(x))
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        (("a.b.q.weight", "a.b.k.weight"), "a.b.q_k.weight"),
        (("a.b.weight",), "a.b.weight"),
        (("a.x.q.weight", "a.y.q.weight"), "a.x_q_y_q.weight"),
        (("w", "v"), "w_v"),
        (("a.w1", "a.w2"), "a.w1_w2"),
    ],
)
def test_names_of_joined_planes(weights: tuple[str, ...], name: str) -> None:
    assert joined(weights) == name


@pytest.mark.skipif(sys.platform != "linux", reason="of the linker on Linux")
@pytest.mark.parametrize(("needs", "whole"), [(b"libstdc++.so.6", True), (b"libc++.so.1", True), (b"libc.so.6", False)])
def test_a_package_with_a_c_plus_plus_library_of_its_own_is_refused(
    program: quant_compile.Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs: bytes, whole: bool
) -> None:
    def build(*_: Any, package_path: str, **__: Any) -> str:
        with zipfile.ZipFile(package_path, "w") as archive:
            archive.writestr("model/data/aotinductor/model/c.wrapper.so", b"\x7fELF\0" + needs + b"\0")
        return package_path

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", build)
    (path := tmp_path / "model.pt2").write_bytes(b"old")
    with nullcontext() if whole else pytest.raises(ExportError, match=r"CXX: .* links its C\+\+ library into what it"):
        program.package(path)
    assert (path.read_bytes() == b"old") is not whole
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]


# --- packages ---------------------------------------------------------------------------------------------------------

ALONE = """
import sys
import torch

run = torch._inductor.aoti_load_package(sys.argv[1])
results = []
for x in torch.load(sys.argv[2]):
    apart = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)  # begins where no vector load may read
    results.append((run(x), run(apart.copy_(x))))
torch.save(results, sys.argv[3])
print("transformers" in sys.modules, "quant_compile" in sys.modules)
"""


def test_a_package_runs_in_a_process_without_this_package(tmp_path: Path) -> None:
    program = exported("W8A16")
    path = program.package(tmp_path / "model.pt2", self_contained=True)
    given = [inputs(*sizes) for sizes in ((1, 1), (4, 8), (3, 11), (2, 100))]
    torch.save(given, tmp_path / "inputs.pt")
    files = [str(path), str(tmp_path / "inputs.pt"), str(tmp_path / "results.pt")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *files],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False"]
    run = program.program.module()
    with torch.no_grad():
        for x, (y, apart) in zip(given, torch.load(tmp_path / "results.pt"), strict=True):
            assert distance(y, run(x)) < CLOSE
            assert torch.equal(y, apart)


@pytest.mark.parametrize("policy", ["FP8_DYNAMIC", "W4A16"])
def test_lengths_stay_free_with_kernels_of_a_gpu(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module.Target, "of", staticmethod(lambda device: Target.fake("sm90")))
    model = load("dense").model.eval()
    sizes = {"input_ids": {0: Dim("batch", min=1, max=64), 1: Dim("length", min=1, max=512)}, "use_cache": None}
    call = {"input_ids": torch.randint(0, 512, (2, 16)), "use_cache": False}
    exported = quant_compile.export(model, (), call, policy, dynamic_shapes=sizes)
    (shape,) = [
        node.meta["val"].shape
        for node in exported.program.graph.find_nodes(op="placeholder")
        if node.name == "input_ids"
    ]
    assert all(isinstance(size, torch.SymInt) for size in shape)
    assert not exported.self_contained and export_module.AS_WRITTEN in exported.report.notes
    assert "scaled_dot_product_attention" in str(exported.program.graph)
