"""The trainer of one rank: model, optimizer and data order, with evaluation, checkpoints and records."""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # torch would import it with the first optimizer: here, forked ranks share it

from megatron_sov.base.errors import UserError
from megatron_sov.base.figures import format_duration
from megatron_sov.checkpoint import initial_weights
from megatron_sov.checkpoint.save import SavedCheckpoint
from megatron_sov.convert.encoder_weights import load_encoder_weights
from megatron_sov.engine.decode.forward_only import ForwardModel
from megatron_sov.engine.model import replica_checks
from megatron_sov.engine.model.expert_load import ExpertLoad
from megatron_sov.engine.model.language_model import LanguageModel, build_run_model
from megatron_sov.engine.model.quantized_weights import get_raw_data
from megatron_sov.engine.optimizer.optimizer import Optimizer
from megatron_sov.engine.parallel import collectives
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
from megatron_sov.train.checkpointer import Checkpointer, Stateful, TrainState
from megatron_sov.train.data.ledger import LedgerEntry
from megatron_sov.train.data.sources import Source
from megatron_sov.train.feed import Feed
from megatron_sov.train.forward_backward import ForwardBackward
from megatron_sov.train.guards.fault_injection import Fault, corrupt_checkpoint
from megatron_sov.train.guards.gate import Gate
from megatron_sov.train.guards.guards import Guards
from megatron_sov.train.objectives.data_batches import DataBatches, ObjectiveContext
from megatron_sov.train.objectives.heldout_evaluator import HeldoutEvaluator, HeldoutLoss
from megatron_sov.train.objectives.objective import (
    GlobalBatch, Objective, get_checkpoint_parts, get_columns, get_headline, has_comparable_loss)
from megatron_sov.train.recorder import Recorder, read_peak_memory
from megatron_sov.train.side_jobs.side_jobs import GarbageCollector, SideJobs, StepProfiler
from megatron_sov.work.processes.stop_signals import StopFlag

ObjectiveFactory = Callable[[ObjectiveContext], Objective]
MAX_TIMINGS = 20
"""Latest durations from which `CurrentWork` predicts the next."""


@dataclass(frozen=True)
class TrainerOptions:
    """Optional `Trainer` inputs."""

    gate: Gate | None = None
    """Must pass before the stage is complete."""
    faults: Sequence[Fault] = ()
    """Faults to inject (`--inject`)."""
    began_s: float | None = None
    """Unix time at which work on the run began; default: now."""
    planned: Sequence[LedgerEntry] | None = None
    """Entries from `plan_ledger`; by default, the trainer calls it."""
    feed: Feed | None = None
    """Supplies data that appear during the run, such as rollouts."""
    initial_weights: bool = True
    """Whether to draw initial weights from `train.seed`, which takes minutes for a large model. If False, a
    checkpoint will be loaded, and only new adapters and encoders get initial weights."""


