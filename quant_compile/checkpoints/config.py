"""A checkpoint's configs to one description.

Reads ``config.json``, ``hf_quant_config.json``, ``quantize_config.json`` and ``quantization_config.json``, and nothing that they name.
Files that contradict each other are an error; a method that is not known is one too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, cast

from quant_compile.checkpoints.description import Description, Keys, shown
from quant_compile.checkpoints.errors import CheckpointError
from quant_compile.checkpoints.files import read_json
from quant_compile.checkpoints.formats import METHODS

LONGEST_CONFIG = 16_000_000
# What two files that describe one checkpoint must agree in, where both say it.
COMPARED = ("bits", "group_size", "sym", "desc_act", "quant_algo", "checkpoint_format", "zero_point", "load_in_4bit")
METHOD_FIX = f"Fix: load the original checkpoint with a policy; known methods are {', '.join(METHODS)}."


def describe(folder: Path) -> Description:
    """What the configs of a folder say.

    Raises:
        CheckpointError: they cannot be read, contradict each other, or name a method that is not known.
    """
    found = _configs(folder)
    if not found:
        return Description()
    method = _method(found)
    if method not in METHODS:
        _fail(found[0].where, f"quant_method {shown(method)} is not read here", METHOD_FIX)
    main = found[0]
    for other in found[1:]:
        _agree(main, other)
    merged = dict(main.data)
    for other in found[1:]:
        for key, value in other.data.items():
            merged.setdefault(key, value)
    merged.pop("quant_method", None)
    made = METHODS[method](Keys({"quant_method": method, **merged}, main.where))
    seen = tuple(f"read {other.where} as well" for other in found[1:])
    return replace(made, notes=(*made.notes, *seen))


def _configs(folder: Path) -> list[Keys]:
    """The objects that describe quantization, the one of ``config.json`` first."""
    out: list[Keys] = []
    path = folder / "config.json"
    if path.is_file():
        config = read_json(path, LONGEST_CONFIG)
        text = config.get("text_config")
        inner = cast(dict[str, Any], text).get("quantization_config") if isinstance(text, Mapping) else None
        found = ((config.get("quantization_config"), "quantization_config"), (inner, "text_config.quantization_config"))
        # Older compressed-tensors called it so.
        for value, where in (*found, (config.get("compression_config"), "compression_config")):
            if value is not None:
                out.append(_object(value, f"{path}: {where}"))
    for name, key in (
        ("hf_quant_config.json", "quantization"),
        ("quantize_config.json", ""),
        ("quantization_config.json", ""),
    ):
        path = folder / name
        if path.is_file():
            config = read_json(path, LONGEST_CONFIG)
            out.append(_object(config.get(key), f"{path}: {key}") if key else Keys(config, str(path)))
    return [keys for keys in out if keys.data]


def _object(value: Any, where: str) -> Keys:
    if not isinstance(value, Mapping):
        _fail(where, f"must be an object, got {shown(value)}", "Fix: write the checkpoint again, or correct this key.")
    return Keys(cast(Mapping[str, Any], value), where)


def _method(found: list[Keys]) -> str:
    """The method of all the configs, by their own word or by the file's name."""
    named = [(keys, method) for keys in found if (method := _own_method(keys)) is not None]
    if not named:
        _fail(found[0].where, "has no quant_method", METHOD_FIX)
    first = named[0]
    for keys, method in named[1:]:
        if _family(method) != _family(first[1]):
            text = f"says {shown(method)}, and {first[0].where} says {shown(first[1])}"
            _fail(keys.where, text, "Fix: remove the file that is not of this checkpoint.")
    return first[1]


def _family(method: str) -> str:
    return "auto-round" if "auto-round" in method or method in ("gptq", "awq") else method


def _own_method(keys: Keys) -> str | None:
    value = keys.data.get("quant_method")
    if value is not None:
        if not isinstance(value, str):
            _fail(keys.where, f"quant_method must be a text, got {shown(value)}", METHOD_FIX)
        method = value.lower().replace("_", "-")
        return "modelopt" if method.startswith("modelopt") else method
    if keys.where.endswith("compression_config"):
        return "compressed-tensors"
    if "hf_quant_config.json" in keys.where or "quant_algo" in keys.data:
        return "modelopt"
    return "gptq" if "quantize_config.json" in keys.where else None


def _agree(main: Keys, other: Keys) -> None:
    for key in COMPARED:
        a, b = main.data.get(key), other.data.get(key)
        if a is not None and b is not None and a != b:
            text = f"says {key} {shown(b)}, and {main.where} says {shown(a)}"
            _fail(other.where, text, "Fix: remove the file that is not of this checkpoint.")


def _fail(where: str, what: str, fix: str) -> NoReturn:
    raise CheckpointError(f"{where}: {what}.\n{fix}")
