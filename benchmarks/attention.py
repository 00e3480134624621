"""Decode attention alone: ours over 16 bits and over e4m3, each of torch's SDPA backends, FlexAttention, FlashInfer and FA3.

For each model's heads, batch and context: one query a sequence over a full cache under a bool mask, as a static cache gives it.
Every contender is first compared with the f32 truth over its own cache (relative Frobenius error at most 1e-2, and nothing
infinite or NaN); one that fails is reported and not timed. All contenders of a cell are timed in turns as CUDA graphs over
copies of the cache that together exceed the L2. The floor is what the bytes of K and V take at the rate of a copy in the same run.

    python benchmarks/attention.py                              # about 8 minutes
    python benchmarks/attention.py --filled 512                 # only so many tokens of each cache are filled
    python benchmarks/attention.py --sweep --models Llama-3-8B --batches 16 --contexts 8192    # other plans over codes, a minute
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from common import (
    RESULTS,
    Deadline,
    Timing,
    collect,
    copies_for,
    geomean,
    last_line,
    machine,
    table,
    time_calls,
    write_result,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from quant_compile.ir.family import Reject
from quant_compile.lowering.kernels.attention import reference, triton_decode
from quant_compile.lowering.target import Target, probe_library

MODELS = {"Llama-3-8B": (32, 8, 128), "Llama-3-70B": (64, 8, 128), "Qwen3-30B-A3B": (32, 4, 128)}
BATCHES, CONTEXTS = (1, 16, 64), (512, 2048, 8192, 32768)
SMOKE_MODELS = {"tiny": (4, 2, 32)}
SMOKE_BATCHES, SMOKE_CONTEXTS = (1, 2), (64,)
# p, v and the result are rounded to bf16 once each, in some backends p and the sums more than once.
TOLERANCE = 1e-2
# Bytes that a cell may need at most: copies of both caches, and of repeated heads.
ROOM = 0.8
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
# Times the splits of the plan.
SPLITS = (1.0, 1.5, 2.0)
LIBRARIES = ("flashinfer", "flash_attn_interface")
# Times of a contender that is this much slower than the floor are from one measurement.
HOPELESS, HOPELESS_US = 60.0, 1000.0
COPIED = 1 << 31


@dataclass(frozen=True)
class Cell:
    """One problem: a model's heads, sequences, room of the cache and tokens filled."""

    model: str
    heads: int
    kv_heads: int
    size: int
    batch: int
    context: int
    filled: int

    @property
    def tokens(self) -> int:
        """Tokens of K (or V) of all sequences and KV heads that have to be read."""
        return self.batch * self.kv_heads * self.filled

    def bytes_read(self, codes: bool) -> int:
        """Bytes of K and V that have to be read, with f32 scales of a token and head under codes."""
        return 2 * self.tokens * (self.size + 4 if codes else 2 * self.size)

    @property
    def where(self) -> dict[str, Any]:
        """For a result row."""
        return {"model": self.model, "batch": self.batch, "context": self.context, "filled": self.filled}


class Caches:
    """Copies of a cell's caches that together exceed the L2, in bf16 and in codes; queries; the mask; the truths."""

    def __init__(self, cell: Cell, device: torch.device) -> None:
        self.cell, self.device = cell, device
        self.generator = torch.Generator(device).manual_seed(cell.batch + cell.context)
        self.copies = copies_for(cell.bytes_read(True)) if device.type == "cuda" else 2
        self.q = self._random(cell.heads, 1)
        keys = torch.arange(cell.context, device=device)
        self.mask = (keys < cell.filled).expand(cell.batch, 1, 1, cell.context).contiguous()
        self.scale = cell.size**-0.5

    def _random(self, heads: int, tokens: int) -> Tensor:
        shape = (self.cell.batch, heads, tokens, self.cell.size)
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.bfloat16)

    @cached_property
    def plain(self) -> list[tuple[Tensor, Tensor]]:
        """(k, v) in bf16."""
        kv, context = self.cell.kv_heads, self.cell.context
        first = self._random(kv, context), self._random(kv, context)
        return [first] + [(first[0].clone(), first[1].clone()) for _ in range(self.copies - 1)]

    @cached_property
    def coded(self) -> list[tuple[Tensor, ...]]:
        """(k, v, k_scale, v_scale), e4m3 with a scale for each token and head."""
        planes = [self._coded(plane) for plane in self.plain[0]]
        first = planes[0][0], planes[1][0], planes[0][1], planes[1][1]
        return [first] + [tuple(plane.clone() for plane in first) for _ in range(self.copies - 1)]

    def _coded(self, plane: Tensor) -> tuple[Tensor, Tensor]:
        parts = [reference.quantize(rows, torch.float8_e4m3fn) for rows in plane.split(1)]
        return torch.cat([codes for codes, _ in parts]), torch.cat([scale for _, scale in parts])

    def truth(self, codes: bool) -> Tensor:
        """f32 attention of each sequence over its own cache, in bf16."""
        k, v, *scales = (*self.coded[0],) if codes else (*self.plain[0], None, None)
        rows = []
        for i in range(self.cell.batch):
            own = [None if plane is None else plane[i : i + 1] for plane in (k, v, *scales)]
            rows.append(
                reference.attention(
                    self.q[i : i + 1], own[0], own[1], self.mask[i : i + 1], self.scale, k_scale=own[2], v_scale=own[3]
                )
            )
        return torch.cat(rows)


