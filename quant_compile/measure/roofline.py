"""What a model under a policy holds and at best takes on a device: bytes over bandwidth or operations over rate, whichever is more.

Reads a plan and the kernels chosen for it. Times are bounds: kernels reach a share of the roofs, launches and norms are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quant_compile.generation.facts import LayerShape, cache_shape, mixin
from quant_compile.inspect.kernels import KernelChoice
from quant_compile.ir.moe import MoeProblem
from quant_compile.ir.scheme import Scheme
from quant_compile.measure.devices import Device
from quant_compile.model.plan import Plan, PlanEntry

BATCH, CONTEXT, PROMPT = 64, 1024, 2048
SCALE_BYTES = 4  # K and V in codes have an f32 scale for each token and head
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "top_k_experts",
    "moe_k",
    "experts_per_token",
)


@dataclass(frozen=True)
class Cost:
    """What a policy holds and takes at best; ``None`` where the model keeps no K and V, or the memory is not known.

    Attributes:
        name: the policy, or ``16 bits``.
        bytes: of all parameters.
        kv_bytes: of K and V for 1000 tokens.
        ms_token: milliseconds a token of one sequence, CONTEXT tokens kept.
        ms_step: the same of a step of BATCH sequences, each with CONTEXT tokens kept.
        step_bound: ``memory`` or ``compute``: what bounds the products of that step.
        prefill: tokens a second of a prompt of PROMPT tokens.
        room: tokens of K and V that fit beside the weights in nine tenths of the memory; 0 where the weights do not.
    """

    name: str
    bytes: int
    kv_bytes: int | None
    ms_token: float
    ms_step: float
    step_bound: str
    prefill: float
    room: int | None


@dataclass(frozen=True)
class Load:
    """Weights that are multiplied alike.

    Attributes:
        weights: how many numbers, of all experts.
        bytes: that are read of them, where all experts are.
        scheme: None: 16 bits.
        experts: of a block; 1 for linears.
        chosen: experts of a token.
        head: the output head, which sees the last token of a prompt only.
    """

    weights: int
    bytes: int
    scheme: Scheme | None = None
    experts: int = 1
    chosen: int = 1
    head: bool = False

    def seconds(self, m: int, device: Device) -> tuple[float, float]:
        """(of reading, of multiplying) for ``m`` tokens; of experts, those that some token is expected to choose are read."""
        share = self.chosen / self.experts
        read = self.bytes * (1 - (1 - share) ** m) / (device.bandwidth * 1e9)
        return read, 2 * m * self.weights * share / (_rate(self.scheme, device) * 1e12)


def _rate(scheme: Scheme | None, device: Device) -> float:
    inputs = None if scheme is None else scheme.input_activations
    if inputs is None:
        return device.math16
    return device.math4 or device.math8 if inputs.num_bits == 4 else device.math8


def top_k_of(config: Any) -> int | None:
    """Experts of a token, as far as the config tells."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = (getattr(text, name, None) for name in _TOP_K)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def plain_loads(plan: Plan, top_k: int) -> list[Load]:
    """Of the model in 16 bits."""
    return [_kept(entry, top_k) for entry in plan.entries]


def loads(plan: Plan, choices: Sequence[KernelChoice], top_k: int) -> list[Load]:
    """Of a plan whose quantized weights have kernels."""
    out = [_kept(entry, top_k) for entry in plan.entries if entry.decision.scheme is None]
    for choice in choices:
        problem, count = choice.problem, sum(_numbers(entry) for entry in choice.entries)
        experts = problem.experts if isinstance(problem, MoeProblem) else 1
        out.append(Load(count, choice.bytes_packed, problem.scheme, experts, min(top_k, experts)))
    return out


def _kept(entry: PlanEntry, top_k: int) -> Load:
    experts = entry.shape[0] if entry.kind == "moe" and len(entry.shape) == 3 else 1
    head = "output head" in entry.decision.reason
    return Load(_numbers(entry), entry.bytes_before, None, experts, min(top_k, experts), head)


def _numbers(entry: PlanEntry) -> int:
    count = 1
    for size in entry.shape:
        count *= size
    return count


@dataclass(frozen=True)
class Cache:
    """What K and V of a model take.

    Attributes:
        layers: None: the model keeps none, or transformers does not say.
        width: numbers of all heads' queries in a layer, for attention over a prompt.
    """

    layers: tuple[LayerShape, ...] | None
    width: int

    @staticmethod
    def of(model: Any) -> Cache:
        """Of a model, on any device."""
        known = mixin(model) is not None and hasattr(model, "_get_static_cache_init_shape")
        layers = cache_shape(model) if known else None
        config: Any = getattr(model, "config", None)
        config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        heads = getattr(config, "num_attention_heads", None) or 0
        size = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", 0) // heads if heads else 0)
        return Cache(None if layers is None else tuple(layers), heads * size)

    def bytes(self, codes: bool) -> int | None:
        """For one token."""
        if self.layers is None:
            return None
        sizes = [(layer.heads, layer.size) for layer in self.layers]
        sizes += [(layer.value_heads, layer.value_size) for layer in self.layers]
        return sum(heads * (size + SCALE_BYTES if codes else 2 * size) for heads, size in sizes)


def cost(name: str, held: int, found: Sequence[Load], cache: Cache, codes: bool, device: Device) -> Cost:
    """What weights, ``held`` bytes in all, and a cache cost."""
    kept = cache.bytes(codes)
    reading = CONTEXT * (kept or 0) / (device.bandwidth * 1e9)
    step, bound = _seconds(found, BATCH, device)
    layers = 0 if cache.layers is None else len(cache.layers)
    attention = 2 * PROMPT**2 * cache.width * layers / (device.math16 * 1e12)
    prompt = _seconds(found, PROMPT, device, heads=1)[0] + attention
    room = None
    if device.memory and kept:
        room = max(0, int((0.9e9 * device.memory - held) / kept))
    return Cost(
        name,
        held,
        None if kept is None else 1000 * kept,
        1e3 * (_seconds(found, 1, device)[0] + reading),
        1e3 * (step + BATCH * reading),
        bound,
        PROMPT / prompt if prompt else float("inf"),
        room,
    )


def _seconds(found: Sequence[Load], m: int, device: Device, heads: int | None = None) -> tuple[float, str]:
    """Of all products of ``m`` tokens, and what bounds most of that time; ``heads``: tokens that the output head sees."""
    bounds = {"memory": 0.0, "compute": 0.0}
    for load in found:
        read, math = load.seconds(m if heads is None or not load.head else heads, device)
        bounds["memory" if read >= math else "compute"] += max(read, math)
    return sum(bounds.values()), max(bounds, key=lambda name: bounds[name])
