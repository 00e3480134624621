"""Fill the documents' tables from ``benchmarks/results/*.json`` and from the kernels' own answers: no number is typed.

    python benchmarks/render_readme.py           # rewrite README.md and docs/*.md
    python benchmarks/render_readme.py --check   # exit 1 if one would change

A table stands between ``<!-- table:NAME -->`` and ``<!-- end:NAME -->``, in any of the documents, once in all of them. One whose
results are absent is left empty, its heading included; ``generate``, the README's own, says that it is not measured. Links in a table
are written from the root and turned to the document it stands in. Reads the documents and the results; writes the documents and
nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = (README, *sorted((ROOT / "docs").glob("*.md")))
RESULTS = ROOT / "benchmarks" / "results"

Result = Mapping[str, Any]
NONE = "–"
STACKS = {"inductor": "Inductor bf16", "torchao-fp8": "torchao FP8 per row", "torchao-int4": "torchao int4, group 128"}
DECODE_BATCHES = (1, 16)
# The problem that stands for a linear in the table of kernels; no kernel refuses its sizes.
SIZE = 4096


def read(name: str, results: Path) -> Result | None:
    """One result file, or None where it is absent."""
    path = results / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


# --- text ------------------------------------------------------------------------------------------------------------


def read_all(names: Sequence[str], results: Path) -> list[Result]:
    """Those results that are there, in order."""
    return [result for name in names if (result := read(name, results))]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first to the right. Nothing without rows."""
    if not rows:
        return ""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def place(result: Result, *libraries: str) -> str:
    """Device, torch, the named libraries that were there, and the day."""
    machine = result["machine"]
    versions = machine["versions"]
    names = [f"{name} {versions[name]}" for name in ("torch", *libraries) if versions.get(name)]
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    return ", ".join([device, *names, result["date"]])


def short_device(result: Result) -> str:
    """``H200`` or ``CPU``."""
    return result["machine"].get("gpu", "CPU").removeprefix("NVIDIA ")


def times(value: float | None) -> str:
    """A speed-up."""
    return NONE if value is None else f"{value:.2f}×"


def number(value: float | None, digits: int = 2) -> str:
    """A plain number with fixed decimals."""
    return NONE if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A relative difference with its sign."""
    return NONE if value is None else f"{value:+.2%}"


# --- generate --------------------------------------------------------------------------------------------------------


GENERATE_STACKS = {
    "hf-auto": "HF bf16, static cache, compiled by HF",
    "hf-eager": "HF bf16, eager",
    "inductor": "HF bf16, `torch.compile`",
    "torchao-fp8": "torchao FP8 per row, compiled by HF",
    "torchao-int4": "torchao int4, group 128, compiled by HF",
}
TOKEN_KEYS, FIRST_TOKEN_KEYS = ("ms_per_token", "speedup"), ("first_token_ms", "first_token_speedup")


def generate(results: Path) -> str:
    """What a user of ``generate`` sees a token; a sentence until there is a result."""
    result = read("generate", results)
    if result is None:
        return "The speed of `generate` has not been measured yet; its table will stand here."
    settings = result["settings"]
    text = (
        f"**`generate`, milliseconds a token**, by the wall clock: {shapes_of(result)}, seeded random weights, greedy, "
        f"{settings['new_tokens']} new tokens, B prompts of P tokens. In parentheses: speed relative to the first row, "
        f"bf16 that Hugging Face's own `generate` compiles with CUDA graphs. {options_of(result)}"
        f"{place(result, 'triton', 'transformers', 'torchao')}.\n"
    )
    return "\n".join([text, generate_table(result, *TOKEN_KEYS)])


def generate_first_token(results: Path) -> str:
    """Time to the first token."""
    result = read("generate", results)
    if result is None:
        return ""
    text = (
        "**`generate`, milliseconds to the first token**, in the same run: wall time of a `generate` of one token, and speed "
        "relative to the first row. "
        + (f"{result['settings']['gpus']} GPUs of one host." if result["settings"]["gpus"] > 1 else "One GPU.")
        + "\n"
    )
    return "\n".join([text, generate_table(result, *FIRST_TOKEN_KEYS)])


def generate_rest(results: Path) -> str:
    """The other batches and prompts of ``generate``, in a run of their own."""
    result = read("generate_rest", results)
    if result is None:
        return ""
    text = (
        f"**`generate`, the other batches and prompts**: {shapes_of(result)}, a run of its own with its own first row. "
        f"{options_of(result)}{place(result, 'triton', 'transformers')}. Milliseconds a token:\n"
    )
    first = "\nMilliseconds to the first token:\n"
    tables = [generate_table(result, *keys) for keys in (TOKEN_KEYS, FIRST_TOKEN_KEYS)]
    return "\n".join([text, tables[0], first, tables[1]])


def generate_torchao(results: Path) -> str:
    """torchao under Hugging Face's own compilation, in a run of its own."""
    result = read("generate_torchao", results)
    if result is None:
        return ""
    rows = [
        [generate_name(row), *(generate_cell(cell, *keys) for keys in (TOKEN_KEYS, FIRST_TOKEN_KEYS))]
        for row in result["rows"]
        for cell in row["cells"].values()
    ]
    text = (
        "**torchao in the same loop**: Llama-3-8B shape, 16 layers, B=1, a prompt of 128 tokens, each stack in processes of its own, by "
        f"turns on one GPU. {place(result, 'triton', 'transformers', 'torchao')}."
    )
    return "\n\n".join([text, markdown(["stack", "ms a token", "ms to the first token"], rows)])


def first_token(results: Path) -> str:
    """Time to the first token, with all stacks taking turns."""
    found = [result for name in ("first_token", "first_token_later") if (result := read(name, results)) is not None]
    parts: list[str] = []
    for result in found:
        rows = result["rows"]
        columns = list(dict.fromkeys((row["prompt"], row["lengths"]) for row in rows))
        values = {(row["stack"], row["prompt"], row["lengths"]): row for row in rows}
        lines = [
            [
                GENERATE_STACKS.get(stack, stack),
                *(f"{row['ms']:.1f} ({times(row['speedup'])})" for c in columns if (row := values[stack, *c])),
            ]
            for stack in dict.fromkeys(row["stack"] for row in rows)
        ]
        parts += [
            place(result, "triton", "transformers") + ".",
            markdown(["stack", *(f"{p}, {k}" for p, k in columns)], lines),
        ]
    text = (
        "**Milliseconds to the first token**, B=1, all stacks in one process and by turns, medians; in parentheses the speed relative to "
        "the faster of bf16's two. *Same*: a prompt of a length that has come before; *new*: of one that has not."
    )
    return "\n\n".join([text, *parts]) if found else ""


def load(results: Path) -> str:
    """How long ``load`` takes and what it holds."""
    result = read("load", results)
    if result is None:
        return ""
    header = [
        "model", "stored as", "policy", "file, GB", "load, s", "GB/s", "GB/s of the second load", "first call, s", "decode, ms a token",
        "GiB on the GPU at the peak", "held", "GiB on the host",
    ]  # fmt: skip
    names = {"bf16": "16 bits, quantized on the way", "packed": "`packed`", "gptq desc_act": "GPTQ, `desc_act`"}
    rows = [row for row in result["rows"] if "error" not in row]
    lines = [
        [
            row.get("model", "Llama"), names.get(row["stored"], row["stored"].replace("fp8", "FP8")), row["policy"] or "its own",
            number(row["file_gb"], 1), number(row["seconds"], 1), number(row["gb_per_s"], 1),
            number(row.get("again_gb_per_s"), 1), number(row["first_call_s"], 1), number(row.get("decode_ms")),
            number(row["peak_gib"]), number(row["held_gib"]), number(row["host_gib"]),
        ]
        for row in rows
    ]  # fmt: skip
    text = (
        f"**`quant_compile.load`**, Llama-3-8B's shape with {result['settings']['layers']} layers"
        f"{', Qwen3-30B-A3B with 8' if any('Qwen' in row['model'] for row in rows) else ''}, files in the page cache; the host's "
        "memory is what no file backs, the second load is one in the same process, decode is `generate` of one sequence by the wall clock. "
        f"{place(result, 'transformers')}."
    )
    notes: dict[str, list[str]] = {}
    for row in rows:
        notes.setdefault(row.get("note", ""), []).append(row["policy"] or row["stored"])
    text += "".join(f" {', '.join(dict.fromkeys(of))}: {note}." for note, of in notes.items() if note)
    text += " A first call finds what the rows above it compiled." if len(rows) > 1 else ""
    failed = "; ".join(f"{row['model']}, {row['stored']}: {row['error']}" for row in result["rows"] if "error" in row)
    return "\n\n".join([text, markdown(header, lines), *([f"Not measured: {failed}."] if failed else [])])


