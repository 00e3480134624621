"""The demo: the bundled tiny Llama and the tiny MoE in bf16 and quantized, on text they have never seen.

Reads ``examples/tiny_lm/weights`` of a source checkout (or ``--model DIR``); writes to the terminal, and a report where
one is asked for. Each run compiles one graph, a step of one token for each of ``SEQUENCES`` texts over a static KV cache. Perplexity,
speed and the printed continuation all come from this graph, so that compiling, which takes most of the time, is paid once. What torch
and transformers have to say while they compile is kept back; our own warnings are shown.
"""

from __future__ import annotations

import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

import quant_compile
from quant_compile.ir.errors import PolicyWarning, QuantError, RecompileLimitWarning
from quant_compile.measure.windows import windows_of

# Of the dense model, by the type of device: a CPU, where compiling takes most of the time, should be done in three minutes.
POLICIES = {"cuda": ("FP8_DYNAMIC", "W8A8", "W8A16", "W4A16"), "cpu": ("W8A16", "W4A16")}
MOE_POLICIES = ("FP8_DYNAMIC",)
BASELINE = "bf16"
SEQUENCES = 16
WINDOW = 128
NEW_TOKENS = 32
SHOWN = 5  # the sequence whose continuation is printed
SHOWN_TOKENS = 48  # of its prompt
WIDTH = 140  # of what is piped or captured
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
        model: ``dense`` or ``moe``.
        policy: its name, or ``bf16``.
        perplexity: on the held-out windows.
        tokens_per_second: greedy decode of all sequences at once, with a KV cache.
        weight_bytes: of all parameters as the model computes with them.
        coverage: quantized bytes over the bytes the policy names; None for bf16.
        compile_seconds: the first call.
        continuation: greedy continuation of the shown sequence.
    """

    model: str
    policy: str
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


class Runner:
    """A causal LM with a static KV cache: every call is the same step, one token of each sequence."""

    def __init__(self, lm: TinyLM, sequences: int, length: int) -> None:
        """A cache for ``sequences`` texts of at most ``length`` tokens."""
        from transformers import StaticCache

        self.lm = lm
        config = lm.model.config
        self.device = lm.heldout.device
        self.cache = StaticCache(config=config, max_cache_len=length)
        # A cache that initialises itself inside a compiled call would belong to that graph.
        heads, size = config.num_key_value_heads, config.head_dim
        self.cache.early_initialization(sequences, heads, size, torch.bfloat16, self.device)

    def step(self, token: Tensor) -> Tensor:
        """Logits [sequences, vocabulary] after one more token [sequences, 1] of each."""
        # Contiguous, since a graph is for strides too.
        return self.lm.model(input_ids=token.contiguous(), past_key_values=self.cache, use_cache=True).logits[:, -1]

    def read(self, ids: Tensor) -> Iterator[Tensor]:
        """Logits [sequences, vocabulary] after each column of ``ids`` [sequences, tokens], from an empty cache on."""
        self.cache.reset()
        for column in ids.split(1, dim=1):
            yield self.step(column)

    def perplexity(self, windows: Tensor) -> tuple[float, Tensor]:
        """exp of the mean negative log-likelihood over ``windows`` [sequences, length + 1], and the last logits."""
        total, logits = 0.0, None
        for logits, following in zip(self.read(windows[:, :-1]), windows[:, 1:].unbind(1), strict=True):
            total += float(torch.nn.functional.cross_entropy(logits.float(), following))
        assert logits is not None
        return math.exp(total / (windows.shape[1] - 1)), logits

    def decode(self, logits: Tensor, count: int) -> tuple[Tensor, float]:
        """``count`` greedy tokens [sequences, count] from ``logits`` of the text so far, and the seconds of all but the first."""
        token = logits.argmax(-1, keepdim=True)
        made = [token]
        self._wait()
        start = time.perf_counter()
        for _ in range(count - 1):
            token = self.step(token).argmax(-1, keepdim=True)
            made.append(token)
        self._wait()
        return torch.cat(made, dim=1), time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@torch.inference_mode()
def measure(
    name: str, lm: TinyLM, policy: str, windows: Tensor, say: Callable[[str], None] = lambda doing: None
) -> tuple[Outcome, Any]:
    """Compile ``lm`` for ``policy`` (``bf16``: Inductor alone) and measure it; the report is None for bf16.

    Args:
        name: what to call the model.
        lm: freshly loaded.
        policy: a preset, a policy file, or ``bf16``.
        windows: token ids [sequences, length + 1].
        say: told what is being done.
    """
    say("compiling")
    if policy == BASELINE:
        lm.model.compile(backend="inductor")
    else:
        quant_compile.compile(lm.model, policy=policy)
    runner = Runner(lm, windows.shape[0], windows.shape[1] - 1 + NEW_TOKENS)
    start = time.perf_counter()
    runner.step(windows[:, :1])
    compile_seconds = time.perf_counter() - start
    say("reading held-out text")
    ppl, logits = runner.perplexity(windows)
    say("writing")
    tokens, seconds = runner.decode(logits, NEW_TOKENS)
    report: Any = None if policy == BASELINE else quant_compile.report(lm.model)
    whole = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    outcome = Outcome(
        model=name,
        policy=policy,
        perplexity=ppl,
        tokens_per_second=(NEW_TOKENS - 1) * windows.shape[0] / seconds,
        weight_bytes=whole if report is None else report.bytes_after,
        coverage=None if report is None else report.coverage,
        compile_seconds=compile_seconds,
        continuation=lm.tokenizer.decode(tokens[min(SHOWN, len(tokens) - 1)].tolist()),
    )
    return outcome, report


def results_table(outcomes: Sequence[Outcome], caption: str) -> Table:
    """One line a run, compared with the same model in bf16."""
    base = {outcome.model: outcome.perplexity for outcome in outcomes if outcome.policy == BASELINE}
    table = Table(title="Held-out perplexity, speed and memory", title_justify="left", caption=caption)
    for column in ("model", "policy", "perplexity", "to bf16", "tokens/s", "weights", "coverage", "compile"):
        table.add_column(column, justify="left" if column in ("model", "policy") else "right")
    for outcome in outcomes:
        table.add_row(
            outcome.model,
            outcome.policy,
            f"{outcome.perplexity:.3f}",
            f"{outcome.perplexity / base[outcome.model] - 1:+.2%}",
            f"{outcome.tokens_per_second:.0f}",
            f"{outcome.weight_bytes / 1e6:.2f} MB",
            "–" if outcome.coverage is None else f"{outcome.coverage:.1%}",
            f"{outcome.compile_seconds:.0f} s",
            end_section=outcome is [other for other in outcomes if other.model == outcome.model][-1],
        )
    return table


@contextmanager
def quiet(console: Console) -> Generator[None]:
    """Torch and transformers keep to errors; of the warnings, ours are shown, as one line each."""
    import transformers

    levels = transformers.logging
    before, bars = levels.get_verbosity(), levels.is_progress_bar_enabled()
    levels.set_verbosity_error()
    levels.disable_progress_bar()
    torch._logging.set_logs(all=logging.ERROR)  # does nothing where TORCH_LOGS says otherwise

    def show(message: Warning | str, *where: Any, **more: Any) -> None:
        console.print(f"[yellow]warning:[/yellow] {escape(str(message))}", highlight=False)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for ours in (PolicyWarning, RecompileLimitWarning):
                warnings.simplefilter("default", ours)
            warnings.showwarning = show
            yield
    finally:
        torch._logging.set_logs()
        levels.set_verbosity(before)
        if bars:
            levels.enable_progress_bar()


@contextmanager
def few_threads(device: torch.device) -> Generator[str]:
    """One thread on a CPU: these products are too small to share. Says where it runs."""
    if device.type != "cpu":
        yield str(device)
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield "one thread of the CPU"
    finally:
        torch.set_num_threads(before)


def described(model: Any) -> str:
    """Class and size of a model, and its experts if it has any."""
    config, size = model.config, sum(p.numel() for p in model.parameters())
    text = f"{type(model).__name__}, {size / 1e6:.2f} M parameters"
    if hasattr(config, "num_experts_per_tok"):
        text += f", {config.num_local_experts} experts in each of {config.num_hidden_layers} layers"
        text += f", {config.num_experts_per_tok} a token"
    return text


def introduce(console: Console, names: Sequence[str], folder: str | Path | None) -> str:
    """Print what the models are; returns the end of the shown prompt."""
    lm = None
    for name in names:
        lm = load(name, folder)
        console.print(f"{name:5} {described(lm.model)}", highlight=False)
    assert lm is not None
    windows = windows_of(lm.heldout, WINDOW, SEQUENCES)
    console.print(
        f"Both learned the Python standard library; they are measured on {len(windows)} held-out windows of {WINDOW} tokens.\n",
        highlight=False,
    )
    return lm.tokenizer.decode(windows[min(SHOWN, len(windows) - 1), -SHOWN_TOKENS - 1 : -1].tolist())


def show_texts(console: Console, outcomes: Sequence[Outcome], prompt: str) -> None:
    """The end of the prompt, and how each run goes on."""
    console.print("\nThe prompt ends:", style="bold")
    console.print(escape(prompt), highlight=False)
    for outcome in outcomes:
        console.print(f"\n{outcome.model} {outcome.policy} continues:", style="bold")
        console.print(escape(outcome.continuation), highlight=False)


def show_ledgers(console: Console, done: Sequence[tuple[Outcome, Any]], full: bool) -> None:
    """Every ledger, or what the user must know of it: notes, and what the policy names and nothing quantized."""
    for outcome, report in done:
        if report is None:
            continue
        if full:
            console.print(report.table())
            continue
        skips = [f"{weight}: {reason}" for weight, reason in report.skips] if report.coverage < 1 else []
        for text in (*report.notes, *skips):
            console.print(f"{outcome.model} {outcome.policy}: {escape(text)}", highlight=False)


def run_all(
    console: Console, runs: Sequence[tuple[str, str]], folder: str | Path | None, device: torch.device
) -> list[tuple[Outcome, Any]]:
    """Measure each (model, policy) in turn, with a progress bar on a terminal, and a line for each that is done."""
    columns = (
        SpinnerColumn(),
        MofNCompleteColumn(),
        BarColumn(30),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    done: list[tuple[Outcome, Any]] = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("loading", total=len(runs))
        for name, policy in runs:
            torch.compiler.reset()  # a new model each time; nothing of the one before is wanted
            start = time.perf_counter()
            lm = load(name, folder, device)
            windows = windows_of(lm.heldout, WINDOW, SEQUENCES)
            say: Callable[[str], None] = lambda doing, at=f"{name} {policy}": progress.update(  # noqa: E731
                task, description=f"{at}: {doing}"
            )
            done.append(measure(name, lm, policy, windows, say))
            progress.advance(task)
            outcome, seconds = done[-1][0], time.perf_counter() - start
            console.print(
                f"{name:5} {policy:12} compiled in {outcome.compile_seconds:.0f} s, all in {seconds:.0f} s",
                highlight=False,
            )
    return done


def main(
    policies: Sequence[str] | None = None,
    moe_policies: Sequence[str] = MOE_POLICIES,
    full: bool = False,
    model: str | Path | None = None,
    device: str | None = None,
    html: str | Path | None = None,
) -> int:
    """Run the demo; returns the exit status (1: the model is missing).

    Args:
        policies: presets or policy files for the dense model; none: leave it out; None: those of ``POLICIES`` for the device.
        moe_policies: the same for the MoE.
        full: print each policy's ledger too.
        model: folder made by ``examples/tiny_lm/train.py``; None: the checkout's.
        device: None: a GPU if there is one.
        html: write the last model's report here.
    """
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dense = POLICIES.get(place.type, POLICIES["cuda"]) if policies is None else policies
    runs = [
        (name, policy) for name, own in (("dense", dense), ("moe", moe_policies)) if own for policy in (BASELINE, *own)
    ]
    console.print(
        f"sglquant demo: {len(runs)} runs of tiny language models, in bf16 and quantized; compiling takes most of the time.",
        highlight=False,
    )
    try:
        with quiet(console), few_threads(place) as where:
            prompt = introduce(console, list(dict.fromkeys(name for name, _ in runs)), model)
            done = run_all(console, runs, model, place)
    except DemoError as error:
        console.print(f"[red]{escape(str(error))}[/red]", highlight=False)
        return 1
    outcomes = [outcome for outcome, _ in done]
    console.print()
    console.print(results_table(outcomes, f"tokens/s: {SEQUENCES} sequences at once, on {where}"))
    show_texts(console, outcomes, prompt)
    console.print()
    show_ledgers(console, done, full)
    if html is not None and (last := next((pair for pair in reversed(done) if pair[1] is not None), None)) is not None:
        console.print(f"{last[0].model} {last[0].policy}, weight by weight: {last[1].html(html)}", highlight=False)
    return 0
