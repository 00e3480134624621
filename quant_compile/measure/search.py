"""A scheme for every weight under a budget: what each choice costs is measured once, and an integer program chooses.

Reads the model and the batches; writes a policy file, and beside it the numbers that were measured, so that a search that was
killed goes on. The model is not changed.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import nn

from quant_compile.ir.errors import MeasureError, OptionError, PolicyError
from quant_compile.ir.family import family_of
from quant_compile.ir.scheme import Scheme
from quant_compile.measure import front as drawing
from quant_compile.measure.choose import BYTES, ERROR, MS, Option, choose, least, most, total
from quant_compile.measure.front import Point
from quant_compile.measure.groups import Found, Group, find_groups
from quant_compile.measure.latency import Latency
from quant_compile.measure.log import Log, subject_of
from quant_compile.measure.outputs import Reference, batches_hash, checked
from quant_compile.measure.rules import Decided, rules_of, scheme_text, text_of
from quant_compile.measure.sensitivity import KL, METHODS, measure
from quant_compile.measure.weights import all_weights
from quant_compile.model.distributed import refuse_parts
from quant_compile.model.places import parameters_of
from quant_compile.policy import Policy
from quant_compile.simulate import Simulation, Values

WIDTH = 170
BITS = "bits"
BUDGETS = (BITS, BYTES, MS, ERROR)
_INT4 = {"num_bits": 4, "type": "int", "strategy": "group"}
_SCHEMES: tuple[Any, ...] = (
    "W4A16",
    {"weights": {**_INT4, "group_size": 64}},
    {"weights": {**_INT4, "group_size": 32}},
    "NVFP4A16",
    "W8A16",
    {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}},
    "keep",
)
# How often an error budget is tightened where what was predicted is not what is measured.
_TRIES = 5


@dataclass(frozen=True)
class Choice:
    """What one group got.

    Attributes:
        weights: names.
        scheme: spec, or ``keep``.
        error: divergence with this group alone quantized, nats.
        bytes: of its weights.
        ms: at the profile.
    """

    weights: tuple[str, ...]
    scheme: str
    error: float
    bytes: int
    ms: float


@dataclass(frozen=True)
class Searched:
    """What a search found.

    Attributes:
        policy: as the file has it.
        path: the file.
        choices: one for each group, in the model's order.
        point: the choice as a whole.
        points: of other budgets, and of single schemes for all weights.
        positions: of the logits that were compared.
        how: how times were found; None without a profile.
    """

    policy: Policy
    path: Path
    choices: tuple[Choice, ...]
    point: Point
    points: tuple[Point, ...]
    positions: int
    how: str | None = None

    def table(self) -> Table:
        """The front, for people."""
        return drawing.table(self.points, self.how)

    def __str__(self) -> str:
        console = Console(width=WIDTH, highlight=False, file=io.StringIO())
        with console.capture() as captured:
            console.print(self.table())
            console.print(f"policy: {escape(str(self.path))}")
        return captured.get().rstrip()

    def plot(self, path: str | Path) -> Path:
        """Draw the front: ``.png`` through matplotlib, ``.html`` and ``.svg`` by themselves.

        Raises:
            MissingLibraryError: matplotlib is needed and not installed.
        """
        return drawing.plot(self.points, path, by_ms=self.how is not None)

    def to_json(self, path: str | Path | None = None) -> str:
        """Choices and points as JSON text, written to a file where one is named."""
        content = {
            "policy": str(self.path),
            "positions": self.positions,
            "times": self.how,
            "choices": [asdict(choice) for choice in self.choices],
            "points": [asdict(point) for point in self.points],
        }
        text = json.dumps(content, indent=2)
        if path is not None:
            Path(path).write_text(f"{text}\n", encoding="utf-8")
        return text


def search(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    budget: Mapping[str, float],
    schemes: Sequence[Any] | None = None,
    path: str | Path = "search.yaml",
    sensitivity: str = KL,
    m: Mapping[int, float] | None = None,
    target: str | None = None,
    tune: str = "quick",
    points: int = 8,
    progress: bool = True,
) -> Searched:
    """Pick a scheme, or none, for every weight so that the model's output changes least under a budget; write the policy.

    Siblings that read one input get one scheme, and so do the weights of an expert block. What conventions keep (output heads,
    router gates) stays kept.

    Args:
        model: with its weights in 16 bits or f32; it is run eagerly and not changed.
        batches: each a mapping (keyword arguments), a tuple (positional arguments) or one tensor.
        budget: one or more of ``bits`` (a decided weight has on average), ``bytes`` (of the whole model), ``ms`` (of linears and
            experts over ``m``), ``error`` (divergence in nats; then the fewest bytes are looked for, or ms where ``m`` is given).
        schemes: names, dicts of a custom scheme, Schemes, and ``"keep"``. Default: INT4 in groups of 128, 64 and 32, NVFP4 and 8
            bits under 16-bit inputs, and ``keep``.
        path: the policy file. What was measured is kept beside it, as ``<path>.jsonl``.
        sensitivity: ``kl``: one run over the batches for each group and scheme; ``fisher``: an estimate from one backward.
        m: number of rows -> how often it is run, e.g. ``{1: 128, 512: 1}``.
        target: whose kernels' estimates give times (``sm90``); default: the model's own device, where a GPU is measured.
        tune: ``quick`` or ``full``: measure a GPU's kernels; ``off``: their estimates.
        points: other budgets that the front shows.
        progress: show progress bars with the time left.

    Raises:
        OptionError: no batches, an unknown budget or scheme, or an option out of range.
        MeasureError: the budget cannot be met, no weight is reached, or the logits are NaN.
        MissingLibraryError: SciPy is not installed.
    """
    check_options(budget, sensitivity, m, points)
    refuse_parts(model, "search")
    candidates = _candidates(schemes)
    given = checked(batches)
    file = Path(path)
    if not file.parent.is_dir():
        raise OptionError(f"the folder {file.parent} of path does not exist. Fix: make it, or another path.")
    choose([[Option(None, 0.0, 0)]], {})  # whether SciPy is here, before anything takes time
    latency = Latency.of(model, m, target, tune) if m else None
    reference = Reference(model, given)
    found = find_groups(model, given)
    log = Log(file.with_suffix(file.suffix + ".jsonl"), subject_of(model, batches_hash(given), _versions()))
    state = _Search(reference, found, log, latency, progress)
    state.options = state.measure_options(candidates, sensitivity)
    chosen, measured = state.meet(budget)
    point = replace(state.point("search", chosen, measured), chosen=True)
    others = [*state.front(points, budget), *state.uniform(candidates)]
    text = state.text(file.stem, chosen, point, budget, sensitivity)
    policy = _written(file, text, model, state.decided(chosen))
    choices = tuple(state.choice(group, option) for group, option in zip(found.groups, chosen, strict=True))
    how = latency.how if latency else None
    return Searched(policy, file, choices, point, (point, *others), reference.positions, how)


class _Search:
    """What a search knows of a model."""

    def __init__(self, reference: Reference, found: Found, log: Log, latency: Latency | None, progress: bool) -> None:
        self.reference, self.groups, self.unreached = reference, found.groups, found.unreached
        self.log, self.latency, self.progress = log, latency, progress
        self.options: list[list[Option]] = []
        self.elements = sum(group.elements for group in self.groups)
        before = sum(group.bytes_as(None) for group in self.groups)
        self.other_bytes = sum(parameter.nbytes for parameter in parameters_of(reference.model)) - before

    def measure_options(self, candidates: Sequence[Scheme | None], method: str) -> list[list[Option]]:
        """What each group may have, and what that costs.

        Raises:
            MeasureError: a group can have none of the schemes.
        """
        able = [
            [scheme for scheme in candidates if group.refuses(scheme) is None and self._runs(group, scheme)]
            for group in self.groups
        ]
        for group, schemes in zip(self.groups, able, strict=True):
            if not schemes:
                raise MeasureError(
                    f"{group.name} can have none of the schemes: {group.refuses(candidates[0]) or 'no kernel runs them'}.\n"
                    'Fix: add "keep", or a scheme that it can have, to schemes.'
                )
        cells = [(index, scheme) for index, schemes in enumerate(able) for scheme in schemes if scheme is not None]
        errors = measure(method, self.reference, self.groups, cells, self.log, self.progress)
        return [
            [self._option(group, scheme, errors[index, scheme] if scheme else 0.0) for scheme in schemes]
            for index, (group, schemes) in enumerate(zip(self.groups, able, strict=True))
        ]

    def _runs(self, group: Group, scheme: Scheme | None) -> bool:
        """Whether the target has a kernel, where times are asked for."""
        return self.latency is None or not isinstance(self.latency.ms(group, scheme), str)

    def _option(self, group: Group, scheme: Scheme | None, error: float) -> Option:
        ms = self.latency.ms(group, scheme) if self.latency else 0.0
        return Option(scheme, error, group.bytes_as(scheme), 0.0 if isinstance(ms, str) else ms)

    def limits(self, budget: Mapping[str, float]) -> dict[str, float]:
        """Of what is summed over groups."""
        out = {what: float(budget[what]) for what in (MS, ERROR) if what in budget}
        sizes = [budget[BITS] * self.elements / 8] if BITS in budget else []
        sizes += [budget[BYTES] - self.other_bytes] if BYTES in budget else []
        if sizes:
            out[BYTES] = min(sizes)
        return out

    def meet(self, budget: Mapping[str, float]) -> tuple[list[Option], float]:
        """The choice and its measured divergence; one that an error budget does not hold is made again with less.

        Raises:
            MeasureError: nothing meets the budget.
        """
        limits = self.limits(budget)
        self._explain(limits, budget)
        goal = ERROR if ERROR not in limits else MS if self.latency else BYTES
        for _ in range(_TRIES):
            chosen = choose(self.options, limits, goal)
            measured = self.measured(chosen)
            wanted = budget.get(ERROR, math.inf)
            if measured <= wanted:
                return chosen, measured
            limits[ERROR] *= 0.9 * wanted / measured
        raise MeasureError(
            f"an error of {budget[ERROR]:.4g} nats could not be met: the nearest choice has {measured:.4g} nats.\n"  # pyright: ignore[reportPossiblyUnboundVariable]
            'Fix: a larger error, or "keep" and 8-bit schemes among schemes.'
        )

    def _explain(self, limits: Mapping[str, float], budget: Mapping[str, float]) -> None:
        """Refuse bits and bytes that are too few in the user's own unit."""
        smallest = least(self.options, BYTES)
        if BYTES not in limits or smallest <= limits[BYTES] * (1 + 1e-9):
            return
        if BITS in budget and budget[BITS] * self.elements / 8 < smallest:
            lowest = math.ceil(1000 * 8 * smallest / self.elements) / 1000
            raise MeasureError(
                f"the budget of {budget[BITS]:g} bits cannot be met: with these schemes a weight has at least {lowest:g} bits.\n"
                f"Fix: a budget of {lowest:g} or more, or schemes with fewer bits."
            )
        raise MeasureError(
            f"the budget of {budget[BYTES]:,.0f} bytes cannot be met: with these schemes the model has at least "
            f"{self.other_bytes + smallest:,.0f} bytes, {self.other_bytes:,} of which are embeddings and the like.\n"
            f"Fix: a budget of {math.ceil(self.other_bytes + smallest)} or more, or schemes with fewer bits."
        )

    def measured(self, chosen: Sequence[Option]) -> float:
        """Divergence of the model with all groups as chosen."""
        specs = [scheme_text(option.scheme) for option in chosen]
        names = [" ".join(group.names) for group in self.groups]
        key = self.log.key("whole", [f"{name} {spec}" for name, spec in zip(names, specs, strict=True)])
        if key not in self.log.known:
            weights = [
                each
                for group, option in zip(self.groups, chosen, strict=True)
                if option.scheme is not None
                for each in group.chosen(option.scheme)
            ]
            self.log.put(key, self.reference.divergence(Simulation(weights, Values())), kind="whole")
        return self.log.known[key]

    def point(self, label: str, chosen: Sequence[Option], measured: float | None) -> Point:
        """A choice as a whole."""
        size = round(total(chosen, BYTES))
        ms = total(chosen, MS) if self.latency else None
        return Point(label, 8 * size / self.elements, self.other_bytes + size, total(chosen, ERROR), measured, ms)

    def front(self, count: int, budget: Mapping[str, float]) -> list[Point]:
        """Choices for budgets from the least to twice the one that was asked for."""
        what = MS if self.latency and BITS not in budget and BYTES not in budget else BYTES
        low, high = least(self.options, what), most(self.options, what)
        high = min(high, 2.2 * low)
        out: dict[tuple[str, ...], Point] = {}
        steps = [low + (high - low) * index / max(1, count - 1) for index in range(count)]
        for limit in track(steps, "the front", disable=not self.progress or not count):
            chosen = choose(self.options, {what: limit * (1 + 1e-9)})
            specs = tuple(scheme_text(option.scheme) for option in chosen)
            if specs not in out:
                out[specs] = self.point("search", chosen, self.measured(chosen))
        return list(out.values())

    def uniform(self, candidates: Sequence[Scheme | None]) -> list[Point]:
        """One scheme for all groups that can have it."""
        out: list[Point] = []
        for scheme in candidates:
            if scheme is None:
                continue
            chosen = [next((o for o in group if o.scheme == scheme), None) for group in self.options]
            if all(option is not None for option in chosen):
                own = [option for option in chosen if option is not None]
                out.append(self.point(scheme.spec, own, self.measured(own)))
        return out

    def choice(self, group: Group, option: Option) -> Choice:
        """For people and JSON."""
        spec = option.scheme.spec if option.scheme else "keep"
        return Choice(group.names, spec, option.error, option.bytes, option.ms)

    def decided(self, chosen: Sequence[Option]) -> list[Decided]:
        """Weight by weight; the parts of a group share its costs by size. Weights that no batch used are kept."""
        out: list[Decided] = []
        for group, option in zip(self.groups, chosen, strict=True):
            for weight in group.weights:
                count = weight.parameter.numel()
                part = count / group.elements
                block = weight.site.blocks[0] if weight.site.blocks else ""
                size, took = round(option.bytes * part), option.ms * part
                name = weight.site.names[0]
                out.append(Decided(name, block, option.scheme, option.error * part, size, count, took))
        for weight in self.unreached:
            block = weight.site.blocks[0] if weight.site.blocks else ""
            out.append(
                Decided(weight.site.names[0], block, None, 0.0, weight.parameter.nbytes, weight.parameter.numel())
            )
        return out

    def text(self, name: str, chosen: Sequence[Option], point: Point, budget: Mapping[str, float], method: str) -> str:
        """The policy file."""
        words = ", ".join(f"{what} {value:g}" for what, value in budget.items())
        predicted = f"{point.predicted:.3g} by the sum of the parts"
        head = [
            f"Found by sglquant search under a budget of {words}.",
            f"KL to the model as it is: {point.measured:.4g} nats, measured over {self.reference.positions} positions ({predicted}).",
            f"{point.bits:.3f} bits a weight; the model has {point.bytes / 1e6:,.2f} MB.",
        ]
        if self.latency is not None:
            head.append(f"{point.ms:.4g} ms of linears and experts, {self.latency.how}.")
        if self.unreached:
            head.append(f"Not reached by any batch, and kept: {len(self.unreached)} weights.")
        way = "alone, summed" if method == KL else "alone, summed, by Fisher information"
        head.append(f"Beside each rule: KL of the weights that it decides ({way}), their bits and MB.")

        def cost(members: Sequence[Decided]) -> str:
            size, count = sum(member.bytes for member in members), sum(member.elements for member in members)
            error, took = sum(member.error for member in members), sum(member.ms for member in members)
            ms = f", {took:.3g} ms" if self.latency else ""
            return f"KL {error:.3g}, {8 * size / count:.3g} bits, {size / 1e6:,.2f} MB{ms}"

        decided = self.decided(chosen)
        known = {each.name for each in decided}
        others = [weight.site.names for weight in all_weights(self.reference.model)]
        kept = [name for names in others if names[0] not in known for name in names]
        return text_of(rules_of(decided, kept), name, head, cost)


