"""Which policy for which purpose: a model, a GPU and a goal in, a policy with its reasons, kernels and costs out; no weights are needed.

The goals are the scenarios of the usual guides. Each prefers some schemes; the kernels that the target has decide among them: a scheme
that none serves is not recommended, nor one whose kernels are estimated to take clearly longer than another's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quant_compile.inspect.kernels import KernelChoice, kernel_choices
from quant_compile.inspect.models import construct, load_config
from quant_compile.ir.errors import NoKernelError, OptionError, SchemeError
from quant_compile.ir.moe import MoeProblem
from quant_compile.ir.scheme import Scheme, parse
from quant_compile.lowering.moe import choose_moe, moe_fits, moe_kernels
from quant_compile.lowering.registry import Problem, kernels
from quant_compile.lowering.select import Request, choose, fits
from quant_compile.lowering.target import RUN_ON, Target
from quant_compile.measure.comparison import size_text
from quant_compile.measure.devices import Device, device_of
from quant_compile.measure.goals import Goal, goal_of
from quant_compile.measure.recommendation import Recommendation, Served
from quant_compile.measure.roofline import BATCH, Cache, Cost, cost, loads, plain_loads, top_k_of
from quant_compile.model.places import parameters_of, unwrap
from quant_compile.model.plan import Plan, PlanEntry, label_of
from quant_compile.policy import KEEP, Policy
from quant_compile.rules import CacheRules, Rule

FEWEST = 0.5
"""Share of the linears' bytes that must have kernels in a scheme for it to be a policy's default."""
CPU_SLACK = 1.5
"""The least slack on a CPU, whose kernels' estimates are rough."""
FP8_ARCH = 89  # from here on 8-bit floats are converted by instructions


def recommend(model: Any, gpu: str | Target | Device | None = None, goal: str = "memory") -> Recommendation:
    """A policy for a model, a device and a goal, by the kernels that would serve.

    Args:
        model: a model (the meta device will do), a config of transformers, or the path or id of one.
        gpu: a product (``h100``, ``rtx4090``), a target (``sm90``), ``cpu``, a Target; None: this machine's.
        goal: ``memory``, ``throughput``, ``long-context``, ``latency`` or ``sensitive``.

    Raises:
        OptionError: the goal or the GPU is not known, or the model has no linear weights.
        ModelError: the configuration cannot be read.
    """
    wanted = goal_of(goal)
    device, target = device_of(gpu)
    built = _built(model)
    entries = Plan.of(Policy(None), built).entries
    if not entries:
        raise OptionError(f"{type(built).__name__} has no linear weights, so that there is nothing to quantize")
    return _Search(wanted, device, target, built).recommendation()


def _built(model: Any) -> nn.Module:
    """The model itself, or one of its config on the meta device."""
    if isinstance(model, nn.Module):
        return unwrap(model)
    config = load_config(str(model)) if isinstance(model, str | Path) else model
    if not hasattr(config, "architectures"):
        raise OptionError(
            f"the model is an nn.Module, a config of transformers, or the folder or id of one; got {type(model).__name__}"
        )
    dtype = getattr(config, "dtype", None)
    return construct(config, None, dtype if isinstance(dtype, torch.dtype) else torch.bfloat16).eval()


@dataclass(frozen=True)
class _Candidate:
    """A scheme as a policy's default, with other schemes where it has no kernels.

    Attributes:
        share: of the linears' bytes that the scheme itself serves.
        times: estimated microseconds of all products, at each of the goal's numbers of tokens.
        patches: what was said of weights that have another scheme.
    """

    name: str
    policy: Policy
    plan: Plan
    choices: tuple[KernelChoice, ...]
    share: float
    times: tuple[float, ...]
    patches: tuple[str, ...] = ()
    refusal: str = ""


