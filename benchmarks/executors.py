"""One job by every executor of `megatron-sov map`: what each costs before the first row, and for each row.

    python benchmarks/executors.py [--rows 6400] [--busy-ms 5]

The step keeps a core busy for so long a row.  It is done in this process, in two processes, by an array of
two jobs on the Slurm of the tests (tests/operate/slurm/virtual_cluster.py), and on a Ray cluster of two
nodes; all on this one machine, so its two cores are what all have.  Each is done with no row's work too: what
starting, reading, keeping and publishing take alone.  Rows must come out equal.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / f"tests/{hall}") for hall in ("operate/slurm", "work")]
from ray_nodes import two_nodes
from virtual_cluster import PROFILE, VirtualCluster, why_not

ROOT = Path(__file__).parents[1]
STEP = """
import time

class Busy:
    def __init__(self, *, seconds: float = 0.0):
        self.seconds = seconds

    def do(self, row):
        end = time.thread_time() + self.seconds
        while time.thread_time() < end:
            pass
        return {"n": row["n"] + 1}
"""


def mapped(folder: Path, seconds: float, words: list[str]) -> None:
    """Run the command once."""
    program = "import sys; from megatron_sov.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", program, "map", "rows.jsonl", "mine.py:Busy", "--output",
                           "out", "--set", f"seconds={seconds}", *words], cwd=folder, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    if done.returncode:
        raise SystemExit(f"{words} ended with {done.returncode}: {done.stderr[-2000:]}")


def timed(folder: Path, seconds: float, words: list[str]) -> tuple[float, bytes]:
    """Return how long a job took until its output was there, and its rows."""
    began_s = time.monotonic()
    mapped(folder, seconds, words)
    while not (folder / "out/manifest.json").exists():
        time.sleep(0.05)
    wall_s, made = time.monotonic() - began_s, (folder / "out/rows.jsonl").read_bytes()
    subprocess.run(["rm", "-r", str(folder / "out")], check=True)
    return wall_s, made


def main() -> int:
    """Do all, and print a table; returns 1 where rows differ."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=6400)
    parser.add_argument("--busy-ms", type=float, default=5.0)
    args = parser.parse_args()
    if reason := why_not():
        raise SystemExit(f"there is no Slurm to be had: {reason}")
    print(f"python {platform.python_version()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the "
          f"start; {args.rows:,} rows, {args.busy_ms:g} ms each: {args.rows * args.busy_ms / 1e3:.1f} s of "
          "one core")
    print(f"{'executor':<28} {'no work':>9} {'with work':>10} {'rows/s':>8} {'of two cores':>13}")
    seconds, same, code = args.busy_ms / 1e3, b"", 0
    with tempfile.TemporaryDirectory(prefix="sov-executors-") as name, \
            VirtualCluster(Path(name) / "cluster") as slurm, two_nodes() as ray:
        os.environ["SLURM_CONF"] = slurm.env["SLURM_CONF"]
        folder = Path(name)
        (folder / "mine.py").write_text(STEP)
        (folder / "site.yaml").write_text(PROFILE + f"python: {sys.executable}\n")
        (folder / "rows.jsonl").write_text("".join(f'{{"n": {n}}}\n' for n in range(args.rows)))
        for executor, words in (("this process", ["--workers", "1"]), ("two processes", ["--workers", "2"]),
                                ("Slurm, an array of two jobs", ["--workers", "2", "--cluster", "site.yaml"]),
                                ("Ray, two nodes", ["--workers", "2", "--ray", ray.address])):
            start_s, _ = timed(folder, 0.0, words)
            wall_s, made = timed(folder, seconds, words)
            same = same or made
            code |= made != same
            told = "" if made == same else " DIFFERS"
            print(f"{executor:<28} {start_s:>7.1f} s {wall_s:>8.1f} s {args.rows / wall_s:>8.0f} "
                  f"{args.rows * seconds / wall_s / 2:>12.0%}{told}", flush=True)
    print(f"load at the end {os.getloadavg()[0]:.1f}")
    return code


if __name__ == "__main__":
    sys.exit(main())