def attention_decode(results: Path) -> str:
    """Attention alone over a full cache: ours in both forms, the best of torch's, and what the bytes take at a copy's rate."""
    result = read("attention", results)
    if result is None:
        return ""
    heads = {"Llama-3-8B": "32 over 8", "Llama-3-70B": "64 over 8", "Qwen3-30B-A3B": "32 over 4"}
    header = [
        "heads of 128", "sequences x keys", "bf16", "e4m3", "e4m3 to bf16", "the best of SDPA, bf16", "FlexAttention, bf16",
        "bf16 to the best of torch's",
    ]  # fmt: skip
    lines = [
        [
            heads[row["model"]], f"{row['batch']} x {row['context']}", _of_floor(row["bf16_us"], row["bf16_of_floor"]),
            _of_floor(row["e4m3_us"], row["e4m3_of_floor"]), f"{row['e4m3_over_bf16']:.2f}×",
            f"{number(row['sdpa_us'], 1)} ({row['sdpa']})", number(row.get("peer_us"), 1), f"{row['faster_than_best']:.2f}×",
        ]
        for row in sorted(result["summary"], key=lambda row: (row["model"], row["batch"], row["context"]))
    ]  # fmt: skip
    text = (
        "**Attention of one decode step**, microseconds, cold L2; in parentheses the share of what the bytes of K and V take at "
        f"the rate of a copy ({result['settings']['copy_gb_per_s']:.0f} GB/s, read and written: reading alone can be faster). e4m3: a "
        "scale for each token and head. `no mask`: over the filled "
        f"tokens alone, which a static graph cannot know. {place(result, 'triton')}."
    )
    return "\n\n".join([text, markdown(header, lines)])


def _of_floor(us: float, share: float) -> str:
    return f"{number(us, 1)} ({share:.0%})"


PREFILL = {
    "as the model writes it": "as written",
    "tiles of 128 x 128": "ours 128x128 warps=8 stages=2",
    "of 128 x 64": "ours 128x64 warps=8 stages=3",
    "of 64 x 64": "ours 64x64 warps=4 stages=3",
    "of 32 x 64, codes in registers": "ours 32x64 warps=4 stages=3 in registers",
    "flash attention without a mask": "flash, no mask",
}


def attention_prefill(results: Path) -> str:
    """A prompt's attention under a mask over a static cache: our kernel in several tiles beside what models write."""
    result = read("attention_prefill", results)
    if result is None:
        return ""
    times: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in result["rows"]:
        if row.get("us") is not None and row["cache"] in ("bf16", "e4m3"):
            times.setdefault((row["batch"], row["tokens"], row["cache"]), {})[row["contender"]] = row["us"]
    lines = [
        [f"{batch} x {tokens}", cache, *(number(own.get(contender), 1) for contender in PREFILL.values())]
        for (batch, tokens, cache), own in sorted(times.items())
    ]
    text = (
        "**Attention of a prompt under a mask**, 32 heads over 8 of 128, a static cache with room for 64 tokens more, microseconds; "
        "tiles are queries x keys of a program of `triton_prefill`, its reading of the mask and of codes included. Without a mask "
        f"torch's flash attention reads the prompt's own K and V. {place(result, 'triton')}."
    )
    return "\n\n".join([text, markdown(["sequences x tokens", "cache", *PREFILL], lines)])


def long_contexts(results: Path) -> str:
    """``generate`` where the cache is long; what was measured apart has its own base."""
    found = read_all(["long_context", "long_context_w4a16"], results)
    if not found:
        return ""
    rows = [row for row in found[0]["rows"] if "token_ms" in row]
    cells = list(dict.fromkeys((row["batch"], row["prompt"]) for row in rows))
    stacks = sorted({row["stack"] for row in rows}, key=lambda stack: (stack != "hf-auto", stack))
    lines = [_of_stack(stack, rows, cells) for stack in stacks]
    for result in found[1:]:
        more = dict.fromkeys(row["stack"] for row in result["rows"] if row["stack"] != "hf-auto")
        lines += [_of_stack(stack, result["rows"], cells) for stack in more]
    text = (
        f"**`generate` over long contexts**, milliseconds a token: Llama-3-8B shape, {found[0]['settings']['layers']} layers, B prompts "
        "of P tokens, by the wall clock; in parentheses the speed relative to Hugging Face's compiled bf16 of the same run. `+ FP8`: the "
        "KV cache in codes; `as written`: without attention's kernel. Peak: GiB at the last cell, weights in 16 bits included. "
        f"{place(found[0], 'triton', 'transformers')}; the W4A16 row in a run of its own on such a machine."
    )
    return "\n\n".join([text, markdown(["stack", *(f"B={b} P={p}" for b, p in cells), "peak"], lines)])


def capacity(results: Path) -> str:
    """The largest batch that decodes on one GPU, by the kind of cache."""
    result = read("capacity", results)
    if result is None:
        return ""
    rows = [
        [row["cache"], str(row["context"]), str(row["rows"]), f"{row['tokens'] / 1e6:.2f}", times(row.get("times"))]
        for row in result["rows"]
        if "rows" in row
    ]
    text = (
        f"**How many rows fit**: {result['settings']['shape']} shape, {result['settings']['layers']} layers, "
        "FP8_DYNAMIC, 16-bit weights released; the largest batch of which compiled decode steps run over a static cache. "
        f"{place(result, 'transformers')}."
    )
    header = ["K and V in", "tokens of a row", "rows", "million tokens", "to bf16"]
    return "\n\n".join([text, markdown(header, rows)])


def _of_stack(stack: str, rows: Sequence[Mapping[str, Any]], cells: Sequence[tuple[int, int]]) -> list[str]:
    own = {(row["batch"], row["prompt"]): row for row in rows if row["stack"] == stack and "token_ms" in row}
    name = "HF bf16, static cache, compiled by HF" if stack == "hf-auto" else stack
    times = [f"{own[cell]['token_ms']:.2f} ({own[cell]['speedup']:.2f}×)" if cell in own else NONE for cell in cells]
    return [name, *times, number(own[cells[-1]]["peak_gib"], 1) if cells[-1] in own else NONE]


def generate_start(results: Path) -> str:
    """First calls, memory, calls without CUDA graphs, and the wrapper."""
    result = read("generate", results)
    if result is None:
        return ""
    rows = [
        row
        for found in [result, *read_all(["generate_first", "generate_first_w4a16"], results)]
        for row in _starts(found)
    ]
    header = ["model", "stack", "processes at a time", "first call, s", "in a second process, s", "to HF's"]
    text = (
        "**`generate`, the first call**: everything that happens once, with empty caches and in a second process that finds them, "
        "relative to HF's of the same run; processes that compile at a time, for each GPU, share the host's cores. Memory is the "
        "allocator's, at the peak of that call and after it, 16-bit weights included unless they are released.\n"
    )
    header += ["GiB at the peak", "GiB held"]
    alone = [{"rows": [{"wrapper": row} for row in found["rows"]]} for found in read_all(["wrapper_cost"], results)]
    return "\n".join(
        [
            text,
            markdown(header, rows),
            *generate_calls(read_all(["single_calls"], results)),
            *generate_calls([result, *read_all(["generate_default"], results), *alone]),
        ]
    )


def _starts(result: Result) -> list[list[str]]:
    """Rows of first calls of one run."""
    base = {row["model"]: start_s(row, "cold") for row in result["rows"] if row["stack"] == "hf-auto"}
    return [
        [row["model"], generate_name(row), str(result["settings"]["processes_per_gpu"])]
        + [number(start_s(row, "cold"), 1), number(start_s(row, "warm"), 1)]
        + [times_as_long(start_s(row, "cold"), base.get(row["model"]))]
        + [number(row.get("memory", {}).get(name)) for name in ("peak_gib", "held_gib")]
        for row in result["rows"]
        if "cold" in row
    ]


