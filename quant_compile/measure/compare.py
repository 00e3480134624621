"""Policies side by side on the user's model and text: bits, bytes, perplexity, divergence from the model itself, speed.

Compiles the model with each policy, runs it, and takes that away again; the model is as it was at the end, however that comes.
Logits of the unquantized model are kept on the CPU where they are small, else computed anew beside each policy's: those of a whole
text are tokens x vocabulary.
"""

from __future__ import annotations

import gc
import importlib.metadata
import math
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from quant_compile.api import compile, report, uncompile
from quant_compile.generation.blocks import CALL
from quant_compile.ir.errors import OptionError, QuantError, WeightError
from quant_compile.ir.numerics import dtype_name
from quant_compile.lowering.target import Target
from quant_compile.measure.comparison import Comparison, Row
from quant_compile.measure.text import windows_for
from quant_compile.measure.windows import Divergence, divergence, losses
from quant_compile.model import offload
from quant_compile.model.distributed import refuse_parts
from quant_compile.model.places import parameters_of, unwrap
from quant_compile.model.weights import linear_weights
from quant_compile.policy import KEEP, Policy

EAGER = "eager"
KEPT_LOGITS = 1 << 30
"""Bytes of the unquantized model's logits that are kept; of more, they are computed anew for each policy."""
PROMPT = 128
WARM, TIMED = 2, 3
"""Calls of ``generate`` before those that are timed (the first compiles, on a GPU the second records), and those; the fastest counts."""


@dataclass(frozen=True)
class _Setting:
    """What all rows share: windows [count, length + 1] on the CPU, what is to be generated, and options of ``compile``."""

    windows: Tensor
    batch: int
    new_tokens: int
    options: Mapping[str, Any]
    keep: int


def compare(
    model: nn.Module,
    policies: Any,
    text: Any,
    *,
    tokenizer: Any = None,
    length: int | None = None,
    windows: int = 16,
    batch: int = 1,
    new_tokens: int = 64,
    baseline: bool = True,
    keep_logits: int = KEPT_LOGITS,
    progress: bool = True,
    options: Mapping[str, Any] | None = None,
) -> Comparison:
    """Measure policies on a causal language model and a text.

    Args:
        model: with its weights loaded, not compiled; it is as before when this returns or raises.
        policies: a policy (preset, shipped policy, YAML path, dict, Policy, or ``keep``), several, or a dict {label: policy}.
        text: a string, the path of a text file, or token ids [tokens] or [windows, length + 1].
        tokenizer: of transformers or a path; None: the one where the model was loaded from.
        length: tokens predicted in a window; None: 512, or what the model or the text has.
        windows: of the text's beginning, at most.
        batch: sequences that ``generate`` is timed with.
        new_tokens: that it makes; 0: speed is not measured.
        baseline: add ``keep``, the model compiled in 16 bits: the speed to compare with, and how far compiling alone moves logits.
        keep_logits: bytes of the unquantized model's logits that may be kept on the CPU.
        progress: show what is being done on a terminal.
        options: of ``compile``, for all policies (``tune``, ``mode``, ``kernels``, ...).

    Returns:
        A row for the model as it is, and one for each policy; of one that fails for this model, the reason.

    Raises:
        OptionError: the text, the tokenizer or an option will not do, or the model is compiled already.
        PolicyError: a policy cannot be read.
        WeightError: the model has no weights.
    """
    chosen = labelled(policies, baseline)
    given = dict(options or {})
    for key in ("policy", "release_weights"):
        if key in given:
            raise OptionError(
                f"compare has no option {key!r}: policies are an argument, and originals are not released"
            )
    _check(model)
    cut = windows_for(model, text, tokenizer, length, windows)
    if not 1 <= batch <= len(cut) or new_tokens < 0:
        raise OptionError(
            f"batch must be 1 to {len(cut)}, the windows of the text, and new_tokens 0 or more; got {batch} and {new_tokens}"
        )
    setting = _Setting(cut, batch, new_tokens, given, keep_logits)
    rows: list[Row] = []
    with _as_before(model), _saying(progress, len(chosen) + 1) as say, torch.inference_mode():
        say(EAGER)
        kept, row = _reference(model, setting)
        rows.append(row)
        for label, policy in chosen:
            say(label)
            rows.append(_measured(model, label, policy, setting, kept))
    return Comparison(tuple(rows), _meta(model, setting))


