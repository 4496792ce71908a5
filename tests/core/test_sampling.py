"""Sampling: the distribution is that of transformers' logits processors, and draws follow it."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moei_core.config import GenerationSettings
from moei_core.engine.sampling import Sampler
from moei_core.errors import MoeiError

SETTINGS = [
    GenerationSettings(temperature=1.0),
    GenerationSettings(temperature=0.7, top_k=20, top_p=0.8),
    GenerationSettings(temperature=0.8, top_k=50, top_p=0.9, repetition_penalty=1.3),
    GenerationSettings(temperature=1.5, min_p=0.05),
    GenerationSettings(temperature=0.6, top_p=0.95),
    GenerationSettings(temperature=3.0, top_p=0.3),
    GenerationSettings(temperature=1.0, top_k=1),
    GenerationSettings(temperature=1.0, top_k=10**6, top_p=0.999, min_p=0.01),
]


def theirs(settings: GenerationSettings, tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
    """Probabilities [vocabulary] by transformers, in the order in which ``generate`` has the processors."""
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)])
    processors.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        processors.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        processors.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        processors.append(MinPLogitsWarper(settings.min_p))
    return processors(torch.tensor([tokens]), logits.float()[None]).softmax(-1)[0]


@pytest.mark.parametrize("vocabulary", [30, 1000, 50000])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("spread", [0.0, 0.5, 4.0, 30.0])
def test_the_distribution_is_transformers(
    settings: GenerationSettings, vocabulary: int, spread: float
) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    # bfloat16 makes equal scores, as real logits have them.
    logits = (torch.randn(vocabulary, generator=generator) * spread).bfloat16()
    tokens = [1, 5, 5, 7]
    candidates, found = Sampler(settings).distribution(tokens, logits)
    dense = torch.zeros(vocabulary)
    dense[slice(None) if candidates is None else candidates] = found
    expected = theirs(settings, tokens, logits)
    if settings.top_p < 1:
        # Among equally probable tokens at the edge of the nucleus any may be the last, and sums round: the edge may
        # differ by tokens of the edge's probability, and by what rounding makes of the threshold.
        edge = min(expected[expected > 0].min(), dense[dense > 0].min()) * 1.01
        inner = (expected > edge) & (dense > edge)
        count = int((expected > 0).sum())
        assert abs(count - int((dense > 0).sum())) <= max(1, count // 1000)
        assert torch.allclose(dense[inner], expected[inner], rtol=2e-3)
        assert not ((expected > edge) ^ (dense > edge)).any() or edge > 0.9 * expected.max()
        return
    assert torch.equal(dense > 0, expected > 0)
    assert torch.allclose(dense, expected, rtol=1e-4, atol=1e-9)


def test_draws_follow_the_distribution() -> None:
    """Pearson's chi-square of 20000 draws over 8 tokens: its 99.99% quantile with 7 degrees of freedom is 29.9."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, -torch.inf, 0.5, 1.5, -2.0, 0.1])
    sampler, draws = Sampler(GenerationSettings(temperature=1.0, seed=4)), 20000
    drawn = torch.tensor([sampler.next_token([], logits) for _ in range(draws)])
    counts = torch.bincount(drawn, minlength=9).double()
    expected = logits.double().softmax(0) * draws
    assert counts[4] == 0
    there = expected > 0
    assert float(((counts - expected)[there].square() / expected[there]).sum()) < 29.9


def test_a_seed_repeats_and_another_does_not() -> None:
    logits = torch.zeros(1000)

    def draw(seed: int) -> list[int]:
        sampler = Sampler(GenerationSettings(temperature=1.0, seed=seed))
        return [sampler.next_token([], logits) for _ in range(8)]

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("settings", [*SETTINGS, GenerationSettings(temperature=0)], ids=str)
def test_results_that_are_no_numbers_are_refused(settings: GenerationSettings, bad: float) -> None:
    logits = torch.zeros(1000)
    logits[3] = bad
    with pytest.raises(MoeiError, match="not a number"):
        Sampler(settings).next_token([1], logits)