def generate_calls(results: Sequence[Result]) -> list[str]:
    """Host and wall time of single calls without CUDA graphs, of the last run that has them, and what the wrapper costs."""
    of_each = [(result, [row for row in result["rows"] if row.get("calls")]) for result in results]
    result, found = next((each for each in reversed(of_each) if each[1]), ({}, []))
    names = list(dict.fromkeys(name for row in found for name in row["calls"]))
    rows = [
        [generate_name(row)]
        + [f"{c['host_ms']:.2f} / {c['wall_ms']:.2f}" if (c := row["calls"].get(name)) else NONE for name in names]
        for row in found
    ]
    how = "stacks in turns" if result.get("benchmark") == "single_calls" else "one stack after the other"
    how += f", {result['date']}" if "date" in result else ""
    text = f"One call without CUDA graphs, B=1, {how}: milliseconds until it returns / until the GPU is done."
    out = ["", text, ""] * bool(rows)
    out += [markdown(["stack", *names], rows)] * bool(rows)
    out += [text for row in found if row.get("note") for text in ("", f"{generate_name(row)}: {row['note']}.")]
    costs = [row["wrapper"] for result in results for row in result["rows"] if "wrapper" in row]
    for cost in costs[-1:]:
        counts = [(name.removeprefix("us_"), value) for name, value in cost.items() if name.startswith("us_")]
        words = ", ".join(f"{value:.0f} µs with {count} bound to it" for count, value in counts)
        words += f"; {cost['turns_us']:.0f} µs where these take turns" if "turns_us" in cost else ""
        out += ["", f"Python of a call of a graph with {cost['weights']} weights, by the number of models: {words}."]
    return out


def generate_cpu(results: Path) -> str:
    """The bundled model's ``generate`` on a CPU."""
    result = read("generate_cpu", results)
    if result is None:
        return ""
    text = (
        f"**`generate` on a CPU**: the bundled dense model, {result['settings']['new_tokens']} new tokens, B prompts of P tokens; "
        "milliseconds a token by the wall clock and speed relative to bf16 that Hugging Face compiles. "
        f"{place(result, 'transformers')}.\n"
    )
    return "\n".join([text, generate_table(result, *TOKEN_KEYS)])


def generate_table(result: Result, name: str, ratio: str) -> str:
    """Stacks by cells, and what no figure was taken for."""
    cells = list(dict.fromkeys(cell for row in result["rows"] for cell in row["cells"]))
    cells.sort(key=lambda cell: [int(part) for part in reversed(re.findall(r"\d+", cell))])
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    cells = [cell for cell in cells if any(_asked(row["cells"].get(cell, {})) for row in result["rows"])]
    empty = [cell for cell in cells if not any(row["cells"].get(cell, {}).get(name) for row in result["rows"])]
    cells = [cell for cell in cells if cell not in empty]
    rows: list[list[str]] = []
    missing = list[str]()
    for row in result["rows"]:
        found = [generate_cell(row["cells"].get(cell, {}), name, ratio) for cell in cells]
        if set(found) - {NONE}:
            rows.append([*([row["model"]] if len(models) > 1 else []), generate_name(row), *found])
        elif row["stack"] != "wrapper" and any(_asked(cell) for cell in row["cells"].values()):
            missing.append(generate_name(row))
    table = markdown([*(["model"] if len(models) > 1 else []), "stack", *cells], rows)
    return f"{table}\n\nNot measured: {'; '.join(dict.fromkeys([*missing, *empty]))}." if missing or empty else table


def _asked(cell: Result) -> bool:
    """Whether it was to be measured."""
    return bool(cell) and "not asked" not in cell.get("reason", "")


def generate_cell(cell: Result, name: str, ratio: str) -> str:
    """A time and its speed-up; one whose logits are wrong does not count."""
    if cell.get(name) is None:
        return NONE
    if "reason" in cell:
        return "wrong logits"
    return f"{cell[name]:.2f} ({times(cell.get(ratio))})"


def generate_name(row: Result) -> str:
    """A stack in words."""
    policy, cache = row["stack"].partition("+kv:")[::2]
    if cache:
        return f"{policy}, KV cache {cache}"
    policy, _, mode = policy.partition(":")
    return f"{policy}, no CUDA graphs" if mode else GENERATE_STACKS.get(policy, policy)


def shapes_of(result: Result) -> str:
    """Models with their layers."""
    known = list(dict.fromkeys(row["model"] for row in result["rows"]))
    return " and ".join(f"{name} shape, {result['settings']['layers'][name]} layers" for name in known)


def options_of(result: Result) -> str:
    """Options that the policies were compiled with, if any."""
    options = result["settings"]["options"]
    return f"Policies with {', '.join(f'`{key}={value!r}`' for key, value in options.items())}. " if options else ""


def start_s(row: Result, name: str) -> float | None:
    """Seconds of the first call of a stack's first (``cold``) or second (``warm``) process."""
    return row.get(name, {}).get("seconds")


def times_as_long(value: float | None, base: float | None) -> str:
    """A duration relative to another; above 1: longer."""
    return times(value / base if value and base else None)


# --- end to end ------------------------------------------------------------------------------------------------------


def e2e(results: Path) -> str:
    """Whole models: milliseconds and speed-up of each stack, and what its weights hold."""
    result = read("e2e", results)
    if result is None:
        return ""
    settings = result["settings"]
    cells = [f"decode B={batch}" for batch in DECODE_BATCHES if batch in settings["batches"]]
    cells += [name for row in result["rows"] for name in row if name.startswith("prefill")][:1]
    header = ["stack", *cells, "linears alone, B=1", "weights held, GiB"]
    rows = [e2e_row(row, cells) for row in result["rows"]]
    peers, late = read_all(("e2e_peers",), results), read_all(LATE_MODELS, results)
    for other in (peers, late):
        rows += [e2e_row(row, cells) for row in merged(other) if row["stack"] != "inductor"]
    text = (
        f"**A whole model**: {settings['shape']} shape, {settings['layers']} layers, seeded random weights, static cache "
        f"of {settings['cache_tokens']} tokens of which {settings['filled']} are filled, CUDA graphs. Milliseconds, and "
        f"the stream's speed relative to Inductor in bf16. {WALL}. {place(result, 'triton', 'transformers', 'torchao')}.\n"
    )
    note = (
        "`linears alone` is the kernel time of the layers' linears, lm_head apart. `weights held` is what the allocator holds "
        "for all parameters after `release`, embeddings and lm_head in bf16 included. [How it is measured](benchmarks/README.md)."
    )
    for other, words in ((peers, "at the same time on another GPU of that host"), (late, "in other runs")):
        others = [STACKS.get(r["stack"], r["stack"]) for r in merged(other) if r["stack"] != "inductor"]
        if others:
            note += f" {', '.join(others)}: measured {words}, relative to Inductor there."
    note += released([*result["rows"], *merged([*peers, *late])])
    return "\n".join([text, markdown(header, rows), "", note])


# Runs of 4-bit schemes, the latest first; a cell is of the first of them that has it.
LATE_MODELS = ("e2e_decode_4bit", "e2e_4bit", "e2e_qserve")


def merged(results: Sequence[Result]) -> list[Result]:
    """A row of each stack that was begun, its cells from the first result that has them; its error unless one has none."""
    rows: dict[str, Result] = {}
    for row in (row for result in results for row in measured(result)):
        known = rows.setdefault(row["stack"], {"stack": row["stack"], "error": row.get("error")})
        known["error"] = known["error"] and row.get("error")
        for name, cell in row.items():
            known.setdefault(name, cell)
    return list(rows.values())


def measured(result: Result) -> list[Result]:
    """Rows of the stacks that were begun; a spent time budget leaves out the last ones."""
    return [row for row in result["rows"] if not str(row.get("error") or "").startswith("not run")]


def released(rows: Sequence[Result]) -> str:
    """What the policies' weights hold after release; empty where it was not measured."""
    ratios = [(row["stack"], row.get("memory", {}).get("named_ratio")) for row in rows]
    words = ", ".join(f"{ratio:.3f}× ({stack})" for stack, ratio in ratios if ratio)
    return f" After release the quantized weights hold {words} of their bf16 bytes, by the allocator." if words else ""


def stream_and_wall(cell: Result, speedup: float | None) -> str:
    """Milliseconds in a stream / with a sync after each step, and the stream's speed-up; older results lack the second."""
    return f"{cell['ms']:.2f} / {number(cell.get('wall_ms'))} ({times(speedup)})"


WALL = (
    "Two times: of steps in a stream that never drains / by the wall clock with a sync after each step, which "
    f"results older than it lack ({NONE})"
)


