"""GEMM kernels against their peers: every kernel of the registry, cuBLAS bf16, and each peer library called directly.

For each scheme, shape [n x k] and M: every contender is first compared with the scheme's torch reference (relative
Frobenius error at most 5e-3 over up to 128 rows, and no NaN or inf anywhere); one that fails is reported and not timed.
sgl-kernel's GGUF products, which round the input to Q8_1, are held to 2e-2 of the same reference.
Then all contenders of a cell are timed in turns as CUDA graphs, over copies of their weights that together exceed the
L2. Times are of the GEMM alone: the input is quantized beforehand. ``dispatch`` is the kernel that the selection of
quant_compile picks for that M from its one layout, run over that layout and fed as the dispatch feeds it.

    python benchmarks/gemm.py --out benchmarks/results/gemm.json            # the rows of the anchors, about 4 minutes
    python benchmarks/gemm.py --schemes FP8_DYNAMIC --llama --seconds 120
    python benchmarks/gemm.py --schemes GGUF_Q4_K,GGUF_Q8_0 --seconds 110
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Deadline, Timing, copies_for, geomean, last_line, machine, table, time_calls, write_result
from torch import Tensor
from torch.nn.functional import linear

import quant_compile.lowering.schemes  # noqa: F401  (registers the scheme families)
from quant_compile.ir.family import Family, Planes, Reject, family_of
from quant_compile.ir.scheme import parse
from quant_compile.lowering.registry import Kernel, Problem, kernels, layouts
from quant_compile.lowering.schemes.gguf import block_of
from quant_compile.lowering.target import Target

SCHEMES = ("FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W4A16", "W4A8", "W4AFP8", "NVFP4A16")
SHAPES = ((6144, 4096), (28672, 4096), (8192, 28672))
LLAMA_SHAPES = ((4096, 4096), (4096, 14336))
MS = (1, 16, 64, 512, 4096)
SMOKE_SHAPES = ((256, 256), (128, 512))
SMOKE_MS = (1, 16)
TOLERANCE = 5e-3
Q8_1_TOLERANCE = 2e-2
CHECKED_ROWS = 128
# A contender this many times slower than bf16 should be is reported with one measurement instead of a graph of them, if
# it is also slower than launch overheads can explain.
HOPELESS, HOPELESS_US = 6.0, 500.0


@dataclass(frozen=True)
class Contender:
    """Something that computes a cell.

    Attributes:
        kind: ``bf16``, ``peer``, ``kernel`` or ``dispatch``.
        layout: contenders of one layout share packed copies.
        pack: row-form planes of a weight -> what ``call`` wants of it.
        feed: planes of an input -> what ``call`` wants of it.
        call: ``(x, w) -> [m, n]``.
        tolerance: of the relative error.
    """

    name: str
    kind: str
    layout: str
    pack: Callable[[Planes], Any]
    feed: Callable[[Planes], Any]
    call: Callable[[Any, Any], Tensor]
    tolerance: float = TOLERANCE


# --- the peers, called without our code ------------------------------------------------------------------------------


def _same(planes: Planes) -> Planes:
    return planes


def _column_scales(x: Planes) -> Planes:
    return x[0], x[1].t().contiguous().t()


def _kn(w: Planes) -> Planes:
    """Weight and scales as [k, n] and [., n] views, which column-major GEMMs read."""
    return w[0].t(), w[1].t()


def torch_fp8_row(problem: Problem) -> Contender:
    """torch._scaled_mm with row-wise scales."""

    def call(x: Planes, w: Planes) -> Tensor:
        return torch._scaled_mm(x[0], w[0], scale_a=x[1], scale_b=w[1], out_dtype=problem.dtype, use_fast_accum=True)

    return Contender("torch._scaled_mm", "peer", "kn", _kn, _same, call)


def sgl_fp8(problem: Problem) -> Contender:
    """sgl-kernel's CUTLASS FP8 GEMM with per-token and per-channel scales."""
    import sgl_kernel

    def call(x: Planes, w: Planes) -> Tensor:
        return sgl_kernel.fp8_scaled_mm(x[0], w[0], x[1], w[1], problem.dtype, None)

    return Contender("sgl fp8_scaled_mm", "peer", "k", lambda w: (w[0].t(), w[1]), _same, call)