class Trainer:
    """Model, optimizer, data order and observers on one rank; implements `GateView` and `FeedView`."""

    def __init__(self, config: RunConfig, world: ParallelWorld, folder: RunFolder, sources: list[Source],
                 objective: ObjectiveFactory, options: TrainerOptions = TrainerOptions()) -> None:
        """Build the model on this rank's device, with optimizer, data order and observers."""
        self.config, self.world, self.folder, self.sources = config, world, folder, sources
        self.gate, self._feed = options.gate, options.feed
        self.schedule, self.state = Schedule(config), TrainState()
        self.num_steps = self.schedule.num_steps
        self.model = build_run_model(config)
        load_storage_extension(self.model.config.recompute_modules)
        _initialize_weights(self.model, config, options.initial_weights)
        self.optimizer = Optimizer(self.model, config.optim, config.parallel, config.gpu)
        self.expert_load = ExpertLoad(self.model)
        self.model.config.finalize_model_grads_func = self.expert_load.finalize_gradients
        self.policy = ForwardModel(self.model, config.train.head_chunk_tokens)
        self.batches = DataBatches(config, sources, world, options.planned, get_columns(objective))
        self.recorder = Recorder(config, world, self.num_steps, options.began_s)
        self.guards = Guards(config, world, folder.path, options.faults, self.recorder.record_hang)
        self.objective = objective(ObjectiveContext(
            config, self.batches, world, folder.path, self._write_event, self.guards.watchdog.pause))
        self.guards.step_guard.compares_losses = has_comparable_loss(self.objective)
        self.checkpointer = Checkpointer(config, folder, sources, self.model, self.optimizer, self.batches,
                                         self._list_stateful_parts(), self._handle_saved)
        self.forward_backward = ForwardBackward(config, self.model, optimizer=self.optimizer,
                                                expert_load=self.expert_load, num_sources=len(sources),
                                                faults=self.guards.faults, clock=self.guards.stragglers.clock)
        self.side_jobs: SideJobs | None = None
        """Exports and evaluations; created by `open_records`, on rank 0 only."""
        self.garbage = GarbageCollector(config.gpu.gc_every_steps)
        self.profiling = StepProfiler(config.gpu, folder.path, world.is_main)
        self.work = CurrentWork()
        self._evaluator: HeldoutEvaluator | None = None
        self._resumed_from: str | None = None
        self._started_from: Path | None = None
        self._extra_inputs: Sequence[Mapping[str, str]] = ()
        self._entered_s = time.monotonic()
        self._saved_step = 0

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def finished(self) -> bool:
        """Whether the last step is done or the gate has passed."""
        return self.step >= self.num_steps or (self.gate is not None and self.gate.passed)

    @property
    def has_heldout(self) -> bool:
        """Whether a source has held-out documents."""
        return any(source.num_tokens.get("heldout", 0) > 1 for source in self.sources)

    def is_evaluation_due(self) -> bool:
        every_steps = self.config.train.eval_every_steps
        return every_steps > 0 and self.step % every_steps == 0

    def is_checkpoint_due(self, step: int) -> bool:
        if step % self.config.train.checkpoint_every_steps == 0:
            return True
        return self._feed is not None and self._feed.needs_checkpoint(step)

    @property
    def is_saved(self) -> bool:
        """Whether a checkpoint of the last step exists or is being written; step 0 needs no checkpoint."""
        return self.step == self._saved_step

    @property
    def events(self) -> EventLog:
        return self.recorder.events

    @property
    def feed_meters(self) -> Mapping[str, float]:
        """Meter -> value for the next step's data."""
        return {} if self._feed is None else self._feed.meters

    def _write_event(self, event: str, **fields: Any) -> None:
        self.events.write(event, **fields)  # looked up at each call: `open_records` replaces the log

    def _list_stateful_parts(self) -> dict[str, Stateful]:
        """Return name in the checkpoint -> part whose state it stores."""
        parts: dict[str, Stateful] = {"guard": self.guards.step_guard, **get_checkpoint_parts(self.objective)}
        if self.gate is not None:
            parts["gate"] = self.gate
        if self._feed is not None:
            parts[FEED_STATE] = self._feed
        return parts

    # starting and resuming

    def resume(self, path: Path) -> None:
        """Restore model, optimizer, data order and counters from this run's sound checkpoint `path`.

        Raises `UserError` if the data of a source changed after the checkpoint was written.
        """
        self.state = self.checkpointer.load(path)
        self._saved_step = self.step
        self._resumed_from = path.name

    def load_start_weights(self, path: Path) -> None:
        """Load weights from another run's checkpoint `path`, and encoder weights from `media.*_from`."""
        self.checkpointer.load_weights(path)
        load_encoder_weights(self.model, self.config)
        self.optimizer.sync_master_weights()
        self.state.trained_tokens = checkpoints.read_trained_tokens(path)
        self._started_from = path

    def restore_weights(self, path: Path) -> int:
        """Load model and optimizer from a sound checkpoint without moving the data order; return its step."""
        # the step count continues: samples after the checkpoint are skipped instead of learned twice
        previous = self.checkpointer.load(path, load_data_order=False)
        self.state.tokens = previous.tokens
        return previous.step

    def open_records(self, extra_inputs: Sequence[Mapping[str, str]] = ()) -> None:
        """Open events.jsonl, trackers and side jobs on rank 0.

        `extra_inputs` are recorded in addition to data and start weights (`describe_input`).
        """
        self._extra_inputs = extra_inputs
        self.recorder.open(self.folder.path)
        self.side_jobs = SideJobs(self.folder.path, self.config, self.events.write)
        self.guards.faults.record_events(self.events)

    def record_start(self) -> None:
        """Record settings, data and machine in `events.jsonl`."""
        self.recorder.show_meters(get_headline(self.objective),
                                  comparable=has_comparable_loss(self.objective))
        self.recorder.record_start(self.step, self._resumed_from, self.sources, self.batches.ledger.entries,
                                   self._started_from if self.world.is_main else None, self._extra_inputs)

    def answer_stop(self, signal_name: str) -> None:
        """Print and record how long the current work will delay the stop; runs in a thread of rank 0.

        The text also says how many steps a second Ctrl-C would lose.
        """
        text = f"stopping after {self.work.describe()}, then saving"
        if signal_name == "SIGINT" and STORE_PORT in os.environ:  # else another launcher handles the second
            newest = checkpoints.latest_checkpoint(self.folder.checkpoints)
            available = "there is no checkpoint yet"
            if newest is not None:
                available = f"last checkpoint is step {checkpoints.checkpoint_step(newest)}"
            text += f"; Ctrl-C again: leave now, {available}"
        # the cursor may be at the end of a progress bar
        print(f"\n{text}\n", end="", file=sys.stderr)
        with suppress(UserError):  # a full disk; the next event of the main thread raises the error
            self.events.write("stopping", step=self.step, reason=signal_name, text=text)

    # around a step

    def fetch_data(self, stop: StopFlag) -> str | None:
        """Wait for data of the next step; return the reason to end the run if they are missing."""
        if self._feed is None:
            return None
        if self.step % self.config.rollout.steps_per_round == 0:
            self.work.begin("round", f"the responses under way, before step {self.step + 1}")
        return self._feed.prepare_data(self, lambda: stop.reason is not None)

    def finish_data(self, stop: StopFlag) -> str | None:
        """Finish the feed's work after the last step; return a reason to end the run before."""
        return None if self._feed is None else self._feed.finish(self, lambda: stop.reason is not None)

    def inject_faults(self) -> None:
        """Trigger `--inject` faults that are due in the next step."""
        step, faults = self.step + 1, self.guards.faults
        faults.record_events(self.events)
        faults.trigger("step", step)
        fault = faults.take_due("bitflip", "step", step)
        if fault is not None:
            first_matrix = next(p for p in self.model.parameters() if p.dim() == 2)
            replica_checks.flip_bit(get_raw_data(first_matrix), fault.options.get("bit"))

    def probe_gradients(self, batch: GlobalBatch) -> None:
        """Compute a micro-batch's gradients twice if `guards.probe_every_steps` is due. Collective.

        Raises `SilentCorruption` if a rank's results differ and `guards.on_sdc` is "exit".
        """
        step = self.step + 1
        if self.guards.sdc.is_probe_due(step):
            compute = partial(self.forward_backward.compute_local_gradients, batch, self.objective, step)
            self.guards.sdc.compare_repetition(step, self.model, compute, self.events)

    def observe_step(self) -> torch.Tensor | None:
        """Run the guards that are due after a learned step. Collective.

        Returns [layers, experts]: tokens routed to each expert, or None if the step is not recorded.
        """
        self.guards.check_step(self.step, self.expert_load, self.events)
        return self.expert_load.gather() if self.recorder.is_due(self.step) else None

    # evaluation and checkpoints

    def evaluate(self) -> dict[str, HeldoutLoss]:
        """Record each source's held-out loss and expert load."""
        self.work.begin("evaluation", f"the evaluation at step {self.step}")
        if self._evaluator is None:
            self._evaluator = HeldoutEvaluator.from_config(self.config, self.sources,
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
        """Start writing a checkpoint; it is complete on return only if `train.async_save` is off."""
        # before the write: a rollback to a checkpoint of corrupt weights would restore them
        self.guards.sdc.compare_replicas(self.step, self.model, self.events)
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
        """Return the run's working time in seconds, summed over restarts."""
        return self.state.wall_s + time.monotonic() - self._entered_s

    def finish_after_error(self) -> None:
        """Complete the outstanding checkpoint without a collective, which would wait for dead ranks."""
        self.guards.watchdog.close()
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
    """The loop's current work, such as a step, and durations of earlier work."""

    def __init__(self) -> None:
        self._name, self._kind, self._began_s = "the start of the run", "start", time.monotonic()
        self._durations_s: dict[str, deque[float]] = {}

    def begin(self, kind: str, name: str) -> None:
        """Begin work `name` ("step 7") and end the previous work, unless both have one name.

        Work of one `kind` ("step", "evaluation") is expected to take equal time.
        """
        if name == self._name:
            return
        now_s = time.monotonic()
        self._durations_s.setdefault(self._kind, deque(maxlen=MAX_TIMINGS)).append(now_s - self._began_s)
        self._name, self._kind, self._began_s = name, kind, now_s

    def describe(self) -> str:
        """Format the current work with its remaining time, as "step 7 (about 4 min 10 s)"."""
        durations_s = sorted(self._durations_s.get(self._kind, ()))
        if not durations_s:
            return f"{self._name} (the first {self._kind}: its time is not known yet)"
        # the upper quartile, so that most work ends earlier than predicted
        remaining_s = durations_s[3 * len(durations_s) // 4] - (time.monotonic() - self._began_s)
        return f"{self._name} (about {format_duration(max(1.0, remaining_s))})"


def _initialize_weights(model: LanguageModel, config: RunConfig, whole_model: bool) -> None:
    """Draw initial weights for the whole model, or for new adapters and encoders only."""
    only = "" if whole_model else (PREFIX, *ENCODERS)
    initial_weights.initialize_weights(model, config.model, config.train.seed, only=only)
    if whole_model:
        load_encoder_weights(model, config)
