"""Preference losses of pairs, groups and single responses against formulas."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from megatron_sov.engine.decode.forward_only import DocumentBatch
from megatron_sov.engine.parallel import world
from megatron_sov.post import preference
from megatron_sov.post.preference import (
    dpo, find_heldout_documents, grouper, orpo, select_objective, simper, simpo)
from megatron_sov.post.reference import Reference
from megatron_sov.runs.folder import RunFolder
from megatron_sov.train.data.sources import open_sources
from megatron_sov.train.loop import train_step
from megatron_sov.train.trainer import Trainer
from tests.layouts.layout_run import build_small_config

SETTINGS = ["train.precision=fp64", 'data.phases=[{"name": "main", "seq_len": 128}]',
            "preference.chosen_coeff=0.1", "train.global_batch_size=4", "optim.lr=0.01",
            "model.num_experts=8"]
BETA = 0.3


def build_trainer(settings: list[str], data: str, run: Path) -> Any:
    """Return a trainer whose reference log-probabilities are computed by its own initial weights."""
    config = build_small_config("tiny-k-exaone", [*SETTINGS, *settings], [data], "preference")
    place = world.join_world(config.parallel)
    config.check(place.size)
    sources = open_sources(config.data.paths, config.model.vocab_size, ("preference",))
    # The data's manifest serves as a checkpoint's.
    reference = Reference(run, Path(data), sources, 128, {s.name: find_heldout_documents(s) for s in sources})
    trainer = Trainer(config, place, RunFolder(run), list(reference.sources), select_objective(config))
    reference.score_heldout(trainer)
    trainer.reference = reference  # type: ignore[attr-defined]
    return trainer


class SelectedDocuments:
    """The documents of a split with the given indices, in the order of the indices."""

    def __init__(self, documents: Any, indices: list[int]) -> None:
        self._documents, self._indices, self.lengths = documents, indices, documents.lengths[indices]

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._documents, name)
        if name in ("tokens", "types", "loss_weights", "routes", "encoder_inputs"):
            return lambda document, *rest: attribute(self._indices[document], *rest)
        return attribute


def evaluate_heldout_pairs(trainer: Any, batch: Any) -> dict[str, float]:
    """Measure the pairs of a training batch as if they were held out."""
    numbers = [origin.segment.document for m in batch.micro_batches for origin in m.origins]
    with_reference = trainer.sources[0].open_split("train")
    documents = SelectedDocuments(with_reference, numbers)
    reference_logprobs = np.concatenate([
        with_reference.column("reference_logprobs", number, 0, length)
        for number, length in zip(numbers, documents.lengths.tolist(), strict=True)])
    source: Any = SimpleNamespace(name="pairs", num_tokens={"heldout": 1}, open_split=lambda split: documents)
    settings = trainer.config.preference
    needs_reference = settings.method in preference.REFERENCE_METHODS
    (figures,) = preference.measure_pairs(
        [source], lambda pairs, chosen: preference.score_documents(trainer, pairs, chosen, 128, 2), 128,
        settings, (lambda source: reference_logprobs) if needs_reference else None).values()
    return figures


class PairLogprobs(NamedTuple):
    """Summed log-probabilities of a pair's responses by the policy and by the reference."""

    chosen: float
    rejected: float
    chosen_reference: float
    rejected_reference: float
    chosen_tokens: int
    rejected_tokens: int


def compute_trl_meters(method: str, pairs: list[PairLogprobs]) -> dict[str, float]:
    """Return rewards/accuracies and rewards/margins of TRL's DPOTrainer (SimPO and ORPO: of CPOTrainer and
    ORPOTrainer without their beta), except that a tie counts half."""
    margins, are_likelier = [], []
    for pair in pairs:
        chosen, rejected = pair.chosen, pair.rejected
        are_likelier.append(chosen / pair.chosen_tokens > rejected / pair.rejected_tokens)
        if method in ("dpo", "ipo", "dpo-norm"):
            chosen, rejected = chosen - pair.chosen_reference, rejected - pair.rejected_reference
        if method != "dpo":
            chosen, rejected = chosen / pair.chosen_tokens, rejected / pair.rejected_tokens
        margins.append((1.0 if method in ("simper", "orpo") else BETA) * (chosen - rejected))
    num_right = sum(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins)
    return {"pairs_right": num_right / len(pairs), "margin": sum(margins) / len(pairs),
            "chosen_likelier": sum(are_likelier) / len(pairs)}


