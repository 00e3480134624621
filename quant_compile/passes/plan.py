"""What the passes read: the sites of one graph, what the policy decided for each, and how to choose kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from quant_compile.ir.attention import AttentionMiss, AttentionSite
from quant_compile.ir.batched import BatchedSite
from quant_compile.ir.experts import MoeSite
from quant_compile.ir.family import Reject
from quant_compile.ir.moe import MoeProblem
from quant_compile.ir.report import AttentionLine
from quant_compile.ir.scheme import Scheme
from quant_compile.ir.sites import LinearSite
from quant_compile.lowering.attention import AttentionChoice, AttentionProblem
from quant_compile.lowering.latent import LatentProblem
from quant_compile.lowering.moe import MoeDispatch
from quant_compile.lowering.registry import Problem
from quant_compile.lowering.select import Dispatch
from quant_compile.lowering.target import Target


@dataclass(frozen=True)
class SiteDecision:
    """What becomes of a site: a scheme, or kept (None), with the reason and the weight's name.

    ``refused``: it is kept although the policy names a scheme, so coverage counts it as asked for.
    ``guard``: why it is kept in this graph although it can have the scheme ``instead``: 16 bits are faster at its m.
    ``second``: of an expert block's second weight; None: the same.
    """

    scheme: Scheme | None
    reason: str
    name: str
    refused: bool = False
    guard: str = ""
    instead: Scheme | None = None
    second: SiteDecision | None = None

    @property
    def parts(self) -> tuple[SiteDecision, SiteDecision]:
        """Of an expert block's first and second weight."""
        return self, self.second or self

    @property
    def schemes(self) -> tuple[Scheme, Scheme] | None:
        """Those of an expert block's weights; None: it is kept."""
        first, second = (part.scheme for part in self.parts)
        return None if first is None or second is None else (first, second)

    @property
    def asked(self) -> Scheme | None:
        """The scheme that the weight has in this graph, or would have but for the guard."""
        return self.scheme or self.instead


@dataclass(frozen=True, eq=False)
class Plan:
    """The plan of one graph.

    Attributes:
        sites: in graph order.
        blocks: expert blocks, in graph order.
        batched: products with all experts, in graph order.
        decisions: node name of a site or of a block's result -> decision.
        choose: ``(problem, site name) -> Dispatch``; ``choose_moe`` likewise for blocks, ``choose_rows`` for batched products.
        scale_class: slot -> number; static input scales are equal where the numbers are.
        sums: ``(a rank's part, process group) -> None | Reject``: whether a sum over ranks is one kernel; None: none is.
        coded: codes that ranks send of other sums of quantized products, of ``ir.sums.CODES``; None: these stay as they were written.
        factor_class: slot -> number, of weights whose inputs have factors; these are equal where the numbers are.
        is_parameter: whether an argument position is a Parameter.
        share_quant: quantize an input once for all linears that read it.
        merge_siblings: one GEMM for linears that read one input.
        target: the device that is compiled for; None: inputs are quantized by the families' torch code alone.
        attention: in graph order; attention_misses: what looks like some and stays as it is.
        choose_attention: ``(problem, batch times tokens) -> AttentionChoice``; None: all attention stays as it was written.
        choose_latent: ``problem -> AttentionChoice`` for attention over latents; None: K and V are computed as they were written.
        replaced: node of a site that a pass replaced -> what stands in its place.
        absorbed: nodes of linears that attention has absorbed.
        expanded: node of an attention over latents that is none of them -> why its K and V are computed at each step.
    """

    sites: tuple[LinearSite, ...]
    decisions: Mapping[str, SiteDecision]
    choose: Callable[[Problem, str], Dispatch]
    is_parameter: Callable[[int], bool]
    scale_class: Mapping[int, int] = field(default_factory=dict)
    share_quant: bool = True
    merge_siblings: bool = True
    blocks: tuple[MoeSite, ...] = ()
    batched: tuple[BatchedSite, ...] = ()
    choose_moe: Callable[[MoeProblem, str], MoeDispatch] | None = None
    choose_rows: Callable[[Problem, str], Dispatch] | None = None
    target: Target | None = None
    attention: tuple[AttentionSite, ...] = ()
    attention_misses: tuple[AttentionMiss, ...] = ()
    choose_attention: Callable[[AttentionProblem, Any], AttentionChoice] | None = None
    choose_latent: Callable[[LatentProblem], AttentionChoice] | None = None
    replaced: dict[fx.Node, fx.Node] = field(default_factory=dict)
    absorbed: set[fx.Node] = field(default_factory=set)
    expanded: dict[fx.Node, str] = field(default_factory=dict)
    factor_class: Mapping[int, int] = field(default_factory=dict)
    sums: Callable[[Tensor, str], Reject | None] | None = None
    coded: str | None = None


@dataclass(frozen=True)
class NearMiss:
    """What a pass nearly did for the weights ``names``, and why not."""

    names: tuple[str, ...]
    reason: str


@dataclass
class PassReport:
    """What one pass did: rewritten nodes and refusals, in words; near misses are the refusals that concern particular weights."""

    name: str
    rewrote: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    dispatches: dict[tuple[int, ...], Dispatch | MoeDispatch] = field(default_factory=dict)
    attention: list[AttentionLine] = field(default_factory=list)
    near: list[NearMiss] = field(default_factory=list)

    def nearly(self, names: Iterable[str], reason: str) -> None:
        """Say why what would have helped the weights ``names`` was not done, where that is no refusal: the policy has it so."""
        self.near.append(NearMiss(tuple(names), reason))

    def miss(self, label: str, names: Iterable[str], reason: str) -> None:
        """Refuse what ``label`` names, which would have helped the weights ``names``."""
        self.refused.append(f"{label}: {reason}")
        self.near.append(NearMiss(tuple(names), reason))


def dispatches_of(reports: Iterable[PassReport]) -> dict[int, Dispatch | MoeDispatch]:
    """Slot of each weight that a kernel multiplies by -> its dispatch."""
    return {slot: dispatch for report in reports for slots, dispatch in report.dispatches.items() for slot in slots}
