"""What ``quant_compile.export`` returns: a quantized program, what became of each weight, and how it is saved and packaged."""

from __future__ import annotations

import os
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from quant_compile.ir.errors import ExportError
from quant_compile.ir.report import Report

PACKAGE = ".pt2"
# What the loader is asked for where the C++ library is not part of a shared object: GCC's, or LLVM's.
_CPP_LIBRARIES = (b"libstdc++.so", b"libc++.so")
SHOWN = 4


@dataclass(frozen=True)
class KernelUse:
    """What multiplies some weights in an exported program.

    Attributes:
        kernels: kernel for each range of m, the number of tokens.
        weights: their names in the model.
        reason: why a process needs quant_compile to run it; empty: it does not.
    """

    kernels: str
    weights: tuple[str, ...]
    reason: str = ""

    @property
    def self_contained(self) -> bool:
        """Whether the program holds it in operations of torch alone."""
        return not self.reason

    def __str__(self) -> str:
        """In a line, for people."""
        shown = ", ".join(self.weights[:SHOWN]) + (
            f" and {len(self.weights) - SHOWN} more" if self.weights[SHOWN:] else ""
        )
        return f"{self.kernels} of {shown or 'the graph'}" + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True, eq=False)
class Exported:
    """A quantized program.

    Attributes:
        program: planes are buffers of it, named after their weights; the original weights are not in it.
        report: what became of every weight, as ``quant_compile.report`` of a compiled model.
        kernels: what runs, and whether a process needs this package for it.
        planes: buffer -> the weights whose plane it is.
        inductor: patches of Inductor's config, for ``package``.
    """

    program: ExportedProgram
    report: Report
    kernels: tuple[KernelUse, ...]
    planes: Mapping[str, tuple[str, ...]]
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @property
    def self_contained(self) -> bool:
        """Whether a process can run the program without quant_compile."""
        return all(use.self_contained for use in self.kernels)

    def package(self, path: str | Path, *, self_contained: bool = False) -> Path:
        """Compile the program with AOTInductor, for this machine, into one file.

        ``torch._inductor.aoti_load_package(path)`` gives a function of the model's arguments. Its process needs neither the model's
        code nor transformers; where the program is not ``self_contained`` it imports quant_compile first.

        Args:
            path: a file that ends in ``.pt2``; one that is there is replaced once the new one is whole.
            self_contained: refuse a program that needs quant_compile.

        Returns:
            The path.

        Raises:
            ExportError: the path cannot be written, or kernels are not self-contained; nothing has been built. Or the C++ compiler
                puts its own C++ library into what it builds; what was at the path stays.
        """
        if self_contained:
            require_self_contained(self.kernels)
        target = _writable(path)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            made = torch._inductor.aoti_compile_and_package(
                self.program,
                package_path=str(Path(folder) / target.name),
                inductor_configs={"size_asserts": False, **self.inductor},
            )
            _check_linked(Path(made))
            os.replace(made, target)
        return target

    def save(self, path: str | Path) -> Path:
        """Write the program, uncompiled; ``torch.export.load(path)`` reads it.

        Args:
            path: as in ``package``.

        Returns:
            The path.

        Raises:
            ExportError: the path cannot be written.
        """
        target = _writable(path)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            made = Path(folder) / target.name
            torch.export.save(self.program, made)
            os.replace(made, target)
        return target

    def __str__(self) -> str:
        """The report, and what a process needs."""
        needs = [f"needs quant_compile: {use}" for use in self.kernels if not use.self_contained]
        return "\n".join([str(self.report), *(needs or ["self-contained: a process needs torch alone"])])


def require_self_contained(uses: tuple[KernelUse, ...]) -> None:
    """Refuse kernels that a process cannot run without this package.

    Raises:
        ExportError: names each, its weights and why.
    """
    found = [f"  {use}" for use in uses if not use.self_contained]
    if found:
        raise ExportError(
            "\n".join(
                [
                    "these kernels are not self-contained:",
                    *found,
                    "Fix: self_contained=False, and import quant_compile where the package is run; or pin another kernel "
                    '(kernels={"W8A16": "torch_cpu_int8pack"}), or give these weights another scheme in the policy.',
                ]
            )
        )


def _check_linked(package: Path) -> None:
    """Refuse a package with a C++ library of its own.

    torch brings another one, and the loader mixes both: such a package ends the process that loads it (torch 2.11, GCC 13.3).

    Raises:
        ExportError: names the variable that chooses the compiler.
    """
    if sys.platform != "linux":
        return
    with zipfile.ZipFile(package) as archive:
        built = [name for name in archive.namelist() if name.endswith(".so")]
        alone = [name for name in built if not _names_library(archive, name)]
    if alone:
        raise ExportError(
            f"the C++ compiler (CXX: {os.environ.get('CXX') or 'not set'}, unless `inductor` names another) links its C++ library "
            "into what it builds, and torch brings another one: a process that loads this package would end with a segmentation "
            "fault.\n"
            "Fix: set the environment variable CXX to a compiler that links libstdc++ dynamically, as g++ does by itself, and "
            "start anew: torch reads it when it is imported."
        )


def _names_library(archive: zipfile.ZipFile, name: str) -> bool:
    """Whether a shared object, which may hold a model's constants, names a C++ library that the loader should find."""
    before = b""
    with archive.open(name) as file:
        while part := file.read(1 << 20):
            if any(library in before + part for library in _CPP_LIBRARIES):
                return True
            before = part[-max(map(len, _CPP_LIBRARIES)) :]
    return False


def _writable(path: str | Path) -> Path:
    """A path that a file can be written to.

    Raises:
        ExportError: it is a folder, lies in none, or has another ending.
    """
    target = Path(path)
    if target.is_dir():
        raise ExportError(f"{target} is a folder. Fix: name a file in it, such as {target / 'model.pt2'}.")
    if target.suffix != PACKAGE:
        raise ExportError(f"{target} does not end in {PACKAGE}, as torch has it. Fix: {target.with_suffix(PACKAGE)}.")
    if not target.parent.is_dir():
        raise ExportError(f"the folder {target.parent} is not there. Fix: make it first.")
    if not os.access(target.parent, os.W_OK):
        raise ExportError(f"the folder {target.parent} cannot be written to. Fix: name another.")
    return target
