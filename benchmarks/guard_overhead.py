"""What the guards cost: steps of the same training with and without them, in one process, in turns.

    python benchmarks/guard_overhead.py [--nproc 2] [--turns 60] > benchmarks/results/guard_overhead.txt

Two trainers of the same model take turns, so that whatever else the machine does hits both: one with all
guards at their defaults (refusal of steps, hang watch, routing records and alarms, computing time, which is
compared more often than by default, every 20 steps), one with none, not even the agreement of the processes
before an update.  Ratios are medians over turns of with / without.  CPU time is that of rank 0 with all its
threads.  What is done before a checkpoint only is timed by itself.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from loop_overhead import DOCUMENT_TOKENS, NUM_DOCUMENTS, SETTINGS, WARMUP_TURNS, on_one_and_more

from megatron_sov import recipes
from megatron_sov.engine.parallel import world
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.runs.obs.events import EventLog
from megatron_sov.train.data.token_shards import ShardChain, Source

SMALLER = ("train.global_batch_size=4", "train.micro_batch_size=2",
           'data.phases=[{"name": "main", "seq_len": 256}]')
"""Steps of a quarter of loop_overhead's tokens: the shorter a step, the more of it guards can be."""
WITH = ("guards.straggler_every_steps=20",)
WITHOUT = ("guards.skip=false", "guards.hang_timeout_s=0", "guards.straggler_every_steps=0",
           "guards.routing_every_steps=0")


def make_step(config: RunConfig, place: world.ParallelWorld, source: Source, folder: Path,
              guarded: bool) -> Callable[[], None]:
    """Return one step of the training loop, as `train.loop` does it."""
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.objectives.data_objective import LanguageModelling
    from megatron_sov.train.stopping import StopFlag
    from megatron_sov.train.trainer import Trainer

    trainer, stop = Trainer(config, place, RunFolder(folder), [source], LanguageModelling), StopFlag()
    guards = trainer.guards
    if place.is_main:
        trainer.recorder.events = EventLog(folder.with_suffix(".jsonl"))
    if guarded:  # as after many steps, and none is a spike
        usual = [100.0 + i % 7 for i in range(config.guards.window_steps)]
        guards.step_guard.restore({"losses": usual, "grad_norms": usual, "in_a_row": 0, "suspect_in_a_row": 0,
                                   "rollbacks": []})
    else:
        guards.step_guard.accepts = lambda loss, grad_norm: True  # type: ignore[method-assign]

    def step() -> None:
        guards.watchdog.begin(trainer.step + 1)
        result = trainer.update()
        assert result is not None, "a step was refused"
        trainer.recorder.step(trainer.state, result, trainer.observe())
        guards.watchdog.end()
        trainer.checkpointer.sync(stop)

    return step


def time_comparison(config: RunConfig, place: world.ParallelWorld) -> float:
    """Return the seconds in which all processes compare their replicas once."""
    from megatron_sov.checkpoint import load
    from megatron_sov.engine.model.language_model import build
    from megatron_sov.engine.model.replica_checks import differing_replicas

    model = build(config.model, config.parallel, config.train)
    load.initialise(model, config.model, 1)
    times = []
    for _ in range(5):
        start_s = time.perf_counter()
        assert differing_replicas(model) == [], "replicas differ"
        times.append(time.perf_counter() - start_s)
    return statistics.median(times)


def measure(turns: int, folder: Path) -> None:
    """Take turns and print a table; runs on every rank."""
    plain = apply_settings(recipes.get("tiny-solar-open"), [*SETTINGS, *SMALLER])
    place = world.join(plain.parallel)
    source = Source("web", None, "text", {}, {"train": NUM_DOCUMENTS * DOCUMENT_TOKENS}, 1.0,
                    ShardChain([folder / "train"]))
    steps = {
        name: make_step(apply_settings(plain, list(settings)), place, source, folder / name, name == "with")
        for name, settings in (("with", WITH), ("without", WITHOUT))}
    wall: dict[str, list[float]] = {name: [] for name in steps}
    busy: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns + WARMUP_TURNS):
        for name in sorted(steps, reverse=turn % 2 == 1):  # who comes first alternates
            start_s, cpu_s = time.perf_counter(), time.process_time()
            steps[name]()
            if turn >= WARMUP_TURNS:
                wall[name].append(time.perf_counter() - start_s)
                busy[name].append(time.process_time() - cpu_s)
    compare_s = time_comparison(plain, place)
    world.leave()
    if place.is_main:
        print(f"\n{place.size} process(es), {turns} steps each of 4 x 256 tokens; "
              f"load {os.getloadavg()[0]:.1f} at the end")
        print(f"{'guards':<10}{'wall ms':>10}{'CPU ms':>10}")
        for name in steps:
            print(f"{name:<10}{1e3 * statistics.median(wall[name]):>10.1f}"
                  f"{1e3 * statistics.median(busy[name]):>10.1f}")
        for label, times in (("wall", wall), ("CPU", busy)):
            ratio = statistics.median(a / b for a, b in zip(times["with"], times["without"], strict=True))
            sums = sum(times["with"]) / sum(times["without"])
            print(f"with / without, {label}: median of turns {ratio:.3f}, of sums {sums:.3f}")
        print(f"comparison of replicas before a checkpoint: {1e3 * compare_s:.1f} ms", flush=True)


if __name__ == "__main__":
    on_one_and_more(measure, __doc__, turns=60)
