"""Mixture-of-experts models end to end, and their expert blocks alone: Inductor bf16 against sglquant policies.

Models have the shape of Qwen3-30B-A3B cut to 8 layers and of Mixtral-8x7B cut to 4, with seeded random weights. Each stack
runs in a process of its own, like those of ``e2e.py``, whose decode, prefill and memory measurements these are. Hugging
Face has two implementations of experts that compile, ``grouped_mm`` (the default) and ``batched_mm`` (which ``generate``
takes for decoding on a GPU); both are stacks, and every ratio is to the faster one in the same run.

``block`` is one of the model's MoE modules, router included, compiled with Inductor's default mode and captured in a CUDA
graph of many calls whose tokens take turns. Its memory is what the allocator holds for the experts after
``quant_compile.release``, over their bf16 bytes.

    python benchmarks/moe_e2e.py --out benchmarks/results/moe_e2e.json
    python benchmarks/moe_e2e.py --models Qwen3-30B-A3B --stacks inductor-grouped_mm,FP8_DYNAMIC --batches 1
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    GIB,
    RESULTS,
    ROTATE_BYTES,
    Timing,
    collect,
    fill,
    last_line,
    machine,
    table,
    time_calls,
    write_result,
)
from e2e import (
    CACHE_TOKENS,
    FILLED,
    Setup,
    Worker,
    allocated,
    logits_error,
    profile,
    reset_peak,
    run_stack,
    timed_seconds,
)

STACKS = ("inductor-grouped_mm", "inductor-batched_mm", "FP8_DYNAMIC", "W4A16")
BLOCK_TS = (1, 16, 2048)
# batched_mm copies the weights of every chosen expert of every token.
MOST_GATHERED = 16 * GIB
MOST_SAMPLES = 16


@dataclass(frozen=True)
class MoeShape:
    """Sizes of a decoder whose layers are all mixtures of experts.

    Attributes:
        kind: ``qwen3_moe`` or ``mixtral``.
        intermediate: hidden size of one expert.
        layers: how many are built.
    """

    kind: str
    layers: int
    vocab: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int

    @property
    def expert_bytes(self) -> int:
        """bf16 bytes of one expert."""
        return 6 * self.hidden * self.intermediate


MODELS = {
    "Qwen3-30B-A3B": MoeShape("qwen3_moe", 8, 151936, 2048, 768, 32, 4, 128, 128, 8),
    "Mixtral-8x7B": MoeShape("mixtral", 4, 32000, 4096, 14336, 32, 8, 128, 8, 2),
}
SMOKE_MODELS = {
    "Qwen3-30B-A3B": MoeShape("qwen3_moe", 1, 512, 128, 128, 4, 2, 32, 8, 2),
    "Mixtral-8x7B": MoeShape("mixtral", 1, 512, 128, 256, 4, 2, 32, 4, 2),
}


def config_of(shape: MoeShape, layers: int, implementation: str) -> Any:
    """transformers' config with SDPA attention, an untied head and one implementation of experts."""
    from transformers import MixtralConfig, Qwen3MoeConfig

    common: dict[str, Any] = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "num_experts_per_tok": shape.top_k,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "attn_implementation": "sdpa",
        "experts_implementation": implementation,
    }
    if shape.kind == "mixtral":
        return MixtralConfig(intermediate_size=shape.intermediate, num_local_experts=shape.experts, **common)
    return Qwen3MoeConfig(
        moe_intermediate_size=shape.intermediate, num_experts=shape.experts, norm_topk_prob=True, **common
    )


def build_moe(shape: MoeShape, layers: int, implementation: str, device: torch.device) -> Any:
    """An eval-mode model with seeded random weights made on the device."""
    from transformers import MixtralForCausalLM, Qwen3MoeForCausalLM

    config = config_of(shape, layers, implementation)
    with torch.device("meta"):
        model = (MixtralForCausalLM if shape.kind == "mixtral" else Qwen3MoeForCausalLM)(config).to(torch.bfloat16)
    return fill(model, config, device)


