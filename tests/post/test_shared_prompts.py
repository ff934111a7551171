"""Shared prompts: attention, loss, gradient and expert counts equal those of separate prompts."""

from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sov import recipes
from megatron_sov.base.documents import ROLLOUTS
from megatron_sov.engine.model import attention
from megatron_sov.engine.model.chunk import ModelInputs
from megatron_sov.engine.parallel import world
from megatron_sov.model.config import ParallelConfig, apply_settings
from megatron_sov.post import shared_prompts
from megatron_sov.post.policy import build_policy_objective
from megatron_sov.post.shared_prompts import find_sharing_problem, remove_repeated_prompts
from megatron_sov.runs.folder import RunFolder
from megatron_sov.train.data.sources import Source
from megatron_sov.train.loop import train_step
from megatron_sov.train.objectives.microbatch import MicroBatch
from megatron_sov.train.trainer import Trainer
from tests.layouts.layout_run import build_small_config
from tests.post.test_policy import Rollouts

SETTINGS = ["train.precision=fp64", 'data.phases=[{"name": "main", "seq_len": 64}]', "optim.lr=0.01",
            "rollout.max_new_tokens=64", "policy.method=grpo", "policy.kl=none",
            "model.seq_aux_loss_coeff=0.01", "model.router_bias_update_rate=0.001",
            "train.micro_batch_size=4"]
STEPS, GROUP, COMPUTED_SHARE = 2, 20, "computed share"
"""Steps, responses to a prompt, and key of the share of tokens that remain in a step of `train_steps`."""
SPANS = [(0, 0, 9), (9, 14, 20), (20, 25, 27), (27, 27, 31), (31, 36, 42)]
"""(start, first own token, end) of documents in a row of 42 tokens; the second, third and last begin with the
prompt of the first."""
CASES = [(window, block) for window in (0, 3, 7, 64) for block in (1024, 2)]
"""(attention window, query block)."""


class Groups(Rollouts):
    """Groups of responses to one prompt each, with a tool's text in the middle of some."""

    columns = ("advantage", "behaviour_logprobs")

    def __init__(self, num_documents: int) -> None:
        self.lengths = np.array([12 + 7 * i % 23 for i in range(num_documents)], np.int32)

    def tokens(self, document: int, start: int, count: int) -> np.ndarray:
        result = np.random.default_rng(document).integers(5, 360, self.lengths[document])
        group, size = document // GROUP, self.count_prompt_tokens(document)
        result[:size] = np.random.default_rng([group, 1]).integers(5, 360, size)
        return result[start:start + count]

    def count_prompt_tokens(self, document: int) -> int:
        return 5 + document // GROUP % 5


def train_steps(shares: bool, run: str) -> list[dict[str, Any]]:
    """Train `STEPS` steps with or without shared prompts.

    Returns, for each step: loss, meters, gradient norm, loads of the experts, and the share of tokens that
    remains after sharing.
    """
    settings = [*SETTINGS, f"policy.share_prompts={str(shares).lower()}"]
    config = build_small_config("tiny-solar-open", settings, [], "policy")
    groups: Any = Groups(60)
    source = Source(ROLLOUTS, None, ROLLOUTS, {}, {"train": int(groups.lengths.sum()), "heldout": 0}, 1.0,
                    train_documents=groups, columns=groups.columns)
    trainer = Trainer(config, world.join_world(config.parallel), RunFolder(Path(run)), [source],
                      build_policy_objective(config))
    prepare, computed_shares = trainer.objective.prepare, list[float]()

    def count_tokens(batch: Any) -> int:
        return sum(len(micro_batch.labels) for micro_batch in batch.micro_batches)

    def prepare_and_measure(batch: Any) -> Any:
        result = prepare(batch)
        computed_shares.append(count_tokens(result) / count_tokens(batch))
        return result

    setattr(trainer.objective, "prepare", prepare_and_measure)  # noqa: B010
    results = []
    for _ in range(STEPS):
        result = train_step(trainer)
        assert result is not None
        results.append({"loss": result.loss, "grad_norm": result.grad_norm, "tokens": result.num_tokens,
                        **result.meters, "load": trainer.expert_load.gather().flatten().tolist(),
                        COMPUTED_SHARE: computed_shares[-1]})
    trainer.close()
    world.leave_world()
    return results


