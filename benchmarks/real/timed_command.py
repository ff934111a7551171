"""Run one of our commands in this process, and write the processor seconds of its steps and generations.

Usage: python benchmarks/real/timed_command.py TIMES.json sft|prefer|rl|generate ...

TIMES.json gets `steps`, the seconds between the starts of steps; `generations`, the seconds of each call of
our decoder; `peak_bytes`, the peak memory up to the start of the last step, after which the command writes a
checkpoint; and `products`, the seconds of the decoder's matrix products alone, which torch repeats for every
row of tokens without other work.
"""

import itertools
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megatron_sov import cli
from megatron_sov.engine.decode.cached_decoder import CachedDecoder, DecodeOutput
from megatron_sov.infer.decoder.generator import MegatronEngine
from megatron_sov.train.trainer import Trainer

starts: list[float] = []
peaks_bytes: list[int] = []
generations: list[float] = []
rows: list[tuple[int, int]] = []
"""Tokens of a row, and tokens to which the output head is applied."""
weights: list[torch.Tensor] = []
"""Weights of the decoder's linear layers; the output head's is the last."""
fetch_data, generate, best_tokens = Trainer.fetch_data, MegatronEngine.generate, CachedDecoder.best_tokens


def read_peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def record_start(*args: Any, **kwargs: Any) -> Any:
    starts.append(time.process_time())
    peaks_bytes.append(read_peak_bytes())
    return fetch_data(*args, **kwargs)


def record_generation(*args: Any, **kwargs: Any) -> Any:
    begin_s = time.process_time()
    try:
        return generate(*args, **kwargs)
    finally:
        generations.append(time.process_time() - begin_s)


def record_row(decoder: Any, read: DecodeOutput, places: Any) -> Any:
    rows.append((len(read.row.tokens), len(places)))
    if not weights:
        model = decoder._model
        weights.extend(weight for name, weight in model.named_parameters()
                       if weight.dim() == 2 and "embedding" not in name and "output_layer" not in name)
        weights.append(model.head_weight)
    return best_tokens(decoder, read, places)


@torch.no_grad()
def time_products() -> float:
    """Repeat the matrix products of all recorded rows twice; return the processor seconds of the faster."""
    seconds = []
    for _ in range(2):
        begin_s = time.process_time()
        for num_tokens, num_places in rows:
            inputs = {weight.shape[1]: torch.ones(num_tokens, weight.shape[1]) for weight in weights}
            for weight in weights[:-1]:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)
            torch.nn.functional.linear(inputs[weights[-1].shape[1]][:num_places], weights[-1])
        seconds.append(time.process_time() - begin_s)
    return min(seconds)


def main() -> int:
    # as torchrun starts a single rank: the command computes in this process; the system chooses the port
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT="0", OMP_NUM_THREADS="1")
    Trainer.fetch_data = record_start  # type: ignore[method-assign]
    MegatronEngine.generate = record_generation  # type: ignore[method-assign]
    CachedDecoder.best_tokens = record_row  # type: ignore[assignment, method-assign]
    code = cli.main(sys.argv[2:])
    steps = [after - before for before, after in itertools.pairwise(starts)]
    peak_bytes = (peaks_bytes or [read_peak_bytes()])[-1]
    Path(sys.argv[1]).write_text(json.dumps({
        "steps": steps, "generations": generations, "peak_bytes": peak_bytes, "products": time_products()}))
    return code


if __name__ == "__main__":
    sys.exit(main())
