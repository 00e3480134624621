"""A model with its weights and batches of a user's own text, for the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant_compile.inspect.models import DTYPES, ModelError, load_config
from quant_compile.ir.errors import OptionError


def load_model(source: str, dtype: str | None, device: str | None) -> Any:
    """A causal language model from a folder or a Hugging Face id, in eval mode.

    Args:
        dtype: key of ``DTYPES``; None: the checkpoint's.
        device: None: a GPU if there is one.

    Raises:
        ModelError: there is none, or it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    load_config(source)  # whose errors name the fix
    read: Any = AutoModelForCausalLM.from_pretrained
    try:
        model = read(source, dtype=DTYPES[dtype] if dtype else "auto", trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"no causal language model in {source}: {reason}\nFix: a folder with config.json and its weights."
        ) from None
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def windows(tokenizer: str, text: str, length: int, count: int) -> list[Tensor]:
    """Token ids [1, length] of the first windows of a text file.

    Args:
        tokenizer: folder, ``tokenizer.json`` or Hugging Face id.
        text: path of a file of UTF-8 text.

    Raises:
        OptionError: a file cannot be read, or the text is shorter than one window.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(text)
    if not path.is_file():
        raise OptionError(f"the text file {text} does not exist.")
    try:
        made: Any = (
            PreTrainedTokenizerFast(tokenizer_file=tokenizer)
            if tokenizer.endswith(".json")
            else AutoTokenizer.from_pretrained(tokenizer)
        )
    except (OSError, ValueError) as error:
        raise OptionError(
            f"{tokenizer} has no tokenizer: {str(error).splitlines()[0]} Fix: --tokenizer FOLDER, ID or tokenizer.json."
        ) from None
    content = path.read_text(encoding="utf-8", errors="replace")
    ids = torch.tensor(made(content, add_special_tokens=False)["input_ids"], dtype=torch.long)
    found = [ids[at : at + length][None] for at in range(0, ids.numel() - length + 1, length)][:count]
    if not found:
        raise OptionError(
            f"{text} has {ids.numel()} tokens, fewer than one window of {length}. Fix: a longer text, or --length {ids.numel()}."
        )
    return found
