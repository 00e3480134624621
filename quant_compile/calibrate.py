"""Static activation scales: run example batches eagerly, watch the input of every weight with a static scheme, save the scales.

The model is not changed and its compiled code is not used while it is watched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quant_compile.inspect.weights import linear_weights, unwrap
from quant_compile.ir.errors import MissingScalesError, OptionError
from quant_compile.ir.numerics import FLOAT_MAX, SMALLEST_AMAX
from quant_compile.ir.scheme import Scheme
from quant_compile.policy import Policy

_SAMPLE = 1 << 20
# operand positions (input, weight) by function name
_OPERANDS = {"linear": (0, 1), "addmm": (1, 2), "matmul": (0, 1), "__matmul__": (0, 1), "mm": (0, 1)}


class _Observer(TorchFunctionMode):
    """Largest magnitude (or a percentile of it) of the inputs that meet the watched weights."""

    def __init__(self, weights: Mapping[int, str], percentile: float | None) -> None:
        super().__init__()
        self.weights, self.percentile = weights, percentile
        self.largest: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = _OPERANDS.get(getattr(func, "__name__", ""))
        if operands is not None:
            self._watch(func.__name__, [*args, *kwargs.values()], operands)
        return func(*args, **kwargs)

    def _watch(self, name: str, values: list[Any], operands: tuple[int, int]) -> None:
        for x, w in (operands, operands[::-1]) if "linear" not in name else (operands,):
            if len(values) > max(x, w) and isinstance(values[w], Tensor) and isinstance(values[x], Tensor):
                known = self.weights.get(values[w].data_ptr())
                if known is not None:
                    self._see(known, values[x])

    def _see(self, name: str, x: Tensor) -> None:
        magnitude = x.detach().abs().float().flatten()
        if not magnitude.numel():
            return
        if self.percentile is None:
            value = magnitude.amax()
        else:
            value = torch.quantile(magnitude[:: max(1, magnitude.numel() // _SAMPLE)][:_SAMPLE], self.percentile / 100)
        before = self.largest.get(name)
        self.largest[name] = value if before is None else torch.maximum(before, value)


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    policy: Any,
    *,
    percentile: float | None = None,
    path: str | Path | None = None,
    progress: bool = True,
) -> Policy:
    """Measure input scales for every weight that the policy gives a static scheme, and save them.

    Args:
        model: the model; run eagerly in inference mode.
        batches: each a mapping (keyword arguments), a tuple (positional arguments) or one tensor.
        policy: preset name, YAML path, dict or Policy.
        percentile: of the magnitudes, e.g. 99.9; None: the largest.
        path: the safetensors file; default: beside the policy's file, else ``<policy>.scales.safetensors`` here. A policy file
            without a ``scales`` key gets one, so that loading it again finds them.
        progress: show a progress bar.

    Returns:
        The policy with its ``scales``.

    Raises:
        OptionError: percentile out of range, or no batches.
        MissingScalesError: a static weight met no input; nothing is written.
    """
    if percentile is not None and not 0 < percentile <= 100:
        raise OptionError(f"percentile must lie in (0, 100], got {percentile}")
    loaded = Policy.load(policy)
    schemes = _static_schemes(model, loaded)
    observer = _Observer({pointer: name for name, (pointer, _) in schemes.items()}, percentile)
    seen = 0
    with torch.compiler.set_stance("force_eager"), torch.inference_mode():
        for batch in track(list(batches), "calibrating", disable=not progress):
            with observer:
                _call(model, batch)
            seen += 1
    if not seen:
        raise OptionError("no batches were given")
    missing = [name for name in schemes if name not in observer.largest]
    if missing:
        raise MissingScalesError(
            f"no batch reached {missing[0]} ({len(missing)} weights in all). Fix: batches that run every layer, or `keep` it."
        )
    scales = {f"{name}.input_scale": _scale(observer.largest[name], scheme) for name, (_, scheme) in schemes.items()}
    target = _scales_path(loaded, path)
    save_file(
        scales, str(target), metadata={"format": "pt", "percentile": str(percentile or "amax"), "batches": str(seen)}
    )
    _mention(loaded, target)
    return replace(loaded, scales=target)


def _static_schemes(model: nn.Module, policy: Policy) -> dict[str, tuple[int, Scheme]]:
    out: dict[str, tuple[int, Scheme]] = {}
    for weight in linear_weights(unwrap(model)):
        scheme = policy.decide(weight.site).scheme
        if scheme is not None and scheme.static:
            out[weight.site.names[0]] = (weight.parameter.data_ptr(), scheme)
    if not out:
        raise OptionError(
            f"policy {policy.name} has no static scheme for this model; dynamic schemes need no calibration"
        )
    return out


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple):
        model(*batch)
    else:
        model(batch)


def _scale(largest: Tensor, scheme: Scheme) -> Tensor:
    """amax over the largest code, [1] f32."""
    inputs = scheme.input_activations
    assert inputs is not None
    limit = FLOAT_MAX[inputs.format] if inputs.format else 127.0
    return (largest.cpu().clamp_min(SMALLEST_AMAX) * (1.0 / limit)).reshape(1)


def _scales_path(policy: Policy, path: str | Path | None) -> Path:
    if path is not None:
        return Path(path)
    if policy.source is not None:
        return Path(policy.source).with_suffix(".scales.safetensors")
    return Path(f"{policy.name.lower()}.scales.safetensors")


def _mention(policy: Policy, scales: Path) -> None:
    """Add ``scales:`` to a policy file that has none, leaving the rest of its text alone."""
    if policy.source is None or policy.scales is not None:
        return
    file = Path(policy.source)
    if file.is_file() and file.suffix in (".yaml", ".yml") and not str(file).startswith(str(Path(__file__).parent)):
        name = scales.name if scales.parent.resolve() == file.parent.resolve() else str(scales.resolve())
        text = file.read_text(encoding="utf-8")
        file.write_text(f"{text.rstrip()}\nscales: {name}\n", encoding="utf-8")
