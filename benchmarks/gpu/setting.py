"""The rungs of first_contact.py, their journal of figures, and their commands."""

import json
import math
import os
import subprocess
import sys
import time
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
PASS, FAIL, CUT = "PASS", "FAIL", "CUT"
"""Status of a rung; CUT: its process was killed before the end."""
EVENTS = "events.jsonl"


class Failed(Exception):
    """A check of a rung failed."""


def fail_on(problems: list[str]) -> None:
    """Raise `Failed` with all problems; rungs continue after a problem and raise at the end."""
    if problems:
        raise Failed("; ".join(problems))


@dataclass(frozen=True)
class Rung:
    """A measurement with its own process and events: a part, or one case of it."""

    name: str
    """PART or PART.CASE; the module `part_PART` measures it."""
    minutes: float
    """Expected duration on an H200, from three earlier calls and estimates."""
    measures: str
    on_gpu: bool = True
    """False: runs on the CPU only, so another machine can run it beforehand."""

    @property
    def module(self) -> str:
        return "part_" + self.name.partition(".")[0]

    @property
    def case(self) -> str:
        return self.name.partition(".")[2]


RUNGS = tuple(Rung(*row) for row in (
    ("big_rank.selective", 1.5, "kernels, host time, waits and memory with selective recomputation"),
    ("big_rank.fixed_segments", 0.7, "the same without expandable_segments of the allocator"),
    ("big_rank.recompute", 0.7, "full recomputation"),
    ("big_rank.micro_batch_2", 0.8, "two sequences in a micro-batch"),
    ("big_rank.learned_routing", 0.7, "routers choose: the rungs with graphs compare with this one"),
    ("big_rank.router_graphs", 0.8, "CUDA graphs of routers: does the capture work?"),
    ("big_rank.overlap", 1.0, "expert messages of one micro-batch behind another one's layers"),
    ("big_rank.overlap_graphs", 1.2, "overlap and router graphs together, as in recommended layouts"),
    ("big_rank.tensorwise", 0.8, "train.fp8=tensorwise"),
    ("big_rank.blockwise", 0.8, "train.fp8=blockwise"),
    ("big_rank.fp8_weights", 0.8, "blockwise with weights stored in 8 bits"),
    ("installation", 0.7, "Transformer Engine imports and has the expected signatures; `doctor`"),
    ("attention", 1.0, "packed rows, windows, grouped heads and linear attention against a reference"),
    ("fp8", 0.5, "products of each FP8 recipe against their emulation"),
    ("fp8_training.tensorwise", 2.0, "losses against bf16; a resumed run has the same bits"),
    ("fp8_training.blockwise", 1.5, "losses against bf16"),
    ("fp8_training.mxfp8", 1.5, "the same, on Blackwell"),
    ("fp8_training.nvfp4", 1.5, "the same, on Blackwell"),
    ("transfers", 1.5, "speed of snapshots and of collectives with one rank, and seconds of a start"),
    ("losses.cpu", 4.0, "tiny recipes on the CPU", False),
    ("losses.gpu", 4.0, "the same on the GPU against the CPU's losses; routers learn"),
    ("losses.moved", 1.0, "a run of the CPU continues on the GPU, and then on the CPU"),
    ("post.cpu", 3.0, "post-training chains on the CPU", False),
    ("post.gpu", 3.0, "the same on the GPU: losses and greedy responses against the CPU's"),
    ("big_rank.unfused_sums", 0.7, "weight gradients without fused sums"),
    ("big_rank.all_off", 0.8, "no fused kernels, no overlapped gradient messages"),
))
"""Rungs in their default order: the first questions are answered within the first ten minutes."""