def _written(file: Path, text: str, model: nn.Module, decided: Sequence[Decided]) -> Policy:
    """Write the file, and see that it decides what was chosen."""
    file.write_text(text, encoding="utf-8")
    policy = Policy.load(file)
    wanted = {each.name: each.scheme for each in decided}
    for weight in all_weights(model):
        name = weight.site.names[0]
        found = policy.decide(weight.site)
        if found.scheme != wanted.get(name) and weight.parameter.is_floating_point():
            raise PolicyError(
                f"{file}: {name} gets {found.scheme}, not {wanted.get(name)}; this is a defect of search."
            )
    return policy


def check_options(budget: Any, sensitivity: str, m: Any, points: int) -> None:
    """Refuse what no search can have, before a model is loaded.

    Raises:
        OptionError: a budget, the sensitivity, or how many points.
    """
    if not isinstance(budget, Mapping) or not budget:
        raise OptionError(f"budget must be a mapping such as {{'bits': 4.5}}, got {budget!r}.")
    for what, value in budget.items():
        if what not in BUDGETS:
            raise OptionError(f"unknown budget {what!r}. Fix: one of {', '.join(BUDGETS)}.")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise OptionError(f"the budget of {what} must be a number above 0, got {value!r}.")
    if MS in budget and not m:
        raise OptionError("a budget in ms needs m. Fix: m={1: 128, 512: 1}, how often each number of rows is run.")
    if sensitivity not in METHODS:
        raise OptionError(f"sensitivity must be {' or '.join(METHODS)}, got {sensitivity!r}.")
    if points < 0:
        raise OptionError(f"points must be 0 or more, got {points}.")