class _Search:
    """One question: candidates, the choice, and its reasons."""

    def __init__(self, goal: Goal, device: Device, target: Target, model: nn.Module) -> None:
        self.goal, self.device, self.target, self.model = goal, device, target, model
        self.top_k = top_k_of(getattr(model, "config", None))
        self.cache = Cache.of(model)
        self.preferred = goal.schemes if device.arch else goal.on_cpu
        self.order = (*self.preferred, *(goal.lesser if device.arch else ()))
        self.candidates = {name: self._candidate(name) for name in self.order}

    def _candidate(self, name: str) -> _Candidate:
        """The scheme's policy, mended until every weight that it names has kernels here."""
        policy = Policy(parse(name), name=name)
        plan, choices = self._plan(policy)
        share = _share(plan, choices)
        refusal = next((_reason(choice) for choice in choices if not _runs(choice)), "")
        rules, texts = (
            dict[str, Rule](),
            dict[str, str](),
        )  # by what a rule matches: the second takes the place of the first
        for last in (False, True):
            bad: list[tuple[Sequence[PlanEntry], Scheme | None]] = [
                (choice.entries, None if last else self._other(choice.problem, name))
                for choice in choices
                if not _runs(choice)
            ]
            bad += [((entry,), None) for entry in plan.entries if entry.decision.refused]
            for entries, other in bad:
                rule, text = _patch(entries, other, name, self.target)
                rules, texts[rule.match] = {rule.match: rule} | rules | {rule.match: rule}, text
            if bad:
                policy = replace(policy, rules=tuple(rules.values()))
                policy = replace(policy, rules=_with_effect(Plan.of(policy, self.model), policy))
                plan, choices = self._plan(policy)
        patches = tuple(texts[rule.match] for rule in policy.rules)
        times = tuple(self._time(plan, choices, m) for m in self.goal.rows)
        return _Candidate(name, policy, plan, tuple(choices), share, times, patches, refusal)

    def _plan(self, policy: Policy) -> tuple[Plan, list[KernelChoice]]:
        plan = Plan.of(policy, self.model)
        return plan, kernel_choices(plan, self.target)

    def _other(self, problem: Problem | MoeProblem, name: str) -> Scheme | None:
        """The goal's next scheme that has kernels for a problem."""
        for other in self.order:
            scheme = parse(other)
            if other != name and _served(replace(problem, scheme=scheme), self.target):
                return scheme
        return None

    def _time(self, plan: Plan, choices: Sequence[KernelChoice], m: int) -> float:
        """Estimated microseconds of all products of ``m`` tokens; those in 16 bits by the roofline."""
        kept = sum(max(load.seconds(m, self.device)) for load in plain_loads(plan, self.top_k or 2) if load.weights)
        quantized = {id(entry) for choice in choices for entry in choice.entries}
        whole = sum(entry.bytes_before for entry in plan.entries)
        named = sum(entry.bytes_before for entry in plan.entries if id(entry) in quantized)
        total = 1e6 * kept * (1 - named / max(1, whole))
        for choice in choices:
            if choice.dispatch is not None:
                moe = isinstance(choice.problem, MoeProblem)
                total += _estimate(choice, m, self.target) * len(choice.entries) / (2 if moe else 1)
        return total

    def chosen(self) -> tuple[_Candidate | None, dict[str, str]]:
        """The first that serves and is not clearly slower than another; why not those before it."""
        slack = self.goal.slack if self.device.arch else max(self.goal.slack, CPU_SLACK)
        served = [found for found in self.candidates.values() if found.share >= FEWEST]
        able = [found for found in served if found.name in self.preferred] or served
        fastest = min((_mean(found.times) for found in able), default=math.inf)
        why: dict[str, str] = {}
        for found in self.candidates.values():
            if found.share < FEWEST:
                why[found.name] = f"{found.name} has no kernel here for most of the weights: {found.refusal}"
            elif _mean(found.times) > slack * fastest:
                best = min(able, key=lambda other: _mean(other.times)).name
                ratio = _mean(found.times) / fastest
                rows = ", ".join(map(str, self.goal.rows))
                why[found.name] = f"{found.name} is estimated to take {ratio:.2f} times as long as {best} (m = {rows})."
            else:
                return found, why
        return None, why

    def recommendation(self) -> Recommendation:
        """The answer."""
        found, why = self.chosen()
        if found is None:
            policy, plan, choices = Policy(None, name=KEEP), Plan.of(Policy(None), self.model), ()
        else:
            policy, plan, choices = self._policy(found), found.plan, found.choices
        codes = policy.kv_cache is not None
        held = sum(parameter.nbytes for parameter in parameters_of(self.model))
        top_k = self.top_k or 2
        costs = [cost("16 bits", held, plain_loads(plan, top_k), self.cache, False, self.device)]
        if found is not None:
            costs.append(self._cost(found, codes, policy.name))
            others = [other for other in self.candidates.values() if other.share >= FEWEST and other is not found]
            costs += [self._cost(other, codes, other.name) for other in others]
        served = tuple(
            Served(tuple(label_of(c.entries)), c.problem.scheme.spec, c.size, c.dispatch.ranges)
            for c in choices
            if c.dispatch
        )
        reasons = (*self._reasons(found, policy, why, costs), *self._warnings(plan, costs))
        count = sum(parameter.numel() for parameter in parameters_of(self.model))
        words = f"{type(self.model).__name__}, {_count(count)} parameters"
        return Recommendation(self.goal.name, words, self.device, self.target, policy, reasons, served, tuple(costs))

    def _policy(self, found: _Candidate) -> Policy:
        """The candidate's policy with the goal's switches."""
        gpu = bool(self.device.arch)
        kept = None
        if self.goal.kv_cache and self.cache.layers is not None:
            kept = Policy.load(
                {"default": KEEP, "kv_cache": "INT8" if gpu and self.device.arch < FP8_ARCH else "FP8"}
            ).kv_cache
        return replace(
            found.policy,
            kv_cache=kept,
            release_weights=True if self.goal.release else None,
            guard="never_slower" if self.goal.guard and gpu else None,
            name=f"{self.goal.name}-{found.name.lower()}",
        )

    def _cost(self, found: _Candidate, codes: bool, name: str) -> Cost:
        quantized = {id(entry) for choice in found.choices for entry in choice.entries}
        packed = sum(choice.bytes_packed for choice in found.choices)
        kept = sum(entry.bytes_before for entry in found.plan.entries if id(entry) not in quantized)
        tied = sum(e.bytes_before for e in found.plan.entries if id(e) in quantized and e.bytes_after > e.bytes_before)
        held = packed + kept + tied + found.plan.other_bytes
        return cost(name, held, loads(found.plan, found.choices, self.top_k or 2), self.cache, codes, self.device)

    def _reasons(
        self, found: _Candidate | None, policy: Policy, why: Mapping[str, str], costs: Sequence[Cost]
    ) -> list[str]:
        """Why this policy."""
        out = [self.goal.why if self.device.arch else self.goal.cpu_why or self.goal.why, *why.values()]
        if found is None:
            return [*out, "So the model stays in 16 bits here."]
        before, after = costs[0], costs[1]
        out.append(
            f"{found.name} holds {size_text(after.bytes)} instead of {size_text(before.bytes)}. At best a token takes "
            f"{after.ms_token:.3g} ms instead of {before.ms_token:.3g}, and a step of {BATCH} sequences "
            f"{after.ms_step:.3g} ms instead of {before.ms_step:.3g}."
        )
        inputs = parse(found.name).input_activations
        if inputs is not None and inputs.num_bits == 4:
            out.append("Inputs in 4 bits round far more than in 8: measure what that costs before you rely on it.")
        out += [*self._faster(found), *found.patches]
        out += self._of_cache(policy.kv_cache, before, after)
        if policy.guard:
            out.append(
                "guard: never_slower leaves a linear in 16 bits at the sizes at which it is measured to be faster there."
            )
        if policy.release_weights:
            out.append("release_weights frees the 16-bit originals; without it both are held.")
        fixed = [name for name in self.goal.fixed if self.device.arch and self._share_of(name) >= FEWEST]
        if fixed:
            now = (
                "Scales of inputs are computed at run time"
                if inputs
                else "Inputs stay in 16 bits, without scales to compute at run time"
            )
            out.append(
                f"{now}; in 8 bits, calibrate(model, batches, {fixed[0]!r}) fixes them, which needs example batches."
            )
        return out

    def _share_of(self, name: str) -> float:
        return _share(*self._plan(Policy(parse(name), name=name)))

    def _faster(self, found: _Candidate) -> list[str]:
        """What is faster and was not preferred, where speed is the goal."""
        able = [other for other in self.candidates.values() if other.share >= FEWEST]
        best = min(able, key=lambda other: _mean(other.times))
        ratio = _mean(best.times) / _mean(found.times)
        if not self.goal.speed or ratio > 0.95:
            return []
        rows = ", ".join(map(str, self.goal.rows))
        return [f"{best.name} is estimated to take {ratio:.2f} of its time (m = {rows}); compare both on your text."]

    def _of_cache(self, kept: CacheRules | None, before: Cost, after: Cost) -> list[str]:
        if not self.goal.kv_cache:
            return []
        if kept is None or before.kv_bytes is None or after.kv_bytes is None:
            return ["It keeps no K and V that transformers tells of, so that there is no cache to quantize."]
        default = kept.default.name if kept.default else KEEP
        text = f"K and V in {default} take {size_text(after.kv_bytes)} for 1000 tokens instead of {size_text(before.kv_bytes)}."
        if not self.device.arch:
            return [text, "On a CPU that saves memory only: values are computed of the codes where they are read."]
        return [text]

    def _warnings(self, plan: Plan, costs: Sequence[Cost]) -> list[str]:
        """What the user should know beside."""
        out: list[str] = []
        memory = self.device.memory * 1e9
        if memory and costs[0].bytes > memory:
            fits = len(costs) > 1 and costs[1].bytes < 0.9 * memory
            out.append(
                f"In 16 bits the model does not fit into {size_text(memory)}"
                + ("." if fits else ", and not in this policy either: more than one device is needed.")
            )
        kept = plan.other_bytes + sum(entry.bytes_before for entry in plan.entries if entry.decision.scheme is None)
        share = kept / max(1, costs[0].bytes)
        if len(costs) > 1 and share > 0.4:
            out.append(
                f"{share:.0%} of the bytes stay in 16 bits (embeddings, the output head, norms): a small model gains less."
            )
        if self.target.device == "cuda" and self.target.arch not in RUN_ON:
            ran = ", ".join(f"sm{arch}" for arch in RUN_ON)
            out.append(
                f"Kernels for {self.target.label} are compiled and emulated in the tests; they have been run on {ran} only."
            )
        if self.top_k is None and any(entry.kind == "moe" for entry in plan.entries):
            out.append("The config does not say how many experts a token has; two are assumed.")
        if len(costs) > 1:
            out.append("What it costs in quality, quant_compile.compare(model, policies, text) measures.")
        return out


