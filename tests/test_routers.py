"""Routers are known by what the graph does with their scores; plans know the names and classes of the families' routers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

import quant_compile
from quant_compile.explain import explain
from quant_compile.model.plan import Plan
from quant_compile.policy import Policy
from tests.moe_support import TinyExperts, one_thread, randomize
from tests.runtime_support import CompileCounter, plain_inductor

__all__ = ["one_thread", "plain_inductor"]
pytestmark = pytest.mark.usefixtures("one_thread")

EXPERTS, KEPT = 6, "kept by convention: MoE router gate"
SHARED: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": EXPERTS, "num_experts_per_tok": 2,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": 61, "d_model": 64, "num_experts": EXPERTS, "pad_token_id": 0, "decoder_start_token_id": 1
}  # fmt: skip


def afmoe() -> nn.Module:
    fields = {"num_dense_layers": 0, "head_dim": 16, "num_shared_experts": 1, "n_group": 1, "topk_group": 1}
    return hf.AfmoeForCausalLM(hf.AfmoeConfig(**SHARED, **fields))


def gemma4() -> nn.Module:
    fields = {"enable_moe_block": True, "top_k_experts": 2, "head_dim": 16, "global_head_dim": 16}
    more = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 61, "num_kv_shared_layers": 0}
    return hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**SHARED, **fields, **more))


def hunyuan() -> nn.Module:
    return hf.HunYuanMoEV1ForCausalLM(hf.HunYuanMoEV1Config(**SHARED, moe_topk=2, head_dim=16))


def lfm2() -> nn.Module:
    config = hf.Lfm2MoeConfig(**SHARED, layer_types=["conv", "full_attention"], num_dense_layers=0)
    return hf.Lfm2MoeForCausalLM(config)


def nllb() -> nn.Module:
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1) | dict.fromkeys(
        ("encoder_ffn_dim", "decoder_ffn_dim"), 96
    )
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    sparse = {"encoder_sparse_step": 1, "decoder_sparse_step": 1, "max_position_embeddings": 64}
    return hf.NllbMoeForConditionalGeneration(hf.NllbMoeConfig(**ENCODER_DECODER, **sizes, **heads, **sparse))


def switch() -> nn.Module:
    layers = dict.fromkeys(
        ("num_layers", "num_decoder_layers", "num_sparse_encoder_layers", "num_sparse_decoder_layers"), 1
    )
    config = hf.SwitchTransformersConfig(**ENCODER_DECODER, **layers, d_kv=16, d_ff=96, num_heads=4)
    return hf.SwitchTransformersForConditionalGeneration(config)


def zaya() -> nn.Module:
    return hf.ZayaForCausalLM(hf.ZayaConfig(**(SHARED | {"num_experts_per_tok": 1, "head_dim": 16})))


# Family -> the end of its routers' names.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "afmoe": (afmoe, "mlp.router.gate"),
    "gemma4": (gemma4, "router.proj"),
    "hunyuan_v1_moe": (hunyuan, "mlp.gate.wg"),
    "lfm2_moe": (lfm2, "feed_forward.gate"),
    "nllb_moe": (nllb, "ffn.router.classifier"),
    "switch_transformers": (switch, "mlp.router.classifier"),
    "zaya": (zaya, "router_mlp.out_proj"),
}


def called(model: nn.Module) -> dict[str, Tensor]:
    """Arguments of one call."""
    ids = torch.arange(2, 11)[None]
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})  # type: ignore[union-attr]


def kept_in(model: nn.Module, end: str) -> dict[str, str | None]:
    lines = [line for line in quant_compile.report(model).lines if line.names[0].endswith(f"{end}.weight")]
    assert lines, f"no weight ends in {end}"
    return {line.names[0]: line.scheme for line in lines if KEPT not in line.reason}


@pytest.mark.parametrize("by", ["name", "graph"])
@pytest.mark.parametrize("family", FAMILIES)
def test_routers_of_families(
    family: str, by: str, plain_inductor: CompileCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantized by nobody, planned as traced; and found in the graph where no name and no class tells."""
    make, end = FAMILIES[family]
    torch._dynamo.reset()
    model = randomize(make())
    planned = {e.names[0]: e for e in Plan.of(Policy.load("W8A8"), model).entries if e.names[0].endswith(end)}
    assert planned and all(entry.decision.reason == KEPT for entry in planned.values())
    if by == "graph":
        from quant_compile import rules

        for known in ("CONVENTIONS", "FURTHER_CONVENTIONS"):
            left = tuple(rule for rule in getattr(rules, known) if rule.reason != rules.ROUTER)
            monkeypatch.setattr(rules, known, left)
        (first, *_) = planned
        entry = next(e for e in Plan.of(Policy.load("W8A8"), model).entries if e.names[0] == first)
        assert entry.scheme == "W8A8", "without names the plan cannot know"
    with torch.no_grad():
        torch.compile(model, backend="sglquant", options={"policy": "w8a8"})(**called(model))
    assert kept_in(model, end) == {}


