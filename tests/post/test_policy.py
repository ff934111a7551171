"""The policy objective: the loss against formulas on the model's logits, and equal at every layout."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sov import recipes
from megatron_sov.base.documents import ROLLOUTS
from megatron_sov.base.errors import UserError
from megatron_sov.chat.encode import TYPE_TEXT
from megatron_sov.engine.decode.forward_only import DocumentBatch
from megatron_sov.engine.parallel import world
from megatron_sov.model.config import PolicyConfig, apply_settings
from megatron_sov.model.recipes import get
from megatron_sov.post.policy import PolicyLearning, build_policy_objective, check_sources, open_text_sources
from megatron_sov.runs.folder import RunFolder
from megatron_sov.train.data.sources import Source, open_sources
from megatron_sov.train.loop import train_step
from megatron_sov.train.objectives.objective import get_columns, get_formats
from megatron_sov.train.trainer import Trainer
from tests.layouts.layout_run import build_small_config

TEMPERATURE, LOW, HIGH, CLIP = 0.7, 0.75, 1.35, 0.05
SETTINGS = ["train.precision=fp64", 'data.phases=[{"name": "main", "seq_len": 64}]', "model.num_experts=8",
            "optim.lr=0.01", f"rollout.temperature={TEMPERATURE}", "rollout.max_new_tokens=64",
            "policy.method=gspo", f"policy.clip_low={CLIP}", f"policy.clip_high={CLIP}",
            "policy.kl=sequence", "policy.kl_coeff=0.2", "policy.correction=token_mask",
            f"policy.correction_low={LOW}", f"policy.correction_high={HIGH}",
            "policy.knowledge_coeff=0.1", "policy.knowledge_share=1.0", "policy.knowledge_batch_size=1"]
STEPS = 2
ALL_MASKED = ["policy.correction_low=5", "policy.correction_high=6", "policy.knowledge_coeff=0",
              "policy.kl=none", "model.mtp_loss_coeff=0", "model.seq_aux_loss_coeff=0"]
"""Settings that mask all tokens: a step without a loss must not end the run."""


class Rollouts:
    """Prompts and responses of artificial tokens, some with a tool result in the middle, and
    log-probabilities near those of an untrained model."""

    is_plain = False
    columns = ("advantage", "behaviour_logprobs", "old_logprobs", "reference_logprobs")

    def __init__(self, num_documents: int) -> None:
        self.lengths = np.array([12 + 7 * i % 31 for i in range(num_documents)], np.int32)

    def tokens(self, document: int, start: int, count: int) -> np.ndarray:
        return self._draw(document, 0).integers(5, 360, self.lengths[document])[start:start + count]

    def count_prompt_tokens(self, document: int) -> int:
        return 4 + document % 5

    def types(self, document: int, start: int, count: int) -> np.ndarray:
        result = np.full(self.lengths[document], 2, np.uint8)
        result[:self.count_prompt_tokens(document)] = 1
        if document % 3 == 0:
            result[9:11] = 1
        return result[start:start + count]

    def loss_weights(self, document: int, start: int, count: int) -> np.ndarray:
        is_learned = document % 7 != 6  # as if the group of every seventh response had been left out
        return (self.types(document, start, count) == 2).astype(np.float32) * is_learned

    def column(self, name: str, document: int, start: int, count: int) -> np.ndarray:
        if name == "advantage":
            return np.full(count, (1.2, -0.7, 0.4, -1.1)[document % 4], np.float32)
        number = self.columns.index(name)
        spread = self._draw(document, number).uniform(-0.4, 0.4, self.lengths[document])
        return (spread - math.log(368))[start:start + count].astype(np.float32)

    def _draw(self, document: int, number: int) -> np.random.Generator:
        return np.random.default_rng([document, number])


class Texts:
    """Text of random tokens."""

    is_plain, columns = True, ()
    lengths = np.full(40, 30, np.int32)

    def tokens(self, document: int, start: int, count: int) -> np.ndarray:
        return np.random.default_rng([document, 9]).integers(5, 360, 30)[start:start + count]


def build_trainer(settings: list[str], run: str, rollouts: Any = None) -> Any:
    config = build_small_config("tiny-k-exaone", [*SETTINGS, *settings], [], "policy")
    place = world.join_world(config.parallel)
    config.check(place.size)
    documents: Any = (rollouts or Rollouts(60), Texts())
    sources = [Source(name, None, name, {}, {"train": int(dataset.lengths.sum()), "heldout": 0}, share,
                      train_documents=dataset, columns=dataset.columns)
               for name, dataset, share in zip((ROLLOUTS, "text"), documents, (0.75, 0.25), strict=True)]
    check_sources(config, sources)
    return Trainer(config, place, RunFolder(Path(run)), sources, build_policy_objective(config))


def train_steps(settings: list[str], run: str, *, write_out: bool) -> list[dict[str, Any]]:
    """Train `STEPS` steps; return the losses, meters and gradient norm of each.

    With `write_out`, the first entry has the terms of the first step by `compute_terms_by_hand`.
    """
    trainer, results = build_trainer(settings, run), []
    if write_out:
        collect = trainer.objective.collect
        first_batch = collect(trainer.policy, 0)
        results.append(compute_terms_by_hand(trainer.policy, first_batch))
        trainer.objective.collect = lambda policy, step: collect(policy, step) if step else first_batch
    for _ in range(STEPS):
        result = train_step(trainer)
        results.append({"loss": result.loss, "grad_norm": result.grad_norm, **result.losses, **result.meters})
    trainer.close()
    return results


def compute_terms_by_hand(model: Any, batch: Any) -> dict[str, float]:
    """Compute the loss terms of a batch by formula, with one forward pass per document."""
    objectives, divergences, text_losses = [], [], []
    for micro_batch in batch.micro_batches:
        for first, end in zip(micro_batch.inputs.host_bounds, micro_batch.inputs.host_bounds[1:],
                              strict=False):
            if micro_batch.inputs.padding[first]:
                continue
            ids, span = micro_batch.inputs.tokens[first:end].tolist(), slice(first, end)
            logits = model.logits(DocumentBatch([ids], torch.device("cpu")), torch.arange(len(ids))).double()
            positions, labels = torch.arange(len(ids)), micro_batch.labels[span]
            if micro_batch.sources[first] == 1:
                losses = -logits.log_softmax(-1)[positions, labels]
                text_losses += losses[micro_batch.weights[span] > 0].tolist()
                continue
            logprobs = (logits / TEMPERATURE).log_softmax(-1)[positions, labels].tolist()
            old, engine, reference, advantage = (micro_batch.columns[name][span].tolist() for name in (
                "old_logprobs", "behaviour_logprobs", "reference_logprobs", "advantage"))
            corrections = [w if LOW <= (w := math.exp(a - b)) <= HIGH else 0.0
                           for a, b in zip(old, engine, strict=True)]
            learned = [t for t in range(len(ids)) if micro_batch.weights[span][t] > 0]
            if not learned:
                continue
            ratio = math.exp(sum(logprobs[t] - old[t] for t in learned) / len(learned))
            divergences.append(sum(logprobs[t] - reference[t] for t in learned))
            a = advantage[learned[0]]
            clipped = min(ratio * a, min(max(ratio, 1 - CLIP), 1 + CLIP) * a)
            objectives.append(clipped * sum(corrections[t] for t in learned) / len(learned))
    return {"policy": -sum(objectives) / len(objectives), "kl": sum(divergences) / len(objectives),
            "knowledge": sum(text_losses) / len(text_losses)}


@pytest.mark.distributed
def test_terms_equal_the_formulas_and_masked_steps_have_no_gradient(ranks: Any, job: Any,
                                                                    tmp_path: Path) -> None:
    (trained,), (masked,) = ranks(*(
        job(__file__, "train_steps", 1,
            {"settings": settings, "run": str(tmp_path), "write_out": not settings})
        for settings in ([], ALL_MASKED)))
    expected, first, *_ = trained
    for term, value in expected.items():
        assert first[term] == pytest.approx(value, rel=1e-10, abs=1e-12), term
    assert 0 < first["clip_share"] < 1 and abs(first["policy"]) > 1e-3
    assert [(step["loss"], step["grad_norm"], step["masked_share"]) for step in masked] == [(0, 0, 1)] * STEPS


def test_the_objective_requires_the_columns_of_its_settings() -> None:
    def build_objective(*settings: str) -> Any:
        return build_policy_objective(apply_settings(recipes.get("tiny-k-exaone"), list(settings)))

    required = ("advantage", "behaviour_logprobs", "old_logprobs")
    assert tuple(get_columns(build_objective("policy.method=gspo"))) == required
    assert tuple(get_columns(build_objective("policy.method=grpo"))) == required
    assert tuple(get_columns(build_objective("policy.method=grpo", "policy.kl_coeff=0.04"))) == (
        *required, "reference_logprobs")
    assert get_formats(build_objective("policy.method=gspo")) == (ROLLOUTS,)
    assert get_formats(build_objective("policy.method=ink_grpo")) == (ROLLOUTS, "text")
    assert get_formats(build_objective("policy.method=ink_grpo", "policy.knowledge_coeff=0")) == (ROLLOUTS,)
    config = apply_settings(recipes.get("tiny-k-exaone"), ["policy.method=ink_grpo"])
    with pytest.raises(UserError, match=r"policy.knowledge_coeff = 0.1 needs"):
        check_sources(config, [])
    only_heldout = Source("text", None, "text", {}, {"train": 0, "heldout": 9}, 1.0)
    with pytest.raises(UserError, match="add --data with packed"):
        check_sources(config, [only_heldout])
    namesakes = [Source(ROLLOUTS, None, kind, {}, {"train": 9}, 1.0) for kind in ("text", ROLLOUTS)]
    with pytest.raises(UserError, match="--data: the source name"):
        check_sources(config, namesakes)


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_engine_gap_blames_precision_only_for_fresh_rounds(max_staleness: int) -> None:
    learning: Any = PolicyLearning.__new__(PolicyLearning)
    learning._rollout = SimpleNamespace(max_staleness=max_staleness, steps_per_round=1)
    warning = learning.doubt(1, {"engine_kl": 0.2})
    assert "staleness_steps of the round; above 0, older weights" in warning
    assert "at 0 the engine's model" in warning
    assert not learning.doubt(1, {"engine_kl": 0.01})


def test_knowledge_chats_are_text_with_learned_assistant_turns(packed_data: Any) -> None:
    config = get("tiny-solar-open")
    paths = {str(packed_data.chats): 1.0}
    config = replace(config, data=replace(config.data, paths=paths), policy=PolicyConfig(method="ink_grpo"))
    (text,) = open_text_sources(config)
    check_sources(config, [text])
    (chats,) = open_sources(paths, config.model.vocab_size)
    text_split, chat_split = text.open_split("train"), chats.open_split("train")
    assert text.format == "text" and not text.num_tokens["heldout"] and len(text_split.lengths) > 3
    for document, count in enumerate(map(int, text_split.lengths)):
        weights = text_split.loss_weights(document, 0, count)
        assert (weights == chat_split.loss_weights(document, 0, count)).all() and 0 < weights.sum() < count
        assert (text_split.types(document, 0, count) == TYPE_TEXT).all()
        assert (text_split.tokens(document, 0, count) == chat_split.tokens(document, 0, count)).all()
    # A method without a loss on text would train on nothing.
    with pytest.raises(UserError, match="holds data of format 'chat'"):
        open_text_sources(replace(config, policy=PolicyConfig(method="dapo")))
