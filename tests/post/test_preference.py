"""Preference losses of pairs, groups and single responses against formulas."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
from tests.layouts.layout_run import small_config

SETTINGS = ["train.precision=fp64", 'data.phases=[{"name": "main", "seq_len": 128}]',
            "preference.chosen_coeff=0.1", "train.global_batch_size=4", "optim.lr=0.01",
            "model.num_experts=8"]
STEPS = 3


def _trainer(settings: list[str], data: str, run: Path) -> Any:
    """Return a trainer with its reference made."""
    config = small_config("tiny-k-exaone", [*SETTINGS, *settings], [data], "preference")
    place = world.join_world(config.parallel)
    config.check(place.size)
    sources = open_sources(config.data.paths, config.model.vocab_size, ("preference",))
    # The data's manifest serves as a checkpoint's.
    reference = Reference(run, Path(data), sources, 128, {s.name: find_heldout_documents(s) for s in sources})
    trainer = Trainer(config, place, RunFolder(run), list(reference.sources), select_objective(config))
    reference.score_heldout(trainer)
    trainer.reference = reference  # type: ignore[attr-defined]
    return trainer


class Picked:
    """Some documents of a split, in an order of their own."""

    def __init__(self, documents: Any, chosen: list[int]) -> None:
        self._documents, self._chosen, self.lengths = documents, chosen, documents.lengths[chosen]

    def __getattr__(self, name: str) -> Any:
        result = getattr(self._documents, name)
        if name in ("tokens", "types", "loss_weights", "routes", "encoder_inputs"):
            return lambda document, *rest: result(self._chosen[document], *rest)
        return result


def evaluate_heldout_pairs(trainer: Any, batch: Any) -> dict[str, float]:
    """Return the held-out figures of the pairs of a training batch."""
    origins = [origin for m in batch.micro_batches for origin in m.origins]
    with_reference = trainer.sources[0].open_split("train")
    documents = Picked(with_reference, [origin.segment.document for origin in origins])
    numbers = np.concatenate([with_reference.column("reference_logprobs", o.segment.document, 0, n)
                              for o, n in zip(origins, documents.lengths.tolist(), strict=True)])
    source: Any = SimpleNamespace(name="pairs", num_tokens={"heldout": 1}, open_split=lambda split: documents)
    asked = trainer.config.preference
    (found,) = preference.measure_pairs(
        [source], lambda d, chosen: preference.score_documents(trainer, d, chosen, 128, 2), 128, asked,
        (lambda source: numbers) if asked.method in preference.REFERENCE_METHODS else None).values()
    return found


def trl_meters(method: str, pairs: list[tuple[float, float, float, float, int, int]]) -> dict[str, float]:
    """Return rewards/accuracies and rewards/margins of TRL's DPOTrainer (SimPO and ORPO: of CPOTrainer and
    ORPOTrainer without their beta), except that a tie counts half.

    Args:
        method: the loss.
        pairs: log-probabilities of chosen and rejected response by the policy, then by the reference, and
            the two lengths.
    """
    margins = []
    for c, r, rc, rr, nc, nr in pairs:
        if method not in ("dpo", "ipo", "dpo-norm"):
            rc = rr = 0.0
        if method != "dpo":
            c, r, rc, rr = c / nc, r / nr, rc / nc, rr / nr
        beta = 1.0 if method in ("simper", "orpo") else 0.3
        margins.append(beta * (c - rc) - beta * (r - rr))
    return {"pairs_right": sum(1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins) / len(margins),
            "margin": sum(margins) / len(margins),
            "chosen_likelier": sum(c / nc > r / nr for c, r, _, _, nc, nr in pairs) / len(margins)}


def written_out(data: str, run: str, methods: list[str]) -> list[dict[str, Any]]:
    """Return, for each of the methods, loss and meters of a batch after a step, and the same with each
    response passed through the model alone, in numpy."""

    def sums(policy: Any, batch: Any) -> list[tuple[float, int]]:
        """Return each response's log-probability and tokens."""
        found = []
        for first, end in zip(batch.inputs.host_bounds, batch.inputs.host_bounds[1:], strict=False):
            if batch.inputs.padding[first]:
                continue
            ids = batch.inputs.tokens[first:end].tolist()
            micro_batch = DocumentBatch([ids], torch.device("cpu"))
            logits = policy.logits(micro_batch, torch.arange(len(ids))).double().log_softmax(-1)
            learned = (batch.types[first:end] == 2) & (batch.weights[first:end] > 0)
            picked = logits[torch.arange(len(ids)), batch.labels[first:end]][learned]
            found.append((float(picked.sum()), int(learned.sum())))
        return found

    def odds(mean: float) -> float:
        return math.exp(mean) / (1 - math.exp(mean))

    results = []
    for method in methods:
        trainer = _trainer([f"preference.method={method}", "preference.chosen_coeff=0.0",
                            "preference.beta=0.3", "optim.lr=0.002"], data, Path(run))  # of one reference
        objective = trainer.objective
        held = [*trainer.model.parameters(), *trainer.model.buffers()]  # routers' biases move as well
        initial = [tensor.detach().clone() for tensor in held]
        train_step(trainer)
        batch = objective.prepare(objective.collect(trainer.policy, 1))
        now = [s for m in batch.micro_batches for s in sums(trainer.policy, m)]
        measured = evaluate_heldout_pairs(trainer, batch)
        # which moves the routers' biases
        sums_of_batch = trainer.forward_backward.compute_gradients(batch, objective, 2)
        loss = sums_of_batch.terms["preference"] / batch.targets["preference"]
        with torch.no_grad():
            for tensor, value in zip(held, initial, strict=True):
                tensor.copy_(value)
        then = [s for m in batch.micro_batches for s in sums(trainer.policy, m)]
        losses = []
        for i in range(0, len(now), 2):
            (c, nc), (r, nr), (rc, _), (rr, _) = now[i], now[i + 1], then[i], then[i + 1]
            losses.append({
                "dpo": lambda c=c, r=r, rc=rc, rr=rr: math.log1p(math.exp(-0.3 * ((c - rc) - (r - rr)))),
                "ipo": lambda c=c, r=r, rc=rc, rr=rr, nc=nc, nr=nr:
                    ((c - rc) / nc - (r - rr) / nr - 1 / 0.6) ** 2,
                "dpo-norm": lambda c=c, r=r, rc=rc, rr=rr, nc=nc, nr=nr:
                    math.log1p(math.exp(-0.3 * ((c - rc) / nc - (r - rr) / nr))),
                "simper": lambda c=c, r=r, nc=nc, nr=nr: math.exp(r / nr) - math.exp(c / nc),
                "simpo": lambda c=c, r=r, nc=nc, nr=nr: math.log1p(math.exp(-0.3 * (c / nc - r / nr) + 0.5)),
                "orpo": lambda c=c, r=r, nc=nc, nr=nr:
                    math.log1p(odds(r / nr) / odds(c / nc)),
            }[method]())
        results.append({"method": method, "ours": loss, "written_out": float(np.mean(losses)),
                        "pairs": len(losses), "spread": float(np.std(losses)),
                        "meters": sums_of_batch.meters, "measured": measured,
                        "trl": trl_meters(method, [
                            (now[i][0], now[i + 1][0], then[i][0], then[i + 1][0], now[i][1], now[i + 1][1])
                            for i in range(0, len(now), 2)])})
        trainer.close()
        world.leave_world()
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("methods", [["dpo", "simpo"], pytest.param(["ipo", "dpo-norm", "simper", "orpo"],
                                                                    marks=pytest.mark.deep)])
