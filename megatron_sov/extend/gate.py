"""The gate of an extension stage: needle retrieval at all lengths and depths,
with the short context as good as it was.

Every process comes to the same verdict: needle answers and held-out losses are the same on all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_sov.config import GateConfig, RunConfig
from megatron_sov.eval.heldout import HeldoutData, evaluate_forward_model, open_heldout
from megatron_sov.eval.needle.suite import Cell
from megatron_sov.extend.decontamination import Decontamination
from megatron_sov.extend.needles import Needles
from megatron_sov.generate.load import Loaded, run_forward_model
from megatron_sov.generate.target import Target
from megatron_sov.mcore.parallel import collectives
from megatron_sov.train.evaluate import HeldoutLoss
from megatron_sov.train.gate import GateView


def short_context(config: RunConfig, trained_tokens: int, formats: tuple[str, ...]) -> HeldoutData:
    """Return the held-out documents by which the short context is judged: rows as long as what was
    trained on before, of data of these formats."""
    return open_heldout(config.data.paths, trained_tokens, config.data.heldout_tokens,
                        model_vocab_size=config.model.vocab_size, formats=formats)


def mean_loss(losses: dict[str, HeldoutLoss]) -> float:
    """Return the mean over all held-out tokens, in nats."""
    tokens = sum(r.tokens for r in losses.values())
    return sum(r.loss * r.tokens for r in losses.values()) / max(1, tokens)


def loss_of_checkpoint(start: Path, short: HeldoutData, config: RunConfig, nproc: int | None) -> float | None:
    """Return a checkpoint's loss on the short context as it is: its own rotations, not those of the stage.

    Returns:
        Nats per token; None on other processes than the first of a torchrun or Slurm job.
    """
    layout = [f"parallel.{name}={value}" for name, value in config.to_dict()["parallel"].items()]
    found: float | None = run_forward_model(Target(start, False),
                                            [*layout, f"train.precision={config.train.precision}"], nproc,
                                            lambda loaded: mean_loss(evaluate_forward_model(loaded, short)))
    return found


class StageGate:
    """A `train.gate.Gate` that judges needles and the short context."""

    def __init__(self, settings: GateConfig, needles: Needles, short: HeldoutData, start_loss: float | None,
                 min_steps: int, clean: Decontamination) -> None:
        """Make a gate that has seen nothing.

        Args:
            settings: threshold, tolerance, rhythm.
            needles: the test.
            short: held-out text cut as short as before.
            start_loss: loss on it before the first stage, nats per token; the first process must know it.
            min_steps: steps before the gate may end the stage.
            clean: what the search of the training text found.
        """
        self.passed = False
        self._settings, self._needles, self._short, self._clean = settings, needles, short, clean
        self._start_loss, self._min_steps = start_loss, min_steps
        self._checks: list[dict[str, Any]] = []
        self._result: dict[str, Any] | None = None

    def begin(self, run: GateView) -> None:
        """Record what was searched, and judge the model as it is before the first step."""
        run.events.write("decontamination", step=run.step, **self._clean.fields())
        self._measure(run)

    def check(self, run: GateView) -> None:
        """Judge the model every `every_steps` steps and after the last one."""
        step = run.step
        if step % self._settings.every_steps == 0 or step == run.num_steps or step == self._min_steps:
            self._measure(run)

    def _measure(self, run: GateView) -> None:
        step = run.step
        result = self._needles.measure(run)
        losses = evaluate_forward_model(Loaded(run.policy, run.config, run.world), self._short)
        known = self._start_loss if run.world.is_main and self._start_loss is not None else 0.0
        start_loss = self._start_loss = float(collectives.all_reduce_world(
            torch.tensor([known], dtype=torch.float64)))
        verdict = decide(result.cells, mean_loss(losses), start_loss, self._settings)
        self.passed = verdict.passed and step >= self._min_steps
        self._checks.append({"step": step, "passed": self.passed, "failures": verdict.lines()})
        run.events.write("gate", step=step, passed=self.passed, start_loss=start_loss,
                             losses={name: r.loss for name, r in losses.items()}, seq_len=self._short.seq_len,
                             min_steps=self._min_steps, **verdict.fields())
        if step == 0:
            self._needles.record(run, "before", result)
        elif run.finished:
            self._result = self._needles.record(run, "after", result)
        if run.world.is_main:
            said = "passes" if verdict.passed else "does not pass\n  " + "\n  ".join(verdict.lines())
            early = (f", and the stage goes on to step {self._min_steps}"
                     if verdict.passed and not self.passed else "")
            print(f"gate at step {step} {said}{early}", flush=True)

    def failure(self) -> str:
        last = self._checks[-1]
        lines = "\n".join(f"  {line}" for line in last["failures"])
        return (f"the gate has not passed within its {last['step']} steps; give the stage more with "
                f"max_steps (or train.steps) and --resume, or change its data\n{lines}")

    def completion(self, run: GateView) -> dict[str, Any]:
        return {"needle": self._result,
                "gate": {"passed": self.passed, "start_loss": self._start_loss, "checks": self._checks,
                         "decontamination": self._clean.fields()}}

    def state(self) -> dict[str, Any]:
        return {"passed": self.passed, "start_loss": self._start_loss, "checks": self._checks,
                "result": self._result}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave; a stage that was given up is judged anew with more steps."""
        self.passed, self._start_loss, self._checks = (state["passed"], state["start_loss"],
                                                       list(state["checks"]))
        self._result = state["result"]


