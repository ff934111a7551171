"""The trainer of one rank: model, optimizer and data order, and the actions of the training loop."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # torch would import it with the first optimizer: here, forked ranks share it

from megatron_sov.base.errors import UserError
from megatron_sov.base.figures import format_duration
from megatron_sov.checkpoint import load
from megatron_sov.checkpoint.save import SavedCheckpoint
from megatron_sov.engine.decode.forward_only import ForwardModel
from megatron_sov.engine.model import replica_checks
from megatron_sov.engine.model.expert_load import ExpertLoad
from megatron_sov.engine.model.language_model import LanguageModel, build_run_model
from megatron_sov.engine.model.quantized_weights import get_raw_data
from megatron_sov.engine.optimizer.optimizer import Optimizer
from megatron_sov.engine.parallel import collectives
from megatron_sov.engine.parallel.rng import seed_step
from megatron_sov.engine.parallel.storage_extension import load_storage_extension
from megatron_sov.engine.parallel.world import STORE_PORT, ParallelWorld
from megatron_sov.model.config import RunConfig
from megatron_sov.model.families.adapters import PREFIX
from megatron_sov.model.families.encoders import PREFIXES as ENCODERS
from megatron_sov.runs import checkpoints
from megatron_sov.runs.folder import RunFolder
from megatron_sov.runs.obs.events import EventLog
from megatron_sov.runs.rounds import FEED_STATE
from megatron_sov.schedules import Schedule
from megatron_sov.train.checkpointer import Checkpointer, Stateful, TrainState, load_encoder_weights
from megatron_sov.train.data.ledger import LedgerEntry
from megatron_sov.train.data.token_shards import Source
from megatron_sov.train.feed import Feed
from megatron_sov.train.forward_backward import ForwardBackward, StepSums
from megatron_sov.train.guards.fault_injection import Fault, corrupt_checkpoint
from megatron_sov.train.guards.gate import Gate
from megatron_sov.train.guards.guards import Guards
from megatron_sov.train.guards.step_guard import StepRejection
from megatron_sov.train.objectives.data_batches import DataBatches, ObjectiveContext
from megatron_sov.train.objectives.heldout_evaluator import HeldoutEvaluator, HeldoutLoss
from megatron_sov.train.objectives.objective import (
    GlobalBatch, Objective, check_has_targets, get_checkpoint_parts, get_columns, get_doubt, get_headline,
    has_comparable_loss)
from megatron_sov.train.recorder import Recorder, StepResult, read_peak_memory
from megatron_sov.train.side_jobs.side_jobs import GarbageCollector, SideJobs, StepProfiler
from megatron_sov.work.processes.stop_signals import StopFlag

ObjectiveFactory = Callable[[ObjectiveContext], Objective]
MAX_TIMINGS = 20
"""Latest timings of a kind of work that predict the next one."""


class Trainer:
    """Model, optimizer and data order of one rank; also the `GateView` and `FeedView` of the run."""

    def __init__(self, config: RunConfig, world: ParallelWorld, folder: RunFolder, sources: list[Source],
                 objective: ObjectiveFactory, gate: Gate | None = None, faults: Sequence[Fault] = (),
                 began_s: float | None = None, planned: Sequence[LedgerEntry] | None = None, *,
                 initial_weights: bool = True, feed: Feed | None = None) -> None:
        """Build model, optimizer, data order and all observers of the run.

        Args:
            config: settings of the run.
            world: rank and groups of this process.
            folder: folder of the run.
            sources: training data.
            objective: builds the objective from its context.
            gate: must pass for the stage to be complete; None: no gate.
            faults: faults to inject.
            began_s: Unix time at which work on the run began; None: now.
            planned: entries of `plan_ledger`; None: they are computed here.
            initial_weights: True: draw weights from the seed, which takes minutes for a large model. False:
                draw those of new adapters and encoders only, because a checkpoint is loaded next.
            feed: supplies data that appear during the run; None: all data exist.
        """
        self.config, self.world, self.folder, self.sources, self.gate = config, world, folder, sources, gate
        self._feed = feed
        self.schedule, self.state = Schedule(config), TrainState()
        self.num_steps = self.schedule.num_steps
        self.model = build_run_model(config)
        load_storage_extension(self.model.config.recompute_modules)
        _initialize_weights(self.model, config, initial_weights)
        self.optimizer = Optimizer(self.model, config.optim, config.parallel, config.gpu)
        self.expert_load = ExpertLoad(self.model)
        self.model.config.finalize_model_grads_func = self.expert_load.finalize_gradients
        self.policy = ForwardModel(self.model, config.train.head_chunk_tokens)
        self.batches = DataBatches(config, sources, world, planned, get_columns(objective))
        self.recorder = Recorder(config, world, self.num_steps, began_s)
        self.guards = Guards(config.guards, world, folder.path, faults, self.recorder.record_hang)
        self.objective = objective(ObjectiveContext(
            config, self.batches, world, folder.path, self._write_event, self.guards.watchdog.paused))
        self.guards.step_guard.compares_losses = has_comparable_loss(self.objective)
        self.checkpointer = Checkpointer(config, folder, sources, self.model, self.optimizer, self.batches,
                                         self._list_stateful_parts(), self._handle_saved)
        self.forward_backward = ForwardBackward(config, self.model, self.optimizer, self.expert_load,
                                                len(sources), self.guards.faults,
                                                self.guards.stragglers.clock)
        self.side_jobs: SideJobs | None = None
        """Exports and evaluations; set on rank 0 by `open_records`."""
        self.garbage = GarbageCollector(config.gpu.gc_every_steps)
        self.profiling = StepProfiler(config.gpu, folder.path, world.is_main)
        self.work = CurrentWork()
        self.learned_batch: GlobalBatch | None = None
        """The last learned batch; stored if `guards.attribute` is on."""
        self.rejected_batch: GlobalBatch | None = None
        """The batch of the last step if it was rejected and `guards.attribute` is on."""
        self._evaluator: HeldoutEvaluator | None = None
        self._continued_from: str | None = None
        self._started_from: Path | None = None
        self._extra_inputs: Sequence[Mapping[str, str]] = ()
        self._entered_s = time.monotonic()
        self._saved_step = 0

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def finished(self) -> bool:
        """Whether training is complete: the last step is done, or the gate has passed."""
        return self.step >= self.num_steps or (self.gate is not None and self.gate.passed)

    @property
    def is_new(self) -> bool:
        """Whether no step is done and the run was not resumed from a checkpoint of its own."""
        return self.step == 0 and self._continued_from is None

    @property
    def has_heldout(self) -> bool:
        """Whether a source has held-out documents."""
        return any(source.num_tokens.get("heldout", 0) > 1 for source in self.sources)

    def is_checkpoint_due(self, step: int) -> bool:
        if step % self.config.train.checkpoint_every_steps == 0:
            return True
        return self._feed is not None and self._feed.needs_checkpoint(step)

    @property
    def is_saved(self) -> bool:
        """Whether a checkpoint of the last step exists or is being written; step 0 needs none."""
        return self.step == self._saved_step

    @property
    def events(self) -> EventLog:
        return self.recorder.events

    def _write_event(self, event: str, **fields: Any) -> None:
        self.events.write(event, **fields)  # looked up now: `open_records` replaces the log

    def _list_stateful_parts(self) -> dict[str, Stateful]:
        """Return name in the checkpoint -> further part of the run with a state."""
        parts: dict[str, Stateful] = {"guard": self.guards.step_guard,
                                      **get_checkpoint_parts(self.objective)}
        if self.gate is not None:
            parts["gate"] = self.gate
        if self._feed is not None:
            parts[FEED_STATE] = self._feed
        return parts

    # starting and resuming

    def resume(self, path: Path) -> None:
        """Restore the state of a sound checkpoint of this run.

        Raises:
            UserError: the data of a source changed since the checkpoint.
        """
        self.state = self.checkpointer.load(path)
        self._saved_step = self.step
        self._continued_from = path.name

    def load_start_weights(self, path: Path) -> None:
        """Load the weights of another run's checkpoint, and those of encoders that `media` names."""
        self.checkpointer.load_weights(path)
        load_encoder_weights(self.model, self.config)
        self.optimizer.sync_master_weights()
        self.state.trained_tokens = checkpoints.read_trained_tokens(path)
        self._started_from = path

    def restore_weights(self, path: Path) -> int:
        """Restore weights and optimizer of a sound checkpoint, but not the data order; returns its step."""
        # the step count goes on: the samples since the checkpoint are skipped, not learned again
        previous = self.checkpointer.load(path, load_data_order=False)
        self.state.tokens = previous.tokens
        return previous.step

    def open_records(self, extra_inputs: Sequence[Mapping[str, str]] = ()) -> None:
        """Open events, trackers and side jobs; called on rank 0 only.

        Args:
            extra_inputs: inputs next to data and start weights, for the records.
        """
        self._extra_inputs = extra_inputs
        self.recorder.open(self.folder.path)
        self.side_jobs = SideJobs(self.folder.path, self.config, self.events.write)
        self.guards.faults.record_events(self.events)

    def answer_stop(self, signal_name: str) -> None:
        """Print and record which work ends before the run stops, its time, and the loss of a second Ctrl-C.

        Called on rank 0 from another thread.
        """
        text = f"stopping after {self.work.text()}, then saving"
        if signal_name == "SIGINT" and STORE_PORT in os.environ:  # else another launcher handles the second
            newest = checkpoints.latest_checkpoint(self.folder.checkpoints)
            available = "there is no checkpoint yet"
            if newest is not None:
                available = f"last checkpoint is step {checkpoints.checkpoint_step(newest)}"
            text += f"; Ctrl-C again: leave now, {available}"
        # the cursor may be at the end of a progress bar
        print(f"\n{text}\n", end="", file=sys.stderr, flush=True)
        with suppress(UserError):  # of a full disk; the next event of the main thread raises it
            self.events.write("stopping", step=self.step, reason=signal_name, text=text)

    def announce(self) -> None:
        """Print and record settings, data and machine of the run."""
        entries = self.batches.ledger.entries
        self.recorder.show_meters(get_headline(self.objective),
                                  comparable=has_comparable_loss(self.objective))
        self.recorder.record_start(self.step, self._continued_from, self.sources, entries,
                                   self._started_from if self.world.is_main else None, self._extra_inputs)

    # one step

    def fetch_data(self, stop: StopFlag) -> str | None:
        """Wait for the next step's data; returns None, or the reason to end the run before they exist."""
        if self._feed is None:
            return None
        if self.step % self.config.rollout.steps_per_round == 0:
            self.work.begin("round", f"the responses under way, before step {self.step + 1}")
        return self._feed.bring(self, lambda: stop.reason is not None)

    def conclude_data(self, stop: StopFlag) -> str | None:
        """Finish the feed's work after the last step; returns None, or the reason to end the run first."""
        return None if self._feed is None else self._feed.conclude(self, lambda: stop.reason is not None)

    def train_step(self) -> StepResult | None:
        """Run one optimizer step; None if the ledger skips its batch or the step guard rejects it.

        Raises:
            UserError: loss or gradient norm is not finite and `guards.skip` is off; nothing is saved.
            SilentCorruption: a rank computed different gradients from the same input.
        """
        start_s = time.monotonic()
        step, guard = self.state.step, self.guards.step_guard
        # random numbers depend on (seed, step) only: a resumed run draws those of an uninterrupted one
        seed_step(self.config.train.seed, step)
        guard.enter(step, self.batches.ledger)
        if self.batches.next_entry().skip:
            # the batch is drawn all the same, so that later steps see the same samples
            self.batches.skip()
            self.state.step += 1
            self.recorder.record_skipped_step(self.step, self._get_feed_meters())
            return None

        # denominators of the whole global batch come first: losses are then plain sums over ranks and
        # micro-batches
        batch = self.objective.prepare(self.objective.collect(self.policy, step))
        check_has_targets(batch, step + 1)
        self._inject_and_probe(batch)
        sums = self.forward_backward.run(batch, self.objective, step + 1)
        loss, losses = self.normalize_losses(sums, batch)

        # the guard decides once loss and gradient norm are known and before any weight changes
        lr = self.schedule.learning_rate(step)
        grad_norm = self.optimizer.step(lr, lambda norm: guard.accept_step(loss, norm))
        self.state.step += 1
        if guard.rejection is not None:
            self._reject_step(guard.rejection, batch)
            return None
        if self.config.guards.attribute:
            self.learned_batch = batch

        self.state.tokens += batch.num_tokens
        self.state.trained_tokens = max(self.state.trained_tokens, batch.seq_len)
        self.recorder.warn_of_epochs(self.step, self.batches.epochs)
        self.recorder.warn_of_doubt(self.step, get_doubt(self.objective, self.step, sums.meters))
        by_source = zip(self.sources, sums.by_source.tolist(), strict=True)
        return StepResult(
            loss=loss, losses=losses,
            losses_by_source={s.name: total / count for s, (total, count) in by_source if count > 0},
            grad_norm=grad_norm, lr=lr, num_tokens=batch.num_tokens, phase=batch.phase,
            padding_share=1 - batch.num_tokens / (batch.num_sequences * batch.seq_len),
            seq_len=batch.seq_len, seconds=time.monotonic() - start_s,
            meters={**sums.meters, **self._get_feed_meters()})

    def normalize_losses(self, sums: StepSums, batch: GlobalBatch) -> tuple[float, dict[str, float]]:
        """Return the total loss, and each term's sum divided by its targets."""
        losses = {term: total / batch.targets[term]
                  for term, total in sums.terms.items() if batch.targets[term] > 0}
        return sum(self.objective.coefficients[term] * value for term, value in losses.items()), losses

    def _get_feed_meters(self) -> Mapping[str, float]:
        return {} if self._feed is None else self._feed.meters

    def _inject_and_probe(self, batch: GlobalBatch) -> None:
        """Trigger injected faults of this step, and compute a micro-batch twice if a probe is due."""
        step, faults = self.step + 1, self.guards.faults
        faults.record_events(self.events)
        faults.trigger("step", step)
        fault = faults.take_due("bitflip", "step", step)
        if fault is not None:
            first_matrix = next(p for p in self.model.parameters() if p.dim() == 2)
            replica_checks.flip_bit(get_raw_data(first_matrix), fault.options.get("bit"))
        if self.guards.sdc.is_probe_due(step):
            compute = partial(self.forward_backward.compute_local_gradients, batch, self.objective, step)
            self.guards.sdc.repeat(step, self.model, compute, self.events)

    def _reject_step(self, rejection: StepRejection, batch: GlobalBatch) -> None:
        """Record that the current step is not learned, and store its batch for `attribute_rejected_step`."""
        step = self.step
        if not self.config.guards.skip:
            self.checkpointer.finish()
            newest = checkpoints.latest_checkpoint(self.folder.checkpoints)
            start = "--run, since there is no checkpoint yet"
            if newest is not None:
                start = f"--run --from {newest}, the last checkpoint"
            raise UserError(f"step {step}: the loss is {rejection.loss:g} and the gradient norm "
                            f"{rejection.grad_norm:g}; lower optim.lr = {self.config.optim.lr:g} and start a "
                            f"new {start}, or switch on guards.skip")
        self.expert_load.restore_biases()
        self.batches.ledger.skip_steps(step - 1, step)
        ranks = replica_checks.gather_ranks_where(not self.forward_backward.is_finite)
        self.recorder.record_rejected_step(step, rejection, ranks)
        if self.config.guards.attribute:
            self.rejected_batch = batch

    def observe_step(self) -> torch.Tensor | None:
        """Run the guards that are due after a learned step; all ranks call this together.

        Returns:
            [layers, experts] tokens of each expert if the step is to be recorded, else None.
        """
        self.guards.observe(self.step, self.expert_load, self.events)
        return self.expert_load.gather() if self.recorder.is_due(self.step) else None

    # evaluation and checkpoints

    def evaluate(self) -> dict[str, HeldoutLoss]:
        """Evaluate held-out documents and record their losses, and the expert load of each source."""
        self.work.begin("evaluation", f"the evaluation at step {self.step}")
        if self._evaluator is None:
            self._evaluator = HeldoutEvaluator.of(self.config, self.sources,
                                                  self.batches.ledger.max_seq_len(), self.world)

        def record_load(source: str, action: Callable[[], Any]) -> Any:
            result, load = self.expert_load.count_during(action)
            self.recorder.record_expert_load(self.step, load, source=source)
            return result

        results = self._evaluator.run(self.policy, record_load)
        self.recorder.record_evaluation(self.step, results, self.batches.consumed_tokens(),
                                        self.batches.planned_tokens(), self.batches.over_long())
        return results

    def save(self) -> None:
        """Take a checkpoint, written in the background unless `train.async_save` is off."""
        # before the write: a rollback to a checkpoint of corrupt weights would keep them
        self.guards.sdc.compare(self.step, self.model, self.events)
        peaks_bytes = collectives.gather_numbers(read_peak_memory()["peak_memory_bytes"])
        self.recorder.record_memory(self.step, peaks_bytes)
        self.checkpointer.save(replace(self.state, wall_s=self.wall_s()))
        self._saved_step = self.step
        self.guards.faults.trigger("save", self.step)
        if not self.config.train.async_save:
            self.checkpointer.finish()

    def _handle_saved(self, saved: SavedCheckpoint) -> None:
        self.recorder.record_checkpoint(saved)
        if self.guards.faults.take_due("corrupt-checkpoint", "save", saved.step):
            corrupt_checkpoint(saved.path)
        if self.side_jobs is not None:
            self.side_jobs.offer(saved.step, saved.path, last=self.finished and saved.step == self.step)

    def wall_s(self) -> float:
        """Return the seconds that the run has worked, over all its restarts."""
        return self.state.wall_s + time.monotonic() - self._entered_s

    def abandon(self) -> None:
        """Complete the outstanding checkpoint after an error ended the steps; other ranks may be gone."""
        self.guards.watchdog.close()
        # no collective here: it would wait for a dead rank forever
        self.checkpointer.finish_alone()

    def close(self) -> None:
        """Close guards, side jobs, records and data."""
        self.guards.watchdog.close()
        self.garbage.close()
        if self.side_jobs is not None:
            self.side_jobs.close()
        self.guards.faults.record_events(self.events)
        self.recorder.close()
        self.batches.close()


