"""Turn every sglq op into what runs: quantization into ATen that Inductor fuses, linears and attention into kernel ops.

Reads ``sglq`` nodes; writes traced scheme code, ``sglq_kernels.linear`` with its dispatch, and planes in the chosen layout.
Inputs of which Inductor would make too many kernels go to one of our own (``fuse_input``).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from torch import Tensor, fx
from torch.nn import functional as F

from quant_compile.ir import ops
from quant_compile.ir.batched import BatchedSite
from quant_compile.ir.experts import MoeSite
from quant_compile.ir.family import Planes, family_of
from quant_compile.ir.graph import (
    ExpertRef,
    PlaneRef,
    add_named_plane,
    add_plane,
    erase_with_inputs,
    inline,
    names_reading,
    plane_name,
    stand_for,
    trace,
    verify,
)
from quant_compile.ir.moe import Activation, MoeProblem, parse_spec
from quant_compile.ir.scheme import parse
from quant_compile.ir.writes import Writes
from quant_compile.lowering import ops as kernel_ops
from quant_compile.lowering.attention import GROUPED, AttentionChoice
from quant_compile.lowering.latent import AbsorbedDispatch, latent_forms
from quant_compile.lowering.moe import MoeDispatch, planes_of
from quant_compile.lowering.registry import Problem, layouts
from quant_compile.lowering.select import Dispatch
from quant_compile.lowering.target import Target
from quant_compile.passes.fuse_input import erase_unused, one_launch
from quant_compile.passes.plan import PassReport, Plan


@dataclass(frozen=True, eq=False)
class Reached:
    """What has been read of masks so far: by mask and size of blocks, the node that reads it and the attention that it was made for."""

    writes: Writes
    made: dict[tuple[fx.Node, tuple[int, int]], tuple[fx.Node, fx.Node]] = field(default_factory=dict)

    def of(self, graph: fx.Graph, mask: fx.Node, blocks: tuple[int, int], node: fx.Node) -> fx.Node:
        """Blocks of the mask of an attention, read where the first one under it is, unless it is written to since."""
        found = self.made.get((mask, blocks))
        if found is not None and self.writes.between(mask, found[1], node) is None:
            return found[0]
        reach = graph.call_function(kernel_ops.reach, (mask, *blocks))
        reach.meta["site"] = "attention blocks of a mask"
        self.made[mask, blocks] = reach, node
        return reach


def lower(gm: fx.GraphModule, plan: Plan) -> tuple[fx.GraphModule, PassReport]:
    """Lower every sglq op; none may be left."""
    report = PassReport("lower")
    column_scales: set[fx.Node] = set()
    for node in list(gm.graph.find_nodes(op="call_function", target=ops.linear)):
        x, names, slots = node.args[0], " + ".join(node.meta["names"]), node.args[1][0].meta["plane"].slots
        dispatch = _lower_linear(gm.graph, node, plan)
        if dispatch.column_scales and isinstance(x, fx.Node):
            column_scales.add(x)
        report.rewrote.append(f"{names}: {dispatch.layout}, {dispatch.ranges}")
        report.dispatches[slots] = dispatch
    for node in list(gm.graph.find_nodes(op="call_function", target=ops.moe)):
        names, slots = " + ".join(node.meta["names"]), node.meta["block"].slots
        moe = _lower_moe(gm.graph, node, plan)
        report.rewrote.append(f"{names}: {moe.layout}, {moe.ranges}")
        report.dispatches[slots] = moe
    for node in list(gm.graph.find_nodes(op="call_function", target=ops.batched)):
        names, slot = " + ".join(node.meta["names"]), node.meta["batched"].slot
        dispatch = _lower_batched(gm.graph, node, plan)
        report.rewrote.append(f"{names}: {dispatch.layout}, {dispatch.ranges}")
        report.dispatches[(slot,)] = dispatch
    for node in list(gm.graph.find_nodes(op="call_function", target=ops.dequantize)):
        names, slots = " + ".join(node.meta["names"]), node.args[0][0].meta["plane"].slots
        dispatch = _lower_dequantize(gm.graph, node, plan)
        report.rewrote.append(f"{names}: {dispatch.layout}, {dispatch.ranges}")
        report.dispatches[slots] = dispatch
    for node in list(gm.graph.find_nodes(op="call_function", target=ops.latent_attention)):
        report.rewrote.append(f"{node.name}: {_lower_latent(gm.graph, node)}")
    attention = list(gm.graph.find_nodes(op="call_function", target=ops.attention))
    reached = Reached(Writes(gm.graph)) if attention else None
    for node in attention:
        report.rewrote.append(f"{node.name}: {_lower_attention(gm.graph, node, reached)}")
    _lower_inputs(gm.graph, plan.target, column_scales, report)
    return verify(gm, "lowered"), report


def _lower_linear(graph: fx.Graph, node: fx.Node, plan: Plan) -> Dispatch:
    x, w, bias, spec, dtype = node.args
    ref: PlaneRef = w[0].meta["plane"]  # type: ignore[index, union-attr]
    source = x if isinstance(x, fx.Node) else x[0]  # type: ignore[index]
    value = (source.args[0] if source.target is ops.quantize else source).meta["example_value"]  # type: ignore[union-attr]
    n = w[0].meta["example_value"].shape[0]  # type: ignore[index, union-attr]
    k, siblings = int(value.shape[-1]), len(ref.slots)
    problem = Problem(parse(str(spec)), int(n), k, dtype, bias is not None, siblings)  # type: ignore[arg-type]
    dispatch = plan.choose(problem, " + ".join(node.meta["names"]))
    planes = _in_layout(graph, w, dispatch)
    with graph.inserting_before(node):
        y = graph.call_function(kernel_ops.linear, (x, planes, bias, dispatch.text))
    y.meta = {key: node.meta[key] for key in ("site", "names", "example_value")}
    stand_for(y, node)
    node.replace_all_uses_with(y)
    erase_with_inputs(graph, node)
    return dispatch


def _in_layout(graph: fx.Graph, w: Any, dispatch: Dispatch) -> list[fx.Node]:
    """The planes of a linear's weight in the layout of its dispatch."""
    ref: PlaneRef = w[0].meta["plane"]
    if dispatch.layout == ref.layout:
        return list(w)
    planes: list[fx.Node] = []
    stem: str = w[0].meta["parameter"].split(" + ")[0]
    for i, plane in enumerate(layouts()[dispatch.layout].planes(dispatch.problem)):
        moved = replace(ref, layout=dispatch.layout, index=i)
        planes.append(add_plane(graph, moved, plane, w[0], plane_name(stem, f"{dispatch.layout}_{plane.name}")))
        planes[-1].meta["parameter"] = w[0].meta["parameter"]
    return planes