def compute_odds(mean: float) -> float:
    return math.exp(mean) / (1 - math.exp(mean))


def compute_pair_loss(method: str, pair: PairLogprobs) -> float:
    """Compute the loss of a pair by the formula of its paper."""
    chosen_mean, rejected_mean = pair.chosen / pair.chosen_tokens, pair.rejected / pair.rejected_tokens
    chosen_gain, rejected_gain = pair.chosen - pair.chosen_reference, pair.rejected - pair.rejected_reference
    mean_lead = chosen_gain / pair.chosen_tokens - rejected_gain / pair.rejected_tokens
    if method == "dpo":
        return math.log1p(math.exp(-BETA * (chosen_gain - rejected_gain)))
    if method == "ipo":
        return (mean_lead - 1 / (2 * BETA)) ** 2
    if method == "dpo-norm":
        return math.log1p(math.exp(-BETA * mean_lead))
    if method == "simper":
        return math.exp(rejected_mean) - math.exp(chosen_mean)
    if method == "simpo":
        return math.log1p(math.exp(-BETA * (chosen_mean - rejected_mean) + 0.5))
    assert method == "orpo"
    return math.log1p(compute_odds(rejected_mean) / compute_odds(chosen_mean))


def compare_losses(data: str, run: str, methods: list[str]) -> list[dict[str, Any]]:
    """Compute each method's loss and meters of a batch after one step, and the same by formula.

    The formulas use one forward pass per response, by the policy and by the initial weights as the reference.
    """

    def sum_logprobs(policy: Any, batch: Any) -> list[tuple[float, int]]:
        """Return the log-probability and the number of tokens of each response."""
        found = []
        for start, end in zip(batch.inputs.host_bounds, batch.inputs.host_bounds[1:], strict=False):
            if batch.inputs.padding[start]:
                continue
            ids = batch.inputs.tokens[start:end].tolist()
            micro_batch = DocumentBatch([ids], torch.device("cpu"))
            logits = policy.logits(micro_batch, torch.arange(len(ids))).double().log_softmax(-1)
            is_learned = (batch.types[start:end] == 2) & (batch.weights[start:end] > 0)
            logprobs = logits[torch.arange(len(ids)), batch.labels[start:end]][is_learned]
            found.append((float(logprobs.sum()), int(is_learned.sum())))
        return found

    results = []
    for method in methods:
        trainer = build_trainer([f"preference.method={method}", "preference.chosen_coeff=0.0",
                                 f"preference.beta={BETA}", "optim.lr=0.002"], data, Path(run))
        objective = trainer.objective
        tensors = [*trainer.model.parameters(), *trainer.model.buffers()]  # routers' biases move as well
        initial = [tensor.detach().clone() for tensor in tensors]
        train_step(trainer)
        batch = objective.prepare(objective.collect(trainer.policy, 1))
        current = [s for m in batch.micro_batches for s in sum_logprobs(trainer.policy, m)]
        heldout = evaluate_heldout_pairs(trainer, batch)
        # Computing the loss changes the biases of the routers, so it comes after the measurement.
        sums_of_batch = trainer.forward_backward.compute_gradients(batch, objective, 2)
        loss = sums_of_batch.terms["preference"] / batch.targets["preference"]
        with torch.no_grad():
            for tensor, value in zip(tensors, initial, strict=True):
                tensor.copy_(value)
        reference = [s for m in batch.micro_batches for s in sum_logprobs(trainer.policy, m)]
        pairs = []
        for i in range(0, len(current), 2):  # a chosen response, and the rejected one after it
            (chosen, chosen_tokens), (rejected, rejected_tokens) = current[i:i + 2]
            (chosen_reference, _), (rejected_reference, _) = reference[i:i + 2]
            pairs.append(PairLogprobs(chosen, rejected, chosen_reference, rejected_reference, chosen_tokens,
                                      rejected_tokens))
        losses = [compute_pair_loss(method, pair) for pair in pairs]
        results.append({"method": method, "loss": loss, "expected_loss": float(np.mean(losses)),
                        "pairs": len(pairs), "spread": float(np.std(losses)), "meters": sums_of_batch.meters,
                        "measured": heldout, "trl": compute_trl_meters(method, pairs)})
        trainer.close()
        world.leave_world()
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("methods", [["dpo", "simpo"], pytest.param(["ipo", "dpo-norm", "simper", "orpo"],
                                                                    marks=pytest.mark.deep)])
