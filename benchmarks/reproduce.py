"""What comes of the claims of the seeds: `megatron-sov reproduce SEED --claim NAME`, claim by claim, and a
table of all that have run.

    python benchmarks/reproduce.py --work FOLDER --claims SEED/NAME ... > benchmarks/results/reproduce.txt
    python benchmarks/reproduce.py --work FOLDER --print

The claims are in megatron_sov/bench/reproduce/seeds, written before their runs.  A run that was killed goes
on; seconds of processors are those of all its parts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

from megatron_sov.base.errors import ExitCode
from megatron_sov.bench.reproduce.claims import Registered, find_file, read_claims, register
from megatron_sov.bench.reproduce.running import claim_folder, seeds_of
from megatron_sov.bench.reproduce.verdict import Judged, paired_interval

CPU = "cpu_s.json"


def run(work: Path, seed: str, name: str) -> None:
    """Run what is missing of a claim, in one process of one thread, and add up what it took."""
    folder = work / seed
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        code = subprocess.run([sys.executable, "-W", "ignore", "-m", "megatron_sov", "reproduce", seed,
                               "--claim", name, "--workers", "1", "--output", folder], stdout=sys.stderr,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode
    finally:
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        file = folder / CPU
        spent = json.loads(file.read_text()) if file.exists() else {}
        spent[name] = spent.get(name, 0.0) + sum(getattr(after, kind) - getattr(before, kind)
                                                 for kind in ("ru_utime", "ru_stime"))
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(spent))
    if code not in (ExitCode.OK, ExitCode.GATE_FAILED):
        raise SystemExit(f"reproduce {seed} --claim {name} ended with exit code {code}")


def told(values: list[float]) -> str:
    """Return a mean, its interval and the values."""
    found = paired_interval(values)
    mean = sum(values) / len(values)
    interval = f" (95 %: {found[0]:+.4f} to {found[1]:+.4f})" if found else ""
    return f"{mean:+.4f}{interval}   " + ", ".join(f"{value:.4f}" for value in values)


def report(work: Path) -> None:
    """Print each claim that has begun, its arms and its tests."""
    print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work, Python "
          f"{platform.python_version()}; one process of one thread")
    for folder in sorted(work.iterdir()):
        file = find_file(folder.name).absolute()
        spent = json.loads((folder / CPU).read_text()) if (folder / CPU).exists() else {}
        claims = read_claims(file)
        for name in claims.claims:
            claim = register(claims, name, file)
            if (place := claim_folder(folder, claim)).is_dir():
                show(folder.name, claim, spent.get(name), seeds_of(place, claim.declared))


def show(seed: str, claim: Registered, cpu_s: float | None,
         found: dict[int, dict[str, dict[str, float]]]) -> None:
    """Print one claim; None for seconds that nobody has counted."""
    judged = Judged(claim, found)
    print(f"\n{seed}/{claim.name} ({claim.address}): {judged.outcome}, {len(found)} of {claim.claim.seeds} "
          f"seeds{'' if cpu_s is None else f', {cpu_s:.0f} s of a processor'}\n  {claim.claim.says}")
    for measure, what in claim.claim.measures.items():
        print(f"  {what.unit}")
        for arm in claim.claim.arms if found else ():
            print(f"    {arm:<12} {told([found[number][arm][measure] for number in sorted(found)])}")
    for tested in judged.tested:
        test = tested.test
        print(f"  {test.lower} < {test.higher} in {test.measure}, bound {test.more_than:g}, power "
              f"{tested.power:.0%}: {tested.outcome}")
        if tested.differences:
            print(f"    {'difference':<12} {told([*tested.differences])}")


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--claims", nargs="+", default=[], metavar="SEED/NAME")
    parser.add_argument("--print", dest="only_print", action="store_true")
    args = parser.parse_args()
    for asked in [] if args.only_print else args.claims:
        run(args.work, *asked.split("/"))
    report(args.work)


if __name__ == "__main__":
    main()
