"""Planes by example batches: the methods that round weights by what their inputs were, and the file that keeps what they made.

Reads a model that is not changed; weights are taken one after the other, an expert at a time, and moments of as many as
``MOMENTS_BYTES`` hold in one pass over the batches. Writes one safetensors file, whose metadata say of each weight what made its planes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from quant_compile.ir.errors import MissingScalesError
from quant_compile.ir.family import Planes
from quant_compile.ir.numerics import checksum
from quant_compile.ir.scheme import Scheme
from quant_compile.lowering.rounding.gptq import gptq
from quant_compile.lowering.rounding.recipe import GPTQ, METHODS, PLANES_OF, TOKEN, plane_key, searchable
from quant_compile.lowering.rounding.search import searched
from quant_compile.model.follow import eagerly, run_batch, weights_by_address
from quant_compile.model.moments import Moments, Size
from quant_compile.model.weights import Weight, linear_weights, possible_weights
from quant_compile.policy import Policy

MOMENTS_BYTES = 1 << 30
# Moments of fewer tokens than inputs have too low a rank for GPTQ, which then does harm: scales are searched for.
FEWER = "fewer tokens than inputs"

__all__ = ["METHODS", "Rounded", "round_weights", "write_planes"]


@dataclass(frozen=True)
class Rounded:
    """Planes of one weight.

    Attributes:
        planes: row form, [E, ...] for experts, on the CPU.
        scheme: their scheme.
        method: what made them, for ledgers.
        checksums: of the matrices that they were made of.
    """

    planes: Planes
    scheme: Scheme
    method: str
    checksums: tuple[int, ...]


@dataclass(frozen=True)
class _Job:
    name: str
    weight: Weight
    scheme: Scheme
    size: Size
    required: bool

    def matrix(self, expert: int | None) -> Tensor:
        """[n, k] as linears multiply by it."""
        values = self.weight.parameter.detach()
        values = values if expert is None else values[expert]
        return values.t().contiguous() if self.weight.transposed else values


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
    whole = policy.method == GPTQ
    groups = list(_groups(jobs, whole))
    for number, group in enumerate(groups, 1):
        part = f" ({number} of {len(groups)})" if len(groups) > 1 else ""
        addresses = weights_by_address({job.name: job.weight.parameter for job in group})
        moments = Moments(addresses, {job.name: job.size for job in group}, whole)
        with eagerly(), torch.inference_mode():
            for batch in track(batches, f"reading inputs{part}"):
                with moments:
                    run_batch(model, batch)
        with torch.inference_mode():  # as the sums were made
            for job in track(group, f"rounding{part}"):
                made = _round(job, moments)
                if made is not None:
                    out[job.name] = made
    return out


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


def _groups(jobs: Iterable[_Job], whole: bool) -> Iterable[list[_Job]]:
    """As many weights as the bytes hold, at least one."""
    group: list[_Job] = []
    held = 0
    for job in jobs:
        size = job.size.nbytes(whole)
        if group and held + size > MOMENTS_BYTES:
            yield group
            group, held = [], 0
        group.append(job)
        held += size
    if group:
        yield group


def _round(job: _Job, moments: Moments) -> Rounded | None:
    sums = moments.sums.pop(job.name, None)
    if sums is None:
        if job.required and not job.size.experts:
            raise MissingScalesError(
                f"no batch reached {job.name}. Fix: batches that run every layer, or `keep` it in the policy."
            )
        return None
    if not bool(torch.isfinite(sums).all()):
        raise MissingScalesError(
            f"the inputs of {job.name} were NaN or inf somewhere in these batches; nothing was written.\n"
            "Fix: other batches, or `keep` it in the policy."
        )
    tokens = moments.tokens[job.name]
    if not job.size.experts:
        planes, method = _matrix(job, None, sums[0].div_(int(tokens[0])), int(tokens[0]), moments.whole, None)
        return Rounded(tuple(plane.cpu() for plane in planes), job.scheme, method, (checksum(job.matrix(None)),))
    # What the others met stands for an expert that met too little.
    squares = sums.diagonal(dim1=1, dim2=2).sum(0) if moments.whole else sums.sum(0)
    shared = squares / max(1, int(tokens.sum()))
    parts: list[Planes] = []
    methods: dict[str, int] = {}
    for expert, count in enumerate(tokens.tolist()):
        planes, method = _matrix(job, expert, sums[expert].div_(max(1, count)), count, moments.whole, shared)
        parts.append(tuple(plane.cpu() for plane in planes))
        methods[method] = methods.get(method, 0) + 1
    stacked = tuple(torch.stack([_bytes(p) for p in plane]).view(plane[0].dtype) for plane in zip(*parts, strict=True))
    told = next(iter(methods)) if len(methods) == 1 else ", ".join(f"{text} of {n}" for text, n in methods.items())
    values = tuple(checksum(job.matrix(expert)) for expert in range(len(tokens)))
    return Rounded(stacked, job.scheme, told, values)


def _bytes(plane: Tensor) -> Tensor:
    """8-bit floats as bytes, which every torch stacks."""
    return plane.view(torch.uint8) if plane.dtype.is_floating_point and plane.element_size() == 1 else plane


def _matrix(
    job: _Job, expert: int | None, sums: Tensor, tokens: int, whole: bool, shared: Tensor | None
) -> tuple[Planes, str]:
    w, few = job.matrix(expert), tokens < job.size.k
    squares = sums.diagonal().clone() if whole else sums
    if whole and not few:
        planes = gptq(w, job.scheme, sums)
        if planes is not None:
            return planes, GPTQ
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
        for i, plane in enumerate(weight.planes):
            tensors[plane_key(name, i)] = plane.contiguous()
            digest.update(_bytes(plane).contiguous().view(torch.uint8).numpy().tobytes())
    metadata = {"format": "pt", PLANES_OF: json.dumps(told), TOKEN: digest.hexdigest(), "method": policy.method or ""}
    partial = path.with_name(f"{path.name}.part")
    save_file(tensors, str(partial), metadata=metadata)
    partial.replace(path)
