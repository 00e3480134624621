"""fuse_all_reduce: sums over ranks as models write them are joined with what follows them, and all numbers stay as they were.

The process group has one rank, whose sum is its own part; two ranks are in ``tests/distributed``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, fx, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from quant_compile.ir import ops as sglq
from quant_compile.ir.family import Reject
from quant_compile.ir.graph import lines
from quant_compile.lowering import collectives, symmetric
from quant_compile.passes.fuse_all_reduce import fuse_all_reduce, sums_in_words
from quant_compile.passes.insert_quant import insert_quant
from quant_compile.passes.lower import lower
from quant_compile.passes.plan import PassReport
from quant_compile.passes.share_quant import share_quant
from tests.ir.tracing import Traced, plan_for, run, trace

BF16 = torch.bfloat16
K = 72
Use = Callable[["Block", Tensor, Tensor], Any]


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Block(nn.Module):
    """A linear whose result is a rank's part, a norm, two linears, and how they are used."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.use, self.norm = use, LlamaRMSNorm(K)
        self.down = nn.Linear(K, K, bias=False)
        self.first, self.second = nn.Linear(K, 32, bias=False), nn.Linear(K, 16)
        self.bias = nn.Parameter(torch.randn(K))
        self.to(BF16).requires_grad_(False)
        self.norm.weight.normal_()

    def forward(self, x: Tensor, residual: Tensor) -> Any:
        return self.use(self, x, residual)


def summed(part: Tensor) -> Tensor:
    dist.all_reduce(part)
    return part


def usual(m: Block, x: Tensor, residual: Tensor) -> Any:
    h = residual + summed(m.down(x))
    y = m.norm(h)
    return m.first(y), m.second(y), h


def functionally(m: Block, x: Tensor, residual: Tensor) -> Any:
    h = functional.all_reduce(m.down(x), "sum", dist.group.WORLD) + residual
    y = m.norm(h)
    return m.first(y), m.second(y), h


def in_rows(m: Block, x: Tensor, residual: Tensor) -> Any:
    """As around expert blocks: the sum of rows, and a norm that is read in rows."""
    part = summed(m.down(x.view(-1, K)))
    h = part.reshape(x.shape) + residual
    y = m.norm(h)
    rows = y.view(-1, K)
    return m.first(rows), rows.float().amax(-1), h


def also_read(m: Block, x: Tensor, residual: Tensor) -> Any:
    h = residual + summed(m.down(x))
    y = m.norm(h)
    return m.first(y), y * 2, h


def last_norm(m: Block, x: Tensor, residual: Tensor) -> Any:
    return (m.norm(residual + summed(m.down(x))),)


def no_norm(m: Block, x: Tensor, residual: Tensor) -> Any:
    return m.first(residual + summed(m.down(x))), residual


def with_bias(m: Block, x: Tensor, residual: Tensor) -> Any:
    h = summed(m.down(x)) + m.bias
    return m.first(m.norm(residual + h)), h


def read_twice(m: Block, x: Tensor, residual: Tensor) -> Any:
    total = summed(m.down(x))
    return m.first(m.norm(residual + total)), total * 2


def read_before(m: Block, x: Tensor, residual: Tensor) -> Any:
    part = m.down(x)
    before = part * 3
    return m.first(m.norm(residual + summed(part))), before


def written_after(m: Block, x: Tensor, residual: Tensor) -> Any:
    total = summed(m.down(x))
    total.mul_(2)
    return m.first(m.norm(residual + total)), residual


def written_stream(m: Block, x: Tensor, residual: Tensor) -> Any:
    h = residual + summed(m.down(x))
    h.mul_(2)
    return m.first(m.norm(h)), h


def over_an_input(m: Block, x: Tensor, residual: Tensor) -> Any:
    h = residual + summed(x)
    return m.first(m.norm(h)), h


def over_a_view(m: Block, x: Tensor, residual: Tensor) -> Any:
    whole = m.down(x)
    summed(whole.view(-1, K))
    return m.first(m.norm(residual + whole)), residual


def of_no_product(m: Block, x: Tensor, residual: Tensor) -> Any:
    return m.first(m.norm(residual + summed(x * 2))), residual


def largest(m: Block, x: Tensor, residual: Tensor) -> Any:
    part = m.down(x)
    dist.all_reduce(part, op=dist.ReduceOp.MAX)
    return m.first(m.norm(residual + part)), residual


def allowed(x: Tensor, group: str) -> None:
    """Every sum may be ours."""


