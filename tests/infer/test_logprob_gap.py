"""The difference of engine and trainer, against distributions that can be written down."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_sov.infer.decoder.logprobs import logprob_gap

ENGINE = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
TRAINER = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)


def test_over_what_the_engine_draws_the_estimate_is_the_divergence() -> None:
    """Tokens as often as the engine's distribution has them."""
    tokens = torch.tensor([0] * 4 + [1] * 2 + [2, 3])
    gap = logprob_gap(ENGINE.log()[tokens], TRAINER.log()[tokens])
    divergence = float(torch.nn.functional.kl_div(TRAINER.log(), ENGINE, reduction="sum"))
    assert gap.sum_kl_nats / gap.tokens == pytest.approx(divergence, abs=1e-12)
    assert gap.tokens == 8 and gap.largest_nats == pytest.approx(math.log(0.2 / 0.125))
    assert gap.sum_nats == pytest.approx(float((TRAINER / ENGINE).log().abs()[tokens].sum()))
    assert gap.large == 8, "each token's probability differs by more than a tenth"


def test_batches_add_up_and_prompts_do_not_count() -> None:
    engine, trainer = torch.tensor([-1.0, -2.0, -9.0, -0.5]), torch.tensor([-1.0, -2.05, -1.0, -1.0])
    drawn = torch.tensor([1, 1, 0, 1])
    whole = logprob_gap(engine, trainer, drawn)
    assert (whole.tokens, whole.large, whole.largest_nats) == (3, 1, 0.5)
    halves = logprob_gap(engine[:2], trainer[:2], drawn[:2]) + logprob_gap(engine[2:], trainer[2:], drawn[2:])
    assert vars(halves) == pytest.approx(vars(whole))
    assert {name: total / count for name, (total, count) in whole.meters().items()} == pytest.approx({
        "engine_gap_nats": 0.55 / 3, "engine_gap_large": 1 / 3,
        "engine_gap_kl_nats": (math.exp(-0.05) - 1 + 0.05 + math.exp(-0.5) - 1 + 0.5) / 3}, rel=1e-5)
    none = logprob_gap(engine, trainer, torch.zeros(4))
    assert (none.tokens, none.largest_nats) == (0, 0.0)


def test_tokens_that_are_not_the_same_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[3\] are not of the trainer's tokens \[4\]"):
        logprob_gap(torch.zeros(3), torch.zeros(4))
