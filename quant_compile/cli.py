"""The command line ``sglquant``: policies, what they decide and cost, rewritten graphs, checkpoints, comparisons, a demo.

Models are built from their configuration; no command but ``convert``, ``compare``, ``attribute`` and ``search`` needs weights. Exit codes:
0 fine, 1 an error of the policy or the model (one text on stderr), 2 wrong usage; of ``diff`` 1 is a difference, 2 any error.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant_compile import cli_diff, cli_help, cli_measure
from quant_compile.cli_common import (
    TARGETS,
    console_of,
    model_arguments,
    model_spec,
    output,
    positive,
    quiet_transformers,
    report_error,
    this_machine,
)
from quant_compile.ir.errors import OptionError
from quant_compile.ir.family import bits_per_weight

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from quant_compile.lowering.target import Target
    from quant_compile.model.plan import Plan

FALLBACKS = ("weight_only", "fp8")
# What Dynamo calls a parameter or buffer of a module; "args_0" where forward is wrapped, as by transformers 5.24.
_DYNAMO_NAME = re.compile(r"\bl_(?:self|args_0)_modules_(\w+?)_(?:parameters|buffers)_(\w+)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed help or the mistake
        return int(stop.code or 0)
    try:
        return arguments.run(arguments)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        return 0
    except Exception as error:
        if arguments.traceback:
            raise
        return report_error(error)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="show the Python traceback of an error")
    parser = argparse.ArgumentParser(
        prog="sglquant",
        description="Quantize unmodified models through torch.compile.",
        epilog="sglquant COMMAND --help shows examples.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            parents=[common],
            help=text,
            description=text,
            epilog=cli_help.examples_of(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run=run)
        return made

    command("policies", _policies, "list the presets and the shipped policies, and what each costs")
    check = command("check", _check, "validate a policy against a model and show the plan; needs no weights")
    check.add_argument("policy", metavar="POLICY", help="preset, shipped policy or YAML file")
    check.add_argument(
        "--model", required=True, metavar="DIR_OR_ID", help="folder with config.json, GGUF file, or Hugging Face id"
    )
    check.add_argument("--full", action="store_true", help="one line for every weight")
    check.add_argument("--json", action="store_true", help="print the plan as JSON")
    model_arguments(check)
    inspect = command("inspect", _inspect, "show the rewritten graph and the kernels; needs no weights")
    inspect.add_argument("model", metavar="MODEL", help="folder with config.json, GGUF file, or Hugging Face id")
    inspect.add_argument(
        "--policy",
        metavar="P",
        help="preset, shipped policy or YAML file; none, or where the folder's checkpoint is quantized: show what load makes of it",
    )
    inspect.add_argument(
        "--fallback", choices=FALLBACKS, help="of a checkpoint: what serves where the target has no kernel for a scheme"
    )
    inspect.add_argument("--graph", choices=("before", "after", "diff"), help="which graph to print (default: after)")
    inspect.add_argument("--target", choices=TARGETS, help="show the kernels that this device would get")
    inspect.add_argument("--tokens", type=positive, default=16, metavar="N", help="tokens of the traced input")
    inspect.add_argument("--full", action="store_true", help="one line for every weight in the ledger")
    inspect.add_argument(
        "--html",
        type=output,
        metavar="FILE",
        help="write the report here: one file with the tree, graphs, kernels and totals",
    )
    model_arguments(inspect)
    cli_diff.add(command)
    convert = command(
        "convert", _convert, "quantize a checkpoint by a policy, or write a quantized one in another format"
    )
    convert.add_argument("source", metavar="SRC", help="folder with config.json and safetensors files, or GGUF file")
    convert.add_argument(
        "target", metavar="DST", help="folder or .gguf file to write; a checkpoint that is there is replaced at the end"
    )
    convert.add_argument(
        "--policy",
        metavar="P",
        help="preset, shipped policy or YAML file, for what SRC has in 16 bits; for more, where it says requantize",
    )
    convert.add_argument(
        "--format", metavar="F", help="format to write (default: compressed-tensors, or gguf by DST's name)"
    )
    convert.add_argument("--device", default="cpu", metavar="D", help="device to quantize on (default: cpu)")
    convert.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="dtype of what is not quantized (default: the config's)"
    )
    cli_measure.add(command)
    demo = command("demo", _demo, "quantize bundled small models with several policies and compare them")
    demo.add_argument("--full", action="store_true", default=None, help="show the ledger of each policy too")
    demo.add_argument("--policies", nargs="+", metavar="P", help="presets or policy files for the dense model")
    demo.add_argument("--moe-policies", nargs="*", metavar="P", help="of the mixture of experts; none: leave it out")
    demo.add_argument(
        "--model", metavar="DIR", help="folder made by examples/tiny_lm/train.py (default: the checkout's)"
    )
    demo.add_argument("--device", metavar="D", help="cpu or cuda (default: a GPU if there is one)")
    demo.add_argument("--html", type=output, metavar="FILE", help="write the last model's report here")
    cli_help.add(command, parser)
    return parser


def _policies(arguments: argparse.Namespace) -> int:
    console = console_of()
    console.print(_presets_table())
    console.print(_shipped_table())
    return 0


def _presets_table() -> Table:
    from rich.table import Table

    import quant_compile.lowering.schemes  # noqa: F401  # pyright: ignore[reportUnusedImport]  registers the presets
    from quant_compile.ir.scheme import PRESETS

    table = Table(title="presets", title_justify="left")
    for column in ("name", "weights", "inputs", "bits a weight", "what it costs"):
        table.add_column(column, justify="right" if column == "bits a weight" else "left")
    for name, scheme in sorted(PRESETS.items()):
        inputs = scheme.input_activations.spec if scheme.input_activations else "16 bits"
        table.add_row(name, scheme.weights.spec, inputs, f"{bits_per_weight(scheme):.3g}", _cost(scheme))
    return table


def _cost(scheme: Any) -> str:
    """What a scheme costs, in one line."""
    share = f"{bits_per_weight(scheme) / 16:.0%} of the bytes of bf16"
    inputs = scheme.input_activations
    if inputs is None:
        return f"{share}; multiplies in 16 bits, so it helps where weights are the bottleneck"
    if not inputs.dynamic:
        return f"{share}; inputs need calibrated scales"
    per = {"token": "for each token", "tensor": "for the whole input", "group": f"for {inputs.group_size} inputs"}
    if inputs.strategy == "tensor_group":
        return f"{share}; one scale for {inputs.group_size} inputs and one for the whole input, computed at run time"
    return f"{share}; one scale {per.get(inputs.strategy, inputs.strategy)} computed at run time"


def _shipped_table() -> Table:
    from rich.table import Table

    from quant_compile.policy import Policy, shipped_policies

    table = Table(title="shipped policies (files to copy and edit)", title_justify="left")
    for column in ("name", "default", "rules", "file"):
        table.add_column(column, overflow="fold")
    for name, path in shipped_policies().items():
        policy = Policy.load(path)
        default = policy.default.spec if policy.default else "keep"
        table.add_row(name, default, str(len(policy.rules)), str(path))
    return table


def _check(arguments: argparse.Namespace) -> int:
    from quant_compile.policy import Policy

    policy = Policy.load(arguments.policy)  # first, since a mistake in it needs no model
    quiet_transformers()
    from quant_compile.inspect.models import build_model
    from quant_compile.model.plan import Plan

    plan = Plan.of(policy, build_model(model_spec(arguments, arguments.model)))
    if arguments.json:
        print(plan.to_json())
    else:
        _print_plan(plan, arguments.full)
    _warn(plan, arguments.model)
    return 0


def _print_plan(plan: Plan, full: bool) -> None:
    """The plan, whose bytes are those of row form, and where this machine's kernels hold others."""
    from quant_compile.inspect.kernels import held, kernel_choices

    console, target = console_of(), this_machine()
    console.print(plan.table(full))
    for text in held(kernel_choices(plan, target), target):
        console.print(f"note: {text}", markup=False, soft_wrap=True)


