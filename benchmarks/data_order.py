"""The trainer's data order: start-up at 10^9 documents, samples a second beside Megatron's GPTDataset, and
what packing costs.

Usage: python benchmarks/data_order.py > benchmarks/results/data_order.txt
Every measurement runs in a process of its own.  CPU seconds stand beside wall seconds,
for machines that are shared.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov import recipes
from megatron_sov.model.config import DataConfig, PhaseConfig, RunConfig, TrainConfig
from megatron_sov.train.data.order import OrderState, SampleOrder
from megatron_sov.train.data.rows import BatchStream
from megatron_sov.train.data.streams import WINDOW_DOCUMENTS, PackedSegment, Row, best_fit, concatenate, cut
from megatron_sov.train.data.token_shards import Source
from megatron_sov.train.data.views import LongDocuments

NUM_SHARDS, DOCUMENTS_OF_A_SHARD = 4000, 250_000
LENGTHS = {"web": (6.4, 1.1), "code": (6.5, 1.4), "books": (9.5, 1.0), "chats": (6.0, 0.8)}
"""Log-normal lengths (mean and deviation of the logarithm): medians of 600, 670, 13,400 and 400 tokens."""
MEASURE_S = 3.0
EOD = 0


def document_lengths(kind: str, count: int, seed: int = 0) -> np.ndarray:
    """Return [count] int32 tokens of documents, 8 to 200,000."""
    drawn = np.random.default_rng(seed).lognormal(*LENGTHS[kind], count)
    return np.clip(drawn, 8, 200_000).astype(np.int32)


def write_shard(prefix: Path, lengths: np.ndarray, *, sparse: bool) -> None:
    """Write a shard of int32 tokens; a sparse one has an empty file of the right size for tokens."""
    ends = np.cumsum(lengths.astype(np.int64))
    header = b"MMIDIDX\x00\x00" + np.array([1], np.uint64).tobytes() + bytes([4])
    prefix.with_suffix(".idx").write_bytes(
        header + np.array([len(lengths), len(lengths) + 1], np.uint64).tobytes() + lengths.tobytes()
        + (4 * (ends - lengths)).tobytes() + np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
    if sparse:
        with open(prefix.with_suffix(".bin"), "wb") as f:
            f.truncate(int(ends[-1]) * 4)
    else:
        tokens = np.random.default_rng(1).integers(1, 30_000, int(ends[-1]), dtype=np.int32)
        tokens[ends - 1] = EOD
        tokens.tofile(prefix.with_suffix(".bin"))


def source_of(folder: Path, prefixes: tuple[str, ...], num_tokens: int) -> Source:
    return Source("web", folder, "text", {"train": prefixes}, {"train": num_tokens}, 1.0)


def settings(seq_len: int, batch_size: int) -> RunConfig:
    """Return settings that matter for the order; nothing is prepared ahead, so that all work is counted
    where it is asked for."""
    data = DataConfig(phases=(PhaseConfig("main", seq_len=seq_len),), prefetch_steps=0)
    return dataclasses.replace(recipes.get("tiny-solar-open"), data=data, train=TrainConfig(
        steps=10**9, global_batch_size=batch_size, micro_batch_size=1))


def memory_mib() -> dict[str, float]:
    """Return this process's resident memory: its own, and mapped pages of files (which processes share)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[key].split()[0]) / 1024
            for name, key in (("own", "RssAnon"), ("files", "RssFile"))}