def sgl_fp8_block(problem: Problem) -> Contender:
    """sgl-kernel's CUTLASS FP8 GEMM with 1x128 and 128x128 scales."""
    import sgl_kernel

    def call(x: Planes, w: Planes) -> Tensor:
        return sgl_kernel.fp8_blockwise_scaled_mm(x[0], w[0], x[1], w[1], problem.dtype)

    return Contender("sgl fp8_blockwise", "peer", "kn", _kn, _column_scales, call)


def deep_gemm_block(problem: Problem) -> Contender:
    """DeepGEMM with the input's scales already in the order that its TMA loads want, so that only the GEMM is timed."""
    import deep_gemm

    def feed(x: Planes) -> Planes:
        return x[0], deep_gemm.get_mn_major_tma_aligned_tensor(x[1])

    def call(x: Planes, w: Planes) -> Tensor:
        y = torch.empty(x[0].shape[0], problem.n, dtype=problem.dtype, device=x[0].device)
        deep_gemm.fp8_gemm_nt((x[0], x[1]), (w[0], w[1]), y)
        return y

    return Contender("deep_gemm", "peer", "rows", _same, feed, call)


def sgl_int8(problem: Problem) -> Contender:
    """sgl-kernel's CUTLASS INT8 GEMM."""
    import sgl_kernel

    def call(x: Planes, w: Planes) -> Tensor:
        return sgl_kernel.int8_scaled_mm(x[0], w[0], x[1], w[1], problem.dtype, None)

    return Contender("sgl int8_scaled_mm", "peer", "k", lambda w: (w[0].t(), w[1]), _same, call)


def _humming(
    problem: Problem, weight: dict[str, Any], inputs: str | None, tensors: Callable[[Planes], dict[str, Tensor]]
) -> Contender:
    """humming's layer, given the input's codes and scale where it is quantized, so that only the GEMM is timed."""
    from humming.layer import HummingLayer

    def pack(w: Planes) -> Any:
        layer = HummingLayer(
            shape_n=problem.n,
            shape_k=problem.k,
            weight_config=dict(weight),
            input_config=None if inputs is None else {"dtype": inputs},
            torch_dtype=problem.dtype,
        ).cuda()
        layer.load_from_tensors(tensors(w))
        layer.transform()
        return layer

    def call(x: Planes, layer: Any) -> Tensor:
        return layer(x[0], input_scale=x[1] if len(x) > 1 else None)

    return Contender("humming", "peer", "humming layer", pack, _same, call)


def humming_int4(problem: Problem) -> Contender:
    """int4 groups; humming's packed fields are our nibbles read as little-endian int32."""
    x = problem.scheme.input_activations
    inputs = None if x is None else "int8" if x.type == "int" else "float8e4m3"
    weight = {"dtype": "int4", "group_size": problem.scheme.weights.group_size}
    return _humming(problem, weight, inputs, lambda w: {"weight": w[0].view(torch.int32), "weight_scale": w[1]})


def humming_nvfp4(problem: Problem) -> Contender:
    """e2m1 under e4m3 scales and one f32 scale of the tensor."""
    weight = {"dtype": "float4e2m1", "group_size": 16, "scale_dtype": "float8e4m3", "scale_2_type": "tensor"}

    def tensors(w: Planes) -> dict[str, Tensor]:
        return {"weight": w[0].view(torch.int32), "weight_scale": w[1], "weight_scale_2": w[2][:1, 0].clone()}

    return _humming(problem, weight, None, tensors)


def humming_mxfp4(problem: Problem) -> Contender:
    """e2m1 under e8m0 scales."""
    weight = {"dtype": "float4e2m1", "group_size": 32, "scale_dtype": "float8e8m0"}

    def tensors(w: Planes) -> dict[str, Tensor]:
        return {"weight": w[0].view(torch.int32), "weight_scale": w[1].view(torch.float8_e8m0fnu)}

    return _humming(problem, weight, None, tensors)