def _warn(plan: Plan, source: str) -> None:
    """Print what is wrong with the plan of a model's ``source``; raises it if the policy is strict.

    Raises:
        PolicyError: weights in 16 bits would have a scheme that only files bring, or the policy is strict.
    """
    if not source.endswith(".gguf"):
        plan.enforce_quantizers()
    if plan.policy.strict:
        plan.enforce()
    for note in (*plan.problems, *([plan.calibration_note] if plan.calibration_note else [])):
        print(f"warning: {note}", file=sys.stderr)


def _inspect_checkpoint(arguments: argparse.Namespace) -> int:
    quiet_transformers()
    from quant_compile.lowering.target import Target
    from quant_compile.pretrained import plan_of

    target = Target.fake(arguments.target) if arguments.target else None
    plan = plan_of(arguments.model, arguments.policy, fallback=arguments.fallback, target=target)
    console = console_of()
    console.print(plan.table(arguments.full))
    for note in (*plan.notes, *plan.serving()):
        console.print(f"note: {note}", markup=False)
    return 0


def _is_quantized(source: str) -> bool:
    """Whether it is the folder of a quantized checkpoint, with its weights, or a GGUF file."""
    from quant_compile.checkpoints.config import describe

    folder = Path(source)
    if folder.suffix == ".gguf":
        return True
    return folder.is_dir() and any(folder.glob("*.safetensors")) and bool(describe(folder).method)