def test_explain_says_what_compiling_does(plain_inductor: CompileCounter) -> None:
    model = Moe(lambda scores: scores.softmax(-1).topk(2, -1)).eval().requires_grad_(False)
    report = explain(model, {"x": torch.randn(3, 64)}, "W8A8").report
    line = next(line for line in report.lines if line.names[0] == "picker.weight")
    assert line.scheme is None and line.reason == KEPT


# --- by the graph alone -----------------------------------------------------------------------------------------------


class Moe(nn.Module):
    """Experts behind a linear whose name says nothing; ``choose``: scores [T, E] -> weights and ids [T, k]."""

    def __init__(self, choose: Callable[[Tensor], Any], experts: int = 5, bias: bool = False) -> None:
        super().__init__()
        self.picker = nn.Linear(64, experts, bias=bias)
        self.mixture = TinyExperts(experts, 64, 24)
        self.choose = choose

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.choose(self.picker(x))
        return x + self.mixture(x, ids, weights)


def grouped(scores: Tensor) -> Any:
    """As DeepSeek chooses: a correction, groups of experts, weights of the uncorrected scores."""
    probabilities = scores.float().sigmoid()
    corrected = probabilities + torch.arange(6) * 0.01
    groups = corrected.view(-1, 2, 3).topk(2, -1)[0].sum(-1)
    chosen = torch.zeros_like(groups).scatter_(1, groups.topk(1, -1)[1], 1)
    mask = chosen.unsqueeze(-1).expand(-1, 2, 3).reshape(-1, 6)
    ids = corrected.masked_fill(~mask.bool(), 0.0).topk(2, -1, sorted=False)[1]
    return probabilities.gather(1, ids).to(scores.dtype), ids


def by_sort(scores: Tensor) -> Any:
    values, order = scores.softmax(-1).sort(-1, descending=True)
    return values[:, :2], order[:, :2]


def by_argmax(scores: Tensor) -> Any:
    ids = scores.argmax(-1, keepdim=True)
    return scores.softmax(-1).gather(-1, ids), ids


def by_max(scores: Tensor) -> Any:
    values, ids = torch.max(scores.softmax(-1), dim=-1, keepdim=True)
    return values, ids


CHOICES: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "softmax, top-k": (lambda s: s.softmax(-1).topk(2, -1), 5),
    "top-k, softmax": (lambda s: (lambda t: (t.values.softmax(-1), t.indices))(s.topk(2, dim=-1)), 5),
    "groups": (grouped, 6),
    "sort": (by_sort, 5),
    "argmax": (by_argmax, 5),
    "max": (by_max, 5),
    "as many experts as a block": (lambda s: s.softmax(-1).topk(2, -1), 40),
}


def scheme_of(model: nn.Module, name: str) -> tuple[str | None, str]:
    line = next(line for line in quant_compile.report(model).lines if line.names[0] == f"{name}.weight")
    return line.scheme, line.reason


