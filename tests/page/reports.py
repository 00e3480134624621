"""Reports to draw: the bundled mixture of experts under a policy, planned without its weights, and a synthetic one of any size."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from quant_compile.explain import explain
from quant_compile.inspect.models import ModelSpec, build_model, example_inputs
from quant_compile.ir.report import Report, WeightLine
from quant_compile.lowering.target import Target
from quant_compile.page.views import Box, Drawing, KernelTime, SiteView

MOE = Path(__file__).parents[2] / "examples" / "tiny_lm" / "weights" / "moe"
EVIL = "<img src=x onerror=alert(1)>"
KERNELS = "m<=4: triton_gemv, m>4: sgl_fp8"


@lru_cache(maxsize=None)
def moe() -> Report:
    """Of the bundled model under FP8_DYNAMIC on an sm90."""
    model = build_model(ModelSpec(str(MOE)))
    return explain(model, example_inputs(model, 16), "FP8_DYNAMIC", Target.fake("sm90")).report


def other() -> Report:
    """As another policy might have it: what is quantized has another scheme."""
    lines = (replace(line, scheme="W4A16", layout="w4_tiles") if line.scheme else line for line in moe().lines)
    return replace(moe(), policy="W4A16", lines=tuple(lines))


def synthetic(count: int, policy: str = "made up") -> Report:
    """Of ``count`` weights in layers of fifty, and one whose name, reason and note are markup."""
    drawing = Drawing((Box("w", "bf16[64, 64]", "weight"), Box("linear", "bf16[1, 64]")), ((0, 1),))
    times = tuple(KernelTime(m, "triton_gemv", 2.0, m < 64, 1.0) for m in (1, 16, 64, 512, 4096))
    views = tuple(
        SiteView((f"proj{i}.weight",), drawing, drawing, times, ("joined",), ("not merged: a reason",), ("m.py:1 in f: y = x @ w",))
        for i in range(8)
    )  # fmt: skip
    lines = [_line(i) for i in range(count)]
    lines.append(WeightLine((f"{EVIL}.weight",), 100, 100, None, "", "", f"</script>{EVIL}", False))
    return Report(policy, "sm90", tuple(lines), (f"</script>{EVIL}",), (), {"inductor": 1.5}, (), views)


def _line(i: int) -> WeightLine:
    layer, j = divmod(i, 50)
    name = f"model.layers.{layer}.mlp.experts.{j // 2}.proj{j % 2}.weight"
    if j % 3 == 0:
        return WeightLine((name,), 8192, 8192, None, "", "", f"reason {j % 7}", False, shape=(64, 64), dtype="bfloat16")
    scheme = ("W4A16", "W8A8")[j % 2]
    sizes = (8192, 4096, scheme, "rows", KERNELS, f"reason {j % 7}", True)
    return WeightLine((name,), *sizes, shape=(64, 64), dtype="bfloat16", views=(i % 8,))
