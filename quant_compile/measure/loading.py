"""A model with its weights, for the command line."""

from __future__ import annotations

from typing import Any

import torch

from quant_compile.inspect.models import DTYPES, ModelError, load_config
from quant_compile.ir.errors import OptionError


def load_model(source: str, dtype: str | None, device: str | None) -> Any:
    """A causal language model from a folder or a Hugging Face id, in eval mode.

    Args:
        dtype: key of ``DTYPES``; None: the checkpoint's.
        device: None: a GPU if there is one.

    Raises:
        ModelError: there is none, or it cannot be loaded.
        OptionError: there is no such device.
    """
    from transformers import AutoModelForCausalLM

    where = _device(device)
    load_config(source)  # whose errors name the fix
    read: Any = AutoModelForCausalLM.from_pretrained
    try:
        model = read(source, dtype=DTYPES[dtype] if dtype else "auto", trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"no causal language model in {source}: {reason}\nFix: a folder with config.json and its weights."
        ) from None
    return model.to(where).eval()


def _device(name: str | None) -> torch.device:
    """Raises:
    OptionError: it is no name of a device, or there is none here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise OptionError(f"no device {name!r} here: {reason}. Fix: --device cpu, or leave it out.") from None
    return device