class Layer(torch.nn.Module):
    """A MoE module as the layer of a model holds it, under the name ``mlp``."""

    def __init__(self, mlp: torch.nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[1, T, H] -> [1, T, H]."""
        return self.mlp(x)


def build_block(shape: MoeShape, implementation: str, device: torch.device) -> Layer:
    """One MoE module, router included, with the same weights in every stack."""
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = config_of(shape, 1, implementation)
    with torch.device("meta"):
        block = (MixtralSparseMoeBlock if shape.kind == "mixtral" else Qwen3MoeSparseMoeBlock)(config)
    return fill(Layer(block.to(torch.bfloat16)), config, device)  # type: ignore[return-value]


# --- a worker --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MoeSetup(Setup):
    """``Setup`` of a worker on a MoE model."""

    model: str = ""
    block_ts: tuple[int, ...] = ()
    whole: bool = True

    @property
    def shape(self) -> MoeShape:
        """Sizes of the model."""
        return (SMOKE_MODELS if self.smoke else MODELS)[self.model]

    @property
    def policy(self) -> str | None:
        """The sglquant policy, None for Inductor."""
        return None if self.stack.startswith("inductor") else self.stack

    @property
    def implementation(self) -> str:
        """Hugging Face's implementation of experts; sglquant gets the default one."""
        return self.stack.partition("-")[2] if self.policy is None else "grouped_mm"

    def gathers_too_much(self, tokens: int) -> str | None:
        """Why this many tokens cannot be run, if so."""
        copied = tokens * self.shape.top_k * self.shape.expert_bytes
        if self.implementation != "batched_mm" or copied <= MOST_GATHERED:
            return None
        return f"batched_mm would copy {copied / GIB:.0f} GiB of weights in each layer"


class MoeWorker(Worker):
    """``Worker`` on a MoE model, with the blocks alone first."""

    setup: MoeSetup

    def phases(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Blocks, then the model."""
        if self.setup.block_ts:
            yield "block", self.block
        if self.setup.whole:
            yield from super().phases()

    def new_model(self) -> Any:
        """The eager bf16 model."""
        layers = min(self.setup.layers, self.setup.shape.layers)
        return build_moe(self.setup.shape, layers, self.setup.implementation, self.setup.device)

    def decode(self, batch: int, first: bool) -> None:
        """As ``Worker``'s, or the reason why not."""
        reason = self.setup.gathers_too_much(batch)
        if reason is None:
            super().decode(batch, first)
        else:
            self.emit("skipped", cell=f"decode B={batch}", reason=reason)

    def prefill(self) -> None:
        """As ``Worker``'s, or the reason why not."""
        reason = self.setup.gathers_too_much(self.setup.tokens[2])
        if reason is None:
            super().prefill()
        else:
            self.emit("skipped", cell=f"prefill 1x{self.setup.tokens[2]}", reason=reason)

    def kernels(self, step: Callable[[], object]) -> dict[str, Any]:
        """The longest kernels of a step by name; which of them are linears cannot be told by name here."""
        sums = profile(step)
        return {"kernels_per_step": sums["kernels_per_step"], "top": sums["top"]}

    def block(self) -> None:
        """Time one MoE module at each number of tokens, then weigh it."""
        setup = self.setup
        before = allocated(setup.device)
        layer = build_block(setup.shape, setup.implementation, setup.device)
        experts = sum(p.numel() * p.element_size() for n, p in layer.named_parameters() if ".experts." in n)
        rest = sum(p.numel() * p.element_size() for p in layer.parameters()) - experts
        options = {"backend": "sglquant", "options": {"policy": setup.policy}} if setup.policy else {}
        layer.compile(dynamic=False, **options)
        reset_peak(setup.device)
        for tokens in setup.block_ts:
            reason = setup.gathers_too_much(tokens)
            try:
                values = {"reason": reason} if reason else self.time_block(layer, tokens)
            except Exception as error:  # the other sizes and the model go on
                values = {"reason": last_line(error)}
            self.emit("block", cell=f"block T={tokens}", **values)
        if setup.policy:
            try:
                self.emit("block_memory", **self.weigh_block(layer, before + rest, experts))
            except Exception as error:
                self.emit("block_memory", reason=last_line(error))
        del layer
        torch._dynamo.reset()
        collect(setup.device)

    def time_block(self, layer: Layer, tokens: int) -> dict[str, Any]:
        """Microseconds of one call, and seconds of the first."""
        setup, shape = self.setup, self.setup.shape
        generator = torch.Generator(setup.device).manual_seed(tokens)
        touched = min(shape.experts, tokens * shape.top_k) * shape.expert_bytes // 4
        count = min(MOST_SAMPLES, max(2, -(-ROTATE_BYTES // touched))) if setup.device.type == "cuda" else 2
        size = (1, tokens, shape.hidden)
        xs = [torch.randn(size, generator=generator, device=setup.device, dtype=torch.bfloat16) for _ in range(count)]
        seconds = timed_seconds(lambda: layer(xs[0]), setup.device)
        torch.save(layer(xs[0]).float().cpu(), setup.work / f"{setup.stack}.block{tokens}.pt")
        repeats = 2 if setup.smoke else 15
        timing = time_calls({"block": lambda i: layer(xs[i % count])}, setup.device, count, repeats)["block"]
        if isinstance(timing, Timing):
            return {"compile_s": seconds, "samples": count, **timing.fields()}
        return {"compile_s": seconds, "reason": timing}

    def weigh_block(self, layer: Layer, others: int, experts: int) -> dict[str, Any]:
        """Bytes that the experts hold after release by the allocator, and what the ledger says."""
        import quant_compile

        report = quant_compile.report(layer)
        lines = [line for line in report.lines if any(".experts." in name for name in line.names) and line.scheme]
        quant_compile.release(layer)
        torch._dynamo.reset()
        collect(self.setup.device)
        held = allocated(self.setup.device) - others
        stored, named = (sum(getattr(line, name) for line in lines) for name in ("bytes_after", "bytes_before"))
        return {
            "experts_bf16_gib": experts / GIB,
            "experts_held_gib": held / GIB,
            "experts_ratio": held / experts if self.setup.device.type == "cuda" else None,
            "experts_ledger_ratio": stored / named if named else None,
            "kernels": {name: line.kernels for line in lines for name in line.names},
            "coverage": report.coverage,
        }


def work(args: argparse.Namespace) -> None:
    """Run as a worker, without gradients."""
    setup = MoeSetup(
        args.worker, args.layers, torch.device(args.device), tuple(args.batches), args.steps, args.prefill, args.smoke,
        args.work, args.model, tuple(args.block_ts), args.whole,
    )  # fmt: skip
    with torch.no_grad():
        MoeWorker(setup).run()


# --- the parent ------------------------------------------------------------------------------------------------------


def time_of(cell: Any) -> float | None:
    """Milliseconds or microseconds of a cell that was timed."""
    return (cell.get("ms") or cell.get("us")) if isinstance(cell, dict) else None


def summarize(model: str, stack: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row of a model and stack: cells by name, memory, and the error that ended it."""
    row: dict[str, Any] = {"model": model, "stack": stack, "error": None}
    for line in lines:
        values = {key: value for key, value in line.items() if key not in ("stack", "kind", "cell")}
        if line["kind"] == "error":
            row["error"] = f"{line['phase']}: {line['message']}"
        elif line["kind"] == "kernels":
            row[f"{line['cell']} kernels"] = values
        else:
            row[line.get("cell", line["kind"])] = values
    return row


def add_speedups(rows: Sequence[dict[str, Any]]) -> None:
    """Into every timed cell, how many times faster it is than the faster Inductor stack on the same model."""
    for row in rows:
        peers = [r for r in rows if r["model"] == row["model"] and r["stack"].startswith("inductor")]
        for name, cell in row.items():
            own = time_of(cell)
            theirs = [time for peer in peers if (time := time_of(peer.get(name))) is not None]
            if own is not None:
                cell["speedup"] = min(theirs) / own if theirs else None
            if own is not None and "wall_ms" in cell:
                walls = [peer[name]["wall_ms"] for peer in peers if "wall_ms" in peer.get(name, {})]
                cell["wall_speedup"] = min(walls) / cell["wall_ms"] if walls else None


def block_errors(row: dict[str, Any], work: Path, tokens: Sequence[int], bf16: str | None) -> None:
    """Into block cells, the relative distance of the first output to a bf16 stack's: a check of sanity."""
    for count in tokens:
        own, theirs = (work / f"{stack}.block{count}.pt" for stack in (row["stack"], bf16))
        if own.exists() and theirs.exists() and isinstance(row.get(f"block T={count}"), dict):
            y, expected = torch.load(own), torch.load(theirs)
            row[f"block T={count}"]["error_to_bf16"] = float((y - expected).norm() / expected.norm())


def run_model(
    model: str, args: argparse.Namespace, started: float, rows: list[dict[str, Any]], meta: Mapping[str, Any]
) -> None:
    """All stacks of a model; what is known is written after each."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        bf16 = next((stack for stack in args.stacks if stack.startswith("inductor")), None)
        extra = ["--model", model, "--block-ts", ",".join(map(str, args.block_ts)) or "0"] + ["--no-model"] * (
            not args.whole
        )
        for stack in args.stacks:
            if time.perf_counter() - started > args.seconds:
                rows.append({"model": model, "stack": stack, "error": "not run: time budget spent"})
                continue
            row = summarize(model, stack, run_stack(stack, args, work, __file__, extra))
            row["logits_error_to_bf16"] = logits_error(stack, work, bf16 or "inductor")
            block_errors(row, work, args.block_ts, bf16)
            rows.append(row)
            add_speedups(rows)
            write_result(args.out, rows, meta)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of parent and worker."""
    args = _arguments(argv)
    if args.worker:
        work(args)
        return
    settings = {
        "models": args.models,
        "layers": {
            name: min(args.layers, (SMOKE_MODELS if args.smoke else MODELS)[name].layers) for name in args.models
        },
        "batches": args.batches,
        "block_ts": args.block_ts,
        "cache_tokens": CACHE_TOKENS,
        "filled": FILLED,
        "steps": args.steps,
        "timing": "models: CUDA events around steps of an unbroken stream, and wall clock with a sync after each step; "
        "blocks: CUDA graphs of many calls; medians",
    }
    meta = {"benchmark": "moe_e2e", "machine": machine(args.device), "settings": settings}
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    for model in args.models:
        run_model(model, args, started, rows, meta)
    show(rows, args)
    write_result(args.out, rows, meta)


def show(rows: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> None:
    """Longest kernels, blocks, models, memory, then errors and what was skipped."""
    for row in rows:
        for name in [key for key in row if key.endswith("kernels")]:
            print(f"{row['model']} {row['stack']}, {name}: {row[name]['kernels_per_step']:.0f} a step")
            for top in row[name]["top"]:
                print(f"   {top['us']:8.1f} us {top['calls']:6.1f} calls  {top['name'][:90]}")
    blocks = [f"block T={t}" for t in args.block_ts]
    header = ["model", "stack", *(part for name in blocks for part in (f"{name} us", "x", "err"))]
    print(
        table(header, [[r["model"], r["stack"], *_fields(r, blocks, ("us", "speedup", "error_to_bf16"))] for r in rows])
    )
    cells = [f"decode B={b}" for b in args.batches]
    cells += [name for row in rows for name in row if name.startswith("prefill")][:1]
    header = [
        "model",
        "stack",
        *(part for name in cells for part in (f"{name} ms", "x", "wall", "compile s")),
        "logits err",
    ]
    names = ("ms", "speedup", "wall_ms", "compile_s")
    lines = [[r["model"], r["stack"], *_fields(r, cells, names)] for r in rows]
    print(table(header, [[*line, row.get("logits_error_to_bf16")] for line, row in zip(lines, rows)]))
    names = ("experts_ratio", "experts_ledger_ratio", "held_gib", "peak_gib", "weights_gib", "named_ratio", "coverage")
    memory = [{**r.get("first", {}), **r.get("memory", {}), **r.get("block_memory", {})} for r in rows]
    print(
        table(["model", "stack", *names], [[r["model"], r["stack"], *map(m.get, names)] for r, m in zip(rows, memory)])
    )
    for row in rows:
        for name, cell in row.items():
            if isinstance(cell, dict) and cell.get("reason"):
                print(f"{row['model']} {row['stack']} {name}: {cell['reason']}")
        if row["error"]:
            print(f"ERROR {row['model']} {row['stack']}: {row['error']}")


def _fields(row: Mapping[str, Any], cells: Sequence[str], names: Sequence[str]) -> list[Any]:
    return [row.get(cell, {}).get(name) for cell in cells for name in names]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", default=",".join(MODELS), help=f"comma-separated, of {', '.join(MODELS)}")
    parser.add_argument("--stacks", default=",".join(STACKS), help="inductor-<implementation>, and any policy")
    parser.add_argument("--layers", type=int, default=64, help="at most this many layers of each model's own number")
    parser.add_argument("--batches", default="1,16", help="decode batch sizes; the first also measures memory")
    parser.add_argument("--block-ts", default=",".join(map(str, BLOCK_TS)), help="tokens of the block alone; 0: none")
    parser.add_argument("--no-prefill", dest="prefill", action="store_false")
    parser.add_argument("--no-model", dest="whole", action="store_false", help="the blocks alone")
    parser.add_argument("--steps", type=int, default=30, help="timed decode steps")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds a stack may take")
    parser.add_argument("--seconds", type=float, default=540.0, help="no new stack is started after this")
    parser.add_argument("--smoke", action="store_true", help="tiny models on CPU: does it run?")
    parser.add_argument("--verbose", action="store_true", help="print the log of a stack that fails")
    parser.add_argument("--out", type=Path, default=RESULTS / "moe_e2e.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.smoke:
        args.device, args.steps, args.limit = "cpu", 2, 300.0
    args.models, args.stacks = args.models.split(","), args.stacks.split(",")
    args.batches = [int(b) for b in args.batches.split(",")]
    args.block_ts = [int(t) for t in args.block_ts.split(",") if int(t)]
    return args


if __name__ == "__main__":
    main()
