"""Speed of saving and loading checkpoints, compared with `cp`, and the training time that a save costs.

    python benchmarks/checkpoint_speed.py [--megabytes 400] [--rounds 5] [--nproc 1]

Save the float32 weights and moments of a model of about the given size, and load them again. The peers copy
the files of the checkpoint: `cp`; `cp` and fsync; `cp`, fsync and BLAKE3, as a save does; `cp`, fsync and
SHA-256 by `openssl`. Every round measures each action once, so that other load on the machine affects all
alike. Ratios are of the medians. Loading and `cp` read from the page cache.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from measurement import COPIES, copy_folder, describe_machine, measure_action

from megatron_sov import recipes
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.checkpoint import initial_weights, load
from megatron_sov.engine.parallel import launcher, world
from megatron_sov.model.config import ParallelConfig, RunConfig, apply_settings
from megatron_sov.model.families.count import count_params

BYTES_PER_PARAMETER = 12
"""Bytes of a float32 weight and its two moments."""
SAVE, STALL = "save, waiting (async_save=false)", "stall of the same save (async_save=true)"
CHECK, LOAD = "check: hash every file", "load weights and moments"
MEASURES = (*COPIES, SAVE, STALL, CHECK, LOAD)
"""Measured actions, as the table names them."""


def build_config(num_bytes: float) -> RunConfig:
    """Return a mixture of experts whose checkpoint has at least about `num_bytes`."""
    config = apply_settings(recipes.get("tiny-solar-open"), [
        "train.precision=fp32", "model.vocab_size=8192", "model.hidden_size=256", "model.num_layers=4"])
    width = 64
    while count_params(config.model).total * BYTES_PER_PARAMETER < num_bytes:
        width += 64
        config = apply_settings(config, [f"model.expert_ffn_dim={width}"])
    return config


def measure_actions(folder: Path, config: RunConfig, rounds: int) -> None:
    """Run every action of `MEASURES` on every rank; rank 0 writes wall and CPU seconds and the checkpoint's
    bytes to FOLDER/seconds.json."""
    import torch
    import torch.distributed as dist

    from megatron_sov.checkpoint.save import CheckpointMetadata, CheckpointSaver, SavedCheckpoint
    from megatron_sov.engine.model.language_model import build_model
    from megatron_sov.engine.optimizer.optimizer import Optimizer

    place = world.join_world(ParallelConfig())
    model = build_model(config.model, config.parallel, config.train)
    initial_weights.initialize_weights(model, config.model, 1)
    optimizer = Optimizer(model, config.optim)
    for block in optimizer.state_shards():
        with torch.no_grad():
            block.data.normal_()
    saved = list[SavedCheckpoint]()
    # a run uses one saver, in the background or waiting
    saver, waiting = CheckpointSaver(saved.append), CheckpointSaver(saved.append)
    companions = CheckpointMetadata({"step": 1, "tokens": 1, "num_updates": 1}, {}, None)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in MEASURES}

    def time_action(name: str, action: Callable[[], object]) -> None:
        dist.barrier()
        os.sync()
        cost = measure_action(action)
        seconds[name].append((cost.wall_s, cost.cpu_s))

    def begin_save(name: str) -> None:
        saver.begin(folder / name, model, optimizer, companions)

    def save_waiting(name: str) -> None:
        waiting.begin(folder / name, model, optimizer, companions, wait=True)
        waiting.finish()

    begin_save("step-0")  # allocates host memory, which later saves reuse
    saver.finish()
    path = folder / "step-0"
    num_bytes = sum(r.size_bytes for r in read_manifest(path).files.values())
    for _ in range(rounds):
        for name in COPIES:
            action = partial(copy_folder, path, folder / "copy", name)
            time_action(name, action if place.is_main else lambda: None)
            if place.is_main:
                shutil.rmtree(folder / "copy")
        time_action(SAVE, lambda: save_waiting("step-1"))
        time_action(STALL, lambda: begin_save("step-2"))
        saver.finish()
        time_action(CHECK, lambda: load.find_damage(path))
        time_action(LOAD, lambda: (load.load_model(path, model), load.load_optimizer(path, optimizer, 1)))
        if place.is_main:
            shutil.rmtree(folder / "step-1")
            shutil.rmtree(folder / "step-2")
    if place.is_main:
        (folder / "seconds.json").write_text(json.dumps({"bytes": num_bytes, "seconds": seconds}))
    dist.barrier()
    world.leave_world()


def main() -> int:
    """Measure on `--nproc` ranks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=float, default=400,
                        help="size of the checkpoint (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5,
                        help="measurements of each action (default %(default)s)")
    parser.add_argument("--nproc", type=int, default=1, help="processes (default %(default)s)")
    args = parser.parse_args()
    config = build_config(args.megabytes * 1e6)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        measure = partial(measure_actions, Path(folder), config, args.rounds)
        if code := launcher.launch_ranks(measure, args.nproc, 1):
            return code
        parsed = json.loads((Path(folder) / "seconds.json").read_text())
    seconds = parsed["seconds"]
    median_s = {name: statistics.median(wall_s for wall_s, _ in seconds[name]) for name in MEASURES}
    median_cpu_s = {name: statistics.median(cpu_s for _, cpu_s in seconds[name]) for name in MEASURES}
    print(f"{describe_machine()}\n{parsed['bytes'] / 1e6:.0f} MB on {args.nproc} process(es), median of "
          f"{args.rounds} rounds")
    print(f"{'':<42} {'s':>7} {'CPU s':>7} {'GB/s':>6}   rate / cp, + fsync, + blake3, + openssl")
    for name in MEASURES:
        ratios = "  ".join(f"{median_s[copied] / median_s[name]:6.2f}" for copied in COPIES)
        print(f"{name:<42} {median_s[name]:7.3f} {median_cpu_s[name]:7.3f} "
              f"{parsed['bytes'] / 1e9 / median_s[name]:6.2f}   {ratios}")
    print(f"a background save stalls training for {median_s[STALL] / median_s[SAVE]:.1%} of a blocking save")
    return 0


if __name__ == "__main__":
    sys.exit(main())
