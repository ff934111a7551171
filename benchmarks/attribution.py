"""Planted faults, and what refused steps were put down to (`guards.attribute`).

    python benchmarks/attribution.py [--cases 20] > benchmarks/results/attribution.txt

Three data-parallel processes train a small model for 60 steps (on documents of 64 words in no order, whose
loss falls from that of 8,192 words to that of 64), which says what is usual; then one thing goes wrong, in
each case at another seed, place and size:
  data          a document makes the loss NaN, or 10,000 times larger, whenever it is read
  computation   a high bit of one process's gradient flips once
  memory        a high bit of one process's weight flips, and stays
  rate          the learning rate of one step is 10^2 to 10^30 times too large
  usual         nothing goes wrong
A case is right when the verdict is, and when it names the process, or the document that was planted.  Where
nobody notices (no step is refused within three), there is nothing to attribute, and another case takes its
place.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from loop_overhead import DOCUMENT_TOKENS, NUM_DOCUMENTS, VOCAB_SIZE, write_shard

from megatron_sov import recipes
from megatron_sov.engine.parallel import cpu_shims, launcher, world
from megatron_sov.model.config import apply_settings
from megatron_sov.train.data.token_shards import ShardChain, Source

NUM_RANKS, USUAL_STEPS, NUM_WORDS = 3, 60, 64
SETTINGS = (f"model.vocab_size={VOCAB_SIZE}", "model.hidden_size=32", "model.num_layers=2",
            "model.head_dim=8", "model.expert_ffn_dim=16", "model.num_experts=4",
            'data.phases=[{"name": "main", "seq_len": 64}]',
            "train.steps=100000", "train.global_batch_size=6", "train.micro_batch_size=1",
            "train.precision=fp32", "train.eval_every_steps=0", "guards.hang_timeout_s=0",
            "guards.window_steps=40", "train.deterministic=true", "guards.attribute=true",
            "optim.lr=2e-2", "optim.min_lr=2e-2", "optim.warmup_steps=0")
EXPECTED = {"data": "data", "computation": "process", "memory": "weights", "rate": "optimisation"}


def trained(seed: int, place: world.ParallelWorld, source: Source, folder: Path) -> tuple[Any,
                                                                                          list[dict[str,
                                                                                                    Any]]]:
    """Return a trainer behind its usual steps, and the list that its attributions go to."""
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.objectives.data_objective import LanguageModelling
    from megatron_sov.train.trainer import Trainer

    config = apply_settings(recipes.get("tiny-solar-open"), [*SETTINGS, f"train.seed={seed}"])
    trainer, told = Trainer(config, place, RunFolder(folder), [source], LanguageModelling), []

    def write(event: str, **fields: Any) -> None:
        if event == "attribution":
            told.append(fields)

    trainer.recorder.events = SimpleNamespace(  # type: ignore[assignment]
        write=write, is_open=False, close=lambda: None)
    for _ in range(USUAL_STEPS):
        update(trainer)
    return trainer, told


def update(trainer: Any) -> Any:
    """Do a step as the loop does."""
    from megatron_sov.train.loop import attribute

    result = trainer.update()
    attribute(trainer)
    return result


def plant_data(trainer: Any, case: int) -> Callable[[dict[str, Any]], bool]:
    """Let a document of the next batch spoil the loss; returns whether an attribution names it."""
    batch, place = trainer.objective.collect(trainer.policy, trainer.step), trainer.world
    mine = batch.micro_batches[case // 2 % len(batch.micro_batches)].origins[0].segment.document
    bad = world_value(mine, place, of_rank=case % NUM_RANKS)
    learn, factor = trainer.objective.loss, torch.nan if case % 2 else 1e4

    def loss(hidden: Any, head: Any, micro_batch: Any) -> Any:
        sums = learn(hidden, head, micro_batch)
        if any(o.segment.document == bad for o in micro_batch.origins):
            sums.by_source[:, 0] *= factor
            sums.terms["lm"] = sums.terms["lm"] * factor
        return sums

    trainer.objective.loss, trainer.objective.collect = loss, lambda policy, step: batch
    return lambda event: any(name.endswith(f" document {bad}") for name in event["documents"])


def world_value(mine: int, place: world.ParallelWorld, of_rank: int) -> int:
    """Return what one rank has, on all of them."""
    from megatron_sov.engine.parallel.values import gather_objects

    return int(gather_objects(mine)[of_rank])


def plant_bit(trainer: Any, case: int, kind: str) -> Callable[[dict[str, Any]], bool]:
    """Flip a high bit on one process; returns whether an attribution names that process alone."""
    from megatron_sov.engine.model import replica_checks

    rank, bit = case % NUM_RANKS, 30 - case // NUM_RANKS % 2
    here = trainer.world.rank == rank
    tensors = [p for name, p in trainer.model.named_parameters() if ".self_attention.linear" in name
               and p.dim() == 2]
    chosen = tensors[case % len(tensors)]
    if kind == "memory":
        if here:
            replica_checks.flip_bit(chosen, bit)
    else:
        wait, times = trainer.expert_load.before_sync, []

        def once() -> None:
            if here and not times:
                times.append(1)
                replica_checks.flip_bit(chosen.main_grad, bit)
            wait()

        trainer.expert_load.before_sync = once
    return lambda event: event["ranks"] == (rank,)


def plant_rate(trainer: Any, case: int) -> Callable[[dict[str, Any]], bool]:
    """Make the next step's learning rate too large, and do that step."""
    usual, factor = trainer.schedule.learning_rate, 10.0 ** (2 + case % 20 * 28 / 19)
    trainer.schedule.learning_rate = lambda step: usual(step) * factor
    update(trainer)
    trainer.schedule.learning_rate = usual
    return lambda event: True


