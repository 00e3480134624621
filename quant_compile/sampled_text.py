"""Text that a language model writes itself, for ``calibrate`` where there is none at hand.

After Williams, Chrysostomou and Aletras 2024, "Self-calibration for Language Model Quantization and Pruning". Reads the model, which is not
changed; neither are torch's generators of random numbers.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quant_compile.ir.errors import OptionError
from quant_compile.model.follow import evaluating
from quant_compile.model.offload import execution_device

WRITTEN, BATCH = 64, 8
"""Sequences that are written together, and that are one batch: logits of whole sequences may be large."""


def own_text(model: nn.Module, sequences: int = 64, length: int = 128, *, seed: int = 0) -> list[Tensor]:
    """Batches of token ids that the model samples from its own distribution, for ``calibrate(model, own_text(model), policy)``.

    Each sequence begins with the config's first token (``bos_token_id``), or with one drawn at random where it has none. An end of text is
    a token like others, after which the text goes on, so none is padded. The model's ``generation_config`` plays no part: no top-k, top-p
    or penalty changes its distribution.

    Args:
        model: a causal language model of transformers; called by its ``generate``, so compiled ones are faster.
        sequences: how many.
        length: tokens of each, the first included.
        seed: other seeds, other texts; the same seed on the same device gives the same ones.

    Returns:
        i64 [at most 8, length] each, on the model's device.

    Raises:
        OptionError: the model cannot write text from one token, or the sizes are none that it can write.
    """
    config = _config_of(model)
    most = getattr(config, "max_position_embeddings", None)
    if sequences < 1 or length < 2 or (isinstance(most, int) and length > most):
        limit = f", at most {most} (max_position_embeddings)" if isinstance(most, int) else ""
        raise OptionError(
            f"own_text wants 1 or more sequences of 2 or more tokens{limit}; got {sequences} of {length}.\n"
            "Fix: change sequences or length."
        )
    device = torch.device(execution_device(model) or next(model.parameters()).device)
    with _seeded(seed, device), torch.no_grad(), evaluating(model), _plain_generation(model):
        first = _first(config, sequences, device)
        written = (_written(model, part, length) for part in first.split(WRITTEN))
        return [batch for part in written for batch in part.split(BATCH)]


def _config_of(model: nn.Module) -> Any:
    """Of the text that a model writes.

    Raises:
        OptionError: it writes none, or from other inputs.
    """
    whole: Any = getattr(model, "config", None)
    fix = "Fix: calibrate by example batches."
    if not callable(getattr(model, "generate", None)) or whole is None:
        raise OptionError(f"{type(model).__name__} has no generate, and writes no text of its own.\n{fix}")
    if getattr(whole, "is_encoder_decoder", False):
        raise OptionError(f"{type(model).__name__} writes text from an encoder's input, not from a first token.\n{fix}")
    config = whole.get_text_config(decoder=True) if hasattr(whole, "get_text_config") else whole
    if not isinstance(getattr(config, "vocab_size", None), int):
        raise OptionError(f"the config of {type(model).__name__} has no vocab_size.\n{fix}")
    return config


def _first(config: Any, count: int, device: torch.device) -> Tensor:
    """[count, 1] ids."""
    begin = getattr(config, "bos_token_id", None)
    if isinstance(begin, int) and 0 <= begin < config.vocab_size:
        return torch.full((count, 1), begin, device=device)
    return torch.randint(0, config.vocab_size, (count, 1)).to(device)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Generator[None]:
    """Generators of random numbers of the CPU and of GPUs begin anew, and come back as they were."""
    kind = device.type if device.type != "cpu" else "cuda"
    module: Any = torch.get_device_module(kind)
    gpus = list(range(module.device_count())) if module.is_available() else []
    with torch.random.fork_rng(gpus, device_type=kind):
        torch.manual_seed(seed)
        yield


@contextmanager
def _plain_generation(model: Any) -> Generator[None]:
    """Out of sight what a model's maker set: transformers takes from there whatever a call leaves open."""
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def _written(model: Any, first: Tensor, length: int) -> Tensor:
    """[rows, length] ids."""
    ids: Tensor = model.generate(
        first,
        attention_mask=torch.ones_like(first),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=length - 1,
    )
    return ids
