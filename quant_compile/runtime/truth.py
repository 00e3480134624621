"""What each rewritten site of a graph must give, computed without any rewrite: unmerged, unfused, from planes in row form.

Reads sites as they were matched, decisions, the weights of a call, and schemes' own functions (``Family``). Knows no pass, no
layout and no kernel, so that a defect of one of these cannot hide in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import Parameter
from torch.nn import functional as F

from quant_compile.ir import ops
from quant_compile.ir.batched import BatchedSite
from quant_compile.ir.experts import MoeSite, leading_sizes
from quant_compile.ir.family import Planes, family_of
from quant_compile.ir.moe import Activation, gates_first, moe_reference
from quant_compile.ir.scheme import Scheme
from quant_compile.ir.sites import LinearSite
from quant_compile.lowering.weights import STORE, Key
from quant_compile.passes.plan import SiteDecision
from quant_compile.runtime.decide import Found

Values = Callable[[fx.Node], Any]
"""What nodes of the graph as it was have computed."""

# Relative Frobenius error of a product, what CONTRIBUTING.md holds every kernel to: rounding to bf16 alone is 1.7e-3, sums of FP8
# tensor cores in 14 bits make up to 3.3e-3.
TOLERANCE = 5e-3
# A row or column alone may be off by so many times as much: of few numbers, the error is not yet a mean.
PARTS = 8.0
# The order of two products changes where K and V are absorbed, so what is between them is rounded to 16 bits in other places.
ABSORBED_TOLERANCE = 2e-2


@dataclass(frozen=True, eq=False)
class Truth:
    """What a site must give.

    Attributes:
        reads: nodes whose values it needs.
        value: of the site's node.
        plain: the site as it was matched, with the weight's own values; compared with what the model's own operation gives. None:
            there are no values, or the match was proven by running it (expert blocks).
        margin: added to the tolerance.
    """

    reads: tuple[fx.Node, ...]
    value: Callable[[Values], Tensor]
    plain: Callable[[Values], Tensor] | None = None
    margin: Callable[[Values], float] = lambda values: 0.0


def truths(
    found: Found, decisions: Mapping[str, SiteDecision], parameters: Mapping[int, Parameter], absorbed: frozenset[int]
) -> dict[fx.Node, Truth]:
    """Node of each quantized site -> what it must give.

    Args:
        found: the sites of the graph as it was.
        decisions: by name of a site's node.
        parameters: the weights of a call, by slot.
        absorbed: slots of linears that attention has absorbed; their inputs stay in 16 bits.
    """
    out: dict[fx.Node, Truth] = {}
    for site in found.linears:
        decision = decisions[site.node.name]
        if decision.scheme is not None:
            linear = _Linear(site, decision.scheme, parameters[site.slot], decision.name, site.slot in absorbed)
            reads = (site.x,) if site.bias is None else (site.x, site.bias)
            out[site.node] = Truth(reads, linear.quantized, linear.plain if linear.has_values else None)
    for block in found.blocks:
        decision = decisions[block.node.name]
        if decision.schemes is not None:
            experts = _Experts(block, decision, (parameters[block.slots[0]], parameters[block.slots[1]]), parameters)
            out[block.node] = Truth(experts.reads, experts.quantized, margin=experts.margin)
    for site in found.batched:
        decision = decisions[site.node.name]
        if decision.scheme is not None:
            rows = partial(_batched, site, decision.scheme, parameters[site.slot], decision.name)
            index = (site.index,) if isinstance(site.index, fx.Node) else ()
            bias = () if site.bias is None else (site.bias,)
            out[site.node] = Truth((site.x, *index, *bias), rows)
    return out


@dataclass(frozen=True, eq=False)
class _Linear:
    site: LinearSite
    scheme: Scheme
    parameter: Parameter
    name: str
    absorbed: bool

    @property
    def has_values(self) -> bool:
        return not STORE.entry(self.parameter).released

    def quantized(self, values: Values) -> Tensor:
        site, scheme = self.site, self.scheme
        key = Key(scheme.spec, "rows", site.transposed, site.dtype, view=site.view)
        w, bias, x = _rows(self.parameter, key, self.name), self._bias(values), self._input(values)
        family, factor = family_of(scheme), _factor(self.parameter, site.dtype)
        if self.absorbed:
            weight = family.dequantize_weight(w, scheme, site.k).to(site.dtype)
            return self._turned(F.linear(x, weight if factor is None else weight * factor, bias))
        x = x if factor is None else x * factor
        return self._turned(family.linear(_input(x, scheme, self.parameter), w, bias, scheme, site.dtype))

    def plain(self, values: Values) -> Tensor:
        """The product in 16 bits."""
        site = self.site
        w = self.parameter.detach()
        w = w.reshape(site.view or w.shape)
        w = (w.t() if site.transposed else w).to(site.dtype)
        return self._turned(F.linear(self._input(values), w, self._bias(values)))

    def _input(self, values: Values) -> Tensor:
        x = values(self.site.x)
        for method, arguments in self.site.before:
            x = getattr(x, method)(*arguments)
        return x.to(self.site.dtype)

    def _bias(self, values: Values) -> Tensor | None:
        return None if self.site.bias is None else values(self.site.bias).to(self.site.dtype)

    def _turned(self, y: Tensor) -> Tensor:
        for method, arguments in self.site.after:
            y = getattr(y, method)(*arguments)
        return y


@dataclass(frozen=True, eq=False)
class _Experts:
    block: MoeSite
    decision: SiteDecision
    weights: tuple[Parameter, Parameter]
    parameters: Mapping[int, Parameter]

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        block = self.block
        sizes = [size[0] if isinstance(size, tuple) else size for size in leading_sizes(block) or ()]
        found = (block.x, block.ids, block.weights, *sizes)
        return tuple(dict.fromkeys(node for node in found if isinstance(node, fx.Node)))

    def quantized(self, values: Values) -> Tensor:
        return self._run(values, self.block.activation)

    def margin(self, values: Values) -> float:
        """What a hidden layer does that is one step of its dtype off everywhere: another order of sums makes that, and codes flip."""
        activation = self.block.activation
        truth, off = self._run(values, activation), self._run(values, _Nudged(activation))
        return error_of(off, truth)

    def _run(self, values: Values, activation: Any) -> Tensor:
        block, (first, second) = self.block, self.decision.schemes or (None, None)
        assert first is not None and second is not None
        dtype = block.x.meta["example_value"].dtype
        x = values(block.x).reshape(-1, block.hidden)
        ids = ops.dense_ids(x, block.experts) if block.ids is None else values(block.ids)
        router = None if block.weights is None else values(block.weights)
        factor = _factor(self.weights[0], dtype)
        planes = _input(x if factor is None else x * factor, first, self.weights[0])
        w13, w2 = (self._planes(which, scheme, dtype) for which, scheme in enumerate((first, second)))
        scale2 = STORE.entry(self.weights[1]).input_scale if second.static else None
        y = moe_reference(
            planes, ids, router, w13, self._bias(0, dtype), w2, self._bias(1, dtype), first, activation, dtype, scale2, second
        )  # fmt: skip
        sizes = [_size(values, size) for size in leading_sizes(block) or (-1,)]
        return y.to(block.node.meta["example_value"].dtype).reshape(*sizes, block.hidden)

    def _planes(self, which: int, scheme: Scheme, dtype: torch.dtype) -> Planes:
        block = self.block
        key = Key(scheme.spec, "experts", block.transposed[which], dtype, interleaved=which == 0 and block.interleaved)
        return _stacked(self.weights[which], key, self.decision.name, block.experts)

    def _bias(self, which: int, dtype: torch.dtype) -> Tensor | None:
        node = (self.block.b13, self.block.b2)[which]
        if node is None:
            return None
        bias = self.parameters[node.meta["argument"]].detach()
        return (gates_first(bias, 1) if which == 0 and self.block.interleaved else bias).to(dtype)


@dataclass(frozen=True)
class _Nudged:
    """An activation whose results are one step of their dtype away from zero, each second one towards it."""

    activation: Activation

    def __call__(self, hidden: Tensor) -> Tensor:
        y = self.activation(hidden)
        away = torch.full_like(y, float("inf")).copysign(y)
        towards = torch.arange(y.numel(), device=y.device).reshape(y.shape) % 2 == 1
        return torch.nextafter(y, torch.where(towards, torch.zeros_like(y), away))


def _batched(site: BatchedSite, scheme: Scheme, parameter: Parameter, name: str, values: Values) -> Tensor:
    """Rows of the operand [e?, ..., k] times each expert, quantized together, as what the product's letters say."""
    key = Key(scheme.spec, "experts", site.transposed, site.dtype, view=site.view)
    w = _stacked(parameter, key, name, site.experts)
    if site.index is not None:
        at = int(values(site.index)) if isinstance(site.index, fx.Node) else int(site.index)
        w = tuple(plane[at : at + 1] for plane in w)
    x = values(site.x)
    x = x.squeeze(site.squeezed) if site.squeezed else x
    rows = [letter for letter in site.x_letters if letter not in "ek"]
    each = ["e"] if "e" in site.x_letters else []
    ordered = x.permute([site.x_letters.index(letter) for letter in (*each, *rows, "k")]).to(site.dtype)
    sizes = ordered.shape[len(each) : -1]
    flat = ordered.reshape(*ordered.shape[: len(each)], -1, site.k)
    factor = _factor(parameter, site.dtype)
    planes = _input(flat if factor is None else flat * factor, scheme, parameter)
    y = ops.batched(list(planes), list(w), scheme.spec, site.dtype)
    lead = [] if site.index is not None else ["e"]
    y = y.reshape(*([site.experts] if lead else []), *sizes, site.n)
    y = y.permute([[*lead, *rows, "n"].index(letter) for letter in site.out_letters])
    return y if site.bias is None else y + values(site.bias).to(site.dtype)


