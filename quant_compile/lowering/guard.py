"""Whether 16 bits beat a quantized chain at the m that is run, by measured times.

A chain is what a graph runs for the linears that read one input under one scheme: the quantization of that input, then one
product for all that are merged, or one for each. It is compared with as many plain linears in 16 bits. Reads dispatches and
times (``lowering/tune_guard.py``); measures nothing and knows no graphs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from quant_compile.ir.family import Reject
from quant_compile.ir.numerics import dtype_name
from quant_compile.ir.scheme import Scheme
from quant_compile.lowering.expand import FEWEST, recorded_for
from quant_compile.lowering.registry import Problem
from quant_compile.lowering.select import WEIGHTS, Dispatch
from quant_compile.lowering.sides import SPLIT
from quant_compile.lowering.target import Target

NEVER_SLOWER = "never_slower"
# 16 bits win where the quantized chain takes more than this share longer: two medians of one thing differ by up to 2 %.
MARGIN = 0.03
# A quantization takes less than this: launches in microseconds, and its bytes so many times.
LAUNCHES, PASSES = 6.0, 3.0


@dataclass(frozen=True)
class Plain:
    """A linear in 16 bits: ``F.linear`` of x[m, k] and w[n, k], with a bias or without."""

    n: int
    k: int
    dtype: torch.dtype
    has_bias: bool

    @property
    def key(self) -> str:
        """As text, for the file of times."""
        return f"linear|{self.n}|{self.k}|{dtype_name(self.dtype)}|{int(self.has_bias)}"


@dataclass(frozen=True)
class Quantize:
    """The quantization of an input [m, k].

    Attributes:
        fused: what makes the input is part of the same kernel (a norm, an activation), so only what quantization adds counts.
    """

    scheme: Scheme
    k: int
    dtype: torch.dtype
    fused: bool

    @property
    def key(self) -> str:
        """As text, for the file of times."""
        return f"input|{self.scheme.spec}|{self.k}|{dtype_name(self.dtype)}|{int(self.fused)}"


@dataclass(frozen=True)
class Product:
    """A product of quantized planes by one kernel."""

    kernel: str
    problem: Problem


Job = Plain | Quantize | Product
TimeOf = Callable[[Job, int], "float | Reject"]
"""(job, m) -> measured microseconds, or why there are none."""


@dataclass(frozen=True)
class Chain:
    """What the linears that read one input cost either way.

    Attributes:
        plain: each of them in 16 bits.
        products: their quantized products: one if they are merged.
        quantize: of their input; None for inputs in 16 bits.
    """

    plain: tuple[Plain, ...]
    products: tuple[Problem, ...]
    quantize: Quantize | None

    @property
    def scheme(self) -> Scheme:
        """Of all of them."""
        return self.products[0].scheme


@dataclass(frozen=True)
class Rows:
    """The m that a graph runs.

    Attributes:
        m: the number, or None where it is a symbol.
        many: the symbol is above SPLIT, else up to it.
    """

    m: int | None
    many: bool = False

    @property
    def weights(self) -> Mapping[int, float]:
        """m -> what it counts."""
        if self.m is not None:
            return {self.m: 1.0}
        return {m: w for m, w in WEIGHTS.items() if (m > SPLIT if self.many else FEWEST <= m <= SPLIT)}

    @property
    def text(self) -> str:
        """For people."""
        return f"m = {self.m}" if self.m is not None else f"m > {SPLIT}" if self.many else f"m <= {SPLIT}"


@dataclass(frozen=True)
class Verdict:
    """Microseconds either way; geometric means over a range of m.

    Attributes:
        quantized: at most, where that is enough for the quantized chain to win; measured where 16 bits do.
    """

    chain: Chain
    rows: Rows
    plain: float
    quantized: float

    @property
    def keeps(self) -> bool:
        """Whether 16 bits win."""
        return self.quantized > (1 + MARGIN) * self.plain

    @property
    def text(self) -> str:
        """For ledgers: ``guard: bf16 … µs, FP8_DYNAMIC … µs at m = 512``."""
        dtype = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "f32"}[self.chain.plain[0].dtype]
        siblings = f", {len(self.chain.plain)} linears of one input" if len(self.chain.plain) > 1 else ""
        spec = self.chain.scheme.spec
        return f"guard: {dtype} {self.plain:.1f} µs, {spec} {self.quantized:.1f} µs at {self.rows.text}{siblings}"


def compare(chain: Chain, dispatches: Sequence[Dispatch], rows: Rows, target: Target, time: TimeOf) -> Verdict | Reject:
    """Both times of a chain at the m of a graph.

    Args:
        dispatches: of the chain's products.

    Returns:
        A Reject where a time is not known.
    """
    kernels = [None if rows.m is not None else recorded_for(dispatch, rows.many, target) for dispatch in dispatches]
    plains, products = list[float](), list[float]()
    for m in rows.weights:
        runs = [
            Product(found.kernel if found is not None else dispatch.kernel_for(m).name, dispatch.problem)
            for found, dispatch in zip(kernels, dispatches, strict=True)
        ]
        for total, jobs in ((plains, chain.plain), (products, runs)):
            took = _sum(jobs, m, time)
            if isinstance(took, Reject):
                return took
            total.append(took)
    verdict = _verdict(chain, rows, plains, products)
    if chain.quantize is None:
        return verdict
    for of_input in (partial(_at_most, chain, time, target), partial(time, chain.quantize)):
        whole = list[float]()
        for m, product in zip(rows.weights, products, strict=True):
            took = of_input(m)
            if isinstance(took, Reject):
                return took
            whole.append(product + took)
        verdict = _verdict(chain, rows, plains, whole)
        if not verdict.keeps:
            break
    return verdict


def _sum(jobs: Sequence[Job], m: int, time: TimeOf) -> float | Reject:
    times = [time(job, m) for job in jobs]
    return next((t for t in times if isinstance(t, Reject)), sum(t for t in times if not isinstance(t, Reject)))


def _at_most(chain: Chain, time: TimeOf, target: Target, m: int) -> float | Reject:
    """More than the quantization of an input takes, by the speed at which a linear of one row reads its weight.

    To measure it, Inductor must compile it, which takes a second. Infinite where that speed tells nothing: on CPUs.
    """
    if target.device != "cuda" or chain.quantize is None:
        return math.inf
    weight = max(chain.plain, key=lambda plain: plain.n * plain.k)
    took = time(weight, 1)
    if isinstance(took, Reject):
        return took
    bytes_of_input, bytes_of_weight = 2 * m * chain.quantize.k, 2 * weight.n * weight.k
    return LAUNCHES + PASSES * took * bytes_of_input / bytes_of_weight


def _verdict(chain: Chain, rows: Rows, plain: Sequence[float], quantized: Sequence[float]) -> Verdict:
    weights = list(rows.weights.values())
    return Verdict(chain, rows, _mean(plain, weights), _mean(quantized, weights))


def _mean(times: Sequence[float], weights: Sequence[float]) -> float:
    """Geometric mean."""
    logs = sum(weight * math.log(max(time, 1e-3)) for time, weight in zip(times, weights, strict=True))
    return math.exp(logs / sum(weights))
