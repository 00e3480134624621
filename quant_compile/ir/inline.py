"""Open what hides linears from the matchers: subgraphs that are only called, and attention modules that are one op.

Dynamo leaves ``torch.utils.checkpoint`` and the like as a call of a subgraph, and a ``nn.MultiheadAttention`` or a whole encoder layer
as a single node. In inference a wrapped subgraph is its body, and an attention op is what its documentation says it computes.
Subgraphs that are called or not (``cond``, ``while_loop``) stay; ``ir/account.py`` names the weights that they read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from quant_compile.ir.graph import copy_graph

# Higher-order ops that compute what their body computes; operands are their last arguments, one for each of the body's inputs.
WRAPPERS = {
    *("tag_activation_checkpoint", "wrap_activation_checkpoint", "wrap", "invoke_subgraph", "hints_wrapper"),
    "dynamo_bypassing_wrapper",
}


def inline(gm: fx.GraphModule) -> fx.GraphModule:
    """Open a copied Dynamo graph in place, nested bodies too; returns it."""
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        name = getattr(node.target, "__name__", "")
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            _inline_body(gm, node)
        elif name in ATTENTION:
            _inline_traced(gm, node, ATTENTION[name])
    for node in gm.graph.find_nodes(op="get_attr"):  # fx's own way removes writes from all other subgraphs as well
        if not node.users:
            gm.graph.erase_node(node)
    gm.recompile()
    return gm


def bodies_of(gm: fx.GraphModule, node: fx.Node) -> dict[str, fx.GraphModule]:
    """Name -> the subgraphs that a higher-order op is given."""
    given = [n for n in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(n, fx.Node) and n.op == "get_attr"]
    found = {str(n.target): getattr(gm, str(n.target), None) for n in given}
    return {name: body for name, body in found.items() if isinstance(body, fx.GraphModule)}


def _inline_body(gm: fx.GraphModule, node: fx.Node) -> None:
    bodies = bodies_of(gm, node)
    if getattr(node.target, "_name", "") not in WRAPPERS or len(bodies) != 1 or not _only_taken_apart(node):
        return
    ((name, body),) = bodies.items()
    body = inline(copy_graph(body))
    inputs = list(body.graph.find_nodes(op="placeholder"))
    if len(node.args) >= len(inputs):
        _splice(gm, node, body, node.args[len(node.args) - len(inputs) :], name)


def _splice(gm: fx.GraphModule, node: fx.Node, body: fx.GraphModule, operands: Iterable[Any], prefix: str) -> None:
    """Put a body's nodes in front of ``node``, which its results replace."""
    mapping: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
    stack = node.meta.get("nn_module_stack")
    result: Any = None
    with gm.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "output":
                result = fx.map_arg(inner.args[0], lambda n: mapping[n])
            elif inner.op != "placeholder":
                made = gm.graph.node_copy(inner, lambda n: mapping[n])
                if inner.op == "get_attr":
                    made.target = _adopt(gm, body, str(inner.target), prefix)
                if stack is not None:
                    made.meta.setdefault("nn_module_stack", stack)
                mapping[inner] = made
    _replace(gm.graph, node, result)


def _adopt(gm: fx.GraphModule, body: fx.GraphModule, name: str, prefix: str) -> str:
    """Name under which an attribute of a body is one of the graph's too."""
    value, wanted = getattr(body, name), name
    while hasattr(gm, wanted) and getattr(gm, wanted) is not value:
        wanted = f"{prefix}_{wanted}"
    if not hasattr(gm, wanted):
        setattr(gm, wanted, value)
    return wanted