def _with_effect(plan: Plan, policy: Policy) -> tuple[Rule, ...]:
    useless = {unused.index for unused in plan.unmatched_rules}
    return tuple(rule for index, rule in enumerate(policy.rules) if index not in useless)


def _runs(choice: KernelChoice) -> bool:
    """Whether kernels other than the torch reference run it, at every number of tokens."""
    if choice.dispatch is None:
        return False
    known: Mapping[str, Any] = moe_kernels() if isinstance(choice.problem, MoeProblem) else kernels()
    return not any(known[name].reference for _, name in choice.dispatch.table)


def _served(problem: Problem | MoeProblem, target: Target) -> bool:
    try:
        if isinstance(problem, MoeProblem):
            return not any(moe_kernels()[name].reference for _, name in choose_moe(problem, target).table)
        return not any(kernels()[name].reference for _, name in choose(problem, target).table)
    except (NoKernelError, SchemeError):
        return False


def _share(plan: Plan, choices: Sequence[KernelChoice]) -> float:
    """Of the bytes that the plan would quantize, those that have kernels."""
    wanted = [entry for entry in plan.entries if entry.decision.scheme is not None or entry.decision.refused]
    done = sum(entry.bytes_before for choice in choices if _runs(choice) for entry in choice.entries)
    return done / max(1, sum(entry.bytes_before for entry in wanted))