Call = Callable[[int], Tensor]


@dataclass(frozen=True)
class Contender:
    """Something that computes a cell.

    Attributes:
        kind: ``ours``, ``sdpa`` or ``peer``.
        codes: over the cache in e4m3.
        make: caches -> the call, whose argument counts calls; it raises where the contender cannot serve.
    """

    name: str
    kind: str
    codes: bool
    make: Callable[[Caches], Call]


# --- ours ---


def ours(codes: bool, device: torch.device, change: Mapping[str, int] | None = None, splits: float = 1.0) -> Contender:
    """Our kernel; ``change``: fields of its plan; ``splits``: as many times those of the plan.

    On a CPU, where it cannot run, the truth that it is tested against.
    """

    def make(caches: Caches) -> Call:
        data = caches.coded if codes else caches.plain

        def call(i: int) -> Tensor:
            k, v, *scales = data[i % len(data)]
            more = dict(zip(("k_scale", "v_scale"), scales, strict=False))
            if device.type != "cuda":
                return reference.attention(caches.q, k, v, caches.mask, caches.scale, **more)
            return triton_decode.decode(caches.q, k, v, caches.mask, caches.scale, plan=plan, **more)

        plan = None
        if device.type == "cuda":
            k, v, *scales = data[0]
            more = dict(zip(("k_scale", "v_scale"), scales, strict=False))
            problem, target = triton_decode.problem_of(caches.q, k, v, caches.mask, **more), Target.of(device)
            answer = triton_decode.fit(problem, target)
            if isinstance(answer, Reject):
                raise ValueError(answer.reason)
            plan = replace(triton_decode.plan_of(problem, target), **(change or {}))
            plan = replace(plan, splits=min(triton_decode.MOST_SPLITS, round(plan.splits * splits)))
        return call

    name = "ours e4m3" if codes else "ours bf16"
    name += "".join(f" {key}={value}" for key, value in (change or {}).items())
    return Contender(name + (f" splits*{splits:g}" if splits != 1 else ""), "ours", codes, make)


def sweep(device: torch.device, codes: bool) -> list[Contender]:
    """Our kernel under other plans: over codes all of blocks, warps, stages and splits together; over 16 bits the splits apart."""
    found, times = [ours(False, device), ours(True, device)], SPLITS if codes else (1.0,)
    for block_n, warps, stages in itertools.product((64, 128) if codes else (32, 64, 128), (4, 8), (2, 3, 4)):
        plan = {"block_n": block_n, "warps": warps, "stages": stages}
        found += [ours(codes, device, plan, more) for more in times]
    if not codes:
        found += [ours(False, device, {"splits": splits}) for splits in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)]
    return found


# --- torch ---


def repeat_kv(x: Tensor, group: int) -> Tensor:
    """As transformers repeats K and V for grouped heads."""
    b, heads, length, size = x.shape
    return x[:, :, None].expand(b, heads, group, length, size).reshape(b, heads * group, length, size)


def sdpa(backend: str, how: str) -> Contender:
    """One backend of SDPA, with ``repeat_kv`` before it as transformers has, or by its own ``enable_gqa``."""

    def make(caches: Caches) -> Call:
        group = caches.cell.heads // caches.cell.kv_heads

        def call(i: int) -> Tensor:
            k, v = caches.plain[i % len(caches.plain)]
            if how == "repeat":
                k, v = repeat_kv(k, group), repeat_kv(v, group)
            with sdpa_kernel(BACKENDS[backend]):
                return scaled_dot_product_attention(
                    caches.q, k, v, attn_mask=caches.mask, scale=caches.scale, enable_gqa=how == "gqa"
                )

        return call

    return Contender(f"sdpa {backend} {how}", "sdpa", False, make)


