"""The torch.compile entry: validate, clone Dynamo's graph, run the pipeline, call Inductor, wrap the inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import exceptions_allowed_to_be_fallback
from torch.nn import Parameter

from quant_compile.ir.errors import GradModeError, GraphError, NoKernelError, OptionError
from quant_compile.ir.family import Reject
from quant_compile.ir.graph import copy_graph, planes_of
from quant_compile.ir.moe import MoeProblem
from quant_compile.lowering.expand import expanding
from quant_compile.lowering.guard import Chain, Rows, Verdict, compare
from quant_compile.lowering.moe import MoeDispatch, choose_moe, serves
from quant_compile.lowering.registry import Problem
from quant_compile.lowering.select import Dispatch, Request, choose
from quant_compile.lowering.sides import is_late
from quant_compile.lowering.target import Target, default_policy
from quant_compile.lowering.trace import analysed_once
from quant_compile.lowering.tune import begin, measured, serve, source_hash
from quant_compile.lowering.tune_guard import guard_times
from quant_compile.lowering.tune_moe import measured_moe
from quant_compile.model.names import walked_once
from quant_compile.options import Options, PolicySource
from quant_compile.runtime import Choosers, GraphRunner, native, recompiles


def sglquant(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend ``sglquant``.

    Args:
        gm: Dynamo's graph; never modified.
        example_inputs: its arguments; Parameters are the real ones.
        mode: an Inductor mode.
        options: see ``Options``.

    Raises:
        OptionError, PolicyError, GradModeError, NoKernelError, MissingScalesError: see their messages; Dynamo wraps them in
            BackendCompilerFailed.
    """
    parsed = Options.of(options, mode)
    _refuse_gradients(example_inputs)
    _refuse_freezing(gm)
    device = _device_of(example_inputs)
    target = Target.of(device)
    source = PolicySource(parsed.policy, default_policy(target))
    if target.device == "cuda":  # on a CPU a call's own work is longer
        native.build_ahead()
    choosers = choosers_of(parsed, source, target, device)
    runner = GraphRunner(gm, example_inputs, source, parsed, _inductor(parsed, target), choosers, target)
    with walked_once():
        runner.prepare()
        recompiles.watch(value for value in example_inputs if isinstance(value, Parameter))
    return runner


def choosers_of(options: Options, source: PolicySource, target: Target, device: torch.device) -> Choosers:
    """How kernels are chosen for graphs that run on a device; what is measured is measured there."""
    rows: dict[Problem, int | None] = {}
    return Choosers(
        _chooser(options, source, target, device, None, rows),
        _moe_chooser(options, source, target, device),
        _chooser(options, source, target, device, "rows", rows),
        _server(options, source, target, device),
        _comparer(options, source, target, device),
        _beginner(options, source, target, device, rows),
    )


def _refuse_gradients(inputs: Sequence[Any]) -> None:
    """Refuse a call with gradients; a gradient that the model's own code takes is none (its products stay, with that reason)."""
    wanted = [value for value in inputs if isinstance(value, torch.Tensor) and value.requires_grad]
    if torch.is_grad_enabled() and wanted:
        ours = any(isinstance(value, Parameter) for value in wanted)
        if not ours and _within_model_code():
            return
        frozen = "model" if ours else f"the input of shape {tuple(wanted[0].shape)}"
        raise GradModeError(
            "sglquant graphs are for inference: they have no backward, and gradients are enabled.\n"
            f"Fix: call the model under torch.inference_mode() or torch.no_grad(), or {frozen}.requires_grad_(False)."
        )


def _within_model_code() -> bool:
    """Whether Dynamo compiles a function that the model's code called, not the compiled call itself.

    torch 2.15 runs a function as it is, and compiles what it calls, where it breaks inside of a call with a ``with`` open.
    """
    frame = inspect.currentframe()
    homes = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    while frame is not None and frame.f_code.co_name != "compile_wrapper":
        if not frame.f_code.co_filename.startswith(homes):
            return True
        frame = frame.f_back
    return False


def _refuse_freezing(gm: fx.GraphModule) -> None:
    for node in gm.graph.find_nodes(op="get_attr"):
        value: Any = gm
        for part in str(node.target).split("."):
            value = getattr(value, part, None)
        if isinstance(value, Parameter) and value.dim() > 1:
            raise OptionError(
                f"the weight {node.target} is a constant of the graph (freezing), so nothing can be quantized.\n"
                "Fix: turn off torch._dynamo.config.prepare_freezing and torch._inductor.config.freezing, and keep "
                "torch._dynamo.config.inline_inbuilt_nn_modules on."
            )


def _device_of(inputs: Sequence[Any]) -> torch.device:
    """Device of the weights, else of the inputs; CPU for a graph without tensors."""
    tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
    devices = [value.device for value in tensors if isinstance(value, Parameter)] or [value.device for value in tensors]
    if any(device.type == "meta" for device in devices):
        raise GraphError(
            "the model is on the meta device and cannot run. Fix: load it onto a CPU or GPU first (to_empty + load_state_dict)."
        )
    return next((device for device in devices if device.type == "cuda"), torch.device("cpu"))