def run(model: nn.Module, *inputs: Tensor, policy: Any = "w8a8") -> None:
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend="sglquant", options={"policy": policy})(*inputs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("choice", CHOICES)
def test_a_linear_whose_choice_picks_experts_is_kept(choice: str, bias: bool, plain_inductor: CompileCounter) -> None:
    choose, experts = CHOICES[choice]
    model = Moe(choose, experts, bias).eval().requires_grad_(False)
    run(model, torch.randn(3, 64))
    assert scheme_of(model, "picker") == (None, KEPT)


def test_a_rule_wins_over_the_graph(plain_inductor: CompileCounter) -> None:
    model = Moe(CHOICES["sort"][0]).eval().requires_grad_(False)
    rules = [{"match": "picker", "scheme": "W8A16"}]
    run(model, torch.randn(3, 64), policy={"default": "W8A8", "rules": rules, "strict": True})
    assert scheme_of(model, "picker")[0] == "W8A16"


class Switch(nn.Module):
    """Experts in a ModuleList, each applied to all tokens under a mask of those that chose it."""

    def __init__(self) -> None:
        super().__init__()
        self.picker = nn.Linear(64, 4)
        self.mixture = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        probabilities = self.picker(x).float().softmax(-1)
        mask = F.one_hot(probabilities.argmax(-1), 4).to(x.dtype)
        parts = [mask[:, i : i + 1] * expert(x) for i, expert in enumerate(self.mixture)]
        return torch.stack(parts).sum(0) * probabilities.amax(-1, keepdim=True)


class Broken(nn.Module):
    """The graph ends between the choice and the experts, as transformers' loop over experts makes it end."""

    def __init__(self) -> None:
        super().__init__()
        self.picker = nn.Linear(64, 4)
        self.mixture = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.sin()
        weights, ids = self.picker(x).softmax(-1).topk(2, -1)
        torch._dynamo.graph_break()
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.mixture):
            out = out + expert(x) * (weights * (ids == i)).sum(-1, keepdim=True)
        return out


@pytest.mark.parametrize("kind", [Switch, Broken])
def test_experts_that_are_linears(kind: type[nn.Module], plain_inductor: CompileCounter) -> None:
    model = kind().eval().requires_grad_(False)
    run(model, torch.randn(3, 64))
    assert scheme_of(model, "picker") == (None, KEPT)
    assert scheme_of(model, "mixture.0")[0] == "W8A8"


class Sampler(nn.Module):
    """An output head of an unknown name, and a greedy next token that an embedding looks up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 64)
        self.words = nn.Linear(64, 12)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.table(ids)
        for _ in range(2):
            token = self.words(hidden).argmax(-1)
            hidden = self.table(token)
        return token, hidden


class Classifier(nn.Module):
    """Labels, and the best of them; how many are right; the five best."""

    def __init__(self) -> None:
        super().__init__()
        self.labels = nn.Linear(64, 8)

    def forward(self, x: Tensor, truth: Tensor) -> tuple[Tensor, ...]:
        scores = self.labels(x.tanh())
        values, best = scores.softmax(-1).topk(5, -1)
        return scores, values, best, (scores.argmax(-1) == truth).float().mean()


class Queries(nn.Module):
    """The tokens with the best scores are selected, as detectors select queries: the choice is along another dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.labels = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        best = self.labels(x).max(-1).values.topk(2, dim=1).indices
        return x.gather(1, best.unsqueeze(-1).expand(-1, -1, 64))


class Gated(nn.Module):
    """Soft weights without a choice, and attention with few keys."""

    def __init__(self) -> None:
        super().__init__()
        self.soft = nn.Linear(64, 4)
        self.keys = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        scores = (self.keys(x) @ x.transpose(-1, -2)).softmax(-1)
        best = scores.topk(2, -1).indices
        mask = torch.zeros_like(scores).scatter(-1, best, 1.0)
        return ((scores * mask) @ x) * self.soft(x).softmax(-1).amax(-1, keepdim=True)


OTHERS: list[tuple[type[nn.Module], str, Callable[[], tuple[Tensor, ...]]]] = [
    (Sampler, "words", lambda: (torch.arange(3)[None],)),
    (Classifier, "labels", lambda: (torch.randn(4, 64), torch.arange(4))),
    (Queries, "labels", lambda: (torch.randn(2, 4, 64),)),
    (Gated, "soft", lambda: (torch.randn(2, 4, 64),)),
    (Gated, "keys", lambda: (torch.randn(2, 4, 64),)),
]


@pytest.mark.parametrize(("kind", "name", "inputs"), OTHERS)
def test_what_is_no_router_is_quantized(
    kind: type[nn.Module], name: str, inputs: Callable[[], tuple[Tensor, ...]], plain_inductor: CompileCounter
) -> None:
    model = kind().eval().requires_grad_(False)
    run(model, *inputs())
    assert scheme_of(model, name)[0] == "W8A8"
