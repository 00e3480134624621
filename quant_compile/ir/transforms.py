"""Which nodes of a Dynamo graph a gradient or a function transform passes through.

Kernels of packed planes have no derivative and no rule for batched tensors: under ``torch.func.grad`` they would give zeros, and
``autograd``, ``jvp`` and ``vmap`` would fail in their own words. Reads the order of a copied graph's nodes and their traced
values; changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_OPENS = {
    "_grad_increment_nesting": "torch.func.grad or vjp",
    "_jvp_increment_nesting": "torch.func.jvp",
    "_vmap_increment_nesting": "torch.func.vmap",
    "_func_increment_nesting": "torch.func.functionalize",
    "_enter_dual_level": "forward-mode gradients",
}
_CLOSES = {
    "_grad_decrement_nesting": "_grad_increment_nesting",
    "_jvp_decrement_nesting": "_jvp_increment_nesting",
    "_vmap_decrement_nesting": "_vmap_increment_nesting",
    "_func_decrement_nesting": "_func_increment_nesting",
    "_exit_dual_level": "_enter_dual_level",
}


def transformed(graph: fx.Graph) -> dict[fx.Node, str]:
    """Nodes that a transform reads through -> why a product there cannot be quantized."""
    found: dict[fx.Node, str] = {}
    opened: list[str] = []
    tracked = torch.is_grad_enabled() or any(map(_tracks, graph.nodes))
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name in _OPENS:
            opened.append(name)
        elif name in _CLOSES:
            _close(opened, _CLOSES[name])
        elif opened:
            inside = " inside ".join(_OPENS[level] for level in reversed(opened))
            found[node] = f"it is inside {inside}, and kernels of packed planes have no rule for that"
        elif tracked and _has_gradient(node.meta.get("example_value")):
            found[node] = "a gradient is taken through it, and kernels of packed planes have no derivative"
    return found


def _close(opened: list[str], level: str) -> None:
    """Leave the innermost level of a kind; a graph that begins within one may close more than it opens."""
    for position in reversed(range(len(opened))):
        if opened[position] == level:
            del opened[position]
            return


def _tracks(node: fx.Node) -> bool:
    """Whether a node turns gradients on, for all that follows or for one tensor.

    Without one, in a graph that starts with gradients off, they are off throughout; yet a traced value may say that it requires
    one (views of a Parameter do).
    """
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name in ("_set_grad_enabled", "set_grad_enabled"):
        return True in node.args
    return name in ("requires_grad_", "enable_grad", "grad", "backward") and node.op in ("call_function", "call_method")


def _has_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad and not isinstance(value, torch.nn.Parameter)
