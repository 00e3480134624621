"""What the ranks of a world run to test sums over ranks that are one op with what follows them."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

import quant_compile
from quant_compile.lowering import collectives, symmetric
from tests.distributed import checks

BF16 = torch.bfloat16
TP = {"tp_plan": "auto"}


@contextmanager
def _played() -> Generator[None]:
    """CPUs pass for GPUs that share memory: the op is in the graph, and runs one step after the other."""
    with patch.object(collectives, "buffers", lambda *rows: None):
        yield


def model(path: Path, spec: str, inductor: bool = False) -> dict[str, Any]:
    """Logits of a divided model in bf16 with its sums as they were written, and joined with what follows them."""
    ids = torch.arange(3, 19).view(2, 8).to(checks.device())
    found: dict[str, Any] = {}
    cuda = ids.is_cuda
    for name, fuse in (("written", False), ("joined", True)):
        divided = checks.loaded(path, TP, BF16)
        with nullcontext() if inductor else checks.without_inductor(), nullcontext() if cuda else _played():
            quant_compile.compile(divided, {"default": spec, "fuse": {"all_reduce": fuse}}, dynamic=False)
            with torch.no_grad():
                found[name] = divided(ids).logits.cpu()
        found[f"{name} notes"] = [note for note in quant_compile.report(divided).notes if "sums over ranks" in note]
    return found


def coded(path: Path, codes: str) -> dict[str, Any]:
    """A divided model of which ranks send codes: its distance to the one of which they send 16 bits, and a sum's to that in f32."""
    from quant_compile.ir import ops
    from quant_compile.ir.sums import decode_sum, encode

    ids, logits = torch.arange(3, 19).view(2, 8), list[Tensor]()
    found: dict[str, Any] = {}
    for kind in ("keep", codes):
        divided = checks.loaded(path, TP, BF16)
        with checks.without_inductor(), torch.no_grad():
            quant_compile.compile(divided, {"default": "W8A16", "all_reduce": kind})
            logits.append(divided(ids).logits.float())
        found["notes"] = [note for note in quant_compile.report(divided).notes if "sums over ranks" in note]
    found["logits"] = float((logits[1] - logits[0]).norm() / logits[0].norm())
    parts = [
        torch.randn(3, 200, generator=torch.Generator().manual_seed(rank)) for rank in range(dist.get_world_size())
    ]
    group, world = dist.group.WORLD.group_name, dist.get_world_size()  # type: ignore[union-attr]
    total = ops.all_reduce(parts[dist.get_rank()], codes, group, world)
    sent = [encode(part, codes) for part in parts]
    played = decode_sum(*(torch.stack(planes) for planes in zip(*sent, strict=True)), 200, torch.float32)
    exact = torch.stack(parts).sum(0)
    found |= {"as encoded": torch.equal(total, played), "error": float((total - exact).norm() / exact.norm())}
    return found | {"alike": _alike([total, logits[1]])}


def plain(path: Path) -> list[str]:
    """What the ledger says of sums where nothing is played."""
    divided = checks.loaded(path, TP, BF16)
    with checks.without_inductor(), torch.no_grad():
        quant_compile.compile(divided, {"default": "W8A16", "fuse": {"all_reduce": True}}, dynamic=False)
        divided(torch.arange(3, 11).view(1, 8))
    return [note for note in quant_compile.report(divided).notes if "sums over ranks" in note]


def agreed() -> list[str | None]:
    """What the ranks make of answers that differ."""
    rank, group = dist.get_rank(), dist.group.WORLD
    cases = (("", "one"), ("no reason but this" if rank else "", "one"), ("", f"host {rank}"))
    return [symmetric._first_reason(group, *case) for case in cases] + [symmetric._alone(group)]


# --- on GPUs ---


def _inputs(rows: int, k: int, call: int) -> tuple[Tensor, Tensor]:
    """This rank's part, and the residual, which all have alike."""
    device = checks.device()
    g = torch.Generator(device).manual_seed(1000 * call + dist.get_rank() + 1)
    same = torch.Generator(device).manual_seed(1000 * call)
    part = torch.randn(rows, k, generator=g, device=device) * (1 + call % 7)
    return part.to(BF16), torch.randn(rows, k, generator=same, device=device).to(BF16)


