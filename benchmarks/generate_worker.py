"""One stack of ``generate.py`` in a process of its own: build, first call, then cell by cell, a JSON line for each result.

Everything that uses the device is done under its lock; Dynamo and Inductor compile without it, so that other stacks are
timed meanwhile (on other cores, see ``generate.py``). Seconds of waiting for the lock are in no figure.

Reads its setup from the command line, and the bundled tiny model for ``--cpu``; writes lines, logits and nothing else.
"""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest.mock import patch

import torch
import wrapper_cost
from common import GIB, LLAMA_3_8B, TINY, DeviceLock, build_llama, collect, last_line, set_position, static_cache
from e2e import allocated, peak, quantize_torchao, reset_peak, synchronize
from moe_e2e import MODELS, SMOKE_MODELS, build_moe

LLAMA, QWEN, BUNDLED = "Llama-3-8B", "Qwen3-30B-A3B", "tiny-lm"
LAYERS = {LLAMA: 16, QWEN: 8}
# Contenders that Hugging Face's generate compiles itself.
AUTO = ("hf-auto", "torchao-fp8", "torchao-int4")
BF16 = ("hf-auto", "hf-eager", "inductor")
DEFAULT = ":default"
CACHE = "+kv:"  # FP8_DYNAMIC+kv:FP8: with a quantized cache
# Rows and steps whose logits are kept for comparison; the last step is added.
CHECKED_ROWS, CHECKED_STEPS = (0, -1), (0, 1, 2)
EOS = 2
# Samples of one time: at least and at most this many, and no more once they took so many seconds.
LEAST, MOST, ENOUGH_S = 3, 9, 1.5
CALLS = 20
# A stack that needs longer for a first token is not worth the others' time.
SLOWEST_S = 3.0


@dataclass(frozen=True)
class Setup:
    """What a process measures.

    Attributes:
        stack: ``hf-auto``, ``hf-eager``, ``inductor``, ``torchao-fp8``, ``torchao-int4``, ``wrapper``, or a policy;
            ``<policy>:default`` is without CUDA graphs.
        phase: ``cold`` (the first call with empty caches, nothing else) or the name of a group of cells.
        cells: (batch, prompt tokens) in order.
        calls: prompt lengths whose host time is measured; empty where no call is timed by itself.
        options: further options of ``quant_compile.compile``.
        deadline: no cell is begun after this second of ``time.time()``.
        peers: with them, stacks meet before each cell is timed and take turns sample by sample.
    """

    model: str
    stack: str
    phase: str
    cells: tuple[tuple[int, int], ...]
    calls: tuple[int, ...]
    new_tokens: int
    device: str
    tiny: bool
    options: Mapping[str, Any]
    deadline: float
    folder: str
    lock: str
    peers: tuple[str, ...] = ()

    @staticmethod
    def read(text: str) -> Setup:
        """From its JSON."""
        data = json.loads(text)
        data["cells"] = tuple(tuple(cell) for cell in data["cells"])
        return Setup(**data | {"calls": tuple(data["calls"]), "peers": tuple(data["peers"])})

    @property
    def policy(self) -> str | dict[str, str] | None:
        """The sglquant policy, None for the other stacks."""
        if self.stack in (*AUTO, *BF16):
            return None
        scheme, _, cache = self.stack.removesuffix(DEFAULT).partition(CACHE)
        return {"default": scheme, "kv_cache": cache} if cache else scheme

    @property
    def compile_options(self) -> dict[str, Any]:
        """Options of ``quant_compile.compile``."""
        return {**self.options, **({"mode": "default"} if self.stack.endswith(DEFAULT) else {})}

    def file(self, kind: str, phase: str | None = None) -> Path:
        """``<model>.<stack>.<phase>.<kind>`` in the run's folder."""
        stack = self.stack.replace(":", "-")
        return Path(self.folder) / f"{self.model}.{stack}.{phase or self.phase}.{kind}"


def cell_name(batch: int, prompt: int) -> str:
    """``B=1 P=128``."""
    return f"B={batch} P={prompt}"


def logits_file(folder: Path, model: str, stack: str, cell: str) -> Path:
    """Where a stack leaves the logits of a cell."""
    return folder / f"{model}.{stack.replace(':', '-')}.{cell.replace(' ', '')}.pt"