def sdpa_filled(how: str) -> Contender:
    """Flash attention without a mask over the filled tokens alone, which a static graph cannot know: the best of SDPA."""

    def make(caches: Caches) -> Call:
        group, filled = caches.cell.heads // caches.cell.kv_heads, caches.cell.filled

        def call(i: int) -> Tensor:
            k, v = (plane[:, :, :filled] for plane in caches.plain[i % len(caches.plain)])
            if how == "repeat":
                k, v = repeat_kv(k, group), repeat_kv(v, group)
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return scaled_dot_product_attention(caches.q, k, v, scale=caches.scale, enable_gqa=how == "gqa")

        return call

    return Contender(f"sdpa flash {how} no mask", "sdpa", False, make)


def flex() -> Contender:
    """FlexAttention, compiled, with the same mask as a block mask."""

    def make(caches: Caches) -> Call:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        filled, cell = caches.cell.filled, caches.cell

        def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return k < filled

        torch._dynamo.reset()  # each cell is compiled anew, and after some compilations of one function Dynamo runs it eagerly
        blocks = create_block_mask(seen, None, None, 1, cell.context, device=str(caches.device))
        compiled = torch.compile(flex_attention, dynamic=False)

        def call(i: int) -> Tensor:
            k, v = caches.plain[i % len(caches.plain)]
            return compiled(caches.q, k, v, block_mask=blocks, scale=caches.scale, enable_gqa=True)

        return call

    return Contender("flex_attention", "peer", False, make)


# --- peers, called without our code ---


def flashinfer() -> Contender:
    """FlashInfer's batch decode over pages of 64 tokens, planned beforehand; bf16."""

    def make(caches: Caches) -> Call:
        import flashinfer

        cell, page = caches.cell, 64
        pages = cell.filled // page
        if cell.filled % page or cell.context % page:
            raise ValueError(f"pages of {page} tokens do not divide {cell.filled} or {cell.context}")
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device=caches.device)
        starts = torch.arange(cell.batch + 1, dtype=torch.int32, device=caches.device) * pages
        room = cell.context // page
        places = torch.arange(cell.batch, device=caches.device)[:, None] * room
        indices = (places + torch.arange(pages, device=caches.device)).flatten().int()
        lasts = torch.full((cell.batch,), page, dtype=torch.int32, device=caches.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_cuda_graph=True, use_tensor_cores=cell.heads // cell.kv_heads >= 4,
            paged_kv_indptr_buffer=starts.clone(), paged_kv_indices_buffer=indices.clone(),
            paged_kv_last_page_len_buffer=lasts.clone(),
        )  # fmt: skip
        wrapper.plan(
            starts, indices, lasts, cell.heads, cell.kv_heads, cell.size, page, q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16, sm_scale=caches.scale,
        )  # fmt: skip

        def paged(x: Tensor) -> Tensor:
            parts = x.unflatten(2, (room, page)).transpose(1, 2).flatten(0, 1)
            return parts.contiguous()

        data = [(paged(k), paged(v)) for k, v in caches.plain]

        def call(i: int) -> Tensor:
            return wrapper.run(caches.q[:, :, 0], data[i % len(data)])[:, :, None]

        return call

    return Contender("flashinfer", "peer", False, make)


def flash_attention_3() -> Contender:
    """FA3's ``flash_attn_with_kvcache`` over [b, l, h, d]; bf16."""

    def make(caches: Caches) -> Call:
        from flash_attn_interface import flash_attn_with_kvcache

        lengths = torch.full((caches.cell.batch,), caches.cell.filled, dtype=torch.int32, device=caches.device)
        data = [tuple(x.transpose(1, 2).contiguous() for x in pair) for pair in caches.plain]
        q = caches.q.transpose(1, 2).contiguous()

        def call(i: int) -> Tensor:
            out = flash_attn_with_kvcache(q, *data[i % len(data)], cache_seqlens=lengths, softmax_scale=caches.scale)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return call

    return Contender("flash_attn_3", "peer", False, make)


def contenders(device: torch.device) -> tuple[list[Contender], list[str]]:
    """All that are here, and notes on those that are not."""
    found, notes = [ours(False, device), ours(True, device)], list[str]()
    if device.type != "cuda":
        return [*found, sdpa("math", "repeat"), sdpa("math", "gqa")], notes
    found += [sdpa(backend, how) for backend in BACKENDS for how in ("repeat", "gqa")]
    found += [sdpa_filled("repeat"), sdpa_filled("gqa"), flex()]
    for library, peer in zip(LIBRARIES, (flashinfer, flash_attention_3), strict=True):
        if probe_library(library):
            found.append(peer())
        else:
            notes.append(f"{library} is not installed")
    return found, notes


