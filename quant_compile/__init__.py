"""sglquant: a torch.compile backend that quantizes unmodified models and says what became of every weight.

quant_compile.compile(model, policy="fp8_dynamic")     # in place; or torch.compile(model, backend="sglquant", options=...)
model.generate(**inputs)
print(quant_compile.report(model))
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

from quant_compile import backend as _backend  # noqa: F401  # pyright: ignore[reportUnusedImport]  # has the ops of saved programs
from quant_compile.ir.errors import (
    CoverageError,
    ExportError,
    GradModeError,
    LockError,
    LockWarning,
    MeasureError,
    MissingScalesError,
    NoKernelError,
    OptionError,
    PolicyError,
    QuantError,
    ReleasedWeightError,
    SchemeError,
    StaleWeightError,
    VerifyError,
    WeightError,
)
from quant_compile.ir.report import Report
from quant_compile.ir.scheme import PRESETS, QuantArgs, Scheme
from quant_compile.on_import import enter as _enter
from quant_compile.policy import Policy, Rule

if TYPE_CHECKING:
    from quant_compile._transformers import HfConfig as HfConfig
    from quant_compile.api import compile, refresh, release, report, restore, uncompile, watch
    from quant_compile.calibrating import calibrate
    from quant_compile.checkpoints.errors import CheckpointError, SaveError
    from quant_compile.checkpoints.gguf.tokenizer import tokenizer
    from quant_compile.exporting.export import export
    from quant_compile.exporting.exported import Exported
    from quant_compile.measure.attribute import attribute
    from quant_compile.measure.compare import compare
    from quant_compile.measure.recommend import recommend
    from quant_compile.measure.search import search
    from quant_compile.pretrained import load
    from quant_compile.sampled_text import own_text
    from quant_compile.saving import save

    QuantizedStaticCache: type[Any]

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "CheckpointError",
    "CoverageError",
    "ExportError",
    "Exported",
    "GradModeError",
    "LockError",
    "LockWarning",
    "MeasureError",
    "MissingScalesError",
    "NoKernelError",
    "OptionError",
    "Policy",
    "PolicyError",
    "QuantArgs",
    "QuantError",
    "ReleasedWeightError",
    "Report",
    "Rule",
    "SaveError",
    "Scheme",
    "SchemeError",
    "StaleWeightError",
    "VerifyError",
    "WeightError",
    "attribute",
    "calibrate",
    "compare",
    "compile",
    "export",
    "load",
    "own_text",
    "recommend",
    "refresh",
    "release",
    "report",
    "restore",
    "save",
    "search",
    "tokenizer",
    "uncompile",
    "watch",
]

# Imported at their first use, where they are: a process that runs a backend needs neither loaders nor searches.
_HOMES = {
    **dict.fromkeys(("compile", "refresh", "release", "report", "restore", "uncompile", "watch"), "api"),
    **dict.fromkeys(("CheckpointError", "SaveError"), "checkpoints.errors"),
    "Exported": "exporting.exported",
    "attribute": "measure.attribute",
    "calibrate": "calibrating",
    "compare": "measure.compare",
    "export": "exporting.export",
    "load": "pretrained",
    "own_text": "sampled_text",
    "recommend": "measure.recommend",
    "save": "saving",
    "search": "measure.search",
    "tokenizer": "checkpoints.gguf.tokenizer",
}


def __getattr__(name: str) -> Any:
    """What is imported at its first use. ``HfConfig`` and the cache import transformers, which ``import quant_compile`` does without."""
    if name in _HOMES:
        globals()[name] = found = getattr(_import_module(f"quant_compile.{_HOMES[name]}"), name)
        return found
    if name == "HfConfig":
        from quant_compile._transformers import HfConfig

        return HfConfig
    if name == "QuantizedStaticCache":
        from quant_compile.generation.quantized import types

        return types().cache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "HfConfig", "QuantizedStaticCache"})


_enter()