def rewritten(
    use: Use, spec: str = "FP8_DYNAMIC", sums: Any = allowed, dynamic: bool = False, coded: str | None = None
) -> tuple[fx.GraphModule, PassReport, Traced]:
    """The graph after the pass, lowered; its numbers are those of the graph without it, or near them where codes are sent."""
    results: list[Any] = []
    for answer in (None, sums):
        torch.manual_seed(1)
        x, residual = torch.randn(2, 3, K).to(BF16), torch.randn(2, 3, K).to(BF16)
        traced = trace(Block(use), x, residual, dynamic=dynamic)
        plan = plan_for(traced, spec, sums=answer, coded=None if len(results) == 0 else coded)
        gm, _ = insert_quant(traced.gm, plan)
        gm, _ = share_quant(gm, plan)
        gm, report = fuse_all_reduce(gm, plan)
        gm, _ = lower(gm, plan)
        results.append((gm, report, traced, run(gm, traced)))
    (*_, wanted), (gm, report, traced, found) = results
    wanted, found = (value if isinstance(value, tuple) else (value,) for value in (wanted, found))
    for mine, theirs in zip(found, wanted, strict=True):
        if coded is None:
            assert torch.equal(mine, theirs)
        else:
            assert float((mine - theirs).float().norm() / theirs.float().norm()) < 0.1
    return gm, report, traced


def sums(gm: fx.GraphModule) -> list[fx.Node]:
    return gm.graph.find_nodes(op="call_function", target=collectives.all_reduce)


def collective_nodes(gm: fx.GraphModule) -> list[str]:
    return [node.name for node in gm.graph.nodes if "c10d" in str(node.target) or node.target == "copy_"]


def test_graph() -> None:
    gm, report, _ = rewritten(usual)
    text = [line for line in lines(gm) if "all_reduce" in line or "= getitem" in line]
    assert text == [
        "  all_reduce_default = sglq_kernels.all_reduce(linear_default_3, l_residual_, l_self_modules_norm_parameters_weight_, 1e-06, "
        "'after_cast', 'FP8_DYNAMIC', False, '0')",
        "  getitem: bf16[2, 3, 72] = getitem(all_reduce_default, 0)",
        "  getitem_2: f8_e4m3fn[2, 3, 72] = getitem(all_reduce_default, 1)",
        "  getitem_3: f32[2, 3, 1] = getitem(all_reduce_default, 2)",
    ]
    assert not collective_nodes(gm)
    assert report.rewrote == [
        "down.weight: by one kernel, with the residual add, the RMSNorm and the codes of FP8_DYNAMIC"
    ]
    assert sums_in_words(report) == [
        "sums over ranks: 1 by one kernel, with the residual add, the RMSNorm and the codes of FP8_DYNAMIC"
    ]


