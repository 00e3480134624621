"""Prefill attention alone, over a static cache in bf16, e4m3 and int8: ours under each plan, beside what models write.

For Llama-3-8B's heads, tokens and batch: a prompt over an empty cache with room for 64 tokens more, or the last piece of one over a
cache that is otherwise full (``--filled``), under a bool mask, as a static cache gives it. ``as written`` is what Inductor makes of
values computed of codes, ``repeat_kv`` and ``scaled_dot_product_attention`` over the whole room. ``flash, no mask`` is the best of
torch, which a prompt over an empty cache without padding gets: flash attention over the prompt's own keys, causal. Every contender is
first compared with the f32 truth of the cell's last sequence (relative Frobenius error at most 1e-2). All are timed in turns as CUDA
graphs.

    python benchmarks/attention_prefill.py                     # 100 seconds
    python benchmarks/attention_prefill.py --sweep --tokens 2048 --batches 4      # all plans, some minutes: they are compiled first
    python benchmarks/attention_prefill.py --filled 8192 --tokens 128,512          # pieces of a long prompt
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Deadline, Timing, collect, geomean, last_line, machine, table, time_calls, write_result
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from quant_compile.ir import kv
from quant_compile.ir.family import Reject
from quant_compile.lowering.kernels.attention import reference, triton_prefill
from quant_compile.lowering.kernels.attention.triton_prefill import Plan
from quant_compile.lowering.target import Target

HEADS, SMOKE_HEADS = (32, 8, 128), (4, 2, 32)
# Small cells first: what the time is not enough for are the largest.
BATCHES, TOKENS, CACHES = (1, 4, 16), (128, 512, 2048, 8192), ("bf16", "e4m3", "int8")
SMOKE_BATCHES, SMOKE_TOKENS = (1, 2), (40,)
SCHEMES = {"e4m3": kv.CacheScheme("e4m3"), "int8": kv.CacheScheme("int8")}
MORE = 64  # tokens that a cache has room for beyond the prompt
# Values of codes, p and the result are rounded to bf16 once each.
TOLERANCE = 1e-2
# Share of the GPU's memory that a cell may need.
ROOM = 0.8
# Plans beside the default one where not all are swept: the tiles that FlashAttention-2 has, and one that converts codes in registers.
FEW_PLANS = (Plan(128, 128, 8, 2), Plan(128, 64, 8, 3), Plan(64, 64, 4, 3), Plan(32, 64, 4, 3, False))


@dataclass(frozen=True)
class Cell:
    """One problem: sequences, queries, keys filled, room of the cache, and what it keeps."""

    batch: int
    tokens: int
    filled: int
    length: int
    cache: str
    heads: tuple[int, int, int]

    @property
    def where(self) -> dict[str, Any]:
        """For a result row."""
        return {
            "batch": self.batch,
            "tokens": self.tokens,
            "filled": self.filled,
            "length": self.length,
            "cache": self.cache,
        }

    @property
    def flops(self) -> float:
        """Of products of queries with keys that they see."""
        pairs = self.tokens * (self.filled - self.tokens) + self.tokens * (self.tokens + 1) / 2
        return 4.0 * self.batch * self.heads[0] * self.heads[2] * pairs

    @property
    def bytes_needed(self) -> int:
        """K and V in 16 bits, repeated ones of two contenders, masks, and f32 scores of the truth."""
        heads, kv_heads, size = self.heads
        one = 4 * self.batch * self.length * size  # K and V of one head
        return (
            one * (3 * kv_heads + 2 * heads)
            + 3 * self.batch * self.tokens * self.length
            + 16 * heads * self.tokens * self.length
        )


class Data:
    """Tensors of a cell."""

    def __init__(self, cell: Cell, device: torch.device) -> None:
        self.cell, self.device = cell, device
        self.generator = torch.Generator(device).manual_seed(cell.batch + cell.tokens)
        heads, kv_heads, size = cell.heads
        self.scale = size**-0.5
        self.q = self._random(cell.tokens, heads).transpose(1, 2)
        keys = torch.arange(cell.length, device=device)
        queries = torch.arange(cell.filled - cell.tokens, cell.filled, device=device)[:, None]
        self.mask = (keys <= queries).expand(cell.batch, 1, cell.tokens, cell.length)
        plain = [self._random(kv_heads, cell.length) for _ in range(2)]
        self.k, self.v, self.scales = plain[0], plain[1], list[Tensor]()
        if cell.cache in SCHEMES:
            (self.k, k_scale), (self.v, v_scale) = (kv.encode(x, SCHEMES[cell.cache]) for x in plain)
            self.scales = [k_scale, v_scale]

    def _random(self, *middle: int) -> Tensor:
        shape = (self.cell.batch, *middle, self.cell.heads[2])
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.bfloat16)

    @property
    def coded(self) -> tuple[Tensor, Tensor]:
        """K and V in the dtype of their codes."""
        return (
            (self.k, self.v)
            if not self.scales
            else tuple(x.view(SCHEMES[self.cell.cache].codes) for x in (self.k, self.v))
        )  # type: ignore[return-value]

    @property
    def kernel_scales(self) -> dict[str, Tensor]:
        """[b, h, l], by name."""
        return dict(zip(("k_scale", "v_scale"), (scale.squeeze(-1) for scale in self.scales), strict=False))

    @cached_property
    def truth(self) -> Tensor:
        """f32 attention of the last sequence, some heads at a time: [1, heads, tokens, size]."""
        heads, kv_heads, _ = self.cell.heads
        group, out = heads // kv_heads, []
        for h in range(kv_heads):
            k, v = (x[-1:, h : h + 1] for x in self.coded)
            scales = {name: scale[-1:, h : h + 1] for name, scale in self.kernel_scales.items()}
            q = self.q[-1:, h * group : (h + 1) * group]
            out.append(reference.attention(q, k, v, self.mask[-1:], self.scale, **scales))
        return torch.cat(out, 1)


Call = Callable[[int], Tensor]


@dataclass(frozen=True)
class Contender:
    """Something that computes a cell; ``make`` raises where it cannot serve."""

    name: str
    make: Callable[[Data], Call]


# --- ours ---


def ours(plan: Plan | None) -> Contender:
    """Our kernel under a plan, or its own; on a CPU, where it cannot run, the truth that it is tested against."""

    def make(data: Data) -> Call:
        k, v = data.coded
        more = data.kernel_scales
        if data.device.type != "cuda":
            return lambda i: reference.attention(data.q, k, v, data.mask, data.scale, **more)
        problem, target = triton_prefill.problem_of(data.q, k, v, data.mask, **more), Target.of(data.device)
        answer = triton_prefill.fit(problem, target)
        if isinstance(answer, Reject):
            raise ValueError(answer.reason)
        return lambda i: triton_prefill.prefill(data.q, k, v, data.mask, data.scale, plan=plan, **more)

    if plan is None:
        return Contender("ours", make)
    how = "" if plan.values else " in registers"
    return Contender(f"ours {plan.block_m}x{plan.block_n} warps={plan.warps} stages={plan.stages}{how}", make)


def plans(cell: Cell, data: Data, sweep: bool) -> list[Plan]:
    """The plans to time beside what the kernel chooses, which may be one of them."""
    if data.device.type != "cuda":
        return [Plan(64, 64, 4, 2)]
    k, v = data.coded
    problem, target = triton_prefill.problem_of(data.q, k, v, data.mask, **data.kernel_scales), Target.of(data.device)
    found = triton_prefill.plans_of(problem, target)
    return found if sweep else [plan for plan in FEW_PLANS if plan in found]


# --- torch ---


def written(q: Tensor, k: Tensor, v: Tensor, scales: list[Tensor], mask: Tensor, scale: float, codes: str) -> Tensor:
    """As a model has it: values of codes, K and V repeated for the heads of a group, a mask over the whole room."""
    if codes:
        k, v = (kv.decode(x, own, codes, q.dtype) for x, own in zip((k, v), scales, strict=True))
    b, kv_heads, length, size = k.shape
    group = q.shape[1] // kv_heads
    wide = (b, kv_heads, group, length, size)
    k, v = (x[:, :, None].expand(wide).reshape(b, kv_heads * group, length, size) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


@cache
def compiled() -> Callable[..., Tensor]:
    """``written`` by Inductor, which makes one kernel of values and copies; for any sizes, as one graph serves all prompts."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(written, dynamic=True)


