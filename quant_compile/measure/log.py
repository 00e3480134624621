"""What a search has measured, one line a number, so that a search that was killed goes on where it was.

A number is known by everything that decides it: the model's values, the batches, the weights and their scheme. A line that was
cut off by a kill is left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from quant_compile.lowering.weights import fingerprint
from quant_compile.model.places import parameters_of
from quant_compile.simulate import stored_values

# Of the meaning of a number; another version does not read what an older one wrote.
VERSION = 1


def model_fingerprint(model: nn.Module) -> str:
    """Hash over the class, and the values of all Parameters and buffers."""
    digest = hashlib.sha256(type(model).__qualname__.encode())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter in parameters_of(model):
        stored_values(parameter, names.get(id(parameter), "a weight"))
        _add(digest, parameter)
    for _, buffer in model.named_buffers():
        if buffer.numel() and not buffer.is_meta and not buffer.is_complex():
            _add(digest, buffer)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, values: Tensor) -> None:
    total = fingerprint(values)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    digest.update(f"{tuple(values.shape)}{values.dtype}{total}".encode())


class Log:
    """Numbers by key, in a file that grows; without a path, in memory."""

    def __init__(self, path: Path | None, subject: str) -> None:
        """Read what there is.

        Args:
            subject: what all numbers of this search have in common.
        """
        self.path, self.subject = path, subject
        self.known: dict[str, float] = {}
        if path is not None and path.is_file():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                self._read(line)
        if path is not None and path.is_file() and not path.read_bytes().endswith(b"\n"):
            with path.open("a", encoding="utf-8") as file:  # after a line that was cut off
                file.write("\n")

    def _read(self, line: str) -> None:
        try:
            found = json.loads(line)
            self.known[str(found["key"])] = float("inf") if found["value"] is None else float(found["value"])
        except (ValueError, KeyError, TypeError):
            return

    def key(self, what: str, parts: Iterable[str]) -> str:
        """Of a number."""
        text = "\n".join([str(VERSION), self.subject, what, *parts])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def put(self, key: str, value: float, **words: object) -> None:
        """Remember a number; ``words`` are for people who read the file."""
        self.known[key] = value
        if self.path is not None:
            line = {"key": key, "value": value if value < float("inf") else None, **words}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def subject_of(model: nn.Module, batches: str, method: str) -> str:
    """What all numbers of a search have in common: model, batches and how they are measured."""
    with torch.no_grad():
        return f"{model_fingerprint(model)} {batches} {method}"
