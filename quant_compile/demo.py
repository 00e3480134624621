"""The demo: the bundled tiny Llama in bf16 and under four policies, then the bundled MoE, on text they have never seen.

Reads ``examples/tiny_lm/weights`` of a source checkout (or ``--model DIR``); writes to the terminal only. Each model
runs compiled, in two graphs: one reads a window into a static KV cache, the other makes one token. Perplexity, speed
and the printed continuation all come from these two graphs, so that compiling is paid twice a policy and no more. The MoE
shows that experts are quantized and what it costs: one graph, compared with the eager model.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

import quant_compile
from quant_compile.ir.errors import QuantError
from quant_compile.ir.family import bits_per_weight
from quant_compile.policy import Policy

POLICIES = ("FP8_DYNAMIC", "W8A8", "W8A16", "W4A16")
MOE_POLICIES = ("FP8_DYNAMIC",)
MOE_WINDOWS = 4
BASELINE = "bf16"
WINDOW = 448
NEW_TOKENS = 32
END = "<|end|>"
WEIGHTS = Path(__file__).resolve().parents[1] / "examples" / "tiny_lm" / "weights"
FILES = ("tokenizer.json", "heldout.txt")


class DemoError(QuantError, FileNotFoundError):
    """The demo's model is not where it was looked for."""


@dataclass(frozen=True)
class TinyLM:
    """A tiny language model with its tokenizer and the ids [tokens] of text that it was not trained on."""

    model: Any
    tokenizer: Any
    heldout: Tensor


@dataclass(frozen=True)
class Outcome:
    """What one policy gave.

    Attributes:
        policy: its name, or ``bf16``.
        bits: bits per quantized weight.
        perplexity: on the held-out windows.
        tokens_per_second: decode, one sequence, greedy, with a KV cache.
        weight_bytes: of all parameters as the model computes with them.
        coverage: quantized bytes over the bytes the policy names; None for bf16.
        compile_seconds: the first call of both graphs.
        continuation: greedy continuation of the prompt.
    """

    policy: str
    bits: float
    perplexity: float
    tokens_per_second: float
    weight_bytes: int
    coverage: float | None
    compile_seconds: float
    continuation: str


def find_weights(folder: str | Path | None = None) -> Path:
    """The folder with the trained models: ``folder``, or the source checkout's.

    Raises:
        DemoError: a file is missing there.
    """
    place = WEIGHTS if folder is None else Path(folder)
    missing = [name for name in FILES if not (place / name).is_file()]
    if missing:
        raise DemoError(
            f"no trained model in {place}: {', '.join(missing)} is missing. The weights are part of the source "
            "repository, not of the installed package.\nFix: run this in a checkout, or give --model DIR, a folder "
            "made by examples/tiny_lm/train.py."
        )
    return place


