"""What a restart takes up to its first step, with and without making the initial weights that a checkpoint
replaces, for a model of some 100 million parameters in one process.

Usage: python benchmarks/restart.py > benchmarks/results/restart.txt

Two ways take turns: `with` makes the weights of the seed and then loads the checkpoint over them, as every
restart once did; `without` loads alone, as they do.  CPU time is that of all threads; wall time means
little on a machine that does other things.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from loop_overhead import DOCUMENT_TOKENS, NUM_DOCUMENTS, SEQ_LEN, VOCAB_SIZE, write_shard

from megatron_sov.engine.parallel import cpu_shims

TURNS = 3
SETTINGS = (f"model.vocab_size={VOCAB_SIZE}", "model.hidden_size=512", "model.num_layers=8",
            "model.head_dim=64", "model.num_experts=16", "model.expert_ffn_dim=448", "train.steps=10",
            "train.precision=bf16", "train.global_batch_size=1", "train.micro_batch_size=1",
            "train.eval_every_steps=0", f'data.phases=[{{"name": "main", "seq_len": {SEQ_LEN}}}]')
MODULES = "megatron_sov.train.stages.stage, megatron_sov.train.trainer"
"""What a rank imports, torch and megatron-core among it."""


class Times:
    """Seconds of parts: name -> (wall, CPU) of each turn."""

    def __init__(self) -> None:
        self.of: dict[str, list[tuple[float, float]]] = {}

    def run(self, name: str, part: Any) -> Any:
        """Run a part and note how long it took."""
        wall, cpu = time.monotonic(), time.process_time()
        result = part()
        self.of.setdefault(name, []).append((time.monotonic() - wall, time.process_time() - cpu))
        return result

    def line(self, name: str) -> str:
        """Return the medians of a part."""
        wall, cpu = (statistics.median(values) for values in zip(*self.of[name], strict=True))
        return f"{name:34}{wall:10.2f}{cpu:10.2f}"


def imports(times: Times) -> None:
    """Import what a rank needs, in processes of their own."""
    code = f"import time, {MODULES}; print(time.process_time())"
    for _ in range(TURNS):
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, text=True,
                              stdout=subprocess.PIPE)
        times.of.setdefault("imports", []).append((time.monotonic() - start, float(done.stdout)))


def restarts(times: Times, work: Path) -> int:
    """Build, initialise and load in turns; returns the parameters."""
    from megatron_sov import recipes
    from megatron_sov.checkpoint import load
    from megatron_sov.engine.parallel import world
    from megatron_sov.model.config import apply_settings
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.data.token_shards import ShardChain, Source
    from megatron_sov.train.objectives.data_objective import LanguageModelling
    from megatron_sov.train.trainer import Trainer

    write_shard(work)
    config = apply_settings(recipes.get("tiny-solar-open"), list(SETTINGS))
    place, folder = times.run("process group", lambda: world.join(config.parallel)), RunFolder(work / "run")
    source = Source("main", None, "text", {}, {"train": NUM_DOCUMENTS * DOCUMENT_TOKENS}, 1.0,
                    ShardChain([work / "train"]))
    folder.checkpoints.mkdir(parents=True)

    def built() -> Any:
        return Trainer(config, place, folder, [source], LanguageModelling, initial_weights=False)

    def make_weights(trainer: Any) -> None:
        load.initialise(trainer.model, config.model, config.train.seed)

    first = built()
    make_weights(first)
    first.save()
    first.checkpointer.finish()
    count = sum(p.numel() for p in first.model.parameters())
    del first
    for turn in range(TURNS):
        for name in ("with", "without") if turn % 2 else ("without", "with"):
            trainer = times.run("model, optimizer, order of the data", built)
            if name == "with":
                times.run("initial weights", lambda trainer=trainer: make_weights(trainer))
            times.run("loading the checkpoint", lambda trainer=trainer: trainer.resume(folder.checkpoint(0)))
            trainer.close()
            del trainer
    world.leave()
    return count


def main() -> None:
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 10000)}
    cpu_shims.prepare_megatron()
    times = Times()
    imports(times)
    with tempfile.TemporaryDirectory() as folder:
        count = restarts(times, Path(folder))
    print(f"{platform.machine()}, Python {platform.python_version()}, one process of {os.cpu_count()} cores, "
          f"load {os.getloadavg()[0]:.0f}; {count:,} parameters; medians of {TURNS} turns\n"
          f"{'':34}{'wall, s':>10}{'CPU, s':>10}")
    for name in times.of:
        print(times.line(name))
    sums = {name: statistics.median(cpu for _, cpu in values) for name, values in times.of.items()}
    whole = sum(sums.values())
    print(f"{'a restart with initial weights':44}{whole:10.2f}\n"
          f"{'a restart without':44}{whole - sums['initial weights']:10.2f}")


if __name__ == "__main__":
    main()