# --- models ----------------------------------------------------------------------------------------------------------


def build(model: str, tiny: bool, device: torch.device) -> Any:
    """The eager bf16 model: seeded random weights made on the device, or the bundled tiny one."""
    if model == BUNDLED:
        from quant_compile.demo import load

        return load("dense").model.to(device)
    layers = 1 if tiny else LAYERS[model]
    if model == QWEN:
        return build_moe((SMOKE_MODELS if tiny else MODELS)[QWEN], layers, "grouped_mm", device)
    return build_llama(TINY if tiny else LLAMA_3_8B, layers, device)


class Forced:
    """A logits processor that keeps the logits of some steps and dictates the next token.

    All stacks then see the same tokens, so that their logits can be compared at any step.
    """

    def __init__(self, prompt: int, steps: Sequence[int], vocab: int) -> None:
        self.prompt, self.steps = prompt, set(steps)
        self.tokens = torch.randint(EOS + 1, vocab, (max(steps) + 1,), generator=torch.Generator().manual_seed(7))
        self.kept: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[B, vocab] -> all -inf but for the dictated token."""
        step = input_ids.shape[1] - self.prompt
        if step in self.steps:
            kept = scores[list(CHECKED_ROWS)].float().cpu()
            kept[:, EOS] = 0.0  # -inf while fewer than min_new_tokens have been made
            self.kept.append(kept)
        forced = torch.full_like(scores, -torch.inf)
        forced[:, int(self.tokens[min(step, len(self.tokens) - 1)])] = 0.0  # transformers may run a step more
        return forced


# --- a worker --------------------------------------------------------------------------------------------------------


@dataclass
class Worker:
    """Runs one phase of one stack."""

    setup: Setup
    device: torch.device = field(init=False)
    lock: DeviceLock = field(init=False)
    model: Any = field(init=False, default=None)
    cache: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.device = torch.device(self.setup.device)
        self.lock = DeviceLock(Path(self.setup.lock), self.settle)

    def settle(self) -> None:
        """Wait for the device, and leave others the memory that is not in use.

        Unlike ``collect`` this leaves cuBLAS its workspaces, whose addresses recorded graphs may hold.
        """
        synchronize(self.device)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def emit(self, kind: str, **values: Any) -> None:
        """Append a result."""
        line = {"model": self.setup.model, "stack": self.setup.stack, "phase": self.setup.phase, "kind": kind}
        with self.setup.file("jsonl").open("a") as file:
            file.write(json.dumps(line | values) + "\n")

    def run(self) -> None:
        """The whole phase; an error that ends it is a result too."""
        try:
            self.phase()
        except Exception as error:
            self.emit("error", message=last_line(error))
            raise
        finally:  # peers do not wait for a process that is gone
            for batch, prompt in self.setup.cells:
                self.mark(cell_name(batch, prompt)).touch()

    def phase(self) -> None:
        """First call, single calls, cells."""
        setup = self.setup
        if setup.stack == "wrapper":
            with self.lock.held():
                self.emit("wrapper", **wrapper_cost.measure(self.device))
            return
        with self.lock.held():
            self.load()
            collect(self.device)
            reset_peak(self.device)
        first = self.first_call(*setup.cells[0])
        self.memory()
        if setup.phase == "cold":
            return
        if setup.calls:
            try:
                self.calls()
            except Exception as error:
                self.emit("calls_error", reason=last_line(error))
        for index, (batch, prompt) in enumerate(setup.cells):
            name = cell_name(batch, prompt)
            if time.time() > setup.deadline:
                self.emit("cell", cell=name, reason="not run: the time was up")
                continue
            self.emit("begin", cell=name)
            self.guarded(name, lambda b=batch, p=prompt, s=None if index else first: self.cell(b, p, s))
        self.kept()

    def load(self) -> None:
        """Build the model."""
        self.model = build(self.setup.model, self.setup.tiny, self.device)
        self.model.generation_config.eos_token_id = EOS
        self.model.generation_config.pad_token_id = 0

    def kept(self) -> None:
        """What ``guard: never_slower`` kept in 16 bits: both times, and of how many weights."""
        if self.setup.policy is None or not self.setup.options.get("guard"):
            return
        import quant_compile

        texts = [text for _, guarded in quant_compile.report(self.model).guarded for text in guarded.split("; ")]
        self.emit("guard", kept={text: texts.count(text) for text in dict.fromkeys(texts)})

    def guarded(self, name: str, action: Callable[[], None]) -> None:
        """A cell that fails is a result with its reason; the others go on."""
        try:
            action()
        except Exception as error:
            print(f"{name}: {last_line(error)}", flush=True)
            self.emit("cell", cell=name, reason=last_line(error))
            self.mark(name).touch()
            if self.setup.stack in AUTO:
                torch._dynamo.reset()

    # -- calls ---------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """What a user does once with a loaded model."""
        setup = self.setup
        if setup.stack.startswith("torchao"):
            quantize_torchao(self.model, setup.stack)
        elif setup.stack == "inductor":
            self.model.compile(dynamic=True)
        elif setup.policy is not None:
            import quant_compile

            quant_compile.compile(self.model, policy=setup.policy, **setup.compile_options)

    def inputs(self, batch: int, prompt: int) -> dict[str, torch.Tensor]:
        """Seeded random ids and a mask of ones, as a tokenizer gives one."""
        vocab = self.model.config.vocab_size
        generator = torch.Generator().manual_seed(batch * 10000 + prompt)
        ids = torch.randint(EOS + 1, vocab, (batch, prompt), generator=generator).to(self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def arguments(self) -> dict[str, Any]:
        """What the stack's user passes to ``generate`` beside the inputs; nothing for sglquant."""
        setup = self.setup
        if setup.stack == "inductor":
            self.cache.reset()
            return {"past_key_values": self.cache, "disable_compile": True}
        if setup.stack not in AUTO:
            return {}
        if self.device.type != "cpu":
            return {"cache_implementation": "static"}
        from transformers import CompileConfig

        config = CompileConfig()
        config._compile_all_devices = True  # type: ignore[attr-defined]  # transformers leaves CPUs out otherwise
        return {"cache_implementation": "static", "compile_config": config}

    def generate(self, inputs: Mapping[str, torch.Tensor], tokens: int, **more: Any) -> float:
        """Seconds by the wall clock of one greedy ``generate`` of exactly ``tokens`` tokens."""
        arguments = self.arguments()
        synchronize(self.device)
        started = time.perf_counter()
        out = self.model.generate(
            **inputs, **arguments, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, **more
        )
        synchronize(self.device)
        elapsed = time.perf_counter() - started
        made = out.shape[1] - inputs["input_ids"].shape[1]
        if made != tokens:
            raise RuntimeError(f"generate made {made} tokens instead of {tokens}")
        return elapsed

    @property
    def tokens(self) -> int:
        """Tokens of a whole generate: one where only prefill is compiled."""
        return 1 if self.setup.stack == "inductor" else self.setup.new_tokens

    def fresh(self, batch: int, prompt: int) -> None:
        """Forget the sizes of earlier cells, so that caches are as long as this one needs, and HF's graphs static."""
        if self.setup.stack in AUTO:
            torch._dynamo.reset()
        if hasattr(self.model, "_previous_max_cache_length"):
            del self.model._previous_max_cache_length
        self.cache = None
        self.settle()
        if self.setup.stack == "inductor":
            length = prompt + self.setup.new_tokens
            self.cache = static_cache(self.model.config, batch, length, self.device, torch.bfloat16)

    def first_call(self, batch: int, prompt: int) -> float:
        """Seconds of ``prepare`` and the first generate, all that happens only once included; a result of its own."""
        with self.lock.held():
            self.fresh(batch, prompt)
            with self.compiling_yields():
                waited, started = self.lock.waited, time.perf_counter()
                self.prepare()
                prepared = time.perf_counter() - started
                self.generate(self.inputs(batch, prompt), self.tokens)
                seconds = time.perf_counter() - started - (self.lock.waited - waited)
        timings: dict[str, float] = {}
        if self.setup.policy is not None:
            import quant_compile

            timings = dict(quant_compile.report(self.model).timings)
        self.emit("first", seconds=seconds, prepare_s=prepared, timings=timings)
        print(f"first call: {seconds:.1f} s", flush=True)
        return seconds

    def memory(self) -> None:
        """GiB at the peak of the first call, and held after it."""
        with self.lock.held():
            top = peak(self.device)
            self.settle()
            self.emit("memory", peak_gib=top / GIB, held_gib=allocated(self.device) / GIB)

    # -- cells ---------------------------------------------------------------------------------------------------------

    def cell(self, batch: int, prompt: int, first: float | None) -> None:
        """All times of one batch size and prompt length."""
        name, inputs = cell_name(batch, prompt), self.inputs(batch, prompt)
        with contextlib.nullcontext() if self.setup.peers else self.lock.held():
            if first is None:
                with self.lock.held():
                    self.fresh(batch, prompt)
            with self.lock.held(), self.compiling_yields():
                if first is None:
                    waited, started = self.lock.waited, time.perf_counter()
                    self.generate(inputs, self.tokens)
                    first = time.perf_counter() - started - (self.lock.waited - waited)
                self.generate(inputs, 1)
                if (seconds := self.generate(inputs, 1)) > SLOWEST_S:
                    raise RuntimeError(f"skipped: a first token takes {seconds:.1f} s")
                check = self.check(inputs, name)
                self.generate(inputs, self.tokens)
            self.meet(name)
            whole = [] if self.tokens == 1 else self.samples(lambda: self.generate(inputs, self.tokens))
            self.generate_quietly(inputs)
            start = self.samples(lambda: self.generate(inputs, 1))
        self.emit("cell", cell=name, first_call_s=first, **check, **times(whole, start, self.tokens, batch))
        print(f"{name}: {statistics.median(start) * 1e3:.2f} ms to the first token", flush=True)
        time.sleep(0.05)  # whoever waits for the lock is before this process

    def generate_quietly(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """One generate of one token that counts for nothing."""
        with self.lock.held():
            self.generate(inputs, 1)

    def samples(self, step: Callable[[], float]) -> list[float]:
        """Seconds of some steps."""
        out: list[float] = []
        while len(out) < LEAST or (len(out) < MOST and (self.setup.peers or sum(out) < ENOUGH_S)):
            with self.lock.held():
                out.append(step())
            if self.setup.peers:
                time.sleep(0.01)
        return out

    def check(self, inputs: Mapping[str, torch.Tensor], name: str) -> dict[str, Any]:
        """Whether the logits of some steps are numbers that differ; they are kept to be compared with bf16's."""
        from transformers import LogitsProcessorList

        steps = [step for step in dict.fromkeys((*CHECKED_STEPS, self.tokens - 1)) if step < self.tokens]
        forced = Forced(inputs["input_ids"].shape[1], steps, self.model.config.vocab_size)
        self.generate(inputs, self.tokens, logits_processor=LogitsProcessorList([forced]))  # type: ignore[list-item]
        logits = torch.stack(forced.kept)
        torch.save(logits.half(), logits_file(Path(self.setup.folder), self.setup.model, self.setup.stack, name))
        varied = bool((logits.std(-1) > 0).all())
        return {"finite": bool(logits.isfinite().all()), "varied": varied, "checked_steps": steps}

    def meet(self, name: str) -> None:
        """With peers: wait until all of them are as far as this, so that they take turns from here on."""
        if not self.setup.peers:
            return
        self.mark(name).touch()
        while time.time() < self.setup.deadline:
            if all(self.mark(name, peer).exists() for peer in self.setup.peers):
                return
            time.sleep(0.1)

    def mark(self, name: str, stack: str | None = None) -> Path:
        """The file that says that a stack is as far as a cell."""
        setup = self.setup
        return Path(setup.folder) / f"{setup.model}.{stack or setup.stack}.{name.replace(' ', '')}.ready"

    # -- single calls of the model -------------------------------------------------------------------------------------

    def calls(self) -> None:
        """Host and wall time of one decode call and of prefill calls, each begun with an idle device."""
        inductor = self.setup.stack == "inductor"
        first = self.setup.calls[0]
        for name, tokens, filled in (("decode", 1, first), *((f"prefill {p}", p, 0) for p in self.setup.calls)):
            if inductor and tokens in (1, first):  # each gets its best: static decode, one graph for all prompts
                torch._dynamo.reset()
                self.model.compile(dynamic=tokens > 1)
            with self.lock.held(), self.compiling_yields(), torch.no_grad():
                host, wall = self.time_call(tokens, filled)
            self.emit("call", call=name, host_ms=statistics.median(host), wall_ms=statistics.median(wall))
        if inductor:
            torch._dynamo.reset()
            self.model.compile(dynamic=True)

    def time_call(self, tokens: int, filled: int) -> tuple[list[float], list[float]]:
        """(ms until the call returned, ms until the device was done) of some calls at one position of the cache."""
        call = self.call_of(tokens, filled, self.setup.new_tokens)
        samples = [call() for _ in range(4 + CALLS)][4:]
        return [host for host, _ in samples], [wall for _, wall in samples]

    def call_of(self, tokens: int, filled: int, room: int) -> Callable[[], tuple[float, float]]:
        """A call at one position of a static cache with room for more: ms until it returned, and until the device was done."""
        cache = static_cache(self.model.config, 1, filled + tokens + room, self.device, torch.bfloat16)
        ids = torch.arange(tokens, device=self.device).reshape(1, tokens) % self.model.config.vocab_size

        def call() -> tuple[float, float]:
            set_position(cache, filled)
            synchronize(self.device)
            started = time.perf_counter()
            self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            returned = time.perf_counter()
            synchronize(self.device)
            return (returned - started) * 1e3, (time.perf_counter() - started) * 1e3

        return call

    # -- the lock while compiling --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def compiling_yields(self) -> Iterator[None]:
        """Let go of the lock while Dynamo traces and Inductor compiles.

        In between a backend has the lock: sglquant's measures kernels on the device. On a CPU, and where stacks take
        turns, compiling is work on the device itself and keeps it.
        """
        if self.device.type == "cpu" and not self.setup.tiny:
            yield
            return
        with tracing_in(self.lock.yielded), contextlib.ExitStack() as stack:
            if self.setup.policy is not None:
                stack.enter_context(wrapped("torch._dynamo.output_graph.OutputGraph.call_user_compiler", self.taken))
            stack.enter_context(wrapped("torch._inductor.compile_fx.compile_fx", self.lock.yielded))
            yield

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """From here on the lock is held, until Dynamo is done with the frame and beyond."""
        self.lock.take()
        yield


@contextlib.contextmanager
def tracing_in(context: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """Enter ``context`` whenever Dynamo begins to compile a frame, until it is done with it."""
    from torch._dynamo.callback import callback_handler

    entered = contextlib.ExitStack()

    def start(*arguments: Any) -> None:
        trigger = getattr(arguments[0], "callback_trigger", None) if arguments else None
        if trigger is None or trigger.name == "DYNAMO":
            entered.enter_context(context())

    def end(*arguments: Any) -> None:
        entered.close()

    callback_handler.register_start_callback(start)
    callback_handler.register_end_callback(end)
    try:
        yield
    finally:
        entered.close()
        with contextlib.suppress(ValueError):  # torch._dynamo.reset forgets them
            callback_handler.remove_start_callback(start)
            callback_handler.remove_end_callback(end)


@contextlib.contextmanager
def wrapped(name: str, context: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """Run every call of a function of torch, named by its full path, inside ``context``."""
    original = resolve_name(name)

    def call(*args: Any, **kwargs: Any) -> Any:
        with context():
            return original(*args, **kwargs)

    with patch(name, call):
        yield


def times(whole: Sequence[float], start: Sequence[float], tokens: int, batch: int) -> dict[str, Any]:
    """Figures of a cell from seconds of whole generates and of generates of one token; the medians count."""
    first = statistics.median(start)
    out: dict[str, Any] = {"first_token_ms": first * 1e3, "first_token_samples": len(start)}
    if not whole:
        return out
    total = statistics.median(whole)
    if total <= first:
        return out | {"reason": f"too noisy: {tokens} tokens took no longer than one"}
    return out | {
        "ms_per_token": (total - first) / (tokens - 1) * 1e3,
        "least_ms_per_token": (min(whole) - first) / (tokens - 1) * 1e3,
        "tokens_per_s": batch * tokens / total,
        "samples": len(whole),
    }


if __name__ == "__main__":
    Worker(Setup.read(sys.argv[1])).run()
