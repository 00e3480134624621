"""Our roundings beside those of other libraries: same model, same calibration text, same evaluation.

    python benchmarks/rounding_peers.py --python llm-compressor=VENV/bin/python --python modelopt=... --python auto-round=...

Each library rounds the bundled dense model (in f32, on a CPU) in a process of its own, by the Python of an environment that has it
(``rounding_peer.py`` says which versions were asked for), and its own quantized model gives the logits that are judged, so that its inputs
are quantized as it does it. Ours are simulated in the eager model, as in ``rounding.py``. Everything but ``lm_head`` is quantized, by all.
A library that cannot is a row with its reason. Writes results/rounding_peers.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine, source_hash, table, write_result
from rounding import CALIBRATION, LENGTH, WINDOWS, Setting, batches_of, judged, logits_of, setting
from safetensors.torch import load_file, save_file

import quant_compile
from quant_compile import demo
from quant_compile.lowering.rounding.recipe import COMPENSATE, METHODS, NEAREST, SEARCH
from quant_compile.measure.weights import chosen_by
from quant_compile.policy import Policy
from quant_compile.simulate import Simulation, Values

PEERS = {"llm-compressor": ("rtn", "gptq", "awq"), "modelopt": ("rtn", "awq"), "auto-round": ("rtn", "light")}
OURS = "sglquant"
SCHEMES = ("W4A16", "NVFP4")
WORKER = Path(__file__).with_name("rounding_peer.py")
SOURCE = source_hash()


@dataclass(frozen=True)
class Row:
    """One rounding by one library.

    Attributes:
        extra: perplexity to that of the model as it is, less one.
        kl: mean divergence of the logits from the model's, nats.
        seconds: of quantizing, calibration included.
        reason: why there are no figures.
    """

    library: str
    method: str
    scheme: str
    seed: int
    extra: float | None = None
    kl: float | None = None
    seconds: float | None = None
    versions: dict[str, str] | None = None
    reason: str | None = None
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d", time.gmtime()))


def ours(at: Setting, method: str, scheme: str, seed: int, data: bool) -> Row:
    """A policy's ``method`` with data, its ``rounding`` without."""
    start, rule = time.perf_counter(), {"match": "lm_head.weight", "scheme": "keep"}
    with tempfile.TemporaryDirectory() as folder:
        if data:
            policy = {"default": scheme, "rules": [rule], "method": method}
            path = Path(folder) / "planes.safetensors"
            made = quant_compile.calibrate(
                at.model, batches_of(at.trained_on, seed, CALIBRATION), policy, path=path, progress=False
            )
        else:
            made = Policy.load({"default": scheme, "rules": [rule], "rounding": method})
        chosen, values = chosen_by(made, at.model), Values(kept_bytes=1 << 34)
        for each in chosen:
            values.of(each, False)
        seconds = time.perf_counter() - start
        with torch.inference_mode(), Simulation(chosen, values):
            logits = [logits_of(at.model, window) for window in at.windows]
    name = f"{method}, {'data' if data else 'no data'}"
    return Row(OURS, name, scheme, seed, *judged(at, logits), seconds, {"torch": torch.__version__})


def theirs(at: Setting, library: str, python: str, method: str, scheme: str, seed: int, limit: float) -> Row:
    """In a process of its own."""
    row = Row(library, method, scheme, seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lm = demo.load("dense")
        lm.model.save_pretrained(folder / "model")
        lm.tokenizer.save_pretrained(folder / "model")
        calibration = torch.cat(batches_of(at.trained_on, seed, CALIBRATION))
        tokens = {"calibration": calibration, "evaluation": at.windows[:, :-1].contiguous()}
        save_file(tokens, folder / "tokens.safetensors")
        command = [python, str(WORKER), library, method, scheme, str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=folder, check=False)
        except subprocess.TimeoutExpired:
            return Row(**asdict(row) | {"reason": f"not done in {limit:.0f} s"})
        if done.returncode:
            last = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
            return Row(**asdict(row) | {"reason": last[-1].replace(name, "FOLDER")[:200]})
        told = json.loads((folder / "told.json").read_text())
        extra, kl = judged(at, list(load_file(folder / "logits.safetensors")["logits"]))
    return Row(**asdict(row) | {"extra": extra, "kl": kl} | told)


def rows_of(at: Setting, args: argparse.Namespace) -> Iterator[Row]:
    """As they are measured."""
    pythons = dict(part.split("=", 1) for part in args.python)
    for scheme in args.schemes:
        for method in (NEAREST, SEARCH, COMPENSATE):
            yield ours(at, method, scheme, 0, False)
        for seed in range(args.seeds):
            for method in args.methods:
                yield ours(at, method, scheme, seed, True)
            for library, python in pythons.items():
                for method in PEERS[library]:
                    yield theirs(at, library, python, method, scheme, seed, args.limit)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", action="append", default=[], metavar="LIBRARY=PATH", help=", ".join(PEERS))
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS, help="ours, with data")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds for one library's run")
    parser.add_argument("--out", type=Path, default=RESULTS / "rounding_peers.json")
    args = parser.parse_args(argv)
    meta: dict[str, Any] = {
        "benchmark": "rounding_peers",
        "machine": machine(torch.device("cpu")) | {"source": SOURCE},
        "settings": {"length": LENGTH, "windows": WINDOWS, "calibration": CALIBRATION},
    }
    at, rows = setting("dense", torch.device("cpu"), WINDOWS, torch.float32), list[dict[str, Any]]()
    for row in rows_of(at, args):
        rows.append(asdict(row))
        print(row.library, row.method, row.scheme, row.seed, row.extra, row.kl, row.reason or "", flush=True)
        write_result(args.out, rows, meta)
    cells = [[r[n] for n in ("scheme", "library", "method", "seed", "extra", "kl", "seconds", "reason")] for r in rows]
    print(table(("scheme", "library", "method", "seed", "extra", "kl", "s", "reason"), cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
