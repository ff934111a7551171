"""Peak memory of an optimizer step on one sequence of 131,072 tokens, compared with the prediction of `plan`.

Usage: python benchmarks/long_sequence.py [--lengths 32768 131072] > benchmarks/results/long_sequence.txt

A thin K-EXAONE (three sliding layers, one global layer, experts, float32) trains one step of the ordinary
loop on two processes that share the sequence (`parallel.cp` 2), and recomputes each layer. Each length runs
in new processes. `before` is a process's resident memory before it builds the model; `grown` is the increase
up to the peak, in the process with the larger increase; `account` is the prediction of
`plan/footprint/memory.py`, which docs/memory.md explains.
"""

import argparse
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measurement import describe_machine

from megatron_sov import recipes
from megatron_sov.base.documents.shard_files import write_index
from megatron_sov.engine.parallel import launcher, world
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.plan.footprint.memory import MemoryAccount, build_account
from megatron_sov.train.data.sources import Source
from megatron_sov.train.data.token_shards import ShardChain

NPROC, MIB = 2, 1 << 20
SETTINGS = ("parallel.cp=2", "train.recompute=true", "model.hidden_size=256", "model.num_heads=1",
            "model.num_kv_heads=1", "model.dense_ffn_dim=256", "model.sliding_window_tokens=128",
            "model.mtp_attention=L", "train.steps=1", "train.global_batch_size=1", "train.micro_batch_size=1",
            "train.eval_every_steps=0", "data.prefetch_steps=0")


def write_random_source(folder: Path, num_documents: int, num_tokens: int, vocab_size: int) -> Source:
    """Write a token shard of documents with `num_tokens` random tokens each, and return it as a source."""
    folder.mkdir(parents=True, exist_ok=True)
    write_index(folder / "train", "int32", np.full(num_documents, num_tokens, np.int32))
    ids = np.random.default_rng(0).integers(1, vocab_size, num_documents * num_tokens, dtype=np.int32)
    ids.tofile(folder / "train.bin")
    return Source("random", None, "text", {}, {"train": ids.size}, 1.0, ShardChain([folder / "train"]))


def read_resident_bytes(field: str) -> int:
    """Return this process's resident memory: now (field "VmRSS") or at its peak ("VmHWM")."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None, field
    return int(match[1]) << 10


def build_config(tokens: int) -> RunConfig:
    """Return the settings for sequences of `tokens` tokens."""
    return apply_settings(recipes.get("tiny-k-exaone"), [
        *SETTINGS, f"model.max_position_tokens={tokens}",
        f'data.phases=[{{"name": "long", "seq_len": {tokens}}}]'])


def build_trainer(config: RunConfig, place: world.ParallelWorld, folder: Path) -> Any:
    """Return the trainer of a run on two random documents per sequence of a step."""
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.objectives.data_objective import LanguageModelling
    from megatron_sov.train.trainer import Trainer

    tokens = config.data.phases[0].seq_len
    source = write_random_source(folder / f"data-{place.rank}", 2 * config.train.global_batch_size, tokens,
                                 config.model.vocab_size)
    return Trainer(config, place, RunFolder(folder / "run"), [source], LanguageModelling)


def train_one_step(config: RunConfig, folder: Path) -> tuple[int, int, float, float]:
    """Train a step on this rank; return bytes before, bytes grown, seconds and loss."""
    from megatron_sov.train.loop import train_step

    place = world.join_world(config.parallel)
    before, begin_s = read_resident_bytes("VmRSS"), time.perf_counter()
    trainer = build_trainer(config, place, folder)
    result = train_step(trainer)
    assert result is not None and result.num_tokens == config.data.phases[0].seq_len
    grown, seconds = read_resident_bytes("VmHWM") - before, time.perf_counter() - begin_s
    trainer.close()
    world.leave_world()
    return before, grown, seconds, result.loss


def measure_ranks(measure: Callable[[Path], Any], nproc: int) -> list[Any]:
    """Call `measure` with a temporary folder on `nproc` ranks of one thread; return each rank's result.

    Raises:
        SystemExit: a rank failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def run_rank() -> None:
            (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(measure(folder)))

        if code := launcher.launch_ranks(run_rank, nproc, num_threads=1):
            raise SystemExit(code)
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(nproc)]


def main() -> None:
    """Measure each length and print a table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32_768, 65_536, 131_072])
    args = parser.parse_args()
    print(f"{describe_machine()}; {NPROC} processes of one thread\n"
          "MiB of one process, float32, recomputation on\n")
    print(f"{'tokens':>8}{'before':>8}{'grown':>8}{'account':>9}{'ratio':>7}{'seconds':>9}{'loss':>7}   "
          "account: " + ", ".join(MemoryAccount.__annotations__))
    for tokens in args.lengths:
        config = build_config(tokens)
        planned = build_account(config, NPROC, 0, tokens)
        rows = measure_ranks(partial(train_one_step, config), NPROC)
        before, grown, seconds, loss = max(rows, key=lambda row: row[1])
        print(f"{tokens:>8,}{before / MIB:>8.0f}{grown / MIB:>8.0f}{planned.allocated / MIB:>9.0f}"
              f"{grown / planned.allocated:>7.2f}{seconds:>9.0f}{loss:>7.3f}   "
              + ", ".join(f"{v / MIB:.0f}" for v in vars(planned).values()), flush=True)


if __name__ == "__main__":
    main()
