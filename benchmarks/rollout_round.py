"""What publishing a round costs: processor time, memory of each process, bytes a token; and how many files a
job looks up that takes up the pieces of a round.

    python benchmarks/rollout_round.py [--prompts 100000] [--samples 8] [--tokens 48] [--processes 1,4]
        [--routes LAYERS,TOP_K,EXPERTS] [--known 1000000] [--piece-prompts 64]

A store of one round is written by the store's own writer, with rewards: responses of about `--tokens` tokens
to prompts of 16.  A run has `--known` prompts, of which a round asks `--prompts`.  The round is then
published anew by each number of processes, which join each other over Gloo; memory is the peak of a process
above what it had with the prompts read.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import numpy as np
import torch.distributed as dist
from tokenizers import Tokenizer, models

from megatron_sov import recipes
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.documents.shard_files import RouteShape
from megatron_sov.chat.vocabulary import TOKENIZER_JSON, tokenizer_digest
from megatron_sov.model.config import PhaseConfig, PolicyConfig, RolloutConfig, RunConfig
from megatron_sov.model.config.run import with_rounds
from megatron_sov.post.rl import publish
from megatron_sov.post.rl.generate import Missing
from megatron_sov.rollouts.prompts import RolloutPrompt, round_pieces
from megatron_sov.rollouts.rows import STOP, Key, RewardRow, Rollout
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs.rounds import Policy

PROMPT_TOKENS, VOCAB_SIZE, VERSION = 16, 1024, "a" * 64


def config_of(args: argparse.Namespace) -> RunConfig:
    base = recipes.get("tiny-solar-open")
    rollout = RolloutConfig(rounds=1, prompts_per_round=args.prompts, samples_per_prompt=args.samples,
                            piece_prompts=args.piece_prompts, max_new_tokens=2 * args.tokens,
                            max_prompt_tokens=PROMPT_TOKENS)
    phase = PhaseConfig("main", seq_len=PROMPT_TOKENS + 2 * args.tokens)
    return with_rounds(dataclasses.replace(
        base, rollout=rollout, policy=PolicyConfig(method="grpo"),
        model=dataclasses.replace(base.model, vocab_size=VOCAB_SIZE),
        data=dataclasses.replace(base.data, phases=(phase,))))


def prompts_of(args: argparse.Namespace) -> list[RolloutPrompt]:
    return [RolloutPrompt(f"{i:016x}", {"prompt": f"What is {i}?"}) for i in range(args.known)]


def shape_of(args: argparse.Namespace) -> RouteShape | None:
    return RouteShape(*map(int, args.routes.split(","))) if args.routes else None


def write_store(folder: Path, args: argparse.Namespace, prompts: Sequence[RolloutPrompt]) -> None:
    """Write the store of a round, and its tokenizer."""
    letters = {f"<{i}>": i for i in range(VOCAB_SIZE)}
    (folder / "tokenizer").mkdir()
    Tokenizer(models.BPE(letters, [])).save(str(folder / "tokenizer" / TOKENIZER_JSON))
    store = RolloutStore.create(folder / "store", tokenizer_digest(folder / "tokenizer"), VOCAB_SIZE)
    shape, draw = shape_of(args), np.random.default_rng(0)
    most = 2 * args.tokens
    ids = np.minimum(draw.zipf(1.2, 1 << 16), VOCAB_SIZE - 1).astype(np.int32)
    logprobs, versions = -draw.exponential(0.7, 1 << 16).astype(np.float32), np.zeros(most, np.int32)
    for piece in round_pieces(prompts, config_of(args).rollout, 1, 0):
        rows = []
        for prompt in piece.prompts:
            for sample in range(args.samples):
                count, at = int(draw.integers(args.tokens // 2, most - args.tokens // 2)), int(
                    draw.integers(0, len(ids) - most))
                routes = None if shape is None else draw.permuted(np.broadcast_to(
                    np.arange(shape.num_experts, dtype=shape.dtype),
                    (PROMPT_TOKENS + count - 1, shape.layers, shape.num_experts)),
                    axis=2)[:, :, :shape.top_k].copy()
                rows.append(Rollout(
                    Key(prompt.id, sample, "b" * 64, "c" * 64), 1, 0, prompt.record, ids[:PROMPT_TOKENS],
                    ids[at:at + count], logprobs[at:at + count], versions[:count], STOP, "It is.", 1.0,
                    "benchmark", 0.0, 1.0, routes=routes))
        store.add_rollouts(piece.part(), rows, {})
        store.add_rewards(VERSION, piece.part(), [RewardRow(
            row.key, 0, VERSION, float(row.key.sample % 2), "scored") for row in rows])


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def publish_one(rank: int, size: int, folder: Path, args: argparse.Namespace,
                prompts: Sequence[RolloutPrompt], told: Any) -> None:
    """Publish the round as one of several processes, and tell what it took this one."""
    if size > 1:
        dist.init_process_group("gloo", f"file://{folder}/joined-{size}", rank=rank, world_size=size)
    publisher = publish.Publisher(config_of(args), folder / str(size) / "rounds", folder / "store", prompts,
                                  VERSION, folder / "tokenizer")
    base_mb, began, began_cpu = peak_mb(), time.perf_counter(), time.process_time()
    with mock.patch.object(publish, "replayed_routes", lambda config: shape_of(args)):
        assert not (lacks := publisher.publish(1)), lacks
    told.put((time.process_time() - began_cpu, time.perf_counter() - began, peak_mb() - base_mb))


def publish_by(nproc: int, folder: Path, args: argparse.Namespace, prompts: Sequence[RolloutPrompt]) -> str:
    """Publish the round by some processes; returns what it took them."""
    fork = multiprocessing.get_context("fork")
    queue: Any = fork.Queue()
    running = [fork.Process(target=publish_one, args=(rank, nproc, folder, args, prompts, queue))
               for rank in range(nproc)]
    for process in running:
        process.start()
    told = [queue.get() for _ in running]
    for process in running:
        process.join()
    manifest = read_manifest(folder / str(nproc) / "rounds/0001")
    train = manifest.content["sources"][0]["splits"]["train"]
    size_bytes = sum(file.size_bytes for file in manifest.files.values())
    count = train["num_tokens"]
    cpus_s, walls_s, added_mb = zip(*told, strict=True)
    return (f"{nproc} processes: {count:,} tokens of {train['num_documents']:,} responses in "
            f"{len(train['shards'])} shards, {size_bytes / count:.2f} bytes a token; processor "
            f"{sum(cpus_s):.1f} s in all ({sum(cpus_s) / count * 1e6:.2f} a million tokens), the busiest "
            f"{max(cpus_s):.1f} s; {max(walls_s):.1f} s by the clock; memory of each +"
            + ", +".join(f"{mb:,.0f}" for mb in added_mb) + " MB")


def look_ups(pieces: int) -> str:
    """Take up the pieces of a round one after the other; returns what was looked up."""
    written, count = set[str](), 0

    def has(name: str) -> bool:
        nonlocal count
        count += 1
        return name in written

    rollout = RolloutConfig(rounds=1, prompts_per_round=pieces, samples_per_prompt=1, piece_prompts=1)
    prompts = [RolloutPrompt(f"{i:016x}", {}) for i in range(pieces)]
    claim = SimpleNamespace(renewing=contextlib.nullcontext, release=lambda: None)
    missing = Missing(cast(Any, SimpleNamespace(has=has, read_rollouts=lambda name, fields: [])),
                      cast(Any, SimpleNamespace(take=lambda name: claim)), prompts, rollout, range(1, 2),
                      lambda number: Policy(Path(), 0, "a" * 64), lambda number: "")
    began = time.process_time()
    while attempts := missing.take():
        written.update(attempt.name for attempt in attempts)
        missing.leave()
    return (f"{pieces:,} pieces taken up by one job: {count:,} look-ups ({count / pieces:.0f} a piece; "
            f"{pieces**2 / 2:,.0f} where each take looks up all that is open), "
            f"{time.process_time() - began:.1f} s of processor")


def main() -> None:
    """Publish a round, and say what it took."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--known", type=int, default=1_000_000)
    parser.add_argument("--piece-prompts", type=int, default=64)
    parser.add_argument("--processes", default="1,4")
    parser.add_argument("--routes", default="")
    args = parser.parse_args()
    prompts = prompts_of(args)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {args.prompts:,} of {args.known:,} "
          f"prompts x {args.samples} responses of about {args.tokens} tokens, routes {args.routes or 'none'}",
          flush=True)
    with tempfile.TemporaryDirectory() as folder:
        began_cpu = time.process_time()
        write_store(Path(folder), args, prompts)
        print(f"the store was written in {time.process_time() - began_cpu:.0f} s of processor", flush=True)
        for nproc in map(int, args.processes.split(",")):
            print(publish_by(nproc, Path(folder), args, prompts), flush=True)
    if not args.routes:
        for pieces in (1_250, 12_500):
            print(look_ups(pieces), flush=True)
    print(f"load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
