"""The model that ``config.json`` describes, without weights; what the config says is held against the files first.

A config of a few bytes can ask for more layers than memory has, or name other files and code. Reads the config and the headers;
transformers builds the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from quant_compile.checkpoints.config import LONGEST_CONFIG
from quant_compile.checkpoints.description import shown
from quant_compile.checkpoints.errors import CheckpointError, cut
from quant_compile.checkpoints.files import Files, read_json
from quant_compile.inspect.models import construct, load_config
from quant_compile.ir.errors import OptionError, QuantError
from quant_compile.model.division import Division

AGAIN = "Fix: correct config.json, or download it again."
# Keys that count parts, each of which has a tensor: num_hidden_layers, n_layer, decoder_layers, depth, n_routed_experts.
_COUNTS = re.compile(r"(?!.*(?:window|per_tok|shared_kv)).*(?:layers?|experts?|blocks?|depth|labels)")
LABELS = 1 << 20  # of a classifier; transformers makes a name for each
FEW = 256  # counts up to this cost nothing, whatever the files hold
# Bytes that a model may compute for itself as it is made, beside the size of its files: tables of positions and the like.
COMPUTED = 64_000_000
_FACTORIES = (torch.arange, torch.zeros, torch.ones, torch.full, torch.linspace, torch.eye)
# Of Tensor and torch.nn.init, which transformers wraps; on the meta device torch spends a millisecond on each, for no values.
_RANDOM = ("normal_", "uniform_", "kaiming_uniform_")


def read_config(files: Files) -> Any:
    """The transformers config of a checkpoint's folder.

    Raises:
        CheckpointError: it cannot be read, names other files, or counts more parts than the files can have.
    """
    path = files.folder / "config.json"
    if not path.exists():
        _fail(path, "is not there", "Fix: name the folder of a model in Hugging Face format.")
    data = read_json(path, LONGEST_CONFIG)
    if "configuration_files" in data:
        _fail(path, "names other configs (configuration_files), and no path in a config is opened", AGAIN)
    most = max([FEW, len(files.tensors), *(info.shape[0] for info in files.tensors.values() if len(info.shape) > 2)])
    for key, value in _numbers(data):
        if _COUNTS.fullmatch(key) and value > (LABELS if "labels" in key else most):
            _fail(path, f"says {key} {shown(value)}, and the files have {len(files.tensors)} tensors", AGAIN)
    try:
        return load_config(str(files.folder))
    except Exception as error:  # whatever transformers raises for values that it does not expect
        _fail(path, _reason(error), AGAIN)


def build(config: Any, dtype: torch.dtype, files: Files, division: Division | None = None) -> nn.Module:
    """The model of a checkpoint's config, Parameters on the meta device; those that ranks share are DTensors under a ``division``.

    Raises:
        CheckpointError: transformers cannot build it, or it computes large tables.
        OptionError: the ranks cannot share it.
    """
    path = files.config_file
    try:
        model = construct(config, None, dtype, _EmptyOnMeta(path, COMPUTED + files.nbytes))
        model = model if division is None else division.divide(model)
        if hasattr(model, "tie_weights"):
            model.tie_weights()  # type: ignore[operator]
        return model
    except (CheckpointError, OptionError):
        raise
    except Exception as error:
        _fail(path, _reason(error), AGAIN)


class _EmptyOnMeta(TorchFunctionMode):
    """Weights are made with ``torch.empty``; what a model computes for itself (rotary frequencies) is not."""

    def __init__(self, path: Path, most: int) -> None:
        super().__init__()
        self.path, self.most = path, most

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if (
            getattr(func, "__name__", "") in _RANDOM
            and (tensor := kwargs["tensor"] if "tensor" in kwargs else args[0]).is_meta
        ):
            return tensor
        if func is torch.empty:
            kwargs["device"] = "meta"
        elif func in _FACTORIES:
            made = func(*args, **{**kwargs, "device": "meta"})
            if made.numel() * made.element_size() > self.most:
                size = f"{made.numel() * made.element_size():,}"
                _fail(self.path, f"makes the model compute {size} bytes, and its files are far smaller", AGAIN)
        return func(*args, **kwargs)


def _numbers(data: Any) -> Iterator[tuple[str, int]]:
    """Keys of whole numbers, in inner objects too."""
    left = [data]
    while left:
        whole = left.pop()
        for key, value in cast(dict[str, Any], whole).items():
            if isinstance(value, dict):
                left.append(value)
            elif type(value) is int:
                yield key, value


def _reason(error: Exception) -> str:
    """One line for people."""
    if isinstance(error, QuantError):
        return cut(str(error), 1000)
    text = str(error).strip().splitlines()
    return f"transformers cannot build this model: {type(error).__name__}: {cut(text[0] if text else '', 300)}"


def _fail(path: Path, what: str, fix: str) -> NoReturn:
    raise CheckpointError(f"{path}: {what.rstrip('.')}.\n{fix}")
