"""What it costs to give an engine other weights, beside a plain copy of the same bytes.

Usage: python benchmarks/engine_update.py > benchmarks/results/engine_update.txt

  copy          `Tensor.copy_` of every tensor from memory to memory: what no way can be cheaper than
  transformers  `HfEngine.update` from tensors in memory, one for each expert, into the stacked ones
  megatron      `MegatronEngine.update` from the same tensors
  export        `export_weights` of a model, into nothing: what the trainer's side costs
  both          `HfEngine.update(export_weights(model), ...)`: one round of training, from model to engine

Then the same model in bf16, before and behind a step that changes each weight by about the learning rate, as
Adam does: bytes and time of all weights and of the changed values alone, and whether both make the same bits.
The whole way copies each tensor once for sending, as from another process.

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


RATES = (1e-6, 3e-6, 1e-5)
"""Learning rates: of the order that papers on reinforcement learning use."""


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
    from megatron_sov.infer.engines.libraries import HfEngine, load_hf

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
        measure_changed(weights, load_hf(Path(folder) / "hf", torch.bfloat16))
    world.leave()


def measure_changed(masters: dict[str, Any], loaded: Any) -> None:
    """Print what all weights and changed ones cost in bf16.

    Args:
        masters: fp32 weights by their names in files.
        loaded: transformers' model of them in bf16.
    """
    import torch

    from megatron_sov.convert import SentWeights
    from megatron_sov.infer.engines.libraries import HfEngine, live_views

    engine, drawn = HfEngine(loaded), torch.Generator().manual_seed(0)
    before = {name: tensor.bfloat16() for name, tensor in masters.items()}
    whole_bytes = sum(tensor.nbytes for tensor in before.values())
    print(f"\nthe same in bf16, {whole_bytes / 2**20:.0f} MiB, behind one step; median of {TURNS} turns, CPU "
          f"time, one thread\n\n{'learning rate':<14}{'changed':>9}{'bytes':>9}{'of all':>8}{'send ms':>9}"
          f"{'take ms':>9}{'all: send':>11}{'take':>6}  same bits")
    for rate in RATES:
        after = {name: (tensor + rate * torch.randn(tensor.shape, generator=drawn)).bfloat16()
                 for name, tensor in masters.items()}
        seconds: dict[str, list[float]] = {way: [] for way in ("send", "take", "all_send", "all_take")}
        for turn in range(TURNS):
            sent = SentWeights()
            engine.update(sent.whole(before.items()), 2 * turn)
            changed, seconds_send = timed(lambda s=sent, a=after: list(s.changed(a.items())))
            _, seconds_take = timed(lambda c=changed, v=2 * turn: engine.update_changed(iter(c), v + 1, v))
            found = {name: view.clone() for name, view in live_views(loaded).items()}
            every, seconds_all = timed(lambda a=after: {name: t.clone() for name, t in a.items()})
            _, seconds_over = timed(lambda e=every, v=2 * turn: engine.update(iter(e.items()), v + 1))
            views = live_views(loaded)
            same = all(torch.equal(found[n].view(torch.int16), views[n].view(torch.int16)) for n in views)
            for way, took_s in zip(seconds, (seconds_send, seconds_take, seconds_all, seconds_over),
                                   strict=True):
                seconds[way].append(took_s)
        sent_bytes = sum(one.num_bytes for one in changed)
        count = sum(len(one.values) for one in changed)
        ms = {way: 1e3 * statistics.median(times) for way, times in seconds.items()}
        print(f"{rate:<14g}{2 * count / whole_bytes:>9.2%}{sent_bytes / 2**20:>5.1f} MiB"
              f"{sent_bytes / whole_bytes:>8.2%}{ms['send']:>9.0f}{ms['take']:>9.0f}{ms['all_send']:>11.0f}"
              f"{ms['all_take']:>6.0f}  {'yes' if same else 'NOT SO'}", flush=True)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return what work gives, and its seconds."""
    began_s = time.process_time()
    found = work()
    return found, time.process_time() - began_s


def main() -> None:
    """Measure on one rank."""
    cpu_shims.prepare_megatron()
    print(f"{platform.machine()}, {os.cpu_count()} cores (load {os.getloadavg()[0]:.1f} at the start), "
          f"Python {platform.python_version()}", flush=True)
    sys.exit(launcher.launch(measure, 1, num_threads=1))


if __name__ == "__main__":
    main()
