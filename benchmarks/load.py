"""How long ``load`` takes and what it holds: 16 bits quantized as they are read, ``packed``, and checkpoints of others.

Others are GPTQ with ``desc_act`` (the groups of q, k and v, and of gate and up, in one order each, as gptqmodel has them) and FP8 in
blocks of 128 with a tensor for each expert, as DeepSeek and Qwen publish it. Their decode is timed beside that of a model that was
quantized by the policy of the same scheme: ``generate`` by the wall clock, one sequence, static cache.

Each load is a process of its own, with files in the page cache. Times are of ``load`` alone and of the first call after it; memory is the
allocator's on a GPU, and on the host what is not backed by a file, sampled while ``load`` runs. The first load of a process also
imports what compiles, loads the libraries of kernels and tries them on this GPU; ``again`` is a second load in it. Python's bytecode is
kept, as on any machine where a program ran before.

    python benchmarks/load.py            # on a GPU: Llama-3-8B's shape, 16 layers; Qwen3-30B-A3B's, 8 layers
    python benchmarks/load.py --only gptq llama --policies W4A16   # some of it
    python benchmarks/load.py --smoke    # tiny, on a CPU: does it run?
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    GIB,
    LLAMA_3_8B,
    RESULTS,
    ROOT,
    TINY,
    LlamaShape,
    build_llama,
    llama_config,
    machine,
    table,
    write_result,
)
from e2e import synchronize
from moe_e2e import MODELS, SMOKE_MODELS, MoeShape, build_moe
from safetensors.torch import load_file, save_file
from torch import Tensor

POLICIES = ("FP8_DYNAMIC", "W4A16")
LAYERS = 16
GROUP = BLOCK = 128
# Tokens of a sample of decode; generate makes one more with the prompt.
TOKENS = 64
SAMPLES = 5
PARTS = ("llama", "gptq", "qwen")


class HostPeak:
    """Bytes of this process that no file backs, at most, beyond those at the beginning."""

    def __enter__(self) -> HostPeak:
        self.before = self.most = self.now()
        self.on = True
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.on = False
        self.thread.join()

    def watch(self) -> None:
        """Look every few milliseconds."""
        while self.on:
            self.most = max(self.most, self.now())
            time.sleep(0.005)

    @staticmethod
    def now() -> int:
        """As Linux counts them."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

    @property
    def bytes(self) -> int:
        """Since the beginning."""
        return self.most - self.before


@dataclass(frozen=True)
class Job:
    """One load: a folder, a policy or the checkpoint's own, and what else is asked of the model."""

    folder: str
    policy: str | None
    device: str
    save_to: str | None = None
    decode: bool = False


