"""What each group of weights costs under each scheme: the divergence of the logits, measured, or estimated from one backward.

``kl``: the model runs once over the batches for each group and scheme, with that group alone quantized.

``fisher``: labels are drawn from the model's own distribution, so that the expected square of their gradient is the Fisher
information F of the logits; half of the error of a product, weighted by F, is the divergence to second order:
``sum_t (g_t . (y_q - y)_t)^2 / 2`` over all positions t, g the gradient at the product. (Amari 1998; HAWQ and SqueezeLLM weight
by the same.) One forward and one backward for all groups and schemes, and a product for each.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from quant_compile.ir.scheme import Scheme
from quant_compile.measure.groups import Group
from quant_compile.measure.log import Log
from quant_compile.measure.outputs import Reference, kept_rows, logits_of
from quant_compile.model.follow import Meeting, eagerly, run_batch
from quant_compile.simulate import Chosen, Simulation, Values

KL, FISHER = "kl", "fisher"
METHODS = (KL, FISHER)
Cell = tuple[int, Scheme]
"""Index of a group, and a scheme."""


def measure(
    method: str, reference: Reference, groups: Sequence[Group], cells: Sequence[Cell], log: Log, progress: bool
) -> dict[Cell, float]:
    """Divergence of each cell, in nats; what the log knows is not measured again."""
    keys = {cell: log.key(method, [*groups[cell[0]].names, cell[1].spec]) for cell in cells}
    missing = [cell for cell in cells if keys[cell] not in log.known]

    def put(cell: Cell, value: float) -> None:
        log.put(keys[cell], value, group=groups[cell[0]].name, scheme=cell[1].spec, kind=method)

    if missing:
        by = _by_divergence if method == KL else _by_fisher
        by(reference, groups, missing, put, progress)
    return {cell: log.known[keys[cell]] for cell in cells}


Put = Callable[[Cell, float], None]


def _by_divergence(
    reference: Reference, groups: Sequence[Group], cells: Sequence[Cell], put: Put, progress: bool
) -> None:
    for cell in track(cells, "sensitivities", disable=not progress):
        index, scheme = cell
        # Values of one cell are of no use to the next.
        put(cell, reference.divergence(Simulation(groups[index].chosen(scheme), Values())))


def _by_fisher(reference: Reference, groups: Sequence[Group], cells: Sequence[Cell], put: Put, progress: bool) -> None:
    total: dict[Cell, float] = dict.fromkeys(cells, 0.0)
    group_of = {name: index for index, group in enumerate(groups) for name in group.names}
    schemes: dict[int, list[Scheme]] = {}
    for index, scheme in cells:
        schemes.setdefault(index, []).append(scheme)

    def add(found: Meeting, gradient: Tensor) -> None:
        name = found.made.weight
        index = group_of[name]
        weight = next(weight for weight in groups[index].weights if weight.site.names[0] == name)
        for scheme in schemes.get(index, ()):
            both = watching.compared(found, Chosen(weight, scheme))
            along = (gradient.float() * (both.quantized - both.plain)).sum(-1)
            total[index, scheme] += 0.5 * float(along.square().sum(dtype=torch.float64))

    watching = _Gradients([chosen for group in groups for chosen in group.chosen(cells[0][1])], add)
    model = reference.model
    for number, batch in enumerate(track(reference.batches, "gradients", disable=not progress)):
        with _frozen(model), watching:
            logits = kept_rows(logits_of(run_batch(model, batch)), batch).float()
            loss = _loss(logits, number)
        loss.backward()
    for cell, value in total.items():
        put(cell, value / reference.positions)


class _Gradients(Simulation):
    """Computes what the model does, and hands each product with a chosen weight to ``add`` with its gradient."""

    def __init__(self, chosen: Iterable[Chosen], add: Callable[[Meeting, Tensor], None]) -> None:
        super().__init__(chosen, Values())
        self.add = add

    def meet(self, meetings: list[Meeting]) -> Any:
        result: Tensor = meetings[0].call()
        if not result.requires_grad:  # the first products of the model; what follows is differentiated from here on
            result = result.detach().requires_grad_().clone()

        def hook(gradient: Tensor) -> None:
            with torch.no_grad():
                self.add(meetings[0], gradient)

        result.register_hook(hook)
        return result


def _loss(logits: Tensor, seed: int) -> Tensor:
    """Negative log-likelihood, summed, of labels drawn from the logits themselves."""
    generator = torch.Generator().manual_seed(seed)
    chance = logits.detach().softmax(-1).cpu()
    labels = torch.multinomial(chance, 1, generator=generator).squeeze(-1).to(logits.device)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


@contextmanager
def _frozen(model: nn.Module) -> Generator[None]:
    """With gradients, but not of Parameters; in eval mode, eagerly."""
    flags: Mapping[nn.Parameter, bool] = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for parameter in flags:
            parameter.requires_grad = False
        with eagerly(), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad = flag
        for module, was in training.items():
            module.training = was