def _replace(graph: fx.Graph, node: fx.Node, result: Any) -> None:
    """Readers of a node read ``result``; of a tuple, what takes its parts out is the parts."""
    if isinstance(result, tuple | list):
        for user in list(node.users):
            user.replace_all_uses_with(result[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
    else:
        node.replace_all_uses_with(result)
    graph.erase_node(node)


def _inline_traced(gm: fx.GraphModule, node: fx.Node, function: Callable[..., Any]) -> None:
    """Replace a node by the ops of a function of the same arguments."""
    flat, spec = pytree.tree_flatten((list(node.args), dict(node.kwargs)))
    sources = [value for value in flat if isinstance(value, fx.Node)]
    values = [source.meta.get("example_value") for source in sources]
    if not all(isinstance(value, Tensor | int | float | torch.SymInt | torch.SymFloat) for value in values):
        return
    if not _only_taken_apart(node):
        return
    # One input for each node, so that what is one tensor there (self-attention) is one tensor here.
    distinct = list(dict.fromkeys(sources))
    known = {source: source.meta["example_value"] for source in distinct}

    def call(*given: Any) -> Any:
        by_node = dict(zip(distinct, given, strict=True))
        args, kwargs = pytree.tree_unflatten([by_node[v] if isinstance(v, fx.Node) else v for v in flat], spec)
        return function(*args, **kwargs)

    mode = next(value.fake_mode for value in known.values() if isinstance(value, Tensor))  # type: ignore[attr-defined]
    with mode, torch.no_grad():
        body = make_fx(call, pre_dispatch=True, _allow_fake_constant=True)(*known.values())
    for inner in body.graph.nodes:
        if "val" in inner.meta:
            inner.meta["example_value"] = inner.meta.pop("val")
    _splice(gm, node, body, distinct, node.name)


def _only_taken_apart(node: fx.Node) -> bool:
    """Whether a node's value is a tensor, or a tuple of which readers take parts by number."""
    if isinstance(node.meta.get("example_value"), Tensor):
        return True
    return all(
        user.op == "call_function"
        and getattr(user.target, "__name__", "") == "getitem"
        and isinstance(user.args[1], int)
        for user in node.users
    )


# --- what attention ops compute ------------------------------------------------------------------------------------------


def _native_attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_heads: int, in_weight: Tensor, in_bias: Tensor,
    out_weight: Tensor, out_bias: Tensor, mask: Tensor | None = None, need_weights: bool = True,
    average_attn_weights: bool = True, mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``torch._native_multi_head_attention`` [b, s, e] by ``F.multi_head_attention_forward`` [s, b, e]."""
    same = key is query, value is key
    query = query.transpose(0, 1)
    key = query if same[0] else key.transpose(0, 1)
    value = key if same[1] else value.transpose(0, 1)
    padding, attention = (mask, None) if mask_type == 1 else (None, mask)
    if mask is not None and mask_type not in (0, 1):
        raise NotImplementedError("a mask of both kinds in one")
    out, weights = _attention(
        query, key, value, embed_dim, num_heads, in_weight, in_bias, None, None, False, 0.0, out_weight, out_bias,
        training=False, key_padding_mask=padding, need_weights=need_weights, attn_mask=attention,
        average_attn_weights=average_attn_weights,
    )  # fmt: skip
    return out.transpose(0, 1), weights


def _encoder_layer(
    x: Tensor, embed_dim: int, num_heads: int, in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, out_bias: Tensor,
    use_gelu: bool, norm_first: bool, eps: float, norm1: Tensor, norm1_bias: Tensor, norm2: Tensor, norm2_bias: Tensor,
    up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, mask: Tensor | None = None, mask_type: int | None = None,
) -> Tensor:  # fmt: skip
    """``torch._transformer_encoder_layer_fwd``: what the layer's Python code computes in evaluation."""

    def attend(y: Tensor) -> Tensor:
        parts = (in_weight, in_bias, out_weight, out_bias)
        return _native_attention(y, y, y, embed_dim, num_heads, *parts, mask, False, True, mask_type)[0]

    def feed(y: Tensor) -> Tensor:
        hidden = F.linear(y, up, up_bias)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), down, down_bias)

    def normed(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(y, (embed_dim,), weight, bias, eps)

    if norm_first:
        x = x + attend(normed(x, norm1, norm1_bias))
        return x + feed(normed(x, norm2, norm2_bias))
    x = normed(x + attend(x), norm1, norm1_bias)
    return normed(x + feed(x), norm2, norm2_bias)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_heads: int, in_weight: Any, in_bias: Any, *others: Any, **named: Any
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``F.multi_head_attention_forward``; other keys than queries take the parts of the joint projection one by one, as matrices."""
    if in_weight is None or query is key or named.get("use_separate_proj_weight", False):
        return F.multi_head_attention_forward(
            query, key, value, embed_dim, num_heads, in_weight, in_bias, *others, **named
        )
    parts = in_weight.view(3, embed_dim, embed_dim)
    apart = {f"{name}_proj_weight": parts[i] for i, name in enumerate("qkv")}
    return F.multi_head_attention_forward(
        query, key, value, embed_dim, num_heads, None, in_bias, *others, **named | apart | {"use_separate_proj_weight": True}
    )  # fmt: skip


ATTENTION: dict[str, Callable[..., Any]] = {
    "multi_head_attention_forward": _attention,
    "_native_multi_head_attention": _native_attention,
    "_transformer_encoder_layer_fwd": _encoder_layer,
}
