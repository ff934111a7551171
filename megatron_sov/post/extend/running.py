"""Runs the stages of a context extension; a stage starts from the previous stage's checkpoint."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_sov.base.errors import UserError, warn
from megatron_sov.engine.parallel import collectives
from megatron_sov.eval.heldout_loss import HeldoutData, evaluate_forward_model, open_heldout
from megatron_sov.eval.needle.documents import SOURCE_NAME, NeedleDocuments, build_needle_source
from megatron_sov.eval.needle.suite import (
    Cell, NeedleResult, NeedleSuite, build_suite, format_table, run_suite)
from megatron_sov.eval.needle.text import open_haystacks
from megatron_sov.infer.decoder.generator import MegatronEngine
from megatron_sov.infer.engines.load import LoadedModel, run_forward_model
from megatron_sov.infer.engines.target import Target
from megatron_sov.model.config import GateConfig, RunConfig
from megatron_sov.model.process_memory import MemoryEstimate
from megatron_sov.post.extend.stages import PlannedStage
from megatron_sov.runs.checkpoints import find_checkpoint, find_tokenizer_folder, latest_checkpoint
from megatron_sov.runs.launch_environment import get_command_start, is_first_rank
from megatron_sov.train.data.sources import TEXTS, Source, open_sources, tokenizer_folder
from megatron_sov.train.data.views import PIECES_MARK
from megatron_sov.train.guards.fault_injection import Fault
from megatron_sov.train.guards.gate import GateView
from megatron_sov.train.objectives.heldout_evaluator import HeldoutLoss
from megatron_sov.train.objectives.objective import get_formats
from megatron_sov.train.stages.launch import run_stage
from megatron_sov.train.stages.stage import Stage
from megatron_sov.train.trainer import ObjectiveFactory


def run_stages(stages: list[PlannedStage], start: Path, objective: ObjectiveFactory, nproc: int | None,
               resume: bool, faults: tuple[Fault, ...] = (), *, dry_run: bool = False,
               memory: Sequence[MemoryEstimate] = ()) -> None:
    """Run the stages in order. If a stage is incomplete, return under a launcher and raise otherwise.

    Args:
        stages: the planned stages.
        start: checkpoint of the start; its loss on the short context, plus a tolerance, limits every stage.
        objective: factory of the objective.
        nproc: local processes.
        resume: whether folders may contain the runs already.
        faults: injected faults, once per stage.
        dry_run: check and describe the stages without training or searching data.
        memory: predicted memory per stage; (): unknown.

    Raises:
        UserError: settings, data or a folder do not allow a stage.
        GateFailed: the gate of a stage did not pass within its steps.
        StopRequested: the run was asked to stop, and everything is saved.
    """
    first, formats = start, get_formats(objective)
    stage_start_s = get_command_start()
    prepared = [build_needles(stage.config, start, formats) for stage in stages]
    start_loss: float | None = None
    estimates: Sequence[MemoryEstimate | None] = memory or [None] * len(stages)
    for planned, needles, estimate in zip(stages, prepared, estimates, strict=True):
        stage = Stage(add_needles_to_blends(planned.config), planned.folder, objective, start, resume,
                      sources=needles.data, extra_sources=needles.sources, before=needles.before,
                      after=needles.after, faults=faults, dry_run=dry_run, memory=estimate)
        if planned.config.extend.gate.every_steps and not dry_run:
            fresh = latest_checkpoint(planned.folder.checkpoints) is None
            data = planned.config.data
            short = open_heldout(data.paths, Target(first, False).trained_tokens, data.heldout_tokens,
                                 model_vocab_size=planned.config.model.vocab_size, formats=formats)
            if fresh and start_loss is None:
                # A resumed stage has the loss in the state of the gate.
                start_loss = measure_checkpoint_loss(first, short, planned.config, nproc)
            if (text := describe_small_suite(planned.config)) and is_first_rank():
                warn(f"{planned.folder.path.name}: {text}")
            gate = StageGate(planned.config.extend.gate, needles, short, start_loss, planned.min_steps)
            stage = dataclasses.replace(stage, before=None, after=gate.completion, gate=gate)
        was_complete = stage.folder.completion() is not None
        if not run_stage(stage, nproc, stage_start_s):
            return
        if not was_complete:
            stage_start_s = time.time()
        start = planned.folder.path if dry_run else find_checkpoint(planned.folder.path)


class StageGate:
    """Gate for an extension stage: needle retrieval at all lengths and depths, without degradation on short
    context.

    Answers and held-out losses are equal on all processes, and hence the verdicts.
    """

    def __init__(self, settings: GateConfig, needles: "Needles", short: HeldoutData, start_loss: float | None,
                 min_steps: int) -> None:
        """Start without checks.

        Args:
            settings: threshold, tolerance, interval.
            needles: the needle test.
            short: held-out rows of the earlier length.
            start_loss: loss on `short` before the first stage, nats per token; required on rank 0.
            min_steps: steps before the gate may end the stage.
        """
        self.passed = False
        self._settings, self._needles, self._short = settings, needles, short
        self._start_loss, self._min_steps = start_loss, min_steps
        self._checks: list[dict[str, Any]] = []
        self._result: dict[str, Any] | None = None

    def begin(self, run: GateView) -> None:
        """Test the model before the first step."""
        self._measure_stage(run)

    def check(self, run: GateView) -> None:
        """Test the model every `every_steps` steps and after the last step."""
        step = run.step
        if step % self._settings.every_steps == 0 or step == run.num_steps or step == self._min_steps:
            self._measure_stage(run)

    def _measure_stage(self, run: GateView) -> None:
        step = run.step
        result = self._needles.measure_scores(run)
        losses = evaluate_forward_model(LoadedModel(run.policy, run.config, run.world), self._short)
        # Only rank 0 knows the loss: a sum with zeros broadcasts it.
        local_loss = self._start_loss if run.world.is_main and self._start_loss is not None else 0.0
        start_loss = self._start_loss = float(collectives.all_reduce_world(
            torch.tensor([local_loss], dtype=torch.float64)))
        verdict = decide_verdict(result.cells, compute_mean_loss(losses), start_loss, self._settings)
        # A stage that passes early still trains for the planned steps.
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
            outcome = "passes" if verdict.passed else "does not pass\n  " + "\n  ".join(verdict.lines())
            if verdict.passed and not self.passed:
                outcome += f", and the stage continues to step {self._min_steps}"
            print(f"gate at step {step} {outcome}", flush=True)

    def failure(self) -> str:
        last = self._checks[-1]
        lines = "\n".join(f"  {line}" for line in last["failures"])
        return (f"the gate has not passed within its {last['step']} steps; give the stage more with "
                f"max_steps (or train.steps) and --resume, or change its data\n{lines}")

    def completion(self, run: GateView) -> dict[str, Any]:
        return {"needle": self._result,
                "gate": {"passed": self.passed, "start_loss": self._start_loss, "checks": self._checks}}

    def state(self) -> dict[str, Any]:
        return {"passed": self.passed, "start_loss": self._start_loss, "checks": self._checks,
                "result": self._result}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`; after more steps, a failed gate is checked again."""
        self.passed, self._start_loss = state["passed"], state["start_loss"]
        self._checks, self._result = list(state["checks"]), state["result"]


