"""What a kernel and a layout are, and the registry of both.

A *layout* is how a weight's planes lie in memory; several kernels may read one layout, so that they can share one packed
copy and be chosen by M at run time. A *kernel* answers ``fit`` (a rank, or a refusal with its reason) and can ``run``.
Every module under ``lowering/kernels`` whose name has no leading underscore offers ``KERNELS`` and, if it brings its own,
``LAYOUTS``, or ``INPUTS``: kernels that quantize inputs where Inductor is not left to it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from quant_compile.ir.family import Planes, PlaneSpec, Reject, family_of
from quant_compile.ir.scheme import Scheme
from quant_compile.lowering.target import Target


@dataclass(frozen=True)
class Problem:
    """One linear as kernels see it: y[m, n] = x[m, k] @ w[n, k].T (+ bias), for any m.

    Attributes:
        scheme: what w and x are.
        n: output features.
        k: input features.
        dtype: dtype of the 16-bit (or f32) input and of y.
        has_bias: a bias [n] of ``dtype`` is added.
        siblings: weights that are merged into w. A scale of a whole tensor is one number where there is one, else each has its own.
    """

    scheme: Scheme
    n: int
    k: int
    dtype: torch.dtype
    has_bias: bool = False
    siblings: int = 1

    @property
    def spec(self) -> str:
        """The scheme's."""
        return self.scheme.spec

    def __hash__(self) -> int:
        """Computed once: a problem is looked up at every call of some kernels."""
        known = self.__dict__.get("_hash")
        if known is None:
            fields = (self.scheme, self.n, self.k, self.dtype, self.has_bias, self.siblings)
            known = self.__dict__["_hash"] = hash(fields)
        return known


@dataclass(frozen=True)
class Rank:
    """A kernel's answer that it can run; the lowest cost wins. Costs are estimates of microseconds, for comparison only."""

    cost: float


Fit = Callable[[Problem, int, Target], Rank | Reject]
Run = Callable[[Planes, Planes, Tensor | None, Problem], Tensor]


@dataclass(frozen=True)
class Kernel:
    """Something that can run a linear.

    Attributes:
        name: provider, then job: ``sgl_fp8``.
        layout: name of the layout of its weight planes.
        fit: ``(problem, m, target) -> Rank | Reject``. A kernel that only serves some m refuses the others.
        run: ``(x planes, w planes, bias, problem) -> y``. x planes are 2-D: data [m, k] contiguous, scale [m, 1] or [1]
            (groups: [m, g]); for 16-bit inputs the one plane is x [m, k]. m is at least 1.
        column_scales: needs the input's group scales in column-major order (stride 1 along m).
        reference: slow and exact; on a GPU only used when the policy or the options allow it.
        only_pinned: why it is never chosen, only pinned: it computes less exactly than the scheme says. None: it may be chosen.
        prepare: compile for m rows on a device, where that takes seconds; may run in threads (``lowering.ahead``).
        recorded: ``(problem, m, target) -> plan``: ``run`` may be recorded in Inductor's graph for m rows, which launches it
            itself then. A launch for m rows serves fewer, too. A plan of None: not for this m. Without: never.
        portable: ``problem -> None | Reject``: ``run`` is operations of torch alone for every m, so that an exported program
            holds these and needs no code of this package. Without: never.
        kept: ``w planes -> w planes``: as ``run`` makes them at each call, for a program to keep; ``run`` takes both.
    """

    name: str
    layout: str
    fit: Fit
    run: Run
    column_scales: bool = False
    reference: bool = False
    only_pinned: str | None = None
    prepare: Prepare | None = None
    recorded: Callable[[Problem, int, Target], object | None] | None = None
    portable: Callable[[Problem], Reject | None] | None = None
    kept: Callable[[Planes], Planes] | None = None


class Prepare(Protocol):
    """What compiles a kernel for m rows: when called, or in the background from ``begin`` on; ``serve`` says that a graph has it."""

    def __call__(self, problem: Problem, m: int, device: torch.device, /) -> object: ...
    def begin(self, problem: Problem, m: int, device: torch.device, /) -> None: ...
    def serve(self, problem: Problem, device: torch.device, /) -> None: ...


