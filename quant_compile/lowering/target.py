"""The device as data: the only place that asks the machine what it is and which kernels' libraries it has.

A Target is what ``fit`` functions read. ``Target.of(device)`` describes the real device and probes ops and libraries when
they are first asked for; ``Target.fake("sm100")`` describes one that is not here, for plans and tests.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import lru_cache

import torch

from quant_compile.ir.errors import OptionError

# Libraries that a fake GPU target has unless it is told otherwise: ops by qualified name, Python libraries by name.
FAKE_OPS = frozenset(
    {
        "sgl_kernel::fp8_scaled_mm",
        "sgl_kernel::fp8_blockwise_scaled_mm",
        "sgl_kernel::int8_scaled_mm",
        "sgl_kernel::fp8_blockwise_scaled_grouped_mm",
        "sgl_kernel::es_fp8_blockwise_scaled_grouped_mm",
        "sgl_kernel::cutlass_w4a8_moe_mm",
        "sgl_kernel::qserve_w4a8_per_chn_gemm",
        "sgl_kernel::qserve_w4a8_per_group_gemm",
        "sgl_kernel::ggml_dequantize",
        "sgl_kernel::ggml_mul_mat_a8",
        "sgl_kernel::ggml_mul_mat_vec_a8",
        "sgl_kernel::ggml_moe_a8_vec",
        "aten::_grouped_mm",
        "aten::_scaled_grouped_mm",
        "aten::_scaled_grouped_mm_v2",
        "aten::_scaled_mm_v2",
        "triton",
        "humming",
        "deep_gemm",
    }
)
RUN_ON = (90,)  # archs whose kernels the GPU tests have run on; for the others they are compiled and emulated
FAKE_SM_COUNT = {80: 108, 89: 142, 90: 132, 100: 148, 120: 170}
_OP_LIBRARY = {"sgl_kernel": "sgl_kernel"}


@dataclass(frozen=True)
class Target:
    """A device that kernels are chosen for.

    Attributes:
        device: ``cuda`` or ``cpu``.
        arch: compute capability times ten (90 for sm90); 0 on CPU.
        sm_count: multiprocessors (CPU: threads).
        name: the vendor's name of the device.
        ops: what is present; None means probe this machine.
    """

    device: str
    arch: int = 0
    sm_count: int = 1
    name: str = "cpu"
    ops: frozenset[str] | None = None

    @staticmethod
    def of(device: torch.device | str) -> Target:
        """The target of a real device of this machine."""
        device = torch.device(device)
        if device.type != "cuda":
            return Target("cpu", sm_count=torch.get_num_threads())
        return _cuda_target(torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device)

    @staticmethod
    def fake(text: str, ops: frozenset[str] = FAKE_OPS) -> Target:
        """A target by name, ``cpu`` or ``sm80``..``sm120``, with the libraries ``ops``.

        Raises:
            OptionError: the name is no target.
        """
        if text == "cpu":
            return Target("cpu", sm_count=torch.get_num_threads())
        if not text.startswith("sm") or not text[2:].isdigit() or int(text[2:]) not in FAKE_SM_COUNT:
            names = ", ".join(["cpu", *(f"sm{arch}" for arch in FAKE_SM_COUNT)])
            raise OptionError(f"unknown target {text!r}; valid targets: {names}")
        arch = int(text[2:])
        return Target("cuda", arch, FAKE_SM_COUNT[arch], f"fake {text}", ops)

    def has(self, name: str) -> bool:
        """Whether an op (``library::op``) or a Python library (``humming``) is there."""
        if self.ops is not None:
            return name in self.ops
        return probe_op(name) if "::" in name else probe_library(name)

    @property
    def label(self) -> str:
        """``sm90`` and so on, or ``cpu``."""
        return f"sm{self.arch}" if self.device == "cuda" else self.device


@lru_cache(maxsize=None)
def _cuda_target(device: torch.device) -> Target:
    properties = torch.cuda.get_device_properties(device)
    arch = properties.major * 10 + properties.minor
    return Target("cuda", arch, properties.multi_processor_count, properties.name)


@lru_cache(maxsize=None)
def probe_library(name: str) -> bool:
    """Whether a Python library can be imported; a library that is there but broken counts as absent."""
    if importlib.util.find_spec(name) is None:
        return False
    try:
        importlib.import_module(name)
    except Exception:  # a broken optional library must not break the backend
        return False
    return True


@lru_cache(maxsize=None)
def probe_op(name: str) -> bool:
    """Whether ``namespace::op`` is registered, after importing the library that brings the namespace."""
    namespace, _, op = name.partition("::")
    library = _OP_LIBRARY.get(namespace)
    if library is not None and not probe_library(library):
        return False
    return hasattr(getattr(torch.ops, namespace), op)


def default_policy(target: Target) -> str:
    """The preset used when the user names no policy: the best that this device multiplies natively."""
    if target.device == "cpu":
        return "W8A16"
    return "FP8_DYNAMIC" if target.arch >= 89 else "W8A8"
