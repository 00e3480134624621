"""A model with its weights and batches of a user's own text, for the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant_compile.ir.errors import OptionError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load_model(source: str, dtype: str | None, device: str) -> Any:
    """A causal language model from a folder or a Hugging Face id, in eval mode.

    Raises:
        OptionError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[dtype] if dtype else "auto")
    except (OSError, ValueError) as error:
        raise OptionError(f"{source} cannot be loaded: {str(error).splitlines()[0]}") from None
    return model.eval().to(device)


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