def _inductor(options: Options, target: Target) -> Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]:
    from torch._inductor import config

    # Sizes of planes are known, and Dynamo guards those of inputs: not to be checked again at every call.
    patches: dict[str, Any] = {"size_asserts": False}
    if target.device == "cuda":
        patches["split_reductions"] = False  # keeps act·mul + amax + quantize in one kernel at few rows
        if hasattr(config, "static_launch_user_defined_triton_kernels"):
            patches["static_launch_user_defined_triton_kernels"] = True  # without Triton's own, slow launcher
    if options.mode not in ("auto", "default"):
        patches |= torch._inductor.list_mode_options(options.mode)
    patches |= dict(options.inductor)

    def compile_graph(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        weights = planes_of(gm.graph)
        as_traced = None if weights else copy_graph(gm)  # Inductor may change the graph before it gives up
        try:
            with expanding(), analysed_once(), torch.compiler.config.patch(cache_key_tag=_cache_tag()):  # type: ignore[attr-defined]
                return compile_fx(gm, list(inputs), config_patches=patches or None)  # type: ignore[arg-type]
        except exceptions_allowed_to_be_fallback as error:
            # Dynamo answers these by running the whole frame eagerly, with all its linears in 16 bits, and in silence.
            if as_traced is not None:
                as_traced.real_recompile()  # here, since threads may call it at once
                return as_traced
            raise _cannot_compile(weights, error) from error

    return compile_graph


def _cannot_compile(weights: Sequence[str], error: Exception) -> GraphError:
    shown = ", ".join(weights[:6]) + (f" and {len(weights) - 6} more" if len(weights) > 6 else "")
    return GraphError(
        f"Inductor cannot compile a graph with the quantized weights {shown}: {error}\n"
        "Fix: take the operation out of the graph with torch._dynamo.graph_break() before and after it, or give these weights "
        "the scheme `keep` in rules: a graph without quantized weights runs eagerly."
    )


def _cache_tag() -> str:
    """The user's tag of compile caches and what decides what becomes of our ops: caches see the graph with the ops only."""
    tag = torch.compiler.config.cache_key_tag
    ours = f"sglquant-{source_hash()}{'-late' if is_late() else ''}"
    return tag if tag.endswith(ours) else f"{tag}{ours}"


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one, which kernels are tried and measured on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _moe_chooser(
    options: Options, source: PolicySource, target: Target, device: torch.device
) -> Callable[[MoeProblem, str], MoeDispatch]:
    def pick(problem: MoeProblem, name: str) -> MoeDispatch:
        request = options.request(source.policy)
        with _current(device):
            return choose_moe(problem, target, request, name, measured_moe(target, request.tune))

    return pick


def _chooser(
    options: Options,
    source: PolicySource,
    target: Target,
    device: torch.device,
    only: str | None = None,
    rows: Mapping[Problem, int | None] = MappingProxyType({}),
) -> Callable[[Problem, str], Dispatch]:
    estimated: dict[tuple[Problem, Request], Dispatch] = {}

    def pick(problem: Problem, name: str) -> Dispatch:
        request = options.request(source.policy)
        with _current(device):
            cost = measured(target, request.tune)
            chosen = estimated.get((problem, request)) if cost is None else None
            if chosen is None:
                chosen = choose(problem, target, request, name, cost, only)
            if cost is None:
                estimated[problem, request] = chosen
            if target.device == "cuda":
                serve(chosen, rows.get(problem), device)
            return chosen

    return pick


def _beginner(
    options: Options, source: PolicySource, target: Target, device: torch.device, rows: dict[Problem, int | None]
) -> Callable[[Mapping[Problem, int | None]], None]:
    def ahead(problems: Mapping[Problem, int | None]) -> None:
        rows.update(problems)
        request = options.request(source.policy)
        if request.kernels == "auto":  # with pins, what is measured is little
            begin(problems, target, request.tune, device)

    return ahead


def _server(
    options: Options, source: PolicySource, target: Target, device: torch.device
) -> Callable[[Problem | MoeProblem], bool]:
    def served(problem: Problem | MoeProblem) -> bool:
        with _current(device):
            return serves(problem, target, options.request(source.policy).unpinned)

    return served


def _comparer(
    options: Options, source: PolicySource, target: Target, device: torch.device
) -> Callable[[Chain, Rows, str], Verdict | Reject]:
    def compared(chain: Chain, rows: Rows, name: str) -> Verdict | Reject:
        request = options.request(source.policy)
        with _current(device):
            time = guard_times(target, request.tune, device)
            if isinstance(time, Reject):
                return time
            cost = measured(target, request.tune)
            try:
                chosen = [choose(problem, target, request, name, cost) for problem in chain.products]
            except NoKernelError as error:  # graphs that merge nothing may still have kernels
                return Reject(str(error).splitlines()[0])
            return compare(chain, chosen, rows, target, time)

    return compared