def labelled(policies: Any, baseline: bool = False) -> list[tuple[str, Policy]]:
    """(label, policy) of whatever way policies are given in; labels are unique.

    Raises:
        OptionError: there are none.
        PolicyError: one cannot be read.
    """
    found: list[tuple[str | None, Any]]
    if isinstance(policies, Mapping) and "default" not in policies:
        found = [(str(label), policy) for label, policy in policies.items()]
    elif isinstance(policies, str | Path | Policy | Mapping) or not isinstance(policies, Iterable):
        found = [(None, policies)]
    else:
        found = [(None, policy) for policy in policies]
    if not found:
        raise OptionError('no policies were given. Fix: compare(model, ["FP8_DYNAMIC", "W4A16"], text).')
    loaded = [(label, _loaded(policy)) for label, policy in found]
    if baseline and not any(policy == _loaded(KEEP) for _, policy in loaded):
        loaded.insert(0, (KEEP, _loaded(KEEP)))
    out: dict[str, Policy] = {}
    for label, policy in loaded:
        name = stem = label or policy.name
        number = 1
        while name in out or name == EAGER:
            number += 1
            name = f"{stem} ({number})"
        out[name] = policy
    return list(out.items())


def _loaded(policy: Any) -> Policy:
    if isinstance(policy, str) and policy.lower() == KEEP:
        return Policy(None, name=KEEP)
    return Policy.load(policy)


def _check(model: Any) -> None:
    """Refuse what cannot be compared, before anything is measured."""
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"model must be a torch.nn.Module, got {type(model).__name__}. Fix: load it first (from_pretrained)."
        )
    if (
        any(CALL in vars(module) and vars(module)[CALL] is not None for module in model.modules())
        or unwrap(model) is not model
    ):
        raise OptionError(
            "the model is compiled or wrapped. Fix: quant_compile.uncompile(model), or give the model without its wrapper; "
            "a checkpoint that is quantized already must be loaded in 16 bits."
        )
    refuse_parts(model, "compare")
    lent = set(map(id, offload.lent_parameters(model)))
    if any(parameter.is_meta and id(parameter) not in lent for parameter in model.parameters()):
        raise WeightError("the model is on the meta device and has no weights. Fix: load it first (from_pretrained).")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise OptionError(
            f"{type(model).__name__} has an encoder; compare measures causal language models, which predict a text's tokens"
        )


@contextmanager
def _as_before(model: nn.Module) -> Generator[None]:
    """In eval mode inside; afterwards the model is what it was: not compiled, each module in its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        uncompile(model)
        for module, training in modes:
            module.training = training


@contextmanager
def _saying(progress: bool, count: int) -> Generator[Any]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task("", total=count, completed=-1)

        def say(doing: str) -> None:
            bar.update(task, advance=1, description=doing)

        yield say


def _reference(model: nn.Module, setting: _Setting) -> tuple[list[Tensor] | None, Row]:
    """Logits of each window on the CPU, or None where these would be too large, and the row of the model as it is."""
    start = time.perf_counter()
    kept: list[Tensor] | None = []
    likelihoods: list[Tensor] = []
    for window in setting.windows:
        logits = _logits(model, window)
        likelihoods.append(losses(logits, window[1:].to(logits.device)).cpu())
        if kept is not None and logits.nbytes * len(setting.windows) <= setting.keep:
            kept.append(logits.cpu())
        else:
            kept = None
    speed, reason = _speed(model, setting)
    held = sum(parameter.nbytes for parameter in parameters_of(model))
    perplexity = math.exp(float(torch.cat(likelihoods).double().mean()))
    seconds = time.perf_counter() - start
    row = Row(
        EAGER, _plain_bits(model), held, perplexity=perplexity, tokens_per_second=speed, seconds=seconds, error=reason
    )
    return kept, row


def _measured(model: nn.Module, label: str, policy: Policy, setting: _Setting, kept: list[Tensor] | None) -> Row:
    """The row of one policy; a failure is its reason."""
    start = time.perf_counter()
    row = Row(label)
    try:
        compile(model, replace(policy, release_weights=None), release_weights=False, **setting.options)
        row = replace(row, **_quality(model, setting, kept))
        speed, reason = _speed(model, setting)
        row = replace(_held(model, row), tokens_per_second=speed, error=reason)
    except Exception as error:
        row = replace(row, error=reason_of(error))
    finally:
        uncompile(model)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return replace(row, seconds=time.perf_counter() - start)


def _quality(model: nn.Module, setting: _Setting, kept: list[Tensor] | None) -> dict[str, float]:
    """Perplexity and divergence of a compiled model, a window at a time."""
    likelihoods: list[Tensor] = []
    apart: list[Divergence] = []
    for index, window in enumerate(setting.windows):
        logits = _logits(model, window)
        likelihoods.append(losses(logits, window[1:].to(logits.device)).cpu())
        if kept is None:
            with _eager(model):
                reference = _logits(model, window)
        else:
            reference = kept[index]
        apart.append(divergence(logits, reference))
    loss, kl = torch.cat(likelihoods).double(), torch.cat([found.kl for found in apart])
    if not bool(loss.isfinite().all()):
        raise WeightError("its logits are not finite on this text")
    return {
        "perplexity": math.exp(float(loss.mean())),
        "kl": float(kl.double().mean()),
        "kl_999": float(torch.quantile(kl.double(), 0.999)),
        "top1": float(torch.cat([found.same for found in apart]).double().mean()),
    }


def _logits(model: Any, window: Tensor) -> Tensor:
    """[length, vocabulary] of a window [length + 1]."""
    device = next((parameter.device for parameter in model.parameters() if not parameter.is_meta), torch.device("cpu"))
    ids = window[None, :-1].to(device)
    if getattr(model, "config", None) is None:
        out = model(ids)
    else:
        out = model(input_ids=ids, **({"use_cache": False} if hasattr(model.config, "use_cache") else {}))
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != ids.shape:
        raise OptionError(
            f"{type(model).__name__} gives no logits for each token. Fix: a causal language model (AutoModelForCausalLM)."
        )
    return logits[0]


@contextmanager
def _eager(model: nn.Module) -> Generator[None]:
    """The model uncompiled for a while: its modules' compiled calls are set aside."""
    calls = [(module, vars(module)[CALL]) for module in model.modules() if CALL in vars(module)]
    try:
        for module, _ in calls:
            delattr(module, CALL)
        yield
    finally:
        for module, call in calls:
            setattr(module, CALL, call)


