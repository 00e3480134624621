"""Logits of loaded checkpoints against those of the library that wrote them, and against what rounding alone does to them.

Each sample is a folder with a checkpoint and ``ref_logits.safetensors``: the library's own logits [1, T, vocab] of the tokens
0..T-1, in f32 or bf16. ``loaded`` is ``quant_compile.load`` on a CPU. ``eager`` and ``compiled`` are transformers' model with the
checkpoint's dequantized weights rounded to bf16, as the libraries compute with them, uncompiled and under plain
``torch.compile``: how far the same weights move by the order of operations alone, without inputs quantized. Errors are
relative, by the Frobenius norm.

    python benchmarks/checkpoint_logits.py SAMPLES            # every folder in SAMPLES
    python benchmarks/checkpoint_logits.py SAMPLES --only name,name --out /tmp/some.json
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine, table, write_result
from safetensors.torch import load_file
from torch import Tensor, nn

import quant_compile
from quant_compile.checkpoints.fill import Filler, place
from quant_compile.checkpoints.names import Experts, Linear
from quant_compile.pretrained import plan_of

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def relative(found: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def dequantized(folder: Path, dtype: torch.dtype, rounded: torch.dtype = torch.bfloat16) -> nn.Module:
    """transformers' model in ``dtype`` with the checkpoint's values, each ``rounded``."""
    plan = plan_of(folder, {"default": "keep"}, torch.device("cpu"), dtype)
    quantized = [job for job in plan.mapped.jobs if isinstance(job, Linear | Experts)]
    rest = [job for job in plan.mapped.jobs if not isinstance(job, Linear | Experts)]
    filler = Filler(plan.files, plan.description, rounded, torch.device("cpu"))
    for job in quantized:
        if isinstance(job, Linear):
            values = filler.read(job.stem, False).dequantized()
        else:
            values = torch.stack(
                [torch.cat([filler.read(s, False).dequantized() for s in stems]) for stems in job.stems]
            )
            if job.interleaved != job.alternates:
                values = torch.stack(values.chunk(2, 1), 2).flatten(1, 2)
            values = values.transpose(1, 2) if job.transposed else values
        place(job.slot, values.to(rounded).to(dtype).contiguous())
    Filler(plan.files, plan.description, dtype, torch.device("cpu")).fill(replace(plan.mapped, jobs=tuple(rest)))
    return plan.model.eval()


@torch.inference_mode()
def logits(model: Any, length: int) -> Tensor:
    """Of the tokens 0..length-1."""
    torch._dynamo.reset()
    return model(torch.arange(length)[None]).logits.float()


def rows_of(folder: Path, references: dict[str, Tensor], dtypes: Sequence[str]) -> list[dict[str, Any]]:
    """Both dtypes of one sample."""
    rows: list[dict[str, Any]] = []
    length = next(iter(references.values())).shape[1]
    for name in dtypes:
        dtype, row = DTYPES[name], {"sample": folder.name, "dtype": name}
        model = quant_compile.load(folder, device="cpu", dtype=dtype, progress=False)
        found = {"loaded": logits(model, length)}
        report = quant_compile.report(model)
        row["schemes"] = sorted({line.scheme for line in report.lines if line.scheme is not None})
        row["coverage"] = report.coverage
        del model
        try:
            plain = dequantized(folder, dtype)
        except (AttributeError, RuntimeError) as error:
            row["reason"] = f"no plain model: {type(error).__name__}: {error}".splitlines()[0]
        else:
            found["eager"] = logits(plain, length)
            found["compiled"] = logits(torch.compile(plain), length)
            del plain
        for reference, wanted in references.items():
            rows.append(row | {"reference": reference} | {way: relative(value, wanted) for way, value in found.items()})
        gc.collect()
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("samples", type=Path, help="a folder of folders")
    parser.add_argument("--only", default="", help="names of samples, separated by commas")
    parser.add_argument("--dtypes", default="f32,bf16")
    parser.add_argument("--out", type=Path, default=RESULTS / "checkpoint_logits.json")
    args = parser.parse_args(argv)
    only = {name for name in args.only.split(",") if name}
    rows: list[dict[str, Any]] = []
    for folder in sorted(args.samples.iterdir()):
        if not (folder / "config.json").exists() or (only and folder.name not in only):
            continue
        references = {
            path.stem.removeprefix("ref_"): next(iter(load_file(path).values()))
            for path in sorted(folder.glob("ref_logits*.safetensors"))
        }
        if not references:
            continue
        try:
            rows += rows_of(folder, references, args.dtypes.split(","))
        except Exception as error:  # one that fails is a result; the others go on
            rows.append({"sample": folder.name, "error": f"{type(error).__name__}: {error}".splitlines()[0]})
        print(*(row for row in rows if row["sample"] == folder.name), sep="\n", flush=True)
    meta = {"benchmark": "checkpoint_logits", "machine": machine("cpu"), "settings": {"device": "cpu"}}
    write_result(args.out, rows, meta)
    header = ("sample", "dtype", "reference", "loaded", "eager", "compiled")
    print(table(header, [[row.get(name) for name in header] for row in rows]))


if __name__ == "__main__":
    main()
