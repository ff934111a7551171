"""What packing gains on samples of very different lengths, and that it changes no sample.

Usage: python benchmarks/packing.py [--documents 48] [--turns 3] > benchmarks/results/packing.txt

Forward and backward passes over the same samples, whose lengths are log-normal; three ways take turns:
  packed   whole samples, several in a row of SEQ_LEN tokens, by best fit: what `megatron-sov sft` does
  batch    BATCH samples at a time, in the order of the data, each padded to the longest of them
  full     BATCH samples at a time, each padded to SEQ_LEN
Tokens per second count the samples' own tokens, not padding, by CPU time.  Then every packed sample's logits
are compared with those of the sample alone, in float64 and in float32, by one process and with the row cut
over two: alone in a row of SEQ_LEN tokens, as training would have it, and in one that is as short as it is.
The second may differ in the last digits though nothing leaks: a matrix library chooses the order of its sums
by the number of rows.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from megatron_sov import recipes
from megatron_sov.engine.parallel import cpu_shims, launcher, world
from megatron_sov.model.config import apply_settings
from megatron_sov.train.data.streams import PackedSegment, best_fit

RECIPE, SEQ_LEN, BATCH, MEDIAN_TOKENS, SPREAD = "tiny-qwen3", 512, 4, 70, 1.0
Documents = Sequence[list[int]]


def documents(count: int, vocab_size: int) -> list[list[int]]:
    """Return samples of random tokens, of log-normal lengths up to a row."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(MEDIAN_TOKENS), SPREAD, count), 8, SEQ_LEN).astype(int)
    return [random.integers(1, vocab_size, n).tolist() for n in lengths]


def micro_batch(row: Documents, padded_to: int = 0, min_tokens: int = 0) -> Any:
    """Return samples one behind the other, each padded to `padded_to` tokens; padding is not learned."""
    import torch

    from megatron_sov.engine.decode.forward_only import Inputs
    from megatron_sov.engine.parallel.device import local_device
    from megatron_sov.train.objectives.microbatch import MicroBatch

    inputs = Inputs([d + [0] * max(0, padded_to - len(d)) for d in row], local_device(), min_tokens).inputs
    weights = torch.zeros(len(inputs.tokens))
    for document, first in zip(row, inputs.cu_seqlens.tolist(), strict=False):
        weights[first:first + len(document) - 1] = 1
    zeros = torch.zeros(len(inputs.tokens), dtype=torch.int64)
    return MicroBatch(inputs, inputs.tokens.roll(-1), weights, zeros.byte(), zeros)


def rows_of(held: Documents) -> list[list[int]]:
    """Return the numbers of the samples of each packed row."""
    return [[segment.document for segment in row]
            for row in best_fit((PackedSegment(i, 0, len(d)) for i, d in enumerate(held)), SEQ_LEN)]


def built(precision: str, cp: int = 1) -> Any:
    """Return a model with numbers in it."""
    from megatron_sov.checkpoint import load
    from megatron_sov.engine.model.language_model import build

    config = apply_settings(recipes.get(RECIPE), [f"train.precision={precision}", f"parallel.cp={cp}"])
    model = build(config.model, config.parallel, config.train)
    load.initialise(model, config.model, 1)
    return model


def timed(ways: dict[str, list[Any]], turns: int, passed: Callable[[str, Any], None],
          ended: Callable[[str], None]) -> dict[str, list[float]]:
    """Return the seconds of each turn of each way, which take turns.

    Args:
        ways: way -> its batches.
        turns: how many, behind one that warms up.
        passed: passes a batch of a way forward and backward.
        ended: called behind the last batch of a way's turn, which is not timed.
    """
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(turns + 1):
        for way, found in ways.items():
            began_s = time.process_time()
            for batch in found:
                passed(way, batch)
            if turn:
                seconds[way].append(time.process_time() - began_s)
            ended(way)
    return seconds


def tell_speed(read: dict[str, int], seconds: dict[str, list[float]], tokens: int, first: str) -> None:
    """Print a line for each way.

    Args:
        read: way -> tokens that it reads in a turn, padding among them.
        seconds: of `timed`.
        tokens: the samples' own.
        first: the way that others are compared with.
    """
    print(f"{'way':<10}{'tokens read':>12}{'padding':>9}{'tokens/s':>10}{f'of {first}':>11}")
    for way, count in read.items():
        ratio = statistics.median(p / t for p, t in zip(seconds[first], seconds[way], strict=True))
        speed = tokens / statistics.median(seconds[way])
        print(f"{way:<10}{count:>12,}{1 - tokens / count:>9.1%}{speed:>10.0f}{ratio:>11.2f}", flush=True)


