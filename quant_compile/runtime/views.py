"""What a variant does at each product, for the report: drawn before and after, times of its kernels, near misses, the model's line.

Reads the graph as it was and as it is lowered, and what passes report, when a report is made. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

from torch import fx

from quant_compile.ir.draw import Scene, Sketch, op_label, shape_of, source_of, whole_value
from quant_compile.ir.graph import fill_examples, slots_of
from quant_compile.lowering import collectives
from quant_compile.lowering import ops as kernel_ops
from quant_compile.lowering.kernel_times import kernel_times
from quant_compile.lowering.latent import AbsorbedDispatch
from quant_compile.lowering.moe import MoeDispatch
from quant_compile.lowering.select import Dispatch
from quant_compile.lowering.target import Target
from quant_compile.page.views import Box, Drawing, SiteView, joined_of, tail
from quant_compile.passes.insert_moe import weight_names
from quant_compile.passes.plan import PassReport, SiteDecision, dispatches_of
from quant_compile.runtime.decide import Found

_BEFORE, _AFTER = 2, 2  # levels of producers that are drawn


@dataclass(frozen=True, eq=False)
class Views:
    """The views of one variant, drawn when first asked for: most compilations are never looked at.

    Attributes:
        pristine: the graph as it was.
        found: its sites.
        decisions: node name of a site -> what was decided.
        lowered: the graph after all passes.
        reports: what they say.
        target: the device.
        level: of the tuner.
    """

    pristine: fx.Graph
    found: Found
    decisions: Mapping[str, SiteDecision]
    lowered: fx.Graph
    reports: Sequence[PassReport]
    target: Target
    level: str

    @cached_property
    def joined(self) -> Mapping[int, tuple[str, ...]]:
        """Slot of each weight that a site multiplies by -> ``SiteView.joined``; draws nothing."""
        return {
            slot: joined_of(self._weights(slots), () if kernel is None else _fused(kernel))
            for slots, kernel in self._groups
            for slot in slots
        }

    @cached_property
    def drawn(self) -> Mapping[int, SiteView]:
        """Slot of each weight that a site multiplies by -> its view."""
        dispatches = dispatches_of(self.reports)
        near = [miss for report in self.reports for miss in report.near]
        out: dict[int, SiteView] = {}
        fill_examples(self.lowered)
        scenes = Scene(self.pristine), Scene(self.lowered)
        times = lru_cache(maxsize=None)(partial(kernel_times, target=self.target, level=self.level))
        for slots, kernel in self._groups:
            own = list(dict.fromkeys(site for slot in slots for site in self._sites[slot]))
            known = {self.decisions[site.node.name].name for site in own}
            dispatch = dispatches.get(slots[0]) if kernel is not None else None
            weights = self._weights(slots)
            view = SiteView(
                weights,
                _before(scenes[0], own),
                None if kernel is None else _after(scenes[1], kernel, weights, dispatch),
                () if dispatch is None or isinstance(dispatch, AbsorbedDispatch) else times(dispatch),
                () if kernel is None else _fused(kernel),
                tuple(dict.fromkeys(miss.reason for miss in near if not known.isdisjoint(miss.names))),
                source_of(own[0].node),
            )
            out |= dict.fromkeys(slots, view)
        return out

    def of_weights(self) -> dict[int, Seen]:
        """Slot of each weight that a site multiplies by -> its view, not drawn yet."""
        return {slot: Seen(self, slot) for slot in self._sites}

    def _weights(self, slots: Sequence[int]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(tail(self._names[slot]) for slot in slots))

    @cached_property
    def _names(self) -> dict[int, str]:
        return _names(self.found, self.decisions)

    @cached_property
    def _sites(self) -> dict[int, list[Any]]:
        return _sites(self.found)

    @cached_property
    def _groups(self) -> list[tuple[tuple[int, ...], fx.Node | None]]:
        return _groups(self._sites, self.lowered)


@dataclass(frozen=True)
class Seen:
    """One view of a variant; the same to whoever compares, drawn or not."""

    views: Views
    slot: int

    def __call__(self) -> SiteView:
        """Drawn."""
        return self.views.drawn[self.slot]


def _sites(found: Found) -> dict[int, list[Any]]:
    """Slot -> the sites that multiply by it, in graph order."""
    out: dict[int, list[Any]] = {}
    for site in (*found.linears, *found.batched):
        out.setdefault(site.slot, []).append(site)
    for block in found.blocks:
        for slot in block.slots:
            out.setdefault(slot, []).append(block)
    return out


def _groups(sites: Mapping[int, Any], lowered: fx.Graph) -> list[tuple[tuple[int, ...], fx.Node | None]]:
    """Slots that one node of the lowered graph multiplies by, with that node; of those that stay, each alone without one."""
    out: list[tuple[tuple[int, ...], fx.Node | None]] = []
    done = set[int]()
    for node in lowered.nodes:
        if "names" not in node.meta:
            continue
        read = [slot for plane in _planes(node) for slot in slots_of(plane.meta["plane"])]
        slots = tuple(slot for slot in dict.fromkeys(read) if slot in sites and slot not in done)
        if slots:
            done.update(slots)
            out.append((slots, node))
    return out + [((slot,), None) for slot in sites if slot not in done]


def _planes(node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if "plane" in source.meta]


def _names(found: Found, decisions: Mapping[str, SiteDecision]) -> dict[int, str]:
    """Slot -> name of its weight."""
    names = {slot: decision.name for slot, decision in found.decided(decisions)}
    for block in found.blocks:
        names |= dict(zip(block.slots, weight_names(decisions[block.node.name].name, block), strict=True))
    return names


def _before(scene: Scene, sites: Sequence[Any]) -> Drawing:
    sketch = Sketch(scene)
    for site in sites:
        inside: tuple[fx.Node, ...] = getattr(site, "nodes", (site.node,))
        for weight in _weights(site):
            sketch.add(Box(_weight_label(weight), shape_of(weight), "weight"), (weight,))
        whole = len(inside) > 1
        label = f"{site.module_class}, {len(inside)} operations" if whole else op_label(site.node)
        sketch.add(Box(label, shape_of(site.node), "module" if whole else "op"), inside)
    for site in sites:
        for node in getattr(site, "nodes", (site.node,)):
            sketch.add_producers(node, _BEFORE)
    for site in sites:
        sketch.add_readers(site.node)
    return sketch.done()


def _weights(site: Any) -> list[fx.Node]:
    return [site.w13, site.w2] if hasattr(site, "w13") else [site.weight]


def _weight_label(node: fx.Node) -> str:
    """A weight's name in Dynamo's graph, from its module on."""
    stem = node.name.removesuffix("_").replace("_parameters_", ".").replace("_modules_", ".")
    return ".".join(stem.split(".")[-2:])


def _after(scene: Scene, kernel: fx.Node, names: Sequence[str], dispatch: Dispatch | MoeDispatch | None) -> Drawing:
    sketch = Sketch(scene)
    planes = _planes(kernel)
    layout = f"layout {dispatch.layout}" if dispatch is not None else ""
    sketch.add(Box(" + ".join(dict.fromkeys(names)), " ".join(map(shape_of, planes)), "weight", layout), planes)
    ranges = dispatch.ranges if dispatch is not None else ""
    sketch.add(Box(op_label(kernel), shape_of(kernel), "kernel", ranges), (kernel,))
    sketch.add_producers(kernel, _AFTER)
    sketch.add_readers(kernel)
    return sketch.done()


def _fused(kernel: fx.Node) -> tuple[str, ...]:
    """What was joined around a kernel, by what the graph has."""
    out: list[str] = []
    names = kernel.meta["names"]
    if len(names) > 1:
        out.append(f"one product of {len(names)} weights that read one input")
    planes = kernel.args[0] if isinstance(kernel.args[0], list | tuple) else [kernel.args[0]]
    source = whole_value(planes[0])  # type: ignore[arg-type]
    readers = [user for user in planes[0].users if "names" in user.meta]  # type: ignore[union-attr]
    if len(planes) > 1 and len(readers) > 1:
        out.append(f"its input is quantized once, for {len(readers)} products")
    if source.target is kernel_ops.norm_quantize:
        joined = "the residual add, the RMSNorm and" if source.args[1] is not None else "the RMSNorm and"
        out.append(f"{joined} the quantization of its input are one kernel, {source.args[-1]}")
    elif source.target is collectives.all_reduce:
        out.append("the sum over ranks, the residual add, the RMSNorm and the quantization of its input are one kernel")
    elif source.target is kernel_ops.quantize_rows:
        out.append(f"its input is quantized by one kernel, {source.args[-1]}, after the maxima of rows")
    return tuple(out)
