"""Every MoE kernel of the registry that accepts a block on this GPU, against the plain truth of a block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_compile.ir.family import Planes, family_of
from quant_compile.ir.moe import Activation, MoeProblem, moe_reference, stack_planes
from quant_compile.ir.scheme import Scheme, parse
from quant_compile.lowering import schemes as _schemes  # noqa: F401  (registers the families)
from quant_compile.lowering.kernels.experts import library_moe, sgl_w4a8_moe, torch_moe_decoded
from quant_compile.lowering.kernels.experts._moe import Groups, group_pairs, weigh_and_sum
from quant_compile.lowering.moe import MoeKernel, moe_kernels, moe_layouts
from quant_compile.lowering.registry import Rank, Reject
from quant_compile.lowering.target import Target
from tests.moe_support import nudged

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
EIGHT_BITS = ("FP8_DYNAMIC", "FP8", "FP8_BLOCK", "W8A8", "W8A16")
SCHEMES = (*EIGHT_BITS, "W4A16", "W4A16_ASYM", "int4.group32+16", "int4.channel+16", "W4AFP8", "NVFP4A16", "MXFP4A16")
KERNELS = moe_kernels() | {kernel.name: kernel for kernel in library_moe.PEERS}
LIBRARY = {
    "torch_grouped_decoded_moe": "NVFP4A16",
    "torch_grouped_fp8_moe": "FP8_DYNAMIC",
    "sgl_grouped_fp8_moe": "FP8_BLOCK",
    "sgl_expert_fp8_moe": "FP8_BLOCK",
    "humming_grouped_w4a16_moe": "W4A16",
    "sgl_w4a8_moe": "W4AFP8",
}
# (experts, hidden, intermediate, top k) -> tokens tried.
SHAPES = {(16, 1024, 768, 4): (1, 3, 16, 100, 700), (128, 512, 256, 8): (1, 33, 1024)}
# One product: rounding to bf16 (1.7e-3) and FP8 tensor cores, which keep fewer bits than f32 while they add.
STAGE_TOLERANCE = 5e-3
# Scales of tokens multiply rounded products here, and a second rounding flips codes of the hidden layer again.
ROUNDED_TWICE = {"sgl_w4a8_moe": 1e-2}
PRODUCTS = {
    "torch_grouped_decoded_moe": torch_moe_decoded.grouped,
    "torch_grouped_fp8_moe": library_moe.torch_grouped,
    "sgl_grouped_fp8_moe": library_moe.sgl_grouped,
    "sgl_expert_fp8_moe": library_moe.sgl_expert_grouped,
    "humming_grouped_w4a16_moe": library_moe.humming_grouped,
    "sgl_w4a8_moe": sgl_w4a8_moe.w4a8_grouped,
}


class Block:
    """Random operands on the GPU."""

    def __init__(self, problem: MoeProblem) -> None:
        p = self.problem = problem
        self.w13, self.w2 = self._planes(2 * p.intermediate, p.hidden), self._planes(p.hidden, p.intermediate)
        self.scale2 = torch.full((1,), 0.01, device="cuda") if p.scheme.static else None
        self._packed: dict[str, tuple[Planes, Planes]] = {}

    def _planes(self, n: int, k: int) -> Planes:
        p, quantize = self.problem, family_of(self.problem.scheme).quantize_weight
        weights = (torch.randn(n, k, device="cuda", dtype=p.dtype).mul_(k**-0.5) for _ in range(p.experts))
        return stack_planes([quantize(weight, p.scheme) for weight in weights])

    def packed(self, layout: str) -> tuple[Planes, Planes]:
        """Both weights in a layout."""
        if layout not in self._packed:
            p, pack = self.problem, moe_layouts()[layout].pack
            sizes = ((self.w13, 2 * p.intermediate, p.hidden), (self.w2, p.hidden, p.intermediate))
            w13, w2 = (
                stack_planes([pack(tuple(q[e].contiguous() for q in w), p, n, k) for e in range(p.experts)])
                for w, n, k in sizes
            )
            self._packed[layout] = w13, w2
        return self._packed[layout]

    def inputs(self, tokens: int) -> Planes:
        x = torch.randn(tokens, self.problem.hidden, device="cuda", dtype=self.problem.dtype)
        if self.problem.scheme.input_activations is None:
            return (x,)
        scale = torch.full((1,), 0.01, device="cuda") if self.problem.scheme.static else None
        return family_of(self.problem.scheme).quantize_input(x, self.problem.scheme, scale)

    def run(self, kernel: MoeKernel, x: Planes, ids: Tensor, weights: Tensor) -> Tensor:
        w13, w2 = self.packed(kernel.layout)
        return kernel.run(x, ids, weights, w13, None, w2, None, self.scale2, self.problem)

    def expected(self, x: Planes, ids: Tensor, weights: Tensor, off: bool = False) -> Tensor:
        """The truth; ``off``: with a hidden layer that is one step of its dtype off everywhere."""
        p = self.problem
        how: Any = nudged(p.activation) if off else p.activation
        return moe_reference(x, ids, weights, self.w13, None, self.w2, None, p.scheme, how, p.dtype, self.scale2)

    def limit(self, x: Planes, ids: Tensor, weights: Tensor) -> float:
        """How far a correct kernel may be from the truth: flipped codes of the hidden layer are part of it."""
        expected = self.expected(x, ids, weights)
        return STAGE_TOLERANCE + relative_error(self.expected(x, ids, weights, off=True), expected)


def problem_of(scheme: str, shape: tuple[int, int, int, int]) -> MoeProblem:
    experts, hidden, inner, top_k = shape
    return MoeProblem(parse(scheme), experts, hidden, inner, top_k, Activation("silu"), BF16)


def fitting(problem: MoeProblem, tokens: int) -> Iterator[MoeKernel]:
    for kernel in KERNELS.values():
        if not kernel.reference and isinstance(kernel.fit(problem, tokens, Target.of("cuda")), Rank):
            yield kernel


def relative_error(y: Tensor, reference: Tensor) -> float:
    return float((y.float() - reference.float()).norm() / reference.float().norm())


def routed(problem: MoeProblem, tokens: int, skewed: bool = False) -> tuple[Tensor, Tensor]:
    """Random ids and weights; skewed: a few experts get nearly everything, and some ids are no expert's."""
    score = torch.rand(tokens, problem.experts, device="cuda")
    if skewed:
        score = score + 3.0 * (torch.arange(problem.experts, device="cuda") < problem.top_k)
    ids = score.topk(problem.top_k).indices
    if skewed:
        ids[0, 0], ids[-1, -1] = problem.experts, -1
    return ids, torch.rand(tokens, problem.top_k, device="cuda")


