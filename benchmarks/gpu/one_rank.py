"""One rank of a run, as training builds it: model, optimizer and steps on random documents, without files.

`fake_rank.py` runs it on fake tensors, `part_big_rank.py` on a GPU.
"""

import os
import time
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from megatron_sov.checkpoint import initial_weights
from megatron_sov.engine.model.expert_load import ExpertLoad
from megatron_sov.engine.model.language_model import build_model
from megatron_sov.engine.optimizer.optimizer import Optimizer
from megatron_sov.engine.parallel import world
from megatron_sov.model.config import RunConfig
from megatron_sov.train.data.rows import PackedRow
from megatron_sov.train.forward_backward import ForwardBackward
from megatron_sov.train.guards.fault_injection import FaultInjector
from megatron_sov.train.objectives.data_objective import LanguageModelling
from megatron_sov.train.objectives.microbatch import build_micro_batch
from megatron_sov.train.objectives.objective import GlobalBatch

DOCUMENT_TOKENS = 1200
"""Mean length of the random documents that a row is packed from."""


class OneRank:
    """Model and optimizer of one rank. With several ranks, create the process group first."""

    def __init__(self, config: RunConfig, rank: int = 0, num_ranks: int = 1) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": "0",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29572"}
        self.config = config
        self.world = world.join_world(config.parallel)
        self.model = build_model(config.model, config.parallel, config.train, config.gpu)
        with patch.object(initial_weights, "_generate_values", _draw_on_device):
            initial_weights.initialize_weights(self.model, config.model, config.train.seed)
        self.optimizer = Optimizer(self.model, config.optim, config.parallel, config.gpu)
        self.expert_load = ExpertLoad(self.model)
        self.model.config.finalize_model_grads_func = self.expert_load.finalize_gradients
        context: Any = SimpleNamespace(config=config, batches=SimpleNamespace(num_sources=1))
        self.objective = LanguageModelling(context)
        self.computation = ForwardBackward(config, self.model, self.optimizer, self.expert_load, 1,
                                           FaultInjector((), Path(), rank), None)

    def batch(self, step: int, num_micro_batches: int) -> GlobalBatch:
        """Return this rank's part of a step's batch, drawn with the step number as seed."""
        config, rng = self.config, np.random.default_rng(step)
        seq_len, micro_batch_size = config.data.phases[0].seq_len, config.train.micro_batch_size
        rows = [draw_row(rng, seq_len * micro_batch_size, config.model.vocab_size)
                for _ in range(num_micro_batches)]
        num_sequences = num_micro_batches * micro_batch_size * self.world.dp_size
        micro_batches = tuple(map(build_micro_batch, rows))
        return self.objective.prepare(GlobalBatch(micro_batches, seq_len, num_sequences, "random"))

    def step(self, number: int, num_micro_batches: int = 1) -> tuple[float, float]:
        """Run optimizer step `number` (from 1) and return its loss and seconds."""
        batch = self.batch(number, num_micro_batches)
        wait()
        begin_s = time.monotonic()
        sums = self.computation.compute_gradients(batch, self.objective, number)
        self.optimizer.step(self.config.optim.lr)
        wait()
        loss = sum(self.objective.coefficients[term] * value / batch.targets[term]
                   for term, value in sums.terms.items())
        return loss, time.monotonic() - begin_s


def _draw_on_device(parts: Iterable[Any], seed: int, num_threads: int) -> Iterator[tuple[Any, torch.Tensor]]:
    """Yield parameters with normal values drawn on their device.

    The layout-independent initial values of training are drawn on the CPU, which takes minutes for one rank
    of solar-open-102b.
    """
    # on both devices: 8-bit weights are quantized from bf16 weights on the host
    generators: dict[torch.device, torch.Generator] = {}
    for part in parts:
        device = part.target.device
        generator = generators.setdefault(device, torch.Generator(device).manual_seed(seed))
        yield part, torch.randn(part.target.shape, device=device, generator=generator) * part.std


def wait() -> None:
    """Wait for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def draw_row(random: np.random.Generator, num_tokens: int, vocab_size: int) -> PackedRow:
    """Return a packed row of documents in which most tokens are a function of the token before.

    There is something to learn in them, so the loss of correct steps decreases.
    """
    num_cuts = max(1, num_tokens // DOCUMENT_TOKENS)
    cuts = np.sort(random.choice(np.arange(1, num_tokens), num_cuts, replace=False))
    bounds = np.array([0, *cuts, num_tokens], np.int32)
    tokens = random.integers(0, vocab_size, num_tokens)
    for _ in range(3):
        follows = random.random(num_tokens) < 0.8
        tokens[1:] = np.where(follows[1:], (tokens[:-1] * 31 + 17) % vocab_size, tokens[1:])
    positions = np.concatenate([np.arange(b - a) for a, b in pairwise(bounds)])
    weights = np.ones(num_tokens, np.float32)
    weights[bounds[1:] - 1] = 0
    return PackedRow(
        tokens=tokens.astype(np.int64), labels=np.roll(tokens, -1).astype(np.int64), weights=weights,
        positions=positions.astype(np.int64), types=np.zeros(num_tokens, np.uint8),
        sources=np.zeros(num_tokens, np.int64), padding=np.zeros(num_tokens, bool), bounds=bounds)
