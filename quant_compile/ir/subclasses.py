"""Which products of a graph a tensor subclass takes part in: its operations are its own, so they stay as they are.

A weight that another library has quantized, a DTensor, or a user's wrapper has no plain values to pack, and its kernels are part
of the subclass. Parameter's own subclasses that change no operation are plain. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import fx
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


@lru_cache(maxsize=1024)
def own_operations(kind: type) -> bool:
    """Whether a tensor class says itself what operations over it do; one that only says when it may be read does not."""
    if getattr(kind, "behaves_as_parameter", False):
        return False
    function = getattr(kind, "__torch_function__", None)
    usual = (torch.Tensor.__torch_function__, Parameter.__torch_function__)
    if not any(getattr(function, "__func__", function) is getattr(known, "__func__", known) for known in usual):
        return True
    return getattr(kind, "__torch_dispatch__", None) is not getattr(torch.Tensor, "__torch_dispatch__", None)


def of_subclasses(graph: fx.Graph, parameters: Mapping[int, Any]) -> dict[fx.Node, str]:
    """Nodes that compute with a subclass's operations -> which, as the reason why they cannot be quantized.

    Args:
        graph: of ``copy_graph``.
        parameters: argument position -> Parameter.
    """
    found: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        kinds = (_kind(source, parameters) for source in (*node.all_input_nodes, node))
        kind = next((kind for kind in kinds if kind is not None), None)
        if kind is not None:
            found[node] = f"it computes with tensors of {kind.__name__}, a subclass whose operations are its own"
    return found


def _kind(node: fx.Node, parameters: Mapping[int, Any]) -> type | None:
    """The subclass behind a node's value, or None for a plain tensor."""
    value = node.meta.get("example_value")
    if isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value):
        return type(value)
    parameter = parameters.get(node.meta.get("argument", -1)) if node.op == "placeholder" else None
    return type(parameter) if parameter is not None and own_operations(type(parameter)) else None