# --- measuring ---


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a microsecond, read and written together, of the faster of a copy and a kernel that adds, far beyond the L2."""
    size = COPIED if device.type == "cuda" else 1 << 24
    source, target = (torch.zeros(size // 4, dtype=torch.float32, device=device) for _ in range(2))
    ways = {"copy": lambda i: target.copy_(source), "kernel": lambda i: torch.add(source, 1.0, out=target)}
    times = [timing.us for timing in time_calls(ways, device, 1).values() if isinstance(timing, Timing)]
    return 2 * size / min(times)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error; inf when anything is not finite."""
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def prepare(contender: Contender, caches: Caches, truths: Mapping[bool, Tensor], row: dict[str, Any]) -> Call | None:
    """Fill in the row's status, and give the call to time if it is right."""
    try:
        call = contender.make(caches)
        row["relative_error"] = round(relative_error(call(0), truths[contender.codes]), 7)
    except Exception as error:  # a backend that cannot serve is a result, not the end of the run
        row.update(status="failing", reason=last_line(error))
        return None
    if not row["relative_error"] <= TOLERANCE:
        row.update(status="failing", reason=f"relative error {row['relative_error']:.2e} over {TOLERANCE:.0e}")
        return None
    row["status"] = "ok"
    return call


def measure(cell: Cell, found: Sequence[Contender], bandwidth: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Check and time every contender of a cell."""
    device = torch.device(args.device)
    caches = Caches(cell, device)
    truths = {codes: caches.truth(codes) for codes in (False, True)}
    rows = {c.name: {**cell.where, "contender": c.name, "kind": c.kind} for c in found}
    calls = {c.name: prepare(c, caches, truths, rows[c.name]) for c in found}
    floors = {c.name: cell.bytes_read(c.codes) / bandwidth for c in found}
    limit = max(HOPELESS_US, HOPELESS * cell.bytes_read(False) / bandwidth) if device.type == "cuda" else float("inf")
    timings: dict[str, Timing | str] = {}
    for group in groups([name for name, call in calls.items() if call is not None], cell, device):
        timings |= time_calls({name: calls[name] for name in group}, device, caches.copies, args.repeats, limit)
        collect(device)
    for name, timing in timings.items():
        row = rows[name]
        row["floor_us"] = round(floors[name], 3)
        if isinstance(timing, Timing):
            row.update(timing.fields(), share_of_floor=round(floors[name] / timing.us, 4))
        else:
            row.update(status="slow" if timing.startswith("slower") else "failing", reason=timing)
    return list(rows.values())


def summarize(cell: Cell, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A line for each cell: ours, the best of SDPA and of the peers, and ratios (above 1: ours is faster)."""
    timed = {row["contender"]: row for row in rows if "us" in row}
    out = dict(cell.where)
    for name in ("ours bf16", "ours e4m3"):
        row, key = timed.get(name, {}), name.replace("ours ", "")
        out[f"{key}_us"], out[f"{key}_of_floor"] = row.get("us"), row.get("share_of_floor")
    for kind in ("sdpa", "peer"):
        found = [(row["us"], row["contender"]) for row in timed.values() if row["kind"] == kind]
        out[f"{kind}_us"], out[kind] = min(found, default=(None, None))
    others = [us for us in (out["sdpa_us"], out["peer_us"]) if us]
    mine = out["bf16_us"]
    out["faster_than_best"] = round(min(others) / mine, 4) if others and mine else None
    out["e4m3_over_bf16"] = round(mine / out["e4m3_us"], 4) if mine and out["e4m3_us"] else None
    return out


def groups(names: Sequence[str], cell: Cell, device: torch.device) -> list[list[str]]:
    """Who is timed in turns: all, unless the graphs of those that repeat K and V, each with memory of its own, have no room together."""
    repeating = [name for name in names if " repeat" in name]
    if device.type != "cuda" or needs(cell, len(repeating)) < ROOM * torch.cuda.mem_get_info(device)[1]:
        return [list(names)]
    return [[name for name in names if name not in repeating], *([name] for name in repeating)]


def needs(cell: Cell, repeating: int = 1) -> int:
    """Bytes that a cell may take: both caches in copies, those of libraries that want another order, a truth in f32, repeated heads."""
    one = 2 * cell.batch * cell.kv_heads * cell.context * cell.size  # K or V in bf16
    repeated = 2 * one * cell.heads // cell.kv_heads
    planes = 3 + 2 * sum(map(probe_library, LIBRARIES))
    return planes * one * copies_for(cell.bytes_read(True)) + repeating * repeated + 8 * one // cell.batch


def cells(args: argparse.Namespace) -> list[Cell]:
    """All problems."""
    sizes = itertools.product(args.contexts, args.batches, args.models.items())
    return [
        Cell(model, *heads, batch, context, min(args.filled or context, context))
        for context, batch, (model, heads) in sizes
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = _arguments(argv)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_grad_enabled(False)
    device, deadline = torch.device(args.device), Deadline(args.seconds)
    found, notes = (sweep(device, args.sweep == "codes"), []) if args.sweep else contenders(device)
    bandwidth = copy_bandwidth(device)
    rows, summary = list[dict[str, Any]](), list[dict[str, Any]]()
    for cell in cells(args):
        name = f"{cell.model} B={cell.batch} {cell.filled} of {cell.context}"
        if deadline.passed:
            notes.append(f"{name}: not measured, time budget spent")
            continue
        if device.type == "cuda" and needs(cell) > ROOM * torch.cuda.mem_get_info(device)[1]:
            notes.append(f"{name}: not measured, needs {needs(cell) / 2**30:.0f} GiB")
            continue
        new = measure(cell, found, bandwidth, args)
        rows += new
        summary.append(summarize(cell, new))
        collect(device)
    meta = {
        "benchmark": "attention",
        "machine": machine(device),
        "settings": {
            "repeats": args.repeats,
            "tolerance": TOLERANCE,
            "copy_gb_per_s": round(bandwidth / 1e3, 1),
            "timing": "CUDA graphs in turns of random order, caches rotated past the L2, attention alone, median"
            if device.type == "cuda"
            else "calls in turns, median",
            "seconds": round(deadline.elapsed, 1),
        },
        "summary": summary,
        "faster_than_best": geomean([row["faster_than_best"] for row in summary if row["faster_than_best"]]),
        "notes": notes,
    }
    show(rows, summary, notes)
    write_result(args.out, rows, meta)


def show(rows: Sequence[Mapping[str, Any]], summary: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> None:
    """Notes, what failed (each reason once), the times of each cell, and the table."""
    for note in notes:
        print("note:", note)
    failed = dict.fromkeys((row["contender"], row["reason"]) for row in rows if row["status"] != "ok")
    for contender, reason in failed:
        print(f"FAILING {contender}: {reason}")
    lines: dict[str, list[str]] = {}
    for row in sorted((row for row in rows if "us" in row), key=lambda row: row["us"]):
        key = f"{row['model']} B={row['batch']} {row['filled']} of {row['context']}"
        lines.setdefault(key, []).append(f"{row['contender']} {row['us']:.1f} ({row['share_of_floor']:.0%})")
    for name, values in lines.items():
        print(f"{name}: " + ", ".join(values))
    keys = ["model", "batch", "context", "filled", "bf16_us", "bf16_of_floor", "e4m3_us", "e4m3_of_floor"]
    keys += ["e4m3_over_bf16", "sdpa", "sdpa_us", "peer", "peer_us", "faster_than_best"]
    print(table(keys, [[row[key] for key in keys] for row in summary]))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", default=None, help=f"comma-separated, of {', '.join(MODELS)}")
    parser.add_argument("--batches", default=None, help="comma-separated")
    parser.add_argument("--contexts", default=None, help="comma-separated tokens that the cache has room for")
    parser.add_argument("--filled", type=int, default=0, help="tokens that are filled; 0: all")
    how = "our kernel alone, under other plans over codes (36, a minute for a cell) or over 16 bits"
    parser.add_argument("--sweep", nargs="?", const="codes", choices=("codes", "floats"), help=how)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=540.0, help="no new cell is started after this")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on CPU: does it run?")
    parser.add_argument("--out", type=Path, default=RESULTS / "attention.json")
    args = parser.parse_args(argv)
    if args.smoke:
        args.device, args.repeats = "cpu", 2
    known = SMOKE_MODELS if args.smoke else MODELS
    args.models = {name: known[name] for name in args.models.split(",")} if args.models else known
    args.batches = _numbers(args.batches) or (SMOKE_BATCHES if args.smoke else BATCHES)
    args.contexts = _numbers(args.contexts) or (SMOKE_CONTEXTS if args.smoke else CONTEXTS)
    return args


def _numbers(text: str | None) -> tuple[int, ...]:
    return tuple(map(int, text.split(","))) if text else ()


if __name__ == "__main__":
    main()
