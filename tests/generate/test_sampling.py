"""Text from a policy: greedy as transformers writes it, samples of the right distribution."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_sov.config import ParallelConfig
from megatron_sov.mcore.cpu import open_door

open_door()

from megatron_sov.generate.documents import next_logits, next_tokens, rows_of  # noqa: E402
from megatron_sov.generate.hf import generate_hf, load_hf, next_tokens_hf  # noqa: E402
from megatron_sov.generate.load import load_policy  # noqa: E402
from megatron_sov.generate.sampling import draw, generate  # noqa: E402
from megatron_sov.generate.target import inference_config  # noqa: E402
from megatron_sov.mcore import world  # noqa: E402

PROMPTS = [[5, 9, 2, 70], [300], list(range(100, 140))]


@pytest.fixture(params=["solar_open", "exaone_moe"])
def family(request) -> str:
    return request.param


@pytest.fixture
def policy(family: str, imported: dict[str, Path], one_rank: None):
    world.join(ParallelConfig())
    yield load_policy(imported[family], inference_config(imported[family], [], 1))
    world.leave()


def test_greedy_text_is_that_of_transformers(policy, family: str, hf_models: dict[str, Path]) -> None:
    ours = generate(policy, PROMPTS, 12)
    model = load_hf(hf_models[family])
    assert ours == generate_hf(model, PROMPTS, 12)
    assert len({tuple(c) for c in ours}) == 3
    long = [p for p in PROMPTS if len(p) >= 3]
    assert next_tokens(policy, long, 3).tolist() == next_tokens_hf(model, long, 3).tolist()


def test_a_continuation_ends_with_its_end_token(policy) -> None:
    free = generate(policy, PROMPTS, 12)
    end = free[0][4]
    ended = generate(policy, PROMPTS, 12, eos_id=end)
    assert ended == [c[:c.index(end) + 1] if end in c else c for c in free]
    assert len(ended[0]) <= 5 and ended[0][-1] == end


def test_samples_depend_on_the_seed_and_on_nothing_else(policy) -> None:
    first = generate(policy, PROMPTS, 8, temperature=1.0, top_p=0.9, seed=3)
    assert generate(policy, PROMPTS, 8, temperature=1.0, top_p=0.9, seed=3) == first
    assert generate(policy, PROMPTS[:2], 8, temperature=1.0, top_p=0.9, seed=3) == first[:2]
    assert generate(policy, PROMPTS, 8, temperature=1.0, top_p=0.9, seed=4) != first
    assert generate(policy, PROMPTS, 8, temperature=1e-6, seed=4) == generate(policy, PROMPTS, 8)


def test_logits_are_those_behind_the_last_token(policy, family: str, hf_models: dict[str, Path]) -> None:
    with torch.no_grad():
        expected = torch.stack([load_hf(hf_models[family])(torch.tensor([p])).logits[0, -1] for p in PROMPTS])
    assert torch.allclose(next_logits(policy, PROMPTS), expected.double(), atol=1e-4)


def test_draws_follow_the_tempered_truncated_distribution() -> None:
    logits = torch.tensor([0.3, 2.0, -1.0, 1.1, 1.9])
    p = np.exp(logits.double().numpy() / 0.7)
    p /= p.sum()
    order = [1, 4, 3, 0, 2]
    kept = order[:int(np.searchsorted(np.cumsum(p[order]), 0.8)) + 1]
    assert kept == [1, 4]
    drawn = [draw(logits, 0.7, 0.8, (k + 0.5) / 2000) for k in range(2000)]
    shares = np.bincount(drawn, minlength=5) / 2000
    assert shares == pytest.approx([p[i] / p[kept].sum() if i in kept else 0 for i in range(5)], abs=1e-3)
    everything = [draw(logits, 0.7, 1.0, (k + 0.5) / 2000) for k in range(2000)]
    assert np.bincount(everything, minlength=5) / 2000 == pytest.approx(p, abs=1e-3)
    assert draw(logits, 0.7, 1.0, np.nextafter(1.0, 0.0)) == 2


def test_rows_hold_documents_in_order_up_to_their_size() -> None:
    assert rows_of([3, 4, 2, 9, 1, 20, 1], row_tokens=9) == [[0, 1, 2], [3], [4], [5], [6]]
    assert rows_of([]) == []