@pytest.mark.parametrize(
    ("use", "spec"),
    [
        *((use, "FP8_DYNAMIC") for use in (functionally, in_rows, also_read, last_norm, read_before)),
        (usual, "W8A8"),
        (usual, "W8A16"),
        (in_rows, "W8A8"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_joined(use: Use, spec: str) -> None:
    gm, _, _ = rewritten(use, spec)
    (node,) = sums(gm)
    assert node.args[1] is not None and node.args[2] is not None
    assert not collective_nodes(gm)
    quantized = spec != "W8A16" and use is not last_norm
    assert node.args[5] == (spec if quantized else "")
    assert node.args[6] is (not quantized or use in (in_rows, also_read))


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (no_norm, "no RMSNorm that the kernel knows follows the addition"),
        (with_bias, "is no addition to a tensor of its shape"),
        (read_twice, "2 nodes read it"),
        (written_after, "2 nodes read it"),
        (written_stream, "is written by"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_sum_alone(use: Use, reason: str) -> None:
    gm, report, _ = rewritten(use)
    (node,) = sums(gm)
    assert node.args[1:3] == (None, None)
    assert not collective_nodes(gm)
    assert reason in report.rewrote[0]


@pytest.mark.parametrize("spec", ["MXFP4", "FP8_BLOCK"])
def test_other_codes_leave_the_norm_to_others(spec: str) -> None:
    gm, report, _ = rewritten(usual, spec)
    (node,) = sums(gm)
    assert node.args[1:3] == (None, None)
    assert f"{spec} quantizes otherwise" in report.rewrote[0]


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (over_an_input, "an input of the graph"),
        (over_a_view, "reads"),
        (largest, "no sum"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_left_alone(use: Use, reason: str) -> None:
    gm, report, _ = rewritten(use)
    assert not sums(gm) and collective_nodes(gm)
    assert reason in report.refused[0]


def test_without_memory_torchs_collective_stays() -> None:
    gm, report, _ = rewritten(usual, sums=collectives.fits)
    assert not sums(gm) and collective_nodes(gm)
    assert report.refused == ["down.weight: a CPU has no symmetric memory"]
    assert sums_in_words(report) == ["sums over ranks: 1 by torch's collective: a CPU has no symmetric memory"]


@pytest.mark.parametrize("codes", ["FP8", "INT8"])
def test_codes(codes: str) -> None:
    """Whatever follows: only the sum is another, and it is known what it is."""
    for use, dynamic in ((usual, False), (with_bias, True), (functionally, False)):
        gm, report, _ = rewritten(use, sums=None, coded=codes, dynamic=dynamic)
        (node,) = gm.graph.find_nodes(op="call_function", target=sglq.all_reduce)
        assert node.args[1:] == (codes, "0", 1)
        assert not sums(gm) and not collective_nodes(gm)
        assert sums_in_words(report) == [f"sums over ranks: 1 by {codes} codes with a scale for each 128 values"]


def test_what_is_not_sent_in_codes() -> None:
    gm, report, _ = rewritten(over_an_input, sums=None, coded="FP8")
    assert collective_nodes(gm) and "an input of the graph" in report.refused[0]
    gm, report, _ = rewritten(of_no_product, sums=None, coded="FP8")
    assert collective_nodes(gm) and "no quantized products" in report.refused[0]


def test_one_kernel_goes_before_codes() -> None:
    gm, report, _ = rewritten(usual, coded="INT8")
    assert len(sums(gm)) == 1 and report.rewrote[0].startswith("down.weight: by one kernel")
    gm, report, _ = rewritten(usual, sums=collectives.fits, coded="INT8")
    assert not sums(gm) and report.rewrote[0].startswith("down.weight: by INT8 codes")


def test_switched_off() -> None:
    gm, report, _ = rewritten(usual, sums=None)
    assert not sums(gm) and not report.refused and not report.rewrote


def test_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[Any]()
    monkeypatch.setattr(symmetric, "unshared", lambda group, device: None)
    monkeypatch.setattr(symmetric.GROUPS, "workspace", lambda *asked: made.append(asked))
    x = torch.empty(1, symmetric.MOST_ROWS, K, dtype=BF16)
    assert collectives.fits(x, "0") is None
    assert made == [("0", K, BF16, x.device)], "a first call, which may be recorded, would have to make it"
    for x, reason in (
        (torch.empty(1, symmetric.MOST_ROWS + 1, K, dtype=BF16), "rows"),
        (torch.empty(2, K), "float32"),
        (torch.empty(1, 32768, dtype=BF16), "at most"),
        (torch.empty((), dtype=BF16), "one number"),
    ):
        found = collectives.fits(x, "0")
        assert isinstance(found, Reject) and reason in found.reason
    assert len(made) == 1
    _, report, _ = rewritten(usual, sums=collectives.fits, dynamic=True)
    assert "symbol" in report.refused[0]


def test_a_group_is_asked_of_each_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's default group has a backend for each."""
    groups = symmetric.Groups()
    monkeypatch.setattr(symmetric, "_agreed", lambda group, device: f"asked of {device.type}")
    monkeypatch.setattr(symmetric, "_current", lambda device: nullcontext())
    assert [groups.of("0", torch.device(kind)).reason for kind in ("cpu", "cuda", "cpu")] == [
        "asked of cpu",
        "asked of cuda",
        "asked of cpu",
    ]


@pytest.mark.parametrize("spec", ["", "FP8_DYNAMIC", "W8A8"])
@pytest.mark.parametrize("keep", [True, False])
def test_op(spec: str, keep: bool) -> None:
    """Its fake results are those of the op, and it changes none of its inputs."""
    x, residual, weight = (torch.randn(*size).to(BF16) for size in ((2, 3, K), (2, 3, K), (K,)))
    arguments = (x, residual, weight, 1e-6, "after_cast", spec, keep, "0")
    torch.library.opcheck(collectives.all_reduce, arguments, test_utils=("test_schema", "test_faketensor"))
    assert len(collectives.all_reduce(*arguments)) == 1 + keep + 2 * bool(spec)
    torch.library.opcheck(
        collectives.all_reduce, (x, None, None, 0.0, "", "", False, "0"), test_utils=("test_schema", "test_faketensor")
    )
