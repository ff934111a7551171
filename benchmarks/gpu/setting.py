"""Settings of the parts of first_contact.py (result folder, dry run), their time budgets and their
commands."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOUBLE = ROOT / "tests/te_double"
"""Folder of the package that replaces Transformer Engine in a dry run."""
PROGRAMS = {"megatron-sov": "megatron_sov.cli", "sov-data": "data_prep.cli", "sov-tokenizer": "tokenizer.cli"}
"""Program -> its module."""
Figures = Iterator[tuple[str, Any]]
"""Type of a part's `measure`: yields the name and value of each figure as soon as it is measured."""


class Failed(Exception):
    """A check of a part failed."""


def fail_on(problems: list[str]) -> None:
    """Raise `Failed` with all problems; parts continue after a problem and raise at the end."""
    if problems:
        raise Failed("; ".join(problems))


@dataclass(frozen=True)
class Machine:
    """Speed of a machine, which `first_contact.py` measures before the first part."""

    start_s: float
    """Seconds to start a process, import training and Transformer Engine, and multiply the first matrices."""
    flops_per_s: float
    """FLOP/s of a large bf16 matrix product on the device."""
    cpu_flops_per_s: float
    """FLOP/s of a large fp32 matrix product on the host."""


STEP_S = 1.0
"""Seconds of a training step in addition to its FLOPs: launches, compilation, evaluations and checkpoints."""
EFFICIENCY = 0.02
"""FLOP/s of small models as a share of those of a large matrix product."""
MARGIN = 3.0
"""Budget over estimated time; a budget that is too short would discard the whole part."""


@dataclass(frozen=True)
class Cost:
    """The amount of work of a part, from which its time budget follows."""

    starts: int = 0
    """Processes that the part starts, in addition to its own."""
    steps: int = 0
    """Training steps, and operations that take about as long."""
    flops: float = 0.0
    """Floating-point operations on the device."""
    cpu_flops: float = 0.0
    """Floating-point operations on the host."""

    def budget_s(self, machine: Machine) -> float:
        """Return the seconds after which the part is killed."""
        computing_s = self.flops / machine.flops_per_s + self.cpu_flops / machine.cpu_flops_per_s
        return MARGIN * ((1 + self.starts) * machine.start_s + self.steps * STEP_S + computing_s / EFFICIENCY)


def training_flops(recipe: str, settings: Iterable[str], steps: int) -> float:
    """Return the FLOPs of `steps` training steps of a recipe."""
    from megatron_sov import recipes
    from megatron_sov.model.config import apply_settings
    from megatron_sov.model.families.count import compute_train_flops_per_token

    config = apply_settings(recipes.get(recipe), list(settings))
    seq_len = config.data.phases[0].seq_len
    return compute_train_flops_per_token(config.model,
                                         seq_len) * seq_len * config.train.global_batch_size * steps


@dataclass(frozen=True)
class Setting:
    """Result folder and mode of a part."""

    out: Path
    """Folder of result files; data and runs go into its folder `work`."""
    dry: bool
    """Run on the CPU, at the smallest sizes, with the Transformer Engine double."""

    @property
    def device(self) -> str:
        """Torch device of the tensors."""
        return "cpu" if self.dry else "cuda"

    @property
    def work(self) -> Path:
        """Folder for data and runs; may be deleted."""
        folder = self.out / "work"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def command(self, *words: str | Path, on_gpu: bool = True) -> str:
        """Run a command (a key of `PROGRAMS`, then its words) in a process, and return its standard output.

        Raises:
            Failed: the exit code is not 0.
        """
        completed = subprocess.run([sys.executable, "-W", "ignore", "-m", PROGRAMS[str(words[0])],
                                    *map(str, words[1:])],
                                   env=environment(on_gpu), capture_output=True, text=True, check=False)
        if completed.returncode:
            raise Failed(f"{' '.join(map(str, words))}: exit code {completed.returncode}: "
                         f"{completed.stderr.strip()[-2000:]}")
        return completed.stdout

    def commands(self, commands: Sequence[Sequence[str | Path]], *, on_gpu: bool = True) -> Iterator[str]:
        """Run commands (a key of `PROGRAMS`, then words) one after another in one process. Yield "" or the
        error of each as soon as it ends. After a failure, a new process runs the remaining commands."""
        rest = [[str(word) for word in words] for words in commands]
        double = ["--double"] if self.dry and on_gpu else []
        while rest:
            log = self.work / "commands.log"
            call = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("commands.py")), *double,
                    json.dumps(rest)]
            with (log.open("w", encoding="utf-8") as errors,
                  subprocess.Popen(call, env=environment(on_gpu), stdout=subprocess.PIPE, stderr=errors,
                                   text=True) as process):
                assert process.stdout is not None
                code = 0
                while rest and not code:
                    line = process.stdout.readline().strip()
                    code = int(line) if line else process.wait() or 1
                    words, output = rest.pop(0), log.read_text(encoding="utf-8", errors="replace")
                    yield f"{' '.join(words)}: exit code {code}: {output.strip()[-1000:]}" if code else ""


def environment(on_gpu: bool) -> dict[str, str]:
    """Return environment variables with this checkout on PYTHONPATH and, unless `on_gpu`, with all GPUs
    hidden."""
    paths = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    hidden = {} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, "PYTHONPATH": paths.rstrip(os.pathsep), **hidden}


def relative(found: Any, expected: Any) -> float:
    """Return ||found - expected|| / ||expected||, computed in float64 on the CPU."""
    expected = expected.detach().double().cpu()
    difference = found.detach().double().cpu() - expected
    return float(difference.norm() / expected.norm().clamp_min(1e-300))


def largest(values: Iterable[float]) -> float:
    """Return the largest number, or NaN if any is NaN; `max` would skip NaN."""
    result = list(values)
    return math.nan if any(map(math.isnan, result)) else max(result)


def losses(run: Path) -> list[float]:
    """Return the loss of each step of a run; the last loss of a step that a resumed run has repeated."""
    events = (json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines())
    found = {e["step"]: e["loss"] for e in events if e["event"] == "step"}
    return [found[step] for step in sorted(found)]
