"""Devices by name: the target that kernels are chosen for, and the roofs that times are estimated by.

Rates are those of vendors' data sheets for dense products with sums in f32, in units of 10^12 operations a second; bandwidth is in
10^9 bytes a second. They are bounds, for estimates where nothing can be measured.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

import torch

from quant_compile.ir.errors import OptionError
from quant_compile.lowering.target import FAKE_OPS, FAKE_SM_COUNT, Target


@dataclass(frozen=True)
class Device:
    """A device as estimates see it.

    Attributes:
        name: the vendor's.
        arch: compute capability times ten; 0 for a CPU.
        sm_count: multiprocessors, or a CPU's threads.
        bandwidth: 10^9 bytes a second.
        memory: 10^9 bytes; 0 where it is not known.
        math16: 10^12 operations a second on 16-bit operands.
        math8: on 8-bit operands.
        math4: on 4-bit floats; 0 where it multiplies none.
    """

    name: str
    arch: int
    sm_count: int
    bandwidth: float
    memory: float
    math16: float
    math8: float
    math4: float = 0.0

    @property
    def target(self) -> Target:
        """For the choice of kernels, with every library that kernels use."""
        if not self.arch:
            return Target("cpu", sm_count=self.sm_count)
        return Target("cuda", self.arch, self.sm_count, self.name, FAKE_OPS)


DEVICES = {
    "a100": Device("A100 80GB", 80, 108, 2039, 80, 312, 624),
    "a10040gb": Device("A100 40GB", 80, 108, 1555, 40, 312, 624),
    "a30": Device("A30", 80, 56, 933, 24, 165, 330),
    "a10": Device("A10", 86, 72, 600, 24, 125, 250),
    "a40": Device("A40", 86, 84, 696, 48, 149.7, 299.3),
    "rtxa6000": Device("RTX A6000", 86, 84, 768, 48, 154.8, 309.7),
    "rtx3090": Device("RTX 3090", 86, 82, 936, 24, 71, 284),
    "l4": Device("L4", 89, 58, 300, 24, 121, 242),
    "l40s": Device("L40S", 89, 142, 864, 48, 362, 733),
    "l40": Device("L40", 89, 142, 864, 48, 181, 362),
    "rtx4090": Device("RTX 4090", 89, 128, 1008, 24, 165.2, 330.3),
    "rtx4080": Device("RTX 4080", 89, 76, 717, 16, 97.5, 194.9),
    "rtx6000ada": Device("RTX 6000 Ada", 89, 142, 960, 48, 364, 728),
    "h100": Device("H100 SXM", 90, 132, 3350, 80, 989, 1979),
    "h100pcie": Device("H100 PCIe", 90, 114, 2039, 80, 756, 1513),
    "h100nvl": Device("H100 NVL", 90, 132, 3938, 94, 835, 1671),
    "h200": Device("H200", 90, 132, 4800, 141, 989, 1979),
    "gh200": Device("GH200", 90, 132, 4000, 96, 989, 1979),
    "b200": Device("B200", 100, 148, 8000, 180, 2250, 4500, 9000),
    "rtx5090": Device("RTX 5090", 120, 170, 1792, 32, 209.5, 419, 1676),
    "rtxpro6000": Device("RTX PRO 6000", 120, 188, 1792, 96, 503.8, 1007.6, 2015),
}
# The product that stands for an arch of which nothing else is said; the kernels' own estimates take the same.
OF_ARCH = {80: "a100", 86: "rtxa6000", 89: "l40s", 90: "h200", 100: "b200", 120: "rtxpro6000"}
_MAKERS = ("nvidia", "geforce", "tesla")
_REST = re.compile(r"(?:sxm\d?|pcie|nvl|\d+gb|hbm\d?e?|laptopgpu|generation|workstation|server|edition)*")
# A thread of a CPU: what the kernels' own estimates take for one, 10^9 bytes and 10^12 operations a second.
CPU_BANDWIDTH, CPU_MATH = 5.0, 0.05


def device_of(gpu: str | Target | Device | None) -> tuple[Device, Target]:
    """A device and the target that kernels are chosen for.

    Args:
        gpu: a product (``h100``, ``RTX 4090``, ``NVIDIA A100-SXM4-80GB``), a target (``sm90``), ``cpu``, a Target, or None or ``cuda``:
            that of this machine, with the libraries that are installed here.

    Raises:
        OptionError: it is not known; names those that are.
    """
    if isinstance(gpu, Device):
        return gpu, gpu.target
    if isinstance(gpu, Target):
        return _of_target(gpu), gpu
    if gpu is None or gpu in ("cuda", "gpu", "this", "auto"):
        if gpu not in (None, "auto", "this") and not torch.cuda.is_available():
            raise OptionError(f"there is no GPU here. Fix: name one, {_known()}.")
        target = Target.of("cuda" if torch.cuda.is_available() else "cpu")
        return _of_target(target), target
    if not isinstance(gpu, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptionError(f"gpu must be a name or a Target, got {type(gpu).__name__}. Fix: name one, {_known()}.")
    word = re.sub(r"[^a-z0-9]", "", gpu.lower())
    if word == "cpu":
        return _of_target(Target.fake("cpu")), Target.fake("cpu")
    if re.fullmatch(r"sm\d+a?", word):
        arch = int(word[2:].removesuffix("a"))
        if arch not in OF_ARCH:
            raise OptionError(f"unknown target {gpu!r}; known: {_known()}")
        return _of_target(Target("cuda", arch, DEVICES[OF_ARCH[arch]].sm_count, word, FAKE_OPS)), _fake(arch)
    found = _named(word)
    if found is None:
        close = difflib.get_close_matches(word, DEVICES, n=1)
        hint = f" Did you mean {DEVICES[close[0]].name}?" if close else ""
        raise OptionError(
            f"unknown GPU {gpu!r}.{hint} Known: {_known()}. Fix: name one of these, or its target (sm90)."
        )
    return found, found.target


def _fake(arch: int) -> Target:
    if arch in FAKE_SM_COUNT:
        return Target.fake(f"sm{arch}")
    return Target("cuda", arch, DEVICES[OF_ARCH[arch]].sm_count, f"fake sm{arch}", FAKE_OPS)


def _of_target(target: Target) -> Device:
    """What is known of a target: by its name, else the product that stands for its arch, or the nearest older one."""
    if target.device != "cuda":
        threads = max(1, target.sm_count)
        return Device(
            f"CPU, {threads} threads", 0, threads, CPU_BANDWIDTH * threads, 0, CPU_MATH * threads, CPU_MATH * threads
        )
    named = _named(re.sub(r"[^a-z0-9]", "", target.name.lower()))
    if named is not None:
        return named
    older = [arch for arch in OF_ARCH if arch <= target.arch] or [min(OF_ARCH)]
    return DEVICES[OF_ARCH[max(older)]]


def _named(word: str) -> Device | None:
    """The product whose name a word begins with, where nothing but memory and form follow."""
    for maker in _MAKERS:
        word = word.removeprefix(maker)
    forms = [word, f"rtx{word}"]
    found = [name for form in forms for name in DEVICES if form.startswith(name) and _REST.fullmatch(form[len(name) :])]
    if not found:
        return None
    name = max(found, key=len)
    if name == "a100" and "40gb" in word:
        name = "a10040gb"
    return DEVICES[name]


def _known() -> str:
    names = ", ".join(device.name for device in DEVICES.values())
    return f"{names}; targets {', '.join(f'sm{arch}' for arch in OF_ARCH)}; cpu"