def sgl_qserve(problem: Problem) -> Contender:
    """QServe's GEMMs as sgl-kernel exposes them: f16 input scales and sums, f16 out, weights in the kernels' own order."""
    import sgl_kernel

    from quant_compile.lowering.kernels.w4a8 import sgl_qserve as ours

    if problem.scheme.weights.group_size is None:

        def call(x: Planes, w: Planes) -> Tensor:
            return sgl_kernel.qserve_w4a8_per_chn_gemm(x[0], w[0], w[1], x[1], w[2], x[2])

        return Contender(
            "sgl qserve", "peer", "qserve", lambda w: ours.pack_channel(w, problem),
            lambda x: (x[0], x[1].reshape(-1).half(), (x[1] * x[2]).reshape(-1).half()), call,
        )  # fmt: skip

    def call_group(x: Planes, w: Planes) -> Tensor:
        return sgl_kernel.qserve_w4a8_per_group_gemm(x[0], w[0], w[3], w[2], w[1], x[1])

    return Contender(
        "sgl qserve", "peer", "qserve", lambda w: ours.pack_group(w, problem),
        lambda x: (x[0], x[1].reshape(-1).half()), call_group,
    )  # fmt: skip


def tinygemm(problem: Problem) -> Contender:
    """torch's ``_weight_int4pack_mm``, the kernel below torchao's int4: even k in the high nibble, zero point 8."""
    group = problem.scheme.weights.group_size or problem.k

    def pack(w: Planes) -> Planes:
        swapped = (w[0] >> 4) | (w[0] << 4)
        scale = w[1].t().contiguous()
        return torch.ops.aten._convert_weight_to_int4pack(swapped, 8), torch.stack((scale, torch.zeros_like(scale)), -1)

    def call(x: Planes, w: Planes) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(x[0], w[0], group, w[1])

    return Contender("torch tinygemm", "peer", "tinygemm", pack, _same, call)


def sgl_ggml_vec(problem: Problem) -> Contender:
    """sgl-kernel's product for one row, which rounds the input to Q8_1."""
    import sgl_kernel

    kind = block_of(problem.scheme).number

    def call(x: Planes, w: Planes) -> Tensor:
        if x[0].shape[0] > 1:
            raise ValueError("measured at one row")
        return sgl_kernel.ggml_mul_mat_vec_a8(w[0], x[0], kind, problem.n)

    return Contender("sgl ggml_mul_mat_vec_a8", "peer", "blocks", _same, _same, call, Q8_1_TOLERANCE)


def sgl_ggml(problem: Problem) -> Contender:
    """sgl-kernel's product for any rows, which rounds the input to Q8_1."""
    import sgl_kernel

    kind = block_of(problem.scheme).number
    return Contender(
        "sgl ggml_mul_mat_a8", "peer", "blocks", _same, _same,
        lambda x, w: sgl_kernel.ggml_mul_mat_a8(w[0], x[0], kind, problem.n), Q8_1_TOLERANCE,
    )  # fmt: skip


PEERS: Mapping[str, Sequence[Callable[[Problem], Contender]]] = {
    "FP8_DYNAMIC": (torch_fp8_row, sgl_fp8),
    "FP8_BLOCK": (sgl_fp8_block, deep_gemm_block),
    "W8A8": (sgl_int8,),
    "W4A16": (humming_int4, tinygemm),
    "W4A8": (humming_int4,),
    "W4AFP8": (humming_int4,),
    "NVFP4A16": (humming_nvfp4,),
    "MXFP4A16": (humming_mxfp4,),
    "QSERVE_W4A8_CHANNEL": (sgl_qserve,),
    "QSERVE_W4A8_GROUP": (sgl_qserve,),
    **dict.fromkeys(("GGUF_Q4_0", "GGUF_Q4_K", "GGUF_Q5_K", "GGUF_Q6_K", "GGUF_Q8_0"), (sgl_ggml_vec, sgl_ggml)),
}


