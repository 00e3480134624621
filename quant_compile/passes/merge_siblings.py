"""One GEMM for linears that read one input under one scheme (q/k/v, gate/up): fewer launches, bigger tiles.

Reads ``sglq.linear`` nodes; writes one over joined planes and a slice for each sibling. Siblings without a bias join siblings
with one through zeros. A slice is not contiguous, so views of it become reshapes. Refuses rows that would not start at a scale
block, a bias that is not a Parameter, and inputs or viewed outputs that are written in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from quant_compile.ir import ops
from quant_compile.ir.family import PlaneSpec, Reject, family_of
from quant_compile.ir.graph import BiasRef, PlaneRef, add_plane, erase_with_inputs, stand_for, verify
from quant_compile.ir.scheme import parse
from quant_compile.ir.writes import Writes, storage_of
from quant_compile.page.views import tail
from quant_compile.passes.plan import PassReport, Plan


def merge_siblings(gm: fx.GraphModule, plan: Plan) -> tuple[fx.GraphModule, PassReport]:
    """Merge every group of siblings."""
    report = PassReport("merge_siblings")
    groups: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node in gm.graph.find_nodes(op="call_function", target=ops.linear):
        x = node.args[0] if isinstance(node.args[0], fx.Node) else node.args[0][0]
        groups.setdefault((x, *node.args[3:]), []).append(node)
    _say_why_apart(groups, report)
    if not plan.merge_siblings:
        for siblings in groups.values():
            if len(siblings) > 1:
                report.nearly(_names(siblings), f"not one product with {_others(siblings)}: {TURNED_OFF}")
        return gm, report
    writes = Writes(gm.graph)
    for siblings in groups.values():
        if len(siblings) < 2:
            continue
        each = _names(siblings)
        names = " + ".join(each)
        refusal = _refusal(siblings, plan, writes)
        if refusal is not None:
            report.miss(names, each, refusal.reason)
            continue
        _merge(gm.graph, siblings)
        report.rewrote.append(names)
    return verify(gm, "quantized"), report


TURNED_OFF = "the policy's `fuse` turns merge_siblings off"


def _names(siblings: Iterable[fx.Node]) -> list[str]:
    return [name for node in siblings for name in node.meta["names"]]


def _others(siblings: Sequence[fx.Node]) -> str:
    return f"{len(siblings) - 1} {'other' if len(siblings) == 2 else 'others'} of its input"


def _say_why_apart(groups: Mapping[tuple[Any, ...], Sequence[fx.Node]], report: PassReport) -> None:
    """Of linears that read one input: why they are in several groups."""
    by_input: dict[Any, list[tuple[Any, ...]]] = {}
    for key in groups:
        source = key[0].args[0] if key[0].target is ops.quantize else key[0]
        by_input.setdefault(source, []).append(key)
    for first, *others in by_input.values():
        beside = " + ".join(map(tail, _names(groups[first])))  # so that layers alike say the same
        for other in others:
            if other[1] != first[1]:
                why = f"its scheme is {other[1]}, and theirs is {first[1]}"
            elif other[2] != first[2]:
                why = f"it computes in {other[2]}, and they in {first[2]}"
            else:
                why = "its input is quantized on its own"
            report.nearly(_names(groups[other]), f"not one product with {beside}: {why}")


def _ref(plane: fx.Node) -> PlaneRef:
    return plane.meta["plane"]


def _rows(node: fx.Node) -> int:
    return node.args[1][0].meta["example_value"].shape[0]  # type: ignore[index, union-attr]


def _refusal(siblings: list[fx.Node], plan: Plan, writes: Writes) -> Reject | None:
    spec = str(siblings[0].args[3])
    block = family_of(parse(spec)).row_block(parse(spec))
    for node in siblings[:-1]:
        if _rows(node) % block:
            return Reject(
                f"{node.meta['names'][0]} has {_rows(node)} rows, not a multiple of the scale block of {block}"
            )
    slots = [_ref(node.args[1][0]).slots[0] for node in siblings]  # type: ignore[index]
    if len(set(slots)) < len(slots):
        return Reject("one weight is used twice")
    for node in siblings:
        bias: Any = node.args[2]
        if bias is not None and not (bias.op == "placeholder" and plan.is_parameter(bias.meta.get("argument", -1))):
            return Reject(f"the bias of {node.meta['names'][0]} is not a Parameter")
    return _written(siblings, writes)


def _written(siblings: list[fx.Node], writes: Writes) -> Reject | None:
    x: Any = siblings[0].args[0]
    writer = writes.between(x[0], siblings[0], siblings[-1]) if isinstance(x, list | tuple) else None
    if writer is not None:
        return Reject(f"the input is written by {writer}")
    for node in siblings:
        bias: Any = node.args[2]
        writer = None if bias is None else writes.anywhere(bias)
        if writer is not None:  # the joined bias is made before the call
            return Reject(f"the bias of {node.meta['names'][0]} is written by {writer}")
        writer = writes.anywhere(node)
        if writer is not None and _views(node):
            return Reject(f"{node.meta['names'][0]}'s output is viewed and written by {writer}")
    return None


def _views(node: fx.Node) -> list[fx.Node]:
    """``view`` calls on a linear's output or an alias of it, which need strides that a slice has not."""
    found: list[fx.Node] = []
    storage = storage_of(node)
    for user in node.users:
        if storage is not None and storage_of(user) == storage:
            if user.op == "call_method" and user.target in _RESHAPES and not _is_bit_view(user):
                found.append(user)
            found += _views(user)
    return found