def gptq(folder: Path, shape: LlamaShape, layers: int, device: torch.device) -> None:
    """A Llama of random integers in 4 bits, symmetric, whose groups hold inputs in a random order."""
    config = llama_config(shape, layers)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.quantization_config = {
        "quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": True, "checkpoint_format": "gptq",
    }  # fmt: skip
    config.save_pretrained(folder)
    generator = torch.Generator(device).manual_seed(0)

    def order(k: int) -> Tensor:
        return (torch.randperm(k, generator=generator, device=device) // GROUP).int().cpu()

    def linear(name: str, n: int, k: int, index: Tensor) -> dict[str, Tensor]:
        words = torch.randint(-(2**31), 2**31 - 1, (k // 8, n), generator=generator, device=device)
        scales = 0.004 + 0.002 * torch.rand((k // GROUP, n), generator=generator, device=device)
        zeros = torch.full((k // GROUP, n // 8), 0x77777777, dtype=torch.int32)
        return {
            f"{name}.qweight": words.int().cpu(), f"{name}.scales": scales.half().cpu(), f"{name}.qzeros": zeros,
            f"{name}.g_idx": index.clone(),
        }  # fmt: skip

    def values(*size: int) -> Tensor:
        return (torch.randn(size, generator=generator, device=device) * 0.02).bfloat16().cpu()

    hidden, inner = shape.hidden, shape.intermediate
    kv = hidden // shape.heads * shape.kv_heads
    norm = torch.ones(hidden, dtype=torch.bfloat16)
    index = {}
    for layer in range(layers):
        stem, tensors = f"model.layers.{layer}", {}
        orders = [order(hidden), order(hidden), order(hidden), order(inner)]
        for name, n, k, which in (
            ("self_attn.q_proj", hidden, hidden, 0), ("self_attn.k_proj", kv, hidden, 0), ("self_attn.v_proj", kv, hidden, 0),
            ("self_attn.o_proj", hidden, hidden, 1), ("mlp.gate_proj", inner, hidden, 2), ("mlp.up_proj", inner, hidden, 2),
            ("mlp.down_proj", hidden, inner, 3),
        ):  # fmt: skip
            tensors |= linear(f"{stem}.{name}", n, k, orders[which])
        tensors |= {f"{stem}.{name}.weight": norm.clone() for name in ("input_layernorm", "post_attention_layernorm")}
        index |= shard(folder, f"model-{layer:02}.safetensors", tensors)
    rest = {
        "model.embed_tokens.weight": values(shape.vocab, hidden), "lm_head.weight": values(shape.vocab, hidden),
        "model.norm.weight": norm,
    }  # fmt: skip
    index |= shard(folder, "model-rest.safetensors", rest)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def shard(folder: Path, name: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Write one file; which tensor is in it."""
    save_file(tensors, folder / name, {"format": "pt"})
    return dict.fromkeys(tensors, name)


def qwen(folder: Path, source: Path, shape: MoeShape, device: torch.device) -> None:
    """A Qwen3-MoE in bf16 (``source``), and the same in FP8 in blocks with a tensor for each expert."""
    model = build_moe(shape, shape.layers, "grouped_mm", device)
    model.save_pretrained(source)
    config = model.config
    config.quantization_config = {
        "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic", "fmt": "e4m3",
        "modules_to_not_convert": ["lm_head", "re:.*mlp.gate$"],
    }  # fmt: skip
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    index: dict[str, str] = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors: dict[str, Tensor] = {}
        for name, tensor in load_file(file).items():
            if tensor.dim() == 2 and name.endswith("_proj.weight"):
                codes, scale = blocks(tensor.to(device))
                tensors[name], tensors[f"{name}_scale_inv"] = codes.cpu(), scale.cpu()
            else:
                tensors[name] = tensor
        index |= shard(folder, file.name, tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 [n, k] and f32 scales of blocks of 128 x 128; sizes that blocks do not divide are padded for it."""
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -k % BLOCK, 0, -n % BLOCK))
    cut = padded.reshape(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scale = cut.abs().amax((1, 3)) / 448.0
    codes = (cut / scale[:, None, :, None]).reshape(padded.shape)[:n, :k].to(torch.float8_e4m3fn)
    return codes.contiguous(), scale


def load(job: Job) -> dict[str, Any]:
    """Load, call once, decode and write the model as packed where asked for."""
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401  # imports are no part of loading

    import quant_compile

    folder, device = Path(job.folder), torch.device(job.device)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as opened:
            while opened.read(1 << 26):
                pass
    torch.zeros(1, device=device)
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with HostPeak() as host:
        model, seconds = timed_load(job, folder, device)
    assert not any(p.is_meta for p in model.parameters()), "a weight was not loaded"
    cuda = device.type == "cuda"
    peak, held = (torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()) if cuda else (0, 0)
    ids = torch.arange(16, device=device)[None]
    with torch.no_grad():
        started = time.perf_counter()
        model(ids)
        synchronize(device)
        first = time.perf_counter() - started
    row = {
        "seconds": seconds, "gb_per_s": size / seconds / 1e9, "file_gb": size / 1e9, "first_call_s": first, "peak_gib": peak / GIB,
        "held_gib": held / GIB, "host_gib": host.bytes / GIB,
    }  # fmt: skip
    if job.decode:
        row["decode_ms"] = decode(model, torch.arange(128, device=device)[None] % 256)
    if job.save_to is not None:
        quant_compile.save(model, job.save_to, "packed")
    del model
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    try:
        _, again = timed_load(job, folder, device)
    except torch.OutOfMemoryError:  # what was compiled may hold the first model
        return row
    return row | {"again_s": again, "again_gb_per_s": size / again / 1e9}


def timed_load(job: Job, folder: Path, device: torch.device) -> tuple[Any, float]:
    """A model and the seconds of ``load``."""
    import quant_compile

    started = time.perf_counter()
    model = quant_compile.load(folder, job.policy, device=device, progress=False)
    synchronize(device)
    return model, time.perf_counter() - started


def decode(model: Any, ids: Tensor) -> float:
    """Milliseconds a token of ``generate``, the prompt's call taken off: the median of samples by the wall clock."""

    def seconds(tokens: int) -> float:
        started = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False
        )
        synchronize(ids.device)
        return time.perf_counter() - started

    for tokens in (TOKENS + 1, TOKENS + 1, 1, 1):
        seconds(tokens)
    whole = statistics.median(seconds(TOKENS + 1) for _ in range(SAMPLES))
    return (whole - statistics.median(seconds(1) for _ in range(SAMPLES))) / TOKENS * 1e3


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, which keeps the bytecode of what it imports."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )


def child(job: Job) -> dict[str, Any]:
    """``load`` in a process of its own."""
    done = python(__file__, "--child", json.dumps(asdict(job)))
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["ended"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


Row = dict[str, Any]


def llama_rows(place: Path, device: str, smoke: bool, policies: Sequence[str]) -> Iterator[Row]:
    """16 bits under each policy, and what was made of them as packed."""
    source = place / "source"
    made = build_llama(TINY if smoke else LLAMA_3_8B, 1 if smoke else LAYERS, torch.device(device))
    made.save_pretrained(source)
    del made
    if device == "cuda":
        torch.cuda.empty_cache()
    for policy in policies:
        packed = place / f"packed-{policy}"
        plain = child(Job(str(source), policy, device, str(packed), policy == "W4A16"))
        yield {"model": "Llama", "stored": "bf16", "policy": policy, **plain}
        again = child(Job(str(packed), None, device))
        if "seconds" in plain and "seconds" in again:
            again["times_as_fast"] = plain["seconds"] / again["seconds"]
        yield {"model": "Llama", "stored": "packed", "policy": policy, **again}


def gptq_rows(place: Path, device: str, smoke: bool) -> Iterator[Row]:
    """GPTQ with ``desc_act``."""
    gptq(place / "gptq", TINY if smoke else LLAMA_3_8B, 1 if smoke else LAYERS, torch.device(device))
    found = child(Job(str(place / "gptq"), None, device, None, True))
    yield {"model": "Llama", "stored": "gptq desc_act", "policy": None, **found}


def qwen_rows(place: Path, device: str, smoke: bool) -> Iterator[Row]:
    """FP8 for each expert, and the same model quantized from bf16."""
    qwen(place / "fp8", place / "qwen", (SMOKE_MODELS if smoke else MODELS)["Qwen3-30B-A3B"], torch.device(device))
    if device == "cuda":
        torch.cuda.empty_cache()
    for stored, name, policy in (("fp8 per expert", "fp8", None), ("bf16", "qwen", "FP8_BLOCK")):
        yield {"model": "Qwen3-MoE", "stored": stored, "policy": policy} | child(
            Job(str(place / name), policy, device, None, True)
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Write checkpoints, load them in all ways, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--policies", nargs="+", help=f"of the Llama in bf16; default: {', '.join(POLICIES)}")
    parser.add_argument(
        "--folder",
        type=lambda text: Path(text).resolve(),
        help="where checkpoints are written; default: a temporary folder",
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "load.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps(load(Job(**json.loads(args.child)))))
        return
    device = "cpu" if args.smoke else "cuda"
    meta = {"benchmark": "load", "machine": machine(device), "settings": {"layers": LAYERS, "tokens": TOKENS}}
    rows: list[Row] = []
    policies = args.policies or (("W8A16", "W4A16") if args.smoke else POLICIES)
    os.environ.setdefault("PYTHONPYCACHEPREFIX", str(Path(tempfile.gettempdir()) / "bytecode"))
    python("-c", "import torch._dynamo.repro.after_dynamo, torch._inductor.compile_fx, quant_compile.pretrained")
    for part, made in zip(PARTS, (partial(llama_rows, policies=policies), gptq_rows, qwen_rows), strict=True):
        if part not in args.only:
            continue
        with tempfile.TemporaryDirectory(dir=args.folder) as place:
            for row in made(Path(place), device, args.smoke):
                rows.append(row)
                print(row, flush=True)
                write_result(args.out, rows, meta, quiet=True)
    keys = (
        "model", "stored", "policy", "file_gb", "seconds", "gb_per_s", "again_gb_per_s", "times_as_fast", "first_call_s",
        "decode_ms", "peak_gib", "held_gib", "host_gib",
    )  # fmt: skip
    print(table(list(keys), [[row.get(key, "–") for key in keys] for row in rows]))


if __name__ == "__main__":
    main()
