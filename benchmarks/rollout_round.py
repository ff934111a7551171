"""What a million prompts and a round of them cost: reading the prompts, publishing the round, reading it
back as training does; processor time, memory of each process, bytes a token; and how many files a job looks
up that takes up the pieces of a round.

    python benchmarks/rollout_round.py [--prompts 100000] [--samples 8] [--tokens 128] [--processes 1,2,4]
        [--routes LAYERS,TOP_K,EXPERTS] [--known 1000000] [--piece-prompts 64] [--steps 100]

A run has a file of `--known` prompts of 30 words, of which a round asks `--prompts`.  A store of one round
is written by the store's own writer, with rewards.  Lengths of responses are log-normal, as those of models
that reason are: mean `--tokens`, 0.7 in the exponent, cut off at eight times the mean; prompts have 16
tokens.  The round is then published anew by each number of processes, which join each other over Gloo, and
read by as many data-parallel ranks, each its own documents of each step.  Memory of who publishes is its
peak above what it had with the prompts read; of who reads, its own pages, those of mapped files left out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
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
from megatron_sov.rollouts.prompts import PromptList, RolloutPrompt, read_prompts, round_pieces
from megatron_sov.rollouts.rows import STOP, Key, RewardRow, Rollout
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs.rounds import Policy
from megatron_sov.train.data.rounds import RoundDocuments

PROMPT_TOKENS, VOCAB_SIZE, VERSION = 16, 1024, "a" * 64
SPREAD, LONGEST = 0.7, 8
"""Of the lengths: standard deviation of their logarithm, and the limit as a multiple of their mean."""


def config_of(args: argparse.Namespace) -> RunConfig:
    base = recipes.get("tiny-solar-open")
    rollout = RolloutConfig(rounds=1, prompts_per_round=args.prompts, samples_per_prompt=args.samples,
                            piece_prompts=args.piece_prompts, max_new_tokens=LONGEST * args.tokens,
                            max_prompt_tokens=PROMPT_TOKENS, steps_per_round=args.steps)
    phase = PhaseConfig("main", seq_len=PROMPT_TOKENS + LONGEST * args.tokens)
    return with_rounds(dataclasses.replace(
        base, rollout=rollout, policy=PolicyConfig(method="grpo"),
        model=dataclasses.replace(base.model, vocab_size=VOCAB_SIZE),
        data=dataclasses.replace(base.data, phases=(phase,))))


def read_known(folder: Path, args: argparse.Namespace) -> tuple[PromptList, str]:
    """Write a file of prompts and read it; returns them, and what that took."""
    draw, file = np.random.default_rng(1), folder / "prompts.jsonl"
    words = np.array(["".join(map(chr, draw.integers(97, 123, n))) for n in draw.integers(2, 10, 5000)])
    with open(file, "w") as f:
        for first in range(0, args.known, 1000):
            texts = [" ".join(row) for row in words[draw.integers(0, len(words), (1000, 30))]]
            f.writelines(json.dumps({"prompt": f"What is {first + i}: {text}?", "answer": str(i),
                                     "domain": "sums"}) + "\n" for i, text in enumerate(texts))
    base_mb, began, began_cpu = own_mb(), time.perf_counter(), time.process_time()
    prompts = read_prompts(file)
    told = (f"{len(prompts):,} prompts ({file.stat().st_size / 1e6:,.0f} MB): read in "
            f"{time.process_time() - began_cpu:.0f} s of processor ({time.perf_counter() - began:.0f} s by "
            f"the clock), +{own_mb() - base_mb:,.0f} MB of memory, and a temporary file of its size")
    began_cpu = time.process_time()
    pieces = round_pieces(prompts, config_of(args).rollout, 1)
    cut_s = time.process_time() - began_cpu
    count = sum(1 for piece in pieces for _ in piece.prompts)
    return prompts, (f"{told}; a round of {count:,} of them in {len(pieces):,} pieces: {cut_s:.2f} s, and "
                     f"{time.process_time() - began_cpu - cut_s:.1f} s to read each, "
                     f"+{own_mb() - base_mb:,.0f} MB then")


def own_mb() -> float:
    """Return the memory of this process, pages of mapped files left out."""
    [kb] = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("RssAnon")]
    return int(kb) / 1e3


def shape_of(args: argparse.Namespace) -> RouteShape | None:
    return RouteShape(*map(int, args.routes.split(","))) if args.routes else None


def write_store(folder: Path, args: argparse.Namespace, prompts: PromptList) -> None:
    """Write the store of a round, and its tokenizer."""
    letters = {f"<{i}>": i for i in range(VOCAB_SIZE)}
    (folder / "tokenizer").mkdir()
    Tokenizer(models.BPE(letters, [])).save(str(folder / "tokenizer" / TOKENIZER_JSON))
    store = RolloutStore.create(folder / "store", tokenizer_digest(folder / "tokenizer"), VOCAB_SIZE)
    shape, draw = shape_of(args), np.random.default_rng(0)
    most = LONGEST * args.tokens
    middle = np.log(args.tokens) - SPREAD**2 / 2
    ids = np.minimum(draw.zipf(1.2, 1 << 16), VOCAB_SIZE - 1).astype(np.int32)
    logprobs, versions = -draw.exponential(0.7, 1 << 16).astype(np.float32), np.zeros(most, np.int32)
    for piece in round_pieces(prompts, config_of(args).rollout, 1, 0):
        rows = []
        for prompt in piece.prompts:
            for sample in range(args.samples):
                count, at = int(np.clip(draw.lognormal(middle, SPREAD), 1, most)), int(
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


def forked(work: Callable[..., None], size: int, *given: Any) -> list[Any]:
    """Return what some processes tell of a piece of work that they do together."""
    fork = multiprocessing.get_context("fork")
    queue: Any = fork.SimpleQueue()
    running = [fork.Process(target=work, args=(rank, size, *given, queue)) for rank in range(size)]
    for process in running:
        process.start()
    for process in running:
        process.join()
        assert not process.exitcode, f"a process ended with {process.exitcode}"
    return [queue.get() for _ in running]


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def publish_one(rank: int, size: int, folder: Path, args: argparse.Namespace,
                prompts: PromptList, told: Any) -> None:
    """Publish the round as one of several processes, and tell what it took this one."""
    if size > 1:
        dist.init_process_group("gloo", f"file://{folder}/joined-{size}", rank=rank, world_size=size)
    publisher = publish.Publisher(config_of(args), folder / str(size) / "rounds", folder / "store", prompts,
                                  VERSION, folder / "tokenizer")
    base_mb, began, began_cpu = peak_mb(), time.perf_counter(), time.process_time()
    with mock.patch.object(publish, "replayed_routes", lambda config: shape_of(args)):
        assert not (lacks := publisher.publish(1)), lacks
    told.put((time.process_time() - began_cpu, time.perf_counter() - began, peak_mb() - base_mb))


def publish_by(nproc: int, folder: Path, args: argparse.Namespace, prompts: PromptList) -> str:
    """Publish the round by some processes; returns what it took them."""
    told = forked(publish_one, nproc, folder, args, prompts)
    read = read_back(nproc, folder, args)
    manifest = read_manifest(folder / str(nproc) / "rounds/0001")
    train = manifest.content["sources"][0]["splits"]["train"]
    size_bytes = sum(file.size_bytes for file in manifest.files.values())
    count = train["num_tokens"]
    cpus_s, walls_s, added_mb = zip(*told, strict=True)
    return (f"{nproc} processes: {count:,} tokens of {train['num_documents']:,} responses in "
            f"{len(train['shards'])} shards, {size_bytes / count:.2f} bytes a token; processor "
            f"{sum(cpus_s):.1f} s in all ({sum(cpus_s) / count * 1e6:.2f} a million tokens), the busiest "
            f"{max(cpus_s):.1f} s; {max(walls_s):.1f} s by the clock; memory of each +"
            + ", ".join(f"{mb:,.0f}" for mb in added_mb) + f" MB\n    {read}")


def read_one(rank: int, size: int, folder: Path, args: argparse.Namespace, told: Any) -> None:
    """Read the documents of one data-parallel rank, and tell what it took."""
    config = config_of(args)
    base_mb, began_cpu = own_mb(), time.process_time()
    rounds = RoundDocuments(folder / str(size) / "rounds", VOCAB_SIZE)
    rounds.verify(1, rank, size)
    rounds.open(1, rounds.read(1, config.data.phases[0].seq_len, args.steps))
    opened_s, count = time.process_time() - began_cpu, 0
    for step in range(args.steps):
        for segment in rounds.of_step(1, step)[rank::size]:
            place = segment.document, 0, segment.count
            count += len(rounds.tokens(*place))
            rounds.loss_weights(*place)
            for name in rounds.columns:
                rounds.column(name, *place)
            if args.routes:
                rounds.routes(*place)
    told.put((count, opened_s, time.process_time() - began_cpu, own_mb() - base_mb))


def read_back(size: int, folder: Path, args: argparse.Namespace) -> str:
    """Read a published round by some data-parallel ranks; returns what it took them."""
    counts, opened_s, cpus_s, added_mb = zip(*forked(read_one, size, folder, args), strict=True)
    return (f"read by {size} data-parallel ranks: at most {max(counts):,} of {sum(counts):,} tokens each, "
            f"processor of the busiest {max(opened_s):.1f} s to check its files and open the round, "
            f"{max(cpus_s):.1f} s in all; memory of each +"
            + ", +".join(f"{mb:,.0f}" for mb in added_mb) + " MB")


def look_ups(pieces: int) -> str:
    """Take up the pieces of a round one after the other; returns what was looked up."""
    written, count = set[str](), 0

    def has(name: str) -> bool:
        nonlocal count
        count += 1
        return name in written

    rollout = RolloutConfig(rounds=1, prompts_per_round=pieces, samples_per_prompt=1, piece_prompts=1)
    prompts = PromptList.of(RolloutPrompt(f"{i:016x}", {}) for i in range(pieces))
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
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--known", type=int, default=1_000_000)
    parser.add_argument("--piece-prompts", type=int, default=64)
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--routes", default="")
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {args.prompts:,} of {args.known:,} "
          f"prompts x {args.samples} responses of about {args.tokens} tokens, routes {args.routes or 'none'}",
          flush=True)
    with tempfile.TemporaryDirectory() as folder:
        prompts, told = read_known(Path(folder), args)
        print(told, flush=True)
        began_cpu = time.process_time()
        write_store(Path(folder), args, prompts)
        size_bytes = sum(file.stat().st_size for file in Path(folder, "store").rglob("*") if file.is_file())
        print(f"the store was written in {time.process_time() - began_cpu:.0f} s of processor: "
              f"{size_bytes / 1e6:,.0f} MB", flush=True)
        for nproc in map(int, args.processes.split(",")):
            print(publish_by(nproc, Path(folder), args, prompts), flush=True)
            shutil.rmtree(Path(folder, str(nproc)))
    if not args.routes:
        for pieces in (1_250, 12_500):
            print(look_ups(pieces), flush=True)
    print(f"load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