def as_written() -> Contender:
    """What runs where no kernel is chosen."""

    def make(data: Data) -> Call:
        run = compiled() if data.device.type == "cuda" else written
        codes = data.cell.cache if data.scales else ""
        return lambda i: run(data.q, data.k, data.v, data.scales, data.mask, data.scale, codes)

    return Contender("as written", make)


def flash() -> Contender:
    """Flash attention over the prompt alone, whose keys are values already: no mask, no room beyond."""

    def make(data: Data) -> Call:
        cell = data.cell
        if cell.filled != cell.tokens:
            raise ValueError("there are keys before the prompt")
        keys = slice(0, cell.tokens)
        values = (data.k, data.v)
        if data.scales:
            pairs = zip(values, data.scales, strict=True)
            values = tuple(kv.decode(x[:, :, keys], s[:, :, keys], cell.cache, data.q.dtype) for x, s in pairs)
        backend = SDPBackend.FLASH_ATTENTION if data.device.type == "cuda" else SDPBackend.MATH

        def call(i: int) -> Tensor:
            k, v = (x[:, :, keys] for x in values)
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(data.q, k, v, is_causal=True, scale=data.scale, enable_gqa=True)

        return call

    return Contender("flash, no mask", make)


# --- measuring ---


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error of the last sequence; inf when anything is not finite."""
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    return float((found[-1:].float() - wanted.float()).norm() / wanted.float().norm())


def prepare(contender: Contender, data: Data, row: dict[str, Any]) -> Call | None:
    """Fill in the row's status, and give the call to time if it is right."""
    try:
        call = contender.make(data)
        row["relative_error"] = round(relative_error(call(0), data.truth), 7)
    except Exception as error:  # one that cannot serve is a result, not the end of the run
        row.update(status="failing", reason=last_line(error))
        return None
    if not row["relative_error"] <= TOLERANCE:
        row.update(status="failing", reason=f"relative error {row['relative_error']:.2e} over {TOLERANCE:.0e}")
        return None
    row["status"] = "ok"
    return call


