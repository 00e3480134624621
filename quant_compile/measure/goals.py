"""What a user may want most of a quantized model, as data: the scenarios of the usual guides, and the schemes that each prefers.

Knows names only; which of the schemes a GPU has kernels for is asked elsewhere.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from quant_compile.ir.errors import OptionError


@dataclass(frozen=True)
class Goal:
    """What the user wants most.

    Attributes:
        words: other names, in lower case without anything between letters.
        why: the first reason.
        schemes: the ones it prefers, first to last.
        on_cpu: the same on a CPU, where no kernel multiplies 8-bit inputs at more than the rate of 16 bits.
        rows: numbers of tokens at which kernels' estimates are compared.
        lesser: schemes that are taken only where none of these has kernels: they round more, or gain less.
        slack: a scheme is passed over if the best of those that it prefers is estimated to be so many times as fast; inf: never.
        fixed: the same schemes with calibrated input scales, to mention.
        speed: say what is faster than the scheme that is taken.
        cpu_why: the first reason on a CPU, where it is another.
    """

    name: str
    words: tuple[str, ...]
    why: str
    schemes: tuple[str, ...]
    on_cpu: tuple[str, ...]
    rows: tuple[int, ...]
    slack: float
    lesser: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    cpu_why: str = ""
    speed: bool = False
    kv_cache: bool = False
    release: bool = False
    guard: bool = False


GOALS = (
    Goal(
        "memory",
        ("memorybound", "vram", "size", "small", "fit"),
        "Memory is short: weights in 4 bits take about a quarter of the bytes, and inputs in 16 bits cost no accuracy of their own.",
        ("W4A16", "NVFP4A16", "MXFP4A16", "W8A16", "FP8_DYNAMIC", "W8A8"),
        ("W4A16", "W8A16"),
        (1,),
        math.inf,
        release=True,
    ),
    Goal(
        "throughput",
        ("computebound", "batch", "batchthroughput", "highthroughput", "prefill"),
        "Many tokens at once are bound by arithmetic: 8-bit weights and inputs are multiplied at twice the rate of 16 bits.",
        ("FP8_DYNAMIC", "W8A8", "NVFP4"),
        ("W8A16", "W4A16"),
        (16, 128, 2048),
        1.25,
        cpu_why="On a CPU no kernel gains from inputs in 8 bits: weights in 8 bits are read in half the time.",
        speed=True,
        lesser=("W8A16", "W4A8", "W4A16"),
    ),
    Goal(
        "long-context",
        ("context", "longtext", "kv", "kvcache", "largebatch"),
        "Long contexts and large batches fill the memory with K and V: these are kept in 8 bits, and weights leave them room.",
        ("FP8_DYNAMIC", "W8A8"),
        ("W8A16", "W4A16"),
        (16, 128, 2048),
        1.25,
        kv_cache=True,
        release=True,
        speed=True,
        lesser=("W8A16", "W4A16"),
    ),
    Goal(
        "latency",
        ("lowlatency", "singlerequest", "interactive", "decode", "single"),
        "One request at a time is bound by reading the weights once a token, and by whatever else a step launches.",
        ("W4A16", "W4A8", "FP8_DYNAMIC", "W8A8", "W8A16"),
        ("W8A16", "W4A16"),
        (1,),
        1.15,
        fixed=("FP8", "W8A8_STATIC"),
        guard=True,
        speed=True,
    ),
    Goal(
        "sensitive",
        ("sensitivemodel", "accuracy", "quality", "accurate", "precision"),
        "The model takes quantization badly: 8 bits, and scales of inputs computed from the inputs themselves, as fine as kernels take.",
        ("FP8_BLOCK", "FP8_DYNAMIC", "W8A8", "W8A16"),
        ("W8A16",),
        (16, 128, 2048),
        1.5,
        cpu_why="The model takes quantization badly: weights in 8 bits, a scale a row, and inputs as they are.",
    ),
)


def goal_of(text: str) -> Goal:
    """The goal of a name, however it is written.

    Raises:
        OptionError: there is none; lists those that there are.
    """
    word = re.sub(r"[^a-z]", "", str(text).lower())
    for goal in GOALS:
        if word in (re.sub(r"[^a-z]", "", goal.name), *goal.words):
            return goal
    names = "\n".join(f"  {goal.name}: {goal.why}" for goal in GOALS)
    raise OptionError(f"unknown goal {text!r}. Fix: one of\n{names}")