def measure_speed(held: Documents, turns: int) -> None:
    """Print a line for each way."""
    from megatron_sov.engine.decode import forward_only
    from megatron_sov.engine.model.expert_load import ExpertLoad
    from megatron_sov.engine.model.logprobs import head_of
    from megatron_sov.engine.optimizer.optimizer import Optimizer

    model = built("fp32")
    optimizer = Optimizer(model, recipes.get(RECIPE).optim)
    model.config.finalize_model_grads_func = ExpertLoad(model).finalize
    batches = [held[i:i + BATCH] for i in range(0, len(held), BATCH)]
    ways = {"packed": [micro_batch([held[i] for i in row], min_tokens=SEQ_LEN) for row in rows_of(held)],
            "batch": [micro_batch(batch, max(map(len, batch))) for batch in batches],
            "full": [micro_batch(batch, SEQ_LEN) for batch in batches]}

    def loss(hidden: Any, batch: Any) -> tuple[Any, Any]:
        sums, _ = head_of(model, 512).cross_entropy(hidden, batch.labels, {"lm": batch.weights})
        return sums["lm"], sums["lm"].detach()

    def passed(way: str, batch: Any) -> None:
        forward_only.run_pipeline(optimizer.wrapped, [batch], loss, len(batch.inputs.tokens),
                                  forward_only=False)

    seconds = timed(ways, turns, passed, lambda way: optimizer.zero_grad())
    tokens = sum(map(len, held))
    print(f"{RECIPE}, {len(held)} samples of {min(map(len, held))} to {max(map(len, held))} tokens (median "
          f"{statistics.median(map(len, held)):.0f}, {tokens:,} in all), rows of {SEQ_LEN}; median of "
          f"{turns} turns, CPU time, one thread\n")
    tell_speed({way: sum(len(batch.inputs.tokens) for batch in found) for way, found in ways.items()},
               seconds, tokens, "packed")


def measure_difference(held: Documents, precision: str, cp: int) -> None:
    """Print the largest difference of a packed sample's logits from its own alone."""
    import torch

    from megatron_sov.engine.decode.forward_only import ForwardModel
    from megatron_sov.runs.launch_environment import is_first

    model = ForwardModel(built(precision, cp), SEQ_LEN)
    worst = worst_short = largest = 0.0
    for row in rows_of(held):
        packed = [held[i] for i in row]
        together = model.logits(micro_batch(packed, min_tokens=SEQ_LEN), torch.arange(SEQ_LEN))
        for document, part in zip(packed, together.split([len(d) for d in packed] + [SEQ_LEN - sum(
                map(len, packed))])[:-1], strict=True):
            alone = model.logits(micro_batch([document], min_tokens=SEQ_LEN), torch.arange(SEQ_LEN))
            short = model.logits(micro_batch([document]), torch.arange(len(document)))
            worst = max(worst, float((part - alone[:len(document)]).abs().max()))
            worst_short = max(worst_short, float((part - short).abs().max()))
            largest = max(largest, float(short.abs().max()))
    if is_first():
        print(f"max |packed - alone| logit, {precision}, CP{cp}: {worst:.1e} in rows of {SEQ_LEN}, "
              f"{worst_short:.1e} in rows as short as it (largest logit {largest:.2f})", flush=True)


def measure(count: int, turns: int, cp: int) -> None:
    """Print the speed, and the differences of one way to cut rows; runs inside a rank."""
    from megatron_sov.model.config import ParallelConfig

    world.join(ParallelConfig(cp=cp))
    held = documents(count, recipes.get(RECIPE).model.vocab_size)
    if cp == 1:
        measure_speed(held, turns)
        print()
    for precision in ("fp64", "fp32"):
        measure_difference(held, precision, cp)
    world.leave()


def begun(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the arguments, those among them that both benchmarks of packing have, and name the machine."""
    parser.add_argument("--documents", type=int, default=48)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    cpu_shims.prepare_megatron()
    print(f"{platform.machine()}, {os.cpu_count()} cores (load {os.getloadavg()[0]:.1f} at the start), "
          f"Python {platform.python_version()}", flush=True)
    return args


def main() -> None:
    """Measure on one rank, and the differences on two."""
    args = begun(argparse.ArgumentParser(description=__doc__,
                                         formatter_class=argparse.RawDescriptionHelpFormatter))
    codes = [launcher.launch(partial(measure, args.documents, args.turns, cp), cp, num_threads=1)
             for cp in (1, 2)]
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