def _inspect(arguments: argparse.Namespace) -> int:
    quantized = arguments.graph is None and _is_quantized(arguments.model)
    if arguments.html and quantized:
        raise OptionError(
            f"--html draws graphs that a policy makes of a model, and {arguments.model} is quantized already.\n"
            "Fix: leave --html out, or write quant_compile.report(quant_compile.load(FOLDER)).html(FILE) after a call."
        )
    if quantized or (arguments.policy is None and not arguments.html):
        return _inspect_checkpoint(arguments)
    from quant_compile.lowering.target import Target, default_policy
    from quant_compile.policy import Policy

    target = Target.fake(arguments.target) if arguments.target else this_machine()
    policy = Policy.load(arguments.policy or default_policy(target))
    quiet_transformers()
    from quant_compile.explain import explain
    from quant_compile.inspect.models import build_model, example_inputs
    from quant_compile.model.plan import Plan

    model = build_model(model_spec(arguments, arguments.model))
    plan = Plan.of(policy, model)
    _warn(plan, arguments.model)
    console = console_of()
    # First, because it also shows why nothing can run a weight, which stops the rest.
    if arguments.target and not arguments.html:
        _print_kernels(console, plan, target)
    explanation = explain(model, example_inputs(model, arguments.tokens), policy, target)
    if arguments.graph or not (arguments.target or arguments.html):
        _print_graph(arguments.graph or "after", explanation.before, explanation.after)
    if arguments.html:
        print(f"report: {explanation.report.html(arguments.html)}")
        return 0
    console.print(explanation.report.table(arguments.full))
    return 0


def _print_graph(which: str, before: Sequence[str], after: Sequence[str]) -> None:
    before, after = ([_DYNAMO_NAME.sub(_plain_name, line) for line in graph] for graph in (before, after))
    if which == "diff":
        lines = list(difflib.unified_diff(before, after, "before", "after", lineterm=""))
    else:
        lines = before if which == "before" else after
    print("\n".join(lines))


def _plain_name(found: re.Match[str]) -> str:
    """``l_self_modules_mlp_modules_up_proj_parameters_weight_`` -> ``mlp.up_proj.weight``."""
    return f"{found[1].replace('_modules_', '.')}.{found[2].rstrip('_')}"


def _print_kernels(console: Console, plan: Plan, target: Target) -> None:
    from quant_compile.inspect.kernels import kernel_choices, kernels_table, refusals_table

    choices = kernel_choices(plan, target)
    console.print(kernels_table(choices, target))
    console.print(refusals_table(choices))


def _convert(arguments: argparse.Namespace) -> int:
    quiet_transformers()
    from quant_compile.saving import convert

    given = {"format": arguments.format} if arguments.format else {}
    source, target = arguments.source, arguments.target
    print(convert(source, target, arguments.policy, dtype=arguments.dtype, device=arguments.device, **given))
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    names = ("full", "policies", "moe_policies", "model", "device", "html")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    return int(importlib.import_module("quant_compile.demo").main(**given) or 0)


if __name__ == "__main__":
    sys.exit(main())
