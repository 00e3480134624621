"""Planes by example batches: the methods that round weights by what their inputs were, and the file that keeps what they made.

Reads a model that is not changed; weights are taken one after the other, an expert at a time, and moments of as many as
``MOMENTS_BYTES`` hold in one pass over the batches. Writes one safetensors file, whose metadata say of each weight what made its planes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from quant_compile.ir.errors import MissingScalesError
from quant_compile.ir.family import Planes
from quant_compile.ir.numerics import checksum
from quant_compile.ir.scheme import Scheme
from quant_compile.lowering.rounding.factors import (
    Inputs,
    Member,
    awq_factors,
    fitted,
    multiplied,
    smoothquant_factors,
)
from quant_compile.lowering.rounding.gptq import corrected, gptq
from quant_compile.lowering.rounding.recipe import (
    AWQ,
    FACTOR,
    GPTAQ,
    GPTQ,
    METHODS,
    PLANES_OF,
    SMOOTHQUANT,
    TOKEN,
    Factor,
    Rounding,
    factor_key,
    plane_key,
    searchable,
    uses,
)
from quant_compile.lowering.rounding.search import searched
from quant_compile.model.follow import eagerly, run_batch, weights_by_address
from quant_compile.model.inputs import KEPT, Readers, Samples
from quant_compile.model.moments import Enough, Moments, Pairs, Rows, Seeing, Size
from quant_compile.model.weights import Weight, linear_weights, possible_weights
from quant_compile.policy import Policy
from quant_compile.simulate import Chosen, Simulation, Values

MOMENTS_BYTES = 1 << 30
# Passes over the batches at most by which weights see what those before them became; more where ``MOMENTS_BYTES`` hold fewer weights.
STAGES = 8
# Rows that the unquantized model's weights meet, all batches together: kept where they take no more, else met anew in each stage.
ROWS_BYTES = 1 << 30
# Moments of fewer tokens than inputs have too low a rank for GPTQ, which then does harm: scales are searched for.
FEWER = "fewer tokens than inputs"
# Why a weight's inputs have no factors.
NO_GAIN = "no factors: none lowers the error"
INSIDE = "no factors: its inputs are made inside of the experts' kernels"
NOT_QUANTIZED = "no factors: its inputs are not quantized"
SEEN = {AWQ: awq_factors, SMOOTHQUANT: smoothquant_factors}

__all__ = ["METHODS", "Rounded", "round_weights", "write_planes"]


@dataclass(frozen=True)
class Rounded:
    """Planes of one weight.

    Attributes:
        planes: row form, [E, ...] for experts, on the CPU.
        scheme: their scheme.
        method: what made them, for ledgers.
        checksums: of the matrices that they were made of.
        factor: [k] in the weight's dtype, what its input is multiplied by; None: it is not.
    """

    planes: Planes
    scheme: Scheme
    method: str
    checksums: tuple[int, ...]
    factor: Tensor | None = None


@dataclass(frozen=True)
class _Job:
    """One weight to round.

    Attributes:
        leader: the first weight that reads what this one reads; they have their factors together.
        without: why its inputs cannot have factors; empty: they can.
        factor: of its inputs.
        once: no batch meets it twice.
    """

    name: str
    weight: Weight
    scheme: Scheme
    size: Size
    required: bool
    leader: str = ""
    without: str = ""
    factor: Tensor | None = None
    once: bool = False

    def nbytes(self, whole: bool) -> int:
        """Of what is kept of its inputs; ``whole``: moments beside the diagonal too."""
        sampled = KEPT * self.size.k * self.weight.parameter.element_size() if self.leader == self.name else 0
        return self.size.nbytes(whole) + sampled

    def matrix(self, expert: int | None) -> Tensor:
        """[n, k] as linears multiply by it."""
        values = self.weight.parameter.detach()
        values = values if expert is None else values[expert]
        return values.t().contiguous() if self.weight.transposed else values

    def scaled(self, expert: int | None) -> Tensor:
        """[n, k] that is rounded: over the factors of the weight's inputs."""
        return multiplied(self.matrix(expert), self.factor)

    def label(self, text: str, method: str | None) -> str:
        """What a ledger says of planes that ``text`` made, under the policy's ``method``."""
        if self.factor is not None:
            return f"{_before(method)}, {text}"
        return f"{text} ({self.without})" if self.without else text