def test_losses_are_the_papers(ranks: Any, job: Any, pairs: Path, tmp_path: Path, methods: list[str]) -> None:
    ((results,),) = ranks(job(__file__, "written_out", 1, {"data": str(pairs), "run": str(tmp_path),
                                                           "methods": methods}))
    assert len(results) == len(methods)
    for found in results:
        assert found["pairs"] >= 4 and found["spread"] > 1e-6, found
        # the reference keeps float32: some 40 numbers of 1e-7 each
        assert found["ours"] == pytest.approx(found["written_out"], rel=1e-5, abs=2e-6), found
        # One definition in training, held out and in TRL.
        for name in ("pairs_right", "margin"):
            assert found["meters"][name] == pytest.approx(found["trl"][name], rel=1e-4, abs=1e-5), found
        assert found["measured"] == pytest.approx(
            found["trl"] | {"pairs": found["pairs"]}, rel=1e-4, abs=1e-5), found


MARGINS = (-30.0, -1.5, 0.0, 0.25, 4.0)


@pytest.mark.each("beta", [0.1, 0.5])
@pytest.mark.each("smoothing", [0.0, 0.2])
def test_dpo_is_the_papers(beta: float, smoothing: float) -> None:
    margins = torch.tensor(MARGINS, dtype=torch.float64, requires_grad=True)
    losses = dpo(margins, beta, smoothing)
    (slopes,) = torch.autograd.grad(losses.sum(), margins)
    for x, loss, slope in zip(MARGINS, losses.tolist(), slopes.tolist(), strict=True):
        right = 1 / (1 + math.exp(-beta * x))  # sigma(beta x): how likely the pair is the right way round
        assert loss == pytest.approx(-(1 - smoothing) * math.log(right) - smoothing * math.log(1 - right),
                                     abs=1e-12)
        assert slope == pytest.approx(beta * (right - (1 - smoothing)), abs=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo_asks_for_a_lead(smoothing: float) -> None:
    chosen, rejected = torch.tensor([-1.0, -2.0]).double(), torch.tensor([-3.0, -0.5]).double()
    # r = beta * mean log p; the chosen one has to lead by gamma
    right = [1 / (1 + math.exp(-(2.5 * lead - 1.5))) for lead in (2.0, -1.5)]
    assert simpo(chosen, rejected, 2.5, 1.5, smoothing).tolist() == pytest.approx(
        [-(1 - smoothing) * math.log(p) - smoothing * math.log(1 - p) for p in right], abs=1e-12)


def test_orpo_weighs_odds_and_stays_finite_where_a_response_is_certain() -> None:
    chosen, rejected = torch.tensor([-0.1, -2.0]).double(), torch.tensor([-3.0, -0.5]).double()
    odds = [(math.exp(c) / (1 - math.exp(c)), math.exp(r) / (1 - math.exp(r)))
            for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    assert orpo(chosen, rejected).tolist() == pytest.approx(
        [-math.log((c / r) / (1 + c / r)) for c, r in odds], abs=1e-12)
    certain = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    losses = orpo(certain, rejected) + orpo(rejected, certain)
    (slopes,) = torch.autograd.grad(losses.sum(), certain)
    assert losses.isfinite().all() and slopes.isfinite().all()


def test_simper_and_grouper_weigh_inverse_perplexities() -> None:
    chosen, rejected = torch.tensor([-1.0, -2.0]).double(), torch.tensor([-3.0, -0.5]).double()
    expected = [math.exp(-3) - math.exp(-1), math.exp(-0.5) - math.exp(-2)]
    assert simper(chosen, rejected).tolist() == pytest.approx(expected, abs=1e-12)
    both = torch.stack([chosen, rejected], dim=1).flatten()
    assert grouper(both, torch.tensor([1.0, -1.0, 1.0, -1.0])).tolist() == pytest.approx(
        [-math.exp(-1), math.exp(-3), -math.exp(-2), math.exp(-0.5)], abs=1e-12)
