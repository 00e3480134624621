"""One family against what it must be: eager, compiled by a policy, and an eager copy whose weights are rounded in this file.

The copy's weights are those that the compiled model's ledger says are quantized, rounded to int8 for each output row by the torch
functions below; where a row lies is what the compiled graph said of the weight. Runs in a process of its own, which ``check``
tells through ``tell`` how far it has come.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from common import without_paths
from family_models import NotBuilt, Tiny, first_line, seed_all, tensors_of, tiny
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

POLICY = "W8A16"
"""Rounded to nearest, as this file rounds its copy."""
TOLERANCE = 1e-3
"""Relative error: f32 sums in another order are about 1e-6 of the result; one code that falls to its neighbour is about 1e-4."""
NEW_TOKENS = 4
RIGHT, WRONG, UNSTABLE, CRASHED = "right", "wrong", "unstable", "crashed"
TORCH, EAGER, LATE = "torch.compile fails too", "not run", "out of time"
Row = dict[str, Any]
Tell = Callable[[Row], None]


def check(family: str, tell: Tell, inductor: bool = False, with_generate: bool = True) -> Row:
    """Everything about one family as a row; ``tell`` gets the row at each step, so that a time-out leaves what was found."""
    row: Row = {"family": family, "status": EAGER, "stage": "building"}
    tell(row)
    try:
        recipe = tiny(family)
    except NotBuilt as error:
        return row | {"reason": without_paths(str(error))[:300]}
    row |= {
        "class": recipe.model_class.__name__,
        "level": recipe.level,
        "inputs": list(recipe.inputs),
        "parameters": sum(p.numel() for p in recipe.make().parameters()),
    }
    tell(row := row | {"stage": "compiling"})
    with contextlib.nullcontext() if inductor else graphs_as_they_are():
        return _compared(recipe, row, tell, with_generate)


@contextlib.contextmanager
def graphs_as_they_are() -> Iterator[None]:
    """No Inductor in this block: what it would compile is run as it is."""
    from torch._inductor import compile_fx

    def run(gm: torch.fx.GraphModule, inputs: Any, **_: Any) -> Callable[..., Any]:
        return gm.forward

    before = compile_fx.compile_fx
    compile_fx.compile_fx = run  # type: ignore[assignment]
    try:
        yield
    finally:
        compile_fx.compile_fx = before


def _compared(recipe: Tiny, row: Row, tell: Tell, with_generate: bool) -> Row:
    import quant_compile

    plain = outputs(recipe.make(), recipe)
    model = recipe.make()
    try:
        quant_compile.compile(model, {"default": POLICY, "rounding": "nearest"})
        got = outputs(model, recipe)
    except Exception as error:
        text = reason_of(error)
        failure = plain_compile_failure(recipe)
        return row | ({"status": TORCH, "reason": failure} if failure else {"status": CRASHED, "reason": text})
    report = quant_compile.report(model)
    reference, rounded = reference_of(recipe, model, report)
    with as_read(rounded):
        wanted = outputs(reference, recipe)
    error, moved = distance(got, wanted), distance(wanted, plain)
    row |= {
        "graphs": graph_count(),
        "coverage": round(report.coverage, 4),
        "share": round(report.share, 4),
        "quantized": sum(line.scheme is not None for line in report.lines),
        "error": error,
        "rounding": moved,
        "skips": skips_of(report),
        "status": RIGHT if error <= TOLERANCE else WRONG,
    }
    if row["status"] == WRONG:
        row |= _by_compiled_copy(reference, recipe, rounded, got, wanted)
    if row["status"] == WRONG and (moves := unrest(reference, recipe, rounded, wanted)) > TOLERANCE:
        why = f"eager outputs move by {moves:.0e} when weights move by 1e-6"
        return row | {"status": UNSTABLE, "reason": why, "stage": "done"}
    both = sum(line.missed and line.scheme is not None for line in report.lines)
    if row["status"] == WRONG and both:
        row["reason"] = (
            f"{both} weights are quantized where some graph reads them and not where another does; no copy is like that"
        )
    if not row["quantized"] and not row["skips"]:
        row["reason"] = "the policy names no weight of it"
    if not with_generate:
        return row | {"stage": "done"}
    tell(row := row | {"stage": "generating"})
    if hasattr(model, "generate") and callable(getattr(model, "can_generate", None)) and model.can_generate():
        row["generate"] = generated(model, reference, recipe, rounded)
    return row | {"stage": "done"}


def _by_compiled_copy(
    reference: nn.Module, recipe: Tiny, rounded: Before, got: list[Tensor], wanted: list[Tensor]
) -> Row:
    """The comparison with the copy as Dynamo traces it, where that differs from the eager one: other masks are made."""
    torch._dynamo.reset()
    with as_read(rounded):
        traced = outputs(torch.compile(reference, backend="eager"), recipe)
    torch._dynamo.reset()
    apart = distance(traced, wanted)
    if apart <= TOLERANCE:
        return {}
    error = distance(got, traced)
    reason = f"plain torch.compile gives other outputs than eager, by {apart:.0e}; compared with those of torch.compile"
    return {"error": error, "status": RIGHT if error <= TOLERANCE else WRONG, "reason": reason}


def graph_count() -> int:
    """Graphs that Dynamo has made since it was reset."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def outputs(model: nn.Module, recipe: Tiny) -> list[Tensor]:
    """Floating point outputs of a call."""
    seed_all()
    with torch.inference_mode():
        return tensors_of(model(**copied(recipe.inputs)))