def test_losses_are_the_papers(ranks: Any, job: Any, pairs: Path, tmp_path: Path, methods: list[str]) -> None:
    ((results,),) = ranks(job(__file__, "compare_losses", 1, {"data": str(pairs), "run": str(tmp_path),
                                                              "methods": methods}))
    assert len(results) == len(methods)
    for result in results:
        assert result["pairs"] >= 4 and result["spread"] > 1e-6, result
        # Reference log-probabilities are stored in float32: sums of some 40 values with errors of 1e-7.
        assert result["loss"] == pytest.approx(result["expected_loss"], rel=1e-5, abs=2e-6), result
        # Training, held-out evaluation and TRL define the meters in the same way.
        for name in ("pairs_right", "margin"):
            assert result["meters"][name] == pytest.approx(result["trl"][name], rel=1e-4, abs=1e-5), result
        assert result["measured"] == pytest.approx(
            result["trl"] | {"pairs": result["pairs"]}, rel=1e-4, abs=1e-5), result


MARGINS = (-30.0, -1.5, 0.0, 0.25, 4.0)


@pytest.mark.each("beta", [0.1, 0.5])
@pytest.mark.each("smoothing", [0.0, 0.2])
def test_dpo_is_the_papers(beta: float, smoothing: float) -> None:
    margins = torch.tensor(MARGINS, dtype=torch.float64, requires_grad=True)
    losses = dpo(margins, beta, smoothing)
    (gradient,) = torch.autograd.grad(losses.sum(), margins)
    for margin, loss, slope in zip(MARGINS, losses.tolist(), gradient.tolist(), strict=True):
        probability = 1 / (1 + math.exp(-beta * margin))  # that the chosen response is the better one
        assert loss == pytest.approx(
            -(1 - smoothing) * math.log(probability) - smoothing * math.log(1 - probability),
            abs=1e-12)
        assert slope == pytest.approx(beta * (probability - (1 - smoothing)), abs=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo_requires_a_margin(smoothing: float) -> None:
    chosen, rejected = torch.tensor([-1.0, -2.0]).double(), torch.tensor([-3.0, -0.5]).double()
    # With rewards beta * mean log p, the chosen response must lead by gamma = 1.5; mean log p leads by
    # 2 and -1.5.
    probabilities = [1 / (1 + math.exp(-(2.5 * lead - 1.5))) for lead in (2.0, -1.5)]
    assert simpo(chosen, rejected, 2.5, 1.5, smoothing).tolist() == pytest.approx(
        [-(1 - smoothing) * math.log(p) - smoothing * math.log(1 - p) for p in probabilities], abs=1e-12)


def test_orpo_compares_odds_and_stays_finite_if_a_response_is_certain() -> None:
    chosen, rejected = torch.tensor([-0.1, -2.0]).double(), torch.tensor([-3.0, -0.5]).double()
    odds_ratios = [compute_odds(chosen_mean) / compute_odds(rejected_mean)
                   for chosen_mean, rejected_mean in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    assert orpo(chosen, rejected).tolist() == pytest.approx(
        [-math.log(ratio / (1 + ratio)) for ratio in odds_ratios], abs=1e-12)
    certain = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    losses = orpo(certain, rejected) + orpo(rejected, certain)
    (gradient,) = torch.autograd.grad(losses.sum(), certain)
    assert losses.isfinite().all() and gradient.isfinite().all()


def test_simper_and_grouper_compare_inverse_perplexities() -> None:
    chosen, rejected = torch.tensor([-1.0, -2.0]).double(), torch.tensor([-3.0, -0.5]).double()
    expected = [math.exp(-3) - math.exp(-1), math.exp(-0.5) - math.exp(-2)]
    assert simper(chosen, rejected).tolist() == pytest.approx(expected, abs=1e-12)
    interleaved = torch.stack([chosen, rejected], dim=1).flatten()
    assert grouper(interleaved, torch.tensor([1.0, -1.0, 1.0, -1.0])).tolist() == pytest.approx(
        [-math.exp(-1), math.exp(-3), -math.exp(-2), math.exp(-0.5)], abs=1e-12)