def timed(action: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return an action's result, wall seconds and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = action()
    return result, time.perf_counter() - wall, time.process_time() - cpu


# measurements, each in its own process


def measure_startup(folder: Path) -> Iterator[dict[str, Any]]:
    """Open 10^9 documents and take batches; yields a row for each action."""
    # as a login shell has it
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    lengths = document_lengths("web", DOCUMENTS_OF_A_SHARD)
    source = source_of(folder, tuple(f"s{i:04}" for i in range(NUM_SHARDS)), int(lengths.sum()) * NUM_SHARDS)
    config = settings(8192, 512)

    def row(what: str, result: tuple[Any, float, float]) -> dict[str, Any]:
        return {"what": what, "wall_s": result[1], "cpu_s": result[2], **memory_mib()}

    yield {"what": "before", "wall_s": 0.0, "cpu_s": 0.0, **memory_mib()}
    opened = timed(lambda: SampleOrder(config, [source]))
    order = opened[0]
    yield row(f"open {NUM_SHARDS:,} shards, {NUM_SHARDS * DOCUMENTS_OF_A_SHARD:,} documents",
              timed(lambda: order.documents(0)))
    stream = BatchStream(config, order, 0, 8, 10**9)
    yield row("first batch: 512 samples of 8K ordered, a rank's 64 rows made", timed(stream.next))
    yield row("ten batches more", timed(lambda: sum(len(stream.next().rows) for _ in range(10))))
    state = json.loads(json.dumps(stream.next().order_state))
    stream.close()

    def resume() -> Any:
        return BatchStream(config, SampleOrder(config, [source], OrderState.from_dict(state)), 0, 8,
                           10**9).next()

    yield row("resume from a checkpoint's state to its first batch, shards opened anew", timed(resume))
    yield row("NAME@8192: find the long documents among all",
              timed(lambda: LongDocuments(source.shard("train"), 8192).lengths))


def rate(next_samples: Callable[[], int]) -> dict[str, float]:
    """Return time for a sample, the first call not counted, and the growth of the largest resident
    memory by all of them."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    next_samples()
    wall, cpu, count = time.perf_counter(), time.process_time(), 0
    while count < 3 or time.process_time() - cpu < MEASURE_S:
        count += next_samples()
    cpu_s, wall_s = time.process_time() - cpu, time.perf_counter() - wall
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"cpu_ms": 1e3 * cpu_s / count, "wall_ms": 1e3 * wall_s / count, "peak_growth_mib": grown,
            "samples": count}


def measure_ours(folder: Path, seq_len: int) -> Iterator[dict[str, Any]]:
    """Order, packing and rows as tensors, as a rank that takes every sample."""
    import torch

    config = settings(seq_len, 8)
    source = source_of(folder, ("real",), 10**9)
    stream = BatchStream(config, SampleOrder(config, [source]), 0, 1, 10**9)

    def take() -> int:
        rows = stream.next().rows
        for row in rows:
            for field in dataclasses.fields(row):
                torch.from_numpy(getattr(row, field.name))
        return len(rows)

    yield rate(take)
    stream.close()


class Tokenizer:
    """What GPTDataset asks of a tokenizer."""

    vocab_size, eod, pad = 30_000, EOD, None
    unique_identifiers = {"class": "Tokenizer"}


def measure_theirs(folder: Path, seq_len: int, masked: bool) -> Iterator[dict[str, Any]]:
    """Megatron-Core's GPTDataset: with its attention mask of separate documents,
    or with documents that see each other."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=1, sequence_length=seq_len, reset_position_ids=masked, reset_attention_mask=masked,
        eod_mask_loss=masked, create_attention_mask=masked, tokenizer=Tokenizer(),
        blend=([str(folder / "real")], None), split="1,0,0", path_to_cache=str(folder / "cache"))
    dataset = BlendedMegatronDatasetBuilder(GPTDataset, [100_000, 0, 0], lambda: True, config).build()[0]
    place = iter(range(len(dataset)))

    def take() -> int:
        dataset[next(place)]
        return 1

    yield rate(take)


# packing


