"""What the chosen kernels of a problem take at each m, measured or by their estimates, and the floor that the device sets.

Reads what the tuner has measured; measures nothing.
"""

from __future__ import annotations

from quant_compile.ir.moe import MoeProblem
from quant_compile.ir.scheme import Scheme
from quant_compile.lowering.moe import MoeDispatch, moe_kernels, planes_of
from quant_compile.lowering.registry import Problem, kernels, layouts
from quant_compile.lowering.roofs import Roof, roof
from quant_compile.lowering.select import BUCKETS, Dispatch, name_for
from quant_compile.lowering.target import Target
from quant_compile.lowering.tune import FAILED, POINTS, Timings, own_estimate, timings
from quant_compile.page.views import KernelTime


def kernel_times(dispatch: Dispatch | MoeDispatch, target: Target, level: str) -> tuple[KernelTime, ...]:
    """One time for each bucket of m.

    Args:
        dispatch: the kernels of a problem.
        target: the device.
        level: of the tuner; its times are those of this GPU, of fake targets and of CPUs there are none.
    """
    measures = level in POINTS and target.device == "cuda" and target.ops is None
    known = timings(target.name, level) if measures else None
    limits = roof(target)
    return tuple(_time(dispatch, m, target, known, limits) for m in BUCKETS)


def _time(dispatch: Dispatch | MoeDispatch, m: int, target: Target, known: Timings | None, limits: Roof) -> KernelTime:
    problem, name = dispatch.problem, name_for(dispatch.table, m)
    took = known.get(problem, name, m) if known is not None else None
    measured = took is not None and took < FAILED
    if not measured:
        kernel = (moe_kernels() if isinstance(problem, MoeProblem) else kernels())[name]
        took = own_estimate(kernel, problem, m, target)
    least = _experts_floor(dispatch, m, limits) if isinstance(dispatch, MoeDispatch) else _floor(dispatch, m, limits)
    return KernelTime(m, name, took if took is not None and took < FAILED else None, measured, least)


def _floor(dispatch: Dispatch, m: int, limits: Roof) -> float:
    """Microseconds to read weight and input and to write the result, or to multiply, whichever is more."""
    p = dispatch.problem
    weight = sum(plane.nbytes for plane in layouts()[dispatch.layout].planes(p))
    moved = weight + m * p.k * _input_bytes(p.scheme, p) + m * p.n * p.dtype.itemsize
    return max(moved / limits.bandwidth, 2 * m * p.n * p.k / _rate(p.scheme, limits))


def _experts_floor(dispatch: MoeDispatch, m: int, limits: Roof) -> float:
    """The same of a block, of whose experts those are read that m tokens are expected to choose."""
    p = dispatch.problem
    share = 1 - (1 - p.top_k / p.experts) ** m
    weight = share * sum(plane.nbytes for planes in planes_of(dispatch.layout, p) for plane in planes)
    moved = weight + m * p.hidden * (_input_bytes(p.scheme, p) + p.dtype.itemsize)
    products = 2 * m * p.top_k * p.hidden * (p.up_rows + p.intermediate)
    return max(moved / limits.bandwidth, products / _rate(p.scheme, limits))


def _input_bytes(scheme: Scheme, problem: Problem | MoeProblem) -> float:
    inputs = scheme.input_activations
    return problem.dtype.itemsize if inputs is None else inputs.num_bits / 8


def _rate(scheme: Scheme, limits: Roof) -> float:
    return limits.math16 if scheme.input_activations is None else limits.math8
