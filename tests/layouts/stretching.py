"""Runs inside ranks: objectives of kinds that the project's own do not have,
on synthetic batches, as plain numbers.

`Pairs`: a loss on pairs of sequences that must stay together, with a cross-entropy term that is normalised on
its own.  `SequenceRatio`: a clipped importance ratio of whole sequences, longer than what one
context-parallel process holds.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sov.engine.model.language_model import ModelInputs
from megatron_sov.engine.model.logprobs import Head
from megatron_sov.engine.parallel import collectives, world
from megatron_sov.runs.folder import RunFolder
from megatron_sov.train.data.token_shards import open_sources
from megatron_sov.train.objectives.data_batches import ObjectiveContext
from megatron_sov.train.objectives.data_objective import LanguageModelling
from megatron_sov.train.objectives.microbatch import MicroBatch
from megatron_sov.train.objectives.objective import GlobalBatch, LossSums, per_source, with_denominators
from megatron_sov.train.trainer import Trainer
from tests.layouts.layout_run import small_config

LENGTHS = ((13, 5, 9, 21), (31, 1, 3, 13), (12, 12, 12, 12), (1, 2, 40, 5))
"""Tokens of the sequences of each row; 48 in all, so that pieces of a row end inside sequences."""
BETA, EPSILON = 0.3, 0.2


@dataclass(frozen=True)
class Sequences(MicroBatch):
    """A row of sequences, with what a policy loss needs of each token."""

    document: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    """[n] int64: number of the sequence in the row."""
    old_logprobs: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    """[n]: log-probabilities under the policy that made the sequences."""
    advantages: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    """[sequences]."""


def _row(step: int, row: int, vocab_size: int) -> Sequences:
    lengths = torch.tensor(LENGTHS[row])
    generator = torch.Generator().manual_seed(100 * step + row)
    n = int(lengths.sum())
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    tokens, labels = torch.randint(1, vocab_size, (2, n), generator=generator)
    weights = (torch.rand(n, generator=generator) > 0.25).float()
    weights[bounds[:-1]] = 1.0  # no sequence without a target
    old = -torch.log(torch.tensor(float(vocab_size))) + 0.3 * torch.randn(n, generator=generator)
    inputs = ModelInputs(tokens=tokens, positions=torch.arange(n) - bounds[document], cu_seqlens=bounds.int(),
                         max_document_tokens=int(lengths.max()), padding=torch.zeros(n, dtype=torch.bool))
    return Sequences(inputs=inputs, labels=labels, weights=weights, types=torch.zeros(n, dtype=torch.uint8),
                     sources=document % 2, document=document, old_logprobs=old,
                     advantages=torch.randn(len(lengths), generator=generator))


class _Synthetic:
    """The batches that both objectives read: row i goes to data-parallel rank i mod n."""

    coefficients: dict[str, float]

    def __init__(self, context: ObjectiveContext) -> None:
        self._vocab_size = context.config.model.vocab_size
        self._num_sources = context.batches.num_sources

    def collect(self, policy: Any, step: int) -> GlobalBatch:
        rank, size = collectives.data_place()
        rows = tuple(_row(step, i, self._vocab_size) for i in range(rank, len(LENGTHS), size))
        return GlobalBatch(rows, sum(LENGTHS[0]), len(LENGTHS), "synthetic")

    def _of_sequences(self, values: torch.Tensor, batch: Sequences) -> torch.Tensor:
        """[n] -> [sequences]: sums over each sequence's targets."""
        return values.new_zeros(len(batch.advantages)).index_add(0, batch.document, values * batch.weights)


class Pairs(_Synthetic):
    """-log sigmoid(beta (log p(chosen) - log p(rejected))) over pairs,
    and cross-entropy on what was chosen."""

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        self.coefficients = {"pair": 1.0, "ce": 0.25}

    def prepare(self, batch: GlobalBatch) -> GlobalBatch:
        tokens = sum(float((m.weights * (m.document % 2 == 0)).sum()) for m in batch.micro_batches)
        return with_denominators(batch, {"pair": sum(len(m.advantages) / 2 for m in batch.micro_batches),
                                         "ce": tokens})

    def loss(self, hidden: list[torch.Tensor], head: Head, batch: Sequences) -> LossSums:
        logprobs = head.logprobs(hidden[0], batch.labels)
        chosen, rejected = self._of_sequences(logprobs, batch).reshape(-1, 2).unbind(1)
        is_chosen = batch.document % 2 == 0
        terms = {"pair": -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).sum(),
                 "ce": -(logprobs * batch.weights * is_chosen).sum()}
        return LossSums(terms, per_source(-logprobs, batch.weights, batch.sources, self._num_sources))


class SequenceRatio(_Synthetic):
    """GSPO (arXiv 2507.18071, eq. 5-7): the ratio is the geometric mean over the sequence's tokens,
    clipped as a whole."""

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        self.coefficients = {"policy": 1.0}
        self.meters = ("clipped", "length")

    def prepare(self, batch: GlobalBatch) -> GlobalBatch:
        return with_denominators(batch, {"policy": sum(len(m.advantages) for m in batch.micro_batches)})

    def loss(self, hidden: list[torch.Tensor], head: Head, batch: Sequences) -> LossSums:
        logprobs = head.logprobs(hidden[0], batch.labels)
        lengths = self._of_sequences(torch.ones_like(logprobs), batch)
        ratio = (self._of_sequences(logprobs - batch.old_logprobs, batch) / lengths).exp()
        gain = torch.minimum(ratio * batch.advantages,
                             ratio.clamp(1 - EPSILON, 1 + EPSILON) * batch.advantages)
        clipped = ((ratio - 1).abs() > EPSILON).sum()
        return LossSums({"policy": -gain.sum()},
                        per_source(-logprobs, batch.weights, batch.sources, self._num_sources),
                        {"clipped": (clipped, len(lengths)), "length": (lengths.sum(), len(lengths))})


OBJECTIVES = {"pairs": Pairs, "sequence ratio": SequenceRatio, "lm": LanguageModelling}


def steps(objective: str, recipe: str, settings: list[str], paths: list[str],
          count: int) -> list[dict[str, Any]]:
    """Train; return each step's loss, terms, losses of sources and gradient norm."""
    config = small_config(recipe, settings, paths, "lm")
    place = world.join(config.parallel)
    sources = open_sources(config.data.paths, config.model.vocab_size)
    trainer = Trainer(config, place, RunFolder(Path("not-written")), sources, OBJECTIVES[objective])
    results = [trainer.update() for _ in range(count)]
    trainer.close()
    world.leave()
    return [{"loss": r.loss, "grad_norm": r.grad_norm, **r.losses,
             **{f"source {k}": v for k, v in r.losses_by_source.items()},
             **{f"meter {k}": v for k, v in r.meters.items()}}
            for r in results if r is not None]
