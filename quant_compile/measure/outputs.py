"""Batches in, logits out, and how far the logits of two runs are apart.

The divergence is KL(p || q) in nats, the mean over the positions of all batches: p of the model as it is, q of the changed one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from quant_compile.ir.errors import MeasureError, OptionError
from quant_compile.measure.windows import kl_of, pieces
from quant_compile.model.follow import eagerly, listed, run_batch

# Bytes of reference logits that may stay on the device that made them.
_ON_DEVICE = 1 << 30


def checked(batches: Any) -> list[Any]:
    """Batches as a list, each with something in it.

    Raises:
        OptionError: as ``listed``, or a tensor without elements.
    """
    found = listed(batches)
    for index, batch in enumerate(found):
        if any(tensor.numel() == 0 for tensor in _tensors(batch)):
            raise OptionError(f"batch {index} has a tensor without elements. Fix: leave it out.")
    return found


def batches_hash(batches: Sequence[Any]) -> str:
    """sha256 of all tensors of all batches, in order."""
    digest = hashlib.sha256()
    for batch in batches:
        for tensor in _tensors(batch):
            digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        digest.update(b"|")
    return digest.hexdigest()


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for key in sorted(cast(Mapping[str, Any], batch)):
            yield from _tensors(batch[key])
    elif isinstance(batch, list | tuple):
        for item in cast(Iterable[Any], batch):
            yield from _tensors(item)


def logits_of(output: Any) -> Tensor:
    """Logits [..., classes] of what a model returns.

    Raises:
        MeasureError: it has none.
    """
    found: Any = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = cast(Mapping[str, Any], output).get("logits")
    if found is None and isinstance(output, tuple) and output:
        found = cast(tuple[Any, ...], output)[0]
    if not isinstance(found, Tensor) or not found.is_floating_point() or not found.dim():
        raise MeasureError(
            f"the model returned {type(output).__name__}, which has no logits. Fix: a model with a head "
            "(e.g. AutoModelForCausalLM), or one whose forward returns the logits."
        )
    return found


@contextmanager
def still(model: nn.Module) -> Generator[None]:
    """Without dropout, compiled code and gradients; as it was, afterwards."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with eagerly(), torch.inference_mode():
            yield
    finally:
        for module, was in training.items():
            module.training = was


class Reference:
    """Logits of the model as it is, on the positions that count, in the model's dtype; many are held in main memory."""

    def __init__(self, model: nn.Module, batches: Sequence[Any]) -> None:
        """Run the model once over all batches.

        Raises:
            MeasureError: logits are NaN or inf, or no position counts.
        """
        self.model, self.batches = model, batches
        self._logits: list[Tensor] = []
        held = 0
        with still(model):
            for index, batch in enumerate(batches):
                logits = kept_rows(logits_of(run_batch(model, batch)), batch)
                _check(logits, index)
                held += logits.nbytes
                self._logits.append(logits.clone() if held <= _ON_DEVICE else logits.cpu())
        self.positions = sum(logits.shape[0] for logits in self._logits)
        if not self.positions:
            raise MeasureError("no position of any batch counts. Fix: an attention_mask that is not all 0.")

    def divergence(self, context: AbstractContextManager[Any] | None = None) -> float:
        """Mean KL divergence of the model under a context; infinite where its logits are NaN."""
        total = 0.0
        with still(self.model):
            for batch, wanted in zip(self.batches, self._logits, strict=True):
                with context or nullcontext():
                    output = run_batch(self.model, batch)
                total += divergence(wanted, kept_rows(logits_of(output), batch))
        mean = total / self.positions
        return mean if mean == mean else float("inf")


def divergence(p: Tensor, q: Tensor) -> float:
    """Sum over rows of KL(softmax(p) || softmax(q)), logits [rows, classes], in nats."""
    total = sum(float(kl_of(a.to(b.device), b).double().sum()) for a, b in zip(pieces(p), pieces(q), strict=True))
    return max(0.0, total) if total == total else total


def kept_rows(logits: Tensor, batch: Any) -> Tensor:
    """Rows [positions, classes] that are no padding."""
    mask: Any = cast(Mapping[str, Any], batch).get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and logits.dim() == 3 and mask.shape == logits.shape[:2]:
        return logits[mask.to(logits.device).bool()]
    return logits.reshape(-1, logits.shape[-1])


def _check(logits: Tensor, index: int) -> None:
    if bool(torch.isnan(logits).any()) or bool((logits == float("inf")).any()):
        raise MeasureError(
            f"the logits of the model itself are NaN or inf in batch {index}, so nothing can be compared with them.\n"
            "Fix: look at this batch (padding without an attention_mask?), or load the model in bfloat16 or float32."
        )
