"""sglquant: a torch.compile backend that quantizes unmodified models and says what became of every weight.

quant_compile.compile(model, policy="fp8_dynamic")     # in place; or torch.compile(model, backend="sglquant", options=...)
model.generate(**inputs)
print(quant_compile.report(model))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quant_compile.api import compile, refresh, release, report, restore, uncompile, watch
from quant_compile.calibrate import calibrate
from quant_compile.checkpoints.errors import CheckpointError, SaveError
from quant_compile.checkpoints.gguf.tokenizer import tokenizer
from quant_compile.exporting.export import export
from quant_compile.exporting.exported import Exported
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
from quant_compile.measure.attribute import attribute
from quant_compile.measure.compare import compare
from quant_compile.measure.recommend import recommend
from quant_compile.measure.search import search
from quant_compile.on_import import enter as _enter
from quant_compile.own_text import own_text
from quant_compile.policy import Policy, Rule
from quant_compile.pretrained import load
from quant_compile.saving import save

if TYPE_CHECKING:
    from quant_compile._transformers import HfConfig as HfConfig

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

_enter()


def __getattr__(name: str) -> Any:
    """What imports transformers: at its first use, since ``import quant_compile`` is to work without."""
    if name == "HfConfig":
        from quant_compile._transformers import HfConfig

        return HfConfig
    if name == "QuantizedStaticCache":
        from quant_compile.generation.quantized import types

        return types().cache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "HfConfig", "QuantizedStaticCache"])
