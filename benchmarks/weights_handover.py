"""What it takes to hand the weights of a 1 GB model over from two trainer ranks to two engines.

Usage: python benchmarks/weights_handover.py [--turns 3] [--layers 12]
       > benchmarks/results/weights_handover.txt

Two processes hold a dense model in bf16, split by tensor parallelism (tp), or each the whole (dp).  Two
further processes stand for the workers of two engines: each has a tensor for each of the model's, and fills
it as the extension of vLLM's worker reads an update (`safetensors.safe_open`, tensor by tensor); what vLLM
then does with them is not in it.

  files   as `rl run --engine vllm`: `export_weights` gathers, `WeightFiles` writes safetensors into shared
          memory, the receivers read them
  disk    through a checkpoint: both ranks write it and sync it, its tensors are read, exported and written
          for the receivers as above, as `rl generate --engine vllm` takes a policy

Seconds from the call to the moment at which both receivers have everything; a plain copy of the same bytes
in memory stands beside it.  The checkpoint has the weights alone, no optimizer.

Behind that stands an account of larger models in bf16, which nobody has run: their bytes over speeds of
links (slurm/chips.yaml, without any loss) and over what `megatron-sov plan` takes for a whole update, which
is fitted to NeMo RL's.  With files one process gathers everything and writes it, engines read it from its
memory: that is bound by the copies of one process, as measured above, and not by links.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_sov.engine.parallel import cpu_shims, launcher

RECIPE = "tiny-qwen3"
RECEIVERS, RANKS = 2, 2
LAYOUTS = {"tp": ["parallel.tp=2"], "dp": []}
ACCOUNT = {"solar-open-102b": 102.65e9, "k-exaone-236b": 236.57e9}
"""Recipe -> parameters."""
ACCOUNT_CHIPS = ("h100", "b200")
"""Whose network is told: each engine of 8 takes the whole model over its 8 adapters, all at the same time."""


def sizes(layers: int) -> list[str]:
    """Return the settings of a model of about 35 M parameters a layer and 98 M outside of them."""
    return ["model.vocab_size=32000", "model.hidden_size=1536", "model.head_dim=128", "model.num_heads=12",
            "model.num_kv_heads=4", f"model.num_layers={layers}", "model.dense_ffn_dim=6144",
            "train.precision=bf16"]


def receive(pipe: Connection) -> None:
    """Fill tensors out of files that are named, again and again."""
    import torch
    from safetensors import safe_open

    torch.set_num_threads(1)
    targets: dict[str, Any] = {}
    while (files := pipe.recv()) is not None:
        count = 0
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                    tensor = opened.get_tensor(name)
                    if name not in targets:
                        targets[name] = torch.empty_like(tensor)
                    targets[name].copy_(tensor)
                    count += tensor.nbytes
        pipe.send(count)


def hand_over(pipes: list[Connection], files: list[str]) -> int:
    """Have both receivers read files; returns the bytes that each has read."""
    for pipe in pipes:
        pipe.send(files)
    [count] = {pipe.recv() for pipe in pipes}
    return int(count)


def measure(settings: list[str], turns: int, pipes: list[Connection], told: Path) -> None:
    """Measure all ways at one layout; runs inside a rank."""
    import torch
    import torch.distributed as dist

    from megatron_sov import convert, recipes
    from megatron_sov.checkpoint import load
    from megatron_sov.convert import export_weights
    from megatron_sov.engine.model.language_model import build
    from megatron_sov.engine.parallel import world
    from megatron_sov.infer.engines.server_engine import WeightFiles
    from megatron_sov.model.config import apply_settings

    config = apply_settings(recipes.get(RECIPE), settings)
    world.join(config.parallel)
    model = build(config.model, config.parallel, config.train)
    load.initialise(model, config.model, 1)
    is_main, shared = dist.get_rank() == 0, Path("/dev/shm") / f"sov-handover-{os.getppid()}"
    writer = WeightFiles(shared) if is_main else None
    seconds: dict[str, list[float]] = {}
    size_bytes = 0

    def files() -> None:
        nonlocal size_bytes
        weights = export_weights(model)
        if writer is None:
            for _ in weights:
                pass
            return
        began_s = time.monotonic()
        paths = writer.write(weights)
        seconds.setdefault("files: written", []).append(time.monotonic() - began_s)
        size_bytes = hand_over(pipes, paths)
        writer.forget_others([])

    def disk() -> None:
        folder = told.parent / "checkpoint"
        load.save(folder, model, None, {"step": 1, "tokens": 1}, config.to_dict(), None)
        if writer is not None:
            opened = convert.open_weights(folder)
            paths = writer.write((name, opened.read(name)) for link in opened.links for name in link.hf_names)
            hand_over(pipes, paths)
            writer.forget_others([])
            shutil.rmtree(folder)

    def copy() -> None:
        if is_main:
            torch.empty_like(source).copy_(source)

    source = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.bfloat16)
    ways: dict[str, Callable[[], None]] = {"files": files, "disk": disk, "copy": copy}
    for turn in range(turns + 1):
        for way, run in ways.items():
            dist.barrier()
            began_s = time.monotonic()
            run()
            if is_main and turn:  # the first makes the receivers' tensors
                seconds.setdefault(way, []).append(time.monotonic() - began_s)
    if writer is not None:
        writer.remove()
        del seconds["files: written"][0]
        told.write_text(json.dumps({"size_bytes": size_bytes, "copy_bytes": source.nbytes,
                                    "seconds": seconds}))
    world.leave()


def show(layout: str, told: dict[str, Any]) -> float:
    """Print what was measured at one layout; returns the bytes a second of the way over files."""
    size_bytes = told["size_bytes"]
    seconds = {way: statistics.median(s) for way, s in told["seconds"].items()}
    copy_s = seconds.pop("copy") * size_bytes / told["copy_bytes"]
    print(f"{layout}: {size_bytes / 1e9:.2f} GB of weights; a plain copy of them takes {copy_s:.2f} s")
    size = f"{size_bytes / 1e9:.2f} GB written"
    moved = {"files": f"{size}, {RECEIVERS * size_bytes / 1e9:.2f} read in memory, none on a disk",
             "files: written": "of it, until the files were there",
             "disk": f"{size} to the disk and read again, then as files"}
    for way, took_s in seconds.items():
        print(f"  {way:<16}{took_s:>8.2f} s  {size_bytes / 1e9 / took_s:>6.2f} GB/s  "
              f"{took_s / copy_s:>6.1f} copies  {moved[way]}")
    print(f"  files / disk    {seconds['files'] / seconds['disk']:>8.2f}", flush=True)
    return float(size_bytes / seconds["files"])


def show_account(bytes_per_s: float) -> None:
    """Print what larger models take, by account, given the speed of the way over files."""
    from megatron_sov.plan.post_training import EngineCosts
    from megatron_sov.work.clusters.chips import CHIPS

    costs = EngineCosts()
    print("\nBy account, bf16, seconds; files: at the speed above, of this machine under its load")
    print(f"{'':<18}{'GB':>6}{'files':>8}{'plan, same GPUs':>17}{'plan, GPUs apart':>18}"
          + "".join(f"{f'network of 8 {key}':>20}" for key in ACCOUNT_CHIPS))
    for name, parameters in ACCOUNT.items():
        size_bytes = 2 * parameters
        print(f"{name:<18}{size_bytes / 1e9:>6.0f}{size_bytes / bytes_per_s:>8.0f}"
              f"{size_bytes / costs.refit_bytes_per_s:>17.1f}"
              f"{size_bytes / costs.refit_apart_bytes_per_s:>18.1f}"
              + "".join(f"{size_bytes / (8 * CHIPS[key].network_bytes_per_s):>20.2f}"
                        for key in ACCOUNT_CHIPS))


def main() -> int:
    """Measure both layouts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(RECEIVERS)]
    receivers = [context.Process(target=receive, args=(far,), daemon=True) for _, far in pairs]
    for receiver in receivers:
        receiver.start()
    cpu_shims.prepare_megatron()
    print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work (load "
          f"{os.getloadavg()[0]:.1f} at the start), Python {platform.python_version()}; {RANKS} ranks of one "
          f"thread, {RECEIVERS} receivers, medians of {args.turns} turns", flush=True)
    code, bytes_per_s = 0, 0.0
    with tempfile.TemporaryDirectory() as work, contextlib.ExitStack() as stack:
        for pipe, _ in pairs:
            stack.callback(pipe.send, None)
        for layout, settings in LAYOUTS.items():
            told = Path(work) / f"{layout}.json"
            code = code or launcher.launch(partial(measure, [*sizes(args.layers), *settings], args.turns,
                                                   [pipe for pipe, _ in pairs], told), RANKS, num_threads=1)
            if not code:
                bytes_per_s = show(layout, json.loads(told.read_text()))
    if not code:
        show_account(bytes_per_s)
    print(f"load {os.getloadavg()[0]:.1f} at the end")
    return code


if __name__ == "__main__":
    sys.exit(main())
