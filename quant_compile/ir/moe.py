"""Mixture-of-experts blocks as data: their activation, their problem, and the plain torch truth of ``sglq.moe``.

    y[t] = sum_j weights[t, j] * (act(x[t] @ w13[e].T + b13[e]) @ w2[e].T + b2[e]),   e = ids[t, j]

Weights of one block are planes stacked over experts: every plane of a family's row form with a leading dimension E. w13 holds
the gate rows, then the up rows; of experts without a gate the up rows alone. An id outside of 0..E-1 (a sentinel of expert
parallelism) adds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from quant_compile.ir.errors import SchemeError
from quant_compile.ir.family import Planes, bits_per_weight, family_of
from quant_compile.ir.scheme import GGUF, Scheme, parse

# A scheme of no quantization: planes are the weights themselves. It shows that a block was understood, to the last bit or so.
NONE = "none"


@dataclass(frozen=True)
class Activation:
    """What an expert does to its hidden layer [.., gate | up], or [.., up] where it has no gate.

    Attributes:
        kind: ``silu`` (gate * sigmoid(alpha * gate)), ``gelu``, ``gelu_tanh`` or ``relu``.
        alpha: factor inside of silu's sigmoid (1 for plain silu, 1.702 for GPT-OSS).
        limit: gates are clamped from above and ups from both sides at this value; inf: not at all.
        shift: added to up.
        gated: gate times up; else the kind is applied to up (also ``relu2``, the square of relu), and nothing else.
    """

    kind: str
    alpha: float = 1.0
    limit: float = float("inf")
    shift: float = 0.0
    gated: bool = True

    @property
    def text(self) -> str:
        """As one word: ``silu``, ``silu(1.702,7.0,1.0)``, ``up-relu2`` without a gate."""
        if not self.gated:
            return f"up-{self.kind}"
        plain = Activation(self.kind)
        return self.kind if self == plain else f"{self.kind}({self.alpha!r},{self.limit!r},{self.shift!r})"

    @staticmethod
    def parse(text: str) -> Activation:
        """Inverse of ``text``."""
        if text.removeprefix("up-") in UNGATED and text.startswith("up-"):
            return Activation(text.removeprefix("up-"), gated=False)
        kind, _, rest = text.partition("(")
        if kind not in _KINDS:
            raise SchemeError(f"no expert activation is called {kind!r}; there are {', '.join(_KINDS)}")
        alpha, limit, shift = map(float, rest.removesuffix(")").split(",")) if rest else (1.0, float("inf"), 0.0)
        return Activation(kind, alpha, limit, shift)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[.., 2 i] (gate | up) -> [.., i] of the same dtype, or [.., i] -> [.., i]; computed in f32 (f64 stays)."""
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        if not self.gated:
            return UNGATED[self.kind](wide, 1.0).to(hidden.dtype)
        gate, up = wide.chunk(2, -1)
        if self.limit != float("inf"):
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (_KINDS[self.kind](gate, self.alpha) * (up + self.shift)).to(hidden.dtype)


_KINDS: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "silu": lambda g, alpha: g * torch.sigmoid(alpha * g),
    "gelu": lambda g, alpha: F.gelu(g),
    "gelu_tanh": lambda g, alpha: F.gelu(g, approximate="tanh"),
    "relu": lambda g, alpha: F.relu(g),
}


UNGATED: Mapping[str, Callable[[Tensor, float], Tensor]] = {**_KINDS, "relu2": lambda up, alpha: F.relu(up).square()}


def spec_of(schemes: tuple[Scheme, Scheme]) -> str:
    """What a block's first and second weight are, as one word: a ``Scheme.spec``, or two: ``GGUF_Q4_K/GGUF_Q6_K``."""
    return "/".join(dict.fromkeys(scheme.spec for scheme in schemes))


def parse_spec(spec: str) -> tuple[Scheme, Scheme]:
    """Inverse of ``spec_of``."""
    first, _, second = spec.partition("/")
    return parse(first), parse(second or first)


def gates_first(rows: Tensor, dim: int = 0) -> Tensor:
    """Rows of gate and up that alternate along ``dim`` (from 0), all gates before all ups; one row stays one."""
    before = (slice(None),) * dim
    return torch.cat((rows[(*before, slice(0, None, 2))], rows[(*before, slice(1, None, 2))]), dim)


def may_differ(first: Scheme, second: Scheme) -> bool:
    """Whether a block may have them as its two weights: one scheme, or two GGUF types, which change nothing but how rows are decoded."""
    return first == second or first.weights.type == second.weights.type == GGUF