def _input(x: Tensor, scheme: Scheme, parameter: Parameter) -> Planes:
    if scheme.input_activations is None:
        return (x,)
    scale = STORE.entry(parameter).input_scale if scheme.static else None
    return family_of(scheme).quantize_input(x, scheme, None if scale is None else scale.to(x.device))


def _factor(parameter: Parameter, dtype: torch.dtype) -> Tensor | None:
    has = STORE.entry(parameter).rounding.factor is not None
    return STORE.input_factor(parameter, dtype) if has else None


def _rows(parameter: Parameter, key: Key, name: str, expert: int | None = None) -> Planes:
    """Row form of a weight: quantized anew where it has its values, else out of the planes that it was adopted or kept with."""
    entry = STORE.entry(parameter)
    if entry.released:
        key = next(k for k in entry.packs if k.spec == key.spec)
    return STORE.logical(parameter, key, name, expert)


def _stacked(parameter: Parameter, key: Key, name: str, experts: int) -> Planes:
    parts = [_rows(parameter, key, name, expert) for expert in range(experts)]
    return tuple(torch.stack(planes) for planes in zip(*parts, strict=True))


def _size(values: Values, size: int | fx.Node | tuple[fx.Node, int]) -> int:
    if isinstance(size, tuple):
        value = values(size[0])
        return int((value if isinstance(value, torch.Size) else value.shape)[size[1]])
    return int(values(size)) if isinstance(size, fx.Node) else size