class CurrentWork:
    """The work that has to end before the run can stop, and the time that such work took before."""

    def __init__(self) -> None:
        self._name, self._kind, self._began_s = "the start of the run", "start", time.monotonic()
        self._seconds: dict[str, deque[float]] = {}

    def begin(self, kind: str, name: str) -> None:
        """Begin a piece of work and end the previous one, unless it has the same name.

        Args:
            kind: "step" or "evaluation"; work of one kind takes about the same time.
            name: of this piece, such as "step 7".
        """
        if name == self._name:
            return
        now_s = time.monotonic()
        self._seconds.setdefault(self._kind, deque(maxlen=MAX_TIMINGS)).append(now_s - self._began_s)
        self._name, self._kind, self._began_s = name, kind, now_s

    def text(self) -> str:
        """Return the current work and its remaining time: "step 7 (about 4 min 10 s)"."""
        times_s = sorted(self._seconds.get(self._kind, ()))
        if not times_s:
            return f"{self._name} (the first {self._kind}: its time is not known yet)"
        # the upper quartile, so that most pieces end earlier than predicted
        left_s = times_s[3 * len(times_s) // 4] - (time.monotonic() - self._began_s)
        return f"{self._name} (about {format_duration(max(1.0, left_s))})"


def _initialize_weights(model: LanguageModel, config: RunConfig, initial_weights: bool) -> None:
    """Draw initial weights of the model, or of new adapters and encoders only."""
    drawn = "" if initial_weights else (PREFIX, *ENCODERS)
    load.initialize_weights(model, config.model, config.train.seed, only=drawn)
    if initial_weights:
        load_encoder_weights(model, config)