def _lower_dequantize(graph: fx.Graph, node: fx.Node, plan: Plan) -> AbsorbedDispatch:
    """The layout is the one that graphs read in which the linear is one."""
    w: Any
    w, spec, k = node.args
    n, name = int(w[0].meta["example_value"].shape[0]), " + ".join(node.meta["names"])
    found = plan.choose(Problem(parse(str(spec)), n, int(k), node.meta["dtype"]), name)  # type: ignore[arg-type]
    dispatch = AbsorbedDispatch(found.problem, found.layout, found.table, found.column_scales)
    planes = _in_layout(graph, w, dispatch)
    with graph.inserting_before(node):
        y = graph.call_function(kernel_ops.dequantize, (planes, dispatch.text))
    y.meta = {key: node.meta[key] for key in ("site", "names")}
    stand_for(y, node)
    node.replace_all_uses_with(y)
    erase_with_inputs(graph, node)
    return dispatch


def _lower_moe(graph: fx.Graph, node: fx.Node, plan: Plan) -> MoeDispatch:
    x, ids, weights, w13, b13, w2, b2, scale2, spec, activation, dtype = node.args
    block: MoeSite = node.meta["block"]
    how, has_bias = Activation.parse(str(activation)), b13 is not None or b2 is not None
    sizes = (block.experts, block.hidden, block.intermediate, block.top_k)
    scheme, scheme2 = parse_spec(str(spec))
    problem = MoeProblem(scheme, *sizes, how, dtype, has_bias, weights is not None, scheme2)  # type: ignore[arg-type]
    assert plan.choose_moe is not None
    dispatch = plan.choose_moe(problem, " + ".join(node.meta["names"]))
    w13, w2 = _moved(graph, w13, dispatch, 0), _moved(graph, w2, dispatch, 1)
    with graph.inserting_before(node):
        y = graph.call_function(kernel_ops.moe, (x, ids, weights, w13, b13, w2, b2, scale2, dispatch.text))
    y.meta = {key: node.meta[key] for key in ("site", "names", "example_value")}
    stand_for(y, node)
    node.replace_all_uses_with(y)
    erase_with_inputs(graph, node)
    return dispatch


def _lower_batched(graph: fx.Graph, node: fx.Node, plan: Plan) -> Dispatch:
    x, w, spec, dtype = node.args
    site: BatchedSite = node.meta["batched"]
    assert plan.choose_rows is not None
    problem = Problem(parse(str(spec)), site.n, site.k, dtype)  # type: ignore[arg-type]
    dispatch = plan.choose_rows(problem, " + ".join(node.meta["names"]))
    with graph.inserting_before(node):
        y = graph.call_function(kernel_ops.batched, (x, w, dispatch.text))
    y.meta = {key: node.meta[key] for key in ("site", "names", "example_value")}
    stand_for(y, node)
    node.replace_all_uses_with(y)
    graph.erase_node(node)
    return dispatch