def _candidates(schemes: Sequence[Any] | None) -> list[Scheme | None]:
    """Schemes, None for ``keep``; each once.

    Raises:
        OptionError: one is unknown, static, or made by checkpoints alone.
    """
    if isinstance(schemes, str | Mapping):
        raise OptionError(f"schemes must be a list, got {schemes!r}. Fix: [{schemes!r}].")
    out: dict[Scheme | None, None] = {}
    for given in _SCHEMES if schemes is None else schemes:
        try:
            scheme = Policy.load({"default": given}).default
        except PolicyError as error:
            raise OptionError(f"schemes: {error}") from None
        refusal = None if scheme is None else family_of(scheme).quantizes(scheme)
        if scheme is not None and refusal is not None:
            raise OptionError(f"schemes: nothing here quantizes to {scheme.spec}: {refusal.reason}")
        if scheme is not None and scheme.static:
            raise OptionError(
                f"schemes: {scheme.spec} needs calibrated input scales, which a search does not have. Fix: a scheme whose inputs "
                "are dynamic or in 16 bits."
            )
        out.setdefault(scheme)
    if not out:
        raise OptionError("no schemes were given. Fix: leave schemes out for the default ones.")
    return list(out)


def _versions() -> str:
    """Of what numbers depend on besides the model and the batches."""
    import torch

    from quant_compile.lowering.tune import source_hash

    return f"{torch.__version__} {source_hash()}"