def measure(cell: Cell, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Check and time every contender of a cell."""
    device = torch.device(args.device)
    data = Data(cell, device)
    found = [ours(None), *map(ours, plans(cell, data, args.sweep)), as_written(), flash()]
    rows = {c.name: {**cell.where, "contender": c.name} for c in found}
    calls = {name: call for c in found if (call := prepare(c, data, rows[(name := c.name)])) is not None}
    for name, timing in time_calls(calls, device, 1, args.repeats).items():
        row = rows[name]
        if isinstance(timing, Timing):
            row.update(timing.fields(), tflops=round(cell.flops / timing.us / 1e6, 1))
        else:
            row.update(status="failing", reason=timing)
    return list(rows.values())


def summarize(cell: Cell, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A line for each cell: ours, its best plan, what is written, and how many times as fast ours is."""
    times = {row["contender"]: row["us"] for row in rows if "us" in row}
    best = min((us, name) for name, us in times.items() if name.startswith("ours")) if "ours" in times else (None, None)
    mine, theirs = times.get("ours"), times.get("as written")
    faster = round(theirs / mine, 4) if mine and theirs else None
    named = {"ours_us": mine, "best_us": best[0], "best_plan": best[1], "written_us": theirs}
    return {**cell.where, **named, "flash_us": times.get("flash, no mask"), "faster_than_written": faster}


def cells(args: argparse.Namespace) -> list[Cell]:
    """All problems, those with the fewest products first."""
    heads = SMOKE_HEADS if args.smoke else HEADS
    found = []
    for tokens, batch, kept in itertools.product(args.tokens, args.batches, args.caches):
        filled = max(tokens, args.filled)
        found.append(Cell(batch, tokens, filled, filled + MORE, kept, heads))
    return sorted(found, key=lambda cell: cell.flops)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = _arguments(argv)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_grad_enabled(False)
    device, deadline = torch.device(args.device), Deadline(args.seconds)
    rows, summary, notes = list[dict[str, Any]](), list[dict[str, Any]](), list[str]()
    for cell in cells(args):
        name = f"B={cell.batch} T={cell.tokens} of {cell.length} {cell.cache}"
        if deadline.passed:
            notes.append(f"{name}: not measured, time budget spent")
            continue
        if device.type == "cuda" and cell.bytes_needed > ROOM * torch.cuda.mem_get_info(device)[1]:
            notes.append(f"{name}: not measured, needs {cell.bytes_needed / 2**30:.0f} GiB")
            continue
        new = measure(cell, args)
        rows += new
        summary.append(summarize(cell, new))
        collect(device)
    how = (
        "CUDA graphs in turns of random order, attention alone, median"
        if device.type == "cuda"
        else "calls in turns, median"
    )
    meta = {
        "benchmark": "attention_prefill",
        "machine": machine(device),
        "settings": {
            "heads": SMOKE_HEADS if args.smoke else HEADS,
            "repeats": args.repeats,
            "tolerance": TOLERANCE,
            "timing": how,
            "seconds": round(deadline.elapsed, 1),
        },
        "summary": summary,
        "faster_than_written": geomean([row["faster_than_written"] for row in summary if row["faster_than_written"]]),
        "notes": notes,
    }
    show(rows, summary, notes)
    write_result(args.out, rows, meta)


def show(rows: Sequence[Mapping[str, Any]], summary: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> None:
    """Notes, what failed (each reason once), the times of each cell, and the table."""
    for note in notes:
        print("note:", note)
    for contender, reason in dict.fromkeys((r["contender"], r["reason"]) for r in rows if r["status"] != "ok"):
        print(f"FAILING {contender}: {reason}")
    lines: dict[str, list[str]] = {}
    for row in sorted((row for row in rows if "us" in row), key=lambda row: row["us"]):
        key = f"B={row['batch']} T={row['tokens']} of {row['length']} {row['cache']}"
        lines.setdefault(key, []).append(f"{row['contender']} {row['us']:.1f} ({row['tflops']:.0f} TFLOP/s)")
    for name, values in lines.items():
        print(f"{name}: " + ", ".join(values))
    keys = list(summary[0]) if summary else []
    print(table(keys, [[row[key] for key in keys] for row in summary]))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", default=None, help="comma-separated")
    parser.add_argument("--tokens", default=None, help="comma-separated")
    parser.add_argument("--caches", default=None, help=f"comma-separated, of {', '.join(CACHES)}")
    parser.add_argument(
        "--filled", type=int, default=0, help="keys that are filled after the prompt; 0: the prompt alone"
    )
    parser.add_argument("--sweep", action="store_true", help="all plans of our kernel, not only some")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=85.0, help="no new cell is started after this")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on CPU: does it run?")
    parser.add_argument("--out", type=Path, default=RESULTS / "attention_prefill.json")
    args = parser.parse_args(argv)
    if args.smoke:
        args.device, args.repeats = "cpu", 2
    args.batches = _numbers(args.batches) or (SMOKE_BATCHES if args.smoke else BATCHES)
    args.tokens = _numbers(args.tokens) or (SMOKE_TOKENS if args.smoke else TOKENS)
    args.caches = tuple(args.caches.split(",")) if args.caches else CACHES
    return args


def _numbers(text: str | None) -> tuple[int, ...]:
    return tuple(map(int, text.split(","))) if text else ()


if __name__ == "__main__":
    main()
