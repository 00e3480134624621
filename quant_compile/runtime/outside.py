"""What a model's calls run outside of compiled graphs: frames that Dynamo skipped, broke off or was told to leave alone.

A backend hears of graphs only. So a model's first calls, and each call after one for which Dynamo compiled something, are watched by
Python's own profile hook: a module's function that runs as it was written, and not as Dynamo's translation of it, runs unquantized.
The hook is off while Dynamo compiles, and in all other calls.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import nn
from torch._dynamo import eval_frame
from torch._dynamo import utils as dynamo
from torch.nn import functional

from quant_compile.lowering.identity import local_of
from quant_compile.model.ledger import LEDGER
from quant_compile.model.names import names_in
from quant_compile.model.weights import linear_weights, possible_weights
from quant_compile.rules import Decides, strict_error
from quant_compile.runtime.call import GraphRunner
from quant_compile.runtime.profiling import profiled

_NEVER = {"extra_repr", "reset_parameters", "_apply", "_load_from_state_dict", "_save_to_state_dict", "_init_weights"}
_SKIPPED: dict[tuple[str, int], str] = {}  # (file, line) of a function -> why Dynamo would not compile it


@dataclass(frozen=True, eq=False)
class _Ran:
    """A function that ran as it was written: a module's, or any other that was given ``parameters``."""

    module: nn.Module | None
    code: CodeType
    parameters: tuple[nn.Parameter, ...] = ()
    called: str = ""


class _Seen(threading.local):
    ran: dict[Any, _Ran] | None = None
    inside: int = 0


class Outside:
    """Watches the calls of one model.

    Args:
        model: held weakly.
        policy: what its weights should become; a strict one makes reads outside of graphs an error.
    """

    def __init__(self, model: nn.Module, policy: Decides) -> None:
        self._model, self._policy = weakref.ref(model), policy
        self._seen = _Seen()
        self._frames = -1
        self._codes: dict[int, CodeType] = {}  # by id: code that Dynamo wrote may hold constants without a hash

    def due(self) -> bool:
        """Whether the next call is to be watched: the first, and after Dynamo was at work."""
        return self._frames != _frames() and self._seen.ran is None and sys.getprofile() is None

    @contextmanager
    def watching(self) -> Generator[None]:
        """Watch one call.

        Raises:
            PolicyError: the policy is strict, and the call read a weight that it names outside of compiled graphs.
        """
        self._codes = self._codes or _codes(self._model())
        self._frames = _frames()
        ran: dict[Any, _Ran] = {}
        self._seen.ran, self._seen.inside = ran, 0
        with profiled(self._look):
            try:
                yield
            finally:
                self._seen.ran = None
        model = self._model()
        if model is not None:
            self._settle(model, list(ran.values()))

    def _look(self, frame: FrameType, event: str, _: Any) -> None:
        ran, code = self._seen.ran, frame.f_code
        if code is _GRAPH:  # whatever runs below is the graph's own
            self._seen.inside += {"call": 1, "return": -1}.get(event, 0)
        if event != "call" or ran is None or self._seen.inside:
            return
        if id(code) in self._codes:
            module = frame.f_locals.get(code.co_varnames[0])
            if isinstance(module, nn.Module):
                ran.setdefault((id(module), id(code)), _Ran(module, code))
        elif _may_multiply(code):
            given = frame.f_locals
            if any(_is_ours(value) for value in given.values()):  # on its way to a graph, through wrappers of Dynamo's
                return
            function = given.get("fn") if code.co_filename == _DYNAMO else None
            values = [*given.values(), *given.get("args", ()), *given.get("kwargs", {}).values()]
            found = tuple(value for value in values if isinstance(value, nn.Parameter) and value.dim() > 1)
            if found:
                name = getattr(function, "__name__", code.co_name)
                ran.setdefault((id(code), *map(id, found)), _Ran(None, code, found, name))

    def _settle(self, model: nn.Module, ran: list[_Ran]) -> None:
        """Write what ran outside to the ledger.

        Raises:
            PolicyError: the policy is strict, and a weight that it names was read there.
        """
        if not ran:
            return
        _note_skips()
        weights = {id(w.parameter): w for w in [*possible_weights(model), *linear_weights(model)]}
        against, names = dict[str, None](), names_in(model)
        for found in ran:
            for parameter in map(local_of, _read_by(found)):
                weight = weights.get(id(parameter))
                if weight is None or weight.in_embedding:
                    continue
                decision = self._policy.decide(weight.site)
                record = LEDGER.record(parameter)
                if decision.scheme is None:
                    record.reason = record.reason or decision.reason
                    record.named |= decision.refused
                    continue
                reason = _reason(found, ran)
                record.named = True
                record.misses[reason] = None
                against[f"{names[id(parameter)].full[0]}: {reason}"] = None
        if against and self._policy.strict:
            what = ", and weights were read outside of the compiled graph"
            fix = "change the model's code at the place named, give them `keep` in a rule, or set strict: false."
            raise strict_error(self._policy, what, against, fix)


