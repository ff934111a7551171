"""Attention with different value and query sizes against a dense softmax."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sov.engine.decode.forward_only import DocumentBatch, ForwardModel
from megatron_sov.engine.model.adapters import LinearAdapter
from megatron_sov.engine.model.attention import pack_documents
from megatron_sov.engine.model.latent_attention import LatentDocumentAttention
from megatron_sov.engine.parallel import context, world
from megatron_sov.infer.decoder.generator import MegatronEngine
from megatron_sov.infer.request import Batching, Sampling
from tests.engine.model.test_adapters import LATENT_SETTINGS, AdapterTraining, build_config

HEADS, BOUNDS = 3, [0, 5, 5, 6, 20]


@pytest.mark.each(("nope", "rope", "value_width"), [(6, 4, 7), (6, 4, 10), (2, 4, 9)])
def test_values_of_any_width_are_attended_to_inside_documents(nope: int, rope: int, value_width: int,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "get_cp_size", lambda: 1)
    draw = torch.Generator().manual_seed(nope)
    query, key = (torch.randn(20, HEADS, nope + rope, generator=draw, dtype=torch.float64) for _ in range(2))
    value = torch.randn(20, HEADS, value_width, generator=draw, dtype=torch.float64, requires_grad=True)
    config = SimpleNamespace(qk_head_dim=nope, qk_pos_emb_head_dim=rope, v_head_dim=value_width,
                             kv_channels=rope)
    attention = LatentDocumentAttention(config, 1, None, "self", softmax_scale=0.3)
    result = attention(query, key, value, None,
                       packed_seq_params=pack_documents(torch.tensor(BOUNDS, dtype=torch.int32), 14, 20))
    document = torch.bucketize(torch.arange(20), torch.tensor(BOUNDS[1:]), right=True)
    mask = (document[:, None] == document) & torch.ones(20, 20).tril().bool()
    scores = torch.einsum("qhd,khd->hqk", query, key).mul(0.3).masked_fill(~mask, -torch.inf)
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1)
    assert result.shape == (20, HEADS * value_width)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(result.shape, generator=draw, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((out * weights).sum(), value)[0] for out in (result, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def generate_while_training() -> list[tuple[list[list[int]], list[list[int]], int]]:
    """Inside a rank: generate before and after a training step of a `kv_b_proj` adapter.

    Returns, for each: generated tokens, greedy tokens of full forward passes, and how often the adapter was
    merged into the weight.
    """
    config = build_config("tiny-deepseek-v3", {}, [*LATENT_SETTINGS, "model.num_mtp_layers=0",
                                                   'lora.targets=["kv_b_proj"]', "optim.clip_grad=0"])
    world.join_world(config.parallel)
    training, merges, results = AdapterTraining(config), [], []
    compute_weight = LinearAdapter.compute_effective_weight
    LinearAdapter.compute_effective_weight = (  # type: ignore[method-assign]
        lambda *args: merges.append(1) or compute_weight(*args))
    policy = ForwardModel(training.model, 50)
    engine, prompts = MegatronEngine(policy, Batching(1, 5)), [[5, 9, 2, 70], list(range(20, 32))]
    for _ in range(2):
        continuations = engine.generate(prompts, Sampling(6)).continuations
        recomputed = [policy.logits(DocumentBatch([[*p, *c]], torch.device("cpu")),
                                    torch.arange(len(p) - 1, len(p) + 5)).argmax(-1).tolist()
                      for p, c in zip(prompts, continuations, strict=True)]
        results.append((continuations, recomputed, len(merges)))
        merges.clear()
        training.compute_gradients()
        training.optimizer.step(2.0)
    return results


@pytest.mark.distributed
def test_merged_adapter_weight_is_built_once_per_generation(ranks: Any, job: Any) -> None:
    (before, after), = ranks(job(__file__, "generate_while_training", 1, {}))[0]
    num_layers = 2
    assert before[2] == after[2] == num_layers
    assert before[0] == before[1] and after[0] == after[1]
    assert before[0] != after[0], "the step changed nothing"
