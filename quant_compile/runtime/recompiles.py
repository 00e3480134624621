"""Keep torch from giving up on a function: past its recompile limit it runs eagerly, in 16 bits, with nothing but a line in a log.

torch asks a hook before each compilation, in the thread that compiles, where its limits are read (from torch 2.12 on each thread
has limits of its own). Here the limit is raised as far as the accumulated limit goes; where that is reached, the ledger hears
of it, and a strict policy raises. Reads the frame of torch's compilation; writes Dynamo's config and the ledger.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from types import CodeType
from typing import Any

from torch import nn

from quant_compile.ir.errors import PolicyError, RecompileLimitWarning
from quant_compile.lowering.target import Target, default_policy
from quant_compile.model.ledger import LEDGER
from quant_compile.model.names import Owners
from quant_compile.model.weights import linear_weights
from quant_compile.options import Options, PolicySource
from quant_compile.rules import Decides

_MODELS: weakref.WeakKeyDictionary[CodeType, weakref.WeakSet[nn.Module]] = weakref.WeakKeyDictionary()


def watch(parameters: Iterable[nn.Parameter]) -> None:
    """See to it that torch asks us, and remember which model the code that is being compiled belongs to."""
    from torch._dynamo import utils

    if _before_compiling not in (utils.get_hook_for_recompile_user_context() or ()):
        utils.register_hook_for_recompile_user_context(_before_compiling)
    frame = _compilation()
    if frame is not None:
        _MODELS[frame["code"]] = weakref.WeakSet(Owners.of(parameters).models)


def _before_compiling() -> str:
    """What torch calls; it keeps the text that it gets with its metrics, and there is none."""
    from torch._dynamo.cache_size import exceeds_recompile_limit

    frame = _compilation()
    options = None if frame is None else _options_of(frame["compiler_fn"])
    if frame is None or options is None:
        return ""
    exceeded, which = exceeds_recompile_limit(frame["cache_size"], frame["compile_id"])
    if exceeded:
        profile = sys.getprofile()
        sys.setprofile(None)  # who watches what the model's call runs would take what is done here for a part of it
        try:
            _raise_limit(frame, options, which)
        finally:
            sys.setprofile(profile)
    return ""


def _raise_limit(frame: Mapping[str, Any], options: Mapping[str, Any], which: str) -> None:
    from torch._dynamo import config

    code, limit = frame["code"], config.recompile_limit
    count = frame["cache_size"].num_cache_entries
    text = f"{code.co_qualname} has been compiled {count} times, which is torch._dynamo.config.{which}"
    raised = min(max(limit * 2, count + 1), config.accumulated_recompile_limit)
    lost = which != "recompile_limit" or raised <= limit
    if lost:
        text += (
            "; further variants run eagerly and UNQUANTIZED. Fix: compile the whole model, or raise "
            "torch._dynamo.config.accumulated_recompile_limit."
        )
    else:
        config.recompile_limit = raised
        text += f"; raised it to {raised}, since further calls would run unquantized. Compiling the whole model needs fewer graphs."
    _tell(frame, options, text, lost)


def _compilation() -> Mapping[str, Any] | None:
    """Local variables of torch's function that compiles a frame, in this thread now."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_compile" and frame.f_code.co_filename.endswith("convert_frame.py"):
            return frame.f_locals
        frame = frame.f_back
    return None


def _options_of(compiler: Any) -> Mapping[str, Any] | None:
    """``mode`` and ``options`` of a backend that is ours; None for any other."""
    while hasattr(compiler, "_torchdynamo_orig_backend"):
        compiler = compiler._torchdynamo_orig_backend
    given: dict[str, Any] = {}
    if hasattr(compiler, "compiler_fn"):
        given, compiler = dict(getattr(compiler, "kwargs", {})), compiler.compiler_fn
    if isinstance(compiler, partial):
        given, compiler = {**compiler.keywords, **given}, compiler.func
    ours = str(getattr(compiler, "__module__", "")).startswith("quant_compile.")
    return {key: given.get(key) for key in ("mode", "options")} if ours else None


def _tell(frame: Mapping[str, Any], options: Mapping[str, Any], text: str, lost: bool) -> None:
    """Warn, and note it for the model; ``lost``: weights that the frame reads run unquantized from here on.

    Raises:
        PolicyError: they are lost, and the policy is strict.
    """
    modules = [value for value in frame["locals"].values() if isinstance(value, nn.Module)]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    models = Owners.of(parameters).models or tuple(_MODELS.get(frame["code"], ()))
    target = Target.of(next((p.device for p in parameters if p.is_cuda), "cpu"))
    policy = PolicySource(Options.of(options["options"], options["mode"]).policy, default_policy(target)).policy
    if lost and policy.strict:
        raise PolicyError(f"{policy.source or policy.name}: the policy is strict, and {text}")
    warnings.warn(text, RecompileLimitWarning, stacklevel=3)
    for model in models:
        LEDGER.session(model, policy, target.label).notes[text] = None
    if lost:
        _miss(modules or models, models, policy)


def _miss(modules: Iterable[nn.Module], models: Iterable[nn.Module], policy: Decides) -> None:
    """Write to the ledger that some calls read the weights of ``modules`` as they are."""
    sites = {id(weight.parameter): weight.site for model in models for weight in linear_weights(model)}
    for module in modules:
        for weight in linear_weights(module):
            record = LEDGER.record(weight.parameter)
            record.misses["torch's recompile limit is reached, so some calls run eagerly"] = None
            decision = policy.decide(sites.get(id(weight.parameter), weight.site))
            record.named = decision.scheme is not None or decision.refused