def load(name: str = "dense", folder: str | Path | None = None, device: str | torch.device = "cpu") -> TinyLM:
    """Load ``dense`` (Llama) or ``moe`` (Qwen3-MoE) in bf16, in eval mode, with its tokenizer and held-out token ids.

    Raises:
        DemoError: there is no such model.
    """
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    place = find_weights(folder)
    if not (place / name / "model.safetensors").is_file():
        found = sorted(path.parent.name for path in place.glob("*/model.safetensors"))
        raise DemoError(f"no model {name!r} in {place}; there is: {', '.join(found) or 'none'}")
    model: Any = AutoModelForCausalLM.from_pretrained(place / name, dtype=torch.bfloat16)
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(place / "tokenizer.json"), bos_token=END, eos_token=END)
    text = (place / "heldout.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    model.eval().requires_grad_(False)
    return TinyLM(model.to(device), tokenizer, ids.to(device))


def windows_of(ids: Tensor, length: int, count: int) -> Tensor:
    """The first ``count`` windows [count, length + 1] of ``ids``; neighbours share one token, so each is predicted.

    Raises:
        ValueError: the text has not even one window.
    """
    count = min(count, (ids.numel() - 1) // length)
    if count < 1:
        raise ValueError(f"{ids.numel()} tokens are fewer than one window of {length + 1}")
    return torch.stack([ids[i * length : (i + 1) * length + 1] for i in range(count)])


@torch.inference_mode()
def perplexity(forward: Callable[[Tensor], Tensor], windows: Tensor) -> float:
    """exp of the mean negative log-likelihood over ``windows`` [count, length + 1], one window a call.

    Args:
        forward: token ids [1, length] -> logits [1, length, vocabulary].
        windows: token ids.
    """
    total = 0.0
    for window in windows:
        logits = forward(window[None, :-1])[0].float()
        total += float(torch.nn.functional.cross_entropy(logits, window[1:]))
    return math.exp(total / len(windows))


class Runner:
    """A compiled causal LM with one static KV cache: reads windows of ``WINDOW`` tokens, decodes token by token."""

    def __init__(self, lm: TinyLM) -> None:
        from transformers import StaticCache

        self.lm = lm
        config = lm.model.config
        self.device = lm.heldout.device
        self.cache = StaticCache(config=config, max_cache_len=WINDOW + NEW_TOKENS)
        # A cache that initialises itself inside a compiled call would belong to that graph.
        self.cache.early_initialization(1, config.num_key_value_heads, config.head_dim, torch.bfloat16, self.device)

    def read(self, ids: Tensor) -> Tensor:
        """Logits [1, WINDOW, vocabulary] of ``ids`` [1, WINDOW], with an empty cache before and a filled one after."""
        self.cache.reset()
        return self.lm.model(input_ids=ids, past_key_values=self.cache, use_cache=True).logits

    @torch.inference_mode()
    def decode(self, prompt: Tensor, count: int) -> tuple[list[int], float]:
        """``count`` greedy tokens after ``prompt`` [1, WINDOW], and the seconds that all but the first took."""
        token = self.read(prompt)[:, -1:].argmax(-1)
        made = [token]
        self._wait()
        start = time.perf_counter()
        for _ in range(count - 1):
            token = self.lm.model(input_ids=token, past_key_values=self.cache, use_cache=True).logits.argmax(-1)
            made.append(token)
        self._wait()
        seconds = time.perf_counter() - start
        return torch.cat(made, dim=1)[0].tolist(), seconds

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(lm: TinyLM, policy: str, windows: Tensor, prompt: Tensor) -> tuple[Outcome, Any]:
    """Compile ``lm`` for ``policy`` (``bf16``: Inductor alone) and measure it; the report is None for bf16."""
    if policy == BASELINE:
        lm.model.compile(backend="inductor")
    else:
        quant_compile.compile(lm.model, policy=policy)
    runner = Runner(lm)
    start = time.perf_counter()
    runner.decode(prompt, 3)
    compile_seconds = time.perf_counter() - start
    ppl = perplexity(runner.read, windows)
    tokens, seconds = runner.decode(prompt, NEW_TOKENS)
    report: Any = None if policy == BASELINE else quant_compile.report(lm.model)
    whole = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    outcome = Outcome(
        policy=policy,
        bits=16.0 if report is None else bits_of(policy),
        perplexity=ppl,
        tokens_per_second=(NEW_TOKENS - 1) / seconds,
        weight_bytes=whole if report is None else report.bytes_after,
        coverage=None if report is None else report.coverage,
        compile_seconds=compile_seconds,
        continuation=lm.tokenizer.decode(tokens),
    )
    return outcome, report


def bits_of(policy: str) -> float:
    """Bits that the policy's default scheme stores per weight, group scales included."""
    scheme = Policy.load(policy).default
    return 16.0 if scheme is None else bits_per_weight(scheme)


def results_table(outcomes: Sequence[Outcome]) -> Table:
    """One line a policy, compared with the first."""
    base = outcomes[0]
    table = Table(title="Held-out perplexity, speed and memory", title_justify="left")
    for column in ("policy", "bits/weight", "perplexity", "vs bf16", "tokens/s", "weights", "coverage", "compile"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for outcome in outcomes:
        table.add_row(
            outcome.policy,
            f"{outcome.bits:.2f}",
            f"{outcome.perplexity:.3f}",
            f"{outcome.perplexity / base.perplexity - 1:+.2%}",
            f"{outcome.tokens_per_second:.0f}",
            f"{outcome.weight_bytes / 1e6:.2f} MB",
            "–" if outcome.coverage is None else f"{outcome.coverage:.1%}",
            f"{outcome.compile_seconds:.0f} s",
        )
    return table


@dataclass(frozen=True)
class ExpertOutcome:
    """What one policy gave for the MoE.

    Attributes:
        policy: its name, or ``bf16``.
        perplexity: on the held-out windows.
        weight_bytes: of all parameters as the model computes with them.
        expert_bytes: of the experts alone.
        coverage: quantized bytes over the bytes the policy names; None for bf16.
        seconds: compiling and the first window; None for bf16, which runs eagerly.
    """

    policy: str
    perplexity: float
    weight_bytes: int
    expert_bytes: int
    coverage: float | None = None
    seconds: float | None = None


def measure_experts(model: Any, policy: str, windows: Tensor) -> tuple[ExpertOutcome, Any]:
    """Compile an MoE model for ``policy`` (``bf16``: leave it eager) and measure it; the report is None for bf16."""
    forward: Callable[[Tensor], Tensor] = lambda ids: model(input_ids=ids, use_cache=False).logits  # noqa: E731
    sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    if policy == BASELINE:
        experts = sum(size for name, size in sizes.items() if _is_expert(name))
        return ExpertOutcome(policy, perplexity(forward, windows), sum(sizes.values()), experts), None
    quant_compile.compile(model, policy=policy)
    start = time.perf_counter()
    perplexity(forward, windows[:1])
    seconds = time.perf_counter() - start
    ppl = perplexity(forward, windows)
    report = quant_compile.report(model)
    experts = sum(line.bytes_after for line in report.lines if _is_expert(line.names[0]))
    return ExpertOutcome(policy, ppl, report.bytes_after, experts, report.coverage, seconds), report


def _is_expert(name: str) -> bool:
    return "experts" in name.split(".")


def experts_table(outcomes: Sequence[ExpertOutcome]) -> Table:
    """One line a policy, compared with the first."""
    base = outcomes[0]
    table = Table(title="The mixture of experts: held-out perplexity and memory", title_justify="left")
    for column in ("policy", "perplexity", "vs bf16", "weights", "experts alone", "coverage", "compile"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for outcome in outcomes:
        table.add_row(
            outcome.policy,
            f"{outcome.perplexity:.3f}",
            f"{outcome.perplexity / base.perplexity - 1:+.2%}",
            f"{outcome.weight_bytes / 1e6:.2f} MB",
            f"{outcome.expert_bytes / 1e6:.2f} MB",
            "–" if outcome.coverage is None else f"{outcome.coverage:.1%}",
            "–" if outcome.seconds is None else f"{outcome.seconds:.0f} s",
        )
    return table


def show_experts(console: Console, args: argparse.Namespace) -> None:
    """The MoE's part of the demo."""
    lm = load("moe", args.model, args.device)
    windows = windows_of(lm.heldout, WINDOW, min(args.windows, MOE_WINDOWS))
    config = lm.model.config
    console.print(
        f"\n{type(lm.model).__name__}, {config.num_local_experts} experts in each of {config.num_hidden_layers} layers, "
        f"{config.num_experts_per_tok} a token. {windows.shape[0]} windows.",
        highlight=False,
    )
    outcomes: list[ExpertOutcome] = []
    for policy in (BASELINE, *args.moe_policies):
        torch.compiler.reset()
        model = lm.model if policy == BASELINE else load("moe", args.model, args.device).model
        with console.status(f"compiling and measuring {policy} ..."):
            outcome, report = measure_experts(model, policy, windows)
        outcomes.append(outcome)
        if report is not None:
            console.print(report.table())
    console.print(experts_table(outcomes))


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sglquant demo", description="The bundled tiny models under several policies."
    )
    parser.add_argument("--model", help="folder made by examples/tiny_lm/train.py (default: the checkout's)")
    parser.add_argument("--name", default="dense", help="dense or moe (default: dense)")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), help="presets or policy files")
    parser.add_argument("--moe-policies", nargs="*", default=list(MOE_POLICIES), help="of the MoE; none: leave it out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--windows", type=int, default=8, help=f"held-out windows of {WINDOW} tokens")
    return parser.parse_args(list(argv))


def main(argv: Sequence[str] = ()) -> int:
    """Run the demo; returns the exit status (1: the model is missing)."""
    args = _arguments(argv)
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        lm = load(args.name, args.model, args.device)
    except DemoError as error:
        console.print(f"[red]{escape(str(error))}[/red]", highlight=False)
        return 1
    windows = windows_of(lm.heldout, WINDOW, args.windows)
    prompt = windows[min(2, len(windows) - 1)][None, :-1]
    size = sum(p.numel() for p in lm.model.parameters())
    console.print(
        f"{type(lm.model).__name__}, {size / 1e6:.2f} M parameters, trained on the Python standard library. "
        f"Perplexity on {windows.shape[0]} held-out windows of {WINDOW} tokens, {args.device}.",
        highlight=False,
    )
    outcomes: list[Outcome] = []
    for policy in (BASELINE, *args.policies):
        torch.compiler.reset()  # a new model each time; nothing of the one before is wanted
        with console.status(f"compiling and measuring {policy} ..."):
            outcome, report = measure(load(args.name, args.model, args.device), policy, windows, prompt)
        outcomes.append(outcome)
        if report is not None:
            console.print(report.table())
    console.print(results_table(outcomes))
    shown = lm.tokenizer.decode(prompt[0, -48:].tolist())
    console.print("\nThe prompt ends:", style="bold")
    console.print(escape(shown), highlight=False)
    for outcome in outcomes:
        console.print(f"\n{outcome.policy} continues:", style="bold")
        console.print(escape(outcome.continuation), highlight=False)
    if args.name != "moe" and args.moe_policies:
        show_experts(console, args)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