def _lower_attention(graph: fx.Graph, node: fx.Node, reached: Reached | None) -> str:
    choice: AttentionChoice = node.meta["choice"]
    q, k, v, mask, scale, is_causal, softcap, sinks, _, *coded = node.args
    more: dict[str, Any] = {}
    with graph.inserting_before(node):
        if choice.runs == GROUPED:
            more = {"attn_mask": mask, "scale": scale, "is_causal": is_causal, "enable_gqa": True}
            y = graph.call_function(F.scaled_dot_product_attention, (q, k, v), more)
        else:
            if reached is not None and choice.blocks is not None and isinstance(mask, fx.Node):
                more = {"reach": reached.of(graph, mask, choice.blocks, node), "blocks": choice.blocks}
            given = (q, k, v, mask, scale, softcap, sinks, choice.runs, *coded)
            y = graph.call_function(kernel_ops.attention, given, more)
    y.meta = {key: node.meta[key] for key in ("site", "example_value")}
    stand_for(y, node)
    node.replace_all_uses_with(y)
    graph.erase_node(node)
    return choice.runs


def _lower_latent(graph: fx.Graph, node: fx.Node) -> str:
    """A kernel between the two products; plain torch is what the op decomposes into."""
    form: str = node.meta["choice"].runs
    if latent_forms()[form].run is not None:
        with graph.inserting_before(node):
            y = graph.call_function(kernel_ops.latent_attention, (*node.args[:10], form, *node.args[10:]))
        y.meta = {key: node.meta[key] for key in ("site", "example_value")}
        stand_for(y, node)
        node.replace_all_uses_with(y)
        graph.erase_node(node)
    return form


def _moved(graph: fx.Graph, planes: Any, dispatch: MoeDispatch, which: int) -> list[fx.Node]:
    """The planes of a block's first or second weight in the layout of its dispatch."""
    ref: ExpertRef = replace(planes[0].meta["plane"], problem=dispatch.problem.halves[which])
    if ref.layout == dispatch.layout:
        for i, plane in enumerate(planes):
            plane.meta["plane"] = replace(ref, index=i)
        return planes
    out: list[fx.Node] = []
    for i, spec in enumerate(planes_of(dispatch.layout, dispatch.problem)[which]):
        moved, label = replace(ref, layout=dispatch.layout, index=i), f"{dispatch.layout}_{spec.name}"
        out.append(add_named_plane(graph, moved, spec, planes[0], planes[0].meta["parameter"], label))
    return out


@lru_cache(maxsize=None)
def _template(spec: str, k: int, static: bool) -> fx.Graph:
    """The scheme's own ``quantize_input``, traced: what runs is what the reference computes."""
    scheme = parse(spec)

    def quantize(x: Tensor, scale: Tensor | None = None) -> Planes:
        return family_of(scheme).quantize_input(x, scheme, scale)

    return trace(quantize, k, 2 if static else 1)


def _lower_inputs(graph: fx.Graph, target: Target | None, column_scales: set[fx.Node], report: PassReport) -> None:
    """Quantizations by a kernel of their own where that saves one, else by ATen."""
    writes = Writes(graph) if target is not None and target.device == "cuda" else None
    for node in list(graph.find_nodes(op="call_function", target=ops.quantize)):
        x: Any = node.args[0]
        outputs = None
        if writes is not None and target is not None and node in column_scales:
            report.nearly(
                names_reading(node),
                "its kernel wants the scales of its input in columns, so the input has no kernel of its own",
            )
        elif writes is not None and target is not None:
            outputs = one_launch(graph, node, target, writes, report)
        if outputs is None:
            outputs = _inlined(graph, node, node in column_scales)
        for user in list(node.users):
            user.args = tuple(outputs if argument is node else argument for argument in user.args)
        graph.erase_node(node)
        erase_unused(graph, x)


def _inlined(graph: fx.Graph, node: fx.Node, column_scales: bool) -> list[fx.Node]:
    arguments: list[Any] = list(node.args)
    x, spec = arguments[0], arguments[1]
    static = len(arguments) > 2 and arguments[2] is not None
    template = _template(str(spec), int(x.meta["example_value"].shape[-1]), static)
    outputs = list(inline(graph, template, [a for a in (x, *arguments[2:]) if isinstance(a, fx.Node)], node))
    if column_scales:
        with graph.inserting_before(node):
            flat = graph.call_method("flatten", (outputs[1], 0, -2))
            columns = graph.call_method("contiguous", (graph.call_method("t", (flat,)),))
            outputs[1] = graph.call_method("t", (columns,))
    return outputs