def anyhow(problem: Problem, m: int, target: Target) -> object:
    """For ``Kernel.recorded``: one launch serves every m."""
    return ()


def always(problem: Problem) -> None:
    """For ``Kernel.portable``: whatever the problem."""


@dataclass(frozen=True)
class Norm:
    """An RMSNorm over the last dimension: x / sqrt(mean(x^2) + eps) in f32, times a weight [k].

    Attributes:
        weighting: ``after_cast``: in the weight's dtype, which is x's; ``before_cast``: in f32, then cast to x's dtype;
            ``one_plus``: likewise, times 1 + weight.
    """

    weight: Tensor
    eps: float
    weighting: str


@dataclass(frozen=True)
class InputKernel:
    """Quantizes inputs in one launch where Inductor would make several kernels; its numbers are those of the family.

    Attributes:
        name: provider, then job.
        job: ``norm``: together with the RMSNorm before it; ``maxima``: once the largest magnitude of each row is known.
        fit: ``(scheme, dtype, target) -> None | Reject``.
        run: ``norm``: ``(x [m, k], residual | None, Norm, scheme, scale | None) -> planes``, without a scale that is given,
            and with x + residual, rounded, before them if there is a residual;
            ``maxima``: ``(x [m, k], maxima [m], scheme) -> planes``. x, contiguous, may have no rows.
    """

    name: str
    job: str
    fit: Callable[[Scheme, torch.dtype, Target], Reject | None]
    run: Callable[..., Planes]


@dataclass(frozen=True)
class Layout:
    """How the planes of a weight lie in memory.

    Attributes:
        pack: ``(row-form planes, problem) -> planes``, on the planes' device.
        unpack: its inverse.
        planes: ``problem -> specs`` of the packed planes, known without data.
        row_block: ``problem -> rows``; planes may be cut along dimension 0 at multiples of it (each plane proportionally);
            0 when they cannot be cut.
        exact: ``packed planes -> bool``: whether ``unpack`` gives these very rows back, to the last bit.
    """

    name: str
    pack: Callable[[Planes, Problem], Planes]
    unpack: Callable[[Planes, Problem], Planes]
    planes: Callable[[Problem], tuple[PlaneSpec, ...]]
    row_block: Callable[[Problem], int]
    exact: Callable[[Planes], bool] = lambda planes: True


ROWS = Layout(
    "rows",
    pack=lambda planes, problem: planes,
    unpack=lambda planes, problem: planes,
    planes=lambda p: family_of(p.scheme).weight_planes(p.scheme, p.n, p.k, p.dtype),
    row_block=lambda p: family_of(p.scheme).row_block(p.scheme),
)


@lru_cache(maxsize=1)
def _modules() -> tuple[object, ...]:
    package = importlib.import_module("quant_compile.lowering.kernels")
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    files = (module.name for module in found if not module.ispkg)
    # By file name: of equal costs the first kernel wins, and the folder that a file is in must not decide that.
    names = sorted(name.rpartition(".")[::-1] for name in files)
    return tuple(importlib.import_module(f"{folder}.{file}") for file, _, folder in names if not file.startswith("_"))


@lru_cache(maxsize=1)
def kernels() -> dict[str, Kernel]:
    """All kernels by name."""
    return {kernel.name: kernel for module in _modules() for kernel in getattr(module, "KERNELS", ())}


@lru_cache(maxsize=1)
def layouts() -> dict[str, Layout]:
    """All layouts by name."""
    own = {layout.name: layout for module in _modules() for layout in getattr(module, "LAYOUTS", ())}
    return {ROWS.name: ROWS, **own}


@lru_cache(maxsize=1)
def input_kernels() -> dict[str, InputKernel]:
    """All kernels that quantize inputs, by name."""
    return {kernel.name: kernel for module in _modules() for kernel in getattr(module, "INPUTS", ())}


def input_kernel(job: str, scheme: Scheme, dtype: torch.dtype, target: Target) -> InputKernel | None:
    """The first that does ``job`` for inputs of a scheme and dtype on a target."""
    for kernel in input_kernels().values():
        if kernel.job == job and kernel.fit(scheme, dtype, target) is None:
            return kernel
    return None