def error_of(got: Any, wanted: Any) -> float:
    """Relative Frobenius error, where the truth is finite; inf where that is met by NaN or inf, or by another shape or dtype.

    A row or a column counts for itself, by an eighth: one that is missing would not show beside large ones.

    Of what is no tensor of floats: 0 where equal, else inf.
    """
    if not isinstance(wanted, Tensor) or not isinstance(got, Tensor):
        return 0.0 if type(got) is type(wanted) and got == wanted else float("inf")
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return float("inf")
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(got, wanted) else float("inf")
    finite = wanted.isfinite()
    want = torch.where(finite, wanted, 0).float()
    off = torch.where(finite, got, 0).float() - want
    whole = _ratio(off.norm(), want.norm())
    if wanted.dim() < 2 or not wanted.numel():
        return whole
    rows, by_row = off.flatten(0, -2), want.flatten(0, -2)
    parts = (_worst(rows.norm(dim=dim), by_row.norm(dim=dim)) for dim in (0, 1))
    return max(whole, *(part / PARTS for part in parts))


def _ratio(off: Tensor, scale: Tensor) -> float:
    size = float(off)
    if size != size or size == float("inf"):
        return float("inf")
    return size / float(scale) if scale else (float("inf") if size else 0.0)


def _worst(off: Tensor, scale: Tensor) -> float:
    """The largest relative error of rows, or of columns; small ones are measured by the middle one."""
    least = scale[scale > 0].median() if bool((scale > 0).any()) else scale.sum()
    return float((off / scale.clamp_min(least)).nan_to_num(nan=0.0, posinf=float("inf")).max())


def tells(wanted: Any) -> bool:
    """Whether equality to this says anything: of floats that are all zero, or none finite, it does not."""
    if not isinstance(wanted, Tensor) or not wanted.is_floating_point():
        return True
    return bool((wanted.isfinite() & (wanted != 0)).any())