def measure(cases: int, folder: Path) -> None:
    """Plant all faults and print a table; runs on every rank."""
    place = world.join(apply_settings(recipes.get("tiny-solar-open"), list(SETTINGS)).parallel)
    source = Source("web", None, "text", {}, {"train": NUM_DOCUMENTS * DOCUMENT_TOKENS}, 1.0,
                    ShardChain([folder / "train"]))
    if place.is_main:
        print(f"{'planted':<14}{'cases':>6}{'refused':>9}{'right':>7}   others", flush=True)
    for kind in (*EXPECTED, "usual"):
        refused, right, others, case = 0, 0, [], -1
        while (kind == "usual" and case + 1 < cases) or (kind != "usual" and refused < cases
                                                         and case + 1 < 4 * cases):
            case += 1
            trainer, told = trained(1000 + case, place, source, folder / f"{kind}-{case}")
            plant = {"data": plant_data, "rate": plant_rate, "usual": lambda *_: lambda event: False}.get(
                kind, lambda trainer, case, kind=kind: plant_bit(trainer, case, kind))
            names_it = plant(trainer, case)
            refused += any(update(trainer) is None for _ in range(3))  # the same on all processes
            if told:
                is_right = told[0]["verdict"] == EXPECTED.get(kind) and names_it(told[0])
                right += is_right
                others += [] if is_right else [f"{told[0]['verdict']} {told[0]['ranks'] or ''} (case {case})"]
            trainer.close()
        if place.is_main:
            print(f"{kind:<14}{case + 1:>6}{refused:>9}{right:>7}   {'; '.join(others) or '-'}", flush=True)
    world.leave()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20)
    args = parser.parse_args()
    cpu_shims.prepare_megatron()
    print(f"{platform.machine()}, {os.cpu_count()} cores (load {os.getloadavg()[0]:.1f} at the start), "
          f"{NUM_RANKS} processes", flush=True)
    with tempfile.TemporaryDirectory() as name:
        write_shard(Path(name))
        tokens = np.random.default_rng(0).integers(1, NUM_WORDS + 1, NUM_DOCUMENTS * DOCUMENT_TOKENS)
        tokens.astype(np.int32).tofile(Path(name) / "train.bin")
        sys.exit(launcher.launch(lambda: measure(args.cases, Path(name)), NUM_RANKS, num_threads=1))