def round_weights(
    model: nn.Module,
    batches: Sequence[Any],
    policy: Policy,
    track: Callable[[Iterable[Any], str], Iterable[Any]],
) -> dict[str, Rounded]:
    """Planes of every weight that the policy gives a scheme whose codes can be chosen, by the policy's method.

    Args:
        track: ``(items, text) -> items``, which shows progress.

    Raises:
        MissingScalesError: a weight met no input, or NaN or inf.
    """
    jobs, out = _jobs(model, policy), dict[str, Rounded]()
    paired, before = uses(policy.method, GPTAQ), _before(policy.method)
    whole = paired or uses(policy.method, GPTQ)
    plain: list[Rows] | None = None
    if before or paired:
        jobs, plain = _with_readers(model, batches if paired else batches[:1], jobs, before, paired and not before)
    groups = list(_stages(jobs) if paired else _groups(jobs, lambda job: job.nbytes(whole)))
    simulated, values, hooked = list[Chosen](), Values(), _has_hooks(model)
    for number, group in enumerate(groups, 1):
        part = f" ({number} of {len(groups)})" if len(groups) > 1 else ""
        addresses, sizes = _addresses(group), {job.name: job.size for job in group}
        moments = Pairs(addresses, sizes) if simulated else Moments(addresses, sizes, whole)
        wanted = {job.name: job.size for job in group if before and job.leader == job.name and not job.without}
        samples = Samples(addresses, wanted, len(batches))
        ends = {job.name for job in group} if paired and not hooked and all(job.once for job in group) else None
        with eagerly(), torch.inference_mode():
            for index, batch in enumerate(track(batches, f"reading inputs{part}")):
                rows = Rows(addresses, sizes) if simulated else moments
                if isinstance(rows, Rows) and plain is not None:
                    rows = plain[index]
                else:
                    with rows, samples if wanted else nullcontext():
                        _run(model, batch, rows, ends)
                if isinstance(moments, Pairs) and isinstance(rows, Rows):
                    moments.plain = {key: list(met) for key, met in rows.rows.items() if key[0] in sizes}
                    with Simulation(simulated, values), moments:
                        _run(model, batch, moments, ends)
        with torch.inference_mode():  # as the sums were made
            if wanted:
                group = _with_factors(
                    group, samples, before, lambda items, part=part: track(items, f"fitting factors{part}")
                )
            for job in track(group, f"rounding{part}"):
                made = _round(job, moments, policy.method)
                if made is not None:
                    out[job.name] = made
                    # Static scales of inputs are calibrated after the weights.
                    simulated += [_simulated(job, made)] if paired and not job.scheme.static else []
    return out


def _has_hooks(model: nn.Module) -> bool:
    """Whether code of somebody runs behind a module's forward, which expects to."""
    return any(module._forward_hooks or hasattr(module, "_hf_hook") for module in model.modules())


def _run(model: nn.Module, batch: Any, seeing: Seeing, ends: set[str] | None) -> None:
    """A batch, no further than behind the last of some weights, each of which is met once; None: to its end."""
    seeing.left = None if ends is None else set(ends)
    with suppress(Enough):
        run_batch(model, batch)


def _simulated(job: _Job, made: Rounded) -> Chosen:
    """A weight as it was rounded."""

    def planes(scheme: Scheme, expert: int | None) -> Planes:
        return made.planes if expert is None else tuple(plane[expert] for plane in made.planes)

    factor = None if made.factor is None else Factor(job.name, lambda kept=made.factor: kept)
    return Chosen(job.weight, job.scheme, rounding=Rounding(made.method, job.name, planes, made.checksums, factor))


def _before(method: str | None) -> str:
    """The step of a method that finds factors; empty: none."""
    return next((name for name in SEEN if uses(method, name)), "")


def _addresses(jobs: Iterable[_Job]) -> dict[int, str]:
    return weights_by_address({job.name: job.weight.parameter for job in jobs})


def _with_readers(
    model: nn.Module, batches: Sequence[Any], jobs: Sequence[_Job], before: str, keeps: bool
) -> tuple[list[_Job], list[Rows] | None]:
    """Jobs with their leaders, those of one leader beside each other, in the order in which batches meet them.

    Beside them, if it ``keeps`` any, the rows of each batch; None where they take too much.
    """
    plain: list[Rows] | None = [] if keeps else None
    addresses, sizes = _addresses(jobs), {job.name: job.size for job in jobs}
    readers = Readers(addresses, {job.name for job in jobs if job.size.experts})
    most: Counter[str] = Counter()
    with eagerly(), torch.inference_mode():
        for batch in batches:
            readers.met.clear()
            rows = None if plain is None else Rows(addresses, sizes, ROWS_BYTES - sum(each.taken for each in plain))
            with readers, rows or nullcontext():
                run_batch(model, batch)
            most |= readers.met
            if plain is not None and rows is not None:
                plain = None if rows.full else [*plain, rows]
    order = {name: place for place, name in enumerate(most)}
    together: dict[str, list[_Job]] = {}
    for job in sorted(jobs, key=lambda job: order.get(job.name, len(order))):
        together.setdefault(readers.leader.get(job.name, job.name), []).append(job)
    out: list[_Job] = []
    for leader, group in together.items():
        quantized = any(job.scheme.input_activations is not None for job in group)
        for job in group:
            without = INSIDE if before and readers.inside(job.name) else ""
            without = without or (NOT_QUANTIZED if before == SMOOTHQUANT and not quantized else "")
            once = most[job.name] == 1 and not job.size.experts
            out.append(replace(job, leader=leader, without=without, once=once))
    return out, plain