def kernel_contender(kernel: Kernel, problem: Problem, kind: str, column_scales: bool) -> Contender:
    """A kernel of the registry over its own layout, with the input's scales in the order given."""
    return Contender(
        kernel.name,
        kind,
        kernel.layout,
        lambda w: layouts()[kernel.layout].pack(w, problem),
        _column_scales if column_scales else _same,
        lambda x, w: kernel.run(x, w, None, problem),
    )


# --- one weight, and the cells over it -------------------------------------------------------------------------------


class Weight:
    """A random weight of one problem, its planes, and the packed copies that contenders rotate through."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem, self.device = problem, device
        self.generator = torch.Generator(device).manual_seed(problem.n * 31 + problem.k)
        self._packed: dict[str, list[Any]] = {}

    @property
    def family(self) -> Family:
        """The scheme's truth."""
        return family_of(self.problem.scheme)

    @cached_property
    def dense(self) -> Tensor:
        """[n, k] in the problem's dtype."""
        shape = (self.problem.n, self.problem.k)
        w = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return (w * self.problem.k**-0.5).to(self.problem.dtype)

    @cached_property
    def planes(self) -> Planes:
        """Row form."""
        return self.family.quantize_weight(self.dense, self.problem.scheme)

    @cached_property
    def copies(self) -> int:
        """Copies whose bytes exceed the L2, the same for every contender of quantized weights."""
        return copies_for(sum(p.numel() * p.element_size() for p in self.planes)) if self.device.type == "cuda" else 2

    def packed(self, contender: Contender) -> list[Any]:
        """Packed copies for a contender, made once a layout; there are at least ``copies`` of them."""
        key = f"{'layout' if contender.kind in ('kernel', 'dispatch') else 'own'} {contender.layout}"
        if key not in self._packed:
            count = copies_for(self.dense.numel() * 2) if contender.kind == "bf16" else self.copies
            source = (self.dense,) if contender.kind == "bf16" else self.planes
            self._packed[key] = [contender.pack(tuple(p.clone() for p in source)) for _ in range(count)]
        return self._packed[key]

    def inputs(self, m: int) -> tuple[list[Tensor], list[Planes]]:
        """Two random inputs [m, k], and their planes."""
        shape = (m, self.problem.k)
        xs = [torch.randn(shape, generator=self.generator, device=self.device).to(self.problem.dtype) for _ in range(2)]
        if self.problem.scheme.input_activations is None:
            return xs, [(x,) for x in xs]
        return xs, [self.family.quantize_input(x, self.problem.scheme, None) for x in xs]

    def reference(self, x: Planes, rows: Tensor) -> Tensor:
        """The family's own linear over some rows of the input, f32; schemes with one scale a row or group only."""
        picked = tuple(p[rows] for p in x)
        return self.family.linear(picked, self.planes, None, self.problem.scheme, torch.float32)


def checked_rows(m: int, device: torch.device) -> Tensor:
    """Up to 128 different rows spread over every position within a tile (61 shares no factor with usual sizes)."""
    rows = torch.arange(min(m, CHECKED_ROWS), device=device)
    return rows * 61 % m if m > CHECKED_ROWS else rows


