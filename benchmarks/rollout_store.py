"""Speed, memory and file size of the rollout store.

    python benchmarks/rollout_store.py [--rows 1000000] [--tokens 64] [--part-rows 4096]

Rows have a prompt and a response of about `--tokens` tokens, with Zipf-distributed ids (150,000 ids) and
random log-probabilities. The creation of rows is not timed. Each part is written as a job writes it: checked,
hashed, synced to disk, renamed. A round has 4 parts; at its start, one process lists the parts, reads their
keys, and reads their rows. Memory is the peak of a separate process that reads a tenth of all rounds, or all
rounds, part by part.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from measurement import describe_machine, run_measured

from megatron_sov.rollouts.rows import Key, Rollout, format_part_name
from megatron_sov.rollouts.store import RolloutStore

PIECES, SAMPLES, VOCAB_SIZE = 4, 8, 150_000
"""Parts per round, responses per prompt, number of token ids."""


def generate_rows(number: int, count: int, tokens: int) -> list[Rollout]:
    """Return `count` random rows of part `number`, with SAMPLES responses per prompt."""
    draw = np.random.default_rng(number)
    round_number, versions = number // PIECES + 1, np.full(2 * tokens, number, np.int32)
    ids = np.minimum(draw.zipf(1.2, count * 2 * tokens), VOCAB_SIZE - 1).astype(np.int32)
    logprobs = -draw.exponential(0.7, count * tokens).astype(np.float32)
    lengths = draw.integers(tokens // 2, tokens * 3 // 2, count)
    rows = []
    for i, length in enumerate(lengths.tolist()):
        if i % SAMPLES == 0:
            prompt = f"{number:08x}{i:08x}"
            record = {"prompt": f"What is {i} plus {number}?", "answer": str(i)}
            prompt_tokens = ids[-(i // SAMPLES + 1) * 32:][:32]
        start = min(i * tokens, len(logprobs) - length)
        key = Key(prompt, i % SAMPLES, f"{round_number:064x}", "5" * 64)
        rows.append(Rollout(key, round_number, 0, record, prompt_tokens, ids[start:start + length],
                            logprobs[start:start + length], versions[:length], "stop",
                            f"It is {i}. " * (tokens // 8), 1.0, "megatron", 1.7e9, 1.7e9 + 1))
    return rows


def write_parts(path: Path, parts: int, args: argparse.Namespace) -> tuple[float, float]:
    """Write all parts to a new store; return wall and CPU seconds without the creation of rows."""
    store, wall_s, cpu_s = RolloutStore.create(path, "sha256:benchmark", VOCAB_SIZE), 0.0, 0.0
    for number in range(parts):
        rows = generate_rows(number, args.part_rows, args.tokens)
        begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
        store.add_rollouts(format_part_name(number // PIECES + 1, number % PIECES), rows, {"benchmark": True})
        wall_s += time.perf_counter() - begin_s
        cpu_s += time.process_time() - begin_cpu_s
    return wall_s, cpu_s


def start_round(path: Path, number: int) -> str:
    """Read a round as the trainer does at its start; return a line with the times."""
    begin_s = time.perf_counter()
    store = RolloutStore.open(path)
    num_keys = sum(len(store.read_rollouts(part.name, ())) for part in store.parts(number))
    keys_s = time.perf_counter() - begin_s
    rows = [row for part in store.parts(number) for row in store.read_rollouts(part.name)]
    return (f"{len(rows):,} rows read in {time.perf_counter() - begin_s:.2f} s, including {keys_s:.2f} s "
            f"for {num_keys:,} keys")


def read_peak_mb(path: Path, rounds: int) -> float:
    """Return the peak memory of a process that reads the first `rounds` rounds, part by part."""
    command = [sys.executable, __file__, "--read", str(path), "--rounds", str(rounds)]
    return run_measured(command).peak_bytes / 1e6


def read_rounds(path: Path, rounds: int) -> None:
    """Read the first `rounds` rounds, part by part."""
    store = RolloutStore.open(path)
    for number in range(1, rounds + 1):
        for part in store.parts(number):
            store.read_rollouts(part.name)


def main() -> None:
    """Write a store, and print its cost."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--part-rows", type=int, default=4096)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read is not None:
        read_rounds(args.read, args.rounds)
        return
    parts = max(args.rows // args.part_rows, 1)
    rows, rounds = parts * args.part_rows, -(-parts // PIECES)
    print(f"{describe_machine()}; {rows:,} rows in {parts:,} parts of {args.part_rows:,}, responses of about "
          f"{args.tokens} tokens")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        wall_s, cpu_s = write_parts(path, parts, args)
        print(f"append: {rows / wall_s:,.0f} rows/s ({rows / cpu_s:,.0f} per CPU second), one process",
              flush=True)
        print(f"start of a round: {start_round(path, rounds)}", flush=True)
        size_bytes = sum(file.stat().st_size for file in path.rglob("rollouts.parquet"))
        tokens = rows * (args.tokens - 0.5)
        print(f"size: {size_bytes / tokens:.2f} bytes per token of a response with all columns, texts and "
              "prompts (8 for its id and log-probability alone, uncompressed)", flush=True)
        few, many = max(rounds // 10, 1), max(rounds - 1, 1)
        print(f"memory: at most {read_peak_mb(path, few):,.0f} MB to read {few} rounds, "
              f"{read_peak_mb(path, many):,.0f} MB to read {many}, part by part")


if __name__ == "__main__":
    main()