def _with_factors(
    jobs: Sequence[_Job], samples: Samples, before: str, track: Callable[[Iterable[Any]], Iterable[Any]]
) -> list[_Job]:
    """Jobs with the factors of their inputs, or the reason why there are none."""
    together: dict[str, list[_Job]] = {}
    for job in jobs:
        together.setdefault(job.leader, []).append(job)
    out: list[_Job] = []
    for leader, group in track(list(together.items())):
        tokens = samples.tokens.get(leader, 0)
        if group[0].without or not tokens or not bool(torch.isfinite(samples.squares[leader]).all()):
            out += group  # what is wrong with the inputs is said where the weight is rounded
        elif tokens < group[0].size.k:
            out += [replace(job, without=f"no factors: {FEWER}") for job in group]
        else:
            factor = _factor(leader, group, samples, before)
            out += [replace(job, factor=factor, without="" if factor is not None else NO_GAIN) for job in group]
    return out


def _factor(leader: str, group: Sequence[_Job], samples: Samples, before: str) -> Tensor | None:
    inputs = Inputs(samples.squares[leader] / samples.tokens[leader], samples.largest[leader])
    members: list[Member] = []
    for job in group:
        for expert in range(job.size.experts) if job.size.experts else (None,):
            rows = samples.sample(leader, expert or 0)
            if rows is not None:
                members.append(Member(job.matrix(expert), job.scheme, rows))
    return fitted(members, inputs, SEEN[before], group[0].weight.parameter.dtype)


def _jobs(model: nn.Module, policy: Policy) -> list[_Job]:
    jobs: list[_Job] = []
    for required, weights in ((True, linear_weights(model)), (False, possible_weights(model))):
        for weight in weights:
            site, parameter = weight.site, weight.parameter
            scheme = policy.decide(site).scheme
            if scheme is None or parameter.is_meta or not searchable(scheme):
                continue
            experts = parameter.shape[0] if parameter.dim() == 3 else 0
            jobs.append(_Job(site.names[0], weight, scheme, Size(experts, site.k, tuple(parameter.shape)), required))
    return jobs