def relative_error(y: Tensor, rows: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error of ``y[rows]``; inf when anything in ``y`` is not finite."""
    if not bool(torch.isfinite(y).all()):
        return float("inf")
    difference = y[rows].float() - expected
    return float(difference.norm() / expected.norm())


@dataclass
class Entry:
    """What became of one contender in one cell."""

    contender: Contender
    reason: str | None = None
    status: str = "ok"
    error: float | None = None
    timing: Timing | None = None

    def row(self, where: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON row."""
        row = {**where, "contender": self.contender.name, "kind": self.contender.kind, "status": self.status}
        if self.error is not None:
            row["relative_error"] = round(self.error, 7)
        if self.reason is not None:
            row["reason"] = self.reason
        return row | (self.timing.fields() if self.timing else {})


def contenders(problem: Problem, target: Target) -> tuple[list[Contender], list[tuple[str, str]]]:
    """All that could run the problem, bf16 first, and what could not be set up: (name, reason)."""
    bf16 = Contender("cuBLAS bf16", "bf16", "dense", _same, _same, lambda x, w: linear(x[0], w[0]))
    found, missing = [bf16], list[tuple[str, str]]()
    for peer in PEERS.get(problem.scheme.spec, ()) if target.device == "cuda" else ():
        try:
            found.append(peer(problem))
        except Exception as error:  # an absent or broken peer library must not end the run
            missing.append((peer.__name__, last_line(error)))
    for kernel in kernels().values():
        if kernel.only_pinned is None and not (kernel.reference and target.device == "cuda"):
            found.append(kernel_contender(kernel, problem, "kernel", kernel.column_scales))
    return found, missing


def prepare(entry: Entry, weight: Weight, m: int, target: Target, truth: Truth) -> Callable[[int], Tensor] | None:
    """Fill in the entry's status (rejected by ``fit``, failing, or ok) and give the call to time if it is ok."""
    contender = entry.contender
    try:
        if contender.kind in ("kernel", "dispatch"):
            answer = kernels()[contender.name].fit(weight.problem, m, target)
            if isinstance(answer, Reject):
                entry.status, entry.reason = "rejected", answer.reason
                return None
        sample = truth.dense if contender.kind == "bf16" else truth.quantized
        xs, ws = [contender.feed(x) for x in sample.xs], weight.packed(contender)
        entry.error = relative_error(contender.call(xs[0], ws[0]), truth.rows, sample.expected)
    except Exception as error:  # a peer or kernel that breaks is a result, not the end of the run
        entry.status, entry.reason = "failing", last_line(error)
        return None
    if not entry.error <= contender.tolerance:
        entry.status, entry.reason = "failing", f"relative error {entry.error:.2e} over {contender.tolerance:.0e}"
        return None
    return lambda i: contender.call(xs[i % len(xs)], ws[i % len(ws)])


@dataclass(frozen=True)
class Sample:
    """Inputs of a cell, and what the checked rows of the product with the first should be, f32."""

    xs: Sequence[Any]
    expected: Tensor


@dataclass(frozen=True)
class Truth:
    """What contenders of one cell are compared with."""

    rows: Tensor
    quantized: Sample
    dense: Sample


def truth_of(weight: Weight, m: int) -> Truth:
    """Fresh random inputs and their expected products."""
    dense, planes = weight.inputs(m)
    rows = checked_rows(m, weight.device)
    plain = dense[0][rows].float() @ weight.dense.float().t()
    return Truth(rows, Sample(planes, weight.reference(planes[0], rows)), Sample([(x,) for x in dense], plain))


def measure_cell(weight: Weight, m: int, target: Target, found: Sequence[Contender], repeats: int) -> list[Entry]:
    """Check and time every contender at one M."""
    truth = truth_of(weight, m)
    entries = {f"{contender.kind} {contender.name}": Entry(contender) for contender in found}
    calls = {name: prepare(entry, weight, m, target, truth) for name, entry in entries.items()}
    limit = max(HOPELESS_US, HOPELESS * _floor_us(weight, m)) if weight.device.type == "cuda" else float("inf")
    good = {name: call for name, call in calls.items() if call is not None}
    for name, timing in time_calls(good, weight.device, weight.copies, repeats, limit).items():
        entry = entries[name]
        if isinstance(timing, Timing):
            entry.timing = timing
        else:
            entry.status, entry.reason = "slow" if timing.startswith("slower") else "failing", timing
    return list(entries.values())


def _floor_us(weight: Weight, m: int) -> float:
    """A rough time of the bf16 GEMM, to tell hopeless contenders: 3 TB/s, 500 TFLOP/s, 10 us at least."""
    n, k = weight.problem.n, weight.problem.k
    return max(10.0, 2 * n * k / 3e6, 2 * m * n * k / 5e8)


# --- dispatch, summaries, output -------------------------------------------------------------------------------------


def choose_dispatch(problem: Problem, target: Target, tune: str) -> Any:
    """What the backend chooses for the problem under its preset as policy; a text when it cannot answer."""
    try:
        from quant_compile.backend import _chooser
        from quant_compile.options import Options, PolicySource

        source = PolicySource(problem.scheme.spec, problem.scheme.spec)
        return _chooser(Options.of({"tune": tune}), source, target, torch.device(target.device))(
            problem, "a benchmark's linear"
        )
    except Exception as error:
        return last_line(error)


def dispatched(dispatch: Any, m: int) -> list[Contender]:
    """The kernel that a dispatch runs at this M, fed as the dispatch feeds it; nothing when there is no dispatch."""
    if isinstance(dispatch, str):
        return []
    return [kernel_contender(dispatch.kernel_for(m), dispatch.problem, "dispatch", dispatch.column_scales)]


def summarize(where: Mapping[str, Any], entries: Sequence[Entry]) -> dict[str, Any]:
    """One line a cell: bf16, best peer, best kernel, dispatch, and dispatch over best peer (below 1: we are faster)."""
    out: dict[str, Any] = dict(where)
    for kind in ("bf16", "peer", "kernel", "dispatch"):
        timed = [(e.timing.us, e.contender.name) for e in entries if e.timing is not None and e.contender.kind == kind]
        us, name = min(timed, default=(None, None))
        out[kind], out[f"{kind}_us"] = name, us and round(us, 3)
    for kind in ("peer", "bf16"):
        both = out["dispatch_us"] and out[f"{kind}_us"]
        out[f"ratio_to_{kind}"] = round(out["dispatch_us"] / out[f"{kind}_us"], 4) if both else None
    return out


def verdicts(summary: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per scheme: geometric mean and worst row of dispatch over best peer."""
    out: list[dict[str, Any]] = []
    for scheme in dict.fromkeys(row["scheme"] for row in summary):
        rows = [row for row in summary if row["scheme"] == scheme]
        rated = [row for row in rows if row["ratio_to_peer"]]
        worst = max(rated, key=lambda row: row["ratio_to_peer"], default=None)
        out.append(
            {
                "scheme": scheme,
                "rows": len(rows),
                "rated": len(rated),
                "geomean_to_peer": geomean([row["ratio_to_peer"] for row in rated]),
                "worst_to_peer": worst["ratio_to_peer"] if worst else None,
                "worst_row": f"{worst['n']}x{worst['k']} M={worst['m']}" if worst else None,
                "geomean_to_bf16": geomean([row["ratio_to_bf16"] for row in rows if row["ratio_to_bf16"]]),
            }
        )
    return out


@dataclass
class Run:
    """The results as they grow; ``rejected`` is a set in order of kernels' refusals, each told once."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rejected: dict[str, None] = field(default_factory=dict)


def measure_problem(run: Run, problem: Problem, args: argparse.Namespace, deadline: Deadline) -> None:
    """All M of one scheme and shape; cells past the deadline are listed as not measured."""
    device = torch.device(args.device)
    target = Target.of(device)
    name = {"scheme": problem.scheme.spec, "n": problem.n, "k": problem.k}
    found, missing = contenders(problem, target)
    for peer, reason in missing:
        run.notes.append(f"{problem.scheme.spec} {peer}: {reason}")
    dispatch = "time budget spent" if deadline.passed else choose_dispatch(problem, target, args.tune)
    if isinstance(dispatch, str):
        run.notes.append(f"{problem.scheme.spec} {problem.n}x{problem.k}: no dispatch ({dispatch})")
    weight = Weight(problem, device)
    for m in args.ms:
        if deadline.passed:
            run.notes.append(f"{problem.scheme.spec} {problem.n}x{problem.k} M={m}: not measured, time budget spent")
            continue
        where = {**name, "m": m}
        entries = measure_cell(weight, m, target, [*found, *dispatched(dispatch, m)], args.repeats)
        run.rows += [entry.row(where) for entry in entries if entry.status != "rejected"]
        for entry in entries:
            if entry.status == "rejected":
                run.rejected[f"{problem.scheme.spec} {entry.contender.name}: {entry.reason}"] = None
        run.summary.append(summarize(where, entries))
    if device.type == "cuda":
        del weight
        torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = _arguments(argv)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_grad_enabled(False)
    deadline, run = Deadline(args.seconds), Run()
    for n, k in args.shapes:
        for scheme in args.schemes:
            measure_problem(run, Problem(parse(scheme), n, k, torch.bfloat16), args, deadline)
    meta = {
        "benchmark": "gemm",
        "machine": machine(args.device),
        "settings": {
            "tune": args.tune,
            "repeats": args.repeats,
            "tolerance": TOLERANCE,
            "timing": "CUDA graphs in turns of random order, weights rotated past the L2, GEMM alone, median"
            if args.device != "cpu"
            else "calls in turns, median",
            "seconds": round(deadline.elapsed, 1),
        },
        "verdicts": verdicts(run.summary),
        "summary": run.summary,
        "notes": run.notes,
        "rejected": list(run.rejected),
    }
    show(run, meta["verdicts"])
    write_result(args.out, run.rows, meta)


def show(run: Run, per_scheme: Sequence[Mapping[str, Any]]) -> None:
    """Print notes, failing contenders, the table and the verdicts; the shortest and most needed last."""
    for note in run.notes:
        print("note:", note)
    for row in run.rows:
        if row["status"] == "failing":
            print(f"FAILING {row['scheme']} {row['n']}x{row['k']} M={row['m']} {row['contender']}: {row['reason']}")
    timed = [row for row in run.rows if "us" in row and row["kind"] != "bf16"]
    lines: dict[tuple[Any, ...], list[str]] = {}
    for row in timed:
        key = (row["scheme"], row["n"], row["k"], row["m"])
        name = "dispatch" if row["kind"] == "dispatch" else row["contender"]
        lines.setdefault(key, []).append(f"{name} {row['us']:.1f}")
    for (scheme, n, k, m), values in lines.items():
        print(f"{scheme} {n}x{k} M={m}: " + ", ".join(values))
    header = ["scheme", "n", "k", "M", "bf16", "best peer", "us", "best ours", "us", "dispatch", "us", "/peer", "/bf16"]
    fields = ["scheme", "n", "k", "m", "bf16_us", "peer", "peer_us", "kernel", "kernel_us", "dispatch", "dispatch_us"]
    fields += ["ratio_to_peer", "ratio_to_bf16"]
    print(table(header, [[row[field] for field in fields] for row in run.summary]))
    keys = ["scheme", "rows", "rated", "geomean_to_peer", "worst_to_peer", "worst_row", "geomean_to_bf16"]
    print(table(keys, [[row[key] for key in keys] for row in per_scheme]))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--schemes", default=",".join(SCHEMES), help="comma-separated presets")
    parser.add_argument("--shapes", default=None, help="comma-separated NxK, instead of the anchors' shapes")
    parser.add_argument("--ms", default=None, help="comma-separated M")
    parser.add_argument("--llama", action="store_true", help="also o_proj and down_proj of Llama-3-8B")
    parser.add_argument("--tune", default="quick", choices=["off", "quick", "full"], help="how dispatch is chosen")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=230.0, help="no new cell is started after this")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on CPU: does it run?")
    parser.add_argument("--out", type=Path, default=RESULTS / "gemm.json")
    args = parser.parse_args(argv)
    if args.smoke:
        args.device, args.repeats, args.tune = "cpu", 2, "off"
    args.schemes = args.schemes.split(",")
    shapes = SMOKE_SHAPES if args.smoke else SHAPES + (LLAMA_SHAPES if args.llama else ())
    args.shapes = [tuple(map(int, s.split("x"))) for s in args.shapes.split(",")] if args.shapes else list(shapes)
    args.ms = [int(m) for m in args.ms.split(",")] if args.ms else list(SMOKE_MS if args.smoke else MS)
    return args


if __name__ == "__main__":
    main()
