"""What the benchmarks have in common that train small models with and without synthesised data."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from seeds import over_seeds


def records(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file of JSON lines."""
    return map(json.loads, file.read_text().splitlines())


def report_shares(work: Path, title: str, what: str, arms: Iterable[str],
                  share_of: Callable[[Path, str], float | None]) -> None:
    """Print a percentage for each seed and arm that there is, and its mean over seeds.

    Args:
        work: a folder for each seed.
        title: what is measured.
        what: the synthesis makes.
        arms: in order.
        share_of: returns the percentage of a seed's folder and an arm; None: it was not measured yet.
    """
    print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work, Python "
          f"{platform.python_version()}; one process of one thread each")
    print(title)
    found: dict[str, list[float]] = {name: [] for name in arms}
    for folder in sorted(work.glob("seed-*")):
        if not (folder / "made/summary.json").exists():
            continue
        shares = {name: share for name in found if (share := share_of(folder, name)) is not None}
        summary = json.loads((folder / "made/summary.json").read_text())
        print(f"{folder.name}: {summary['num_kept']} {what} kept of {summary['num_samples']}; "
              + ", ".join(f"{name} {share:.0f}" for name, share in shares.items()))
        for name, share in shares.items():
            found[name].append(share)
    for name, shares_of in found.items():
        if shares_of:
            print(f"  {name:<10} {over_seeds(shares_of, '5.1f')}  ({len(shares_of)} seeds)")