def _stages(jobs: Sequence[_Job]) -> Iterable[list[_Job]]:
    """Weights that are rounded by the same inputs, of a model whose weights before them are quantized; in order."""
    leaders = len({job.leader for job in jobs})
    size = -(-leaders // STAGES)
    groups = [list(group) for _, group in groupby(jobs, lambda job: job.leader)]
    for start in range(0, len(groups), size):
        several = [job for group in groups[start : start + size] for job in group]
        yield from _groups(several, lambda job: 2 * job.nbytes(True))


def _groups(jobs: Iterable[_Job], nbytes: Callable[[_Job], int]) -> Iterable[list[_Job]]:
    """As many weights as the bytes hold, at least one; those that read the same input are not parted."""
    group: list[_Job] = []
    held = 0
    for _, several in groupby(jobs, lambda job: job.leader or job.name):
        more = list(several)
        size = sum(map(nbytes, more))
        if group and held + size > MOMENTS_BYTES:
            yield group
            group, held = [], 0
        group += more
        held += size
    if group:
        yield group


def _round(job: _Job, moments: Moments, method: str | None) -> Rounded | None:
    sums = moments.sums.pop(job.name, None)
    if sums is None:
        if job.required and not job.size.experts:
            raise MissingScalesError(
                f"no batch reached {job.name}. Fix: batches that run every layer, or `keep` it in the policy."
            )
        return None
    if not bool(torch.isfinite(sums).all()):
        if isinstance(moments, Pairs):
            raise MissingScalesError(
                f"the inputs of {job.name} were NaN or inf once the weights before it were quantized; nothing was written.\n"
                "Fix: `method: gptq`, or `keep` in the policy what loses too much."
            )
        raise MissingScalesError(
            f"the inputs of {job.name} were NaN or inf somewhere in these batches; nothing was written.\n"
            "Fix: other batches, or `keep` it in the policy."
        )
    tokens = moments.tokens[job.name]
    _multiply_moments(sums, job.factor, moments.whole)
    factor = None if job.factor is None else job.factor.cpu()
    cross = moments.cross.pop(job.name, None) if isinstance(moments, Pairs) else None
    apart = moments.apart.pop(job.name, None) if isinstance(moments, Pairs) else None
    pairs = None if cross is None or apart is None else _Paired(cross, apart)
    if pairs is not None:
        _multiply_moments(pairs.cross, job.factor, True)
        _multiply_moments(pairs.apart, job.factor, False)
    if not job.size.experts:
        planes, text = _matrix(
            job, None, sums[0], int(tokens[0]), moments.whole, None, None if pairs is None else pairs.of(0)
        )
        values = (checksum(job.matrix(None)),)
        return Rounded(tuple(plane.cpu() for plane in planes), job.scheme, job.label(text, method), values, factor)
    # What the others met stands for an expert that met too little.
    squares = sums.diagonal(dim1=1, dim2=2).sum(0) if moments.whole else sums.sum(0)
    shared = squares / max(1, int(tokens.sum()))
    parts: list[Planes] = []
    methods: dict[str, int] = {}
    for expert, count in enumerate(tokens.tolist()):
        paired = None if pairs is None else pairs.of(expert)
        planes, text = _matrix(job, expert, sums[expert], count, moments.whole, shared, paired)
        parts.append(tuple(plane.cpu() for plane in planes))
        methods[text] = methods.get(text, 0) + 1
    stacked = tuple(torch.stack([_bytes(p) for p in plane]).view(plane[0].dtype) for plane in zip(*parts, strict=True))
    told = next(iter(methods)) if len(methods) == 1 else ", ".join(f"{text} of {n}" for text, n in methods.items())
    values = tuple(checksum(job.matrix(expert)) for expert in range(len(tokens)))
    return Rounded(stacked, job.scheme, job.label(told, method), values, factor)


def _multiply_moments(sums: Tensor, factor: Tensor | None, whole: bool) -> None:
    """Those of x times factors, in the place of x's: [..., k, k], or [..., k] of squares alone."""
    if factor is not None:
        by = factor.float()
        sums.mul_(by[:, None] * by if whole else by.square())


def _bytes(plane: Tensor) -> Tensor:
    """8-bit floats as bytes, which every torch stacks."""
    return plane.view(torch.uint8) if plane.dtype.is_floating_point and plane.element_size() == 1 else plane


@dataclass(frozen=True)
class _Paired:
    """Sums over pairs of rows, as ``Pairs`` has them."""

    cross: Tensor
    apart: Tensor

    def of(self, expert: int) -> _Paired:
        """Those of one matrix."""
        return _Paired(self.cross[expert], self.apart[expert])


def _matrix(
    job: _Job, expert: int | None, sums: Tensor, tokens: int, whole: bool, shared: Tensor | None, pairs: _Paired | None
) -> tuple[Planes, str]:
    """Planes of one matrix, and what made them; the memory of ``sums`` and ``pairs`` is used."""
    few, w = tokens < job.size.k, job.scaled(expert)
    sums.div_(max(1, tokens))
    squares = sums.diagonal().clone() if whole else sums
    if whole and not few:
        better = None
        if pairs is not None:
            better = corrected(w, sums, pairs.cross.div_(tokens), pairs.apart.div_(tokens), tokens)
        planes = gptq(w if better is None else better, job.scheme, sums)
        if planes is not None:
            return planes, GPTQ if better is None else GPTAQ
    text = f"search by inputs ({FEWER})" if few and whole else "search by inputs"
    return searched(w, job.scheme, shared if few and shared is not None else squares), text


def write_planes(path: Path, made: Mapping[str, Rounded], policy: Policy) -> None:
    """One file; it is replaced as a whole."""
    tensors: dict[str, Tensor] = {}
    digest = hashlib.sha256()
    told: dict[str, dict[str, Any]] = {}
    for name, weight in sorted(made.items()):
        told[name] = {
            "weights": weight.scheme.weights.spec,
            "method": weight.method,
            "checksums": weight.checksums,
        }
        if weight.factor is not None:
            called = hashlib.sha256(_numbers(weight.factor) + str(weight.factor.dtype).encode()).hexdigest()
            told[name][FACTOR], tensors[factor_key(called)] = called, weight.factor
            digest.update(called.encode())
        for i, plane in enumerate(weight.planes):
            tensors[plane_key(name, i)] = plane.contiguous()
            digest.update(_numbers(_bytes(plane)))
    metadata = {"format": "pt", PLANES_OF: json.dumps(told), TOKEN: digest.hexdigest(), "method": policy.method or ""}
    partial = path.with_name(f"{path.name}.part")
    save_file(tensors, str(partial), metadata=metadata)
    partial.replace(path)


def _numbers(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()