def _held(model: nn.Module, row: Row) -> Row:
    """The row with what the ledger says of bytes."""
    ledger = report(model)
    sizes = [parameter.numel() for parameter in parameters_of(model)]
    quantized = [(line, size) for line, size in zip(ledger.lines, sizes, strict=True) if line.scheme]
    count = sum(size for _, size in quantized)
    return replace(
        row,
        bits=8 * sum(line.bytes_after for line, _ in quantized) / count if count else _plain_bits(model),
        bytes=ledger.bytes_after,
        coverage=ledger.coverage if any(line.named for line in ledger.lines) else None,
        unquantized=ledger.skips,
    )


def _plain_bits(model: nn.Module) -> float:
    """Of the weights that linears and experts multiply by, as they are."""
    weights = [weight.parameter for weight in linear_weights(model)] or parameters_of(model)
    return 8 * sum(weight.nbytes for weight in weights) / max(1, sum(weight.numel() for weight in weights))


def _speed(model: Any, setting: _Setting) -> tuple[float | None, str | None]:
    """Tokens per second of ``generate`` after the first token, or why there is no such number.

    The wall clock of ``new_tokens`` less that of one: prompt and start are the same.
    """
    if not setting.new_tokens:
        return None, None
    if not hasattr(model, "generate"):
        return None, f"{type(model).__name__} does not generate"
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 1 << 30
    count = min(setting.new_tokens, positions - 1)
    prompt = min(PROMPT, setting.windows.shape[1] - 1, positions - count)
    ids = setting.windows[: setting.batch, :prompt].to(next(iter(model.parameters())).device)
    if count < 2:
        return None, "fewer than two new tokens have no speed"
    try:
        one, all_ = (_seconds(model, ids, made) for made in (1, count))
    except Exception as error:
        return None, f"generate: {reason_of(error)}"
    if all_ <= one:
        return None, f"generate: {count} tokens took no longer than one; raise new_tokens"
    return setting.batch * (count - 1) / (all_ - one), None


def _seconds(model: Any, ids: Tensor, count: int) -> float:
    """The fastest of some calls of ``generate``."""
    times: list[float] = []
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    for _ in range(WARM + TIMED):
        start = time.perf_counter()
        made = model.generate(input_ids=ids, min_new_tokens=count, max_new_tokens=count, **given)
        int(made[0, -1])  # waits for the device
        times.append(time.perf_counter() - start)
    return min(times[WARM:])


def reason_of(error: BaseException) -> str:
    """What went wrong, without what torch.compile wraps around it."""
    own = error if isinstance(error, QuantError) else getattr(error, "inner_exception", None)
    if isinstance(own, QuantError):
        return str(own)
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _meta(model: nn.Module, setting: _Setting) -> dict[str, Any]:
    device = next((parameter.device for parameter in model.parameters() if parameter.is_cuda), torch.device("cpu"))
    target = Target.of(device)
    dtypes: Sequence[str] = sorted({dtype_name(parameter.dtype) for parameter in parameters_of(model)})
    return {
        "model": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in parameters_of(model)),
        "dtypes": list(dtypes),
        "device": target.name,
        "windows": len(setting.windows),
        "length": setting.windows.shape[1] - 1,
        "tokens": setting.windows[:, 1:].numel(),
        "batch": setting.batch,
        "new_tokens": setting.new_tokens,
        "versions": {name: _version(name) for name in ("torch", "triton", "transformers")},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