@dataclass(frozen=True)
class GateVerdict:
    """Result of a gate check."""

    failing_cells: list[Cell]
    """Cells with a confidence interval below `threshold`."""
    failing_rows: list[dict[str, Any]]
    """Rows (kind, language, length) with an accuracy over all depths below `threshold`."""
    loss: float
    """Held-out loss on the short context, nats per token."""
    loss_limit: float
    threshold: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Accuracy per row."""

    @property
    def passed(self) -> bool:
        return not self.failing_cells and not self.failing_rows and self.loss <= self.loss_limit

    def fields(self) -> dict[str, Any]:
        return {**asdict(self), "judged": self.passed}

    def lines(self) -> list[str]:
        """Return a line per failure."""
        lines = [f"{_describe_row(r)}: {r['correct']} of {r['samples']} right over all depths = "
                 f"{r['accuracy']:.1%}, below {self.threshold:.0%}" for r in self.failing_rows]
        lines += [f"{_describe_row(asdict(c))}, depth {c.depth:.0%}: {c.correct} of {c.samples} right, "
                  f"interval {c.interval[0]:.1%} to {c.interval[1]:.1%}, below {self.threshold:.0%}"
                  for c in self.failing_cells]
        if not self.loss <= self.loss_limit:  # NaN fails too
            lines.append(f"short context: held-out loss {self.loss:.4f} nats per token, "
                         f"above {self.loss_limit:.4f}")
        return lines


@dataclass(frozen=True)
class Needles:
    """Needle documents for training, and the needle retrieval test before and after a stage."""

    suite: NeedleSuite
    """The test: held-out text, with keys and values reserved for tests."""
    data: tuple[Source, ...]
    """The packed data, open."""
    sources: tuple[Source, ...]
    """Needle documents for training; () if `needle.train_share` is 0 and no blend names `SOURCE_NAME`."""

    def before(self, run: GateView) -> None:
        """Test the model before the first step, with the stage's rotary embedding."""
        self.record(run, "before", self.measure_scores(run))

    def after(self, run: GateView) -> dict[str, Any]:
        """Test the trained model; return fields for the completion manifest."""
        return {"needle": self.record(run, "after", self.measure_scores(run))}

    def measure_scores(self, run: GateView) -> NeedleResult:
        """Test the current model by `run_suite`; called by all processes together."""
        return run_suite(self.suite, MegatronEngine(run.policy))

    def record(self, run: GateView, when: str, result: NeedleResult) -> dict[str, Any]:
        run.events.write("needle", when=when, step=run.step, **result.to_dict())
        if run.world.is_main:
            print(f"needle retrieval {when} the extension\n{format_table(result)}", flush=True)
        return result.to_dict()


