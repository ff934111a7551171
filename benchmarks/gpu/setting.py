"""The setting of every first-contact part: result folder, dry run, measured costs, and commands."""

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
"""Stands for Transformer Engine in a dry run."""


PROGRAMS = {"megatron-sov": "megatron_sov.cli", "sov-data": "data_prep.cli", "sov-tokenizer": "tokenizer.cli"}
"""Program -> its module."""
Figures = Iterator[tuple[str, Any]]
"""What a part's `measure` yields: name and value of each figure, as soon as it is measured."""


class Failed(Exception):
    """A check of a part failed."""


def fail_on(problems: list[str]) -> None:
    """Raise `Failed` with all problems; parts continue after a problem and raise at the end."""
    if problems:
        raise Failed("; ".join(problems))


@dataclass(frozen=True)
class Machine:
    """How quick a machine is, as `first_contact.py` measures it before the first part."""

    start_s: float
    """Seconds in which a process starts, imports what training imports, and has multiplied its first
    matrices."""
    flops_per_s: float
    """Of a large product in bf16 on the device."""
    cpu_flops_per_s: float
    """Of a large product in fp32 on the host."""


STEP_S = 1.0
"""Of a training step beside its FLOPs: launches, what is compiled or searched at first, evaluations and
checkpoints, whatever its size."""
EFFICIENCY = 0.02
"""Share of a large product's speed that small models reach."""
MARGIN = 3.0
"""A budget is so many times what is reckoned; one that is too short costs the whole part."""


@dataclass(frozen=True)
class Cost:
    """The amount of work of a part, from which its time budget follows."""

    starts: int = 0
    """Processes that it starts, beside its own."""
    steps: int = 0
    """Training steps and the like."""
    flops: float = 0.0
    """On the device."""
    cpu_flops: float = 0.0
    """On the host."""

    def budget_s(self, machine: Machine) -> float:
        """Return the seconds after which a part is ended."""
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

    def command(self, *words: str | Path, on_gpu: bool = True) -> str:
        """Run one of our commands as a user does, a program's name first, and return what it printed.

        Raises:
            Failed: its exit code is not 0.
        """
        completed = subprocess.run([sys.executable, "-W", "ignore", "-m", PROGRAMS[str(words[0])],
                                    *map(str, words[1:])],
                                   env=environment(on_gpu), capture_output=True, text=True, check=False)
        if completed.returncode:
            raise Failed(f"{' '.join(map(str, words))}: exit code {completed.returncode}: "
                         f"{completed.stderr.strip()[-2000:]}")
        return completed.stdout

    def commands(self, commands: Sequence[Sequence[str | Path]], *, on_gpu: bool = True) -> Iterator[str]:
        """Run our commands one after another in one process, a program's name first in each, and yield for
        each "", or what was wrong, as soon as it has ended.  Behind one that fails a new process goes on."""
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
                    words, said = rest.pop(0), log.read_text(encoding="utf-8", errors="replace")
                    yield f"{' '.join(words)}: exit code {code}: {said.strip()[-1000:]}" if code else ""


def environment(on_gpu: bool) -> dict[str, str]:
    """Return the environment of a command that finds this checkout, and a GPU or none."""
    paths = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    hidden = {} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, "PYTHONPATH": paths.rstrip(os.pathsep), **hidden}


def relative(found: Any, expected: Any) -> float:
    """Return the norm of the difference of two tensors over the norm of the expected one."""
    expected = expected.detach().double().cpu()
    difference = found.detach().double().cpu() - expected
    return float(difference.norm() / expected.norm().clamp_min(1e-300))


def largest(values: Iterable[float]) -> float:
    """Return the largest number, or NaN if any is NaN; `max` would skip NaN."""
    result = list(values)
    return math.nan if any(map(math.isnan, result)) else max(result)


def losses(run: Path) -> list[float]:
    """Return the loss of each step of a run; of a step that was done again, the last one."""
    events = (json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines())
    found = {e["step"]: e["loss"] for e in events if e["event"] == "step"}
    return [found[step] for step in sorted(found)]
