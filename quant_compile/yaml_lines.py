"""YAML as plain data plus the line of every key and item, so that a wrong value is reported where it stands.

Reads text, never files. Builds only what ``yaml.safe_load`` builds; on top of that a key given twice is an error (the
plain loader would silently keep the last one).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from quant_compile.ir.errors import PolicyError

KeyPath = tuple[str | int, ...]
# Aliases may repeat parts of a document; a file that unfolds into more nodes than this is not a policy.
MAX_NODES = 20_000


@dataclass(frozen=True)
class Document:
    """Plain data and where its parts stand.

    Attributes:
        data: dicts, lists and scalars.
        label: file name (or other origin) that errors begin with.
        lines: path of keys and indices -> line, from 1; empty when the data never was text.
    """

    data: Any
    label: str
    lines: Mapping[KeyPath, int] = field(default_factory=dict[KeyPath, int])

    def line(self, path: KeyPath) -> int | None:
        """Line of ``path``, or of the nearest thing around it."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return None

    def fail(self, path: KeyPath, message: str) -> NoReturn:
        """Raise a PolicyError that names the line (or, without text, the path)."""
        line = self.line(path)
        if line is not None:
            raise PolicyError(f"{self.label}:{line}: {message}")
        where = path_text(path)
        raise PolicyError(f"{self.label}: {where}: {message}" if where else f"{self.label}: {message}")


def path_text(path: KeyPath) -> str:
    """``("rules", 1, "scheme")`` -> ``rules[1].scheme``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def read_yaml(text: str, label: str) -> Document:
    """Read one YAML document.

    Raises:
        PolicyError: no valid YAML, a tag that is not plain data, a key twice, or nothing at all; names the line.
    """
    try:
        loader = yaml.SafeLoader(text)
    except yaml.YAMLError as error:
        raise _yaml_error(label, error) from None
    try:
        node = loader.get_single_node()
        if node is None:
            raise PolicyError(f"{label}:1: the file is empty. Fix: write at least `default: FP8_DYNAMIC`.")
        reader = _NodeReader(loader, label)
        data = reader.read(node, (), ())
    except yaml.YAMLError as error:
        raise _yaml_error(label, error) from None
    except RecursionError:
        raise PolicyError(f"{label}:1: the YAML is nested too deeply to be a policy") from None
    finally:
        loader.dispose()
    return Document(data, label, reader.lines)


def _yaml_error(label: str, error: yaml.YAMLError) -> PolicyError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    line = mark.line + 1 if mark is not None else 1
    return PolicyError(f"{label}:{line}: not readable as YAML: {problem}")


class _NodeReader:
    """Turns composed nodes into data while noting lines."""

    def __init__(self, loader: yaml.SafeLoader, label: str) -> None:
        self.loader, self.label = loader, label
        self.lines: dict[KeyPath, int] = {}
        self.count = 0

    def read(self, node: Node, path: KeyPath, above: tuple[int, ...]) -> Any:
        """Data of ``node``; ``above`` are the ids of the nodes around it."""
        self.count += 1
        if id(node) in above or self.count > MAX_NODES:
            raise PolicyError(f"{self.label}:{_line(node)}: the YAML aliases unfold without end")
        self.lines.setdefault(path, _line(node))
        inside = (*above, id(node))
        if isinstance(node, ScalarNode):
            return self.loader.construct_object(node)
        if isinstance(node, SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.read(item, (*path, index), inside) for index, item in enumerate(node.value)]
        if isinstance(node, MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return {key: self.read(value, (*path, key), inside) for key, value in self._pairs(node, path)}
        raise PolicyError(f"{self.label}:{_line(node)}: YAML tag {node.tag!r} is not plain data")

    def _pairs(self, node: MappingNode, path: KeyPath) -> Iterator[tuple[str, Node]]:
        seen: dict[str, int] = {}
        for key_node, value in node.value:
            line = _line(key_node)
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise PolicyError(f"{self.label}:{line}: merge keys (<<) are not read. Fix: write the keys out.")
            key = self.loader.construct_object(key_node) if isinstance(key_node, ScalarNode) else None
            if not isinstance(key, str):
                raise PolicyError(f"{self.label}:{line}: keys must be text, got {key_node.value!r}")
            if key in seen:
                raise PolicyError(f"{self.label}:{line}: key {key!r} is given twice (first on line {seen[key]})")
            seen[key] = line
            self.lines[(*path, key)] = line
            yield key, value


def _line(node: Node) -> int:
    return node.start_mark.line + 1
