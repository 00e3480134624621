"""What a group of weights takes under each scheme at the user's m: measured on this GPU, else by the kernels' own estimates.

Linears of one input are one merged product, as graphs have them. Counted are linears and expert blocks, the quantization of
inputs where it is measured, and nothing else of the model: attention, norms and the head take the same whatever is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quant_compile.ir.errors import NoKernelError, OptionError
from quant_compile.ir.family import Reject
from quant_compile.ir.moe import Activation, MoeProblem
from quant_compile.ir.scheme import Scheme
from quant_compile.lowering.guard import Chain, Plain, Product, Quantize, TimeOf
from quant_compile.lowering.moe import choose_moe
from quant_compile.lowering.registry import Problem
from quant_compile.lowering.roofs import roof
from quant_compile.lowering.select import Request, choose
from quant_compile.lowering.target import Target
from quant_compile.lowering.tune import measured
from quant_compile.lowering.tune_guard import guard_times
from quant_compile.lowering.tune_moe import measured_moe
from quant_compile.measure.groups import Group
from quant_compile.model.weights import Weight

# Shares of a device's roofs that plain products in 16 bits reach.
_OF_BANDWIDTH, _OF_MATH = 0.85, 0.7


@dataclass(frozen=True)
class Latency:
    """Times of groups on a target.

    Attributes:
        profile: m -> how often it is run.
        target: the device.
        request: what kernels may serve, and how they are measured.
        top_k: experts of a token.
        times: measured times of single jobs; None: estimates.
    """

    profile: Mapping[int, float]
    target: Target
    request: Request
    top_k: int
    device: torch.device
    times: TimeOf | None

    @staticmethod
    def of(model: nn.Module, profile: Mapping[int, float], target: str | None, tune: str) -> Latency:
        """Of a model on its own device, or on another by name, where nothing can be measured.

        Raises:
            OptionError: the profile is no mapping of m to counts, or there is no such target.
        """
        _check(profile)
        parameter = next(model.parameters())
        device = parameter.device
        real = Target.of(device) if target is None else Target.fake(target)
        measures = target is None and device.type == "cuda" and tune != "off"
        times = guard_times(real, tune, device) if measures else None
        config: Any = getattr(model, "config", None)
        top_k = getattr(config, "num_experts_per_tok", None)
        request = Request(tune=tune if measures else "off", allow_reference=False)
        known = None if isinstance(times, Reject) else times
        return Latency(dict(profile), real, request, top_k if isinstance(top_k, int) else 2, device, known)

    @property
    def how(self) -> str:
        """In words."""
        way = "measured" if self.times is not None else "estimated"
        counts = ", ".join(f"{count:g} x m={m}" for m, count in self.profile.items())
        return f"{way} on {self.target.label}, {counts}"

    def ms(self, group: Group, scheme: Scheme | None) -> float | str:
        """Milliseconds of a group over the whole profile, or why nothing can run it."""
        try:
            one = self._experts(group, scheme) if group.experts else self._linears(group, scheme)
        except NoKernelError as error:
            return str(error).splitlines()[0]
        return sum(count * microseconds for microseconds, count in zip(one, self.profile.values(), strict=True)) / 1000

    def _linears(self, group: Group, scheme: Scheme | None) -> list[float]:
        """Microseconds at each m; siblings are merged, weights that are only decided together are not."""
        total = [0.0] * len(self.profile)
        for siblings in _siblings(group.weights):
            own = self._plain(siblings) if scheme is None else self._quantized(siblings, scheme)
            total = [one + more for one, more in zip(total, own, strict=True)]
        return total

    def _plain(self, siblings: Sequence[Weight]) -> list[float]:
        jobs = [Plain(w.site.n, w.site.k, w.parameter.dtype, w.has_bias) for w in siblings]
        return [sum(self._plain_time(job, m) for job in jobs) for m in self.profile]

    def _plain_time(self, job: Plain, m: int) -> float:
        took = self.times(job, m) if self.times is not None else None
        if took is not None and not isinstance(took, Reject):
            return took
        return _by_roof(self.target, m, job.n, job.k, job.dtype.itemsize)

    def _quantized(self, siblings: Sequence[Weight], scheme: Scheme) -> list[float]:
        first = siblings[0]
        n, dtype = sum(weight.site.n for weight in siblings), first.parameter.dtype
        problem = Problem(scheme, n, first.site.k, dtype, any(w.has_bias for w in siblings), len(siblings))
        cost = measured(self.target, self.request.tune)
        dispatch = choose(problem, self.target, self.request, first.site.names[0], cost)
        chain = Chain((), (problem,), None)
        if scheme.input_activations is not None:
            chain = Chain((), (problem,), Quantize(scheme, first.site.k, dtype, fused=True))
        out: list[float] = []
        for m in self.profile:
            kernel = dispatch.kernel_for(m)
            took = self.times(Product(kernel.name, problem), m) if self.times is not None else None
            if took is None or isinstance(took, Reject):
                answer = kernel.fit(problem, m, self.target)
                took = float("inf") if isinstance(answer, Reject) else answer.cost
            out.append(took + self._quantization(chain, m))
        return out

    def _quantization(self, chain: Chain, m: int) -> float:
        if self.times is None or chain.quantize is None:
            return 0.0
        took = self.times(chain.quantize, m)
        return 0.0 if isinstance(took, Reject) else took

    def _experts(self, group: Group, scheme: Scheme | None) -> list[float]:
        up, down = _up_and_down(group)
        experts, dtype = up.parameter.shape[0], up.parameter.dtype
        hidden, inner = up.site.k, down.site.k
        if scheme is None:
            return [self._plain_experts(m, group, experts) for m in self.profile]
        gated = up.site.n == 2 * inner
        activation = Activation("silu") if gated else Activation("relu2", gated=False)
        top_k = min(self.top_k, experts)
        problem = MoeProblem(scheme, experts, hidden, inner, top_k, activation, dtype, up.has_bias)
        cost = measured_moe(self.target, self.request.tune)
        dispatch = choose_moe(problem, self.target, self.request, group.name, cost)
        out: list[float] = []
        for m in self.profile:
            kernel = dispatch.kernel_for(m)
            answer = kernel.fit(problem, m, self.target)
            estimated = float("inf") if isinstance(answer, Reject) else answer.cost
            out.append(estimated if cost is None else cost(kernel, problem, m))
        return out

    def _plain_experts(self, m: int, group: Group, experts: int) -> float:
        """A grouped product for each weight; experts that a token of the m chooses are read."""
        pairs = m * min(self.top_k, experts)
        read = min(1.0, pairs / experts)
        total = 0.0
        for weight in group.weights:
            n, k, size = weight.site.n, weight.site.k, weight.parameter.dtype.itemsize
            limits = roof(self.target)
            memory = size * (read * experts * n * k + pairs * (n + k)) / (limits.bandwidth * _OF_BANDWIDTH)
            total += limits.launch + max(memory, 2.0 * pairs * n * k / (limits.math16 * _OF_MATH))
        return total


def _check(profile: Any) -> None:
    good = isinstance(profile, Mapping) and profile
    if not good or not all(isinstance(m, int) and m > 0 and count > 0 for m, count in profile.items()):
        raise OptionError(
            f"m must say how often each number of rows is run, got {profile!r}. Fix: m={{1: 128, 512: 1}} for 128 "
            "decode steps and one prompt of 512 tokens."
        )


def _siblings(weights: Sequence[Weight]) -> list[list[Weight]]:
    """Those that graphs merge: of one k, unless they are experts of their own."""
    if any(".experts." in weight.site.names[0] for weight in weights):
        return [[weight] for weight in weights]
    by: dict[int, list[Weight]] = {}
    for weight in weights:
        by.setdefault(weight.site.k, []).append(weight)
    return list(by.values())


def _up_and_down(group: Group) -> tuple[Weight, Weight]:
    """The two weights of a block, in the order in which the model uses them."""
    if len(group.weights) != 2:
        raise NoKernelError(group.name, {}, "`keep` this block, or leave the budget in ms out.")
    first, second = group.weights
    return (first, second) if first.site.k == second.site.n else (second, first)


def _by_roof(target: Target, m: int, n: int, k: int, size: int) -> float:
    """Microseconds of a product in 16 bits."""
    limits = roof(target)
    memory = size * (n * k + m * (n + k)) / (limits.bandwidth * _OF_BANDWIDTH)
    return limits.launch + max(memory, 2.0 * m * n * k / (limits.math16 * _OF_MATH))