@dataclass(frozen=True)
class Setting:
    """Result folder and mode of a rung."""

    out: Path
    """Folder of the journal `EVENTS`."""
    dry: bool
    """Run on the CPU, at the smallest sizes, with the Transformer Engine double."""
    work: Path
    """Folder of data, runs and compiled kernels."""

    @property
    def device(self) -> str:
        """Torch device of the tensors."""
        return "cpu" if self.dry else "cuda"

    def record(self, event: str, rung: str, **fields: Any) -> None:
        """Append an event to the journal, so that a kill at any moment loses no earlier event."""
        line = json.dumps({"event": event, "rung": rung, "time_s": time.time(), **fields}, default=str)
        with (self.out / EVENTS).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read_results(self) -> dict[str, dict[str, Any]]:
        """Return rung -> status, problem, seconds and figures of its last attempt in this mode."""
        return read_results(self.out / EVENTS, self.dry)

    def get_figures(self, rung: str) -> dict[str, Any]:
        """Return the figures of a rung that has passed.

        Raises:
            Failed: it has not passed in this mode.
        """
        result = self.read_results().get(rung, {})
        if result.get("status") != PASS:
            raise Failed(f"run {rung} first, or give the journal of its run by --carry")
        return dict(result["figures"])

    def run_command(self, *words: str | Path, on_gpu: bool = True) -> str:
        """Run a command (a key of `PROGRAMS`, then its words) in a process, and return its standard output.

        Raises:
            Failed: the exit code is not 0.
        """
        completed = subprocess.run([sys.executable, "-W", "ignore", "-m", PROGRAMS[str(words[0])],
                                    *map(str, words[1:])],
                                   env=build_environment(on_gpu), capture_output=True, text=True, check=False)
        if completed.returncode:
            raise Failed(f"{' '.join(map(str, words))}: exit code {completed.returncode}: "
                         f"{completed.stderr.strip()[-2000:]}")
        return completed.stdout

    def run_commands(self, commands: Sequence[Sequence[str | Path]], *, on_gpu: bool = True) -> Iterator[str]:
        """Run commands (a key of `PROGRAMS`, then words) one after another in one process. Yield "" or the
        error of each as soon as it ends. After a failure, a new process runs the remaining commands."""
        rest = [[str(word) for word in words] for words in commands]
        double = ["--double"] if self.dry and on_gpu else []
        while rest:
            log = self.work / "commands.log"
            call = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("commands.py")), *double,
                    json.dumps(rest)]
            with (log.open("w", encoding="utf-8") as errors,
                  subprocess.Popen(call, env=build_environment(on_gpu), stdout=subprocess.PIPE, stderr=errors,
                                   text=True) as process):
                assert process.stdout is not None
                code = 0
                while rest and not code:
                    line = process.stdout.readline().strip()
                    code = int(line) if line else process.wait() or 1
                    words, output = rest.pop(0), log.read_text(encoding="utf-8", errors="replace")
                    yield f"{' '.join(words)}: exit code {code}: {output.strip()[-1000:]}" if code else ""


def read_results(journal: Path, dry: bool) -> dict[str, dict[str, Any]]:
    """Return rung -> status, problem, seconds and figures of its last attempt in a journal."""
    results: dict[str, dict[str, Any]] = {}
    lines = journal.read_text(encoding="utf-8").splitlines() if journal.is_file() else []
    for line in lines:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:  # the machine stopped while this line was written
            continue
        if event["event"] == "start":
            results[event["rung"]] = {"dry": event["dry"], "status": CUT, "problem": "", "figures": {}}
        elif event["event"] == "figure":
            results[event["rung"]]["figures"][event["name"]] = event["value"]
        else:
            results[event["rung"]] |= {key: event[key] for key in ("status", "problem", "seconds")}
    return {rung: result for rung, result in results.items() if result["dry"] == dry}


def build_environment(on_gpu: bool) -> dict[str, str]:
    """Return environment variables with this checkout on PYTHONPATH and, unless `on_gpu`, with all GPUs
    hidden."""
    paths = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    hidden = {} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, "PYTHONPATH": paths.rstrip(os.pathsep), **hidden}


def compute_relative_error(found: Any, expected: Any) -> float:
    """Return ||found - expected|| / ||expected||, computed in float64 on the CPU."""
    expected = expected.detach().double().cpu()
    difference = found.detach().double().cpu() - expected
    return float(difference.norm() / expected.norm().clamp_min(1e-300))


def find_largest(values: Iterable[float]) -> float:
    """Return the largest number, or NaN if any is NaN; `max` would skip NaN."""
    result = list(values)
    return math.nan if any(map(math.isnan, result)) else max(result)


def read_losses(run: Path) -> list[float]:
    """Return the loss of each step of a run; the last loss of a step that a resumed run has repeated."""
    events = (json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines())
    by_step = {event["step"]: event["loss"] for event in events if event["event"] == "step"}
    return [by_step[step] for step in sorted(by_step)]
