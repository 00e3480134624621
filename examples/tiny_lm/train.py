"""Train the two bundled models: a small dense Llama and a small Qwen3-MoE on the Python standard library's sources.

    python3 examples/tiny_lm/train.py --out DIR --minutes 1.7           # on a GPU, both models
    python3 examples/tiny_lm/train.py --out DIR --device cpu --steps 3 --tiny

Reads the running interpreter's standard library; writes ``DIR/{tokenizer.json, heldout.txt, train_log.json}`` and
``DIR/{dense,moe}/{config.json, model.safetensors}`` (bf16). Forward and backward run in bf16 on a bf16 copy of f32
master weights, so that what is saved is exactly what was trained and measured.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from corpus import encode, heldout_text, read_corpus, train_tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

VOCAB = 2048
MAX_MODEL_BYTES = 10_000_000
AUX_LOSS = 0.02
TRAIN_EXPERTS = "every_expert_on_every_token"


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train. Rates are AdamW's; ``minutes`` or ``epochs`` ends it, whichever comes first."""

    minutes: float
    steps: int | None
    batch: int = 64
    length: int = 512
    rate: float = 3e-3
    warmup: int = 150
    weight_decay: float = 0.1
    epochs: float = 24.0
    checks: int = 10


@dataclass
class Log:
    """What happened: training loss over time, held-out loss at checkpoints (nats per token), seconds, sizes."""

    loss: list[tuple[int, float]] = field(default_factory=list)
    heldout: list[tuple[int, float]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    epochs: float = 0.0
    parameters: int = 0
    file_bytes: int = 0
    best_step: int = 0
    final_heldout_loss: float = 0.0
    final_heldout_perplexity: float = 0.0


def dense_config(tiny: bool) -> LlamaConfig:
    """Llama, every dimension a multiple of 128 where group and block schemes divide it. Untied lm_head."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2 if tiny else 5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )


def moe_config(tiny: bool) -> Qwen3MoeConfig:
    """Qwen3-MoE: 8 experts, 2 per token, in every layer. Tied lm_head."""
    return Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        moe_intermediate_size=128,
        num_hidden_layers=2 if tiny else 4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        norm_topk_prob=True,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )


def every_expert(experts: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts' sum for ``hidden`` [t, h], computed densely: an expert that was not chosen has weight 0.

    Four times the work of the two chosen experts, in two plain matmuls: at this size that is faster than gathering, and
    its backward has no alignment rules, unlike grouped matmul's.
    """
    tokens = hidden.shape[0]
    weights = hidden.new_zeros(tokens, experts.num_experts).scatter(1, top_k_index, top_k_weights.to(hidden.dtype))
    gate, up = torch.matmul(hidden, experts.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)
    inner = experts.act_fn(gate) * up * weights.t().unsqueeze(-1)
    flat = inner.permute(1, 0, 2).reshape(tokens, -1)
    return flat @ experts.down_proj.transpose(1, 2).reshape(-1, hidden.shape[1])


def balance_loss(router_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """Switch Transformer's load balancing loss (arXiv 2101.03961, eq. 4 to 6), mean over layers; 1 is even load."""
    losses: list[Tensor] = []
    for logits in router_logits:
        probs = logits.float().softmax(-1)
        chosen = torch.zeros_like(probs).scatter(1, probs.topk(top_k, dim=-1).indices, 1.0)
        losses.append(probs.shape[1] / top_k * (chosen.mean(0) * probs.mean(0)).sum())
    return torch.stack(losses).mean()


def token_loss(model: PreTrainedModel, window: Tensor, balance: bool) -> tuple[Tensor, Tensor]:
    """(loss to minimise, cross entropy in nats per token) of ``window`` [b, length + 1]."""
    extra = {"output_router_logits": True} if balance else {}
    out = model(input_ids=window[:, :-1], use_cache=False, **extra)
    entropy = F.cross_entropy(out.logits.flatten(0, 1).float(), window[:, 1:].flatten())
    if not balance:
        return entropy, entropy
    return entropy + AUX_LOSS * balance_loss(out.router_logits, model.config.num_experts_per_tok), entropy


@torch.no_grad()
def heldout_loss(model: PreTrainedModel, ids: Tensor, length: int, windows: int) -> float:
    """Mean cross entropy (nats per token) over the first ``windows`` windows of ``ids`` [n], side by side."""
    model.eval()
    count = min(windows, (ids.numel() - 1) // length)
    total = torch.zeros((), device=ids.device, dtype=torch.float64)
    for first in range(0, count, 16):
        rows = range(first, min(first + 16, count))
        window = torch.stack([ids[row * length : row * length + length + 1] for row in rows]).long()
        total += token_loss(model, window, balance=False)[1].double() * len(rows)
    model.train()
    return float(total) / count


class MasterWeights:
    """f32 copies of a bf16 model's parameters, stepped by AdamW and rounded back into the model."""

    def __init__(self, model: PreTrainedModel, recipe: Recipe) -> None:
        self.live = list(model.parameters())
        self.master = [p.detach().float().clone() for p in self.live]
        decayed = [m for m in self.master if m.dim() >= 2]
        plain = [m for m in self.master if m.dim() < 2]
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        fused = self.master[0].is_cuda
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.95), fused=fused)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One AdamW step from the live parameters' gradients (clipped to norm 1), which it clears."""
        for master, live in zip(self.master, self.live, strict=True):
            master.grad = live.grad.float() if live.grad is not None else torch.zeros_like(master)
            live.grad = None
        torch.nn.utils.clip_grad_norm_(self.master, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        torch._foreach_copy_([p.detach() for p in self.live], self.master)


def learning_rate(recipe: Recipe, step: int, progress: float) -> float:
    """Linear warm-up over ``recipe.warmup`` steps, then a cosine over ``progress`` (0 to 1) down to 2 %."""
    warm = min(1.0, (step + 1) / recipe.warmup)
    return recipe.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(model: PreTrainedModel, data: Tensor, heldout: Tensor, recipe: Recipe, say: Callable[[str], None]) -> Log:
    """Train in place on ``data`` [n] token ids; the weights of the best held-out checkpoint are what remains.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    balance = isinstance(model, Qwen3MoeForCausalLM)
    weights = MasterWeights(model, recipe)
    log = Log(parameters=sum(p.numel() for p in model.parameters()))
    draw = torch.Generator(device=data.device).manual_seed(1)
    reach = torch.arange(recipe.length + 1, device=data.device)
    per_step = recipe.batch * recipe.length
    best = (math.inf, [p.detach().clone() for p in weights.live])
    start, progress, losses, checked = time.monotonic(), 0.0, [], 0
    while progress < 1.0:
        offsets = torch.randint(data.numel() - recipe.length - 1, (recipe.batch, 1), generator=draw, device=data.device)
        loss, entropy = token_loss(model, data[offsets + reach].long(), balance)
        loss.backward()
        weights.step(learning_rate(recipe, log.steps, progress))
        losses.append(entropy.detach())
        log.steps += 1
        if log.steps % 25 == 0 and data.is_cuda:
            torch.cuda.synchronize()  # else the host runs ahead and the clock lies
        log.epochs = log.steps * per_step / data.numel()
        elapsed = (time.monotonic() - start) / (60 * recipe.minutes)
        progress = log.steps / recipe.steps if recipe.steps else max(elapsed, log.epochs / recipe.epochs)
        if progress * recipe.checks >= checked + 1:
            checked = int(progress * recipe.checks)
            best = check(model, heldout, recipe, log, losses, best, say)
            losses = []
    with torch.no_grad():
        torch._foreach_copy_([p.detach() for p in weights.live], best[1])
    log.seconds, log.tokens = time.monotonic() - start, log.steps * per_step
    return log


def check(
    model: PreTrainedModel,
    heldout: Tensor,
    recipe: Recipe,
    log: Log,
    losses: list[Tensor],
    best: tuple[float, list[Tensor]],
    say: Callable[[str], None],
) -> tuple[float, list[Tensor]]:
    """Log the mean training loss since the last check and the held-out loss now; return the better weights."""
    mean = float(torch.stack(losses).mean())
    if not math.isfinite(mean):
        raise FloatingPointError(f"loss is {mean} at step {log.steps}: lower --rate")
    now = heldout_loss(model, heldout, recipe.length, windows=128)
    log.loss.append((log.steps, round(mean, 4)))
    log.heldout.append((log.steps, round(now, 4)))
    say(f"  step {log.steps} epoch {log.epochs:.1f} train {mean:.3f} held-out {now:.3f} (ppl {math.exp(now):.2f})")
    if now >= best[0]:
        return best
    log.best_step = log.steps
    return now, [p.detach().clone() for p in model.parameters()]


def save(model: PreTrainedModel, folder: Path) -> int:
    """Write config.json and model.safetensors, nothing else; returns the weight file's bytes.

    Raises:
        ValueError: the weight file is larger than ``MAX_MODEL_BYTES``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(Path(scratch) / name, folder / name)
    size = (folder / "model.safetensors").stat().st_size
    if size > MAX_MODEL_BYTES:
        raise ValueError(f"{folder}/model.safetensors has {size} bytes, more than {MAX_MODEL_BYTES}")
    return size


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what this ran, for the log."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else (platform.processor() or platform.machine())
    return {
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=1.7, help="training time for each model")
    parser.add_argument("--steps", type=int, default=None, help="a fixed number of steps instead of a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rate", type=float, default=Recipe.rate)
    parser.add_argument("--epochs", type=float, default=Recipe.epochs)
    parser.add_argument("--models", nargs="+", choices=("dense", "moe"), default=["dense", "moe"])
    parser.add_argument("--sources", type=Path, default=None, help="a copy of the standard library to train on")
    parser.add_argument("--tiny", action="store_true", help="smoke run: two layers, small batches, 2 MB of text")
    return parser.parse_args(argv)


def build(name: str, tiny: bool, device: torch.device) -> PreTrainedModel:
    """A freshly initialised bf16 model, the same on every run."""
    torch.manual_seed(0)
    if name == "dense":
        return LlamaForCausalLM(dense_config(tiny)).to(device, torch.bfloat16).train()
    model = Qwen3MoeForCausalLM(moe_config(tiny)).to(device, torch.bfloat16).train()
    ALL_EXPERTS_FUNCTIONS.register(TRAIN_EXPERTS, every_expert)
    model.set_experts_implementation(TRAIN_EXPERTS)
    return model


def finish(model: PreTrainedModel, heldout: Tensor, recipe: Recipe, log: Log, folder: Path) -> None:
    """Measure on all of heldout.txt with transformers' own experts, save, and complete ``log``."""
    if isinstance(model, Qwen3MoeForCausalLM):
        model.set_experts_implementation("eager")  # no test of alignment: the plain loop over experts
    log.final_heldout_loss = heldout_loss(model, heldout, recipe.length, windows=10**6)
    log.final_heldout_perplexity = math.exp(log.final_heldout_loss)
    log.file_bytes = save(model, folder)


def main(argv: list[str] | None = None) -> int:
    """Train, save and log; a failing second model leaves the first one on disk."""
    args = arguments(argv)
    device = torch.device(args.device)
    recipe = Recipe(minutes=args.minutes, steps=args.steps, rate=args.rate, epochs=args.epochs)
    if args.tiny:
        recipe = Recipe(minutes=args.minutes, steps=args.steps, rate=args.rate, batch=4, length=128, checks=2)
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {text}", flush=True)

    corpus = read_corpus(2_000_000 if args.tiny else None, args.sources)
    tokenizer = train_tokenizer(corpus.train, VOCAB)
    tokenizer.save(str(args.out / "tokenizer.json"))
    text = heldout_text(corpus.heldout)
    (args.out / "heldout.txt").write_text(text, encoding="utf-8")
    data = torch.tensor(encode(tokenizer, corpus.train), dtype=torch.int32, device=device)
    other = torch.tensor(encode(tokenizer, corpus.heldout), dtype=torch.int32, device=device)
    final = torch.tensor(tokenizer.encode(text).ids, dtype=torch.int32, device=device)
    report: dict[str, Any] = {
        "machine": machine(device),
        "corpus": {
            "train_files": len(corpus.train),
            "train_bytes": corpus.train_bytes,
            "train_tokens": data.numel(),
            "heldout_files": len(corpus.heldout),
            "heldout_tokens": other.numel(),
            "heldout_txt_tokens": final.numel(),
        },
        "recipe": asdict(recipe),
        "models": {},
    }
    say(f"corpus {report['corpus']}")
    for name in args.models:
        model = build(name, args.tiny, device)
        log = train(model, data, other, recipe, say)
        finish(model, final, recipe, log, args.out / name)
        report["models"][name] = asdict(log)
        (args.out / "train_log.json").write_text(json.dumps(report, indent=1) + "\n")
        say(
            f"{name}: {log.parameters} parameters, {log.file_bytes} bytes, {log.steps} steps, {log.epochs:.1f} epochs, "
            f"heldout.txt perplexity {log.final_heldout_perplexity:.3f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