@dataclass
class Apart:
    """How far results are from those of torch's sequence, over many calls.

    Attributes:
        sums: calls whose sums have other bits.
        rows: of how many.
        rescaled: rows with another scale, since rounding moved their largest value by a step; their codes are not compared.
        flipped: the largest share of bytes of a call that are others.
        steps: the largest relative distance of scales.
    """

    sums: list[int] = field(default_factory=list)
    rows: int = 0
    rescaled: int = 0
    flipped: float = 0.0
    steps: float = 0.0

    def add(self, call: int, found: list[Tensor], wanted: list[Tensor]) -> None:
        """Results of a call: the sum, normed rows perhaps, codes, scales."""
        if not torch.equal(found[0], wanted[0]):
            self.sums.append(call)
        mine, theirs = found[-1].flatten(), wanted[-1].flatten()
        same = mine == theirs
        self.rows += same.numel()
        self.rescaled += int((~same).sum())
        self.steps = max(self.steps, float(((mine - theirs).abs() / theirs).max()))
        for plane, other in zip(found[1:-1], wanted[1:-1], strict=True):
            bits = plane[same].view(torch.uint8) != other[same].view(torch.uint8)
            self.flipped = max(self.flipped, float(bits.float().mean()) if bits.numel() else 0.0)


def _alike(tensors: list[Tensor]) -> bool:
    """Whether all ranks have the same bits."""
    good = True
    for tensor in tensors:
        mine = tensor.contiguous().view(torch.uint8)
        everywhere = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere, mine)
        good &= all(torch.equal(each, mine) for each in everywhere)
    return good


def _norm(k: int) -> Tensor:
    return torch.linspace(0.5, 2, k, device=checks.device()).to(BF16)


def _delay(call: int) -> None:
    """Now one rank is late, now the other, by up to half a millisecond, before and after what the other waits for."""
    if call % 3 == dist.get_rank():
        torch.cuda._sleep(100_000 * (1 + call % 9))


def repeated(k: int, spec: str, calls: int) -> dict[str, Any]:
    """Calls of unlike rows one after the other, not waited for in between, with late ranks: sums that are not NCCL's, other bits."""
    group, weight = dist.group.WORLD.group_name, _norm(k)  # type: ignore[union-attr]
    made: list[list[Tensor]] = []
    for call in range(calls):
        part, residual = _inputs((1, 16, 3, 64, 2)[call % 5], k, call)
        _delay(call)
        made.append(collectives.all_reduce(part, residual, weight, 1e-6, "after_cast", spec, call % 2 == 0, group))
    torch.cuda.synchronize()
    apart = Apart()
    for call, found in enumerate(made):
        part, residual = _inputs((1, 16, 3, 64, 2)[call % 5], k, call)
        given = (part, residual, weight, 1e-6, "after_cast", spec, call % 2 == 0, group)
        apart.add(call, found, collectives.reference(*given))
    return {"apart": apart, "alike": _alike([plane for found in made for plane in found])}


def replayed(k: int, rows: int, spec: str, replays: int) -> dict[str, Any]:
    """A CUDA graph of an odd number of sums, each the residual of the next, replayed with other values, and late ranks."""
    group, weight = dist.group.WORLD.group_name, _norm(k)  # type: ignore[union-attr]
    part, residual = _inputs(rows, k, 0)

    def chain(sum_: Any) -> list[Tensor]:
        found, stream = list[Tensor](), residual
        for step in range(5):
            found = sum_(part * (step + 1), stream, weight, 1e-6, "after_cast", spec, True, group)
            stream = found[0]
        return found

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        chain(collectives.all_reduce)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = chain(collectives.all_reduce)
    kept: list[list[Tensor]] = []
    for call in range(replays):
        for held, new in zip((part, residual), _inputs(rows, k, call), strict=True):
            held.copy_(new)
        _delay(call)
        graph.replay()
        kept.append([plane.clone() for plane in results])
    torch.cuda.synchronize()
    apart = Apart()
    for call, found in enumerate(kept):
        for held, new in zip((part, residual), _inputs(rows, k, call), strict=True):
            held.copy_(new)
        apart.add(call, found, chain(collectives.reference))
    return {"apart": apart, "alike": _alike([plane for found in kept for plane in found])}
