"""Speed and memory of conversion in both directions, compared with copying the same bytes.

    python benchmarks/convert_speed.py [--gigabytes 4.5] [--workers 2] [--rounds 3] [--folder DIR]

A Hugging Face folder of random bfloat16 weights (structure of Solar Open, small experts) is converted to a
checkpoint and back. The peers copy the same files: `cp`; `cp` and fsync; `cp`, fsync and BLAKE3, as
conversion does; `cp`, fsync and SHA-256 with `openssl`. In addition, `to_hf` checks its source against the
manifest, and both directions check and rearrange every value. Every round runs all commands one after
another, and the best round of each counts. The time of a conversion includes the start of Python and torch,
which is also printed alone.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from measurement import COPIES, Cost, copy_folder, describe_machine, measure_action, run_measured

from megatron_sov.base.digests import BLAKE3, SHA256, Digest

HASH_BLOCKS = 128
"""Blocks of 1 MiB that measure the speed of hashing."""
IDLE = "import megatron_sov.convert.hf_export, megatron_sov.convert.hf_import"
# Programs: convert a model, and write a Hugging Face folder of about as many bytes as asked for.
CONVERT = """
import sys
from megatron_sov import convert
action, source, out, workers = sys.argv[1:]
getattr(convert, action)(source, out, workers=int(workers))
"""
MAKE = """
import dataclasses, json, sys
from pathlib import Path
import torch
from megatron_sov import convert, recipes
from megatron_sov.convert.hf_import import plan_shards, write_files
from megatron_sov.checkpoint.safetensors_files import TensorSpec
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.family import TokenIds
folder, size_bytes = Path(sys.argv[1]), float(sys.argv[2])
big = recipes.get("solar-open-102b").model
model = dataclasses.replace(big, hidden_size=2048, num_heads=16, num_kv_heads=4, num_experts=64,
                            expert_ffn_dim=640, num_layers=1, vocab_size=65536)
family = models.get_family(model.family)
def specs(model):
    return [TensorSpec(name, shape, torch.float32 if link.fp32 else torch.bfloat16)
            for link in family.links(model) for name, shape in link.hf_shapes().items()]
once, layer = (sum(s.size_bytes for s in specs(dataclasses.replace(model, num_layers=n))) for n in (1, 2))
model = dataclasses.replace(model, num_layers=max(1, round((size_bytes - once) / (layer - once))))
shards = plan_shards(specs(model), 1_500_000_000)
files = {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}
noise = torch.randn(1 << 27).bfloat16()
def read(spec):
    n = torch.Size(spec.shape).numel()
    return noise[:n].reshape(spec.shape).to(spec.dtype)
folder.mkdir()
write_files(folder, files, read, 2, lambda name, record: None)
index = {"metadata": {}, "weight_map": {s.name: name for name, shard in files.items() for s in shard}}
(folder / "model.safetensors.index.json").write_text(json.dumps(index))
(folder / "config.json").write_text(json.dumps(family.to_hf_config(model, "bfloat16", TokenIds())))
"""


def measure_hash_rate(algorithm: str) -> float:
    """Return the hashing speed of a core in GB per processor second."""
    block, digest = bytes(1 << 20), Digest(algorithm)
    begin_s = time.process_time()
    for _ in range(HASH_BLOCKS):
        digest.update(block)
    return HASH_BLOCKS * len(block) / 1e9 / (time.process_time() - begin_s)


def count_bytes(folder: Path) -> int:
    """Return the total bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def compare_with_copies(action: str, source: Path, out: Path, workers: int, rounds: int, idle: Cost) -> None:
    """Measure the conversion `action` of a source and all copies of it, and print a table.

    Args:
        action: "from_hf" or "to_hf", a function of `megatron_sov.convert`.
        source, out: folders; the last round leaves its output in `out`.
        workers: worker processes of the conversion.
        rounds: measurements of each command.
        idle: cost of starting Python and torch.
    """
    command = [sys.executable, "-c", CONVERT, action, str(source), str(out), str(workers)]
    costs: dict[str, list[Cost]] = {name: [] for name in (*COPIES, action)}
    for _ in range(rounds):
        for name, values in costs.items():
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            values.append(run_measured(command) if name == action
                          else measure_action(partial(copy_folder, source, out, name)))
    best = {name: min(runs, key=lambda cost: cost.wall_s) for name, runs in costs.items()}
    ours, size_gb = best[action], count_bytes(source) / 1e9
    print(f"\n{action}, {size_gb:.2f} GB, {len(list(out.rglob('*.safetensors')))} file(s) written, "
          f"load {os.getloadavg()[0]:.1f} at the end")
    print(f"{'':<24} {'wall, s':>8} {'CPU, s':>7} {'GB/s':>6} {action + ' is':>12} {'less start':>11}   "
          "wall s of each round")
    for name, cost in best.items():
        print(f"{name:<24} {cost.wall_s:8.2f} {cost.cpu_s:7.2f} {size_gb / cost.wall_s:6.2f} "
              f"{cost.wall_s / ours.wall_s:11.2f}x {cost.wall_s / (ours.wall_s - idle.wall_s):10.2f}x   "
              f"{', '.join(f'{repeated.wall_s:.1f}' for repeated in costs[name])}", flush=True)
    print(f"{action} takes {ours.peak_bytes / 1e9:.2f} GB of memory")


def main() -> None:
    """Write the Hugging Face folder and compare both directions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.5,
                        help="bytes of the model (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path,
                        help="folder of all files (default: the temporary folder); needs 4 times the bytes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        hf, checkpoint, out = Path(work) / "hf", Path(work) / "checkpoint", Path(work) / "out"
        if shutil.disk_usage(work).free < 4e9 * args.gigabytes:
            raise SystemExit(f"{work}: needs {4 * args.gigabytes:.0f} GB of free space")
        run_measured([sys.executable, "-c", MAKE, str(hf), str(args.gigabytes * 1e9)])
        print(f"{describe_machine()}; {args.workers} workers, best of {args.rounds} rounds; GB/s per core: "
              f"BLAKE3 {measure_hash_rate(BLAKE3):.1f}, SHA-256 {measure_hash_rate(SHA256):.2f}")
        idle = min((run_measured([sys.executable, "-c", IDLE]) for _ in range(args.rounds)),
                   key=lambda cost: cost.wall_s)
        print(f"start of Python and torch alone: {idle.wall_s:.2f} s, CPU {idle.cpu_s:.2f} s, "
              f"{idle.peak_bytes / 1e9:.2f} GB")
        compare_with_copies("from_hf", hf, out, args.workers, args.rounds, idle)
        shutil.rmtree(hf)
        out.rename(checkpoint)
        compare_with_copies("to_hf", checkpoint, out, args.workers, args.rounds, idle)


if __name__ == "__main__":
    main()
