"""Dynamo's graph of a small module, a plan for it, and a slow runner of rewritten graphs. No Inductor, no weight store.

Planes are made here from the scheme families alone, so that a defect of the store cannot hide one of a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

import quant_compile  # noqa: F401  (registers the schemes)
from quant_compile.ir.family import Planes, family_of
from quant_compile.ir.graph import BiasRef, PlaneRef, ScaleRef, copy_graph
from quant_compile.ir.scheme import parse
from quant_compile.ir.sites import LinearSite, Miss, find_sites
from quant_compile.lowering.registry import Problem, layouts
from quant_compile.lowering.select import Request, choose
from quant_compile.lowering.target import Target
from quant_compile.passes.plan import Plan, SiteDecision


class Holder(nn.Module):
    """Parameters by name, and a function of (self, *inputs) as forward."""

    def __init__(self, function: Callable[..., Any], **parameters: Tensor | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            made = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
            self.register_parameter(name, made)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


@dataclass
class Traced:
    """One Dynamo graph, copied, with the arguments of its first call and what eager returned."""

    gm: fx.GraphModule
    arguments: tuple[Any, ...]
    names: dict[int, str]
    sites: list[LinearSite] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)

    @property
    def parameters(self) -> dict[int, nn.Parameter]:
        """Argument position -> Parameter."""
        return {i: value for i, value in enumerate(self.arguments) if isinstance(value, nn.Parameter)}


def trace(module: nn.Module, *inputs: Any, dynamic: bool | None = False) -> Traced:
    """Run ``module`` once under Dynamo and return its only graph with its sites and misses."""
    graphs: list[fx.GraphModule] = []
    calls: list[tuple[Any, ...]] = []

    def backend(gm: fx.GraphModule, _example: Any) -> Callable[..., Any]:
        graphs.append(copy_graph(gm))

        def call(*arguments: Any) -> Any:
            calls.append(arguments)
            return gm.forward(*arguments)

        return call

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(module, backend=backend, dynamic=dynamic, fullgraph=True)(*inputs)
    assert len(graphs) == len(calls) == 1
    by_id = {id(parameter): name for name, parameter in module.named_parameters()}
    names = {i: by_id[id(value)] for i, value in enumerate(calls[0]) if id(value) in by_id}
    traced = Traced(graphs[0], calls[0], names)
    traced.sites, traced.misses = find_sites(traced.gm, traced.parameters)
    return traced


def plan_for(traced: Traced, schemes: str | Mapping[str, str | None], **changes: Any) -> Plan:
    """A plan that gives every site one scheme, or each weight its own (None: kept); kernels are the reference."""
    decisions: dict[str, SiteDecision] = {}
    for site in traced.sites:
        name = traced.names[site.slot]
        spec = schemes if isinstance(schemes, str) else schemes.get(name)
        decisions[site.node.name] = SiteDecision(parse(spec) if spec else None, "as the test says", name)

    def reference(problem: Problem, name: str) -> Any:
        return choose(problem, Target.fake("cpu"), Request(kernels="reference"), name)

    fields = {"choose": reference, "is_parameter": lambda slot: slot in traced.parameters} | changes
    return Plan(tuple(traced.sites), decisions, **fields)


def run(gm: fx.GraphModule, traced: Traced, scales: Mapping[str, float] | None = None) -> Any:
    """Run a rewritten graph on the arguments that were traced, with planes made from the Parameters.

    Returns the one output, or a tuple of them.
    """
    values: list[Any] = []
    for node in gm.graph.find_nodes(op="placeholder"):
        ref = node.meta.get("plane")
        if ref is None:
            values.append(traced.arguments[node.meta["argument"]])
        elif isinstance(ref, PlaneRef):
            values.append(packed_planes(ref, traced)[ref.index])
        elif isinstance(ref, ScaleRef):
            values.append(torch.tensor([(scales or {})[traced.names[ref.slots[0]]]]))
        else:
            values.append(_joined_bias(ref, traced))
        declared = node.meta["example_value"]
        if ref is not None:
            assert tuple(values[-1].shape) == tuple(declared.shape), node.name
            assert values[-1].dtype == declared.dtype, node.name
    with torch.no_grad():
        result = gm(*values)
    return result[0] if len(result) == 1 else result


def packed_planes(ref: PlaneRef, traced: Traced) -> Planes:
    """The planes that a reference stands for: each weight quantized by itself, rows joined, packed."""
    scheme = parse(ref.spec)
    rows: list[Planes] = []
    total = 0
    for slot, (transposed, view) in zip(ref.slots, ref.stored, strict=True):
        weight = traced.parameters[slot].detach()
        weight = weight.reshape(view or weight.shape)
        weight = (weight.t() if transposed else weight).to(ref.dtype)
        k = weight.shape[1]
        total += weight.shape[0]
        rows.append(family_of(scheme).quantize_weight(weight.contiguous(), scheme))
        if len(ref.slots) == 1:
            break
    joined = tuple(torch.cat(parts) for parts in zip(*rows, strict=True))
    return layouts()[ref.layout].pack(joined, Problem(scheme, int(total), int(k), ref.dtype))


def _joined_bias(ref: BiasRef, traced: Traced) -> Tensor:
    parts = [
        torch.zeros(size, dtype=ref.dtype) if slot is None else traced.parameters[slot].detach()
        for slot, size in zip(ref.slots, ref.sizes, strict=True)
    ]
    return torch.cat(parts)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error."""
    wanted = wanted.double()
    return float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def eager_linear(x: Tensor, w: Tensor, bias: Tensor | None, spec: str, scale: float | None = None) -> Tensor:
    """x [..., k] times w [n, k] under a scheme, from its torch functions alone, in x's dtype."""
    scheme = parse(spec)
    family = family_of(scheme)
    given = None if scale is None else torch.tensor([scale])
    planes = (x,) if scheme.input_activations is None else family.quantize_input(x, scheme, given)
    return family.linear(planes, family.quantize_weight(w.contiguous(), scheme), bias, scheme, x.dtype)
