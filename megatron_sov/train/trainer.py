"""What one rank holds while it trains: model, optimizer, data order; and the actions that
the loop is made of."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # torch would import it with the first optimizer: here, forked ranks share it

from megatron_sov.base.errors import UserError
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
from megatron_sov.train.checkpointer import Checkpointer, TrainState, start_encoders
from megatron_sov.train.computation import Computation, StepSums
from megatron_sov.train.data.ledger import LedgerEntry
from megatron_sov.train.data.token_shards import Source
from megatron_sov.train.feed import Feed
from megatron_sov.train.guards.fault_injection import Fault, corrupt
from megatron_sov.train.guards.gate import Gate
from megatron_sov.train.guards.guards import Guards
from megatron_sov.train.guards.step_guard import Refusal
from megatron_sov.train.objectives.data_batches import DataBatches, ObjectiveContext
from megatron_sov.train.objectives.heldout_evaluator import HeldoutEvaluator, HeldoutLoss
from megatron_sov.train.objectives.objective import (
    GlobalBatch, Objective, columns_of, doubt_of, headline_of, is_comparable, parts_of,
    refuse_nothing_learned)
from megatron_sov.train.recorder import Recorder, StepResult, peak_memory
from megatron_sov.train.side_jobs.side_jobs import Garbage, Profiling, SideJobs
from megatron_sov.train.stopping import CurrentWork, StopFlag

ObjectiveFactory = Callable[[ObjectiveContext], Objective]


class Trainer:
    """Model, optimizer and data order of one rank; a `GateView`, too."""

    def __init__(self, config: RunConfig, world: ParallelWorld, folder: RunFolder, sources: list[Source],
                 objective: ObjectiveFactory, gate: Gate | None = None, faults: Sequence[Fault] = (),
                 began_s: float | None = None, planned: Sequence[LedgerEntry] | None = None, *,
                 initial_weights: bool = True, feed: Feed | None = None) -> None:
        """Build everything.

        Args:
            config: the run's settings.
            world: this rank's place.
            folder: the run's folder.
            sources: what is read.
            objective: makes what is learned.
            gate: what must pass for the stage to be complete.
            faults: what is to come on purpose.
            began_s: Unix time at which the work on the run began; None: now.
            planned: the ledger as `data.ledger.plan` gives it; None: it is planned here.
            initial_weights: whether weights are made of the seed, which takes minutes for a large model;
                False: a checkpoint is loaded next, which holds all of them but a new adapter's or encoder's.
            feed: brings what is not there yet when the run begins; None: everything is.
        """
        self.config, self.world, self.folder, self.sources, self.gate = config, world, folder, sources, gate
        self._feed = feed
        self.schedule, self.state = Schedule(config), TrainState()
        self.num_steps = self.schedule.num_steps
        self.model = build_run_model(config)
        load_storage_extension(self.model.config.recompute_modules)
        _begin(self.model, config, initial_weights)
        self.optimizer = Optimizer(self.model, config.optim, config.parallel, config.gpu)
        self.expert_load = ExpertLoad(self.model)
        self.model.config.finalize_model_grads_func = self.expert_load.finalize_gradients
        self.policy = ForwardModel(self.model, config.train.head_chunk_tokens)
        self.batches = DataBatches(config, sources, world, planned, columns_of(objective))
        self.recorder = Recorder(config, world, self.num_steps, began_s)
        self.objective = objective(ObjectiveContext(
            config, self.batches, world, folder.path, self._write_event, self._waiting))
        self.guards = Guards(config.guards, world, folder.path, faults, self.recorder.hang,
                             losses_compare=is_comparable(self.objective))
        parts: dict[str, Any] = {"guard": self.guards.step_guard, **parts_of(self.objective)}
        parts |= {name: part for name, part in (("gate", gate), (FEED_STATE, feed)) if part is not None}
        self.checkpointer = Checkpointer(
            config, folder, sources, self.model, self.optimizer, self.batches, parts, self._note_saved)
        self.computation = Computation(config, self.model, self.optimizer, self.expert_load, len(sources),
                                       self.guards.faults, self.guards.stragglers.clock)
        self.side_jobs: SideJobs | None = None
        """On rank 0, once the records are open."""
        self.garbage = Garbage(config.gpu.gc_every_steps)
        """Python's collections."""
        self.profiling = Profiling(config.gpu, folder.path, world.is_main)
        """Traces of steps."""
        self.work = CurrentWork()
        """For the answer to a signal that asks for a stop."""
        self._evaluator: HeldoutEvaluator | None = None
        self._continued_from: str | None = None
        self._started_from: Path | None = None
        self._besides: Sequence[Mapping[str, str]] = ()
        self._entered_s = time.monotonic()
        self._saved_step = 0
        # batches: the last that was learned, and one that was refused, where these are attributed
        self.learned: GlobalBatch | None = None
        self.refused: GlobalBatch | None = None

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def finished(self) -> bool:
        """Whether there is no more to train: the last step is done, or the gate has passed."""
        return self.step >= self.num_steps or (self.gate is not None and self.gate.passed)

    @property
    def is_new(self) -> bool:
        """Whether no step was done and the run does not continue from a checkpoint of its own."""
        return self.step == 0 and self._continued_from is None

    @property
    def has_heldout(self) -> bool:
        """Whether a source holds documents out for evaluations."""
        return any(source.num_tokens.get("heldout", 0) > 1 for source in self.sources)

    def is_saved_at(self, step: int) -> bool:
        """Return whether a checkpoint is due behind a step."""
        return (step % self.config.train.checkpoint_every_steps == 0
                or (self._feed is not None and self._feed.needs_checkpoint(step)))

    @property
    def is_saved(self) -> bool:
        """Whether a checkpoint of the last step is there, or under way; before the first none is needed."""
        return self.step == self._saved_step

    @property
    def events(self) -> EventLog:
        return self.recorder.events

    def _write_event(self, event: str, **fields: Any) -> None:
        self.events.write(event, **fields)  # which are others once the records are open

    def _waiting(self) -> AbstractContextManager[None]:
        # an objective may wait while it is made: the guards come behind it, and no step is watched yet
        return self.guards.watchdog.paused() if hasattr(self, "guards") else nullcontext()

    # starting and resuming

    def resume(self, path: Path) -> None:
        """Continue exactly where a (sound) checkpoint of this run was taken.

        Raises:
            UserError: a source is not what the run has read so far.
        """
        self.state = self.checkpointer.load(path)
        self._saved_step = self.step
        self._continued_from = path.name

    def start_from(self, path: Path) -> None:
        self.checkpointer.load_weights(path)
        start_encoders(self.model, self.config)
        self.optimizer.sync_master_weights()
        self.state.trained_tokens = checkpoints.read_trained_tokens(path)
        self._started_from = path

    def rollback_to(self, path: Path) -> int:
        """Return to the weights of a (sound) checkpoint and go on with the data where they are; returns the
        checkpoint's step."""
        # the step count goes on: the samples since then are passed over and not learned again
        then = self.checkpointer.load(path, data_too=False)
        self.state.tokens = then.tokens
        return then.step

    def open_records(self, besides: Sequence[Mapping[str, str]] = ()) -> None:
        """Open events and trackers, and find the side jobs that were left; called on rank 0 only.

        Args:
            besides: what the run learns from beside its data and its start, for its records.
        """
        self._besides = besides
        self.recorder.open(self.folder.path)
        self.side_jobs = SideJobs(self.folder.path, self.config, self.events.write)
        self.guards.faults.tell(self.events)

    def answer_stop(self, signal_name: str) -> None:
        """Print and record what is finished before the run stops, how long that takes, and what a second
        Ctrl-C loses; called on rank 0 from another thread."""
        text = f"stopping after {self.work.text()}, then saving"
        if signal_name == "SIGINT" and STORE_PORT in os.environ:  # else another launcher answers the second
            newest = checkpoints.latest_checkpoint(self.folder.checkpoints)
            kept = ("there is no checkpoint yet" if newest is None
                    else f"last checkpoint is step {checkpoints.checkpoint_step(newest)}")
            text += f"; Ctrl-C again: leave now, {kept}"
        # The cursor may stand behind a progress bar.
        print(f"\n{text}\n", end="", file=sys.stderr, flush=True)
        with suppress(UserError):  # of a full disk; the next event of the main thread raises it
            self.events.write("stopping", step=self.step, reason=signal_name, text=text)

    def announce(self) -> None:
        """Record what runs where."""
        entries = self.batches.ledger.entries
        self.recorder.judge_by(headline_of(self.objective), comparable=is_comparable(self.objective))
        self.recorder.begin(self.step, self._continued_from, self.sources, entries,
                            self._started_from if self.world.is_main else None, self._besides)

    # one step

    def bring_data(self, stop: StopFlag) -> str | None:
        """See to it that the next step's data are there; returns None, or why the run has to end until they
        are."""
        if self._feed is None:
            return None
        if self.step % self.config.rollout.steps_per_round == 0:
            self.work.begin("round", f"the responses under way, before step {self.step + 1}")
        return self._feed.bring(self, lambda: stop.reason is not None)

    def conclude(self, stop: StopFlag) -> str | None:
        """Do what the data ask for behind the last step; returns None, or why the run has to end first."""
        return None if self._feed is None else self._feed.conclude(self, lambda: stop.reason is not None)

    def update(self) -> StepResult | None:
        """Do one optimizer step; None where the ledger says to pass over its batch,
        or the guard refuses to learn it.

        Raises:
            UserError: loss or gradient is not a finite number, and `guards.skip` is off;
                nothing is saved then.
            SilentCorruption: a process does not compute the same twice.
        """
        start = time.monotonic()
        step, guard = self.state.step, self.guards.step_guard
        # random numbers are a function of (seed, step): a resumed run draws what the run that was left alone
        # draws
        seed_step(self.config.train.seed, step)
        guard.enter(step, self.batches.ledger)
        if self.batches.next_entry().skip:
            # drawn all the same, so that the steps behind it see what they would have seen
            self.batches.skip()
            self.state.step += 1
            self.recorder.passed_over(self.step, {} if self._feed is None else self._feed.meters)
            return None

        # the denominators of the whole global batch come first: losses are then plain sums over
        # ranks and micro-batches
        batch = self.objective.prepare(self.objective.collect(self.policy, step))
        refuse_nothing_learned(batch, step + 1)
        self._before_computing(batch)
        sums = self.computation.sums(batch, self.objective, step + 1)
        loss, losses = self.loss_of(sums, batch)

        # the guard is asked when loss and gradient norm are known and nothing has changed yet
        lr = self.schedule.learning_rate(step)
        grad_norm = self.optimizer.step(lr, lambda norm: guard.accepts(loss, norm))
        self.state.step += 1
        if guard.refusal is not None:
            self._refuse(guard.refusal, batch)
            return None
        if self.config.guards.attribute:
            self.learned = batch

        self.state.tokens += batch.num_tokens
        self.state.trained_tokens = max(self.state.trained_tokens, batch.seq_len)
        self.recorder.epochs(self.step, self.batches.epochs)
        self.recorder.doubted(self.step, doubt_of(self.objective, self.step, sums.meters))
        by_source = zip(self.sources, sums.by_source.tolist(), strict=True)
        return StepResult(
            loss=loss, losses=losses,
            losses_by_source={s.name: total / n for s, (total, n) in by_source if n > 0}, grad_norm=grad_norm,
            lr=lr, num_tokens=batch.num_tokens, phase=batch.phase,
            padding_share=1 - batch.num_tokens / (batch.num_sequences * batch.seq_len),
            seq_len=batch.seq_len, seconds=time.monotonic() - start,
            meters={**sums.meters, **(self._feed.meters if self._feed is not None else {})})

    def loss_of(self, sums: StepSums, batch: GlobalBatch) -> tuple[float, dict[str, float]]:
        losses = {t: total / batch.targets[t] for t, total in sums.terms.items() if batch.targets[t] > 0}
        return sum(self.objective.coefficients[t] * value for t, value in losses.items()), losses

    def _before_computing(self, batch: GlobalBatch) -> None:
        """Let faults on purpose come, and check that this process computes the same twice."""
        step, faults = self.step + 1, self.guards.faults
        faults.tell(self.events)
        faults.trigger("step", step)
        if (fault := faults.due("bitflip", "step", step)) is not None:
            replica_checks.flip_bit(get_raw_data(next(p for p in self.model.parameters() if p.dim() == 2)),
                                    fault.options.get("bit"))
        if self.guards.sdc.probe_is_due(step):
            compute = partial(self.computation.own_gradients, batch, self.objective, step)
            self.guards.sdc.repeat(step, self.model, compute, self.events)

    def _refuse(self, refusal: Refusal, batch: GlobalBatch) -> None:
        """Take note that the step that was just computed is not learned; its batch is kept where it is asked
        why."""
        step = self.step
        if not self.config.guards.skip:
            self.checkpointer.finish()
            newest = checkpoints.latest_checkpoint(self.folder.checkpoints)
            start = (f"--run --from {newest}, the last checkpoint" if newest
                     else "--run, since there is no checkpoint yet")
            raise UserError(f"step {step}: the loss is {refusal.loss:g} and the gradient norm "
                            f"{refusal.grad_norm:g}; lower optim.lr = {self.config.optim.lr:g} and start a "
                            f"new {start}, or switch on guards.skip")
        self.expert_load.restore_biases()
        self.batches.ledger.pass_over(step - 1, step)
        self.recorder.refused(step, refusal,
                              replica_checks.gather_ranks_where(not self.computation.is_finite))
        if self.config.guards.attribute:
            self.refused = batch

    def observe(self) -> torch.Tensor | None:
        """Look at the step that was just learned, where that is due; called by all processes together.

        Returns:
            [layers, experts] tokens of its experts, if the step is to be recorded.
        """
        self.guards.observe(self.step, self.expert_load, self.events)
        return self.expert_load.gather() if self.recorder.is_due(self.step) else None

    # evaluation and checkpoints

    def evaluate(self) -> dict[str, HeldoutLoss]:
        """Evaluate on held-out documents and record it, with the experts that each
        source's documents go to."""
        self.work.begin("evaluation", f"the evaluation at step {self.step}")
        if self._evaluator is None:
            self._evaluator = HeldoutEvaluator.of(self.config, self.sources,
                                                  self.batches.ledger.max_seq_len(), self.world)

        def counted(source: str, action: Callable[[], Any]) -> Any:
            result, load = self.expert_load.count_during(action)
            self.recorder.expert_load(self.step, load, source=source)
            return result

        results = self._evaluator.run(self.policy, counted)
        self.recorder.evaluated(self.step, results, self.batches.consumed_tokens(),
                                self.batches.planned_tokens(), self.batches.over_long())
        return results

    def save(self) -> None:
        """Take a checkpoint; it is written in the background, or at once where `train.async_save` is off."""
        # before anything is written: a checkpoint of corrupt weights would be the one to return to
        self.guards.sdc.compare(self.step, self.model, self.events)
        self.recorder.memory(self.step, collectives.gather_numbers(peak_memory()["peak_memory_bytes"]))
        self.checkpointer.save(replace(self.state, wall_s=self.wall_s()))
        self._saved_step = self.step
        self.guards.faults.trigger("save", self.step)
        if not self.config.train.async_save:
            self.checkpointer.finish()

    def _note_saved(self, saved: SavedCheckpoint) -> None:
        self.recorder.saved(saved)
        if self.guards.faults.due("corrupt-checkpoint", "save", saved.step):
            corrupt(saved.path)
        if self.side_jobs is not None:
            self.side_jobs.offer(saved.step, saved.path, last=self.finished and saved.step == self.step)

    def wall_s(self) -> float:
        """Return the seconds that the run has worked, over all its restarts."""
        return self.state.wall_s + time.monotonic() - self._entered_s

    def abandon(self) -> None:
        """Keep what there is when an error has ended the steps; other processes may be gone."""
        self.guards.watchdog.close()  # the step that it watches has ended
        # no collective here: a process that has gone would be waited for without end
        self.checkpointer.finish_alone()

    def close(self) -> None:
        """End the records, and what runs beside."""
        self.guards.watchdog.close()
        self.garbage.close()
        if self.side_jobs is not None:
            self.side_jobs.close()
        self.guards.faults.tell(self.events)
        self.recorder.close()
        self.batches.close()


def _begin(model: LanguageModel, config: RunConfig, initial_weights: bool) -> None:
    """Give a model its initial weights; without them those of new adapters and encoders alone."""
    load.initialize_weights(model, config.model, config.train.seed,
                    only="" if initial_weights else (PREFIX, *ENCODERS))
    if initial_weights:
        start_encoders(model, config)
