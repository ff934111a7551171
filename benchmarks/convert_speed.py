"""How fast conversion is beside `cp` of the same bytes, and how much memory it takes, in both directions.

    python benchmarks/convert_speed.py [--gigabytes 4.5] [--workers 2] [--folder DIR]

A Hugging Face folder of random bfloat16 weights is made (structure of Solar Open, small experts, several
files), then converted to a checkpoint and back.  `cp -r` copies the same source in the same state of the page
cache; like the conversion it is followed by a sync of what it wrote.  The rounds alternate, and the best of
each counts.  Conversion reads, checks for NaN and infinity, rearranges, hashes twice (the source against its
manifest, where it has one, and what is written) and syncs.  Its memory is the largest resident set of its
process, Python and torch included.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

IDLE = "import megatron_sov.convert.hf_export, megatron_sov.convert.hf_import"
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
from megatron_sov import convert, models, recipes
from megatron_sov.convert.shard_writer import plan_shards, write_files
from megatron_sov.mcore.checkpoint.writer import TensorSpec
from megatron_sov.models.family import TokenIds
folder, size_bytes = Path(sys.argv[1]), float(sys.argv[2])
big = recipes.get("solar-open-102b").model
model = dataclasses.replace(big, hidden_size=2048, num_heads=16, num_kv_heads=4, num_experts=64,
                            expert_ffn_dim=640, num_layers=1, vocab_size=65536)
family = models.get(model.family)
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


@dataclass(frozen=True)
class Cost:
    """What a command took."""

    wall_s: float
    """Time on the clock."""
    cpu_s: float
    """User and system time."""
    peak_bytes: int
    """Largest resident set of its process."""


def measured(command: list[str]) -> Cost:
    """Run a command to its end and return its cost."""
    start_s = time.monotonic()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[:4]}: exit code {process.returncode}")
    return Cost(time.monotonic() - start_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def copied(source: Path, target: Path) -> Cost:
    """Copy a folder with `cp -r` and sync the copy."""
    return measured(["bash", "-c", 'cp -r "$1" "$2" && sync $(find "$2" -type f)', "copy", str(source),
                     str(target)])


def size_of(folder: Path) -> int:
    """Return the bytes of a folder's files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def compare(action: str, source: Path, out: Path, workers: int, rounds: int, idle: Cost) -> None:
    """Print one line: `cp` and conversion of the same source."""
    copies, conversions = [], []
    for _ in range(rounds):
        for costs in (copies, conversions):
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            command = [sys.executable, "-c", CONVERT, action, str(source), str(out), str(workers)]
            costs.append(copied(source, out) if costs is copies else measured(command))
    best, copy = (min(costs, key=lambda cost: cost.wall_s) for costs in (conversions, copies))
    size_gb, work_s = size_of(source) / 1e9, best.wall_s - idle.wall_s
    print(f"{action:<8} {size_gb:6.2f} {copy.wall_s:7.1f} {copy.cpu_s:7.1f} {best.wall_s:11.1f} "
          f"{best.cpu_s:7.1f} {copy.wall_s / best.wall_s:7.2f} {copy.wall_s / work_s:15.2f} "
          f"{best.peak_bytes / 1e9:9.2f}", flush=True)
    for name, costs in (("cp", copies), ("convert", conversions)):
        print(f"{'':<16}every {name}: {', '.join(f'{cost.wall_s:.1f}' for cost in costs)} s")


def main() -> None:
    """Make the folder and compare both directions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.5,
                        help="bytes of the model (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path,
                        help="where to work (default: the temporary folder); needs three times the bytes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        hf, checkpoint, out = Path(work) / "hf", Path(work) / "checkpoint", Path(work) / "out"
        if shutil.disk_usage(work).free < 4e9 * args.gigabytes:
            raise SystemExit(f"{work}: needs {4 * args.gigabytes:.0f} GB of free space")
        measured([sys.executable, "-c", MAKE, str(hf), str(args.gigabytes * 1e9)])
        idle = measured([sys.executable, "-c", IDLE])
        print(f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
              f"load {os.getloadavg()[0]:.1f} when it began, {args.workers} workers, {args.rounds} rounds")
        print(f"Python and torch alone: {idle.wall_s:.1f} s, {idle.peak_bytes / 1e9:.2f} GB\n")
        print(f"{'':<8} {'GB':>6} {'cp, s':>7} {'CPU, s':>7} {'convert, s':>11} {'CPU, s':>7} {'ratio':>7} "
              f"{'without imports':>15} {'peak GB':>9}")
        compare("from_hf", hf, out, args.workers, args.rounds, idle)
        shutil.rmtree(out)
        measured([sys.executable, "-c", CONVERT, "from_hf", str(hf), str(checkpoint), str(args.workers)])
        shutil.rmtree(hf)
        compare("to_hf", checkpoint, out, args.workers, args.rounds, idle)


if __name__ == "__main__":
    main()
