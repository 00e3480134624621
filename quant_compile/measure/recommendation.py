"""What ``recommend`` answers, as data: a policy with its reasons, the kernels that would serve and the costs; tables, YAML and JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from quant_compile.lowering.target import Target
from quant_compile.measure.comparison import size_text
from quant_compile.measure.devices import Device
from quant_compile.measure.roofline import BATCH, CONTEXT, PROMPT, Cost
from quant_compile.policy import Policy

WIDTH = 150


@dataclass(frozen=True)
class Served:
    """Weights of one problem and what runs them on the target."""

    weights: tuple[str, ...]
    scheme: str
    size: str
    kernels: str


@dataclass(frozen=True)
class Recommendation:
    """A policy for a goal, and why.

    Attributes:
        goal: its name.
        model: class and parameters.
        device: as estimates see it.
        target: what kernels were chosen for.
        policy: to compile with, or to save.
        reasons: sentences.
        kernels: of each problem of the model.
        costs: of 16 bits, of the policy, then of the other schemes that the target has kernels for; bounds, see ``roofline``.
    """

    goal: str
    model: str
    device: Device
    target: Target = field(repr=False)
    policy: Policy
    reasons: tuple[str, ...]
    kernels: tuple[Served, ...]
    costs: tuple[Cost, ...]

    @property
    def yaml(self) -> str:
        """The policy's file, the reasons as comments."""
        head = [
            f"# {self.goal} on {self.device.name} ({self.target.label}), {self.model}",
            *(f"# {text}" for text in self.reasons),
        ]
        return "\n".join(head) + "\n" + yaml.safe_dump(self.policy.to_dict(), sort_keys=False, width=120)

    def save(self, path: str | Path) -> Path:
        """Write the policy's file; ``Policy.load`` of it equals ``policy``."""
        path = Path(path)
        path.write_text(self.yaml, encoding="utf-8")
        return path

    def to_json(self, path: str | Path | None = None) -> str:
        """All of it as JSON; written to ``path`` as well if one is given."""
        data = {
            "goal": self.goal,
            "model": self.model,
            "device": asdict(self.device),
            "target": self.target.label,
            "policy": self.policy.to_dict(),
            "reasons": list(self.reasons),
            "kernels": [asdict(served) for served in self.kernels],
            "costs": [asdict(found) for found in self.costs],
        }
        text = json.dumps(data, indent=1) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def tables(self) -> tuple[Table, Table]:
        """Costs, and kernels."""
        caption = (
            f"at best, by bytes and operations: step: {BATCH} sequences; {CONTEXT} tokens kept each; prompt: {PROMPT} tokens. "
            "Room: tokens of K and V beside the weights"
        )
        costs = Table(
            title=f"{self.model} on {self.device.name}", title_justify="left", caption=caption, caption_justify="left"
        )
        for name in (
            "policy",
            "weights",
            "K and V, 1k tokens",
            "ms a token",
            f"ms a step of {BATCH}",
            "prompt, tokens/s",
            "room",
        ):
            costs.add_column(name, justify="left" if name == "policy" else "right")
        for found in self.costs:
            kept = "–" if found.kv_bytes is None else size_text(found.kv_bytes)
            room = "–" if found.room is None else f"{found.room:,}" if found.room else "does not fit"
            step = f"{found.ms_step:.3g} ({found.step_bound})"
            costs.add_row(
                found.name, size_text(found.bytes), kept, f"{found.ms_token:.3g}", step, f"{found.prefill:,.0f}", room
            )
        table = Table(title=f"kernels on {self.target.label}", title_justify="left")
        for name in ("weights", "scheme", "size", "kernels"):
            table.add_column(name, overflow="fold")
        for served in self.kernels:
            table.add_row(*map(escape, ("\n".join(served.weights), served.scheme, served.size, served.kernels)))
        return costs, table

    def __str__(self) -> str:
        console = Console(width=WIDTH, file=None)
        with console.capture() as capture:
            console.print(self.yaml, markup=False, highlight=False, soft_wrap=True)
            for table in self.tables():
                console.print(table)
        return capture.get()