@dataclass(frozen=True)
class Verdict:
    """What one check of the gate found."""

    failing_cells: list[Cell]
    """Cells whose whole confidence interval lies below the threshold."""
    failing_rows: list[dict[str, Any]]
    """Rows (kind, language, length) whose accuracy over all depths lies below it."""
    loss: float
    """Held-out loss on the short context, nats per token."""
    loss_limit: float
    """What it may be."""
    threshold: float
    """Accuracy asked for."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Accuracy of every row."""

    @property
    def passed(self) -> bool:
        return not self.failing_cells and not self.failing_rows and self.loss <= self.loss_limit

    def fields(self) -> dict[str, Any]:
        """Return plain values for the event and the report."""
        return {**asdict(self), "judged": self.passed}

    def lines(self) -> list[str]:
        """Return what failed, a line each."""
        said = [f"{_place(r)}: {r['correct']} of {r['samples']} right over all depths = {r['accuracy']:.1%}, "
                f"below {self.threshold:.0%}" for r in self.failing_rows]
        said += [f"{_place(asdict(c))}, depth {c.depth:.0%}: {c.correct} of {c.samples} right, "
                 f"interval {c.interval[0]:.1%} to {c.interval[1]:.1%}, below {self.threshold:.0%}"
                 for c in self.failing_cells]
        if not self.loss <= self.loss_limit:  # a loss that is no number is no pass
            said.append(f"short context: held-out loss {self.loss:.4f} nats per token, "
                        f"above {self.loss_limit:.4f}")
        return said


def _place(cell: dict[str, Any]) -> str:
    return f"{cell['kind']}, {cell['language']}, {cell['length_tokens']:,} tokens"


def decide(cells: Sequence[Cell], loss: float, start_loss: float, gate: GateConfig) -> Verdict:
    """Return the verdict.

    A cell of 20 samples cannot prove 90 %: one that is right 97 % of the time misses two or more in 12 % of
    all tests.  So a single cell fails where its whole interval lies below the threshold, and the samples of a
    row together must reach it.

    Args:
        cells: the test's cells.
        loss: held-out loss on the short context, nats per token.
        start_loss: the same before the first stage.
        gate: threshold and tolerance.
    """
    rows: dict[tuple[str, str, int], list[int]] = {}
    for cell in cells:
        row = rows.setdefault((cell.kind, cell.language, cell.length_tokens), [0, 0])
        row[0] += cell.correct
        row[1] += cell.samples
    described: list[dict[str, Any]] = [
        {"kind": kind, "language": language, "length_tokens": length, "correct": correct, "samples": samples,
         "accuracy": correct / samples} for (kind, language, length), (correct, samples) in rows.items()]
    return Verdict(
        failing_cells=[c for c in cells if c.interval[1] < gate.min_accuracy],
        failing_rows=[r for r in described if r["accuracy"] < gate.min_accuracy],
        loss=loss, loss_limit=start_loss + gate.loss_tolerance_nats, threshold=gate.min_accuracy,
        rows=described)