def _is_bit_view(node: fx.Node) -> bool:
    """``view(dtype)``, which looks at the bits and not at the shape."""
    return any(isinstance(value, torch.dtype) for value in (*node.args[1:2], *node.kwargs.values()))


_RESHAPES = {"view": "reshape", "view_as": "reshape_as"}


def _merge(graph: fx.Graph, siblings: list[fx.Node]) -> None:
    first = siblings[0]
    sizes = [_rows(node) for node in siblings]
    names = tuple(name for node in siblings for name in node.meta["names"])
    w = [_joined_plane(graph, siblings, i, names) for i in range(len(first.args[1]))]  # type: ignore[arg-type]
    bias = _joined_bias(graph, siblings, sizes, names)
    with graph.inserting_before(first):
        y = graph.call_function(ops.linear, (first.args[0], w, bias, *first.args[3:]))
        y.meta |= {"site": f"{' + '.join(names)} {first.args[3]}", "names": names}
        value = first.meta["example_value"]
        with value.fake_mode:
            y.meta["example_value"] = value.new_empty((*value.shape[:-1], sum(sizes)))
        start, parts = 0, []
        for node, size in zip(siblings, sizes, strict=True):
            part = graph.call_method("narrow", (y, -1, start, size))
            part.meta["example_value"] = node.meta["example_value"]
            parts.append(part)
            start += size
    for node, part in zip(siblings, parts, strict=True):
        for view in dict.fromkeys(_views(node)):
            view.target = _RESHAPES[str(view.target)]
            if "size" in view.kwargs:
                view.kwargs = {"shape": view.kwargs["size"]}
        stand_for(part, node)
        node.replace_all_uses_with(part)
        erase_with_inputs(graph, node)


def _joined_plane(graph: fx.Graph, siblings: list[fx.Node], index: int, names: tuple[str, ...]) -> fx.Node:
    planes: list[fx.Node] = [node.args[1][index] for node in siblings]  # type: ignore[index]
    refs = [_ref(plane) for plane in planes]
    value = planes[0].meta["example_value"]
    rows = sum(plane.meta["example_value"].shape[0] for plane in planes)
    ref = PlaneRef(
        tuple(slot for r in refs for slot in r.slots),
        tuple(flag for r in refs for flag, _ in r.stored),
        refs[0].spec,
        refs[0].layout,
        refs[0].dtype,
        index,
        tuple(view for r in refs for _, view in r.stored),
    )
    node = add_plane(
        graph, ref, PlaneSpec("joined", (rows, *value.shape[1:]), value.dtype), planes[0], f"{planes[0].name}_joined"
    )
    node.meta["parameter"] = " + ".join(names)
    return node


def _joined_bias(graph: fx.Graph, siblings: list[fx.Node], sizes: list[int], names: tuple[str, ...]) -> fx.Node | None:
    biases: list[Any] = [node.args[2] for node in siblings]
    present = next((bias for bias in biases if bias is not None), None)
    if present is None:
        return None
    dtype = present.meta["example_value"].dtype
    slots = tuple(None if bias is None else bias.meta["argument"] for bias in biases)
    spec = PlaneSpec("bias", (sum(sizes),), dtype)
    node = add_plane(graph, BiasRef(slots, tuple(sizes), dtype), spec, present, f"{present.name}_joined")
    node.meta["parameter"] = " + ".join(names)
    return node
