"""Put a model's calls and its ``generate`` on compiled code, and take that away again.

Only attributes of the instance are set, and ``generation_config.disable_compile``; ``uninstall`` puts back what was there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import count
from typing import Any

import torch
from torch import nn

from quant_compile.generation import caches
from quant_compile.generation.backward import BackwardHooks
from quant_compile.generation.blocks import (
    CALL,
    Active,
    BlockCall,
    Blocks,
    blocks_of,
    call_block,
    hooked,
    layer_names,
)
from quant_compile.generation.caches import PLAIN, Kept
from quant_compile.generation.calls import enter, noted
from quant_compile.generation.facts import cache_name, mixin
from quant_compile.generation.inputs import marked
from quant_compile.generation.lease import Names
from quant_compile.generation.loop import HOOKS, Loop
from quant_compile.generation.quantized import Scales
from quant_compile.generation.step import Step
from quant_compile.ir.errors import ExportError, PolicyWarning
from quant_compile.model.cache_scales import scales_of
from quant_compile.model.places import modules_of, parameters_of
from quant_compile.model.weights import linear_weights
from quant_compile.options import Options, PolicySource
from quant_compile.policy import Policy
from quant_compile.rules import strict_error
from quant_compile.runtime.outside import Outside
from quant_compile.runtime.profiling import unprofiled

RECORDED = ("auto", "reduce-overhead", "max-autotune")  # modes whose decode steps become CUDA graphs
WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
_NOTHING = object()
BYPASSED = (
    "torch.export does not see what a compiled model runs: the program would be the model in 16 bits.\n"
    "Fix: quant_compile.uncompile(model), then quant_compile.export(model, args, kwargs, policy)."
)


@dataclass(eq=False)
class Installed:
    """What was there before: (object, name, its value or nothing) in the order in which it was changed."""

    before: list[tuple[Any, str, Any]] = field(default_factory=list)
    loop: Loop | None = None

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of an instance."""
        self.before.append((owner, name, vars(owner).get(name, _NOTHING)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Put everything back."""
        for owner, name, value in reversed(self.before):
            if value is not _NOTHING:
                setattr(owner, name, value)
            elif name in vars(owner):
                delattr(owner, name)
        if self.loop is not None:
            self.loop.pool.clear()


def _run(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(args, kwargs)


# Where Dynamo gave up on a caller's frame, it is offered each frame within anew: nothing of ours is for it to trace.
unseen: Callable[..., Any] = torch.compiler.disable(_run)


class Call:
    """A compiled call of a module, and how to take it away.

    Attributes:
        run: the compiled function.
        installed: what was there before; on the model's own call only.
        outside: watches what runs outside of compiled graphs.
        active: whether blocks inside of the module are run one by one.
    """

    def __init__(
        self,
        module: nn.Module,
        run: Callable[..., Any],
        dynamic: bool,
        outside: Outside,
        installed: Installed | None = None,
        active: Active | None = None,
    ) -> None:
        self.run, self.installed, self.outside = run, installed, outside
        self._plain, self._dynamic, self._active = module._call_impl, dynamic, active

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_exporting():
            raise ExportError(BYPASSED)
        by_blocks = self._active is not None and self._active.depth
        if torch.compiler.is_dynamo_compiling() or by_blocks:  # part of a larger graph, or around smaller ones
            return self._plain(*args, **kwargs)
        return unseen(self.compiled, args, kwargs)

    def compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the compiled function, and what goes with it."""
        enter()
        if self._dynamic:
            kwargs = {name: marked(name, value) for name, value in kwargs.items()}
        if self.outside.due():
            with self.outside.watching():
                return self.run(*args, **kwargs)
        return self.run(*args, **kwargs)


def install(
    model: nn.Module,
    options: dict[str, Any],
    note: Callable[[str], None],
    *,
    dynamic: bool | None,
    fullgraph: bool,
) -> None:
    """Compile a model's calls in place.

    Args:
        options: of the backend.
        note: writes into the model's report.
        dynamic: as in torch.compile.
        fullgraph: as in torch.compile.

    Raises:
        MissingScalesError: the policy fixes the scales of K and V, and there are none; nothing has been changed.
    """
    parsed = Options.of(options)
    kept = _kept(model, parsed, note)
    uninstall(model)
    installed, outside = Installed(), Outside(model, options["policy"])
    arguments: dict[str, Any] = {"hooks": BackwardHooks(model), "dynamic": dynamic, "fullgraph": fullgraph}
    compiled = partial(_compiled, **arguments)
    compiled_function = partial(_compiled_function, options=_inside(options), **arguments)
    active = Active()
    kind = mixin(model)
    if kind is None:
        installed.set(model, CALL, Call(model, compiled(model, options), False, outside, installed))
        for part in _entered(model):
            installed.set(part, CALL, Call(part, compiled(part, options), False, outside))
        return
    name = cache_name(kind)
    records = parsed.mode in RECORDED
    found = blocks_of(model, parsed.policy) if _by_blocks(model, parsed) else None
    if found is None:
        inside = compiled(model, _inside(options))
        plain = inside if _inside(options) == options else compiled(model, options)
    else:
        plain = compiled(model, options)
        inside = _blockwise(model, found, active, plain, name, installed, compiled_function)
    prefix = "decoder_" if getattr(model.config, "is_encoder_decoder", False) else ""
    names = Names(f"{prefix}input_ids", f"{prefix}position_ids", f"{prefix}attention_mask", name)
    step = Step(inside, plain, names, dynamic is not False)
    installed.loop = Loop(model, step, note, records, kept)
    for part in _called_apart(model):
        around = found is not None and any(module is found.repeated[0][1] for module in part.modules())
        run = compiled(part, _inside(options))
        installed.set(part, CALL, Call(part, run, dynamic is not False, outside, active=active if around else None))
    installed.set(model, CALL, Call(model, step, False, outside, installed))
    for hook in HOOKS:
        installed.set(model, hook, installed.loop.hook(hook))
    config = getattr(model, "generation_config", None)
    if config is not None:
        # transformers would compile decode a second time, with its own backend.
        installed.set(config, "disable_compile", True)


def _kept(model: nn.Module, options: Options, note: Callable[[str], None]) -> Kept:
    """How ``generate`` keeps K and V.

    Raises:
        MissingScalesError: scales are fixed, and there are none.
    """
    rules = options.caches(options.policy)
    if rules is None:
        return PLAIN
    if mixin(model) is None:
        note(f"kv_cache has no effect: {type(model).__name__} does not generate")
        return PLAIN
    source, names = PolicySource(options.policy, ""), layer_names(model)
    _say_unused(options.policy, rules.unused(names), note)

    def scales(layer: str) -> Scales | None:
        scheme = rules.of(layer)
        found = None if scheme is None else source.cache_scales(layer, scheme)
        return scales_of(model, layer, scheme) if found is None else found

    return Kept.by(rules, names, scales)


def _say_unused(policy: Policy, patterns: Sequence[str], note: Callable[[str], None]) -> None:
    """Rules of the KV cache that name no layer.

    Raises:
        PolicyError: the policy is strict.
    """
    found = [f"kv_cache: no layer is named by the rule with match {pattern!r}" for pattern in patterns]
    if found and policy.strict:
        raise strict_error(
            policy, " and does not fit this model", found, "correct or remove these rules, or set strict: false."
        )
    for text in found:
        note(text)
        warnings.warn(f"{policy.source or policy.name}: {text}", PolicyWarning, stacklevel=4)


def kept_of(model: nn.Module) -> Kept:
    """How a compiled model's ``generate`` keeps K and V."""
    call = vars(model).get(CALL)
    installed = call.installed if isinstance(call, Call) else None
    return installed.loop.kept if installed is not None and installed.loop is not None else PLAIN


def _by_blocks(model: nn.Module, options: Options) -> bool:
    """Whether a model is compiled block by block: asked for, or where nobody sees what that costs the host."""
    if getattr(model.config, "is_encoder_decoder", False):
        return False
    if options.blocks is not None:
        return options.blocks
    return options.mode in RECORDED and any(parameter.is_cuda for parameter in model.parameters())


def _blockwise(
    model: nn.Module,
    found: Blocks,
    active: Active,
    whole: Callable[..., Any],
    cache: str,
    installed: Installed,
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> Callable[..., Any]:
    """A call of the model in which its blocks are compiled, one graph for all, and the rest is eager; with a cache of ours.

    Args:
        whole: the model compiled as one, for calls with any other cache.
        compiled: compiles a function.
    """
    run = compiled(call_block)
    for index, block in found.repeated:
        installed.set(block, CALL, BlockCall(block, index, cache, run, active))
    for module in found.single:
        installed.set(module, CALL, BlockCall(module, 0, cache, compiled(call_block), active))

    def call(*args: Any, **kwargs: Any) -> Any:
        if not isinstance(kwargs.get(cache), caches.types().static) or hooked(block for _, block in found.repeated):
            return whole(*args, **kwargs)
        with active:
            return model._call_impl(*args, **kwargs)

    return call


def uninstall(model: nn.Module) -> bool:
    """Take away what ``install`` has set; whether there was anything."""
    call = vars(model).get(CALL)
    if not isinstance(call, Call) or call.installed is None:
        return False
    call.installed.undo()
    return True


def outside_of(model: nn.Module) -> Outside | None:
    """What watches a compiled model's calls; None for a model that is not compiled."""
    call = vars(model).get(CALL)
    return call.outside if isinstance(call, Call) else None


def _inside(options: dict[str, Any]) -> dict[str, Any]:
    """The options for calls inside of ``generate``: without Inductor's CUDA graphs, where there are some of ours."""
    parsed = Options.of(options)
    made = dict(options)
    if parsed.mode in WITHOUT_GRAPHS:
        made["mode"] = WITHOUT_GRAPHS[parsed.mode]
    if parsed.mode in RECORDED and parsed.inductor.get("triton.cudagraphs"):
        made["inductor"] = {**parsed.inductor, "triton.cudagraphs": False}
    return made


def _compiled(module: nn.Module, options: dict[str, Any], **arguments: Any) -> Callable[..., Any]:
    """A module's call, compiled; also where forward is torch.nn's own (``nn.Sequential``): Dynamo enters that from other code only."""
    run = _compiled_function(module._call_impl, options, **arguments)
    return _with_recurrences(run) if any(isinstance(part, nn.RNNBase) for part in module.modules()) else run


def _compiled_function(
    call: Callable[..., Any], options: dict[str, Any], hooks: BackwardHooks, dynamic: bool | None, fullgraph: bool
) -> Callable[..., Any]:
    """A function, compiled; torch.compile is asked at the first call, since what torch imports for it takes as long as reading some GB."""
    own = _of_its_own(call)

    @lru_cache(maxsize=None)
    def run() -> Callable[..., Any]:
        with unprofiled():
            compiled = torch.compile(own, backend=noted, options=options, dynamic=dynamic, fullgraph=fullgraph)
        return hooks.out_of_sight(compiled)

    return lambda *args, **kwargs: run()(*args, **kwargs)


_COUNT = count()


def _of_its_own(call: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls another, with code that no other function has.

    Dynamo keeps what it has seen by the code that it entered, and ``Module._call_impl`` is that of every model: a number that
    differs between two models, as the scale of attention does, would be a symbol in the second one's graph, and no attention is matched
    whose scale is a symbol.
    """

    def around(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    around.__code__ = around.__code__.replace(co_name=f"call_{next(_COUNT)}")
    return around


def _with_recurrences(run: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled call during which Dynamo takes a recurrence for an op, instead of skipping the function that calls it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(allow_rnn=True):
            return run(*args, **kwargs)

    return call


def _entered(model: nn.Module) -> Iterator[nn.Module]:
    """Parts that other methods than ``forward`` may call (``encode``, ``get_image_features``): the modules right under a model.

    Where Dynamo skips the model's own frame, these are compiled each on its own instead. Bare linears are among them in models of
    transformers only, whose methods call projections: elsewhere ``model.forward(x)`` stays the plain one.
    """
    if type(model).__module__.startswith("torch.nn"):  # has no other methods
        return
    weighty = {id(weight.parameter) for weight in linear_weights(model)}
    for child in model.children():
        for part in child.children() if isinstance(child, nn.ModuleList | nn.ModuleDict) else (child,):
            bare = type(part).__module__.startswith("torch.nn") and not hasattr(model, "base_model")
            if not bare and any(id(parameter) in weighty for parameter in parameters_of(part)):
                yield part


def _called_apart(model: Any) -> Iterator[nn.Module]:
    """Parts that ``generate`` or a user calls by themselves: encoders, towers, the model under its head."""
    weighty = {weight.site.names[0] for weight in linear_weights(model)}
    base = getattr(model, "base_model", model)
    near = {*model.children(), *base.children(), base}
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
    for name, part in modules_of(model):
        wanted = part in near or part is encoder
        if (
            not wanted
            or part is model
            or isinstance(part, nn.ModuleList)
            or type(part).__module__.startswith("torch.nn")
        ):
            continue
        if any(weight.startswith(f"{name}.") for weight in weighty):
            yield part