def build_needles(config: RunConfig, start: Path, formats: tuple[str, ...] = TEXTS) -> Needles:
    """Build the needle test and the needle documents for training.

    Args:
        config: resolved settings.
        start: checkpoint or Hugging Face folder with the tokenizer for data without one.
        formats: data formats of the objective; needles are hidden in text only.
    """
    needle = config.needle
    data = open_sources(config.data.paths, config.model.vocab_size, formats)
    if SOURCE_NAME in (s.name for s in data):
        raise UserError(f"--data: a source named {SOURCE_NAME!r} is reserved for documents made on the fly; "
                        "pack that text under another name (--input NAME=PATH)")
    tokenizer = tokenizer_folder(data) or find_tokenizer_folder(start)
    suite = build_suite(needle, open_haystacks(data, "heldout", tokenizer, languages=needle.languages))
    lengths = _document_lengths(config)
    if not lengths:
        return Needles(suite, tuple(data), ())
    haystacks = open_haystacks(data, "train", tokenizer, languages=needle.languages)
    sources = []
    for name, length in lengths.items():
        share = needle.train_share if name == SOURCE_NAME else 0.0
        documents = NeedleDocuments(haystacks, length, config.train.seed, needle)
        sources.append(build_needle_source(documents, share, name))
    return Needles(suite, tuple(data), tuple(sources))


def _document_lengths(config: RunConfig) -> dict[str, int]:
    """Return needle source (`needle`, in blends `needle/N`) -> document length in tokens."""
    named = dict.fromkeys(name for phase in config.data.phases for name in phase.blend)
    lengths: dict[str, int] = {}
    if config.needle.train_share or SOURCE_NAME in named:
        lengths[SOURCE_NAME] = config.data.max_seq_len()
    for name in named:
        base, mark, number = name.partition(PIECES_MARK)
        if base == SOURCE_NAME and mark:
            if not number.isdecimal() or int(number) < 1:
                raise UserError(f"data.phases blend {name!r}: write a number of tokens after {PIECES_MARK}, "
                                f"e.g. {base}{PIECES_MARK}4096")
            lengths[name] = int(number)
    return lengths


def add_needles_to_blends(config: RunConfig) -> RunConfig:
    """Add `needle.train_share` of needle documents to every explicit blend without `SOURCE_NAME`."""
    share = config.needle.train_share
    if share == 0:
        return config
    phases = []
    for phase in config.data.phases:
        if phase.blend and SOURCE_NAME not in phase.blend:
            # share / (1 - share) of the other weights becomes `share` of the sum.
            weight = sum(phase.blend.values()) * share / (1 - share)
            phase = dataclasses.replace(phase, blend={**phase.blend, SOURCE_NAME: weight})
        phases.append(phase)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, phases=tuple(phases)))


def compute_mean_loss(losses: dict[str, HeldoutLoss]) -> float:
    """Average the losses over all held-out tokens, in nats per token."""
    tokens = sum(r.tokens for r in losses.values())
    return sum(r.loss * r.tokens for r in losses.values()) / max(1, tokens)


def measure_checkpoint_loss(start: Path, short: HeldoutData, config: RunConfig, nproc: int | None
                            ) -> float | None:
    """Measure a checkpoint's loss on the short context, with the checkpoint's rotary embedding.

    Returns:
        Nats per token; None on processes of a torchrun or Slurm job other than the first.
    """
    settings = [f"parallel.{name}={value}" for name, value in config.to_dict()["parallel"].items()]
    settings.append(f"train.precision={config.train.precision}")
    loss: float | None = run_forward_model(
        Target(start, False), settings, nproc,
        lambda loaded: compute_mean_loss(evaluate_forward_model(loaded, short)))
    return loss


def _describe_row(cell: dict[str, Any]) -> str:
    return f"{cell['kind']}, {cell['language']}, {cell['length_tokens']:,} tokens"


def decide_verdict(cells: Sequence[Cell], loss: float, start_loss: float, gate: GateConfig) -> GateVerdict:
    """Decide a gate check: no cell and no row below `gate.min_accuracy`, no loss above the tolerance.

    A cell of 20 samples cannot prove 90 %: a model with 97 % accuracy misses two or more samples in 12 % of
    tests. So a cell fails if the upper end of the confidence interval is below the threshold, and a row if
    the accuracy over all samples is.

    Args:
        cells: cells of the test.
        loss: held-out loss on the short context, nats per token.
        start_loss: `loss` before the first stage.
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
    return GateVerdict(
        failing_cells=[c for c in cells if c.interval[1] < gate.min_accuracy],
        failing_rows=[r for r in described if r["accuracy"] < gate.min_accuracy],
        loss=loss, loss_limit=start_loss + gate.loss_tolerance_nats, threshold=gate.min_accuracy,
        rows=described)


def describe_small_suite(config: RunConfig) -> str | None:
    """Return a warning if `needle.lengths_tokens` are shorter than the stage, otherwise None."""
    longest, seq_len = max(config.needle.lengths_tokens), max(phase.seq_len for phase in config.data.phases)
    if longest >= seq_len:
        return None
    return (f"needle.lengths_tokens = {list(config.needle.lengths_tokens)}: "
            f"the gate asks at most {longest:,} tokens, and the stage has {seq_len:,}; "
            "leave the setting out, and it asks at the old and the new length")
