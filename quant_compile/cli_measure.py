"""The commands that measure or estimate: ``recommend``, ``compare``, ``attribute``, ``search``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from quant_compile.cli_common import (
    TARGETS,
    Command,
    console_of,
    existing,
    model_arguments,
    model_spec,
    output,
    positive,
    quiet_transformers,
)
from quant_compile.ir.errors import OptionError


def add(command: Command) -> None:
    """Add them; ``command`` makes the parser of one, by its name, its function and its help."""
    _add_recommend(command)
    _add_compare(command)
    _add_attribute_and_search(command)


def _add_recommend(command: Command) -> None:
    recommend = command("recommend", _recommend, "which policy for which purpose, why, and its costs; needs no weights")
    recommend.add_argument("model", metavar="MODEL", help="folder with config.json, GGUF file, or Hugging Face id")
    recommend.add_argument(
        "--goal", required=True, metavar="G", help="memory, throughput, long-context, latency or sensitive"
    )
    recommend.add_argument(
        "--gpu", "--target", metavar="D", help="h100, rtx4090, sm90, cpu, ... (default: this machine's)"
    )
    recommend.add_argument("--out", type=output, metavar="FILE", help="write the policy here")
    recommend.add_argument("--json", action="store_true", help="print everything as JSON")
    model_arguments(recommend)


def _add_compare(command: Command) -> None:
    compare = command("compare", _compare, "policies side by side on your text: bits, perplexity, divergence, speed")
    compare.add_argument("model", metavar="MODEL", help="folder with weights in 16 bits, or Hugging Face id")
    compare.add_argument("text", metavar="TEXT", help="a text file, or the text itself")
    compare.add_argument("--policies", nargs="+", required=True, metavar="P", help="presets, policy files, or keep")
    compare.add_argument("--tokenizer", metavar="T", help="folder, id or tokenizer.json (default: the model's)")
    compare.add_argument("--length", type=positive, metavar="N", help="tokens predicted in a window (default: 512)")
    compare.add_argument("--windows", type=positive, default=16, metavar="N", help="windows at most (default: 16)")
    compare.add_argument("--batch", type=positive, default=1, metavar="B", help="sequences that generate is timed with")
    compare.add_argument(
        "--new-tokens", type=int, default=64, metavar="N", help="that generate makes; 0: speed is not measured"
    )
    compare.add_argument("--device", metavar="D", help="cpu or cuda (default: a GPU if there is one)")
    compare.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="of the model (default: the config's)")
    compare.add_argument("--json", type=output, metavar="FILE", help="write the rows here")
    compare.add_argument(
        "--plot", type=output, metavar="FILE", help="draw them here (PNG, SVG or PDF); needs matplotlib"
    )


def _add_attribute_and_search(command: Command) -> None:
    attribute = command("attribute", _attribute, "what each quantized weight costs, the worst first")
    search = command("search", _search, "find a scheme for every weight under a budget, and write the policy")
    for parser in (attribute, search):
        parser.add_argument("model", metavar="MODEL", help="folder with config.json and weights, or Hugging Face id")
        parser.add_argument("--text", type=existing, required=True, metavar="FILE", help="text to measure with")
        parser.add_argument("--tokenizer", metavar="T", help="folder, tokenizer.json or id (default: the model's)")
        parser.add_argument(
            "--length", type=positive, default=512, metavar="N", help="tokens predicted in a window (default: 512)"
        )
        parser.add_argument("--count", type=positive, default=8, metavar="N", help="windows (default: 8)")
        parser.add_argument(
            "--dtype", choices=("bf16", "fp16", "fp32"), help="of the model (default: the checkpoint's)"
        )
        parser.add_argument("--device", metavar="D", help="cpu or cuda (default: a GPU if there is one)")
        parser.add_argument("--json", type=output, metavar="FILE", help="write the numbers here too")
        parser.add_argument(
            "--plot", type=output, metavar="FILE", help="draw them: .png; of a search .html and .svg too"
        )
    attribute.add_argument("--policy", required=True, metavar="P", help="preset, shipped policy or YAML file")
    attribute.add_argument("--top", type=positive, metavar="N", help="divergences of the N with the largest own error")
    for what, text in (
        ("bits", "of a decided weight, on average"),
        ("bytes", "of the whole model"),
        ("ms", "of linears and experts over --m"),
        ("error", "KL divergence in nats"),
    ):
        search.add_argument(f"--{what}", type=float, metavar="X", help=f"budget: {text}")
    search.add_argument(
        "--out", type=output, default="search.yaml", metavar="FILE", help="the policy (default: search.yaml)"
    )
    search.add_argument("--schemes", nargs="+", metavar="S", help="presets, specs such as int4.group32+16, and keep")
    search.add_argument("--sensitivity", choices=("kl", "fisher"), default="kl", help="how choices are measured")
    search.add_argument(
        "--m", type=_profile, metavar="M:COUNT,...", help="how often each number of rows is run: 1:128,512:1"
    )
    search.add_argument("--target", choices=TARGETS, help="times of this device, by estimates")
    search.add_argument("--points", type=int, default=8, metavar="N", help="other budgets to show (default: 8)")


def _profile(text: str) -> dict[int, float]:
    try:
        pairs = [part.partition(":") for part in text.split(",")]
        return {int(m): float(count or 1) for m, _, count in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no profile such as 1:128,512:1") from None


def _recommend(arguments: argparse.Namespace) -> int:
    from quant_compile.measure.goals import goal_of
    from quant_compile.measure.recommend import recommend

    goal_of(arguments.goal)  # first, since a mistake in it needs no model
    quiet_transformers()
    from quant_compile.inspect.models import build_model

    found = recommend(build_model(model_spec(arguments, arguments.model)), arguments.gpu, arguments.goal)
    if arguments.json:
        print(found.to_json(), end="")
    else:
        print(found.yaml)
        for table in found.tables():
            console_of().print(table)
    if arguments.out:
        found.save(arguments.out)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from quant_compile.measure.compare import compare, labelled
    from quant_compile.measure.figures import drawable
    from quant_compile.measure.loading import load_model

    labelled(arguments.policies)  # first, since a mistake in one needs no model
    if arguments.plot:
        drawable(arguments.plot)
    quiet_transformers()
    model = load_model(arguments.model, arguments.dtype, arguments.device)
    result = compare(
        model,
        arguments.policies,
        arguments.text,
        tokenizer=arguments.tokenizer or arguments.model,
        length=arguments.length,
        windows=arguments.windows,
        batch=arguments.batch,
        new_tokens=arguments.new_tokens,
    )
    console_of().print(result.table())
    if arguments.json:
        result.to_json(arguments.json)
    if arguments.plot:
        result.plot(arguments.plot)
    return 0


def _measured_with(arguments: argparse.Namespace) -> tuple[Any, list[Any]]:
    """The model, and batches of the text on its device."""
    quiet_transformers()
    from quant_compile.measure.loading import load_model
    from quant_compile.measure.text import windows_for

    model = load_model(arguments.model, arguments.dtype, arguments.device)
    tokenizer = arguments.tokenizer or arguments.model
    windows = windows_for(model, arguments.text, tokenizer, arguments.length, arguments.count)
    return model, list(windows[:, :-1].to(model.device).split(1))


def _attribute(arguments: argparse.Namespace) -> int:
    from quant_compile.measure.attribute import attribute
    from quant_compile.measure.figures import drawable
    from quant_compile.policy import Policy

    policy = Policy.load(arguments.policy)  # first, since a mistake in it needs no model
    if arguments.plot:
        drawable(arguments.plot)
    model, batches = _measured_with(arguments)
    return _shown(attribute(model, batches, policy, top=arguments.top, progress=sys.stderr.isatty()), arguments)


def _search(arguments: argparse.Namespace) -> int:
    from quant_compile.measure.figures import drawable
    from quant_compile.measure.front import ALONE
    from quant_compile.measure.search import BUDGETS, check_options, search

    budget = {what: value for what in BUDGETS if (value := getattr(arguments, what)) is not None}
    if not budget:
        raise OptionError(f"a search needs a budget. Fix: one or more of {', '.join(f'--{what}' for what in BUDGETS)}.")
    check_options(budget, arguments.sensitivity, arguments.m, arguments.points)
    if arguments.plot:
        drawable(arguments.plot, ALONE)
    model, batches = _measured_with(arguments)
    found = search(
        model,
        batches,
        budget=budget,
        schemes=arguments.schemes,
        path=arguments.out,
        sensitivity=arguments.sensitivity,
        m=arguments.m,
        target=arguments.target,
        points=arguments.points,
        progress=sys.stderr.isatty(),
    )
    return _shown(found, arguments)


def _shown(found: Any, arguments: argparse.Namespace) -> int:
    print(found)
    if arguments.json:
        found.to_json(arguments.json)
    if arguments.plot:
        found.plot(arguments.plot)
    return 0
