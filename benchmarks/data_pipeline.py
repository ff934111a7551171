"""What a whole pipeline costs and that kills do not change it: seconds for each step, core-hours for each TB,
the same bytes after ten kills.

    python benchmarks/data_pipeline.py --docs FOLDER [--pipeline FILE.yaml] [--megabytes 200] [--kills 10]
                                       [--before CHECKOUT]

FOLDER has raw documents, such as unpacked documentation packages (`apt-get download`, `dpkg-deb -x`, one
folder for each package); whole packages are taken in their order by a hash of the name until there are enough
megabytes.  Without --pipeline it is data_prep/curate/pipelines/tiny.yaml.  CPU seconds are those that tasks
note, reading and writing included.  CHECKOUT is an older tree of this repository: it works at the same time,
on the same documents, with as many workers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pyarrow import parquet

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, required=True, help="folder of raw documents")
    parser.add_argument("--pipeline", type=Path, default=ROOT / "data_prep/curate/pipelines/tiny.yaml")
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--before", type=Path, help="an older checkout, to run beside this one")
    parser.add_argument("--work", type=Path, help="folder to work in (default: a temporary one)")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="data-pipeline-"))
    work.mkdir(parents=True, exist_ok=True)
    size_bytes = gather(args.docs, work / "raw", args.megabytes * 1e6)
    shutil.copy(args.pipeline, work / "pipeline.yaml")
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
          f"{size_bytes / 1e6:.1f} MB of raw documents, {args.workers} workers")
    begun = time.monotonic()
    older = args.before and subprocess.Popen(command(work, "before", args.workers), cwd=args.before,
                                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    subprocess.run(command(work, "whole", args.workers), check=True, cwd=ROOT)
    whole_s = time.monotonic() - begun
    if older:
        if older.wait():
            sys.exit(f"{args.before}: the run ended with {older.returncode}")
        print("before:")
        tell(work / "before", size_bytes, time.monotonic() - begun)
        print("now:")
    tell(work / "whole", size_bytes, whole_s)
    if older:
        same = texts(work / "before") == texts(work / "whole")
        print(f"the text of both: {'the same' if same else 'OTHER'}; load then {os.getloadavg()[0]:.1f}")
    undisturbed, chance = hashes(work / "whole"), random.Random(0)
    for number in range(args.kills):
        killed_after_s = chance.uniform(0.02, 1.2) * whole_s / args.kills
        with subprocess.Popen(command(work, "killed", args.workers), start_new_session=True,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                process.wait(killed_after_s)
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
        stand = sum(1 for _ in (work / "killed/shards").rglob("[0-9]*.parquet"))
        print(f"kill {number + 1}: after {killed_after_s:.1f} s, {stand} files of shards stand", flush=True)
    subprocess.run(command(work, "killed", args.workers), check=True, stdout=subprocess.DEVNULL)
    same = hashes(work / "killed") == undisturbed
    print(f"after {args.kills} kills: {len(undisturbed)} files of the output, "
          f"{'the same bytes' if same else 'OTHER BYTES'}")
    if not same:
        sys.exit(1)


def command(work: Path, output: str, workers: int) -> list[str]:
    """Return the command line of a run."""
    return [sys.executable, "-m", "data_prep.cli", "run", str(work / "pipeline.yaml"), "--output",
            str(work / output), "--workers", str(workers)]


def gather(docs: Path, raw: Path, size_bytes: float) -> int:
    """Link folders of documents until there are enough bytes; returns how many there are."""
    found = 0
    for folder in sorted(docs.iterdir(), key=lambda p: hashlib.sha256(p.name.encode()).digest()):
        if found >= size_bytes:
            break
        if not (raw / folder.name).exists():
            shutil.copytree(folder, raw / folder.name, copy_function=link, symlinks=False,
                            ignore_dangling_symlinks=True)
        found += sum(file.stat().st_size for file in (raw / folder.name).rglob("*") if file.is_file())
    return found


def link(source: str, target: str) -> None:
    """Give a file a second name, or copy it to another disk."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)


def tell(output: Path, size_bytes: int, wall_s: float) -> None:
    """Print documents, seconds and costs of each step."""
    summary = json.loads((output / "summary.json").read_text())
    steps: dict[tuple[int, str], dict[str, float]] = {}
    for source in summary["sources"]:
        for step in source["steps"]:
            total = steps.setdefault((step["number"], step["kind"]), dict.fromkeys(
                ("documents_in", "documents_kept", "bytes_in", "cpu_s"), 0))
            for name in total:
                total[name] += step[name]
    for shared in summary["shared"]:
        steps[shared["number"], shared["kind"]]["cpu_s"] += sum(one["cpu_s"] for one in shared["passes"])
    text_bytes = steps[0, "parse"]["bytes_in"]
    print(f"{'step':22} {'documents':>10} {'kept':>10} {'CPU s':>8} {'MB/s':>8} {'docs/s':>8}")
    for (number, kind), total in sorted(steps.items()):
        cpu_s = max(total["cpu_s"], 1e-9)
        print(f"{number:02d} {kind:19} {total['documents_in']:10.0f} {total['documents_kept']:10.0f} "
              f"{cpu_s:8.1f} {total['bytes_in'] / cpu_s / 1e6:8.1f} {total['documents_in'] / cpu_s:8.0f}")
    cpu_s = sum(total["cpu_s"] for total in steps.values())
    print(f"whole run: {wall_s:.0f} s, {cpu_s:.0f} CPU seconds in tasks; "
          f"{cpu_s / 3600 / (size_bytes / 1e12):,.0f} core-hours for a TB of raw documents, "
          f"{cpu_s / 3600 / (text_bytes / 1e12):,.0f} for a TB of their text")


def texts(output: Path) -> str:
    """Return a hash of the text of an output's documents, in their order."""
    found = hashlib.sha256()
    for file in sorted((output / "text").rglob("*.parquet")):
        found.update(repr(parquet.read_table(file, columns=["text"])["text"].to_pylist()).encode())
    return found.hexdigest()


def hashes(output: Path) -> dict[str, str]:
    """Return name -> hash of the files of an output's text."""
    return {str(file.relative_to(output)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted((output / "text").rglob("*.parquet"))}


if __name__ == "__main__":
    main()