def _reason(choice: KernelChoice) -> str:
    """Why nothing runs it: what the kernel says that comes closest, the one for the oldest GPUs if it is the GPU."""
    texts = list(dict.fromkeys(text for text in choice.refusals.values() if text != "runs on CPU only"))
    archs = {int(found[1]): text for text in texts if (found := re.search(r"needs sm(\d+)", text))}
    if archs:
        return f"{archs[min(archs)]}."
    telling = [text for text in texts if re.search(r"multiple|at least|CPU", text)]
    return f"{(telling or texts or ['only the torch reference runs it'])[0]}."


def _estimate(choice: KernelChoice, m: int, target: Target) -> float:
    dispatch, problem = choice.dispatch, choice.problem
    assert dispatch is not None
    name = dispatch.kernel_for(m).name
    found = (
        moe_fits(problem, target, Request(), m)
        if isinstance(problem, MoeProblem)
        else fits(problem, target, Request(), m)
    )
    answer = found[name]
    return math.inf if isinstance(answer, str) else answer


def _mean(times: Sequence[float]) -> float:
    """Geometric."""
    return math.exp(sum(math.log(max(time, 1e-9)) for time in times) / len(times))


def _patch(entries: Sequence[PlanEntry], other: Scheme | None, name: str, target: Target) -> tuple[Rule, str]:
    """A rule for weights that the default does not serve, and what to say of it."""
    names = [entry.block or entry.names[0] for entry in entries]
    patterns = sorted({re.sub(r"\d+", r"\\d+", re.escape(text)) for text in names})
    first = entries[0]
    refused = (
        first.decision.reason
        if first.decision.refused
        else f"no kernel of {target.label} takes {name} at n={first.n}, k={first.k}"
    )
    rule = Rule(f"re:({'|'.join(patterns)})", other, reason=refused)
    labels = ", ".join(label_of(entries))
    return rule, f"{labels} {'get ' + other.spec if other else 'stay in 16 bits'}: {refused}."


def _count(number: int) -> str:
    return f"{number / 1e9:.3g} B" if number >= 1e9 else f"{number / 1e6:.3g} M"
