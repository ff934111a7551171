"""Forgetting gate (`--gate TASKS --tolerance T`): benchmark scores before and after a training stage.

The start checkpoint is evaluated before the first step, the last checkpoint after the training processes have
ended. Each evaluation is a separate `megatron-sov eval lm` process; processes under torchrun or Slurm cannot
start others, so there the training processes run it themselves. Answers are cached in RUN/gate/cache, so that
no question is asked twice.
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

GATE_OPTIONS = ("--tasks", "--output", "--cache", "--run", "--nproc")
"""Arguments of `eval lm` that the gate sets."""


@dataclass(frozen=True)
class ForgettingGate:
    """A `train.guards.gate.EndGate` that compares the last checkpoint with the start of the stage."""

    run: Path
    """The run's folder."""
    start: Path
    """Start checkpoint."""
    tasks: tuple[str, ...]
    """Benchmark tasks; a group stands for its tasks."""
    tolerance: float
    """Largest accepted loss in a task's first metric."""
    arguments: tuple[str, ...]
    """Further arguments for `eval lm`."""
    name: str = FORGETTING_GATE
    """Name of the event, and key of the verdict in the completion manifest."""

    def check_arguments(self) -> None:
        """Raise `UserError` if `eval lm` would refuse the arguments."""
        arguments = self._build_arguments(self.start, "start")
        try:
            options = _parse_eval_options(arguments)
        except UserError as e:
            raise UserError(f"--gate-with: {e}") from None
        # compare parsed values: --gate-with may repeat the gate's options, also abbreviated (--out), and the
        # last value of an option counts
        expected = [arguments[arguments.index(option) + 1] for option in ("--tasks", "--output", "--cache")]
        settings = options.settings
        if [options.tasks, str(settings.output), str(settings.cache)] != expected or settings.run is not None:
            raise UserError("--gate-with: the gate sets --tasks, --output, --cache and --run; leave them out")

    def begin(self) -> None:
        """Evaluate the start checkpoint."""
        self._evaluate(self.start, "start", [])

    def judge(self, checkpoint: Path) -> EndVerdict | None:
        """Evaluate the last checkpoint and compare its scores with the start; None except on rank 0."""
        self._evaluate(checkpoint, "last", ["--run", str(self.run)])
        if not is_first_rank():
            return None
        first, last = (read_scored_results(self._get_output(when)) for when in ("start", "last"))
        forgetting = judge_forgetting(first, last, self.tolerance)
        # before the verdict, so that a report also shows a failed gate
        RunEvents(self.run).add(self.name, step=last.results.model.step, start=str(self.start),
                                **forgetting.to_dict())
        self._print_verdict(forgetting)
        lost = forgetting.format_lines(FORGOTTEN, NOT_KNOWN)
        failure = "\n".join([f"the forgetting gate did not pass: {len(lost)} of {len(forgetting.tasks)} "
                             "tasks; change the data (rehearse the lost tasks) or the learning rate in a new "
                             "--run, or raise --tolerance with --resume", *(f"  {line}" for line in lost)])
        return EndVerdict(None if forgetting.passed else failure, {self.name: forgetting.to_dict()})

    def _print_verdict(self, forgetting: Forgetting) -> None:
        for line in forgetting.format_lines():
            print(f"forgetting gate: {line}", flush=True)
        if forgetting.passed and (unproven := forgetting.format_lines(NOT_PROVEN)):
            warn(f"{self.run}: the forgetting gate passes, but {len(unproven)} of {len(forgetting.tasks)} "
                 "tasks have too few items to prove that the loss is within --tolerance; add items")

    def _get_output(self, when: str) -> Path:
        return self.run / GATE / f"{when}.json"

    def _build_arguments(self, target: Path, when: str) -> list[str]:
        return [str(target), "--tasks", ",".join(self.tasks), "--output", str(self._get_output(when)),
                "--cache", str(self.run / GATE / "cache"), *self.arguments]

    def _evaluate(self, target: Path, when: str, extra_arguments: list[str]) -> None:
        # equal arguments for both models: figures from different modes or prompts are not comparable
        arguments = [*self._build_arguments(target, when), *extra_arguments]
        # the launcher has started the ranks; otherwise a new command starts them
        if has_launcher():
            code = LM.run_options(_parse_eval_options(arguments))
        else:
            print(f"forgetting gate: evaluates {target}", file=sys.stderr, flush=True)
            code = run_command(["megatron_sov", "eval", "lm", *arguments], "continue with --resume")
        if code == ExitCode.STOPPED:
            raise StopRequested(f"{self.run}: the forgetting gate was stopped, and its answers are saved; "
                                "continue with --resume")
        if code != ExitCode.OK:
            raise SystemExit(code)  # the command has printed the reason


def _parse_eval_options(arguments: list[str]) -> EvalLmOptions:
    parser = Parser(prog="megatron-sov eval lm")
    add_options(parser, EvalLmOptions)
    return read_options(EvalLmOptions, parser.parse_args(arguments))
