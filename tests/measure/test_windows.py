"""Likelihood and divergence of logits against the plain formulas."""

from __future__ import annotations

import math

import pytest
import torch

from quant_compile.measure import windows as measured
from quant_compile.measure.windows import divergence, losses, perplexity, windows_of


def test_windows_share_one_token_so_that_each_is_predicted() -> None:
    cut = windows_of(torch.arange(10), 3, 5)
    assert cut.tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    with pytest.raises(ValueError, match="3 tokens are fewer than one window of 4"):
        windows_of(torch.arange(3), 3, 1)


@pytest.mark.parametrize("chunk", [1 << 24, 7])
def test_losses_and_divergence_are_the_formulas(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In f64, whether rows come in pieces or not; f32 sums of 50 terms differ by less than 1e-5."""
    monkeypatch.setattr(measured, "CHUNK", chunk)
    torch.manual_seed(0)
    ours, theirs = torch.randn(9, 50), torch.randn(9, 50)
    following = torch.randint(0, 50, (9,))
    q, p = ours.double().softmax(-1), theirs.double().softmax(-1)
    assert torch.allclose(losses(ours, following).double(), -q[torch.arange(9), following].log(), atol=1e-5)
    found = divergence(ours, theirs)
    assert torch.allclose(found.kl.double(), (p * (p / q).log()).sum(-1), atol=1e-5)
    assert found.same.tolist() == [int(a.argmax()) == int(b.argmax()) for a, b in zip(ours, theirs, strict=True)]


def test_the_same_logits_diverge_by_nothing() -> None:
    logits = torch.randn(5, 20, dtype=torch.bfloat16)
    found = divergence(logits, logits.clone())
    assert float(found.kl.abs().max()) == 0.0 and bool(found.same.all())


def test_perplexity_of_uniform_logits_is_the_vocabulary() -> None:
    cut = windows_of(torch.randint(0, 12, (25,)), 8, 3)
    assert perplexity(lambda ids: torch.zeros(1, ids.shape[1], 12), cut) == pytest.approx(12.0)
    assert math.isclose(perplexity(lambda ids: torch.zeros(1, ids.shape[1], 12), cut[:1]), 12.0, rel_tol=1e-6)
