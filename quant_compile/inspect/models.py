"""Models built from their configuration alone: no weights are read, and none are needed to plan or to trace.

Reads a local folder, a GGUF file or a Hugging Face id through transformers, which is imported late because that takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quant_compile.ir.errors import OptionError, QuantError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class ModelError(QuantError, ValueError):
    """A model cannot be built from what was named; says why and what to do."""


@dataclass(frozen=True)
class ModelSpec:
    """What to build.

    Attributes:
        source: folder with a config.json, such a file, a GGUF file, or a Hugging Face id.
        class_name: transformers class, e.g. ``AutoModelForMaskedLM``; None takes the one that the config names.
        dtype: key of DTYPES; None takes the config's own, else bf16.
        layers: number of layers instead of the config's, to keep printed graphs short.
    """

    source: str
    class_name: str | None = None
    dtype: str | None = None
    layers: int | None = None


def load_config(source: str) -> Any:
    """The transformers config of a folder, a config.json, a GGUF file or a Hugging Face id (the local cache is tried first).

    Raises:
        ModelError: there is none, or transformers cannot read it.
    """
    from transformers import AutoConfig

    read: Callable[..., Any] = AutoConfig.from_pretrained
    path = Path(source)
    if path.suffix == ".gguf":
        from quant_compile.checkpoints.gguf.model import read_model

        return read_model(path).config
    if path.is_file():
        path = path.parent if path.name == "config.json" else path
    if path.exists() and not (path / "config.json").is_file():
        raise ModelError(f"{source} has no config.json. Fix: name the folder of a model in Hugging Face format.")
    if path.exists():
        # Code that a folder names is never run; without a word transformers would ask on the terminal.
        config = _read_config(read, str(path), local_files_only=True, trust_remote_code=False)
        if hasattr(config, "auto_map"):
            del config.auto_map
        return config
    try:
        return read(source, local_files_only=True)
    except (OSError, ValueError):
        return _read_config(read, source)


def _read_config(read: Callable[..., Any], source: str, **options: Any) -> Any:
    try:
        return read(source, **options)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"no configuration for {source!r}: there is no such folder, it is not in the Hugging Face cache, and it "
            f"could not be downloaded ({reason}).\nFix: name a local folder that has the model's config.json, or go "
            "online; weights are not needed."
        ) from None
    except (ValueError, KeyError, ImportError) as error:
        raise ModelError(f"transformers cannot read the configuration of {source!r}: {error}") from None


def build_model(spec: ModelSpec) -> nn.Module:
    """The model of a spec on the meta device, in eval mode.

    Raises:
        ModelError: no configuration, or the class cannot be built from it.
        OptionError: transformers has no class of that name, or the model fewer layers than asked for.
    """
    config = load_config(spec.source)
    if spec.layers is not None:
        _set_layers(config, spec.layers)
    return construct(config, spec.class_name, _dtype(config, spec.dtype)).eval()


def _dtype(config: Any, name: str | None) -> torch.dtype:
    if name is not None:
        return DTYPES[name]
    own = getattr(config, "dtype", None)
    if isinstance(own, str):
        own = getattr(torch, own, None)
    return own if isinstance(own, torch.dtype) else torch.bfloat16


def _set_layers(config: Any, layers: int) -> None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if layers < 1 or not hasattr(text, "num_hidden_layers"):
        raise OptionError(f"--layers {layers}: the number of layers of this configuration cannot be set to that")
    if layers > text.num_hidden_layers:
        raise OptionError(f"--layers {layers}: this model has {text.num_hidden_layers}")
    text.num_hidden_layers = layers
    kinds = getattr(text, "layer_types", None)
    if kinds is not None:
        text.layer_types = list(kinds)[:layers]


def construct(
    config: Any, class_name: str | None, dtype: torch.dtype, where: AbstractContextManager[Any] | None = None
) -> nn.Module:
    """The model of a configuration, made inside of ``where`` (None: the meta device).

    Raises:
        ModelError: the class cannot be built from it.
        OptionError: transformers has no class of that name.
    """
    import transformers

    names = [class_name] if class_name else [*(config.architectures or []), "AutoModelForCausalLM", "AutoModel"]
    classes = [cls for name in names if (cls := _class_of(transformers, name)) is not None]
    if not classes:
        raise OptionError(f"transformers has no class {class_name!r}")
    failure: Exception | None = None
    for cls in classes:
        make = getattr(cls, "from_config", None) or getattr(cls, "_from_config", None)
        if make is None:
            raise OptionError(f"{cls.__name__} is not a model class of transformers")
        wanted = getattr(cls, "config_class", None)
        if wanted is not None and not isinstance(config, wanted):
            failure = ValueError(f"it is a {type(config).__name__}, and the class takes a {wanted.__name__}")
            continue
        try:
            with torch.device("meta") if where is None else where:
                return make(config, dtype=dtype)
        except ValueError as error:  # what transformers raises for a config of another family
            failure = error
    raise ModelError(f"{classes[-1].__name__} cannot be built from this configuration: {failure}")


def _class_of(library: Any, name: object) -> Any:
    """A class of transformers that is named in a config, or None."""
    found = getattr(library, name, None) if isinstance(name, str) and name.isidentifier() else None
    return found if isinstance(found, type) else None


def example_inputs(model: nn.Module, tokens: int) -> Mapping[str, Any]:
    """Keyword arguments to trace ``model`` with: ``tokens`` token ids, or one image or one stretch of sound.

    Raises:
        ModelError: the model takes something else.
    """
    parameter = next(model.parameters())
    config: Any = getattr(model, "config", None)
    if config is None:
        raise ModelError("the model has no config to make example inputs from")
    ids = torch.ones(1, tokens, dtype=torch.long, device=parameter.device)
    main = getattr(model, "main_input_name", "input_ids")
    inputs: dict[str, Any] = {main: _main_input(main, config, ids, parameter)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    if hasattr(config, "use_cache"):
        inputs["use_cache"] = False  # a cache adds nodes and no linear
    return inputs


def _main_input(name: str, config: Any, ids: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if name == "input_ids":
        return ids
    if name == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return torch.zeros(1, getattr(config, "num_channels", 3), height, width, dtype=like.dtype, device=like.device)
    if name == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 1500)
        return torch.zeros(1, getattr(config, "num_mel_bins", 80), frames, dtype=like.dtype, device=like.device)
    raise ModelError(f"no example inputs are known for a model whose main input is {name!r}")
