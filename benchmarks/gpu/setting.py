"""What every part of the first contact has: where results go, whether it is a dry run, and commands."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOUBLE = ROOT / "tests/te_double"
"""Stands for Transformer Engine in a dry run."""


class Failed(Exception):
    """A part has found that something is not as it must be."""

    def __init__(self, problem: str, **figures: Any) -> None:
        super().__init__(problem)
        self.figures = figures


@dataclass(frozen=True)
class Setting:
    """How a part is run."""

    out: Path
    """Folder of results; work files go into its folder `work`."""
    dry: bool
    """On the CPU, at the smallest sizes, with a double in the place of Transformer Engine."""

    @property
    def device(self) -> str:
        """Where tensors are."""
        return "cpu" if self.dry else "cuda"

    @property
    def work(self) -> Path:
        """A folder for data and runs, which may be deleted."""
        folder = self.out / "work"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def command(self, *words: str | Path, on_gpu: bool = True, **environment: str) -> str:
        """Run one of our commands, a program's name first, and return what it printed.

        Raises:
            Failed: its exit code is not 0.
        """
        module = {"megatron-sov": "megatron_sov", "sov-data": "data_prep.cli",
                  "sov-tokenizer": "tokenizer.cli"}[str(words[0])]
        start = [sys.executable, "-W", "ignore", "-m", module]
        if self.dry and on_gpu:
            start = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("with_double.py"))]
        paths = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        env = {**os.environ, "PYTHONPATH": paths.rstrip(os.pathsep), **environment}
        if not on_gpu:
            env["CUDA_VISIBLE_DEVICES"] = ""
        done = subprocess.run([*start, *map(str, words[1:])], env=env, capture_output=True, text=True,
                              check=False)
        if done.returncode:
            raise Failed(f"{' '.join(map(str, words))}: exit code {done.returncode}: "
                         f"{done.stderr.strip()[-2000:]}")
        return done.stdout


def relative(found: Any, expected: Any) -> float:
    """Return the norm of the difference of two tensors over the norm of the expected one."""
    expected = expected.detach().double().cpu()
    difference = found.detach().double().cpu() - expected
    return float(difference.norm() / expected.norm().clamp_min(1e-300))


def largest(values: Iterable[float]) -> float:
    """Return the largest of some numbers, NaN where one is none: `max` passes over those."""
    found = list(values)
    return math.nan if any(map(math.isnan, found)) else max(found)


def losses(run: Path) -> list[float]:
    """Return the loss of each step of a run; of a step that was done again, the last one."""
    events = (json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines())
    found = {e["step"]: e["loss"] for e in events if e["event"] == "step"}
    return [found[step] for step in sorted(found)]