_GRAPH = GraphRunner.__call__.__code__
_TORCH, _DYNAMO = str(Path(torch.__file__).parent), eval_frame.__file__
_OURS = __name__.partition(".")[0]
_WHERE = (str(Path(__file__).parents[1]), _TORCH)


def _is_ours(value: Any) -> bool:
    where = str(getattr(value, "__module__", "")) if callable(value) else ""
    return where.startswith(_OURS) or (isinstance(value, FunctionType) and where.startswith("torch._dynamo"))


def _may_multiply(code: CodeType) -> bool:
    """Whether a function outside of modules may compute with Parameters that it is given: not torch's own, ours, or compiled ones.

    What Dynamo was told to leave alone is called through a function of Dynamo's.
    """
    if code.co_filename == _DYNAMO:
        return code.co_name == "_fn"
    if code.co_filename.startswith(_WHERE) and code.co_filename != functional.__file__:
        return False
    return not any(name.startswith(("__compiled_fn", "__resume_at")) for name in code.co_names)


def _frames() -> int:
    """How often Dynamo was asked to compile a frame in this process."""
    return dynamo.counters["frames"]["total"]


def _codes(model: nn.Module | None) -> dict[int, CodeType]:
    """Code of every function that the classes of a model's modules define."""
    found: dict[int, CodeType] = {}
    classes = dict.fromkeys(
        base for module in (model.modules() if model is not None else ()) for base in type(module).__mro__
    )
    for base in classes:
        if not issubclass(base, nn.Module) or base is nn.Module:
            continue
        for name, function in vars(base).items():
            code = getattr(_plain(function), "__code__", None)
            if code is not None and name not in _NEVER and not name.startswith("__") and code.co_argcount:
                found[id(code)] = code
    return found


def _plain(function: Any) -> Any:
    """The function under its decorators."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def _read_by(ran: _Ran) -> Iterator[nn.Parameter]:
    """Parameters that a function reads: given ones, its module's, and those of modules right under that which its code names."""
    yield from ran.parameters
    if ran.module is None:
        return
    names, forward = set(ran.code.co_names), ran.code.co_name == "forward"
    for attribute, parameter in ran.module._parameters.items():
        if parameter is not None and (forward or attribute in names):
            yield parameter
    for name, child in ran.module._modules.items():
        if child is not None and name in names:
            for attribute, parameter in child._parameters.items():
                if parameter is not None and attribute in names:
                    yield parameter


def _note_skips() -> None:
    for metrics in dynamo.get_compilation_metrics():
        reason = getattr(metrics, "fail_reason", None)
        if reason and metrics.co_filename and metrics.co_firstlineno:
            place = f"{metrics.fail_user_frame_filename}:{metrics.fail_user_frame_lineno}"
            text = str(reason).strip().splitlines()[0].rstrip(".")
            at = f" ({place})" if metrics.fail_user_frame_filename else ""
            _SKIPPED[metrics.co_filename, metrics.co_firstlineno] = f"{text}{at}"


def _reason(found: _Ran, ran: list[_Ran]) -> str:
    """Why a function ran as it was written: Dynamo's word on it, or on the nearest function around it."""
    own = found.called or type(found.module).__name__
    around = [
        r for r in ran if r is found or (r.module and any(found.module is module for module in r.module.modules()))
    ]
    for outer in reversed(around):
        why = _SKIPPED.get((outer.code.co_filename, outer.code.co_firstlineno))
        if why is not None:
            called = f"{type(outer.module).__name__}.{outer.code.co_name}" if outer.module else own
            return f"{own} ran outside of the compiled graph, because Dynamo would not compile {called}: {why}"
    breaks = list(dynamo.counters["graph_break"])
    why = f"the graph is broken off: {breaks[-1].strip().splitlines()[0]}" if breaks else "Dynamo has left it alone"
    return f"{own} ran outside of the compiled graph, because {why}"