def e2e_row(row: Result, cells: Sequence[str]) -> list[str]:
    """One stack; what an error left unmeasured is a dash, and the error stands beside the name."""
    name = STACKS.get(row["stack"], row["stack"])
    name += f" ({row['error'][:80]})" if row.get("error") else ""
    base = 1.0 if row["stack"] == "inductor" else None
    out = [name]
    for cell in cells:
        found = row.get(cell)
        out.append(stream_and_wall(found, found["speedup"] or base) if found else NONE)
    linears = row.get("decode B=1 kernels")
    out.append(times(linears["linears_speedup"] or base) if linears else NONE)
    # Of the other stacks nothing is left to release: what they hold after the first step is what they hold.
    held = (
        row.get("memory", {}).get("weights_gib")
        if row["stack"] not in ("inductor", "torchao-fp8", "torchao-int4")
        else row.get("first", {}).get("held_gib")
    )
    return [*out, number(held)]


# --- kernels ---------------------------------------------------------------------------------------------------------


def gemm(results: Path) -> str:
    """Dispatch against the best peer kernel and against cuBLAS bf16."""
    result = read("gemm", results)
    if result is None:
        return ""
    tokens = sorted({row["m"] for row in result["summary"]})
    shapes = list(dict.fromkeys(f"{row['n']}×{row['k']}" for row in result["summary"]))
    header = ["scheme", "to best peer", "worst row", *(f"to bf16, M={m}" for m in tokens)]
    rows: list[list[str]] = []
    late = read("gemm_4bit", results)
    summary = [*result["summary"], *(late["summary"] if late else [])]
    for verdict in [*result["verdicts"], *(late["verdicts"] if late else [])]:
        own = [row for row in summary if row["scheme"] == verdict["scheme"]]
        by_m = [speed([row["ratio_to_bf16"] for row in own if row["m"] == m]) for m in tokens]
        worst = inverse(verdict["worst_to_peer"])
        worst += f" ({verdict['worst_row'].replace('x', '×')})" if verdict["worst_row"] else ""
        rows.append([verdict["scheme"], inverse(verdict["geomean_to_peer"]), worst, *by_m])
    where = place(result, "triton", "sgl_kernel", "humming", "deep_gemm")
    text = (
        f"**The linears alone**: speed of the kernel that is chosen, over N×K = {', '.join(shapes)}, as geometric means; "
        "above 1 is faster. The best peer is the fastest correct kernel of that scheme among those of torch, "
        f"sgl-kernel, DeepGEMM and humming, called directly; inputs are quantized beforehand. {where}."
        + (f" {', '.join(v['scheme'] for v in late['verdicts'])}: in another run.\n" if late else "\n")
    )
    return "\n".join([text, markdown(header, rows)])


def gemm_gguf(results: Path) -> str:
    """GGUF linears beside sgl-kernel's and cuBLAS bf16."""
    result = read("gemm_gguf", results)
    if result is None:
        return ""
    header = ["type", "N×K", "M", "ours", "kernel", "sgl-kernel", "its op", "bf16", "to sgl-kernel", "to bf16"]
    lines = [
        [
            row["scheme"], f"{row['n']}×{row['k']}", f"{row['m']}", number(row["dispatch_us"], 1), f"`{row['dispatch']}`",
            number(row.get("peer_us"), 1), f"`{str(row['peer']).removeprefix('sgl ')}`" if row.get("peer") else NONE,
            number(row["bf16_us"], 1), inverse(row.get("ratio_to_peer")), inverse(row["ratio_to_bf16"]),
        ]
        for row in sorted(result["summary"], key=lambda row: (row["scheme"], row["n"] * row["k"], row["m"]))
    ]  # fmt: skip
    text = (
        "**GGUF linears**, microseconds, weights rotated past the L2. sgl-kernel's ops round inputs to Q8_1, ours do not; where one took "
        f"longer than the benchmark waits for, or does not serve so many tokens, there is none. {place(result, 'triton', 'sgl_kernel')}."
    )
    return "\n\n".join([text, markdown(header, lines), *gguf_wholes(results)])


GGUF_CELLS = ("decode B=1", "decode B=16", "prefill 1x2048")


def gguf_wholes(results: Path) -> list[str]:
    """Experts alone and a whole model in GGUF blocks."""
    experts, models, out = read("moe_gguf", results), read("e2e_gguf", results), []
    if experts is not None:
        columns = list(dict.fromkeys((row["routing"], row["t"]) for row in experts["summary"]))
        cells = {(row["scheme"], row["routing"], row["t"]): row for row in experts["summary"]}
        lines = [
            [scheme, *(f"{(c := cells[scheme, *at])['dispatch_us']:.0f} ({times(c['speedup'])})" for at in columns)]
            for scheme in dict.fromkeys(row["scheme"] for row in experts["summary"])
        ]
        names = [f"T={t}" + ("" if routing == "even" else f" {routing}") for routing, t in columns]
        out += [
            f"Experts of {experts['summary'][0]['shape']} alone, microseconds, and speed over the faster of Hugging Face's two bf16 "
            f"implementations compiled by Inductor. {place(experts, 'triton', 'transformers')}.",
            markdown(["type", *names], lines),
        ]
    if models is not None:
        lines = [
            [
                "Inductor bf16" if row["stack"] == "inductor" else row["stack"],
                *(stream_and_wall(row[cell], row[cell].get("speedup") or 1.0) for cell in GGUF_CELLS),
            ]
            for row in models["rows"]
        ]
        settings = models["settings"]
        out += [
            f"A whole model, {settings['shape']} shape, {settings['layers']} layers, every linear but lm_head in blocks that were "
            f"quantized from 16 bits, milliseconds: in a stream that never drains / by the wall clock with a sync after each step. "
            f"{place(models, 'triton', 'transformers')}.",
            markdown(["stack", *GGUF_CELLS], lines),
        ]
    return out


def inverse(ratio: float | None) -> str:
    """Speed-up of a ratio of times."""
    return times(1 / ratio if ratio else None)


def speed(ratios: Sequence[float | None]) -> str:
    """Geometric mean of ratios of times, as a speed-up."""
    known = [ratio for ratio in ratios if ratio]
    return times(math.exp(-statistics.fmean(map(math.log, known))) if known else None)


# --- quality ---------------------------------------------------------------------------------------------------------


def quality(results: Path) -> str:
    """Perplexity of the bundled models per scheme: textbook, and as compiled on each device that was measured."""
    found = [result for name in ("quality_cuda", "quality_cpu") if (result := read(name, results)) is not None]
    if not found:
        return ""
    header = ["scheme", "bits a weight", "coverage", "textbook"]
    for result in found:
        header += [f"compiled, {short_device(result)}", "to bf16", "to textbook"]
    keys = list(dict.fromkeys((row["model"], row["scheme"]) for result in found for row in result["rows"]))
    rows: list[list[str]] = []
    for model in dict.fromkeys(model for model, _ in keys):
        mine = [row for result in found for row in result["rows"] if row["model"] == model]
        rows.append([f"{model} bf16", "16", NONE, number(mine[0]["bf16"], 4), *[NONE] * (3 * len(found))])
        rows += [quality_row(found, model, scheme) for of, scheme in keys if of == model]
    tokens = {name.removeprefix("tokens_"): count for name, count in found[0].items() if name.startswith("tokens_")}
    text = (
        "**Quality**: perplexity of the bundled models on held-out text "
        f"({', '.join(f'{name}: {count} tokens' for name, count in tokens.items())}). The textbook column is plain "
        "round-to-nearest in eager f32, written apart from the product. Coverage: quantized bytes over those that the policy "
        "names. Under 4-bit inputs a single perplexity says little, since codes that flip make others flip: there the mean over "
        "several models is given too, whose embeddings differ in their last bits, with its standard error. "
        f"{'; '.join(place(result, 'triton', 'sgl_kernel', 'humming') for result in found)}.\n"
    )
    return "\n".join([text, markdown(header, rows)])


def quality_row(found: Sequence[Result], model: str, scheme: str) -> list[str]:
    """One scheme; a device that failed shows its error."""
    rows = [next((r for r in f["rows"] if (r["model"], r["scheme"]) == (model, scheme)), {}) for f in found]
    known = next(row for row in rows if row)
    textbook = next((row["textbook"] for row in rows if row.get("textbook") is not None), None)
    covered = next((f"{row['coverage']:.0%}" for row in rows if row.get("coverage") is not None), NONE)
    out = [f"{model} {scheme}", f"{known['bits_per_weight']:.3g}", covered, number(textbook, 4)]
    for row in rows:
        shown = row["error"][:80] if row.get("error") else number(row.get("product"), 4)
        apart = percent(row.get("product_to_textbook"))
        if row.get("mean_to_textbook") is not None:
            apart += f" (mean of {row['draws']}: {percent(row['mean_to_textbook'])} ± {row['mean_error']:.2%})"
        out += [shown, percent(row.get("product_to_bf16")), apart]
    return out


