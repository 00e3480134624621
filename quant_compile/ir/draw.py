"""Draw the neighbourhood of nodes of a graph: what they read and what reads them, modules as one box each.

Reads nodes, their ``example_value``, module stack and stack trace. Writes nothing.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.nn import Parameter

from quant_compile.ir.graph import INLINED, short_dtype, target_name
from quant_compile.ir.sites import module_class
from quant_compile.page.views import Box, Drawing

MOST_INPUTS, MOST_READERS, MOST_FRAMES = 3, 4, 3
_FAR = 6  # nodes between two boxes that an edge is drawn across
_NEAR = 32  # nodes on each side among which those of one module or template are
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>[^\n]+)\n\s*(?P<code>[^\n]*)')
_WRAPPER = re.compile(r"\bfunc\(.*\*args")  # what decorators call says nothing of the model
_TORCH = str(Path(torch.__file__).parent)


class Scene:
    """A graph that is drawn from: its nodes by place, and what belongs together."""

    def __init__(self, graph: fx.Graph) -> None:
        self._nodes = list(graph.nodes)
        self.place = {node: i for i, node in enumerate(self._nodes)}
        self._wholes: dict[fx.Node, tuple[fx.Node, ...]] = {}

    def whole(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """All nodes of a node's module, where that is a leaf such as a norm; all of one inlined template; else the node alone."""
        found = self._wholes.get(node)
        if found is None:
            found = self._find_whole(node)
            self._wholes |= dict.fromkeys(found, found)
        return found

    def _find_whole(self, node: fx.Node) -> tuple[fx.Node, ...]:
        place = self.place[node]
        around = self._nodes[max(0, place - _NEAR) : place + _NEAR]
        label = node.meta.get(INLINED)
        if label is not None:
            return tuple(other for other in around if other.meta.get(INLINED) == label)
        own = _stack(node)
        if node.op == "placeholder" or not own or "site" in node.meta:
            return (node,)
        inside = [other for other in around if other.op != "placeholder" and _stack(other)[: len(own)] == own]
        is_leaf = all(_stack(other) == own and "site" not in other.meta for other in inside)
        return tuple(inside) if is_leaf and 1 < len(inside) < _NEAR else (node,)


class Sketch:
    """A drawing in the making: each box stands for some nodes of a graph."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._boxes: dict[int, Box] = {}
        self._of: dict[fx.Node, int] = {}

    def add(self, box: Box, nodes: Iterable[fx.Node]) -> None:
        """A box for nodes that have none yet."""
        number = len(self._boxes)
        self._boxes[number] = box
        for node in nodes:
            self._of.setdefault(node, number)

    def add_producers(self, node: fx.Node, levels: int) -> None:
        """Boxes of what a node reads, ``levels`` back."""
        if levels == 0:
            return
        for source in map(whole_value, _values(node.all_input_nodes)[:MOST_INPUTS]):
            if source not in self._of and not _is_weight(source):
                members = self._whole(source)
                self.add(_box_of(source, members), members)
                for member in members:
                    self.add_producers(member, levels - 1)

    def add_readers(self, node: fx.Node) -> None:
        """Boxes of what reads a node."""
        readers = [user for user in node.users if user not in self._of and user.op != "output"]
        for user in readers[:MOST_READERS]:
            members = self._whole(user)
            last = next((member for member in reversed(members) if _is_read_outside(member, members)), user)
            self.add(_box_of(last, members), members)
        if len(readers) > MOST_READERS:
            self.add(Box(f"{len(readers) - MOST_READERS} more", kind="op"), readers[MOST_READERS:])

    def done(self) -> Drawing:
        """The drawing, boxes in graph order."""
        places: dict[int, int] = {}
        for node, number in self._of.items():
            places[number] = min(places.get(number, self._scene.place[node]), self._scene.place[node])
        order = sorted(places, key=lambda number: places[number])
        place = {number: i for i, number in enumerate(order)}
        edges = {
            (place[start], place[end])
            for node, end in self._of.items()
            for source in node.all_input_nodes
            for start in self._origins(source, _FAR)
            if start != end
        }
        return Drawing(tuple(self._boxes[number] for number in order), tuple(sorted(edges)))

    def _whole(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """What is drawn with a node; alone where some of that is drawn already, as of the module that a site is in."""
        members = self._scene.whole(node)
        return (node,) if any(member in self._of for member in members) else members

    def _origins(self, node: fx.Node, far: int) -> set[int]:
        """The boxes that a value comes from, across nodes without one."""
        if node in self._of:
            return {self._of[node]}
        if far == 0:
            return set()
        return {box for source in node.all_input_nodes for box in self._origins(source, far - 1)}


def value_text(value: Any) -> str:
    """dtype and shape of a value: ``bf16[1, 16, 256]``; of several, one after the other; nothing for what is no tensor."""
    if isinstance(value, torch.Tensor):
        return f"{short_dtype(value.dtype)}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, list | tuple):
        return " ".join(text for part in value if (text := value_text(part)))
    return ""


def shape_of(node: fx.Node) -> str:
    """dtype and shape of what a node makes."""
    return value_text(node.meta.get("example_value"))


def source_of(node: fx.Node) -> tuple[str, ...]:
    """The model's lines that made a node, the innermost last; torch's own are left out."""
    frames: list[str] = []
    for found in _FRAME.finditer(node.meta.get("stack_trace") or ""):
        if not found["file"].startswith(_TORCH) and not _WRAPPER.search(found["code"]):
            frames.append(
                f"{_short_path(found['file'])}:{found['line']} in {found['function']}: {found['code'].strip()}"
            )
    return tuple(frames[-MOST_FRAMES:])


def _short_path(file: str) -> str:
    """A path from the package on; the machine's own folders say nothing of the model."""
    _, found, rest = file.rpartition("/site-packages/")
    return rest if found else "/".join(Path(file).parts[-2:])


def _values(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    return [node for node in nodes if isinstance(node.meta.get("example_value"), torch.Tensor | list | tuple)]


def whole_value(node: fx.Node) -> fx.Node:
    """What a value is a part of."""
    while node.target is operator.getitem and _values(node.all_input_nodes[:1]):
        whole = node.all_input_nodes[0]
        if isinstance(whole.meta.get("example_value"), torch.Tensor):
            break  # a slice
        node = whole
    return node


def _is_weight(node: fx.Node) -> bool:
    """A plane, or a Parameter or buffer of the model."""
    static = (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type")
    is_parameter = isinstance(node.meta.get("example_value"), Parameter)
    return node.op == "placeholder" and ("plane" in node.meta or static is not None or is_parameter)


def _stack(node: fx.Node) -> tuple[str, ...]:
    return tuple(node.meta.get("nn_module_stack") or ())


def _is_read_outside(node: fx.Node, members: Sequence[fx.Node]) -> bool:
    return any(user not in members for user in node.users)


def _box_of(node: fx.Node, members: Sequence[fx.Node]) -> Box:
    if node.op == "placeholder":
        return Box("input", shape_of(node), "input")
    if INLINED in node.meta:
        return Box("quantize", shape_of(node), "quantize", f"{len(members)} operations, fused by Inductor")
    if len(members) > 1:
        return Box(module_class(node) or op_label(node), shape_of(node), "module", f"{len(members)} operations")
    kind = "fused" if op_label(node).startswith("sglq") else "op"
    return Box(op_label(node), shape_of(node), kind)


def op_label(node: fx.Node) -> str:
    """The operation of a node."""
    return node.target if isinstance(node.target, str) else target_name(node.target)