def compare_attention() -> list[float]:
    """Compare attention over shared prompts with attention over a row in which each document has its own
    prompt.

    Returns the largest difference of outputs and gradients for each of `CASES`.
    """
    from megatron.core.transformer import TransformerConfig

    world.join_world(ParallelConfig())
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4)
    positions = torch.cat([torch.arange(first, stop) for _, first, stop in SPANS])
    source = torch.arange(42)
    for start, first, _ in SPANS:
        source[start:first] = torch.arange(first - start)
    sharing_source = torch.searchsorted(positions, source)
    bounds = torch.tensor([0, *(stop for _, _, stop in SPANS)], dtype=torch.int32)
    generator, differences = torch.Generator().manual_seed(0), []
    for window, block in CASES:
        attention.QUERY_BLOCK = block
        layer = attention.DocumentAttention(config, 1, None, "self", window_tokens=window)
        row = [torch.randn(len(positions), heads, 8, dtype=torch.float64, generator=generator)
               for heads in (4, 2, 2)]
        upstream = torch.randn(len(positions), 32, dtype=torch.float64, generator=generator)
        inputs = [t.clone().requires_grad_() for t in row]
        shared = attention.SharedPrompts(sharing_source, SPANS, torch.zeros(42, dtype=torch.bool))
        out = layer(*inputs, None,
                    packed_seq_params=attention.pack_documents(bounds, 11, len(positions), shared=shared))
        out.backward(upstream)
        separate = [t.clone().requires_grad_() for t in row]
        expected = layer(*(t[sharing_source] for t in separate), None,
                         packed_seq_params=attention.pack_documents(bounds, 11, 42))
        expected[positions].backward(upstream)
        compared = [(out, expected[positions]),
                    *((ours.grad, theirs.grad) for ours, theirs in zip(inputs, separate, strict=True))]
        differences.append(max(float((ours - theirs).abs().max()) for ours, theirs in compared))
    return differences


def run_comparisons(run: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[float]]:
    """Return `train_steps` with and without shared prompts, and `compare_attention`."""
    return train_steps(True, run), train_steps(False, run), compare_attention()


def test_shared_prompts_do_not_change_gradients(ranks: Any, job: Any, tmp_path: Path) -> None:
    (result,), = ranks(job(__file__, "run_comparisons", 1, {"run": str(tmp_path)}))
    shared_steps, separate_steps, attention_differences = result
    assert [step.pop(COMPUTED_SHARE) for step in separate_steps] == [1.0] * STEPS
    assert max(step.pop(COMPUTED_SHARE) for step in shared_steps) < 0.9
    for shared_step, separate_step in zip(shared_steps, separate_steps, strict=True):
        assert shared_step["load"] == separate_step.pop("load") and sum(shared_step.pop("load")) > 0
        assert shared_step == pytest.approx(separate_step, rel=1e-12, abs=1e-13)
    assert max(attention_differences) < 1e-12, dict(zip(CASES, attention_differences, strict=True))


def test_sharing_removes_only_prompt_tokens() -> None:
    """Two responses to a prompt of four tokens, one to another prompt that begins alike, text, padding."""
    documents = [[7, 8, 9, 1, 4, 4], [7, 8, 9, 1, 5], [7, 8, 9, 2, 4], [7, 8], [0, 0]]
    loss_weights = [[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 0], [1, 1], [0, 0]]
    tokens = torch.tensor(list(chain(*documents)))
    bounds = torch.tensor([0, *map(len, documents)]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(len(d)) for d in documents])
    weights = torch.tensor(list(chain(*loss_weights)), dtype=torch.float32)
    inputs = ModelInputs(tokens, positions, bounds, 6, torch.arange(20) >= 18, bounds.tolist())
    batch = MicroBatch(inputs, tokens.roll(-1), weights, torch.full((20,), 2, dtype=torch.uint8),
                       torch.zeros(20, dtype=torch.int64), {"advantage": weights * 3})
    result = remove_repeated_prompts(batch)
    shared = result.inputs.shared
    assert shared is not None and result.inputs.host_bounds == [0, 6, 8, 10, 12, 14]
    assert result.inputs.tokens.tolist() == [7, 8, 9, 1, 4, 4, 1, 5, 2, 4, 7, 8, 0, 0]
    assert result.inputs.positions.tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 3, 4, 0, 1, 0, 1]
    assert result.inputs.tokens[shared.source].tolist() == tokens.tolist()
    assert [stop - first for _, first, stop in shared.spans] == np.diff(result.inputs.host_bounds).tolist()
    for (first, stop), (start, begins, end) in zip(pairwise(result.inputs.host_bounds), shared.spans,
                                                   strict=True):
        assert torch.equal(result.labels[first:stop], batch.labels[begins:end])
        assert torch.equal(result.columns["advantage"][first:stop], batch.columns["advantage"][begins:end])
        assert not weights[start:begins].any()
    assert remove_repeated_prompts(result) is result, "the result has no repeated prompt"


@pytest.mark.each("settings", [
    "policy.share_prompts=false", "parallel.tp=2", "parallel.pp=2", "parallel.cp=2", "model.num_mtp_layers=1",
    "train.hidden_dropout=0.1", "policy.router_replay=true", "train.fp8=tensorwise",
    "parallel.ep=2 parallel.expert_dispatcher=allgather"])
def test_prompts_are_not_shared_if_results_would_change(settings: str) -> None:
    base = recipes.get("tiny-solar-open")
    assert not find_sharing_problem(base)
    assert not find_sharing_problem(apply_settings(base, ["parallel.ep=2"]))
    (reason,) = find_sharing_problem(apply_settings(base, settings.split()))
    last_key = settings.split()[-1].partition("=")[0]
    assert last_key.partition(".")[2] in reason


def test_attention_of_transformer_engine_shares_no_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prompts, "uses_transformer_engine", lambda precision: True)
    (reason,) = find_sharing_problem(apply_settings(recipes.get("tiny-solar-open"), ["gpu.attention=flash"]))
    assert reason.startswith("gpu.attention = flash: ")
