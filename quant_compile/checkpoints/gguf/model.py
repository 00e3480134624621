"""A GGUF file as the model to build: its architecture, its config in transformers, and its tensors fitted to the model that was built.

Reads heads and the small tensors of rotary factors; counts that the metadata promise are held against the tensors before anything is built.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quant_compile.checkpoints.description import shown
from quant_compile.checkpoints.errors import CheckpointError, cut
from quant_compile.checkpoints.gguf.architectures import ARCHITECTURES, Architecture, Facts, own_frequencies
from quant_compile.checkpoints.gguf.container import AGAIN, fail
from quant_compile.checkpoints.gguf.files import GgufFiles, open_files
from quant_compile.checkpoints.gguf.names import GgufResolver
from quant_compile.checkpoints.gguf.reader import GgufDescription
from quant_compile.checkpoints.names import Mapped
from quant_compile.checkpoints.weight import REAL

# Sizes of a config that make as many parts, each of which has a tensor.
_LAYERS, _EXPERTS = ("num_hidden_layers",), ("num_experts", "num_local_experts", "n_routed_experts")
LARGEST = 1 << 24  # any other size


@dataclass(frozen=True)
class GgufModel:
    """What a file says of its model.

    Attributes:
        files: its tensors.
        facts: its metadata.
        architecture: what it is in transformers.
        config: of transformers; its dtype is that of the matrices where all are of one, else bf16.
    """

    files: GgufFiles
    facts: Facts
    architecture: Architecture
    config: Any

    def fit(self, model: nn.Module) -> tuple[Mapped, GgufDescription]:
        """What each tensor is in the model that was built; sets frequencies that no config can say.

        Raises:
            CheckpointError: the tensors do not fit.
        """
        mapped, description = GgufResolver(model, self.files, self.architecture).resolve()
        factors = own_frequencies(self.facts, self.config)
        if factors is None:
            return mapped, description
        self._divide(model, torch.tensor(factors))
        note = (
            "rotary frequencies are divided by the file's factors, which follow from no rule that a config has: a folder that save "
            "writes loses them"
        )
        return mapped, replace(description, notes=(*description.notes, note))

    def _divide(self, model: nn.Module, factors: torch.Tensor) -> None:
        for module in model.modules():
            for name in ("inv_freq", "original_inv_freq"):
                buffer = module._buffers.get(name)
                if buffer is not None and buffer.shape == factors.shape:
                    module._buffers[name] = buffer / factors.to(buffer.device)
                elif buffer is not None:
                    fail(
                        self.files.folder,
                        f"has {len(factors)} rotary factors, and the model {buffer.numel()} frequencies",
                    )


def read_model(path: str | Path) -> GgufModel:
    """A file's model.

    Raises:
        CheckpointError: the file cannot be read, is of an architecture that is not known, or contradicts itself.
    """
    files = open_files(path)
    name = files.head.need("general.architecture", str)
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        fix = "Fix: load the model's safetensors checkpoint with a policy that has a GGUF scheme."
        fail(files.folder, f"is of the architecture {cut(name, 60)!r}; read here are {', '.join(ARCHITECTURES)}", fix)
    facts = Facts(files, name)
    made = architecture.config(facts)
    _check(files, made)
    return GgufModel(files, facts, architecture, _config(files, made))


def _check(files: GgufFiles, made: dict[str, Any]) -> None:
    """Refuse sizes beyond what the tensors can be."""
    experts = max((info.shape[0] for info in files.tensors.values() if len(info.shape) > 2), default=0)
    for key, value in made.items():
        if type(value) is not int or key.endswith("_id"):
            continue
        count = len(files.tensors)
        most = count if key in _LAYERS else max(experts, count) if key in _EXPERTS else LARGEST
        least = 1 if key.startswith("num_") or key.endswith("_size") else 0
        if not least <= value <= most:
            fail(files.folder, f"makes {key} {value}, and its {count} tensors allow {least} to {most}")
    if made["num_attention_heads"] % made["num_key_value_heads"]:
        heads = made["num_attention_heads"], made["num_key_value_heads"]
        fail(files.folder, f"has {heads[0]} heads of queries, which {heads[1]} of keys do not divide")


def _config(files: GgufFiles, made: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.for_model(**made)
    except Exception as error:  # whatever transformers raises for values that it does not expect
        text = cut((str(error).strip().splitlines() or [""])[0], 300)
        raise CheckpointError(
            f"{files.folder}: transformers cannot build {shown(made['model_type'])}: {type(error).__name__}: {text}.\n{AGAIN}"
        ) from None
    matrices = {info.dtype for info in files.tensors.values() if len(info.shape) > 1 and "gate_inp" not in info.name}
    config.dtype = next(iter(matrices)) if len(matrices) == 1 and matrices <= set(REAL) else torch.bfloat16
    return config