@dataclass(frozen=True)
class MoeProblem:
    """One block as kernels see it, for any number of tokens.

    Attributes:
        scheme: what both weights and both inputs (tokens and hidden layer) are.
        experts: E.
        hidden: H, size of a token; w13 is [E, up_rows, H] and w2 [E, H, I] before quantization.
        intermediate: I.
        top_k: experts of a token.
        activation: between the two products.
        dtype: of the tokens, of the hidden layer between the products, and of the result.
        has_bias: b13 [E, 2 I] and b2 [E, H] of ``dtype`` are added.
        has_weights: outputs are multiplied by weights [T, k] (any float dtype); else plainly added.
        scheme2: what w2 and the hidden layer are where that is not ``scheme``; None: one scheme.
    """

    scheme: Scheme
    experts: int
    hidden: int
    intermediate: int
    top_k: int
    activation: Activation
    dtype: torch.dtype
    has_bias: bool = False
    has_weights: bool = True
    scheme2: Scheme | None = None

    def __post_init__(self) -> None:
        if self.scheme2 == self.scheme:
            object.__setattr__(self, "scheme2", None)

    @property
    def schemes(self) -> tuple[Scheme, Scheme]:
        """Those of w13 and of w2."""
        return self.scheme, self.scheme2 or self.scheme

    @property
    def spec(self) -> str:
        """``schemes`` as one word."""
        return spec_of(self.schemes)

    @cached_property
    def halves(self) -> tuple[MoeProblem, MoeProblem]:
        """The block as each of its weights is packed and multiplied: with one scheme, that of w13 or of w2."""
        if self.scheme2 is None:
            return self, self
        return replace(self, scheme2=None), replace(self, scheme=self.scheme2, scheme2=None)

    @property
    def bits_per_weight(self) -> float:
        """As the function of this name, on average over both weights."""
        first, second = map(bits_per_weight, self.schemes)
        return first + (second - first) * self.intermediate / (self.up_rows + self.intermediate)

    @property
    def up_rows(self) -> int:
        """Rows of an expert's first weight: gate and up, or up alone."""
        return self.intermediate * (2 if self.activation.gated else 1)


def moe_reference(
    x: Planes,
    ids: Tensor,
    weights: Tensor | None,
    w13: Planes,
    b13: Tensor | None,
    w2: Planes,
    b2: Tensor | None,
    scheme: Scheme | None,
    activation: Activation,
    dtype: torch.dtype,
    scale2: Tensor | None = None,
    scheme2: Scheme | None = None,
) -> Tensor:
    """The truth: expert by expert, with the scheme's own linear and input quantization; sums in f32 (f64 for f64).

    Args:
        x: planes of the tokens, data [T, H] first; scales [T, s] or [1].
        ids: [T, k] integers; values outside of 0..E-1 are dropped.
        weights: [T, k] or None.
        w13, w2: planes [E, ...]; for ``scheme`` None one plane [E, n, k] each.
        scale2: calibrated scale [1] of the hidden layer, for static schemes.
        scheme2: of w2 and the hidden layer; None: as ``scheme``.

    Returns:
        [T, H] of ``dtype``.
    """
    tokens, top_k = ids.shape
    experts, out_features = w13[0].shape[0], w2[0].shape[1]
    second = scheme2 or scheme
    total = torch.zeros(
        tokens, out_features, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=ids.device
    )
    pairs = torch.arange(tokens * top_k, device=ids.device)
    flat = ids.reshape(-1)
    for expert in range(experts):
        chosen = pairs[flat == expert]
        if chosen.numel() == 0:
            continue
        rows = chosen // top_k
        hidden = _product(_rows_of(x, rows), w13, b13, expert, scheme, dtype)
        inner: Planes = (activation(hidden),)
        if second is not None and second.input_activations is not None:
            inner = family_of(second).quantize_input(inner[0], second, scale2)
        out = _product(inner, w2, b2, expert, second, dtype).to(total.dtype)
        if weights is not None:
            out = out * weights.reshape(-1)[chosen].unsqueeze(-1).to(total.dtype)
        total.index_add_(0, rows, out)
    return total.to(dtype)


def _rows_of(x: Planes, rows: Tensor) -> Planes:
    """Some tokens' planes; a scale of the whole tensor stays."""
    return tuple(plane if plane.dim() == 1 else plane[rows] for plane in x)


def _product(
    x: Planes, w: Planes, bias: Tensor | None, expert: int, scheme: Scheme | None, dtype: torch.dtype
) -> Tensor:
    own = tuple(plane[expert] for plane in w)
    b = None if bias is None else bias[expert]
    if scheme is None:
        y = F.linear(x[0], own[0])
        return y if b is None else y + b
    return family_of(scheme).linear(x, own, b, scheme, dtype)


def stack_planes(parts: Sequence[Planes]) -> Planes:
    """Planes of single experts as planes of the block (for tests and tools; the store fills preallocated planes)."""
    return tuple(torch.stack(planes) for planes in zip(*parts, strict=True))


def random_ids(
    tokens: int, experts: int, top_k: int, device: torch.device | str, generator: torch.Generator | None = None
) -> Tensor:
    """[T, top_k] int64: distinct experts for each token, as a router gives them, or all of them where a rank holds fewer than that."""
    scores = torch.rand(tokens, max(experts, top_k), generator=generator, device=device, dtype=torch.float32)
    return scores.topk(top_k, -1).indices % experts