def copied(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs that a model may write to."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}


def distance(got: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative Frobenius error of any output; infinite where shapes or places of NaN and inf differ."""
    if [t.shape for t in got] != [t.shape for t in wanted]:
        return float("inf")
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        finite = b.isfinite()
        if not torch.equal(finite, a.isfinite()):
            return float("inf")
        x, y = a[finite].double(), b[finite].double()
        worst = max(worst, float((x - y).norm() / y.norm().clamp_min(1e-12))) if y.numel() else worst
    return worst


# --- the reference ---------------------------------------------------------------------------------------------------


def int8_rows(weight: Tensor, transposed: bool) -> Tensor:
    """The values of a weight [..., n, k] (``transposed``: [..., k, n]) rounded to 255 steps for each row n."""
    step = weight.abs().amax(-2 if transposed else -1, keepdim=True).clamp_min(1e-30) * (1.0 / 127.0)
    # The reciprocal is the product's choice too: with a division codes halfway between two integers would fall otherwise.
    return (weight * step.reciprocal()).round().clamp(-127, 127) * step


@dataclass(frozen=True)
class Rounded:
    """What a weight of the reference was, and what linears read of it where others read it the other way round."""

    original: Tensor
    for_linears: Tensor | None


Before = Mapping[int, Rounded]


def rounded_as_packed(weight: Tensor, parameter: Tensor) -> tuple[Tensor, Tensor | None]:
    """A weight rounded by the rows that the compiled graph said: of each expert's matrix, or of the one that all its dimensions make.

    One that graphs read both ways has rows for linears too.
    """
    from quant_compile.lowering.weights import STORE

    entry = STORE.peek(parameter)  # type: ignore[arg-type]
    found = {key.transposed: _by_rows(weight, key, pack) for key, pack in entry.packs.items()} if entry else {}
    if len(found) == 2:
        return found[True], found[False]
    return next(iter(found.values()), weight), None


def _by_rows(weight: Tensor, key: Any, pack: Any) -> Tensor:
    rows = pack.stop - pack.start
    if key.layout == "experts":
        return int8_rows(weight.reshape(key.view or weight.shape), key.transposed).reshape(weight.shape)
    matrix = weight.reshape(-1, rows) if key.transposed else weight.reshape(rows, -1)
    return int8_rows(matrix, key.transposed).reshape(weight.shape)


def reference_of(recipe: Tiny, model: nn.Module, report: Any) -> tuple[nn.Module, Before]:
    """A fresh model with rounded weights, and what they were by the rounded Parameter's id."""
    compiled = dict(model.named_parameters(remove_duplicate=False))
    reference = recipe.make()
    own = dict(reference.named_parameters(remove_duplicate=False))
    before: dict[int, Rounded] = {}
    for line in report.lines:
        if line.scheme is not None:
            parameter = own[line.names[0]]
            rounded, for_linears = rounded_as_packed(parameter.data, compiled[line.names[0]])
            before[id(parameter)] = Rounded(parameter.detach().clone(), for_linears)
            parameter.data = rounded
    return reference, before


class as_read(TorchFunctionMode):
    """Embeddings look up original rows of a table that is a linear's weight too; linears have their rows of one read both ways."""

    def __init__(self, before: Before) -> None:
        super().__init__()
        self.before = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = self.before.get(id(args[1])) if len(args) > 1 else None
        if found is not None and func is torch.nn.functional.embedding:
            args = (args[0], found.original, *args[2:])
        elif found is not None and func is torch.nn.functional.linear and found.for_linears is not None:
            args = (args[0], found.for_linears, *args[2:])
        return func(*args, **(kwargs or {}))


def unrest(reference: nn.Module, recipe: Tiny, before: Before, wanted: list[Tensor]) -> float:
    """How far the eager copy's outputs move when its matrices move by a millionth: far, where they hang on what is largest."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.is_floating_point() and parameter.dim() > 1:
                parameter.mul_(1 + 1e-6 * torch.randn(parameter.shape, generator=generator))
    with as_read(before):
        return distance(outputs(reference, recipe), wanted)


# --- generate --------------------------------------------------------------------------------------------------------


def generated(model: nn.Module, reference: nn.Module, recipe: Tiny, rounded: Before) -> str:
    """``same`` where both models generate the same tokens, else what happened."""
    try:
        with as_read(rounded):
            wanted = generate(reference, recipe)
    except Exception as error:
        return f"eager generate fails: {reason_of(error)}"
    try:
        got = generate(model, recipe)
    except Exception as error:
        return f"fails: {reason_of(error)}"
    if got.shape != wanted.shape:
        return f"other shape: {tuple(got.shape)}, eager {tuple(wanted.shape)}"
    return "same" if torch.equal(got, wanted) else "other tokens"


def generate(model: Any, recipe: Tiny) -> Tensor:
    """Greedy tokens, none of which ends the text; of a model that makes sound or images what it makes."""
    seed_all()
    config = model.generation_config
    config.eos_token_id = None
    config.pad_token_id = config.pad_token_id if config.pad_token_id is not None else 0
    if getattr(model.config, "is_encoder_decoder", False) and config.decoder_start_token_id is None:
        config.decoder_start_token_id = 0
    inputs = {name: value for name, value in copied(recipe.inputs).items() if name != "decoder_input_ids"}
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1)
    out = getattr(out, "sequences", out)
    return out[0] if isinstance(out, (tuple, list)) else out


# --- reasons ---------------------------------------------------------------------------------------------------------


def plain_compile_failure(recipe: Tiny) -> str | None:
    """Why plain ``torch.compile`` fails on a fresh model; None where it does not."""
    torch._dynamo.reset()
    model = recipe.make()
    try:
        seed_all()
        with torch.inference_mode():
            torch.compile(model, backend="eager")(**copied(recipe.inputs))
    except Exception as error:
        return reason_of(error)
    return None


def reason_of(error: BaseException) -> str:
    """Type and first lines of an error, as the backend raised it."""
    while isinstance(getattr(error, "inner_exception", None), BaseException):
        error = error.inner_exception  # type: ignore[attr-defined]
    return without_paths(f"{type(error).__name__}: {first_line(error)}")[:300]


def skips_of(report: Any) -> list[str]:
    """What the policy names and did not get, alike ones joined: ``layers.*.gate (2): reason``."""
    groups: dict[tuple[str, str], int] = {}
    for name, reason in report.skips:
        short = without_paths(reason.strip().splitlines()[0] if reason.strip() else "")[:160]
        key = re.sub(r"\.\d+(?=\.|$)", ".*", name), short
        groups[key] = groups.get(key, 0) + 1
    return [f"{name} ({count}): {reason}" for (name, reason), count in groups.items()][:6]
