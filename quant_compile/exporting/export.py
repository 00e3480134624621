"""``export``: a model to a quantized program, by the passes that compiled graphs go through.

Reads the model and example arguments; packs planes as a first call would. The model itself stays what it is: planes belong to
the program, and the ledger forgets what it was told.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from quant_compile.backend import choosers_of
from quant_compile.exporting.exported import Exported, require_self_contained
from quant_compile.exporting.program import exported_program, uses_of
from quant_compile.exporting.traced import Call, Traced
from quant_compile.generation import outside_of
from quant_compile.ir.errors import ExportError, GradModeError, OptionError, WeightError
from quant_compile.lowering.target import Target, default_policy
from quant_compile.lowering.weights import STORE
from quant_compile.model import names as naming
from quant_compile.model.ledger import LEDGER
from quant_compile.model.places import parameters_of, unwrap
from quant_compile.options import Options, PolicySource
from quant_compile.policy import KEEP
from quant_compile.runtime import GraphRunner

NOT_REPLAYED = "verify: true is not applied: a program is exported without a call whose inputs could be replayed"
AS_WRITTEN = (
    "attention stays as the model wrote it: calls choose sizes of this program, which blocks of a mask would fix"
)
# Options of ``compile`` that mean something for a program; the others are about calls and generate().
OPTIONS = ("kernels", "tune", "attention", "inductor")


def export(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    policy: Any = None,
    *,
    dynamic_shapes: Any = None,
    strict: bool = False,
    self_contained: bool = False,
    **options: Any,
) -> Exported:
    """Trace a model with ``torch.export`` and quantize the program; the model stays as it is.

    Args:
        model: any nn.Module in eval mode with its weights loaded, not compiled.
        args: example arguments by position.
        kwargs: example arguments by name.
        policy: as in ``quant_compile.compile``.
        dynamic_shapes: as in ``torch.export.export``; sizes that are not named are fixed.
        strict: as in ``torch.export.export``: trace by Dynamo.
        self_contained: refuse kernels that a process cannot run without quant_compile.
        options: ``kernels``, ``tune``, ``attention``, ``inductor``, as in ``quant_compile.compile``.

    Returns:
        The program, its report, and how to package it.

    Raises:
        ExportError: the model is compiled or training, the arguments do not fit, or torch cannot trace it.
        OptionError, PolicyError, WeightError, NoKernelError: as in ``quant_compile.compile``.
    """
    parsed = _options(options, policy)
    call = Call(tuple(args), dict(kwargs or {}), dynamic_shapes, strict)
    _check_model(model)
    model = unwrap(model)
    call.check(model)
    _check_inputs(call)
    device = next((p.device for p in model.parameters() if p.is_cuda), torch.device("cpu"))
    target = Target.of(device)
    source = PolicySource(parsed.policy, default_policy(target))
    problems = source.policy.resolve(model).problems
    traced = Traced.of(model, call)
    with _remembered(model), torch.no_grad():
        LEDGER.session(model, source.policy, target.label).notes.update(dict.fromkeys(problems))
        if parsed.verifies(source.policy):
            LEDGER.session(model, source.policy, target.label).notes[NOT_REPLAYED] = None
        if target.device != "cpu" and parsed.attends(source.policy) and _has_free_sizes(traced):
            parsed = replace(parsed, attention=KEEP)
            LEDGER.session(model, source.policy, target.label).notes[AS_WRITTEN] = None
        choosers = choosers_of(parsed, source, target, device)
        runner = GraphRunner(
            traced.graph, traced.inputs, source, parsed, lambda gm, inputs: gm.forward, choosers, target
        )
        uses = uses_of(runner.prepare().graph.graph)
        if self_contained:
            require_self_contained(uses)
        binding = runner.bind(tuple(value for value in traced.inputs if isinstance(value, Parameter)))
        program, planes = exported_program(traced, binding.variant.graph, binding.planes, model, call)
        report = LEDGER.report(model)
    return Exported(program, report, uses, planes, dict(parsed.inductor))


def _has_free_sizes(traced: Traced) -> bool:
    """Whether an input of the program has a size that calls choose."""
    return any(isinstance(size, torch.SymInt) for x in traced.inputs if isinstance(x, Tensor) for size in x.shape)


def _options(options: Mapping[str, Any], policy: Any) -> Options:
    """Options of a program, which neither releases weights nor leaves linears in 16 bits by the m of a graph."""
    for key in options:
        if key not in OPTIONS:
            raise OptionError(f"export has no option {key!r}; valid options: {', '.join(OPTIONS)}")
    return replace(Options.of({**options, "policy": policy}), release_weights=False, guard=False)


def _check_model(model: nn.Module) -> None:
    """Refuse what cannot be exported.

    Raises:
        ExportError: the model is compiled, training, or no module.
        WeightError: weights have no values.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ExportError(f"a model is an nn.Module, got {type(model).__name__}.")
    inner = unwrap(model)
    if any(outside_of(module) is not None for module in (model, *inner.modules())):
        raise ExportError(
            f"{type(inner).__name__} is compiled, and export traces the untouched model.\n"
            "Fix: quant_compile.uncompile(model) first."
        )
    if inner.training:
        raise ExportError(f"{type(inner).__name__} is in training mode. Fix: model.eval().")
    for name, parameter in inner.named_parameters():
        if is_lazy(parameter):
            raise WeightError(f"{name} has no shape yet (a lazy module). Fix: call the model once before exporting it.")
        if parameter.is_meta:
            raise WeightError(f"{name} is on the meta device and has no values. Fix: load the weights first.")
        entry = STORE.peek(parameter)
        if entry is not None and entry.released:
            raise WeightError(
                f"the values of {name} were released after quantization.\n"
                "Fix: quant_compile.restore(model, source) and quant_compile.uncompile(model) first."
            )


def _check_inputs(call: Call) -> None:
    """Refuse inputs that ask for gradients.

    Raises:
        GradModeError: one does.
    """
    for value in pytree.tree_leaves((call.args, call.kwargs)):
        if isinstance(value, Tensor) and value.requires_grad:
            raise GradModeError(
                f"the input of shape {tuple(value.shape)} requires gradients, and quantized programs have no backward.\n"
                "Fix: input.detach()."
            )


@contextmanager
def _remembered(model: nn.Module) -> Generator[None]:
    """Names for the model's weights; afterwards the store and the ledger know of them what they knew before."""
    naming.register(model)
    with LEDGER.aside(model):
        try:
            yield
        finally:
            STORE.refresh(parameters_of(model))
