"""What cannot be done with a model that torch.distributed divides: refusals that name the place and the way out. Changes nothing."""

from __future__ import annotations

from torch import nn

from quant_compile.ir.errors import OptionError
from quant_compile.ir.shards import Shard
from quant_compile.lowering.identity import shard_of
from quant_compile.model.places import is_a, parameters_of


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse what gathers weights at each call: its planes would be made of tensors that are gone after it.

    Raises:
        OptionError: a module is wrapped by FSDP2 (``fully_shard``).
    """
    found = next((name for name, module in model.named_modules() if is_a(module, "torch", "FSDPModule")), None)
    if found is not None:
        raise OptionError(
            f"{found or 'the model'} is wrapped by FSDP2 (fully_shard), which gathers its weights anew at each call.\n"
            "Fix: load the model with tp_plan, or whole, and compile that. Nothing has been changed."
        )


def refuse_release(model: nn.Module) -> None:
    """Refuse to free original values of parts: torch cannot trace a DTensor without them.

    Raises:
        OptionError: ranks have a weight in parts.
    """
    if _cut(model) is not None:
        raise OptionError(
            "the original values of weights that ranks have in parts cannot be released: torch traces no DTensor without them.\n"
            "Fix: release_weights=False; every rank keeps its parts in 16 bits beside their planes. Nothing has been changed."
        )


def refuse_parts(model: nn.Module, what: str) -> None:
    """Refuse what needs whole weights.

    Args:
        what: the function, for the message.

    Raises:
        OptionError: ranks have a weight in parts.
    """
    found = _cut(model)
    if found is not None:
        raise OptionError(
            f"{what} needs whole weights, and ranks have those of this model in parts ({found.placements}).\n"
            "Fix: call it for the model loaded without tp_plan; a policy that it writes serves the divided model too."
        )


def _cut(model: nn.Module) -> Shard | None:
    """How the first weight that ranks have in parts is divided."""
    return next((shard for p in parameters_of(model) if (shard := shard_of(p)) is not None and shard.cuts), None)