def fits_or_skips(name: str, problem: MoeProblem) -> MoeKernel:
    """The kernel; an absent library skips the test, one that is there and fails its trial fails it."""
    kernel = KERNELS[name]
    answer = kernel.fit(problem, 512, Target.of("cuda"))
    if isinstance(answer, Reject):
        (pytest.fail if answer.reason.startswith("fails here") else pytest.skip)(answer.reason)
    return kernel


def by_expert(x: Planes, w: Planes, groups: Groups, scheme: Scheme) -> Tensor:
    """The grouped product of sorted rows by the scheme's own linear, f32; rows of dropped pairs are zeros."""
    y = torch.zeros(x[0].shape[0], w[0].shape[1], device="cuda")
    start = 0
    for expert, stop in enumerate(groups.ends.tolist()):
        rows = tuple(p if p.dim() == 1 else p[start:stop] for p in x)
        planes = tuple(p[expert] for p in w)
        y[start:stop] = family_of(scheme).linear(rows, planes, None, scheme, torch.float32)
        start = stop
    return y


@pytest.mark.parametrize("skewed", [False, True], ids=["even", "skewed"])
@pytest.mark.parametrize("tokens", [1, 40, 1000])
@pytest.mark.parametrize("name", LIBRARY)
def test_stages_match_the_reference(name: str, tokens: int, skewed: bool) -> None:
    """Each stage alone, on the same inputs: first product, activation, second product, weighted sum."""
    problem = p = problem_of(LIBRARY[name], (16, 1024, 768, 4))
    kernel, product, block = fits_or_skips(name, problem), PRODUCTS[name], Block(problem)
    ids, weights = routed(problem, tokens, skewed)
    groups = group_pairs(ids, p.experts)
    counted, (w13, w2) = int(groups.ends[-1]), block.packed(kernel.layout)
    rows = library_moe._gather(block.inputs(tokens), groups.pairs // p.top_k)

    hidden = product(rows, w13, groups, library_moe.Product(p, 2 * p.intermediate, p.hidden))
    expected = by_expert(rows, block.w13, groups, p.scheme)
    assert relative_error(hidden[:counted], expected[:counted]) <= STAGE_TOLERANCE

    inner = library_moe.activate(hidden, groups, None, None, p)
    truth = p.activation(hidden)
    planes = (truth,) if len(inner) == 1 else family_of(p.scheme).quantize_input(truth, p.scheme, None)
    for plane, known in zip(inner, planes, strict=True):
        assert plane.shape == known.shape and plane.dtype == known.dtype
        assert relative_error(plane[:counted], known[:counted]) <= STAGE_TOLERANCE

    out = product(inner, w2, groups, library_moe.Product(p, p.hidden, p.intermediate))
    expected = by_expert(inner, block.w2, groups, p.scheme)
    assert relative_error(out[:counted], expected[:counted]) <= STAGE_TOLERANCE

    y = library_moe.weigh(out, groups, None, weights, p.top_k)
    assert relative_error(y, weigh_and_sum(out, groups, weights, (tokens, p.top_k), p.experts)) <= 1e-3


@pytest.mark.parametrize("skewed", [False, True], ids=["even", "skewed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_kernels_match_the_reference(scheme: str, shape: tuple[int, int, int, int], skewed: bool) -> None:
    problem = problem_of(scheme, shape)
    block, failures = Block(problem), list[str]()
    for tokens in SHAPES[shape]:
        x, (ids, weights) = block.inputs(tokens), routed(problem, tokens, skewed)
        expected = block.expected(x, ids, weights)
        for kernel in fitting(problem, tokens):
            try:
                y = block.run(kernel, x, ids, weights)
                torch.cuda.synchronize()
                error = relative_error(y, expected)
            except Exception as failure:
                failures.append(f"{kernel.name} T={tokens}: {type(failure).__name__} {str(failure).splitlines()[:1]}")
                continue
            limit = block.limit(x, ids, weights) + ROUNDED_TWICE.get(kernel.name, 0.0)
            if not error <= limit:  # NaN fails too
                failures.append(f"{kernel.name} T={tokens}: error {error:.2e}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W4A16", "W4AFP8"])
def test_kernels_replay_in_cuda_graphs(scheme: str) -> None:
    """A replay reads tokens, ids and weights as they are then: nothing of the routing is baked in or asked of the host."""
    problem = problem_of(scheme, (16, 1024, 768, 4))
    block, failures = Block(problem), list[str]()
    first, second = ((block.inputs(32), *routed(problem, 32, skewed)) for skewed in (False, True))
    for kernel in fitting(problem, 32):
        x, ids, weights = tuple(plane.clone() for plane in first[0]), first[1].clone(), first[2].clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            block.run(kernel, x, ids, weights)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                y = block.run(kernel, x, ids, weights)
        except Exception as failure:
            failures.append(f"{kernel.name}: {type(failure).__name__} {str(failure).splitlines()[:1]}")
            continue
        for plane, new in zip((*x, ids, weights), (*second[0], *second[1:]), strict=True):
            plane.copy_(new)
        graph.replay()
        error = relative_error(y, block.expected(*second))
        if not error <= block.limit(*second) + ROUNDED_TWICE.get(kernel.name, 0.0):
            failures.append(f"{kernel.name}: error {error:.2e}")
    assert not failures, "\n".join(failures)
