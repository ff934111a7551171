"""`--gate TASKS --tolerance T` of the training commands: what the model could do before, it can still do.

What the stage starts from is evaluated before its first step, and the last checkpoint when its processes have
ended, each by `megatron-sov eval lm` as a command of its own; under torchrun or Slurm, whose processes cannot
start others, in these.  Both keep their answers in RUN/gate/cache, so that nothing is asked twice.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_sov.base.command_line import Parser
from megatron_sov.base.errors import ExitCode, StopRequested, UserError, warn
from megatron_sov.base.settings import add_options, read_options
from megatron_sov.bench.score_differences import (
    FORGOTTEN, NOT_KNOWN, NOT_PROVEN, Forgetting, judge_forgetting, read_scored_results)
from megatron_sov.commands.evaluate.eval_lm import LM, EvalLmOptions
from megatron_sov.commands.train.setup.stage_options import FORGETTING_GATE
from megatron_sov.runs.folder import GATE, RunEvents
from megatron_sov.runs.launch_environment import has_launcher, is_first_rank
from megatron_sov.train.guards.gate import EndVerdict
from megatron_sov.work.processes.children import run_command

OWN = ("--tasks", "--output", "--cache", "--run", "--nproc")
"""Arguments of `eval lm` that the gate gives itself."""


@dataclass(frozen=True)
class ForgettingGate:
    """A `train.guards.gate.EndGate` that compares the last checkpoint with what the stage started from."""

    run: Path
    """The run's folder."""
    start: Path
    """The checkpoint that it starts from."""
    tasks: tuple[str, ...]
    """What is evaluated; a group stands for its tasks."""
    tolerance: float
    """How much worse a task's first figure may be."""
    words: tuple[str, ...]
    """Further arguments of `eval lm`."""
    name: str = FORGETTING_GATE
    """Of the event, and of the verdict in the completion manifest."""

    def check_arguments(self) -> None:
        """Raise `UserError` where `eval lm` would not take them."""
        words = self._words(self.start, "start")
        try:
            found = _eval_options(words)
        except UserError as e:
            raise UserError(f"--gate-with: {e}") from None
        # an option may be shortened, and of two the last one counts
        own = [words[words.index(option) + 1] for option in ("--tasks", "--output", "--cache")]
        kept = found.settings
        if [found.tasks, str(kept.output), str(kept.cache)] != own or kept.run is not None:
            raise UserError("--gate-with: --tasks, --output, --cache and --run are the gate's own; leave "
                            "them out")

    def begin(self) -> None:
        """Evaluate what the stage starts from."""
        self._evaluate(self.start, "start", [])

    def judge(self, checkpoint: Path) -> EndVerdict | None:
        """Evaluate the last checkpoint, and compare; None on other processes than the first."""
        self._evaluate(checkpoint, "last", ["--run", str(self.run)])
        if not is_first_rank():
            return None
        first, last = (read_scored_results(self._output(when)) for when in ("start", "last"))
        found = judge_forgetting(first, last, self.tolerance)
        # before the verdict is told: a report shows a gate that did not pass as well
        RunEvents(self.run).add(self.name, step=last.results.model.step, start=str(self.start),
                                **found.to_dict())
        self._tell(found)
        lost = found.format_lines(FORGOTTEN, NOT_KNOWN)
        failure = "\n".join([f"the forgetting gate has not passed: {len(lost)} of {len(found.tasks)} tasks; "
                             "change the data (rehearsal of what is lost) or the learning rate in a new "
                             "--run, or allow more by --tolerance and --resume",
                             *(f"  {line}" for line in lost)])
        return EndVerdict(None if found.passed else failure, {self.name: found.to_dict()})

    def _tell(self, found: Forgetting) -> None:
        for line in found.format_lines():
            print(f"forgetting gate: {line}", flush=True)
        if found.passed and (open_ones := found.format_lines(NOT_PROVEN)):
            warn(f"{self.run}: the forgetting gate passes, and {len(open_ones)} of {len(found.tasks)} tasks "
                 "have too few items to prove that no more than the tolerance is lost; give them more")

    def _output(self, when: str) -> Path:
        return self.run / GATE / f"{when}.json"

    def _words(self, target: Path, when: str) -> list[str]:
        return [str(target), "--tasks", ",".join(self.tasks), "--output", str(self._output(when)), "--cache",
                str(self.run / GATE / "cache"), *self.words]

    def _evaluate(self, target: Path, when: str, more: list[str]) -> None:
        # the same words for both models: a figure of another mode or prompt could not be compared
        words = [*self._words(target, when), *more]
        # the ranks are there already; else a command of its own starts them
        if has_launcher():
            code = LM.run_options(_eval_options(words))
        else:
            print(f"forgetting gate: evaluates {target}", file=sys.stderr, flush=True)
            code = run_command(["megatron_sov", "eval", "lm", *words], "continue with --resume")
        if code == ExitCode.STOPPED:
            raise StopRequested(f"{self.run}: the forgetting gate was stopped, and its answers are saved; "
                                "continue with --resume")
        if code != ExitCode.OK:
            raise SystemExit(code)  # it has said why


def _eval_options(words: list[str]) -> EvalLmOptions:
    """Return what words ask of `eval lm`."""
    parser = Parser(prog="megatron-sov eval lm")
    add_options(parser, EvalLmOptions)
    return read_options(EvalLmOptions, parser.parse_args(words))
