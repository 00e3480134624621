"""Every error that sglquant raises on purpose: what, where, each reason, and the fix."""

from __future__ import annotations

from collections.abc import Mapping


class QuantError(Exception):
    """Base of all sglquant errors, so that a caller can catch them together."""


class OptionError(QuantError, ValueError):
    """An option of the backend is unknown or has a value it cannot have."""


class PolicyError(QuantError, ValueError):
    """A policy cannot be read or does not fit; names the file, the line and the fix."""


class SchemeError(QuantError, ValueError):
    """A scheme has fields that contradict each other or that no scheme family implements."""


class NoKernelError(QuantError, RuntimeError):
    """No kernel can run a problem; carries each kernel's reason.

    Args:
        problem: the problem in words, e.g. "model.layers.0.mlp.up_proj (FP8_DYNAMIC, n=8 k=4100, sm90)".
        reasons: kernel name -> why it refused.
        fix: one sentence.
    """

    def __init__(self, problem: str, reasons: Mapping[str, str], fix: str) -> None:
        self.problem, self.reasons, self.fix = problem, dict(reasons), fix
        lines = [f"no kernel for {problem}", *(f"  {name}: {why}" for name, why in reasons.items()), f"Fix: {fix}"]
        super().__init__("\n".join(lines))


class MissingLibraryError(QuantError, ImportError):
    """An optional library is needed that is not installed; names the command that installs it."""


class RankError(QuantError, RuntimeError):
    """Another process of the group failed at what all of them do together; has that one's error."""


class GradModeError(QuantError, RuntimeError):
    """The model was called with gradients enabled; quantized graphs are for inference only."""


class WeightError(QuantError, ValueError):
    """A weight cannot be quantized: NaN or inf, integer or complex dtype, meta device."""


class RangeError(WeightError):
    """A weight's values are too large for a scheme, whose scales would be inf.

    Args:
        name: of the weight.
        reason: a sentence without its end.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}.\nFix: `keep` this weight in the policy, or give it another scheme.")
        self.reason = reason


class ReleasedWeightError(QuantError, RuntimeError):
    """A weight's original values were released and something tried to read them."""


class ExportError(QuantError, ValueError):
    """A model cannot be exported or packaged: what, where, and the fix; nothing has been changed or written."""


class MissingScalesError(QuantError, ValueError):
    """A static scheme has no calibrated activation scale for a weight."""


class MeasureError(QuantError, ValueError):
    """What quantization costs a model cannot be measured, or nothing meets a budget: what was found, and the fix."""


class CoverageError(QuantError, AssertionError):
    """``Report.require`` found less coverage than asked for."""


class GraphError(QuantError, RuntimeError):
    """A rewritten graph breaks an invariant; always a defect of a pass, never of the model."""


class StaleWeightError(QuantError, RuntimeError):
    """A released weight was changed, so its planes cannot be rebuilt."""


class RecompileLimitWarning(UserWarning):
    """torch.compile is about to stop compiling a function, or its limit was raised to avoid that."""


class LockError(QuantError, ValueError):
    """A lock cannot be read or written, or a strict policy's weights got something else; names the file, the line, the weights."""


class VerifyError(QuantError, AssertionError):
    """A rewrite is not what it stands for, and cannot stay as the model wrote it, or the policy is strict; names place and numbers."""


class LockWarning(UserWarning):
    """Weights got something else than their lock says; names them."""


class PolicyWarning(UserWarning):
    """A rule of a policy matched nothing."""