# --- the KV cache ----------------------------------------------------------------------------------------------------


def rounding(results: Path) -> str:
    """Extra perplexity and KL of each rounding beside nearest's, and what a large model takes; for each device."""
    found = (read(f"rounding_{which}", results) for which in ("cuda", "cpu", "own_cpu", "own_cuda"))
    return "\n\n".join(_roundings(result) for result in found if result is not None)


# What roundings were calibrated by, as methods are called.
TEXTS = {
    "data": "Data: {calibration} windows of {length} tokens of what the models were trained on, drawn anew by each seed. ",
    "own text": "Own text: 64 texts of 128 tokens that the model wrote (`own_text`), the writing counted. ",
}


def _roundings(result: Result) -> str:
    settings, cells = result["settings"], dict[tuple[str, str, str], list[Result]]()
    for row in result["rows"]:
        cells.setdefault((row["model"], row["scheme"], row["method"]), []).append(row)
    lines = [
        [
            f"{model} {scheme}, {method}",
            str(len(found)),
            spread([row["extra"] for row in found], percent),
            spread([row["to_nearest"] for row in found]),
            spread([row["kl"] for row in found], lambda x: number(x, 4)),
            spread([row["kl_to_nearest"] for row in found]),
            NONE if any(row["seconds"] is None for row in found) else number(max(row["seconds"] for row in found), 1),
        ]
        for (model, scheme, method), found in cells.items()
    ]
    methods = {row["method"].partition(", ")[2] for row in result["rows"]}
    sources = [text for name, text in TEXTS.items() if name in methods]
    text = (
        f"**Roundings**: bundled models, eager, quantization simulated, {settings['windows']} held-out windows of {settings['length']} "
        f"tokens. {''.join(sources).format(**settings)}"
        "Extra perplexity is relative to 16 bits; ratios are to rounding to nearest; with seeds mean, least and most. "
        f"{place(result, 'transformers')}.\n"
    )
    large = [
        [
            f"{row['scheme']}, {row['method']}",
            number(row["seconds"], 1),
            number(row["held_gib"]),
            number(row["peak_gib"]),
        ]
        for row in result.get("large", [])
    ]
    header = ["model, scheme, rounding", "seeds", "extra perplexity", "of nearest's", "KL", "of nearest's", "s"]
    out = [text, markdown(header, lines)]
    if large:
        out += [
            "\nThe Llama-3-8B shape, 16 layers of random weights, the same number of tokens; memory of the device.\n",
            markdown(["scheme, rounding", "s", "GiB of the model", "GiB at the peak"], large),
        ]
    return "\n".join(out)


def rounding_peers(results: Path) -> str:
    """Our roundings and those of other libraries by scheme, least KL first; below them those that could not be run."""
    result = read("rounding_peers", results)
    if result is None:
        return ""
    settings, versions = result["settings"], dict[str, str]()
    for row in result["rows"]:
        versions |= {
            name: value for name, value in (row["versions"] or {}).items() if name not in ("torch", "transformers")
        }
    measured = sorted(
        (row for row in result["rows"] if not row["reason"]),
        key=lambda row: (row["scheme"] != "W4A16", row["scheme"], row["kl"]),
    )
    lines = [
        [row["scheme"], row["library"], row["method"], percent(row["extra"]), number(row["kl"], 4)] for row in measured
    ]
    failed = [
        f"- {row['scheme']}, {row['library']} {row['method']}: {row['reason']}"
        for row in result["rows"]
        if row["reason"]
    ]
    text = (
        f"**Other libraries**: the bundled dense model in f32, all linears but `lm_head`, {settings['windows']} held-out windows of "
        f"{settings['length']} tokens; data, where a method takes any, are the same {settings['calibration']} windows for all. "
        f"{', '.join(f'{name} {value}' for name, value in sorted(versions.items()))}. {place(result, 'transformers')}.\n"
    )
    out = [text, markdown(["scheme", "library", "method", "extra perplexity", "KL"], lines)]
    return "\n".join([*out, *(["\nNot measured:\n", *failed] if failed else [])])


