"""Run one of our commands in this process, and write the processor seconds of its steps and generations.

Usage: python benchmarks/real/timed_command.py TIMES.json sft|prefer|rl|generate ...

TIMES.json gets `steps`, the seconds between the starts of steps, `generations`, the seconds of each call of
our decoder, and `peak_bytes`, the peak memory up to the start of the last step: the command also writes a
checkpoint afterwards.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from megatron_sov import cli
from megatron_sov.infer.decoder.generator import MegatronEngine
from megatron_sov.train.trainer import Trainer

starts: list[float] = []
peaks_bytes: list[int] = []
generations: list[float] = []
fetch_data, generate = Trainer.fetch_data, MegatronEngine.generate


def read_peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def record_start(*args: Any, **kwargs: Any) -> Any:
    starts.append(time.process_time())
    peaks_bytes.append(read_peak_bytes())
    return fetch_data(*args, **kwargs)


def record_generation(*args: Any, **kwargs: Any) -> Any:
    began_s = time.process_time()
    try:
        return generate(*args, **kwargs)
    finally:
        generations.append(time.process_time() - began_s)


def main() -> int:
    # as torchrun starts a single rank: the command computes in this process; the system chooses the port
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT="0", OMP_NUM_THREADS="1")
    Trainer.fetch_data = record_start  # type: ignore[method-assign]
    MegatronEngine.generate = record_generation  # type: ignore[method-assign]
    code = cli.main(sys.argv[2:])
    steps = [after - before for before, after in itertools.pairwise(starts)]
    Path(sys.argv[1]).write_text(json.dumps({
        "steps": steps, "generations": generations, "peak_bytes": (peaks_bytes or [read_peak_bytes()])[-1]}))
    return code


if __name__ == "__main__":
    sys.exit(main())
