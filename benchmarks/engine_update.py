"""What it costs to give an engine other weights, beside a plain copy of the same bytes.

Usage: python benchmarks/engine_update.py > benchmarks/results/engine_update.txt

  copy          `Tensor.copy_` of every tensor from memory to memory: what no way can be cheaper than
  transformers  `HfEngine.update` from tensors in memory, one for each expert, into the stacked ones
  megatron      `MegatronEngine.update` from the same tensors
  export        `export_weights` of a model, into nothing: what the trainer's side costs
  both          `HfEngine.update(export_weights(model), ...)`: one round of training, from model to engine

Ways take turns; a ratio is the median of the turns' ratios to the copy of the same turn.  Files are those
that the process opens for writing meanwhile.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_sov.engine.parallel import cpu_shims, launcher

TURNS = 7
RECIPE = "tiny-solar-open"
SIZES = ["model.vocab_size=8192", "model.hidden_size=512", "model.head_dim=64", "model.num_layers=3",
         "model.num_experts=16", "model.expert_ffn_dim=512", "train.precision=fp32"]
WRITES = os.O_WRONLY | os.O_RDWR


def models(folder: Path) -> tuple[Any, Any]:
    """Return a model of ours, and transformers' model of another draw."""
    from megatron_sov import convert, recipes
    from megatron_sov.checkpoint import load
    from megatron_sov.engine.model.language_model import build
    from megatron_sov.engine.parallel import world
    from megatron_sov.infer.engines.libraries import load_hf
    from megatron_sov.model.config import ParallelConfig, apply_settings

    config = apply_settings(recipes.get(RECIPE), SIZES)
    world.join(ParallelConfig())
    model = build(config.model, ParallelConfig(), config.train)
    load.initialise(model, config.model, 2)
    load.save(folder / "checkpoint", model, None, {"step": 1, "tokens": 1}, config.to_dict(), None)
    convert.to_hf(folder / "checkpoint", folder / "hf")
    load.initialise(model, config.model, 1)
    return model, load_hf(folder / "hf")


def measure() -> None:
    """Print the table; runs inside a rank."""
    import torch

    from megatron_sov.convert import export_weights
    from megatron_sov.engine.decode.forward_only import ForwardModel
    from megatron_sov.engine.parallel import world
    from megatron_sov.infer.decoder.generator import MegatronEngine
    from megatron_sov.infer.engines.libraries import HfEngine

    written: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        model, loaded = models(Path(folder))
        weights = dict(export_weights(model))
        targets = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        own, hf = MegatronEngine(ForwardModel(model, 256)), HfEngine(loaded)

        def copy() -> None:
            for name, tensor in weights.items():
                targets[name].copy_(tensor)

        def export() -> None:
            for _ in export_weights(model):
                pass

        ways: dict[str, Callable[[], None]] = {
            "copy": copy, "transformers": lambda: hf.update(iter(weights.items()), 1),
            "megatron": lambda: own.update(iter(weights.items()), 1), "export": export,
            "both": lambda: hf.update(export_weights(model), 1)}
        sys.addaudithook(lambda event, asked: written.append(str(asked[0])) if event == "open"
                         and isinstance(asked[2], int) and asked[2] & WRITES else None)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(TURNS + 1):
            for way, run in ways.items():
                began_s = time.process_time()
                run()
                if turn:  # the first warms up
                    seconds[way].append(time.process_time() - began_s)
        size_bytes = sum(t.nbytes for t in weights.values())
        print(f"{RECIPE} of {len(weights)} tensors, {size_bytes / 2**20:.0f} MiB in fp32; median of {TURNS} "
              f"turns, CPU time, one thread\n\n{'way':<14}{'ms':>8}{'GB/s':>8}{'ratio to a copy':>17}")
        for way, times in seconds.items():
            ratio = statistics.median(t / c for t, c in zip(times, seconds["copy"], strict=True))
            print(f"{way:<14}{1e3 * statistics.median(times):>8.0f}"
                  f"{size_bytes / 1e9 / statistics.median(times):>8.2f}{ratio:>16.2f}x")
        print(f"\nfiles opened for writing: {written or 'none'}")
    world.leave()


def main() -> None:
    """Measure on one rank."""
    cpu_shims.prepare_megatron()
    print(f"{platform.machine()}, {os.cpu_count()} cores (load {os.getloadavg()[0]:.1f} at the start), "
          f"Python {platform.python_version()}", flush=True)
    sys.exit(launcher.launch(measure, 1, num_threads=1))


if __name__ == "__main__":
    main()