def spread(values: Sequence[float], shown: Callable[[float], str] = lambda x: number(x)) -> str:
    """The mean, and where there are several the least and the most."""
    mean = shown(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({shown(min(values))} to {shown(max(values))})"


def kv_quality(results: Path) -> str:
    """Schemes of the KV cache beside 16 bits: perplexity and copying, then the needle, then compiled against eager."""
    result = read("kv_quality", results)
    if result is None:
        return ""
    rows = result["rows"]
    copies = [f"copy from {cell['distance']}" for cell in rows[0]["copies"]]
    needles = [f"needle {cell['distance']} back" for cell in rows[0]["needles"]]
    plain = {(row["model"], row["scheme"]): row for row in result["textbook"]}
    header = ["cache", "bits", "perplexity", "to 16 bits", "textbook, to 16 bits", *copies]
    first = markdown(header, [kv_row(row, plain.get((row["model"], row["scheme"]))) for row in rows])
    second = markdown(["cache", *needles, "first", "first five"], kv_needles(result))
    return "\n".join([kv_text(result), first, "", kv_needle_text(result), second, *kv_compiled(result)])


def kv_text(result: Result) -> str:
    """What the first table holds, and which schemes are out of bounds."""
    settings = result["settings"]
    far = [f"{row['model']} {row['scheme']}" for row in result["rows"] if not row["within"]]
    return (
        f"**The KV cache**: bundled models in bf16, eager, each scheme's cache beside one of 16 bits. Perplexity of "
        f"{result['tokens']} tokens of held-out text, each predicted by a decode step over the cache, in windows of "
        f"{settings['length']}. Asked for: within {settings['within']:.1%} of 16 bits; not so: {', '.join(far) or 'none'}. The textbook is "
        "round-to-nearest in f64, written apart from the product, over whole windows at once. ± is the standard error of the "
        f"difference, over windows or trials. Copying: a passage of {settings['passage']} tokens a second time, so many tokens after "
        f"the first, {settings['trials']} passages at each distance. How many of its tokens come first, of those that do not where the "
        "first passage was another one; in parentheses how the mean log-probability of all of them differs from 16 bits. Fixed scales "
        f"are of {settings['calibration']} other windows. {place(result, 'transformers')}.\n"
    )


def kv_row(row: Result, plain: Result | None) -> list[str]:
    """Perplexity, here and by the textbook, and recall of copies with the change of log-probability."""
    base = row["scheme"] == "16 bits"
    apart = [NONE if base or of is None else f"{percent(of['to_base'])} ± {of['error']:.2%}" for of in (row, plain)]
    copies = [
        f"{cell['first']:.1%}" + ("" if base else f" ({cell['to_base']:+.3f} ± {cell['error']:.3f})")
        for cell in row["copies"]
    ]
    return [f"{row['model']} {row['scheme']}", f"{row['bits']:g}", number(row["perplexity"], 4), *apart, *copies]


def kv_needle_text(result: Result) -> str:
    """What the second table holds, and what it cannot tell."""
    return (
        "**A needle in it**: a pair of tokens A B that the text has nowhere, other text, A again. Mean log-probability of B with 16 bits "
        "and without the pair; for schemes the difference to 16 bits. Then how often B is first, and among the first five, over all "
        f"{sum(cell['trials'] for cell in result['rows'][0]['needles'])} trials. Models this small hardly recall a pair that they "
        "saw once, in 16 bits either, which is why there is copying.\n"
    )


def kv_needles(result: Result) -> list[list[str]]:
    """16 bits without the pair, with it, then the schemes, model by model."""
    rows: list[list[str]] = []
    for row in result["rows"]:
        name, cells = row["model"], row["needles"]
        if row["scheme"] == "16 bits":
            without = result["without"][name]["needles"]
            rows.append([f"{name} 16 bits, no pair", *(number(cell["logp"]) for cell in without), *kv_shares(without)])
            shown = [number(cell["logp"]) for cell in cells]
        else:
            shown = [f"{cell['to_base']:+.2f} ± {cell['error']:.2f}" for cell in cells]
        rows.append([f"{name} {row['scheme']}", *shown, *kv_shares(cells)])
    return rows


def kv_shares(cells: Sequence[Result]) -> list[str]:
    """First, and among the first five, over all distances."""
    trials = sum(cell["trials"] for cell in cells)
    return [f"{sum(cell[key] * cell['trials'] for cell in cells) / trials:.1%}" for key in ("first", "five")]


def kv_compiled(result: Result) -> list[str]:
    """Compiled models against eager ones."""
    rows = [
        [f"{row['model']} {row['scheme']}, {row['dtype']}", number(row["perplexity"], 4)]
        + [f"{percent(row['to_eager'])} ± {row['error']:.2%}", f"{row['rms']:.5f}"]
        + [f"{row['eager_rms_to_base']:.5f}" if row["scheme"] != "16 bits" else NONE]
        for row in result["compiled"]
    ]
    if not rows:
        return []
    text = (
        f"**Compiled** against eager, over {result['compiled'][0]['tokens']} of these tokens: perplexity, and the root mean square by "
        "which tokens' log-probabilities differ, beside that of what the scheme itself changes. In bf16, sums of another order change last "
        "bits, and these change codes; the rows in f32 show that the same is computed.\n"
    )
    header = ["model and cache", "perplexity", "to eager", "rms to eager", "rms of the scheme"]
    return ["", text, markdown(header, rows)]


# --- compile time, CPU -----------------------------------------------------------------------------------------------


def newcomer(results: Path) -> str:
    """The steps of docs/tutorial.md and their times."""
    result = read("newcomer", results)
    if result is None:
        return ""
    rows = [[row["name"], number(row["seconds"], 1), row["error"]] for row in result["rows"]]
    rows.append(["in all", number(result["total_s"], 1), ""])
    what = (
        "with an environment that is there" if result["installed"] else "with everything that is installed on the way"
    )
    text = f"**How long it takes**, {what}, on a CPU, by the wall clock. {place(result)}.\n"
    return "\n".join([text, markdown(["step", "seconds", ""], rows)])


def compile_time(results: Path) -> str:
    """Cold compilation against Inductor's, and the passes' own time by depth."""
    result = read("compile_time", results)
    if result is None:
        return ""
    settings = result["settings"]
    rows = [
        [STACKS.get(row["stack"], row["stack"]), *(number(row.get(key), 1) for key in ("compile_s", "apart_s"))]
        + [times(row.get("ratio")), f"{row['runs']}" + (f" ({row['error'][:80]})" if row["error"] else "")]
        for row in result["rows"]
    ]
    text = (
        f"**Compile time**: one decode step of the {settings['shape']} shape, {settings['layers']} layers, cold caches, "
        f"medians of {settings['runs']}; apart: {settings['apart']}. {place(result, 'triton')}.\n"
    )
    table = markdown(["stack", "compile, s", "apart, s", "to Inductor", "runs"], rows)
    deep = read("compile_time_passes", results) or result
    passes = [row for row in deep.get("passes", ()) if not row.get("error")]
    if not passes:
        return "\n".join([text, table])
    depth = [[f"{r['layers']}", f"{r['nodes']}", number(r["passes_s"]), f"{r['us_per_node']:.0f}"] for r in passes]
    return "\n".join(
        [text, table, "", "The passes alone, by depth of the model:", ""]
        + [markdown(["layers", "nodes", "passes, s", "µs a node"], depth)]
    )


def cpu_decode(results: Path) -> str:
    """Decoding on a CPU."""
    result = read("cpu_decode", results)
    if result is None:
        return ""
    rows = [
        [row["variant"] + (f" ({row['error'][:80]})" if row["error"] else "")]
        + [number(row["us"] / 1000, 1) if row.get("us") else NONE, times(row.get("speedup"))]
        for row in result["rows"]
    ]
    settings = result["settings"]
    text = (
        f"**On a CPU**: decode step, {settings['shape']}, {settings['layers']} layers, B={settings['batch']}. "
        f"{place(result)}.\n"
    )
    return "\n".join([text, markdown(["variant", "ms", "to bf16"], rows)])


def mla(results: Path) -> str:
    """A decode step over DeepSeek's latents, absorbed and as written."""
    return "\n\n".join(_latents(result) for result in read_all(("mla", "mla_fp8", "mla_cpu"), results))


def _latents(result: Result) -> str:
    cells: dict[tuple[int, int], dict[str, Result]] = {}
    for row in result["rows"]:
        cells.setdefault((row["batch"], row["tokens"]), {})[row["variant"]] = row
    names = list(dict.fromkeys(row["variant"] for row in result["rows"]))
    rows = [
        [f"B={batch}, {tokens} tokens", *(_step(found[name]) for name in names)]
        for (batch, tokens), found in cells.items()
    ]
    settings = result["settings"]
    text = (
        f"**A decode step over latents**: {settings['layers']} layers, {settings['sizes']['num_attention_heads']} heads, "
        f"linears under `{settings['policy']}`, a static cache of so many tokens, half filled; milliseconds, and speed relative to "
        f"what is written over the same cache. {place(result)}.\n"
    )
    return "\n".join([text, markdown(["", *names], rows)])


def _step(row: Result) -> str:
    if not row.get("us"):
        return cell((row.get("error") or NONE)[:60])
    return f"{number(row['us'] / 1000, 2)} ({times(row.get('speedup'))})"


# --- which kernel serves what ----------------------------------------------------------------------------------------


def kernels(results: Path) -> str:
    """Scheme by target: every kernel that can run it there, asked of the kernels themselves."""
    del results
    import torch

    from quant_compile.ir.scheme import PRESETS
    from quant_compile.lowering.registry import Problem

    rows: list[list[str]] = []
    for name, scheme in sorted(PRESETS.items()):
        problem = Problem(scheme, SIZE, SIZE, torch.bfloat16)
        rows.append([f"`{name}`", serving(problem, ["cpu"]), serving(problem, gpu_targets())])
    return markdown(["scheme", "CPU", "GPU"], rows).replace("---:", "---")


def gpu_targets() -> list[str]:
    """The GPU targets that selection knows, oldest first."""
    from quant_compile.lowering.target import FAKE_SM_COUNT

    return [f"sm{arch}" for arch in sorted(FAKE_SM_COUNT)]


def serving(problem: Any, targets: Sequence[str]) -> str:
    """The kernels that can run ``problem`` on any of ``targets``, with the targets and the most rows of each."""
    from quant_compile.lowering.select import BUCKETS, Request, fits
    from quant_compile.lowering.target import Target

    able: dict[str, dict[str, int]] = {}
    for text in targets:
        for m in BUCKETS:
            for name, answer in fits(problem, Target.fake(text), Request(), m).items():
                if not isinstance(answer, str) and name != "reference":
                    able.setdefault(name, {})[text] = m
    parts: list[str] = []
    for name, found in sorted(able.items()):
        most = max(found.values())
        limits = [span(list(found), targets)] if len(targets) > 1 else []
        limits += [f"m≤{most}" if most > 1 else "m=1"] if most != BUCKETS[-1] else []
        parts.append(f"`{name}`" + (f" ({', '.join(limits)})" if limits else ""))
    return ", ".join(parts) or NONE


def span(found: Sequence[str], targets: Sequence[str]) -> str:
    """``sm89+``, ``sm90`` or ``sm80–sm90``; a list where there are gaps."""
    start = targets.index(found[0])
    if list(targets[start : start + len(found)]) != list(found):
        return " ".join(found)
    if found[-1] == targets[-1] and len(found) > 1:
        return f"{found[0]}+"
    return found[0] if len(found) == 1 else f"{found[0]}–{found[-1]}"


def self_contained(results: Path) -> str:
    """CPU kernel: whether an exported program holds it in operations of torch alone, asked of the kernels themselves."""
    del results
    from quant_compile.exporting.program import INSIDE
    from quant_compile.ir.family import Reject
    from quant_compile.lowering.moe import moe_kernels
    from quant_compile.lowering.registry import kernels as linear_kernels

    rows: list[list[str]] = []
    for name, kernel in sorted(linear_kernels().items()):
        if not (served := cpu_problems(kernel)):
            continue
        answers = [Reject(INSIDE) if kernel.portable is None else kernel.portable(problem) for problem in served]
        reasons = list(dict.fromkeys(answer.reason for answer in answers if answer is not None))
        held = "no" if None not in answers else "in part" if reasons else "yes"
        rows.append([f"`{name}`", held, "; ".join(reasons)])
    rows += [[f"`{name}`", "no", INSIDE] for name in sorted(moe_kernels()) if name.startswith("torch_cpu")]
    return markdown(["kernel", "self-contained", "why not"], rows).replace("---:", "---")


def cpu_problems(kernel: Any) -> list[Any]:
    """A small and a large problem of each preset that a kernel runs on a CPU; all small ones first."""
    import torch

    from quant_compile.ir.family import Reject
    from quant_compile.ir.scheme import PRESETS
    from quant_compile.lowering.registry import Problem
    from quant_compile.lowering.target import Target

    both = [Problem(scheme, size, size, torch.bfloat16) for size in (256, SIZE) for scheme in PRESETS.values()]
    return [problem for problem in both if not isinstance(kernel.fit(problem, 1, Target.fake("cpu")), Reject)]


def export(results: Path) -> str:
    """Packages against compiled models, on each device that has results."""
    header = [
        "model",
        "policy",
        "batch",
        "length",
        "needs quant_compile",
        "error",
        "to eager",
        "compiled to eager",
        "compiled ms",
        "package ms",
        "speed",
    ]
    tables: list[str] = []
    for result in read_all(("export_cpu", "export_cuda"), results):
        rows = [
            [row["model"], row["policy"], str(row["batch"]), str(row["length"])]
            + ["no" if row["self_contained"] else "yes"]
            + [f"{row[key]:.1e}" for key in ("error", "package_error", "compiled_error")]
            + [number(row["compiled_us"] / 1000), number(row["package_us"] / 1000), times(row["speed"])]
            for row in result["rows"]
            if "problem" not in row
        ]
        notes = dict.fromkeys((row["model"], row["note"]) for row in result["rows"] if "note" in row)
        text = "".join(f"\n\n{model}: {note}." for model, note in notes)
        tables.append(f"{place(result)}.\n\n{markdown(header, rows)}{text}")
    return "\n\n".join(tables)


def tensor_parallel(results: Path) -> str:
    """A call of models divided over GPUs, by the wall clock, to bf16 that is divided alike."""
    result = read("tensor_parallel", results)
    if result is None:
        return ""
    shown = sorted(result["rows"], key=lambda row: (row["model"], row["cell"], row["gpus"]))
    rows = [
        [row["model"], row["cell"], str(row["gpus"]), row["stack"].removesuffix(" graphs")]
        + ["yes" if row["stack"].endswith(" graphs") else "no", number(row["ms"])]
        + [times(row.get("speedup")) if "reason" not in row else row["reason"]]
        + [times(row.get("scaling")), number(row.get("cosine"), 3)]
        for row in shown
        if "ms" in row
    ]
    header = [
        "model",
        "call",
        "GPUs",
        "stack",
        "CUDA graphs",
        "ms",
        "to bf16",
        "to one GPU",
        "cosine of logits to bf16's",
    ]
    return f"{place(result)}.\n\n{markdown(header, rows)}"


def all_reduce(results: Path) -> str:
    """A sum over two ranks and what follows it, by NCCL and Inductor and by kernels of ours."""
    result = read("all_reduce", results)
    if result is None:
        return ""
    rows = [
        [row["model"], str(row["hidden"]), str(row["rows"])]
        + ([row["reason"]] + [NONE] * 4 if "reason" in row else all_reduce_cells(row))
        for row in result["rows"]
        if "hidden" in row
    ]
    header = [
        "hidden size of",
        "hidden",
        "rows",
        "NCCL, Inductor µs",
        "sum alone µs",
        "one kernel µs",
        "sum alone",
        "one kernel",
    ]
    return f"{place(result)}.\n\n{markdown(header, rows)}"


def all_reduce_cells(row: Result) -> list[str]:
    """Microseconds and speed-ups."""
    micros = [number(row[key]) for key in ("nccl_us", "alone_us", "fused_us")]
    return micros + [times(row[key]) if key in row else NONE for key in ("speedup_alone", "speedup")]


def all_reduce_error(results: Path) -> str:
    """Sums of which ranks send codes, to sums in f32."""
    result = read("all_reduce_error", results)
    if result is None:
        return ""
    rows = [
        [row["parts"], str(row["ranks"]), *(f"{row[sent]:.2%}" for sent in ("bfloat16", "FP8", "INT8"))]
        for row in result["rows"]
    ]
    return markdown(["parts", "ranks", "bfloat16", "FP8", "INT8"], rows)


# --- models with experts ---------------------------------------------------------------------------------------------


MOE_CELLS = ("block T=1", "block T=16", "block T=2048", "decode B=1", "decode B=16", "prefill 1x2048")
HF_STACKS = {"inductor-grouped_mm": "Inductor bf16, grouped_mm", "inductor-batched_mm": "Inductor bf16, batched_mm"}


# Of a stack that several files have, the first is shown.
MOE_MODELS = ("moe_e2e", "moe_e2e_mixtral", "moe_e2e_w4a16", "moe_e2e_stacks", "moe_e2e_4bit", "moe_e2e_mixtral_4bit")


def moe_e2e(results: Path) -> str:
    """Whole models with experts, and their MoE modules alone: times and speed-up over the faster Inductor stack of the same run."""
    found = read_all(MOE_MODELS, results)
    if not found:
        return ""
    rows: dict[tuple[str, str], list[str]] = {}
    for result in found:
        for row in measured(result):
            name = HF_STACKS.get(row["stack"], row["stack"])
            cells = [moe_cell(row.get(cell)) for cell in MOE_CELLS]
            rows.setdefault((row["model"], row["stack"]), [row["model"], name, *cells])
    layers = {name: count for result in found for name, count in result["settings"]["layers"].items()}
    shapes = ", ".join(f"{name} ({count} layers)" for name, count in layers.items())
    text = (
        f"**Models with experts**: {shapes}, seeded random weights, CUDA graphs. A block is a MoE module with its router, in "
        "microseconds; models in milliseconds. Speed is relative to the faster of Hugging Face's two bf16 implementations under "
        f"Inductor in the same run; {NONE}: not run. Of models: {WALL[0].lower()}{WALL[1:]}. {place(found[0], 'triton', 'transformers')}.\n"
    )
    ordered = sorted(
        rows.values(), key=lambda row: (list(layers).index(row[0]), not row[1].startswith("Inductor"), row[1])
    )
    return "\n".join([text, markdown(["model", "stack", *MOE_CELLS], ordered)])


def moe_cell(cell: Result | None) -> str:
    """Time and speed-up of one cell."""
    time = (cell.get("ms") or cell.get("us")) if cell else None
    if cell is None or time is None:
        return NONE
    return stream_and_wall(cell, cell["speedup"]) if "ms" in cell else f"{time:.0f} ({times(cell['speedup'])})"


def moe(results: Path) -> str:
    """Expert blocks alone, without their router: the kernel that is chosen against Hugging Face's bf16 experts under Inductor."""
    result, late = read("moe", results), read("moe_4bit", results)
    if result is None:
        return ""
    columns = list(dict.fromkeys((row["routing"], row["t"]) for row in result["summary"]))
    every = [*result["summary"], *(late["summary"] if late else [])]
    found = {(row["shape"], row["scheme"], row["routing"], row["t"]): row for row in every}
    rows: list[list[str]] = []
    for shape, scheme in dict.fromkeys(key[:2] for key in found):
        cells = [found.get((shape, scheme, *column)) for column in columns]
        rows.append([shape, scheme, *(f"{c['dispatch_us']:.0f} ({times(c['speedup'])})" if c else NONE for c in cells)])
    header = [
        "experts of",
        "scheme",
        *(f"T={t}" + ("" if routing == "even" else f" {routing}") for routing, t in columns),
    ]
    floors = [row["times_floor"] for row in found.values() if row["times_floor"] and row["t"] in (16, 64)]
    text = (
        "**Experts alone**: one block's experts without the router, in microseconds of the kernel that is chosen, and its speed "
        "over the faster of Hugging Face's two bf16 implementations compiled by Inductor. "
        f"{place(result, 'triton', 'transformers', 'sgl_kernel', 'humming')}."
        + (f" {', '.join(dict.fromkeys(r['scheme'] for r in late['summary']))}: in another run.\n" if late else "\n")
    )
    slower = [row for row in found.values() if (row["dispatch_over_best"] or 0) > 1.05]
    best = {"W4A16": "humming's grouped GEMM, whose layout no decode kernel reads"}
    note = (
        f"At 16 and 64 tokens the chosen kernel takes {min(floors):.2f} to {max(floors):.2f} times what reading the chosen experts "
        "once takes at the vendor's bandwidth. "
        + "".join(
            f"{scheme}: up to {max(r['dispatch_over_best'] for r in slower if r['scheme'] == scheme):.2f} times the best contender"
            f"{f', {best[scheme]}' if scheme in best else ''}. "
            for scheme in dict.fromkeys(r["scheme"] for r in slower)
        )
        + "Every contender: [moe.json](benchmarks/results/moe.json)"
        + (", [moe_4bit.json](benchmarks/results/moe_4bit.json)." if late else ".")
    )
    return "\n".join([text, markdown(header, rows), "", note])


# --- the documents ---------------------------------------------------------------------------------------------------

# --- checkpoints -----------------------------------------------------------------------------------------------------


def checkpoint_logits(results: Path) -> str:
    """Loaded checkpoints against the libraries that wrote them; all figures are relative errors of logits."""
    result = read("checkpoint_logits", results)
    if result is None:
        return ""
    header = ["sample", "dtype", "library's logits", "loaded", "same weights, eager", "same weights, `torch.compile`"]
    rows = [
        [row["sample"], row["dtype"], row["reference"].removeprefix("logits").lstrip("_") or "in memory"]
        + [NONE if row.get(way) is None else f"{row[way]:.1e}" for way in ("loaded", "eager", "compiled")]
        if "error" not in row
        else [row["sample"], NONE, cell(row["error"]), NONE, NONE, NONE]
        for row in result["rows"]
    ]
    text = (
        "Relative error of 64 tokens' logits to those of the library that wrote the sample. *Same weights*: transformers' own model with "
        "the dequantized weights rounded to bf16, inputs not quantized. "
        f"{place(result, 'transformers')}.\n"
    )
    return "\n".join([text, markdown(header, rows)])


# --- families --------------------------------------------------------------------------------------------------------


def families(results: Path) -> str:
    """How every family of transformers fared: counts, what stays open, all that ran, and what did not."""
    result = read("families", results)
    if result is None:
        return ""
    rows, settings = result["rows"], result["settings"]
    ran = [row for row in rows if row["status"] in ("right", "wrong", "unstable")]
    parts = [
        families_summary(rows, settings, place(result, "transformers")),
        *section("What stays open", families_open(rows)),
        *section(
            "Families that ran",
            markdown(
                ["family", "class", "graphs", "coverage", "error", "rounding", "generate, or the reason"],
                [family_row(row) for row in ran],
            ),
        ),
        *section(
            "Families that did not run",
            markdown(
                ["family", "", "reason"],
                [[row["family"], row["status"], cell(row.get("reason", ""))] for row in rows if row not in ran],
            ),
        ),
    ]
    return "\n".join(parts)


def section(title: str, text: str) -> list[str]:
    """A heading and its text; nothing without text."""
    return ["", f"## {title}", "", text] if text else []


def families_summary(rows: Sequence[Result], settings: Result, where: str) -> str:
    """Counts in words."""
    count = {status: sum(row["status"] == status for row in rows) for status in {row["status"] for row in rows}}
    right = [row for row in rows if row["status"] == "right"]
    whole = sum(row["coverage"] == 1.0 for row in right)
    none = sum(not row["quantized"] and not row["skips"] for row in right)
    told = [row["generate"] for row in right if "generate" in row]
    same, failing = told.count("same"), sum(text.startswith("eager") for text in told)
    lines = [
        f"{len(rows)} of {settings['families']} families under {settings['policy']}:",
        "",
        f"- {len(right)} right: within {settings['tolerance']:.0e} of the eager reference. {whole} have coverage 1.0, {none} no "
        f"weight that the policy names, {len(right) - whole - none} weights that are skipped, each with its reason "
        f"({sum(not row['quantized'] for row in right) - none} of them have nothing quantized, so that nothing was compared).",
        f"- {count.get('wrong', 0)} wrong, {count.get('crashed', 0)} crashed where plain `torch.compile` works.",
        f"- {count.get('unstable', 0)} unstable: the eager model's own outputs jump when its weights move by a millionth.",
        f"- {count.get('torch.compile fails too', 0)} that plain `torch.compile` cannot compile either, "
        f"{count.get('out of time', 0)} out of time.",
        f"- {count.get('not run', 0)} that general rules could not build or run eagerly.",
    ]
    if told:
        lines.append(
            f"- `generate`: {same} of {len(told)} right ones give the eager reference's {settings['new_tokens']} tokens, {failing} "
            f"do not generate eagerly either, {len(told) - same - failing} are listed with a reason."
        )
    how = "graphs compiled by Inductor" if settings["inductor"] else "graphs run as they are lowered, without Inductor"
    return "\n".join([*lines, "", f"{how[0].upper()}{how[1:]}; {where}."])


def families_open(rows: Sequence[Result]) -> str:
    """Families with something left to do."""
    found: list[list[str]] = []
    for row in rows:
        texts = list(row.get("skips", ()))
        if row["status"] in ("wrong", "crashed"):
            texts.insert(0, f"{row['status']}: {row.get('reason') or error_text(row)}")
        if row.get("generate", "same") != "same" and not row["generate"].startswith("eager"):
            texts.append(f"generate: {row['generate']}")
        if texts:
            found.append([row["family"], cell("; ".join(texts))])
    return markdown(["family", "what"], found)


def family_row(row: Result) -> list[str]:
    """A family that ran."""
    words = row.get("reason") or row.get("generate", NONE)
    coverage = NONE if not row["quantized"] and not row["skips"] else number(row["coverage"], 3)
    rounding = NONE if row["rounding"] is None else f"{row['rounding']:.1e}"
    return [row["family"], f"`{row['class']}`", str(row["graphs"]), coverage, error_text(row), rounding, cell(words)]


def error_text(row: Result) -> str:
    """A relative error; infinite ones are none in JSON."""
    return "other shape or NaN" if row["error"] is None else f"{row['error']:.0e}"


def cell(text: str) -> str:
    """Text that is no markup in a table."""
    return re.sub(r"([*_<>\[\]`])", r"\\\1", " ".join(text.split()))


TABLES: dict[str, Callable[[Path], str]] = {
    "generate": generate,
    "generate_first_token": generate_first_token,
    "generate_rest": generate_rest,
    "generate_torchao": generate_torchao,
    "first_token": first_token,
    "load": load,
    "attention_decode": attention_decode,
    "attention_prefill": attention_prefill,
    "long_contexts": long_contexts,
    "capacity": capacity,
    "generate_start": generate_start,
    "generate_cpu": generate_cpu,
    "e2e": e2e,
    "gemm": gemm,
    "gemm_gguf": gemm_gguf,
    "moe_e2e": moe_e2e,
    "moe": moe,
    "quality": quality,
    "kv_quality": kv_quality,
    "rounding": rounding,
    "rounding_peers": rounding_peers,
    "compile_time": compile_time,
    "newcomer": newcomer,
    "cpu_decode": cpu_decode,
    "mla": mla,
    "kernels": kernels,
    "self_contained": self_contained,
    "export": export,
    "tensor_parallel": tensor_parallel,
    "all_reduce": all_reduce,
    "all_reduce_error": all_reduce_error,
    "checkpoint_logits": checkpoint_logits,
    "families": families,
}


def render(text: str, results: Path = RESULTS, document: Path = README) -> str:
    """``text`` of ``document`` with every table filled anew.

    Raises:
        ValueError: a marker without its partner, or a table that nobody makes.
    """
    opened, closed = marked(text), re.findall(r"^<!-- end:(\w+) -->$", text, flags=re.M)
    if opened != closed or set(opened) - set(TABLES) or len(set(opened)) < len(opened):
        raise ValueError(f"tables opened: {opened}, closed: {closed}, known: {sorted(TABLES)}")
    for name in opened:
        made = relinked(TABLES[name](results), document)
        block = f"<!-- table:{name} -->\n" + (f"\n{made}\n\n" if made else "") + f"<!-- end:{name} -->"
        pattern = rf"^<!-- table:{name} -->$.*?^<!-- end:{name} -->$"
        text = re.sub(pattern, lambda _, block=block: block, text, flags=re.M | re.S)
    return text


def marked(text: str) -> list[str]:
    """Names of the tables that a document opens, in order."""
    return re.findall(r"^<!-- table:(\w+) -->$", text, flags=re.M)


def relinked(text: str, document: Path) -> str:
    """Links from the root turned to links from ``document``."""

    def turned(found: re.Match[str]) -> str:
        return f"]({Path(os.path.relpath(ROOT / found[1], document.parent)).as_posix()})"

    return re.sub(r"\]\((?![a-z]+:|#)([^)\s]+)\)", turned, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the status is 1 when ``--check`` finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a document is not up to date")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    stale = False
    for document in DOCUMENTS:
        before = document.read_text(encoding="utf-8")
        after = render(before, document=document)
        if before == after:
            continue
        stale = True
        if not args.check:
            document.write_text(after, encoding="utf-8")
        print(f"{document.relative_to(ROOT)}: {'out of date; run make docs' if args.check else 'rewritten'}")
    if not stale:
        print("all tables are up to date")
    return int(stale and args.check)


if __name__ == "__main__":
    sys.exit(main())