def fewest_rows(counts: list[int], seq_len: int) -> int:
    """Return the optimum by branch and bound: the longest item goes into each row of another room,
    or into a new one."""
    items = sorted(counts, reverse=True)
    best = len(items)

    def place(i: int, rooms: tuple[int, ...]) -> None:
        nonlocal best
        missing = sum(items[i:]) - sum(rooms)
        if len(rooms) + max(0, -(-missing // seq_len)) >= best:
            return
        if i == len(items):
            best = len(rooms)
            return
        for room in sorted({r for r in rooms if r >= items[i]}):
            k = rooms.index(room)
            place(i + 1, (*rooms[:k], *rooms[k + 1:], room - items[i]))
        place(i + 1, (*rooms, seq_len - items[i]))

    place(0, ())
    return best


def padding_share(rows: list[Row], seq_len: int) -> float:
    """Return the part of all rows that holds no token."""
    return 1 - sum(s.count for row in rows for s in row) / (len(rows) * seq_len)


def cut_in_vain(rows: list[Row], lengths: np.ndarray, seq_len: int) -> float:
    """Return the part of the documents that are cut although they would fit into a row."""
    pieces = np.bincount([s.document for row in rows for s in row], minlength=len(lengths))
    return float(((pieces > 1) & (lengths <= seq_len)).mean())


def packing_table() -> Iterator[str]:
    columns = f"{'padding':>18}{'cut in vain':>13}"
    yield f"{'':<23} | {'best fit':^31} | {'one after another':^31}"
    yield f"{'lengths':<8}{'row':>8}{'rows':>7} | {columns} | {columns}"
    for kind in LENGTHS:
        lengths = document_lengths(kind, WINDOW_DOCUMENTS)
        parts = [PackedSegment(i, 0, n) for i, n in enumerate(lengths.tolist())]
        for seq_len in (4096, 8192, 32768, 131072):
            packed, joined = best_fit(cut(parts, seq_len), seq_len), concatenate(parts, seq_len)
            yield (f"{kind:<8}{seq_len:>8,}{len(packed):>7,} | {padding_share(packed, seq_len):>18.3%}"
                   f"{cut_in_vain(packed, lengths, seq_len):>13.1%} | {padding_share(joined, seq_len):>18.3%}"
                   f"{cut_in_vain(joined, lengths, seq_len):>13.1%}")


def optimum_table(num_sets: int = 200, set_size: int = 14) -> Iterator[str]:
    yield (f"{'lengths':<8}{'row':>8} | {'padding, best fit':>18}{'fewest rows':>13} | "
           f"{'sets with the fewest rows':>26}{'with one more':>15}")
    for kind, seq_len in (("web", 2048), ("web", 4096), ("code", 4096), ("books", 32768), ("chats", 2048)):
        more, totals = np.zeros(num_sets, np.int64), np.zeros(3)
        for seed in range(num_sets):
            pieces = cut([PackedSegment(i, 0, n)
                          for i, n in enumerate(document_lengths(kind, set_size, seed).tolist())], seq_len)
            rows, optimum = best_fit(pieces, seq_len), fewest_rows([p.count for p in pieces], seq_len)
            more[seed] = len(rows) - optimum
            totals += (len(rows) * seq_len, optimum * seq_len, sum(p.count for p in pieces))
        yield (f"{kind:<8}{seq_len:>8,} | "
               f"{1 - totals[2] / totals[0]:>18.1%}{1 - totals[2] / totals[1]:>13.1%} | "
               f"{(more == 0).mean():>26.1%}{(more == 1).mean():>15.1%}")


# the report


def in_process(*arguments: object) -> list[dict[str, Any]]:
    """Run one measurement in a process of its own; returns its rows."""
    argv = [sys.executable, "-W", "ignore", __file__, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, check=True, env=environment)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def startup_report(folder: Path) -> Iterator[str]:
    lengths = document_lengths("web", DOCUMENTS_OF_A_SHARD)
    write_shard(folder / "one", lengths, sparse=True)
    for i in range(NUM_SHARDS):
        for suffix in (".idx", ".bin"):
            os.link(folder / f"one{suffix}", folder / f"s{i:04}{suffix}")
    yield f"{int(lengths.sum()) * NUM_SHARDS / 1e12:.2f} T tokens; limit on open files 1,024"
    yield (f"the shards are links to one index of {DOCUMENTS_OF_A_SHARD:,} documents and one sparse token "
           "file: no disk is read")
    yield ("own: memory of the process; files: pages of mapped files, which processes share (the one index "
           "counts for each link)")
    yield f"{'':<84}{'wall s':>8}{'CPU s':>8}{'own MiB':>9}{'files MiB':>11}"
    for row in in_process("startup", folder):
        yield (f"{row['what']:<84}{row['wall_s']:>8.2f}{row['cpu_s']:>8.2f}{row['own']:>9.0f}"
               f"{row['files']:>11.0f}")


def rates_report(folder: Path) -> Iterator[str]:
    lengths = document_lengths("web", 30_000)
    write_shard(folder / "real", lengths, sparse=False)
    yield (f"one shard of {len(lengths):,} documents, {int(lengths.sum()):,} tokens, "
           "in the page cache; one thread")
    yield (f"{'sample':>8}  {'':<42}{'CPU ms':>10}{'wall ms':>10}{'samples/s':>11}{'MiB more':>10}"
           f"{'CPU time against ours':>23}")
    for seq_len in (2048, 8192, 16384, 131072):
        (ours,) = in_process("ours", folder, seq_len)
        rows = [("ours: documents kept apart, order included", ours)]
        if seq_len <= 16384:
            rows += [("GPTDataset, mask of separate documents", in_process("masked", folder, seq_len)[0]),
                     ("GPTDataset, documents see each other", in_process("unmasked", folder, seq_len)[0])]
        for name, r in rows:
            yield (f"{seq_len:>8,}  "
                   f"{name:<42}{r['cpu_ms']:>10.3f}{r['wall_ms']:>10.3f}{1e3 / r['cpu_ms']:>11,.0f}"
                   f"{r['peak_growth_mib']:>10.0f}{r['cpu_ms'] / ours['cpu_ms']:>22.2f}x")


def report() -> None:
    """Print all tables."""
    began = time.perf_counter()
    cpu = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in cpu if "model name" in line), "")
    print(f"{platform.machine()} {model}, {os.cpu_count()} cores (load {os.getloadavg()[0]:.1f} at the "
          f"start), Python {platform.python_version()}")
    parts: list[tuple[str, Callable[[Path], Iterator[str]]]] = [
        ("Start-up at 10^9 documents", startup_report),
        ("Samples a second, beside Megatron-Core's GPTDataset", rates_report),
        (f"Packing a window of {WINDOW_DOCUMENTS:,} documents", lambda _: packing_table()),
        ("Best fit beside the fewest rows there can be, sets of 14 documents (branch and bound)",
         lambda _: optimum_table()),
    ]
    for title, lines in parts:
        with tempfile.TemporaryDirectory() as folder:
            print(f"\n{title}\n{'-' * len(title)}", flush=True)
            for line in lines(Path(folder)):
                print(line, flush=True)
    print(f"\nall in {math.ceil(time.perf_counter() - began)} s")


def main() -> None:
    """Run a named measurement and print its rows as JSON, or everything as a report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measurement", nargs="?", choices=["startup", "ours", "masked", "unmasked"],
                        help="default: the whole report")
    parser.add_argument("folder", nargs="?", type=Path, help="where its data lies")
    parser.add_argument("seq_len", nargs="?", type=int, default=8192, help="tokens of a sample")
    args = parser.parse_args()
    if args.measurement is None:
        report()
        return
    measure = {"startup": lambda: measure_startup(args.folder),
               "ours": lambda: measure_ours(args.folder, args.seq_len),
               "masked": lambda: measure_theirs(args.folder, args.seq_len, True),
               "unmasked": lambda: measure_theirs(args.folder, args.seq_len, False)}
    for row in measure[args.measurement]():
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
